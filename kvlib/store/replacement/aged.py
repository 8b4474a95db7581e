# SPDX-License-Identifier: Apache-2.0
"""What LFU-DA and GDSF share: uses times worth, over an age that rises with every eviction."""

from collections.abc import Callable, Collection, Iterator, Mapping, Set
from typing import Any, Generic

from kvlib.store.replacement.base import Key, enough
from kvlib.store.replacement.queues import Ranked

__all__ = ["AgedOrder"]


class AgedOrder(Generic[Key]):
    """The record of the least rank goes first; rank = age + uses x worth, set when it is used.

    The age is the rank of the last record evicted: one that is not used stays where it was while
    newcomers start higher, so that no record lives on old merits.

    Args:
        worth: of one use of a record, from its size in bytes (at least 1) and its cost.
    """

    def __init__(self, worth: Callable[[int, float], float]) -> None:
        self._worth = worth
        self._age = 0.0
        self._ranks: Ranked[Key] = Ranked()
        self._records: dict[Key, tuple[int, float, int, float]] = {}  # size, worth, uses, rank

    def admit(self, key: Key, size: int) -> bool:
        """See `Order.admit`."""
        return True

    def insert(self, key: Key, size: int, cost: float) -> None:
        """See `Order.insert`."""
        self._set(key, size, self._worth(max(size, 1), cost), 1)

    def _set(self, key: Key, size: int, worth: float, uses: int) -> None:
        rank = self._age + uses * worth
        self._records[key] = size, worth, uses, rank
        self._ranks.set(key, rank)

    def hit(self, key: Key) -> None:
        """See `Order.hit`."""
        size, worth, uses, _ = self._records[key]
        self._set(key, size, worth, uses + 1)

    def touch(self, key: Key) -> None:
        """See `Order.touch`."""
        size, worth, uses, _ = self._records[key]
        self._set(key, size, worth, uses)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """See `Order.remove`."""
        rank = self._records.pop(key)[3]
        self._ranks.discard(key)
        if evicted:
            self._age = max(self._age, rank)

    def victims(self, need_bytes: int, protected: Set[Key]) -> Iterator[Key]:
        """See `Order.victims`."""
        keys = (key for _, key in self._ranks.ascending())
        return enough(keys, lambda key: self._records[key][0], need_bytes, protected)

    def keys(self) -> Collection[Key]:
        """See `Order.keys`."""
        return self._records.keys()

    def snapshot(self) -> dict[str, Any]:
        """See `Order.snapshot`."""
        ranked = self._ranks.ascending()
        return {
            "age": self._age,
            "records": [[key, self._records[key][2], rank] for rank, key in ranked],
        }

    def restore(self, data: Mapping[str, Any], sizes: Mapping[Key, tuple[int, float]]) -> None:
        """See `Order.restore`."""
        self._age = float(data["age"])
        for key, uses, rank in data["records"]:
            if key in self._records or int(uses) < 1 or not float(rank) >= 0:
                raise ValueError(f"{key!r:.80} with {uses!r:.80} uses")
            size, cost = sizes[key]
            worth = self._worth(max(size, 1), cost)
            self._records[key] = size, worth, int(uses), float(rank)
            self._ranks.set(key, float(rank))
