# SPDX-License-Identifier: Apache-2.0
"""LFU-DA: the record used least often goes first, and merits age."""

from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar

from kvlib.store.replacement.aged import AgedOrder
from kvlib.store.replacement.base import Clock, ReplacementState
from kvlib.store.replacement.hinted import HintedState

__all__ = ["LFUDA"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LFUDA:
    """Least frequently used with dynamic ageing.

    Source: Arlitt, Cherkasova, Dilley, Friedrich and Jin, Performance Evaluation Review 27(4),
    2000: K = F + L, L being the K of the last victim. Equal K: the one used longest ago goes.
    Cost: O(log n) a use.
    """

    name: ClassVar[str] = "lfuda"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def start(self, capacity_bytes: int, clock: Clock = monotonic) -> ReplacementState[Any]:
        """See `Replacement.start`."""
        return HintedState(self, lambda: AgedOrder(lambda size, cost: 1.0), clock)
