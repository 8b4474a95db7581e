# SPDX-License-Identifier: Apache-2.0
"""How `cachegen` decodes symbols, compiled by numba; see `cachegen_kernels.Kernels`.

Symbols are found by their cumulative frequencies, of which neighbours share a cache line: a small
table says which symbol each 32nd slot has, and from there the search goes up. One step of it is
taken without a branch, more are rare. The rest is as in `kvlib.codecs.rans_numba`, where it says
why indices are unsigned.
"""

from collections.abc import Sequence

import numpy as np
from numba import types
from numpy.typing import NDArray

from kvlib.codecs.cachegen_kernels import Counts
from kvlib.codecs.rans import LOWEST, WORD_BITS, Bytes, Coded, Stream, Tables, check_end
from kvlib.codecs.rans_numba import _compiled, _input, _output
from kvlib.codecs.rans_tables import PRECISION, TOTAL

__all__ = ["decode", "lookup"]

_u64 = np.uint64
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_PRECISION, _SLOT = np.uint64(PRECISION), np.uint64(TOTAL - 1)
_LOWEST, _WORD_BITS = np.uint64(LOWEST), np.uint64(WORD_BITS)
_START_BITS = 7
_STARTS = 1 << _START_BITS  # slots of a row whose symbols are known
_STEP = np.uint64(TOTAL // _STARTS)
_ROW, _WITHIN = np.uint64(_START_BITS), np.uint64(PRECISION - _START_BITS)


@_compiled(_input(types.uint16), types.int64, _output(types.uint8))
def _find_starts(cumulative: Counts, width: int, starts: Bytes) -> int:
    for row in range(starts.size >> _START_BITS):
        at, to = _u64(row * width), _u64(row) << _ROW
        symbol = _ZERO
        for i in range(_STARTS):
            while _u64(cumulative[at + symbol + _ONE]) <= _u64(i) * _STEP:
                symbol += _ONE
            starts[to + _u64(i)] = symbol
    return 0


Lookup = tuple[Counts, int, Bytes]


def lookup(tables: Tables) -> Lookup:
    """See `Kernels`: cumulative frequencies that end with 4096, how many in a row, and starts."""
    rows, width = len(tables), tables.alphabet + 1
    cumulative = np.zeros((rows, width), np.uint16)
    np.cumsum(tables.frequencies, axis=1, dtype=np.uint16, out=cumulative[:, 1:])
    starts = np.empty(rows << _START_BITS, np.uint8)
    _find_starts(cumulative.reshape(-1), width, starts)
    return cumulative.reshape(-1), width, starts


@_compiled(
    _output(types.uint8),
    _input(types.uint32),
    types.int64,
    _input(types.uint16),
    types.int64,
    _input(types.uint8),
    _output(types.uint32),
    _input(types.uint16),
)
def _decode(
    symbols: Bytes,
    columns: NDArray[np.uint32],
    period: int,
    cumulative: Counts,
    width: int,
    starts: Bytes,
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
) -> int:
    """Fill `symbols`; the number of words used. `words` ends with one for each lane too many."""
    lanes = states.size
    end = _u64(words.size - lanes)
    place = column = _ZERO
    stride, whole = _u64(lanes % period), _u64(period)
    base = 0
    while base < symbols.size and place <= end:
        at = _u64(base)
        for j in range(min(lanes, symbols.size - base)):
            lane = _u64(j)
            x = _u64(states[lane])
            row = _u64(columns[column + lane])
            slot = x & _SLOT
            first = row * _u64(width)
            i = first + _u64(starts[row << _ROW | slot >> _WITHIN])
            i += _u64(slot >= _u64(cumulative[i + _ONE]))
            while slot >= _u64(cumulative[i + _ONE]):
                i += _ONE
            symbols[at + lane] = i - first
            low = _u64(cumulative[i])
            x = (_u64(cumulative[i + _ONE]) - low) * (x >> _PRECISION) + slot - low
            refilled = x << _WORD_BITS | words[place]
            few = x < _LOWEST
            states[lane] = refilled if few else x
            place += _u64(few)
        base += lanes
        column += stride
        if column >= whole:
            column -= whole
    return int(place)


def decode(streams: Sequence[Stream], coded: Sequence[Coded], lookup: Lookup) -> None:
    """See `Kernels`."""
    cumulative, width, starts = lookup
    for stream, source in zip(streams, coded, strict=True):
        states = source.states.astype(np.uint32)
        words = np.zeros(source.words.size + stream.lanes, np.uint16)
        words[: source.words.size] = source.words
        used = _decode(
            stream.symbols, stream.columns, stream.period, cumulative, width, starts, states, words
        )
        check_end(stream, source, states, used)
