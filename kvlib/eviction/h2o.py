# SPDX-License-Identifier: Apache-2.0
"""H2O: heavy hitters and recent tokens (arXiv 2306.14048, section 4 and algorithm 1).

Every entry has a score: the attention it has received so far, summed over queries. The budget is
shared between the most recent entries and, of the others, those with the highest scores. Scores go
on growing in every step, and as soon as a head holds more than its budget the lowest-scoring entry
outside the recent part is dropped: one per step of one token.

The prompt is processed densely and evicted once at its end, with the sums over all its queries, as
in the authors' code that really drops entries. Scores of the query heads that share a KV head are
added up. Early tokens have had more queries than late ones, and sums are not normalised for that:
so the method is defined.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import (
    LayerView,
    Needs,
    Plans,
    check_budget,
    keep_highest,
    keep_rows,
    keeps_all,
    tokens_to_keep,
)

__all__ = ["H2O"]


@dataclass(frozen=True, slots=True)
class H2O:
    """Accumulated attention.

    Args:
        budget: entries per head: a fraction of the prompt or a number of tokens.
        recent: share of the budget for the most recent entries, the current token included;
            rounded up to whole entries.
    """

    budget: float | int = 0.5
    recent: float = 0.5
    name: ClassVar[str] = "h2o"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if not 0 <= self.recent <= 1:
            raise ConfigError(f"h2o: recent is a share in [0, 1], got {self.recent}")

    @property
    def needs(self) -> Needs:
        """Column sums, always."""
        wanted = not keeps_all(self.budget)
        return Needs(prefill_column_sums=wanted, step_column_sums=wanted)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Add what the chunk's queries looked at."""
        self._accumulate(view)

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Down to the budget in one go."""
        return [self._plan(view) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Add what the step's queries looked at; drop what exceeds the budget."""
        for view in views:
            self._accumulate(view)
        return [self._plan(view) for view in views]

    def _accumulate(self, view: LayerView) -> None:
        if view.column_sums is None:
            return
        received = view.column_sums.sum(1)
        scores = view.state.entries.get("scores")
        view.state.entries["scores"] = received if scores is None else scores + received

    def _plan(self, view: LayerView) -> Plans:
        budget = tokens_to_keep(view, self.budget)
        held = view.layer.lengths[0]
        if budget is None or held <= budget:
            return ()
        recent = math.ceil(Fraction(str(self.recent)) * budget)  # the decimal as it is written
        candidates = view.state.entries["scores"][:, : held - recent]
        heavy = self._heavy(candidates, budget - recent)
        last = torch.arange(held - recent, held, device=heavy.device)
        return keep_rows(torch.cat([heavy, last.expand(len(heavy), -1)], dim=1))

    def _heavy(self, scores: Tensor, num: int) -> Tensor:
        """Indices [Hkv, num] of the heaviest; of equal ones the earlier stays."""
        held = scores.shape[1]
        if num != held - 1:
            return keep_highest(scores, num)
        drop = held - 1 - scores.flip(1).argmin(1, keepdim=True)  # the last of the lowest
        index = torch.arange(num, device=scores.device).expand(len(scores), -1)
        return index + (index >= drop)
