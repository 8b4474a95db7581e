# SPDX-License-Identifier: Apache-2.0
"""How `cachegen` decodes symbols, compiled by numba; see `cachegen_kernels.Kernels`.

Symbols are found by their cumulative frequencies, of which neighbours share a cache line: a small
table says which symbol each 32nd slot has, and from there the search goes up. One step of it is
taken without a branch, more are rare. Where the processor has AVX-512, 16 steps are one comparison,
and the rest of the work is done for 16 lanes at once (`kvlib.codecs.rans_vector`). All else is as
in `kvlib.codecs.rans_numba`, where it says why indices are unsigned.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from kvlib.codecs import rans_vector
from kvlib.codecs.cachegen_kernels import Counts
from kvlib.codecs.rans import LOWEST, WORD_BITS, Bytes, Coded, Stream, Tables, check_end
from kvlib.codecs.rans_numba import _compiled, _input, _output
from kvlib.codecs.rans_tables import PRECISION, TOTAL
from kvlib.codecs.rans_vector import WIDTH, Lanes, Memory, renew, step

__all__ = ["decode", "lookup"]

_u64 = np.uint64
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_PRECISION, _SLOT = np.uint64(PRECISION), np.uint64(TOTAL - 1)
_LOWEST, _WORD_BITS = np.uint64(LOWEST), np.uint64(WORD_BITS)
_HALF = 16  # bits
_UPPER = np.uint32(_HALF)
_START_BITS = 7
_STARTS = 1 << _START_BITS  # slots of a row whose symbols are known
_STEP = np.uint64(TOTAL // _STARTS)
_ROW, _WITHIN = np.uint64(_START_BITS), np.uint64(PRECISION - _START_BITS)

Columns = NDArray[np.uint32]


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
    """See `Kernels`.

    Cumulative frequencies that end with 4096, and behind the last row as many numbers as are
    compared at once; how many in a row; and starts.
    """
    rows, width = len(tables), tables.alphabet + 1
    every = np.zeros(rows * width + WIDTH, np.uint16)
    cumulative = every[: rows * width].reshape(rows, width)
    np.cumsum(tables.frequencies, axis=1, dtype=np.uint16, out=cumulative[:, 1:])
    starts = np.empty(rows << _START_BITS, np.uint8)
    _find_starts(every, width, starts)
    return every, width, starts


@step()
def _search_step(
    builder: Any,
    symbols: Memory,
    at: Any,
    columns: Memory,
    column: Any,
    cumulative: Memory,
    width: Any,
    starts: Memory,
    states: Memory,
    lane: Any,
    edges: Memory,
) -> Any:
    """Store symbols of the lanes from `lane`, and in `edges` where in the row these begin and end.

    What follows a row is compared with too, but never counts: the row ends with more than any slot.

    Returns:
        uint64: not 0 if a symbol may be a higher one.
    """
    row = columns.load(column)
    slot = states.load(lane) & TOTAL - 1
    start = row << _START_BITS | slot >> PRECISION - _START_BITS
    row_begin = row * Lanes.equal(builder, width)
    found = []
    for j in range(WIDTH):
        first = builder.add(row_begin.number(j), starts.number(start.number(j)))
        steps = cumulative.up_to(builder.add(first, first.type(1)), slot.number(j))
        found.append(builder.add(first, steps))
    place = Lanes.of(builder, found)
    symbols.store(at, place - row_begin)
    pair = cumulative.gather(place)
    edges.store(lane, pair)
    return (slot >= pair >> _HALF).bits()


@step()
def _renew_step(_: Any, edges: Memory, states: Memory, lane: Any, words: Memory, place: Any) -> Any:
    """Go on to the next states of the lanes from `lane`; how many words they took, uint64."""
    x, pair = states.load(lane), edges.load(lane)
    low = pair & (1 << _HALF) - 1
    x = ((pair >> _HALF) - low) * (x >> PRECISION) + (x & TOTAL - 1) - low
    return renew(states, lane, x, words, place)


@njit(nogil=True, error_model="numpy")
def _up(cumulative: Counts, i: Any, slot: Any) -> Any:
    """Where in a row the symbol of a slot is, from a place that is not behind it."""
    i += _u64(slot >= _u64(cumulative[i + _ONE]))
    while slot >= _u64(cumulative[i + _ONE]):
        i += _ONE
    return i


def _kernel(vector: bool) -> Any:
    def kernel(
        symbols: Bytes,
        columns: Columns,
        period: int,
        cumulative: Counts,
        width: int,
        starts: Bytes,
        states: NDArray[np.uint32],
        words: NDArray[np.uint16],
    ) -> int:
        """Fill `symbols`; the number of words used. `words` has one more for each lane."""
        lanes = states.size
        end = _u64(words.size - lanes)
        place = column = _ZERO
        stride, whole, entries = _u64(lanes % period), _u64(period), _u64(width)
        edges = np.empty(lanes, np.uint32)
        base = 0
        while base < symbols.size and place <= end:
            at = _u64(base)
            here = min(lanes, symbols.size - base)
            if vector and here >= WIDTH and here == lanes:
                for j in range(0, lanes, WIDTH):
                    lane = _u64(j)
                    if _search_step(
                        symbols,
                        at + lane,
                        columns,
                        column + lane,
                        cumulative,
                        entries,
                        starts,
                        states,
                        lane,
                        edges,
                    ):
                        for k in range(lane, lane + _u64(WIDTH)):
                            begin = _u64(columns[column + k]) * entries
                            i = begin + _u64(symbols[at + k])
                            i = _up(cumulative, i, _u64(states[k]) & _SLOT)
                            symbols[at + k] = i - begin
                            edges[k] = cumulative[i] | np.uint32(cumulative[i + _ONE]) << _UPPER
                    place += _renew_step(edges, states, lane, words, place)
            else:
                for j in range(here):
                    lane = _u64(j)
                    x = _u64(states[lane])
                    row = _u64(columns[column + lane])
                    slot = x & _SLOT
                    begin = row * entries
                    start = _u64(starts[row << _ROW | slot >> _WITHIN])
                    i = _up(cumulative, begin + start, slot)
                    symbols[at + lane] = i - begin
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

    kernel.__qualname__ = "_decode_vector" if vector else "_decode_scalar"
    return _compiled(
        _output(types.uint8),
        _input(types.uint32),
        types.int64,
        _input(types.uint16),
        types.int64,
        _input(types.uint8),
        _output(types.uint32),
        _input(types.uint16),
    )(kernel)


@cache
def decoder(vector: bool, /) -> Any:
    """The compiled loop over a stream; see `kvlib.codecs.rans_numba.kernels`."""
    return _kernel(vector)


DECODE = decoder(rans_vector.SUPPORTED)


def decode(streams: Sequence[Stream], coded: Sequence[Coded], lookup: Lookup) -> None:
    """See `Kernels`."""
    for stream, source in zip(streams, coded, strict=True):
        states = source.states.astype(np.uint32)
        words = np.zeros(source.words.size + stream.lanes, np.uint16)
        words[: source.words.size] = source.words
        used = DECODE(stream.symbols, stream.columns, stream.period, *lookup, states, words)
        check_end(stream, source, states, used)
