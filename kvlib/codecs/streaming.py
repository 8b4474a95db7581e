# SPDX-License-Identifier: Apache-2.0
"""Which encoding of each chunk to fetch over a link, or from where on to recompute.

**Problem.** The KV of a long context lies behind a link, cut into chunks, each stored at several
encoding levels. The first token is wanted within a time (the SLO). The link's speed is known only
from what has arrived; decoding a chunk takes the accelerator and runs behind the transfer; a tail
of the context can be recomputed from its text. Before every chunk a rule looks at where the request
stands (`Progress`) and answers with a `Choice`. Rules are pure: they do no I/O, hold no state and
read no clock.

**Method.** CacheGen's streaming adapter (SIGCOMM'24) with the changes below; the rules of its paper
and of its released code are in `kvlib.codecs.stream_baselines`. Before each chunk
`StreamController` takes the first that holds, for the link's average pace plus its deviation:

1. The finest level at which *all* remaining chunks arrive and are decoded in the time left. Time
   saved on one chunk is time left for the next, so no slack is lost. After a few chunks at a level
   the rest fits at the next finer one: the rule mixes two neighbouring levels, coarser first,
   without planning for it. On a steady link that is the best mix where levels are evenly spaced
   and each costs more quality than the last (`reserve` 0).
2. Some chunks at the coarsest level and the rest recomputed after them, as few as make it fit.
   Only a suffix is ever recomputed: a chunk's recomputation needs all KV before it.
3. Everything from here recomputed.
4. Nothing fits for certain: the coarsest level while that may end before recomputing would, at the
   average pace less its deviation; else recomputation. (The paper's rule stays at the coarsest
   level, however slow the link has become.)

The paper prefers recomputing to any level where it fits; here the accelerator's time is spared and
levels come first. Levels rise one at a time and fall at once.

**Estimate.** `LinkEstimate` averages seconds per byte, not bytes per second. Times add up, rates do
not: on a link that is fast and slow for equal amounts of data the mean rate promises too much (5.05
for 2.15 Gbit/s, where each chunk's rate is uniform in 0.1-10 Gbit/s), and a rate minus its
deviation can reach zero, which seconds plus their deviation cannot.

**Measurements.** A store measures its tiers, decoding and prefill already (`kvlib.store.cost.
CostModel`); `Context.measured` and `CostModel.link` take them from there, so that this and the
store's own choice between loading and computing follow from the same numbers.

**Exact.** A caller who asks for exact numbers gets lossless levels or recomputation, never a lossy
level, whatever that does to the time.

Chunks decode on their own, so changing the level costs nothing in itself. Latency of a request for
a chunk is not modelled: ask for the next chunk before the last one has ended.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Protocol

from kvlib.errors import ConfigError

__all__ = [
    "Choice",
    "Chunk",
    "ChunkOffer",
    "Context",
    "LinkEstimate",
    "Progress",
    "Speeds",
    "StreamController",
    "StreamRule",
    "time_to_recompute",
]

# Plans that end exactly at the deadline must not fail by the rounding of sums of times.
_ROUNDING = 1e-9


def check_positive(value: float, what: str, *, zero: bool = False) -> None:
    """Refuse what is not a finite positive number (or zero, where allowed).

    Raises:
        ConfigError: naming `what`.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        wanted = "zero or more" if zero else "more than zero"
        raise ConfigError(f"{what}={value!r}: expected a finite number, {wanted}")


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """Seconds per byte of a link and their mean deviation, as exponential averages.

    The recurrences are those of TCP's retransmission timer (RFC 6298): the deviation is averaged
    from the error of the mean before this measurement. The first measurement sets it to all of
    itself (there: half), for one chunk says nothing about the next, and recomputing cannot be taken
    back. Keep the estimate of a link across requests: the first chunk is then no guess.

    Args:
        s_per_byte: average; None while nothing is known.
        deviation: average of absolute errors, in seconds per byte.
        gain: weight of a new measurement, in (0, 1].

    Raises:
        ConfigError: a number out of range.
    """

    s_per_byte: float | None = None
    deviation: float = 0.0
    gain: float = 0.25

    def __post_init__(self) -> None:
        if self.s_per_byte is not None:
            check_positive(self.s_per_byte, "s_per_byte")
        check_positive(self.deviation, "deviation", zero=True)
        if not 0 < self.gain <= 1:
            raise ConfigError(f"gain={self.gain!r}: expected a weight above 0 and at most 1")

    @classmethod
    def of(cls, bytes_per_s: float, *, spread: float = 0.0, gain: float = 0.25) -> "LinkEstimate":
        """An estimate from a known or advertised rate.

        Args:
            bytes_per_s: the rate.
            spread: deviation as a share of the seconds per byte; 0 trusts the rate.
            gain: see the class.
        """
        check_positive(bytes_per_s, "bytes_per_s")
        check_positive(spread, "spread", zero=True)
        return cls(1 / bytes_per_s, spread / bytes_per_s, gain)

    @property
    def bytes_per_s(self) -> float | None:
        """The rate that the average stands for; None while nothing is known."""
        return None if self.s_per_byte is None else 1 / self.s_per_byte

    def after(self, nbytes: int, seconds: float) -> "LinkEstimate":
        """The estimate once `nbytes` have arrived in `seconds`."""
        check_positive(nbytes, "nbytes")
        check_positive(seconds, "seconds")
        seen = seconds / nbytes
        if self.s_per_byte is None:
            return replace(self, s_per_byte=seen, deviation=seen)
        error = seen - self.s_per_byte
        return replace(
            self,
            s_per_byte=self.s_per_byte + self.gain * error,
            deviation=self.deviation + self.gain * (abs(error) - self.deviation),
        )


@dataclass(frozen=True, slots=True)
class ChunkOffer:
    """What one chunk of a context costs.

    Args:
        tokens: tokens it covers.
        nbytes: bytes to transfer at each level, finest level first.
        decode_s: seconds the accelerator takes to decode it at load 1.
        prefill_s: seconds to recompute it, given all KV before it, at load 1.

    Raises:
        ConfigError: no tokens, no levels, a level larger than a finer one, a bad number.
    """

    tokens: int
    nbytes: tuple[int, ...]
    decode_s: float
    prefill_s: float

    def __post_init__(self) -> None:
        check_positive(self.tokens, "tokens")
        check_positive(self.decode_s, "decode_s", zero=True)
        check_positive(self.prefill_s, "prefill_s", zero=True)
        if not self.nbytes:
            raise ConfigError("nbytes=(): a chunk needs at least one level to be fetched at")
        for size in self.nbytes:
            check_positive(size, "nbytes")
        if list(self.nbytes) != sorted(self.nbytes, reverse=True):
            raise ConfigError(
                f"nbytes={self.nbytes}: expected the finest level first, sizes not growing; "
                "leave out a level that is larger than a finer one"
            )


class Speeds(Protocol):
    """What is known of this machine; `kvlib.store.cost.CostModel` is one."""

    def decode_seconds(self, num_bytes: int) -> float | None:
        """Seconds to decode so many bytes of KV; None if that is not known."""
        ...

    def prefill_seconds(self, tokens: int, position: int) -> float | None:
        """Seconds to compute tokens from a position on; None if that is not known."""
        ...


class Chunk(NamedTuple):
    """A chunk as it is stored.

    Attributes:
        tokens: tokens it covers.
        nbytes: bytes to transfer at each level, finest level first.
        raw_bytes: bytes of the KV that it decodes to.
    """

    tokens: int
    nbytes: tuple[int, ...]
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class Context:
    """The chunks of one context in order, and which levels are lossless.

    Args:
        offers: one a chunk, with the same levels.
        lossless_levels: how many of the finest levels restore the numbers bit for bit.

    Raises:
        ConfigError: no chunks, chunks of different levels, more lossless levels than levels.
    """

    offers: tuple[ChunkOffer, ...]
    lossless_levels: int = 0
    prefill_from: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.offers:
            raise ConfigError("offers=(): a context needs at least one chunk")
        counts = sorted({len(offer.nbytes) for offer in self.offers})
        if len(counts) > 1:
            raise ConfigError(
                f"chunks offer {counts} levels; expected the same levels of every chunk"
            )
        if not 0 <= self.lossless_levels <= counts[0]:
            raise ConfigError(
                f"lossless_levels={self.lossless_levels}: expected 0 to {counts[0]}, "
                "the number of levels"
            )
        sums = accumulate((offer.prefill_s for offer in reversed(self.offers)), initial=0.0)
        object.__setattr__(self, "prefill_from", tuple(sums)[::-1])

    @classmethod
    def measured(
        cls, speeds: Speeds, chunks: Sequence[Chunk], *, start: int = 0, lossless_levels: int = 0
    ) -> "Context | None":
        """A context whose times are those measured.

        Args:
            speeds: the measurements.
            chunks: in order.
            start: tokens before the first chunk, which are there already.
            lossless_levels: see the class.

        Returns:
            None as long as decoding or prefill was never measured: then there is nothing to weigh.
        """
        offers = []
        for chunk in chunks:
            decode = speeds.decode_seconds(chunk.raw_bytes)
            prefill = speeds.prefill_seconds(chunk.tokens, start)
            if decode is None or prefill is None:
                return None
            offers.append(ChunkOffer(chunk.tokens, chunk.nbytes, decode, prefill))
            start += chunk.tokens
        return cls(tuple(offers), lossless_levels)

    @property
    def levels(self) -> int:
        """Number of encoding levels."""
        return len(self.offers[0].nbytes)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request stands before its next chunk.

    Args:
        context: what is fetched.
        at: index of the next chunk; all before it have arrived.
        left_s: seconds until the deadline; negative when it has passed.
        link: estimate of the link.
        busy_s: seconds until the accelerator has decoded what has arrived.
        load: how many times longer than alone the accelerator takes (concurrent requests).
        exact: the caller accepts no lossy level.
        previous: level of the chunk before; None before the first.
        slo_s: the whole time allowed; only rules that split it among chunks look at it.

    Raises:
        ConfigError: an index or number out of range.
    """

    context: Context
    at: int
    left_s: float
    link: LinkEstimate
    busy_s: float = 0.0
    load: float = 1.0
    exact: bool = False
    previous: int | None = None
    slo_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.at < len(self.context.offers):
            raise ConfigError(
                f"at={self.at}: expected the index of a chunk, 0 to {len(self.context.offers) - 1}"
            )
        if math.isnan(self.left_s) or math.isnan(self.slo_s):
            raise ConfigError(f"left_s={self.left_s}, slo_s={self.slo_s}: expected seconds")
        check_positive(self.busy_s, "busy_s", zero=True)
        check_positive(self.load, "load")
        if self.previous is not None and not 0 <= self.previous < self.context.levels:
            raise ConfigError(
                f"previous={self.previous}: expected a level, 0 to {self.context.levels - 1}"
            )

    @property
    def remaining(self) -> Sequence[ChunkOffer]:
        """Offers of the chunks still to come."""
        return self.context.offers[self.at :]

    @property
    def allowed(self) -> range:
        """Levels that the caller accepts, finest first."""
        return range(self.context.lossless_levels if self.exact else self.context.levels)


@dataclass(frozen=True, slots=True)
class Choice:
    """What to do with the next chunk.

    Args:
        level: to fetch it at, 0 the finest; None to recompute it.
        predicted_s: seconds from now until the first token can be computed; NaN from rules that
            predict nothing.
        to_end: with level None: recompute everything after it too, and ask no more.
    """

    level: int | None
    predicted_s: float
    to_end: bool = True


class StreamRule(Protocol):
    """Anything that chooses."""

    def choose(self, progress: Progress) -> Choice:
        """What to do with chunk `progress.at`."""
        ...


def time_to_recompute(progress: Progress) -> float:
    """Seconds until all chunks from here are recomputed; it begins when decoding has ended."""
    return progress.busy_s + progress.load * progress.context.prefill_from[progress.at]


def ready_times(progress: Progress, level: int, s_per_byte: float) -> list[float]:
    """Seconds from now until each remaining chunk has arrived at `level` and is decoded."""
    arrived, ready, out = 0.0, progress.busy_s, []
    for offer in progress.remaining:
        arrived += offer.nbytes[level] * s_per_byte
        ready = max(ready, arrived) + progress.load * offer.decode_s
        out.append(ready)
    return out


@dataclass(frozen=True, slots=True)
class StreamController:
    """kvlib's rule; see the module for the order in which it tries plans.

    Args:
        deviations: careful plans are made for seconds per byte plus this many deviations. Giving up
            on the link needs the average minus as many to be too slow.
        reserve: share of the SLO that a level finer than the coarsest must leave unused. Without
            it every request ends just before its deadline, and any bad news comes too late.
        first: level of the first chunk over a link of which nothing is known: 0 the finest, 1 the
            coarsest, between them rounded towards the coarser.
        rise: levels by which a chunk may be finer than the one before it; it may be any number
            coarser. One fast chunk is weak evidence, and a chunk too fine is paid for by all after
            it.

    Raises:
        ConfigError: a number out of range.
    """

    deviations: float = 1.0
    reserve: float = 0.1
    first: float = 1.0
    rise: int = 1

    def __post_init__(self) -> None:
        check_positive(self.deviations, "deviations", zero=True)
        if not 0 <= self.reserve < 1:
            raise ConfigError(f"reserve={self.reserve!r}: expected a share, 0 or more and below 1")
        if not 0 <= self.first <= 1:
            raise ConfigError(f"first={self.first!r}: expected 0 (finest) to 1 (coarsest)")
        if self.rise < 1:
            raise ConfigError(f"rise={self.rise!r}: expected at least one level")

    def choose(self, progress: Progress) -> Choice:
        """What to do with chunk `progress.at`."""
        recompute = Choice(None, time_to_recompute(progress))
        if not progress.allowed:
            return recompute
        coarsest = progress.allowed[-1]
        mean, margin = progress.link.s_per_byte, self.deviations * progress.link.deviation
        if mean is None:
            return Choice(math.ceil(self.first * coarsest), math.nan)
        left = progress.left_s + _ROUNDING * max(1.0, abs(progress.left_s))
        careful = mean + margin

        # 1. Everything fetched.
        reserve = self.reserve * progress.slo_s if math.isfinite(progress.slo_s) else 0.0
        for level in range(self._finest(progress), coarsest):
            end = ready_times(progress, level, careful)[-1]
            if end <= left - reserve:
                return Choice(level, end)
        ends = _mixed_ends(progress, coarsest, careful)
        if ends[-1] <= left:
            return Choice(coarsest, ends[-1])
        # 2. A suffix recomputed, as short as the careful pace allows; it shrinks again if the link
        # turns out better.
        fitting = [end for end in ends if end <= left]
        if fitting:
            return Choice(coarsest, fitting[-1])
        # 3. All of it.
        if recompute.predicted_s <= left:
            return recompute
        # 4. Nothing is safe. A chunk fetched leaves less to recompute, recomputing has no way back:
        # fetch while that may still end sooner.
        hoped = min(_mixed_ends(progress, coarsest, max(0.0, mean - margin)))
        if hoped <= recompute.predicted_s:
            return Choice(coarsest, min(_mixed_ends(progress, coarsest, mean)))
        return recompute

    def _finest(self, progress: Progress) -> int:
        """The finest level that hysteresis lets the next chunk have."""
        return 0 if progress.previous is None else max(0, progress.previous - self.rise)


def _mixed_ends(progress: Progress, level: int, s_per_byte: float) -> list[float]:
    """Seconds until all is there with 1, 2, ... more chunks fetched and the rest recomputed."""
    after = progress.context.prefill_from[progress.at + 1 :]
    ready = ready_times(progress, level, s_per_byte)
    return [r + progress.load * p for r, p in zip(ready, after, strict=True)]
