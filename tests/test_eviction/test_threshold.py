# SPDX-License-Identifier: Apache-2.0
"""The threshold allocator: what scores tau or more, and what is protected."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib.blocks import LayerKV, Row
from kvlib.errors import ConfigError
from kvlib.eviction import ALLOCATORS, LayerState, LayerView, Needs, build_policy
from kvlib.eviction.full import Full
from kvlib.eviction.scored import Allocator, Protect, ScoredPolicy, plan_scored
from kvlib.eviction.threshold import Threshold
from kvlib.testing.models import tiny_model


@dataclass(frozen=True)
class Table(ScoredPolicy):
    """Scores from a table, by layer and position."""

    table: tuple
    budget: float | int = 1
    name: ClassVar[str] = "table"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar = Full.about

    @property
    def needs(self):
        return Needs()

    def scores(self, view):
        rows = [
            torch.tensor(mine)[row.positions.long()]
            for mine, row in zip(self.table[view.place], view.layer.rows(), strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1e9)


def view_of(rows, place=0):
    """A layer whose heads hold these positions."""
    parts = [
        Row(
            torch.zeros(len(p), 2), torch.zeros(len(p), 2), torch.tensor(p, dtype=torch.int32), None
        )
        for p in rows
    ]
    num = max(max(p) for p in rows) + 1
    layer = LayerKV.from_rows(place, parts)
    return LayerView(
        layer=layer, state=LayerState(), num_new=1, num_prompt=num, num_seen=num, place=place
    )


def kept(scorer, allocator, protect, views):
    """Positions by layer and head."""
    out = []
    plans = plan_scored(scorer, allocator, protect, views)
    for view, plan in zip(views, plans, strict=True):
        rows = [row.positions.tolist() for row in view.layer.rows()]
        if plan:
            rows = [
                [row[i] for i in index.tolist()]
                for row, index in zip(rows, plan[0].rows, strict=True)
            ]
        out.append(rows)
    return out


def definition(table, held, tau, sinks, window):
    """Positions that one head keeps."""
    out = [p for i, p in enumerate(held) if table[p] >= tau or i < sinks or i >= len(held) - window]
    return out or [max(held, key=lambda p: (table[p], -p))]


SCORES = st.lists(st.integers(-9, 0).map(float), min_size=12, max_size=12)


@given(
    st.lists(st.lists(SCORES, min_size=2, max_size=2), min_size=1, max_size=3),
    st.data(),
    st.integers(-10, 1),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_choices_are_the_definitions(table, data, tau, sinks, window):
    """In rows of any lengths, with any protection, whatever the budget; at least one stays."""
    some = st.sets(st.integers(0, 11), min_size=1).map(sorted)
    rows = [[data.draw(some) for _ in layer] for layer in table]
    for budget in (1, 5, 0.25):
        views = [view_of(layer, place) for place, layer in enumerate(rows)]
        found = kept(Table(tuple(table), budget), Threshold(tau), Protect(sinks, window), views)
        assert found == [
            [definition(t, r, tau, sinks, window) for t, r in zip(*pair, strict=True)]
            for pair in zip(table, rows, strict=True)
        ]
        assert all("budgets" not in view.state.values for view in views)


def test_the_full_budget_keeps_everything():
    """1.0 asks a scorer for no signal, so there are no scores to go by."""
    views = [view_of([[0, 1, 2], [0, 1]])]
    table = (([-9.0] * 3, [-9.0] * 3),)
    assert kept(Table(table, 1.0), Threshold(0), None, views) == [[[0, 1, 2], [0, 1]]]
    assert kept(Table(table, 0.9), Threshold(0), None, views) == [[[0], [0]]]


@torch.no_grad()
def test_it_decides_anew_in_every_step():
    """An entry goes in the step in which it leaves the window; others fix what they gave."""
    model = tiny_model(num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    table = (torch.rand(2, 40, generator=generator) * 9 - 9).tolist()
    scorer = Table((table,))
    ids = torch.randint(0, 199, (1, 40), generator=generator)

    from kvlib.eviction.compose import compose

    cache = kvlib.KVCache(model, compose([scorer, Threshold(-4), Protect(2, 5)]))
    held = [list(range(20)) for _ in range(2)]
    model(ids[:, :20], past_key_values=cache)
    held = [definition(table[h], held[h], -4, 2, 5) for h in range(2)]
    sizes = []
    seen = 20
    for num in (1, 1, 1, 4, 1, 1, 7, 1, 1):
        assert [row.positions.tolist() for row in cache.layer_kv(0).rows()] == held
        model(ids[:, seen : seen + num], past_key_values=cache)
        held = [
            definition(table[h], [*held[h], *range(seen, seen + num)], -4, 2, 5) for h in range(2)
        ]
        seen += num
        sizes.append(tuple(map(len, held)))
    assert len(set(sizes)) > 3
    assert sizes[-1][0] != sizes[-1][1]


def test_methods():
    """With a policy and alone, beside SnapKV; whole model or not is the scorer's business."""
    policy = build_policy("h2o:budget=0.5+threshold:tau=0.25")
    assert policy.allocator == Threshold(0.25)
    assert not policy.needs.whole_model
    assert build_policy("threshold:tau=1,window=4").tokens.window == 4
    assert build_policy("kvzip:instruct=false+threshold").needs.whole_model
    assert Threshold().tau == -4.0


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_only_a_threshold_is_not_fixed(name):
    """Every allocator says which it is."""
    allocator = ALLOCATORS.get(name)()
    assert isinstance(allocator, Allocator)
    assert allocator.fixed == (name != "threshold")


@pytest.mark.parametrize("tau", [float("nan"), float("inf")])
def test_a_threshold_is_a_number(tau):
    with pytest.raises(ConfigError, match="threshold: tau is a finite number"):
        Threshold(tau)
