# SPDX-License-Identifier: Apache-2.0
"""The chunks of `cachegen:variant=lmcache`: tokens in a few levels, with their distributions.

    code = round_half_even(x / peak * M + M), M = (bins - 2) / 2, peak the token's largest magnitude
    decoded: (code - M) / M * peak

in float32; a token of zeros has the code M. A chunk of n tokens and C channels:

    dtype [n]      peaks, in the dtype of the KV
    u16 [C, 33]    how many tokens of the chunk have a lower code than 0, 1, ... 32, by channel
    of each 256 tokens, the last perhaps fewer:
      u32 [C]      sum over these tokens, counted from 1, of number times code, modulo 2^32
      u32          words
      u32 [N], u16 states and words of the codes [m, C] (docs/formats/codec.md)

The frequency of a code with count k is max(1, floor(4096 k / n)), 0 for those that do not occur;
the most frequent (of these the lowest) gets what is missing to 4096, or loses what is too much.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvlib.codecs import rans
from kvlib.codecs.cachegen_kernels import ENTRIES, PIECE, Kernels, Levels
from kvlib.codecs.cachegen_lines import Chunk, Reader, batches, coded_parts, floats_of
from kvlib.codecs.cachegen_profile import MAX_ROWS, kept_layers
from kvlib.codecs.container import Buffer
from kvlib.codecs.rans import MAX_LANES, Bytes, Coded, Stream, Tables
from kvlib.errors import CorruptDataError
from kvlib.spec import KVSpec

__all__ = ["LMCacheCoder", "num_levels"]

_FEW_LAYERS = 10
_FINE = (10, 2)  # so many first layers of keys and of values have 32 bins


def num_levels(place: int, num_layers: int, kind: int) -> int:
    """M of a layer: codes are 0..2M.

    Args:
        place: of the layer, among those that keep tokens.
        num_layers: how many these are.
        kind: 0 for keys, 1 for values.
    """
    bins = 32 if num_layers < _FEW_LAYERS or place < _FINE[kind] else 16
    return bins // 2 - 1


class Draft(NamedTuple):
    """A chunk before its codes are coded; `below` are the counts as they are stored."""

    levels: Levels
    below: NDArray[np.uint16]
    dtype: torch.dtype


class Packed(NamedTuple):
    """A chunk before its codes are decoded: room for these, and their streams."""

    chunk: Chunk
    half: int
    levels: Levels
    frequencies: NDArray[np.uint16]
    coded: list[Coded]


class LMCacheCoder:
    """See `kvlib.codecs.cachegen.ChunkCoder`."""

    def __init__(self, spec: KVSpec, kernel: Kernels) -> None:
        self._kept = kept_layers(spec)
        self._kernel = kernel

    def _half(self, chunk: Chunk) -> int:
        return num_levels(self._kept.index(chunk.layer_idx), len(self._kept), chunk.kind)

    def draft(self, chunk: Chunk) -> Draft | None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        found = self._kernel.levels(chunk.x, self._half(chunk))
        return found and Draft(*found, chunk.x.dtype)

    def write(self, drafts: Sequence[Draft]) -> list[list[Buffer]]:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        out: list[list[Buffer]] = []
        for some in batches(drafts, [len(d.below) for d in drafts], MAX_ROWS):
            out += self._write(some)
        return out

    def _write(self, drafts: Sequence[Draft]) -> list[list[Buffer]]:
        tables = Tables(np.concatenate([self._kernel.frequencies(d.below) for d in drafts]))
        matrices, rows, first = [], [], 0
        for d in drafts:
            mine = _pieces(d.levels.codes)
            matrices += mine
            rows += [np.arange(first, first + len(d.below))] * len(mine)
            first += len(d.below)
        coded = iter(rans.encode(matrices, rows, tables))
        out = []
        for d in drafts:
            parts: list[Buffer] = [floats_of(d.levels.peaks, d.dtype)]
            parts.append(d.below.astype("<u2").tobytes())
            for check in d.levels.checks:
                parts += [check.astype("<u4").tobytes(), *coded_parts(next(coded))]
            out.append(parts)
        return out

    def parse(self, chunk: Chunk, reader: Reader) -> Packed:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        n, channels = chunk.shape
        half = self._half(chunk)
        peaks = reader.floats(n, chunk.x.dtype)
        below = reader.array("<u2", channels * ENTRIES).reshape(channels, ENTRIES)
        below = below.astype(np.uint16)
        if (
            below[:, 0].any()
            or (below[:, 2 * half + 1 :] != n).any()
            or (below[:, 1:] < below[:, :-1]).any()
        ):
            raise CorruptDataError(f"a stored distribution is not one of {n} tokens")
        codes = np.empty((n, channels), np.uint8)
        pieces = _pieces(codes)
        checks = np.empty((len(pieces), channels), np.uint32)
        coded = []
        for check, piece in zip(checks, pieces, strict=True):
            check[:] = reader.array("<u4", channels)
            coded.append(reader.coded(piece.size))
        frequencies = self._kernel.frequencies(below)
        return Packed(chunk, half, Levels(peaks, codes, checks), frequencies, coded)

    def finish(self, packed: Sequence[Packed]) -> None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        for some in batches(packed, [len(p.frequencies) for p in packed], MAX_ROWS):
            self._decode(some)
        for p in packed:
            if not self._kernel.restore(p.levels, p.half, p.chunk.x):
                raise CorruptDataError(
                    f"layer {p.chunk.layer_idx}: the codes of a channel do not match their check"
                )

    def _decode(self, packed: Sequence[Packed]) -> None:
        tables = Tables(np.concatenate([p.frequencies for p in packed]))
        streams: list[Stream] = []
        coded, first = [], 0
        for p in packed:
            channels = len(p.frequencies)
            rows = np.resize(
                np.arange(first, first + channels, dtype=np.uint32), channels + MAX_LANES
            )
            first += channels
            for piece, source in zip(_pieces(p.levels.codes), p.coded, strict=True):
                lanes = source.states.size
                streams.append(Stream(len(streams), piece.reshape(-1), rows, channels, lanes))
                coded.append(source)
        self._kernel.decode(streams, coded, self._kernel.lookup(tables))


def _pieces(codes: Bytes) -> list[Bytes]:
    return [codes[i : i + PIECE] for i in range(0, len(codes), PIECE)]
