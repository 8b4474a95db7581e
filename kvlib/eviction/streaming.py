# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: attention sinks and a sliding window (arXiv 2309.17453, section 3.2).

Every layer and head keeps the first `sinks` tokens and the last `budget - sinks`, at the end of the
prompt and after each step. Nothing is measured and nothing remembered.

Keys stay at their absolute positions. The paper counts positions inside the cache instead; since
RoPE logits depend on differences only, that changes nothing within the window and moves the sinks
next to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvlib.errors import ConfigError
from kvlib.eviction.base import (
    LayerView,
    Needs,
    Plans,
    check_budget,
    keep_rows,
    tokens_to_keep,
)

__all__ = ["Streaming"]


@dataclass(frozen=True, slots=True)
class Streaming:
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

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.sinks < 0:
            raise ConfigError(f"streaming: sinks must be 0 or more, got {self.sinks}")

    @property
    def needs(self) -> Needs:
        """Nothing: positions decide."""
        return Needs()

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Nothing to note."""

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Sinks and window of the prompt."""
        return [self._plan(view) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """The window moves on."""
        return [self._plan(view) for view in views]

    def _plan(self, view: LayerView) -> Plans:
        budget = tokens_to_keep(view, self.budget)
        held = view.layer.lengths[0]  # all heads hold the same tokens
        if budget is None or held <= budget:
            return ()
        sinks = min(self.sinks, budget)
        index = torch.arange(budget, device=view.layer.keys.device)
        index[sinks:] += held - budget
        return keep_rows(index.expand(view.layer.num_kv_heads, -1))
