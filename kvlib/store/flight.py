# SPDX-License-Identifier: Apache-2.0
"""Single flight: concurrent calls for one thing become one call."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["SingleFlight"]

T = TypeVar("T")


class SingleFlight:
    """At most one call per key at a time; the others wait for its result."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Future[object]] = {}

    def run(self, key: Hashable, call: Callable[[], T]) -> tuple[T, bool]:
        """The call's result, and whether it was shared with a call already under way."""
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = Future()
        if not mine:
            return flight.result(), True  # type: ignore[return-value]
        try:
            result = call()
        except BaseException as exc:
            flight.set_exception(exc)
            raise
        else:
            flight.set_result(result)
            return result, False
        finally:
            with self._lock:
                del self._flights[key]
