# SPDX-License-Identifier: Apache-2.0
"""Rows in buffers of their own: what is done in place is what `apply_plan` makes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib import cache_ragged
from kvlib.attention import Logits, attend, column_maxima, column_sums
from kvlib.blocks import SYNTHETIC, LayerKV, Row
from kvlib.cache_ragged import find_gaps, slide
from kvlib.cache_rows import LayerRow, extend_entries
from kvlib.errors import ShapeError
from kvlib.eviction import LayerState
from kvlib.eviction.base import LayerView
from kvlib.eviction.key_lengths import forget_lengths, key_lengths
from kvlib.eviction.scored import Protect
from kvlib.eviction.select import drop_lowest, plan_highest
from kvlib.layer_kv import Gaps
from kvlib.plans import AppendToken, KeepTokens, apply_plan

WIDTH = 4
CPU = torch.device("cpu")


def packed(rng, lengths, dtype=torch.float32, *, weighted=False):
    """Rows of these lengths; if weighted, the last entry of each but the first is synthetic."""
    rows = []
    for head, n in enumerate(lengths):
        positions = torch.arange(n, dtype=torch.int32) * 2
        weight = torch.zeros(n) if weighted else None
        if weighted and head:
            positions[-1] = SYNTHETIC
            weight[-1] = float(rng.standard_normal())
        parts = [torch.from_numpy(rng.standard_normal((n, WIDTH))).to(dtype) for _ in "kv"]
        rows.append(Row(*parts, positions, weight))
    return LayerKV.from_rows(0, rows)


def without_append(layer, keys, values, positions):
    """New tokens before the synthetic entries, written down row by row."""
    rows = []
    for head, row in enumerate(layer.rows()):
        at = int((row.positions != SYNTHETIC).sum())
        new = Row(keys[head], values[head], positions, torch.zeros(len(positions)))
        rows.append(
            Row(
                *(
                    None if x is None else torch.cat([x[:at], more.to(x.dtype), x[at:]])
                    for x, more in zip(row, new, strict=True)
                )
            )
        )
    return LayerKV.from_rows(0, rows)


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(2, 20), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(1, 30),
)
def test_steps_in_place_are_the_same(seed, lengths, dtype, weighted, steps):
    """Tokens come and one range of each row goes, with compensation tokens or without."""
    rng = np.random.default_rng(seed)
    layer = packed(rng, lengths, dtype, weighted=weighted)
    row = LayerRow(layer, LayerState())
    expected = layer
    heads = len(lengths)
    for step in range(steps):
        num = int(rng.integers(1, 3))
        shape = (heads, num, WIDTH)
        keys, values = (torch.from_numpy(rng.standard_normal(shape)).to(dtype) for _ in "kv")
        positions = torch.arange(num, dtype=torch.int32) + 1000 + 2 * step
        old = row.layer.lengths
        row.append(keys, values, positions)
        extend_entries(row.state, old, row.layer)
        expected = without_append(expected, keys, values, positions)
        assert row.layer.equal(expected)
        count = expected.keys.shape[:-1].numel()
        numbered = torch.arange(count).view(expected.keys.shape[:-1])
        row.state.entries = {} if weighted else {"number": numbered}
        ends = [n - weighted * bool(h) for h, n in enumerate(expected.lengths)]
        starts = [int(rng.integers(0, max(end - 2, 1))) for end in ends]
        ranges = tuple(
            range(a, min(a + int(rng.integers(0, 3)), e)) for a, e in zip(starts, ends, strict=True)
        )
        plans = [KeepTokens.without(Gaps(expected.lengths, ranges, CPU))]
        if weighted and heads > 1:
            tails = (0, *(1 for _ in lengths[1:]))
            plans = [KeepTokens.without(Gaps(expected.lengths, ranges, CPU, tails))]
            some = tuple(range(1, heads))
            means = [torch.from_numpy(rng.standard_normal((heads - 1, WIDTH))) for _ in "kv"]
            plans.append(AppendToken(some, *means, mass=tuple(2.0 + step for _ in some)))
        numbers = row.state.entries.get("number")
        if rng.integers(0, 2):  # rows written out do the same
            plans[0] = KeepTokens(plans[0].rows)
        before = expected.lengths
        expected = apply_plan(expected, plans).layer
        row.apply(plans, None)
        assert row.layer.equal(expected)
        assert row.layer.is_dense == expected.is_dense
        if numbers is not None:
            parts = numbers.flatten().split(list(before))
            want = [part[index] for part, index in zip(parts, plans[0].rows, strict=True)]
            assert torch.equal(row.state.entries["number"].flatten(), torch.cat(want))
            assert row.state.entries["number"].shape == row.layer.keys.shape[:-1]
    assert row.nbytes >= expected.nbytes


def test_steps_allocate_nothing():
    """A row that loses as many entries as come stays in its buffers, and moves within them."""
    rng = np.random.default_rng(0)
    row = LayerRow(packed(rng, [30, 40]), LayerState())
    places = set()
    for step in range(200):
        new = torch.randn(2, 1, WIDTH)
        row.append(new, new, torch.tensor([1000 + step], dtype=torch.int32))
        gone = (range(2, 3), range(35, 36))  # near the front of one, near the end of the other
        row.apply([KeepTokens.without(Gaps((31, 41), gone, CPU))], None)
        places.add(tuple(x.data_ptr() for head in row._loose._heads for x in head.tensors))
    assert len(places) == 1
    assert row.layer.lengths == (30, 40)


@pytest.mark.parametrize("device", ["cpu", "other"])
@pytest.mark.parametrize(("to", "start", "num"), [(0, 1, 5), (2, 0, 5), (1, 1, 3), (4, 0, 0)])
def test_slide(to, start, num, device, monkeypatch):
    """Overlapping parts, as numpy moves them; without memory addresses too."""
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        x = torch.arange(16, dtype=torch.int32).view(8, 2).to(dtype)
        want = x.clone()
        want[to : to + num] = x[start : start + num].clone()
        if device == "other":
            monkeypatch.setattr(cache_ragged, "_MEMORY", ())
        slide(x, to, start, num)
        assert torch.equal(x, want)


@pytest.mark.parametrize(
    "rows",
    [
        ([0, 2, 1], [0, 1]),
        ([0, 0, 1], [0, 1]),
        ([0, 1, 9], [0, 1]),
        ([0, 1, 2],),
    ],
)
def test_wrong_plans_are_refused(rows):
    """As `apply_plan` refuses them, and nothing has changed."""
    row = LayerRow(packed(np.random.default_rng(0), [3, 2]), LayerState())
    row.append(torch.ones(2, 1, WIDTH), torch.ones(2, 1, WIDTH), torch.tensor([99]).int())
    before = row.fork()
    plan = KeepTokens(tuple(torch.tensor(x) for x in rows))
    assert find_gaps(plan, row.layer) is None
    with pytest.raises(ShapeError):
        row.apply([plan], None)
    assert row.layer.equal(before.layer)


def test_gaps_that_do_not_fit_are_refused():
    """For rows of other lengths."""
    layer = packed(np.random.default_rng(0), [3, 2])
    for lengths, gone in (((3, 3), (0, 1)), ((3, 2), (2, 3))):
        ranges = (range(0), range(*gone))
        assert not Gaps(lengths, ranges, CPU).fit(layer)
    row = LayerRow(layer, LayerState())
    row.append(torch.ones(2, 1, WIDTH), torch.ones(2, 1, WIDTH), torch.tensor([99]).int())
    with pytest.raises(ShapeError):
        row.apply([KeepTokens.without(Gaps((9, 9), (range(8, 9),) * 2, CPU))], None)


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
)
def test_the_lowest_is_the_one_that_ranking_drops(seed, lengths, sinks, window, shared):
    """Ties, protected entries and rows of any length."""
    rng = np.random.default_rng(seed)
    lengths = [lengths[0]] * len(lengths) if shared else lengths
    longest = max(lengths)
    scores = torch.from_numpy(rng.integers(0, 3, (len(lengths), longest))).float()
    if shared:
        scores = scores[:1].expand(len(lengths), -1)
    budgets = [n - 1 for n in lengths]
    guard = Protect(sinks=sinks, window=window)
    safe = [guard.within(budget) for budget in budgets]
    plan = drop_lowest(scores, lengths, budgets, safe)
    assert plan  # a budget never protects all entries of a row that is longer
    (ranked,) = plan_highest(guard.mark(scores, lengths, budgets), lengths, budgets)
    for mine, row in zip(plan[0].rows, ranked.rows, strict=True):
        assert torch.equal(mine, row)


def test_only_the_usual_step_is_taken():
    """Another number of entries to drop is left to `plan_highest`."""
    assert not drop_lowest(torch.zeros(1, 5), [5], [3], [(0, 0)])
    assert not drop_lowest(torch.zeros(2, 5), [5, 4], [4, 4], [(0, 0)] * 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7], [5, 9]])
def test_one_query_is_the_last_of_many(lengths, weighted):
    """Output, sums and maxima of one query, against the general path through a soft cap of 1e9."""
    rng = np.random.default_rng(0)
    layer = packed(rng, lengths, weighted=weighted)
    query = torch.randn(6, 1, WIDTH)
    plain, capped = Logits(), Logits(softcap=1e9)
    row = LayerRow(layer, LayerState())
    row.append(torch.ones(2, 1, WIDTH), torch.ones(2, 1, WIDTH), torch.tensor([99]).int())
    for held in (layer, row.layer):
        want = attend(query, held, capped, with_column_sums=True)
        for found in (
            attend(query, held, plain),
            attend(query, held, plain, with_column_sums=True),
        ):
            torch.testing.assert_close(found.output, want.output)
        torch.testing.assert_close(found.column_sums, want.column_sums)
        for statistic in (column_sums, column_maxima):
            torch.testing.assert_close(statistic(query, held, plain), want.column_sums)


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16]))
def test_remembered_lengths_are_those_of_the_keys(seed, dtype):
    """Bit for bit, while entries come, go and change."""
    rng = np.random.default_rng(seed)
    keys = torch.from_numpy(rng.standard_normal((2, 9, 64))).to(dtype)
    state = LayerState()

    def view(keys):
        layer = LayerKV(layer_idx=0, keys=keys, values=keys, positions=range(keys.shape[1]))
        return LayerView(layer=layer, state=state, num_new=1, num_prompt=9, num_seen=9)

    def fresh(keys):
        return torch.linalg.vector_norm(keys.float(), dim=-1).clamp(min=0.5)

    assert torch.equal(key_lengths(view(keys), 0.5), fresh(keys))
    keys = torch.cat([keys, torch.zeros(2, 1, 64, dtype=dtype)], dim=1)
    state.entries["lengths"] = torch.nn.functional.pad(state.entries["lengths"], (0, 1))
    assert torch.equal(key_lengths(view(keys), 0.5), fresh(keys))
    keys[1, 3] *= 2
    forget_lengths(view(keys), torch.tensor([1]), torch.tensor([3]))
    assert torch.equal(key_lengths(view(keys), 0.5), fresh(keys))
