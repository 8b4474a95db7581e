# SPDX-License-Identifier: Apache-2.0
"""Joint allocation: all heads of all layers compete for one budget (KVzip's level "pair").

An allocator, for scorers whose numbers compare between layers (arXiv 2505.23416, non-uniform
head budgets): the highest-scored entries of the whole model stay, wherever they are. Protected ones
stay in every head and do not compete. With `floor`, a head's number is drawn towards the uniform
share as in `adakv`. Of equal scores the earlier layer's wins, then the earlier head's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.adakv import share_out
from kvlib.eviction.base import LayerView
from kvlib.eviction.scored import Protect

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
    whole_model: ClassVar[bool] = True
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"joint: floor is a share in [0, 1], got {self.floor}")

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """See `Allocator`."""
        return share_out(views, scores, budgets, protect, self.floor)
