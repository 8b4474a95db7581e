# SPDX-License-Identifier: Apache-2.0
"""Expected Attention by its definition: sums over queries and positions, in float64.

Queries are those before the rotary embedding, keys those after it. `angles` are the embedding's
radians per position, and `pairs` the two channels that each of them turns; both empty for none.
"""

import math

import numpy as np

__all__ = ["choose", "expected_logits", "expected_scores", "turned"]


def turned(vector, position, angles, pairs):
    """A vector as the rotary embedding makes it at a position."""
    out = np.array(vector, dtype=np.float64)
    for angle, (a, b) in zip(angles, pairs, strict=True):
        z = complex(vector[a], vector[b]) * complex(
            math.cos(position * angle), math.sin(position * angle)
        )
        out[a], out[b] = z.real, z.imag
    return out


def average_turn(width, positions, angles, pairs):
    """The matrix whose columns are the unit vectors, turned and averaged over positions."""
    columns = []
    for channel in range(width):
        unit = [float(c == channel) for c in range(width)]
        every = [turned(unit, position, angles, pairs) for position in positions]
        columns.append(sum(every) / len(every))
    return np.array(columns).T


def expected_logits(queries, keys, turn, *, covariance):
    """Log of the expected exp(logit) of each key, for queries [n, D] of one head."""
    width = keys.shape[1]
    mean = sum(queries) / len(queries)
    spread = sum(np.outer(q - mean, q - mean) for q in queries) / len(queries)
    mean, spread = turn @ mean, turn @ spread @ turn.T
    out = []
    for key in keys:
        z = float(key @ mean) / math.sqrt(width)
        if covariance:
            z += float(key @ spread @ key) / (2 * width)
        out.append(z)
    return out


def expected_scores(
    queries, keys, values, *, sinks, future, eps, covariance, norm, angles=(), pairs=()
):
    """Scores of the entries behind the sinks: [Hkv][S - sinks].

    Args:
        queries: [Hq, S, D] of the prompt, keys and values [Hkv, S, D].
        sinks: first tokens left out.
        future: positions from S on that are averaged over.
        eps: added to weights.
        covariance: whether it counts.
        norm: whether values count.
        angles: see the module.
        pairs: see the module.
    """
    queries, keys, values = (np.asarray(x, dtype=np.float64) for x in (queries, keys, values))
    group = len(queries) // len(keys)
    num, width = keys.shape[1:]
    turn = average_turn(width, range(num, num + future), angles, pairs)
    out = []
    for h in range(len(keys)):
        rows = []
        for g in range(group):
            mine = queries[h * group + g, sinks:]
            logits = expected_logits(mine, keys[h, sinks:], turn, covariance=covariance)
            top = max(logits)
            weights = [math.exp(z - top) for z in logits]
            rows.append([w / sum(weights) for w in weights])
        scores = []
        for s in range(num - sinks):
            weight = sum(row[s] for row in rows) / group
            length = math.sqrt(sum(float(x) ** 2 for x in values[h, sinks + s]))
            scores.append((weight + eps) * length if norm else weight)
        out.append(scores)
    return out


def choose(scores, sinks, budget):
    """Kept indices of each head, the sinks among them, and the narrowest relative margin."""
    kept, margin = [], math.inf
    for row in scores:
        order = sorted(range(len(row)), key=lambda s: (-row[s], s))
        mine, rest = order[: budget - sinks], order[budget - sinks :]
        if mine and rest:
            margin = min(margin, (row[mine[-1]] - row[rest[0]]) / row[mine[-1]])
        kept.append([*range(sinks), *sorted(sinks + s for s in mine)])
    return kept, margin
