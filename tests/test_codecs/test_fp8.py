# SPDX-License-Identifier: Apache-2.0
"""fp8 against a table of its numbers in float64."""

import math
import struct

import numpy as np
import pytest
import torch

from kvlib.blocks import KVBlock, LayerKV, Row
from kvlib.codecs import Container, build_codec, decode_block, encode_block
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.codecs.fixed_rate import Matrix
from kvlib.codecs.fp8 import Fp8Codec
from kvlib.errors import ConfigError, CorruptDataError
from kvlib.spec import KVSpec, LayerSpec
from kvlib.testing.strategies import draw_numbers
from tests.oracles import fixed_rate as oracle

DTYPES = ("float32", "float16", "bfloat16")
METHODS = [(f, s) for f in ("e4m3", "e5m2") for s in ("none", "head", "token")]
NUMBERS = {f: sorted({*-oracle.fp8_numbers(f), *oracle.fp8_numbers(f)}) for f in oracle.FP8}


def record(keys, values, method):
    """A container of one dense layer, keys and values [H, T, D]."""
    layer = LayerSpec(
        num_kv_heads=keys.shape[0], k_head_dim=keys.shape[-1], v_head_dim=values.shape[-1]
    )
    dtype = str(keys.dtype).removeprefix("torch.")
    spec = KVSpec(model_id="m", layers=(layer,), dtype=dtype)
    return b"".join(encode_block(KVBlock.dense(spec, [(keys, values)]), build_codec(method))), spec


def through(keys, method):
    """Decoded keys, and whether they were stored raw."""
    data, spec = record(keys, keys[..., :0], method)
    info = Container(data).find(SectionKind.KEYS, 0)
    return decode_block(data, spec).layers[0].keys, bool(info.flags & SectionFlag.RAW)


def sample(shape, dtype, seed=0):
    """Heads and tokens of different size, as real KV has them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:2], 1)))
    return torch.from_numpy(x * np.exp(2 * rng.standard_normal((shape[0], 1, 1)))).to(
        getattr(torch, dtype)
    )


@pytest.mark.parametrize("form", oracle.FP8)
def test_the_table_of_numbers(form):
    """Decoding knows exactly the numbers that the format defines, in the right places."""
    bits, least, _ = oracle.FP8[form]
    for code in range(256):
        exponent, mantissa = code >> bits & (128 >> bits) - 1, code & 2**bits - 1
        number = (mantissa / 2**bits + bool(exponent)) * 2.0 ** (max(exponent, 1) + least - 1)
        number *= -1 if code & 128 else 1
        data = memoryview(bytes([code]))
        out = torch.zeros((1, 1))
        matrix = Matrix(SectionKind.KEYS, 0, (1,), 1)
        codec = Fp8Codec(format=form, scale="none")
        if number in NUMBERS[form]:
            codec.decode_rows(matrix, data, [out])
            assert struct.pack("<f", float(out)) == struct.pack("<f", number)
        else:
            with pytest.raises(CorruptDataError, match="no finite number"):
                codec.decode_rows(matrix, data, [out])


@pytest.mark.parametrize("form", oracle.FP8)
def test_rounding_is_to_nearest_even_and_saturates(form):
    """Numbers, their middles, and what lies around either go where the definition says."""
    numbers = np.array(NUMBERS[form])
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = [np.nextafter(middles.astype(np.float32), np.float32(t)) for t in (-np.inf, np.inf)]
    beyond = numbers[-1] * np.array([1.01, 1.04, 1.07, 1.5, 100, 1e30])
    x = np.concatenate([numbers, middles, *around, beyond, -beyond, [-0.0, 1e-30, -1e-45]])
    x = x.astype(np.float32)
    y, raw = through(torch.from_numpy(x).reshape(1, 1, -1), f"fp8:format={form},scale=none")
    assert not raw
    expected = oracle.nearest_fp8(x.astype(np.float64), form)
    np.testing.assert_array_equal(y.flatten().numpy(), expected)
    np.testing.assert_array_equal(np.signbit(y.flatten().numpy()), np.signbit(x))


@pytest.mark.parametrize("width", [1, 33, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(("form", "scale"), METHODS)
def test_decoded_numbers_are_the_oracles(form, scale, width):
    """Values off the middle of two codes decode to the oracle's number, rounded once."""
    for dtype in DTYPES:
        for tokens in (1, 2, 17):
            x = sample((3, tokens, width), dtype, seed=width)
            y, raw = through(x, f"fp8:format={form},scale={scale}")
            if raw:
                assert width == 1
                assert torch.equal(x, y)
                continue
            rows = x.double().reshape(-1, width).numpy()
            decoded, bound, each = oracle.fp8(rows, [tokens] * 3, form, scale)
            found = y.double().reshape(-1, width).numpy()
            expected = torch.from_numpy(decoded).to(torch.float32).to(x.dtype).double().numpy()
            # float32's quotient may fall on the other side of a middle.
            with np.errstate(invalid="ignore", divide="ignore"):
                unit = np.where(each > 0, rows / each, 0)
            near = 0 if scale == "none" else 2e-7
            low, high = (oracle.nearest_fp8(unit * s, form) for s in (1 - near, 1 + near))
            clear = low == high
            assert clear.mean() > (0.9 if near else 0.9999) or x.numel() < 200
            np.testing.assert_array_equal(found[clear], expected[clear])
            eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
            assert (np.abs(found - rows) <= bound * (1 + 1e-6) + np.abs(rows) * eps + 2e-8).all()


@pytest.mark.parametrize("form", oracle.FP8)
def test_the_greatest_value_meets_the_top(form):
    """Scales are as small as float16 allows, so the greatest value has one of the top codes."""
    x = sample((4, 50, 64), "float32", seed=9)
    data, _ = record(x, x, f"fp8:format={form},scale=head")
    _, section = Container(data).read(SectionKind.VALUES, 0)
    top = oracle.FP8[form][2]
    greatest = x.abs().amax((1, 2)).double().numpy()
    scales = np.frombuffer(section[:8], "<f2").astype(np.float64)
    np.testing.assert_array_equal(scales, oracle.half_up((greatest / top).astype(np.float32)))
    assert len(section) == 8 + 4 * 50 * 64
    codes = np.frombuffer(section[8:], np.uint8).reshape(4, -1) & 127
    assert set(codes.max(axis=1)) == {0x7E if form == "e4m3" else 0x7B}


def test_scales_belong_to_heads_and_tokens():
    """A large head does not touch another; with `token`, nor does a large token."""
    x = sample((2, 8, 64), "float32")
    louder = x.clone()
    louder[1] *= 100
    alone, _ = through(x, "fp8:scale=head")
    beside, _ = through(louder, "fp8:scale=head")
    assert torch.equal(alone[0], beside[0])
    louder = x.clone()
    louder[0, 3] *= 100
    one, _ = through(louder, "fp8:scale=token")
    other, _ = through(x, "fp8:scale=token")
    rest = [t for t in range(8) if t != 3]
    assert torch.equal(one[0, rest], other[0, rest])
    by_head, _ = through(louder, "fp8:scale=head")
    assert not torch.equal(by_head[0, rest], alone[0, rest])


def test_rows_of_different_length():
    """A head's scale covers its own row, also beside one without entries."""
    spec = KVSpec(
        model_id="m",
        layers=(LayerSpec(num_kv_heads=3, k_head_dim=16, v_head_dim=8),),
        dtype="bfloat16",
    )
    rng = np.random.default_rng(3)
    rows = [
        Row(
            draw_numbers(rng, (n, 16), "bfloat16") * size,
            draw_numbers(rng, (n, 8), "bfloat16") * size,
            torch.arange(n, dtype=torch.int32),
            None,
        )
        for n, size in ((5, 1.0), (0, 1.0), (9, 1000.0))
    ]
    layer = LayerKV.from_rows(0, rows)
    block = KVBlock(spec=spec, start=0, num_tokens=9, layers=(layer,))
    for form, scale in METHODS:
        method = f"fp8:format={form},scale={scale}"
        back = decode_block(b"".join(encode_block(block, build_codec(method))), spec).layers[0]
        for x, y in ((layer.keys, back.keys), (layer.values, back.values)):
            decoded, bound, _ = oracle.fp8(x.double().numpy(), (5, 0, 9), form, scale)
            found = y.double().numpy()
            assert (np.abs(found - x.double().numpy()) <= bound * 1.000001 + 1e-9).all()
            assert (np.abs(found - decoded) <= np.abs(decoded) * 2.0**-2).all()


@pytest.mark.parametrize(("form", "scale"), METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_raw(form, scale, value):
    """One such value keeps the section as it is, to the bit."""
    for dtype in DTYPES:
        x = sample((2, 9, 64), dtype)
        x[1, 3, 7] = value
        y, raw = through(x, f"fp8:format={form},scale={scale}")
        assert raw
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_scales_beyond_float16():
    """A scale that float16 cannot hold keeps the section raw; the greatest that it can does not."""
    for size, expected in ((65504.0 * 448, False), (65504.0 * 448 * 1.001, True), (3e38, True)):
        for scale in ("head", "token"):
            x = torch.full((1, 4, 64), 1.0)
            x[0, 0, 0] = -size
            y, raw = through(x, f"fp8:scale={scale}")
            assert raw == expected
            assert torch.isfinite(y).all()
            assert float(y[0, 0, 0]) == pytest.approx(-size, rel=0.07)


def test_float16_never_decodes_to_infinity():
    """Where the top code would, the section is raw."""
    for form, scale in METHODS:
        for top in (65504.0, 65472.0, 65000.0, 60000.0):
            x = torch.linspace(-top, top, 1024).half().reshape(1, 16, 64)
            y, raw = through(x, f"fp8:format={form},scale={scale}")
            assert torch.isfinite(y).all()
            assert raw or scale == "none" or float((y - x).abs().max()) <= 65504 * 2.0**-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_and_constant_numbers(dtype):
    """Zeros come back; subnormal and constant sections are within the bound."""
    for form, scale in METHODS:
        method = f"fp8:format={form},scale={scale}"
        zeros = torch.zeros((2, 5, 64)).to(getattr(torch, dtype))
        y, raw = through(zeros, method)
        assert not raw
        assert (y == 0).all()
        for value in (1.0, -0.1, 3e-5, 2.0**-24, 1e-30, 1e-40):
            x = torch.full((2, 5, 64), value).to(getattr(torch, dtype))
            y, raw = through(x, method)
            assert not raw
            rows = x.double().reshape(-1, 64).numpy()
            _, bound, _ = oracle.fp8(rows, [5, 5], form, scale)
            error = np.abs(y.double().reshape(-1, 64).numpy() - rows)
            assert (error <= bound * 1.000001 + np.abs(rows) * 2.0**-7 + 6e-8).all()


def test_error_on_normal_numbers():
    """The squared error of a plain cast is that of the measured table: 0.0007 at 8 bits."""
    x = torch.randn((4, 512, 128), generator=torch.Generator().manual_seed(1)).bfloat16()
    for method, low, high, bits in (
        ("fp8:scale=none", 0.00065, 0.00075, 8),
        ("fp8", 0.0006, 0.00075, 8),
        ("fp8:scale=token", 0.0006, 0.0007, 8.125),
        ("fp8:format=e5m2", 0.0025, 0.003, 8),
    ):
        data, spec = record(x, x, method)
        y = decode_block(data, spec).layers[0].values
        error = float(((x.double() - y.double()) ** 2).sum() / (x.double() ** 2).sum())
        assert low < error < high, method
        stored = Container(data).find(SectionKind.KEYS, 0).stored_bytes
        assert stored * 8 / x.numel() == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize("bad", ["format=e4m4", "scale=channel", "format=E4M3", "scale=1"])
def test_wrong_parameters(bad):
    """Both parameters are names, and an error lists them."""
    with pytest.raises(ConfigError, match=r"is one of .*e4m3|is one of .*head"):
        build_codec(f"fp8:{bad}")


def test_malformed_sections():
    """Wrong sizes, scales that are negative or not finite, and codes of no number are refused."""
    codec = Fp8Codec()
    matrix = Matrix(SectionKind.VALUES, 2, (1, 2), 2)
    good = struct.pack("<2e", 0.5, 2.0) + bytes([0x38, 0xB8, 0, 0x40, 0x30, 0x7E])
    heads = [torch.zeros((1, 2)), torch.zeros((2, 2))]
    codec.decode_rows(matrix, memoryview(good), heads)
    assert [head.tolist() for head in heads] == [[[0.5, -0.5]], [[0.0, 4.0], [1.0, 896.0]]]
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        struct.pack("<e", math.nan) + good[2:],
        struct.pack("<e", math.inf) + good[2:],
        struct.pack("<e", -0.5) + good[2:],
        good[:-1] + b"\x7f",
        good[:-1] + b"\xff",
    ):
        with pytest.raises(CorruptDataError):
            codec.decode_rows(matrix, memoryview(bad), heads)
