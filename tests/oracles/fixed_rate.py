# SPDX-License-Identifier: Apache-2.0
"""The fixed-rate codecs by their definitions, in float64: fp8, KIVI and rotated Lloyd-Max codes.

Matrices are [N, D], head after head; `lengths` are the entries of each head. What comes back is the
decoded matrix before it is rounded to a dtype, and what the error of each value may be. None stands
for a matrix that must be kept as it is.
"""

import itertools
import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

__all__ = [
    "FP8",
    "fp8",
    "hadamard",
    "half_down",
    "half_up",
    "kivi",
    "lloyd_max",
    "mean_square_error",
    "rotation",
]

FP8 = {"e4m3": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}
"""Bits of mantissa, exponent of the least normal number, greatest number."""

_POSITIVE = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
_HALVES = np.concatenate([-_POSITIVE[:0:-1], _POSITIVE])  # every finite one, ascending


def half_up(x):
    """The least float16 not below x; infinity beyond the greatest."""
    at = np.searchsorted(_HALVES, x, side="left")
    return np.append(_HALVES, np.inf)[at]


def half_down(x):
    """The greatest float16 not above x."""
    return -half_up(-np.asarray(x, np.float64))


def fp8_numbers(form):
    """Every non-negative number of a format, ascending."""
    bits, least, top = FP8[form]
    found = {m * 2.0 ** (least - bits) for m in range(2**bits)}  # subnormals
    exponent = least
    while 2.0**exponent <= top:
        found |= {(1 + m / 2**bits) * 2.0**exponent for m in range(2**bits)}
        exponent += 1
    return np.array(sorted(x for x in found if x <= top))


def nearest_fp8(x, form):
    """The nearest number of a format, the one with an even mantissa in the middle of two."""
    numbers = fp8_numbers(form)
    size = np.minimum(np.abs(x), numbers[-1])
    above = np.searchsorted(numbers, size)
    below = np.maximum(above - 1, 0)
    gap = (numbers[above] - size) - (size - numbers[below])
    # Numbers alternate between odd and even mantissas, beginning with the even 0.
    index = np.where(gap == 0, np.where(above % 2 == 0, above, below), above)
    index = np.where(gap > 0, below, index)
    return np.copysign(numbers[index], x)


def fp8(x, lengths, form, scale):
    """Decoded matrix, bound of the error of each value, and scales of each value."""
    if not np.isfinite(x).all():
        return None
    bits, least, top = FP8[form]
    each = np.ones(x.shape)
    if scale == "token":
        each[:] = half_up(np.abs(x).max(axis=1) / top)[:, None]
    elif scale == "head":
        at = 0
        for n in lengths:
            if n:
                each[at : at + n] = half_up(np.abs(x[at : at + n]).max() / top)
            at += n
    if np.isinf(each).any():
        return None
    unit = np.divide(x, each, out=np.zeros_like(x), where=each > 0)
    bound = np.maximum(np.abs(x) * 2.0 ** -(bits + 1), each * 2.0 ** (least - bits - 1))
    return nearest_fp8(unit, form) * each, np.maximum(bound, np.abs(x) - top * each), each


def kivi(x, lengths, keys, bits, group, residual):
    """Decoded matrix and step of each value; steps are NaN where values stay exact."""
    decoded, steps = x.copy(), np.full(x.shape, np.nan)
    first = 0
    for n in lengths:
        end = first + max(0, n - residual)
        if keys:  # a group of tokens at a time, every channel by itself
            parts = [(slice(t, min(t + group, end)), slice(None)) for t in range(first, end, group)]
        else:  # a group of channels at a time, every token by itself
            parts = [(slice(first, end), slice(c, c + group)) for c in range(0, x.shape[1], group)]
        for part in parts if first < end else ():
            values = x[part]
            if not (np.abs(values) <= 65504).all():
                return None
            axis = 0 if keys else 1
            low = half_down(values.min(axis, keepdims=True))
            step = half_up((values.max(axis, keepdims=True) - low) / (2**bits - 1))
            ratio = np.divide(values - low, step, out=np.zeros(values.shape), where=step > 0)
            decoded[part] = low + np.clip(np.rint(ratio), 0, 2**bits - 1) * step
            steps[part] = step
        first += n
    return decoded, steps


def _words(layer_idx, kind, width):
    """A 32-bit number for each channel."""

    def mix(w):
        w = ((w ^ (w >> 16)) * 0x85EBCA6B) % 2**32
        w = ((w ^ (w >> 13)) * 0xC2B2AE35) % 2**32
        return w ^ (w >> 16)

    return [mix((mix(2 * layer_idx + kind) + c) % 2**32) for c in range(width)]


@lru_cache
def rotation(layer_idx, kind, width):
    """The orthogonal matrix that turns a vector; `kind` is 0 for keys, 1 for values."""
    words = _words(layer_idx, kind, width)
    order = list(range(width))
    if math.log2(width) % 1:
        order = sorted(order, key=lambda c: words[c])
    out = np.zeros((width, width))
    at = 0
    while at < width:
        size = 2 ** int(math.log2(width - at))
        signs = np.ones((1, 1))  # Sylvester's matrix
        while len(signs) < size:
            signs = np.kron(signs, [[1, 1], [1, -1]])
        for j, channel in enumerate(order[at : at + size]):
            out[at : at + size, channel] = signs[:, j] * (-1) ** words[channel] / math.sqrt(size)
        at += size
    return out


def lloyd_max(bits, rounds=20000):
    """Positive levels of the quantizer of N(0, 1): each the mean of what is nearest to it."""
    normal = NormalDist()
    levels = [(i + 0.5) * 2.5 / 2 ** (bits - 1) for i in range(2 ** (bits - 1))]
    for _ in range(rounds):
        edges = _edges(levels)
        levels = [
            (_pdf(a) - _pdf(b)) / (normal.cdf(b) - normal.cdf(a))
            for a, b in itertools.pairwise(edges)
        ]
    return levels


def _edges(levels):
    return [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 40.0]


def _pdf(t):
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def mean_square_error(levels):
    """Of N(0, 1) under a symmetric quantizer whose levels are the means of their cells."""
    normal, edges = NormalDist(), _edges(levels)
    cells = zip(levels, edges, edges[1:], strict=False)
    return 1 - 2 * sum(x * x * (normal.cdf(b) - normal.cdf(a)) for x, a, b in cells)


def hadamard(x, turn, positive, correct):
    """Decoded matrix and, of each entry, how far off it may be in norm."""
    if not np.isfinite(x).all():
        return None
    levels = np.array([*(-v for v in positive[::-1]), *positive])
    rms = np.sqrt((x**2).mean(axis=1, keepdims=True))
    unit = np.divide(x, rms, out=np.zeros_like(x), where=rms > 0) @ turn.T
    chosen = levels[np.abs(unit[:, :, None] - levels).argmin(axis=2)]
    norms = np.linalg.norm(chosen, axis=1, keepdims=True)
    gain = np.linalg.norm(x, axis=1, keepdims=True) / norms if correct else rms
    away = np.linalg.norm(unit - chosen, axis=1, keepdims=True) * rms
    rounding = norms * np.maximum(gain * 2.0**-11, 2.0**-25)
    return (gain * chosen) @ turn, away * (2 if correct else 1) + rounding
