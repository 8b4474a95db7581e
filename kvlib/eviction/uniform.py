# SPDX-License-Identifier: Apache-2.0
"""The same budget for every head of every layer.

An allocator, and what most policies do anyway; ``kvzip+uniform`` takes the place of KVzip's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.eviction.base import LayerView
from kvlib.eviction.scored import Protect

__all__ = ["Uniform"]


@dataclass(frozen=True, slots=True)
class Uniform:
    """As many entries everywhere."""

    name: ClassVar[str] = "uniform"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    whole_model: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """See `Allocator`."""
        return [[n] * view.layer.num_kv_heads for view, n in zip(views, budgets, strict=True)]
