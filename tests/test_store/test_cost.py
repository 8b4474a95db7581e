# SPDX-License-Identifier: Apache-2.0
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.store.cost import CostModel, Line


@given(latency=st.floats(1e-6, 1e-2), pace=st.floats(1e-11, 1e-8), seed=st.integers(0, 1000))
def test_a_line_is_found(latency, pace, seed):
    rng = random.Random(seed)
    line = Line(2)
    for _ in range(30):
        x = rng.uniform(1e5, 1e8)
        line.add((1.0, x), latency + pace * x)
    for x in (1e5, 1e7, 1e8):
        assert line.at((1.0, x)) == pytest.approx(latency + pace * x, rel=1e-3)


def test_coefficients_are_never_negative():
    line = Line(2)
    for x, y in ((1e6, 3.0), (1e7, 2.0), (1e8, 1.0)):
        line.add((1.0, x), y)
    assert min(line.coefficients()) >= 0
    assert line.at((1.0, 1e12)) >= line.at((1.0, 1.0)) > 0


def test_a_disk_that_becomes_slow_is_noticed():
    cost = CostModel()
    assert cost.read_seconds("file", 1) is None
    for _ in range(200):
        cost.read("file", 10**6, 1e-3)
    assert cost.read_seconds("file", 10**6) == pytest.approx(1e-3, rel=1e-3)
    for _ in range(200):
        cost.read("file", 10**6, 1e-2)
    assert cost.read_seconds("file", 10**6) == pytest.approx(1e-2, rel=0.25)
    assert cost.read_seconds("memory", 10**6) is None


@given(
    loads=st.lists(st.floats(1e-4, 1.0), max_size=12),
    a=st.floats(1e-5, 1e-2),
    b=st.floats(0, 1e-6),
    tail=st.integers(0, 100),
    start=st.integers(0, 300),
)
def test_the_split_is_the_best_one(loads, a, b, tail, start):
    """Against every split there is."""
    cost = CostModel()
    compute = lambda n, p: a * n + b * n * (p + n / 2)  # noqa: E731
    for n, p in itertools.product((64, 256, 1000), (0, 512, 4096)):
        cost.prefill(n, p, compute(n, p))
    tokens = start + 64 * len(loads) + tail
    split = cost.split(loads, block_tokens=64, tokens=tokens, start=start)
    every = [
        max(sum(loads[:m]), compute(tokens - start - 64 * m, start + 64 * m))
        for m in range(len(loads) + 1)
    ]
    assert split.seconds == pytest.approx(min(every), rel=1e-2, abs=1e-9)
    assert every[split.load_blocks] == pytest.approx(min(every), rel=2e-2, abs=1e-9)
    assert split.compute_all_seconds == pytest.approx(compute(tokens - start, start), rel=1e-2)


def test_nothing_is_known_at_first():
    cost = CostModel()
    assert cost.split([1.0], block_tokens=64, tokens=64) is None
    assert cost.load_seconds("file", 1, 1) is None
    cost.read("file", 1000, 1.0)
    cost.decode(4000, 2.0)
    assert cost.load_seconds("file", 1000, 4000) == pytest.approx(3.0)
