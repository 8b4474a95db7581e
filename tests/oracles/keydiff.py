# SPDX-License-Identifier: Apache-2.0
"""KeyDiff by its definition: loops over lists of numbers, in float64."""

import math

__all__ = ["keydiff", "scores"]


def scores(keys):
    """Minus the cosine with the mean unit key, of every key [S][D] of one head."""
    keys = [[float(x) for x in key] for key in keys]
    unit = []
    for key in keys:
        length = math.sqrt(sum(x * x for x in key))
        unit.append([x / length for x in key])
    width = len(keys[0])
    anchor = [sum(key[d] for key in unit) / len(unit) for d in range(width)]
    length = math.sqrt(sum(x * x for x in anchor))
    return [-sum(a * b for a, b in zip(key, anchor, strict=True)) / length for key in unit]


def keydiff(keys, budget, window=0):
    """Indices that stay of one head, ascending, and by how much the choice was clear.

    Args:
        keys: [S][D].
        budget: entries that stay.
        window: last ones that always do.
    """
    found = scores(keys)
    window = min(window, budget)
    free = len(keys) - window
    order = sorted(range(free), key=lambda s: (-found[s], s))
    kept, dropped = order[: budget - window], order[budget - window :]
    margin = math.inf
    if kept and dropped:
        margin = found[kept[-1]] - found[dropped[0]]
    return sorted([*kept, *range(free, len(keys))]), margin
