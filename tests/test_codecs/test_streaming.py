# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvlib.codecs.stream_baselines import ArtefactRule, FixedLevel, PaperRule
from kvlib.codecs.stream_trace import ChunkTrace, TimeTrace, best_plan, simulate
from kvlib.codecs.streaming import (
    ChunkOffer,
    Context,
    LinkEstimate,
    Progress,
    StreamController,
    time_to_recompute,
)
from kvlib.errors import ConfigError
from tests.oracles import streaming as oracle

RULES = [
    StreamController(),
    StreamController(deviations=0, reserve=0),
    StreamController(first=0, rise=9),
    PaperRule(),
    ArtefactRule(),
    FixedLevel(0),
    FixedLevel(1),
    FixedLevel(None),
]
STEADY = StreamController(reserve=0, rise=9)

seconds = st.floats(0.01, 5)


@st.composite
def contexts(draw, max_chunks=4, max_levels=3, lossless=False):
    levels = draw(st.integers(1, max_levels))
    offers = []
    for _ in range(draw(st.integers(1, max_chunks))):
        sizes = draw(st.lists(st.integers(1, 1000), min_size=levels, max_size=levels))
        offers.append(
            ChunkOffer(
                tokens=draw(st.integers(1, 9)),
                nbytes=tuple(sorted(sizes, reverse=True)),
                decode_s=draw(st.floats(0, 0.5)),
                prefill_s=draw(st.floats(0, 3)),
            )
        )
    return Context(tuple(offers), draw(st.integers(0, levels)) if lossless else 0)


@st.composite
def traces(draw):
    rates = draw(st.lists(st.floats(20, 5000), min_size=1, max_size=6))
    if draw(st.booleans()):
        return ChunkTrace(tuple(rates))
    return TimeTrace(draw(st.floats(0.05, 1)), tuple(rates))


def even(chunks, sizes, *, decode_s=0.0, prefill_s=1e6, lossless=0):
    """A context of equal chunks; by default recomputing is out of the question."""
    offer = ChunkOffer(10, tuple(sizes), decode_s, prefill_s)
    return Context((offer,) * chunks, lossless)


def parts(context, load=1.0):
    return (
        [offer.nbytes for offer in context.offers],
        [load * offer.decode_s for offer in context.offers],
        [load * offer.prefill_s for offer in context.offers],
    )


def choose(rule, context, left_s, rate, **other):
    progress = Progress(context, other.pop("at", 0), left_s, LinkEstimate.of(rate), **other)
    return rule.choose(progress)


# ---- exact callers ----


@pytest.mark.parametrize("rule", RULES, ids=repr)
@given(
    context=contexts(lossless=True),
    trace=traces(),
    slo_s=seconds,
    load=st.floats(0.5, 4),
    known=st.booleans(),
    peek=st.booleans(),
)
def test_exact_never_gets_a_lossy_level(rule, context, trace, slo_s, load, known, peek):
    """Neither in a hurry, nor with time to spare, nor over an unknown link."""
    assume(not isinstance(rule, FixedLevel) or rule.level is None or rule.level < context.levels)
    link = LinkEstimate.of(500, spread=0.5) if known else None
    done = simulate(rule, context, trace, slo_s=slo_s, load=load, link=link, exact=True, peek=peek)
    assert all(level is None or level < context.lossless_levels for level in done.levels)


def test_a_caller_who_takes_lossy_levels_gets_them():
    """What the test above forbids does happen without `exact`."""
    context = even(3, (100, 10), lossless=1)
    assert choose(StreamController(), context, 0.5, 100).level == 1
    assert choose(StreamController(), context, 0.5, 100, exact=True).level == 0


@given(context=contexts(lossless=True), trace=traces(), slo_s=seconds)
def test_best_plan_honours_exact(context, trace, slo_s):
    done = best_plan(context, trace, slo_s=slo_s, costs=[0.0] * context.levels, exact=True)
    assert all(level is None or level < context.lossless_levels for level in done.levels)


# ---- the best plan ----


@given(context=contexts(), trace=traces(), slo_s=seconds, load=st.floats(0.5, 3), data=st.data())
def test_best_plan_is_what_exhaustion_finds(context, trace, slo_s, load, data):
    """In time as often, with as few chunks recomputed, at the same cost; late plans as short."""
    costs = sorted(
        data.draw(st.lists(st.floats(0, 9), min_size=context.levels, max_size=context.levels))
    )
    tokens = [offer.tokens for offer in context.offers]
    in_time, fetched, cost, end = oracle.optimum(
        *parts(context, load), trace.finish_s, slo_s, costs, tokens, range(context.levels)
    )
    # A plan that ends at the deadline to a rounding may be on either side.
    ends = [
        oracle.end_of(plan, *parts(context, load), trace.finish_s)
        for plan in oracle.all_plans(len(tokens), range(context.levels))
    ]
    assume(all(abs(e - slo_s) > 1e-9 for e in ends))
    done = best_plan(context, trace, slo_s=slo_s, costs=costs, load=load)
    plan = tuple(level for level in done.levels if level is not None)
    assert done.levels[len(plan) :] == (None,) * (len(tokens) - len(plan))
    assert done.ttft_s == pytest.approx(
        oracle.end_of(plan, *parts(context, load), trace.finish_s), rel=1e-12
    )
    assert (done.ttft_s <= slo_s) == in_time
    if in_time:
        assert len(plan) == fetched
        assert sum(t * costs[level] for t, level in zip(tokens, plan, strict=False)) == (
            pytest.approx(cost, rel=1e-12, abs=1e-12)
        )
    else:
        assert done.ttft_s == pytest.approx(end, rel=1e-12)


@given(context=contexts(max_chunks=6), trace=traces(), slo_s=seconds, width=st.integers(1, 5))
def test_a_narrow_search_is_in_time_as_often_and_never_cheaper(context, trace, slo_s, width):
    costs = range(context.levels)
    full = best_plan(context, trace, slo_s=slo_s, costs=costs)
    narrow = best_plan(context, trace, slo_s=slo_s, costs=costs, width=width)

    def cost(done):
        pairs = zip(context.offers, done.levels, strict=True)
        return sum(offer.tokens * level for offer, level in pairs if level is not None)

    assert (narrow.ttft_s <= slo_s + 1e-9) == (full.ttft_s <= slo_s + 1e-9)
    assert narrow.levels.count(None) == full.levels.count(None)
    assert cost(narrow) >= cost(full)


def test_load_slows_decoding_in_the_best_plan():
    """Alone the first chunk may be fine; with decoding twice as long that ends at 4 s."""
    context, trace = even(2, (2, 1), decode_s=0.5), ChunkTrace((1.0,))
    assert best_plan(context, trace, slo_s=3.5, costs=(0, 1)).levels.count(0) == 1
    assert best_plan(context, trace, slo_s=3.5, costs=(0, 1), load=2).levels == (1, 1)


@given(context=contexts(max_chunks=6), trace=traces())
def test_a_plan_that_ends_at_the_deadline_to_the_last_digit_is_in_time(context, trace):
    coarsest = (context.levels - 1,) * len(context.offers)
    slo_s = oracle.end_of(coarsest, *parts(context), trace.finish_s)
    done = best_plan(context, trace, slo_s=slo_s, costs=range(context.levels))
    assert None not in done.levels
    assert done.ttft_s <= slo_s + 1e-9


# ---- the controller on a steady link ----


@given(
    context=contexts(max_chunks=5),
    rate=st.floats(20, 5000),
    slo_s=seconds,
    load=st.floats(0.5, 3),
    rule=st.builds(
        StreamController,
        deviations=st.floats(0, 3),
        reserve=st.floats(0, 0.9),
        rise=st.integers(1, 3),
    ),
)
def test_on_a_steady_link_the_slo_is_met_whenever_some_plan_meets_it(
    context, rate, slo_s, load, rule
):
    """Whatever the parameters: fetched prefix, recomputed suffix, or both."""
    trace = ChunkTrace((rate,))
    best = best_plan(context, trace, slo_s=slo_s, costs=[0.0] * context.levels, load=load)
    assume(abs(best.ttft_s - slo_s) > 1e-7)
    done = simulate(rule, context, trace, slo_s=slo_s, load=load, link=LinkEstimate.of(rate))
    assert (done.ttft_s <= slo_s + 1e-6) == (best.ttft_s <= slo_s)


@given(
    chunks=st.integers(1, 6),
    base=st.integers(1, 50),
    gap=st.integers(1, 50),
    levels=st.integers(1, 4),
    decode_s=st.sampled_from([0.0, 0.125, 0.5]),
    spare=st.floats(0, 1),
)
def test_evenly_spaced_levels_on_a_steady_link_get_the_cheapest_plan(
    chunks, base, gap, levels, decode_s, spare
):
    """With costs that double from level to level, as in the optimum, to the last chunk.

    One byte lasts 1/64 s, so that all sums of times are exact.
    """
    context = even(chunks, [base + gap * i for i in reversed(range(levels))], decode_s=decode_s)
    sizes, decode, prefill = parts(context)
    trace = ChunkTrace((64.0,))
    costs = [2.0**i - 1 for i in range(levels)]
    fast, slow = (
        oracle.end_of((level,) * chunks, sizes, decode, prefill, trace.finish_s)
        for level in (levels - 1, 0)
    )
    slo_s = fast + math.floor(64 * spare * (slow - fast)) / 64
    in_time, fetched, cost, _ = oracle.optimum(
        sizes, decode, prefill, trace.finish_s, slo_s, costs, [10] * chunks, range(levels)
    )
    assert in_time
    assert fetched == chunks
    done = simulate(STEADY, context, trace, slo_s=slo_s, link=LinkEstimate.of(64.0))
    assert done.ttft_s <= slo_s
    assert sum(10 * costs[level] for level in done.levels) == cost


@given(
    context=contexts(max_chunks=5, max_levels=4),
    rate=st.floats(20, 5000),
    spare=st.floats(0, 1),
)
def test_the_last_chunk_is_as_fine_as_the_time_left_allows(context, rate, spare):
    """No slack is thrown away."""
    trace = ChunkTrace((rate,))
    chunks = len(context.offers)
    fast, slow = (
        oracle.end_of((level,) * chunks, *parts(context), trace.finish_s)
        for level in (context.levels - 1, 0)
    )
    slo_s = fast + spare * (slow - fast)
    done = simulate(STEADY, context, trace, slo_s=slo_s, link=LinkEstimate.of(rate))
    assert None not in done.levels
    assert done.ttft_s <= slo_s + 1e-6
    if done.levels[-1]:
        finer = (*done.levels[:-1], done.levels[-1] - 1)
        assert oracle.end_of(finer, *parts(context), trace.finish_s) > slo_s


# ---- slack, hysteresis, recomputation ----


def test_slack_is_carried():
    """Time that fast chunks saved pays for a finer level later; equal shares waste it."""
    context = even(4, (100, 50))
    trace = ChunkTrace((100.0,))
    link = LinkEstimate.of(100.0)
    assert simulate(STEADY, context, trace, slo_s=3, link=link).levels == (1, 1, 0, 0)
    assert simulate(ArtefactRule(), context, trace, slo_s=3, link=link).levels == (1, 1, 1, 1)


def test_a_fast_chunk_raises_the_levels_after_it():
    context = even(4, (100, 50))
    steady = simulate(STEADY, context, ChunkTrace((50.0,)), slo_s=5.25, link=LinkEstimate.of(50.0))
    faster = simulate(
        STEADY,
        context,
        ChunkTrace((500.0, 50.0)),
        slo_s=5.25,
        link=LinkEstimate.of(50.0, gain=1e-9),
    )
    assert steady.levels == (1, 1, 1, 0)
    assert faster.levels == (1, 1, 0, 0)


def test_levels_rise_one_at_a_time_and_fall_at_once():
    context = even(9, (80, 40, 20, 10))
    for previous in range(4):
        level = choose(StreamController(), context, 1e9, 10, at=1, previous=previous).level
        assert level == max(0, previous - 1)
    assert choose(StreamController(rise=2), context, 1e9, 10, at=1, previous=3).level == 1
    assert choose(StreamController(), context, 1e9, 10, at=1).level == 0
    assert choose(StreamController(), context, 8.5, 10, at=1, previous=0).level == 3


def test_recomputing_goes_on_to_the_end():
    """Once chosen, whatever the link would do then."""
    context = even(4, (100,), prefill_s=1.0)
    rates = (100.0, 1.0, 1e9, 1e9)
    done = simulate(
        StreamController(), context, TimeTrace(1, rates), slo_s=4.5, link=LinkEstimate.of(1.0)
    )
    assert done.levels == (None,) * 4
    assert done.ttft_s == 4


@given(context=contexts(max_chunks=6), trace=traces(), slo_s=seconds, known=st.booleans())
def test_only_a_suffix_is_recomputed(context, trace, slo_s, known):
    link = LinkEstimate.of(500, spread=1) if known else None
    levels = simulate(StreamController(), context, trace, slo_s=slo_s, link=link).levels
    fetched = [level for level in levels if level is not None]
    assert levels == (*fetched, *[None] * (len(levels) - len(fetched)))


def test_a_prefix_is_fetched_and_the_rest_recomputed():
    """All fetched takes 8 s and all recomputed 6; three fetched and one recomputed do not help,
    but a first chunk that is small does."""
    chunks = [ChunkOffer(1, (size,), 0.0, 1.5) for size in (50, 250, 250, 250)]
    context = Context(tuple(chunks))
    done = simulate(
        StreamController(), context, ChunkTrace((100.0,)), slo_s=5, link=LinkEstimate.of(100.0)
    )
    assert done.levels == (0, None, None, None)
    assert done.ttft_s == 5


def test_levels_are_preferred_to_recomputing_and_the_paper_prefers_recomputing():
    context = even(4, (100, 50), prefill_s=0.5)
    assert choose(StreamController(), context, 5, 100).level == 0
    assert choose(PaperRule(), context, 5, 100).level is None


def test_hopeless_is_the_faster_way():
    """The coarsest level, or recomputing where even a hopeful estimate of the link is slower."""
    assert choose(StreamController(), even(4, (100, 50), prefill_s=1.0), 0.1, 100).level == 1
    slow = even(4, (100, 50), prefill_s=0.25)
    assert choose(StreamController(), slow, 0.1, 100).level is None
    progress = Progress(slow, 0, 0.1, LinkEstimate(0.01, deviation=0.008))
    assert StreamController().choose(progress).level == 1
    assert choose(PaperRule(), slow, 0.1, 100).level == 1


def test_recomputing_that_fits_comes_before_a_transfer_that_may():
    """On average fetching takes 4 s of the 4.2 allowed; recomputing takes 4 s for certain."""
    context = even(4, (50,), prefill_s=1.0)
    progress = Progress(context, 0, 4.2, LinkEstimate(0.02, deviation=0.02))
    assert StreamController().choose(progress).level is None
    assert StreamController().choose(replace(progress, left_s=3.9)).level == 0


def test_deviation_load_and_decoding_make_the_choice_coarser():
    context = even(4, (100, 50), decode_s=0.5)
    rule = StreamController(reserve=0)
    assert choose(rule, context, 4.5, 100).level == 0
    assert choose(rule, context, 4.4, 100).level == 1
    assert choose(rule, context, 4.5, 100, load=2.0).level == 1
    assert choose(rule, context, 4.5, 100, busy_s=3.0).level == 1
    unsure = Progress(context, 0, 4.5, LinkEstimate(0.01, deviation=0.001))
    assert rule.choose(unsure).level == 1
    assert StreamController(deviations=0, reserve=0).choose(unsure).level == 0
    assert choose(StreamController(reserve=0.1), context, 4.5, 100, slo_s=4.5).level == 1
    assert choose(StreamController(reserve=0.1), context, 5.0, 100, slo_s=5.0).level == 0


def test_predicted_times_are_those_that_come_true_on_a_steady_link():
    context = even(5, (100, 40), decode_s=0.3, prefill_s=0.9)
    for left_s in (0.1, 3.0, 4.0, 9.0):
        choice = choose(replace(STEADY, deviations=0), context, left_s, 100)
        plans = {
            oracle.end_of(plan, *parts(context), ChunkTrace((100.0,)).finish_s)
            for plan in oracle.all_plans(5, range(2))
        }
        assert any(choice.predicted_s == pytest.approx(end) for end in plans)


@pytest.mark.parametrize(("first", "level"), [(0, 0), (0.5, 2), (0.6, 3), (1, 4)])
def test_first_chunk_over_an_unknown_link(first, level):
    context = even(3, (5, 4, 3, 2, 1))
    choice = StreamController(first=first).choose(Progress(context, 0, 1.0, LinkEstimate()))
    assert choice.level == level
    assert math.isnan(choice.predicted_s)


# ---- baselines ----


def test_the_artefact_recomputes_one_chunk_and_fetches_the_next():
    """Its own share of the SLO is all that counts for a chunk."""
    context = Context((ChunkOffer(1, (100,), 0.0, 0.5), ChunkOffer(1, (10,), 0.0, 0.5)))
    done = simulate(
        ArtefactRule(), context, ChunkTrace((100.0,)), slo_s=1, link=LinkEstimate.of(100.0)
    )
    assert done.levels == (None, 0)
    assert done.ttft_s == 0.5  # the second chunk arrived meanwhile


def test_the_artefact_with_the_true_rate():
    """Fast and slow chunks, no estimate: each gets the level that its own rate allows."""
    context = even(3, (100, 50, 10))
    trace = ChunkTrace((1000.0, 30.0, 60.0))
    assert simulate(ArtefactRule(), context, trace, slo_s=3, peek=True).levels == (0, 2, 1)


def test_the_paper_looks_at_all_that_remains():
    context = even(4, (100, 50))
    trace, link = ChunkTrace((100.0,)), LinkEstimate.of(100.0, gain=1)
    assert simulate(PaperRule(), context, trace, slo_s=3, link=link).levels == (1, 1, 0, 0)


def test_middle_level_first():
    context = even(3, (5, 4, 3, 2, 1))
    for rule in (PaperRule(), ArtefactRule()):
        assert rule.choose(Progress(context, 0, 1.0, LinkEstimate(), slo_s=1.0)).level == 2


# ---- estimates and traces ----


@given(
    pairs=st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-6, 1e3)), min_size=1, max_size=20),
    gain=st.floats(0.01, 1),
)
def test_estimates_are_the_averages_as_defined(pairs, gain):
    link = LinkEstimate(gain=gain)
    for nbytes, duration in pairs:
        link = link.after(nbytes, duration)
    mean, deviation = oracle.averages(pairs, gain)
    # Averages of positive numbers: every step rounds by a few units of the largest one.
    scale = max(duration / nbytes for nbytes, duration in pairs)
    assert link.s_per_byte == pytest.approx(mean, abs=1e-13 * scale)
    assert link.deviation == pytest.approx(deviation, abs=1e-13 * scale)
    assert link.bytes_per_s == pytest.approx(1 / link.s_per_byte)


def test_an_unknown_rate_is_none():
    assert LinkEstimate().bytes_per_s is None
    assert LinkEstimate.of(200.0, spread=0.5) == LinkEstimate(0.005, 0.0025)


@given(
    rates=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    start=st.integers(0, 60),
    nbytes=st.integers(1, 300),
)
def test_a_trace_in_time_moves_the_bytes_of_its_rates(rates, start, nbytes):
    """Counted in hundredths of a second, by adding up."""
    moved, tick = 0, start
    while moved < nbytes * 100:
        moved += rates[min(tick // 10, len(rates) - 1)]
        tick += 1
    got = TimeTrace(0.1, tuple(map(float, rates))).finish_s(0, start / 100, nbytes)
    assert (tick - 1) / 100 - 1e-9 <= got <= tick / 100 + 1e-9


# ---- bad input ----

OFFER = ChunkOffer(1, (2, 1), 0.0, 1.0)
CONTEXT = Context((OFFER,))
LINK = LinkEstimate.of(1.0)


BAD = [
    (lambda: LinkEstimate(0.0), "s_per_byte"),
    (lambda: LinkEstimate(1.0, -1.0), "deviation"),
    (lambda: LinkEstimate(gain=0), "gain"),
    (lambda: LinkEstimate(gain=1.5), "gain"),
    (lambda: LinkEstimate.of(0), "bytes_per_s"),
    (lambda: LinkEstimate.of(1, spread=-1), "spread"),
    (lambda: LINK.after(0, 1), "nbytes"),
    (lambda: LINK.after(1, 0), "seconds"),
    (lambda: LINK.after(1, math.nan), "seconds"),
    (lambda: replace(OFFER, tokens=0), "tokens"),
    (lambda: replace(OFFER, nbytes=()), "at least one level"),
    (lambda: replace(OFFER, nbytes=(1, 2)), "finest level first"),
    (lambda: replace(OFFER, nbytes=(1, 0)), "nbytes"),
    (lambda: replace(OFFER, decode_s=-1), "decode_s"),
    (lambda: replace(OFFER, prefill_s=math.inf), "prefill_s"),
    (lambda: Context(()), "at least one chunk"),
    (lambda: Context((OFFER, replace(OFFER, nbytes=(1,)))), "same levels"),
    (lambda: Context((OFFER,), 3), "lossless_levels=3"),
    (lambda: Context((OFFER,), -1), "lossless_levels=-1"),
    (lambda: Progress(CONTEXT, 1, 1.0, LINK), "at=1"),
    (lambda: Progress(CONTEXT, 0, math.nan, LINK), "left_s"),
    (lambda: Progress(CONTEXT, 0, 1.0, LINK, busy_s=-1), "busy_s"),
    (lambda: Progress(CONTEXT, 0, 1.0, LINK, load=0), "load"),
    (lambda: Progress(CONTEXT, 0, 1.0, LINK, previous=2), "previous=2"),
    (lambda: StreamController(deviations=-1), "deviations"),
    (lambda: StreamController(reserve=1), "reserve"),
    (lambda: StreamController(first=2), "first"),
    (lambda: StreamController(rise=0), "rise"),
    (lambda: FixedLevel(-1), "level=-1"),
    (lambda: choose(FixedLevel(2), CONTEXT, 1, 1), "levels 0 to 1"),
    (lambda: ChunkTrace(()), "at least one rate"),
    (lambda: ChunkTrace((0.0,)), "rates"),
    (lambda: TimeTrace(0, (1.0,)), "step_s"),
    (lambda: best_plan(CONTEXT, ChunkTrace((1.0,)), slo_s=1, costs=(1, 0)), "do not fall"),
    (lambda: best_plan(CONTEXT, ChunkTrace((1.0,)), slo_s=1, costs=(1,)), "2 numbers"),
]


@pytest.mark.parametrize(("make", "match"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_time_to_recompute_begins_when_decoding_ends():
    context = even(3, (1,), prefill_s=2.0)
    assert time_to_recompute(Progress(context, 1, 1.0, LINK, busy_s=0.5, load=1.5)) == 6.5
