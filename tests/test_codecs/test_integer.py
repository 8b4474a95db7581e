# SPDX-License-Identifier: Apache-2.0
import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import KVBlock
from kvlib.codecs import Container, build_codec, decode_block, encode_block
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.codecs.integer import Int4Codec, Int8Codec
from kvlib.errors import ConfigError, CorruptDataError, UnsupportedInputError
from kvlib.spec import KVSpec, LayerSpec
from kvlib.testing.strategies import draw_numbers, kv_blocks

BITS = {"int4": 4, "int8": 8}
DTYPES = ("float32", "float16", "bfloat16")


def record(keys, method):
    layer = LayerSpec(kind="mla", num_kv_heads=1, k_head_dim=keys.shape[-1], v_head_dim=0)
    spec = KVSpec(model_id="m", layers=(layer,), dtype=str(keys.dtype).removeprefix("torch."))
    block = KVBlock.dense(spec, [(keys[None], keys[None, :, :0])])
    return b"".join(encode_block(block, build_codec(method))), spec


def through(keys, method):
    """The decoded matrix, and whether it was stored raw."""
    data, spec = record(keys, method)
    info = Container(data).find(SectionKind.KEYS, 0)
    return decode_block(data, spec).layers[0].keys[0], bool(info.flags & SectionFlag.RAW)


# ---- the documented formula, in exact fractions, a value at a time ----


def half(value, up):
    """The float16 next to a fraction, at or beyond it in the given direction."""
    near = np.float16(float(value))
    if up and Fraction(float(near)) < value:
        near = np.nextafter(near, np.float16(np.inf))
    if not up and Fraction(float(near)) > value:
        near = np.nextafter(near, np.float16(-np.inf))
    return Fraction(float(near))


def formula(row, bits, group):
    """Per value of a row: its decoded value before rounding to the dtype, and its step."""
    decoded, steps = [], []
    top = 2**bits - 1
    for first in range(0, len(row), group):
        part = [Fraction(x) for x in row[first : first + group]]
        minimum = half(min(part), up=False)
        step = half((max(part) - minimum) / top, up=True)
        for x in part:
            code = 0 if step == 0 else min(top, max(0, round((x - minimum) / step)))
            decoded.append(minimum + code * step)
            steps.append(step)
    return decoded, steps


CASES = ["normal", "wide spans", "offset", "constant", "tiny spans", "subnormal", "zeros", "edges"]


def matrix(case, width, dtype, seed=0):
    rng = np.random.default_rng([seed, CASES.index(case), width])
    x = rng.standard_normal((6, width))
    if case == "wide spans":
        x = np.clip(x * 15000, -50000, 50000)
    elif case == "offset":
        x = x * 0.01 + 37.3
    elif case == "constant":
        x = np.repeat(
            rng.standard_normal((6, 1)) * [[1], [100], [1e-3], [1e-6], [0], [-7]], width, 1
        )
    elif case == "tiny spans":
        x = 1.0 + x * 1e-6
    elif case == "subnormal":
        x = x * 1e-7
    elif case == "zeros":
        x = np.copysign(np.zeros_like(x), x)
    elif case == "edges":
        x = rng.choice([-30000.0, 30000.0, 0.0, 1.0, 6e-8], (6, width))
    return torch.from_numpy(x).to(getattr(torch, dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 32, 33, 64, 65])
@pytest.mark.parametrize("name", BITS)
def test_error_is_within_half_a_step(name, width, case):
    """Every value is within half a documented step of its code, plus one rounding to the dtype."""
    for dtype in DTYPES:
        for group in (2, 5, 32, 64):
            x = matrix(case, width, dtype)
            y, raw = through(x, f"{name}:group={group}")
            if raw:  # too narrow to gain
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
                continue
            eps = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
            for before, after in zip(x.tolist(), y.tolist(), strict=True):
                _, steps = formula(before, BITS[name], group)
                for a, b, step in zip(before, after, steps, strict=True):
                    # float32: x - minimum, the quotient and the final sum round once each; the
                    # codes may then miss a tie by 2**-22 * 255 of a step.
                    slack = float(step) * (0.5 + 2.0**-13)
                    size = abs(a) + float(step)
                    assert abs(a - b) <= slack + size * (eps + 2.0**-23) + 2.0**-25 * (
                        dtype == "float16"
                    )


@pytest.mark.parametrize("name", BITS)
def test_codes_are_those_of_the_formula(name):
    """Minima, steps and codes in the section are the documented ones, laid out as documented."""
    bits, group, width = BITS[name], 8, 21
    x = matrix("normal", width, "float32", seed=3)
    data, _ = record(x, f"{name}:group={group}")
    _, section = Container(data).read(SectionKind.KEYS, 0)
    rows, groups = x.shape[0], 3
    minima = np.frombuffer(section[: rows * groups * 2], "<f2").reshape(rows, groups)
    steps = np.frombuffer(section[rows * groups * 2 : rows * groups * 4], "<f2")
    steps = steps.reshape(rows, groups)
    codes = np.frombuffer(section[rows * groups * 4 :], np.uint8).reshape(rows, -1)
    for r, row in enumerate(x.tolist()):
        seen = []
        for c in range(width):
            byte = codes[r, c] if bits == 8 else codes[r, c // 2]
            seen.append(int(byte) if bits == 8 else int(byte >> 4 * (c % 2) & 15))
        for g in range(groups):
            part = [Fraction(v) for v in row[g * group : (g + 1) * group]]
            minimum = half(min(part), up=False)
            step = half((max(part) - minimum) / (2**bits - 1), up=True)
            assert Fraction(float(minima[r, g])) == minimum
            assert Fraction(float(steps[r, g])) == step
            for v, code in zip(part, seen[g * group : (g + 1) * group], strict=True):
                quotient = (v - minimum) / step
                assert abs(code - quotient) <= Fraction(1, 2) + Fraction(1, 2**13)
    if bits == 4:
        assert (codes[:, -1] >> 4 == 0).all()


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_the_formula_exactly(name, dtype):
    """Decoding is minimum + code * step in float32, rounded once to the dtype: no bit is free."""
    x = matrix("wide spans", 40, dtype, seed=5)
    data, spec = record(x, f"{name}:group=16")
    _, section = Container(data).read(SectionKind.KEYS, 0)
    rows, groups = 6, 3
    halves = np.frombuffer(section[: rows * groups * 4], "<f2").astype(np.float64)
    minima, steps = halves.reshape(2, rows, groups)
    body = section[rows * groups * 4 :]
    out = []
    for r in range(rows):
        for c in range(40):
            code = body[r * 40 + c] if name == "int8" else body[r * 20 + c // 2] >> 4 * (c % 2) & 15
            product = np.float32(code * steps[r, c // 16])
            assert float(product) == code * steps[r, c // 16]  # exact, as the docstring says
            out.append(np.float32(product + np.float32(minima[r, c // 16])))
    expected = torch.tensor(np.array(out, np.float32)).reshape(6, 40).to(x.dtype)
    assert torch.equal(decode_block(data, spec).layers[0].keys[0], expected)


def test_constant_groups():
    """A constant that float16 holds comes back exactly; any other within half its tiny step."""
    for value in (0.0, -0.0, 1.0, -2.5, 65504.0, -65504.0, 2.0**-24, 0.333251953125):
        x = torch.full((3, 64), value)
        for name in BITS:
            y, raw = through(x, name)
            assert not raw
            assert (y == value).all()
    x = torch.full((3, 64), 0.1)
    for name, bits in BITS.items():
        y, raw = through(x, name)
        gap = 0.1 - float(np.nextafter(np.float16(0.1), np.float16(0)))
        assert not raw
        assert float((y - x).abs().max()) <= max(gap / (2**bits - 1), 2.0**-24) * 0.51


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float32", math.nan),
        ("float32", math.inf),
        ("float32", -math.inf),
        ("float32", 65505.0),
        ("float32", -65504.01),
        ("float32", 1e30),
        ("bfloat16", 65536.0),
        ("bfloat16", -3e38),
        ("bfloat16", math.nan),
        ("float16", math.inf),
        ("float16", math.nan),
    ],
)
def test_what_float16_cannot_hold_is_raw(name, dtype, value):
    """One value that is not finite or beyond float16 keeps the matrix as it is, to the bit."""
    x = torch.randn((9, 64), generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    x[4, 17] = value
    y, raw = through(x, name)
    assert raw
    assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_nan_payloads_survive():
    """A raw matrix keeps which NaN it was."""
    x = torch.ones((2, 64))
    x.view(torch.int32)[1, 3] = 0x7FC12345
    for name in BITS:
        y, raw = through(x, name)
        assert raw
        assert int(y.view(torch.int32)[1, 3]) == 0x7FC12345


def test_values_at_the_edge_of_float16():
    """The largest float16 values never decode to infinity."""
    for name, low in (("int4", -65504.0), ("int8", -65504.0), ("int4", 65000.0), ("int8", 0.0)):
        x = torch.tensor([[low, 65504.0, 65472.0, 60000.0] * 16] * 4)
        for dtype in DTYPES:
            keys = x.to(getattr(torch, dtype))
            if keys.abs().max() > 65504:
                continue
            y, raw = through(keys, name)
            assert torch.isfinite(y).all()
            if raw:
                assert torch.equal(keys, y)
            else:
                assert float((y.double() - keys.double()).abs().max()) <= 131008 / 15 * 0.51


def test_raw_is_per_matrix():
    """Values may be raw beside encoded keys, and layers do not touch each other."""
    layer = LayerSpec(num_kv_heads=1, k_head_dim=64, v_head_dim=64)
    spec = KVSpec(model_id="m", layers=(layer, layer), dtype="float32")
    x = torch.randn((1, 8, 64), generator=torch.Generator().manual_seed(0))
    wild = x.clone()
    wild[0, 0, 0] = math.inf
    data = b"".join(encode_block(KVBlock.dense(spec, [(x, wild), (x, x)]), build_codec("int4")))
    assert [bool(s.flags) for s in Container(data).header.sections] == [False, True, False, False]
    block = decode_block(data, spec)
    assert torch.equal(block.layers[0].values, wild)
    assert torch.equal(block.layers[0].keys, block.layers[1].keys)


def test_tokens_do_not_depend_on_each_other():
    """A token's bytes are its own: the same row among other rows decodes alike."""
    x = torch.randn((50, 48), generator=torch.Generator().manual_seed(1))
    for name in BITS:
        whole, _ = through(x, name)
        part, _ = through(x[17:23].contiguous(), name)
        assert torch.equal(whole[17:23], part)


@given(kv_blocks(dtypes=DTYPES), st.sampled_from(["int4", "int8:group=5", "int4:group=1024"]))
def test_encoding_twice_is_stable_in_form(block, method):
    """Any block decodes to its own shape and positions, and what it decodes to encodes again."""
    codec = build_codec(method)
    data = b"".join(encode_block(block, codec))
    decoded = decode_block(data, block.spec)
    assert [x.lengths for x in decoded.layers] == [x.lengths for x in block.layers]
    again = decode_block(b"".join(encode_block(decoded, codec)), block.spec)
    assert [x.lengths for x in again.layers] == [x.lengths for x in block.layers]


def test_bits_per_value():
    """Sizes are those of the docstring: codes and 32 bits a group."""
    x = torch.randn((64, 128), generator=torch.Generator().manual_seed(2))
    for method, bits in (("int8", 8.5), ("int4", 5), ("int4:group=64", 4.5), ("int8:group=32", 9)):
        data, _ = record(x, method)
        info = Container(data).find(SectionKind.KEYS, 0)
        assert info.stored_bytes * 8 == bits * x.numel()


@pytest.mark.parametrize("group", [1, 0, -3, 1025])
def test_groups_out_of_range(group):
    """A group has 2 to 1024 channels."""
    for cls in (Int4Codec, Int8Codec):
        with pytest.raises(ConfigError, match=r"2\.\.1024"):
            cls(group=group)
    with pytest.raises(ConfigError):
        build_codec(f"int4:group={group}")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_are_refused(dtype):
    """One-byte types are refused by name, with what to use instead."""
    x = draw_numbers(np.random.default_rng(0), (4, 64), dtype)
    with pytest.raises(UnsupportedInputError, match=rf"int4 takes .*got {dtype} \(use exact"):
        record(x, "int4")


def test_malformed_sections():
    """Sizes that do not fit, steps below zero, infinities and padding bits are refused."""
    codec = Int4Codec(group=4)
    good = struct.pack("<2e", 1.0, 0.5) + bytes([0x10, 0x02])
    out = torch.zeros((1, 3))
    codec.decode_matrix(memoryview(good), out)
    assert out.tolist() == [[1.0, 1.5, 2.0]]
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        struct.pack("<2e", math.nan, 0.5) + good[4:],
        struct.pack("<2e", math.inf, 0.5) + good[4:],
        struct.pack("<2e", 1.0, math.inf) + good[4:],
        struct.pack("<2e", 1.0, math.nan) + good[4:],
        struct.pack("<2e", 1.0, -0.5) + good[4:],
        good[:4] + bytes([0x10, 0x12]),
    ):
        with pytest.raises(CorruptDataError):
            codec.decode_matrix(memoryview(bad), out)
    with pytest.raises(UnsupportedInputError):
        codec.decode_matrix(memoryview(good), out.to(torch.float8_e5m2))


def test_codes_round_half_to_even():
    """Ties go to the even code, on every machine."""
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 15.0, 14.5, 13.5, 7.5]] * 4)
    y, raw = through(x, "int4:group=8")
    assert not raw
    assert y[0].tolist() == [0.0, 0.0, 2.0, 2.0, 15.0, 14.0, 14.0, 8.0]
