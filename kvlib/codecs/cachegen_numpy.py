# SPDX-License-Identifier: Apache-2.0
"""The inner loops of `cachegen` without a compiler; see `kvlib.codecs.cachegen_kernels.Kernels`."""

from collections.abc import Sequence
from typing import NamedTuple

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
from kvlib.codecs.rans import Bytes, Coded, States, Stream, Tables
from kvlib.codecs.rans_numpy import decode_streams, decode_with
from kvlib.codecs.rans_tables import TOTAL

__all__ = ["decode", "dequantize", "frequencies", "levels", "lookup", "quantize", "restore"]

_BUCKET_BITS = 4
_BUCKETS = TOTAL >> _BUCKET_BITS
"""Parts of a table row that are looked at first, 16 slots each."""
_SEVERAL = TOTAL - (1 << _BUCKET_BITS) + 1 << 20
"""An entry of `Tables.by_slot` this large is of a symbol with less than 16 slots."""
_MOST_BLOCKS = (1 << 32) - _SEVERAL - _BUCKETS
_ROWS_AT_ONCE = 256

# As arrays, which array operations take faster than Python's numbers.
_BUCKET, _LARGE, _OFFSET = (
    np.array(k & 0xFFFFFFFF, np.uint32)
    for k in (_BUCKET_BITS, _SEVERAL, _SEVERAL + _BUCKETS << _BUCKET_BITS)
)


class Lookup(NamedTuple):
    """Where entries of `Tables.by_slot` are found, whose 16 KiB a row no cache would hold.

    Nine lanes of ten need a bucket and no more, of which a row has 1 KiB; the others one block
    besides, a line of cache. Blocks are 3 or 4 KiB a row in profiles of real models, at most 16.

    Attributes:
        buckets: uint32 [256 * rows], the entry of the 16 slots of each bucket if they share one,
            else `_SEVERAL` + 256 + the number of the block - that of the bucket in its row.
        blocks: uint32 [16 * blocks], the entries of the slots of such buckets.
    """

    buckets: NDArray[np.uint32]
    blocks: NDArray[np.uint32]


def lookup(tables: Tables) -> Lookup | Tables:
    """See `Kernels`; the tables themselves if there are more blocks than can be numbered."""
    buckets = np.empty((len(tables), _BUCKETS), np.uint32)
    blocks = []
    number = 0
    for first in range(0, len(tables), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        some = Tables(tables.frequencies[rows]).by_slot.reshape(-1, _BUCKETS, 1 << _BUCKET_BITS)
        several = some[:, :, 0] != some[:, :, -1]
        blocks.append(some[several])
        last = number + len(blocks[-1])
        if last > _MOST_BLOCKS:
            return tables
        mine = buckets[rows]
        mine[:] = some[:, :, 0]
        mine[several] = np.arange(number, last) + (_SEVERAL + _BUCKETS) - several.nonzero()[1]
        number = last
    return Lookup(buckets.reshape(-1), np.concatenate(blocks).reshape(-1))


def decode(streams: Sequence[Stream], coded: Sequence[Coded], lookup: Lookup | Tables) -> None:
    """See `Kernels`."""
    if isinstance(lookup, Tables):
        decode_streams(streams, coded, lookup)
        return
    buckets, blocks = lookup
    width = sum(s.lanes for s in streams)
    indices, masks = np.empty(width, np.uint32), np.empty(width, np.bool_)

    def find(slots: States, columns: States, entries: States) -> None:
        index, mask = indices[: slots.size], masks[: slots.size]
        np.right_shift(slots, _BUCKET, index)
        np.bitwise_or(index, columns, index)
        buckets.take(index, None, entries, "wrap")  # all are there; "raise" would copy them
        several = np.greater_equal(entries, _LARGE, mask).nonzero()[0]
        if several.size:
            at = entries.take(several)
            at <<= _BUCKET
            at += slots.take(several)
            at -= _OFFSET
            entries[several] = blocks.take(at)

    decode_with(find, streams, coded, _BUCKETS)


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
    bins = np.subtract(codes.symbols, LARGEST, dtype=np.uint8).view(np.int8).astype(np.float32)
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
