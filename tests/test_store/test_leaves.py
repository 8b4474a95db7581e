# SPDX-License-Identifier: Apache-2.0
"""Leaves on disk and in memory, against a plain dictionary."""

import os
import random

import numpy as np
import pytest
import torch

from kvlib.errors import CapacityError, ConfigError, CorruptDataError, StoreError
from kvlib.store import blockio
from kvlib.store.leaf_pool import LeafPool
from kvlib.store.leaves import LEAF_TOKENS, RUN_LEAVES, LeafFile, LeafShape, aligned
from kvlib.testing.models import tiny_spec

SHAPE = LeafShape(3, 8, 6, torch.float32)


def make(shape, count, seed=0):
    """Leaves as slots, and their keys and values [heads, n * LEAF_TOKENS, D]."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn((shape.heads, count * LEAF_TOKENS, dim), generator=generator).to(shape.dtype)
        for dim in (shape.k_dim, shape.v_dim)
    )
    slots = aligned(count * shape.slot_bytes).reshape(count, shape.slot_bytes)
    shape.pack(keys, values, slots)
    return slots, keys, values


@pytest.fixture(params=["direct", "buffered"])
def file(request, tmp_path):
    with_file = LeafFile(SHAPE, 3, tmp_path, direct=request.param == "direct")
    yield with_file
    with_file.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing(dtype):
    shape = LeafShape(2, 12, 20, dtype)
    slots, keys, values = make(shape, 5)
    assert slots.shape == (5, shape.slot_bytes)
    assert shape.slot_bytes % 4096 == 0
    k, v = shape.unpack(torch.from_numpy(slots))
    for leaf in range(5):
        tokens = slice(leaf * LEAF_TOKENS, (leaf + 1) * LEAF_TOKENS)
        assert torch.equal(k[leaf], keys[:, tokens])
        assert torch.equal(v[leaf], values[:, tokens])


def test_the_shape_of_a_model():
    spec = tiny_spec()
    shape = LeafShape.of(spec)
    assert shape.heads == spec.layers[0].num_kv_heads
    assert shape.nbytes == LEAF_TOKENS * spec.bytes_per_token() // spec.num_layers


def test_what_is_appended_is_read(file):
    """Layers grow at their own pace, over several runs of the file."""
    rng = random.Random(1)
    expected = {layer: [] for layer in range(3)}
    for step in range(12):
        layer, count = rng.randrange(3), rng.randrange(1, RUN_LEAVES)
        slots, _, _ = make(SHAPE, count, step)
        file.append(layer, slots)
        expected[layer] += [slot.tobytes() for slot in slots]
    for layer, leaves in expected.items():
        assert file.count(layer) == len(leaves)
        for size in (1, 5, len(leaves)):
            chosen = sorted(rng.sample(range(len(leaves)), min(size, len(leaves))))
            room = aligned(len(chosen) * SHAPE.slot_bytes).reshape(-1, SHAPE.slot_bytes)
            file.read(layer, chosen, list(room))
            assert [slot.tobytes() for slot in room] == [leaves[i] for i in chosen]


def test_runs_are_read_in_one_go(file, monkeypatch):
    slots, _, _ = make(SHAPE, 2 * RUN_LEAVES)
    file.append(0, slots)
    calls = []
    pread = blockio.pread
    monkeypatch.setattr(
        blockio, "pread", lambda fd, views, at: calls.append(len(views)) or pread(fd, views, at)
    )
    room = list(aligned(slots.nbytes).reshape(slots.shape))
    file.read(0, [*range(2, 9), *range(20, RUN_LEAVES + 3)], room[: RUN_LEAVES - 10])
    assert calls == [7, RUN_LEAVES - 20, 3]


@pytest.mark.parametrize("bit", [0, 1000 * 8 + 3])
def test_a_flipped_bit_is_found(file, bit):
    slots, _, _ = make(SHAPE, 4)
    file.append(0, slots)
    damaged = slots[2].copy()
    damaged[bit >> 3] ^= 1 << (bit & 7)
    room = aligned(SHAPE.slot_bytes)
    room[:] = damaged
    os.pwritev(file._fd, [room], file._offset(0, 2))
    whole = list(aligned(slots.nbytes).reshape(slots.shape))
    with pytest.raises(CorruptDataError, match="leaf 2 of layer 0"):
        file.read(0, [0, 1, 2, 3], whole)
    file.read(0, [0, 1, 3], whole[:3])


def test_short_reads_and_writes_go_on(file, monkeypatch):
    monkeypatch.setattr(
        blockio, "pwrite", lambda fd, views, at: os.pwritev(fd, [views[0][:4096]], at)
    )
    slots, _, _ = make(SHAPE, 5)
    file.append(1, slots)
    monkeypatch.setattr(
        blockio, "pread", lambda fd, views, at: os.preadv(fd, [views[0][:4096]], at)
    )
    room = aligned(slots.nbytes).reshape(slots.shape)
    file.read(1, range(5), list(room))
    assert np.array_equal(room, slots)


def test_a_failing_disk_says_so(file, monkeypatch):
    slots, _, _ = make(SHAPE, 2)
    file.append(0, slots)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blockio, "pwrite", fail)
    with pytest.raises(CapacityError, match="No space"):
        file.append(0, slots)
    assert file.count(0) == 2
    monkeypatch.setattr(blockio, "pread", fail)
    with pytest.raises(StoreError):
        file.read(0, [0], [aligned(SHAPE.slot_bytes)])
    with pytest.raises(ConfigError):
        LeafFile(SHAPE, 1, "/nowhere/at/all")


def bytes_of(pool, layer, leaves):
    return [pool.slots[slot].numpy().tobytes() for slot in pool.get(layer, leaves).tolist()]


@pytest.mark.parametrize("num_slots", [1, 4, 9, 40])
def test_the_pool_gives_what_the_file_has(file, num_slots):
    """Any order of gets and prefetches; never more leaves than slots."""
    rng = random.Random(num_slots)
    pool = LeafPool(file, num_slots)
    expected = {}
    for layer in range(3):
        slots, _, _ = make(SHAPE, 30, layer)
        pool.add(layer, slots)
        expected.update({(layer, i): slot.tobytes() for i, slot in enumerate(slots)})
    for _ in range(200):
        layer = rng.randrange(3)
        leaves = sorted(rng.sample(range(30), rng.randrange(1, min(num_slots, 12) + 1)))
        if rng.random() < 0.5:
            pool.prefetch(layer, leaves)
        else:
            assert bytes_of(pool, layer, leaves) == [expected[layer, i] for i in leaves]
        held = list(pool._held.values()) + [slot for slot, _ in pool._coming.values()]
        assert sorted(held + pool._free) == list(range(num_slots))
    stats = pool.stats()
    assert stats.fetched * SHAPE.slot_bytes == stats.fetched_bytes
    assert stats.hits + stats.ahead > 0
    with pytest.raises(CapacityError):
        pool.get(0, list(range(num_slots + 1)))
    pool.close()


def test_those_used_longest_ago_make_room(file):
    pool = LeafPool(file, 4)
    slots, _, _ = make(SHAPE, 8)
    pool.add(0, slots)  # leaves 0 to 3 stay
    pool.get(0, [0, 3])
    before = pool.stats().fetched
    pool.get(0, [0, 3])
    assert pool.stats().fetched == before == 0
    pool.get(0, [5, 6])
    assert sorted(leaf for _, leaf in pool._held) == [0, 3, 5, 6]
    pool.pin(0, [0])
    pool.get(0, [1, 2, 7])
    assert sorted(leaf for _, leaf in pool._held) == [0, 1, 2, 7]
    assert pool.stats().evicted == 5
    pool.close()


def test_damage_in_a_prefetch_comes_with_the_get(file):
    pool = LeafPool(file, 4)
    slots, _, _ = make(SHAPE, 8)
    pool.add(0, slots)
    file._digests[0][6] ^= 1
    pool.prefetch(0, [6])
    with pytest.raises(CorruptDataError):
        pool.get(0, [6])
    assert len(bytes_of(pool, 0, [0, 1, 2, 5])) == 4  # no slot is lost
    pool.close()


def test_retired_slots_are_gone(file):
    pool = LeafPool(file, 6)
    slots, _, _ = make(SHAPE, 8)
    pool.add(0, slots)
    pool.prefetch(0, [6, 7])
    pool.retire(4)
    assert (pool.num_slots, pool.nbytes) == (2, 2 * SHAPE.slot_bytes)
    for leaves in ([0, 5], [6, 7], [1]):
        assert bytes_of(pool, 0, leaves) == [slots[i].tobytes() for i in leaves]
    with pytest.raises(CapacityError):
        pool.get(0, [0, 1, 2])
    with pytest.raises(CapacityError):
        pool.retire(2)
    pool.close()


def test_prefetches_that_failed_trouble_only_those_who_ask(file):
    """No slot is lost with them, and no other leaf."""
    pool = LeafPool(file, 8)
    for layer in range(3):
        slots, _, _ = make(SHAPE, 12, layer)
        pool.add(layer, slots)
    file._digests[1][9] ^= 1
    pool.prefetch(1, range(4, 12))
    for _ in range(3):
        assert len(bytes_of(pool, 2, range(8))) == 8
    with pytest.raises(CorruptDataError):
        pool.get(1, [9])
    assert sorted([*pool._held.values(), *pool._free]) == list(range(8))
    pool.close()


def test_no_room():
    with pytest.raises(ConfigError, match="more memory"):
        LeafPool(LeafFile(SHAPE, 1), 0)
