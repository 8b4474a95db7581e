# SPDX-License-Identifier: Apache-2.0
"""Choosing leaves, by definition: loops over tokens in float64."""

import math

import numpy as np

__all__ = [
    "best_logits",
    "boxes",
    "chosen",
    "coded_mass",
    "infllm",
    "merged",
    "score",
]


def leaves(num, leaf):
    return [range(first, min(first + leaf, num)) for first in range(0, num, leaf)]


def boxes(keys, leaf):
    """lo and hi [n][heads][dim] of keys [heads][tokens][dim]."""
    keys = np.asarray(keys, np.float64)
    runs = leaves(keys.shape[1], leaf)
    lo = np.array([[head[list(run)].min(0) for head in keys] for run in runs])
    hi = np.array([[head[list(run)].max(0) for head in keys] for run in runs])
    return lo, hi


def score(query, lo, hi, weight):
    """q . a + weight |q| . h for one query and one box."""
    total = 0.0
    for q, a, b in zip(query, lo, hi, strict=True):
        total += float(q) * (a + b) / 2 + weight * abs(float(q)) * (b - a) / 2
    return total


def best_logits(query, keys, leaf):
    """Greatest q . k in each leaf, of one query and one head's keys."""
    logits = np.asarray(keys, np.float64) @ np.asarray(query, np.float64)
    return np.array([max(logits[list(run)]) for run in leaves(len(logits), leaf)])


def coded_mass(query, rebuilt, leaf):
    """log sum exp of q . k in each leaf, over keys as their codes have them."""
    logits = np.asarray(rebuilt, np.float64) @ np.asarray(query, np.float64)
    return np.array(
        [math.log(sum(math.exp(x) for x in logits[list(r)])) for r in leaves(len(logits), leaf)]
    )


def merged(scores, reduce):
    """[rows][n] as one: the sum of softmaxes, or the most."""
    scores = np.asarray(scores, np.float64)
    out = []
    for unit in range(scores.shape[1]):
        of_rows = []
        for row in scores:
            if reduce == "mass":
                of_rows.append(math.exp(row[unit] - row.max()) / np.exp(row - row.max()).sum())
            else:
                of_rows.append(row[unit])
        out.append(sum(of_rows) if reduce == "mass" else max(of_rows))
    return np.array(out)


def chosen(relevance, num_tokens, tokens, *, leaf, sinks, recent, unit):
    """Leaves of `unit` tokens for one row of relevance and a budget of `tokens`.

    A set: the last run, runs that reach into the last `recent` tokens from the back, runs that
    reach into the first `sinks`, the best of the rest, as many as the budget has room for.
    """
    runs = leaves(num_tokens, leaf)
    room = len(runs) if tokens >= num_tokens else max(1, tokens // leaf)
    order = [len(runs) - 1]
    order += [i for i in reversed(range(len(runs))) if runs[i].stop > num_tokens - recent]
    order += [i for i in range(len(runs)) if runs[i].start < sinks]
    order += sorted(range(len(runs)), key=lambda i: -relevance[i])
    taken = list(dict.fromkeys(order))[:room]
    return sorted({token // unit for i in taken for token in runs[i]})


def infllm(keys, queries, scale, *, leaf, representatives, window):
    """Representatives (token indices) of each leaf."""
    keys, queries = np.asarray(keys, np.float64), np.asarray(queries, np.float64)
    heads, num, _ = keys.shape
    group = len(queries) // heads
    received = np.zeros(num)
    for q in range(len(queries)):
        for i in range(num):
            near = range(max(0, i - window + 1), i + 1)
            logits = [scale * float(queries[q, i] @ keys[q // group, j]) for j in near]
            top = max(logits)
            whole = sum(math.exp(x - top) for x in logits)
            for j, x in zip(near, logits, strict=True):
                received[j] += math.exp(x - top) / whole
    return [sorted(run, key=lambda j: -received[j])[:representatives] for run in leaves(num, leaf)]
