# SPDX-License-Identifier: Apache-2.0
"""Coefficients times decoding matrices: what decoding a transform takes most of its time for.

The format leaves the order of these sums open, and so the last bits of float32. They are NumPy's
BLAS's, or those of `kvlib.codecs.products_numba` where numba and the processor allow it, whichever
entropy coder is chosen: on one machine all readers get the same bits.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs import rans

__all__ = ["Products"]

Float = NDArray[np.float32]


@cache
def _compiled() -> ModuleType | None:
    if "numba" not in rans.backends():
        return None
    from kvlib.codecs.rans_vector import SUPPORTED

    if not SUPPORTED:
        return None
    from kvlib.codecs import products_numba

    return products_numba


class Products:
    """Matrices that are multiplied with again and again.

    Args:
        matrices: float32 [r, width] each, of one shape.
    """

    def __init__(self, matrices: Sequence[Float]) -> None:
        self._width = matrices[0].shape[1]
        self._compiled = _compiled()
        if self._compiled is not None and self._width % self._compiled.COLUMNS:
            self._compiled = None
        lay = np.ascontiguousarray if self._compiled is None else self._compiled.panels
        self._matrices = np.stack([lay(matrix) for matrix in matrices])

    def rows(self, y: Float) -> Float:
        """The first coefficients of each matrix, [matrices, n, a], to rows [n, matrices * width].

        The other coefficients are 0.
        """
        count, n, active = y.shape
        out = np.empty((n, count * self._width), np.float32)
        if self._compiled is not None:
            for i in range(count):
                mine = np.ascontiguousarray(y[i])
                self._compiled.multiply(mine, self._matrices[i], out, i * self._width)
            return out
        every = out.reshape(n, count, self._width).transpose(1, 0, 2)
        np.matmul(y, self._matrices[:, :active], out=every)
        return out
