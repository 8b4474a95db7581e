# SPDX-License-Identifier: Apache-2.0
"""RazorAttention by its definition: loops over tokens, in float64.

Everything is for one layer of one sequence: q is [Hq][T][D], k is [Hkv][T][D], v is [Hkv][T][Dv],
after RoPE; query head h reads KV head h // G.
"""

import math

import numpy as np

__all__ = ["RazorLayer", "head_scores", "retrieval", "weighted_attention"]


def weighted_attention(query, keys, values, counts):
    """One query over entries that each stand for `counts` tokens: in numerator and denominator."""
    logits = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    top = max(logits)
    terms = [n * math.exp(x - top) for n, x in zip(counts, logits, strict=True)]
    total = sum(terms)
    return sum(t / total * value for t, value in zip(terms, values, strict=True))


class RazorLayer:
    """One layer: `forward` the prompt, then every later pass.

    Args:
        heads: KV heads.
        whole: those that keep everything.
        sinks: first tokens that the others keep.
        s0: least window of the others.
        c: share of the tokens seen, as a whole number.

    Attributes:
        kept: positions of the real entries, by head.
        dropped: positions of the tokens that are gone, by head.
    """

    def __init__(self, heads, whole, *, sinks, s0, c):
        self.whole, self.sinks, self.s0, self.c = whole, sinks, s0, c
        self.keys = [[] for _ in range(heads)]  # of all tokens ever seen
        self.values = [[] for _ in range(heads)]
        self.kept = [[] for _ in range(heads)]
        self.dropped = [[] for _ in range(heads)]

    def compensation(self, head):
        """Mean key and value of what a head has dropped."""
        gone = self.dropped[head]
        keys = sum(self.keys[head][p] for p in gone) / len(gone)
        values = sum(self.values[head][p] for p in gone) / len(gone)
        return keys, values

    def forward(self, q, k, v):
        """A pass over new tokens; returns the attention's output, [Hq][T][Dv]."""
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        group = len(q) // len(k)
        output = [[] for _ in q]
        for head in range(len(k)):
            old = list(self.kept[head])
            start = len(self.keys[head])
            self.keys[head] += list(k[head])
            self.values[head] += list(v[head])
            for i in range(k.shape[1]):
                seen = [*old, *range(start, start + i + 1)]
                keys = [self.keys[head][p] for p in seen]
                values = [self.values[head][p] for p in seen]
                counts = [1] * len(seen)
                if self.dropped[head]:
                    mean = self.compensation(head)
                    keys, values = [*keys, mean[0]], [*values, mean[1]]
                    counts.append(len(self.dropped[head]))
                for g in range(group):
                    query = q[head * group + g, i]
                    output[head * group + g].append(weighted_attention(query, keys, values, counts))
            self.kept[head] = [*old, *range(start, start + k.shape[1])]
            self._shrink(head)
        return np.array(output)

    def _shrink(self, head):
        if head in self.whole:
            return
        num_seen = len(self.keys[head])
        window = self.s0
        while window * self.c < num_seen:
            window += 1
        while len(self.kept[head]) > self.sinks + window:
            self.dropped[head].append(self.kept[head].pop(self.sinks))


def head_scores(q, k, start, block):
    """Echo and induction score of every query head, from whole attention matrices."""
    q, k = np.asarray(q, dtype=np.float64), np.asarray(k, dtype=np.float64)
    group = len(q) // len(k)
    total = q.shape[1]
    echo, induction = [0.0] * len(q), [0.0] * len(q)
    queries = 0
    for i in range(block, total - start):
        queries += 1
        earlier = [j for j in range(i) if j % block == i % block]
        for h in range(len(q)):
            logits = k[h // group, : start + i + 1] @ q[h, start + i] / math.sqrt(q.shape[2])
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            echo[h] += sum(weights[start + j] for j in earlier)
            induction[h] += sum(weights[start + j + 1] for j in earlier)
    return [x / queries for x in echo], [x / queries for x in induction]


def retrieval(induction, echo, num_induction, num_echo):
    """(layer, head) of so many best ones by either table [L][H], ties to the earlier."""
    places = [(layer, head) for layer, row in enumerate(induction) for head in range(len(row))]
    chosen = set()
    for table, num in ((induction, num_induction), (echo, num_echo)):
        chosen |= set(sorted(places, key=lambda p: (-table[p[0]][p[1]], p))[:num])
    return chosen
