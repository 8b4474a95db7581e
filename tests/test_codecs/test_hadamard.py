# SPDX-License-Identifier: Apache-2.0
"""Rotated Lloyd-Max codes against dense orthogonal matrices in float64."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import KVBlock, LayerKV, Row
from kvlib.codecs import Container, build_codec, decode_block, encode_block
from kvlib.codecs import hadamard as codec_file
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.codecs.fixed_rate import Matrix
from kvlib.codecs.hadamard import HadamardCodec
from kvlib.errors import ConfigError, CorruptDataError
from kvlib.spec import KVSpec, LayerSpec
from tests.oracles import fixed_rate as oracle

DTYPES = ("float32", "float16", "bfloat16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LEVELS = {bits: oracle.lloyd_max(bits) for bits in (2, 3, 4)}


def sample(shape, dtype="float32", seed=0):
    """Channels of very different size, as real keys have them; a few are ten times the others."""
    rng = np.random.default_rng([seed, *shape])
    size = np.exp(0.5 * rng.standard_normal(shape[-1]))
    size[rng.permutation(shape[-1])[: shape[-1] // 16]] *= 10
    return torch.from_numpy(rng.standard_normal(shape) * size).to(getattr(torch, dtype))


def dense(pairs):
    """A block whose layers hold these keys and values [H, T, D]."""
    layers = tuple(
        LayerSpec(num_kv_heads=len(k), k_head_dim=k.shape[-1], v_head_dim=v.shape[-1])
        for k, v in pairs
    )
    dtype = str(pairs[0][0].dtype).removeprefix("torch.")
    return KVBlock.dense(KVSpec(model_id="m", layers=layers, dtype=dtype), pairs)


def through(block, method):
    """The decoded block, and by layer and kind which sections were raw."""
    data = b"".join(encode_block(block, build_codec(method)))
    raw = {
        (s.layer_idx, s.kind): bool(s.flags & SectionFlag.RAW)
        for s in Container(data).header.sections
        if s.kind in (SectionKind.KEYS, SectionKind.VALUES)
    }
    return decode_block(data, block.spec), raw


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_those_of_lloyd_and_max(bits):
    """The literal levels are the fixed point of Lloyd's iteration, and do what theory says."""
    np.testing.assert_allclose(codec_file._POSITIVE[bits], LEVELS[bits], atol=6e-10, rtol=0)
    levels = codec_file._levels(bits)
    assert levels.dtype == np.float32
    assert len(levels) == 2**bits
    assert (levels == -levels[::-1]).all()
    known = {2: 0.11748, 3: 0.03454, 4: 0.009497}[bits]  # Max, 1960
    assert oracle.mean_square_error(LEVELS[bits]) == pytest.approx(known, rel=2e-3)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 33, 64, 80, 96, 100])
def test_the_rotation_is_the_oracles(width):
    """Transform, signs and order are the orthogonal matrix that the definition gives."""
    for layer_idx, kind in ((0, SectionKind.KEYS), (0, SectionKind.VALUES), (31, SectionKind.KEYS)):
        turn = oracle.rotation(layer_idx, kind - 1, width)
        np.testing.assert_allclose(turn @ turn.T, np.eye(width), atol=1e-12)
        order, signs = codec_file._scramble(layer_idx, kind, width)
        unit = np.eye(width, dtype=np.float32)
        seen = codec_file._transform(unit.T[order] * signs)
        np.testing.assert_allclose(seen, turn, atol=1e-6)
        assert sorted(order) == list(range(width))
        if width & (width - 1) == 0:
            assert (order == np.arange(width)).all()


def test_layers_and_kinds_turn_differently():
    """Signs differ between layers and kinds, and are about evenly mixed."""
    signs = {
        (layer, kind): codec_file._scramble(layer, kind, 128)[1].tobytes()
        for layer in range(64)
        for kind in (SectionKind.KEYS, SectionKind.VALUES)
    }
    assert len(set(signs.values())) == 128
    every = np.frombuffer(b"".join(signs.values()), np.float32)
    assert abs(every.mean()) < 0.03
    assert np.abs(np.corrcoef(every.reshape(128, 128)) - np.eye(128)).max() < 0.5


def check(x, y, layer_idx, kind, bits, correct):
    """What is decoded is the oracle's, except where float32 takes the other of two near levels."""
    rows = x.double().reshape(-1, x.shape[-1]).numpy()
    found = y.double().reshape(rows.shape).numpy()
    turn = oracle.rotation(layer_idx, kind, rows.shape[1])
    decoded, bound = oracle.hadamard(rows, turn, LEVELS[bits], correct)
    eps = EPS[str(x.dtype).removeprefix("torch.")]
    size = np.linalg.norm(rows, axis=1)
    off = np.linalg.norm(found - rows, axis=1)
    assert (off <= bound[:, 0] * 1.0001 + size * (eps * 1.1 + 2.0**-20) + 1e-6).all()
    apart = np.linalg.norm(found - decoded, axis=1)
    size = np.maximum(size, np.linalg.norm(decoded, axis=1))
    same = apart <= size * (2.0**-11 + eps * 1.1 + 2.0**-20) + 1e-6
    assert same.mean() > 0.97 or len(rows) < 40


@pytest.mark.parametrize("width", [1, 2, 3, 33, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoded_vectors_are_the_oracles(bits, width):
    """Within rounding, for every dtype, with and without the norm corrected."""
    for dtype in DTYPES:
        for tokens in (1, 40):
            pairs = [
                (
                    sample((2, tokens, width), dtype, seed=i),
                    sample((2, tokens, width), dtype, seed=9 + i),
                )
                for i in range(2)
            ]
            block = dense(pairs)
            for correct in (True, False):
                back, raw = through(block, f"hadamard:bits={bits},correct={str(correct).lower()}")
                for (layer_idx, kind), is_raw in raw.items():
                    layer = back.layers[layer_idx]
                    x, y = pairs[layer_idx][kind - 1], (layer.keys, layer.values)[kind - 1]
                    if is_raw:
                        assert width < 3
                        assert torch.equal(x, y)
                    else:
                        check(x, y, layer_idx, kind - 1, bits, correct)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3).filter(any),
    width=st.integers(1, 70),
    bits=st.integers(2, 4),
    correct=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_rows(lengths, width, bits, correct, seed):
    """Rows of any length, and lists of kept channels, which only make vectors narrower."""
    rows = [
        Row(
            sample((n, width), seed=seed),
            sample((n, 8), seed=seed),
            torch.arange(n, dtype=torch.int32),
            None,
        )
        for n in lengths
    ]
    channels = torch.arange(width).expand(len(lengths), -1).contiguous()
    layer = LayerKV.from_rows(1, rows, channels=channels)
    shape = LayerSpec(num_kv_heads=len(lengths), k_head_dim=width + 5, v_head_dim=8)
    spec = KVSpec(model_id="m", layers=(shape, shape), dtype="float32")
    block = KVBlock(spec=spec, start=0, num_tokens=6, layers=(layer,))
    back, raw = through(block, f"hadamard:bits={bits},correct={str(correct).lower()}")
    assert not any(raw.values())
    check(layer.keys, back.layers[0].keys, 1, 0, bits, correct)
    check(layer.values, back.layers[0].values, 1, 1, bits, correct)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_norms(bits):
    """Corrected vectors keep their norm to float16's precision; the others are shorter."""
    x = sample((2, 200, 96))
    for correct, low, high in ((True, 1 - 2.0**-10, 1 + 2.0**-10), (False, 0.6, 1.4)):
        back, _ = through(dense([(x, x)]), f"hadamard:bits={bits},correct={str(correct).lower()}")
        ratio = back.layers[0].keys.double().norm(dim=-1) / x.double().norm(dim=-1)
        assert low <= float(ratio.min())
        assert float(ratio.max()) <= high
        if not correct:
            expected = math.sqrt(1 - oracle.mean_square_error(LEVELS[bits]))
            assert float(ratio.mean()) == pytest.approx(expected, abs=0.02)


def test_error_on_vectors_with_large_channels():
    """Relative squared errors are those of the codebook, whatever the channels are."""
    for width in (64, 80, 96, 128):
        x = sample((4, 256, width), "bfloat16", seed=4)
        for bits, theory in ((4, 0.0095), (3, 0.0345), (2, 0.1175)):
            for correct in (True, False):
                method = f"hadamard:bits={bits},correct={str(correct).lower()}"
                data = b"".join(encode_block(dense([(x, x)]), build_codec(method)))
                y = decode_block(data, dense([(x, x)]).spec).layers[0].keys
                part = (x.double() - y.double()).norm(dim=-1) ** 2 / x.double().norm(dim=-1) ** 2
                assert 0.7 * theory < float(part.mean()) < 1.1 * theory
                stored = Container(data).find(SectionKind.KEYS, 0).stored_bytes
                assert stored * 8 == (bits + 16 / width) * x.numel()


def test_order_evens_out_the_pieces():
    """Large channels side by side at the end do not fill the short last piece of 80 channels."""
    x = torch.randn((1, 400, 80), generator=torch.Generator().manual_seed(0))
    x[..., -12:] *= 8
    back, _ = through(dense([(x, x)]), "hadamard")
    for y in (back.layers[0].keys, back.layers[0].values):
        part = (x - y).double().norm(dim=-1) ** 2 / x.double().norm(dim=-1) ** 2
        assert float(part.mean()) < 0.0105  # 0.04 with the channels in their own order


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_small_vectors(dtype):
    """Zero vectors stay zero beside others; subnormal ones are off by less than float16 spaces."""
    x = sample((1, 6, 64), dtype)
    x[0, 2], x[0, 3], x[0, 4] = 0, -0.0, 1e-7
    x[0, 5] = 1e-40
    back, raw = through(dense([(x, x)]), "hadamard")
    y = back.layers[0].keys
    assert not any(raw.values())
    assert (y[0, 2:4] == 0).all()
    assert float((y[0, 4] - x[0, 4]).double().abs().max()) <= 1.1e-7
    assert float(y[0, 5].abs().max()) <= 1e-7
    check(x, y, 0, 0, 4, True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_raw(value):
    """One such value keeps the section as it is, to the bit; the other section is coded."""
    for dtype in DTYPES:
        x, wild = sample((2, 9, 64), dtype), sample((2, 9, 64), dtype)
        wild[1, 3, 7] = value
        back, raw = through(dense([(x, wild)]), "hadamard:bits=2")
        assert list(raw.values()) == [False, True]
        y = back.layers[0].values
        assert torch.equal(wild.view(torch.uint8), y.view(torch.uint8))


def test_gains_beyond_float16_are_raw():
    """Vectors whose root mean square is beyond float16 keep their section raw."""
    for size, expected in ((6e4, False), (7e4, True), (1e30, True), (3e38, True)):
        for correct in ("true", "false"):
            x = torch.full((1, 4, 64), 1.0)
            x[0, 2] = size * torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
            back, raw = through(dense([(x, x)]), f"hadamard:correct={correct}")
            assert list(raw.values()) == [expected] * 2
            assert torch.isfinite(back.layers[0].keys).all()


def test_float16_never_decodes_to_infinity():
    """Where a decoded vector is longer than float16's range, the section is raw."""
    for size, expected in ((65504.0, True), (8200.0, True), (8000.0, False)):
        x = torch.full((1, 4, 64), size).half()
        for bits in (2, 3, 4):
            back, raw = through(dense([(x, x)]), f"hadamard:bits={bits}")
            assert list(raw.values()) == [expected] * 2
            assert torch.isfinite(back.layers[0].keys).all()


def test_decoding_adds_in_the_written_order():
    """Each decoded bit is that of the butterflies, the scale, the gain and the sign in float32."""
    width, f = 24, np.float32
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (3, width))
    gains = np.array([0.37, 11.5, 1e-6], np.float16)
    body = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    matrix = Matrix(SectionKind.VALUES, 5, (3,), width)
    out = torch.zeros((3, width))
    section = memoryview(gains.astype("<f2").tobytes() + body.tobytes())
    HadamardCodec().decode_rows(matrix, section, [out])
    words = oracle._words(5, 1, width)
    order = sorted(range(width), key=lambda c: words[c])
    levels = [f(v) for v in (*(-x for x in LEVELS[4][::-1]), *LEVELS[4])]
    for row, gain, seen in zip(codes, gains, out.numpy(), strict=True):
        a, at = [levels[code] for code in row], 0
        for size, scale in ((16, f(0.25)), (8, f(0.5) * f(math.sqrt(0.5)))):
            step = 1
            while step < size:
                for j in range(at, at + size):
                    if not (j - at) & step:
                        a[j], a[j + step] = a[j] + a[j + step], a[j] - a[j + step]
                step *= 2
            a[at : at + size] = [x * scale for x in a[at : at + size]]
            at += size
        for i, channel in enumerate(order):
            value = a[i] * f(gain)
            assert seen[channel] == (-value if words[channel] & 1 else value)


@pytest.mark.parametrize("bad", ["bits=1", "bits=5", "bits=8"])
def test_wrong_bits(bad):
    """An error says what is possible."""
    with pytest.raises(ConfigError, match="2, 3 or 4"):
        build_codec(f"hadamard:{bad}")


def test_malformed_sections():
    """Wrong sizes, gains that are negative or not finite, and stray bits are refused."""
    codec = HadamardCodec(bits=4)
    matrix = Matrix(SectionKind.KEYS, 0, (1, 0, 1), 3)
    good = struct.pack("<2e", 1.0, 0.0) + bytes([0xFF, 0x0F, 0x00, 0x00])
    heads = [torch.zeros((1, 3)), torch.zeros((0, 3)), torch.ones((1, 3))]
    codec.decode_rows(matrix, memoryview(good), heads)
    assert float(heads[0].norm()) == pytest.approx(math.sqrt(3) * 2.732589571)
    assert (heads[2] == 0).all()
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        struct.pack("<e", math.nan) + good[2:],
        struct.pack("<e", math.inf) + good[2:],
        struct.pack("<e", -1.0) + good[2:],
        good[:5] + b"\x1f" + good[6:],
    ):
        with pytest.raises(CorruptDataError):
            codec.decode_rows(matrix, memoryview(bad), heads)
