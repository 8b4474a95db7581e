# SPDX-License-Identifier: Apache-2.0
"""The entropy coder compiled by numba: the extra `fast`.

Four things make it quick. Lanes are independent, so the processor works on many at once. Nothing
branches on data: each step stores or reads a word, and the place moves on only if it was one. The
division by a frequency is a multiplication. And decoding looks a symbol up in a table of bytes
before its frequency, so tables take 5 KiB a row and 192 different rows stay in a core's cache.

All numbers in the kernels are unsigned and of 64 bits: mixed with signed ones, numba would go to
floating point, and for signed indices it tests for negative ones.
"""

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, cast

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from kvlib.codecs.rans import (
    FULL_BITS,
    LOWEST,
    WORD_BITS,
    Bytes,
    Coded,
    States,
    Stream,
    Words,
    check_end,
    uncodable,
)
from kvlib.codecs.rans_tables import MAX_ALPHABET, PRECISION, TOTAL, Tables

__all__ = ["decode_lanes", "decode_streams", "encode_streams"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

SHIFT = 2 * PRECISION + FULL_BITS
"""RECIPROCAL[f] is 2^SHIFT / f, rounded up by e / f, e < f. For the x < f * 2^19 that are divided,
x * RECIPROCAL[f] / 2^SHIFT = x / f + x e / (f 2^SHIFT), and the last term is less than
f / 2^24 <= 1 / f: too little to reach the next whole number. The product is less than 2^63."""
RECIPROCAL = np.array(
    [0, *(-(-(1 << SHIFT) // f) for f in range(1, TOTAL + 1))], np.uint64
)  # 0: what absent symbols get before they are refused

_ZERO, _ONE = np.uint64(0), np.uint64(1)
_PRECISION, _SLOT, _TOTAL = np.uint64(PRECISION), np.uint64(TOTAL - 1), np.uint64(TOTAL)
_FULL_BITS, _SHIFT = np.uint64(FULL_BITS), np.uint64(SHIFT)
_LOWEST, _WORD_BITS = np.uint64(LOWEST), np.uint64(WORD_BITS)
_ALPHABET = np.uint64(MAX_ALPHABET)
_u64 = np.uint64


def _input(item: types.Type) -> types.Type:
    return types.Array(item, 1, "C", readonly=True)


def _output(item: types.Type) -> types.Type:
    return types.Array(item, 1, "C")


def _compiled(*arguments: types.Type) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Compile a function for these arguments now, or take it from the cache beside this file."""

    def compile_it(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = types.int64(*arguments)
        try:
            return cast("Callable[_P, _R]", njit(signature, nogil=True, cache=True)(function))
        except (OSError, RuntimeError):  # no folder to write to: compile in every process
            return cast("Callable[_P, _R]", njit(signature, nogil=True)(function))

    return compile_it


@_compiled(
    _input(types.uint8),
    _input(types.uint32),
    types.int64,
    _input(types.uint32),
    _input(types.uint64),
    _output(types.uint32),
    _output(types.uint16),
)
def _encode(
    symbols: Bytes,
    columns: NDArray[np.uint32],
    period: int,
    table: NDArray[np.uint32],
    reciprocal: NDArray[np.uint64],
    states: States,
    words: Words,
) -> int:
    """Fill `words` from its end, one place for each symbol; where they begin, -1 if impossible."""
    lanes = states.size
    place = _u64(words.size)
    absent = _ZERO
    base = symbols.size // lanes * lanes
    width = symbols.size - base
    while base >= 0:
        at, column = _u64(base), _u64(base % period)
        for j in range(width - 1, -1, -1):
            lane = _u64(j)
            entry = table[columns[column + lane] * _ALPHABET + symbols[at + lane]]
            f = entry >> _PRECISION
            absent |= _u64(f == _ZERO)
            x = _u64(states[lane])
            full = _u64(x >= f << _FULL_BITS)
            words[place - _ONE] = x  # its low bits; overwritten by the next unless full
            place -= full
            x >>= full * _WORD_BITS
            quotient = x * reciprocal[f] >> _SHIFT
            states[lane] = x + quotient * (_TOTAL - f) + (entry & _SLOT)
        base -= lanes
        width = lanes
    return -1 if absent else int(place)


@_compiled(
    _output(types.uint8),
    _input(types.uint32),
    types.int64,
    _input(types.uint8),
    _input(types.uint32),
    _output(types.uint32),
    _input(types.uint16),
)
def decode_lanes(
    symbols: Bytes,
    columns: NDArray[np.uint32],
    period: int,
    lookup: Bytes,
    table: NDArray[np.uint32],
    states: States,
    words: Words,
) -> int:
    """Fill `symbols`; the number of words used. `words` ends with one for each lane too many."""
    lanes = states.size
    end = _u64(words.size - lanes)
    place = _ZERO
    base = 0
    while base < symbols.size and place <= end:
        at, column = _u64(base), _u64(base % period)
        for j in range(min(lanes, symbols.size - base)):
            lane = _u64(j)
            x = _u64(states[lane])
            row = _u64(columns[column + lane])
            slot = x & _SLOT
            symbol = lookup[row << _PRECISION | slot]
            symbols[at + lane] = symbol
            entry = table[row * _ALPHABET + symbol]
            x = (entry >> _PRECISION) * (x >> _PRECISION) + slot - (entry & _SLOT)
            refilled = x << _WORD_BITS | words[place]
            low = x < _LOWEST
            states[lane] = refilled if low else x
            place += _u64(low)
        base += lanes
    return int(place)


def encode_streams(streams: Sequence[Stream], tables: Tables) -> list[Coded]:
    """See `kvlib.codecs.rans.Coder`."""
    done = []
    for stream in streams:
        states = np.full(stream.lanes, LOWEST, np.uint32)
        words = np.empty(stream.symbols.size, np.uint16)
        first = _encode(
            stream.symbols,
            stream.columns,
            stream.period,
            tables.encoder,
            RECIPROCAL,
            states,
            words,
        )
        if first < 0:
            raise uncodable([stream], tables)
        done.append(Coded(states, words[first:].copy()))
    return done


def decode_streams(streams: Sequence[Stream], coded: Sequence[Coded], tables: Tables) -> None:
    """See `kvlib.codecs.rans.Coder`."""
    for stream, source in zip(streams, coded, strict=True):
        states = source.states.astype(np.uint32)
        words = np.zeros(source.words.size + stream.lanes, np.uint16)
        words[: source.words.size] = source.words
        used = decode_lanes(
            stream.symbols,
            stream.columns,
            stream.period,
            tables.symbols,
            tables.encoder,
            states,
            words,
        )
        check_end(stream, source, states, used)
