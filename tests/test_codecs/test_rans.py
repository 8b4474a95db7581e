# SPDX-License-Identifier: Apache-2.0
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import constriction
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numba.core.dispatcher import Dispatcher

from kvlib.codecs import rans, rans_numba, rans_tables, rans_torch, rans_vector
from kvlib.codecs.rans import GAUSSIAN, LOWEST, Coded, Tables, backends, choose_lanes
from kvlib.errors import ConfigError, CorruptDataError, UnsupportedInputError
from tests.oracles import rans as oracle

ROOT = Path(__file__).parents[2]
NAMES = ("numba", "numpy", "torch")
BACKENDS = (*NAMES, "scalar")  # the last is numba as it is where there is no AVX-512
LANES = (8, 16, 32, 64, 128, 256)
SHA256 = "a164528e3f6aff39550255bddcba5356af60cc3b53a3a433b9fb1070319509c3"


@contextmanager
def backend_named(name):
    """What to ask for to get one of `BACKENDS`."""
    if name != "scalar":
        yield name
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans_numba, "KERNELS", rans_numba.kernels(False))
        yield "numba"


def encode(symbols, rows, tables, lanes=None, backend=None):
    with backend_named(backend) as name:
        return rans.encode(symbols, rows, tables, lanes, name)


def decode(coded, shapes, rows, tables, backend=None, out=None):
    with backend_named(backend) as name:
        return rans.decode(coded, shapes, rows, tables, name, out)


def same(a, b):
    return a.states.tolist() == b.states.tolist() and a.words.tolist() == b.words.tolist()


def drawn(rng, tables, rows, n):
    """Symbols [n, C] with the frequencies of their rows."""
    p = tables.frequencies / 4096
    columns = [rng.choice(tables.alphabet, n, p=p[row]) for row in rows]
    return np.array(columns, np.uint8).reshape(len(rows), n).T.copy()


def gaussian(rng, n, channels, first=14, last=48):
    rows = rng.integers(first, last, channels)
    return drawn(rng, GAUSSIAN, rows, n), rows


@st.composite
def tables(draw):
    """A few rows: one symbol, sparse, flat, or steep."""
    alphabet = draw(st.sampled_from([1, 2, 3, 63, 256]))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        weights = draw(
            hnp.arrays(np.int64, alphabet, elements=st.sampled_from([0, 0, 1, 2, 50, 4000]))
        )
        row = weights * 4096 // max(1, weights.sum())
        row[draw(st.integers(0, alphabet - 1))] += 4096 - row.sum()
        rows.append(row)
    return Tables(np.array(rows))


@st.composite
def streams(draw, table):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = rng.integers(0, len(table), draw(st.integers(0, 40)))
    n = draw(st.integers(0, 60))
    if draw(st.booleans()):
        return drawn(rng, table, rows, n), rows
    present = [np.flatnonzero(f) for f in table.frequencies]  # the dear symbols as often
    columns = [rng.choice(present[row], n) for row in rows]
    return np.array(columns, np.uint8).reshape(len(rows), n).T.copy(), rows


# The bitstream


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_all_coders_write_and_read_the_same_bits(data):
    """numba, NumPy, torch and the oracle agree on every stream, also when many go together."""
    table = data.draw(tables())
    given_streams = data.draw(st.lists(streams(table), min_size=1, max_size=4))
    lanes = [data.draw(st.sampled_from(LANES)) for _ in given_streams]
    symbols, rows = zip(*given_streams, strict=True)
    plain = table.frequencies.tolist()
    want = [
        oracle.encode(x.tolist(), plain, row.tolist(), n)
        for x, row, n in zip(symbols, rows, lanes, strict=True)
    ]
    shapes = [x.shape for x in symbols]
    for backend in BACKENDS:
        coded = encode(symbols, rows, table, lanes, backend)
        assert [(c.states.tolist(), c.words.tolist()) for c in coded] == want
        assert {(c.states.dtype.str[1:], c.words.dtype.str[1:]) for c in coded} == {("u4", "u2")}
        decoded = decode(coded, shapes, rows, table, backend)
        for x, y in zip(symbols, decoded, strict=True):
            assert y.dtype == np.uint8
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_of_many_sizes_together(backend, lanes):
    """Streams of all lengths and widths in one call are coded as they are alone."""
    rng = np.random.default_rng(lanes)
    shapes = [(0, 3), (1, 1), (5, 0), (40, 12), (41, 12), (300, 12), (64, 16), (7, 200), (300, 12)]
    symbols, rows = zip(*(gaussian(rng, *shape) for shape in shapes), strict=True)
    together = encode(symbols, rows, GAUSSIAN, [lanes] * len(shapes), backend)
    for x, row, coded in zip(symbols, rows, together, strict=True):
        assert same(coded, encode([x], [row], GAUSSIAN, [lanes], "numpy")[0])
    decoded = decode(together, shapes, rows, GAUSSIAN, backend)
    for x, y in zip(symbols, decoded, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_of_many_lanes_together(backend):
    """Few lanes and many, few steps and hundreds: streams drop out at steps of their own."""
    rng = np.random.default_rng(11)
    sizes = [(8, 130), (256, 3), (16, 64), (128, 65), (256, 70), (32, 1), (8, 0), (64, 17)]
    sizes += [(256, 70 - i) for i in range(9)]  # more lanes than a full block of steps can hold
    streams = [
        gaussian(rng, -(-(lanes * steps + 5) // width), width)
        for width, (lanes, steps) in enumerate(sizes, start=3)
    ]
    symbols, rows = zip(*streams, strict=True)
    lanes = [n for n, _ in sizes]
    together = encode(symbols, rows, GAUSSIAN, lanes, backend)
    for x, row, n, coded in zip(symbols, rows, lanes, together, strict=True):
        assert same(coded, encode([x], [row], GAUSSIAN, [n], "numba")[0])
    shapes = [x.shape for x in symbols]
    for x, y in zip(symbols, decode(together, shapes, rows, GAUSSIAN, backend), strict=True):
        np.testing.assert_array_equal(x, y)


def test_golden_streams():
    """Stored streams decode with every coder, and are what every coder writes."""
    stored = json.loads((ROOT / "tests" / "golden" / "rans.json").read_text(encoding="utf-8"))
    assert len(stored["streams"]) >= 6
    for stream in stored["streams"]:
        plain = stream["frequencies"] or GAUSSIAN.frequencies.tolist()
        rows = stream["rows"]
        tokens = [list(bytes.fromhex(token)) for token in stream["symbols"]]
        symbols = np.array(tokens, np.uint8).reshape(-1, len(rows))
        coded = Coded(
            np.frombuffer(bytes.fromhex(stream["states"]), "<u4"),
            np.frombuffer(bytes.fromhex(stream["words"]), "<u2"),
        )
        assert coded.states.size == stream["lanes"]
        states, words = coded.states.tolist(), coded.words.tolist()
        assert oracle.decode(states, words, symbols.shape, plain, rows) == tokens
        table = Tables(np.array(plain))
        for backend in BACKENDS:
            given_rows = [np.array(rows)]
            (found,) = encode([symbols], given_rows, table, [stream["lanes"]], backend)
            assert same(found, coded), stream["name"]
            (back,) = decode([coded], [symbols.shape], given_rows, table, backend)
            np.testing.assert_array_equal(back, symbols)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unaligned_and_read_only_input(backend):
    """Words at an odd address, symbols with strides and read-only arrays give the same."""
    rng = np.random.default_rng(2)
    x, row = gaussian(rng, 50, 24)
    (coded,) = encode([x], [row], GAUSSIAN, [8], backend)
    stored = b"\0" + coded.states.tobytes() + coded.words.tobytes()
    odd = Coded(
        np.frombuffer(stored, "<u4", 8, offset=1), np.frombuffer(stored, "<u2", offset=1 + 8 * 4)
    )
    swapped = Coded(odd.states.astype(">u4"), odd.words.astype(">u2"))
    for source in (odd, swapped):
        np.testing.assert_array_equal(decode([source], [x.shape], [row], GAUSSIAN, backend)[0], x)
    x.setflags(write=False)
    row.setflags(write=False)
    assert same(encode([x], [row.astype(np.uint8)], GAUSSIAN, [8], backend)[0], coded)
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    assert same(encode([wide], [row], GAUSSIAN, [8], backend)[0], coded)
    out = [np.empty(x.shape, np.uint8)]
    assert decode([coded], [x.shape], [row], GAUSSIAN, backend, out)[0] is out[0]
    np.testing.assert_array_equal(out[0], x)


def test_threads_give_identical_bytes():
    """Calls from several threads, on shared tables, do what one thread does."""
    rng = np.random.default_rng(3)
    symbols, rows = zip(*(gaussian(rng, 64, 96) for _ in range(8)), strict=True)
    shapes = [x.shape for x in symbols]
    want = encode(symbols, rows, GAUSSIAN)

    def once(_):
        fresh = Tables(GAUSSIAN.frequencies)
        coded = encode(symbols, rows, fresh)
        decoded = decode(coded, shapes, rows, fresh)
        return all(map(same, coded, want)) and all(map(np.array_equal, decoded, symbols))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(once, range(16)))


# Size


def entropy_bits(x, row):
    f = GAUSSIAN.frequencies[row, x]
    return float(-np.log2(f / 4096).sum())


def constriction_bits(x, row):
    """The same symbols with the same probabilities, by constriction's ANS coder."""
    coder = constriction.stream.stack.AnsCoder()
    for c in sorted(set(row.tolist())):
        f = GAUSSIAN.frequencies[c]
        present = np.flatnonzero(f)
        index = np.searchsorted(present, x[:, row == c].ravel()).astype(np.int32)
        model = constriction.stream.model.Categorical((f[present] / 4096), perfect=False)
        coder.encode_reverse(index, model)
    return coder.num_bits()


@pytest.mark.parametrize("classes", [(14, 25), (24, 48), (48, 64)])
def test_size_is_the_entropy(classes):
    """The cross-entropy under the tables and 16 to 32 bits a lane; an independent coder's size."""
    rng = np.random.default_rng(5)
    x, row = gaussian(rng, 256, 192, *classes)
    (coded,) = encode([x], [row], GAUSSIAN)
    bits, ideal, other = coded.nbytes * 8, entropy_bits(x, row), constriction_bits(x, row)
    lanes = coded.states.size
    assert ideal + 16 * lanes <= bits <= ideal * 1.0005 + 32 * lanes
    assert bits <= other * 1.005 + 32 * lanes
    assert bits >= other * 0.995
    assert bits <= ideal * 1.03 or classes[0] < 24  # where a symbol has more than a bit or two


def test_lanes_by_size():
    """The largest power of two in 8..256 that leaves each lane 768 symbols; 8 if none does."""
    for count in [*range(0, 200_000, 61), *(n * 768 + d for n in LANES for d in (-1, 0, 1))]:
        fitting = [n for n in LANES if count / n >= 768]
        assert choose_lanes(count) == max(fitting, default=8)


# Tables


def test_parametric_tables_to_the_bit():
    """The 64 rows have the documented SHA-256, and are the formula's in float64."""
    assert sha256(GAUSSIAN.frequencies.astype("<u2").tobytes()).hexdigest() == SHA256
    page = (ROOT / "docs" / "formats" / "codec.md").read_text(encoding="utf-8")
    assert SHA256 in page
    assert GAUSSIAN.frequencies.tolist() == [oracle.mixture_row(c) for c in range(64)]
    assert GAUSSIAN is rans_tables.gaussian_tables()


def test_parametric_tables_whatever_the_context():
    """A caller's decimal context does not change them."""
    code = (
        "import decimal, hashlib; decimal.getcontext().prec = 3;"
        "decimal.getcontext().rounding = decimal.ROUND_UP;"
        "from kvlib.codecs.rans_tables import gaussian_tables, class_radius;"
        "print(hashlib.sha256(gaussian_tables().frequencies.astype('<u2').tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == SHA256, done.stderr


def test_class_sigmas_and_radius():
    """64 log-spaced deviations from 0.08 to 9; the radius is where a row's symbols end."""
    sigmas, radius = rans_tables.class_sigmas(), rans_tables.class_radius()
    np.testing.assert_allclose(sigmas, np.geomspace(0.08, 9, 64), rtol=1e-14)
    assert radius.tolist() == [min(30, int(np.ceil(6 * s + 1.5))) for s in sigmas]
    for f, r in zip(GAUSSIAN.frequencies, radius, strict=True):
        assert np.flatnonzero(f).tolist() == [*range(31 - r, 31 + r + 1), rans_tables.ESCAPE]


@given(tables())
@settings(max_examples=50, deadline=None)
def test_derived_tables(table):
    """What the coders look up, entry by entry; all of it read-only."""
    f = table.frequencies.astype(int)
    assert table.cumulative.tolist() == (f.cumsum(1) - f).tolist()
    for k, row in enumerate(f):
        slots = [(s, i) for s, share in enumerate(row) for i in range(share)]
        assert table.symbols[4096 * k : 4096 * (k + 1)].tolist() == [s for s, _ in slots]
        packed = [(row[s] - 1) << 20 | i << 8 | s for s, i in slots]
        assert table.decoder[4096 * k : 4096 * (k + 1)].tolist() == packed
    for x in (table.frequencies, table.cumulative, table.symbols, table.encoder, table.decoder):
        assert not x.flags.writeable


def test_tables_do_not_change_with_their_source():
    """A copy is made of writable frequencies."""
    source = np.array([[4096]], np.uint16)
    table = Tables(source)
    source[0, 0] = 1
    assert table.frequencies.tolist() == [[4096]]


@pytest.mark.parametrize(
    "frequencies",
    [
        [[4095]],
        [[4096], [4097]],
        [[5000, -904]],
        [[65535, 4097]],
        [[2**62, 2**62, 2**62, 2**62 + 4096]],
        [4096],
        [[4096.0]],
        np.zeros((0, 3), int),
        np.zeros((3, 0), int),
        np.full((1, 512), 8),
        np.full((65537, 1), 4096),
    ],
)
def test_wrong_frequencies_are_refused(frequencies):
    """Each row of whole numbers in 0..4096 adds up to 4096."""
    with pytest.raises(ConfigError, match="frequencies"):
        Tables(np.asarray(frequencies))


def test_reciprocals_divide_exactly():
    """At every multiple of f and beside it, where rounding would show; the product fits 63 bits."""
    from kvlib.codecs.rans_numba import RECIPROCAL, SHIFT

    for f in range(1, 4097):
        top = f * 2**19
        multiples = f * np.unique(np.linspace(0, 2**19, 400).astype(np.int64))
        x = np.concatenate([multiples - 1, multiples, multiples + 1, [top - 1]])
        x = x[(x >= 0) & (x < top)].astype(np.uint64)
        assert (x * RECIPROCAL[f] >> np.uint64(SHIFT)).tolist() == (x // np.uint64(f)).tolist()
        assert (top - 1) * int(RECIPROCAL[f]) < 2**63


# Vectors


@st.composite
def kernel_inputs(draw):
    """A stream as kernels get it: its size around whole steps, its rows, states and words any."""
    table = draw(tables())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lanes, period = draw(st.sampled_from(LANES)), draw(st.integers(1, 70))
    steps, more = draw(st.integers(1, 12)), draw(st.sampled_from([-1, 0, 1, lanes // 2]))
    columns = np.resize(rng.integers(0, len(table), period), period + lanes).astype(np.uint32)
    low, high = draw(st.sampled_from([(LOWEST, 2**31), (LOWEST, LOWEST + 9), (2**30, 2**31)]))
    states = rng.integers(low, high, lanes).astype(np.uint32)
    return table, columns, period, states, max(1, steps * lanes + more), rng


def both_kernels(of, *arguments):
    """What the kernels with vectors and without return, and make of their copies of arguments."""
    made = []
    for vector in (True, False):
        mine = [x.copy() if isinstance(x, np.ndarray) else x for x in arguments]
        made.append((getattr(rans_numba.kernels(vector), of)(*mine), *mine))
    return made


@pytest.mark.avx512
@given(kernel_inputs(), st.integers(0, 3000))
@settings(max_examples=200, deadline=None)
def test_vectors_decode_as_lanes_alone(given_input, most):
    """Any words: the same symbols, states and number of words used, all of them or too many."""
    table, columns, period, states, count, rng = given_input
    words = rng.integers(0, 2**16, min(count, most) + states.size).astype(np.uint16)
    symbols = np.full(count, 99, np.uint8)
    lookup = rans_numba.lookup(table)
    first, second = both_kernels("decode", symbols, columns, period, lookup, states, words)
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(first[5], second[5])


@pytest.mark.avx512
@given(kernel_inputs(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_vectors_encode_as_lanes_alone(given_input, absent):
    """Any states: the same ones follow, with the same words; an absent symbol is told."""
    table, columns, period, states, count, rng = given_input
    every = np.resize(columns[:period], count)
    slots = rng.integers(0, 4096, count)
    symbols = table.symbols.reshape(-1, 4096)[every, slots]
    missing = np.flatnonzero(table.frequencies[every[0]] == 0)
    place = int(rng.integers(0, count)) // period * period  # of the first column
    if absent and missing.size:
        symbols[place] = rng.choice(missing)
    words = np.full(count, 7, np.uint16)
    first, second = both_kernels(
        "encode", symbols, columns, period, table.encoder, rans_numba.RECIPROCAL, states, words
    )
    assert first[0] == second[0]
    assert (first[0] < 0) == bool(absent and missing.size)
    if first[0] >= 0:
        np.testing.assert_array_equal(first[6], second[6])
        np.testing.assert_array_equal(first[7][first[0] :], second[7][first[0] :])


@pytest.mark.parametrize("vector", [pytest.param(True, marks=pytest.mark.avx512), False])
def test_kernels_divide_exactly(vector):
    """By every frequency, at multiples and beside them, where rounding would show."""
    f = np.arange(1, 4097)
    rows = np.stack([f, 4096 - f], 1)
    table = Tables(rows)
    encode_lanes = rans_numba.kernels(vector).encode
    places = np.unique(np.geomspace(1, 2**19, 60).astype(np.int64))
    for multiple in places:
        for beside in (-1, 0, 1):
            x = np.clip(multiple * f + beside, LOWEST, np.maximum(f * 2**19 - 1, LOWEST))
            full = x >= f * 2**19
            rest = x >> np.where(full, 16, 0)
            want = rest // f * 4096 + rest % f
            for first in range(0, 4096, 256):
                mine = slice(first, first + 256)
                columns = np.resize(np.arange(first, first + 256), 512).astype(np.uint32)
                states, words = x[mine].astype(np.uint32), np.empty(256, np.uint16)
                symbols = np.zeros(256, np.uint8)
                reciprocal = rans_numba.RECIPROCAL
                at = encode_lanes(symbols, columns, 256, table.encoder, reciprocal, states, words)
                np.testing.assert_array_equal(states, want[mine])
                np.testing.assert_array_equal(words[at:], (x[mine] & 0xFFFF)[full[mine]])


GUARDED = """
import ctypes, mmap, os, sys
import numpy as np
from kvlib.codecs import cachegen_symbols_numba, rans_numba, rans_vector
from kvlib.codecs.rans import LOWEST
from kvlib.codecs.rans_tables import Tables

PAGE = mmap.PAGESIZE
mprotect = ctypes.CDLL(None, use_errno=True).mprotect


def guarded(x, front):
    # A copy that begins behind a page that nobody may touch, or ends in front of one.
    size = -(-x.nbytes // PAGE) * PAGE
    memory = mmap.mmap(-1, size + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + size):
        assert mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    out = np.frombuffer(memory, x.dtype, x.size, PAGE if front else PAGE + size - x.nbytes)
    out[:] = x
    return out


def read_only(x, front):
    out = guarded(x, front)
    out.setflags(write=False)
    return out


for front in (True, False):
    x = guarded(np.zeros(5, np.uint32), front)
    child = os.fork()
    if child == 0:
        ctypes.string_at(x.ctypes.data - 4 if front else x.ctypes.data + x.nbytes, 4)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])  # the guard works

rng = np.random.default_rng(0)
rows = rng.multinomial(4096 - 256, rng.dirichlet(np.full(256, 0.05), 5)) + 1
rows[[0, 4]] = 0
rows[[[0], [4]], [3, 255]] = 5, 4091  # of the last row the end is looked at
table = Tables(rows)
done = 0
for vector in {False, rans_vector.SUPPORTED}:
    for front in (True, False):
        lookup = tuple(read_only(x, front) for x in rans_numba.lookup(table))
        cumulative, width, starts = cachegen_symbols_numba.lookup(table)
        found_in = guarded(cumulative, front), width, guarded(starts, front)
        for lanes in (8, 16, 32, 128, 256):
            for size in (1, lanes - 1, lanes, lanes + 1, 3 * lanes, 5 * lanes + 17):
                for period in (1, 7, 16, 300):
                    columns = np.resize(rng.integers(0, 5, period), period + lanes)
                    columns = guarded(columns.astype(np.uint32), front)
                    every = np.resize(columns[:period], size)
                    symbols = table.symbols.reshape(-1, 4096)[every, rng.integers(0, 4096, size)]
                    words = guarded(np.zeros(size, np.uint16), front)
                    states = guarded(np.full(lanes, LOWEST, np.uint32), front)
                    first = rans_numba.kernels(vector).encode(
                        guarded(symbols, front), columns, period,
                        guarded(table.encoder, front), rans_numba.RECIPROCAL, states, words,
                    )
                    good = words[first:]
                    anything = rng.integers(0, 2**16, rng.integers(0, size + 1)).astype(np.uint16)
                    for found, begin in (
                        (good, states.copy()),
                        (anything, np.full(lanes, LOWEST, np.uint32)),
                        (anything, rng.integers(LOWEST, 2**31, lanes).astype(np.uint32)),
                    ):
                        padded = np.concatenate([found, np.zeros(lanes, np.uint16)])
                        for kernel, tables in (
                            (rans_numba.kernels(vector).decode, (lookup,)),
                            (cachegen_symbols_numba.decoder(vector), found_in),
                        ):
                            out = guarded(np.zeros(size, np.uint8), front)
                            kernel(
                                out, columns, period, *tables,
                                guarded(begin, front), guarded(padded, front),
                            )
                            if found is good:
                                assert np.array_equal(out, symbols)
                            done += 1
print("inside", done)
"""


def test_nothing_outside_is_touched():
    """Arrays beside pages that nobody may read or write, for good streams and any others."""
    run = [sys.executable, "-c", GUARDED]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = 2 if rans_vector.SUPPORTED else 1
    assert done.stdout == f"inside {kinds * 2 * 5 * 6 * 4 * 3 * 2}\n"


@pytest.mark.slow
def test_code_for_one_processor_is_not_loaded_on_another(tmp_path):
    """numba tells them apart in its cache; without AVX-512 the kernels without vectors run."""
    code = (
        "import numpy as np; from kvlib.codecs import rans, rans_numba, rans_vector;"
        "from kvlib.codecs import cachegen_symbols_numba as c;"
        "x = np.arange(6000).reshape(-1, 60).astype(np.uint8) % 3 + 30; row = np.arange(60);"
        "(coded,) = rans.encode([x], [row], rans.GAUSSIAN, [16]);"
        "(y,) = rans.decode([coded], [x.shape], [row], rans.GAUSSIAN); assert (x == y).all();"
        "print(rans_vector.SUPPORTED, rans_numba.KERNELS is rans_numba.kernels(False),"
        "sum(c._find_starts.stats.cache_hits.values()), hash(coded.words.tobytes()))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONHASHSEED": "0"}
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        environment.pop(name, None)
    seen = []
    for name in (None, "generic", None):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | ({"NUMBA_CPU_NAME": name} if name else {}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.split())
    assert seen[1][:3] == ["False", "True", "0"]
    assert [x[2] for x in seen] == ["0", "0", "1"]
    assert len({x[3] for x in seen}) == 1
    assert seen[0][:2] == seen[2][:2]


def test_vectors_are_used_where_they_can_be():
    """The default kernels have them exactly where numba compiles for AVX-512."""
    assert rans_numba.KERNELS is rans_numba.kernels(rans_vector.SUPPORTED)
    assert rans_numba.decode_lanes is rans_numba.KERNELS.decode
    if not any(name.startswith("NUMBA_") and "CPU" in name for name in os.environ):
        from llvmlite.binding import get_host_cpu_features

        features = get_host_cpu_features()
        has = all(features.get(x, False) for x in ("avx512f", "avx512bw", "avx512vl"))
        assert has == rans_vector.SUPPORTED


# Damage


def damaged(coded):
    """The stream with each single bit flipped."""
    for name in ("states", "words"):
        x = getattr(coded, name)
        for bit in range(8 * x.nbytes):
            data = bytearray(x.tobytes())
            data[bit // 8] ^= 1 << bit % 8
            changed = np.frombuffer(bytes(data), x.dtype)
            both = {"states": coded.states, "words": coded.words, name: changed}
            yield Coded(**both)


def outcome(coded, x, row, table, backend):
    """The symbols that come out, None where the stream is refused."""
    try:
        (out,) = decode([coded], [x.shape], [row], table, backend)
    except CorruptDataError:
        return None
    return out.tolist()


def test_every_flipped_bit():
    """It is noticed, or the stream is what encoding the other symbols gives."""
    rng = np.random.default_rng(7)
    x, row = gaussian(rng, 6, 25)
    (coded,) = encode([x], [row], GAUSSIAN, [8])
    seen = 0
    for number, flipped in enumerate(damaged(coded)):
        out = outcome(flipped, x, row, GAUSSIAN, "numba")
        if number % 5 == 0:
            states, words = flipped.states.tolist(), flipped.words.tolist()
            plain = GAUSSIAN.frequencies.tolist()
            ranged = all(2**15 <= s < 2**31 for s in states)
            want = oracle.decode(states, words, x.shape, plain, row.tolist()) if ranged else None
            for backend in BACKENDS:
                assert outcome(flipped, x, row, GAUSSIAN, backend) == want
        if out is not None:
            seen += 1
            other = np.array(out, np.uint8)
            assert not np.array_equal(other, x)
            assert same(encode([other], [row], GAUSSIAN, [8])[0], flipped)
    assert seen < number / 20


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_states_and_words(data):
    """Every coder refuses the same; what they accept they write again."""
    table = data.draw(tables())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = data.draw(st.tuples(st.integers(0, 30), st.integers(1, 9)))
    row = rng.integers(0, len(table), shape[1])
    low, high = data.draw(st.sampled_from([(0, 2**32), (2**15, 2**31), (2**15, 2**15 + 1)]))
    coded = Coded(
        rng.integers(low, high, data.draw(st.sampled_from(LANES))).astype(np.uint32),
        rng.integers(0, 2**16, data.draw(st.integers(0, 300))).astype(np.uint16),
    )
    empty = np.empty(shape, np.uint8)
    outs = [outcome(coded, empty, row, table, backend) for backend in BACKENDS]
    assert outs[0] == outs[1] == outs[2]
    if outs[0] is not None:
        x = np.array(outs[0], np.uint8).reshape(shape)
        (again,) = encode([x], [row], table, [coded.states.size])
        assert same(again, coded)


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_and_excess(backend):
    """Words too few or too many, at either end, are noticed; so are symbols too few or too many."""
    rng = np.random.default_rng(8)
    x, row = gaussian(rng, 12, 40, 40, 60)
    (coded,) = encode([x], [row], GAUSSIAN, [8])
    states, words = coded.states, coded.words
    assert words.size > 50
    for n in range(0, words.size, 9 if backend == "torch" else 1):
        for part in (words[:n], words[words.size - n :]):
            assert outcome(Coded(states, part), x, row, GAUSSIAN, backend) is None
    for more in (np.append(words, 0), np.append(words, [7] * 300), np.insert(words, 0, 9)):
        longer = Coded(states, more.astype(np.uint16))
        assert outcome(longer, x, row, GAUSSIAN, backend) is None
    for other in (x[:-1], np.concatenate([x, x[:1]])):
        assert outcome(coded, other, row, GAUSSIAN, backend) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_damaged_stream_is_named(backend):
    """Among many streams the message says which, empty ones counted."""
    rng = np.random.default_rng(9)
    shapes = [(0, 4), (30, 4), (40, 4), (50, 4)]
    symbols, rows = zip(*(gaussian(rng, *shape) for shape in shapes), strict=True)
    coded = encode(symbols, rows, GAUSSIAN)
    coded[2] = Coded(coded[2].states, coded[2].words[:-1])
    with pytest.raises(CorruptDataError, match="stream 2 needs more words"):
        decode(coded, shapes, rows, GAUSSIAN, backend)
    coded[2] = Coded(coded[2].states, np.append(coded[2].words, [0, 0]).astype(np.uint16))
    with pytest.raises(CorruptDataError, match="stream 2"):
        decode(coded, shapes, rows, GAUSSIAN, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("states", "words", "row", "message"),
    [
        ([2**15 - 1] + [2**15] * 7, [], 0, "not in 32768"),
        ([2**31] + [2**15] * 7, [], 0, "not in 32768"),
        ([2**15] * 7, [], 0, "7 lanes"),
        ([2**15] * 4, [], 0, "4 lanes"),
        ([2**15] * 512, [], 0, "512 lanes"),
        ([], [], 0, "0 lanes"),
        ([2**15] * 8, [0] * 7, 0, "7 words for 6 symbols"),
        ([2**15] * 8, [], 64, "rows must be"),
    ],
)
def test_hostile_streams(backend, states, words, row, message):
    """Refused before anything is decoded."""
    coded = Coded(np.array(states, np.uint32), np.array(words, np.uint16))
    with pytest.raises(CorruptDataError, match=message):
        decode([coded], [(2, 3)], [np.full(3, row)], GAUSSIAN, backend)


def test_no_symbols():
    """All states at their start and no words; anything else is refused."""
    nothing, row = np.empty((0, 3), np.uint8), np.zeros(3, int)
    (coded,) = encode([nothing], [row], GAUSSIAN)
    assert (coded.states.tolist(), coded.words.tolist()) == ([2**15] * 8, [])
    assert decode([coded], [(0, 3)], [row], GAUSSIAN)[0].shape == (0, 3)
    assert encode([], [], GAUSSIAN) == decode([], [], [], GAUSSIAN) == []
    other = Coded(coded.states + np.uint32(1), coded.words)
    assert outcome(other, nothing, row, GAUSSIAN, None) is None
    assert outcome(Coded(coded.states, np.ones(1, np.uint16)), nothing, row, GAUSSIAN, None) is None


# Arguments


@pytest.mark.parametrize("backend", BACKENDS)
def test_symbols_without_frequency(backend):
    """They are named; no stream comes back."""
    good, row = np.full((4, 2), 31, np.uint8), np.array([0, 5])
    for symbol in (0, 63, 255):
        x = good.copy()
        x[2, 1] = symbol
        with pytest.raises(UnsupportedInputError, match=f"stream 1: symbol {symbol} in column 1"):
            encode([good, x, good], [row] * 3, GAUSSIAN, backend=backend)


X, ROW = np.full((4, 2), 31, np.uint8), np.zeros(2, int)


@pytest.mark.parametrize(
    "arguments",
    [
        ([X.astype(int)], [ROW]),
        ([X[0]], [ROW]),
        ([X], [ROW[:1]]),
        ([X], [ROW.astype(float)]),
        ([X], [ROW + 64]),
        ([X], [ROW - 1]),
        ([X], []),
        ([X], [ROW], GAUSSIAN, [8, 8]),
        ([X], [ROW], GAUSSIAN, [12]),
        ([X], [ROW], GAUSSIAN, [4]),
        ([X], [ROW], GAUSSIAN, [512]),
    ],
)
def test_wrong_arguments_of_encode(arguments):
    """Each is told."""
    with pytest.raises(ConfigError):
        encode(*arguments, *([GAUSSIAN] if len(arguments) == 2 else []))


@pytest.mark.parametrize(
    "change",
    [
        {"coded": []},
        {"coded": [Coded(np.full(8, 2**15), np.empty(0, np.uint16))]},
        {"coded": [Coded(np.full(8, 2**15, np.uint32), np.empty(0, np.uint8))]},
        {"shapes": []},
        {"rows": []},
        {"rows": [ROW[:1]]},
        {"out": []},
        {"out": [np.empty((4, 3), np.uint8)]},
        {"out": [np.empty((4, 2))]},
        {"out": [np.empty((2, 4), np.uint8).T]},
    ],
)
def test_wrong_arguments_of_decode(change):
    """Each is told."""
    given_arguments = {"coded": encode([X], [ROW], GAUSSIAN), "shapes": [(4, 2)], "rows": [ROW]}
    with pytest.raises(ConfigError):
        decode(**{**given_arguments, **change}, tables=GAUSSIAN)


# Backends


def test_backends_and_their_choice(monkeypatch):
    """numba comes first; an argument beats KVLIB_RANS, which beats the default."""
    assert backends() == ("numba", "numpy", "torch")
    used = []
    for name in NAMES:
        module = rans._coder(name)
        real = module.encode_streams
        monkeypatch.setattr(
            module, "encode_streams", lambda *a, n=name, f=real: used.append(n) or f(*a)
        )
    encode([X], [ROW], GAUSSIAN)
    monkeypatch.setenv("KVLIB_RANS", "torch")
    encode([X], [ROW], GAUSSIAN)
    encode([X], [ROW], GAUSSIAN, backend="numpy")
    assert used == ["numba", "torch", "numpy"]
    monkeypatch.setenv("KVLIB_RANS", "cuda")
    with pytest.raises(ConfigError, match="KVLIB_RANS"):
        encode([X], [ROW], GAUSSIAN)
    with pytest.raises(ConfigError, match=r"unknown rANS backend 'gpu' \(backend"):
        encode([X], [ROW], GAUSSIAN, backend="gpu")


def test_without_numba():
    """NumPy takes its place; asking for numba names the extra."""
    code = """
import sys
sys.modules["numba"] = None
import numpy as np
from kvlib.codecs import rans
from kvlib.errors import ConfigError
assert rans.backends() == ("numpy", "torch")
x, row = np.full((4, 2), 31, np.uint8), np.zeros(2, int)
coded = rans.encode([x], [row], rans.GAUSSIAN)
assert (rans.decode(coded, [x.shape], [row], rans.GAUSSIAN)[0] == x).all()
assert "kvlib.codecs.rans_numpy" in sys.modules
try:
    rans.encode([x], [row], rans.GAUSSIAN, backend="numba")
except ConfigError as exc:
    assert "kvlib[fast]" in str(exc)
    print("told")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "told\n", done.stderr


def test_importing_loads_no_compiler():
    """numba is imported, and the tables are made, when they are first needed."""
    code = (
        "import sys; import kvlib.codecs.rans as r;"
        "print('numba' in sys.modules, 'torch' in sys.modules,"
        "r.gaussian_tables.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False", "0"], done.stderr


def test_no_folder_for_the_compiler_s_cache(monkeypatch):
    """Where nothing can be written, kernels are compiled all the same."""
    tried = []

    def refuse(dispatcher):
        tried.append(dispatcher)
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(Dispatcher, "enable_caching", refuse)
    double = rans_numba._compiled(rans_numba.types.int64)(lambda x: 2 * x)
    assert (double(21), len(tried)) == (42, 1)


def test_a_changed_source_makes_caches_stale(tmp_path):
    """A kernel contains code of other files: whichever is changed, it is compiled again."""
    source = Path(rans_numba.__file__)
    folder = tmp_path / "kvlib" / "codecs"
    shutil.copytree(source.parents[1], tmp_path / "kvlib", ignore=lambda *_: ["__pycache__"])
    script = (
        "from kvlib.codecs import rans_numba as r;"
        "print(r.__file__, sum(r.KERNELS.decode.stats.cache_hits.values()))"
    )

    def hits():
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        file, count = done.stdout.split()
        assert file == str(folder / "rans_numba.py")
        return int(count)

    assert hits() == 0
    assert hits() == 1
    with (folder / "rans_vector.py").open("a", encoding="utf-8") as file:
        file.write("# another line\n")
    assert hits() == 0
    assert hits() == 1


def test_unknown_names_of_the_module():
    """Only GAUSSIAN is made on demand."""
    with pytest.raises(AttributeError, match="GAUSS'"):
        _ = rans.GAUSS


@pytest.mark.gpu
def test_torch_on_a_gpu():
    """The same bits."""
    rng = np.random.default_rng(10)
    x, row = gaussian(rng, 100, 48)
    streams = [rans._stream(0, x.reshape(-1), row, 32)]
    device = torch.device("cuda")
    (coded,) = rans_torch.encode_streams(streams, GAUSSIAN, device)
    assert same(coded, encode([x], [row], GAUSSIAN, [32], "numpy")[0])
    out = np.empty_like(x)
    target = [rans._stream(0, out.reshape(-1), row, 32)]
    rans_torch.decode_streams(target, [coded], GAUSSIAN, device)
    np.testing.assert_array_equal(out, x)
