# SPDX-License-Identifier: Apache-2.0
"""Stores of tensor-parallel ranks: one record per head range, a hit is the minimum over ranks."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib import KVStore
from kvlib.blocks import KVBlock
from kvlib.codecs.base import CodecCaps
from kvlib.codecs.exact import ExactCodec
from kvlib.connectors.identity import rank_heads
from kvlib.errors import ConfigError, ShapeError
from kvlib.snapshots import Snapshot
from kvlib.spec import KVSpec, LayerKind, LayerSpec
from kvlib.store.heads import local_spec
from kvlib.testing.models import random_block

HEADS = 6
LAYER = LayerSpec(num_kv_heads=HEADS, k_head_dim=8, v_head_dim=4)
SPEC = KVSpec(model_id="test", layers=(LAYER,) * 3, dtype="float32")
TOKENS = list(range(64 * 6))
WHOLE = random_block(SPEC, 64 * 6)


def share(block: KVBlock, first: int, last: int) -> KVBlock:
    """The heads of a rank."""
    return KVBlock.dense(
        block.spec,
        [(x.keys[first:last], x.values[first:last]) for x in block.layers],
        start=block.start,
    )


def arrays(block: KVBlock) -> list[np.ndarray]:
    return [t.cpu().numpy() for x in block.layers for t in (x.keys, x.values)]


def same(block: KVBlock, expected: KVBlock) -> bool:
    pairs = zip(arrays(block), arrays(expected), strict=True)
    return block.start == expected.start and all(np.array_equal(a, b) for a, b in pairs)


def filled(store: KVStore, first: int, last: int, tokens: list[int] = TOKENS) -> list:
    keys = store.block_keys(SPEC, tokens)
    store.put(SPEC, keys, share(WHOLE, first, last).slice(0, len(tokens)))
    return keys


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("where", ["memory", "segment", "file"])
@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_each_rank_gets_its_own_heads_back(tmp_path, where, device, codec):
    """Ranks, and an engine without any, share a folder and keys, and never each other's numbers."""
    settings = {"codec": codec, "device": device}
    if where != "memory":
        settings |= {"memory": 0, "path": tmp_path, "tier": where}
    ranges = [(0, 2), (2, 4), (4, 6), (0, 3)]
    stores = [KVStore(head_range=r, **settings) for r in ranges]
    accept = [stores[0].codec_text] if codec != "exact" else None
    for store, mine in zip(stores, ranges, strict=True):
        assert store.head_range == mine
        assert store.match(SPEC, store.block_keys(SPEC, TOKENS)) == 0
        keys = filled(store, *mine)
        assert store.match(SPEC, keys) == 6
    with KVStore(**settings) as whole:
        assert whole.block_keys(SPEC, TOKENS) == keys
        assert whole.match(SPEC, keys) == 0
        assert whole.load(SPEC, keys).num_blocks == 0
        whole.put(SPEC, keys, WHOLE)
        assert whole.load(SPEC, keys).block.layers[0].num_kv_heads == HEADS
    for store, mine in zip(stores, ranges, strict=True):
        want = share(WHOLE, *mine)
        for _ in range(2):  # the second time from the device
            loaded = store.load(SPEC, keys)
            assert loaded.num_blocks == 6
            assert loaded.fidelity == ("exact" if codec == "exact" else store.codec_text)
            assert [a.shape for a in arrays(loaded.block)] == [a.shape for a in arrays(want)]
            if codec == "exact":
                assert same(loaded.block, want)
            else:
                for a, b in zip(arrays(loaded.block), arrays(want), strict=True):
                    assert np.abs(a.astype(float) - b).max() < np.abs(b).max() / 64
        part = store.load(SPEC, keys[:5], start=3)  # leaves a part of a record, at both ends
        assert part.block.layers[0].num_kv_heads == mine[1] - mine[0]
        if codec == "exact":
            assert same(part.block, want.slice(0, 64 * 5))
        pieces = list(store.load_pieces(SPEC, keys, accept=accept))
        assert sum(piece.num_blocks for piece in pieces) in (0, 6)
    for store in stores:
        store.close()


def test_loads_layer_by_layer_give_the_ranks_heads(tmp_path):
    with KVStore(tmp_path, memory=0, head_range=(2, 4)) as store:
        keys = filled(store, 2, 4)
        load = store.load_async(SPEC, keys, layers=1)
        for j in range(SPEC.num_layers):
            assert load.wait_layer(j) == 6
            assert load.tensors[j][0].shape == (2, 64 * 6, 8)
        assert same(load.result().block, share(WHOLE, 2, 4))


@given(
    ends=st.lists(st.integers(0, 6), min_size=3, max_size=3),
    cuts=st.permutations(range(6)),
)
def test_a_hit_is_the_minimum_over_ranks(ends, cuts):
    """What each rank has of a prompt is its own; together they make the whole model's block."""
    stores = [KVStore(head_range=(r, r + 2)) for r in (0, 2, 4)]
    for store, end in zip(stores, ends, strict=True):
        if end:
            filled(store, *store.head_range, TOKENS[: 64 * end])
    keys = stores[0].block_keys(SPEC, TOKENS)
    assert [store.match(SPEC, keys) for store in stores] == ends
    hit = min(ends)
    loaded = [store.load(SPEC, keys[:hit]) for store in stores]
    assert [x.num_blocks for x in loaded] == [hit] * 3
    if hit:
        parts = zip(*(arrays(x.block) for x in loaded), strict=True)
        whole = arrays(WHOLE.slice(0, 64 * hit))
        assert all(np.array_equal(np.concatenate(p), w) for p, w in zip(parts, whole, strict=True))
    for store in stores:
        store.close()


def test_a_layer_with_fewer_heads_has_its_share():
    """Ranges count in the layer that has most; others have their part, one head at least."""
    layers = (
        LAYER,
        replace(LAYER, num_kv_heads=3),
        LayerSpec(kind=LayerKind.MLA, num_kv_heads=1, k_head_dim=16, v_head_dim=0),
        replace(LAYER, num_kv_heads=2),
    )
    spec = KVSpec(model_id="mixed", layers=layers, dtype="float32")
    whole = random_block(spec, 64)
    keys = [b"k" * 32]
    for (first, last), heads in [
        ((0, 2), (2, 1, 1, 1)),
        ((0, 4), (4, 2, 1, 1)),
        ((3, 4), (1,) * 4),
    ]:
        mine = KVBlock.dense(
            spec, [(x.keys[:h], x.values[:h]) for x, h in zip(whole.layers, heads, strict=True)]
        )
        with KVStore(head_range=(first, last), device="cpu") as store:
            keys = store.block_keys(spec, range(64))
            report = store.put(spec, keys, mine)
            assert report.raw_bytes == sum(a.nbytes for a in arrays(mine))
            assert same(store.load(spec, keys).block, mine)
            assert same(store.load(spec, keys).block, mine)


@pytest.mark.parametrize("put", ["put", "put_async"])
@pytest.mark.parametrize("given_heads", [(0, 6), (0, 1), (0, 3)])
def test_a_block_of_other_heads_is_refused(put, given_heads):
    with KVStore(head_range=(2, 4)) as store:
        keys = store.block_keys(SPEC, TOKENS)
        with pytest.raises(ShapeError, match=r"KV heads; this store keeps 2 \(head_range=\(2, 4\)"):
            getattr(store, put)(SPEC, keys, share(WHOLE, *given_heads))
        assert store.match(SPEC, keys) == 0
    with KVStore() as store, pytest.raises(ShapeError, match="keeps 6"):
        getattr(store, put)(SPEC, keys, share(WHOLE, 0, 2))


@pytest.mark.parametrize("bad", [(2, 2), (3, 1), (-1, 2), (0,), (0, 1, 2), "01", 3, (0.0, 1.0)])
def test_what_is_no_range_is_refused(bad):
    with pytest.raises(ConfigError, match="expected \\(first, last\\)"):
        KVStore(head_range=bad)


@pytest.mark.parametrize("bad", [(0, 6), (4, 8), (6, 7)])
def test_a_range_that_the_model_has_not_is_refused(bad):
    """All heads are no range: such a store would not share with one that was opened without."""
    with KVStore(head_range=bad) as store:
        keys = [b"k" * 32]
        for call in (
            lambda: store.match(SPEC, keys),
            lambda: store.load(SPEC, keys),
            lambda: store.put(SPEC, keys, WHOLE.slice(0, 64)),
            lambda: store.put_async(SPEC, keys, WHOLE.slice(0, 64)),
        ):
            with pytest.raises(ConfigError, match="of a model with 6 KV heads"):
                call()


class Calibrated(ExactCodec):
    """A codec that mixes heads and knows one model."""

    def caps(self, spec: KVSpec) -> CodecCaps:
        if spec != SPEC:
            raise ConfigError("calibrated for another model")
        return CodecCaps(mixes_heads=True)


def test_codecs_that_mix_heads_are_refused():
    """At once where that does not depend on the model, else when the model is known."""
    words = "codes the KV heads of a layer together"
    with pytest.raises(ConfigError, match=words):
        KVStore(codec="cachegen:variant=lmcache", head_range=(0, 2))
    with KVStore(codec=Calibrated(), head_range=(0, 2)) as store:
        for call in (store.put, store.put_async):
            with pytest.raises(ConfigError, match=words):
                call(SPEC, store.block_keys(SPEC, TOKENS), share(WHOLE, 0, 2))
        with pytest.raises(ConfigError, match=words):
            store.load(SPEC, store.block_keys(SPEC, TOKENS))
    with KVStore(codec="kvlc", head_range=(0, 2)) as store:  # codes each head by itself
        assert store.load(SPEC, filled(store, 0, 2)).num_blocks == 6


def test_snapshots_are_refused():
    with KVStore(head_range=(0, 2)) as store:
        snapshot = Snapshot(method="none", block=WHOLE, state={})
        with pytest.raises(ConfigError, match="without head_range"):
            store.put_snapshot(torch.arange(64 * 6), snapshot)
        with pytest.raises(ConfigError, match="without head_range"):
            store.load_snapshot(SPEC, torch.arange(64 * 6), "none")


def test_a_record_of_other_heads_under_the_name_is_not_served(tmp_path, monkeypatch):
    """Should a record ever lie under another range's name, it ends the run and is dropped."""
    from kvlib.store import lookups

    with KVStore(tmp_path, head_range=(0, 2)) as store:
        theirs = filled(store, 0, 2)
        identities = store._identities(SPEC, None)
    monkeypatch.setattr(lookups, "identities_of", lambda *_: identities)
    with KVStore(tmp_path, head_range=(2, 4)) as store:
        assert store.match(SPEC, theirs) == 6
        assert store.load(SPEC, theirs).num_blocks == 0
        assert store.stats().corrupt_records >= 1


@given(heads=st.integers(1, 16), factor=st.integers(1, 8), many=st.booleans())
def test_ranks_deal_the_heads_out(heads, factor, many):
    """Every head lies on some rank, in order; each range has one writer; shapes are what lies."""
    ranks = heads * factor if many else max(x for x in range(1, factor + 1) if heads % x == 0)
    spec = replace(SPEC, layers=(replace(LAYER, num_kv_heads=heads),) * 2)
    held, writers = [], Counter()
    for rank in range(ranks):
        mine, writes = rank_heads(spec, rank, ranks)
        held.append(range(*(mine or (0, heads))))
        writers[mine] += writes
        assert local_spec(spec, mine).layers[0].num_kv_heads == len(held[-1])
        assert (mine is None) == (len(held[-1]) == heads)
    assert set(writers.values()) == {1}
    assert held == sorted(held, key=lambda x: x.start)
    assert len({len(x) for x in held}) == 1
    copies = ranks // heads if many else 1
    assert Counter(h for x in held for h in x) == dict.fromkeys(range(heads), copies)


@pytest.mark.parametrize("ranks", [4, 5, 12 + 1])
def test_heads_that_cannot_be_dealt_out_are_refused(ranks):
    with pytest.raises(ConfigError, match="cannot be dealt out"):
        rank_heads(SPEC, 0, ranks)
