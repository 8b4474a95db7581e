# SPDX-License-Identifier: Apache-2.0
"""Lists of whole numbers as bytes: small magnitudes are short.

A number v is first folded so that small magnitudes of both signs are small (zigzag: 0, -1, 1, -2
become 0, 1, 2, 3; in general 2v, or -2v - 1 if v < 0), then written seven bits at a time, lowest
first, one byte each; every byte but the last has its high bit set. There is exactly one form of
each number: none has more bytes than it needs.
"""

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs.container import Buffer
from kvlib.errors import CorruptDataError

__all__ = ["decode_varints", "encode_varints"]

MAX_BYTES = 10
"""Of one number: 64 bits in sevens."""

_SEVEN, _LOW, _MORE, _ONE = np.uint64(7), np.uint64(0x7F), np.uint8(0x80), np.uint64(1)


def encode_varints(values: NDArray[np.int64]) -> bytes:
    """The bytes of int64 numbers [n], one after another."""
    rest = values.astype(np.int64).reshape(-1)
    folded = (rest << 1 ^ rest >> 63).view(np.uint64)
    columns = np.zeros((folded.size, MAX_BYTES), np.uint8)
    used = np.zeros(columns.shape, np.bool_)
    present = np.ones(folded.size, np.bool_)
    for place in range(MAX_BYTES):
        used[:, place] = present
        columns[:, place] = (folded & _LOW).astype(np.uint8)
        folded = folded >> _SEVEN
        present = folded != 0
        columns[:, place] |= np.where(present, _MORE, np.uint8(0))
        if not present.any():
            break
    return columns[used].tobytes()


def decode_varints(data: Buffer, count: int) -> NDArray[np.int64]:
    """The numbers that `encode_varints` made `data` of.

    Args:
        data: exactly their bytes.
        count: how many they are. Nothing is allocated for more than `data` can hold.

    Raises:
        CorruptDataError: there are more or fewer, or one that `encode_varints` does not write.
    """
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < _MORE)
    if len(ends) != count or (raw.size and raw[-1] >= _MORE):
        raise CorruptDataError(f"{raw.size} bytes do not hold exactly {count} numbers")
    if not count:
        return np.empty(0, np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    longest = int(sizes.max())
    last = raw[ends]
    if (
        longest > MAX_BYTES
        or (last[sizes == MAX_BYTES] > 1).any()  # the 64th bit is the last
        or (last[sizes > 1] == 0).any()
    ):
        raise CorruptDataError("a number has more than 64 bits, or more bytes than it needs")
    folded = np.zeros(count, np.uint64)
    for place in range(longest):
        more = np.flatnonzero(sizes > place)
        part = raw[starts[more] + place].astype(np.uint64) & _LOW
        folded[more] |= part << np.uint64(7 * place)
    sign = (folded & _ONE).astype(np.int64)
    return (folded >> _ONE).astype(np.int64) ^ -sign
