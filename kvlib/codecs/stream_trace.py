# SPDX-License-Identifier: Apache-2.0
"""A link whose future is known: what a rule does on it, and the best that any rule could do.

`simulate` runs a request over a trace: the link carries one chunk at a time, the accelerator
decodes and recomputes one chunk at a time and in order, and the two work at the same time.
`best_plan` knows the whole trace and bounds every rule that recomputes a suffix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from kvlib.codecs.streaming import Context, LinkEstimate, Progress, StreamRule, check_positive
from kvlib.errors import ConfigError

__all__ = ["ChunkTrace", "Outcome", "TimeTrace", "Trace", "best_plan", "simulate"]


class Trace(Protocol):
    """When bytes arrive."""

    def finish_s(self, index: int, start_s: float, nbytes: int) -> float:
        """When `nbytes` of chunk `index` have arrived if their transfer begins at `start_s`."""
        ...


def _check_rates(rates: Sequence[float]) -> None:
    if not rates:
        raise ConfigError("rates=(): a trace needs at least one rate")
    for rate in rates:
        check_positive(rate, "rates")


@dataclass(frozen=True, slots=True)
class ChunkTrace:
    """A rate for each chunk, as in CacheGen's released code.

    Args:
        rates: bytes per second, one a chunk; the last one holds for all after it.

    Raises:
        ConfigError: no rates, or one that is not positive.
    """

    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_rates(self.rates)

    def finish_s(self, index: int, start_s: float, nbytes: int) -> float:
        """See `Trace`."""
        return start_s + nbytes / self.rates[min(index, len(self.rates) - 1)]


@dataclass(frozen=True, slots=True)
class TimeTrace:
    """A rate for each step of time.

    Args:
        step_s: length of a step.
        rates: bytes per second in each step; the last one holds for ever.

    Raises:
        ConfigError: no rates, or a number that is not positive.
    """

    step_s: float
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        check_positive(self.step_s, "step_s")
        _check_rates(self.rates)

    def finish_s(self, index: int, start_s: float, nbytes: int) -> float:
        """See `Trace`."""
        now, left = start_s, float(nbytes)
        for step in range(int(start_s / self.step_s), len(self.rates) - 1):
            ends = (step + 1) * self.step_s
            room = max(0.0, ends - now) * self.rates[step]
            if left <= room:
                return now + left / self.rates[step]
            now, left = max(now, ends), left - room
        return now + left / self.rates[-1]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request went.

    Args:
        ttft_s: seconds until all KV was there.
        levels: of each chunk; None for a recomputed one.
        link: the estimate at the end; None from `best_plan`.
    """

    ttft_s: float
    levels: tuple[int | None, ...]
    link: LinkEstimate | None = None


def simulate(
    rule: StreamRule,
    context: Context,
    trace: Trace,
    *,
    slo_s: float,
    link: LinkEstimate | None = None,
    load: float = 1.0,
    exact: bool = False,
    peek: bool = False,
) -> Outcome:
    """Run one request.

    Args:
        rule: that chooses.
        context: that is fetched.
        trace: the link; its rates are this request's share of it.
        slo_s: time allowed.
        link: what is known of the link before; None for nothing.
        load: the accelerator's, see `Progress`.
        exact: see `Progress`.
        peek: show the rule the rate that this chunk is going to have at the finest level, which no
            real link tells, in place of the estimate.
    """
    link = link or LinkEstimate()
    now = gpu = 0.0
    levels: list[int | None] = []
    to_end = False
    for at, offer in enumerate(context.offers):
        if not to_end:
            shown = link
            if peek:
                size = offer.nbytes[0]
                shown = LinkEstimate.of(size / (trace.finish_s(at, now, size) - now))
            previous = next((x for x in reversed(levels) if x is not None), None)
            progress = Progress(
                context=context,
                at=at,
                left_s=slo_s - now,
                link=shown,
                busy_s=max(0.0, gpu - now),
                load=load,
                exact=exact,
                previous=previous,
                slo_s=slo_s,
            )
            choice = rule.choose(progress)
            to_end = choice.level is None and choice.to_end
            level = choice.level
        levels.append(level)
        if level is None:
            gpu = max(gpu, now) + load * offer.prefill_s
        else:
            arrived = trace.finish_s(at, now, offer.nbytes[level])
            link = link.after(offer.nbytes[level], arrived - now)
            now = arrived
            gpu = max(gpu, now) + load * offer.decode_s
    return Outcome(gpu, tuple(levels), link)


def best_plan(
    context: Context,
    trace: Trace,
    *,
    slo_s: float,
    costs: Sequence[float],
    load: float = 1.0,
    exact: bool = False,
    width: int | None = None,
) -> Outcome:
    """What a rule that knows the trace would do: fetch a prefix, recompute the suffix.

    Of the plans that meet the SLO the ones that recompute fewest chunks, of those the one of least
    cost; of plans that all miss it the one that ends first. A dynamic program over the chunks: of
    two prefixes of which one has arrived no later and cost no more, the other is dropped.

    Args:
        context: that is fetched.
        trace: the link; a transfer must not end sooner for being begun later or having more bytes.
        slo_s: time allowed.
        costs: per token of each level, such as a divergence; not falling.
        load: the accelerator's, see `Progress`.
        exact: no lossy level.
        width: prefixes kept of each length. With a bound the time stays minimal and the SLO is met
            just as often, but the cost may be a little more than the least.

    Raises:
        ConfigError: costs that fall or are not one a level.
    """
    if len(costs) != context.levels or any(a > b for a, b in pairwise(costs)):
        raise ConfigError(f"costs={costs!r}: expected {context.levels} numbers that do not fall")
    levels = range(context.lossless_levels if exact else context.levels)
    # The coarsest level is the fastest for every prefix.
    now = ready = 0.0
    arrivals, ends = [], [load * context.prefill_from[0]]
    for at, offer in enumerate(context.offers if levels else ()):
        now = trace.finish_s(at, now, offer.nbytes[levels[-1]])
        ready = max(ready, now) + load * offer.decode_s
        arrivals.append(now)
        ends.append(ready + load * context.prefill_from[at + 1])
    fitting = [count for count, end in enumerate(ends) if end <= slo_s]
    if not fitting:
        count = min(range(len(ends)), key=ends.__getitem__)
        plan = tuple(levels[-1:]) * count
        return Outcome(ends[count], plan + (None,) * (len(context.offers) - count))
    count = fitting[-1]
    # Backwards from the SLO: when each chunk must have arrived for the rest to end in time. The
    # coarsest plan does, whatever the rounding of these sums.
    latest = slo_s - load * context.prefill_from[count]
    deadlines = []
    for offer, arrived in zip(
        reversed(context.offers[:count]), reversed(arrivals[:count]), strict=True
    ):
        latest -= load * offer.decode_s
        deadlines.append(max(latest, arrived))
    deadlines.reverse()
    states: list[_State] = [(0.0, 0.0, ())]
    for at, latest in enumerate(deadlines):
        offer = context.offers[at]
        grown = []
        for now, cost, chosen in states:
            for level in levels:
                arrived = trace.finish_s(at, now, offer.nbytes[level])
                if arrived <= latest:
                    grown.append((arrived, cost + offer.tokens * costs[level], (*chosen, level)))
        states = _undominated(grown, width)
    plan = min(states, key=lambda state: (state[1], state[0]))[2]
    ready = now = 0.0
    for at, level in enumerate(plan):
        now = trace.finish_s(at, now, context.offers[at].nbytes[level])
        ready = max(ready, now) + load * context.offers[at].decode_s
    ready += load * context.prefill_from[count]
    return Outcome(ready, plan + (None,) * (len(context.offers) - count))


_State = tuple[float, float, tuple[int, ...]]


def _undominated(states: list[_State], width: int | None) -> list[_State]:
    """States in the order of arrival, each cheaper than all that arrived before it."""
    kept: list[_State] = []
    for state in sorted(states):
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    if width is not None and len(kept) > width:  # both ends and an even choice between them
        step = (len(kept) - 1) / max(1, width - 1)
        kept = [kept[round(i * step)] for i in range(width)]
    return kept
