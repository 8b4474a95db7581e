# SPDX-License-Identifier: Apache-2.0
"""Leaves on disk and in memory, against a plain dictionary."""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib.errors import CapacityError, ConfigError, CorruptDataError, StoreError
from kvlib.store import blockio, leaf_io, leaf_pool
from kvlib.store import leaves as leaf_files
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


@pytest.fixture(params=["direct", "buffered", "plain", "seeking"])
def file(request, tmp_path, monkeypatch):
    """Past the page cache; through it; without the system's queues; without reads at an offset."""
    if request.param == "seeking":
        monkeypatch.setattr(blockio, "supports", lambda: False)
    direct, overlap = request.param == "direct", request.param in ("direct", "buffered")
    with_file = LeafFile(SHAPE, 3, tmp_path, direct=direct, overlap=overlap)
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
            file.read(layer, chosen, room, range(len(room)))
            assert [slot.tobytes() for slot in room] == [leaves[i] for i in chosen]


def test_runs_are_read_in_one_go(file):
    slots, _, _ = make(SHAPE, 2 * RUN_LEAVES)
    file.append(0, slots)
    size = SHAPE.slot_bytes
    found = file.runs(0, [*range(2, 9), *range(20, RUN_LEAVES + 3)])
    assert [(offset // size, count) for offset, count in found] == [
        (2, 7),
        (20, RUN_LEAVES - 20),
        (RUN_LEAVES, 3),
    ]


@pytest.mark.parametrize("bit", [0, 1000 * 8 + 3])
def test_a_flipped_bit_is_found(file, bit):
    slots, _, _ = make(SHAPE, 4)
    file.append(0, slots)
    damaged = slots[2].copy()
    damaged[bit >> 3] ^= 1 << (bit & 7)
    room = aligned(SHAPE.slot_bytes)
    room[:] = damaged
    os.pwritev(file.fd, [room], file._offset(0, 2))
    whole = aligned(slots.nbytes).reshape(slots.shape)
    with pytest.raises(CorruptDataError, match="leaf 2 of layer 0"):
        file.read(0, [0, 1, 2, 3], whole, range(4))
    file.read(0, [0, 1, 3], whole, range(3))


def test_short_reads_and_writes_go_on(file, monkeypatch):
    monkeypatch.setattr(
        blockio, "pwrite", lambda fd, views, at: os.pwritev(fd, [views[0][:4096]], at)
    )
    slots, _, _ = make(SHAPE, 5)
    file.append(1, slots)
    monkeypatch.setattr(
        blockio, "pread", lambda fd, views, at: os.preadv(fd, [views[0][:4096]], at)
    )
    cut_short(monkeypatch, 4096)
    room = aligned(slots.nbytes).reshape(slots.shape)
    file.read(1, range(5), room, [4, 2, 0, 1, 3])
    assert np.array_equal(room[[4, 2, 0, 1, 3]], slots)


def cut_short(monkeypatch, most):
    """The system's queues report no more than `most` bytes of a read, and the rest is not there."""
    wait = leaf_io._Lane.wait

    def less(lane, least):
        events = wait(lane, least)
        for event in events:
            request = lane._requests[event["data"]]
            pieces = (ctypes.c_uint64 * (2 * int(request["count"]))).from_address(
                int(request["pieces"])
            )
            skip = max(most, 0)
            for address, size in zip(pieces[::2], pieces[1::2], strict=True):
                ctypes.memset(address + min(skip, size), 0xEE, size - min(skip, size))
                skip = max(skip - size, 0)
        events["got"] = np.minimum(events["got"], most)
        return events

    monkeypatch.setattr(leaf_io._Lane, "wait", less)


def test_more_reads_than_the_system_is_given_at_once(file):
    slots, _, _ = make(SHAPE, 2 * leaf_io._MOST + 40)
    file.append(2, slots)
    chosen = range(1, len(slots), 2)
    room = aligned(slots.nbytes).reshape(slots.shape)
    file.read(2, chosen, room, chosen)
    assert np.array_equal(room[1::2], slots[1::2])
    assert not room[::2].any()


def test_direct_io_that_is_refused_late(tmp_path, monkeypatch):
    """Some file systems take O_DIRECT at opening, and not at reading or writing."""
    file = LeafFile(SHAPE, 1, tmp_path)
    if not file.direct:
        pytest.skip("this file system takes no O_DIRECT")
    slots, _, _ = make(SHAPE, 70)
    room = aligned(slots.nbytes).reshape(slots.shape)

    def refuse(call):
        def refusing(fd, views, offset):
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(fd, views, offset)

        return refusing

    monkeypatch.setattr(blockio, "pwrite", refuse(blockio.pwrite))
    file.append(0, slots[:40])
    assert not file.direct
    file.append(0, slots[40:])
    file.read(0, range(70), room, range(70))
    assert np.array_equal(room, slots)
    file.close()


def test_a_sandbox_without_queues(tmp_path, monkeypatch):
    """Whether the system refuses at once or at the first batch, leaves are read."""

    def refuse(code):
        def refusing(*_):
            raise OSError(code, os.strerror(code))

        return refusing

    slots, _, _ = make(SHAPE, 5)
    for name, code in (("__init__", errno.ENOSYS), ("submit", errno.EPERM)):
        with monkeypatch.context() as patch:
            patch.setattr(leaf_io._Lane, name, refuse(code))
            file = LeafFile(SHAPE, 1, tmp_path)
            file.append(0, slots)
            room = aligned(slots.nbytes).reshape(slots.shape)
            for _ in range(2):
                room[:] = 0
                file.read(0, [0, 2, 4], room, range(3))
                assert np.array_equal(room[:3], slots[[0, 2, 4]])
            assert not file.lanes.overlapping
            file.close()


def test_a_signal_does_not_stop_a_reading(tmp_path):
    file = LeafFile(SHAPE, 1, tmp_path)
    overlapping = file.lanes.overlapping
    file.close()
    if not overlapping:
        pytest.skip("this system has no queues")
    lane = leaf_io._Lane(leaf_io._CALLS[platform.machine()])
    answers = iter([OSError(errno.EINTR, "interrupted"), 0])

    def call(*_):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    real, lane._call = lane._call, call
    assert len(lane.wait(1)) == 0
    lane._call = real
    lane.close()


def test_a_failing_disk_says_so(file, monkeypatch):
    slots, _, _ = make(SHAPE, 2)
    file.append(0, slots)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leaf_files, "_seek_and_move", fail)
    monkeypatch.setattr(blockio, "pwrite", fail)
    with pytest.raises(CapacityError, match="No space"):
        file.append(0, slots)
    assert file.count(0) == 2
    monkeypatch.setattr(blockio, "pread", fail)
    cut_short(monkeypatch, -errno.EIO)
    with pytest.raises(StoreError):
        file.read(0, [0], aligned(SHAPE.slot_bytes)[None], [0])
    with pytest.raises(ConfigError):
        LeafFile(SHAPE, 1, "/nowhere/at/all")


def held(pool, layer):
    """Leaves of a layer that memory holds, or that are on their way."""
    return np.flatnonzero(pool._slot_of[layer] >= 0).tolist()


def check(pool):
    """Each slot is free or has one leaf, and the tables say the same of them."""
    taken = np.flatnonzero(pool._layer_of >= 0)
    assert sorted([*taken.tolist(), *pool._free]) == list(range(pool.num_slots))
    assert pool._slot_of[pool._layer_of[taken], pool._leaf_of[taken]].tolist() == taken.tolist()
    assert (pool._slot_of >= 0).sum() == len(taken)
    coming = [slot for reading in pool._coming for slot in reading.places.tolist()]
    ranked = np.flatnonzero(pool._rank < leaf_pool._NEVER)
    assert sorted([*coming, *ranked.tolist()]) == taken.tolist()
    assert len(set(pool._rank[ranked].tolist())) == len(ranked)


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
        check(pool)
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
    assert held(pool, 0) == [0, 3, 5, 6]
    pool.pin(0, [0])
    pool.get(0, [1, 2, 7])
    assert held(pool, 0) == [0, 1, 2, 7]
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
    pool.ask(0, [6])
    while not all(reading.arrived() for reading in pool._coming):
        pass
    pool.prefetch(0, [7])
    with pytest.raises(CorruptDataError):
        pool.rest()
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
    pool.regrow(9)
    assert pool.num_slots == 6
    assert bytes_of(pool, 0, range(1, 7)) == [slots[i].tobytes() for i in range(1, 7)]
    pool.close()


@given(st.lists(st.tuples(st.sampled_from("gaprRn"), st.integers(0, 2**16)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_slots_come_and_go(steps):
    """Getting, prefetching, retiring, regrowing and pinning in any order: the right bytes."""
    file = LeafFile(SHAPE, 1)
    pool = LeafPool(file, 12)
    slots, _, _ = make(SHAPE, 20)
    pool.add(0, slots)
    for what, seed in steps:
        rng = random.Random(seed)
        if what == "r":
            pool.retire(rng.randrange(pool.num_slots))
        elif what == "R":
            pool.regrow(rng.randrange(5))
        elif what == "n":
            pool.pin(0, rng.sample(range(20), 3))
        else:
            count = rng.randrange(1, max(2, pool.num_slots // 2 + 1))
            leaves = sorted(rng.sample(range(20), count))
            if what == "p":
                pool.prefetch(0, leaves)
            elif what == "a":  # other leaves come while these are in use
                here = pool.ask(0, leaves)
                others = pool.others(0, leaves)
                assert not {*others.tolist()} & {*here.tolist()}
                pool.prefetch(0, sorted(rng.sample(range(20), count)))
                late = pool.rest()
                got = sorted(pool.slots[i].numpy().tobytes() for i in [*here, *late])
                assert got == sorted(slots[i].tobytes() for i in leaves)
            else:
                assert bytes_of(pool, 0, leaves) == [slots[i].tobytes() for i in leaves]
        check(pool)
    pool.close()


def test_large_pages(file, monkeypatch):
    """Memory goes back in whole pages of the system, and only that counts as given back."""
    monkeypatch.setattr(mmap, "PAGESIZE", 1 << 16)
    pool = LeafPool(file, 40)
    slots, _, _ = make(SHAPE, 40)
    pool.add(0, slots)
    pool.retire(13)
    assert pool.nbytes % (1 << 16) == 0
    assert 0 <= pool.nbytes - 27 * SHAPE.slot_bytes < 1 << 16
    assert bytes_of(pool, 0, range(12, 39)) == [slots[i].tobytes() for i in range(12, 39)]
    pool.close()


def test_pinned_leaves_give_way_too(file):
    pool = LeafPool(file, 8)
    slots, _, _ = make(SHAPE, 12)
    pool.add(0, slots)
    pool.pin(0, range(4))
    pool.retire(6)
    assert (pool.num_slots, pool.nbytes) == (2, 2 * SHAPE.slot_bytes)
    assert len(pool._pins) == pool._pinned.sum() == 1
    assert bytes_of(pool, 0, [4]) == [slots[4].tobytes()]
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
    check(pool)
    pool.close()


def test_prefetches_that_took_all_room_make_way(file):
    """Also where a leaf that is asked for came with others that are not."""
    pool = LeafPool(file, 4)
    slots, _, _ = make(SHAPE, 12)
    pool.add(0, slots)
    pool.prefetch(0, [4, 5, 6, 7])
    check(pool)
    assert bytes_of(pool, 0, [7, 8, 9, 10]) == [slots[i].tobytes() for i in (7, 8, 9, 10)]
    check(pool)
    assert pool.stats().fetched == 7
    pool.close()


def test_what_makes_room_first(file):
    """Stale leaves in the order of their turning stale, then the last ones of the last layer."""
    pool = LeafPool(file, 6)
    for layer in range(2):
        slots, _, _ = make(SHAPE, 12, layer)
        pool.add(layer, slots)
    pool.get(0, [0, 1, 2])
    pool.get(1, [3, 4, 5])
    pool.get(0, [2, 7])  # nothing is stale yet; 0 and 1 are from now on
    assert (held(pool, 0), held(pool, 1)) == ([0, 1, 2, 7], [3, 4])
    pool.get(1, [3, 4, 6])
    assert (held(pool, 0), held(pool, 1)) == ([1, 2, 7], [3, 4, 6])
    pool.get(1, [3, 4, 5, 6])
    assert (held(pool, 0), held(pool, 1)) == ([2, 7], [3, 4, 5, 6])
    pool.prefetch(0, [8])  # what was asked for last stays
    assert (held(pool, 0), held(pool, 1)) == ([2, 8], [3, 4, 5, 6])
    pool.get(0, [2, 8])
    pool.prefetch(0, [9])
    assert (held(pool, 0), held(pool, 1)) == ([2, 8, 9], [3, 4, 5])
    pool.close()


def test_no_room():
    with pytest.raises(ConfigError, match="more memory"):
        LeafPool(LeafFile(SHAPE, 1), 0)
