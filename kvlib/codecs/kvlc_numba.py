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
from kvlib.codecs.coefficients_write_numba import draft_chunk, write_chunks
from kvlib.codecs.kvlc_kernels import Double, Float, Int, Turning, Values
from kvlib.codecs.rans_numba import _compiled, _input, _output

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

_u64 = np.uint64
_HALF, _QUIET = np.uint32(0x7FFF), np.uint32(0x7FC0)
_UNSIGNED, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_BIT, _SIXTEEN = np.uint32(1), np.uint32(16)
_PLAIN, _HALVES, _PAIRS = range(3)  # how channels turn
_THREE: Any = types.UniTuple(types.int64, 3)  # type: ignore[no-untyped-call]
_FOUR: Any = types.UniTuple(types.int64, 4)  # type: ignore[no-untyped-call]
_NONE: Float = np.zeros(1, np.float32)


@njit(nogil=True, error_model="numpy", inline="always")
def _as_float(u: Any, sixteen: bool) -> Any:
    """The number of these bits, of bfloat16 or of float32."""
    word = np.uint32(u)
    return np.uint32(word << _SIXTEEN if sixteen else word).view(np.float32)


@njit(nogil=True, error_model="numpy", inline="always")
def _as_bits(x: Any, sixteen: bool) -> Any:
    """The bits of a number; as bfloat16 ties go to even, and every NaN is the quiet one."""
    u = np.float32(x).view(np.uint32)
    if not sixteen:
        return u
    even = np.uint32(u + _HALF + (u >> _SIXTEEN & _BIT)) >> _SIXTEEN
    return _QUIET if u & _UNSIGNED > _INFINITE else even


@njit(nogil=True, error_model="numpy", inline="always")
def _gather_plain(
    rows: Float, to: Any, source: NDArray[Any], frm: Any, count: int, most: Any, sixteen: bool
) -> Any:
    """Copy channels; whether one is not below `most` in size."""
    wrong = False
    for j in range(count):
        x = _as_float(source[frm + _u64(j)], sixteen)
        wrong |= not abs(x) < most
        rows[to + _u64(j)] = x
    return wrong


@njit(nogil=True, error_model="numpy", inline="always")
def _place_plain(
    target: NDArray[Any],
    to: Any,
    rows: Float,
    frm: Any,
    bias: Float,
    add: Any,
    count: int,
    sixteen: bool,
) -> None:
    """Round rows + bias into the target."""
    for j in range(count):
        i = _u64(j)
        target[to + i] = _as_bits(rows[frm + i] + bias[add + i], sixteen)


def _turned(interleaved: bool) -> tuple[Any, Any]:
    """What copies `half` pairs of channels and turns them, for `gather` and for `place`."""

    def gather(
        rows: Float,
        to: Any,
        source: NDArray[Any],
        frm: Any,
        cos: Float,
        sin: Float,
        angle: Any,
        half: int,
        most: Any,
        sixteen: bool,
    ) -> Any:
        wrong = False
        for j in range(half):
            i = _u64(2 * j if interleaved else j)
            k = i + _u64(1 if interleaved else half)
            a, b = _as_float(source[frm + i], sixteen), _as_float(source[frm + k], sixteen)
            c, s = cos[angle + _u64(j)], sin[angle + _u64(j)]
            wrong |= not abs(a) < most
            wrong |= not abs(b) < most
            rows[to + i] = a * c + b * s
            rows[to + k] = b * c - a * s
        return wrong

    def place(
        target: NDArray[Any],
        to: Any,
        rows: Float,
        frm: Any,
        bias: Float,
        add: Any,
        cos: Float,
        sin: Float,
        angle: Any,
        half: int,
        sixteen: bool,
    ) -> None:
        for j in range(half):
            i = _u64(2 * j if interleaved else j)
            k = i + _u64(1 if interleaved else half)
            a, b = rows[frm + i] + bias[add + i], rows[frm + k] + bias[add + k]
            c, s = cos[angle + _u64(j)], sin[angle + _u64(j)]
            target[to + i] = _as_bits(a * c - b * s, sixteen)
            target[to + k] = _as_bits(b * c + a * s, sixteen)

    compiled = njit(nogil=True, error_model="numpy", inline="always")
    return compiled(gather), compiled(place)


_gather_halves, _place_halves = _turned(interleaved=False)
_gather_pairs, _place_pairs = _turned(interleaved=True)


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
        most: Any,
    ) -> int:
        heads, size, head_stride, stride = shape
        kind, before, half = how
        if kind == _PLAIN:
            before = size
        after = size - before - 2 * half
        wrong = False
        for h in range(heads):
            for t in range(index.size):
                angle = _u64(t * half)
                frm = _u64(index[t] * stride + h * head_stride)
                to = _u64(t * width + first + h * size)
                if before:
                    wrong |= _gather_plain(rows, to, source, frm, before, most, sixteen)
                if kind == _PLAIN:
                    continue
                frm, to = frm + _u64(before), to + _u64(before)
                if kind == _HALVES:
                    wrong |= _gather_halves(
                        rows, to, source, frm, cos, sin, angle, half, most, sixteen
                    )
                else:
                    wrong |= _gather_pairs(
                        rows, to, source, frm, cos, sin, angle, half, most, sixteen
                    )
                if after:
                    frm, to = frm + _u64(2 * half), to + _u64(2 * half)
                    wrong |= _gather_plain(rows, to, source, frm, after, most, sixteen)
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
        types.float32,
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
        kind, before, half = how
        if kind == _PLAIN:
            before = size
        after = size - before - 2 * half
        for h in range(heads):
            for t in range(index.size):
                angle = _u64(t * half)
                add = _u64(first + h * size)
                frm = _u64(t * width) + add
                to = _u64(index[t] * stride + h * head_stride)
                if before:
                    _place_plain(target, to, rows, frm, bias, add, before, sixteen)
                if kind == _PLAIN:
                    continue
                add, frm, to = add + _u64(before), frm + _u64(before), to + _u64(before)
                if kind == _HALVES:
                    _place_halves(target, to, rows, frm, bias, add, cos, sin, angle, half, sixteen)
                else:
                    _place_pairs(target, to, rows, frm, bias, add, cos, sin, angle, half, sixteen)
                if after:
                    at = _u64(2 * half)
                    _place_plain(target, to + at, rows, frm + at, bias, add + at, after, sixteen)
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
    if x.requires_grad:
        x = x.detach()
    if not x.is_contiguous():
        x = x.as_strided(((heads - 1) * head_stride + (entries - 1) * stride + size,), (1,))
    flat = x.view(_BITS[x.dtype]).numpy().reshape(-1)
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
    first, wrong = 0, 0
    for x in parts:
        if x.dtype not in _gathers:
            x = x.to(torch.float32)
        if x.stride(-1) != 1:
            x = x.contiguous()
        source, shape = _flat(x)
        wrong |= _gathers[x.dtype](
            rows.reshape(-1), first, width, source, index, shape, cos, sin, how, limit
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
