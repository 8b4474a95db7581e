# SPDX-License-Identifier: Apache-2.0
"""ThinK against its definition, and attention over keys that have lost channels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import kvlib
from kvlib.attention import Logits, attend, column_sums
from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV
from kvlib.cache_rows import LayerRow
from kvlib.errors import ConfigError, ShapeError
from kvlib.eviction import LayerState, LayerView, build_policy
from kvlib.plans import AppendToken, KeepChannels, KeepTokens, MergeTokens, apply_plan
from kvlib.testing.models import tiny_model, tiny_spec
from tests.oracles import think as oracle

HEADS, WIDTH = 2, 8


def numbers(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def layer_of(keys, values):
    positions = torch.arange(keys.shape[1], dtype=torch.int32).expand(len(keys), -1)
    return LayerKV(layer_idx=0, keys=keys, values=values, positions=positions)


@given(
    st.sampled_from([1, 3, 4, 7]),
    st.sampled_from(["0.1", "0.3", "0.4", "0.5", "0.75", "0.9"]),
    st.integers(1, 9),
    st.integers(5, 30),
    st.integers(0, 2**32 - 1),
)
def test_channels_are_the_oracles(group, ratio, window, num, seed):
    """Over the whole group, for any share of channels."""
    keys = numbers(seed, HEADS, num, WIDTH) * torch.linspace(0.1, 3, WIDTH)
    queries = numbers(seed + 1, HEADS * group, window, WIDTH)
    view = LayerView(
        layer=layer_of(keys, keys),
        state=LayerState(),
        num_new=num,
        num_prompt=num,
        num_seen=num,
        last_queries=queries,
    )
    plans = build_policy(f"think:ratio={ratio},recent=4").on_prefill_end([view])[0]
    for head in range(HEADS):
        mine = queries[head * group : (head + 1) * group].numpy()
        kept, margin = oracle.think(mine, keys[head].numpy(), ratio)
        assume(margin > 1e-5)
        if len(kept) == WIDTH:
            assert plans == ()
        else:
            assert plans[0].channels[head].tolist() == kept
            assert plans[0].whole_tail == 4


def test_a_dead_channel_goes_first():
    """Whatever the queries say of it."""
    keys = numbers(0, HEADS, 20, WIDTH)
    keys[:, :, 5] = 0
    layer = layer_of(keys, keys)
    view = LayerView(
        layer=layer,
        state=LayerState(),
        num_new=20,
        num_prompt=20,
        num_seen=20,
        last_queries=numbers(1, 4, 3, WIDTH) * 100,
    )
    plan = build_policy("think:ratio=0.125,recent=2").on_prefill_end([view])[0][0]
    assert plan.channels.tolist() == [[0, 1, 2, 3, 4, 6, 7]] * HEADS


# Attention: pruned keys are as keys with zeros


def filled(layer, width):
    """The layer as it would be with zeros in place of pruned channels, row by row."""
    rows = []
    for head, row in enumerate(layer.rows()):
        keys = row.keys.new_zeros(len(row.keys), width)
        keys[:, layer.channels[head]] = row.keys
        if layer.rest is not None:
            others = [i for i in range(width) if i not in layer.channels[head].tolist()]
            tail = min(layer.rest.shape[1], len(keys))
            rest = layer.rest[head, layer.rest.shape[1] - tail :]
            for column, channel in enumerate(others):
                keys[len(keys) - tail :, channel] = rest[:, column]
        rows.append(row._replace(keys=keys))
    return LayerKV.from_rows(0, rows)


def cut(keys, channels):
    """Keys [n, D] with zeros in all but these channels."""
    out = torch.zeros_like(keys)
    out[:, channels] = keys[:, channels]
    return out


def assert_same_attention(layer, group, num, seed=3):
    query = numbers(seed, HEADS * group, num, WIDTH)
    for logits in (Logits(), Logits(softcap=2.0), Logits(scale=0.7)):
        plain = filled(layer, WIDTH)
        seen = attend(query, layer, logits, with_column_sums=True)
        expected = attend(query, plain, logits, with_column_sums=True)
        torch.testing.assert_close(seen.output, expected.output, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.column_sums, expected.column_sums, rtol=1e-5, atol=1e-5)
        alone = attend(query, layer, logits).output
        torch.testing.assert_close(alone, expected.output, rtol=1e-5, atol=1e-5)
        sums = column_sums(query, layer, logits)
        torch.testing.assert_close(sums, expected.column_sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", [None, 0, 3, 6, 50])
@pytest.mark.parametrize("group", [1, 3])
def test_attention_over_pruned_keys(tail, group):
    """Equal to zero-filled keys: dense and ragged rows, one query and many, after later tokens."""
    keys, values = numbers(0, HEADS, 30, WIDTH), numbers(1, HEADS, 30, WIDTH)
    channels = torch.tensor([[0, 2, 3, 7], [1, 2, 5, 6]])
    plan = KeepChannels(channels, whole_tail=tail)
    for rows in (
        None,
        [torch.arange(3, 30), torch.arange(0, 27)],
        [torch.tensor([0, 5, 28]), torch.arange(4, 30)],
    ):
        plans = [plan] if rows is None else [KeepTokens(tuple(rows)), plan]
        row = LayerRow(apply_plan(layer_of(keys, values), plans).layer, LayerState())
        for head, mine in enumerate(filled(row.layer, WIDTH).rows()):
            expected = keys[head] if rows is None else keys[head, rows[head]]
            pruned = cut(expected, channels[head])
            whole = min(tail or 0, len(expected))
            pruned[len(expected) - whole :] = expected[len(expected) - whole :]
            assert torch.equal(mine.keys, pruned)
        assert_same_attention(row.layer, group, 1)
        for step, num in enumerate((1, 4, 1)):
            start = 30 + 10 * step
            new = numbers(start, HEADS, num, WIDTH)
            row.append(new, new, torch.arange(start, start + num, dtype=torch.int32))
            whole = filled(row.layer, WIDTH)
            for head in range(HEADS):
                held = whole.row(head).keys[-num:]
                if tail is not None:  # later tokens are whole
                    assert torch.equal(held, new[head])
                else:
                    assert torch.equal(held, cut(new[head], channels[head]))
            assert_same_attention(row.layer, group, num)


def test_rows_go_with_their_whole_keys():
    """Dropping entries, taking tokens back and copying leave the right keys whole."""
    keys = numbers(0, HEADS, 12, WIDTH)
    channels = torch.tensor([[0, 1, 2], [5, 6, 7]])
    row = LayerRow(
        apply_plan(layer_of(keys, keys), KeepChannels(channels, whole_tail=4)).layer, LayerState()
    )
    new = numbers(9, HEADS, 2, WIDTH)
    row.append(new, new, torch.tensor([12, 13], dtype=torch.int32))
    twin = row.fork()
    expected = filled(row.layer, WIDTH)
    for index in (
        [torch.tensor([0, 1, 9, 11, 13])] * 2,
        [torch.tensor([0, 8, 9, 10, 13]), torch.tensor([0, 1, 2, 3, 4])],
        [torch.tensor([0, 13]), torch.tensor([0, 1, 2, 8, 12])],
    ):
        mine = twin.fork()
        mine.apply([KeepTokens(tuple(index))], None)
        seen = filled(mine.layer, WIDTH)
        for head in range(HEADS):
            assert torch.equal(seen.row(head).keys, expected.row(head).keys[index[head]])
    row.truncate(3)
    seen = filled(row.layer, WIDTH)
    assert torch.equal(seen.keys, expected.keys[:, :11])
    assert filled(twin.layer, WIDTH).equal(expected)


def test_what_pruned_keys_refuse():
    """What would mix whole and pruned keys is said."""
    keys = numbers(0, HEADS, 12, WIDTH)
    channels = torch.tensor([[0, 1, 2], [5, 6, 7]])
    layer = apply_plan(layer_of(keys, keys), KeepChannels(channels, whole_tail=4)).layer
    pair = torch.tensor([0])
    merge = MergeTokens(head=pair, src=pair, dst=pair, weight=torch.ones(1))
    extra = AppendToken((0,), keys[:1, 0, :3], keys[:1, 0], (2.0,))
    for plan in (merge, extra, KeepChannels(channels[:, :1])):
        with pytest.raises(ConfigError, match="pruned channels beside whole ones"):
            apply_plan(layer, plan)
    with pytest.raises(ShapeError, match="whole_tail is -1"):
        apply_plan(layer_of(keys, keys), KeepChannels(channels, whole_tail=-1))
    with pytest.raises(ShapeError, match="rest is"):
        replace(layer, channels=None)
    spec = tiny_spec(layers=1)
    with pytest.raises(ShapeError, match="still whole"):
        KVBlock(spec=spec, start=0, num_tokens=12, layers=(layer,))
    assert SYNTHETIC not in layer.positions


@torch.no_grad()
def test_bytes_really_go():
    """Keys of all but the recent entries shrink by the ratio; the rest stays as it is."""
    model = tiny_model(head_dim=64, hidden_size=384)
    ids = torch.randint(0, 199, (1, 200), generator=torch.Generator().manual_seed(0))
    held = {}
    for method in ("full", "think:ratio=0.5", "streaming:budget=0.5+think:ratio=0.5"):
        cache = kvlib.KVCache(model, method)
        model(ids, past_key_values=cache)
        held[method] = cache.nbytes
    row = 2 * 3 * 4  # heads, layers, bytes of a float
    full = 200 * 128 * row
    positions = 200 * row
    pruned = (168 * 32) * row
    channels = 32 * 2 * 3 * 8
    assert held["full"] == full + 200 * 4
    assert held["think:ratio=0.5"] == full - pruned + positions + channels
    both = held["streaming:budget=0.5+think:ratio=0.5"]
    budget = 8 * 3  # the resolved budget, an int64 a layer
    assert both == 100 * 128 * row - 68 * 32 * row + 100 * row + channels + budget
    layer = cache.layer_kv(0)
    assert layer.keys.shape[-1] == 32
    assert layer.rest.shape == (2, 32, 32)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("think:ratio=1.0", r"share of channels that go, in \[0, 1\)"),
        ("think:ratio=-0.1", "got -0.1"),
        ("think:window=0", "window must be 1 or more"),
        ("think:recent=-1", "recent 0 or more"),
        ("keydiff:budget=0.5+think", "'keydiff' reads whole keys in every step"),
        ("think+think", "channel"),
    ],
)
def test_wrong_methods_are_refused(method, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(method)
