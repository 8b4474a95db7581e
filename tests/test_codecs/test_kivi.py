# SPDX-License-Identifier: Apache-2.0
"""KIVI against its definition in float64."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import KVBlock, LayerKV, Row
from kvlib.codecs import Container, build_codec, decode_block, encode_block
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.codecs.fixed_rate import Matrix, pack_codes, unpack_codes
from kvlib.codecs.kivi import KiviCodec
from kvlib.errors import ConfigError, CorruptDataError
from kvlib.spec import KVSpec, LayerSpec
from tests.oracles import fixed_rate as oracle

DTYPES = ("float32", "float16", "bfloat16")
EPS = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def block_of(lengths, width, dtype, seed=0, value_width=None):
    """One layer whose key channels differ in size and offset, as real keys do."""
    rng = np.random.default_rng([seed, width, *lengths])
    offset, size = 3 * rng.standard_normal(width), np.exp(rng.standard_normal(width))
    rows = []
    for n in lengths:
        keys = offset + size * rng.standard_normal((n, width))
        values = rng.standard_normal((n, value_width or width))
        rows.append(
            Row(
                torch.from_numpy(keys).to(getattr(torch, dtype)),
                torch.from_numpy(values).to(getattr(torch, dtype)),
                torch.arange(n, dtype=torch.int32),
                None,
            )
        )
    layer = LayerSpec(num_kv_heads=len(lengths), k_head_dim=width, v_head_dim=value_width or width)
    spec = KVSpec(model_id="m", layers=(layer,), dtype=dtype)
    layers = (LayerKV.from_rows(0, rows),)
    return KVBlock(spec=spec, start=0, num_tokens=max(lengths), layers=layers)


def through(block, method):
    """Pairs of a matrix and what it decodes to, keys then values, and which were raw."""
    data = b"".join(encode_block(block, build_codec(method)))
    container = Container(data)
    layer, back = block.layers[0], decode_block(data, block.spec).layers[0]
    raw = [
        bool(container.find(kind, 0).flags & SectionFlag.RAW)
        for kind in (SectionKind.KEYS, SectionKind.VALUES)
    ]
    return [(layer.keys, back.keys), (layer.values, back.values)], raw


def check(block, bits, group, residual):
    """Every decoded number is the oracle's, where no tie of codes is near."""
    method = f"kivi:bits={bits},group={group},residual={residual}"
    pairs, raws = through(block, method)
    lengths = block.layers[0].lengths
    for (x, y), raw, keys in zip(pairs, raws, (True, False), strict=True):
        if raw:
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            continue
        rows = x.double().reshape(-1, x.shape[-1]).numpy()
        found = y.double().reshape(rows.shape).numpy()
        decoded, steps = oracle.kivi(rows, lengths, keys, bits, group, residual)
        exact = np.isnan(steps)
        np.testing.assert_array_equal(found[exact], rows[exact])
        near = np.abs(found - decoded) <= np.abs(decoded) * EPS[block.spec.dtype] * 1.01 + 1e-7
        assert near[~exact].mean() > 0.995 or rows.size < 400
        slack = (np.abs(rows) + np.nan_to_num(steps)) * (EPS[block.spec.dtype] + 2.0**-22)
        error = np.abs(found - rows) - slack
        assert (error[~exact] <= steps[~exact] * (0.5 + 2.0**-12)).all()
    return raws


@pytest.mark.parametrize("width", [1, 33, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoded_numbers_are_the_oracles(bits, width):
    """Of dense rows, over lengths that fill their groups and that do not."""
    for dtype in DTYPES:
        for tokens, group in ((1, 32), (7, 4), (64, 32), (65, 32)):
            raw = check(block_of((tokens,) * 2, width, dtype), bits, group, 0)
            if width > 1 and tokens > 1:
                assert raw == [False, False]


@pytest.mark.parametrize("residual", [0, 1, 3, 8, 100])
def test_rows_of_different_length(residual):
    """Groups run within a head's row, and each row keeps its own last tokens exact."""
    for dtype in DTYPES:
        for lengths in ((9, 0, 4), (3, 8, 1), (0, 17), (40, 33, 1, 2)):
            raw = check(block_of(lengths, 24, dtype, value_width=16), 4, 4, residual)
            assert all(raw) == (max(lengths) <= residual)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any),
    width=st.integers(1, 40),
    bits=st.integers(2, 4),
    group=st.integers(2, 9),
    residual=st.integers(0, 7),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(lengths, width, bits, group, residual, dtype):
    """Whatever the shape, numbers are the oracle's."""
    check(block_of(tuple(lengths), width, dtype), bits, group, residual)


def test_heads_do_not_share_groups():
    """A head decodes alike whatever stands beside it; groups begin at its first token."""
    first, second = block_of((10, 10), 32, "float32"), block_of((10, 10), 32, "float32", seed=1)
    mixed = LayerKV(
        layer_idx=0,
        keys=torch.stack([first.layers[0].keys[0], second.layers[0].keys[1]]),
        values=torch.stack([first.layers[0].values[0], second.layers[0].values[1]]),
        positions=range(10),
    )
    mixed = KVBlock(spec=first.spec, start=0, num_tokens=10, layers=(mixed,))
    for a, b, c in zip(
        *(through(x, "kivi:group=4")[0] for x in (first, second, mixed)), strict=True
    ):
        assert torch.equal(c[1], torch.stack([a[1][0], b[1][1]]))


def test_keys_follow_channels_and_values_tokens():
    """A large channel harms no other of the keys; a large token no other of the values."""
    block = block_of((64,) * 2, 32, "float32")
    (keys, _), (values, _) = through(block, "kivi")[0]
    plain = [y for _, y in through(block, "kivi")[0]]
    keys, values = keys.clone(), values.clone()
    keys[:, :, 5] *= 1000
    values[:, 7] *= 1000
    layer = LayerKV(layer_idx=0, keys=keys, values=values, positions=range(64))
    (_, k), (_, v) = through(
        KVBlock(spec=block.spec, start=0, num_tokens=64, layers=(layer,)), "kivi"
    )[0]
    others = [c for c in range(32) if c != 5]
    assert torch.equal(k[:, :, others], plain[0][:, :, others])
    tokens = [t for t in range(64) if t != 7]
    assert torch.equal(v[:, tokens], plain[1][:, tokens])


def test_sections_are_laid_out_as_documented():
    """Minima, steps and codes lie where the format says; a formula over them decodes."""
    block = block_of((5, 5), 11, "float32", value_width=9)
    codec = KiviCodec(bits=3, group=4, residual=1)
    container = Container(b"".join(encode_block(block, codec)))
    layer = block.layers[0]
    back = decode_block(container, block.spec).layers[0]
    _, section = container.read(SectionKind.KEYS, 0)
    minima, steps = np.frombuffer(section[: 2 * 2 * 11 * 2], "<f2").astype("f4").reshape(2, 2, 11)
    size = 5  # 33 bits
    bodies = section[88 : 88 + 8 * size]
    assert bytes(section[88 + 40 :]) == layer.keys[:, 4].numpy().tobytes()
    for head in range(2):
        for t in range(4):
            at = (4 * head + t) * size
            row = int.from_bytes(bodies[at : at + size], "little")
            assert row >> 33 == 0
            for c in range(11):
                value = np.float32((row >> 3 * c & 7) * steps[head, c]) + minima[head, c]
                assert float(back.keys[head, t, c]) == value
    _, section = container.read(SectionKind.VALUES, 0)
    minima, steps = np.frombuffer(section[: 2 * 8 * 3 * 2], "<f2").astype("f4").reshape(2, 8, 3)
    for t in range(8):
        row = int.from_bytes(section[96 + 4 * t : 100 + 4 * t], "little")
        for c in range(9):
            value = np.float32((row >> 3 * c & 7) * steps[t, c // 4]) + minima[t, c // 4]
            assert float(back.values[t // 4, t % 4, c]) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65505.0, -1e30])
def test_what_float16_cannot_hold_is_raw_unless_it_stays_exact(value):
    """Among the quantized tokens it keeps a section raw; among the last ones it harms nothing."""
    for token, residual, expected in ((3, 0, True), (3, 5, True), (9, 5, False), (9, 0, True)):
        block = block_of((10, 10), 32, "float32")
        block.layers[0].keys[1, token, 3] = value
        pairs, raws = through(block, f"kivi:residual={residual},group=4")
        assert raws == [expected, False]
        x, y = pairs[0]
        part = slice(None) if expected else slice(10 - residual, 10)
        assert (
            x[:, part].contiguous().numpy().tobytes() == y[:, part].contiguous().numpy().tobytes()
        )


def test_float16_never_decodes_to_infinity():
    """Where the highest code would, the section is raw."""
    for low in (-65504.0, 0.0, 65000.0):
        for bits in (2, 3, 4):
            block = block_of((32, 32), 64, "float16")
            for x in (block.layers[0].keys, block.layers[0].values):
                x.copy_(torch.linspace(low, 65504, x.numel()).reshape(x.shape))
            for x, y in through(block, f"kivi:bits={bits}")[0]:
                assert torch.isfinite(y).all()
                assert float((x.double() - y.double()).abs().max()) <= 131008 / (2**bits - 1) * 0.51


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_zero_and_subnormal_numbers(dtype):
    """What float16 holds comes back exactly from constant groups; the rest within its spacing."""
    for value in (0.0, -0.0, 1.0, -2.5, 2.0**-24, 0.1, 1e-30):
        block = block_of((40, 40), 64, dtype)
        for x in (block.layers[0].keys, block.layers[0].values):
            x.fill_(value)
        pairs, raws = through(block, "kivi:bits=2")
        assert raws == [False, False]
        for x, y in pairs:
            exact = float(x[0, 0, 0]) == float(np.float16(float(x[0, 0, 0])))
            bound = 0 if exact else max(abs(value) * 2.0**-11, 2.0**-24)
            assert float((x.double() - y.double()).abs().max()) <= bound


def test_all_within_the_residual_is_raw():
    """Rows no longer than the residual are not touched, and no tokens are none."""
    for tokens in (0, 1, 8):
        pairs, raws = through(block_of((tokens,) * 2, 32, "bfloat16"), "kivi:residual=8")
        assert raws == [True, True]
        assert all(torch.equal(x, y) for x, y in pairs)
    pairs, raws = through(block_of((9, 9), 32, "bfloat16"), "kivi:residual=8")
    assert raws == [True, False]  # a group of one token costs the keys more than it saves


def test_bits_per_value_and_error_on_normal_numbers():
    """Sizes are bits + 32 / group; squared errors are those of uniform codes over the range."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 512, 128), generator=generator).bfloat16()
    layer = LayerSpec(num_kv_heads=2, k_head_dim=128, v_head_dim=128)
    spec = KVSpec(model_id="m", layers=(layer,), dtype="bfloat16")
    block = KVBlock.dense(spec, [(x, x)])
    for method, bits, error in (
        ("kivi", 5.0, 0.0062),
        ("kivi:group=64", 4.5, 0.0081),
        ("kivi:bits=3", 4.0, 0.0283),
        ("kivi:bits=2", 3.0, 0.155),
        ("kivi:bits=2,group=64", 2.5, 0.205),
    ):
        data = b"".join(encode_block(block, build_codec(method)))
        for info in Container(data).header.sections:
            assert info.stored_bytes * 8 == bits * x.numel(), method
        for y in (
            decode_block(data, spec).layers[0].keys,
            decode_block(data, spec).layers[0].values,
        ):
            seen = float(((x.double() - y.double()) ** 2).sum() / (x.double() ** 2).sum())
            assert seen == pytest.approx(error, rel=0.06), method


@given(st.integers(1, 40), st.integers(1, 5), st.integers(2, 4), st.randoms())
def test_packing(width, entries, bits, rng):
    """A row of codes is one little-endian number, and unpacks to the same codes."""
    codes = [[rng.randrange(2**bits) for _ in range(width)] for _ in range(entries)]
    packed = pack_codes(np.array(codes, np.uint8).reshape(entries, width), bits)
    for row, mine in zip(packed, codes, strict=True):
        number = sum(code << bits * i for i, code in enumerate(mine))
        assert row.tobytes() == number.to_bytes(-(-width * bits // 8), "little")
    assert unpack_codes(packed, width, bits).tolist() == codes


@pytest.mark.parametrize(
    ("bad", "hint"),
    [
        ("bits=1", "2, 3 or 4"),
        ("bits=8", "2, 3 or 4"),
        ("group=1", r"2\.\.1024"),
        ("group=1025", r"2\.\.1024"),
        ("residual=-1", r"0\.\.1048576"),
    ],
)
def test_wrong_parameters(bad, hint):
    """An error says what is possible."""
    with pytest.raises(ConfigError, match=hint):
        build_codec(f"kivi:{bad}")


def test_malformed_sections():
    """Wrong sizes, numbers that are not finite, negative steps and stray bits are refused."""
    codec = KiviCodec(bits=2, group=2, residual=1)
    matrix = Matrix(SectionKind.VALUES, 0, (2, 1), 3)
    tail = struct.pack("<6f", *range(6))
    good = struct.pack("<4e", 1.0, -2.0, 0.5, 3.0) + bytes([0b011011]) + tail
    heads = [torch.zeros((2, 3)), torch.zeros((1, 3))]
    codec.decode_rows(matrix, memoryview(good), heads)
    assert [head.tolist() for head in heads] == [[[2.5, 2.0, 1.0], [0, 1, 2]], [[3, 4, 5]]]
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        struct.pack("<e", math.nan) + good[2:],
        good[:4] + struct.pack("<e", math.inf) + good[6:],
        good[:4] + struct.pack("<e", -0.5) + good[6:],
        good[:8] + bytes([0b1011011]) + good[9:],
    ):
        with pytest.raises(CorruptDataError):
            codec.decode_rows(matrix, memoryview(bad), heads)
    nothing = Matrix(SectionKind.KEYS, 0, (1, 1), 3)
    with pytest.raises(CorruptDataError, match="quantizes nothing"):
        codec.decode_rows(nothing, memoryview(tail), [torch.zeros((1, 3))] * 2)
