# SPDX-License-Identifier: Apache-2.0
"""TOVA against its oracle: over drawn attention, and over what a real model attends to."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, build_policy
from kvlib.eviction.tova import TOVA
from kvlib.testing.models import random_block, tiny_model, tiny_spec
from tests.oracles.tova import Tova
from tests.test_eviction.test_oracles import HEADS, RELATIVE, Driven, random_attention


@given(
    seed=st.integers(0, 2**31),
    group=st.sampled_from([1, 3, 4]),
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    budget=st.integers(1, 12),
    window=st.integers(0, 3),
)
def test_choices_are_the_oracles(seed, group, sizes, budget, window):
    """Prompt, steps of one token and of many: the same positions in all heads."""
    mine = Driven(f"tova:budget={budget},window={window}")
    theirs = Tova(HEADS, budget, window)
    for q, k, v in random_attention(seed, group, [sizes[0] + 12, *sizes[1:]]):
        theirs.forward(q, k)
        assume(theirs.margin > RELATIVE)
        mine.forward(q, k, v)
        assert mine.positions == [theirs.positions] * HEADS


def first_layer(model, ids, positions):
    """Queries [Hq, T, D] and keys [Hkv, T, D] of layer 0, which no eviction changes."""
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    shape = (*hidden.shape[:2], -1, layer.self_attn.head_dim)
    q, k = (
        proj(hidden).view(shape).transpose(1, 2)
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    cos, sin = model.model.rotary_emb(hidden, positions)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    return q[0].double().tolist(), k[0].double().tolist()


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("removed", [0, 2])
def test_a_real_model_over_a_real_cache(padding, removed):
    """Padded beside another sequence, and with tokens taken back, which decide nothing."""
    model = tiny_model(num_attention_heads=6, head_dim=8)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 199, (2, 60), generator=generator)
    cache = kvlib.KVCache(model, "tova:budget=9")
    theirs = Tova(2, 9)
    mask = torch.ones(2, 0, dtype=torch.int64)
    seen = at = 0
    for num in (20 + padding, 1, 6, 1, 1):
        part = ids[:, at : at + num]
        new = torch.ones(2, num, dtype=torch.int64)
        if at == 0:
            new[1, :padding] = 0
        mask = torch.cat([mask, new], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -num:]
        if removed:
            cache.activate_past_recording()
        model(part, attention_mask=mask, position_ids=positions, past_key_values=cache)
        gone = removed if removed and num > removed else 0
        if removed:
            cache.crop(-gone)
        mask = mask[:, : mask.shape[1] - gone]
        at += num - gone
        valid = part[1:, (padding if not seen else 0) : num - gone]
        places = torch.arange(seen, seen + valid.shape[1])[None]
        seen += valid.shape[1]
        theirs.forward(*first_layer(model, valid, places))
        assert theirs.margin > RELATIVE
        assert cache.layer_kv(0, 1).positions.tolist() == [theirs.positions] * 2


def test_missing_attention_and_wrong_parameters():
    """Refused by name."""
    layer = random_block(tiny_spec(), 20).layers[0]
    view = LayerView(layer=layer, state=LayerState(), num_new=20, num_prompt=20, num_seen=20)
    with pytest.raises(ConfigError, match="tova needs the attention of the last query"):
        TOVA(budget=4).on_prefill_end([view])
    with pytest.raises(ConfigError, match="tova: window must be 0 or more, got -2"):
        build_policy("tova:window=-2")
    assert not TOVA(budget=1.0).needs.any_signal
