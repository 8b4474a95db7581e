# SPDX-License-Identifier: Apache-2.0
"""Chunks of quantized coefficients as bytes: the payload of `kvlc`. docs/formats/codec.md.

A chunk is an integer matrix [n, r], tokens by channels, and the integer means [r] that were taken
off before. A channel's integers look Laplacian or Gaussian about 0 with a deviation of their own,
so each is coded under one of the 64 fixed tables of `kvlib.codecs.rans_tables`, chosen by its
**level**, a number on a logarithmic scale of deviations:

    level e < 58:   class e, no low bits
    level e >= 58:  class 49 + (e - 58) mod 9, k = 1 + (e - 58) div 9 low bits

Nine classes are almost a factor of 2, and k low bits of an integer, all but random, are stored as
they are: the class is that of `value >> k`. Levels are what the profile expects plus a small
difference, which is coded like a coefficient; so are the means. What a table does not cover is an
escape: the value follows as a zigzag varint.

Channels come in order of importance, and a chunk says how many of them, from the first, have
anything but zeros (**active**); the others cost nothing but their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs import rans
from kvlib.codecs.header import Buffer
from kvlib.codecs.kvlc_kernels import Kernels
from kvlib.codecs.rans_tables import ESCAPE, class_radius, class_sigmas
from kvlib.codecs.varint import decode_varints, encode_varints
from kvlib.errors import CorruptDataError

__all__ = [
    "MAX_LEVEL",
    "U32",
    "Chunk",
    "Cursor",
    "Draft",
    "draft_chunk",
    "levels_of",
    "read_chunks",
    "write_chunks",
]

_PLAIN = 58  # levels without low bits
_FIRST = 49  # class of the first level with them
_PER_BIT = 9  # classes that double the deviation, nearly
_ZERO = 31  # symbol of 0
_LEVEL_CLASS = 43  # differences of levels: a deviation of 2
_HEAD = Struct("<HBBIIIII")  # active, level of all, of all means, words, side words, escapes, low
_FROM_PROFILE = 255
MAX_LEVEL = _FROM_PROFILE - 1  # a deviation of 2^24, the size of the largest values
U32, _U16 = np.dtype("<u4"), np.dtype("<u2")

Int = NDArray[np.int64]
Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """Quantized tokens of one matrix.

    Attributes:
        values: int32 [n, r].
        means: int64 [r].
        total: int64 [r], the sum of each column of the values.
        square: int64 [r], the sum of their squares.
    """

    values: NDArray[np.int32]
    means: Int
    total: Int
    square: Int


@dataclass(frozen=True, eq=False, slots=True)
class Expected:
    """What a profile expects of the channels of a matrix at some step.

    Attributes:
        levels: uint8 [r], of the values.
        mean_levels: uint8 [r], of the means.
    """

    levels: NDArray[np.uint8]
    mean_levels: NDArray[np.uint8]


@cache
def _level_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Class and low bits of each level, and the edges between levels on the scale of deviations."""
    e = np.arange(MAX_LEVEL + 1)
    high = np.maximum(e - _PLAIN, 0)
    classes = np.where(e < _PLAIN, e, _FIRST + high % _PER_BIT)
    shifts = np.where(e < _PLAIN, 0, 1 + high // _PER_BIT)
    sigmas = class_sigmas()[classes] * 2.0**shifts
    edges = np.sqrt(sigmas[1:] * sigmas[:-1])
    return classes.astype(np.uint8), shifts.astype(np.uint8), edges


def levels_of(deviations: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """The nearest level of each standard deviation, given in units of the quantizer's step."""
    return np.searchsorted(_level_tables()[2], deviations).astype(np.uint8)


def classes_of(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The class of each level."""
    return _level_tables()[0][levels]


# -- integers as symbols


@dataclass(slots=True)
class _Coded:
    """Integers as symbols of tables, low bits and escapes."""

    symbols: NDArray[np.uint8]
    rows: NDArray[np.uint8]
    low: bytes
    escapes: Int


_NO_ESCAPES = np.empty(0, np.int64)


@cache
def _radii() -> NDArray[np.uint8]:
    return class_radius().astype(np.uint8)


def _symbols(
    values: NDArray[np.int32], active: int, levels: NDArray[np.uint8], kernel: Kernels
) -> _Coded:
    """The first columns of values [n, r] under levels [active]."""
    classes, shifts, _ = _level_tables()
    rows, shift = classes[levels], shifts[levels]
    symbols = kernel.symbols(values, active, shift, _radii()[rows], _ZERO, ESCAPE)
    low = kernel.pack_low(values[:, :active], shift).tobytes() if shift.any() else b""
    escapes = _NO_ESCAPES
    at = _escapes(symbols)
    if at.size:
        t, c = np.divmod(at, active)
        escapes = values[t, c].astype(np.int64) >> shift[c]
    return _Coded(symbols, rows, low, escapes)


def _escapes(symbols: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Where escapes are, in order."""
    found: NDArray[np.intp] = (symbols.reshape(-1) == ESCAPE).nonzero()[0]
    return found


def _low_bytes(n: int, shift: NDArray[np.uint8]) -> int:
    return -(-n * int(shift.sum(dtype=np.int64)) // 8)


def _add_low(values: Int, shift: NDArray[np.uint8], low: memoryview, kernel: Kernels) -> None:
    """Put low bits back: values [n, r] hold the high parts."""
    packed = np.frombuffer(low, np.uint8)
    kernel.add_low(values, shift, packed)
    used = len(values) * int(shift.sum(dtype=np.int64)) % 8
    if used and packed[-1] >> used:
        raise CorruptDataError("the padding of low bits is not zero")


# -- chunks as bytes


@dataclass(slots=True)
class Draft:
    """A chunk as symbols, before they are coded."""

    active: int
    base: int
    mean_base: int
    side: _Coded
    main: _Coded


def draft_chunk(chunk: Chunk, known: Expected | None, kernel: Kernels) -> Draft:
    """A chunk as symbols. Without expectations it carries one level for all its channels.

    Values and means must be below 2^30 in size, and at most 65535 channels are active.
    """
    used = np.flatnonzero(chunk.square)
    active = int(used[-1]) + 1 if used.size else 0
    n = max(len(chunk.values), 1)
    spread = chunk.square[:active] / n - (chunk.total[:active] / n) ** 2
    levels = levels_of(np.sqrt(np.maximum(spread, 0)))
    if known is None:
        base = _median(levels)
        mean_base = int(levels_of(np.sqrt(np.mean(chunk.means**2.0))))
        around: Any = base
        mean_levels = np.full(chunk.means.size, mean_base, np.uint8)
    else:
        base = mean_base = _FROM_PROFILE
        around = known.levels[:active].astype(np.int64)
        mean_levels = known.mean_levels
    beside = np.concatenate([levels.astype(np.int64) - around, chunk.means], dtype=np.int32)
    beside_levels = np.concatenate([_level_levels(active), mean_levels])
    return Draft(
        active=active,
        base=base,
        mean_base=mean_base,
        side=_symbols(beside[None], beside.size, beside_levels, kernel),
        main=_symbols(chunk.values, active, levels, kernel),
    )


def write_chunks(drafts: Sequence[Draft]) -> list[bytes]:
    """Each chunk as bytes; the more at once, the better."""
    streams = [x for draft in drafts for x in (draft.side, draft.main)]
    coded = rans.encode([x.symbols for x in streams], [x.rows for x in streams], rans.GAUSSIAN)
    out = []
    for i, draft in enumerate(drafts):
        side_coded, main_coded = coded[2 * i : 2 * i + 2]
        side, main = draft.side, draft.main
        number = side.escapes.size + main.escapes.size
        escapes = b""
        if number:
            escapes = encode_varints(np.concatenate([side.escapes, main.escapes]))
        low = side.low + main.low
        head = _HEAD.pack(
            draft.active,
            draft.base,
            draft.mean_base,
            main_coded.words.size,
            side_coded.words.size,
            number,
            len(escapes),
            len(low),
        )
        parts = [
            head,
            *(x.astype("<u4").tobytes() for x in (side_coded.states, main_coded.states)),
            *(x.astype("<u2").tobytes() for x in (side_coded.words, main_coded.words)),
            low,
            escapes,
        ]
        out.append(b"".join(parts))
    return out


@lru_cache(maxsize=64)
def _level_levels(active: int) -> NDArray[np.uint8]:
    """The levels of differences of levels, which are also their classes."""
    return np.full(active, _LEVEL_CLASS, np.uint8)


def _median(levels: NDArray[np.uint8]) -> int:
    """The middle level, or the mean of both, rounded down; 0 of none."""
    if not levels.size:
        return 0
    order = np.sort(levels)
    return (int(order[(levels.size - 1) // 2]) + int(order[levels.size // 2])) // 2


class Cursor:
    """Reads a section from front to back; nothing is taken beyond its end."""

    def __init__(self, data: Buffer) -> None:
        self.view = memoryview(data).cast("B")
        self.at = 0

    def take(self, size: int) -> memoryview:
        """The next bytes.

        Raises:
            CorruptDataError: there are fewer.
        """
        if size > self.view.nbytes - self.at:
            raise CorruptDataError(
                f"{size} bytes claimed of {self.view.nbytes - self.at} left in a section"
            )
        self.at += size
        return self.view[self.at - size : self.at]

    def unpack(self, struct: Struct) -> tuple[Any, ...]:
        """The next fields."""
        return struct.unpack(self.take(struct.size))

    def array(self, dtype: "np.dtype[Any]", count: int) -> NDArray[Any]:
        """The next numbers, a view where the machine is little-endian."""
        x = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return x if dtype.isnative else x.astype(dtype.newbyteorder("="))

    def end(self) -> None:
        """Refuse bytes that are left."""
        if self.at != self.view.nbytes:
            raise CorruptDataError(f"{self.view.nbytes - self.at} bytes follow the last chunk")


@dataclass(slots=True)
class Packed:
    """A chunk's bytes, checked and cut up, before its symbols are decoded.

    Attributes:
        n: tokens.
        r: channels.
        active: channels that are not all zero.
        escapes: bytes of so many numbers.
    """

    n: int
    r: int
    active: int
    levels: NDArray[np.int64]
    mean_levels: NDArray[np.uint8]
    main: rans.Coded
    side: rans.Coded
    low: memoryview
    escapes: memoryview
    num_escapes: int


def parse_chunk(cursor: Cursor, n: int, r: int, expected: Expected | None) -> Packed:
    """Read the frame of a chunk of n tokens and r channels.

    Raises:
        CorruptDataError: sizes that cannot be.
    """
    active, base, mean_base, words, side_words, escapes, escape_bytes, low_bytes = cursor.unpack(
        _HEAD
    )
    if active > r:
        raise CorruptDataError(f"{active} active channels of {r}")
    profiled = expected is not None
    if {base == _FROM_PROFILE, mean_base == _FROM_PROFILE} != {profiled}:
        raise CorruptDataError("a chunk's levels do not come from where they should")
    if expected is not None:
        levels = expected.levels[:active].astype(np.int64)
        mean_levels = expected.mean_levels
    else:
        levels = np.full(active, base, np.int64)
        mean_levels = np.full(r, mean_base, np.uint8)
    states = cursor.array(U32, rans.choose_lanes(active + r))
    main_states = cursor.array(U32, rans.choose_lanes(n * active))
    side = rans.Coded(states, cursor.array(_U16, side_words))
    main = rans.Coded(main_states, cursor.array(_U16, words))
    low = cursor.take(low_bytes)
    packed = cursor.take(escape_bytes)
    if not escapes <= min(len(packed), active + r + n * active):
        raise CorruptDataError(
            f"{escapes} escapes of {len(packed)} bytes in a chunk of {n} x {active}"
        )
    return Packed(n, r, active, levels, mean_levels, main, side, low, packed, escapes)


@dataclass(frozen=True, eq=False, slots=True)
class Decoded:
    """A decoded chunk, in steps.

    Attributes:
        symbols: uint8 [n, active], 31 stands for 0.
        escapes: where symbols stand for something else, in order, and what that is.
        columns: those with low bits, mostly few.
        whole: int64 [n, len(columns)], what stands in those columns.
        means: int64 [r].
    """

    symbols: NDArray[np.uint8]
    escapes: tuple[Int, Int]
    columns: Int
    whole: Int
    means: Int

    def scaled(self, kernel: Kernels, step: np.float32, heads: int = 1) -> list[Float]:
        """Values times the step, float32: matrices [n, ...] of every `heads`-th column each."""
        out = kernel.scale(self.symbols, _ZERO, step, heads)
        at, values = self.escapes
        if at.size:
            t, c = np.divmod(at, self.symbols.shape[1])
            large = values.astype(np.float32) * step
            for h, x in enumerate(out):
                mine = c % heads == h
                x[t[mine], c[mine] // heads] = large[mine]
        if self.columns.size:
            scaled = self.whole.astype(np.float32) * step
            for h, x in enumerate(out):
                mine = self.columns % heads == h
                x[:, self.columns[mine] // heads] = scaled[:, mine]
        return out


def _numbers(packed: Sequence[Packed]) -> list[Int]:
    """The escapes of each chunk, decoded together."""
    last = np.cumsum([p.num_escapes for p in packed], dtype=np.int64)
    if not packed:
        return []
    joined = b"".join([p.escapes for p in packed])
    every = decode_varints(joined, int(last[-1]))
    # A chunk's last byte must end the last of its numbers.
    ends = (np.frombuffer(joined, np.uint8) < 0x80).nonzero()[0]
    edges = np.cumsum([len(p.escapes) for p in packed], dtype=np.int64)
    if (np.concatenate([[0], ends + 1])[last] != edges).any():
        raise CorruptDataError("the escapes of a chunk are not as many as it says")
    return np.split(every, last[:-1])


def read_chunks(packed: Sequence[Packed], kernel: Kernels) -> list[Decoded]:
    """Decode chunks, all at once.

    Raises:
        CorruptDataError: streams that no encoder writes.
    """
    classes, shifts, _ = _level_tables()
    side_rows = [np.concatenate([_level_levels(p.active), classes[p.mean_levels]]) for p in packed]
    sides = rans.decode(
        [p.side for p in packed],
        [(1, p.active + p.r) for p in packed],
        side_rows,
        rans.GAUSSIAN,
    )
    means, levels, rest = [], [], []
    for p, symbols, given in zip(packed, sides, _numbers(packed), strict=True):
        row = symbols[0].astype(np.int64) - _ZERO
        at = _escapes(symbols)
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
        [p.main for p in packed],
        [(p.n, p.active) for p in packed],
        [classes[x] for x in levels],
        rans.GAUSSIAN,
    )
    decoded = []
    for p, symbols, level, mean, escapes in zip(packed, mains, levels, means, rest, strict=True):
        shift, mean_shift = shifts[level], shifts[p.mean_levels]
        mean_low = _low_bytes(1, mean_shift)
        if p.low.nbytes != mean_low + _low_bytes(p.n, shift):
            raise CorruptDataError(f"{p.low.nbytes} bytes of low bits do not fit the levels")
        if mean_low:
            _add_low(mean[None], mean_shift, p.low[:mean_low], kernel)
        at = _escapes(symbols)
        if at.size != escapes.size:
            raise CorruptDataError(f"{escapes.size} escapes are there; the symbols need {at.size}")
        columns = shift.nonzero()[0]
        whole = symbols[:, columns].astype(np.int64, order="C") - _ZERO
        if columns.size:
            if at.size:
                t, c = np.divmod(at, p.active)
                mine = shift[c] > 0
                whole[t[mine], np.searchsorted(columns, c[mine])] = escapes[mine]
            _add_low(whole, shift[columns], p.low[mean_low:], kernel)
        decoded.append(Decoded(symbols, (at, escapes), columns, whole, mean))
    return decoded
