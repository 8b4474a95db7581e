# SPDX-License-Identifier: Apache-2.0
"""Allocators against their oracle: how many entries each head keeps, and which."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvlib.blocks import LayerKV, Row
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, Needs, build_policy
from kvlib.eviction.adakv import AdaKV
from kvlib.eviction.compose import Composed
from kvlib.eviction.joint import Joint
from kvlib.eviction.pyramid import Pyramid
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import largest_remainder
from tests.oracles import allocators as oracle

MORE = settings(max_examples=max(200, settings.default.max_examples))  # they are quick
FLOORS = st.sampled_from(["0.0", "0.1", "0.2", "0.3", "0.5", "0.7", "1.0"])


@dataclass(frozen=True)
class Given(ScoredPolicy):
    """Scores from a table, by layer."""

    budget: int
    table: tuple
    name: ClassVar[str] = "given"

    @property
    def needs(self):
        return Needs()

    def scores(self, view):
        rows = [torch.tensor(row, dtype=torch.float64) for row in self.table[view.place]]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1e9)


def views_of(layers):
    """A view of each layer, whose rows have as many entries as there are scores."""
    views = []
    for place, rows in enumerate(layers):
        empty = [
            Row(
                torch.zeros(len(row), 2),
                torch.zeros(len(row), 2),
                torch.arange(len(row)).int(),
                None,
            )
            for row in rows
        ]
        views.append(
            LayerView(
                layer=LayerKV.from_rows(place, empty),
                state=LayerState(),
                num_new=max(map(len, rows)),
                num_prompt=max(map(len, rows)),
                num_seen=max(map(len, rows)),
                place=place,
                num_layers=len(layers),
            )
        )
    return views


def run(allocator, layers, budget, sinks, window):
    """What is allocated, and the entries kept after it."""
    scorer, guard = Given(budget, tuple(layers)), Protect(sinks, window)
    views = views_of(layers)
    counts = allocator.allocate(
        views, [scorer.scores(view) for view in views], [budget] * len(views), guard
    )
    plans = Composed(scorer, allocator, guard).on_prefill_end(views)
    kept = [
        [row.tolist() for row in mine[0].rows] if mine else [list(range(len(row))) for row in rows]
        for mine, rows in zip(plans, layers, strict=True)
    ]
    return counts, kept


def check(layers, counts, kept, budget, sinks, window):
    """Protected entries stay and, of the others, the highest."""
    for rows, sizes, mine in zip(layers, counts, kept, strict=True):
        for row, num, indices in zip(rows, sizes, mine, strict=True):
            assert oracle.protected(len(row), budget, sinks, window) <= set(indices)
            safe = oracle.protected(len(row), num, sinks, window)  # a row that got more guards more
            assert indices == oracle.choose(row, num, safe)


def everything(layers):
    return [[list(range(len(row))) for row in rows] for rows in layers]


def tables(layers, heads, sizes):
    """Scores that tie often, [layers][heads][entries], equally long in all layers."""
    return st.tuples(st.integers(*layers), st.integers(*heads), sizes).flatmap(
        lambda drawn: st.lists(
            st.tuples(
                *(st.lists(st.integers(0, 5), min_size=n, max_size=n) for n in drawn[2][: drawn[1]])
            ),
            min_size=drawn[0],
            max_size=drawn[0],
        )
    )


EQUAL = st.integers(2, 14).map(lambda n: [n] * 5)
RAGGED = st.lists(st.integers(1, 14), min_size=5, max_size=5)
WITHIN = st.tuples(st.integers(1, 13), st.integers(0, 4), st.integers(0, 6))


@MORE
@given(tables((1, 2), (1, 5), EQUAL | RAGGED), WITHIN, FLOORS)
@example([([5] * 7 + [0] * 2, *[[5] * 2 + [0] * 7] * 4)], (3, 0, 0), "0.2")  # 6.2 and 2.2
@example([([1], [1] * 14)], (10, 2, 6), "0.2")  # a row shorter than the window
def test_adakv_equals_its_definition(layers, within, floor):
    """Counts, totals and floors of each layer by itself, for rows equally long and not."""
    budget, sinks, window = within
    counts, kept = run(AdaKV(float(floor)), layers, budget, sinks, window)
    for rows, mine in zip(layers, counts, strict=True):
        assert [mine] == oracle.share([rows], budget, sinks, window, floor)
        assert sum(mine) == min(budget * len(rows), sum(map(len, rows)))
        assert all(n <= len(row) for n, row in zip(mine, rows, strict=True))
        if len({len(row) for row in rows}) == 1 and budget <= len(rows[0]):
            fixed = len(oracle.protected(len(rows[0]), budget, sinks, window))
            assert min(mine) >= fixed + int(Fraction(floor) * (budget - fixed))
    if max(len(row) for rows in layers for row in rows) > budget:
        check(layers, counts, kept, budget, sinks, window)
    else:
        assert kept == everything(layers)


@MORE
@given(tables((1, 4), (1, 3), EQUAL | RAGGED), WITHIN, FLOORS)
def test_joint_equals_its_definition(layers, within, floor):
    """Counts and the total over all layers together."""
    budget, sinks, window = within
    counts, kept = run(Joint(float(floor)), layers, budget, sinks, window)
    assert counts == oracle.share(layers, budget, sinks, window, floor)
    fair = [min(budget * len(rows), sum(map(len, rows))) for rows in layers]
    assert sum(map(sum, counts)) == sum(fair)
    if max(len(row) for rows in layers for row in rows) > budget:
        check(layers, counts, kept, budget, sinks, window)
    else:
        assert kept == everything(layers)


@MORE
@given(
    st.integers(1, 60),
    st.integers(1, 40),
    st.integers(0, 12),
    st.integers(1, 9),
    st.sampled_from(["1.0", "1.5", "3.0", "7.0", "20.0"]),
)
@example(13, 12, 4, 2, "20.0")
def test_pyramid_equals_its_definition(num, budget, window, layers, beta):
    """The slope, clamped to a short prompt; the layers sum to their budget, none holds more."""
    scores = [[[float(s) for s in range(num)]] * 2] * layers
    counts, kept = run(Pyramid(float(beta)), scores, budget, 0, window)
    fixed = min(window, budget)
    expected = oracle.pyramid(num, budget, fixed, layers, beta)
    assert [[len(row) for row in mine] for mine in kept] == [[n, n] for n in expected]
    if num > budget:
        assert counts == [[n, n] for n in expected]
        assert sum(expected) == budget * layers
        assert expected == sorted(expected, reverse=True)
        assert fixed <= expected[-1] <= expected[0] <= num
        check(scores, counts, kept, budget, 0, window)


# By hand


def test_adakv_by_hand():
    """Of 12 winners 9, 3 and 0; drawn to 4 by a fifth; the last token stays and counts."""
    rows = ([9] * 9 + [1] * 3 + [0], [8] * 3 + [1] * 9 + [0], [0] * 13)
    assert run(AdaKV(0.0), [rows], 5, 0, 1)[0] == [[10, 4, 1]]
    # 0.8 * 9 + 0.8 = 8.0, 0.8 * 3 + 0.8 = 3.2, 0.8: one is left, for the remainder of 0.8
    assert run(AdaKV(0.2), [rows], 5, 0, 1)[0] == [[9, 4, 2]]
    assert run(AdaKV(1.0), [rows], 5, 0, 1)[0] == [[5, 5, 5]]


def test_joint_by_hand():
    """Each layer's scores are above the next one's."""
    layers = [([3] * 8, [3] * 8), ([2] * 8, [2] * 8), ([1] * 8, [1] * 8)]
    assert run(Joint(), layers, 4, 0, 0)[0] == [[8, 8], [8, 0], [0, 0]]
    assert run(Joint(), layers, 4, 0, 1)[0] == [[8, 8], [5, 1], [1, 1]]
    assert run(Joint(0.5), layers, 4, 0, 0)[0] == [[6, 6], [6, 2], [2, 2]]


def test_pyramid_by_hand():
    """M = 28 with w = 8 over 5 layers: 39, 29.5, 20, 10.5 and 1 besides the window."""
    assert oracle.pyramid(200, 28, 8, 5, "20.0") == [47, 38, 28, 18, 9]
    counts, _ = run(Pyramid(), [[list(range(200))]] * 5, 28, 0, 8)
    assert counts == [[47], [38], [28], [18], [9]]
    # of 38 tokens the first layer keeps all 30 besides the window, the last 2 * 20 - 30
    counts, _ = run(Pyramid(), [[list(range(38))]] * 5, 28, 0, 8)
    assert counts == [[38], [33], [28], [23], [18]]


@pytest.mark.parametrize("allocator", [AdaKV(0.0), Joint()])
def test_ties_go_to_the_first_head(allocator):
    """Of equal scores the earlier head's win."""
    assert run(allocator, [([1] * 6, [1] * 6)], 4, 0, 0)[0] == [[6, 2]]


def test_remainders_are_compared_exactly():
    """1.4 and 5.4 leave the same, though not as floats: the first head gets the entry."""
    rows = tuple([5] * n + [0] * (9 - n) for n in (1, 4, 2, 6, 3, 2))
    assert run(AdaKV(0.2), [rows], 3, 0, 0)[0] == [[2, 4, 2, 5, 3, 2]]


def test_no_shares_are_equal_shares():
    """Nothing won by anyone."""
    assert largest_remainder([0, 0, 0], 4) == [2, 1, 1]
    assert largest_remainder([0.0, 1.0], 3) == [0, 3]


def test_what_is_given_stays_fixed():
    """A head keeps its number in later steps, and more where others keep less."""
    policy = Composed(Given(4, (([9, 9, 9, 9, 9, 9], [1, 1, 1, 1, 1, 1]),)), AdaKV(0.25))
    (view,) = views_of(policy.tokens.table)
    policy.on_prefill_end([view])
    assert view.state.values["budgets"].tolist() == [6, 2]
    rows = ([0] * 7, [9] * 3)
    later = Composed(Given(4, (rows,)), AdaKV(0.25))
    (after,) = views_of([rows])
    after.state.values["budgets"] = view.state.values["budgets"]
    ((plan,),) = later.on_step([after])
    assert [len(row) for row in plan.rows] == [6, 2]


def test_protect_marks_rows_of_any_length():
    """Nothing behind a row's end is protected."""
    marked = Protect(sinks=3, window=2).mark(torch.zeros(2, 8), [8, 2], [6, 6])
    inf = float("inf")
    assert marked.tolist() == [[inf] * 3 + [0.0] * 3 + [inf] * 2, [inf] * 2 + [-inf] * 6]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("adakv:floor=1.5", r"adakv: floor is a share in \[0, 1\], got 1.5"),
        ("adakv:floor=-0.5", r"adakv: floor is a share in \[0, 1\], got -0.5"),
        ("joint:floor=2", r"joint: floor is a share in \[0, 1\], got 2"),
        ("pyramid:beta=0.5", "pyramid: beta must be 1 or more, got 0.5"),
        ("h2o+protect:sinks=-1", "protect: sinks and window must be 0 or more, got -1 and 0"),
    ],
)
def test_wrong_parameters_are_named(method, message):
    """What was seen and what is expected."""
    with pytest.raises(ConfigError, match=message):
        build_policy(method)


@pytest.mark.parametrize("beta", [float("nan"), float("inf")])
def test_beta_is_a_number(beta):
    """Of the constructor."""
    with pytest.raises(ConfigError, match="pyramid: beta must be 1 or more"):
        Pyramid(beta)
