# SPDX-License-Identifier: Apache-2.0
"""ThinK by its definition: Frobenius norms of outer products, in float64."""

import math
from fractions import Fraction

import numpy as np

__all__ = ["channel_scores", "think"]


def channel_scores(queries, keys):
    """The norm that pruning each channel takes from Q K^T, for one KV head.

    Args:
        queries: [G][w, D], last queries of each query head of the group.
        keys: [S, D].
    """
    width = keys.shape[1]
    out = []
    for i in range(width):
        total = 0.0
        for q in queries:
            lost = np.outer(np.float64(q[:, i]), np.float64(keys[:, i]))
            total += float((lost**2).sum())
        out.append(math.sqrt(total))
    return out


def think(queries, keys, ratio):
    """Channels that stay of one head, ascending, and by how much the choice was clear.

    Args:
        queries: see `channel_scores`.
        keys: likewise.
        ratio: as text, share of the channels that go.
    """
    scores = channel_scores(queries, keys)
    gone = int(Fraction(ratio) * len(scores))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept, dropped = order[: len(scores) - gone], order[len(scores) - gone :]
    margin = math.inf
    if dropped:
        margin = (scores[kept[-1]] - scores[dropped[0]]) / max(scores[kept[-1]], 1e-300)
    return sorted(kept), margin
