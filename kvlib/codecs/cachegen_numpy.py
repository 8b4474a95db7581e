# SPDX-License-Identifier: Apache-2.0
"""The inner loops of `cachegen` without a compiler; see `kvlib.codecs.cachegen_kernels.Kernels`."""

from collections.abc import Sequence

import numpy as np
import torch
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
)
from kvlib.codecs.cachegen_lines import store, tokens_of
from kvlib.codecs.cachegen_profile import ChannelTables
from kvlib.codecs.rans import LOWEST, WORD_BITS, Bytes, Coded, Stream, Tables, check_end
from kvlib.codecs.rans_numpy import Batch
from kvlib.codecs.rans_tables import MAX_ALPHABET, PRECISION, TOTAL

__all__ = ["decode", "dequantize", "frequencies", "levels", "lookup", "quantize", "restore"]

# As arrays, which array operations take faster than Python's numbers.
_SLOT, _PRECISION, _LOWEST, _WORD_BITS, _WIDER = (
    np.array(k, np.uint32)
    for k in (TOTAL - 1, PRECISION, LOWEST, WORD_BITS, (TOTAL // MAX_ALPHABET).bit_length() - 1)
)


def lookup(tables: Tables) -> Tables:
    """See `Kernels`."""
    return tables


def decode(streams: Sequence[Stream], coded: Sequence[Coded], lookup: Tables) -> None:
    """See `Kernels`: `kvlib.codecs.rans_numpy.decode_streams` with tables of a third the size."""
    if not streams:
        return
    batch = Batch(streams)
    given = [coded[i] for i in batch.indices]
    symbols = np.empty(batch.size, np.uint8)
    states = np.concatenate([c.states for c in given]).astype(np.uint32, copy=False)
    sizes = np.array([c.words.size for c in given])
    # One more: a stream that asks for more words than it has reads others' until it is refused.
    words = np.concatenate([*(c.words for c in given), [0]]).astype(np.uint32)
    begin = sizes.cumsum() - sizes
    place = begin.copy()
    ramp = np.arange(states.size)
    room = np.empty((2, states.size), np.uint32)
    by_slot, by_symbol = lookup.symbols, lookup.encoder
    for step in batch.steps(MAX_ALPHABET):
        x = states[step.lanes]
        slot, index = room[0, : x.size], room[1, : x.size]
        np.bitwise_and(x, _SLOT, slot)
        np.left_shift(step.columns, _WIDER, index)
        np.bitwise_or(index, slot, index)
        symbol = by_slot.take(index)
        symbols[step.symbols] = symbol
        np.add(step.columns, symbol, index)
        entry = by_symbol.take(index)
        # x = frequency * (x >> PRECISION) + slot - cumulative
        np.right_shift(entry, _PRECISION, index)
        np.right_shift(x, _PRECISION, x)
        np.multiply(x, index, x)
        np.bitwise_and(entry, _SLOT, entry)
        np.subtract(slot, entry, slot)
        np.add(x, slot, x)
        low = (x < _LOWEST).nonzero()[0]
        edges = low.searchsorted(step.starts)
        first = edges[:-1]
        number = edges[1:] - first
        next_word = place[step.streams]
        wanted = (next_word - first).repeat(number)
        wanted += ramp[: low.size]
        refilled = x.take(low)
        refilled <<= _WORD_BITS
        refilled |= words.take(wanted, mode="clip")
        x[low] = refilled
        next_word += number
        if not isinstance(step.lanes, slice):  # else these are views
            states[step.lanes] = x
            place[step.streams] = next_word
    used = (place - begin).tolist()
    for s, c, x, n in zip(batch.streams, given, batch.states(states), used, strict=True):
        check_end(s, c, x, n)
    batch.store(symbols)


def _too_large(x: Floats, dtype: torch.dtype) -> bool:
    largest: bool = max(x.max(), -x.min()) <= torch.finfo(dtype).max / 2
    return not largest  # so for NaN as well


def quantize(x: Tensor, tables: ChannelTables) -> Codes | None:
    """See `Kernels`."""
    bins = tokens_of(x)
    if _too_large(bins, x.dtype):
        return None
    first = bins[::GROUP]
    peaks = np.abs(first).max(1)
    scales = (peaks / np.float32(LARGEST))[:, None]
    codes = np.rint(first / np.where(scales > 0, scales, np.float32(np.inf)))
    codes = codes.clip(-LARGEST, LARGEST)
    for group, anchor in _groups(bins, codes * scales):
        group -= anchor
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


def dequantize(codes: Codes, width: np.float32, out: Tensor) -> bool:
    """See `Kernels`."""
    bins = codes.symbols - np.float32(LARGEST)
    escapes = codes.symbols == ESCAPE
    if np.count_nonzero(escapes) != codes.escapes.size:
        return False
    if codes.escapes.size:
        bins[escapes] = codes.escapes
    with np.errstate(over="ignore", invalid="ignore"):  # forged codes may leave float32's range
        base = bins[::GROUP] * (codes.peaks / np.float32(LARGEST))[:, None]
        bins *= width
        for group, anchor in _groups(bins, base):
            group += anchor
    bins[::GROUP] = base
    store(out, bins)
    return True


def _groups(x: Floats, base: Floats) -> list[tuple[Floats, Floats]]:
    """Views of the whole groups of a matrix, with their anchors; then of what is left."""
    whole = len(x) // GROUP
    split = whole * GROUP
    return [
        (x[:split].reshape(whole, GROUP, x.shape[1]), base[:whole, None]),
        (x[split:], base[whole:]),
    ]


def levels(x: Tensor, half: int) -> tuple[Levels, Counts] | None:
    """See `Kernels`."""
    y = tokens_of(x)
    if _too_large(y, x.dtype):
        return None
    peaks = np.maximum(y.max(1), -y.min(1)) + np.float32(0)  # no -0
    y /= np.where(peaks > 0, peaks, np.float32(1))[:, None]
    y *= np.float32(half)
    y += np.float32(half)
    codes = np.rint(y, out=y).astype(np.uint8)
    channels, bins = codes.shape[1], ENTRIES - 1
    places = codes + np.arange(0, bins * channels, bins)
    counts = np.bincount(places.reshape(-1), minlength=bins * channels)
    below = np.zeros((channels, ENTRIES), np.uint16)
    below[:, 1:] = counts.reshape(channels, bins).cumsum(1)
    return Levels(peaks, codes, _checks(codes)), below


def frequencies(below: Counts) -> Counts:
    """See `Kernels`."""
    counts = np.diff(below.astype(np.int64))
    out = np.where(counts > 0, np.maximum(counts * TOTAL // counts[0].sum(), 1), 0)
    out[np.arange(len(out)), counts.argmax(1)] += TOTAL - out.sum(1)
    return out.astype(np.uint16)


def restore(levels: Levels, half: int, out: Tensor) -> bool:
    """See `Kernels`."""
    if (_checks(levels.codes) != levels.checks).any():
        return False
    values = (np.arange(2 * half + 1) - half).astype(np.float32) / np.float32(half)
    x = values.take(levels.codes)
    x *= levels.peaks[:, None]
    store(out, x)
    return True


def _checks(codes: Bytes) -> NDArray[np.uint32]:
    pieces = [codes[i : i + PIECE].astype(np.uint32) for i in range(0, len(codes), PIECE)]
    number = np.arange(1, PIECE + 1, dtype=np.uint32)
    return np.stack([np.einsum("t,tc->c", number[: len(x)], x) for x in pieces])  # modulo 2^32
