# SPDX-License-Identifier: Apache-2.0
"""Expected Attention against its oracle: over drawn queries, and over those of real models."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvlib
from kvlib.blocks import LayerKV, Row
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, QueryMoments, Resources, build_policy
from kvlib.eviction.expected import Expected, mean_rotation
from kvlib.spec import RopeSpec
from kvlib.testing.models import tiny_model
from kvlib.testing.recorder import contract_model, random_tokens
from tests.oracles import expected as oracle

HEADS, WIDTH = 2, 8
CLEAR = 1e-4
"""Relative error of float32 scores: exp of logits below 100, each of some 72 products."""

HALVES = {"angles": [1.0, 0.1, 0.01, 0.001], "pairs": [(0, 4), (1, 5), (2, 6), (3, 7)]}
ROPES = {
    "none": (None, {}),
    "halves": (RopeSpec(theta=1e4, rotary_dim=8), HALVES),
    "pairs": (
        RopeSpec(theta=1e4, rotary_dim=8, interleaved=True),
        {"angles": [1.0, 0.1, 0.01, 0.001], "pairs": [(0, 1), (2, 3), (4, 5), (6, 7)]},
    ),
    "part": (
        RopeSpec(theta=1e4, rotary_dim=4, first_channel=3),
        {"angles": [1.0, 0.01], "pairs": [(3, 5), (4, 6)]},
    ),
}


def draw(seed, group, num):
    """Queries before the embedding [Hq, S, D], whose mean is not 0, keys and values."""
    rng = np.random.default_rng(seed)
    shapes = [(HEADS * group, num, WIDTH), (HEADS, num, WIDTH), (HEADS, num, WIDTH)]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return 2 * q + rng.standard_normal((HEADS * group, 1, WIDTH)).astype(np.float32), k, v


def view_of(q, k, v, sinks, rope=None):
    """A layer at the end of its prompt."""
    late = q[:, sinks:].astype(np.float64)
    mean = late.mean(1)
    spread = np.stack([np.cov(row.T, bias=True) for row in late])
    moments = QueryMoments(
        late.shape[1], torch.from_numpy(mean).float(), torch.from_numpy(spread).float()
    )
    num = k.shape[1]
    layer = LayerKV(layer_idx=0, keys=torch.tensor(k), values=torch.tensor(v), positions=range(num))
    return LayerView(
        layer=layer,
        state=LayerState(),
        num_new=num,
        num_prompt=num,
        num_seen=num,
        query_moments=moments,
        rope=rope,
    )


def kept(policy, view):
    (plans,) = policy.on_prefill_end([view])
    return [row.tolist() for row in plans[0].rows]


@given(
    seed=st.integers(0, 2**31),
    group=st.sampled_from([1, 3, 4, 7]),
    num=st.integers(14, 30),
    budget=st.integers(1, 12),
    rope=st.sampled_from(sorted(ROPES)),
    future=st.sampled_from([1, 5, 40]),
    sinks=st.sampled_from([0, 1, 4]),
    eps=st.sampled_from([0.0, 0.02, 1.0]),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_choices_are_the_oracles(seed, group, num, budget, rope, future, sinks, eps, flags):
    """Every parameter, rotary embeddings of every kind: the same entries of every head."""
    q, k, v = draw(seed, group, num)
    spec, turns = ROPES[rope]
    options = {"sinks": sinks, "future": future, "eps": eps}
    options |= {"covariance": flags[0], "norm": flags[1]}
    scores = oracle.expected_scores(q, k, v, **options, **turns)
    theirs, margin = oracle.choose(scores, min(sinks, budget), budget)
    assume(margin > CLEAR or budget <= sinks)
    policy = Expected(budget=budget, **options)
    view = view_of(q, k, v, sinks, spec)
    mine = policy.scores(view)
    np.testing.assert_allclose(mine[:, sinks:], scores, rtol=CLEAR)
    assert not mine[:, :sinks].any()
    expected = [list(range(budget))] * HEADS if budget <= sinks else theirs
    assert kept(policy, view) == expected


# Through models


def prompt_of(model, cache, ids, **options):
    """Queries before the embedding [Hq, T, D] of each layer, heard from the model itself."""
    heard = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda *x: heard.append(x[2]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, **options)
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    return [x.unflatten(-1, (heads, -1)).transpose(1, 2).double() for x in heard]


def held(cache, index, sequence=0):
    return cache.layer_kv(index, sequence).positions_tensor().tolist()


OPTIONS = {"sinks": 4, "future": 24, "eps": 0.0, "covariance": True, "norm": True}
TEXT = "future=24"


def assert_oracles(cache, full, queries, budget, *, sequence=0, turns=HALVES, later=()):
    """What every layer holds is what the oracle keeps of the complete keys and values."""
    for index, q in enumerate(queries):
        layer = full.layer_kv(index, sequence)
        q = q[sequence, :, -layer.keys.shape[1] :]
        scores = oracle.expected_scores(q, layer.keys, layer.values, **OPTIONS, **turns)
        theirs, margin = oracle.choose(scores, OPTIONS["sinks"], budget)
        assert margin > CLEAR, "choose another seed"
        assert held(cache, index, sequence) == [[*row, *later] for row in theirs]


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("chunk", [None, 4, 16])
def test_in_a_model(group, chunk):
    """In one pass or in pieces, some of them sinks only; later tokens all stay."""
    model = contract_model(group)
    ids = random_tokens(1, 40, seed=group)
    full = kvlib.KVCache(model, "full")
    queries = prompt_of(model, full, ids)
    cache = kvlib.KVCache(model, f"expected:budget=15,{TEXT}", prefill_chunk_size=chunk)
    for part in ids.split(chunk or 40, dim=1):
        prompt_of(model, cache, part)
    cache.end_prefill()
    assert_oracles(cache, full, queries, 15)
    for num in (1, 5, 1):
        prompt_of(model, cache, random_tokens(1, num))
    assert_oracles(cache, full, queries, 15, later=range(40, 47))


def test_in_a_padded_batch():
    """Each sequence has moments, positions and sinks of its own."""
    model = contract_model()
    ids = random_tokens(2, 40, seed=3)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, :9] = 0
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    full = kvlib.KVCache(model, "full")
    queries = prompt_of(model, full, ids, **options)
    cache = kvlib.KVCache(model, f"expected:budget=12,{TEXT}")
    prompt_of(model, cache, ids, **options)
    for sequence in range(2):
        assert_oracles(cache, full, queries, 12, sequence=sequence)


@pytest.mark.parametrize(
    ("config", "changes", "turns"),
    [
        ("GlmConfig", {"partial_rotary_factor": 0.5, "pad_token_id": 0}, "pairs"),
        ("StableLmConfig", {"partial_rotary_factor": 0.5}, "halves"),
    ],
)
def test_in_models_that_rotate_a_part(config, changes, turns):
    """Half of the channels, by neighbours and by halves."""
    model = tiny_model(config, **changes).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("q_proj" in name or "k_proj" in name) and weight.dim() == 2:
                weight.mul_(16)
    pairs = {"pairs": [(0, 1), (2, 3)], "halves": [(0, 2), (1, 3)]}[turns]
    ids = random_tokens(1, 40, seed=2)
    full = kvlib.KVCache(model, "full")
    queries = prompt_of(model, full, ids)
    cache = kvlib.KVCache(model, f"expected:budget=15,{TEXT}")
    prompt_of(model, cache, ids)
    assert_oracles(cache, full, queries, 15, turns={"angles": [1.0, 0.01], "pairs": pairs})


# What the docstrings claim


def test_logits_are_the_expectation():
    """Exp of z is the mean of exp(q.k / sqrt d) over normal queries of these moments."""
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(WIDTH)
    root = rng.standard_normal((WIDTH, WIDTH)) / 2
    queries = mean + rng.standard_normal((400_000, WIDTH)) @ root.T
    keys = rng.standard_normal((3, WIDTH))
    drawn = np.exp(queries @ keys.T / math.sqrt(WIDTH)).mean(0)
    z = Expected()._logits(
        torch.tensor(keys), torch.tensor(mean[None]), torch.tensor((root @ root.T)[None])
    )
    np.testing.assert_allclose(z[0], np.log(drawn), atol=0.02)


@pytest.mark.parametrize("rope", ["halves", "pairs", "part"])
def test_mean_rotation(rope):
    """A query turned to each position, averaged; at one position it is a rotation."""
    spec, turns = ROPES[rope]
    q = np.random.default_rng(1).standard_normal(WIDTH)
    every = [oracle.turned(q, position, **turns) for position in range(100, 130)]
    matrix = mean_rotation(spec, WIDTH, 100, 30).numpy()
    np.testing.assert_allclose(matrix @ q, np.mean(every, axis=0), atol=1e-12)
    one = mean_rotation(spec, WIDTH, 7, 1)
    torch.testing.assert_close(one @ one.T, torch.eye(WIDTH, dtype=torch.float64))


def test_sinks_are_in_no_statistics():
    """Whatever their keys and values are, the others are scored alike."""
    q, k, v = draw(0, 3, 30)
    policy = Expected(budget=10)
    before = policy.scores(view_of(q, k, v, 4))
    k[:, :4], v[:, :4] = 100, 100
    assert torch.equal(policy.scores(view_of(q, k, v, 4)), before)


def test_eps_moves_towards_the_value():
    """With a large one, only the lengths of the values count."""
    q, k, v = draw(0, 3, 30)
    view = view_of(q, k, v, 4)
    lengths = torch.tensor(v)[:, 4:].norm(dim=-1)
    longest = [
        [0, 1, 2, 3, *sorted((4 + row.topk(6).indices).tolist())] for row in lengths.unbind()
    ]
    assert kept(Expected(budget=10, eps=1e4), view) == longest
    assert kept(Expected(budget=10), view) != longest


def test_ties_keep_the_earlier():
    """Equal keys and values: the first ones."""
    q, k, v = draw(0, 3, 30)
    k[:], v[:] = k[:, :1], v[:, :1]
    assert kept(Expected(budget=10), view_of(q, k, v, 4)) == [list(range(10))] * HEADS


def test_rows_of_different_lengths():
    """Each row is scored as it is alone."""
    q, k, v = draw(0, 3, 30)
    view = view_of(q, k, v, 4)
    rows = [
        Row(row.keys[:n], row.values[:n], row.positions[:n], None)
        for row, n in zip(view.layer.rows(), (30, 17), strict=True)
    ]
    short = LayerKV.from_rows(
        0,
        [
            row._replace(keys=row.keys[:17], values=row.values[:17], positions=row.positions[:17])
            for row in view.layer.rows()
        ],
    )
    ragged = replace(view, layer=LayerKV.from_rows(0, rows))
    mine = Expected().scores(ragged)
    assert torch.equal(mine[0], Expected().scores(view)[0])
    torch.testing.assert_close(mine[1, :17], Expected().scores(replace(view, layer=short))[1])
    assert not mine[1, 17:].any()
    assert kept(Expected(budget=18), ragged)[1] == list(range(17))


@pytest.mark.parametrize("prompt", [3, 4, 5])
@pytest.mark.parametrize("budget", [2, 4])
def test_prompts_of_sinks_only(prompt, budget):
    """Moments of nothing: the first tokens stay."""
    cache = kvlib.KVCache(contract_model(), f"expected:budget={budget}")
    prompt_of(contract_model(), cache, random_tokens(1, prompt))
    assert held(cache, 0) == [list(range(min(prompt, budget)))] * HEADS


# What it refuses


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("expected:future=0", "expected: future must be 1 position or more, got 0"),
        ("expected:sinks=-1", "expected: sinks must be 0 or more, got -1"),
        ("expected:eps=-0.5", "expected: eps must be 0 or more, got -0.5"),
        ("expected:norm=2", "expected:norm must be bool, got '2'"),
        ("expected:futur=8", "no parameter 'futur'. Did you mean 'future'"),
    ],
)
def test_wrong_parameters_are_named(method, message):
    """What was seen and what is expected."""
    with pytest.raises(ConfigError, match=message):
        build_policy(method)


def test_refuses_moving_frequencies():
    """A rotary embedding that depends on the length; nothing is refused if nothing goes."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny_model(rope_parameters=scaling)
    with pytest.raises(ConfigError, match=r"expected cannot tell how later queries .* another"):
        kvlib.KVCache(model, Expected())
    kvlib.KVCache(model, Expected(budget=1.0))
    kvlib.KVCache(tiny_model(), Expected())
    Expected().check(Resources())


def test_missing_moments():
    """Refused by name."""
    q, k, v = draw(0, 1, 20)
    view = view_of(q, k, v, 4)
    bare = replace(view, query_moments=None)
    with pytest.raises(ConfigError, match="expected needs the moments of the prompt's queries"):
        Expected(budget=4).on_prefill_end([bare])
