# SPDX-License-Identifier: Apache-2.0
"""Each policy against an independent simulator of its paper, use by use."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.store.replacement import REPLACEMENTS, Hint
from tests.oracles import replacement as oracles

ORACLES = {
    "lru": oracles.LRU,
    "arc": oracles.ARC,
    "s3fifo": oracles.S3FIFO,
    "s3fifo:promote=2,small=0.3": lambda c: oracles.S3FIFO(c, small=0.3, promote=2),
    "lfuda": lambda c: oracles.Aged(c, by_size=False),
    "gdsf": lambda c: oracles.Aged(c, by_size=True),
}
keys = st.lists(st.integers(0, 14), max_size=150)


def play(policy, trace, capacity, hint_of=lambda i: None):
    """Yield (hit, keys held) of each use of (key, size); never more than the capacity is held."""
    now = 0
    state = REPLACEMENTS.build(policy).start(capacity, lambda: now)
    held = {}
    for i, (key, size) in enumerate(trace):
        now = i
        hit = key in held
        if hit:
            state.hit(key, hint_of(i))
        elif size <= capacity and state.admit(key, size, hint_of(i)):
            for victim in list(state.victims(sum(held.values()) + size - capacity)):
                state.remove(victim, evicted=True)
                del held[victim]
            state.insert(key, size, hint_of(i))
            held[key] = size
        assert sum(held.values()) <= capacity
        yield hit, set(held)


def compare(policy, oracle, trace, capacity):
    for (key, size), (hit, held) in zip(trace, play(policy, trace, capacity), strict=True):
        assert oracle.access(key, size) == hit
        assert oracle.held == held


@pytest.mark.parametrize("policy", ORACLES)
@given(trace=keys, capacity=st.integers(1, 12))
def test_records_of_one_size(policy, trace, capacity):
    """The same hits, and the same records held after every use."""
    compare(policy, ORACLES[policy](capacity), [(key, 1) for key in trace], capacity)


@pytest.mark.parametrize("policy", ORACLES)
@given(
    trace=keys,
    sizes=st.lists(st.integers(1, 9), min_size=15, max_size=15),
    capacity=st.integers(1, 40),
)
def test_records_of_many_sizes(policy, trace, sizes, capacity):
    """The same in bytes."""
    compare(policy, ORACLES[policy](capacity), [(key, sizes[key]) for key in trace], capacity)


@given(trace=keys, capacity=st.integers(1, 12))
def test_arc_in_bytes_is_arc(trace, capacity):
    """With records of size 1 it is Fig. 4, case by case."""
    compare("arc", oracles.PaperARC(capacity), [(key, 1) for key in trace], capacity)


def skewed(seed, uses):
    """Some keys often, some never again, loops and scans: (key, size) pairs."""
    choose = random.Random(seed)
    trace = []
    while len(trace) < uses:
        kind = choose.randrange(4)
        if kind == 0:
            trace += [int(choose.paretovariate(0.7)) % 300 for _ in range(30)]
        elif kind == 1:
            start = choose.randrange(10_000)
            trace += range(start, start + 40)
        elif kind == 2:
            trace += [*range(400, 420)] * 2
        else:  # in use for a while
            start = 1000 + 10 * (len(trace) // 100)
            trace += [*range(start, start + 15)] * 3
    return [(key, 1 + key * 7919 % 13) for key in trace[:uses]]


@pytest.mark.parametrize("policy", [*ORACLES, "paper arc"])
def test_a_long_mixed_trace(policy):
    """3,000 uses, so that ghosts, ages and borders move far."""
    trace = skewed(1, 3_000)
    if policy == "paper arc":
        compare("arc", oracles.PaperARC(60), [(key, 1) for key, _ in trace], 60)
    else:
        compare(policy, ORACLES[policy](400), trace, 400)


def ahead_of(trace):
    """For each use, how far the next one of its key is ahead."""
    return [
        next((j - i for j in range(i + 1, len(trace)) if trace[j] == key), None)
        for i, key in enumerate(trace)
    ]


def hits_of_belady(trace, capacity):
    ahead = ahead_of(trace)
    hints = [None if x is None else Hint(next_use=x) for x in ahead]
    uses = [(key, 1) for key in trace]
    return sum(hit for hit, _ in play("belady", uses, capacity, hints.__getitem__))


@given(trace=st.lists(st.integers(0, 5), max_size=14), capacity=st.integers(1, 4))
def test_belady_is_optimal(trace, capacity):
    """As many hits as the best of all caches, found by trying every choice."""
    assert hits_of_belady(trace, capacity) == oracles.most_hits(trace, capacity)


@pytest.mark.parametrize("policy", ORACLES)
def test_no_policy_beats_belady(policy):
    """And none comes close on a trace with scans."""
    trace = [key for key, _ in skewed(2, 2_000)]
    hits = sum(hit for hit, _ in play(policy, [(key, 1) for key in trace], 60))
    assert 0 < hits < hits_of_belady(trace, 60)
