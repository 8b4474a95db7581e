# SPDX-License-Identifier: Apache-2.0
"""GDSF: the record whose bytes are worth least goes first."""

from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar

from kvlib.store.replacement.aged import AgedOrder
from kvlib.store.replacement.base import Clock, ReplacementState
from kvlib.store.replacement.hinted import HintedState

__all__ = ["GDSF"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GDSF:
    """Greedy dual size with frequency: K = F x worth + L.

    The worth of a use is `Hint.cost` (1 where no hint is given) for each byte. Give it what a hit
    saves: the time of computing the record less that of loading it. It is for tiers whose records
    differ in codec or model; within one prompt, a cost that grows with the position makes it worse,
    since the records at the end are the dearest and the ones that are not used again. To weigh
    otherwise, override `worth` in a subclass and register it.

    Source: Cherkasova, HP Labs HPL-98-69R1, 1998: K = L + F x C / S.
    Cost: O(log n) a use.
    """

    name: ClassVar[str] = "gdsf"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def worth(self, size: int, cost: float) -> float:
        """Of one use of a record of `size` bytes (at least 1)."""
        return cost / size

    def start(self, capacity_bytes: int, clock: Clock = monotonic) -> ReplacementState[Any]:
        """See `Replacement.start`."""
        return HintedState(self, lambda: AgedOrder(self.worth), clock)
