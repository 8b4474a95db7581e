# SPDX-License-Identifier: Apache-2.0
"""Chunks of coefficients: what is written comes back, and whatever comes, both readers agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.codecs import coefficients_numpy, coefficients_write_numpy, rans
from kvlib.codecs.coefficients import (
    Chunk,
    Cursor,
    Expected,
    level_tables,
    levels_of,
    parse_chunk,
)
from kvlib.errors import CorruptDataError

READERS = {"numpy": coefficients_numpy.read_chunks}
WRITERS = {"numpy": coefficients_write_numpy}
if "numba" in rans.backends():
    from kvlib.codecs import coefficients_numba, coefficients_write_numba

    READERS["numba"] = coefficients_numba.read_chunks
    WRITERS["numba"] = coefficients_write_numba
STEP = np.float32(0.3)


def make(seed, n, r, deviations, means, outliers=0):
    """A chunk of Gaussian integers, some of which are far off."""
    rng = np.random.default_rng(seed)
    values = np.rint(rng.normal(size=(n, r)) * deviations).astype(np.int32)
    for _ in range(outliers if values.size else 0):
        values[rng.integers(n), rng.integers(r)] = rng.integers(-(1 << 24), 1 << 24)
    means = np.rint(rng.normal(size=r) * means).astype(np.int64)
    wide = values.astype(np.int64)
    return Chunk(values, means, wide.sum(axis=0), (wide**2).sum(axis=0))


def expectations(seed, r):
    """Of channels that may have other deviations."""
    rng = np.random.default_rng(seed)
    return Expected(*(levels_of(np.exp(rng.uniform(-3, 8, r))) for _ in range(2)))


def write(chunk, known):
    """A chunk's bytes, which all writers agree on."""
    one, *others = [x.write_chunks([x.draft_chunk(chunk, known)])[0] for x in WRITERS.values()]
    assert all(other == one for other in others)
    return one


def read(data, n, r, known, parts):
    """The rows and means of either reader, or that it refuses them."""
    out = {}
    for name, reader in READERS.items():
        try:
            cursor = Cursor(data)
            packed = parse_chunk(cursor, n, r, known, STEP, parts)
            cursor.end()
            (decoded,) = reader([packed])
            out[name] = decoded.rows.copy(), decoded.means.copy()
        except CorruptDataError:
            out[name] = None
    return out


def same(results):
    first, *others = results.values()
    for other in others:
        assert (first is None) == (other is None)
        if first is not None:
            assert np.array_equal(first[0].view(np.uint32), other[0].view(np.uint32))
            assert np.array_equal(first[1], other[1])
    return first


@settings(max_examples=150, deadline=None)
@given(
    n=st.sampled_from([1, 2, 7, 64, 256]),
    r=st.integers(1, 70),
    parts=st.integers(1, 4),
    profiled=st.booleans(),
    spread=st.floats(-3, 12),
    outliers=st.integers(0, 5),
    seed=st.integers(0, 1 << 30),
)
def test_round_trip(n, r, parts, profiled, spread, outliers, seed):
    deviations = np.exp(np.random.default_rng(seed).uniform(-3, spread, r))
    if seed % 2:
        deviations[r // 2 :] = 0  # inactive channels
    chunk = make(seed, n, r, deviations, np.exp(spread), outliers)
    known = expectations(seed, r) if profiled else None
    data = write(chunk, known)
    rows, means = same(read(data, n, r, known, parts))
    assert np.array_equal(means, chunk.means)
    used = np.flatnonzero(chunk.square)
    active = int(used[-1]) + 1 if used.size else 0
    size = -(-(active if profiled else r) // parts)
    assert rows.shape == (parts, n, size)
    back = rows.transpose(1, 2, 0).reshape(n, size * parts)
    expected = np.zeros_like(back)
    width = min(back.shape[1], r)
    expected[:, :width] = chunk.values[:, :width].astype(np.float32) * STEP
    assert np.array_equal(back, expected)


@pytest.mark.parametrize("profiled", [False, True])
def test_readers_agree_on_what_is_damaged(profiled):
    """They accept and refuse the same bytes, and make the same of what they accept."""
    rng = np.random.default_rng(1)
    n, r = 24, 9
    known = expectations(3, r) if profiled else None
    deviations = np.geomspace(300, 0.2, r)
    whole = write(make(5, n, r, deviations, 40.0, outliers=3), known)
    refused = 0
    for i in range(8 * len(whole)):
        data = bytearray(whole)
        data[i >> 3] ^= 1 << (i & 7)
        refused += same(read(bytes(data), n, r, known, 2)) is None
    assert 2 * len(whole) < refused < 8 * len(whole)  # low bits are anything
    for _ in range(1500):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        same(read(bytes(data), n, r, known, 2))


@pytest.mark.parametrize("size", range(0, 120, 7))
def test_truncation(size):
    known = expectations(3, 9)
    whole = write(make(5, 24, 9, np.geomspace(30, 0.2, 9), 40.0), known)
    assert size < len(whole)
    assert same(read(whole[:size], 24, 9, known, 1)) is None


def test_nothing_is_active():
    """A chunk of zeros has means only; one without channels has nothing."""
    for r in (5, 0):
        chunk = make(1, 4, r, 0.0, 0.0)
        rows, means = same(read(write(chunk, expectations(1, r)), 4, r, expectations(1, r), 3))
        assert rows.shape == (3, 4, 0)
        assert means.tolist() == [0] * r


def test_low_bits_come_in_planes():
    """The first plane holds bit 0 of all columns with a low bit, the first row first."""
    rng = np.random.default_rng(0)
    sizes = np.array([2, 90, 20, 3, 1 << 24, 1500, 3000, 60, 400])
    values = rng.integers(-sizes, sizes, (13, sizes.size)).astype(np.int32)
    wide = values.astype(np.int64)
    chunk = Chunk(values, np.zeros(9, np.int64), wide.sum(axis=0), (wide**2).sum(axis=0))
    data = write(chunk, Expected(np.full(9, 50, np.uint8), np.zeros(9, np.uint8)))
    cursor = Cursor(data)
    packed = parse_chunk(cursor, 13, 9, Expected(*np.full((2, 9), 50, np.uint8)), STEP, 1)
    spread = (wide**2).sum(axis=0) / 13 - (wide.sum(axis=0) / 13) ** 2
    shift = level_tables()[1][levels_of(np.sqrt(spread))]
    assert shift.min() == 0
    assert shift.max() > 16
    assert packed.low_bytes == -(-13 * int(shift.sum()) // 8)
    at = 4 * sum(packed.lanes) + 2 * sum(packed.words)
    low = packed.body[at : at + packed.low_bytes]
    planes = [
        [v >> j & 1 for row in values for v, s in zip(row, shift, strict=True) if s > j]
        for j in range(int(shift.max()))
    ]
    expected = [int(bit) for plane in planes for bit in plane]
    assert [low[i >> 3] >> (i & 7) & 1 for i in range(len(expected))] == expected


@pytest.mark.parametrize("profiled", [False, True])
def test_the_largest_numbers(profiled):
    """Values of up to 24 bits are mostly low bits, and rare ones escapes: more than float16s."""
    n, r = 64, 70
    known = expectations(5, r) if profiled else None
    for deviations in (np.full(r, 2.0**21), np.geomspace(2.0**21, 0.1, r)):
        chunk = make(1, n, r, deviations, 2.0**24, outliers=200)
        data = write(chunk, known)
        assert len(data) > 2048 + 2 * r * n or deviations[-1] < 1
        rows, means = same(read(data, n, r, known, 1))
        assert np.array_equal(rows[0], chunk.values.astype(np.float32) * STEP)
        assert np.array_equal(means, chunk.means)
