# SPDX-License-Identifier: Apache-2.0
"""What every adapter does alike: end its errors as misses, and refuse an engine nobody tested."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from kvlib.errors import EngineVersionError

__all__ = ["Versions", "guarded"]

_LOG = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class _Counting(Protocol):
    counts: Counter[str]


def guarded(default: Callable[[], Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The one place where errors end: as a miss, counted in `counts` and logged.

    Args:
        default: what a method answers that failed.
    """

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return method(*args, **kwargs)
            except Exception:  # noqa: BLE001
                counts = cast("_Counting", args[0]).counts
                counts["errors"] += 1
                if counts["errors"] <= 10 or counts["errors"] % 1000 == 0:
                    _LOG.exception("kvlib: %s failed; going on without it", method.__name__)
                return cast("T", default())

        return call

    return decorate


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of an engine that were tested.

    Attributes:
        engine: its name, as people write it.
        first: the first one.
        end: the first one after it that was not tested.
    """

    engine: str
    first: tuple[int, ...]
    end: tuple[int, ...]

    def __str__(self) -> str:
        """For a message."""
        first, end = (".".join(map(str, numbers)) for numbers in (self.first, self.end))
        return f"{first} up to but not including {end}"

    def supports(self, version: str) -> bool:
        """Whether a version is one that was tested."""
        parts = version.split("+")[0].split(".")[: len(self.first)]
        try:
            numbers = tuple(int(part) for part in parts)
        except ValueError:
            return False
        return self.first <= numbers < self.end

    def check(self, version: str) -> None:
        """Refuse another one.

        Raises:
            EngineVersionError: naming both.
        """
        if not self.supports(version):
            raise EngineVersionError(
                f"this is {self.engine} {version}; this version of kvlib was tested with "
                f"{self.engine} {self}. Install one of those, or another kvlib"
            )
