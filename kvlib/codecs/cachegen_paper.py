# SPDX-License-Identifier: Apache-2.0
"""The chunks of `cachegen:variant=paper`: anchors and deltas under the tables of a profile.

A chunk of n tokens, A = ceil(n / 10) of them anchors, and C channels:

    u32, u32       number of escapes, their bytes
    dtype [A]      largest magnitude of each anchor, in the dtype of the KV
    if n >= 10, of the whole groups of ten:
      u32          words
      u32 [N], u16 states and words of their symbols [n div 10, 10 C] (docs/formats/codec.md)
    if n mod 10 > 0, of the other tokens:
      u32          words
      u32 [N], u16 states and words of their symbols [1, (n mod 10) C]
    varints        escapes (`kvlib.codecs.varint`), token after token

Every `GROUP`-th token of a chunk is an anchor:

    anchor    scale = peak / 127, peak the largest magnitude of the token
              code = round_half_even(x / scale), 0 where the scale is 0; decoded: code * scale
    delta     code = round_half_even((x - decoded anchor) / width)
              decoded: decoded anchor + code * width

All in float32, each operation rounded by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from kvlib.codecs import rans
from kvlib.codecs.cachegen_kernels import EXACT_INTEGERS, GROUP, Codes, Kernels, num_anchors
from kvlib.codecs.cachegen_lines import Chunk, Reader, coded_parts, floats_of
from kvlib.codecs.cachegen_profile import ChannelTables, Profile
from kvlib.codecs.container import Buffer
from kvlib.codecs.rans import Bytes, Coded, Stream
from kvlib.codecs.varint import MAX_BYTES, decode_varints, encode_varints
from kvlib.errors import CorruptDataError

__all__ = ["PaperCoder"]

_NO_ESCAPES = np.empty(0, np.int64)


class Draft(NamedTuple):
    """A chunk before its symbols are coded."""

    codes: Codes
    tables: ChannelTables
    dtype: torch.dtype


class Packed(NamedTuple):
    """A chunk before its symbols are decoded: room for these, in which streams belong."""

    chunk: Chunk
    codes: Codes
    tables: ChannelTables
    streams: list[Stream]
    coded: list[Coded]


@dataclass(frozen=True, slots=True)
class PaperCoder:
    """See `kvlib.codecs.cachegen.ChunkCoder`."""

    profile: Profile
    level: float
    kernel: Kernels

    def draft(self, chunk: Chunk) -> Draft | None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        tables = self._tables(chunk)
        codes = self.kernel.quantize(chunk.x, tables)
        return codes and Draft(codes, tables, chunk.x.dtype)

    def write(self, drafts: Sequence[Draft]) -> list[list[Buffer]]:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        out = []
        for shared, some in groupby(drafts, lambda d: d.tables.shared):
            mine = list(some)
            matrices = [_matrices(d.codes.symbols) for d in mine]
            coded = iter(
                rans.encode(
                    [m for pair in matrices for m in pair],
                    [
                        d.tables.columns[: m.shape[1]]
                        for d, pair in zip(mine, matrices, strict=True)
                        for m in pair
                    ],
                    shared.tables,
                )
            )
            out += [
                _parts(d, [next(coded) for _ in m]) for d, m in zip(mine, matrices, strict=True)
            ]
        return out

    def parse(self, chunk: Chunk, reader: Reader) -> Packed:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        tables = self._tables(chunk)
        n, channels = chunk.shape
        escapes, escape_bytes = reader.numbers(2)
        if not escapes <= min(n * channels, escape_bytes) <= escape_bytes <= MAX_BYTES * escapes:
            raise CorruptDataError(
                f"{escapes} escapes in {escape_bytes} bytes for {n * channels} numbers"
            )
        peaks = reader.floats(num_anchors(n), chunk.x.dtype)
        symbols = np.empty((n, channels), np.uint8)
        streams: list[Stream] = []
        coded = []
        for matrix in _matrices(symbols):
            source = reader.coded(matrix.size)
            flat, lanes = matrix.reshape(-1), source.states.size
            streams.append(Stream(len(streams), flat, tables.columns, matrix.shape[1], lanes))
            coded.append(source)
        far = _NO_ESCAPES
        if escapes:
            far = decode_varints(reader.take(escape_bytes), escapes)
            if max(far.max(), -far.min()) >= EXACT_INTEGERS:
                raise CorruptDataError(f"an escape is not below {EXACT_INTEGERS} in size")
        return Packed(chunk, Codes(peaks, symbols, far), tables, streams, coded)

    def finish(self, packed: Sequence[Packed]) -> None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        for shared, some in groupby(packed, lambda p: p.tables.shared):
            mine = list(some)
            streams = [x for p in mine for x in p.streams]
            coded = [x for p in mine for x in p.coded]
            self.kernel.decode(streams, coded, shared.lookup(self.kernel))
        for p in packed:
            if not self.kernel.dequantize(p.codes, p.tables.width, p.chunk.x):
                raise CorruptDataError(
                    f"layer {p.chunk.layer_idx}: {p.codes.escapes.size} escapes are there, and "
                    "another number of symbols that stand for one"
                )

    def _tables(self, chunk: Chunk) -> ChannelTables:
        tables = self.profile.tables(chunk.layer_idx, chunk.kind, self.level).of(chunk.channels)
        if tables.low[0].size != chunk.shape[1]:
            raise CorruptDataError(
                f"layer {chunk.layer_idx} has {chunk.shape[1]} channels, and tables for "
                f"{tables.low[0].size}"
            )
        return tables


def _matrices(symbols: Bytes) -> list[Bytes]:
    """Views of [n, C] as they are coded, whole groups as rows; then what is left as one."""
    n, channels = symbols.shape
    split = n - n % GROUP
    whole, rest = symbols[:split].reshape(-1, GROUP * channels), symbols[split:].reshape(1, -1)
    return [m for m in (whole, rest) if m.size]


def _parts(draft: Draft, coded: Sequence[Coded]) -> list[Buffer]:
    """A chunk as it is stored."""
    peaks, _, far = draft.codes
    escapes = encode_varints(far) if far.size else b""
    head = far.size.to_bytes(4, "little") + len(escapes).to_bytes(4, "little")
    streams = [part for x in coded for part in coded_parts(x)]
    return [head, floats_of(peaks, draft.dtype), *streams, escapes]
