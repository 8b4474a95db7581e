# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings

from kvlib.codecs import Container, build_codec, decode_block, encode_block
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.errors import CorruptDataError
from kvlib.testing.models import random_block, tiny_spec
from kvlib.testing.strategies import kv_blocks

RAW = build_codec("raw")


@settings(max_examples=80)
@given(kv_blocks())
def test_every_bit_comes_back(block):
    """Dense, evicted and ragged blocks of every dtype, copied or lent."""
    data = b"".join(encode_block(block, RAW))
    assert decode_block(data, block.spec).equal(block)
    assert decode_block(data, block.spec, lend=True).equal(block)


def test_sections_are_the_tensors_bytes():
    block = random_block(tiny_spec(dtype="float16"), 64)
    container = Container(b"".join(encode_block(block, RAW)))
    for layer in block.layers:
        for kind, x in ((SectionKind.KEYS, layer.keys), (SectionKind.VALUES, layer.values)):
            info, data = container.read(kind, layer.layer_idx)
            assert info.flags == SectionFlag.RAW
            assert bytes(data) == x.contiguous().view(torch.uint8).numpy().tobytes()


def test_dense_layers_are_lent_where_they_lie():
    """What was changed in the container afterwards is seen: it is the same memory."""
    block = random_block(tiny_spec(dtype="float32"), 64)
    data = bytearray(b"".join(encode_block(block, RAW)))
    lent = decode_block(data, block.spec, lend=True)
    copied = decode_block(data, block.spec)
    data[:] = bytes(len(data))
    assert copied.equal(block)
    assert all(not layer.keys.any() and not layer.values.any() for layer in lent.layers)


def test_lent_memory_that_is_not_aligned_is_copied():
    block = random_block(tiny_spec(dtype="float32"), 64)
    data = b"".join(encode_block(block, RAW))
    for shift in range(4):
        padded = bytes(shift) + data
        assert decode_block(memoryview(padded)[shift:], block.spec, lend=True).equal(block)


def test_a_coded_section_is_damage():
    """No encoder of this codec makes one: without the mark, nothing says what the bytes mean."""
    with pytest.raises(CorruptDataError, match="codec is raw"):
        RAW.decode_matrix(memoryview(b"1234"), torch.empty(1, 1))
