# SPDX-License-Identifier: Apache-2.0
"""KVzip by its definition, out of transformers' own attention matrices."""

import numpy as np

__all__ = ["joint", "scores"]


def scores(model, prompt, requests, *, chunk, sinks):
    """Scores [layers][Hkv][S] of a prompt's entries.

    Args:
        model: with eager attention, in float64.
        prompt: token ids, list.
        requests: token ids to write before each repeated chunk.
        chunk: tokens repeated at a time.
        sinks: first entries that every softmax sees.
    """
    import torch

    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    out = np.zeros((config.num_hidden_layers, config.num_key_value_heads, len(prompt)))
    for index, start in enumerate(range(0, len(prompt), chunk)):
        stop = min(start + chunk, len(prompt))
        tail = [*requests[index], *prompt[start:stop]]
        with torch.no_grad():
            found = model(torch.tensor([[*prompt, *tail]]), output_attentions=True, use_cache=False)
        near = [*range(min(sinks, start)), *range(start, stop)]
        own = range(len(prompt), len(prompt) + len(tail))
        for layer, matrix in enumerate(found.attentions):
            weights = matrix[0].numpy()  # [Hq, T, T]
            for head in range(len(weights)):
                for query in own:
                    row = weights[head, query]
                    whole = sum(row[s] for s in [*near, *own])
                    for s in range(start, stop):
                        best = out[layer, head // group, s]
                        out[layer, head // group, s] = max(best, row[s] / whole)
    return out


def joint(found, budget, sinks):
    """Positions kept by layer and head, and the narrowest margin: the best of the whole model."""
    layers, heads, num = found.shape
    total = layers * heads * (budget - min(sinks, budget))
    free = [
        (-found[layer, head, s], layer, head, s)
        for layer in range(layers)
        for head in range(heads)
        for s in range(min(sinks, budget), num)
    ]
    free.sort()
    kept = [[list(range(min(sinks, budget))) for _ in range(heads)] for _ in range(layers)]
    for _, layer, head, s in free[:total]:
        kept[layer][head].append(s)
    margin = np.inf
    if total < len(free):
        margin = (free[total][0] - free[total - 1][0]) / max(-free[total - 1][0], 1e-300)
    return [[sorted(row) for row in layer] for layer in kept], margin
