# SPDX-License-Identifier: Apache-2.0
"""SnapKV: what the end of the prompt looks at (arXiv 2404.14469, section 4).

At the end of the prompt, and only then: the attention that the last `window` queries pay to every
earlier token is summed over those queries, pooled over neighbouring positions (so that a token
brings its context along), and the highest `budget - window` tokens of each head stay, with the
window itself. Later tokens are all kept.

The paper decides per query head. Here a KV head decides once, for the queries that share it: pooled
scores are averaged over the group (`group=mean`) or the highest counts (`group=max`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget, check_group, keeps_all, reduce_group

__all__ = ["SnapKV"]


@dataclass(frozen=True, slots=True)
class SnapKV(ScoredPolicy):
    """Observation window, pooling, top-k.

    Args:
        budget: entries per head after the prompt, window included: a fraction of the prompt or a
            number of tokens. A budget below `window` keeps the last tokens only.
        window: last queries of the prompt that vote; their tokens always stay.
        kernel: positions pooled, odd; 1 for none.
        pool: avg or max.
        group: how the query heads of a KV head are reduced: mean, max or sum.
    """

    budget: float | int = 0.5
    window: int = 32
    kernel: int = 5
    pool: str = "avg"
    group: str = "mean"
    name: ClassVar[str] = "snapkv"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "The end of a prompt shows what the answer will look at. The attention of the "
            "last queries is summed, pooled over neighbouring positions, and the highest "
            "stay, with the window itself. Later tokens are all kept."
        ),
        when="once, at the end of the prompt",
        cost="one more Q K^T for the window; no state",
        paper=(
            "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469; "
            "FasterDecoding/SnapKV"
        ),
        differs=(
            "Decides once for each KV head (the code repeats keys and decides for each query "
            "head, which holds G times the memory)."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.window < 1:
            raise ConfigError(f"snapkv: window must be 1 or more, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"snapkv: kernel must be odd, got {self.kernel}")
        if self.pool not in ("avg", "max"):
            raise ConfigError(f"snapkv: pool is avg or max, got {self.pool!r}")
        check_group(self.name, self.group)

    @property
    def needs(self) -> Needs:
        """What the last queries look at."""
        window = 0 if keeps_all(self.budget) else self.window
        return Needs(query_window=window, steps=False)

    def protected(self, budget: int) -> Protect:
        """The window's own tokens."""
        return Protect(window=self.window)

    def scores(self, view: LayerView) -> Tensor:
        """Pooled votes [Hkv, S]; entries of the window have none."""
        if view.window_sums is None:
            raise ConfigError("snapkv needs the attention of the last queries, and did not get it")
        held = view.window_sums.shape[-1]
        votes = view.window_sums[..., : max(held - self.window, 0)]
        pad = self.kernel // 2
        if self.kernel == 1 or not votes.shape[-1]:
            pooled = votes
        elif self.pool == "avg":  # zeros beyond both ends, divided by the whole kernel
            pooled = torch.nn.functional.avg_pool1d(votes, self.kernel, 1, pad)
        else:
            pooled = torch.nn.functional.max_pool1d(votes, self.kernel, 1, pad)
        scores = reduce_group(pooled, self.group)
        return torch.nn.functional.pad(scores, (0, held - scores.shape[-1]))
