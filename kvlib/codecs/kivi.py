# SPDX-License-Identifier: Apache-2.0
"""`kivi`: 2 to 4 bits, keys per channel and values per token (KIVI, ICML 2024).

Keys have channels that are large in all tokens: a scale per token must cover them and leaves the
others few codes. So a scale of keys belongs to one channel, over `group` consecutive tokens of a
head's row; values have no such channels, and one of theirs belongs to `group` channels of one
token. The last group of a row, or of a token, may be shorter. With `residual=R` the last R tokens
of each row are stored as they are.

Of a group are stored a minimum and a step, both float16, and a code per value:

    minimum = float16(min x), rounded down
    step    = float16((max x - minimum) / (2**bits - 1)), rounded up
    code    = round_half_even((x - minimum) / step)
    decoded = minimum + code * step

in float32, where `code * step` is exact: decoding gives the same bits on every machine. The error
is at most step / 2, plus the one rounding to the tensor's dtype.

The authors' kernels quantize when `group` new tokens are there and keep the rest exact meanwhile;
a stored block has all its tokens, so here the last group is simply shorter unless `residual` says
otherwise. Their scale is not rounded outwards. They advise 2 bits for models with as many KV heads
as query heads and 4 for the others, the default here.

A section is stored raw where a value to be quantized is not finite or beyond float16's range or,
in float16, the highest code of a group would decode to infinity.

Section: minima float16, steps float16, codes, exact entries. Minima and steps are [groups, D] for
keys (groups of head 0, then of head 1, ...), [M, groups] for values; codes are M rows of
ceil(D * bits / 8) bytes, the first code in the lowest bits, zeros behind the last; M counts the
quantized entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvlib.codecs.base import raw_view
from kvlib.codecs.container import Buffer, SectionKind
from kvlib.codecs.fixed_rate import (
    FLOAT16_MAX,
    Floats,
    Halves,
    Matrix,
    RowCodec,
    code_bytes,
    expect_size,
    outward,
    pack_codes,
    read_halves,
    round_into,
    split_rows,
    unpack_codes,
)
from kvlib.errors import ConfigError, CorruptDataError

__all__ = ["KiviCodec"]


@dataclass(frozen=True, slots=True)
class _Groups:
    """How a matrix is cut.

    Attributes:
        axis: 0 where groups run over tokens, 1 where they run over channels.
        sizes: of the groups along that axis.
        quantized: entries of each head that are, the first ones of its row.
        sides: numbers of minima (and of steps).
    """

    axis: int
    sizes: tuple[int, ...]
    quantized: tuple[int, ...]
    sides: tuple[int, int]


def _cut(total: int, group: int) -> tuple[int, ...]:
    """Sizes of groups that fill `total`, the last one perhaps shorter."""
    whole, rest = divmod(total, group)
    return (group,) * whole + (rest,) * bool(rest)


def _extremes(x: Floats, axis: int, sizes: Sequence[int]) -> tuple[Floats, Floats]:
    """Least and greatest of each group; NaN where a group has one."""
    longest = max(sizes)
    starts = np.cumsum(sizes) - sizes
    # A shorter group repeats its last member.
    index = starts[:, None] + np.minimum(np.arange(longest), np.array(sizes)[:, None] - 1)
    grouped = torch.from_numpy(np.take(x, index, axis=axis))
    return grouped.amin(axis + 1).numpy(), grouped.amax(axis + 1).numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class KiviCodec(RowCodec):
    """Keys per channel, values per token: bits + 32 / group bits per value.

    Attributes:
        bits: 2, 3 or 4.
        group: tokens (of keys) or channels (of values) that share a minimum and step.
        residual: last tokens of each row that stay exact.
    """

    name: ClassVar[str] = "kivi"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    lossless: ClassVar[bool] = False

    bits: int = 4
    group: int = 32
    residual: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.bits not in (2, 3, 4):
            raise ConfigError(f"kivi:bits is 2, 3 or 4; got {self.bits}")
        if not 2 <= self.group <= 1024:
            raise ConfigError(
                "kivi:group is the number of tokens or channels that share a scale, in 2..1024; "
                f"got {self.group}"
            )
        if not 0 <= self.residual <= 1 << 20:
            raise ConfigError(
                "kivi:residual is the number of last tokens that stay exact, in 0..1048576; got "
                f"{self.residual}"
            )

    def _groups(self, matrix: Matrix) -> _Groups:
        quantized = tuple(max(0, n - self.residual) for n in matrix.lengths)
        if matrix.kind is SectionKind.KEYS:
            sizes = tuple(size for n in quantized for size in _cut(n, self.group))
            return _Groups(0, sizes, quantized, (len(sizes), matrix.width))
        sizes = _cut(matrix.width, self.group)
        return _Groups(1, sizes, quantized, (sum(quantized), len(sizes)))

    def encode_rows(self, matrix: Matrix, x: Tensor) -> list[Buffer] | None:
        """Minima, steps, codes and exact entries; None when the matrix must be stored raw."""
        groups = self._groups(matrix)
        if not sum(groups.quantized):
            return None
        heads = list(x.split(matrix.lengths))
        exact = b""
        if self.residual:
            pairs = list(zip(heads, groups.quantized, strict=True))
            exact = b"".join(raw_view(head[m:]).tobytes() for head, m in pairs)
            x = torch.cat([head[:m] for head, m in pairs])
        values: Floats = x.to(torch.float32).numpy()
        ranges = self._ranges(values, groups, half=x.dtype == torch.float16)
        if ranges is None:
            return None
        minimum, step = ranges
        each = [np.repeat(side.astype(np.float32), groups.sizes, groups.axis) for side in ranges]
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint((values - each[0]) / each[1])
        codes = np.where(each[1] > 0, codes, 0).clip(0, 2**self.bits - 1).astype(np.uint8)
        return [
            minimum.astype("<f2").tobytes(),
            step.astype("<f2").tobytes(),
            pack_codes(codes, self.bits).tobytes(),
            exact,
        ]

    def _ranges(self, x: Floats, groups: _Groups, *, half: bool) -> tuple[Halves, Halves] | None:
        """Minimum and step of each group; None where float16 cannot hold them or what they give."""
        low, high = _extremes(x, groups.axis, groups.sizes)
        if not (low >= -FLOAT16_MAX).all() or not (high <= FLOAT16_MAX).all():  # nor where NaN
            return None
        codes = np.float32(2**self.bits - 1)
        minimum = outward(low, -np.inf)
        floor = minimum.astype(np.float32)
        step = outward((high - floor) / codes, np.inf)
        if half and (floor + step.astype(np.float32) * codes > FLOAT16_MAX).any():
            return None
        return minimum, step

    def decode_rows(self, matrix: Matrix, data: memoryview, out: Sequence[Tensor]) -> None:
        """Minimum + code * step, rounded once to the dtype of `out`; the last entries as stored."""
        groups = self._groups(matrix)
        entries = sum(groups.quantized)
        side = 2 * groups.sides[0] * groups.sides[1]
        end = 2 * side + entries * code_bytes(matrix.width, self.bits)
        row_bytes = matrix.width * out[0].element_size()
        expect_size("kivi", matrix, data, end + (matrix.entries - entries) * row_bytes)
        if not entries:
            raise CorruptDataError("a kivi section that quantizes nothing must be a raw one")
        minimum = read_halves("minimum of kivi", data[:side], negative=True)
        step = read_halves("step of kivi", data[side : 2 * side])
        body = np.frombuffer(data[2 * side : end], np.uint8).reshape(entries, -1)
        rows = unpack_codes(body, matrix.width, self.bits).astype(np.float32)
        rows *= np.repeat(step.reshape(groups.sides), groups.sizes, groups.axis)
        rows += np.repeat(minimum.reshape(groups.sides), groups.sizes, groups.axis)
        parts = split_rows(rows, groups.quantized)
        at = end
        for head, part in zip(out, parts, strict=True):
            round_into(head[: len(part)], part)
            rest = head[len(part) :]
            if rest.numel():
                size = rest.shape[0] * row_bytes
                stored = np.frombuffer(data[at : at + size], np.uint8)
                np.copyto(raw_view(rest), stored.reshape(rest.shape[0], row_bytes))
                at += size
