# SPDX-License-Identifier: Apache-2.0
"""Lists of whole numbers as bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.codecs.varint import decode_varints, encode_varints
from kvlib.errors import CorruptDataError

INT64 = st.integers(-(2**63), 2**63 - 1)
EDGES = [s * 2**k + d for k in range(0, 63, 7) for s in (1, -1) for d in (-1, 0, 1)]


def plain(v):
    """One number, bit by bit."""
    folded = 2 * v if v >= 0 else -2 * v - 1
    out = []
    while folded > 127:
        out.append(128 + folded % 128)
        folded //= 128
    return bytes([*out, folded])


@given(st.lists(INT64 | st.integers(-200, 200), max_size=40))
def test_round_trip_is_the_definition(values):
    """The bytes are those of the definition, and give the numbers back."""
    data = encode_varints(np.array(values, np.int64))
    assert data == b"".join(plain(v) for v in values)
    back = decode_varints(memoryview(data), len(values))
    assert back.dtype == np.int64
    assert back.tolist() == values


def test_edges():
    """Where a number gets another byte, and the ends of the range."""
    values = [*EDGES, 2**63 - 1, -(2**63)]
    data = encode_varints(np.array(values, np.int64))
    assert data == b"".join(plain(v) for v in values)
    assert decode_varints(data, len(values)).tolist() == values
    assert max(len(plain(v)) for v in values) == 10


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"", 1),
        (b"\x00", 0),
        (b"\x00", 2),
        (b"\x80", 1),  # goes on, but nothing follows
        (b"\x00\x80", 1),
        (b"\x80\x00", 1),  # zero in two bytes
        (b"\x00\x81\x80\x00", 2),
        (b"\xff" * 9 + b"\x02", 1),  # 65 bits
        (b"\xff" * 10 + b"\x01", 1),
        (b"\xff" * 40, 1),
        (b"\x00", -1),
        (b"\x00", 1 << 60),
    ],
)
def test_malformed(data, count):
    """Too few, too many, too long, and second forms of a number are refused."""
    with pytest.raises(CorruptDataError):
        decode_varints(data, count)


@given(st.binary(max_size=24), st.integers(0, 24))
def test_any_bytes(data, count):
    """Whatever is accepted is what an encoder writes."""
    try:
        values = decode_varints(data, count)
    except CorruptDataError:
        return
    assert len(values) == count
    assert encode_varints(values) == data
