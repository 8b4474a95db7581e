# SPDX-License-Identifier: Apache-2.0
"""Random eviction: the baseline that every policy has to beat.

At the end of the prompt each head keeps tokens drawn at random, without replacement, beside the
first `sinks` and the last `window` ones; later tokens all stay. What a head keeps depends on the
seed, the layer, the head and the number of tokens alone, so a run can be repeated, and a sequence
keeps the same in any batch. A task whose evidence is one token scores the fraction kept.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget

__all__ = ["Random"]


@dataclass(frozen=True, slots=True)
class Random(ScoredPolicy):
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
    about: ClassVar[About] = About(
        idea=(
            "Tokens are drawn at random, beside sinks and window. It is the baseline that a "
            "policy has to beat. A task whose evidence is one token scores the fraction kept."
        ),
        when="once, at the end of the prompt",
        cost="none",
        paper="none",
        differs="nothing to differ from",
    )

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

    def protected(self, budget: int) -> Protect:
        """Sinks and window."""
        return Protect(sinks=self.sinks, window=self.window)

    def scores(self, view: LayerView) -> Tensor:
        """A draw for every entry; in float64, no two are equal."""
        generator = torch.Generator().manual_seed(self.seed << 20 | view.layer.layer_idx)
        shape = (view.layer.num_kv_heads, max(view.layer.lengths))
        draws = torch.rand(shape, generator=generator, dtype=torch.float64)
        return draws.to(view.layer.keys.device)
