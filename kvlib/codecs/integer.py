# SPDX-License-Identifier: Apache-2.0
"""`int8` and `int4`: uniform integers, grouped per token and head.

Each token's vector in each head is cut into groups of `group` channels (the last may be shorter).
Of a group are stored a minimum and a step, both float16, and a code per channel:

    minimum = float16(min x), rounded down
    step    = float16((max x - minimum) / (2**bits - 1)), rounded up
    code    = round_half_even((x - minimum) / step)
    decoded = minimum + code * step

Rounding outwards makes the codes cover the group, so the error is at most step / 2, plus the one
rounding to the tensor's dtype. All arithmetic is float32; `code * step` has at most 19 significant
bits and is exact, so decoding gives the same bits on every machine. Groups of a few channels within
one token follow the range of that token and that part of the head; per-channel scales (KIVI) suit
keys better at 4 bits and below, but need many tokens at once.

A matrix with a value that is not finite or beyond float16's range is stored raw and comes back
exactly; so is a float16 matrix with a group whose highest code would decode to infinity.

Section: minima float16 [N, groups], steps float16 [N, groups], codes: one byte each (`int8`), or
two per byte with the earlier channel in the low four bits and a zero in the high bits when a
token's last byte has no second (`int4`).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvlib.codecs.base import MatrixCodec, unsupported_dtype
from kvlib.codecs.container import Buffer
from kvlib.codecs.fixed_rate import outward, round_into
from kvlib.errors import ConfigError, CorruptDataError

__all__ = ["Int4Codec", "Int8Codec"]

_FLOAT16_MAX = np.float32(65504)
# Both codes of a byte, as they lie in memory.
_NIBBLES = np.array([[b & 15, b >> 4] for b in range(256)], np.uint8).view(np.uint16)[:, 0]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class _IntegerCodec(MatrixCodec):
    """The arithmetic shared by both widths."""

    bits: ClassVar[int]
    name: ClassVar[str]
    group: int

    def _groups(self, width: int) -> int:
        return -(-width // self.group)

    def _sizes(self, entries: int, width: int) -> tuple[int, int]:
        """Bytes of the minima (or steps), and of the codes."""
        return entries * self._groups(width) * 2, entries * (
            width if self.bits == 8 else -(-width // 2)
        )

    def encode_matrix(self, x: Tensor) -> list[Buffer] | None:
        """Minima, steps and codes; None when the matrix must be stored raw."""
        if x.dtype not in _DTYPES:
            raise unsupported_dtype(self.name, x, _DTYPES)
        values: _Array = x.to(torch.float32).numpy()
        entries, width = values.shape
        groups, group = self._groups(width), min(self.group, width)
        padded = np.pad(values, ((0, 0), (0, groups * group - width)), mode="edge")
        padded = padded.reshape(entries, groups, group)
        low = padded.min(axis=2, keepdims=True)
        high = padded.max(axis=2, keepdims=True)
        if (
            not (low >= -_FLOAT16_MAX).all() or not (high <= _FLOAT16_MAX).all()
        ):  # false for NaN as well
            return None
        minimum = outward(low, -np.inf)
        span = high - minimum.astype(np.float32)
        step = outward(span / np.float32(2**self.bits - 1), np.inf)
        scale = step.astype(np.float32)
        top = minimum.astype(np.float32) + scale * np.float32(2**self.bits - 1)
        if (
            x.dtype == torch.float16 and (top > _FLOAT16_MAX).any()
        ):  # the largest code would decode to infinity
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint((padded - minimum.astype(np.float32)) / scale)
        codes = np.where(scale > 0, codes, 0).clip(0, 2**self.bits - 1).astype(np.uint8)
        codes = codes.reshape(entries, -1)[:, :width]
        if self.bits == 4:
            codes = np.pad(codes, ((0, 0), (0, width % 2)))
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        return [
            minimum.astype("<f2").tobytes(),
            step.astype("<f2").tobytes(),
            np.ascontiguousarray(codes).tobytes(),
        ]

    def decode_matrix(self, data: memoryview, out: Tensor) -> None:
        """Minimum + code * step, rounded once to the dtype of `out`."""
        if out.dtype not in _DTYPES:
            raise unsupported_dtype(self.name, out, _DTYPES)
        width = out.shape[-1]
        entries = out.numel() // width
        side, body = self._sizes(entries, width)
        if data.nbytes != 2 * side + body:
            raise CorruptDataError(
                f"an {self.name} section of {data.nbytes} bytes; {entries} entries of {width} "
                f"channels in groups of {self.group} need {2 * side + body}"
            )
        groups, group = self._groups(width), min(self.group, width)
        halves = np.frombuffer(data[: 2 * side], "<f2").astype(np.float32)
        if not np.isfinite(halves).all() or bool((halves[entries * groups :] < 0).any()):
            raise CorruptDataError(
                f"an {self.name} section holds a step or minimum that is negative or not finite"
            )
        minimum, step = halves.reshape(2, entries, groups, 1)
        codes = np.frombuffer(data[2 * side :], np.uint8).reshape(entries, -1)
        if self.bits == 4:
            if width % 2 and bool((codes[:, -1] >> 4).any()):
                raise CorruptDataError("the padding of an int4 section is not zero")
            codes = np.take(_NIBBLES, codes).view(np.uint8)[:, :width]
        if width % group:
            codes = np.pad(codes, ((0, 0), (0, groups * group - width)))
        values = np.multiply(codes.reshape(entries, groups, group), step, dtype=np.float32)
        values += minimum
        rows = values.reshape(entries, -1)[:, :width]
        heads = [out] if out.dim() == 2 else list(out)
        at = 0
        for head in heads:
            round_into(head, rows[at : at + len(head)])
            at += len(head)


def _check_group(name: str, group: int) -> None:
    if not 2 <= group <= 1024:
        raise ConfigError(
            f"{name}:group is the number of channels that share a scale, in 2..1024; got {group}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Codec(_IntegerCodec):
    """8-bit codes: 8 + 32 / group bits per value.

    Attributes:
        group: channels that share a minimum and step.
    """

    name: ClassVar[str] = "int8"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    lossless: ClassVar[bool] = False
    bits: ClassVar[int] = 8

    group: int = 64

    def __post_init__(self) -> None:
        """Check the group."""
        _check_group(self.name, self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Codec(_IntegerCodec):
    """4-bit codes: 4 + 32 / group bits per value.

    Attributes:
        group: channels that share a minimum and step.
    """

    name: ClassVar[str] = "int4"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    lossless: ClassVar[bool] = False
    bits: ClassVar[int] = 4

    group: int = 32

    def __post_init__(self) -> None:
        """Check the group."""
        _check_group(self.name, self.group)
