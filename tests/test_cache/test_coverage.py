# SPDX-License-Identifier: Apache-2.0
"""Models that a `KVCache` serves, bit-equal to DynamicCache before an eviction, or refuses."""

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.errors import ConfigError
from kvlib.testing.models import tiny_model

SLIDING = {"sliding_window": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral sliding": ("MistralConfig", SLIDING),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {**SLIDING, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {**SLIDING, "num_hidden_layers": 7}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "gpt-oss": ("GptOssConfig", {**SLIDING, **EXPERTS}),
    "gpt2": ("GPT2Config", {}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "cohere": ("CohereConfig", {}),
    "glm": ("GlmConfig", {"pad_token_id": 0}),
    "opt": ("OPTConfig", {}),
}


def inputs(padding: int = 11):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 199, (2, 60), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, cache):
    out = model.generate(
        **inputs(),
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize(
    "method", ["full", "h2o:budget=1.0", "snapkv:budget=500", "h2o:budget=500"]
)
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_ordinary_cache_at_full_budget(name, method):
    """Tokens, logits, keys and values of a padded batch are bit for bit DynamicCache's."""
    config, changes = MODELS[name]
    model = tiny_model(config, **changes)
    ordinary = DynamicCache(config=model.config)
    expected = generated(model, ordinary)
    cache = kvlib.KVCache(model, method)
    found = generated(model, cache)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for mine, theirs in zip(cache.layers, ordinary.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_implementations(implementation):
    """The model's own attention runs, whichever it is."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    expected = generated(model, DynamicCache(config=model.config))
    found = generated(model, kvlib.KVCache(model, "h2o:budget=500"))
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mistral sliding"])
def test_evicting_in_every_model(name):
    """Policies evict every layer with full attention and no sliding one."""
    config, changes = MODELS[name]
    model = tiny_model(config, **changes)
    cache = kvlib.KVCache(model, "h2o:budget=10")
    generated(model, cache)
    full = [i for i, layer in enumerate(cache.layers) if not layer.is_sliding]
    assert full
    for index in full:
        for sequence in range(2):
            assert set(cache.layer_kv(index, sequence).lengths) == {10}
    for layer in cache.layers:
        if layer.is_sliding:
            assert layer.keys.shape[2] == 15


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        ("BloomConfig", {}, "attention interface"),
        ("MptConfig", {}, "attention interface"),
        ("Llama4TextConfig", {}, "chunked"),
        ("Qwen3NextConfig", {}, "recurrent"),
        ("DeepseekV3Config", {"n_routed_experts": 4, "n_group": 1, "topk_group": 1}, "mla"),
    ],
)
def test_refused_by_name(config, changes, reason):
    """A model that is not supported gets an error that says why, before any output."""
    model = tiny_model(config, **changes)
    with pytest.raises(ConfigError, match=reason), torch.no_grad():
        model(**inputs(0), past_key_values=kvlib.KVCache(model, "h2o:budget=0.5"))
