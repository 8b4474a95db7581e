# SPDX-License-Identifier: Apache-2.0
"""Tables of symbol frequencies for the entropy coder, and the 64 parametric ones of version 1.

Quantized KV channels look alike once they are scaled: a table chosen by the channel's standard
deviation costs no more than one trained on its symbols, and one byte says which it was.

Class c has sigma_c = 0.08 * 112.5^(c / 63), from 0.08 to 9, and covers the integers -R_c..R_c with
R_c = min(30, ceil(6 sigma_c + 1.5)). The probability of v is the mass that the mixture
0.75 Normal(0, sigma_c) + 0.25 Laplace(0, sigma_c / sqrt 2) has between v - 1/2 and v + 1/2; symbol
v + 31 stands for it. `ESCAPE` (62) has 2e-4. A frequency is max(1, round(4096 p)), and the mode
takes what is missing to 4096.

Encoder and decoder must agree on every bit of a table wherever they run, so none is computed with
the platform's `exp` and `erf`: `decimal` rounds all its operations correctly. 20 digits are plenty,
as no 4096 p lies within 0.001 of a half. docs/formats/codec.md has the SHA-256.
"""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, localcontext
from functools import cache, cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvlib.errors import ConfigError

__all__ = ["CLASSES", "ESCAPE", "Tables", "class_radius", "class_sigmas", "gaussian_tables"]

PRECISION = 12
"""Bits of a probability."""
TOTAL = 1 << PRECISION
"""What the frequencies of a row add up to."""
MAX_ALPHABET = 256

CLASSES = 64
MAX_RADIUS = 30
ESCAPE = 62
"""The symbol for what a class does not cover."""
ALPHABET = 63

_T = TypeVar("_T", bound=np.generic)
_CONTEXT = Context(prec=20, rounding=ROUND_HALF_EVEN)
_TWO_BY_ROOT_PI = Decimal("1.12837916709551257389615890312154517168810125865799771")
_FAR = Decimal(7)  # 1 - erf(7) < 1e-22


@dataclass(frozen=True, eq=False)
class Tables:
    """Rows of symbol frequencies, and what the coders make of them.

    The derived arrays are made when first asked for, and read-only like `frequencies`.

    Args:
        frequencies: whole numbers [K, A], A <= 256, K <= 65536. Each row adds up to 4096; a symbol
            with frequency 0 cannot be coded with that row.

    Raises:
        ConfigError: they are something else.
    """

    frequencies: NDArray[np.uint16]

    def __post_init__(self) -> None:
        given = np.asarray(self.frequencies)
        if given.dtype.kind not in "iu" or given.ndim != 2:
            raise ConfigError(
                f"frequencies are whole numbers [rows, symbols], got {given.dtype} "
                f"{list(given.shape)}"
            )
        if not (1 <= given.shape[0] <= 1 << 16 and 1 <= given.shape[1] <= MAX_ALPHABET):
            raise ConfigError(
                f"frequencies have 1..65536 rows of 1..{MAX_ALPHABET} symbols, got "
                f"{list(given.shape)}"
            )
        # Each alone first: a sum of huge ones may wrap around to the right one.
        wrong = ((given < 0) | (given > TOTAL)).any(1) | (given.sum(1) != TOTAL)
        if wrong.any():
            row = int(wrong.argmax())
            raise ConfigError(
                f"the frequencies of row {row} are not in 0..{TOTAL} or do not add up to {TOTAL}; "
                "scale them to it"
            )
        object.__setattr__(self, "frequencies", _frozen(given.astype(np.uint16)))

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.frequencies.shape[0])

    @property
    def alphabet(self) -> int:
        """Number of symbols."""
        return int(self.frequencies.shape[1])

    @cached_property
    def cumulative(self) -> NDArray[np.uint16]:
        """Sum of the frequencies of the lower symbols, [K, A]."""
        total = self.frequencies.cumsum(1, dtype=np.uint16)
        return _frozen(total - self.frequencies)

    @cached_property
    def encoder(self) -> NDArray[np.uint32]:
        """At 256 * row + symbol: frequency << 12 | cumulative; 0 where there is no such symbol."""
        f = self.frequencies.astype(np.uint32)
        packed = np.zeros((len(self), MAX_ALPHABET), np.uint32)
        packed[:, : self.alphabet] = np.where(f > 0, f << PRECISION | self.cumulative, 0)
        return _frozen(packed.reshape(-1))

    @cached_property
    def symbols(self) -> NDArray[np.uint8]:
        """At 4096 * row + slot: the symbol whose share of the row the slot lies in."""
        every = np.tile(np.arange(self.alphabet, dtype=np.uint8), len(self))
        return _frozen(every.repeat(self.frequencies.reshape(-1)))

    @cached_property
    def decoder(self) -> NDArray[np.uint32]:
        """At 4096 * row + slot: (frequency - 1) << 20 | (slot - cumulative) << 8 | symbol."""
        symbols = self.symbols.reshape(len(self), TOTAL)
        entries = self.encoder.reshape(len(self), MAX_ALPHABET)
        entry = np.take_along_axis(entries, symbols.astype(np.intp), 1)
        low = np.arange(TOTAL, dtype=np.uint32) - (entry & (TOTAL - 1))
        packed = (entry >> PRECISION) - 1 << 20 | low << 8 | symbols
        return _frozen(packed.reshape(-1).astype(np.uint32, copy=False))

    @cached_property
    def by_symbol(self) -> NDArray[np.uint32]:
        """At 256 * row + symbol: (4096 - frequency) << 20 | symbol << 12 | cumulative.

        x - (4096 - frequency) * (x >> 12) - cumulative is what a state becomes in decoding.
        """
        entry = self.encoder.reshape(len(self), MAX_ALPHABET)
        symbol = np.arange(MAX_ALPHABET, dtype=np.uint32)
        packed = TOTAL - (entry >> PRECISION) << 20 | symbol << PRECISION | entry & (TOTAL - 1)
        return _frozen(packed.reshape(-1).astype(np.uint32, copy=False))

    @cached_property
    def by_slot(self) -> NDArray[np.uint32]:
        """At 4096 * row + slot: what `by_symbol` has for the slot's symbol."""
        place = np.arange(0, MAX_ALPHABET * len(self), MAX_ALPHABET)[:, None]
        return _frozen(self.by_symbol.take(place + self.symbols.reshape(len(self), -1)).reshape(-1))


def _frozen(x: NDArray[_T]) -> NDArray[_T]:
    x.setflags(write=False)
    return x


def _erf(x: Decimal) -> Decimal:
    """The error function of x >= 0, by the series whose terms are all positive."""
    if x > _FAR:
        return Decimal(1)
    square = 2 * x * x
    term = total = x
    odd = 1
    while term > total * Decimal("1e-20"):
        odd += 2
        term = term * square / odd
        total += term
    return _TWO_BY_ROOT_PI * (-x * x).exp() * total


@cache
def _sigmas() -> tuple[Decimal, ...]:
    with localcontext(_CONTEXT):
        step = (Decimal(9) / Decimal("0.08")).ln() / (CLASSES - 1)
        return tuple(Decimal("0.08") * (c * step).exp() for c in range(CLASSES))


@cache
def class_sigmas() -> NDArray[np.float64]:
    """The standard deviation each class stands for, ascending, [64]."""
    return _frozen(np.array([float(sigma) for sigma in _sigmas()]))


@cache
def class_radius() -> NDArray[np.int64]:
    """The largest magnitude each class can code without `ESCAPE`, [64]."""
    with localcontext(_CONTEXT):
        radius = [(6 * s + Decimal("1.5")).to_integral_value(ROUND_CEILING) for s in _sigmas()]
    return _frozen(np.minimum(np.array([int(r) for r in radius]), MAX_RADIUS))


def _class_frequencies(sigma: Decimal, radius: int) -> list[int]:
    """The row of one class."""
    half, root2 = Decimal("0.5"), Decimal(2).sqrt()
    below = []  # the mass between 0 and each upper bin edge
    for v in range(radius + 1):
        edge = v + half
        normal = _erf(edge / (sigma * root2)) / 2
        laplace = (1 - (-edge * root2 / sigma).exp()) / 2
        below.append(3 * normal / 4 + laplace / 4)
    mass = [2 * below[0]] + [b - a for a, b in pairwise(below)]
    side = [max(1, int((p * TOTAL).to_integral_value())) for p in mass]
    row = [0] * ALPHABET
    for v in range(1, radius + 1):
        row[MAX_RADIUS + 1 - v] = row[MAX_RADIUS + 1 + v] = side[v]
    row[ESCAPE] = max(1, int((Decimal("2e-4") * TOTAL).to_integral_value()))
    row[MAX_RADIUS + 1] = TOTAL - sum(row)
    return row


@cache
def gaussian_tables() -> Tables:
    """The tables of the 64 classes, alphabet 63; made once."""
    with localcontext(_CONTEXT):
        pairs = zip(_sigmas(), class_radius().tolist(), strict=True)
        return Tables(np.array([_class_frequencies(*pair) for pair in pairs], np.uint16))
