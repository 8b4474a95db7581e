# SPDX-License-Identifier: Apache-2.0
"""Chunks of coefficients decoded without a compiler; see `kvlib.codecs.coefficients`.

All streams of all chunks take their steps together, which is what NumPy needs to be quick.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from kvlib.codecs import rans
from kvlib.codecs.coefficients import (
    LEVEL_CLASS,
    MAX_LEVEL,
    ZERO,
    Bytes,
    Decoded,
    Float,
    Int,
    Packed,
    find_escapes,
    level_tables,
    same,
)
from kvlib.codecs.varint import decode_varints
from kvlib.errors import CorruptDataError

__all__ = ["read_chunks"]


def read_chunks(packed: Sequence[Packed]) -> Iterator[Decoded]:
    """See `Kernels`."""
    classes, shifts, _ = level_tables()
    cuts = [_cut(p) for p in packed]
    sides = rans.decode(
        [side for side, _, _, _ in cuts],
        [(1, p.active + p.r) for p in packed],
        [np.concatenate([same(LEVEL_CLASS, p.active), classes[p.mean_levels]]) for p in packed],
        rans.GAUSSIAN,
    )
    means, levels, rest = [], [], []
    numbers = _numbers(packed, [escapes for _, _, _, escapes in cuts])
    for p, symbols, given in zip(packed, sides, numbers, strict=True):
        row = symbols[0].astype(np.int64) - ZERO
        at = find_escapes(symbols)
        if at.size > given.size:
            raise CorruptDataError(f"a chunk has {given.size} escapes and needs more")
        row[at] = given[: at.size]
        rest.append(given[at.size :])
        mine = p.levels + row[: p.active]
        if mine.size and (mine.view(np.uint64) > MAX_LEVEL).any():  # negative ones are huge
            raise CorruptDataError("a channel's level is out of range")
        levels.append(mine)
        means.append(row[p.active :])
    mains = rans.decode(
        [main for _, main, _, _ in cuts],
        [(p.n, p.active) for p in packed],
        [classes[x] for x in levels],
        rans.GAUSSIAN,
    )
    for p, symbols, level, mean, escapes, (_, _, low, _) in zip(
        packed, mains, levels, means, rest, cuts, strict=True
    ):
        shift, mean_shift = shifts[level], shifts[p.mean_levels]
        mean_low = _low_bytes(1, mean_shift)
        if low.size != mean_low + _low_bytes(p.n, shift):
            raise CorruptDataError(f"{low.size} bytes of low bits do not fit the levels")
        if mean_low:
            _add_low(mean[:, None], mean_shift, low[:mean_low])
        at = find_escapes(symbols)
        if at.size != escapes.size:
            raise CorruptDataError(f"{escapes.size} escapes are there; the symbols need {at.size}")
        yield Decoded(_scaled(p, symbols, at, escapes, shift, low[mean_low:]), mean)


def _cut(p: Packed) -> tuple[rans.Coded, rans.Coded, Bytes, memoryview]:
    """A body as two streams, low bits and escapes."""
    a, b = (4 * n for n in p.lanes)
    c, d = (2 * n for n in p.words)
    body = np.frombuffer(p.body, np.uint8)
    at = a + b + c + d
    return (
        rans.Coded(_states(body[:a]), _words(body[a + b : a + b + c])),
        rans.Coded(_states(body[a : a + b]), _words(body[a + b + c : at])),
        body[at : at + p.low_bytes],
        p.body[at + p.low_bytes :],
    )


def _states(data: Bytes) -> rans.States:
    return data.view("<u4").astype(np.uint32)


def _words(data: Bytes) -> rans.Words:
    return data.view("<u2").astype(np.uint16)


def _numbers(packed: Sequence[Packed], parts: Sequence[memoryview]) -> list[Int]:
    """The escapes of each chunk, decoded together."""
    last = np.cumsum([p.escapes for p in packed], dtype=np.int64)
    if not packed:
        return []
    joined = b"".join(parts)
    every = decode_varints(joined, int(last[-1]))
    # A chunk's last byte must end the last of its numbers.
    ends = (np.frombuffer(joined, np.uint8) < 0x80).nonzero()[0]
    edges = np.cumsum([len(part) for part in parts], dtype=np.int64)
    if (np.concatenate([[0], ends + 1])[last] != edges).any():
        raise CorruptDataError("the escapes of a chunk are not as many as it says")
    return np.split(every, last[:-1])


def _scaled(p: Packed, symbols: Bytes, at: Int, escapes: Int, shift: Bytes, low: Bytes) -> Float:
    """Values times the step, as matrices of every `parts`-th column."""
    out = np.zeros((p.parts, p.n, p.size), np.float32)
    signed = np.subtract(symbols, ZERO, dtype=np.uint8).view(np.int8)
    for h in range(p.parts):
        mine = signed[:, h :: p.parts]
        out[h, :, : mine.shape[1]] = mine
    out *= p.step
    columns = shift.nonzero()[0]  # those with low bits, mostly few
    whole = signed.T[columns].astype(np.int64)
    if at.size:
        t, c = np.divmod(at, p.active)
        out[c % p.parts, t, c // p.parts] = escapes.astype(np.float32) * p.step
        chosen = shift[c] > 0
        whole[np.searchsorted(columns, c[chosen]), t[chosen]] = escapes[chosen]
    if columns.size:
        _add_low(whole, shift[columns], low)
        out[columns % p.parts, :, columns // p.parts] = whole.astype(np.float32) * p.step
    return out


def _low_bytes(n: int, shift: Bytes) -> int:
    return -(-n * int(shift.sum(dtype=np.int64)) // 8)


def _add_low(values: Int, shift: Bytes, low: Bytes) -> None:
    """Put low bits back, whose planes follow each other: values [r, n] hold the high parts."""
    bits = np.unpackbits(low, bitorder="little")
    values <<= shift.astype(values.dtype)[:, None]
    at = 0
    for j in range(int(shift.max())):
        channels = (shift > j).nonzero()[0]
        count = values.shape[1] * channels.size
        plane = bits[at : at + count].reshape(-1, channels.size)
        values[channels] |= plane.T.astype(values.dtype) << j
        at += count
    if bits[at:].any():
        raise CorruptDataError("the padding of low bits is not zero")
