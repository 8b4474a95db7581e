# SPDX-License-Identifier: Apache-2.0
"""CacheGen from its definition: loops over tokens and channels in float64, no bytes."""

import math
from fractions import Fraction

import numpy as np


def nearest(x):
    """The nearest whole number, the even one of two."""
    return round(Fraction(float(x)))


def margin(x):
    """How far x is from where it would round to another number."""
    return abs(x - math.floor(x) - 0.5)


def paper(x, width):
    """What a chunk [n, C] decodes to, and how near any bin came to another.

    Groups of ten; the first token of each to 8 bits by its largest magnitude, the others as
    multiples of `width` from it.
    """
    n, channels = x.shape
    out = np.zeros((n, channels))
    least = 0.5
    for t in range(n):
        anchor = t - t % 10
        if t == anchor:
            peak = max(abs(v) for v in x[t])
            for c in range(channels):
                ratio = 127 * x[t, c] / peak if peak else 0.0
                least = min(least, margin(ratio))
                out[t, c] = nearest(ratio) * peak / 127
        else:
            for c in range(channels):
                ratio = (x[t, c] - out[anchor, c]) / width
                least = min(least, margin(ratio))
                out[t, c] = out[anchor, c] + nearest(ratio) * width
    return out, least


def width(level, sigma, place, num_layers):
    """Of a bin: half, one or one and a half sigmas by the third of the model, times the level."""
    for number, factor in ((1, 0.5), (2, 1.0), (3, 1.5)):
        if 3 * place < number * num_layers:
            return level * sigma * factor
    raise AssertionError(place)


def sigma(blocks):
    """Root mean square of the differences to the first token of each whole group of ten.

    Args:
        blocks: matrices [T, C]; groups begin at the first token, and once more at the sixth.
    """
    squares = []
    for x in blocks:
        for phase in (0, 5):
            for first in range(phase, len(x) - 9, 10):
                for t in range(first + 1, first + 10):
                    squares += [
                        (float(a) - float(b)) ** 2 for a, b in zip(x[t], x[first], strict=True)
                    ]
    return math.sqrt(math.fsum(squares) / len(squares))


def lmcache_bins(kind, place, num_layers):
    """Bins of a layer's keys or values."""
    if num_layers < 10:
        return 32
    return 32 if place < {"keys": 10, "values": 2}[kind] else 16


def lmcache(x, bins):
    """The codes of a chunk [n, C], what they decode to, and how near any came to another."""
    half = bins // 2 - 1
    codes = np.zeros(x.shape, int)
    out = np.zeros(x.shape)
    least = 0.5
    for t, token in enumerate(x):
        peak = max(abs(v) for v in token)
        for c, v in enumerate(token):
            ratio = v * half / peak + half if peak else half
            least = min(least, margin(ratio))
            codes[t, c] = nearest(ratio)
            out[t, c] = (codes[t, c] - half) / half * peak
    return codes, out, least


def empirical_bits(codes):
    """The entropy of codes [n, C], each channel under its own distribution."""
    total = 0.0
    for column in codes.T:
        for code in set(column.tolist()):
            k = int((column == code).sum())
            total -= k * math.log2(k / len(column))
    return total


def lmcache_side_bytes(n, channels, itemsize):
    """What LMCache stores of a chunk beside its streams: peaks, distributions, stream lengths."""
    return n * itemsize + channels * 33 * 2 + channels * 4 * math.ceil(n / 256)
