# SPDX-License-Identifier: Apache-2.0
"""Abstracts of keys: boxes and codes."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.errors import ConfigError, ShapeError
from kvlib.store.abstracts import BOX_DTYPES, Boxes, Rows
from kvlib.store.abstracts_pq import CENTROIDS, Codebook, Codes
from tests.oracles import selecting as oracle

DTYPES = sorted(BOX_DTYPES)
# A value is rounded up by at most one step: half a step of the type's last place twice.
STEP = {"float32": 0.0, "bfloat16": 2.0**-7, "int8": 2.0**-6}


def draw_keys(seed, heads, tokens, dim, spread=2.0):
    """Keys whose channels differ in size by orders of magnitude, with an offset."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(heads, 1, dim, generator=g))
    return (torch.randn(heads, tokens, dim, generator=g) + 0.5) * sizes


cases = given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 70),
    dim=st.sampled_from([1, 4, 16]),
    leaf=st.sampled_from([1, 3, 16]),
    dtype=st.sampled_from(DTYPES),
)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for x, y in zip(a.bounds(), b.bounds(), strict=True)
    )


@cases
@settings(max_examples=60)
def test_boxes_hold_their_keys(seed, heads, tokens, dim, leaf, dtype):
    """lo and hi enclose what the oracle finds, and exceed it by a rounding step at most."""
    keys = draw_keys(seed, heads, tokens, dim)
    boxes = Boxes(heads, dim, leaf=leaf, dtype=dtype)
    boxes.append(keys)
    lo, hi = (x.double().numpy() for x in boxes.bounds())
    true_lo, true_hi = oracle.boxes(keys.numpy(), leaf)
    assert (lo <= true_lo).all()
    assert (hi >= true_hi).all()
    largest = np.maximum(abs(true_lo), abs(true_hi))
    if dtype == "int8":  # one exponent for all channels of a leaf and head
        largest = largest.max(2, keepdims=True)
    assert (true_lo - lo <= largest * STEP[dtype]).all()
    assert (hi - true_hi <= largest * STEP[dtype]).all()


@cases
@settings(max_examples=60)
def test_weight_one_is_a_bound(seed, heads, tokens, dim, leaf, dtype):
    """The score of weight 1 is never below the greatest q . k in the leaf, in any type."""
    keys = draw_keys(seed, heads, tokens, dim)
    query = draw_keys(seed + 1, heads, 2, dim)
    boxes = Boxes(heads, dim, leaf=leaf, dtype=dtype)
    boxes.append(keys)
    bound = boxes.scores(query, 1.0).double().numpy()
    for head in range(heads):
        for row in range(2):
            best = oracle.best_logits(query[head, row].numpy(), keys[head].numpy(), leaf)
            # float32 sums of dim products
            size = float(query[head, row].abs().max() * keys[head].abs().max())
            assert (bound[head, row] >= best - 1e-6 * dim * size).all()


@given(seed=st.integers(0, 2**31), weight=st.floats(0, 2), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30)
def test_scores_are_those_of_the_stored_boxes(seed, weight, dtype):
    """q . a + weight |q| . h, unfinished leaf and mean included."""
    keys, query = draw_keys(seed, 2, 37, 8, 0.5), draw_keys(seed + 1, 2, 3, 8, 0.5)
    boxes = Boxes(2, 8, leaf=16, dtype=dtype, mean=keys.mean(1))
    boxes.append(keys)
    lo, hi = (x.double().numpy() for x in boxes.bounds())
    found = boxes.scores(query, weight)
    assert found.shape == (2, 3, 3)
    for head in range(2):
        for row in range(3):
            for n in range(3):
                true = oracle.score(query[head, row].numpy(), lo[n, head], hi[n, head], weight)
                assert found[head, row, n] == pytest.approx(true, rel=1e-4, abs=1e-3)


@cases
@settings(max_examples=40)
def test_pieces_are_the_whole(seed, heads, tokens, dim, leaf, dtype):
    """Token by token, in pieces or at once: the same boxes."""
    keys = draw_keys(seed, heads, tokens, dim)
    at_once, single, pieces = (Boxes(heads, dim, leaf=leaf, dtype=dtype) for _ in range(3))
    at_once.append(keys)
    for i in range(tokens):
        single.append(keys[:, i : i + 1])
    for piece in keys.split(7, 1):
        pieces.append(piece)
    assert same(single, at_once)
    assert same(pieces, at_once)
    assert single.num_tokens == tokens


@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
@settings(max_examples=20)
def test_a_mean_shifts_all_scores_alike(seed, dtype):
    """Keys and mean moved together: the same scores. The mean alone: one constant a query."""
    keys, query = draw_keys(seed, 2, 64, 8, 0.0), draw_keys(seed + 1, 2, 3, 8, 0.0)
    move = 4 * torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    plain = Boxes(2, 8, dtype=dtype)
    plain.append(keys)
    moved = Boxes(2, 8, dtype=dtype, mean=move)
    moved.append(keys + move[:, None])
    tolerance = 2e-4 if dtype == "float32" else 0.5  # another rounding, of values up to 4
    assert torch.allclose(plain.scores(query), moved.scores(query), atol=tolerance)
    if dtype == "float32":
        other = Boxes(2, 8, dtype=dtype, mean=move)
        other.append(keys)
        off = plain.scores(query) - other.scores(query)
        assert torch.allclose(off, off[..., :1].expand_as(off), atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_counted(dtype):
    """Boxes hold what they say: the numbers, and a little room to grow."""
    boxes = Boxes(3, 64, dtype=dtype)
    boxes.append(draw_keys(0, 3, 1600, 64))
    numbers = 100 * 3 * 2 * 64 * BOX_DTYPES[dtype].itemsize
    exponents = 300 if dtype == "int8" else 0
    fixed = 3 * 64 * 4 * 3  # the mean and the unfinished leaf
    rows = numbers + exponents
    assert rows + fixed <= boxes.nbytes <= rows + rows * 13 // 100 + fixed  # an eighth and one row


def test_extreme_keys_are_held():
    """Zeros, subnormal numbers and very large ones."""
    for value in (0.0, 1e-44, 1e-30, 127.0, 128.0, 3e37, -3e37):
        for dtype in DTYPES:
            boxes = Boxes(1, 2, leaf=2, dtype=dtype)
            boxes.append(torch.tensor([[[value, 0.0], [0.0, value / 3]]]))
            lo, hi = boxes.bounds()
            assert lo[0, 0, 0] <= min(value, 0.0)
            assert hi[0, 0, 0] >= max(value, 0.0)
            assert bool(torch.isfinite(lo).all() and torch.isfinite(hi).all())


def test_rows_grow():
    """Rows come back in order however they came."""
    rows = Rows((2,), torch.float32)
    parts = [torch.full((n, 2), float(n)) for n in (0, 1, 5, 0, 30, 1)]
    for part in parts:
        rows.extend(part)
    assert torch.equal(rows.data, torch.cat(parts))
    assert rows.nbytes >= rows.data.nbytes


def test_wrong_arguments_are_refused():
    """Types, leaves and shapes."""
    with pytest.raises(ConfigError, match="int4"):
        Boxes(1, 2, dtype="int4")
    with pytest.raises(ConfigError, match="1 token"):
        Boxes(1, 2, leaf=0)
    boxes = Boxes(2, 4)
    with pytest.raises(ShapeError, match="expected"):
        boxes.append(torch.zeros(2, 3, 5))


# Codes

faiss = pytest.importorskip("faiss", reason="codebooks are trained with faiss")


@pytest.fixture(scope="module")
def trained():
    """A codebook of 2 heads, and keys and queries like those it was fitted to."""
    g = torch.Generator().manual_seed(5)
    sizes = torch.exp(torch.randn(2, 1, 8, generator=g))
    keys = (torch.randn(2, 600, 8, generator=g) + 2) * sizes
    queries = torch.randn(2, 900, 8, generator=g) * torch.exp(torch.randn(2, 1, 8, generator=g))
    book = Codebook.train(keys, queries.transpose(1, 2) @ queries / 900, parts=4)
    return book, keys, queries


def rebuilt(book, codes):
    """Keys as codes have them, float64 [heads, t, dim]."""
    parts = [
        [book.centroids[h, p].double().numpy()[codes[:, h, p].numpy()] for p in range(book.parts)]
        for h in range(len(book.centroids))
    ]
    turned = np.stack([np.concatenate(head, 1) for head in parts])
    return turned @ book.back.double().numpy().transpose(0, 2, 1)


def test_turns_keep_products(trained):
    """R^T q . P^T k = q . k, to bfloat16's precision."""
    book, _, _ = trained
    both = book.into.double() @ book.back.double().transpose(1, 2)
    assert torch.allclose(both, torch.eye(8, dtype=torch.float64).expand(2, 8, 8), atol=0.03)


def test_codes_are_the_nearest_centroids(trained):
    """Each part of a turned key has the code of its nearest centroid."""
    book, keys, _ = trained
    codes = book.encode(keys[:, :50])
    turned = (keys[:, :50].double() - book.mean.double()[:, None]) @ book.into.double()
    for head in range(2):
        for part in range(4):
            y = turned[head, :, part * 2 : part * 2 + 2]
            far = torch.cdist(y, book.centroids[head, part].double())
            taken = far.gather(1, codes[:, head, part].long()[:, None])[:, 0]
            assert torch.allclose(taken, far.min(1).values, atol=1e-4)


def test_logits_and_scores_are_those_of_rebuilt_keys(trained):
    """Tables and look-ups give q . k of the coded keys; a leaf has the log of their sum of exp."""
    book, keys, queries = trained
    codes = Codes(book, leaf=16)
    for piece in keys[:, :250].split(33, 1):
        codes.append(piece)
    assert (len(codes), codes.num_tokens) == (16, 250)
    true = rebuilt(book, book.encode(keys[:, :250]))
    asked = queries[:, :3] * 0.1
    logits, scores = codes.logits(asked), codes.scores(asked)
    assert torch.equal(logits, codes.logits(asked, compiled=False))
    for head in range(2):
        for row in range(3):
            q = asked[head, row].double().numpy()
            assert logits[head, row].numpy() == pytest.approx(true[head] @ q, abs=1e-3)
            mass = oracle.coded_mass(q, true[head], 16)
            assert scores[head, row].numpy() == pytest.approx(mass, abs=1e-3)


def test_the_turn_serves_the_queries():
    """Of channels no query looks at, codes tell less, and more of the others."""
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 3000, 8, generator=g)
    queries = torch.randn(1, 500, 8, generator=g)
    queries[..., 2:] *= 0.01
    second = queries.transpose(1, 2) @ queries / 500
    errors = []
    for given_second in (second, torch.eye(8)[None]):
        book = Codebook.train(keys, given_second, parts=4)
        codes = Codes(book)
        codes.append(keys)
        centred = keys - book.mean[:, None]
        true = queries @ centred.transpose(1, 2)
        errors.append(float((codes.logits(queries) - true).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_codes_of_moved_keys_are_the_same():
    """A vector added to all keys goes with the mean."""
    g = torch.Generator().manual_seed(2)
    keys, move = torch.randn(1, 400, 4, generator=g), torch.tensor([[[8.0, -4.0, 2.0, 0.5]]])
    second = torch.eye(4)[None]
    one, two = (Codebook.train(x, second, parts=2) for x in (keys, keys + move))
    query = torch.randn(1, 2, 4, generator=g)
    a, b = Codes(one), Codes(two)
    a.append(keys)
    b.append(keys + move)
    assert torch.allclose(a.logits(query), b.logits(query), atol=0.05)


def test_codebooks_refuse_what_they_cannot_do():
    """Parts that do not divide, too few keys, no faiss."""
    second = torch.eye(8)[None]
    with pytest.raises(ConfigError, match="divide"):
        Codebook.train(torch.zeros(1, CENTROIDS, 8), second, parts=3)
    with pytest.raises(ConfigError, match="256 keys"):
        Codebook.train(torch.zeros(1, CENTROIDS - 1, 8), second)


def test_without_faiss_the_extra_is_named(monkeypatch):
    """The error says what to install."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "faiss":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"kvlib\[faiss\]"):
        Codebook.train(torch.randn(1, CENTROIDS, 8), torch.eye(8)[None])
