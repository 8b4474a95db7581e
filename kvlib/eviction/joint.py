# SPDX-License-Identifier: Apache-2.0
"""Joint allocation: all heads of all layers compete for one budget (KVzip's level "pair").

An allocator, for scorers whose numbers compare between layers (arXiv 2505.23416, non-uniform
head budgets): the highest-scored entries of the whole model stay, wherever they are. Protected ones
stay in every head and do not compete. With `floor`, a head's number is drawn towards the uniform
share as in `adakv`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.adakv import count_winners
from kvlib.eviction.base import LayerView
from kvlib.eviction.scored import Protect
from kvlib.eviction.select import largest_remainder

__all__ = ["Joint"]


@dataclass(frozen=True, slots=True)
class Joint:
    """The highest scores of the whole model.

    Args:
        floor: share of the uniform budget that every head gets anyway, in [0, 1].
    """

    floor: float = 0.0
    name: ClassVar[str] = "joint"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"joint: floor is a share in [0, 1], got {self.floor}")

    @property
    def whole_model(self) -> bool:
        """All layers together."""
        return True

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """See `Allocator`."""
        sinks, window = protect.within(min(budgets))
        kept = sinks + window
        layers = [(mine, view.layer.lengths) for view, mine in zip(views, scores, strict=True)]
        uniform = [
            n - kept for view, n in zip(views, budgets, strict=True) for _ in view.layer.lengths
        ]
        won = list(chain(*count_winners(layers, (sinks, window), sum(uniform))))
        shares = [
            (1 - self.floor) * n + self.floor * even for n, even in zip(won, uniform, strict=True)
        ]
        counts = [kept + n for n in largest_remainder(shares, sum(won))]
        out = []
        for view in views:
            heads = view.layer.num_kv_heads
            out.append(counts[:heads])
            counts = counts[heads:]
        return out
