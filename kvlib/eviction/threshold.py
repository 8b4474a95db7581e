# SPDX-License-Identifier: Apache-2.0
"""Threshold: as many entries as deserve it, instead of a budget (arXiv 2506.05345, 2601.07891).

An allocator, for scorers whose numbers mean the same in every head, layer and prompt. Every head
keeps the entries whose score is at least tau, and those that are protected; a prompt full of
important tokens keeps more than one of small talk. So the method's budget says nothing any more
about how many entries stay, except that the fraction 1 still keeps everything; it goes on to say
how large a protected part is that the method takes as a share of it (`h2o`).

Other allocators decide how many entries a head keeps once, at the end of the prompt; this one
decides anew whenever its scorer does, so what scored low goes as soon as it is not protected any
more. A head in which nothing reaches tau keeps its best entry, for attention over nothing has no
meaning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView
from kvlib.eviction.scored import Protect

__all__ = ["Threshold"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """Whatever scores tau or more.

    Args:
        tau: the lowest score that stays, in the scorer's own measure. The authors' for `kvzap`, a
            logarithm, are from -3 to -9, by model. Sums of attention (`snapkv`) are never negative:
            with those a tau below 0 keeps everything.
    """

    tau: float = -4.0
    name: ClassVar[str] = "threshold"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    whole_model: ClassVar[bool] = False
    fixed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not math.isfinite(self.tau):
            raise ConfigError(f"threshold: tau is a finite number, got {self.tau}")

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """See `Allocator`."""
        counts = []
        for view, mine in zip(views, scores, strict=True):
            lengths = view.layer.lengths  # a row's own length, so that protection is never cut
            enough = protect.mark(mine, lengths, lengths) >= self.tau
            counts.append([max(n, 1) for n in enough.sum(1).tolist()])
        return counts
