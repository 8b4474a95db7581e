# SPDX-License-Identifier: Apache-2.0
"""Anchors and deltas of `cachegen`: numbers to symbols and back, in NumPy.

    anchor    scale = peak / 127, peak the largest magnitude of the token
              code = round_half_even(x / scale), 0 where the scale is 0; decoded: code * scale
    delta     code = round_half_even((x - decoded anchor) / width)
              decoded: decoded anchor + code * width

All in float32, each operation rounded by itself. Every `GROUP`-th token of a matrix is an anchor.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs.cachegen_lines import Floats
from kvlib.codecs.cachegen_profile import ESCAPE, GROUP, LARGEST, ChannelTables
from kvlib.codecs.rans import Bytes

__all__ = ["Codes", "dequantize", "num_anchors", "quantize"]

EXACT_INTEGERS = 1 << 24
"""float32 holds whole numbers up to this one."""


class Codes(NamedTuple):
    """A quantized matrix [n, C].

    Attributes:
        peaks: float32 [A], of the anchors.
        symbols: uint8 [n, C].
        escapes: int64, what the symbols `ESCAPE` stand for, token after token.
    """

    peaks: Floats
    symbols: Bytes
    escapes: NDArray[np.int64]


def num_anchors(n: int) -> int:
    """Anchors among `n` tokens."""
    return -(-n // GROUP)


def quantize(x: Floats, tables: ChannelTables) -> Codes | None:
    """Symbols of a matrix [n, C] of finite numbers; None if a delta is too many bins."""
    first = x[::GROUP]
    peaks = np.abs(first).max(1)
    scales = (peaks / np.float32(LARGEST))[:, None]
    codes = np.rint(first / np.where(scales > 0, scales, np.float32(np.inf)))
    codes = codes.clip(-LARGEST, LARGEST)
    base = codes * scales
    bins = np.empty_like(x)
    for groups, here, anchors in _groups(x, bins, base):
        np.subtract(groups, anchors, out=here)
    with np.errstate(over="ignore"):
        bins /= tables.width
    np.rint(bins, out=bins)
    bins[::GROUP] = codes
    if not max(bins.max(), -bins.min()) < EXACT_INTEGERS:
        return None
    outside = (bins < tables.low[1]) | (bins > tables.high[1])
    outside[::GROUP] = (codes < tables.low[0]) | (codes > tables.high[0])
    escapes = bins[outside].astype(np.int64)
    if escapes.size:
        bins[outside] = ESCAPE - LARGEST
    bins += np.float32(LARGEST)
    return Codes(peaks, bins.astype(np.uint8), escapes)


def dequantize(codes: Codes, width: np.float32, out: Floats) -> None:
    """Fill `out` [n, C]; there are as many escapes as symbols that say so."""
    np.subtract(codes.symbols, np.float32(LARGEST), out=out)
    if codes.escapes.size:
        out[codes.symbols == ESCAPE] = codes.escapes
    with np.errstate(over="ignore", invalid="ignore"):  # forged codes may leave float32's range
        base = out[::GROUP] * (codes.peaks / np.float32(LARGEST))[:, None]
        out *= width
        for groups, _, anchors in _groups(out, out, base):
            groups += anchors
    out[::GROUP] = base


def _groups(x: Floats, y: Floats, base: Floats) -> list[tuple[Floats, Floats, Floats]]:
    """Views of the whole groups of two matrices, with their anchors; then of what is left."""
    whole = len(x) // GROUP
    split = whole * GROUP
    full = [z[:split].reshape(whole, GROUP, x.shape[1]) for z in (x, y)]
    return [(full[0], full[1], base[:whole, None]), (x[split:], y[split:], base[whole:])]
