# SPDX-License-Identifier: Apache-2.0
"""Choosing leaves: budgets, relevances and methods."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.errors import ConfigError, ShapeError, UnknownPluginError
from kvlib.registry import describe
from kvlib.store.leaves import LEAF_TOKENS
from kvlib.store.selecting import SELECTORS, HeadShape, Selection
from kvlib.store.selecting.base import merge_heads
from tests.oracles import selecting as oracle

SHAPE = HeadShape(q_heads=6, kv_heads=2, dim=8, scale=0.35)
BUDGETED = [
    "leoam",
    "leoam:heads=each",
    "leoam:codes=2,train=256",
    "leoam:codes=4,train=256,heads=each",
    "quest",
    "quest:heads=each,dtype=bfloat16",
    "infllm:leaf=32,window=40",
]
METHODS = [*BUDGETED, "full", "percent:resident=0.3"]


def draw(seed, tokens, shape=SHAPE):
    """Keys and queries of a sequence."""
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape.kv_heads, tokens, shape.dim, generator=g) * 2 + 1
    return keys, torch.randn(shape.q_heads, tokens, shape.dim, generator=g) * 2


def begin(method, tokens, seed=0, layers=1, piece=100):
    """A selection that was given so many tokens, and a query."""
    keys, queries = draw(seed, tokens)
    selection = Selection(SELECTORS.build(method), SHAPE, layers)
    for layer in range(layers):
        for first in range(0, tokens, piece):
            some = slice(first, first + piece)
            selection.append(layer, keys[:, some], queries[:, some])
    return selection, draw(seed + 1, 1)[1]


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 900),
    budget=st.one_of(st.integers(1, 1000), st.floats(0.001, 1)),
    leaf=st.sampled_from([16, 32, 64]),
    sinks=st.sampled_from([0, 1, 16, 40, 300]),
    recent=st.sampled_from([0, 1, 16, 50, 64, 300]),
    rows=st.integers(1, 3),
)
@settings(max_examples=200)
def test_choice_follows_the_oracle(seed, tokens, budget, leaf, sinks, recent, rows):
    """The last unit, recent ones, sinks, then the most relevant; never above the budget."""
    fields = {"budget": budget, "leaf": leaf, "sinks": sinks, "recent": recent}
    method = type(SELECTORS.build("quest"))(**fields)
    units = -(-tokens // leaf)
    generator = torch.Generator().manual_seed(seed)
    relevance = torch.randperm(rows * units, generator=generator).view(rows, units).float()
    given_relevance = relevance.clone()
    found = method.choose(relevance, tokens)
    assert torch.equal(relevance, given_relevance)
    meant = budget if isinstance(budget, int) else math.ceil(round(budget * tokens, 9))
    allowed = min(meant, tokens)
    assert min(found.shape[1] * LEAF_TOKENS, tokens) <= max(allowed, leaf)
    for row in range(len(found)):
        true = oracle.chosen(
            relevance[row].tolist(),
            tokens,
            allowed,
            leaf=leaf,
            sinks=sinks,
            recent=recent,
            unit=LEAF_TOKENS,
        )
        assert found[row].tolist() == true


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 255, 256, 700])
def test_contract(method, tokens):
    """Ascending leaves that exist, the last among them, within the budget; bytes are counted."""
    selection, query = begin(method, tokens)
    leaves = selection.select(0, query)
    each = "heads=each" in method and leaves.shape[1] < -(-tokens // 16)
    assert leaves.shape[0] == (SHAPE.kv_heads if each else 1)
    assert leaves.dtype == torch.int64
    assert (leaves.diff(dim=1) > 0).all()
    assert (leaves[:, 0] >= 0).all()
    assert (leaves[:, -1] == (tokens - 1) // LEAF_TOKENS).all()
    assert selection.num_tokens == tokens
    if method in BUDGETED:
        unit = selection.selector.leaf
        assert leaves.shape[1] * 16 <= max(math.ceil(0.1 * tokens), unit)
        assert selection.nbytes == sum(layer.nbytes for layer in selection._layers) > 0
    else:
        assert leaves.tolist() == [list(range(-(-tokens // 16)))]


@pytest.mark.parametrize("method", METHODS)
def test_pieces_are_the_whole(method):
    """However the tokens came, the same leaves are chosen."""
    # A codebook is fitted when enough tokens came: pieces must agree on that.
    pieces = (256, 64) if "codes" in method else (600, 100, 7, 1)
    found = []
    for piece in pieces:
        keys, queries = draw(3, 600)
        selection = Selection(SELECTORS.build(method), SHAPE, 1)
        first = 0
        while first < 600:
            some = slice(first, first + (256 if "codes" in method and first == 0 else piece))
            selection.append(0, keys[:, some], queries[:, some])
            first = some.stop
        found.append(selection.select(0, draw(4, 1)[1]))
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize(
    "method", ["leoam:codes=4,train=256", "leoam:codes=8,train=256,heads=each"]
)
def test_a_vector_added_to_all_keys_changes_nothing(method):
    """Softmax does not see it; neither does the choice."""
    keys, queries = draw(5, 640)
    chosen = []
    for move in (0.0, 3.0):
        selection = Selection(SELECTORS.build(method), SHAPE, 1)
        # The direction of a query's own constant: it would lift one query head above the others.
        moved = keys + move * queries.mean(1)[::3, None]
        for first in range(0, 640, 320):
            some = slice(first, first + 320)
            selection.append(0, moved[:, some], queries[:, some])
        chosen.append(selection.select(0, draw(6, 1)[1]))
    assert torch.equal(*chosen)


@pytest.mark.parametrize("reduce", ["mass", "max"])
@pytest.mark.parametrize("joint", [True, False])
def test_heads_are_merged_as_told(reduce, joint):
    """Softmaxes summed, or the most, over a group or all heads."""
    scores = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 3
    found = merge_heads(scores, reduce, joint=joint)
    rows = [scores.flatten(0, 1)] if joint else list(scores)
    for got, row in zip(found, rows, strict=True):
        assert got.numpy() == pytest.approx(oracle.merged(row.numpy(), reduce), abs=1e-5)


@pytest.mark.parametrize(("method", "weight"), [("quest:", 1.0), ("leoam:weight=0.4,", 0.4)])
def test_boxes_rank_by_centre_and_half_range(method, weight):
    """The greatest score over the queries of a group, as the oracle's boxes give it."""
    selection, query = begin(f"{method}dtype=float32,heads=each", 200)
    keys, _ = draw(0, 200)
    lo, hi = oracle.boxes(keys.numpy(), 16)
    found = selection._layers[0].relevance(query)
    for head in range(2):
        for n in range(13):
            true = max(
                oracle.score(query[q, 0].numpy() * 0.35, lo[n, head], hi[n, head], weight)
                for q in range(head * 3, head * 3 + 3)
            )
            assert found[head, n] == pytest.approx(true, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("piece", [300, 13])
def test_infllm_ranks_by_its_representatives(piece):
    """The mean of q . k over each leaf's representatives, all heads together."""
    keys, queries = draw(0, 150)
    selection, query = begin("infllm:leaf=16,window=24,representatives=3", 150, piece=piece)
    representatives = oracle.infllm(
        keys.numpy(), queries.numpy(), 0.35, leaf=16, representatives=3, window=24
    )
    found = selection._layers[0].relevance(query)[0]
    asked = query[:, 0].double().numpy() * 0.35
    for n, tokens in enumerate(representatives):
        logits = [asked[q] @ keys[q // 3, t].double().numpy() for q in range(6) for t in tokens]
        # of each KV head the mean over its queries, then their sum
        assert found[n] == pytest.approx(np.mean(logits) * 2, rel=1e-4, abs=1e-4)


def test_a_needle_is_found():
    """A leaf with the one key that a query looks for is chosen by every method with abstracts."""
    for method in ("leoam", "leoam:heads=each", "leoam:codes=8,train=256", "quest"):
        keys, queries = draw(7, 1600)
        query = draw(8, 1)[1]
        keys[:, 777] = 40 * query[::3, 0] / query[::3, 0].norm(dim=-1, keepdim=True)
        selection = Selection(SELECTORS.build(method), SHAPE, 1)
        selection.append(0, keys, queries)
        assert all(777 // 16 in row for row in selection.select(0, query).tolist())


def test_methods_say_whether_they_need_queries():
    """InfLLM refuses to work without them; codes are then fitted to the keys alone."""
    keys, _ = draw(0, 20)
    for method, needs in (
        ("leoam", False),
        ("leoam:codes=4", True),
        ("infllm", True),
        ("quest", False),
        ("full", False),
        ("leoam:codes=4,train=256", True),
    ):
        selector = SELECTORS.build(method)
        assert selector.needs_queries == needs
        layer = selector.open(SHAPE)
        if method == "infllm":
            with pytest.raises(ConfigError, match="queries"):
                layer.append(keys)
        else:
            layer.append(keys)
            layer.append(draw(1, 300)[0])
            assert layer.num_tokens == 320
            leaves = selector.choose(layer.relevance(draw(2, 1)[1]), 320)
            assert leaves[0, -1] == 19


def test_percent_says_what_stays():
    """Leaves that never leave memory, rounded down."""
    assert SELECTORS.build("percent:resident=0.2").pinned(1000) == 12
    assert SELECTORS.build("percent:resident=100").pinned(1000) == 6


@pytest.mark.parametrize("method", METHODS)
def test_methods_read_back(method):
    """The text of a method builds it again."""
    selector = SELECTORS.build(method)
    assert SELECTORS.build(describe(selector)) == selector


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("leoam:budget=0", "reads nothing"),
        ("leoam:budget=1.5", "fraction"),
        ("leoam:leaf=20", "multiple of 16"),
        ("leoam:heads=all", "joint or each"),
        ("leoam:dtype=int4", "int4"),
        ("leoam:codes=-1", "codes"),
        ("leoam:train=10", "train"),
        ("leoam:weight=-1.0", "weight"),
        ("quest:heads=all", "joint or each"),
        ("quest:dtype=int4", "int4"),
        ("quest:sinks=-1", "sinks"),
        ("infllm:window=0", "window"),
        ("percent:resident=2.0", "fraction"),
    ],
)
def test_wrong_parameters_are_refused(method, says):
    """With what is wrong about them."""
    with pytest.raises(ConfigError, match=says):
        SELECTORS.build(method)


def test_wrong_shapes_are_refused():
    """Keys, queries and heads that do not fit."""
    with pytest.raises(UnknownPluginError, match="leoam"):
        SELECTORS.build("leaom")
    with pytest.raises(ConfigError, match="cannot share"):
        HeadShape(7, 2, 8, 1.0)
    with pytest.raises(ConfigError, match="divide"):
        SELECTORS.build("leoam:codes=3").open(SHAPE)
    selection, _ = begin("quest", 40)
    with pytest.raises(ShapeError, match="keys"):
        selection.append(0, torch.zeros(3, 1, 8))
    with pytest.raises(ShapeError, match="queries"):
        selection.select(0, torch.zeros(6, 0, 8))
    with pytest.raises(ShapeError, match="queries"):
        SELECTORS.build("infllm").open(SHAPE).append(torch.zeros(2, 1, 8), torch.zeros(6, 2, 8))
