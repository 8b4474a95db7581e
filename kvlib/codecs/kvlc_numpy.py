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
from kvlib.codecs.coefficients_write_numpy import draft_chunk, write_chunks
from kvlib.codecs.kvlc_kernels import Double, Float, Int, Turning, Values
from kvlib.codecs.rope import turn

__all__ = [
    "draft_chunk",
    "gather",
    "place",
    "quantize",
    "read_chunks",
    "squares",
    "sums",
    "write_chunks",
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


def _selected(x: Tensor, index: Int) -> Tensor:
    run = _run(index)
    return x[:, run] if run is not None else x[:, torch.from_numpy(index)]


def gather(
    parts: Sequence[Tensor], index: Int, turning: Turning | None, limit: float
) -> tuple[Float, bool]:
    """See `Kernels`."""
    width = sum(x.shape[0] * x.shape[2] for x in parts)
    out = np.empty((index.size, width), np.float32)
    if not out.size:
        return out, True
    for x, first, last in _columns(parts):
        heads, _, size = x.shape
        target = out[:, first:last].reshape(-1, heads, size).transpose(1, 0, 2)
        mine = _selected(x, index)
        if turning is None:
            torch.from_numpy(target).copy_(mine)
            continue
        source = mine.to(torch.float32).numpy()
        if not _within(source, limit):
            return out, False
        _turn(source, turning, target, back=True)
    return out, turning is not None or _within(out, limit)


def _within(x: Float, limit: float) -> bool:
    return bool(x.max() < limit) and bool(x.min() > -limit)  # not so if there is a NaN


def _turn(x: Float, turning: Turning, out: Float, *, back: bool) -> None:
    """Rotate x into out, [heads, n, D] of any strides: `turn` with long inner loops."""
    at, rope = turning
    if rope.rotary_dim != x.shape[2]:
        out[:] = x
        turn(out.transpose(1, 0, 2), at, rope, back=back)
        return
    (cos, sin), half = at, rope.rotary_dim // 2
    signed = (sin, -sin) if back else (-sin, sin)
    partner, turned = np.empty((2, *x.shape), np.float32)
    if rope.interleaved:
        _split(partner, half, 2)[:] = _split(x, half, 2)[..., ::-1]
        cosines, sines = cos.repeat(2, axis=1), np.stack(signed, axis=2).reshape(len(sin), -1)
    else:
        _split(partner, 2, half)[:] = _split(x, 2, half)[..., ::-1, :]
        cosines, sines = np.concatenate([cos, cos], axis=1), np.concatenate(signed, axis=1)
    partner *= sines
    np.multiply(x, cosines, out=turned)
    np.add(turned, partner, out=out)


def _split(x: Float, *sizes: int) -> Float:
    return x.reshape(*x.shape[:-1], *sizes)


def place(
    parts: Sequence[Tensor], index: Int, rows: Float, bias: Float, turning: Turning | None
) -> None:
    """See `Kernels`."""
    rows += bias
    run = _run(index)
    for x, first, last in _columns(parts):
        heads, _, size = x.shape
        mine = rows[:, first:last].reshape(-1, heads, size).transpose(1, 0, 2)
        if turning is not None:
            plain, mine = mine, np.empty(mine.shape, np.float32)
            _turn(plain, turning, mine, back=False)
        if run is not None:
            x[:, run].copy_(torch.from_numpy(mine))
        else:
            x[:, torch.from_numpy(index)] = torch.from_numpy(mine).to(x.dtype)


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
