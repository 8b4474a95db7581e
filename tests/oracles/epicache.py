# SPDX-License-Identifier: Apache-2.0
"""EpiCache's block loop by its definition, out of transformers' own attention matrices.

What has been dropped is masked instead: every pass runs the whole prompt again, and each token sees
in each layer and head what was held when its block came.
"""

import numpy as np

__all__ = ["attention", "block_loop", "largest_remainder", "layer_budgets"]


def attention(model, tokens, seen):
    """Attention [layers][Hq, T, T] and logits [T, V] where `seen` [L, Hkv, T, T] may be seen.

    Args:
        model: with eager attention, in float64.
        tokens: list.
        seen: bool.
    """
    import torch

    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    hooks = []
    for index, layer in enumerate(model.model.layers):
        allowed = np.repeat(seen[index], group, axis=0)
        mask = torch.tensor(np.where(allowed, 0.0, -np.inf)[None])

        def put(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    try:
        with torch.no_grad():
            found = model(torch.tensor([tokens]), output_attentions=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [x[0].numpy() for x in found.attentions], found.logits[0].numpy()


def block_loop(model, prompt, patch, *, block, budgets, sinks, uniform=False):
    """What is held after each block, who saw whom, and the narrowest margin.

    Args:
        model: see `attention`.
        prompt: token ids, list.
        patch: token ids of the patched prompt, list.
        block: tokens of the prompt at a time.
        budgets: entries per head of each layer.
        sinks: first entries that stay.
        uniform: every head of a layer keeps as many.

    Returns:
        Positions [blocks][layers][Hkv], bool [L, Hkv, T, T], and the smallest relative difference
        between the lowest score that stayed and the highest that went.
    """
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    group = config.num_attention_heads // heads
    longest = len(prompt) + len(patch)
    seen = np.zeros((layers, heads, longest, longest), dtype=bool)
    kept = [[[] for _ in range(heads)] for _ in range(layers)]
    history, margin = [], np.inf
    for start in range(0, len(prompt), block):
        stop = min(start + block, len(prompt))
        end = stop + len(patch)
        now = seen[:, :, :end, :end].copy()
        for layer in range(layers):
            for head in range(heads):
                for i in range(start, stop):
                    now[layer, head, i, [*kept[layer][head], *range(start, i + 1)]] = True
                kept[layer][head] = [*kept[layer][head], *range(start, stop)]
                for i in range(stop, end):
                    now[layer, head, i, [*kept[layer][head], *range(stop, i + 1)]] = True
        seen[:, :, :stop, :stop] = now[:, :, :stop, :stop]
        if stop > sum(budgets) / layers:
            matrices, _ = attention(model, [*prompt[:stop], *patch], now)
            for layer in range(layers):
                free, fixed = [], []
                for head in range(heads):
                    row = kept[layer][head]
                    scores = np.zeros(len(row))
                    for query_head in range(head * group, (head + 1) * group):
                        for i in range(stop, end):
                            weights = matrices[layer][query_head, i, row]
                            scores = np.maximum(scores, weights / weights.sum())
                    front = min(sinks, budgets[layer])
                    fixed.append(row[:front])
                    free.append([(-s, head, p) for s, p in zip(scores, row, strict=True)][front:])
                lots = free if uniform else [[item for row in free for item in row]]
                kept[layer] = fixed
                for lot in lots:
                    lot.sort()
                    num = budgets[layer] * heads // len(lots)
                    num -= sum(len(fixed[h]) for h in {h for _, h, _ in lot})
                    for _, head, position in lot[:num]:
                        kept[layer][head] = [*kept[layer][head], position]
                    if len(lot) > num > 0:
                        low, high = -lot[num - 1][0], -lot[num][0]
                        margin = min(margin, (low - high) / max(low, 1e-300))
                kept[layer] = [sorted(row) for row in kept[layer]]
        history.append([[list(row) for row in layer] for layer in kept])
    return history, seen, margin


def layer_budgets(sensitivity, alpha, floor, budget):
    """Shares by the formula, rounded by largest remainders."""
    num = len(sensitivity)
    powers = [s**alpha for s in sensitivity]
    total = sum(powers)
    shares = [budget * (floor + (1 - floor) * num * w / total) for w in powers]
    return largest_remainder(shares, num * budget)


def largest_remainder(shares, total):
    out = [int(np.floor(x)) for x in shares]
    order = sorted(range(len(shares)), key=lambda i: (out[i] - shares[i], i))
    for i in order[: total - sum(out)]:
        out[i] += 1
    return out
