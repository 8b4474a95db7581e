# SPDX-License-Identifier: Apache-2.0
"""Random eviction: the baseline that every policy has to beat.

At the end of the prompt each head keeps tokens drawn at random, without replacement, beside the
first `sinks` and the last `window` ones; later tokens all stay. What a head keeps depends on the
seed, the layer, the head and the number of tokens alone, so a run can be repeated, and a sequence
keeps the same in any batch. A task whose evidence is one token scores the fraction kept.
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
    keep_highest,
    keep_rows,
    tokens_to_keep,
)

__all__ = ["Random"]


@dataclass(frozen=True, slots=True)
class Random:
    """Tokens drawn at random, once.

    Args:
        budget: entries per head after the prompt, sinks and window included: a fraction of the
            prompt or a number of tokens.
        sinks: first tokens that always stay.
        window: last tokens of the prompt that always stay. A budget too small for both keeps the
            sinks and the newest tokens, and nothing is drawn.
        seed: of the draw.
    """

    budget: float | int = 0.5
    sinks: int = 4
    window: int = 32
    seed: int = 0
    name: ClassVar[str] = "random"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        for name in ("sinks", "window", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"random: {name} must be 0 or more, got {getattr(self, name)}")
        if self.seed >= 2**43:
            raise ConfigError(f"random: seed must be below 2**43, got {self.seed}")

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs(steps=False)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Nothing to note."""

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Sinks, window and a draw from the rest."""
        return [self._plan(view) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """No plans: later tokens stay."""
        return [() for _ in views]

    def _plan(self, view: LayerView) -> Plans:
        budget = tokens_to_keep(view, self.budget)
        held = view.layer.lengths[0]
        if budget is None or held <= budget:
            return ()
        generator = torch.Generator().manual_seed(self.seed << 20 | view.layer.layer_idx)
        # float64: no two tokens draw the same number.
        scores = torch.rand(
            (view.layer.num_kv_heads, held), generator=generator, dtype=torch.float64
        )
        if self.window:
            last = scores[:, -self.window :]
            last[:] = torch.linspace(2, 3, last.shape[1])  # too many of them: the newest stay
        scores[:, : self.sinks] = 4
        return keep_rows(keep_highest(scores, budget).to(view.layer.keys.device))
