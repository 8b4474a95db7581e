# SPDX-License-Identifier: Apache-2.0
"""D2O against brute force, over several layers and passes, and its parts by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvlib import KVCache
from kvlib.attention import column_sums
from kvlib.blocks import LayerKV
from kvlib.cache_rows import LayerRow, extend_entries
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, Needs, build_policy
from kvlib.eviction import d2o as module
from kvlib.eviction.d2o import D2O, layer_shares, nearest
from kvlib.plans import KeepTokens, MergeTokens
from kvlib.testing.recorder import contract_model, random_tokens
from tests.oracles import d2o as oracle

HEADS = 2
RELATIVE = 2e-5
"""Error of float32 scores, as in test_oracles; of cosines it is smaller."""
GAP = 5e-6
OFFICIAL = {
    "norm": "official",
    "first_eviction": "first_step",
    "skip_layers": True,
    "weights": "mean",
    "match": "rank",
    "beta": 0.5,
}


def text(options):
    return "".join(f",{key}={str(value).lower()}" for key, value in options.items())


def random_layers(seed, layers, group, sizes, width=8, *, like=0.0):
    """Queries, keys and values of every layer in every pass; layers differ in how sharp they are.

    Args:
        like: how much all keys have in common.
    """
    rng = np.random.default_rng(seed)
    sharp = 3 * rng.random(layers)
    common = like * rng.standard_normal((layers, HEADS, 1, width))

    def draw(heads, num, factor=1.0, plus=0.0):
        return (factor * rng.standard_normal((heads, num, width)) + plus).astype(np.float32)

    return [
        [
            (draw(HEADS * group, n, sharp[i]), draw(HEADS, n, plus=common[i]), draw(HEADS, n))
            for i in range(layers)
        ]
        for n in sizes
    ]


class Driven:
    """A policy over several layers: rows, state and signals as a cache would keep them."""

    def __init__(self, method, layers):
        self.policy = build_policy(method)
        self.rows = [None] * layers
        self.num_seen = self.num_prompt = 0
        self.plans = []

    def forward(self, parts):
        num = parts[0][1].shape[1]
        positions = torch.arange(self.num_seen, self.num_seen + num, dtype=torch.int32)
        self.num_seen += num
        is_prompt = self.num_prompt == 0
        if is_prompt:
            self.num_prompt = num
        views = [self.view(i, part, positions, is_prompt) for i, part in enumerate(parts)]
        if is_prompt:
            for view in views:
                self.policy.on_prefill_chunk(view)
            self.plans = self.policy.on_prefill_end(views)
        else:
            self.plans = self.policy.on_step(views)
        for row, plans in zip(self.rows, self.plans, strict=True):
            row.apply(plans, None)
        return self

    def view(self, index, part, positions, is_prompt):
        q, k, v = (torch.from_numpy(x) for x in part)
        if is_prompt:
            held = positions.expand(len(k), -1)
            layer = LayerKV(layer_idx=index, keys=k, values=v, positions=held)
            self.rows[index] = LayerRow(layer, LayerState())
        else:
            old = self.rows[index].layer.lengths
            self.rows[index].append(k, v, positions)
            extend_entries(self.rows[index].state, old, self.rows[index].layer)
        row = self.rows[index]
        return LayerView(
            layer=row.layer,
            state=row.state,
            num_new=k.shape[1],
            num_prompt=self.num_prompt,
            num_seen=self.num_seen,
            column_sums=column_sums(q, row.layer),
            place=index,
            num_layers=len(self.rows),
        )

    def positions(self, index):
        return self.rows[index].layer.positions_tensor().tolist()

    def value(self, index, name):
        x = self.rows[index].state.values.get(name)
        return None if x is None else x.item()


def assert_layer(row, expected):
    """Positions, scores, keys and values of a layer are the oracle's."""
    layer = row.layer
    assert layer.positions_tensor().tolist() == [[e["at"] for e in r] for r in expected.rows]
    for name, seen in (("key", layer.keys), ("value", layer.values)):
        wanted = np.array([[e[name] for e in r] for r in expected.rows])
        np.testing.assert_allclose(seen.numpy(), wanted, rtol=0, atol=2e-5)
    scores = np.array([[e["score"] for e in r] for r in expected.rows])
    mine = row.state.entries["scores"].numpy()
    np.testing.assert_allclose(mine, scores, rtol=RELATIVE, atol=1e-6)
    tau = row.state.values.get("tau")
    assert (tau is None) == (expected.tau is None)
    if tau is not None:
        assert tau.item() == pytest.approx(expected.tau, abs=GAP)


def is_clear(theirs):
    """Whether no choice hangs on rounding."""
    return theirs.margin > RELATIVE and theirs.gap > GAP and theirs.rounding > 1e-4


def assert_equals_brute_force(budget, options, forwards, clear=assume):
    """After every pass; returns the oracle. `clear` is told whether rounding can decide."""
    num = len(forwards[0])
    theirs = oracle.Model(num, HEADS, budget, **options)
    mine = Driven(f"d2o:budget={budget}{text(options)}", num)
    for parts in forwards:
        theirs.forward(parts)
        clear(is_clear(theirs))
        mine.forward(parts)
        for row, layer in zip(mine.rows, theirs.layers, strict=True):
            assert_layer(row, layer)
    return theirs


GROUPS = st.sampled_from([1, 3, 4, 7])
SIZES = st.sampled_from([(30, 1, 1, 1, 1), (24, 1, 4, 1), (3, 1, 1, 1, 1, 1, 1), (1, 12, 1, 2)])
SEEDS = st.integers(0, 2**32 - 1)
BUDGETS = st.sampled_from(["1", "2", "5", "8", "11", "0.1", "0.25", "0.5", "0.9"])
CHOICES = st.fixed_dictionaries(
    {
        "recent": st.sampled_from(["0.0", "0.07", "0.3", "0.5", "1.0"]),
        "sinks": st.sampled_from([0, 1, 4, 9]),
        "beta": st.sampled_from([0.0, 0.5, 0.7, 1.0]),
        "merge_self": st.sampled_from([0.0, 0.1, math.e]),
        "merge_keys": st.booleans(),
        "norm": st.sampled_from(["across_layers", "official"]),
        "first_eviction": st.sampled_from(["prefill_end", "first_step"]),
        "skip_layers": st.sampled_from([False, False, True]),
        "weights": st.sampled_from(["softmax", "mean"]),
        "match": st.sampled_from(["head", "rank"]),
    }
)


@settings(max_examples=max(60, settings.default.max_examples), deadline=None)
@given(GROUPS, BUDGETS, CHOICES, SIZES, st.sampled_from([0.0, 2.0]), SEEDS)
def test_equals_brute_force(group, budget, options, sizes, like, seed):
    """All options at random: positions, keys, values, scores and thresholds."""
    layers = 5 if options["skip_layers"] else 3
    forwards = random_layers(seed, layers, group, sizes, like=like)
    assert_equals_brute_force(budget, options, forwards)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        *({key: value} for key, value in OFFICIAL.items()),
        OFFICIAL,
        {"merge_keys": False},
        {"merge_self": 0.1},
    ],
    ids=lambda options: "+".join(options) or "definition",
)
def test_each_option_equals_the_oracles(options, group):
    """The definition, each departure alone, and all that make the official code."""

    def clear(is_so):
        assert is_so, "choose another seed"

    forwards = random_layers(group, 5, group, (30, 1, 1, 1, 1, 4, 1), like=1.0)
    theirs = assert_equals_brute_force("0.3", options, forwards, clear)
    assert theirs.merges > 0


@pytest.mark.parametrize("key", OFFICIAL)
def test_each_option_makes_a_difference(key):
    """Otherwise the comparisons above would show nothing."""
    forwards = random_layers(3, 5, 3, (30, 1, 1, 1, 1), like=1.0)
    pair = [Driven(f"d2o:budget=0.3{text(o)}", 5) for o in ({}, {key: OFFICIAL[key]})]
    for parts in forwards:
        for mine in pair:
            mine.forward(parts)
    same = [a.layer.equal(b.layer) for a, b in zip(*(mine.rows for mine in pair), strict=True)]
    assert not all(same)


# Layer budgets


def test_shares_by_hand():
    """Softmax of minus the scaled variances: e to 1 between the extremes."""
    flat, middle, peaked = (torch.tensor([x, x], dtype=torch.float64) for x in (1.0, 2.0, 3.0))
    whole = 1 + math.exp(-0.5) + math.exp(-1)
    expected = [1 / whole, math.exp(-0.5) / whole, math.exp(-1) / whole]
    assert layer_shares([flat, middle, peaked], "across_layers") == pytest.approx(expected)
    # Inside a layer all heads are equal, so nothing is left to compare.
    assert layer_shares([flat, middle, peaked], "official") == pytest.approx([1 / 3] * 3)
    # Rounding is no difference between layers.
    assert layer_shares([flat, flat + 1e-7], "across_layers") == [0.5, 0.5]
    spread = torch.tensor([0.0, 4.0, 4.0, 4.0], dtype=torch.float64)
    f = math.exp(-0.75)
    seen = layer_shares([spread, torch.ones(4).double()], "official")
    assert seen == pytest.approx([f / (f + 1), 1 / (f + 1)])


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=40),
    st.integers(10, 500),
    st.sampled_from(["across_layers", "official"]),
)
def test_layers_sum_to_the_budget(variances, mean, norm):
    """sum of r_l = rho * L, in whole entries, where no limit applies."""
    layers = [torch.tensor([x, 0.0, x / 3], dtype=torch.float64) for x in variances]
    assert sum(layer_shares(layers, norm)) == pytest.approx(1)
    budgets = D2O(budget=mean, norm=norm).layer_budgets(layers, mean, 10)
    assert sum(budgets) == mean * len(layers)
    assert max(budgets) <= math.e * min(budgets) + math.e + 1


def test_limits_of_a_share():
    """At least a hundredth of the prompt, at most all of it; nobody makes up for that."""
    layers = [torch.tensor([x], dtype=torch.float64) for x in (0.0, 1.0)]
    everything = torch.iinfo(torch.int64).max
    # 2 * 0.011 * 1000 * 0.269 = 5.9 and 16.1
    assert D2O(budget=0.011).layer_budgets(layers, 11, 1000) == [16, 10]
    # 2 * 0.8 * 100 * 0.731 = 117 is more than the prompt
    assert D2O(budget=0.8).layer_budgets(layers, 80, 100) == [everything, 43]
    # a number of tokens stays a limit, and a hundredth is not more than that number
    assert D2O(budget=80).layer_budgets(layers, 80, 100) == [117, 43]
    assert D2O(budget=3).layer_budgets(layers, 3, 1000) == [4, 3]


def test_official_mean_share_of_32_layers():
    """Three layers that never evict come on top of the budget."""
    layers = [torch.ones(4, dtype=torch.float64)] * 32
    policy = D2O(budget=0.2, skip_layers=True)
    budgets = policy.layer_budgets(layers, 200, 1000)
    assert [i for i, n in enumerate(budgets) if n > 1000] == [0, 1, 31]
    assert sum(min(n, 1000) for n in budgets) / 32 == 275


def test_denser_layers_keep_more():
    """Uniform attention beside a layer that looks at its first entry."""
    (parts,) = random_layers(0, 2, 1, (40,))
    flat, peaked = ([x.copy() for x in part] for part in parts)
    flat[0][:] = 0
    peaked[0][:] = 0
    peaked[0][..., 0] = 30
    peaked[1][..., 0] = 0
    peaked[1][:, 0, 0] = 3
    mine = Driven("d2o:budget=10", 2).forward([flat, peaked])
    assert [mine.value(i, "layer_budget") for i in range(2)] == [15, 5]
    assert [len(mine.positions(i)[0]) for i in range(2)] == [15, 5]


def test_variance_is_of_single_query_heads():
    """Two heads that look at different entries, each at one, are not a dense layer."""
    num = 30
    k = np.zeros((1, num, 2), dtype=np.float32)
    k[0, 0], k[0, 1] = (40, 0), (0, 40)
    v = np.zeros_like(k)
    one_each = np.zeros((2, num, 2), dtype=np.float32)
    one_each[0, :, 0] = one_each[1, :, 1] = 40
    uniform = np.zeros_like(one_each)
    both = np.full_like(one_each, 40)  # both heads at both entries: half the sum each
    mine = Driven("d2o:budget=10", 3).forward([(one_each, k, v), (uniform, k, v), (both, k, v)])
    budgets = [mine.value(i, "layer_budget") for i in range(3)]
    assert budgets[0] < budgets[2] < budgets[1]


# When


def test_a_number_of_tokens_is_the_mean_and_a_limit():
    """Nothing goes before the sequence is longer than the mean; then each layer has its own."""
    forwards = random_layers(5, 3, 3, (10, 1, 1, 1, *[1] * 20))
    mine = Driven("d2o:budget=12", 3)
    seen = 0
    for parts in forwards:
        seen += parts[0][1].shape[1]
        mine.forward(parts)
        budgets = [mine.value(i, "layer_budget") for i in range(3)]
        assert sum(budgets) == 36
        assert len(set(budgets)) > 1
        held = [len(mine.positions(i)[0]) for i in range(3)]
        assert held == ([seen] * 3 if seen <= 12 else [min(n, seen) for n in budgets])
    assert sum(held) == 36


def test_a_share_of_one_never_evicts():
    """A layer whose fraction reaches the prompt keeps later tokens too."""
    forwards = random_layers(5, 3, 3, (20, *[1] * 20))
    mine = Driven("d2o:budget=0.8", 3)
    for parts in forwards:
        mine.forward(parts)
    budgets = [mine.value(i, "layer_budget") for i in range(3)]
    held = [len(mine.positions(i)[0]) for i in range(3)]
    assert max(budgets) > 1000
    assert held == [min(n, 40) for n in budgets]


def test_everything_kept_is_nothing_done():
    """rho = 1: no plan, no number, no signal."""
    mine = Driven("d2o:budget=1.0", 2)
    for parts in random_layers(0, 2, 3, (20, 1, 5, 1)):
        mine.forward(parts)
        assert list(mine.plans) == [(), ()]
        assert all(not r.state.entries and not r.state.values for r in mine.rows)
    assert mine.policy.needs == Needs(steps=False)


def test_first_step():
    """The official code leaves the prompt whole until a token follows."""
    prompt, step = random_layers(0, 2, 3, (20, 1))
    mine = Driven("d2o:budget=5,first_eviction=first_step", 2).forward(prompt)
    assert list(mine.plans) == [(), ()]
    budgets = [mine.value(i, "layer_budget") for i in range(2)]
    mine.forward(step)
    assert [len(mine.positions(i)[0]) for i in range(2)] == budgets


def test_the_threshold_does_not_move_where_nothing_goes():
    """And is not set."""
    forwards = random_layers(0, 1, 1, (5, 1, 1, 1, 1))
    mine = Driven("d2o:budget=8", 1)
    for parts in forwards[:-1]:
        assert mine.forward(parts).value(0, "tau") is None
    assert mine.forward(forwards[-1]).value(0, "tau") is not None


@pytest.mark.parametrize(
    ("budget", "recent", "sinks", "expected"),
    [
        (10, "0.5", 4, (4, 5)),
        (10, "0.55", 4, (4, 6)),
        (5, "0.5", 4, (2, 3)),
        (4, "0.0", 4, (3, 0)),
        (1, "0.0", 4, (0, 0)),
        (1, "0.5", 4, (0, 1)),
        (6, "1.0", 4, (0, 6)),
        (200, "0.07", 0, (0, 14)),
    ],
)
def test_protected(budget, recent, sinks, expected):
    """Sinks are heavy hitters and never all that stays; a share means the decimal it is."""
    guard = build_policy(f"d2o:recent={recent},sinks={sinks}").protected(budget)
    assert (guard.sinks, guard.window) == expected


# Merging by hand


def planar(*degrees):
    """Keys in two channels."""
    turn = np.radians(degrees)
    return np.stack([np.cos(turn), np.sin(turn)], axis=1).astype(np.float32)[None]


def steps_of(keys, values, prompt):
    """Passes with uniform attention: the earliest entries are the heaviest."""
    q = np.zeros_like(keys)
    whole = [x[:, :prompt] for x in (q, keys, values)]
    later = [[x[:, i : i + 1] for x in (q, keys, values)] for i in range(prompt, keys.shape[1])]
    return [[tuple(part)] for part in [whole, *later]]


def test_threshold_and_merges_by_hand():
    """One head holds 0 and 90 degrees and the newest; the one before it has to go.

    The threshold after each step, and whether the entry that went was merged.
    """
    cos = [math.cos(math.radians(d)) for d in (30, 40, 10)]
    keys = planar(0, 90, 180, 30, 230, 100, 0)  # what goes: 180, 30, 230, 100
    values = np.arange(14, dtype=np.float32).reshape(1, 7, 2)
    mine = Driven("d2o:budget=3,recent=0.3,sinks=2,beta=0.7", 1)
    passes = steps_of(keys, values, 3)
    mine.forward(passes[0])
    # 180 is nearest to 90 degrees, with u = 0: the first threshold, which it reaches
    mine.forward(passes[1])
    assert mine.positions(0) == [[0, 1, 3]]
    assert mine.value(0, "tau") == pytest.approx(0, abs=1e-6)
    whole = math.e + 1
    second = (math.e * keys[0, 1] + keys[0, 2]) / whole
    np.testing.assert_allclose(mine.rows[0].layer.keys[0, 1], second, atol=1e-6)
    expected = (math.e * values[0, 1] + values[0, 2]) / whole
    np.testing.assert_allclose(mine.rows[0].layer.values[0, 1], expected, atol=1e-5)
    # 30 is nearest to 0 degrees
    mine.forward(passes[2])
    assert mine.value(0, "tau") == pytest.approx(0.7 * cos[0], abs=1e-6)
    own = math.e / (math.e + math.exp(cos[0]))
    first = own * keys[0, 0] + (1 - own) * keys[0, 3]
    np.testing.assert_allclose(mine.rows[0].layer.keys[0, 0], first, atol=1e-6)
    # 230 goes while 100 has come: its nearest is far, and it is dropped, but the threshold moves
    before = mine.rows[0].layer.keys[:, :2].clone()
    u = max(oracle.cosine(planar(230)[0, 0], x) for x in (first, second, planar(100)[0, 0]))
    mine.forward(passes[3])
    assert u < 0
    assert mine.value(0, "tau") == pytest.approx(0.7 * u + 0.3 * 0.7 * cos[0], abs=1e-6)
    assert [type(plan) for plan in mine.plans[0]] == [KeepTokens]
    assert torch.equal(mine.rows[0].layer.keys[:, :2], before)


def test_identical_entries_merge_to_themselves():
    """All similarities are 1, which rounding must not put below their mean; nothing changes."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, HEADS, 30, 64)).astype(np.float32)
    twice = [np.concatenate([x, x], axis=1) for x in (np.zeros_like(k), k, v)]
    mine = Driven("d2o:budget=30,recent=0.0", 1).forward([tuple(twice)])
    assert mine.positions(0) == [list(range(30))] * HEADS
    assert mine.value(0, "tau") == pytest.approx(1, abs=1e-6)
    merge = mine.plans[0][1]
    pairs = sorted(zip(merge.head.tolist(), merge.src.tolist(), merge.dst.tolist(), strict=True))
    assert pairs == [(h, s, s % 30) for h in range(HEADS) for s in range(60)]
    np.testing.assert_allclose(mine.rows[0].layer.keys, k, atol=2e-6)
    np.testing.assert_allclose(mine.rows[0].layer.values, v, atol=2e-6)


@given(GROUPS, st.sampled_from([0.1, 1.0, math.e]), SEEDS)
def test_weights_sum_to_one(group, merge_self, seed):
    """For each destination, its own weight included; it is listed once, and stays."""
    (parts,) = random_layers(seed, 1, group, (40,), like=1.0)
    mine = Driven(f"d2o:budget=12,merge_self={merge_self}", 1).forward(parts)
    keep, merge = mine.plans[0]
    assert isinstance(merge, MergeTokens)
    for h, row in enumerate(keep.rows):
        at = merge.head == h
        for dst in merge.dst[at].unique().tolist():
            assert dst in row.tolist()
            pairs = at & (merge.dst == dst)
            assert float(merge.weight[pairs].sum()) == pytest.approx(1, abs=1e-6)
            own = pairs & (merge.src == dst)
            assert int(own.sum()) == 1
            us = merge.weight[pairs & ~own] / merge.weight[own] * merge_self
            assert bool(((us >= math.exp(-1)) & (us <= math.e + 1e-4)).all())


def test_mean_weights_shrink():
    """The official code: u-scaled tokens, averaged with the one they join."""
    (parts,) = random_layers(0, 1, 1, (40,), like=1.0)
    merge = Driven("d2o:budget=12,weights=mean", 1).forward(parts).plans[0][1]
    for h in range(HEADS):
        for dst in merge.dst[merge.head == h].unique().tolist():
            pairs = (merge.head == h) & (merge.dst == dst)
            own = pairs & (merge.src == dst)
            assert float(merge.weight[own]) == pytest.approx(1 / int(pairs.sum()))
            assert float(merge.weight[pairs].sum()) < 1


def test_values_only():
    """merge_keys=False leaves every kept key as it was, bit for bit."""
    (parts,) = random_layers(0, 1, 3, (40,), like=1.0)
    mine = Driven("d2o:budget=12,merge_keys=false", 1).forward(parts)
    assert mine.plans[0][1].axis == "values"
    at = torch.tensor(mine.positions(0))
    rows = torch.arange(HEADS)[:, None]
    layer = mine.rows[0].layer
    assert torch.equal(layer.keys, torch.from_numpy(parts[0][1])[rows, at])
    assert not torch.equal(layer.values, torch.from_numpy(parts[0][2])[rows, at])


def test_heads_match_for_themselves():
    """One head's evicted entry reaches the common threshold, the other's does not; unless by rank.

    The heads' similarities are 1 and 0, their mean 0.5.
    """
    keys = np.concatenate([planar(0, 90, 90, 45), planar(0, 0, 90, 0)])
    values = np.random.default_rng(0).standard_normal(keys.shape).astype(np.float32)
    merged = {}
    for match in ("head", "rank"):
        mine = Driven(f"d2o:budget=3,recent=0.3,sinks=2,match={match}", 1)
        for parts in steps_of(keys, values, 3):
            mine.forward(parts)
        assert mine.positions(0) == [[0, 1, 3]] * 2
        assert mine.value(0, "tau") == pytest.approx(0.5, abs=1e-6)
        merged[match] = set(mine.plans[0][1].head.tolist())
    assert merged == {"head": {0}, "rank": {0, 1}}


def test_merging_adds_nothing_to_scores():
    """Scores and positions are those of a run in which nothing reaches the threshold."""
    forwards = random_layers(0, 1, 1, (40,), like=1.0)
    q, k, v = forwards[0][0]
    mine = Driven("d2o:budget=12", 1).forward([(q, k, v)])
    sums = column_sums(torch.from_numpy(q), LayerKV(layer_idx=0, keys=torch.from_numpy(k),
                       values=torch.from_numpy(v), positions=range(40)))  # fmt: skip
    expected = sums.sum(1).gather(1, torch.tensor(mine.positions(0)))
    assert torch.equal(mine.rows[0].state.entries["scores"], expected)


# Matching


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [1, 2, 3, 30, 49])
@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_nearest_equals_loops(num, dtype, block, monkeypatch):
    """With few and many evicted ones, in any number of blocks, zero keys among them."""
    monkeypatch.setattr(module, "_BLOCK", block)
    generator = torch.Generator().manual_seed(num)
    keys = torch.randn(3, 50, 8, generator=generator).to(dtype)
    keys[1, 7] = 0
    order = torch.stack([torch.randperm(50, generator=generator) for _ in range(3)])
    gone, kept = order[:, :num].sort(1).values, order[:, num:].sort(1).values
    found = nearest(keys, kept, gone)
    for h in range(3):
        for slot, i in enumerate(gone[h].tolist()):
            key = keys[h, i].double().tolist()
            us = [oracle.cosine(key, keys[h, j].double().tolist()) for j in kept[h].tolist()]
            assert float(found.similarity[h, slot]) == pytest.approx(max(us), abs=1e-6)
            assert int(found.entry[h, slot]) in kept[h].tolist()
            if any(key):
                assert int(found.entry[h, slot]) == kept[h, int(np.argmax(us))]


def test_zero_keys():
    """Cosine 0 with everything, and of equal ones the earliest."""
    keys = torch.zeros(1, 20, 4)
    for num in (1, 5):
        gone, kept = torch.arange(20)[None].split([num, 20 - num], dim=1)
        found = nearest(keys, kept, gone)
        assert found.similarity.tolist() == [[0.0] * num]
        assert found.entry.tolist() == [[num] * num]


# Through a model


class Listening(KVCache):
    """A cache that notes the queries, keys and values of every layer's attention."""

    def attend(self, key, call):
        _, values = self.layers[call.module.layer_idx].pending
        self.heard.append(tuple(x[0].numpy() for x in (call.query, key, values)))
        return super().attend(key, call)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("options", [{}, OFFICIAL | {"skip_layers": False}], ids=["own", "code"])
def test_in_a_model(group, options):
    """A model's own queries and keys, rotary embedding included."""
    sizes = (40, 1, 1, 1, 6, 1, 1)
    model = contract_model(group)
    cache = Listening(model, f"d2o:budget=12{text(options)}")
    theirs = oracle.Model(2, 2, "12", **options)
    for tokens in random_tokens(1, sum(sizes), seed=group).split(list(sizes), dim=1):
        cache.heard = []
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)
        theirs.forward(cache.heard)
        assert is_clear(theirs), "choose another seed"
        for index, expected in enumerate(theirs.layers):
            layer = cache.layers[index]
            if layer.rows is not None:
                assert_layer(layer.rows[0], expected)
            else:
                assert [len(row) for row in expected.rows] == [theirs.num_seen] * 2
    assert theirs.merges > 0


# Parameters


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("d2o:budget=0", "d2o: a budget of 0 tokens"),
        ("d2o:recent=1.5", r"recent is a share in \[0, 1\], got 1.5"),
        ("d2o:beta=-0.1", r"beta is a share in \[0, 1\], got -0.1"),
        ("d2o:sinks=-1", "sinks must be 0 or more, got -1"),
        ("d2o:merge_self=-1", "merge_self must be 0 or more, got -1.0"),
        ("d2o:norm=none", "norm is across_layers or official, got 'none'"),
        ("d2o:first_eviction=now", "first_eviction is prefill_end or first_step, got 'now'"),
        ("d2o:weights=sum", "weights is softmax or mean, got 'sum'"),
        ("d2o:match=layer", "match is head or rank, got 'layer'"),
        ("d2o:skip_layers=3", "skip_layers must be bool, got '3'"),
        ("d2o:alpha=0.3", "no parameter 'alpha'"),
        ("d2o+adakv", "adakv cannot work with 'd2o'"),
    ],
)
def test_wrong_parameters_are_named(method, message):
    """What was seen and what is expected."""
    with pytest.raises(ConfigError, match=message):
        build_policy(method)


def test_missing_attention_is_named():
    """Instead of deciding by nothing."""
    layer = LayerKV(
        layer_idx=0, keys=torch.zeros(1, 3, 2), values=torch.zeros(1, 3, 2), positions=range(3)
    )
    view = LayerView(layer=layer, state=LayerState(), num_new=3, num_prompt=3, num_seen=3)
    with pytest.raises(ConfigError, match="d2o needs the attention that entries receive"):
        D2O().on_prefill_chunk(view)
