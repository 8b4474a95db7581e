# SPDX-License-Identifier: Apache-2.0
"""The inner loops of `kvlc` without a compiler; see `kvlib.codecs.kvlc_kernels.Kernels`.

Matrices of a chunk fit in a core's second cache, so a pass over one costs little more than its
arithmetic. Whoever calls switches the warnings about overflow off: infinities are looked at later.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlib.codecs.coefficients_numpy import read_chunks
from kvlib.codecs.kvlc_kernels import Bytes, Double, Float, Int, Turning, Values
from kvlib.codecs.rope import turn

__all__ = [
    "gather",
    "pack_low",
    "place",
    "quantize",
    "read_chunks",
    "squares",
    "sums",
    "symbols",
]


def _run(index: Int) -> slice | None:
    """The slice that takes the same entries, if there is one."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == index.size else None


def _columns(parts: Sequence[Tensor]) -> Iterator[tuple[Tensor, int, int]]:
    first = 0
    for x in parts:
        last = first + x.shape[0] * x.shape[2]
        yield x, first, last
        first = last


def gather(
    parts: Sequence[Tensor], index: Int, turning: Turning | None, limit: float
) -> tuple[Float, bool]:
    """See `Kernels`."""
    width = sum(x.shape[0] * x.shape[2] for x in parts)
    out = np.empty((index.size, width), np.float32)
    if not out.size:
        return out, True
    run = _run(index)
    rows = torch.from_numpy(out)
    for x, first, last in _columns(parts):
        heads, _, size = x.shape
        mine = x[:, run] if run is not None else x[:, torch.from_numpy(index)]
        rows[:, first:last].view(-1, heads, size).copy_(mine.transpose(0, 1))
    fit = bool(out.max() < limit) and bool(out.min() > -limit)  # not so if there is a NaN
    if fit:
        _turn(parts, out, turning, back=True)
    return out, fit


def _turn(parts: Sequence[Tensor], rows: Float, turning: Turning | None, *, back: bool) -> None:
    if turning is not None:
        at, rope = turning
        for x, first, last in _columns(parts):
            turn(rows[:, first:last].reshape(len(rows), -1, x.shape[2]), at, rope, back=back)


def place(
    parts: Sequence[Tensor], index: Int, rows: Float, bias: Float, turning: Turning | None
) -> None:
    """See `Kernels`."""
    rows += bias
    _turn(parts, rows, turning, back=False)
    run = _run(index)
    every = torch.from_numpy(rows)
    for x, first, last in _columns(parts):
        heads, _, size = x.shape
        mine = every[:, first:last].view(-1, heads, size).transpose(0, 1)
        if run is not None:
            x[:, run].copy_(mine)
        else:
            x[:, torch.from_numpy(index)] = mine.to(x.dtype)


def sums(rows: Float) -> Double:
    """See `Kernels`."""
    return _sum(rows.astype(np.float64))


def _sum(x: Double) -> Double:
    # NumPy adds rows one after another, but the numbers of a single column pairwise.
    out: Double = x.sum(axis=0) if x.shape[1] > 1 else x.cumsum(axis=0)[-1]
    return out


def squares(rows: Float, mean: Double) -> Double:
    """See `Kernels`."""
    difference = rows - mean
    difference *= difference
    return _sum(difference)


def quantize(
    rows: Float, mean: Float, scale: np.float32, most: float
) -> tuple[Values, Int, Int] | None:
    """See `Kernels`."""
    x = rows - mean
    x *= scale
    largest = max(float(x.max()), -float(x.min()))  # NaN if there is one
    if not largest < most:
        return None
    np.rint(x, out=x)
    # Sums of whole numbers are exact, in any order, as long as they are below 2^24 or 2^53.
    bound = (largest + 1) ** 2 * len(x)
    number: type[np.number[Any]] = np.int64
    if bound < 1 << 24:
        number = np.float32
    elif bound < 1 << 53:
        number = np.float64
    exact = x.astype(number, copy=False)
    total = exact.sum(axis=0).astype(np.int64)
    square = np.einsum("nr,nr->r", exact, exact).astype(np.int64)
    return x.astype(np.int32), total, square


def symbols(
    values: Values, active: int, shift: Bytes, radius: Bytes, zero: int, escape: int
) -> Bytes:
    """See `Kernels`."""
    high = values[:, :active]
    if shift.any():
        high = high >> shift.astype(values.dtype)
    largest = radius.astype(values.dtype)
    out: Bytes = (high + np.asarray(zero, values.dtype)).astype(np.uint8)
    beyond = high > largest
    beyond |= high < -largest
    out[beyond] = escape
    return out


def pack_low(values: Values, shift: Bytes) -> Bytes:
    """See `Kernels`."""
    planes = [
        (values[:, shift > j] >> j & 1).astype(np.uint8).ravel() for j in range(int(shift.max()))
    ]
    return np.packbits(np.concatenate(planes), bitorder="little")
