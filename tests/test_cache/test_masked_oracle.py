# SPDX-License-Identifier: Apache-2.0
"""After an eviction, attention is that over the full cache with the evicted entries masked."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kvlib
from kvlib.testing.models import tiny_model

MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"sliding_window": 16, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "num_hidden_layers": 7}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "gpt-oss": (
        "GptOssConfig",
        {
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
        },
    ),
}
METHODS = ("streaming:budget=0.25", "snapkv:budget=0.25,window=8", "h2o:budget=0.25")
VISIBLE: dict[int, torch.Tensor] = {}
"""By layer: bool [B, Hkv, T, S], what the oracle lets a query see."""


def oracle_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """Float64, one query and head at a time."""
    group = query.shape[1] // key.shape[1]
    allowed = VISIBLE.get(module.layer_idx)
    if allowed is None:  # a sliding layer: transformers' own mask
        allowed = attention_mask.expand(query.shape[0], key.shape[1], -1, -1)
    out = torch.zeros_like(query)
    sinks = options.get("s_aux")
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                seen = allowed[b, h // group, t].nonzero()[:, 0]
                if not len(seen):
                    continue  # padding
                logits = key[b, h // group, seen].double() @ query[b, h, t].double() * scaling
                if options.get("softcap") is not None:
                    logits = torch.tanh(logits / options["softcap"]) * options["softcap"]
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h : h + 1].double()])
                weights = logits.softmax(0)[: len(seen)]
                out[b, h, t] = (weights @ value[b, h // group, seen].double()).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture
def oracle_registered():
    """The oracle as an attention implementation, forgotten afterwards."""
    AttentionInterface.register("oracle", oracle_attention)
    AttentionMaskInterface.register(
        "oracle", lambda *args, **more: sdpa_mask(*args, **{**more, "allow_is_causal_skip": False})
    )
    yield
    VISIBLE.clear()
    del AttentionInterface._global_mapping["oracle"]
    del AttentionMaskInterface._global_mapping["oracle"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", [0, 11])
@torch.no_grad()
def test_a_question_after_an_eviction(name, method, padding, oracle_registered):
    """Logits of a question of several tokens, by layer and head, in a padded batch of two."""
    config, changes = MODELS[name]
    model = tiny_model(config, **changes)  # transformers' eager masks overflow in float64
    own = model.config._attn_implementation
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 199, (2, 48 + 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = kvlib.KVCache(model, method)
    for first, last in ((0, 48), (48, 53)):
        found = model(
            input_ids=ids[:, first:last],
            attention_mask=mask[:, :last],
            position_ids=positions[:, first:last],
            past_key_values=cache,
        ).logits
        if first == 0:  # what the question may see
            for index, layer in enumerate(cache.layers):
                if layer.is_sliding:
                    continue
                allowed = torch.zeros(2, layer.rows[0].layer.num_kv_heads, 5, 53, dtype=torch.bool)
                for b in range(2):
                    for h, row in enumerate(cache.layer_kv(index, b).rows()):
                        assert len(row.positions) < 48 - (padding if b == 0 else 0)
                        allowed[b, h, :, row.positions.long() + (padding if b == 0 else 0)] = True
                allowed[..., 48:] = torch.ones(5, 5, dtype=torch.bool).tril()
                VISIBLE[index] = allowed
    assert VISIBLE
    # The prompt itself was read in full; only the question looks at what is left.
    visible = dict(VISIBLE)
    VISIBLE.clear()
    full = DynamicCache(config=model.config)
    model(
        input_ids=ids[:, :48],
        attention_mask=mask[:, :48],
        position_ids=positions[:, :48],
        past_key_values=full,
    )
    VISIBLE.update(visible)
    model.config._attn_implementation = "oracle"
    expected = model(
        input_ids=ids[:, 48:],
        attention_mask=mask,
        position_ids=positions[:, 48:],
        past_key_values=full,
    ).logits
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    VISIBLE.clear()
    unmasked = DynamicCache(config=model.config)
    model.config._attn_implementation = own
    model(
        input_ids=ids[:, :48],
        attention_mask=mask[:, :48],
        position_ids=positions[:, :48],
        past_key_values=unmasked,
    )
    other = model(
        input_ids=ids[:, 48:],
        attention_mask=mask,
        position_ids=positions[:, 48:],
        past_key_values=unmasked,
    ).logits
    assert (other - expected).abs().max() > 1e-4, "the eviction changed nothing: no test"
