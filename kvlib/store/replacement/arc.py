# SPDX-License-Identifier: Apache-2.0
"""ARC: a list of what was used once and one of what was used again, and a border that learns."""

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Generic

from kvlib.store.replacement.base import Clock, Key, ReplacementState, enough
from kvlib.store.replacement.hinted import HintedState
from kvlib.store.replacement.queues import MAX_GHOSTS, Queue

__all__ = ["ARC"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ARC:
    """Adaptive replacement cache.

    T1 holds what was used once, T2 what was used again, both in order of use; B1 and B2 remember
    what was evicted from them. A record that comes back while B1 remembers it says that T1 was too
    small, one in B2 that T2 was: the target p of T1's bytes moves.

    Source: Megiddo and Modha, FAST 2003, Fig. 4. Differs: |T1|, |T2|, |B1|, |B2|, c and p are
    bytes; p moves by the size of the record, times the same ratio, and REPLACE runs until the
    record fits. With records of one size it is the paper's, hit for hit.
    Cost: a few dictionary operations a use; remembers at most as many bytes' worth of keys that
    are gone as it holds.
    """

    name: ClassVar[str] = "arc"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def start(self, capacity_bytes: int, clock: Clock = monotonic) -> ReplacementState[Any]:
        """See `Replacement.start`."""
        return HintedState(self, lambda: _ARCOrder(capacity_bytes), clock)


class _ARCOrder(Generic[Key]):
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._once: Queue[Key] = Queue()  # T1
        self._again: Queue[Key] = Queue()  # T2
        self._gone_once: Queue[Key] = Queue()  # B1
        self._gone_again: Queue[Key] = Queue()  # B2
        self._target = 0.0  # p
        self._coming: Key | None = None  # admitted, not inserted yet: it has moved the target

    def admit(self, key: Key, size: int) -> bool:
        """See `Order.admit`. Cases II and III: a ghost moves the target before room is made."""
        gone_once, gone_again = self._gone_once, self._gone_again
        if key in gone_once:
            ratio = max(gone_again.nbytes / max(gone_once.nbytes, 1), 1.0)
            self._target = min(self._target + size * ratio, float(self._capacity))
        elif key in gone_again:
            ratio = max(gone_once.nbytes / max(gone_again.nbytes, 1), 1.0)
            self._target = max(self._target - size * ratio, 0.0)
        self._coming = key
        return True

    def insert(self, key: Key, size: int, cost: float) -> None:
        """See `Order.insert`."""
        if self._coming != key:
            self.admit(key, size)
        self._coming = None
        if self._gone_once.pop(key) is None and self._gone_again.pop(key) is None:
            self._once.push(key, size)
        else:
            self._again.push(key, size)
        self._forget()

    def _forget(self) -> None:
        """Case IV: T1 and B1 have at most c bytes together, and all four lists 2 c."""
        once, gone_once, gone_again = self._once, self._gone_once, self._gone_again
        while gone_once and (
            once.nbytes + gone_once.nbytes > self._capacity or len(gone_once) > MAX_GHOSTS
        ):
            gone_once.pop_oldest()
        held = once.nbytes + self._again.nbytes
        while gone_again and (
            held + gone_once.nbytes + gone_again.nbytes > 2 * self._capacity
            or len(gone_again) > MAX_GHOSTS
        ):
            gone_again.pop_oldest()

    def hit(self, key: Key) -> None:
        """See `Order.hit`. Case I."""
        size = self._once.pop(key)
        if size is None:
            self._again.renew(key)
        else:
            self._again.push(key, size)

    def touch(self, key: Key) -> None:
        """See `Order.touch`."""
        (self._once if key in self._once else self._again).renew(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """See `Order.remove`."""
        for held, gone in ((self._once, self._gone_once), (self._again, self._gone_again)):
            size = held.pop(key)
            if size is not None and evicted:
                gone.push(key, size)
                if len(gone) > MAX_GHOSTS:
                    gone.pop_oldest()

    def victims(self, need_bytes: int, protected: Set[Key]) -> Iterator[Key]:
        """See `Order.victims`."""
        return enough(self._replace(protected), self._size, need_bytes, protected)

    def _replace(self, protected: Set[Key]) -> Iterator[Key]:
        """REPLACE, again and again, as if what it has named were gone."""
        once = (key for key in self._once if key not in protected)
        again = (key for key in self._again if key not in protected)
        first, other = next(once, None), next(again, None)
        left = self._once.nbytes
        from_again = self._coming in self._gone_again
        while first is not None or other is not None:
            over = left > self._target or (from_again and left == self._target)
            if first is not None and (over or other is None):
                left -= self._once.size(first)
                yield first
                first = next(once, None)
            elif other is not None:
                yield other
                other = next(again, None)

    def _size(self, key: Key) -> int:
        return (self._once if key in self._once else self._again).size(key)

    def keys(self) -> Collection[Key]:
        """See `Order.keys`."""
        return [*self._once, *self._again]

    def snapshot(self) -> dict[str, Any]:
        """See `Order.snapshot`."""
        return {
            "once": list(self._once),
            "again": list(self._again),
            "gone_once": self._gone_once.snapshot(),
            "gone_again": self._gone_again.snapshot(),
            "target": self._target,
        }

    def restore(self, data: Mapping[str, Any], sizes: Mapping[Key, tuple[int, float]]) -> None:
        """See `Order.restore`."""
        self._once.restore((key, sizes[key][0]) for key in data["once"])
        self._again.restore((key, sizes[key][0]) for key in data["again"])
        self._gone_once.restore(data["gone_once"])
        self._gone_again.restore(data["gone_again"])
        ghosts = {*self._gone_once, *self._gone_again}
        if len(ghosts) < len(self._gone_once) + len(self._gone_again) or ghosts & sizes.keys():
            raise ValueError("a key in two lists")
        self._target = min(max(float(data["target"]), 0.0), float(self._capacity))
        self._forget()
