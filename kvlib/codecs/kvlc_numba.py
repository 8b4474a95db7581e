# SPDX-License-Identifier: Apache-2.0
"""The inner loops of `kvlc` compiled by numba; see `kvlib.codecs.kvlc_kernels.Kernels`.

The innermost loops go over the channels of a row, read and write consecutive numbers, and branch on
nothing, so that the compiler makes vector instructions of them. Numbers are float32 wherever
NumPy's are, in the same order of operations, and products are not fused with sums: no bit differs.

Tensors come as one-dimensional views of the memory that they span, and strides. As in
`kvlib.codecs.rans_numba` indices are unsigned.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numpy.typing import NDArray
from torch import Tensor

from kvlib.codecs import kvlc_numpy
from kvlib.codecs.coefficients_numba import read_chunks
from kvlib.codecs.kvlc_kernels import Bytes, Double, Float, Int, Turning, Values
from kvlib.codecs.rans_numba import _compiled, _input, _output

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

_u64 = np.uint64
_ONE = np.uint64(1)
_HALF, _QUIET = np.uint32(0x7FFF), np.uint32(0x7FC0)
_UNSIGNED, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_BIT, _SIXTEEN = np.uint32(1), np.uint32(16)
_PLAIN, _HALVES, _PAIRS = range(3)  # how channels turn
_THREE: Any = types.UniTuple(types.int64, 3)  # type: ignore[no-untyped-call]
_FOUR: Any = types.UniTuple(types.int64, 4)  # type: ignore[no-untyped-call]
_NONE: Float = np.zeros(1, np.float32)


@njit(nogil=True, error_model="numpy")
def _turn(
    x: Float, y: Float, at: int, cos: Float, sin: Float, row: int, first: int, half: int, pairs: int
) -> None:
    """Turn the channels x of one head into y[at:], by the angles from `row` on."""
    to, frm = _u64(at), _u64(first)
    angle = _u64(row)
    for j in range(first):
        y[to + _u64(j)] = x[_u64(j)]
    for j in range(first + half + half, x.size):
        y[to + _u64(j)] = x[_u64(j)]
    to += frm
    if pairs:
        for j in range(half):
            k = _u64(j) + _u64(j)
            c, s = cos[angle + _u64(j)], sin[angle + _u64(j)]
            a, b = x[frm + k], x[frm + k + _ONE]
            y[to + k] = a * c - b * s
            y[to + k + _ONE] = b * c + a * s
        return
    other = frm + _u64(half)
    for j in range(half):
        i = _u64(j)
        y[to + i] = x[frm + i] * cos[angle + i] - x[other + i] * sin[angle + i]
    to += _u64(half)
    for j in range(half):
        i = _u64(j)
        y[to + i] = x[other + i] * cos[angle + i] + x[frm + i] * sin[angle + i]


def _gather_kernel(bits: int) -> Any:
    """`gather` of one part, from the bits of bfloat16 or of float32."""
    sixteen = bits == 16

    def kernel(
        rows: Float,
        first: int,
        width: int,
        source: NDArray[Any],
        index: Int,
        shape: tuple[int, int, int, int],
        cos: Float,
        sin: Float,
        how: tuple[int, int, int],
        limit: Any,
    ) -> int:
        heads, size, head_stride, stride = shape
        kind, channel, half = how
        number = np.empty(size, np.float32)
        pattern = number.view(np.uint32)
        wrong = np.uint32(0)
        for t in range(index.size):
            for h in range(heads):
                place = _u64(index[t] * stride + h * head_stride)
                to = t * width + first + h * size
                for j in range(size):
                    u = np.uint32(source[place + _u64(j)])
                    if sixteen:
                        u = u << _SIXTEEN
                    wrong |= np.uint32(u & _UNSIGNED >= limit)  # sizes are ordered like their bits
                    pattern[_u64(j)] = u
                if kind:
                    _turn(number, rows, to, cos, sin, t * half, channel, half, kind == _PAIRS)
                else:
                    for j in range(size):
                        rows[_u64(to) + _u64(j)] = number[_u64(j)]
        return int(wrong)

    item = types.uint16 if sixteen else types.uint32
    kernel.__qualname__ = f"_gather{bits}"
    return _compiled(
        _output(types.float32),
        types.int64,
        types.int64,
        _input(item),
        _input(types.int64),
        _FOUR,
        _input(types.float32),
        _input(types.float32),
        _THREE,
        types.uint32,
    )(kernel)


def _place_kernel(bits: int) -> Any:
    """`place` of one part, as the bits of bfloat16 or of float32."""
    sixteen = bits == 16

    def kernel(
        target: NDArray[Any],
        index: Int,
        shape: tuple[int, int, int, int],
        rows: Float,
        first: int,
        width: int,
        bias: Float,
        cos: Float,
        sin: Float,
        how: tuple[int, int, int],
    ) -> int:
        heads, size, head_stride, stride = shape
        kind, channel, half = how
        number, turned = np.empty(size, np.float32), np.empty(size, np.float32)
        pattern = (turned if kind else number).view(np.uint32)
        for t in range(index.size):
            for h in range(heads):
                add = _u64(first + h * size)
                frm = _u64(t * width) + add
                place = _u64(index[t] * stride + h * head_stride)
                for j in range(size):
                    number[_u64(j)] = rows[frm + _u64(j)] + bias[add + _u64(j)]
                if kind:
                    _turn(number, turned, 0, cos, sin, t * half, channel, half, kind == _PAIRS)
                for j in range(size):
                    u = pattern[_u64(j)]
                    if sixteen:
                        even = np.uint32(u + _HALF + (u >> _SIXTEEN & _BIT)) >> _SIXTEEN
                        u = _QUIET if u & _UNSIGNED > _INFINITE else even
                    target[place + _u64(j)] = u
        return 0

    item = types.uint16 if sixteen else types.uint32
    kernel.__qualname__ = f"_place{bits}"
    return _compiled(
        _output(item),
        _input(types.int64),
        _FOUR,
        _input(types.float32),
        types.int64,
        types.int64,
        _input(types.float32),
        _input(types.float32),
        _input(types.float32),
        _THREE,
    )(kernel)


_gathers = {torch.bfloat16: _gather_kernel(16), torch.float32: _gather_kernel(32)}
_places = {torch.bfloat16: _place_kernel(16), torch.float32: _place_kernel(32)}
_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}


def _flat(x: Tensor) -> tuple[NDArray[Any], tuple[int, int, int, int]]:
    """The memory from the first number of [heads, T, D] to the last, and how it is laid out."""
    heads, entries, size = x.shape
    head_stride, stride, _ = x.stride()
    span = (heads - 1) * head_stride + (entries - 1) * stride + size
    flat = x.detach().as_strided((span,), (1,)).view(_BITS[x.dtype]).numpy()
    return flat, (heads, size, head_stride, stride)


def _how(turning: Turning | None) -> tuple[Float, Float, tuple[int, int, int]]:
    if turning is None:
        return _NONE, _NONE, (_PLAIN, 0, 0)
    (cos, sin), rope = turning
    kind = _PAIRS if rope.interleaved else _HALVES
    return cos.reshape(-1), sin.reshape(-1), (kind, rope.first_channel, rope.rotary_dim // 2)


def gather(
    parts: Sequence[Tensor], index: Int, turning: Turning | None, limit: float
) -> tuple[Float, bool]:
    """See `Kernels`."""
    width = sum(x.shape[0] * x.shape[2] for x in parts)
    rows = np.empty((index.size, width), np.float32)
    if not rows.size:
        return rows, True
    cos, sin, how = _how(turning)
    if turning is not None:
        sin = -sin
    bits = np.float32(limit).view(np.uint32)
    first, wrong = 0, 0
    for x in parts:
        if x.dtype not in _gathers:
            x = x.to(torch.float32)
        if x.stride(-1) != 1:
            x = x.contiguous()
        source, shape = _flat(x)
        wrong |= _gathers[x.dtype](
            rows.reshape(-1), first, width, source, index, shape, cos, sin, how, bits
        )
        first += x.shape[0] * x.shape[2]
    return rows, not wrong


def place(
    parts: Sequence[Tensor], index: Int, rows: Float, bias: Float, turning: Turning | None
) -> None:
    """See `Kernels`."""
    if parts[0].dtype not in _places:
        kvlc_numpy.place(parts, index, rows, bias, turning)
        return
    cos, sin, how = _how(turning)
    first = 0
    for x in parts:
        target, shape = _flat(x)
        _places[x.dtype](
            target, index, shape, rows.reshape(-1), first, rows.shape[1], bias, cos, sin, how
        )
        first += x.shape[0] * x.shape[2]


@_compiled(_input(types.float32), types.int64, _output(types.float64))
def _sums(rows: Float, width: int, out: Double) -> int:
    for t in range(rows.size // width):
        at = _u64(t * width)
        for c in range(width):
            out[_u64(c)] += rows[at + _u64(c)]
    return 0


def sums(rows: Float) -> Double:
    """See `Kernels`."""
    out = np.zeros(rows.shape[1])
    _sums(rows.reshape(-1), rows.shape[1], out)
    return out


@_compiled(_input(types.float32), _input(types.float64), _output(types.float64))
def _squares(rows: Float, mean: Double, out: Double) -> int:
    for t in range(rows.size // mean.size):
        at = _u64(t * mean.size)
        for c in range(mean.size):
            difference = rows[at + _u64(c)] - mean[_u64(c)]
            out[_u64(c)] += difference * difference
    return 0


def squares(rows: Float, mean: Double) -> Double:
    """See `Kernels`."""
    out = np.zeros(rows.shape[1])
    _squares(rows.reshape(-1), mean, out)
    return out


@_compiled(
    _input(types.float32),
    _input(types.float32),
    types.float32,
    types.float32,
    _output(types.int32),
    _output(types.int64),
    _output(types.int64),
)
def _quantize(
    rows: Float, mean: Float, scale: Any, most: Any, values: Values, total: Int, square: Int
) -> int:
    beyond = np.int32(0)
    for t in range(rows.size // mean.size):
        at = _u64(t * mean.size)
        for c in range(mean.size):
            i = _u64(c)
            x = (rows[at + i] - mean[i]) * scale
            beyond |= np.int32(not abs(x) < most)
            v = np.int32(np.rint(x))
            values[at + i] = v
            total[i] += np.int64(v)
            square[i] += np.int64(v) * np.int64(v)
    return int(beyond)


def quantize(
    rows: Float, mean: Float, scale: np.float32, most: float
) -> tuple[Values, Int, Int] | None:
    """See `Kernels`."""
    values = np.empty(rows.shape, np.int32)
    total, square = np.zeros((2, rows.shape[1]), np.int64)
    if _quantize(rows.reshape(-1), mean, scale, most, values.reshape(-1), total, square):
        return None
    return values, total, square


@_compiled(
    _input(types.int32),
    types.int64,
    _input(types.int32),
    _input(types.int32),
    types.int32,
    types.uint8,
    _output(types.uint8),
)
def _symbols(
    values: Values, width: int, shift: Values, radius: Values, zero: Any, escape: Any, out: Bytes
) -> int:
    active = shift.size
    for t in range(out.size // active):
        frm, to = _u64(t * width), _u64(t * active)
        for c in range(active):
            i = _u64(c)
            high = np.int32(values[frm + i] >> shift[i])
            out[to + i] = escape if abs(high) > radius[i] else np.uint8(high + zero)
    return 0


def symbols(
    values: Values, active: int, shift: Bytes, radius: Bytes, zero: int, escape: int
) -> Bytes:
    """See `Kernels`."""
    n, width = values.shape
    out = np.empty((n, active), np.uint8)
    if out.size:
        limits = shift.astype(np.int32), radius.astype(np.int32)
        _symbols(values.reshape(-1), width, *limits, zero, escape, out.reshape(-1))
    return out


@_compiled(
    types.Array(types.int32, 2, "A", readonly=True), _input(types.uint8), _output(types.uint8)
)
def _pack_low(values: Values, shift: Bytes, out: Bytes) -> int:
    at, used, byte = 0, 0, np.int64(0)
    for j in range(shift.max()):
        channels = np.flatnonzero(shift > j)
        for t in range(values.shape[0]):
            for c in channels:
                byte |= (values[t, c] >> j & 1) << used
                used += 1
                if used == 8:
                    out[at] = byte
                    at += 1
                    byte, used = np.int64(0), 0
    if used:
        out[at] = byte
    return 0


def pack_low(values: Values, shift: Bytes) -> Bytes:
    """See `Kernels`."""
    out = np.zeros(-(-len(values) * int(shift.sum(dtype=np.int64)) // 8), np.uint8)
    _pack_low(values, shift, out)
    return out
