# SPDX-License-Identifier: Apache-2.0
"""InfLLM's block scores and SpecKV's votes by their definitions, in float64."""

import math

import numpy as np

__all__ = ["highest", "infllm_scores", "speckv_scores"]


def highest(scores, num):
    """Indices of the `num` highest, ascending, and the relative margin; ties to the lower index."""
    order = sorted(range(len(scores)), key=lambda s: (-scores[s], s))
    kept, dropped = order[:num], order[num:]
    margin = math.inf
    if kept and dropped and scores[kept[-1]] != math.inf:
        scale = max(abs(scores[kept[-1]]), 1e-300)
        margin = (scores[kept[-1]] - scores[dropped[0]]) / scale
    return sorted(kept), margin


def infllm_scores(q, k, *, block, representatives, window, queries):
    """[S]: every token's block score, over all heads of a layer.

    Args:
        q: [Hq, S, D], every query of the prompt.
        k: [Hkv, S, D].
        block: tokens of a block.
        representatives: of each block.
        window: a query at t sees t - window + 1 .. t when a token's local attention is measured.
        queries: last ones that choose.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    heads, num, width = q.shape
    group = heads // len(k)
    local = np.zeros(num)
    for h in range(heads):
        for t in range(num):
            first = max(t - window + 1, 0)
            logits = k[h // group, first : t + 1] @ q[h, t] / math.sqrt(width)
            weights = np.exp(logits - logits.max())
            local[first : t + 1] += weights / weights.sum()
    out = np.zeros(num)
    for start in range(0, num, block):
        members = list(range(start, min(start + block, num)))
        chosen = sorted(members, key=lambda s: (-local[s], s))[:representatives]
        total = [
            float(q[h, t] @ k[h // group, s])
            for h in range(heads)
            for t in range(max(num - queries, 0), num)
            for s in chosen
        ]
        out[start : start + block] = sum(total) / len(total)
    return out


def speckv_scores(matrix, prompt, *, window, kernel, group):
    """[Hkv, prompt - window] from one layer's attention over the prompt and the drafted answer.

    Args:
        matrix: [Hq, T, T], softmax rows, T = prompt + answer.
        prompt: its length.
        window: last queries of the prompt that vote.
        kernel: neighbours pooled.
        group: query heads of a KV head.
    """
    heads, total, _ = matrix.shape
    half = kernel // 2
    out = np.zeros((heads // group, prompt - window))
    for head in range(heads // group):
        mine = matrix[head * group : (head + 1) * group, prompt - window : total]
        best = mine.max((0, 1))[: prompt - window]
        for s in range(prompt - window):
            out[head, s] = best[max(s - half, 0) : s + half + 1].max()
    return out
