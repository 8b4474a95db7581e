# SPDX-License-Identifier: Apache-2.0
"""Rules that `StreamController` is measured against: CacheGen's two, and fixed levels.

Neither of CacheGen's rules knows of lossless levels; under a caller who asks for exact numbers
these choose among the lossless levels, or recompute, as `StreamController` does.
"""

import math
from dataclasses import dataclass

from kvlib.codecs.streaming import Choice, Progress, time_to_recompute
from kvlib.errors import ConfigError

__all__ = ["ArtefactRule", "FixedLevel", "PaperRule"]


@dataclass(frozen=True, slots=True)
class ArtefactRule:
    """CacheGen's released code: every chunk has an equal share of the SLO.

    The finest level whose transfer takes less than slo / chunks; if there is none, this chunk alone
    is recomputed. What a chunk saves is lost to the others; decoding, load and the time already
    spent are not looked at. The released code reads the rate of *this* chunk from the trace, which
    no real link tells; here it is the link's estimate, so hand it a `LinkEstimate.of` the true rate
    to reproduce that. There a recomputation counts 0.2 s whatever the chunk; a simulation charges
    what it takes.
    """

    def choose(self, progress: Progress) -> Choice:
        """What to do with chunk `progress.at`; the middle level while nothing is known."""
        pace, allowed = progress.link.s_per_byte, progress.allowed
        if not allowed:
            return Choice(None, time_to_recompute(progress))
        if pace is None:
            return Choice(allowed[len(allowed) // 2], math.nan)
        share = progress.slo_s / len(progress.context.offers)
        sizes = progress.remaining[0].nbytes
        for level in allowed:
            if sizes[level] * pace < share:
                return Choice(level, math.nan)
        return Choice(None, math.nan, to_end=False)


@dataclass(frozen=True, slots=True)
class PaperRule:
    """CacheGen's paper: text if recomputing all that remains fits, else the finest level that fits.

    The rate is that of the last chunk (a link estimate of gain 1 gives it), with no margin for its
    deviation; decoding is taken to be hidden. Nothing fits: the coarsest. The first chunk over an
    unknown link: the middle level.
    """

    def choose(self, progress: Progress) -> Choice:
        """What to do with chunk `progress.at`."""
        pace, allowed = progress.link.s_per_byte, progress.allowed
        recompute = Choice(None, time_to_recompute(progress))
        if not allowed or recompute.predicted_s <= progress.left_s:
            return recompute
        if pace is None:
            return Choice(allowed[len(allowed) // 2], math.nan)
        seconds = math.inf
        for level in allowed:
            seconds = sum(offer.nbytes[level] for offer in progress.remaining) * pace
            if seconds <= progress.left_s:
                return Choice(level, seconds)
        return Choice(allowed[-1], seconds)


@dataclass(frozen=True, slots=True)
class FixedLevel:
    """The same level for every chunk, or everything recomputed.

    Args:
        level: 0 the finest; None recomputes. A lossy level under a caller who asks for exact
            numbers is replaced by the coarsest lossless one, or by recomputation.

    Raises:
        ConfigError: a negative level.
    """

    level: int | None

    def __post_init__(self) -> None:
        if self.level is not None and self.level < 0:
            raise ConfigError(f"level={self.level}: expected 0 (the finest) or more, or None")

    def choose(self, progress: Progress) -> Choice:
        """That level.

        Raises:
            ConfigError: the context has no such level.
        """
        if self.level is None or not progress.allowed:
            return Choice(None, time_to_recompute(progress))
        if self.level >= progress.context.levels:
            raise ConfigError(
                f"level={self.level}: the context has levels 0 to {progress.context.levels - 1}"
            )
        return Choice(min(self.level, progress.allowed[-1]), math.nan)
