# SPDX-License-Identifier: Apache-2.0
"""Expected Attention: what queries that are still to come will look at (arXiv 2510.00636).

Before the rotary embedding, the queries of a head are taken to be normally distributed, with the
mean mu and the covariance Sigma of the prompt's own. A later query is rotated by its position; with
R, the rotation averaged over the next `future` positions, it has mean R mu and covariance
R Sigma R^T. The expectation of exp(q.k / sqrt(d)) over such queries is exp(z) with

    z = k.(R mu) / sqrt(d) + k.(R Sigma R^T k) / (2 d)

and an entry's score is (softmax(z) + eps) * |v|: how much of the output it is expected to make up.
Softmax weights are averaged over the query heads of a KV head. The first `sinks` tokens always stay
and are in neither the moments nor the softmax: their queries and keys are unlike all others.

It follows NVIDIA kvpress, by the authors, with two differences. They compute queries again from
hidden states; here those of the pass itself are turned back to position 0, which is the same. And
the scale is always 1 / sqrt(d), with d the width of a key: a model that scales its logits otherwise
or caps them (Gemma 2) is scored as if it did not, as in their code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, QueryMoments, Resources
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget, keeps_all
from kvlib.spec import RopeSpec

__all__ = ["Expected", "mean_rotation"]


@dataclass(frozen=True, slots=True)
class Expected(ScoredPolicy):
    """Attention expected of later queries, times the length of the value.

    Args:
        budget: entries per head after the prompt, sinks included: a fraction of the prompt or a
            number of tokens.
        future: positions after the prompt that the rotation is averaged over.
        sinks: first tokens that always stay, and are left out of all statistics.
        eps: added to every weight before it is multiplied with the value's length; the larger, the
            more the value counts. The authors use 0.02 with Ada-KV.
        covariance: whether the spread of the queries counts, or only their mean.
        norm: whether weights are multiplied with the length of the value.
    """

    budget: float | int = 0.5
    future: int = 512
    sinks: int = 4
    eps: float = 0.0
    covariance: bool = True
    norm: bool = True
    name: ClassVar[str] = "expected"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "Later queries will be distributed like the prompt's, but for their positions. Mean "
            "and covariance of the prompt's queries, rotated to the positions that come next, "
            "give in closed form the attention that each key can expect. Those with the highest "
            "expected attention times length of the value stay, with the first tokens; later "
            "tokens are all kept."
        ),
        when="once, at the end of the prompt",
        cost="D^2 multiplications for each key and query head, once; no state",
        paper=(
            "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
            "Distribution, arXiv 2510.00636; NVIDIA/kvpress"
        ),
        differs=(
            "Takes queries from the pass itself and turns them back, where kvpress computes them "
            "again from hidden states; the same scores."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.future < 1:
            raise ConfigError(f"expected: future must be 1 position or more, got {self.future}")
        if self.sinks < 0:
            raise ConfigError(f"expected: sinks must be 0 or more, got {self.sinks}")
        if not 0 <= self.eps < math.inf:
            raise ConfigError(f"expected: eps must be 0 or more, got {self.eps}")

    @property
    def needs(self) -> Needs:
        """Moments of the prompt's queries but those of the sinks."""
        wanted = None if keeps_all(self.budget) else self.sinks
        return Needs(query_moments=wanted, steps=False)

    def check(self, resources: Resources) -> None:
        """Refuse a rotary embedding whose frequencies depend on the length of the sequence."""
        if keeps_all(self.budget):
            return
        for rope in resources.ropes:
            if rope is not None:
                _frequencies(rope)

    def protected(self, budget: int) -> Protect:
        """The first tokens."""
        return Protect(sinks=self.sinks)

    def scores(self, view: LayerView) -> Tensor:
        """Expected share of the output [Hkv, S]; sinks have none."""
        moments = view.query_moments
        if moments is None:
            raise ConfigError("expected needs the moments of the prompt's queries, and got none")
        rows = view.layer.rows()
        mean, spread = self._later(moments, view.rope, view.num_seen)
        mean = mean.unflatten(0, (len(rows), -1))  # [Hkv, G, D]
        spread = spread.unflatten(0, (len(rows), -1))  # [Hkv, G, D, D]
        scores = []
        for head, row in enumerate(rows):  # one at a time: the products are G times the keys
            keys, values = row.keys[self.sinks :].float(), row.values[self.sinks :].float()
            weights = self._logits(keys, mean[head], spread[head]).softmax(-1).mean(0)
            mine = (weights + self.eps) * values.norm(dim=-1) if self.norm else weights
            unscored = len(row.keys) - len(keys)
            scores.append(torch.nn.functional.pad(mine, (unscored, 0)))
        return torch.nn.utils.rnn.pad_sequence(scores, batch_first=True)

    def _later(
        self, moments: QueryMoments, rope: RopeSpec | None, start: int
    ) -> tuple[Tensor, Tensor]:
        """Mean [Hq, D] and covariance [Hq, D, D] of the queries from position `start` on."""
        if rope is None:
            return moments.mean, moments.covariance
        turn = mean_rotation(rope, moments.mean.shape[-1], start, self.future)
        turn = turn.to(moments.mean.device)
        mean = moments.mean.double() @ turn.T
        spread = turn @ moments.covariance.double() @ turn.T
        return mean.float(), spread.float()

    def _logits(self, keys: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
        """The z [G, n] of keys [n, D] under means [G, D] and covariances [G, D, D]."""
        width = keys.shape[-1]
        logits = mean @ keys.T / math.sqrt(width)
        if self.covariance:
            logits += ((keys @ spread) * keys).sum(-1) / (2 * width)
        return logits


def mean_rotation(rope: RopeSpec, width: int, start: int, num: int) -> Tensor:
    """The rotary embedding of positions start .. start + num - 1, averaged: float64 [D, D].

    A query q before the embedding is `mean_rotation(...) @ q` on average after it. Channels that
    are not rotated pass unchanged.

    Args:
        rope: rotary embedding of the layer.
        width: D, channels of a query.
        start: first position.
        num: how many positions.
    """
    frequencies = torch.tensor(_frequencies(rope), dtype=torch.float64)
    angles = torch.arange(start, start + num, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().mean(0), angles.sin().mean(0)
    half = torch.arange(len(frequencies))
    a, b = (2 * half, 2 * half + 1) if rope.interleaved else (half, half + len(half))
    a, b = a + rope.first_channel, b + rope.first_channel  # the two channels of each pair
    turn = torch.eye(width, dtype=torch.float64)
    turn[a, a], turn[a, b] = cos, -sin
    turn[b, a], turn[b, b] = sin, cos
    return turn


def _frequencies(rope: RopeSpec) -> list[float]:
    try:
        return rope.inverse_frequencies()
    except ConfigError as exc:
        raise ConfigError(
            f"expected cannot tell how later queries will be rotated, choose another policy: {exc}"
        ) from exc
