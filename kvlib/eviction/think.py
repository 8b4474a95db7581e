# SPDX-License-Identifier: Apache-2.0
"""ThinK: thinner keys (arXiv 2407.21018, section 3).

At the end of the prompt each head loses the key channels that matter least for what the prompt's
last queries make of its keys. Keeping a set of channels changes Q K^T by the outer products of the
channels that go; the norm of one is ||Q[:, i]|| * ||K[:, i]||, so that is channel i's score (the
paper's equation 4, taken greedily). The queries are the last `window` of the prompt, after the
rotary embedding; over the query heads of a group squares add up, which is the same norm for the
whole group. The lowest int(ratio * D) channels of each head go.

Pruned channels are gone from memory, and attention reads narrower keys. The last `recent` keys stay
whole, and so do all later ones. It prunes what a token policy has left:
``snapkv:budget=0.25+think:ratio=0.4``.

The authors' code decides per query head, after repeating keys, and so holds a group's keys several
times. NVIDIA kvpress zeroes channels of all keys, recent ones too, and frees nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Plans
from kvlib.eviction.compose import ChannelPolicy
from kvlib.eviction.select import keep_highest
from kvlib.plans import KeepChannels

__all__ = ["ThinK"]


@dataclass(frozen=True, slots=True)
class ThinK(ChannelPolicy):
    """Query-driven pruning of key channels.

    Args:
        ratio: share of the channels that go, in [0, 1); int(ratio * D) of D channels.
        window: last queries of the prompt that decide.
        recent: last entries of the prompt whose keys stay whole.
    """

    ratio: float = 0.4
    window: int = 32
    recent: int = 32
    name: ClassVar[str] = "think"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "Not only tokens, also the channels of keys are redundant. A channel's score is the "
            "norm of its part of Q K^T for the last queries of the prompt; the lowest go. Recent "
            "keys stay whole, and tokens are another policy's business."
        ),
        when="once, at the end of the prompt, after the token policy",
        cost="O((window + S) D) once; int64 per kept channel and head",
        paper="ThinK: Thinner Key Cache by Query-Driven Pruning, arXiv 2407.21018; "
        "SalesforceAIResearch/ThinK",
        differs=(
            "Decides once for each KV head, over the whole group (the code repeats keys and "
            "decides for each query head). Value channels are never pruned."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not 0 <= self.ratio < 1:
            raise ConfigError(
                f"think: ratio is the share of channels that go, in [0, 1), got {self.ratio}"
            )
        if self.window < 1 or self.recent < 0:
            raise ConfigError(
                f"think: window must be 1 or more and recent 0 or more, got {self.window} and "
                f"{self.recent}"
            )

    @property
    def needs(self) -> Needs:
        """The last queries themselves."""
        return Needs(last_queries=self.window if self.ratio else 0, steps=False)

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Prune every layer that has entries beyond the recent ones."""
        return [self._plan(view) for view in views]

    def _plan(self, view: LayerView) -> Plans:
        width = view.layer.keys.shape[-1]
        gone = int(Fraction(str(self.ratio)) * width)  # the decimal as it is written
        if not gone or max(view.layer.lengths) <= self.recent:
            return ()
        kept = keep_highest(self.scores(view), width - gone)
        return (KeepChannels(kept, whole_tail=self.recent),)

    @staticmethod
    def scores(view: LayerView) -> Tensor:
        """Squared norm of each channel's outer product, summed over the group: float32 [Hkv, D]."""
        if view.last_queries is None:
            raise ConfigError("think needs the last queries of the prompt, and did not get them")
        queries = view.last_queries.float().unflatten(0, (view.layer.num_kv_heads, -1))
        keys = [row.keys.float().square().sum(0) for row in view.layer.rows()]
        scores: Tensor = queries.square().sum((1, 2)) * torch.stack(keys)
        return scores
