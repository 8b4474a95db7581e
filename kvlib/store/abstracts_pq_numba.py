# SPDX-License-Identifier: Apache-2.0
"""Looking product-quantized keys up, compiled by numba: codes are read as the bytes they are.

With torch they are spread out to integers of 4 bytes first, which takes longer than the looking up.
Sums are taken in the order of the parts, so both give the same bits.
"""

from collections.abc import Callable
from typing import cast

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

__all__ = ["look_up"]

_CODES = types.Array(types.uint8, 3, "C", readonly=True)
_TABLES = types.Array(types.float32, 3, "C", readonly=True)
_OUT = types.Array(types.float32, 3, "C")
_PIECE = 512  # tokens whose codes stay in the nearest cache while all rows look them up

Floats = NDArray[np.float32]


def _look_up(codes: NDArray[np.uint8], tables: Floats, centroids: int, out: Floats) -> None:
    tokens, heads, parts = codes.shape
    for head in range(heads):
        for at in range(0, tokens, _PIECE):
            for row in range(out.shape[1]):
                table = tables[head, row]
                for token in range(at, min(at + _PIECE, tokens)):
                    total = np.float32(0)
                    for part in range(parts):
                        total += table[part * centroids + codes[token, head, part]]
                    out[head, row, token] = total


def _compiled() -> Callable[[NDArray[np.uint8], Floats, int, Floats], None]:
    signature = types.void(_CODES, _TABLES, types.int64, _OUT)
    try:
        made = njit(signature, nogil=True, cache=True)(_look_up)
    except (OSError, RuntimeError):  # no folder to write to: compile in every process
        made = njit(signature, nogil=True)(_look_up)
    return cast("Callable[[NDArray[np.uint8], Floats, int, Floats], None]", made)


look_up = _compiled()
"""Sum what the parts of codes have in tables.

Args:
    codes: uint8 [tokens, heads, parts].
    tables: float32 [heads, rows, parts * centroids].
    centroids: of a part.
    out: float32 [heads, rows, tokens], written.
"""
