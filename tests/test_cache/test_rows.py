# SPDX-License-Identifier: Apache-2.0
"""Rows that grow in buffers: plans carried out in place are what `apply_plan` makes of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import LayerKV
from kvlib.cache_rows import LayerRow
from kvlib.errors import ShapeError
from kvlib.eviction import LayerState
from kvlib.plans import KeepTokens, MergeTokens, apply_plan

HEADS, WIDTH = 3, 4


def grown(rng, num, dtype):
    """A row whose last entries were appended, so that it has buffers, and one number for each."""
    parts = [torch.from_numpy(rng.standard_normal((HEADS, num, WIDTH))).to(dtype) for _ in "kv"]
    positions = torch.arange(num, dtype=torch.int32)
    first = num // 2
    layer = LayerKV(
        layer_idx=0,
        keys=parts[0][:, :first],
        values=parts[1][:, :first],
        positions=positions[:first].expand(HEADS, -1),
    )
    row = LayerRow(layer, LayerState())
    row.append(parts[0][:, first:], parts[1][:, first:], positions[first:])
    row.state.entries["number"] = torch.arange(HEADS * num).view(HEADS, num)
    return row


@given(
    st.integers(0, 2**32 - 1),
    st.integers(4, 30),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["both", "keys", "values"]),
    st.integers(0, 12),
)
def test_in_place_is_the_same(seed, num, dtype, axis, pairs):
    """Bit for bit, for any rows kept and any merges into them."""
    rng = np.random.default_rng(seed)
    row = grown(rng, num, dtype)
    keep = int(rng.integers(max(num - 4, 1), num))
    kept = [np.sort(rng.permutation(num)[:keep]) for _ in range(HEADS)]
    plans = [KeepTokens(tuple(torch.from_numpy(x) for x in kept))]
    if pairs:
        head = rng.integers(0, HEADS, pairs)
        dst = np.array([rng.choice(kept[h]) for h in head])
        plans.append(
            MergeTokens(
                head=torch.from_numpy(head),
                src=torch.from_numpy(rng.integers(0, num, pairs)),
                dst=torch.from_numpy(dst),
                weight=torch.from_numpy(rng.standard_normal(pairs)).float(),
                axis=axis,
            )
        )
    expected = apply_plan(row.layer, plans).layer
    buffers = row._buffers
    row.apply(plans[::-1], None)
    assert row._buffers is buffers  # nothing was allocated
    assert row.layer.equal(expected)
    numbers = torch.stack([torch.from_numpy(x) + h * num for h, x in enumerate(kept)])
    assert torch.equal(row.state.entries["number"], numbers)


@pytest.mark.parametrize(
    ("head", "src", "dst", "message"),
    [(0, 0, 9, "not kept"), (0, 10, 0, "outside 0..9"), (3, 0, 0, "KV head outside")],
)
def test_wrong_merges_are_refused(head, src, dst, message):
    """As `apply_plan` refuses them, and nothing has changed."""
    row = grown(np.random.default_rng(0), 10, torch.float32)
    before = row.fork()
    one = [torch.tensor([x]) for x in (head, src, dst)]
    merge = MergeTokens(*one, torch.ones(1))
    with pytest.raises(ShapeError, match=message):
        row.apply([KeepTokens((torch.arange(9),) * HEADS), merge], None)
    assert row.layer.equal(before.layer)
