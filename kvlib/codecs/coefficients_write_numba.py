# SPDX-License-Identifier: Apache-2.0
"""Chunks of coefficients as bytes by one compiled call each; see `kvlib.codecs.coefficients`.

The way back is in `kvlib.codecs.coefficients_numba`. Levels, symbols, low bits, escapes and both
streams of a chunk are small steps, each of which costs Python more than the machine.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from kvlib.codecs.coefficients import (
    FROM_PROFILE,
    HEAD,
    LEVEL_CLASS,
    ZERO,
    Bytes,
    Chunk,
    Expected,
    Int,
    level_tables,
    mean_level,
    same,
)
from kvlib.codecs.rans import GAUSSIAN, LOWEST, choose_lanes
from kvlib.codecs.rans_numba import KERNELS, RECIPROCAL, _compiled, _input, _output
from kvlib.codecs.rans_tables import ESCAPE, class_radius
from kvlib.codecs.varint import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvlib.codecs.coefficients_write_numpy import Draft

__all__ = ["draft_chunk", "write_chunks"]

_u64 = np.uint64
_ESCAPE, _ZERO = np.uint8(ESCAPE), np.int32(ZERO)
_lanes: Any = njit(choose_lanes)
_encode = KERNELS.encode


@njit(nogil=True, error_model="numpy")
def _deviation_levels(total: Int, square: Int, n: int, edges: Any, levels: Bytes) -> None:
    """The level of each column's standard deviation: how many edges are below it."""
    count = np.float64(n)
    level = 0
    for c in range(levels.size):
        mean = np.float64(total[c]) / count
        deviation = np.sqrt(max(np.float64(square[c]) / count - mean * mean, 0.0))
        # Neighbours are alike: the search begins where the last one ended.
        while level < edges.size and edges[level] < deviation:
            level += 1
        while level and not edges[level - 1] < deviation:
            level -= 1
        levels[c] = level


@njit(nogil=True, error_model="numpy")
def _median(levels: Bytes) -> int:
    """The middle level, or the mean of both, rounded down; 0 of none."""
    count = np.zeros(256, np.int64)
    for c in range(levels.size):
        count[levels[c]] += 1
    both, below = 0, 0
    for level in range(256):
        for middle in ((levels.size - 1) // 2, levels.size // 2):
            if below <= middle < below + count[level]:
                both += level
        below += count[level]
    return both // 2


@njit(nogil=True, error_model="numpy")
def _symbols(
    values: Any, width: int, shift: Any, radius: Any, symbols: Bytes, escaped: Bytes
) -> int:
    """Fill the symbols [n, active] of values [n, width], say which rows have escapes, and count."""
    active = shift.size
    number = 0
    for t in range(escaped.size):
        frm, to = _u64(t * width), _u64(t * active)
        some = np.uint8(0)
        for c in range(active):
            i = _u64(c)
            high = np.int32(values[frm + i] >> shift[i])
            beyond = abs(high) > radius[i]
            symbols[to + i] = _ESCAPE if beyond else np.uint8(high + _ZERO)
            some |= np.uint8(beyond)
        escaped[t] = some
        if some:
            for c in range(active):
                number += symbols[to + _u64(c)] == _ESCAPE
    return number


@njit(nogil=True, error_model="numpy")
def _put_low(values: Any, width: int, n: int, shift: Any, out: Bytes, at: int) -> int:
    """Append bit j of all values, in order, whose column has more than j low ones; j ascends."""
    planes: Any = 0
    for c in range(shift.size):
        planes = max(planes, shift[c])
    byte: Any = 0
    used = 0
    for j in range(planes):
        channels = np.flatnonzero(shift > j)
        for t in range(n):
            for column in channels:
                byte |= (values[t * width + column] >> j & 1) << used
                used += 1
                if used == 8:
                    out[at] = byte
                    at += 1
                    byte, used = 0, 0
    if used:
        out[at] = byte
        at += 1
    return at


@njit(nogil=True, error_model="numpy")
def _put_escapes(
    values: Any, width: int, shift: Any, symbols: Bytes, escaped: Bytes, out: Bytes, at: int
) -> int:
    """Append what symbols could not say, as varints."""
    active = shift.size
    for t in range(escaped.size):
        if not escaped[t]:
            continue
        for c in range(active):
            if symbols[t * active + c] == _ESCAPE:
                value = np.int64(values[t * width + c] >> shift[c])
                folded = value << 1 ^ value >> 63
                while folded > 0x7F:
                    out[at] = folded & 0x7F | 0x80
                    folded >>= 7
                    at += 1
                out[at] = folded
                at += 1
    return at


@njit(nogil=True, error_model="numpy")
def _put_states(states: Any, out: Bytes, at: int) -> int:
    for lane in range(states.size):
        for byte in range(4):
            out[at + byte] = states[lane] >> np.uint32(8 * byte) & np.uint32(255)
        at += 4
    return at


@njit(nogil=True, error_model="numpy")
def _put_words(words: Any, out: Bytes, at: int) -> int:
    for i in range(words.size):
        k = _u64(at + 2 * i)
        out[k] = words[_u64(i)] & np.uint16(255)
        out[k + _u64(1)] = words[_u64(i)] >> np.uint16(8)
    return at + 2 * int(words.size)


@njit(nogil=True, error_model="numpy")
def _stream(symbols: Bytes, rows: Any, states: Any, words: Any, table: Any, reciprocal: Any) -> int:
    """Code symbols into states and the end of words; where those begin."""
    period = rows.size
    if not symbols.size:
        states[:] = LOWEST
        return int(words.size)
    columns = np.empty(period + states.size, np.uint32)
    for c in range(period):
        columns[c] = rows[c]
    for lane in range(states.size):
        columns[period + lane] = columns[lane % period]
    states[:] = LOWEST
    # Every class has all symbols within its radius, and the escape: none is uncodable.
    return int(_encode(symbols, columns, period, table, reciprocal, states, words))


_BYTES, _ONES, _SUMS = _input(types.uint8), _input(types.int32), _input(types.int64)


@_compiled(
    _ONES,
    types.int64,
    _SUMS,
    _SUMS,
    _SUMS,
    _BYTES,
    _BYTES,
    types.int64,
    _BYTES,
    _BYTES,
    _ONES,
    _input(types.float64),
    _input(types.uint32),
    _input(types.uint64),
    _output(types.int64),
    _output(types.uint8),
)
def _write(
    values: NDArray[np.int32],
    n: int,
    means: Int,
    total: Int,
    square: Int,
    known: Bytes,
    mean_levels: Bytes,
    mean_base: int,
    classes: Bytes,
    shifts: Bytes,
    radii: NDArray[np.int32],
    edges: NDArray[np.float64],
    table: NDArray[np.uint32],
    reciprocal: NDArray[np.uint64],
    head: Int,
    out: Bytes,
) -> int:
    """Fill `head` with the fields of a chunk's, and `out` with what follows it; its size.

    If `out` may be too small, minus the size that suffices. `known` are the expected levels; empty
    if there are none.
    """
    r = means.size
    active = r
    while active and not square[active - 1]:
        active -= 1
    levels = np.empty(active, np.uint8)
    _deviation_levels(total, square, n, edges, levels)
    base = FROM_PROFILE
    if mean_base != FROM_PROFILE:
        base = _median(levels)
    # Levels and means.
    period = active + r
    beside = np.empty(period, np.int32)
    rows, shift = np.empty(period, np.uint8), np.empty(period, np.int32)
    for c in range(active):
        beside[c] = np.int32(levels[c]) - np.int32(base if base != FROM_PROFILE else known[c])
        rows[c], shift[c] = LEVEL_CLASS, 0
    for c in range(r):
        beside[active + c] = means[c]
        rows[active + c] = classes[mean_levels[c]]
        shift[active + c] = shifts[mean_levels[c]]
    radius = np.empty(period, np.int32)
    low_bits = 0
    for c in range(period):
        radius[c] = radii[rows[c]]
        low_bits += shift[c]
    low_bytes = low_bits + 7 >> 3
    symbols, escaped = np.empty(period, np.uint8), np.empty(1, np.uint8)
    escapes = _symbols(beside, period, shift, radius, symbols, escaped)
    states = np.empty(_lanes(period), np.uint32)
    words = np.empty(period, np.uint16)
    side = words[_stream(symbols, rows, states, words, table, reciprocal) :]
    # Values.
    main_rows, main_shift = np.empty(active, np.uint8), np.empty(active, np.int32)
    main_radius = np.empty(active, np.int32)
    low_bits = 0
    for c in range(active):
        main_rows[c], main_shift[c] = classes[levels[c]], shifts[levels[c]]
        main_radius[c] = radii[main_rows[c]]
        low_bits += main_shift[c]
    low_bytes += n * low_bits + 7 >> 3
    main_symbols, main_escaped = np.empty(n * active, np.uint8), np.empty(n, np.uint8)
    escapes += _symbols(values, r, main_shift, main_radius, main_symbols, main_escaped)
    main_states = np.empty(_lanes(n * active), np.uint32)
    main_words = np.empty(n * active, np.uint16)
    first = _stream(main_symbols, main_rows, main_states, main_words, table, reciprocal)
    main = main_words[first:]
    most = 4 * (states.size + main_states.size) + 2 * (side.size + main.size) + low_bytes
    most += MAX_BYTES * escapes
    if most > out.size:
        return -most
    at = _put_states(main_states, out, _put_states(states, out, 0))
    at = _put_words(main, out, _put_words(side, out, at))
    at = _put_low(beside, period, 1, shift, out, at)
    at = _put_low(values, r, n, main_shift, out, at)
    end = _put_escapes(beside, period, shift, symbols, escaped, out, at)
    end = _put_escapes(values, r, main_shift, main_symbols, main_escaped, out, end)
    head[0], head[1], head[2] = active, base, mean_base
    head[3], head[4] = main.size, side.size
    head[5], head[6], head[7] = escapes, end - at, low_bytes
    return end


@cache
def _radii() -> NDArray[np.int32]:
    return class_radius().astype(np.int32)


def draft_chunk(chunk: Chunk, known: Expected | None) -> bytes:
    """See `Kernels`."""
    classes, shifts, edges = level_tables()
    r = chunk.means.size
    mean_base = FROM_PROFILE
    if known is None:
        mean_base = mean_level(chunk.means)
        known = Expected(same(0, 0), same(mean_base, r))
    head = np.empty(8, np.int64)
    room = 2048 + 2 * (r + chunk.values.size)
    while True:
        out = np.empty(room, np.uint8)
        size = _write(
            chunk.values.reshape(-1),
            len(chunk.values),
            chunk.means,
            chunk.total,
            chunk.square,
            known.levels,
            known.mean_levels,
            mean_base,
            classes,
            shifts,
            _radii(),
            edges,
            GAUSSIAN.encoder,
            RECIPROCAL,
            head,
            out,
        )
        if size >= 0:
            return b"".join((HEAD.pack(*head.tolist()), out[:size].data))
        room = -size


def write_chunks(drafts: "Sequence[Draft | bytes]") -> list[bytes]:
    """See `Kernels`; they are already."""
    return cast("list[bytes]", list(drafts))
