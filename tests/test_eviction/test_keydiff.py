# SPDX-License-Identifier: Apache-2.0
"""KeyDiff against its oracle, and what it is blind to."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, build_policy
from kvlib.eviction.keydiff import KeyDiff
from kvlib.testing.models import tiny_model
from tests.oracles import keydiff as oracle

CLEAR = 1e-5
"""Cosines of some ten float32 products differ from float64 by less."""


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(2, 40),
    budget=st.integers(1, 40),
    window=st.integers(0, 8),
    scale=st.sampled_from([1e-3, 1, 1e3]),
)
def test_choices_are_the_oracles(seed, tokens, budget, window, scale):
    """Through a real cache's view of random keys with a common part, at any scale."""
    assume(budget < tokens)
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, tokens, 8)) + rng.standard_normal((2, 1, 8))
    keys = (keys * scale).astype(np.float32)
    expected = [oracle.keydiff(head.tolist(), budget, window) for head in keys]
    assume(all(margin > CLEAR for _, margin in expected))
    policy = KeyDiff(budget=budget, window=window)
    found = policy.of_keys(torch.from_numpy(keys))
    for head in range(2):
        assert found[head].tolist() == pytest.approx(oracle.scores(keys[head].tolist()), abs=CLEAR)
    layer = kvlib.LayerKV(
        layer_idx=0,
        keys=torch.from_numpy(keys),
        values=torch.zeros(2, tokens, 4),
        positions=torch.arange(tokens, dtype=torch.int32).expand(2, -1),
    )
    view = LayerView(
        layer=layer, state=LayerState(), num_new=tokens, num_prompt=tokens, num_seen=tokens
    )
    ((plan,),) = policy.on_prefill_end([view])
    assert [row.tolist() for row in plan.rows] == [kept for kept, _ in expected]


@torch.no_grad()
def test_a_cache_stays_at_its_budget():
    """Prompt, steps and a question of many tokens: each time the oracle's choice."""
    model = tiny_model(hidden_size=64, num_attention_heads=4, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 199, (1, 60), generator=generator)
    cache, full = kvlib.KVCache(model, "keydiff:budget=10"), kvlib.KVCache(model)
    first = 40
    held = None
    for num in (first, 1, 1, 7, 1):
        seen = 0 if held is None else full.num_columns
        part = ids[:, seen : seen + num]
        model(part, past_key_values=cache)
        model(part, past_key_values=full)
        mine = cache.layer_kv(0)  # the first layer's keys do not depend on what was evicted
        whole = full.layer_kv(0)
        new = []
        for head in range(2):
            before = list(range(num)) if held is None else [*held[head], *range(seen, seen + num)]
            kept, margin = oracle.keydiff(whole.keys[head, before].tolist(), 10)
            assert margin > CLEAR
            new.append([before[i] for i in kept])
        assert mine.positions.tolist() == new
        held = new


def test_equal_keys_keep_the_first():
    """Ties are broken like everywhere: the lower index stays."""
    keys = torch.ones(1, 6, 4)
    assert KeyDiff.of_keys(keys).unique().numel() == 1
    layer = kvlib.LayerKV(layer_idx=0, keys=keys, values=keys, positions=range(6))
    view = LayerView(layer=layer, state=LayerState(), num_new=6, num_prompt=6, num_seen=6)
    ((plan,),) = KeyDiff(budget=3).on_prefill_end([view])
    assert [row.tolist() for row in plan.rows] == [[0, 1, 2]]
    assert KeyDiff.of_keys(torch.zeros(1, 6, 4)).isfinite().all()


def test_parameters():
    """Refused by name."""
    with pytest.raises(ConfigError, match="keydiff: window must be 0 or more, got -1"):
        build_policy("keydiff:window=-1")
    with pytest.raises(ConfigError, match="keydiff: "):
        build_policy("keydiff:budget=0")
