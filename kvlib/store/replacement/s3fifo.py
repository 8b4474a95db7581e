# SPDX-License-Identifier: Apache-2.0
"""S3-FIFO: a small queue that most records leave at once, a main queue, and a memory of ghosts."""

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Generic

from kvlib.errors import ConfigError
from kvlib.store.replacement.base import Clock, Key, ReplacementState
from kvlib.store.replacement.hinted import HintedState
from kvlib.store.replacement.queues import MAX_GHOSTS, Queue

__all__ = ["S3FIFO"]

_MOST_USES = 3  # two bits


@dataclass(frozen=True, slots=True, kw_only=True)
class S3FIFO:
    """Three FIFO queues: small, main, ghosts.

    New records enter the small queue. At its end, one that was read `promote` times goes to the
    main queue and any other is evicted and remembered as a ghost; a ghost that comes back enters
    the main queue. At the end of the main queue, a record that was read since goes round again.

    Attributes:
        small: the small queue's share of the capacity.
        promote: reads in the small queue that lead to the main queue.

    Source: Yang et al., SOSP 2023, Algorithm 1. Differs: sizes are bytes, and `promote` is 1, as in
    the authors' later code, where Algorithm 1 has 2: more blocks of the traces in
    `benchmarks/results/replay` hit with it at six of nine capacities, and fewer at two.
    Cost: a read adds to a counter; evictions are O(1) on average.
    """

    name: ClassVar[str] = "s3fifo"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    small: float = 0.1
    promote: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.small < 1:
            raise ConfigError(f"s3fifo:small is between 0 and 1, got {self.small}")
        if not 1 <= self.promote <= _MOST_USES:
            raise ConfigError(f"s3fifo:promote is 1 to {_MOST_USES}, got {self.promote}")

    def start(self, capacity_bytes: int, clock: Clock = monotonic) -> ReplacementState[Any]:
        """See `Replacement.start`."""
        return HintedState(self, lambda: _S3FIFOOrder(self, capacity_bytes), clock)


class _S3FIFOOrder(Generic[Key]):
    def __init__(self, policy: S3FIFO, capacity: int) -> None:
        self._policy = policy
        self._capacity = capacity
        self._small: Queue[Key] = Queue()
        self._main: Queue[Key] = Queue()
        self._gone: Queue[Key] = Queue()
        self._uses: dict[Key, int] = {}

    def admit(self, key: Key, size: int) -> bool:
        """See `Order.admit`."""
        return True

    def insert(self, key: Key, size: int, cost: float) -> None:
        """See `Order.insert`."""
        returns = self._gone.pop(key) is not None
        (self._main if returns else self._small).push(key, size)
        self._uses[key] = 0

    def hit(self, key: Key) -> None:
        """See `Order.hit`."""
        self._uses[key] = min(self._uses[key] + 1, _MOST_USES)

    def touch(self, key: Key) -> None:
        """See `Order.touch`. Only what nobody has read yet is put in order: the rest is a FIFO."""
        if not self._uses[key]:
            (self._small if key in self._small else self._main).renew(key)

    def remove(self, key: Key, *, evicted: bool) -> None:
        """See `Order.remove`. Only the small queue leaves ghosts."""
        del self._uses[key]
        size = self._small.pop(key)
        if size is None:
            self._main.pop(key)
        elif evicted:
            self._gone.push(key, size)
            self._forget()

    def _forget(self) -> None:
        """As many bytes of ghosts as the main queue may have."""
        most = self._capacity * (1 - self._policy.small)
        while self._gone and (self._gone.nbytes > most or len(self._gone) > MAX_GHOSTS):
            self._gone.pop_oldest()

    def victims(self, need_bytes: int, protected: Set[Key]) -> Iterator[Key]:
        """See `Order.victims`. Records change queues on the way, as in the paper's EVICT."""
        small, main = self._small, self._main
        found: list[Key] = []
        # What was looked at and stays where it is until `remove`: taken out, and put back below.
        aside_small: list[tuple[Key, int]] = []
        aside_main: list[tuple[Key, int]] = []
        pinned = freed = 0  # pinned: bytes of the small queue that cannot go
        while freed < need_bytes and (small or main):
            if small and (small.nbytes + pinned >= self._policy.small * self._capacity or not main):
                while small:
                    key, size = small.pop_oldest()
                    if self._uses[key] >= self._policy.promote:
                        self._uses[key] = 0
                        main.push(key, size)
                        continue
                    aside_small.append((key, size))
                    if key in protected:
                        pinned += size
                        continue
                    found.append(key)
                    freed += size
                    break
            else:
                key, size = main.pop_oldest()
                if self._uses[key]:
                    self._uses[key] -= 1
                    main.push(key, size)
                    continue
                aside_main.append((key, size))
                if key not in protected:
                    found.append(key)
                    freed += size
        for queue, aside in ((small, aside_small), (main, aside_main)):
            for key, size in reversed(aside):
                queue.push_oldest(key, size)
        return iter(found)

    def keys(self) -> Collection[Key]:
        """See `Order.keys`."""
        return self._uses.keys()

    def snapshot(self) -> dict[str, Any]:
        """See `Order.snapshot`."""
        return {
            "small": [[key, self._uses[key]] for key in self._small],
            "main": [[key, self._uses[key]] for key in self._main],
            "gone": self._gone.snapshot(),
        }

    def restore(self, data: Mapping[str, Any], sizes: Mapping[Key, tuple[int, float]]) -> None:
        """See `Order.restore`."""
        for name, queue in (("small", self._small), ("main", self._main)):
            for key, uses in data[name]:
                if key in self._uses or uses not in range(_MOST_USES + 1):
                    raise ValueError(f"{key!r:.80} with {uses!r:.80} uses")
                queue.push(key, sizes[key][0])
                self._uses[key] = int(uses)
        self._gone.restore(data["gone"])
        if set(self._gone) & sizes.keys():
            raise ValueError("a key in two lists")
        self._forget()
