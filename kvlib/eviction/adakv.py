# SPDX-License-Identifier: Apache-2.0
"""Ada-KV: heads of a layer share its budget by what they need (arXiv 2407.11550, algorithm 1).

An allocator, for any scorer whose numbers can be compared between heads (probabilities). Protected
entries stay in every head. Beyond them, the scores of all heads of a layer compete together for
the layer's budget; a head's share is how many of the winners are its own. It is then drawn towards
the uniform share by `floor`: (1 - floor) * won + floor * uniform, so that no head is left without.

The paper rounds each head's number by itself and may lose or gain entries; here largest remainders
are rounded up, and a layer keeps exactly its budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView
from kvlib.eviction.scored import Protect
from kvlib.eviction.select import largest_remainder

__all__ = ["AdaKV", "count_winners"]


@dataclass(frozen=True, slots=True)
class AdaKV:
    """Joint selection over the heads of a layer.

    Args:
        floor: share of the uniform budget that every head gets anyway, in [0, 1]; at 1 the
            allocation is uniform. The authors use 0.2.
    """

    floor: float = 0.2
    name: ClassVar[str] = "adakv"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"adakv: floor is a share in [0, 1], got {self.floor}")

    @property
    def whole_model(self) -> bool:
        """Each layer by itself."""
        return False

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """See `Allocator`."""
        return [
            self._share(view.layer.lengths, mine, n, protect)
            for view, mine, n in zip(views, scores, budgets, strict=True)
        ]

    def _share(
        self, lengths: Sequence[int], scores: Tensor, budget: int, protect: Protect
    ) -> list[int]:
        sinks, window = protect.within(budget)
        free = budget - sinks - window
        heads = len(lengths)
        won = count_winners([(scores, lengths)], (sinks, window), heads * free)[0]
        shares = [(1 - self.floor) * n + self.floor * free for n in won]
        return [sinks + window + n for n in largest_remainder(shares, sum(won))]


def count_winners(
    layers: Sequence[tuple[Tensor, Sequence[int]]], protected: tuple[int, int], total: int
) -> list[list[int]]:
    """How many of the `total` highest unprotected scores of all heads are each head's own.

    Ties go to the earlier layer, then head, then entry.

    Args:
        layers: scores [Hkv, S] and the length of each row, by layer.
        protected: first and last entries of each row that do not compete.
        total: winners; all entries win if there are fewer.

    Returns:
        [layers][Hkv].
    """
    sinks, window = protected
    rows = [
        scores[h, sinks : max(n - window, sinks)]
        for scores, lengths in layers
        for h, n in enumerate(lengths)
    ]
    flat = torch.cat(rows)
    owner = torch.repeat_interleave(
        torch.arange(len(rows)), torch.tensor([len(row) for row in rows])
    ).to(flat.device)
    order = torch.sort(flat, descending=True, stable=True).indices[:total]
    counts = torch.bincount(owner[order], minlength=len(rows)).tolist()
    out = []
    for _, lengths in layers:
        out.append(counts[: len(lengths)])
        counts = counts[len(lengths) :]
    return out
