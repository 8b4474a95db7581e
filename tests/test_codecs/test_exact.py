# SPDX-License-Identifier: Apache-2.0
import struct

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings

from kvlib.blocks import KVBlock, LayerKV
from kvlib.codecs import Container, build_codec, decode_block, encode_block
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.codecs.exact import decompress
from kvlib.errors import CorruptDataError
from kvlib.spec import DTYPES, KVSpec, LayerSpec
from kvlib.testing.strategies import kv_blocks

EXACT = build_codec("exact")


def record(keys):
    """A container of one MLA layer [T, D], and its spec."""
    layer = LayerSpec(kind="mla", num_kv_heads=1, k_head_dim=keys.shape[-1], v_head_dim=0)
    spec = KVSpec(model_id="m", layers=(layer,), dtype=str(keys.dtype).removeprefix("torch."))
    block = KVBlock.dense(spec, [(keys[None], keys[None, :, :0])])
    return b"".join(encode_block(block, EXACT)), spec


@settings(max_examples=120)
@given(kv_blocks())
def test_every_bit_comes_back(block):
    """Dense, evicted and ragged blocks of every dtype return bit for bit, whatever their bits."""
    data = b"".join(encode_block(block, EXACT))
    decoded = decode_block(data, block.spec)
    assert decoded.equal(block)
    assert b"".join(encode_block(decoded, EXACT)) == data


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_bit_pattern_comes_back(dtype):
    """All 65536 patterns of two bytes, and all of one, survive: NaN payloads, -0.0, subnormals."""
    raw = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    for turned in (raw, raw.flip(0)):
        x = turned.reshape(-1, 64).view(getattr(torch, dtype))
        data, spec = record(x)
        back = decode_block(data, spec).layers[0].keys[0]
        assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


def test_planes_are_laid_out_as_documented():
    """A section is a table of sizes and one plane per byte, least significant first."""
    bits = torch.arange(300, dtype=torch.int16).reshape(-1, 3) + 0x3C00 * 1
    data, _ = record(bits.view(torch.float16))
    info, section = Container(data).read(SectionKind.KEYS, 0)
    assert not info.flags
    low, high = struct.unpack_from("<2I", section)
    planes = [bytes(section[8 : 8 + (low & 0x7FFFFFFF)])]
    planes.append(bytes(section[8 + (low & 0x7FFFFFFF) :]))
    assert len(planes[1]) == high & 0x7FFFFFFF
    seen = [
        plane if word >> 31 else zstandard.decompress(plane)
        for word, plane in zip((low, high), planes, strict=True)
    ]
    raw = bits.numpy().tobytes()
    assert seen == [raw[0::2], raw[1::2]]
    assert high >> 31 == 0  # the plane of exponents is worth compressing


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
    assert len(data) < 0.85 * keys.numel() * 2


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
    huge = torch.empty((1 << 16, 1 << 15), dtype=torch.uint8, device="meta")
    assert EXACT.encode_matrix(huge.view(torch.float8_e5m2)) is None
