# SPDX-License-Identifier: Apache-2.0
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings

from kvlib import KVStore
from kvlib.blocks import KVBlock, LayerKV
from kvlib.codecs import (
    Container,
    build_codec,
    codec_from_canonical,
    decode_block,
    describe_codec,
    encode_block,
)
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.codecs.exact import ExactCodec, ExactCodec1, decompress
from kvlib.errors import CorruptDataError, IncompatibleDataError
from kvlib.spec import DTYPES, KVSpec, LayerSpec
from kvlib.testing.codecs import CodecContract
from kvlib.testing.models import random_block, tiny_spec
from kvlib.testing.strategies import kv_blocks

EXACT = build_codec("exact")
VERSIONS = pytest.mark.parametrize("codec", [ExactCodec1(), EXACT], ids=["1", "2"])
ROWS, COLUMNS, RAW = 0, 1, 2


def record(keys, codec=EXACT):
    """A container of one MLA layer [T, D], and its spec."""
    layer = LayerSpec(kind="mla", num_kv_heads=1, k_head_dim=keys.shape[-1], v_head_dim=0)
    spec = KVSpec(model_id="m", layers=(layer,), dtype=str(keys.dtype).removeprefix("torch."))
    block = KVBlock.dense(spec, [(keys[None], keys[None, :, :0])])
    return b"".join(encode_block(block, codec)), spec


@VERSIONS
@settings(max_examples=80)
@given(kv_blocks())
def test_every_bit_comes_back(codec, block):
    """Dense, evicted and ragged blocks of every dtype return bit for bit, whatever their bits."""
    data = b"".join(encode_block(block, codec))
    decoded = decode_block(data, block.spec)
    assert decoded.equal(block)
    assert b"".join(encode_block(decoded, codec)) == data


@VERSIONS
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_bit_pattern_comes_back(codec, dtype):
    """All 65536 patterns of two bytes, and all of one, survive: NaN payloads, -0.0, subnormals."""
    raw = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    for turned in (raw, raw.flip(0)):
        x = turned.reshape(-1, 64).view(getattr(torch, dtype))
        data, spec = record(x, codec)
        back = decode_block(data, spec).layers[0].keys[0]
        assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def planes_of(data, itemsize):
    """(form, its plane before it is put in the order of rows) of each plane of the keys."""
    info, section = Container(data).read(SectionKind.KEYS, 0)
    assert not info.flags
    at, seen = 4 * itemsize, []
    for word in struct.unpack_from(f"<{itemsize}I", section):
        form, size = divmod(word, 1 << 30)
        stored = bytes(section[at : at + size])
        seen.append((form, stored if form == RAW else zstandard.decompress(stored)))
        at += size
    assert at == len(section)
    return seen


def test_planes_are_laid_out_as_documented():
    """A section is a table of forms and sizes and one plane per byte, least significant first."""
    bits = torch.arange(300, dtype=torch.int16).reshape(-1, 3) + 0x3C00
    data, _ = record(bits.view(torch.float16))
    raw = bits.numpy().tobytes()
    (_, low), (high_form, high) = planes_of(data, 2)
    assert low == raw[0::2]
    assert high_form != RAW  # the plane of exponents is worth compressing
    if high_form == COLUMNS:
        high = bytes(high[c * 100 + r] for r in range(100) for c in range(3))
    assert high == raw[1::2]


def test_the_smaller_order_is_taken():
    """Exponents that last in a channel are packed by columns, rows that come back by rows."""
    rng = np.random.default_rng(1)
    sizes = 2.0 ** rng.integers(-8, 8, 32)
    keys = torch.from_numpy(rng.normal(3, 1, (96, 32)) * sizes).bfloat16()
    raw = keys.view(torch.uint8).numpy()
    (low_form, _), (high_form, high) = planes_of(record(keys)[0], 2)
    assert (low_form, high_form) == (RAW, COLUMNS)
    assert high == raw[:, 1::2].T.tobytes()
    words = torch.from_numpy(rng.normal(0, 1, (4, 32))).bfloat16()
    keys = words[torch.from_numpy(rng.integers(0, 4, 96))]
    raw = keys.view(torch.uint8).numpy()
    assert planes_of(record(keys)[0], 2) == [(ROWS, raw[:, p::2].tobytes()) for p in (0, 1)]


def test_any_plane_may_have_any_form():
    """A reader takes what another writer chose: noise by columns, exponents as they are."""
    rng = np.random.default_rng(2)
    raw = rng.integers(0, 256, (6, 5 * 4), dtype=np.uint8)
    planes = [raw[:, p::4] for p in range(4)]
    frames = [zstandard.compress(x) for x in (planes[0].T.tobytes(), planes[1].tobytes())]
    parts = [*frames, planes[2].tobytes(), zstandard.compress(planes[3].T.tobytes(), 19)]
    forms = (COLUMNS, ROWS, RAW, COLUMNS)
    table = [form << 30 | len(x) for form, x in zip(forms, parts, strict=True)]
    section = struct.pack("<4I", *table) + b"".join(parts)
    for shape in ((6, 5), (2, 3, 5), (6, 1, 5)):  # rows, or heads and their rows
        out = torch.empty(shape)
        EXACT.decode_matrix(memoryview(section), out)
        assert out.view(torch.uint8).numpy().tobytes() == raw.tobytes()
    wide = torch.zeros((2, 9, 7))  # a view of a larger tensor
    EXACT.decode_matrix(memoryview(section), wide[:, 3:6, 1:6])
    assert wide[:, 3:6, 1:6].contiguous().view(torch.uint8).numpy().tobytes() == raw.tobytes()
    assert wide.view(torch.int32).count_nonzero() == 30
    for p in range(4):
        wrong = struct.pack("<4I", *[w | 3 << 30 if i == p else w for i, w in enumerate(table)])
        with pytest.raises(CorruptDataError, match=rf"plane {p} claims to be raw and"):
            EXACT.decode_matrix(memoryview(wrong + section[16:]), out)


def test_versions():
    """A header's version finds the class that reads it; only the newest is built by name."""
    assert type(EXACT) is ExactCodec
    for codec, text in ((ExactCodec1(), "exact@1"), (EXACT, "exact@2")):
        assert describe_codec(codec) == text
        assert codec_from_canonical(text) == codec
        assert type(codec_from_canonical(text)) is type(codec)
    for text in ("exact@0", "exact@3", "exact@1:", "exact@01", "exact@", "exact"):
        with pytest.raises(IncompatibleDataError, match="written by codec"):
            codec_from_canonical(text)
    with pytest.raises(IncompatibleDataError, match=r"has 'exact@2', and reads version 1$"):
        codec_from_canonical("exact@3")


class TestVersion1(CodecContract):
    """Version 1 keeps the contract of codecs; the newest one is in test_contract.py."""

    @pytest.fixture
    def codec(self):
        return ExactCodec1()


def test_a_store_of_version_1(tmp_path):
    """Its blocks are not found under version 2, are no damage, and are read with version 1."""
    spec = tiny_spec()
    block = random_block(spec, 128)
    with KVStore(tmp_path, memory=0, codec=ExactCodec1()) as store:
        keys = store.block_keys(spec, list(range(128)))
        store.put(spec, keys, block)
    with KVStore(tmp_path, memory=0) as store:
        assert store.load(spec, keys).num_blocks == 0
        assert all(report.ok for report in store.check().values())
        store.put(spec, keys, block)
        assert store.load(spec, keys).block.equal(block)
    with KVStore(tmp_path, memory=0, codec=ExactCodec1()) as store:
        assert store.load(spec, keys).block.equal(block)


@VERSIONS
def test_damaged_sections(codec):
    """Any flip or cut is a declared error or other numbers: nothing is read or written elsewhere.

    In a container a digest finds them all before.
    """
    rng = np.random.default_rng(3)
    keys = torch.from_numpy(rng.normal(0, 1, (40, 8)) * 4.0 ** np.arange(8)).bfloat16()
    parts = codec.encode_matrix(keys)
    section = b"".join(bytes(part) for part in parts)
    outcomes = set()
    guarded = torch.zeros((44, 8), dtype=torch.bfloat16)
    changed = [section[:n] for n in range(len(section))]
    for bit in range(8 * len(section)):
        mutant = bytearray(section)
        mutant[bit // 8] ^= 1 << bit % 8
        changed.append(bytes(mutant))
    for mutant in [*changed, section + b"\0"]:
        try:
            codec.decode_matrix(memoryview(mutant), guarded[2:42])
            outcomes.add("decoded")
            assert len(mutant) == len(section)
        except CorruptDataError:
            outcomes.add("refused")
    assert outcomes == {"decoded", "refused"}
    assert not guarded[:2].any()
    assert not guarded[42:].any()


@pytest.mark.parametrize("codec", [EXACT, ExactCodec1()], ids=["2", "1"])
def test_threads_share_a_codec(codec):
    """Contexts of zstandard are not shared: many threads at once write and read the same bytes."""
    x = torch.randn((512, 64), generator=torch.Generator().manual_seed(4)).bfloat16()
    expected = b"".join(bytes(p) for p in codec.encode_matrix(x))

    def work(_):
        out = torch.empty_like(x)
        codec.decode_matrix(memoryview(expected), out)
        same = b"".join(bytes(p) for p in codec.encode_matrix(x)) == expected
        return same and torch.equal(out.view(torch.int16), x.view(torch.int16))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_noise_is_stored_raw():
    """What does not shrink is stored as it is: the section is never larger than the tensor."""
    rng = np.random.default_rng(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        raw = torch.from_numpy(rng.integers(0, 256, (64, 64), dtype=np.uint8))
        data, spec = record(raw.view(dtype))
        info = Container(data).find(SectionKind.KEYS, 0)
        assert info.flags == SectionFlag.RAW
        assert info.stored_bytes == info.raw_bytes == 4096
        assert torch.equal(decode_block(data, spec).layers[0].keys[0].view(torch.uint8), raw)


def test_bfloat16_of_normal_numbers_shrinks():
    """Normal bfloat16 numbers take less than 85 % of their bytes."""
    keys = torch.randn((512, 128), generator=torch.Generator().manual_seed(0)).bfloat16()
    data, _ = record(keys)
    assert len(data) < 0.72 * keys.numel() * 2


def test_channels_of_their_own_sign_and_size_shrink_more():
    """Biases of channels, as keys have them: columns show them, rows hide them."""
    rng = np.random.default_rng(5)
    means = rng.normal(0, 1, 64) * 2.0 ** rng.integers(-2, 4, 64)
    keys = torch.from_numpy(rng.normal(means, np.abs(means) / 8, (256, 64))).bfloat16()
    new, old = (len(record(keys, codec)[0]) - keys.numel() for codec in (EXACT, ExactCodec1()))
    assert new < 0.9 * old  # beside the plane of noise


def test_large_planes():
    """A plane larger than a frame's window reads back: our limit is above our own frames."""
    keys = torch.zeros((9 << 10, 1024), dtype=torch.uint8)
    keys[::7, ::5] = 3
    data, spec = record(keys.view(torch.float8_e5m2))
    assert len(data) < keys.numel() // 8
    assert torch.equal(decode_block(data, spec).layers[0].keys[0].view(torch.uint8), keys)


def test_decompress_takes_one_whole_frame():
    """Exactly one frame of exactly the declared and expected size is accepted."""
    good = zstandard.compress(b"abc" * 100)
    assert decompress(memoryview(good), 300) == b"abc" * 100
    checked = zstandard.ZstdCompressor(write_checksum=True).compress(b"abc" * 100)
    assert decompress(memoryview(checked), 300) == b"abc" * 100
    for frame, size in (
        (good, 299),
        (good, 301),
        (good, 0),
        (good[:-1], 300),
        (good + b"\0", 300),
        (good + good, 300),
        (good + good, 600),
        (b"", 0),
        (good[:4], 300),
        (b"\0" + good[1:], 300),
        (checked[:-1] + bytes([checked[-1] ^ 1]), 300),
    ):
        with pytest.raises(CorruptDataError):
            decompress(memoryview(frame), size)


def test_empty_plane():
    """A frame of nothing is a frame of size 0."""
    assert decompress(memoryview(zstandard.compress(b"")), 0) == b""


def test_foreign_sizes():
    """A raw section or plane of another size than the shape's is refused."""
    data, spec = record(torch.randn((4, 8)))
    container = Container(data)
    keys = torch.empty((1, 4, 8))

    def decode(x):
        layer = LayerKV(layer_idx=0, keys=x, values=x[..., :0], positions=range(x.shape[1]))
        EXACT.decode(container, spec, [layer])

    decode(keys)
    for shape in ((1, 4, 7), (1, 5, 8), (1, 4, 9)):
        wrong = torch.empty(shape)
        with pytest.raises(CorruptDataError, match="the shape needs"):
            decode(wrong)
    for section in (b"", b"\0" * 15, b"\0" * 16, b"\0" * 17, struct.pack("<4I", 99, 0, 0, 0)):
        with pytest.raises(CorruptDataError):
            EXACT.decode_matrix(memoryview(section), keys)
    assert spec.dtype == "float32"


def test_huge_matrices_are_stored_raw():
    """A plane too large for its 31 bits of size is left to the raw form."""
    for codec, bits in ((EXACT, 30), (ExactCodec1(), 31)):
        huge = torch.empty((1 << bits - 15, 1 << 15), dtype=torch.uint8, device="meta")
        assert codec.encode_matrix(huge.view(torch.float8_e5m2)) is None
