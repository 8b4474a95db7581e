# SPDX-License-Identifier: Apache-2.0
"""LazyEviction by its definition: one entry, one query, one head at a time, in float64."""

import math

from tests.oracles.tova import attention

__all__ = ["Entry", "Lazy", "importance"]


def importance(quiet, recurrence, offset=0):
    """H1 + H2 of an entry that has been quiet for so many steps."""
    if recurrence == 0:
        return 0.0
    h1 = 2 / (1 + math.exp(offset + quiet / recurrence))
    h2 = 2 / (1 + math.exp(min(recurrence - 1, 700)))
    return h1 + h2


class Entry:
    """A token in one KV head: its position, key, TS and MRI."""

    def __init__(self, position, key, last_active):
        self.position, self.key = position, key
        self.last_active, self.recurrence = last_active, 0


class Lazy:
    """One layer of one sequence: `prompt`, then a `forward` for every later pass.

    Args:
        heads: KV heads.
        budget: entries that stay.
        window: newest ones that always do, and steps between decisions.
        alpha: least attention of an active entry.
        group: max or mean.
        offset: inside H1.

    Attributes:
        rows: entries of each head.
        alpha_margin: how near any attention came to alpha, as a share of alpha.
        margin: by what share the worst that was kept exceeds the best that was dropped, at least;
            entries with the same two numbers are as good as each other on any machine.
    """

    def __init__(self, heads, budget, window, alpha, group="max", offset=0):
        self.budget, self.window, self.alpha = budget, window, alpha
        self.group, self.offset = group, offset
        self.rows = [[] for _ in range(heads)]
        self.clock = self.seen = 0
        self.alpha_margin = self.margin = math.inf

    @property
    def positions(self):
        return [[entry.position for entry in row] for row in self.rows]

    def prompt(self, keys):
        """Keys [Hkv][n][D]."""
        for row, mine in zip(self.rows, keys, strict=True):
            row += [Entry(self.seen + i, key, 0) for i, key in enumerate(mine)]
        self.seen += len(keys[0])

    def forward(self, queries, keys):
        """Queries [Hq][T][D] and keys [Hkv][T][D]."""
        group = len(queries) // len(self.rows)
        before = self.clock
        for h, (row, mine) in enumerate(zip(self.rows, keys, strict=True)):
            num_old = len(row)
            row += [Entry(self.seen + i, key, before + i) for i, key in enumerate(mine)]
            most = [[0.0] * group for _ in row]
            for g in range(group):
                for i, query in enumerate(queries[h * group + g]):
                    weights = attention(query, [entry.key for entry in row[: num_old + i + 1]])
                    for s, weight in enumerate(weights):
                        most[s][g] = max(most[s][g], weight)
            self.note(row, most, before + len(mine))
        self.finish(len(keys[0]))

    def note(self, row, most, clock):
        """The most attention [S][G] that any query of the pass paid, by query head."""
        for entry, heads in zip(row, most, strict=True):
            paid = max(heads) if self.group == "max" else sum(heads) / len(heads)
            self.alpha_margin = min(self.alpha_margin, abs(paid - self.alpha) / self.alpha)
            if paid >= self.alpha:
                entry.recurrence = max(entry.recurrence, clock - entry.last_active)
                entry.last_active = clock

    def finish(self, num):
        """The clock after `num` tokens, and the decision if a multiple of W is among them."""
        steps = range(self.clock + 1, self.clock + num + 1)
        self.clock += num
        self.seen += num
        if any(t % self.window == 0 for t in steps):
            self.rows = [self.decide(row) for row in self.rows]

    def decide(self, row):
        if len(row) <= self.budget:
            return row
        older, newest = row[: -self.window], row[-self.window :]
        numbers = [(self.clock - entry.last_active, entry.recurrence) for entry in older]
        scores = [importance(*pair, self.offset) for pair in numbers]
        order = sorted(range(len(older)), key=lambda s: (-scores[s], s))
        num = self.budget - self.window
        worst, best = order[num - 1], order[num]
        if numbers[worst] != numbers[best] and scores[worst] > 0:
            margin = (scores[worst] - scores[best]) / scores[worst]
            self.margin = min(self.margin, margin)
        return [older[s] for s in sorted(order[:num])] + newest
