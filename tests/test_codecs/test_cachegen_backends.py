# SPDX-License-Identifier: Apache-2.0
"""`cachegen` writes and reads the same bits compiled by numba and without."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.artefacts import model_identity, save_artefact
from kvlib.blocks import LayerKV, Row
from kvlib.calibration.cachegen import measure
from kvlib.codecs import (
    Container,
    cachegen,
    cachegen_lmcache,
    cachegen_numpy,
    cachegen_profile,
    decode_block,
    encode_block,
    rans,
)
from kvlib.codecs.base import raw_view
from kvlib.codecs.cachegen import CacheGenCodec
from kvlib.codecs.cachegen_kernels import ESCAPE, GROUP, Codes, kernels
from kvlib.codecs.cachegen_profile import SharedTables, TableSet
from kvlib.codecs.container import SectionFlag
from kvlib.codecs.rans import Coded, Stream, Tables
from kvlib.errors import CorruptDataError
from kvlib.spec import KVSpec, LayerSpec
from kvlib.testing.codecs import sample_blocks, sample_spec
from kvlib.testing.models import random_block

if "numba" not in rans.backends():
    pytest.skip("numba does not work here", allow_module_level=True)

from kvlib.codecs import cachegen_numba, cachegen_symbols_numba, rans_vector

BOTH = (cachegen_numba, cachegen_numpy)
KERNELS = [(cachegen_numpy, False), (cachegen_numba, False)]  # and whether by vectors
if rans_vector.SUPPORTED:
    KERNELS.append((cachegen_numba, True))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 9, 10, 11, 64, 255, 256, 257)
CONTENTS = [
    "normal",
    "outliers",
    "wide",
    "denormal",
    "tiny",
    "constant",
    "zero",
    "negative",
    "bits",
    "nan",
    "inf",
    "huge",
]
SHAPES = [(3, 64), (2, 80), (1, 96), (2, 128), (1, 256), (5, 3), (1, 1), (7, 17)]


@st.composite
def matrices(draw):
    """[H, n, D] of every dtype, content and layout."""
    heads, width = draw(st.sampled_from(SHAPES))
    n, dtype = draw(st.sampled_from(TOKENS)), draw(st.sampled_from(DTYPES))
    content = draw(st.sampled_from(CONTENTS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((heads, n, width)).astype(np.float32)
    places = rng.integers(0, x.size, 3)
    info = torch.finfo(dtype)
    if content == "outliers":
        x.flat[places] *= 1000
    elif content == "wide":
        x *= np.exp(rng.uniform(-20, 6, x.shape))
    elif content == "denormal":
        x *= info.smallest_normal / 3
    elif content == "tiny":
        x *= 55 * info.smallest_normal * info.eps
    elif content in ("constant", "zero", "negative"):
        x[:] = {"constant": 1.7, "zero": 0, "negative": -0.0}[content]
    elif content in ("nan", "inf", "huge"):
        large = {"nan": np.nan, "inf": -np.inf, "huge": info.max * 0.49}[content]
        x.flat[places[: 1 + draw(st.integers(0, 2))]] = large
    out = torch.from_numpy(x).to(dtype)
    if content == "bits":
        raw = torch.from_numpy(rng.integers(0, 256, (heads, n, width * dtype.itemsize), np.uint8))
        out = raw.view(dtype)
    return draw(st.sampled_from([lambda y: y, strided, sparse]))(out)


def strided(x):
    """The same numbers token after token."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def sparse(x):
    """The same with others between them, and a last stride of 2."""
    wide = torch.full((*x.shape[:2], x.shape[2] * 2 + 1), 9, dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def framed(shape, dtype):
    """A matrix to be filled, and the memory around it."""
    heads, n, width = shape
    memory = torch.full((n + 2, heads + 1, width + 3), 7, dtype=dtype)
    return memory, memory[1:-1, 1:, 2:-1].transpose(0, 1)


def same(a, b):
    """Equal in every bit."""
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def table_set(channels, seed, width):
    """Tables that code another range in every channel."""
    rng = np.random.default_rng(seed)
    low, high = -rng.integers(0, 128, 2 * channels), rng.integers(0, 128, 2 * channels)
    rows = np.zeros((2 * channels, 256), np.int64)
    for row, a, b in zip(rows, low, high, strict=True):
        row[127 + a : 128 + b] = 4000 // (b - a + 1)
        row[ESCAPE] = 4096 - row.sum()
    edges = [x.astype(np.float32) for x in (low, high)]
    return TableSet(np.float32(width), SharedTables(Tables(rows)), 0, *edges)


# The kernels


@settings(max_examples=150, deadline=None)
@given(matrices(), st.integers(0, 99), st.sampled_from([1e-19, 1e-6, 0.05, 0.7, 500.0]))
def test_paper(x, seed, width):
    """Symbols, peaks, escapes and numbers; nothing is written beside the matrix."""
    tables = table_set(x.shape[0] * x.shape[2], seed, width).of(None)
    found = [k.quantize(x, tables) for k in BOTH]
    if found[0] is None or found[1] is None:
        assert found == [None, None]
        wide = x.double()
        assert not wide.isfinite().all() or wide.abs().max() > 2**20 * width
        return
    same(*found)
    made = []
    for k in BOTH:
        memory, out = framed(x.shape, x.dtype)
        assert k.dequantize(found[0], tables.width, out)
        made.append(raw_view(memory).tobytes())
        out.fill_(7)
        assert (memory == 7).all()
    assert made[0] == made[1]


def test_anchors_whose_scale_is_denormal():
    """Scales are rounded so coarsely then that codes beyond 127 have to be cut."""
    x = torch.tensor([[[185.0, -160.0, 3.0]]]) * 2.0**-149
    tables = table_set(3, 0, 1.0)
    tables = replace(tables, low=np.full(6, -127, np.float32), high=np.full(6, 127, np.float32))
    for k in BOTH:
        codes = k.quantize(x, tables.of(None))
        assert codes.symbols.tolist() == [[254, 0, 130]]
        assert not codes.escapes.size


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from([7, 15]))
def test_lmcache(x, half):
    """Codes, peaks, checks, counts, frequencies and numbers."""
    found = [k.levels(x, half) for k in BOTH]
    if found[0] is None or found[1] is None:
        assert found == [None, None]
        wide = x.double()
        assert not wide.isfinite().all() or wide.abs().max() > torch.finfo(x.dtype).max / 2
        return
    levels, below = found[0]
    same(levels, found[1][0])
    same([below], [found[1][1]])
    assert levels.codes.max() <= 2 * half
    counts = [np.bincount(c, minlength=32) for c in levels.codes.T]
    assert np.array_equal(np.diff(below.astype(int)), counts)
    same(*([k.frequencies(below)] for k in BOTH))
    made = []
    for k in BOTH:
        memory, out = framed(x.shape, x.dtype)
        assert k.restore(levels, half, out)
        made.append(raw_view(memory).tobytes())
        out.fill_(7)
        assert (memory == 7).all()
    assert made[0] == made[1]
    wrong = levels.checks.copy()
    wrong[-1, -1] += 1
    for k in BOTH:
        assert not k.restore(levels._replace(checks=wrong), half, out)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 100, 255, 4096, 5000, 32768]))
def test_frequencies(seed, n):
    """Any counts: rows add up, and what occurs can be coded."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, rng.dirichlet(np.full(31, rng.choice([0.01, 0.3, 9])), 5)[0], 6)
    below = np.zeros((6, 33), np.uint16)
    below[:, 1:32] = counts.cumsum(1)
    below[:, 32] = n
    found = [k.frequencies(below) for k in BOTH]
    same([found[0]], [found[1]])
    assert (found[0].sum(1, dtype=int) == 4096).all()
    assert np.array_equal(found[0][:, :31] > 0, counts > 0)


@settings(max_examples=80, deadline=None)
@given(matrices(), st.integers(-200, 200), st.integers(0, 99))
def test_forged_codes(x, change, seed):
    """Any symbols and escapes decode alike, or are refused alike."""
    rng = np.random.default_rng(seed)
    heads, n, width = x.shape
    symbols = rng.integers(0, 256, (n, heads * width)).astype(np.uint8)
    there = int((symbols == ESCAPE).sum())
    escapes = rng.integers(-(2**24) + 1, 2**24, max(there + change * seed % 3, 0))
    top = torch.finfo(x.dtype).max
    peaks = torch.from_numpy(rng.uniform(0, top, -(-n // GROUP))).to(x.dtype).float().numpy()
    made = []
    for k in BOTH:
        memory, out = framed(x.shape, x.dtype)
        done = k.dequantize(Codes(peaks, symbols, escapes), np.float32(9e3), out)
        assert done == (escapes.size == there)
        made.append(raw_view(memory).tobytes() if done else b"")
        assert not out.isnan().any()
    assert made[0] == made[1]


@st.composite
def streams(draw):
    """Symbols, rows and tables of some streams."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    alphabet = draw(st.sampled_from([1, 2, 32, 255, 256]))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        p = rng.dirichlet(np.full(alphabet, rng.choice([0.02, 0.5, 5])))
        row = np.floor(p * 4096).astype(int)
        row[rng.integers(alphabet)] += 4096 - row.sum()
        rows.append(row)
    tables = Tables(np.array(rows))
    made = []
    for _ in range(draw(st.integers(1, 4))):
        n, columns = int(rng.integers(1, 40)), int(rng.integers(1, 500))
        mine = rng.integers(0, len(rows), columns).astype(np.uint32)
        slots = rng.integers(0, 4096, (n, columns))
        ends = tables.frequencies.cumsum(1, dtype=np.int64)[mine]
        made.append(((slots[..., None] >= ends).sum(2).astype(np.uint8), mine))
    return made, tables


@settings(max_examples=80, deadline=None)
@given(streams(), st.integers(0, 2**32 - 1))
def test_streams(made, seed):
    """What the entropy coder wrote; damaged words and states give the same, or are refused."""
    made, tables = made
    rng = np.random.default_rng(seed)
    lanes = rng.choice([8, 16, 32, 64, 128, 256], len(made)).tolist()
    symbols, rows = zip(*made, strict=True)
    coded = rans.encode(symbols, rows, tables, lanes, backend="numpy")
    for damage in (False, True):
        if damage:
            i = int(rng.integers(len(coded)))
            states, words = coded[i].states.copy(), coded[i].words.copy()
            part = words if words.size and rng.random() < 0.7 else states
            part[rng.integers(part.size)] ^= 1 << rng.integers(15)
            cut = words[: words.size - int(rng.integers(0, 2))]
            coded[i] = Coded(states, cut)
        results = []
        for k, vector in KERNELS:
            out = [np.full(x.shape, 99, np.uint8) for x, _ in made]
            todo = [
                Stream(i, x.reshape(-1), np.resize(r, r.size + 256), r.size, c.states.size)
                for i, (x, (_, r), c) in enumerate(zip(out, made, coded, strict=True))
            ]
            try:
                with pytest.MonkeyPatch.context() as patch:
                    decoder = cachegen_symbols_numba.decoder(vector)
                    patch.setattr(cachegen_symbols_numba, "DECODE", decoder)
                    k.decode(todo, coded, k.lookup(tables))
            except CorruptDataError as exc:
                assert damage
                results.append(str(exc)[:8])
            else:
                results.append([x.tobytes() for x in out])
        assert results[0] == results[1] == results[-1]
        if not damage:
            assert results[0] == [x.tobytes() for x, _ in made]


# The codec


def write_profile(path, spec):
    blocks = [random_block(spec, 150, seed=seed) for seed in range(2)]
    tensors = measure(spec, lambda: blocks, [0.5, 1.0])
    save_artefact(path, kind="cachegen", model=model_identity(spec), tensors=tensors, settings={})
    return str(path)


def bits(block):
    return [
        x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""
        for y in block.layers
        for x in (y.keys, y.values)
    ]


def check(monkeypatch, codec, block):
    """Both write the same container and read it to the same bits; that container."""
    results = []
    for name in ("numba", "numpy"):
        monkeypatch.setenv("KVLIB_RANS", name)
        assert kernels().__name__ == f"kvlib.codecs.cachegen_{name}"
        data = b"".join(encode_block(block, codec))
        results.append((data, bits(decode_block(data, block.spec, codec_for=lambda _: codec))))
    assert results[0] == results[1]
    return results[0][0]


def ragged(block, seed=0):
    """Every head keeps other tokens, one of them none."""
    rng = np.random.default_rng(seed)
    layers = []
    for layer in block.layers:
        rows = []
        for i, row in enumerate(layer.rows()):
            size = 0 if i == 1 else int(rng.integers(0, layer.lengths[0] + 1))
            index = torch.from_numpy(np.sort(rng.permutation(layer.lengths[0])[:size]))
            rows.append(Row(row.keys[index], row.values[index], row.positions[index], None))
        layers.append(LayerKV.from_rows(layer.layer_idx, rows))
    return replace(block, layers=tuple(layers))


def spec_of(k_head_dim, v_head_dim, dtype):
    layer = LayerSpec(num_kv_heads=3, k_head_dim=k_head_dim, v_head_dim=v_head_dim)
    return KVSpec(model_id="cachegen-backends", layers=(layer,) * 3, dtype=dtype)


@pytest.fixture(scope="module")
def profile_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    made = {}

    def find(spec):
        if spec not in made:
            made[spec] = write_profile(folder / str(len(made)), spec)
        return made[spec]

    return find


@pytest.mark.parametrize(
    ("k_head_dim", "v_head_dim", "dtype"),
    [(64, 64, "bfloat16"), (80, 96, "float16"), (128, 8, "float32"), (24, 256, "bfloat16")],
)
def test_blocks(profile_of, monkeypatch, k_head_dim, v_head_dim, dtype):
    """Dense and ragged blocks of all sizes, in chunks or not, with exact tokens or not."""
    spec = spec_of(k_head_dim, v_head_dim, dtype)
    coded = 0
    for n in (0, 1, 9, 10, 11, 255, 256, 257):
        block = random_block(spec, n, seed=n)
        if n > 9:
            block.layers[0].keys[0, 5, 1] = 1000.0  # escapes
            block.layers[1].values[1, 7, 3] = float("nan")  # raw
        for options in ({}, {"chunk": 100, "sinks": 4}):
            paper = CacheGenCodec(profile=profile_of(spec), **options)
            lmcache = CacheGenCodec(variant="lmcache", **options)
            for codec in (paper, lmcache):
                for each in (block, ragged(block, n)) if n > 9 else (block,):
                    data = check(monkeypatch, codec, each)
                    infos = Container(data).header.sections
                    coded += sum(not s.flags & SectionFlag.RAW for s in infos)
    assert coded > 150


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("variant", ["paper", "lmcache"])
def test_sample_blocks(profile_of, monkeypatch, dtype, variant):
    profile = profile_of(sample_spec(dtype)) if variant == "paper" else None
    codec = CacheGenCodec(variant=variant, profile=profile)
    for _, block in sample_blocks(dtype, tokens=(1, 65), contents=("normal", "bits", "wide")):
        check(monkeypatch, codec, block)


def test_batches(tmp_path, monkeypatch):
    """What is coded together, and which layers share tables, does not show."""
    spec = spec_of(16, 8, "bfloat16")
    block = ragged(random_block(spec, 300))
    path = write_profile(tmp_path / "p", spec)
    wanted = None
    for most in (1 << 24, 3000, 1):
        monkeypatch.setattr(cachegen, "_BATCH", most)
        for rows in (1 << 16, 150, 1):
            monkeypatch.setattr(cachegen_profile, "MAX_ROWS", rows)
            monkeypatch.setattr(cachegen_lmcache, "MAX_ROWS", rows)
            monkeypatch.setattr(cachegen_profile, "_read", {})
            codecs = CacheGenCodec(profile=path), CacheGenCodec(variant="lmcache")
            found = [check(monkeypatch, codec, block) for codec in codecs]
            wanted = wanted or found
            assert found == wanted


def test_tables_of_channels_that_are_not_there():
    tables = table_set(5, 0, 1.0)
    same([tables.of(np.arange(5)).columns], [tables.of(None).columns])
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises(CorruptDataError, match="of a layer that has 5"):
            tables.of(np.array(wrong))
