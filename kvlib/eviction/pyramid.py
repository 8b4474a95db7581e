# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: lower layers keep more (arXiv 2406.02069, section 4.2).

An allocator: with M entries per head on average, of which the protected window w stays in every
layer, the first layer keeps 2(M - w) - (M - w)/beta entries besides w, the last (M - w)/beta, and
those between lie on a straight line. The paper's scorer is SnapKV's: ``pyramid`` alone is
``snapkv+pyramid``.

If the first layer would keep more than there is, it keeps everything and the last one gets the rest
of the slope, as in the authors' code. They cut fractions off and lose entries, and fall back to a
uniform budget where the prompt is shorter than 2(M - w); here the layers' numbers always sum to
exactly L * M.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView
from kvlib.eviction.scored import Protect
from kvlib.eviction.select import largest_remainder

__all__ = ["Pyramid"]


@dataclass(frozen=True, slots=True)
class Pyramid:
    """A budget that falls linearly from the first layer to the last.

    Args:
        beta: the last layer keeps 1 / beta of the average, besides protected entries; 1 or more,
            1 is uniform. The authors use 20.
    """

    beta: float = 20.0
    name: ClassVar[str] = "pyramid"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    whole_model: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 1 <= self.beta < math.inf:
            raise ConfigError(f"pyramid: beta must be 1 or more, got {self.beta}")

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """See `Allocator`."""
        out = []
        for view, budget in zip(views, budgets, strict=True):
            kept = sum(protect.within(budget))
            free = max(view.layer.lengths) - kept
            mine = self.layers(budget - kept, free, view.num_layers)[view.place]
            out.append([kept + mine] * view.layer.num_kv_heads)
        return out

    def layers(self, average: int, available: int, num_layers: int) -> list[int]:
        """Unprotected entries per head for each layer.

        Args:
            average: entries per layer on average.
            available: entries that there are.
            num_layers: L.
        """
        if num_layers == 1:
            return [average]
        last = average / Fraction(str(self.beta))  # the decimal as it is written
        first = min(2 * average - last, Fraction(available))
        last = 2 * average - first
        step = (first - last) / (num_layers - 1)
        slope = [first - step * place for place in range(num_layers)]
        return largest_remainder(slope, average * num_layers)
