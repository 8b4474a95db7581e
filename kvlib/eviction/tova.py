# SPDX-License-Identifier: Apache-2.0
"""TOVA: keep what the newest token looks at (arXiv 2401.06104, section 3.2).

The attention of the last query, averaged over all query heads of the layer, is the score of every
entry. The lowest go until the budget is met: after the prompt, and after every step. All heads of a
layer keep the same tokens. Nothing is remembered from step to step, and no token is safe for being
the first or the last; in practice sinks receive attention and stay.

A forward of many tokens after the prompt is one step here, decided by its last query. NVIDIA
kvpress decides once, after the prompt, and always keeps the last token: `window=1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

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

__all__ = ["TOVA"]


@dataclass(frozen=True, slots=True)
class TOVA:
    """Attention of the last query.

    Args:
        budget: entries per head: a fraction of the prompt or a number of tokens.
        window: last entries that always stay, within the budget; the paper has none.
    """

    budget: float | int = 0.5
    window: int = 0
    name: ClassVar[str] = "tova"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.window < 0:
            raise ConfigError(f"tova: window must be 0 or more, got {self.window}")

    @property
    def needs(self) -> Needs:
        """What the last query looks at, in every forward."""
        wanted = 0 if keeps_all(self.budget) else 1
        return Needs(query_window=wanted, step_query_window=wanted)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Nothing to note."""

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """The prompt down to the budget."""
        return [self._plan(view) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """As many as came go again, if the budget is full."""
        return [self._plan(view) for view in views]

    def _plan(self, view: LayerView) -> Plans:
        budget = tokens_to_keep(view, self.budget)
        held = view.layer.lengths[0]
        if budget is None or held <= budget:
            return ()
        if view.window_sums is None:
            raise ConfigError("tova needs the attention of the last query, and did not get it")
        scores = view.window_sums.mean((0, 1))[None]
        if self.window:
            scores[:, -min(self.window, budget) :] = 2  # above every probability
        index = keep_highest(scores, budget)
        return keep_rows(index.expand(view.layer.num_kv_heads, -1))
