# SPDX-License-Identifier: Apache-2.0
"""SnapKV: what the end of the prompt looks at (arXiv 2404.14469, section 4).

At the end of the prompt, and only then: the attention that the last `window` queries pay to every
earlier token is summed over those queries, pooled over neighbouring positions (so that a token
brings its context along), and the highest `budget - window` tokens of each head stay, with the
window itself. Later tokens are all kept.

The paper decides per query head. Here a KV head decides once, for the queries that share it: pooled
scores are averaged over the group (`group=mean`) or the highest counts (`group=max`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import (
    LayerView,
    Needs,
    Plans,
    check_budget,
    keep_highest,
    keep_rows,
    keeps_all,
    tokens_to_keep,
)

__all__ = ["SnapKV"]


@dataclass(frozen=True, slots=True)
class SnapKV:
    """Observation window, pooling, top-k.

    Args:
        budget: entries per head after the prompt, window included: a fraction of the prompt or a
            number of tokens. A budget below `window` keeps the last tokens only.
        window: last queries of the prompt that vote; their tokens always stay.
        kernel: positions pooled, odd; 1 for none.
        pool: avg or max.
        group: how the query heads of a KV head are reduced: mean or max.
    """

    budget: float | int = 0.5
    window: int = 32
    kernel: int = 5
    pool: str = "avg"
    group: str = "mean"
    name: ClassVar[str] = "snapkv"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.window < 1:
            raise ConfigError(f"snapkv: window must be 1 or more, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"snapkv: kernel must be odd, got {self.kernel}")
        if self.pool not in ("avg", "max"):
            raise ConfigError(f"snapkv: pool is avg or max, got {self.pool!r}")
        if self.group not in ("mean", "max"):
            raise ConfigError(f"snapkv: group is mean or max, got {self.group!r}")

    @property
    def needs(self) -> Needs:
        """What the last queries look at."""
        window = 0 if keeps_all(self.budget) else self.window
        return Needs(query_window=window, steps=False)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Nothing to note."""

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """The window and the tokens it looks at most."""
        return [self._plan(view) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """No plans: later tokens stay."""
        return [() for _ in views]

    def _plan(self, view: LayerView) -> Plans:
        budget = tokens_to_keep(view, self.budget)
        held = view.layer.lengths[0]
        if budget is None or held <= budget:
            return ()
        window = min(self.window, budget)
        scores = torch.full((view.layer.num_kv_heads, held), torch.inf)
        scores = scores.to(view.layer.keys.device)  # infinite: the window's own tokens
        if window < held:
            scores[:, : held - window] = self.scores(view, held - window)
        return keep_rows(keep_highest(scores, budget))

    def scores(self, view: LayerView, num: int) -> Tensor:
        """Pooled scores [Hkv, num] of the first `num` entries."""
        if view.window_sums is None:
            raise ConfigError("snapkv needs the attention of the last queries, and did not get it")
        votes = view.window_sums[..., :num]
        pad = self.kernel // 2
        if self.kernel == 1:
            pooled = votes
        elif self.pool == "avg":  # zeros beyond both ends, divided by the whole kernel
            pooled = torch.nn.functional.avg_pool1d(votes, self.kernel, 1, pad)
        else:
            pooled = torch.nn.functional.max_pool1d(votes, self.kernel, 1, pad)
        return pooled.mean(1) if self.group == "mean" else pooled.amax(1)
