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

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvlib.codecs import rans
from kvlib.codecs.cachegen_lines import Floats, Reader, coded_parts, floats_of
from kvlib.codecs.container import Buffer
from kvlib.codecs.rans import Bytes, Tables
from kvlib.codecs.rans_tables import TOTAL
from kvlib.errors import CorruptDataError

__all__ = ["ENTRIES", "LMCacheCoder", "frequencies_of", "num_levels"]

ENTRIES = 33
"""Numbers of a stored distribution: as many as 32 bins need, also for 16."""
_CODES = ENTRIES - 1
_PIECE = 256  # tokens of a stream
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


def frequencies_of(counts: NDArray[np.integer[Any]], n: int) -> NDArray[np.uint16]:
    """What counts [C, K] of n tokens are coded with; each row adds up to 4096."""
    wide = counts.astype(np.int64)
    out = np.where(wide > 0, np.maximum(wide * TOTAL // n, 1), 0)
    rows = np.arange(len(out))
    out[rows, wide.argmax(1)] += TOTAL - out.sum(1)
    return out.astype(np.uint16)


@dataclass(frozen=True, slots=True)
class LMCacheCoder:
    """Codes chunks of some channels of a layer's keys or values.

    Attributes:
        half: M; codes are 0..2M.
    """

    half: int

    def encode(self, x: Floats, dtype: torch.dtype) -> list[Buffer] | None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        n, channels = x.shape
        half = np.float32(self.half)
        peaks = np.maximum(x.max(1), -x.min(1)) + np.float32(0)  # no -0
        y = x / np.where(peaks > 0, peaks, np.float32(1))[:, None]
        y *= half
        y += half
        codes = np.rint(y, out=y).astype(np.uint8)
        places = codes + np.arange(0, _CODES * channels, _CODES)
        counts = np.bincount(places.reshape(-1), minlength=_CODES * channels)
        counts = counts.reshape(channels, _CODES)
        cumulative = np.zeros((channels, ENTRIES), "<u2")
        cumulative[:, 1:] = counts.cumsum(1)
        tables = Tables(frequencies_of(counts, n))
        pieces = [codes[i : i + _PIECE] for i in range(0, n, _PIECE)]
        rows = np.arange(channels)
        parts: list[Buffer] = [floats_of(peaks, dtype), cumulative.tobytes()]
        for piece, coded in zip(
            pieces, rans.encode(pieces, [rows] * len(pieces), tables), strict=True
        ):
            words = coded.words.size.to_bytes(4, "little")
            parts += [_checks(piece).astype("<u4").tobytes(), words, *coded_parts(coded)]
        return parts

    def decode(self, reader: Reader, out: Floats, dtype: torch.dtype) -> None:
        """See `kvlib.codecs.cachegen.ChunkCoder`."""
        n, channels = out.shape
        peaks = reader.floats(n, dtype)
        cumulative = reader.array("<u2", channels * ENTRIES).reshape(channels, ENTRIES)
        wide = cumulative.astype(np.int32)
        counts = wide[:, 1:] - wide[:, :-1]
        if (
            cumulative[:, 0].any()
            or (cumulative[:, -1] != n).any()
            or (counts < 0).any()
            or counts[:, 2 * self.half + 1 :].any()
        ):
            raise CorruptDataError(f"a stored distribution is not one of {n} tokens")
        shapes = [(min(_PIECE, n - i), channels) for i in range(0, n, _PIECE)]
        streams, checks = [], []
        for rows, _ in shapes:
            checks.append(reader.array("<u4", channels))
            (words,) = reader.numbers(1)
            streams.append(reader.coded(rows * channels, words))
        tables = Tables(frequencies_of(counts, n))
        order = [np.arange(channels)] * len(shapes)
        pieces = rans.decode(streams, shapes, order, tables)
        values = (np.arange(_CODES) - self.half).astype(np.float32) / np.float32(self.half)
        for i, (codes, check) in enumerate(zip(pieces, checks, strict=True)):
            if (_checks(codes) != check).any():
                raise CorruptDataError("the codes of a channel do not match their check")
            np.take(values, codes, out=out[i * _PIECE : i * _PIECE + len(codes)])
        out *= peaks[:, None]


def _checks(codes: Bytes) -> NDArray[np.uint32]:
    number = np.arange(1, len(codes) + 1, dtype=np.uint32)
    found: NDArray[np.uint32] = np.einsum("t,tc->c", number, codes.astype(np.uint32))
    return found  # modulo 2^32
