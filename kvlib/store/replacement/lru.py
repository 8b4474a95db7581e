# SPDX-License-Identifier: Apache-2.0
"""The record used longest ago goes first."""

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Generic

from kvlib.store.replacement.base import Clock, Key, ReplacementState, enough
from kvlib.store.replacement.hinted import HintedState
from kvlib.store.replacement.queues import Queue

__all__ = ["LRU", "LRUOrder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LRU:
    """Least recently used.

    As good as any policy here once a tier holds what is reused within some ten minutes, and the
    cheapest: two dictionary operations a use.
    """

    name: ClassVar[str] = "lru"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def start(self, capacity_bytes: int, clock: Clock = monotonic) -> ReplacementState[Any]:
        """See `Replacement.start`."""
        return HintedState(self, LRUOrder, clock)


class LRUOrder(Generic[Key]):
    """One queue; whatever is used becomes the newest."""

    def __init__(self) -> None:
        self._queue: Queue[Key] = Queue()

    def admit(self, key: Key, size: int) -> bool:
        """See `Order.admit`."""
        return True

    def insert(self, key: Key, size: int, cost: float) -> None:
        """See `Order.insert`."""
        self._queue.push(key, size)

    def hit(self, key: Key) -> None:
        """See `Order.hit`."""
        self._queue.renew(key)

    def touch(self, key: Key) -> None:
        """See `Order.touch`."""
        self._queue.renew(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """See `Order.remove`."""
        self._queue.pop(key)

    def victims(self, need_bytes: int, protected: Set[Key]) -> Iterator[Key]:
        """See `Order.victims`."""
        return enough(self._queue, self._queue.size, need_bytes, protected)

    def keys(self) -> Collection[Key]:
        """See `Order.keys`."""
        return self._queue.keys()

    def snapshot(self) -> dict[str, Any]:
        """See `Order.snapshot`."""
        return {"queue": list(self._queue)}

    def restore(self, data: Mapping[str, Any], sizes: Mapping[Key, tuple[int, float]]) -> None:
        """See `Order.restore`."""
        self._queue.restore((key, sizes[key][0]) for key in data["queue"])
