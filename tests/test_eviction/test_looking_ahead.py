# SPDX-License-Identifier: Apache-2.0
"""InfLLM's blocks, SpecKV's draft, and H2O inside a prompt, against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvlib
from kvlib.attention import Logits, column_sums
from kvlib.blocks import LayerKV
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, build_policy
from kvlib.eviction.speckv import first_layers
from kvlib.testing.models import tiny_model
from tests.oracles import eviction, windows

HEADS, WIDTH = 2, 8


def ids(n, seed=0):
    return torch.randint(0, 199, (1, n), generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from([1, 3, 4, 7]),
    st.integers(8, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 50),
    st.integers(1, 10),
    st.integers(0, 2**32 - 1),
)
def test_infllm_keeps_the_oracles_blocks(group, num, block, representatives, window, queries, seed):
    """Scores and choices; the same in every head."""
    rng = np.random.default_rng(seed)
    q, k = (
        rng.standard_normal((HEADS * group, num, WIDTH)),
        rng.standard_normal((HEADS, num, WIDTH)),
    )
    expected = windows.infllm_scores(
        q, k, block=block, representatives=representatives, window=window, queries=queries
    )
    keys = torch.from_numpy(k)
    positions = torch.arange(num, dtype=torch.int32).expand(HEADS, -1)
    layer = LayerKV(layer_idx=0, keys=keys, values=keys, positions=positions)
    view = LayerView(
        layer=layer,
        state=LayerState(),
        num_new=num,
        num_prompt=num,
        num_seen=num,
        local_sums=column_sums(torch.from_numpy(q), layer, Logits(window=window)),
        last_queries=torch.from_numpy(q)[:, -queries:],
    )
    budget = num // 2 + 2
    policy = build_policy(
        f"infllm:budget={budget},block={block},representatives={representatives},window={window},"
        f"queries={queries},sinks=1,recent=2"
    )
    policy.on_prefill_chunk(view)
    np.testing.assert_allclose(policy.scores(view)[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    plans = policy.on_prefill_end([view])[0]
    assert view.state.entries == {}
    marked = expected.copy()
    marked[[0, num - 1, num - 2]] = np.inf
    kept, margin = windows.highest(marked, budget)
    assume(margin > 1e-3 or margin == 0)
    if len(kept) == num:
        assert plans == ()
    else:
        assert [row.tolist() for row in plans[0].rows] == [kept] * HEADS


def sharpened(model):
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(6)
    return model


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("own", [False, True])
def test_speckv_votes_with_the_draft(group, own):
    """What a draft writes, greedily, chooses with the end of the prompt."""
    sizes = {"num_attention_heads": 2 * group, "hidden_size": 16 * group}
    model = sharpened(tiny_model(**sizes, attn_implementation="eager").double())
    draft = tiny_model(num_hidden_layers=1, seed=5).double()
    prompt = ids(40, seed=group)
    writer = first_layers(model, 2) if own else draft
    written = prompt
    for _ in range(6):  # without any cache
        last = writer(written, use_cache=False).logits[:, -1]
        written = torch.cat([written, last.argmax(-1, keepdim=True)], dim=1)
    attentions = model(written, output_attentions=True, use_cache=False).attentions
    cache = kvlib.KVCache(
        model,
        f"speckv:budget=15,lookahead=6,window=5,kernel=3,layers={2 if own else 0}",
        draft=None if own else draft,
    )
    model(prompt, past_key_values=cache)
    for index, matrix in enumerate(attentions):
        scores = windows.speckv_scores(matrix[0].numpy(), 40, window=5, kernel=3, group=group)
        for head, row in enumerate(cache.layer_kv(index).rows()):
            kept, margin = windows.highest(list(scores[head]), 10)
            assert margin > 1e-5 or margin == 0
            assert row.positions.tolist() == [*kept, *range(35, 40)]
    assert len(model.model.layers) == 3  # the draft took nothing away


def test_speckv_names_what_is_missing():
    model = tiny_model()
    for method, options, message in (
        ("speckv", {}, "give KVCache.*draft=model.*layers=4"),
        ("speckv:layers=9", {}, "layers is 9; the model has 3"),
        ("speckv", {"draft": tiny_model(vocab_size=50)}, "50 token ids, the model 199"),
        ("speckv:kernel=2", {}, "kernel must be odd"),
        ("infllm:block=0", {}, "block must be 1 or more"),
        ("infllm:sinks=-1", {}, "sinks must be 0 or more"),
        ("h2o:prefill=lazy", {}, "dense or streaming"),
        ("h2o:prefill=streaming", {}, "give the budget in tokens, not 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            kvlib.KVCache(model, method, **options)
    kvlib.KVCache(model, "speckv:budget=1.0")


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5])
def test_h2o_evicts_inside_a_prompt(chunk):
    """Pieces of one token are algorithm 1: as if the prompt were its first token, then steps."""
    model = tiny_model("LlamaConfig").double()
    whole = ids(30, seed=3)
    streaming = kvlib.KVCache(model, "h2o:budget=8,prefill=streaming", prefill_chunk_size=chunk)
    stepped = kvlib.KVCache(model, "h2o:budget=8")
    most = 0
    for piece in whole.split(chunk, 1):
        mine = model(piece, past_key_values=streaming).logits
        theirs = model(piece, past_key_values=stepped).logits
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        most = max(most, max(streaming.layer_kv(0).lengths))
    streaming.end_prefill()
    assert most == 8
    for index in range(3):
        held = streaming.layer_kv(index).positions
        assert torch.equal(held, stepped.layer_kv(index).positions)
        assert held[0].tolist() != list(range(22, 30))


def test_h2o_inside_a_prompt_equals_brute_force():
    """Token by token, against the oracle that recomputes every softmax."""
    rng = np.random.default_rng(0)
    oracle = eviction.HeavyHitters(HEADS, "8", "0.5")
    oracle.num_prompt = 1
    from tests.test_eviction.test_oracles import Driven

    mine = Driven("h2o:budget=8,prefill=streaming")
    for _ in range(30):
        parts = [rng.standard_normal((n, 1, WIDTH)) for n in (2 * HEADS, HEADS, HEADS)]
        oracle.forward(*parts)
        mine.forward(*parts)
        assert mine.positions == oracle.positions
