# SPDX-License-Identifier: Apache-2.0
"""How the NumPy coders lay out steps and tables: what all coders share is in test_rans.py."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.codecs import cachegen_numpy, rans, rans_numpy
from kvlib.codecs.rans import GAUSSIAN, Coded, Tables, decode, encode
from kvlib.codecs.rans_numpy import Batch
from kvlib.errors import CorruptDataError


def stream(symbols: np.ndarray, row: np.ndarray, lanes: int) -> Any:
    """As the coders get it."""
    return rans._stream(0, symbols.reshape(-1), row, lanes)


def same(a: Coded, b: Coded) -> bool:
    return bool((a.states == b.states).all()) and a.words.tolist() == b.words.tolist()


@st.composite
def shapes(draw):
    """Rows, columns and lanes of streams that are coded together."""
    lanes = st.sampled_from([8, 16, 32, 64, 128, 256])
    one = st.tuples(st.integers(1, 40), st.integers(1, 70), lanes)
    return draw(st.lists(one, min_size=1, max_size=6))


@given(shapes(), st.sampled_from([(1, 1 << 18), (3, 1 << 18), (128, 64), (128, 1000)]))
@settings(max_examples=60, deadline=None)
def test_blocks_do_not_show(given_shapes, sizes):
    """Blocks of any length, and streams that leave in the middle of one, give the same bits."""
    rng = np.random.default_rng(0)
    symbols = [rng.integers(29, 34, (n, c), np.uint8) for n, c, _ in given_shapes]
    rows = [rng.integers(30, 60, c) for _, c, _ in given_shapes]
    lanes = [n for _, _, n in given_shapes]
    alone = [
        encode([x], [row], GAUSSIAN, [n], "torch")[0]
        for x, row, n in zip(symbols, rows, lanes, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans_numpy, "_BLOCK_STEPS", sizes[0])
        patch.setattr(rans_numpy, "_BLOCK_SIZE", sizes[1])
        coded = encode(symbols, rows, GAUSSIAN, lanes, "numpy")
        back = decode(coded, [x.shape for x in symbols], rows, GAUSSIAN, "numpy")
    assert all(same(a, b) for a, b in zip(coded, alone, strict=True))
    assert all((a == b).all() for a, b in zip(symbols, back, strict=True))


@given(shapes(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blocks_have_every_symbol_once(given_shapes, backwards):
    """Each symbol is in one step, with its column's row, its lane and its stream's."""
    first = 0
    streams = []
    for n, c, lanes in given_shapes:
        row = np.arange(first, first + c) % 64
        streams.append(rans._stream(len(streams), np.zeros(n * c, np.uint8), row, lanes))
        first += c
    batch = Batch(streams)
    seen = np.zeros(batch.size, np.int64)
    expected = {s: 0 if not backwards else x.symbols.size for s, x in enumerate(batch.streams)}
    every = np.arange(batch.size)
    of_lane = np.repeat(np.arange(len(streams)), [s.lanes for s in batch.streams])
    for block in batch.blocks(4096, backwards=backwards):
        places = block.of(every)
        seen[places] += 1
        lanes = np.arange(batch.edges[-1])[block.lanes]
        chosen = np.arange(len(streams))[block.streams]
        counts = np.diff(block.starts).tolist()
        assert of_lane[lanes].tolist() == np.repeat(chosen, counts).tolist()
        assert len(block.columns) == len(places) > 0
        for columns in block.columns[:: -1 if backwards else 1]:
            at = 0
            for s, count in zip(chosen.tolist(), counts, strict=True):
                begin = expected[s] - count if backwards else expected[s]
                own = batch.streams[s]
                want = np.resize(own.columns[: own.period], own.symbols.size)[begin:][:count]
                assert columns[at : at + count].tolist() == (4096 * want).tolist()
                expected[s] = begin if backwards else begin + count
                at += count
    assert all(
        expected[s] == (0 if backwards else x.symbols.size) for s, x in enumerate(batch.streams)
    )
    assert seen.max() == 1
    assert seen.sum() == sum(n * c for n, c, _ in given_shapes)


def test_a_stream_that_wants_far_too_many_words():
    """It is refused, in time that does not grow with what it asks for."""
    rng = np.random.default_rng(0)
    row = np.full(64, 63)
    coded = Coded(rng.integers(1 << 15, 1 << 31, 256).astype(np.uint32), np.empty(0, np.uint16))
    with pytest.raises(CorruptDataError, match="needs more words"):
        decode([coded], [(4096, 64)], [row], GAUSSIAN, "numpy")


# -- how cachegen finds entries


@st.composite
def frequencies(draw):
    """Rows of all kinds: certain symbols, flat and steep ones, gaps, up to 256 symbols."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    alphabet = draw(st.sampled_from([1, 2, 5, 33, 255, 256]))
    out = np.zeros((draw(st.integers(1, 4)), alphabet), np.int64)
    for row in out:
        used = rng.choice(alphabet, rng.integers(1, alphabet + 1), replace=False)
        weight = rng.random(used.size) ** draw(st.sampled_from([0, 1, 8]))
        row[used] = np.maximum(1, (weight / weight.sum() * (4096 - used.size)).astype(np.int64))
        row[used[0]] += 4096 - row.sum()
    return Tables(out)


@given(frequencies())
@settings(max_examples=60, deadline=None)
def test_every_slot_is_found(tables):
    """Buckets and blocks hold what `Tables.by_slot` does: what a step of decoding needs."""
    f = tables.frequencies.astype(int)
    for k, row in enumerate(f):
        want = [
            (4096 - row[s]) << 20 | s << 12 | row[:s].sum()
            for s in range(len(row))
            for _ in range(row[s])
        ]
        assert tables.by_slot[4096 * k : 4096 * (k + 1)].tolist() == want
        present = np.flatnonzero(row)
        assert tables.by_symbol[256 * k + present].tolist() == list(dict.fromkeys(want))
    found = []

    def decode_with(find, _streams, _coded, size):
        slots = np.tile(np.arange(4096, dtype=np.uint32), len(tables))
        columns = np.arange(len(tables), dtype=np.uint32).repeat(4096) * np.uint32(size)
        entries = np.empty(slots.size, np.uint32)
        find(slots, columns, entries)
        found.append(entries)

    room = [stream(np.zeros(256, np.uint8), np.zeros(1, int), 256)] * (16 * len(tables))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cachegen_numpy, "decode_with", decode_with)
        cachegen_numpy.decode(room, [], cachegen_numpy.lookup(tables))
    assert (found[0] == tables.by_slot).all()


@pytest.mark.parametrize("most", [0, 3 * 256, cachegen_numpy._MOST_BLOCKS])
def test_more_blocks_than_can_be_numbered(monkeypatch, most):
    """Then whole tables are used, to the same end."""
    rng = np.random.default_rng(0)
    tables = Tables(rng.multinomial(4096 - 256, np.full(256, 1 / 256), 3).astype(np.int64) + 1)
    x, row = rng.integers(0, 256, (50, 3), np.uint8), np.arange(3)
    (coded,) = encode([x], [row], tables, backend="torch")
    monkeypatch.setattr(cachegen_numpy, "_MOST_BLOCKS", most)
    lookup = cachegen_numpy.lookup(tables)
    assert isinstance(lookup, Tables) == (most == 0)
    out = np.empty_like(x)
    cachegen_numpy.decode([stream(out, row, coded.states.size)], [coded], lookup)
    assert (out == x).all()
