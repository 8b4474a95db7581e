# SPDX-License-Identifier: Apache-2.0
"""The inner loops of `cachegen` compiled by numba; see `cachegen_kernels.Kernels`.

`kvlib.codecs.cachegen_symbols_numba` has those that decode symbols.

Numbers are float32 wherever NumPy's are, in the same order of operations, and products are not
fused with sums: no bit differs. Tensors come as one-dimensional views of the memory that they span,
and strides. As in `kvlib.codecs.rans_numba` indices are unsigned, and sizes were checked by whoever
calls: a kernel does not look again.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numpy.typing import NDArray
from torch import Tensor

from kvlib.codecs.cachegen_kernels import (
    ENTRIES,
    ESCAPE,
    EXACT_INTEGERS,
    GROUP,
    LARGEST,
    PIECE,
    Codes,
    Counts,
    Floats,
    Levels,
    num_anchors,
)
from kvlib.codecs.cachegen_profile import ChannelTables
from kvlib.codecs.cachegen_symbols_numba import decode, lookup
from kvlib.codecs.rans import Bytes
from kvlib.codecs.rans_numba import _compiled, _input, _output
from kvlib.codecs.rans_tables import TOTAL

__all__ = ["decode", "dequantize", "frequencies", "levels", "lookup", "quantize", "restore"]

Shape = tuple[int, int, int, int]
Patterns = NDArray[np.uint32]

_u64 = np.uint64
_ZERO, _ONE, _TOTAL = np.uint64(0), np.uint64(1), np.uint64(TOTAL)
_HALF, _BIT, _SIXTEEN = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
_UNSIGNED = np.uint32(0x7FFFFFFF)
_BIAS, _MOST = np.float32(LARGEST), np.float32(EXACT_INTEGERS)
_INFINITE, _NOTHING, _UNIT = np.float32(np.inf), np.float32(0), np.float32(1)
_ESCAPE, _LAST = np.uint8(ESCAPE), ENTRIES - 1
_SHAPE: Any = types.UniTuple(types.int64, 4)  # type: ignore[no-untyped-call]


@njit(nogil=True, error_model="numpy")
def _ratio(a: Any, b: Any) -> Any:
    """Divide without the test for 0 that Python wants."""
    return a / b


# Tensors

_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}


def _flat(x: Tensor) -> tuple[NDArray[Any], Shape]:
    """The memory from the first number of [H, n, D] to the last, and how it is laid out."""
    heads, n, size = x.shape
    head_stride, stride, _ = x.stride()
    span = (heads - 1) * head_stride + (n - 1) * stride + size
    flat = x.detach().as_strided((span,), (1,)).view(_BITS[x.dtype]).numpy()
    return flat, (heads, size, head_stride, stride)


def _source(x: Tensor) -> tuple[Tensor, np.uint32]:
    """A matrix that kernels read, and the bits of the largest size that may be coded."""
    limit = np.float32(torch.finfo(x.dtype).max / 2).view(np.uint32)
    if x.dtype not in _BITS:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous(), limit


def _target(out: Tensor) -> Tensor:
    """The matrix itself if kernels write its dtype, else one to be rounded into it."""
    return out if out.dtype in _BITS else torch.empty(out.shape)


@njit(nogil=True)
def _read(row: Patterns, source: NDArray[Any], t: int, shape: Shape, sixteen: bool) -> Any:
    """The bits of a token's numbers as float32; the largest of their sizes, as bits as well."""
    heads, size, head_stride, stride = shape
    largest = np.uint32(0)  # sizes are ordered like their bits, NaN above all
    for h in range(heads):
        frm, to = _u64(t * stride + h * head_stride), _u64(h * size)
        for j in range(size):
            u = np.uint32(source[frm + _u64(j)])
            if sixteen:
                u = u << _SIXTEEN
            largest = max(largest, u & _UNSIGNED)
            row[to + _u64(j)] = u
    return largest


@njit(nogil=True)
def _write(target: NDArray[Any], row: Patterns, t: int, shape: Shape, sixteen: bool) -> None:
    """Store a token's numbers, none of which is NaN, rounded to bfloat16 if it has 16 bits."""
    heads, size, head_stride, stride = shape
    for h in range(heads):
        frm, to = _u64(h * size), _u64(t * stride + h * head_stride)
        for j in range(size):
            u = row[frm + _u64(j)]
            if sixteen:
                u = np.uint32(u + _HALF + (u >> _SIXTEEN & _BIT)) >> _SIXTEEN
            target[to + _u64(j)] = u


# The variant paper


def _quantize_kernel(bits: int) -> Any:
    sixteen = bits == 16

    def kernel(
        source: NDArray[Any],
        shape: Shape,
        limit: Any,
        width: Any,
        anchor_low: Floats,
        anchor_high: Floats,
        low: Floats,
        high: Floats,
        peaks: Floats,
        symbols: Bytes,
        escapes: NDArray[np.int32],
    ) -> int:
        """The number of escapes; -1 if a number is too large, or a delta too many bins."""
        channels = low.size
        row, base = np.empty(channels, np.float32), np.empty(channels, np.float32)
        pattern = row.view(np.uint32)
        number = np.zeros(1, np.uint32)
        found = 0
        for t in range(symbols.size // channels):
            largest = _read(pattern, source, t, shape, sixteen)
            if largest > limit:
                return -1
            at = _u64(t * channels)
            outside = np.uint8(0)
            if t % GROUP == 0:
                number[0] = largest
                peak = number.view(np.float32)[0]
                peaks[_u64(t // GROUP)] = peak
                scale = _ratio(peak, _BIAS)
                divisor = scale if scale > _NOTHING else _INFINITE
                for c in range(channels):
                    i = _u64(c)
                    code = np.rint(_ratio(row[i], divisor))
                    code = min(max(code, -_BIAS), _BIAS)
                    base[i] = code * scale
                    row[i] = code
                    far = (code < anchor_low[i]) | (code > anchor_high[i])
                    outside |= np.uint8(far)
                    symbols[at + i] = _ESCAPE if far else np.uint8(np.int32(code + _BIAS))
            else:
                wrong = np.uint8(0)
                for c in range(channels):
                    i = _u64(c)
                    code = np.rint(_ratio(row[i] - base[i], width))
                    wrong |= np.uint8(not abs(code) < _MOST)
                    row[i] = code
                    far = (code < low[i]) | (code > high[i])
                    outside |= np.uint8(far)
                    symbols[at + i] = _ESCAPE if far else np.uint8(np.int32(code + _BIAS))
                if wrong:
                    return -1
            if outside:
                for c in range(channels):
                    if symbols[at + _u64(c)] == _ESCAPE:
                        escapes[_u64(found)] = np.int32(row[_u64(c)])
                        found += 1
        return found

    item = types.uint16 if sixteen else types.uint32
    kernel.__qualname__ = f"_quantize{bits}"
    return _compiled(
        _input(item),
        _SHAPE,
        types.uint32,
        types.float32,
        *[_input(types.float32)] * 4,
        _output(types.float32),
        _output(types.uint8),
        _output(types.int32),
    )(kernel)


def _dequantize_kernel(bits: int) -> Any:
    sixteen = bits == 16

    def kernel(
        target: NDArray[Any],
        shape: Shape,
        width: Any,
        peaks: Floats,
        symbols: Bytes,
        escapes: NDArray[np.int64],
    ) -> int:
        """0; -1 if escapes are not as many as symbols that say so."""
        channels = shape[0] * shape[1]
        row, base = np.empty(channels, np.float32), np.empty(channels, np.float32)
        pattern = row.view(np.uint32)
        found = 0
        for t in range(symbols.size // channels):
            at = _u64(t * channels)
            far = np.uint8(0)
            for c in range(channels):
                symbol = symbols[at + _u64(c)]
                far |= np.uint8(symbol == _ESCAPE)
                row[_u64(c)] = np.float32(symbol) - _BIAS
            if far:
                for c in range(channels):
                    if symbols[at + _u64(c)] == _ESCAPE:
                        if found == escapes.size:
                            return -1
                        row[_u64(c)] = np.float32(escapes[_u64(found)])
                        found += 1
            # Scales, widths and codes are finite: there may be infinities, and no NaN.
            if t % GROUP == 0:
                scale = _ratio(peaks[_u64(t // GROUP)], _BIAS)
                for c in range(channels):
                    base[_u64(c)] = row[_u64(c)] = row[_u64(c)] * scale
            else:
                for c in range(channels):
                    row[_u64(c)] = row[_u64(c)] * width + base[_u64(c)]
            _write(target, pattern, t, shape, sixteen)
        return 0 if found == escapes.size else -1

    item = types.uint16 if sixteen else types.uint32
    kernel.__qualname__ = f"_dequantize{bits}"
    return _compiled(
        _output(item),
        _SHAPE,
        types.float32,
        _input(types.float32),
        _input(types.uint8),
        _input(types.int64),
    )(kernel)


_quantize = {torch.bfloat16: _quantize_kernel(16), torch.float32: _quantize_kernel(32)}
_dequantize = {torch.bfloat16: _dequantize_kernel(16), torch.float32: _dequantize_kernel(32)}


def quantize(x: Tensor, tables: ChannelTables) -> Codes | None:
    """See `Kernels`."""
    x, limit = _source(x)
    source, shape = _flat(x)
    n, channels = x.shape[1], shape[0] * shape[1]
    peaks = np.empty(num_anchors(n), np.float32)
    symbols = np.empty((n, channels), np.uint8)
    escapes = np.empty(symbols.size, np.int32)
    edges = tables.low[0], tables.high[0], tables.low[1], tables.high[1]
    found = _quantize[x.dtype](
        source, shape, limit, tables.width, *edges, peaks, symbols.reshape(-1), escapes
    )
    return None if found < 0 else Codes(peaks, symbols, escapes[:found].astype(np.int64))


def dequantize(codes: Codes, width: np.float32, out: Tensor) -> bool:
    """See `Kernels`."""
    x = _target(out)
    fill = _dequantize[x.dtype]
    wrong = fill(*_flat(x), width, codes.peaks, codes.symbols.reshape(-1), codes.escapes)
    if x is not out:
        out.copy_(x)
    return not wrong


# The variant lmcache


def _levels_kernel(bits: int) -> Any:
    sixteen = bits == 16

    def kernel(
        source: NDArray[Any],
        shape: Shape,
        limit: Any,
        half: Any,
        peaks: Floats,
        codes: Bytes,
        checks: NDArray[np.uint32],
        below: Counts,
    ) -> int:
        """0; -1 if a number is too large. `below` and `checks` are 0 before."""
        channels = shape[0] * shape[1]
        n = codes.size // channels
        row = np.empty(channels, np.float32)
        pattern = row.view(np.uint32)
        number = np.zeros(1, np.uint32)
        for t in range(n):
            largest = _read(pattern, source, t, shape, sixteen)
            if largest > limit:
                return -1
            number[0] = largest
            peak = number.view(np.float32)[0]
            peaks[_u64(t)] = peak
            divisor = peak if peak > _NOTHING else _UNIT
            at, check = _u64(t * channels), _u64(t // PIECE * channels)
            place = np.uint32(t % PIECE + 1)
            for c in range(channels):
                i = _u64(c)
                code = np.uint8(np.int32(np.rint(_ratio(row[i], divisor) * half + half)))
                codes[at + i] = code
                checks[check + i] += place * np.uint32(code)
            for c in range(channels):
                below[_u64(c * ENTRIES + 1) + _u64(codes[at + _u64(c)])] += np.uint16(1)
        for c in range(channels):
            total = np.uint16(0)
            for k in range(ENTRIES):
                i = _u64(c * ENTRIES + k)
                total += below[i]
                below[i] = total
        return 0

    item = types.uint16 if sixteen else types.uint32
    kernel.__qualname__ = f"_levels{bits}"
    return _compiled(
        _input(item),
        _SHAPE,
        types.uint32,
        types.float32,
        _output(types.float32),
        _output(types.uint8),
        _output(types.uint32),
        _output(types.uint16),
    )(kernel)


def _restore_kernel(bits: int) -> Any:
    sixteen = bits == 16

    def kernel(
        target: NDArray[Any],
        shape: Shape,
        half: Any,
        peaks: Floats,
        codes: Bytes,
        checks: NDArray[np.uint32],
    ) -> int:
        """0; -1 if a check does not match."""
        channels = shape[0] * shape[1]
        row = np.empty(channels, np.float32)
        pattern = row.view(np.uint32)
        found = np.zeros(checks.size, np.uint32)
        for t in range(codes.size // channels):
            at, check = _u64(t * channels), _u64(t // PIECE * channels)
            place, peak = np.uint32(t % PIECE + 1), peaks[_u64(t)]
            for c in range(channels):
                code = codes[at + _u64(c)]
                found[check + _u64(c)] += place * np.uint32(code)
                row[_u64(c)] = _ratio(np.float32(code) - half, half) * peak
            _write(target, pattern, t, shape, sixteen)
        for i in range(checks.size):
            if found[_u64(i)] != checks[_u64(i)]:
                return -1
        return 0

    item = types.uint16 if sixteen else types.uint32
    kernel.__qualname__ = f"_restore{bits}"
    return _compiled(
        _output(item),
        _SHAPE,
        types.float32,
        _input(types.float32),
        _input(types.uint8),
        _input(types.uint32),
    )(kernel)


_levels = {torch.bfloat16: _levels_kernel(16), torch.float32: _levels_kernel(32)}
_restore = {torch.bfloat16: _restore_kernel(16), torch.float32: _restore_kernel(32)}


def levels(x: Tensor, half: int) -> tuple[Levels, Counts] | None:
    """See `Kernels`."""
    x, limit = _source(x)
    source, shape = _flat(x)
    n, channels = x.shape[1], shape[0] * shape[1]
    peaks = np.empty(n, np.float32)
    codes = np.empty((n, channels), np.uint8)
    checks = np.zeros((-(-n // PIECE), channels), np.uint32)
    below = np.zeros((channels, ENTRIES), np.uint16)
    outputs = (y.reshape(-1) for y in (peaks, codes, checks, below))
    if _levels[x.dtype](source, shape, limit, half, *outputs):
        return None
    return Levels(peaks, codes, checks), below


@_compiled(_input(types.uint16), _output(types.uint16))
def _frequencies(below: Counts, out: Counts) -> int:
    for c in range(out.size // _LAST):
        at, to = _u64(c * ENTRIES), _u64(c * _LAST)
        n = np.int64(below[at + _u64(_LAST)])
        missing, most, largest = np.int64(TOTAL), _ZERO, np.int64(0)
        for k in range(_LAST):
            i = at + _u64(k)
            count = np.int64(below[i + _ONE]) - np.int64(below[i])
            frequency = max(_u64(count) * _TOTAL // _u64(n), _ONE) if count else _ZERO
            out[to + _u64(k)] = frequency
            missing -= np.int64(frequency)
            if count > largest:
                most, largest = _u64(k), count
        out[to + most] += missing
    return 0


def frequencies(below: Counts) -> Counts:
    """See `Kernels`."""
    out = np.empty((len(below), _LAST), np.uint16)
    _frequencies(below.reshape(-1), out.reshape(-1))
    return out


def restore(levels: Levels, half: int, out: Tensor) -> bool:
    """See `Kernels`."""
    x = _target(out)
    fill = _restore[x.dtype]
    wrong = fill(*_flat(x), half, *(y.reshape(-1) for y in levels))
    if x is not out:
        out.copy_(x)
    return not wrong
