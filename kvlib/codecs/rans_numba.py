# SPDX-License-Identifier: Apache-2.0
"""The entropy coder compiled by numba: the extra `fast`.

Lanes are independent, so the processor works on many at once. Where it has AVX-512, whole steps are
coded by vectors of 16 lanes (`kvlib.codecs.rans_vector`), from one table of 16 KiB a row; several
of these overlap, so streams of many lanes are the fastest.

Elsewhere, and for streams of 8 lanes and the last symbols of all others, three things make it
quick. Nothing branches on data: each step stores or reads a word, and the place moves on only if it
was one. The division by a frequency is a multiplication. And decoding looks a symbol up in a table
of bytes before its frequency, so tables take 5 KiB a row and 192 different rows stay in a core's
cache.

All numbers in the kernels are unsigned and of 64 bits: mixed with signed ones, numba would go to
floating point, and for signed indices it tests for negative ones.
"""

from collections.abc import Callable, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from kvlib.codecs import rans_vector
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
from kvlib.codecs.rans_vector import WIDTH, decode_step, encode_step

__all__ = ["LOOKUP", "Lookup", "decode_lanes", "decode_streams", "encode_streams", "lookup"]

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
_WIDTH = WIDTH
_u64 = np.uint64


def _input(item: types.Type) -> types.Type:
    return types.Array(item, 1, "C", readonly=True)


def _output(item: types.Type) -> types.Type:
    return types.Array(item, 1, "C")


@cache
def _stamp() -> str:
    """A digest of all sources in this folder: kernels contain code and constants of each other."""
    mixed = blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        mixed.update(path.read_bytes())
    return mixed.hexdigest()


def _compiled(*arguments: types.Type) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Compile a function for these arguments now, or take it from the cache beside its file.

    numba alone would look at that one file to tell whether what it has is stale.
    """

    def compile_it(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = types.int64(*arguments)
        kernel: Any = njit(nogil=True)(function)
        try:
            kernel.enable_caching()
            kernel._cache._cache_file._source_stamp = _stamp()
            kernel.compile(signature)
        except (OSError, RuntimeError, AttributeError):  # no folder to write to, or another numba
            kernel = njit(nogil=True)(function)
            kernel.compile(signature)
        kernel.disable_compile()
        return cast("Callable[_P, _R]", kernel)

    return compile_it


Lookup = tuple[Bytes, NDArray[np.uint32], NDArray[np.uint32]]
LOOKUP: Any = types.Tuple(  # type: ignore[no-untyped-call]
    [_input(types.uint8), _input(types.uint32), _input(types.uint32)]
)
"""numba's type of a `Lookup`."""


def lookup(tables: Tables) -> Lookup:
    """What symbols are looked up in: `Tables.symbols`, `encoder`, and `decoder` if it is needed."""
    packed = tables.decoder if rans_vector.SUPPORTED else tables.encoder[:0]
    return tables.symbols, tables.encoder, packed


@njit(nogil=True, error_model="numpy")
def _encode_part(
    symbols: Bytes,
    at: Any,
    width: int,
    columns: NDArray[np.uint32],
    column: Any,
    table: NDArray[np.uint32],
    reciprocal: NDArray[np.uint64],
    states: States,
    words: Words,
    place: Any,
) -> tuple[Any, Any]:
    """One step of the first `width` lanes: where the words begin now; 1 if a symbol is absent."""
    absent = _ZERO
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
    return place, absent


@njit(nogil=True, error_model="numpy")
def _decode_part(
    symbols: Bytes,
    at: Any,
    width: int,
    columns: NDArray[np.uint32],
    column: Any,
    lookup: Lookup,
    states: States,
    words: Words,
    place: Any,
) -> Any:
    """One step of the first `width` lanes: the place of the next word."""
    of_slot, of_symbol, _ = lookup
    for j in range(width):
        lane = _u64(j)
        x = _u64(states[lane])
        row = _u64(columns[column + lane])
        slot = x & _SLOT
        symbol = of_slot[row << _PRECISION | slot]
        symbols[at + lane] = symbol
        entry = of_symbol[row * _ALPHABET + symbol]
        x = (entry >> _PRECISION) * (x >> _PRECISION) + slot - (entry & _SLOT)
        refilled = x << _WORD_BITS | words[place]
        low = x < _LOWEST
        states[lane] = refilled if low else x
        place += _u64(low)
    return place


def _encode_kernel(vector: bool) -> Any:
    def kernel(
        symbols: Bytes,
        columns: NDArray[np.uint32],
        period: int,
        table: NDArray[np.uint32],
        reciprocal: NDArray[np.uint64],
        states: States,
        words: Words,
    ) -> int:
        """Fill `words` from its end, one place for each symbol; where they begin, -1 if impossible.

        So in front of a step there is a place for each of its lanes, which is what vectors need.
        """
        lanes = states.size
        place = _u64(words.size)
        absent = _ZERO
        base = symbols.size // lanes * lanes
        width = symbols.size - base
        while base >= 0:
            at, column = _u64(base), _u64(base % period)
            if vector and lanes >= _WIDTH and width == lanes:
                for first in range(lanes - _WIDTH, -1, -_WIDTH):
                    lane = _u64(first)
                    count, gone = encode_step(
                        symbols,
                        at + lane,
                        columns,
                        column + lane,
                        table,
                        states,
                        lane,
                        words,
                        place,
                    )
                    place -= count
                    absent |= gone
            else:
                place, gone = _encode_part(
                    symbols, at, width, columns, column, table, reciprocal, states, words, place
                )
                absent |= gone
            base -= lanes
            width = lanes
        return -1 if absent else int(place)

    kernel.__qualname__ = "_encode_vector" if vector else "_encode_scalar"
    return _compiled(
        _input(types.uint8),
        _input(types.uint32),
        types.int64,
        _input(types.uint32),
        _input(types.uint64),
        _output(types.uint32),
        _output(types.uint16),
    )(kernel)


def _decode_kernel(vector: bool) -> Any:
    def kernel(
        symbols: Bytes,
        columns: NDArray[np.uint32],
        period: int,
        lookup: Lookup,
        states: States,
        words: Words,
    ) -> int:
        """Fill `symbols`; the number of words used.

        `words` ends with one for each lane too many: so no step that begins before these, the last
        that are read, reads behind them, whatever the states are.
        """
        lanes = states.size
        end = _u64(words.size - lanes)
        packed = lookup[2]
        place = _ZERO
        base = 0
        while base < symbols.size and place <= end:
            at, column = _u64(base), _u64(base % period)
            width = min(lanes, symbols.size - base)
            if vector and width >= _WIDTH and width == lanes:
                for first in range(0, lanes, _WIDTH):
                    lane = _u64(first)
                    place += decode_step(
                        symbols,
                        at + lane,
                        columns,
                        column + lane,
                        packed,
                        states,
                        lane,
                        words,
                        place,
                    )
            else:
                place = _decode_part(
                    symbols, at, width, columns, column, lookup, states, words, place
                )
            base += lanes
        return int(place)

    kernel.__qualname__ = "_decode_vector" if vector else "_decode_scalar"
    return _compiled(
        _output(types.uint8),
        _input(types.uint32),
        types.int64,
        LOOKUP,
        _output(types.uint32),
        _input(types.uint16),
    )(kernel)


class Kernels(NamedTuple):
    """The compiled loops over a stream; both ways, with vectors and without, give the same bits."""

    encode: Any
    decode: Any


@cache
def kernels(vector: bool, /) -> Kernels:
    """Compile, or take from the cache; with vectors only where they are `SUPPORTED`."""
    return Kernels(_encode_kernel(vector), _decode_kernel(vector))


KERNELS = kernels(rans_vector.SUPPORTED)
decode_lanes = KERNELS.decode


def encode_streams(streams: Sequence[Stream], tables: Tables) -> list[Coded]:
    """See `kvlib.codecs.rans.Coder`."""
    done = []
    for stream in streams:
        states = np.full(stream.lanes, LOWEST, np.uint32)
        words = np.empty(stream.symbols.size, np.uint16)
        first = KERNELS.encode(
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
    looked_up = lookup(tables)
    for stream, source in zip(streams, coded, strict=True):
        states = source.states.astype(np.uint32)
        words = np.zeros(source.words.size + stream.lanes, np.uint16)
        words[: source.words.size] = source.words
        used = KERNELS.decode(
            stream.symbols, stream.columns, stream.period, looked_up, states, words
        )
        check_end(stream, source, states, used)
