# SPDX-License-Identifier: Apache-2.0
"""KVzap by its definition: KVzip+ scores out of attention matrices, networks, and what stays."""

import math

import numpy as np

__all__ = ["joint", "network", "plus_scores", "survivors"]


def plus_scores(model, prompt, request, *, plus=True):
    """Scores [layers][Hkv][S] of a prompt that is repeated in one piece behind a request.

    Args:
        model: a Llama with eager attention, in float64.
        prompt: token ids, list.
        request: token ids, list.
        plus: KVzip+; else KVzip.
    """
    import torch

    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    num, width = len(prompt), config.head_dim
    with torch.no_grad():
        found = model(
            torch.tensor([[*prompt, *request, *prompt]]),
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
        )
    out = np.zeros((config.num_hidden_layers, config.num_key_value_heads, num))
    inputs = []
    for index, layer in enumerate(model.model.layers):
        x = found.hidden_states[index][0].numpy()
        gain = layer.input_layernorm.weight.detach().numpy()
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + config.rms_norm_eps) * gain
        inputs.append(x[:num])
        w_value = layer.self_attn.v_proj.weight.detach().numpy()
        w_output = layer.self_attn.o_proj.weight.detach().numpy()
        attention = found.attentions[index][0].numpy()
        for head in range(config.num_attention_heads):
            kv = head // group
            for i in range(num):
                value = w_value[kv * width : (kv + 1) * width] @ x[i]
                written = w_output[:, head * width : (head + 1) * width] @ value
                for j in range(num, len(x)):
                    score = attention[head, j, i]
                    if plus:
                        score *= np.linalg.norm(written) / np.linalg.norm(x[j])
                    out[index, kv, i] = max(out[index, kv, i], score)
    return out, inputs


def network(maps, hidden):
    """Scores [Hkv][n] of hidden states [n][d]: linear maps with GELU between them."""
    x = np.asarray(hidden, dtype=np.float64)
    for index, (weight, bias) in enumerate(maps):
        if index:
            x = np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)(x)
        x = x @ np.asarray(weight, dtype=np.float64).T + np.asarray(bias, dtype=np.float64)
    return x.T


def joint(scores, budget, sinks, window):
    """Positions kept by layer and head, and the narrowest margin; [layers][Hkv][S] compete."""
    layers, heads, num = scores.shape
    sinks = min(sinks, budget)
    window = min(window, budget - sinks)
    safe = [s for s in range(num) if s < sinks or s >= num - window]
    free = sorted(
        (-scores[layer, head, s], layer, head, s)
        for layer in range(layers)
        for head in range(heads)
        for s in range(num)
        if s not in safe
    )
    total = layers * heads * (budget - len(safe))
    kept = [[list(safe) for _ in range(heads)] for _ in range(layers)]
    for _, layer, head, s in free[:total]:
        kept[layer][head].append(s)
    margin = free[total][0] - free[total - 1][0] if 0 < total < len(free) else np.inf
    return [[sorted(row) for row in layer] for layer in kept], margin


def survivors(scores, tau, num, sinks, window):
    """Positions below `num` that one head holds: no decision ever hangs on an earlier one."""
    return [s for s in range(num) if s < sinks or s >= num - window or scores[s] >= tau]
