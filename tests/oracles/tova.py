# SPDX-License-Identifier: Apache-2.0
"""TOVA by its definition: lists, one query at a time, in float64."""

import math

__all__ = ["Tova", "attention"]


def attention(query, keys):
    """Softmax weights of one query [D] over keys [S][D]."""
    logits = [
        sum(float(a) * float(b) for a, b in zip(query, key, strict=True)) / math.sqrt(len(query))
        for key in keys
    ]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


class Tova:
    """One layer of one sequence.

    Args:
        heads: KV heads.
        budget: entries that stay.
        window: last ones that always do.

    Attributes:
        positions: kept, the same in all heads.
        margin: by what share the worst that was kept exceeds the best that was dropped, at least.
    """

    def __init__(self, heads, budget, window=0):
        self.budget, self.window = budget, min(window, budget)
        self.keys = [[] for _ in range(heads)]
        self.positions = []
        self.seen = 0
        self.margin = math.inf

    def forward(self, queries, keys):
        """A pass: queries [Hq][T][D] and keys [Hkv][T][D]; its last query decides."""
        group = len(queries) // len(self.keys)
        for held, new in zip(self.keys, keys, strict=True):
            held.extend(list(new))
        num = len(keys[0])
        self.positions += range(self.seen, self.seen + num)
        self.seen += num
        if len(self.positions) <= self.budget:
            return
        scores = [0.0] * len(self.positions)
        for h, query in enumerate(queries):
            for s, weight in enumerate(attention(query[-1], self.keys[h // group])):
                scores[s] += weight / len(queries)
        free = len(scores) - self.window
        order = sorted(range(free), key=lambda s: (-scores[s], s))
        kept, dropped = order[: self.budget - self.window], order[self.budget - self.window :]
        if kept and dropped:
            gap = (scores[kept[-1]] - scores[dropped[0]]) / scores[kept[-1]]
            self.margin = min(self.margin, gap)
        chosen = sorted([*kept, *range(free, len(scores))])
        self.positions = [self.positions[s] for s in chosen]
        self.keys = [[held[s] for s in chosen] for held in self.keys]
