# SPDX-License-Identifier: Apache-2.0
"""Intervals, tests and comparisons against brute force and published values."""

import itertools
import math
import random

import numpy as np
import pytest

from kvlib.errors import ConfigError
from kvlib.evals.statistics import Interval, cluster_mean, holm, mcnemar
from kvlib.evals.summary import compare, summarize


def test_the_mean_is_over_questions_and_the_interval_over_contexts():
    """Against all resamples of four clusters of unequal size, counted out."""
    clusters = {0: [1.0, 0.0], 1: [1.0], 2: [0.0, 0.0, 1.0], 3: [1.0, 1.0]}
    means = []
    for chosen in itertools.product(clusters.values(), repeat=4):
        values = [x for cluster in chosen for x in cluster]
        means.append(sum(values) / len(values))
    found = cluster_mean(clusters)
    assert found.mean == 5 / 8
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.03)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.03)
    assert cluster_mean(clusters) == found


def test_the_interval_covers_what_it_says():
    """40 correlated contexts, 200 times: 95 % intervals hold the truth in 89 to 99 %."""
    rng = random.Random(0)
    held = 0
    for trial in range(200):
        clusters = {}
        for i in range(40):
            chance = rng.betavariate(2, 2)
            clusters[i] = [float(rng.random() < chance) for _ in range(5)]
        found = cluster_mean(clusters, seed=trial)
        held += found.low <= 0.5 <= found.high
    assert 0.89 <= held / 200 <= 0.99


def test_correlated_questions_do_not_narrow_it():
    """Each question five times over says no more than once."""
    rng = random.Random(1)
    once = {i: [float(rng.random() < 0.6)] for i in range(30)}
    fivefold = {i: values * 5 for i, values in once.items()}
    first, second = cluster_mean(once), cluster_mean(fivefold)
    assert (first.low, first.high) == pytest.approx((second.low, second.high), abs=0.02)


def test_few_and_equal_clusters():
    """One context has no interval; where all agree it has no width."""
    assert cluster_mean({0: [1.0, 0.0]}) == Interval(0.5, None, None)
    assert cluster_mean({0: [1.0], 1: [1.0, 1.0]}) == Interval(1.0, 1.0, 1.0)


def test_disjoint():
    """Only intervals that exist and do not touch."""
    assert Interval(0.2, 0.1, 0.3).disjoint(Interval(0.5, 0.4, 0.6))
    assert Interval(0.5, 0.4, 0.6).disjoint(Interval(0.2, 0.1, 0.3))
    assert not Interval(0.2, 0.1, 0.4).disjoint(Interval(0.5, 0.4, 0.6))
    assert not Interval(0.2, None, None).disjoint(Interval(0.5, 0.4, 0.6))


def test_mcnemar_is_the_exact_binomial():
    """Discordant pairs against the sum of binomial coefficients."""
    first = [1, 1, 1, 1, 1, 1, 0, 0, 1, 0]
    second = [0, 0, 0, 0, 0, 1, 1, 0, 1, 0]
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (5, 1)
    assert found.p == pytest.approx(2 * sum(math.comb(6, k) for k in (0, 1)) / 2**6)
    assert mcnemar([1, 0], [1, 0]).p == 1


def test_holm():
    """The example of its description: .01 .04 .03 .005 -> .03 .06 .06 .02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def record(method, index, exact, *, task="table:pairs=20", kl=0.5, held=50, length=1024):
    questions = [
        {"exact": x, "token_accuracy": float(x), "nll": 1.0, "kl": kl, "top1": 1.0} for x in exact
    ]
    return {
        "sample": {"task": task, "version": 1, "length": length, "seed": 0, "index": index},
        "mode": "unaware",
        "method": method,
        "questions": questions,
        "held_bytes": held,
        "full_bytes": 100,
    }


def test_summaries():
    """Means, shares and paired differences by hand; contexts without the full cache are left."""
    records = [
        record("full", 0, [1, 1], held=100, kl=0),
        record("full", 1, [1, 0], held=100, kl=0),
        record("x:budget=0.5", 1, [0, 0]),
        record("x:budget=0.5", 0, [1, 0]),
        record("x:budget=0.5", 2, [1, 1], held=53),
    ]
    full, other = summarize(records)
    assert (full.method, full.contexts, full.questions) == ("full", 2, 4)
    assert full.score.mean == 0.75
    assert full.delta is None
    assert other.score.mean == 0.5
    assert other.delta.mean == -0.5
    assert other.held_share == pytest.approx(0.51)
    assert other.scores["kl"] == 0.5
    assert other.peak_share is None
    assert summarize(list(reversed(records)))[-1].score == full.score


def test_comparisons_are_paired():
    """Only what both have; the sign and the verdict are those of the second."""
    first = [record("a", i, [1, 0, 1, 0]) for i in range(8)]
    second = [record("a", i, [1, 1, 1, 1]) for i in range(2, 10)]
    (found,) = compare(first, second)
    assert (found.contexts, found.questions) == (6, 24)
    assert (found.first_score, found.second_score) == (0.5, 1)
    assert found.delta == Interval(0.5, 0.5, 0.5)
    assert (found.only_first, found.only_second) == (0, 12)
    assert found.p == pytest.approx(2 / 2**12)
    assert found.verdict == "better"
    (back,) = compare(second, first)
    assert back.verdict == "worse"
    (same,) = compare(first, first)
    assert same.verdict == "no difference shown"
    assert compare(first, [record("b", 0, [1] * 4)]) == []


def test_a_verdict_needs_five_contexts():
    """Where few contexts agree the interval has no width, and means nothing."""
    first = [record("a", i, [0]) for i in range(4)]
    second = [record("a", i, [1]) for i in range(4)]
    assert compare(first, second)[0].verdict == "too few contexts"


def test_other_prompts_are_not_paired():
    """The same task, length, seed and index with another tokenizer: other questions."""
    first = [record("a", i, [0]) for i in range(5)]
    second = [record("a", i, [1]) for i in range(5)]
    for i, one in enumerate(first):
        one["sample"] = {**one["sample"], "digest": f"{i}"}
    assert compare(first, second)[0].verdict == "better"  # a tool that says nothing is believed
    second[3]["sample"] = {**second[3]["sample"], "digest": "4"}
    with pytest.raises(ConfigError, match="different questions"):
        compare(first, second)


def test_comparisons_of_methods_and_of_what_is_better_low():
    """Two methods of one run; less KL is better; p is corrected for the number of cells."""
    records = [
        record(method, i, [1, int(method == "b")], kl=0.1 if method == "b" else 0.2 + i / 100)
        for method in "ab"
        for i in range(5)
    ]
    (found,) = compare(
        [r for r in records if r["method"] == "a"], records, pairs=lambda _: "b", metric="kl"
    )
    assert found.delta.mean == pytest.approx(-0.12)
    assert found.verdict == "better"
    assert found.p is None
    two = [r for r in records if r["method"] == "a"]
    two += [{**r, "sample": {**r["sample"], "length": 2048}} for r in two]
    others = [r for r in records if r["method"] == "b"]
    others += [{**r, "sample": {**r["sample"], "length": 2048}} for r in others]
    for one in compare(two, others, pairs=lambda _: "b"):
        assert one.p == pytest.approx(2 * 2 / 2**5)


def test_a_score_that_one_side_lacks_is_replaced():
    """Another tool may know no KL: text is then compared by nll."""
    first = [record("a", i, [0], task="text:tokens=9") for i in range(3)]
    second = [record("a", i, [0], task="text:tokens=9") for i in range(3)]
    for one in second:
        del one["questions"][0]["kl"]
    assert compare(first, first)[0].metric == "kl"
    assert compare(first, second)[0].metric == "nll"
    assert compare(second, first)[0].metric == "nll"


def test_different_questions_are_refused():
    """Another number of questions for one context; a score that was not taken."""
    first = [record("a", 0, [1, 0]), record("a", 1, [1, 0])]
    with pytest.raises(ConfigError, match="different questions"):
        compare(first, [record("a", 0, [1, 0, 1]), record("a", 1, [1, 0])])
    with pytest.raises(ConfigError, match="not every sample has the score"):
        compare(first, first, metric="speed")
