# SPDX-License-Identifier: Apache-2.0
"""H2O: heavy hitters and recent tokens (arXiv 2306.14048, section 4 and algorithm 1).

Every entry has a score: the attention it has received so far, summed over queries. The budget is
shared between the most recent entries and, of the others, those with the highest scores. Scores go
on growing in every step, and as soon as a head holds more than its budget the lowest-scoring entry
outside the recent part is dropped: one per step of one token.

The prompt is processed densely and evicted once at its end, with the sums over all its queries, as
in the authors' code that really drops entries. With `prefill=streaming`, a prompt that comes in
pieces is evicted after each of them, as after a step; with pieces of one token that is algorithm 1
to the letter.

Scores of the query heads that share a KV head are added up. Early tokens have had more queries than
late ones, and sums are not normalised for that: so the method is defined.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import (
    by_entry,
    by_row,
    check_budget,
    keeps_all,
    reduce_group,
    share_of,
)

__all__ = ["H2O"]


@dataclass(frozen=True, slots=True)
class H2O(ScoredPolicy):
    """Accumulated attention.

    Args:
        budget: entries per head: a fraction of the prompt or a number of tokens.
        recent: share of the budget for the most recent entries, the current token included;
            rounded up to whole entries.
        prefill: dense or streaming. Streaming needs a budget in tokens, and
            ``KVCache(..., prefill_chunk_size=)`` for pieces.
    """

    budget: float | int = 0.5
    recent: float = 0.5
    prefill: str = "dense"
    name: ClassVar[str] = "h2o"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "A few heavy hitters receive most of the attention. Every entry's score is the "
            "attention it has received so far, summed over queries. The budget is shared "
            "between the highest scores and the most recent entries, and each new token "
            "pushes out the lowest."
        ),
        when="at the end of the prompt and in every step",
        cost="column sums: one more Q K^T over the prompt; 4 bytes an entry and KV head",
        paper=(
            "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, arXiv "
            "2306.14048; FMInference/H2O"
        ),
        differs=(
            "Scores of a KV head are summed over its query heads (the paper has no groups). "
            "The prompt is evicted once at its end, as in the code that really drops entries; "
            "the released evaluation script masks with sums over future queries, which is not "
            "the definition."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if not 0 <= self.recent <= 1:
            raise ConfigError(f"h2o: recent is a share in [0, 1], got {self.recent}")
        if self.prefill not in ("dense", "streaming"):
            raise ConfigError(f"h2o: prefill is dense or streaming, got {self.prefill!r}")
        if self.prefill == "streaming" and isinstance(self.budget, float) and self.budget < 1:
            raise ConfigError(
                f"h2o: prefill=streaming evicts before the prompt's length is known: give the "
                f"budget in tokens, not {self.budget}"
            )

    @property
    def needs(self) -> Needs:
        """Column sums, always."""
        wanted = not keeps_all(self.budget)
        return Needs(
            prefill_column_sums=wanted,
            step_column_sums=wanted,
            prefill_plans=wanted and self.prefill == "streaming",
        )

    def protected(self, budget: int) -> Protect:
        """The most recent entries."""
        return Protect(window=share_of(self.recent, budget))

    def observe(self, view: LayerView) -> None:
        """Add what the pass's queries looked at."""
        if view.column_sums is None:
            return
        received = by_entry(reduce_group(view.column_sums, "sum"), view.layer)
        scores = view.state.entries.get("scores")
        view.state.entries["scores"] = received if scores is None else scores + received

    def scores(self, view: LayerView) -> Tensor:
        """Attention received so far."""
        return by_row(view.state.entries["scores"], view.layer)
