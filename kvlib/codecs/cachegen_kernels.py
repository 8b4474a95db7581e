# SPDX-License-Identifier: Apache-2.0
"""The inner loops of `cachegen`, written twice: `cachegen_numpy`, and compiled `cachegen_numba`.

Both give the same bits, so nobody has to care which one ran. They are chosen like the entropy
coder: numba where it works, unless the environment variable KVLIB_RANS names another one.

Symbols are decoded here and not by `kvlib.codecs.rans`, whose tables take 5 or 16 KiB a row, which
is nothing for 64 rows. Here every channel of every layer has two, tens of thousands in all, and
each is used a few hundred times in a record: what counts is how little of it has to be read.

Matrices are chunks [H, n, D] of keys or values, views on the CPU of float32, float16 or bfloat16;
the last dimension of those to be filled is contiguous. They are coded as [n, C], C = H D, the heads
side by side.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvlib.codecs import rans
from kvlib.codecs.rans import Bytes, Coded, Stream, Tables

if TYPE_CHECKING:
    from kvlib.codecs.cachegen_profile import ChannelTables

__all__ = [
    "ENTRIES",
    "ESCAPE",
    "EXACT_INTEGERS",
    "GROUP",
    "LARGEST",
    "PIECE",
    "Codes",
    "Floats",
    "Kernels",
    "Levels",
    "kernels",
    "num_anchors",
]

Floats = NDArray[np.float32]
Counts = NDArray[np.uint16]

GROUP = 10
"""Tokens of a group, the first of them its anchor."""
LARGEST = 127
"""The largest magnitude that has a symbol."""
ESCAPE = 255
EXACT_INTEGERS = 1 << 24
"""float32 holds whole numbers up to this one."""
ENTRIES = 33
"""Numbers of a stored distribution: as many as 32 bins need, also for 16."""
PIECE = 256
"""Tokens of a stream of the variant lmcache."""


def num_anchors(n: int) -> int:
    """Anchors among `n` tokens."""
    return -(-n // GROUP)


class Codes(NamedTuple):
    """A matrix as the variant paper codes it.

    Attributes:
        peaks: float32 [A], of the anchors.
        symbols: uint8 [n, C].
        escapes: int64, what the symbols `ESCAPE` stand for, token after token.
    """

    peaks: Floats
    symbols: Bytes
    escapes: NDArray[np.int64]


class Levels(NamedTuple):
    """A matrix as the variant lmcache codes it.

    Attributes:
        peaks: float32 [n].
        codes: uint8 [n, C].
        checks: uint32 [P, C], sums over each `PIECE` tokens.
    """

    peaks: Floats
    codes: Bytes
    checks: NDArray[np.uint32]


class Kernels(Protocol):
    """What either module has."""

    __name__: str

    def lookup(self, tables: Tables) -> Any:
        """What `decode` looks symbols up in."""
        ...

    def decode(self, streams: Sequence[Stream], coded: Sequence[Coded], lookup: Any) -> None:
        """Decode into `Stream.symbols`, then `kvlib.codecs.rans.check_end`.

        States are in their range, and there are no more words than symbols.
        """
        ...

    def quantize(self, x: Tensor, tables: "ChannelTables") -> Codes | None:
        """Symbols of a matrix; None if a number is too large, or a delta too many bins."""
        ...

    def dequantize(self, codes: Codes, width: np.float32, out: Tensor) -> bool:
        """Fill a matrix; False if escapes are not as many as symbols that say so."""
        ...

    def levels(self, x: Tensor, half: int) -> tuple[Levels, Counts] | None:
        """Codes of a matrix, 0..2 half; None if a number is too large.

        Also, uint16 [C, ENTRIES], how many tokens have a lower code than 0, 1, ... by channel.
        """
        ...

    def frequencies(self, below: Counts) -> Counts:
        """What such counts are coded with: uint16 [C, ENTRIES - 1], each row adds up to 4096."""
        ...

    def restore(self, levels: Levels, half: int, out: Tensor) -> bool:
        """Fill a matrix from codes 0..2 half; False if a check does not match."""
        ...


def kernels() -> Kernels:
    """The implementation to be used now."""
    wanted = os.environ.get("KVLIB_RANS") or "numba"
    return _module("numba" if wanted == "numba" and "numba" in rans.backends() else "numpy")


@cache
def _module(name: str) -> Kernels:
    return cast("Kernels", import_module(f"kvlib.codecs.cachegen_{name}"))
