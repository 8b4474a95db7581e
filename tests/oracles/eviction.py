# SPDX-License-Identifier: Apache-2.0
"""Eviction policies by their definitions: brute force over lists, in float64.

Everything is for one layer of one sequence: q is [Hq, T, D], k is [Hkv, T, D] and v is [Hkv, T, Dv]
of T new tokens, after RoPE. Query head h reads KV head h // G with G = Hq / Hkv.

Two computations can only be expected to choose alike where no choice hangs on rounding. So every
choice leaves its `margin` behind: by what share of it the worst score that was kept exceeds the
best one that was dropped.
"""

import math
from fractions import Fraction

import numpy as np

__all__ = ["HeavyHitters", "attention_rows", "entries", "snapkv", "snapkv_scores", "streaming"]


def entries(budget, prompt):
    """Entries that the text of a budget means for a prompt of so many tokens; None for all.

    With a point it is a fraction of the prompt, rounded up, else a number of entries.
    """
    if "." not in budget:
        return int(budget)
    share = Fraction(budget)
    return None if share == 1 else math.ceil(share * prompt)


def attention_rows(q, keys, num_old):
    """Softmax rows of one KV head, [G, T, S]: query i sees the old entries and new ones up to i.

    Args:
        q: [G, T, D].
        keys: [S, D], the T new ones last.
        num_old: S - T.
    """
    group, num, width = q.shape
    rows = np.zeros((group, num, len(keys)))
    for g in range(group):
        for i in range(num):
            seen = num_old + i + 1
            logits = np.array([float(q[g, i] @ keys[s]) for s in range(seen)]) / math.sqrt(width)
            weights = np.exp(logits - logits.max())
            rows[g, i, :seen] = weights / weights.sum()
    return rows


def heaviest(scores, num):
    """The indices of the `num` highest scores, ascending, and the margin of the choice.

    Of equal scores the earlier index wins.
    """
    order = sorted(range(len(scores)), key=lambda s: (-scores[s], s))
    kept, dropped = order[:num], order[num:]
    if not kept or not dropped:
        return sorted(kept), math.inf
    worst, best = scores[kept[-1]], scores[dropped[0]]
    return sorted(kept), (worst - best) / worst if worst else 0.0


class HeavyHitters:
    """H2O with a dense prompt: `forward` the prompt, then every later step.

    Args:
        heads: KV heads.
        budget: as text, see `entries`.
        recent: share of the budget for the newest entries, as text; rounded up.

    Attributes:
        positions: of the kept entries, for each head.
        scores: attention that each of them has received so far, likewise.
        margin: the narrowest choice so far.
    """

    def __init__(self, heads, budget, recent):
        self.budget = budget
        self.recent = recent
        self.positions = [[] for _ in range(heads)]
        self.keys = [[] for _ in range(heads)]
        self.values = [[] for _ in range(heads)]
        self.scores = [[] for _ in range(heads)]
        self.num_seen = 0
        self.num_prompt = None
        self.margin = math.inf

    def attend(self, q, k, v):
        """Let new tokens look at the kept entries, and add up what those receive.

        Returns:
            [Hq, T, Dv], the attention's output.
        """
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        group = len(q) // len(k)
        num = q.shape[1]
        outputs = []
        for h in range(len(k)):
            num_old = len(self.positions[h])
            self.positions[h] += range(self.num_seen, self.num_seen + num)
            self.keys[h] += list(k[h])
            self.values[h] += list(v[h])
            self.scores[h] += [0.0] * num
            mine = q[h * group : (h + 1) * group]
            rows = attention_rows(mine, np.array(self.keys[h]), num_old)
            for g in range(group):
                outputs.append(rows[g] @ np.array(self.values[h]))
                for i in range(num):
                    for s in range(num_old + i + 1):
                        self.scores[h][s] += rows[g, i, s]
        self.num_seen += num
        return np.array(outputs)

    def evict(self):
        """Down to the budget: the newest entries and, of the others, the heaviest."""
        if self.num_prompt is None:
            self.num_prompt = self.num_seen
        budget = entries(self.budget, self.num_prompt)
        for h, scores in enumerate(self.scores):
            if budget is None or len(scores) <= budget:
                continue
            newest = math.ceil(Fraction(self.recent) * budget)
            older = len(scores) - newest
            kept, margin = heaviest(scores[:older], budget - newest)
            kept += range(older, len(scores))
            self.margin = min(self.margin, margin)
            for held in (self.positions, self.keys, self.values, self.scores):
                held[h] = [held[h][s] for s in kept]

    def forward(self, q, k, v):
        """A forward pass: the whole prompt, or a step of any number of tokens."""
        output = self.attend(q, k, v)
        self.evict()
        return output


def snapkv_scores(q, k, *, window, kernel, pool, group):
    """Scores [Hkv, S - window] of the tokens before the window."""
    q, k = np.asarray(q, dtype=np.float64), np.asarray(k, dtype=np.float64)
    size = len(q) // len(k)
    num = k.shape[1]
    before = num - window
    scores = np.zeros((len(k), before))
    for h in range(len(k)):
        mine = q[h * size : (h + 1) * size, before:]
        rows = attention_rows(mine, k[h], before)
        votes = [[sum(rows[g, :, s]) for s in range(before)] for g in range(size)]
        pooled = [pool_row(row, kernel, pool) for row in votes]
        for s in range(before):
            column = [row[s] for row in pooled]
            scores[h, s] = max(column) if group == "max" else sum(column) / size
    return scores


def pool_row(row, kernel, pool):
    """Every number replaced by the average or the maximum of its `kernel` neighbours.

    Beyond both ends there are zeros for the average, which divides by the whole kernel, and nothing
    for the maximum.
    """
    half = kernel // 2
    out = []
    for s in range(len(row)):
        near = row[max(s - half, 0) : s + half + 1]
        out.append(max(near) if pool == "max" else sum(near) / kernel)
    return out


def snapkv(q, k, *, budget, window, kernel, pool, group):
    """Positions kept of a prompt for each KV head, and the margin.

    A budget below the window keeps the newest tokens.
    """
    heads, num = np.asarray(k).shape[:2]
    size = entries(budget, num)
    if size is None or num <= size:
        return [list(range(num)) for _ in range(heads)], math.inf
    if size <= window:
        return [list(range(num - size, num)) for _ in range(heads)], math.inf
    scores = snapkv_scores(q, k, window=window, kernel=kernel, pool=pool, group=group)
    chosen = [heaviest(list(row), size - window) for row in scores]
    kept = [[*mine, *range(num - window, num)] for mine, _ in chosen]
    return kept, min(margin for _, margin in chosen)


def streaming(num_seen, num_prompt, *, budget, sinks):
    """Positions kept, the same for every head: the first `sinks` and the last `budget - sinks`.

    A budget below `sinks` keeps that many first ones.
    """
    size = entries(budget, num_prompt)
    if size is None or num_seen <= size:
        return list(range(num_seen))
    first = min(sinks, size)
    return [*range(first), *range(num_seen - (size - first), num_seen)]
