# SPDX-License-Identifier: Apache-2.0
"""D2O by its definition: loops over lists, in float64, for all layers of one sequence.

Attention is `tests.oracles.eviction`'s. Everything that hangs on rounding leaves a margin behind.
"""

import math
from fractions import Fraction

import numpy as np

from tests.oracles.eviction import attention_rows, entries, heaviest

__all__ = ["Layer", "Model", "budgets", "cosine", "densities", "merge_weights", "next_tau"]


def cosine(a, b):
    """0 where one of them is."""
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def scale(numbers):
    low, high = min(numbers), max(numbers)
    return [(x - low) / (high - low) if high > low else 0.0 for x in numbers]


def densities(received, norm):
    """F of each layer, from the attention that each query head's entries received: [L][Hq][S]."""
    variances = [[float(np.var(head)) for head in layer] for layer in received]
    if norm == "official":
        return [sum(scale(layer)) / len(layer) for layer in variances]
    return scale([sum(layer) / len(layer) for layer in variances])


def budgets(dense, budget, prompt, *, skip_layers=False):
    """Entries per head of each layer, None for no limit, and how clear the rounding was.

    Args:
        dense: F of each layer.
        budget: text, see `entries`.
        prompt: its tokens.
        skip_layers: layers 0, 1 and L - 1 have no limit.
    """
    num = len(dense)
    mean = entries(budget, prompt)
    total = sum(math.exp(-f) for f in dense)
    exact = [num * mean * math.exp(-f) / total for f in dense]
    whole = [math.floor(x) for x in exact]
    left = num * mean - sum(whole)
    rest = sorted(range(num), key=lambda i: (whole[i] - exact[i], i))
    margin = min(min(x - math.floor(x), math.ceil(x) - x) for x in exact)
    if 0 < left < num:
        first, last = rest[left - 1], rest[left]
        margin = min(margin, (exact[first] - whole[first]) - (exact[last] - whole[last]))
    for i in rest[:left]:
        whole[i] += 1
    out = []
    for i, n in enumerate(whole):
        n = max(n, min(math.ceil(Fraction("0.01") * prompt), mean))
        free = "." in budget and n >= prompt
        out.append(None if free or (skip_layers and i in (0, 1, num - 1)) else n)
    return out, margin if len(set(dense)) > 1 else math.inf


def next_tau(tau, us, beta):
    """The threshold after a pass with these similarities; None before the first."""
    mean = sum(us) / len(us)
    return mean if tau is None else beta * mean + (1 - beta) * tau


def merge_weights(us, *, weights="softmax", merge_self=math.e):
    """Of the entry that others merge into, and of the others, whose similarities are `us`."""
    if weights == "mean":
        return 1 / (1 + len(us)), [u / (1 + len(us)) for u in us]
    whole = merge_self + sum(math.exp(u) for u in us)
    return merge_self / whole, [math.exp(u) / whole for u in us]


class Layer:
    """One layer: rows of dicts with position, key, value and score, by KV head."""

    def __init__(self, heads):
        self.rows = [[] for _ in range(heads)]
        self.tau = None
        self.budget = None
        self.received = None  # [Hq][S] of the prompt

    def attend(self, q, k, v, first):
        """New tokens, the first of them at position `first`, look at the kept ones."""
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        group = len(q) // len(k)
        received = []
        for h, row in enumerate(self.rows):
            old = len(row)
            for t in range(k.shape[1]):
                row.append({"at": first + t, "key": k[h, t], "value": v[h, t], "score": 0.0})
            keys = np.array([entry["key"] for entry in row])
            sums = attention_rows(q[h * group : (h + 1) * group], keys, old).sum(1)
            received += list(sums)
            for s, entry in enumerate(row):
                entry["score"] += sum(sums[:, s])
        if self.received is None:
            self.received = received


class Model:
    """All layers: `forward` the prompt, then every later step.

    Attributes:
        layers: see `Layer`.
        margin: the narrowest choice between scores, relative.
        gap: the narrowest choice between similarities, or of one and the threshold.
        rounding: how clear the layers' whole numbers were.
    """

    def __init__(
        self,
        layers,
        heads,
        budget,
        *,
        recent="0.5",
        sinks=4,
        beta=0.7,
        merge_self=math.e,
        merge_keys=True,
        norm="across_layers",
        first_eviction="prefill_end",
        skip_layers=False,
        weights="softmax",
        match="head",
    ):
        self.layers = [Layer(heads) for _ in range(layers)]
        self.budget, self.recent, self.sinks, self.beta = budget, recent, sinks, beta
        self.merge_self, self.merge_keys, self.norm = merge_self, merge_keys, norm
        self.first_eviction, self.skip_layers = first_eviction, skip_layers
        self.weights, self.match = weights, match
        self.num_prompt = None
        self.num_seen = 0
        self.merges = 0
        self.margin = self.gap = self.rounding = math.inf

    def forward(self, parts):
        """(q, k, v) of every layer."""
        for layer, (q, k, v) in zip(self.layers, parts, strict=True):
            layer.attend(q, k, v, self.num_seen)
        self.num_seen += np.shape(parts[0][1])[1]
        ends_prompt = self.num_prompt is None
        if ends_prompt:
            self.num_prompt = self.num_seen
            self.allocate()
        if ends_prompt and self.first_eviction == "first_step":
            return
        mean = entries(self.budget, self.num_prompt)
        for layer in self.layers:
            if mean is not None and self.num_seen > mean:
                self.evict(layer)

    def allocate(self):
        if entries(self.budget, self.num_prompt) is None:
            return
        dense = densities([layer.received for layer in self.layers], self.norm)
        found, self.rounding = budgets(
            dense, self.budget, self.num_prompt, skip_layers=self.skip_layers
        )
        for layer, budget in zip(self.layers, found, strict=True):
            layer.budget = budget

    def evict(self, layer):
        size = layer.budget
        if size is None or len(layer.rows[0]) <= size:
            return
        kept, gone = [], []
        for row in layer.rows:
            mine = self.choose([entry["score"] for entry in row], size)
            kept.append([row[s] for s in mine])
            gone.append([row[s] for s in range(len(row)) if s not in mine])
        found = [
            [self.nearest(entry["key"], stay) for entry in leave]
            for stay, leave in zip(kept, gone, strict=True)
        ]
        layer.tau = next_tau(layer.tau, [u for row in found for u, _ in row], self.beta)
        before = [
            [(entry["key"], entry["value"]) for entry in leave] for leave in gone
        ]  # evicted ones do not change
        for h, stay in enumerate(kept):
            into = {}
            for rank, (u, j) in enumerate(found[h]):
                judged = u
                if self.match == "rank":
                    judged = sum(row[rank][0] for row in found) / len(found)
                self.gap = min(self.gap, abs(judged - layer.tau))
                if judged >= layer.tau:
                    into.setdefault(j, []).append((u, before[h][rank]))
            for j, merged in into.items():
                self.merges += len(merged)
                own, theirs = merge_weights(
                    [u for u, _ in merged], weights=self.weights, merge_self=self.merge_self
                )
                for axis, name in enumerate(("key", "value")):
                    if name == "key" and not self.merge_keys:
                        continue
                    stay[j][name] = own * stay[j][name] + sum(
                        w * x[axis] for w, (_, x) in zip(theirs, merged, strict=True)
                    )
        layer.rows = kept

    def choose(self, scores, size):
        """Indices that stay of one head: recent ones, sinks, and the heaviest of the others."""
        recent = math.ceil(Fraction(self.recent) * size)
        heavy = size - recent
        sinks = min(self.sinks, heavy if recent else heavy - 1)
        older = len(scores) - recent
        others, margin = heaviest(scores[sinks:older], heavy - sinks)
        self.margin = min(self.margin, margin)
        return [*range(sinks), *(sinks + s for s in others), *range(older, len(scores))]

    def nearest(self, key, stay):
        """The highest cosine with a kept key, and whose it is."""
        found = [cosine(key, entry["key"]) for entry in stay]
        best = max(range(len(found)), key=lambda j: (found[j], -j))
        second = max((u for j, u in enumerate(found) if j != best), default=-math.inf)
        self.gap = min(self.gap, found[best] - second)
        return found[best], best
