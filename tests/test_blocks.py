# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV, Row
from kvlib.errors import ShapeError
from kvlib.spec import KVSpec, LayerKind, LayerSpec
from kvlib.testing.models import random_block, tiny_spec
from kvlib.testing.strategies import kv_blocks

H, T, D = 2, 5, 4


def dense(**changes):
    generator = torch.Generator().manual_seed(0)
    layer = LayerKV(
        layer_idx=0,
        keys=torch.randn((H, T, D), generator=generator),
        values=torch.randn((H, T, 3), generator=generator),
        positions=range(10, 10 + T),
    )
    return replace(layer, **changes)


def packed(**changes):
    generator = torch.Generator().manual_seed(1)
    layer = LayerKV(
        layer_idx=0,
        keys=torch.randn((4, D), generator=generator),
        values=torch.randn((4, 3), generator=generator),
        positions=torch.tensor([10, 12, SYNTHETIC, 11], dtype=torch.int32),
        row_lengths=(3, 1),
        log_weight=torch.tensor([0.0, 0.5, 1.0, -1.0]),
    )
    return replace(layer, **changes)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def python_bytes(layer):
    """What a layer holds, counted number by number."""
    per_entry = 0
    sizes = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
    size = sizes.get(layer.keys.dtype, 1)
    total = 0
    for n in layer.lengths:
        per_entry = (layer.keys.shape[-1] + layer.values.shape[-1]) * size
        per_entry += 0 if isinstance(layer.positions, range) else 4
        per_entry += 0 if layer.log_weight is None else 4
        total += n * per_entry
    if layer.channels is not None:
        total += 8 * layer.num_kv_heads * layer.keys.shape[-1]
    return total


@given(kv_blocks())
def test_nbytes_counts_everything(block):
    """`nbytes` is keys, values, positions, weights and channel lists, and nothing else."""
    assert block.nbytes == sum(map(python_bytes, block.layers))
    for layer in block.layers:
        assert layer.nbytes == python_bytes(layer)


def test_nbytes_of_views_and_ranges():
    """A range of positions costs nothing, and a view counts what it shows."""
    assert dense().nbytes == H * T * (D + 3) * 4
    assert dense(positions=i32(*range(T)).expand(H, T)).nbytes == H * T * (D + 3 + 1) * 4
    assert random_block(tiny_spec(), 10).slice(2, 5).nbytes == 3 * 2 * 2 * 16 * 4
    assert packed().nbytes == 4 * (D + 3 + 1 + 1) * 4


@given(kv_blocks(synthetic=False), st.data())
def test_split_and_join_undo_each_other(block, data):
    """Blocks cut anywhere, any number of times, join to the same bits."""
    cuts = sorted(data.draw(st.lists(st.integers(block.start, block.stop), max_size=4)))
    parts = block.split(*cuts)
    assert [(p.start, p.stop) for p in parts] == list(
        zip([block.start, *cuts], [*cuts, block.stop], strict=True)
    )
    assert sum(part.num_tokens for part in parts) == block.num_tokens
    joined = KVBlock.join(parts)
    assert joined.equal(block)
    for whole, layer in zip(block.layers, joined.layers, strict=True):
        layer.validate()
        # A range stays a range, unless weights (which only ragged rows have elsewhere) came in.
        if isinstance(whole.positions, range) and whole.log_weight is None:
            assert isinstance(layer.positions, range)


@given(kv_blocks(synthetic=False), st.data())
def test_slices_hold_exactly_their_positions(block, data):
    """A slice keeps, of every row, the entries whose position lies in it, bit for bit."""
    a, b = sorted(data.draw(st.tuples(*[st.integers(block.start, block.stop)] * 2)))
    part = block.slice(a, b)
    assert (part.start, part.stop) == (a, b)
    for whole, layer in zip(block.layers, part.layers, strict=True):
        for row, cut in zip(whole.rows(), layer.rows(), strict=True):
            index = [j for j, p in enumerate(row.positions.tolist()) if a <= p < b]
            assert cut.positions.tolist() == [int(row.positions[j]) for j in index]
            for x, y in zip(row, cut, strict=True):
                if x is not None:
                    assert raw(x[index]) == raw(y)
        assert (layer.channels is None) == (whole.channels is None)


def raw(x):
    """The bytes of a tensor."""
    return x.contiguous().flatten().view(torch.uint8).tolist() if x.numel() else []


def test_dense_slices_are_views():
    """Slicing and building dense blocks copies nothing; joining copies."""
    block = random_block(tiny_spec(), 10)
    keys = block.layers[0].keys
    for part in (block.slice(3, 7), *block.split(4), block.slice(3, 9).slice(4, 6)):
        mine = part.layers[0]
        assert mine.keys.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
        assert mine.positions == range(part.start, part.stop)
    assert block.slice(0, 10) is block
    assert KVBlock.join([block]) is block
    rebuilt = KVBlock.dense(block.spec, [(x.keys, x.values) for x in block.layers])
    assert rebuilt.layers[1].values is block.layers[1].values
    joined = KVBlock.join(block.split(4))
    assert joined.layers[0].keys.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()


def test_rows_are_views():
    """`row` and `rows` show the tensors' own memory, dense and packed."""
    for layer in (dense(), packed()):
        for head in range(H):
            row = layer.row(head)
            row.keys.fill_(head + 1.0)
            assert len(row.positions) == layer.lengths[head]
        flat = layer.keys.reshape(-1, D)
        expected = [1.0] * layer.lengths[0] + [2.0] * layer.lengths[1]
        assert flat[:, 0].tolist() == expected
    assert dense().row(0).log_weight is None
    assert packed().row(0).log_weight.tolist() == [0.0, 0.5, 1.0]
    assert packed().row(1).positions.tolist() == [11]


def test_slices_of_layers_clamp():
    """A layer's slice takes what there is of the asked range."""
    layer = dense()
    for a, b, expected in (
        (0, 100, range(10, 15)),
        (12, 13, range(12, 13)),
        (0, 12, range(10, 12)),
    ):
        assert layer.slice(a, b).positions == expected
    for a, b in ((0, 5), (20, 30), (13, 12), (10, 10), (15, 15)):
        assert layer.slice(a, b).lengths == (0, 0)


def test_slices_reach_the_last_position_there_is():
    """2^31 - 1 is the last one; the end of what holds it is no int32."""
    last = 2**31 - 1
    layer = LayerKV(
        layer_idx=0,
        keys=torch.tensor([[[1.0], [2.0]]]),
        values=torch.tensor([[[3.0], [4.0]]]),
        positions=torch.tensor([[last - 5, last]], dtype=torch.int32),
    )
    assert layer.slice(last - 1, last + 1).keys.tolist() == [[[2.0]]]
    assert layer.slice(last - 5, last + 1).keys.tolist() == [[[1.0], [2.0]]]
    assert layer.slice(last + 1, last + 1).keys.shape == (1, 0, 1)


def test_slices_of_synthetic_entries_are_refused():
    """An entry that belongs to no position cannot be cut away from the rest."""
    with pytest.raises(ShapeError, match="synthetic"):
        packed().slice(10, 12)
    block = KVBlock(spec=spec(), start=8, num_tokens=8, layers=(packed(),))
    assert block.slice(8, 16) is block
    with pytest.raises(ShapeError, match="synthetic"):
        block.slice(8, 12)


def spec(**changes):
    layer = LayerSpec(num_kv_heads=H, k_head_dim=D, v_head_dim=3, **changes)
    return KVSpec(model_id="m", layers=(layer, layer), dtype="float32")


def test_from_rows():
    """Equal rows become dense, others packed; weights of some rows are zeros in the others."""
    rows = packed().rows()
    layer = LayerKV.from_rows(0, rows)
    assert layer.equal(packed())
    assert layer.row_lengths == (3, 1)
    mixed = [rows[0], rows[1]._replace(log_weight=None)]
    assert LayerKV.from_rows(0, mixed).log_weight.tolist() == [0.0, 0.5, 1.0, 0.0]
    even = LayerKV.from_rows(0, [rows[1], rows[1]])
    assert even.is_dense
    assert even.positions.tolist() == [[11], [11]]
    assert LayerKV.from_rows(0, [r._replace(log_weight=None) for r in rows]).log_weight is None


def test_select():
    """Chosen entries are copied in the given order, one index list a head."""
    layer = packed()
    chosen = layer.select([torch.tensor([2, 0]), torch.tensor([0])])
    assert chosen.row(0).positions.tolist() == [SYNTHETIC, 10]
    assert torch.equal(chosen.row(0).keys, layer.keys[[2, 0]])
    assert chosen.row(0).log_weight.tolist() == [1.0, 0.0]
    chosen.keys.zero_()
    assert layer.keys.count_nonzero() > 0
    with pytest.raises(ShapeError, match="1 index rows"):
        layer.select([torch.tensor([0])])


def test_equal_is_bitwise():
    """NaN payloads and the sign of zero count; a range and its positions written out do not."""
    nan = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(torch.float32)
    layer = dense()
    layer.keys[0, 0, :2] = nan
    same = replace(layer, keys=layer.keys.clone(), values=layer.values.clone())
    assert layer.equal(same)
    same.keys[0, 0, 0] = nan[1]
    assert not layer.equal(same)
    zeros = dense(values=torch.zeros((H, T, 3)))
    assert not zeros.equal(dense(values=-torch.zeros((H, T, 3))))
    assert layer.equal(replace(layer, positions=layer.positions_tensor().contiguous()))
    strided = torch.empty((T, H, D)).transpose(0, 1)
    strided.copy_(layer.keys)
    assert layer.equal(replace(layer, keys=strided))
    one = torch.ones((1, 3, 1))
    column = torch.ones((1, 3)).t()[None]  # contiguous with a stride other than 1 at the end
    args = {"layer_idx": 0, "positions": range(3)}
    assert LayerKV(keys=one, values=one, **args).equal(LayerKV(keys=column, values=column, **args))


def test_unequal_layers():
    """Any other difference is seen: index, lengths, widths, dtype, positions, weights, channels."""
    layer = dense()
    channels = torch.arange(D).expand(H, D)
    weights = torch.zeros((H, T))
    others = [
        dense(layer_idx=1),
        dense(positions=range(11, 16)),
        dense(positions=i32(10, 11, 12, 13, 15).expand(H, T)),
        dense(keys=layer.keys.double(), values=layer.values.double()),
        dense(keys=layer.keys[..., :3]),
        dense(values=layer.values[..., :2]),
        layer.slice(10, 14),
        dense(channels=channels),
        dense(log_weight=weights),
        dense(keys=layer.keys + 1),
        packed(),
    ]
    for other in others:
        assert not layer.equal(other)
        assert not other.equal(layer)
    shifted = channels.clone()
    shifted[0, 3] = 5
    assert not dense(channels=channels).equal(dense(channels=shifted))
    assert not dense(log_weight=weights).equal(dense(log_weight=weights - 1))
    assert dense(log_weight=weights).equal(dense(log_weight=weights.clone()))
    uniform = LayerKV(
        layer_idx=0,
        keys=layer.keys.reshape(-1, D),
        values=layer.values.reshape(-1, 3),
        positions=layer.positions_tensor().reshape(-1),
        row_lengths=(T, T),
    )
    assert uniform.equal(layer)


WRONG_LAYERS = [
    lambda: dense(keys=torch.zeros(T, D)),
    lambda: dense(values=torch.zeros(T, 3)),
    lambda: dense(values=torch.zeros(H, T + 1, 3)),
    lambda: dense(values=torch.zeros(H + 1, T, 3)),
    lambda: dense(values=torch.zeros((H, T, 3), dtype=torch.float16)),
    lambda: dense(values=torch.zeros((H, T, 3), device="meta")),
    lambda: dense(positions=range(10, 14)),
    lambda: dense(positions=range(10, 20, 2)),
    lambda: dense(positions=range(-1, 4)),
    lambda: dense(positions=torch.arange(T).expand(H, T)),
    lambda: dense(positions=i32(*range(T))),
    lambda: dense(log_weight=torch.zeros(H, T, dtype=torch.float64)),
    lambda: dense(log_weight=torch.zeros(H, T + 1)),
    lambda: dense(channels=torch.zeros((H, D), dtype=torch.int32)),
    lambda: dense(channels=torch.zeros((H, D - 1), dtype=torch.int64)),
    lambda: dense(channels=torch.zeros(D, dtype=torch.int64)),
    lambda: dense(row_lengths=(T, T)),
    lambda: packed(row_lengths=None),
    lambda: packed(row_lengths=(3, 2)),
    lambda: packed(row_lengths=(5, -1)),
    lambda: packed(positions=range(4)),
    lambda: packed(positions=i32(1, 2, 3)),
    lambda: packed(log_weight=torch.zeros(3)),
    lambda: packed(channels=torch.zeros((1, D), dtype=torch.int64)),
]


@pytest.mark.parametrize("make", WRONG_LAYERS, ids=map(str, range(len(WRONG_LAYERS))))
def test_wrong_layers(make):
    """Shapes, dtypes and devices that do not agree are refused when the layer is made."""
    with pytest.raises(ShapeError, match="layer 0"):
        make()


def test_validate():
    """Contents are right when positions and channels ascend, synthetic entries end rows, no NaN."""
    good = [
        dense(),
        packed(),
        dense(positions=torch.stack([i32(1, 2, 3, 4, 5), i32(0, 7, 8, -1, -1)])),
        dense(channels=torch.tensor([[0, 1, 2, 3], [0, 2, 4, 9]])),
        dense(keys=torch.full((H, T, D), math.nan)),
        packed(positions=i32(-1, -1, -1, -1)),
    ]
    for layer in good:
        layer.validate()
    bad = [
        (dense(positions=torch.stack([i32(1, 2, 3, 4, 5), i32(0, 1, 1, 2, 3)])), "head 1"),
        (dense(positions=torch.stack([i32(1, 3, 2, 4, 5), i32(0, 1, 2, 3, 4)])), "head 0"),
        (dense(positions=torch.stack([i32(1, -1, 3, 4, 5), i32(0, 1, 2, 3, 4)])), "head 0"),
        (dense(positions=torch.stack([i32(-2, 1, 3, 4, 5), i32(0, 1, 2, 3, 4)])), "head 0"),
        (packed(positions=i32(-1, 10, 11, 12)), "head 0"),
        (packed(positions=i32(10, 11, 11, 12)), "head 0"),
        (packed(log_weight=torch.tensor([0.0, math.nan, 0.0, 0.0])), "log_weight"),
        (packed(log_weight=torch.tensor([0.0, -math.inf, 0.0, 0.0])), "log_weight"),
        (dense(channels=torch.tensor([[0, 1, 2, 3], [0, 2, 2, 9]])), "channels"),
        (dense(channels=torch.tensor([[0, 1, 3, 2], [0, 2, 4, 9]])), "channels"),
        (dense(channels=torch.tensor([[-1, 1, 2, 3], [0, 2, 4, 9]])), "channels"),
    ]
    for layer, what in bad:
        with pytest.raises(ShapeError, match=what):
            layer.validate()


def block(**changes):
    base = {"spec": spec(), "start": 10, "num_tokens": T, "layers": (dense(),)}
    return KVBlock(**{**base, **changes})


WRONG_BLOCKS = [
    lambda: block(start=-1),
    lambda: block(num_tokens=-1),
    lambda: block(start=2**31 - 4, layers=()),
    lambda: block(start=11),
    lambda: block(num_tokens=T + 1),
    lambda: block(layers=(dense(layer_idx=2),)),
    lambda: block(layers=(dense(layer_idx=-1),)),
    lambda: block(layers=(dense(), dense())),
    lambda: block(layers=(dense(layer_idx=1), dense())),
    lambda: block(layers=(dense(keys=torch.zeros(H, T, D + 1)),)),
    lambda: block(layers=(dense(values=torch.zeros(H, T, 4)),)),
    lambda: block(
        layers=(replace(dense(), keys=dense().keys.half(), values=dense().values.half()),)
    ),
    lambda: block(layers=(dense(keys=torch.zeros(3, T, D), values=torch.zeros(3, T, 3)),)),
    lambda: block(spec=state_spec()),
]


def state_spec():
    state = LayerSpec(kind=LayerKind.RECURRENT, num_kv_heads=0, k_head_dim=0, v_head_dim=0)
    return KVSpec(model_id="m", layers=(state,), dtype="float32")


@pytest.mark.parametrize("make", WRONG_BLOCKS, ids=map(str, range(len(WRONG_BLOCKS))))
def test_wrong_blocks(make):
    """A block's layers must ascend, fit the spec, and hold the block's positions."""
    with pytest.raises(ShapeError):
        make()


def test_right_blocks():
    """A rank's share of the heads, some of the layers, pruned keys and no layer are all blocks."""
    share = replace(dense(), keys=dense().keys[:1], values=dense().values[:1])
    pruned = dense(keys=dense().keys[..., :2], channels=torch.tensor([[0, 1], [0, 3]]))
    for layers in ((), (share,), (replace(dense(), layer_idx=1),), (pruned,)):
        assert block(layers=layers).stop == 10 + T
    assert block(start=2**31 - T, layers=()).stop == 2**31
    assert isinstance(block(layers=[dense()]).layers, tuple)
    with pytest.raises(FrozenInstanceError):
        block().start = 0


def test_dense_needs_every_layer():
    """`dense` is for whole models: one pair a layer."""
    pair = (dense().keys, dense().values)
    assert KVBlock.dense(spec(), [pair, pair], start=3).layers[1].positions == range(3, 3 + T)
    for pairs in ([], [pair], [pair] * 3):
        with pytest.raises(ShapeError, match="the spec has 2"):
            KVBlock.dense(spec(), pairs)


def test_wrong_slices_splits_and_joins():
    """Ranges outside the block, falling cuts, and parts that do not fit together are refused."""
    whole = random_block(tiny_spec(), 10, start=5)
    for a, b in ((4, 10), (5, 16), (9, 8), (-1, 5)):
        with pytest.raises(ShapeError, match="not inside"):
            whole.slice(a, b)
    with pytest.raises(ShapeError):
        whole.split(9, 7)
    left, right = whole.split(8)
    other = random_block(tiny_spec(model_id="other"), 7, start=8)
    narrow = replace(right, layers=right.layers[:1])
    listed = replace(
        right,
        layers=tuple(
            replace(x, channels=torch.arange(8).expand(2, 8).clone()) for x in right.layers
        ),
    )
    shares = replace(
        right,
        layers=tuple(replace(x, keys=x.keys[:1], values=x.values[:1]) for x in right.layers),
    )
    for parts in ([], [right, left], [left, left], [left, other], [left, narrow], [left, listed],
                  [left, shares], [whole, right]):  # fmt: skip
        with pytest.raises(ShapeError, match="cannot join"):
            KVBlock.join(parts)


def test_joining_weights_and_synthetic_entries():
    """Missing weights become zeros, and only the last part may end in synthetic entries."""
    first = KVBlock(spec=spec(), start=5, num_tokens=5, layers=(dense(positions=range(5, 10)),))
    last = KVBlock(spec=spec(), start=10, num_tokens=5, layers=(packed(),))
    joined = KVBlock.join([first, last])
    layer = joined.layers[0]
    assert layer.lengths == (8, 6)
    assert layer.row(0).positions.tolist() == [5, 6, 7, 8, 9, 10, 12, SYNTHETIC]
    assert layer.row(0).log_weight.tolist() == [0.0] * 5 + [0.0, 0.5, 1.0]
    layer.validate()
    after = KVBlock(spec=spec(), start=15, num_tokens=5, layers=(dense(positions=range(15, 20)),))
    with pytest.raises(ShapeError, match="only the last block"):
        KVBlock.join([first, last, after])


def test_positions_tensor():
    """A range is written out as int32 for every head without a copy per head."""
    x = dense().positions_tensor()
    assert x.dtype == torch.int32
    assert x.tolist() == [[10, 11, 12, 13, 14]] * H
    assert x.stride(0) == 0
    assert packed().positions_tensor() is not None
    top = replace(dense(), positions=range(2**31 - T, 2**31))
    assert int(top.positions_tensor().max()) == 2**31 - 1


def test_strategies_reach_the_corners():
    """The shipped strategies do draw what they promise."""
    seen = set()

    @settings(max_examples=200, derandomize=True)
    @given(kv_blocks())
    def collect(block):
        seen.add(("dtype", block.spec.dtype))
        for layer in block.layers:
            want = block.spec.layers[layer.layer_idx]
            seen.add("packed" if layer.row_lengths is not None else "dense")
            seen.add("range" if isinstance(layer.positions, range) else "positions")
            seen.add(want.kind)
            if 0 in layer.lengths:
                seen.add("empty row")
            if layer.channels is not None:
                seen.add("channels")
            if layer.log_weight is not None:
                seen.add("weights")
            if want.k_head_dim % 2:
                seen.add("odd")
            if (layer.positions_tensor() == SYNTHETIC).any():
                seen.add("synthetic")
            if layer.keys.float().isnan().any():
                seen.add("nan")
            if ((layer.keys == 0) & torch.signbit(layer.keys.float())).any():
                seen.add("-0.0")

    collect()
    assert seen >= {
        "packed", "dense", "range", "positions", "empty row", "channels", "weights", "odd",
        "synthetic", "nan", "-0.0", LayerKind.FULL, LayerKind.SLIDING, LayerKind.MLA,
    }  # fmt: skip
    assert len([x for x in seen if x[0] == "dtype"]) == 5


def test_rows_of_numpy_memory():
    """Layers over foreign memory hold it and do not copy it."""
    memory = np.zeros((H, T, D), np.float32)
    layer = dense(keys=torch.from_numpy(memory))
    memory[1, 2, 3] = 7.0
    assert float(layer.row(1).keys[2, 3]) == 7.0
    assert isinstance(layer.row(0), Row)
