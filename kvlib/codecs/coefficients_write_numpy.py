# SPDX-License-Identifier: Apache-2.0
"""Chunks of coefficients as bytes without a compiler; see `kvlib.codecs.coefficients`.

The way back is in `kvlib.codecs.coefficients_numpy`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs import rans
from kvlib.codecs.coefficients import (
    FROM_PROFILE,
    HEAD,
    LEVEL_CLASS,
    ZERO,
    Bytes,
    Chunk,
    Expected,
    Int,
    find_escapes,
    level_tables,
    levels_of,
    mean_level,
    same,
)
from kvlib.codecs.rans_tables import ESCAPE, class_radius
from kvlib.codecs.varint import encode_varints

__all__ = ["Draft", "draft_chunk", "write_chunks"]


@dataclass(slots=True)
class _Coded:
    """Integers as symbols of tables, low bits and escapes."""

    symbols: Bytes
    rows: Bytes
    low: bytes
    escapes: Int


_NO_ESCAPES = np.empty(0, np.int64)


@cache
def _radii() -> Bytes:
    return class_radius().astype(np.uint8)


def _coded(values: NDArray[np.int32], active: int, levels: Bytes) -> _Coded:
    """The first columns of values [n, r] under levels [active]."""
    classes, shifts, _ = level_tables()
    rows, shift = classes[levels], shifts[levels]
    symbols = _symbols(values, active, shift, _radii()[rows])
    low = _pack_low(values[:, :active], shift).tobytes() if shift.any() else b""
    escapes = _NO_ESCAPES
    at = find_escapes(symbols)
    if at.size:
        t, c = np.divmod(at, active)
        escapes = values[t, c].astype(np.int64) >> shift[c]
    return _Coded(symbols, rows, low, escapes)


@dataclass(slots=True)
class Draft:
    """A chunk as symbols, before they are coded."""

    active: int
    base: int
    mean_base: int
    side: _Coded
    main: _Coded


def draft_chunk(chunk: Chunk, known: Expected | None) -> Draft:
    """See `Kernels`."""
    used = np.flatnonzero(chunk.square)
    active = int(used[-1]) + 1 if used.size else 0
    n = max(len(chunk.values), 1)
    spread = chunk.square[:active] / n - (chunk.total[:active] / n) ** 2
    levels = levels_of(np.sqrt(np.maximum(spread, 0)))
    if known is None:
        base = _median(levels)
        mean_base = mean_level(chunk.means)
        around: Any = base
        mean_levels = np.full(chunk.means.size, mean_base, np.uint8)
    else:
        base = mean_base = FROM_PROFILE
        around = known.levels[:active].astype(np.int64)
        mean_levels = known.mean_levels
    beside = np.concatenate([levels.astype(np.int64) - around, chunk.means], dtype=np.int32)
    beside_levels = np.concatenate([same(LEVEL_CLASS, active), mean_levels])
    return Draft(
        active=active,
        base=base,
        mean_base=mean_base,
        side=_coded(beside[None], beside.size, beside_levels),
        main=_coded(chunk.values, active, levels),
    )


def write_chunks(drafts: Sequence[Draft]) -> list[bytes]:
    """See `Kernels`; the more at once, the better."""
    streams = [x for draft in drafts for x in (draft.side, draft.main)]
    coded = rans.encode([x.symbols for x in streams], [x.rows for x in streams], rans.GAUSSIAN)
    out = []
    for i, draft in enumerate(drafts):
        side_coded, main_coded = coded[2 * i : 2 * i + 2]
        side, main = draft.side, draft.main
        number = side.escapes.size + main.escapes.size
        escapes = b""
        if number:
            escapes = encode_varints(np.concatenate([side.escapes, main.escapes]))
        low = side.low + main.low
        head = HEAD.pack(
            draft.active,
            draft.base,
            draft.mean_base,
            main_coded.words.size,
            side_coded.words.size,
            number,
            len(escapes),
            len(low),
        )
        parts = [
            head,
            *(x.astype("<u4").tobytes() for x in (side_coded.states, main_coded.states)),
            *(x.astype("<u2").tobytes() for x in (side_coded.words, main_coded.words)),
            low,
            escapes,
        ]
        out.append(b"".join(parts))
    return out


def _median(levels: Bytes) -> int:
    """The middle level, or the mean of both, rounded down; 0 of none."""
    if not levels.size:
        return 0
    order = np.sort(levels)
    return (int(order[(levels.size - 1) // 2]) + int(order[levels.size // 2])) // 2


def _symbols(values: NDArray[np.int32], active: int, shift: Bytes, radius: Bytes) -> Bytes:
    """(value >> shift) + `ZERO` of the first columns; `ESCAPE` for what exceeds the radius."""
    high = values[:, :active]
    if shift.any():
        high = high >> shift.astype(values.dtype)
    largest = radius.astype(values.dtype)
    out: Bytes = (high + np.asarray(ZERO, values.dtype)).astype(np.uint8)
    beyond = high > largest
    beyond |= high < -largest
    out[beyond] = ESCAPE
    return out


def _pack_low(values: NDArray[np.int32], shift: Bytes) -> Bytes:
    """Bit j of all values, in order, whose column has more than j low ones; j ascends."""
    planes = [
        (values[:, shift > j] >> j & 1).astype(np.uint8).ravel() for j in range(int(shift.max()))
    ]
    return np.packbits(np.concatenate(planes), bitorder="little")
