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

from dataclasses import dataclass
from functools import cache, lru_cache
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs import rans
from kvlib.codecs.header import Buffer
from kvlib.codecs.rans_tables import ESCAPE, class_sigmas
from kvlib.errors import CorruptDataError

__all__ = [
    "MAX_LEVEL",
    "U32",
    "Chunk",
    "Cursor",
    "Expected",
    "levels_of",
    "parse_chunk",
]

_PLAIN = 58  # levels without low bits
_FIRST = 49  # class of the first level with them
_PER_BIT = 9  # classes that double the deviation, nearly
ZERO = 31  # symbol of 0
LEVEL_CLASS = 43  # differences of levels: a deviation of 2
HEAD = Struct("<HBBIIIII")  # active, level of all, of all means, words, side words, escapes, low
FROM_PROFILE = 255
MAX_LEVEL = FROM_PROFILE - 1  # a deviation of 2^24, the size of the largest values
U32, _U16 = np.dtype("<u4"), np.dtype("<u2")

Bytes = NDArray[np.uint8]
Int = NDArray[np.int64]
Float = NDArray[np.float32]


class Chunk(NamedTuple):
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

    levels: Bytes
    mean_levels: Bytes


@cache
def level_tables() -> tuple[Bytes, Bytes, NDArray[np.float64]]:
    """Class and low bits of each level, and the edges between levels on the scale of deviations."""
    e = np.arange(MAX_LEVEL + 1)
    high = np.maximum(e - _PLAIN, 0)
    classes = np.where(e < _PLAIN, e, _FIRST + high % _PER_BIT)
    shifts = np.where(e < _PLAIN, 0, 1 + high // _PER_BIT)
    sigmas = class_sigmas()[classes] * 2.0**shifts
    edges = np.sqrt(sigmas[1:] * sigmas[:-1])
    return classes.astype(np.uint8), shifts.astype(np.uint8), edges


def levels_of(deviations: NDArray[np.floating[Any]]) -> Bytes:
    """The nearest level of each standard deviation, given in units of the quantizer's step."""
    return np.searchsorted(level_tables()[2], deviations).astype(np.uint8)


def mean_level(means: Int) -> int:
    """The level that all means of a chunk are coded under when nothing is known of them."""
    return int(levels_of(np.sqrt(np.mean(means**2.0))))


def find_escapes(symbols: Bytes) -> NDArray[np.intp]:
    """Where escapes are, in order."""
    found: NDArray[np.intp] = (symbols.reshape(-1) == ESCAPE).nonzero()[0]
    return found


# -- reading


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
        at = self._skip(size)
        return self.view[at : at + size]

    def _skip(self, size: int) -> int:
        """Where the next bytes begin."""
        at = self.at
        if size > self.view.nbytes - at:
            raise CorruptDataError(
                f"{size} bytes claimed of {self.view.nbytes - at} left in a section"
            )
        self.at = at + size
        return at

    def unpack(self, struct: Struct) -> tuple[Any, ...]:
        """The next fields."""
        return struct.unpack_from(self.view, self._skip(struct.size))

    def array(self, dtype: "np.dtype[Any]", count: int) -> NDArray[Any]:
        """The next numbers, a view where the machine is little-endian."""
        x = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return x if dtype.isnative else x.astype(dtype.newbyteorder("="))

    def end(self) -> None:
        """Refuse bytes that are left."""
        if self.at != self.view.nbytes:
            raise CorruptDataError(f"{self.view.nbytes - self.at} bytes follow the last chunk")


class Packed(NamedTuple):
    """A chunk's bytes, cut out and checked for their size, before anything of it is decoded.

    Attributes:
        n: tokens.
        r: channels.
        active: channels that are not all zero.
        step: what values are multiplied with.
        parts: matrices to be made, of every `parts`-th channel each.
        size: channels of each of them; those that are not active are 0.
        levels: uint8 [active], what the levels of the values differ from.
        mean_levels: uint8 [r], of the means.
        lanes: of the stream of levels and means, and of the stream of values.
        words: of both.
        low_bytes: of low bits.
        escapes: so many numbers.
        body: the states of both streams, their words, low bits and escapes.
    """

    n: int
    r: int
    active: int
    step: np.float32
    parts: int
    size: int
    levels: Bytes
    mean_levels: Bytes
    lanes: tuple[int, int]
    words: tuple[int, int]
    low_bytes: int
    escapes: int
    body: memoryview


def parse_chunk(
    cursor: Cursor, n: int, r: int, expected: Expected | None, step: np.float32, parts: int
) -> Packed:
    """Cut out a chunk of n tokens and r channels.

    With expectations its matrices have the active channels, else all.

    Raises:
        CorruptDataError: sizes that cannot be.
    """
    active, base, mean_base, words, side_words, escapes, escape_bytes, low_bytes = cursor.unpack(
        HEAD
    )
    if active > r:
        raise CorruptDataError(f"{active} active channels of {r}")
    profiled = expected is not None
    if {base == FROM_PROFILE, mean_base == FROM_PROFILE} != {profiled}:
        raise CorruptDataError("a chunk's levels do not come from where they should")
    if expected is not None:
        levels, mean_levels = expected.levels[:active], expected.mean_levels
    else:
        levels, mean_levels = same(base, active), same(mean_base, r)
    lanes = rans.choose_lanes(active + r), rans.choose_lanes(n * active)
    if side_words > active + r or words > n * active:
        raise CorruptDataError(
            f"{side_words} and {words} words in a chunk of {n} tokens, {active} of {r} channels"
        )
    if not escapes <= min(escape_bytes, active + r + n * active):
        raise CorruptDataError(
            f"{escapes} escapes of {escape_bytes} bytes in a chunk of {n} x {active}"
        )
    body = cursor.take(4 * sum(lanes) + 2 * (side_words + words) + low_bytes + escape_bytes)
    return Packed(
        n=n,
        r=r,
        active=active,
        step=step,
        parts=parts,
        size=-(-(active if profiled else r) // parts),
        levels=levels,
        mean_levels=mean_levels,
        lanes=lanes,
        words=(side_words, words),
        low_bytes=low_bytes,
        escapes=escapes,
        body=body,
    )


@lru_cache(maxsize=64)
def same(level: int, count: int) -> Bytes:
    """That level of so many channels; read-only."""
    out = np.full(count, level, np.uint8)
    out.setflags(write=False)
    return out


class Decoded(NamedTuple):
    """A decoded chunk.

    Attributes:
        rows: float32 [parts, n, size], values times the step, as `Packed` wants them.
        means: int64 [r].
    """

    rows: Float
    means: Int
