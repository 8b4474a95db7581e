# SPDX-License-Identifier: Apache-2.0
"""KeyDiff: keep the keys that differ from the others (arXiv 2504.15364, section 4).

In each head, the anchor is the mean of all held keys after each is scaled to length 1; an entry's
score is minus the cosine of its key with the anchor. The most typical keys go, until the budget is
met: after the prompt, and after every step. No query and no attention is looked at, so it costs one
pass over the keys, and works beside any attention kernel.

The paper bounds the prompt's memory too, by evicting after each block of it; here a prompt is
evicted once at its end, as in NVIDIA kvpress. Keys are scored as cached, rotary embedding included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from kvlib.errors import ConfigError
from kvlib.eviction.base import (
    LayerView,
    Needs,
    Plans,
    check_budget,
    keep_highest,
    keep_rows,
    tokens_to_keep,
)

__all__ = ["KeyDiff"]


@dataclass(frozen=True, slots=True)
class KeyDiff:
    """Distance from the mean key.

    Args:
        budget: entries per head: a fraction of the prompt or a number of tokens.
        window: last entries that always stay, within the budget; the paper has none.
    """

    budget: float | int = 0.5
    window: int = 0
    name: ClassVar[str] = "keydiff"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.window < 0:
            raise ConfigError(f"keydiff: window must be 0 or more, got {self.window}")

    @property
    def needs(self) -> Needs:
        """Nothing besides the keys."""
        return Needs()

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
        scores = self.scores(view.layer.keys)
        if self.window:
            scores[:, -min(self.window, budget) :] = 2  # above every cosine
        return keep_rows(keep_highest(scores, budget))

    @staticmethod
    def scores(keys: Tensor) -> Tensor:
        """Minus the cosine of each key [Hkv, S, D] with its head's anchor: float32 [Hkv, S]."""
        unit = normalize(keys.float(), dim=-1)
        anchor = normalize(unit.mean(1, keepdim=True), dim=-1)
        return -(unit * anchor).sum(-1)
