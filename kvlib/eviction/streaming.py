# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: attention sinks and a sliding window (arXiv 2309.17453, section 3.2).

Every layer and head keeps the first `sinks` tokens and the last `budget - sinks`, at the end of the
prompt and after each step. Nothing is measured and nothing remembered.

Keys stay at their absolute positions. The paper counts positions inside the cache instead; since
RoPE logits depend on differences only, that changes nothing within the window and moves the sinks
next to it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget

__all__ = ["Streaming"]


@dataclass(frozen=True, slots=True)
class Streaming(ScoredPolicy):
    """Sinks and a window.

    Args:
        budget: entries per head, sinks included: a fraction of the prompt or a number of tokens.
        sinks: first tokens that always stay; a smaller budget keeps that many of them.
    """

    budget: float | int = 0.5
    sinks: int = 4
    name: ClassVar[str] = "streaming"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "The first few tokens draw attention whatever they say (attention sinks), and the "
            "last ones matter for what comes next. So each head keeps the sinks and a sliding "
            "window. Nothing is measured, and all between is gone for good."
        ),
        when="at the end of the prompt and in every step",
        cost="a top-k over positions",
        paper=(
            "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453; "
            "mit-han-lab/streaming-llm"
        ),
        differs=(
            "Keys stay at their absolute positions, where the paper counts positions inside "
            "the cache; RoPE logits within the window are the same."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.sinks < 0:
            raise ConfigError(f"streaming: sinks must be 0 or more, got {self.sinks}")

    @property
    def needs(self) -> Needs:
        """Nothing: positions decide."""
        return Needs()

    def protected(self, budget: int) -> Protect:
        """The sinks."""
        return Protect(sinks=self.sinks)

    def scores(self, view: LayerView) -> Tensor:
        """[1, S]: the later the better."""
        held = max(view.layer.lengths)
        return torch.arange(held, dtype=torch.float32, device=view.layer.keys.device)[None]
