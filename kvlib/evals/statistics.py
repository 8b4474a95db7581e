# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests. Questions of one context are correlated, so contexts are what is resampled.

Methods are compared on the same questions: differences are taken per question first. With few
contexts a bootstrap interval is too narrow, and where all contexts agree it has no width at all.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Interval", "McNemar", "cluster_mean", "holm", "mcnemar"]

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its bootstrap interval; None below two contexts."""

    mean: float
    low: float | None
    high: float | None

    def disjoint(self, other: "Interval") -> bool:
        """Whether the intervals have no number in common."""
        ends = (self.low, self.high, other.low, other.high)
        if any(end is None for end in ends):
            return False
        low, high, its_low, its_high = (float(end) for end in ends if end is not None)
        return high < its_low or its_high < low


@dataclass(frozen=True, slots=True)
class McNemar:
    """Pairs of right and wrong answers that differ, and the exact two-sided p of a fair coin."""

    only_first: int
    only_second: int
    p: float


def cluster_mean(clusters: Mapping[object, Sequence[float]], *, seed: int = 0) -> Interval:
    """Mean over all values, with a percentile bootstrap interval over clusters.

    Args:
        clusters: values by cluster (context); every cluster has at least one.
        seed: of the resampling. Clusters are taken in their order, so equal input gives equal
            output.
    """
    sums = np.array([float(np.sum(values)) for values in clusters.values()])
    counts = np.array([len(values) for values in clusters.values()], dtype=np.float64)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(mean, None, None)
    if np.ptp(sums / counts) == 0:
        return Interval(mean, mean, mean)

    def ratio(
        sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], axis: int
    ) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = sums.sum(axis) / counts.sum(axis)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of degenerate resamples
        found = stats.bootstrap(
            (sums, counts),
            ratio,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Exact McNemar test on paired answers that are 0 or 1.

    It takes questions as independent, which those of one context are not: read it beside the
    interval.
    """
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    num = only_first + only_second
    p = float(stats.binomtest(only_first, num).pvalue) if num else 1.0
    return McNemar(only_first, only_second, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected
