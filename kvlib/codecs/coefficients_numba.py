# SPDX-License-Identifier: Apache-2.0
"""Chunks of coefficients decoded by one compiled call each; see `kvlib.codecs.coefficients`.

A record has two or four chunks a layer, and what Python does for each counts: whatever is decided
by the bytes of a chunk is decided here, without the GIL. As in `kvlib.codecs.rans_numba` indices
are unsigned.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numba import njit, types

from kvlib.codecs.coefficients import (
    LEVEL_CLASS,
    MAX_LEVEL,
    ZERO,
    Bytes,
    Decoded,
    Float,
    Int,
    Packed,
    level_tables,
)
from kvlib.codecs.rans import GAUSSIAN, HIGHEST, LOWEST, States, Words
from kvlib.codecs.rans_numba import LOOKUP, Lookup, _compiled, _input, _output, decode_lanes
from kvlib.codecs.rans_numba import lookup as symbol_lookup
from kvlib.codecs.rans_tables import ESCAPE
from kvlib.codecs.varint import MAX_BYTES
from kvlib.errors import CorruptDataError

__all__ = ["read_chunks"]

_u64 = np.uint64
_REASONS = (
    "",
    "a state of a chunk's stream is out of range",
    "a chunk's stream does not end where its encoder began",
    "the escapes of a chunk are not as many as it says",
    "an escape has more than 64 bits, or more bytes than it needs",
    "a channel's level is out of range",
    "the bytes of low bits do not fit the levels",
    "the padding of low bits is not zero",
)
_FINE, _STATE, _END, _COUNT, _NUMBER, _LEVEL, _LOW, _PADDING = range(8)
_SIZES: Any = types.UniTuple(types.int64, 10)  # type: ignore[no-untyped-call]


@njit(nogil=True, error_model="numpy")
def _open(data: Bytes, at: int, words_at: int, states: States, words: Words, used: int) -> Any:
    """Copy a stream's states and words; whether the states are in range."""
    good: Any = True
    for lane in range(states.size):
        k: Any = _u64(at + 4 * lane)
        x = np.uint32(data[k]) | np.uint32(data[k + _u64(1)]) << np.uint32(8)
        x |= np.uint32(data[k + _u64(2)]) << np.uint32(16)
        x |= np.uint32(data[k + _u64(3)]) << np.uint32(24)
        states[lane] = x
        good &= (x >= LOWEST) & (x <= HIGHEST)
    for i in range(used):
        k = _u64(words_at + 2 * i)
        words[i] = np.uint16(data[k]) | np.uint16(data[k + _u64(1)]) << np.uint16(8)
    words[used:] = 0
    return good


@njit(nogil=True, error_model="numpy")
def _ended(states: States) -> bool:
    good = True
    for lane in range(states.size):
        good &= states[lane] == LOWEST
    return good


@njit(nogil=True, error_model="numpy")
def _number(data: Bytes, at: int) -> tuple[Any, int]:
    """The varint at a place, and where it ends: nowhere if it is malformed."""
    folded = _u64(0)
    place = 0
    while at < data.size and place < MAX_BYTES:
        byte = _u64(data[at])
        at += 1
        folded |= (byte & _u64(0x7F)) << _u64(7 * place)
        place += 1
        if byte < _u64(0x80):
            if (place == MAX_BYTES and byte > _u64(1)) or (place > 1 and byte == _u64(0)):
                return 0, -1
            return np.int64(folded >> _u64(1)) ^ -np.int64(folded & _u64(1)), at
    return 0, -1


@njit(nogil=True, error_model="numpy")
def _add_low(values: Int, shift: Int, data: Bytes, at: int) -> Any:
    """Put low bits back, whose planes follow each other; 0, or else the padding is wrong."""
    width = shift.size
    rows = values.size // width if width else 0
    most = 0
    for c in range(width):
        most = max(most, shift[c])
    for t in range(rows):
        for c in range(width):
            values[t * width + c] <<= shift[c]
    bit = 8 * at
    for j in range(most):
        for t in range(rows):
            for c in range(width):
                if shift[c] > j:
                    values[t * width + c] |= np.int64(data[bit >> 3] >> (bit & 7) & 1) << j
                    bit += 1
    return np.int64(data[bit >> 3] >> (bit & 7)) if bit & 7 else 0


@njit(nogil=True, error_model="numpy")
def _scale(symbols: Bytes, row: Any, count: int, step: Any, out: Float, to: Any) -> Any:
    """Values times the step of one token's symbols; whether some of them are escapes."""
    zero, escape = np.float32(ZERO), np.uint8(ESCAPE)
    escaped = False
    for c in range(count):
        symbol = symbols[row + _u64(c)]
        out[to + _u64(c)] = (np.float32(symbol) - zero) * step
        escaped |= symbol == escape
    return escaped


@njit(nogil=True, error_model="numpy")
def _scale_parts(
    symbols: Bytes, row: Any, count: int, scaled: Float, out: Float, to: Any, parts: int, far: int
) -> Any:
    """The same, every `parts`-th to one matrix, which begin `far` apart."""
    escape = np.uint8(ESCAPE)
    escaped = False
    for h in range(parts):
        for i in range((count - h + parts - 1) // parts):
            symbol = symbols[row + _u64(h + i * parts)]
            out[to + _u64(i)] = scaled[_u64(symbol)]
            escaped |= symbol == escape
        to += _u64(far)
    return escaped


@_compiled(
    _input(types.uint8),
    _SIZES,
    _input(types.uint8),
    _input(types.uint8),
    _input(types.uint8),
    _input(types.uint8),
    LOOKUP,
    types.float32,
    _output(types.uint8),
    _output(types.float32),
    _output(types.int64),
)
def _read(
    data: Bytes,
    sizes: tuple[int, int, int, int, int, int, int, int, int, int],
    levels: Bytes,
    mean_levels: Bytes,
    classes: Bytes,
    shifts: Bytes,
    lookup: Lookup,
    step: Any,
    symbols: Bytes,
    out: Float,
    means: Int,
) -> int:
    """Fill `out` and `means`, and say what is wrong. `symbols` has room for the values'."""
    n, active, parts, size, side_lanes, lanes, side_words, words, low_bytes, escapes = sizes
    r = means.size
    low_at = 4 * (side_lanes + lanes) + 2 * (side_words + words)
    escape_at = low_at + low_bytes
    # Levels and means.
    most = max(side_lanes + active + r, lanes + active)
    columns = np.empty(most, np.uint32)
    beside = np.empty(active + r, np.uint8)
    states = np.empty(side_lanes, np.uint32)
    room = np.empty(max(side_words + side_lanes, words + lanes), np.uint16)
    space = room[: side_words + side_lanes]
    if not _open(data, 0, 4 * (side_lanes + lanes), states, space, side_words):
        return _STATE
    period = active + r
    for c in range(active):
        columns[c] = LEVEL_CLASS
    for c in range(r):
        columns[active + c] = classes[mean_levels[c]]
    used = 0
    if period:
        for lane in range(side_lanes):
            columns[period + lane] = columns[lane % period]
        used = decode_lanes(beside, columns[: period + side_lanes], period, lookup, states, space)
    if used != side_words or not _ended(states):
        return _END
    rows, shift = np.empty(active, np.uint32), np.empty(active, np.int64)
    low_columns, low_bits = 0, 0
    for c in range(active + r):
        value: Any = np.int64(beside[c]) - ZERO
        if beside[c] == ESCAPE:
            value, escape_at = _number(data, escape_at)
            escapes -= 1
            if escape_at < 0:
                return _NUMBER
        if c >= active:
            means[c - active] = value
            continue
        value += np.int64(levels[c])
        if value < 0 or value > MAX_LEVEL:
            return _LEVEL
        rows[c] = classes[value]
        shift[c] = shifts[value]
        low_bits += shift[c]
        low_columns += shift[c] > 0
    # Low bits of means, then of values.
    mean_shift = np.empty(r, np.int64)
    mean_bits = 0
    for c in range(r):
        mean_shift[c] = shifts[mean_levels[c]]
        mean_bits += mean_shift[c]
    mean_bytes = (mean_bits + 7) >> 3
    if low_bytes != mean_bytes + ((n * low_bits + 7) >> 3):
        return _LOW
    if mean_bits and _add_low(means, mean_shift, data, low_at):
        return _PADDING
    # Values.
    states = np.empty(lanes, np.uint32)
    space = room[: words + lanes]
    if not _open(data, 4 * side_lanes, low_at - 2 * words, states, space, words):
        return _STATE
    count = n * active
    used = 0
    if count:
        for c in range(active):
            columns[c] = rows[c]
        for lane in range(lanes):
            columns[active + lane] = columns[lane % active]
        used = decode_lanes(
            symbols[:count], columns[: active + lanes], active, lookup, states, space
        )
    if used != words or not _ended(states):
        return _END
    marked = np.empty(n, np.bool_)
    scaled = np.empty(256, np.float32)
    for i in range(256):
        scaled[i] = (np.float32(i) - np.float32(ZERO)) * step
    for t in range(n):
        row, to = _u64(t * active), _u64(t * size)
        if parts == 1:
            marked[t] = _scale(symbols, row, active, step, out, to)
        else:
            marked[t] = _scale_parts(symbols, row, active, scaled, out, to, parts, n * size)
        for h in range(parts):
            for i in range((active - h + parts - 1) // parts, size):
                out[to + _u64(h * n * size + i)] = 0
    whole = np.empty(n * low_columns, np.int64)
    place = np.empty(active, np.int64)
    some_shift = np.empty(low_columns, np.int64)
    k = 0
    for c in range(active):
        place[c] = k
        if shift[c]:
            some_shift[k] = shift[c]
            for t in range(n):
                whole[t * low_columns + k] = np.int64(symbols[t * active + c]) - ZERO
            k += 1
    for t in range(n):
        if not marked[t]:
            continue
        for c in range(active):
            if symbols[t * active + c] == ESCAPE:
                value, escape_at = _number(data, escape_at)
                escapes -= 1
                if escape_at < 0:
                    return _NUMBER
                if shift[c]:
                    whole[t * low_columns + place[c]] = value
                else:
                    out[(c % parts * n + t) * size + c // parts] = np.float32(value) * step
    if escapes or escape_at != data.size:
        return _COUNT
    if low_columns:
        if _add_low(whole, some_shift, data, low_at + mean_bytes):
            return _PADDING
        for c in range(active):
            if shift[c]:
                first = c % parts * n * size + c // parts
                for t in range(n):
                    value = whole[t * low_columns + place[c]]
                    out[first + t * size] = np.float32(value) * step
    return _FINE


def read_chunks(packed: Sequence[Packed]) -> Iterator[Decoded]:
    """See `Kernels`. What it yields is overwritten by the next."""
    classes, shifts, _ = level_tables()
    lookup = symbol_lookup(GAUSSIAN)
    symbols, out = np.empty(0, np.uint8), np.empty(0, np.float32)
    for p in packed:
        count = p.parts * p.n * p.size
        if out.size < count:
            symbols, out = np.empty(count, np.uint8), np.empty(count, np.float32)
        means = np.empty(p.r, np.int64)
        sizes = p.n, p.active, p.parts, p.size, *p.lanes, *p.words, p.low_bytes, p.escapes
        status = _read(
            np.frombuffer(p.body, np.uint8),
            sizes,
            p.levels,
            p.mean_levels,
            classes,
            shifts,
            lookup,
            p.step,
            symbols,
            out,
            means,
        )
        if status:
            raise CorruptDataError(_REASONS[status])
        yield Decoded(out[:count].reshape(p.parts, p.n, p.size), means)
