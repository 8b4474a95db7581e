# SPDX-License-Identifier: Apache-2.0
"""`fp8`: 8-bit floats with a scale, as engines hold KV (vLLM and SGLang's `kv-cache-dtype fp8`).

    scale   = float16(greatest |x| / top), rounded up;  1 with `scale=none`
    code    = fp8(x / scale), to nearest even, saturating at +-top
    decoded = value(code) * scale

`e4m3` (float8_e4m3fn: 3 bits of mantissa, top 448) is what engines use for KV; `e5m2` (top 57344)
has a bit less of precision and the range of float16. What the greatest is taken over:

- `none`: nothing. The plain cast of an engine without calibrated scales (vLLM's default of 1.0, and
  LMCache's `fp8` serde). Values beyond top saturate, where a plain cast would give NaN.
- `head`: each KV head of the section, the granularity of calibrated per-head scales.
- `token`: each entry of each head; 16 bits more an entry.

Arithmetic is float32. A product of 4 and 11 significant bits is exact there, so decoding gives the
same bits everywhere; it is rounded once to the tensor's dtype. A value's error is at most 2**-4 of
itself for e4m3 (2**-3 for e5m2), for small values 2**-10 of the scale (2**-17), plus that rounding.

A section is stored raw and comes back exactly where a value is not finite, a scale would leave
float16 or, in float16, the top code would decode to infinity.

Section: scales float16 (none, one a head, or one an entry), then a byte a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvlib.codecs.container import Buffer
from kvlib.codecs.fixed_rate import (
    FLOAT16_MAX,
    Floats,
    Halves,
    Matrix,
    RowCodec,
    expect_size,
    outward,
    read_halves,
    round_into,
    split_rows,
)
from kvlib.errors import ConfigError, CorruptDataError

__all__ = ["Fp8Codec"]

_FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
_SCALES = ("none", "head", "token")


def _values(fmt: str) -> Floats:
    """The number of each of the 256 codes; NaN and infinity where it has none."""
    codes = torch.arange(256, dtype=torch.uint8)
    table: Floats = codes.view(_FORMATS[fmt][0]).to(torch.float32).numpy()
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Codec(RowCodec):
    """8-bit floats: 8 bits per value and the scales.

    Attributes:
        format: e4m3 or e5m2.
        scale: none, head or token: what shares a scale.
    """

    name: ClassVar[str] = "fp8"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    lossless: ClassVar[bool] = False

    format: str = "e4m3"
    scale: str = "head"

    def __post_init__(self) -> None:
        """Check both names."""
        for key, value, known in (
            ("format", self.format, tuple(_FORMATS)),
            ("scale", self.scale, _SCALES),
        ):
            if value not in known:
                raise ConfigError(f"fp8:{key} is one of {', '.join(known)}; got {value!r:.80}")

    def _count(self, matrix: Matrix) -> int:
        """How many scales there are."""
        return {"none": 0, "head": len(matrix.lengths), "token": matrix.entries}[self.scale]

    def _each(self, matrix: Matrix, scales: Floats) -> Floats:
        """The scale of each entry, [N, 1]."""
        return (np.repeat(scales, matrix.lengths) if self.scale == "head" else scales)[:, None]

    def encode_rows(self, matrix: Matrix, x: Tensor) -> list[Buffer] | None:
        """Scales and codes; None when the matrix must be stored raw."""
        kind, top = _FORMATS[self.format]
        values: Floats = x.to(torch.float32).numpy()
        greatest = np.abs(values).max(axis=1)  # of each entry
        if not np.isfinite(greatest).all():
            return None
        if self.scale == "none":
            scales: Halves = np.empty(0, np.float16)
        else:
            if self.scale == "head":
                heads = np.split(greatest, np.cumsum(matrix.lengths)[:-1])
                greatest = np.array([head.max(initial=0) for head in heads], np.float32)
            scales = outward(greatest / np.float32(top), np.inf)
            if not np.isfinite(scales).all():
                return None
            wide = scales.astype(np.float32)
            if x.dtype == torch.float16 and (wide * np.float32(top) > FLOAT16_MAX).any():
                return None  # the top code would decode to infinity
            each = self._each(matrix, wide)
            values = np.divide(values, each, out=np.zeros_like(values), where=each > 0)
        codes = torch.from_numpy(values.clip(-top, top)).to(kind).view(torch.uint8).numpy()
        return [scales.astype("<f2").tobytes(), codes.tobytes()]

    def decode_rows(self, matrix: Matrix, data: memoryview, out: Sequence[Tensor]) -> None:
        """value(code) * scale, rounded once to the dtype of `out`."""
        side = 2 * self._count(matrix)
        expect_size("fp8", matrix, data, side + matrix.entries * matrix.width)
        scales = read_halves("scale of fp8", data[:side])
        codes = np.frombuffer(data[side:], np.uint8).reshape(matrix.entries, matrix.width)
        rows = np.take(_values(self.format), codes)
        if not np.isfinite(rows).all():
            raise CorruptDataError("an fp8 section holds a code of no finite number")
        if side:
            rows *= self._each(matrix, scales)
        for head, mine in zip(out, split_rows(rows, matrix.lengths), strict=True):
            round_into(head, mine)
