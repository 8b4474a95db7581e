# SPDX-License-Identifier: Apache-2.0
"""The policies against brute force in float64, choice by choice.

Two kinds of attention are drawn. Random one: the library's float32 scores are near the oracle's,
and examples in which a choice hangs on less than their distance are discarded. Votes: every query
puts all its attention on a single token, so scores are whole numbers, equal ones are common, and
nothing is rounded.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kvlib import KVCache
from kvlib.attention import column_sums
from kvlib.blocks import LayerKV
from kvlib.cache_rows import LayerRow, extend_entries
from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.eviction import LayerState, LayerView, build_policy
from kvlib.testing.recorder import contract_model, random_tokens
from tests.oracles import eviction as oracle

HEADS = 2
RELATIVE = 2e-5
"""Error of float32 scores: logits of some 10 from 8 products each, exp, sums of some 100 terms."""

MORE = settings(max_examples=max(150, settings.default.max_examples))  # they are quick


def random_attention(seed, group, sizes, width=8):
    """Queries, keys and values of a prompt and of the steps after it, float32."""
    rng = np.random.default_rng(seed)
    return [
        tuple(
            rng.standard_normal((heads, num, width)).astype(np.float32) * factor
            for heads, factor in ((HEADS * group, 2), (HEADS, 1), (HEADS, 1))
        )
        for num in sizes
    ]


def voting_attention(seed, group, sizes):
    """The same, where every query looks at one token only: in the prompt at any, later at its own.

    Its own is the one token that is sure to be there still.
    """
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    q = np.zeros((HEADS * group, total, total), dtype=np.float32)
    for h in range(HEADS * group):
        for i in range(total):
            target = rng.integers(0, i + 1) if i < sizes[0] else i
            q[h, i, target] = 1000 * np.sqrt(total)
    k = np.broadcast_to(np.eye(total, dtype=np.float32), (HEADS, total, total)).copy()
    v = rng.standard_normal((HEADS, total, 8)).astype(np.float32)
    edges = np.cumsum(sizes)[:-1]
    return list(zip(*(np.split(x, edges, axis=1) for x in (q, k, v)), strict=True))


class Driven:
    """A policy over one layer: rows, state and signals as a cache would keep them."""

    def __init__(self, method):
        self.policy = build_policy(method)
        self.row = None
        self.num_seen = self.num_prompt = 0

    def forward(self, q, k, v):
        q, k, v = (torch.from_numpy(x) for x in (q, k, v))
        num = k.shape[1]
        positions = torch.arange(self.num_seen, self.num_seen + num, dtype=torch.int32)
        self.num_seen += num
        is_prompt = self.row is None
        if is_prompt:
            held = positions.expand(HEADS, -1)
            layer = LayerKV(layer_idx=0, keys=k, values=v, positions=held)
            self.row = LayerRow(layer, LayerState())
            self.num_prompt = num
        else:
            old = self.row.layer.lengths
            self.row.append(k, v, positions)
            extend_entries(self.row.state, old, self.row.layer)
        layer, needs = self.row.layer, self.policy.needs
        wanted = needs.prefill_column_sums if is_prompt else needs.step_column_sums
        window = min(needs.query_window if is_prompt else needs.step_query_window, num)
        view = LayerView(
            layer=layer,
            state=self.row.state,
            num_new=num,
            num_prompt=self.num_prompt,
            num_seen=self.num_seen,
            column_sums=column_sums(q, layer) if wanted else None,
            window_sums=column_sums(q[:, -window:], layer) if window else None,
        )
        if is_prompt:
            self.policy.on_prefill_chunk(view)
            plans = self.policy.on_prefill_end([view])
        else:
            plans = self.policy.on_step([view])
        self.row.apply(plans[0], None)
        return self

    @property
    def positions(self):
        return self.row.layer.positions_tensor().tolist()

    @property
    def scores(self):
        return self.row.state.entries["scores"].double().numpy()


def assert_h2o(method, forwards, *, exact):
    """Positions and scores are the oracle's after every pass."""
    policy = build_policy(method)
    mine = Driven(method)
    theirs = oracle.HeavyHitters(HEADS, str(policy.budget), str(policy.recent))
    for parts in forwards:
        theirs.forward(*parts)
        assume(exact or theirs.margin > RELATIVE)
        mine.forward(*parts)
        assert mine.positions == theirs.positions
        scores = np.array(theirs.scores)
        if exact:
            assert (mine.scores == scores).all()
        else:
            np.testing.assert_allclose(mine.scores, scores, rtol=RELATIVE, atol=1e-7)


GROUPS = st.sampled_from([1, 2, 4, 7])
SIZES = st.sampled_from([(40, 1, 1, 1), (24, 1, 5, 1, 1, 9, 1), (3, 1, 1, 1, 1, 1), (1, 20, 1, 2)])
SEEDS = st.integers(0, 2**32 - 1)
SHARES = st.sampled_from(["0.0", "0.07", "0.25", "0.28", "0.3", "0.5", "0.75", "0.9", "1.0"])
BUDGETS = st.sampled_from(["1", "2", "3", "5", "8", "11", "0.1", "0.25", "0.5", "0.9"])


@given(GROUPS, BUDGETS, SHARES, SIZES, SEEDS)
@example(4, "8", "0.3", (24, 1, 5, 1, 1, 9, 1), 0)  # 2.4 recent entries are 3
def test_h2o_equals_brute_force(group, budget, recent, sizes, seed):
    """After the prompt, after steps of one token and of many: positions and scores."""
    forwards = random_attention(seed, group, sizes)
    assert_h2o(f"h2o:budget={budget},recent={recent}", forwards, exact=False)


@MORE
@given(GROUPS, BUDGETS, SHARES, SIZES, SEEDS)
def test_h2o_keeps_the_earlier_of_equal_ones(group, budget, recent, sizes, seed):
    """Votes tie often, and scores are exact."""
    forwards = voting_attention(seed, group, sizes)
    assert_h2o(f"h2o:budget={budget},recent={recent}", forwards, exact=True)


@pytest.mark.parametrize(("recent", "expected"), [("0.07", 7), ("0.28", 28), ("0.55", 55)])
def test_h2o_reads_the_recent_share_as_a_decimal(recent, expected):
    """A share that means a whole number of entries means that many."""
    num = 130
    q = np.zeros((HEADS, num, 8), dtype=np.float32)  # uniform: the earliest are the heaviest
    mine = Driven(f"h2o:budget=100,recent={recent}").forward(q, q, q)
    assert mine.positions[0] == [*range(100 - expected), *range(num - expected, num)]


POOLS = st.sampled_from(["avg", "max"])
REDUCTIONS = st.sampled_from(["mean", "max"])
KERNELS = st.sampled_from([1, 3, 5, 7, 41])


def is_clear(margin, pool):
    """Whether rounding cannot turn a choice; neighbours may share one maximum, to the bit."""
    return margin > RELATIVE or (margin == 0 and pool == "max")


@MORE
@given(
    GROUPS,
    st.sampled_from(["1", "4", "7", "12", "39", "0.25", "0.5", "0.9", "1.0"]),
    st.sampled_from([1, 4, 8, 64]),
    KERNELS,
    POOLS,
    REDUCTIONS,
    st.sampled_from([1, 5, 9, 40]),
    SEEDS,
)
@example(7, "12", 4, 5, "avg", "mean", 40, 0)
@example(4, "12", 8, 7, "max", "max", 40, 0)
def test_snapkv_equals_brute_force(group, budget, window, kernel, pool, reduce, prompt, seed):
    """The window and the tokens it looks at, then every later token."""
    forwards = random_attention(seed, group, (prompt, 1, 4, 1))
    q, k, _ = forwards[0]
    options = {"window": window, "kernel": kernel, "pool": pool, "group": reduce}
    kept, margin = oracle.snapkv(q, k, budget=budget, **options)
    assume(is_clear(margin, pool))
    text = ",".join(f"{key}={value}" for key, value in options.items())
    mine = Driven(f"snapkv:budget={budget},{text}")
    seen = 0
    for parts in forwards:
        num = parts[1].shape[1]
        later = range(prompt, seen + num)
        assert mine.forward(*parts).positions == [[*row, *later] for row in kept]
        seen += num


@MORE
@given(
    GROUPS,
    st.integers(5, 30),
    st.sampled_from([(1, "avg", "max"), (3, "avg", "max"), (1, "max", "max"), (5, "max", "max")]),
    SEEDS,
)
def test_snapkv_keeps_the_earlier_of_equal_ones(group, budget, options, seed):
    """Whole votes, pooled and reduced without rounding, tie often."""
    kernel, pool, reduce = options
    (parts,) = voting_attention(seed, group, (40,))
    given_ = {"window": 4, "kernel": kernel, "pool": pool, "group": reduce}
    kept, _ = oracle.snapkv(*parts[:2], budget=str(budget), **given_)
    text = ",".join(f"{key}={value}" for key, value in given_.items())
    assert Driven(f"snapkv:budget={budget},{text}").forward(*parts).positions == kept


@given(
    st.sampled_from(["1", "3", "4", "5", "12", "0.1", "0.5", "1.0"]),
    st.sampled_from([0, 1, 4, 10]),
    SIZES,
)
def test_streaming_equals_its_definition(budget, sinks, sizes):
    """First and last tokens after every pass."""
    mine = Driven(f"streaming:budget={budget},sinks={sinks}")
    seen = 0
    for parts in random_attention(0, 1, sizes):
        seen += parts[1].shape[1]
        expected = oracle.streaming(seen, sizes[0], budget=budget, sinks=sinks)
        assert mine.forward(*parts).positions == [expected] * HEADS


# Through a model


class Listening(KVCache):
    """A cache that notes the queries, keys, values and output of every layer's attention."""

    def attend(self, key, call):
        _, values = self.layers[call.module.layer_idx].pending
        output = super().attend(key, call)
        heard = call.query[0], key[0], values[0], output[0].transpose(0, 1)
        self.heard.append(tuple(x.numpy() for x in heard))
        return output


def listen(policy, group, sizes, seed):
    """A cache, and what each of its two layers heard in each pass."""
    model = contract_model(group)
    cache = Listening(model, policy)
    for tokens in random_tokens(1, sum(sizes), seed=seed).split(list(sizes), dim=1):
        cache.heard = []
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)
        yield cache, cache.heard


def held(cache, layer_idx):
    return cache.layer_kv(layer_idx).positions_tensor().tolist()


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("recent", ["0.0", "0.25", "0.5"])
def test_h2o_in_a_model(group, recent):
    """A model's own queries and keys: positions, scores and attention over what is kept."""
    theirs = [oracle.HeavyHitters(HEADS, "12", recent) for _ in range(2)]
    sizes = (40, 1, 1, 1, 6, 1, 15, 1)
    for cache, heard in listen(f"h2o:budget=12,recent={recent}", group, sizes, seed=group):
        for index, (q, k, v, output) in enumerate(heard):
            expected = theirs[index].forward(q, k, v)
            assert theirs[index].margin > RELATIVE, "choose another seed"
            assert held(cache, index) == theirs[index].positions
            scores = cache.layers[index].rows[0].state.entries["scores"].numpy()
            np.testing.assert_allclose(scores, theirs[index].scores, rtol=RELATIVE, atol=1e-7)
            size = np.abs(v).max()
            np.testing.assert_allclose(output, expected, rtol=0, atol=RELATIVE * size)


@pytest.mark.parametrize("options", [(5, "avg", "mean"), (7, "max", "max"), (1, "avg", "max")])
@pytest.mark.parametrize("group", [1, 4])
def test_snapkv_in_a_model(group, options):
    """The same for SnapKV, whose later tokens all stay."""
    kernel, pool, reduce = options
    given_ = {"window": 8, "kernel": kernel, "pool": pool, "group": reduce}
    text = ",".join(f"{key}={value}" for key, value in given_.items())
    kept, seen = {}, 0
    sizes = (40, 1, 5, 1)
    passes = listen(f"snapkv:budget=16,{text}", group, sizes, seed=group)
    for (cache, heard), num in zip(passes, sizes, strict=True):
        seen += num
        for index, (q, k, *_) in enumerate(heard):
            if index not in kept:
                kept[index], margin = oracle.snapkv(q, k, budget="16", **given_)
                assert is_clear(margin, pool), "choose another seed"
            assert held(cache, index) == [[*row, *range(40, seen)] for row in kept[index]]


# Parameters


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("snapkv:kernel=4", "kernel must be odd, got 4"),
        ("snapkv:kernel=0", "kernel must be odd, got 0"),
        ("snapkv:kernel=-3", "kernel must be odd, got -3"),
        ("snapkv:window=0", "window must be 1 or more, got 0"),
        ("snapkv:pool=median", "pool is avg or max, got 'median'"),
        ("snapkv:group=median", "group is mean, max, sum, got 'median'"),
        ("h2o:recent=1.5", r"recent is a share in \[0, 1\], got 1.5"),
        ("h2o:recent=-0.1", r"recent is a share in \[0, 1\], got -0.1"),
        ("h2o:recent=half", "h2o:recent must be float, got 'half'"),
        ("streaming:sinks=-1", "sinks must be 0 or more, got -1"),
        ("streaming:sinks=1.5", "streaming:sinks must be int, got '1.5'"),
        ("snapkv:budget=0", "a budget of 0 tokens leaves nothing to attend to: give 1 or more"),
        ("snapkv:budget=-3", "a budget in tokens cannot be negative, got -3"),
        ("full:budget=0.5", "'full' has no parameter 'budget'"),
        ("h2o:recnt=0.5", "no parameter 'recnt'. Did you mean 'recent'"),
        ("snapkv:budgt=0.5", "no parameter 'budgt'. Did you mean 'budget'"),
        ("streaming:sink=4", "no parameter 'sink'. Did you mean 'sinks'"),
    ],
)
def test_wrong_parameters_are_named(method, message):
    """What was seen and what is expected."""
    with pytest.raises(ConfigError, match=message):
        build_policy(method)


def test_unknown_policies_are_refused():
    """By name."""
    with pytest.raises(UnknownPluginError, match="no policy is named 'h20'"):
        build_policy("h20:budget=0.5")


@pytest.mark.parametrize("name", ["h2o", "snapkv", "streaming"])
@pytest.mark.parametrize("budget", ["0", "-1", "0.0", "1.5", "many"])
def test_budgets_without_meaning_are_refused(name, budget):
    """Naming the policy."""
    with pytest.raises(ConfigError, match=name):
        build_policy(f"{name}:budget={budget}")
