# SPDX-License-Identifier: Apache-2.0
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.codecs.state import decode_state, encode_state
from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError

DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64)


@st.composite
def states(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=4))
    state = {}
    for name in names:
        if any("\ud800" <= c <= "\udfff" for c in name):
            continue
        shape = draw(st.lists(st.integers(0, 3), max_size=4))
        dtype = draw(st.sampled_from(DTYPES))
        seed = draw(st.integers(0, 99))
        raw = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
        state[name] = raw.to(dtype) * (1 if dtype is torch.bool else 3)
    return {name: x.to(torch.bool) if x.dtype is torch.bool else x for name, x in state.items()}


@given(states())
def test_what_is_written_is_read(state):
    """Names, shapes, dtypes and numbers come back, whatever the order they were given in."""
    found = decode_state(encode_state(state))
    assert found.keys() == state.keys()
    for name, x in state.items():
        assert found[name].dtype == x.dtype
        assert torch.equal(found[name], x)
    assert encode_state(dict(reversed(state.items()))) == encode_state(state)


def test_bits_are_kept():
    """NaN payloads and the sign of zero survive."""
    bits = torch.tensor([0x7FC01234, -0x80000000, 0x7F800000], dtype=torch.int32)
    found = decode_state(encode_state({"x": bits.view(torch.float32)}))["x"]
    assert torch.equal(found.view(torch.int32), bits)


def test_the_bytes_are_those_of_the_specification():
    """A vector written out by hand from docs/formats/container.md."""
    expected = (
        struct.pack("<I", 2)
        + struct.pack("<HBB", 1, 5, 2)
        + b"a"
        + struct.pack("<2Q2f", 1, 2, 0.5, -1.0)
        + struct.pack("<HBB", 2, 4, 0)
        + b"bc"
        + struct.pack("<q", -7)
    )
    state = {"bc": torch.tensor(-7), "a": torch.tensor([[0.5, -1.0]])}
    assert encode_state(state) == expected


def test_damaged_bytes_are_refused():
    """Truncation, trailing bytes, wrong order, impossible sizes, dtypes and truth values."""
    good = encode_state({"a": torch.arange(3), "b": torch.tensor([True, False])})
    decode_state(good)
    for size in range(len(good)):
        with pytest.raises(CorruptDataError):
            decode_state(good[:size])
    with pytest.raises(CorruptDataError, match="ends at"):
        decode_state(good + b"\0")

    def one(name=b"a", code=2, shape=(1,), data=b"\1", count=1):
        body = struct.pack("<HBB", len(name), code, len(shape)) + name
        return struct.pack("<I", count) + (body + struct.pack(f"<{len(shape)}Q", *shape) + data)

    decode_state(one())
    with pytest.raises(IncompatibleDataError, match="dtype code 9"):
        decode_state(one(code=9))
    for wrong in (
        one(name=b""),
        one(name=b"\xff"),
        one(shape=(2**63,)),
        one(shape=(2**40, 2**40)),
        one(shape=(0, 2**63), data=b""),
        one(shape=(1,) * 5),
        one(code=1, data=b"\2"),
        one(count=2**31),
    ):
        with pytest.raises(CorruptDataError):
            decode_state(wrong)
    twice = struct.pack("<I", 2) + one()[4:] * 2
    with pytest.raises(CorruptDataError, match="order"):
        decode_state(twice)


def test_what_the_format_lacks_is_refused_by_name():
    """Other dtypes, too many dimensions and empty names are errors when writing."""
    for wrong in (
        {"x": torch.zeros(1, dtype=torch.bfloat16)},
        {"x": torch.zeros(1, 1, 1, 1, 1)},
        {"": torch.zeros(1)},
    ):
        with pytest.raises(ConfigError, match="policy state"):
            encode_state(wrong)
