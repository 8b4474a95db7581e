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
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvlib.codecs import rans
from kvlib.codecs.cachegen_bins import EXACT_INTEGERS, Codes, dequantize, num_anchors, quantize
from kvlib.codecs.cachegen_lines import Floats, Reader, coded_parts, floats_of
from kvlib.codecs.cachegen_profile import ESCAPE, GROUP, ChannelTables
from kvlib.codecs.container import Buffer
from kvlib.codecs.rans import Bytes
from kvlib.codecs.varint import MAX_BYTES, decode_varints, encode_varints
from kvlib.errors import CorruptDataError

__all__ = ["PaperCoder"]


@dataclass(frozen=True, slots=True)
class PaperCoder:
    """Codes chunks of some channels of a layer's keys or values."""

    tables: ChannelTables

    def encode(self, x: Floats, dtype: torch.dtype) -> list[Buffer] | None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        codes = quantize(x, self.tables)
        if codes is None:
            return None
        escapes = encode_varints(codes.escapes)
        parts: list[Buffer] = [
            codes.escapes.size.to_bytes(4, "little"),
            len(escapes).to_bytes(4, "little"),
            floats_of(codes.peaks, dtype),
        ]
        matrices, rows = self._streams(codes.symbols)
        for coded in rans.encode(matrices, rows, self.tables.tables):
            parts += [coded.words.size.to_bytes(4, "little"), *coded_parts(coded)]
        return [*parts, escapes]

    def decode(self, reader: Reader, out: Floats, dtype: torch.dtype) -> None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        escapes, escape_bytes = reader.numbers(2)
        if not escapes <= min(out.size, escape_bytes) <= escape_bytes <= MAX_BYTES * escapes:
            raise CorruptDataError(f"{escapes} escapes in {escape_bytes} bytes for {out.size}")
        peaks = reader.floats(num_anchors(len(out)), dtype)
        symbols = np.empty(out.shape, np.uint8)
        matrices, rows = self._streams(symbols)
        streams = []
        for matrix in matrices:
            (words,) = reader.numbers(1)
            streams.append(reader.coded(matrix.size, words))
        far = decode_varints(reader.take(escape_bytes), escapes)
        shapes = [(len(m), m.shape[1]) for m in matrices]
        rans.decode(streams, shapes, rows, self.tables.tables, out=matrices)
        there = int(np.count_nonzero(symbols == ESCAPE))
        if there != escapes or (escapes and max(far.max(), -far.min()) >= EXACT_INTEGERS):
            raise CorruptDataError(
                f"{there} symbols are escapes; {escapes} are there, or one is out of range"
            )
        dequantize(Codes(peaks, symbols, far), self.tables.width, out)

    def _streams(self, symbols: Bytes) -> tuple[list[Bytes], list[NDArray[np.int64]]]:
        """Views of [n, C] as they are coded, and the tables of their columns."""
        n, channels = symbols.shape
        split = n - n % GROUP
        matrices, rows = [], []
        if split:
            matrices.append(symbols[:split].reshape(-1, GROUP * channels))
            rows.append(self.tables.rows)
        if n > split:
            matrices.append(symbols[split:].reshape(1, -1))
            rows.append(self.tables.rows[: matrices[-1].size])
        return matrices, rows
