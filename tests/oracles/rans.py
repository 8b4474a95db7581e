# SPDX-License-Identifier: Apache-2.0
"""Interleaved rANS by its definition: one symbol at a time, in whole numbers of any size."""

import math

__all__ = ["decode", "encode", "mixture_row"]


def encode(symbols, frequencies, rows, lanes):
    """States and words of a stream.

    Args:
        symbols: [n][C].
        frequencies: [K][A], rows that add up to 4096.
        rows: [C], the row for each column.
        lanes: N.
    """
    flat = [(s, rows[c]) for token in symbols for c, s in enumerate(token)]
    states = [2**15] * lanes
    words = []
    for i in reversed(range(len(flat))):
        symbol, row = flat[i]
        f = frequencies[row][symbol]
        below = sum(frequencies[row][:symbol])
        x = states[i % lanes]
        if x >= f * 2**19:
            words.insert(0, x % 2**16)
            x //= 2**16
        states[i % lanes] = x // f * 4096 + below + x % f
    return states, words


def decode(states, words, shape, frequencies, rows):
    """The symbols [n][C]; None when it does not end as it should."""
    n, channels = shape
    states, words = list(states), list(words)
    out = []
    for i in range(n * channels):
        row = frequencies[rows[i % channels]]
        x = states[i % len(states)]
        slot = x % 4096
        symbol, below = 0, 0
        while below + row[symbol] <= slot:
            below += row[symbol]
            symbol += 1
        out.append(symbol)
        x = row[symbol] * (x // 4096) + slot - below
        if x < 2**15:
            if not words:
                return None
            x = x * 2**16 + words.pop(0)
        states[i % len(states)] = x
    if words or any(x != 2**15 for x in states):
        return None
    return [out[t * channels : (t + 1) * channels] for t in range(n)]


def mixture_row(c):
    """The frequencies of class c of the parametric tables, by erfc and exp of the C library."""
    sigma = 0.08 * (9 / 0.08) ** (c / 63)
    radius = min(30, math.ceil(6 * sigma + 1.5))

    def above(x):
        normal = math.erfc(x / sigma / math.sqrt(2)) / 2
        laplace = math.exp(-x / (sigma / math.sqrt(2))) / 2
        return 0.75 * normal + 0.25 * laplace

    row = [0] * 63
    row[62] = 1
    for v in range(1, radius + 1):
        p = above(v - 0.5) - above(v + 0.5)
        assert abs(p * 4096 % 1 - 0.5) > 1e-3, "too close to a tie for float64"
        row[31 + v] = row[31 - v] = max(1, round(p * 4096))
    row[31] = 4096 - sum(row)
    return row
