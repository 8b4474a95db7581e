# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries to leaves where they lie, compiled by numba.

A decoding step has a handful of query rows for each KV head: reading keys and values once is all
its work. With torch leaves must be copied next to each other first, which moves three times as many
bytes.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from kvlib.store.leaves import LEAF_TOKENS

__all__ = ["leaf_logits", "leaf_values"]

Floats = NDArray[np.float32]

_FREELY = {"reassoc", "contract", "nsz"}
"""Sums may be taken in any order, as in a matrix product; NaNs and infinities stay."""

_float = types.float32
_MEMORY = types.Array(_float, 2, "C", readonly=True)
_SLOTS = types.Array(types.int64, 1, "C", readonly=True)
_READ, _WRITTEN = (types.Array(_float, 3, "C", readonly=x) for x in (True, False))


def _compiled(*arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def compiled(function: Callable[..., None]) -> Callable[..., None]:
        signature = types.void(*arguments)
        try:
            made = njit(signature, nogil=True, fastmath=_FREELY, cache=True)(function)
        except (OSError, RuntimeError):  # no folder to write to: compile in every process
            made = njit(signature, nogil=True, fastmath=_FREELY)(function)
        return cast("Callable[..., None]", made)

    return compiled


@_compiled(_MEMORY, _SLOTS, _READ, _WRITTEN)
def leaf_logits(memory: Floats, slots: NDArray[np.int64], rows: Floats, out: Floats) -> None:
    """Logits of the keys of leaves.

    Args:
        memory: float32 [slots, numbers of a slot], keys first; see `LeafShape`.
        slots: int64 [n].
        rows: queries, scaled, [heads, rows, D].
        out: [heads, rows, n * LEAF_TOKENS], written.
    """
    heads, count, dim = rows.shape
    for i in range(len(slots)):
        leaf = memory[slots[i]]
        for head in range(heads):
            for token in range(LEAF_TOKENS):
                key = (head * LEAF_TOKENS + token) * dim
                for row in range(count):
                    total = np.float32(0)
                    for d in range(dim):
                        total += leaf[key + d] * rows[head, row, d]
                    out[head, row, i * LEAF_TOKENS + token] = total


@_compiled(_MEMORY, _SLOTS, _READ, types.int64, _WRITTEN)
def leaf_values(
    memory: Floats, slots: NDArray[np.int64], weights: Floats, first: int, out: Floats
) -> None:
    """Values of leaves, times their weights, summed.

    Args:
        memory: see `leaf_logits`.
        slots: int64 [n].
        weights: [heads, rows, n * LEAF_TOKENS].
        first: where values begin in a leaf, in numbers.
        out: [heads, rows, Dv], written.
    """
    heads, count, dim = out.shape
    out[:] = 0
    for i in range(len(slots)):
        leaf = memory[slots[i]]
        tokens = slice(i * LEAF_TOKENS, (i + 1) * LEAF_TOKENS)
        for head in range(heads):
            at = first + head * LEAF_TOKENS * dim
            values = leaf[at : at + LEAF_TOKENS * dim]
            for row in range(count):
                weight = weights[head, row, tokens]
                mixed = out[head, row]
                for d in range(dim):
                    total = np.float32(0)
                    for token in range(LEAF_TOKENS):
                        total += weight[token] * values[token * dim + d]
                    mixed[d] += total
