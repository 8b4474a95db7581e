# SPDX-License-Identifier: Apache-2.0
"""The entropy coder: interleaved rANS, 12-bit probabilities, 16-bit words. docs/formats/codec.md.

A stream is a matrix of symbols [n, C], coded row after row with one row of `Tables` for each
column. Symbol i belongs to lane i mod N. Each lane has a state x in [2^15, 2^31); all lanes share
one sequence of words, in the order in which the decoder wants them.

    encode, from the last symbol to the first, with frequency f and cumulative c of the symbol:
        if x >= f * 2^19: put x mod 2^16 in front of the words; x = x div 2^16
        x = (x div f) * 2^12 + x mod f + c
    decode, from the first symbol to the last:
        slot = x mod 2^12; the symbol is the one with c <= slot < c + f
        x = f * (x div 2^12) + slot - c
        if x < 2^15: x = x * 2^16 + next word

Lanes begin the encoding at 2^15, so decoding must end there, with all words used: whatever a
decoder accepts is what an encoder writes for those symbols, bit for bit, and most damage is found.

Three coders write and read the same bits: this module's is NumPy (`kvlib.codecs.rans_numba` is
compiled, `kvlib.codecs.rans_torch` runs on any device). NumPy takes one step of all lanes of all
streams at a time, so it wants many streams per call. The compiled kernels release the GIL: call
`encode` and `decode` from several threads to use more cores.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs.rans_tables import MAX_ALPHABET, PRECISION, Tables, gaussian_tables
from kvlib.errors import ConfigError, CorruptDataError, UnsupportedInputError

__all__ = ["GAUSSIAN", "Coded", "Tables", "backends", "choose_lanes", "decode", "encode"]

LOWEST = 1 << 15
"""The lowest state, and the one that encoders begin with."""
HIGHEST = (1 << 31) - 1
WORD_BITS = 16
FULL_BITS = 31 - PRECISION
"""A state of f << FULL_BITS or more has no room for a symbol of frequency f."""
MIN_LANES, MAX_LANES = 8, 256

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
States = NDArray[np.uint32]

if TYPE_CHECKING:
    GAUSSIAN: Tables
    """`gaussian_tables()`, made when it is first asked for."""
else:

    def __getattr__(name: str) -> Tables:
        if name == "GAUSSIAN":
            return gaussian_tables()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False, slots=True)
class Coded:
    """A coded stream; both arrays are stored little-endian.

    Args:
        states: uint32 [N], where the decoder begins; N is the number of lanes.
        words: uint16 [W], in the order of their use.
    """

    states: States
    words: Words

    @property
    def nbytes(self) -> int:
        """Size when stored."""
        return self.states.nbytes + self.words.nbytes


@dataclass(frozen=True, eq=False, slots=True)
class Stream:
    """A checked stream, as the coders get it.

    Args:
        index: its place among the caller's streams, for messages.
        symbols: contiguous uint8 [n * C], to be read or written; not empty.
        columns: uint32 [C + N], the table row of each column, repeated periodically: a step that
            begins in column k needs columns[k : k + N].
        period: C.
        lanes: N.
    """

    index: int
    symbols: Bytes
    columns: NDArray[np.uint32]
    period: int
    lanes: int


class Coder(Protocol):
    """What a backend's module has."""

    def encode_streams(self, streams: Sequence[Stream], tables: Tables) -> list[Coded]:
        """Encode; UnsupportedInputError for symbols with frequency 0."""
        ...

    def decode_streams(
        self, streams: Sequence[Stream], coded: Sequence[Coded], tables: Tables
    ) -> None:
        """Decode into `Stream.symbols`, then `check_end`.

        States are in their range, and there are no more words than symbols.
        """
        ...


def choose_lanes(count: int) -> int:
    """Lanes for a stream of `count` symbols.

    More are faster to decode on wide machines; each costs 2 to 4 bytes. The result is the largest
    power of two in 8..256 that leaves a lane 768 symbols or more, 8 if none does.
    """
    lanes = MAX_LANES
    while lanes > MIN_LANES and count < lanes * 768:
        lanes //= 2
    return lanes


@cache
def _coder(name: str) -> Coder:
    """The coder of a backend.

    Raises:
        ImportError: its package is not installed, or does not work here.
    """
    return cast("Coder", import_module("kvlib.codecs.rans" + f"_{name}"))


@cache
def backends() -> tuple[str, ...]:
    """The backends that work here, the default one first."""
    try:
        _coder("numba")
    except ImportError:
        return "numpy", "torch"
    return "numba", "numpy", "torch"


def _choose(backend: str | None) -> Coder:
    name = backend or os.environ.get("KVLIB_RANS") or backends()[0]
    if name not in ("numba", "numpy", "torch"):
        raise ConfigError(
            f"unknown rANS backend {name!r} ({'KVLIB_RANS' if backend is None else 'backend'}); "
            "take numba, numpy or torch"
        )
    try:
        return _coder(name)
    except ImportError as exc:
        raise ConfigError(
            f"the rANS backend {name} needs numba ({exc}); install kvlib[fast]"
        ) from exc


def encode(
    symbols: Sequence[Bytes],
    rows: Sequence[NDArray[np.integer[Any]]],
    tables: Tables,
    lanes: Sequence[int] | None = None,
    backend: str | None = None,
) -> list[Coded]:
    """Encode streams; the result does not depend on the backend, nor on which streams go together.

    Args:
        symbols: uint8 [n, C] each.
        rows: for each stream the row of `tables` that each of its columns is coded with, [C].
        tables: the frequencies.
        lanes: of each stream, powers of two in 8..256; None is `choose_lanes` of its size.
        backend: "numba", "numpy" or "torch". None is what the environment variable KVLIB_RANS says,
            else numba where it is installed, else numpy.

    Raises:
        ConfigError: arguments that do not fit together.
        UnsupportedInputError: a symbol whose frequency is 0 in its column's row.
    """
    coder = _choose(backend)
    for x in symbols:
        if x.ndim != 2 or x.dtype != np.uint8:
            raise ConfigError(f"symbols are uint8 [n, C], got {x.dtype} {list(x.shape)}")
    if lanes is None:
        lanes = [choose_lanes(x.size) for x in symbols]
    _check_lengths(len(symbols), rows=rows, lanes=lanes)
    streams = []
    for i, (x, row, n) in enumerate(zip(symbols, rows, lanes, strict=True)):
        if not _valid_lanes(n):
            raise ConfigError(f"lanes are powers of two in {MIN_LANES}..{MAX_LANES}, got {n}")
        _check_rows(row, x.shape[1], tables, ConfigError)
        streams.append(_stream(i, np.ascontiguousarray(x).reshape(-1), row, n))
    done = iter(coder.encode_streams([s for s in streams if s.symbols.size], tables))
    return [next(done) if s.symbols.size else _empty(s.lanes) for s in streams]


def decode(
    coded: Sequence[Coded],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[NDArray[np.integer[Any]]],
    tables: Tables,
    backend: str | None = None,
    out: Sequence[Bytes] | None = None,
) -> list[Bytes]:
    """Decode streams.

    Whatever the words and states are, nothing is read or written elsewhere, the work is that of
    the shapes, and what comes back is what `encode` makes this of.

    Args:
        coded: the streams.
        shapes: (n, C) of each: arrays of that size are made, so check it before.
        rows: see `encode`.
        tables: see `encode`.
        backend: see `encode`.
        out: contiguous uint8 [n, C] arrays to decode into; after an error they hold anything.

    Returns:
        uint8 [n, C] each; `out` where given.

    Raises:
        ConfigError: arguments that do not fit together.
        CorruptDataError: states, words or rows that no encoder writes.
    """
    coder = _choose(backend)
    _check_lengths(len(coded), shapes=shapes, rows=rows, out=coded if out is None else out)
    if out is None:
        out = [np.empty(shape, np.uint8) for shape in shapes]
    streams, given = [], []
    for i, (source, shape, row, x) in enumerate(zip(coded, shapes, rows, out, strict=True)):
        if x.shape != tuple(shape) or x.dtype != np.uint8 or not x.flags.c_contiguous:
            raise ConfigError(
                f"out[{i}] must be contiguous uint8 {list(shape)}, got {x.dtype} {list(x.shape)}"
            )
        _check_rows(row, shape[1], tables, CorruptDataError)
        _check_coded(i, source, x.size)
        if x.size:
            streams.append(_stream(i, x.reshape(-1), row, source.states.size))
            given.append(source)
    coder.decode_streams(streams, given, tables)
    return list(out)


def _empty(lanes: int) -> Coded:
    return Coded(np.full(lanes, LOWEST, np.uint32), np.empty(0, np.uint16))


def _stream(index: int, flat: Bytes, row: NDArray[np.integer[Any]], lanes: int) -> Stream:
    period = row.size
    if period >= lanes:
        columns = np.concatenate((row, row[:lanes]), dtype=np.uint32, casting="unsafe")
    else:
        columns = np.resize(row, period + lanes if period else 0).astype(np.uint32)
    return Stream(index, flat, columns, period, lanes)


def _check_lengths(number: int, **others: Sequence[object]) -> None:
    for name, items in others.items():
        if len(items) != number:
            raise ConfigError(f"{number} streams, but {len(items)} {name}; give one each")


def _check_rows(
    row: NDArray[np.integer[Any]], columns: int, tables: Tables, error: type[Exception]
) -> None:
    if row.shape != (columns,) or row.dtype.kind not in "iu":
        raise ConfigError(
            f"{columns} columns need {columns} whole numbers as rows, got {row.dtype} "
            f"{list(row.shape)}"
        )
    if columns and (row.max() >= len(tables) or (row.dtype.kind == "i" and row.min() < 0)):
        raise error(f"rows must be in 0..{len(tables) - 1}, got {row.min()}..{row.max()}")


def _valid_lanes(lanes: int) -> bool:
    return MIN_LANES <= lanes <= MAX_LANES and not lanes & (lanes - 1)


def _check_coded(index: int, coded: Coded, count: int) -> None:
    """Refuse what can be told before decoding."""
    states, words = coded.states, coded.words
    for name, x, bits in (("states", states, 32), ("words", words, 16)):
        if x.ndim != 1 or x.dtype.kind != "u" or x.itemsize * 8 != bits:
            raise ConfigError(f"{name} are uint{bits} [{name[0]}], got {x.dtype} {list(x.shape)}")
    if not _valid_lanes(states.size):
        raise CorruptDataError(
            f"stream {index} has {states.size} lanes, not a power of two in "
            f"{MIN_LANES}..{MAX_LANES}"
        )
    if (states - LOWEST).max() > HIGHEST - LOWEST:  # those below wrap around
        raise CorruptDataError(f"stream {index}: a state is not in {LOWEST}..{HIGHEST}")
    if words.size > count:
        raise CorruptDataError(f"stream {index} has {words.size} words for {count} symbols")
    if not count and (states != LOWEST).any():
        raise CorruptDataError(f"stream {index}: no symbols, yet a state is not {LOWEST}")


def check_end(stream: Stream, coded: Coded, states: NDArray[np.integer[Any]], used: int) -> None:
    """Refuse a stream whose decoding did not end where the encoding began.

    Raises:
        CorruptDataError: words are left or were too few, or a lane's last state is another one.
    """
    if used != coded.words.size:
        few = "more" if used > coded.words.size else f"{used}"
        raise CorruptDataError(
            f"stream {stream.index} needs {few} words; {coded.words.size} are there"
        )
    if (states != LOWEST).any():
        raise CorruptDataError(f"stream {stream.index}: a lane does not end at {LOWEST}")


def uncodable(streams: Sequence[Stream], tables: Tables) -> UnsupportedInputError:
    """The error for streams of which one has a symbol that its row gives no frequency."""
    for stream in streams:
        columns = np.resize(stream.columns[: stream.period], stream.symbols.size)
        absent = tables.encoder[MAX_ALPHABET * columns + stream.symbols] == 0
        if absent.any():
            break
    i = int(absent.argmax())
    return UnsupportedInputError(
        f"stream {stream.index}: symbol {stream.symbols[i]} in column {i % stream.period} has "
        f"frequency 0 in row {columns[i]}; choose another row for that column, or escape the symbol"
    )
