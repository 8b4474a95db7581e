# SPDX-License-Identifier: Apache-2.0
"""The inner loops of `kvlc`, which are written twice: `kvlc_numpy`, and compiled `kvlc_numba`.

Both give the same bits, so nobody has to care which one ran. They are chosen like the entropy
coder: numba where it works, unless the environment variable KVLIB_RANS names another one.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvlib.codecs import rans
from kvlib.codecs.rope import Angles
from kvlib.spec import RopeSpec

if TYPE_CHECKING:
    from kvlib.codecs.coefficients import Chunk, Decoded, Expected, Packed
    from kvlib.codecs.coefficients_write_numpy import Draft

__all__ = ["Kernels", "Turning", "kernels"]

Bytes = NDArray[np.uint8]
Int = NDArray[np.int64]
Values = NDArray[np.int32]
Float = NDArray[np.float32]
Double = NDArray[np.float64]
Turning = tuple[Angles, RopeSpec]
"""Angles of the rows at hand, and where in a head they belong."""


class Kernels(Protocol):
    """What either module has.

    Rows are float32 [n, width]: of each part, [heads, T, D], the heads side by side.
    """

    def gather(
        self, parts: Sequence[Tensor], index: Int, turning: Turning | None, limit: float
    ) -> tuple[Float, bool]:
        """The entries `index` of all heads as rows, turned back.

        Also whether all sizes were below the limit, which is a float32; if not, rows hold anything.
        """
        ...

    def place(
        self, parts: Sequence[Tensor], index: Int, rows: Float, bias: Float, turning: Turning | None
    ) -> None:
        """Write rows + bias, turned and rounded once, to the entries `index`; `rows` is lost."""
        ...

    def sums(self, rows: Float) -> Double:
        """The sum of each column, added up from the first row to the last."""
        ...

    def squares(self, rows: Float, mean: Double) -> Double:
        """The sum of squared differences from the mean of each column, in the same order."""
        ...

    def quantize(
        self, rows: Float, mean: Float, scale: np.float32, most: float
    ) -> tuple[Values, Int, Int] | None:
        """(rows - mean) * scale rounded to even, and the sums of each column and of its squares.

        None where a size is not below `most`, which is at most 2^24.
        """
        ...

    def draft_chunk(self, chunk: "Chunk", known: "Expected | None") -> "Draft | bytes":
        """A chunk as symbols, or as bytes at once if it need not wait for others.

        Without expectations it carries one level for all its channels. Values and means must be
        below 2^30 in size, and at most 65535 channels are active.
        """
        ...

    def write_chunks(self, drafts: "Sequence[Draft | bytes]") -> list[bytes]:
        """Each chunk as bytes."""
        ...

    def read_chunks(self, packed: Sequence["Packed"]) -> Iterator["Decoded"]:
        """Decode chunks; what comes out may be overwritten by the next.

        Raises:
            CorruptDataError: streams that no encoder writes.
        """
        ...


def kernels() -> Kernels:
    """The implementation to be used now."""
    wanted = os.environ.get("KVLIB_RANS") or "numba"
    return _module("numba" if wanted == "numba" and "numba" in rans.backends() else "numpy")


@cache
def _module(name: str) -> Kernels:
    return cast("Kernels", import_module(f"kvlib.codecs.kvlc_{name}"))
