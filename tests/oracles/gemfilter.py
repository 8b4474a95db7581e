# SPDX-License-Identifier: Apache-2.0
"""GemFilter's choice by its definition, in float64: one layer, the prompt's last query."""

import math

import numpy as np

__all__ = ["chosen", "pooled_products", "rotated"]


def rotated(x, position, theta=10000.0):
    """A head [D] after the rotary embedding whose channel i pairs with i + D / 2."""
    half = len(x) // 2
    out = np.zeros(len(x))
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def pooled_products(query, keys, kernel):
    """[S]: inner products, summed over query heads, then averaged; zeros lie beyond the ends.

    Args:
        query: [Hq, D], the last query; head h reads KV head h // G.
        keys: [Hkv, S, D].
        kernel: odd.
    """
    query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
    group, num = len(query) // len(keys), keys.shape[1]
    raw = [
        sum(float(query[h] @ keys[h // group, s]) for h in range(len(query))) for s in range(num)
    ]
    near = range(-(kernel // 2), kernel // 2 + 1)
    return [sum(raw[s + d] for d in near if 0 <= s + d < num) / kernel for s in range(num)]


def chosen(scores, num):
    """The last token and the `num` - 1 highest others, ascending, and the margin of the choice.

    Of equal scores the earlier token wins.
    """
    last = len(scores) - 1
    order = sorted(range(last), key=lambda s: (-scores[s], s))
    kept, dropped = order[: num - 1], order[num - 1 :]
    margin = scores[kept[-1]] - scores[dropped[0]] if kept and dropped else math.inf
    return sorted([*kept, last]), margin
