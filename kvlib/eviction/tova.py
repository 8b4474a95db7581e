# SPDX-License-Identifier: Apache-2.0
"""TOVA: keep what the newest token looks at (arXiv 2401.06104, section 3.2).

The attention of the last query, averaged over all query heads of the layer, is the score of every
entry. The lowest go until the budget is met: after the prompt, and after every step. All heads of a
layer keep the same tokens. Nothing is remembered from step to step, and no token is safe for being
the first or the last; in practice sinks receive attention and stay.

A forward of many tokens after the prompt is one step here, decided by its last query. NVIDIA
kvpress decides once, after the prompt, and always keeps the last token: `window=1`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget, keeps_all

__all__ = ["TOVA"]


@dataclass(frozen=True, slots=True)
class TOVA(ScoredPolicy):
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
    about: ClassVar[About] = About(
        idea=(
            "In every step the last query votes. Its attention, averaged over all heads of "
            "the layer, ranks the entries, and the lowest goes. All heads of a layer keep the "
            "same entries."
        ),
        when="at the end of the prompt and in every step",
        cost="one attention row; no state",
        paper="Transformers are Multi-State RNNs, arXiv 2401.06104; schwartz-lab-NLP/TOVA",
        differs="Nothing; the protected window is ours and off.",
    )

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

    def protected(self, budget: int) -> Protect:
        """The last entries."""
        return Protect(window=self.window)

    def scores(self, view: LayerView) -> Tensor:
        """[1, S]: the last query's attention, averaged over all heads of the layer."""
        if view.window_sums is None:
            raise ConfigError("tova needs the attention of the last query, and did not get it")
        return view.window_sums.mean((0, 1))[None]
