# SPDX-License-Identifier: Apache-2.0
"""Belady's MIN: the record whose next use is furthest ahead goes first, or does not come in."""

import math
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, cast

from kvlib.store.replacement.base import Clock, Hint, Key, ReplacementState
from kvlib.store.replacement.hinted import END, HintedState
from kvlib.store.replacement.lru import LRUOrder

__all__ = ["Belady"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Belady:
    """The optimum for comparison, where every use is told with the time to the next one.

    A record without `Hint.next_use` is taken as never used again. A record that would be the next
    victim is not admitted. With records of one size no policy has more hits; with several sizes
    there may be better ones, and so there may under the rule that only leading blocks count.

    Source: Belady, IBM Systems Journal 5(2), 1966; Mattson et al., 1970 (optimality).
    Cost: O(log n) a use.
    """

    name: ClassVar[str] = "belady"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def start(self, capacity_bytes: int, clock: Clock = monotonic) -> ReplacementState[Any]:
        """See `Replacement.start`."""
        return _BeladyState(self, capacity_bytes, clock)


class _BeladyState(HintedState[Key]):
    """A state whose order holds what is never used again."""

    def __init__(self, policy: Belady, capacity: int, clock: Clock) -> None:
        super().__init__(policy, LRUOrder, clock)
        self._capacity = capacity

    def _expected(self, key: Key | object, now: float) -> float:
        record = None if key is END else self._records[cast("Key", key)]
        if record is not None and record.due is None:
            return math.inf
        return super()._expected(key, now)

    def admit(self, key: Key, size: int, hint: Hint | None = None) -> bool:
        """See `ReplacementState.admit`."""
        if self.nbytes + size <= self._capacity:
            return True
        first: Key | object = next(self.victims(1), END)
        ahead = math.inf if hint is None or hint.next_use is None else hint.next_use
        return first is END or ahead < self._expected(first, self._clock())
