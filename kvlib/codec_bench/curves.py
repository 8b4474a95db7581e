# SPDX-License-Identifier: Apache-2.0
"""Comparing families at equal quality, by interpolation inside what was measured.

Uniform quantization makes bits fall linearly with the logarithm of the loss, so between two points
of a family bits are interpolated over log KL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvlib.codec_bench.grid import SINKS

__all__ = ["Comparison", "Point", "bits_at", "compare", "frontier", "ratio_at"]

LADDER = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1)
"""KL at which families are compared, where both were measured."""
_OURS = ("kvlc small", "kvlc archive", "kvlc balanced", "kvlc near", "kvlc near, no profile")
_BASELINES = ("cachegen", "cachegen" + SINKS, "lmcache", "lmcache" + SINKS)


@dataclass(frozen=True, slots=True)
class Point:
    """What a method takes and loses."""

    bits: float
    kl: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """At `kl`, `other` needs `ratio` times the bits of `ours`."""

    kl: float
    other: str
    other_bits: float
    ours: str
    our_bits: float

    @property
    def ratio(self) -> float:
        """Bits of `other` over bits of `ours`."""
        return self.other_bits / self.our_bits

    def text(self) -> str:
        """As a line."""
        return (
            f"at KL {self.kl:.3g}, {self.other} needs {self.ratio:.2f} times the bits of "
            f"{self.ours} ({self.other_bits:.2f} and {self.our_bits:.2f} bits a value)"
        )


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points than which no other is smaller and better, by ascending loss.

    Points without a loss have no place on a logarithmic scale and are left out.
    """
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kl, p.bits)):
        if point.kl > 0 and (not out or point.bits < out[-1].bits):
            out.append(point)
    return out


def bits_at(points: Sequence[Point], kl: float) -> float | None:
    """Bits a value with which a family loses `kl`; None outside what was measured."""
    best = frontier(points)
    if not best or not best[0].kl <= kl <= best[-1].kl:
        return None
    scale = np.log([p.kl for p in best])
    return float(np.interp(np.log(kl), scale, [p.bits for p in best]))


def ratio_at(
    families: Mapping[str, Sequence[Point]], other: str, ours: str, kl: float
) -> float | None:
    """Bits of one family over those of another; None where one of them was not measured."""
    found = bits_at(families[other], kl), bits_at(families[ours], kl)
    return None if found[0] is None or found[1] is None else found[0] / found[1]


def compare(families: Mapping[str, Sequence[Point]]) -> list[Comparison]:
    """Every pair of one of ours and a baseline, at losses at which both were measured.

    A family of a single point is compared at its own loss.
    """
    out = []
    for other in (name for name in _BASELINES if name in families):
        for ours in (name for name in _OURS if name in families):
            single = [families[name] for name in (other, ours) if len(families[name]) == 1]
            for kl in sorted({*LADDER, *(p.kl for points in single for p in points)}):
                found = bits_at(families[other], kl), bits_at(families[ours], kl)
                if found[0] is not None and found[1] is not None:
                    out.append(Comparison(kl, other, found[0], ours, found[1]))
    return out
