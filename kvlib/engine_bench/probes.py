# SPDX-License-Identifier: Apache-2.0
"""What is measured, and done to it, from inside an engine's process."""

import time
from collections.abc import Callable
from typing import Any

__all__ = ["Calls", "stall_disk", "time_calls"]

Calls = list[tuple[str, float]]
"""Name of a method and the seconds that a call of it took."""


def time_calls(cls: type, calls: Calls) -> None:
    """Note how long every call of a connector's public methods takes from now on.

    Args:
        cls: the connector's class; it is changed.
        calls: to be appended to.
    """

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                calls.append((name, time.perf_counter() - begun))

        return call

    for name, method in list(vars(cls).items()):
        plain = callable(method) and not isinstance(method, classmethod | property)
        if plain and not name.startswith("_") and name != "register_kv_caches":
            setattr(cls, name, timed(name, method))


def stall_disk(seconds: float) -> None:
    """Let everything that the disk tier is asked from now on take until `seconds` have passed."""
    from kvlib.store.blockio import SegmentFiles

    until = time.monotonic() + seconds

    def slow(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(max(0.0, until - time.monotonic()))
            return method(*args, **kwargs)

        return call

    for name in ("read", "write", "sync", "create"):
        setattr(SegmentFiles, name, slow(getattr(SegmentFiles, name)))
