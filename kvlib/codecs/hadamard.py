# SPDX-License-Identifier: Apache-2.0
"""`hadamard`: random rotation and a fixed codebook, 2 to 4 bits (the TurboQuant family).

A rotation spreads what is large in a few channels over all of them: the coordinates of a rotated
vector of root mean square r are nearly N(0, r**2) whatever the vector was, so one codebook, the
Lloyd-Max quantizer of N(0, 1), suits all vectors. Of each entry of each head are stored a gain and
a code per coordinate:

    z       = rotate(x) / rms(x)
    code    = the nearest level to each z
    gain    = float16(norm(x) / norm(levels[code])), or float16(rms(x)) with `correct=false`
    decoded = gain * rotate_back(levels[code])

With `correct` the decoded vector has the norm of x (vLLM's and LMCache's "nc"): the nearest levels
alone shrink it, by 0.5 % at 4 bits and 6 % at 2. A reader does not see the difference.

**Rotation.** The channels are put in an order, given signs, cut into pieces whose widths are powers
of two (the binary digits of D, largest first: 80 = 64 + 16), and each piece goes through a
Walsh-Hadamard transform. Signs and order come from a hash of layer, kind and channel (`_words`);
all heads of a layer's keys (or values) share them. A D that is a power of two keeps its order. For
others the order matters: a piece's coordinates follow the mean square of that piece, and mixed
channels leave every piece about that of the whole. A piece of one channel is not rotated at all.
TurboQuant rotates by a random orthogonal matrix and its second stage (QJL of the residual) is left
out, as in the engines that ship it; LMCache quantizes values uniformly and leaves four layers raw.

**Bits.** Decoding is additions of float32 in an order that is written down, and products that each
round once, so every reader gets the same bits. Encoding rounds where the rotated vector lies within
float32's error of a boundary; any choice there decodes.

**Error.** Relative to the norm of x, for vectors whose rotated coordinates are normal: 0.342, 0.185
and 0.097 with 2, 3 and 4 bits (root of the mean square), a little more with `correct`. It is never
more than twice the distance of z to its levels; a coordinate beyond the largest level (1.51, 2.15,
2.73) is clipped, which a vector of very few channels can meet.

A section is stored raw where a value is not finite, a gain leaves float16 or, in float16, the norm
of a decoded vector is beyond its range.

Section: gains float16 [N], codes: N rows of ceil(D * bits / 8) bytes, the first code in the lowest
bits, zeros behind the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvlib.codecs.container import Buffer, SectionKind
from kvlib.codecs.fixed_rate import (
    FLOAT16_MAX,
    Bytes,
    Floats,
    Matrix,
    RowCodec,
    code_bytes,
    expect_size,
    pack_codes,
    read_halves,
    round_into,
    split_rows,
    unpack_codes,
)
from kvlib.errors import ConfigError

__all__ = ["HadamardCodec"]

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
Indices = np.ndarray[tuple[int, ...], np.dtype[np.intp]]

# Non-negative levels of the quantizers of N(0, 1) with least squared error; the others mirror them.
_POSITIVE = {
    2: (0.452780035, 1.510417608),
    3: (0.245094179, 0.756005281, 1.343909279, 2.151945705),
    4: (
        0.128395030,
        0.388048299,
        0.656759119,
        0.942340456,
        1.256231197,
        1.618046386,
        2.069017227,
        2.732589571,
    ),
}
_SQRT_HALF = np.float32(0.70710678118654752)
_CHUNK = 1 << 17  # numbers that are rotated at a time: they stay in a core's cache


def _levels(bits: int) -> Floats:
    """The codebook, ascending."""
    upper = _POSITIVE[bits]
    return np.array([*(-x for x in reversed(upper)), *upper], np.float32)


def _mix(words: Words) -> Words:
    """The finalizer of MurmurHash3 (public domain): a permutation of 32-bit words."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        words = (words ^ words >> np.uint32(shift)) * np.uint32(factor)
    return words


def _words(layer_idx: int, kind: SectionKind, width: int) -> Words:
    """A random word for each channel, from integers only: any language can make the same."""
    start = _mix(np.array([2 * layer_idx + (kind is SectionKind.VALUES)], np.uint32))
    channels: Words = np.arange(width, dtype=np.uint32)
    return _mix(start + channels)


@lru_cache(maxsize=256)
def _scramble(layer_idx: int, kind: SectionKind, width: int) -> tuple[Indices, Floats]:
    """Which channel comes at each place, and with which sign [D, 1]."""
    words = _words(layer_idx, kind, width)
    order = np.arange(width)
    if width & (width - 1):
        order = np.argsort(words, kind="stable")
    signs = np.where(words[order] & 1, np.float32(-1), np.float32(1))
    return order, signs[:, None]


def _transform(x: Floats) -> Floats:
    """Walsh-Hadamard transform, its own inverse, of each piece of the columns of `x` [D, n].

    `x` is overwritten. Columns lie apart so that additions run over whole rows.
    """
    at = 0
    for power in reversed(range(len(x).bit_length())):
        width = 1 << power
        if not len(x) & width:
            continue
        piece = x[at : at + width]
        other = np.empty_like(piece)
        for step in range(power):
            pairs = piece.reshape(-1, 2, 1 << step, x.shape[1])
            sums = other.reshape(pairs.shape)
            np.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
            piece, other = other, piece
        scale = np.float32(2.0 ** -(power // 2)) * (_SQRT_HALF if power % 2 else np.float32(1))
        np.multiply(piece, scale, out=x[at : at + width])
        at += width
    return x


@dataclass(frozen=True, slots=True, kw_only=True)
class HadamardCodec(RowCodec):
    """Rotated vectors in the codebook of a normal distribution: bits + 16 / D bits per value.

    Attributes:
        bits: 2, 3 or 4.
        correct: whether decoded vectors have the norm that went in.
    """

    name: ClassVar[str] = "hadamard"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    lossless: ClassVar[bool] = False

    bits: int = 4
    correct: bool = True

    def __post_init__(self) -> None:
        """Check the bits."""
        if self.bits not in _POSITIVE:
            raise ConfigError(f"hadamard:bits is 2, 3 or 4; got {self.bits}")

    def encode_rows(self, matrix: Matrix, x: Tensor) -> list[Buffer] | None:
        """Gains and codes; None when the matrix must be stored raw."""
        if not bool(torch.isfinite(x).all()):
            return None
        order, signs = _scramble(matrix.layer_idx, matrix.kind, matrix.width)
        levels = _levels(self.bits)
        bounds = (levels[1:] + levels[:-1]) / 2
        squares = levels.astype(np.float64) ** 2
        gains = np.empty(matrix.entries, np.float16)
        codes = np.empty((matrix.entries, matrix.width), np.uint8)
        chunk = max(1, _CHUNK // matrix.width)
        for first in range(0, matrix.entries, chunk):
            part = slice(first, first + chunk)
            rows: Floats = x[part].to(torch.float32).numpy()
            rms = np.sqrt(np.square(rows, dtype=np.float64).mean(axis=1))
            scale = rms.astype(np.float32)[:, None]
            unit = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
            rotated = _transform(unit.T[order] * signs)
            mine: Bytes = np.zeros(rotated.shape, np.uint8)
            for bound in bounds:
                mine += rotated >= bound
            norms = np.sqrt(np.take(squares, mine).sum(axis=0))
            with np.errstate(over="ignore"):
                gain = (rms * np.sqrt(matrix.width) / norms if self.correct else rms).astype("<f2")
            if not np.isfinite(gain).all():
                return None
            if x.dtype == torch.float16 and (gain * norms > FLOAT16_MAX).any():
                return None  # a decoded number could be infinite
            gains[part], codes[part] = gain, mine.T
        return [gains.astype("<f2").tobytes(), pack_codes(codes, self.bits).tobytes()]

    def decode_rows(self, matrix: Matrix, data: memoryview, out: Sequence[Tensor]) -> None:
        """Gain * rotate_back(levels), rounded once to the dtype of `out`."""
        side = 2 * matrix.entries
        size = side + matrix.entries * code_bytes(matrix.width, self.bits)
        expect_size("hadamard", matrix, data, size)
        gains = read_halves("gain of hadamard", data[:side])
        body = np.frombuffer(data[side:], np.uint8).reshape(matrix.entries, -1)
        codes = unpack_codes(body, matrix.width, self.bits)
        order, signs = _scramble(matrix.layer_idx, matrix.kind, matrix.width)
        levels = _levels(self.bits)
        rows: Floats = np.empty(codes.shape, np.float32)
        chunk = max(1, _CHUNK // matrix.width)
        for first in range(0, matrix.entries, chunk):
            part = slice(first, first + chunk)
            rotated = _transform(np.take(levels, codes[part].T))
            rotated *= gains[part]
            rotated *= signs
            rows[part, order] = rotated.T
        for head, mine in zip(out, split_rows(rows, matrix.lengths), strict=True):
            round_into(head, mine)
