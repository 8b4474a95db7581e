# SPDX-License-Identifier: Apache-2.0
"""Ada-KV: heads of a layer share its budget by what they need (arXiv 2407.11550, algorithm 1).

An allocator, for any scorer whose numbers can be compared between heads (probabilities). Protected
entries stay in every head. Beyond them, the scores of all heads of a layer compete together for
the layer's budget; a head's share is how many of the winners are its own. It is then drawn towards
the uniform share by `floor`: (1 - floor) * won + floor * uniform, so that no head is left without.

The paper rounds each head's number by itself and may lose or gain entries; here largest remainders
are rounded up, and a layer keeps exactly its budget: of equal remainders the first head's. Of equal
scores the earlier head's wins. Where rows differ in length already, a head is never given more than
it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView
from kvlib.eviction.scored import Protect
from kvlib.eviction.select import largest_remainder

__all__ = ["AdaKV", "share_out"]


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
    whole_model: ClassVar[bool] = False
    fixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"adakv: floor is a share in [0, 1], got {self.floor}")

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """See `Allocator`."""
        return [
            share_out([view], [mine], [budget], protect, self.floor)[0]
            for view, mine, budget in zip(views, scores, budgets, strict=True)
        ]


def share_out(
    views: Sequence[LayerView],
    scores: Sequence[Tensor],
    budgets: Sequence[int],
    protect: Protect,
    floor: float,
) -> list[list[int]]:
    """Entries to keep of each head, [layers][Hkv], where all heads of the layers compete together.

    They sum to what the budgets sum to, or to all there is. The arguments are those of
    `Allocator.allocate`, and the share of the uniform budget that every head gets anyway.
    """
    rivals, kept, even = [], [], []
    for view, mine, budget in zip(views, scores, budgets, strict=True):
        lengths = view.layer.lengths
        sinks, window = protect.within(budget)
        rows = [row[sinks : max(n - window, sinks)] for row, n in zip(mine, lengths, strict=True)]
        safe = [n - len(row) for row, n in zip(rows, lengths, strict=True)]
        free = min(budget * len(lengths), sum(lengths)) - sum(safe)
        even += even_shares([len(row) for row in rows], free)
        rivals += rows
        kept += safe
    total = int(sum(even))
    part = Fraction(str(floor))  # the decimal as it is written
    won = count_winners(rivals, total)
    shares = [(1 - part) * n + part * same for n, same in zip(won, even, strict=True)]
    counts = [n + more for n, more in zip(kept, largest_remainder(shares, total), strict=True)]
    ends = accumulate(view.layer.num_kv_heads for view in views)
    return [
        counts[end - view.layer.num_kv_heads : end] for view, end in zip(views, ends, strict=True)
    ]


def even_shares(available: Sequence[int], total: int) -> list[Fraction]:
    """Equal shares of `total`, but none larger than what is available."""
    shares = [Fraction(0)] * len(available)
    left = Fraction(total)
    for done, i in enumerate(sorted(range(len(available)), key=lambda i: available[i])):
        shares[i] = min(Fraction(available[i]), left / (len(available) - done))
        left -= shares[i]
    return shares


def count_winners(rows: Sequence[Tensor], total: int) -> list[int]:
    """How many of the `total` highest scores are each row's own.

    Of equal scores the one in the earlier row wins, of one row's the earlier.
    """
    flat = torch.cat(list(rows))
    sizes = torch.tensor([len(row) for row in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), sizes).to(flat.device)
    winners = torch.sort(flat, descending=True, stable=True).indices[:total]
    counts: list[int] = torch.bincount(owner[winners], minlength=len(rows)).tolist()
    return counts
