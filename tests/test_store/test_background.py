# SPDX-License-Identifier: Apache-2.0
"""Loads, puts and prefetches that go on while the caller does something else."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvlib import KVStore
from kvlib.errors import CapacityError, ConfigError, ShapeError
from kvlib.store import loads
from kvlib.store.replacement.admission import SecondTouch
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
TOKENS = list(range(64 * 11))


def filled(store, tokens=TOKENS):
    block = random_block(SPEC, len(tokens) // 64 * 64)
    store.put(SPEC, store.block_keys(SPEC, tokens), block)
    return block


def begin(store, tokens=TOKENS, **settings):
    return store.load_async(SPEC, store.block_keys(SPEC, tokens), **settings)


@pytest.mark.parametrize("layers", [None, 1, 2, 100])
@pytest.mark.parametrize("codec", ["exact", "int8", "kvlc"])
def test_it_gives_what_load_gives(tmp_path, codec, layers):
    with KVStore(tmp_path, memory=0, codec=codec) as store:
        filled(store)
        expected = store.load(SPEC, store.block_keys(SPEC, TOKENS))
        load = begin(store, layers=layers)
        got = load.result()
        assert load.done()
        assert got.num_blocks == expected.num_blocks == 11
        assert (got.fidelity, got.stored_bytes) == (expected.fidelity, expected.stored_bytes)
        assert got.block.equal(expected.block)
        assert store.stats().loads == 2


def test_early_layers_can_be_used_while_later_ones_arrive(tmp_path, monkeypatch):
    """The last layer is held back; those before it are there, and complete."""
    go = threading.Event()
    decode = loads.decode_block

    def slow(container, spec, *, layers, **settings):
        if layers[-1] == spec.num_layers - 1:
            assert go.wait(20)
        return decode(container, spec, layers=layers, **settings)

    monkeypatch.setattr(loads, "decode_block", slow)
    with KVStore(tmp_path, memory=0, threads=8) as store:
        block = filled(store)
        load = begin(store, layers=1)
        last = SPEC.num_layers - 1
        assert load.wait_layer(last - 1, timeout=20) == 11
        for layer in block.layers[:last]:
            keys, values = load.tensors[layer.layer_idx]
            assert torch.equal(keys, layer.keys)
            assert torch.equal(values, layer.values)
        assert load.wait_layer(last, timeout=0) == 0
        assert not load.done()
        go.set()
        assert load.wait_layer(last) == 11
        assert load.result().block.equal(block)
        with pytest.raises(ShapeError):
            load.wait_layer(SPEC.num_layers)


def test_a_damaged_record_ends_the_run_for_every_layer(tmp_path):
    with KVStore(tmp_path, memory=0, tier="file") as store:
        block = filled(store)
        keys = store.block_keys(SPEC, TOKENS)
        names = {key.block: key for key in store._stack.tiers[0].keys()}
        path = store._stack.tiers[0]._path(names[keys[4]])
        data = bytearray(path.read_bytes())
        data[-200] ^= 1
        path.write_bytes(data)
        load = begin(store)
        assert load.num_blocks == 11
        assert load.wait_layer(SPEC.num_layers - 1) == 4
        got = load.result()
        assert got.num_blocks == load.num_blocks == 4
        assert got.block.equal(block.slice(0, 256))


def test_what_is_cancelled_or_late_gives_what_arrived(tmp_path):
    with KVStore(tmp_path, memory=0, threads=1) as store:
        filled(store)
        go = threading.Event()
        store._pool.submit(lambda: go.wait(20))
        cancelled, late = begin(store), begin(store, deadline=time.monotonic() + 0.01)
        cancelled.cancel()
        time.sleep(0.02)
        go.set()
        assert cancelled.result().num_blocks == 0
        assert late.result().num_blocks == 0
        assert begin(store).result().num_blocks == 11
        assert begin(store, list(range(10**6, 10**6 + 128))).result().num_blocks == 0


def test_a_timeout_ends_a_load_with_what_is_there(tmp_path):
    with KVStore(tmp_path, memory=0, threads=1) as store:
        filled(store)
        go = threading.Event()
        store._pool.submit(lambda: go.wait(20))
        load = begin(store)
        assert load.result(timeout=0.01).num_blocks == 0
        go.set()
        assert load.result().num_blocks == 0  # it stays what it was


def test_a_load_is_freed_with_its_last_user(tmp_path):
    """Its tasks and their callbacks do not keep it, nor its tensors."""
    gc.collect()
    gc.disable()
    try:
        with KVStore(tmp_path, memory=0) as store:
            filled(store)
            done, dropped = begin(store), begin(store)
            seen = [weakref.ref(load) for load in (done, dropped)]
            assert done.result().num_blocks == 11
            del done, dropped
            limit = time.monotonic() + 20
            while any(ref() is not None for ref in seen):  # the threads may be at it still
                assert time.monotonic() < limit, "something keeps a load"
                time.sleep(0.005)
    finally:
        gc.enable()


def test_nobody_waits_beyond_a_deadline(tmp_path):
    with KVStore(tmp_path, memory=0, threads=1) as store:
        filled(store)
        go = threading.Event()
        store._pool.submit(lambda: go.wait(20))
        load = begin(store, deadline=time.monotonic() + 0.05)
        assert load.wait_layer(0) == 0
        assert load.result().num_blocks == 0
        assert not go.is_set()
        go.set()


def test_a_read_given_up_by_one_is_done_for_another(tmp_path):
    """A caller without a deadline does not get the miss of one that had too little time."""
    with KVStore(tmp_path, memory=0, tier="file") as store:
        filled(store)
        (tier,) = store._stack.tiers
        key = next(iter(tier.keys()))
        begun, get_into, size = threading.Event(), tier.get_into, tier.size(key)

        def slow(key, buf, sections=None, deadline=None):
            begun.set()
            time.sleep(0.05)
            return get_into(key, buf, sections, deadline)

        tier.get_into = slow
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(store._stack.read, key, time.monotonic() + 0.01)
            assert begun.wait(20)
            second = pool.submit(store._stack.read, key)
            assert first.result()[0] is None
            assert len(second.result()[0]) == size


def test_want_of_memory_loses_no_record(tmp_path, monkeypatch):
    with KVStore(tmp_path, memory=0) as store:
        filled(store)
        decode = loads.decode_block

        def fail(*args, **options):
            raise CapacityError("no memory")

        monkeypatch.setattr(loads, "decode_block", fail)
        assert begin(store).result().num_blocks == 0
        monkeypatch.setattr(loads, "decode_block", decode)
        assert begin(store).result().num_blocks == 11
        assert store.stats().corrupt_records == 0


def test_older_loads_are_finished_first(tmp_path):
    with KVStore(tmp_path, memory=0, threads=1) as store:
        filled(store)
        go = threading.Event()
        store._pool.submit(lambda: go.wait(20))
        load = begin(store, layers=1)
        newer = [begin(store, layers=1) for _ in range(3)]
        go.set()
        assert load.result().num_blocks == 11
        assert not newer[-1].done()
        assert newer[-1].result().num_blocks == 11


def test_after_closing_nothing_hangs(tmp_path):
    """What has arrived is there; what has not is a miss."""
    with KVStore(tmp_path, memory=0) as store:
        filled(store)
    store = KVStore(tmp_path, memory="8MiB", threads=1)
    keys = store.block_keys(SPEC, TOKENS)
    there = begin(store)
    there.wait_layer(SPEC.num_layers - 1)
    go = threading.Event()
    store._pool.submit(lambda: go.wait(20))
    prefetch, load = store.prefetch(SPEC, keys), begin(store)
    threading.Timer(0.05, go.set).start()
    store.close()
    assert prefetch.result(20) == 0
    assert load.result().num_blocks == 0
    assert there.result().num_blocks == 11


def test_pieces_come_one_record_at_a_time(tmp_path):
    with KVStore(tmp_path, memory=0, tier="file") as store:
        block = filled(store)
        keys = store.block_keys(SPEC, TOKENS)
        pieces = [loaded.block for loaded in store.load_pieces(SPEC, keys)]
        assert [(p.start, p.stop) for p in pieces] == [
            (0, 256),
            (256, 512),
            (512, 576),
            (576, 640),
            (640, 704),
        ]
        for piece in pieces:
            assert piece.equal(block.slice(piece.start, piece.stop))
        names = {key.block: key for key in store._stack.tiers[0].keys()}
        store._stack.delete(names[keys[8]])
        store._directory.forget(names[keys[8]])
        assert [p.block.stop for p in store.load_pieces(SPEC, keys)] == [256, 512]
        order = [keys.index(key.block) for key in store._stack.tiers[0].keys()]
        assert order.index(4) < order.index(0)  # the start is used last, so it goes last
        assert list(store.load_pieces(SPEC, [])) == []
        # A record that another prompt shares in part.
        other = TOKENS[: 64 * 6] + [7] * 128
        found = [p.block for p in store.load_pieces(SPEC, store.block_keys(SPEC, other))]
        assert [(p.start, p.stop) for p in found] == [(0, 256), (256, 384)]


def test_prefetch_brings_records_into_memory(tmp_path):
    with KVStore(tmp_path, memory=0) as store:
        filled(store)
    with KVStore(tmp_path, memory="8MiB") as store:
        keys = store.block_keys(SPEC, TOKENS)
        prefetch = store.prefetch(SPEC, keys)
        assert prefetch.num_blocks == 11
        assert prefetch.result() == 5  # two chunks of four, three single blocks
        assert prefetch.done()
        memory, disk = store._stack.tiers
        before = disk.stats().hits
        assert store.load(SPEC, keys).num_blocks == 11
        assert disk.stats().hits == before
        assert memory.stats().hits == 5
        assert store.prefetch(SPEC, keys).result() == 0
        store.prefetch(SPEC, keys).cancel()


def test_put_async_copies_and_is_bounded(tmp_path):
    block = random_block(SPEC, 64 * 11)
    with KVStore(tmp_path, memory=0, threads=1, staging=block.nbytes + 4096) as store:
        keys = store.block_keys(SPEC, TOKENS)
        go = threading.Event()
        store._pool.submit(lambda: go.wait(20))
        expected = random_block(SPEC, 64 * 11)
        for layer, source in zip(expected.layers, block.layers, strict=True):
            layer.keys.copy_(source.keys)
            layer.values.copy_(source.values)
        put = store.put_async(SPEC, keys, block)
        for layer in block.layers:
            layer.keys.zero_()
        other = store.put_async(SPEC, store.block_keys(SPEC, TOKENS[::-1]), block)
        assert other.done()
        assert other.result().dropped_blocks == 11
        assert not put.done()
        go.set()
        assert put.result(20).stored_blocks == 11
        assert store.stats().staging_drops == 11
        assert store._staging.used_bytes == 0
        assert store.load(SPEC, keys).block.equal(expected)
        with pytest.raises(ShapeError):
            store.put_async(SPEC, keys[:3], block)


def test_closing_finishes_puts(tmp_path):
    with KVStore(tmp_path, memory=0) as store:
        keys = store.block_keys(SPEC, TOKENS)
        store.put_async(SPEC, keys, random_block(SPEC, 64 * 11))
    with KVStore(tmp_path, memory=0) as store:
        assert store.match(SPEC, keys) == 11


def test_second_touch_spares_the_disk(tmp_path):
    with KVStore(tmp_path, memory="8MiB", admission="second-touch", threads=1) as store:
        keys = store.block_keys(SPEC, TOKENS)
        memory, disk = store._stack.tiers
        block = filled(store)
        assert (memory.stats().records, disk.stats().records) == (5, 0)
        assert store.load(SPEC, keys).block.equal(block)  # wanted again
        store._pool.submit(lambda: None, priority=20.5).result(20)
        assert disk.stats().records == 5
    with KVStore(tmp_path, memory=0) as store:
        assert store.load(SPEC, keys).block.equal(block)


def test_second_touch_forgets_the_oldest():
    touch = SecondTouch(most=2)
    a, b, c = "abc"
    assert not touch.wanted(a)
    assert touch.wanted(a)
    assert [touch.wanted(x) for x in (a, b, c, a)] == [False] * 4
    assert touch.wanted(c)


@pytest.mark.parametrize("where", ["memory", "disk", "both"])
def test_leased_prompts_stay(tmp_path, where):
    """Others come and go; the lease ends by itself, or when it is given back."""
    block = random_block(SPEC, 64 * 11)
    room = int(block.nbytes * 1.6) + 40 * 4096
    options = {"memory": 0 if where == "disk" else room}
    if where != "memory":
        options.update(path=tmp_path, disk=room)
    with KVStore(**options) as store:
        keys = store.block_keys(SPEC, TOKENS)
        store.put(SPEC, keys, block)
        lease = store.pin(SPEC, keys)
        assert lease.num_blocks == 11
        for i in range(4):
            filled(store, [i + 1] * len(TOKENS))
        assert store.load(SPEC, keys).block.equal(block)
        with store.pin(SPEC, keys, seconds=0.0):
            lease.release()
            lease.release()
            time.sleep(0.001)
            for i in range(4, 8):
                filled(store, [i + 1] * len(TOKENS))
        assert len(store._leases) == 0
        # In memory what was used again outlives what passes by (ARC), without any lease.
        assert where != "disk" or store.match(SPEC, keys) < 11


@pytest.mark.parametrize("codec", ["int8", "kvlc"])
def test_memory_may_hold_another_form(tmp_path, codec):
    """What was put is exact as long as memory has it, and lossy from disk."""
    with KVStore(tmp_path, memory="8MiB", codec=codec, memory_codec="exact") as store:
        keys = store.block_keys(SPEC, TOKENS)
        block = filled(store)
        assert [tier.stats().records for tier in store._stack.tiers] == [5, 5]
        got = store.load(SPEC, keys)
        assert (got.num_blocks, got.fidelity) == (11, "exact")
        assert got.block.equal(block)
        memory = store._stack.tiers[0]
        for key in list(memory.keys()):
            memory.delete(key)
        got = store.load(SPEC, keys)
        assert (got.num_blocks, got.fidelity) == (11, store.codec_text)
        assert not got.block.equal(block)
        assert store.load(SPEC, keys).fidelity == store.codec_text  # promoted, not re-encoded
        assert store.put(SPEC, keys, block).present_blocks == 11


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"admission": "third"}, "always or second-touch"),
        ({"tier": "tape"}, "'segment' or 'file'"),
        ({"memory": 0, "memory_codec": "int8"}, "memory_codec needs"),
        ({"staging": "many"}, "staging"),
        ({"codec": "int4", "memory_codec": "int8"}, "loses something"),
        ({"memory_codec": "int8", "codec": "exact"}, "loses something"),
        ({"codec": "int8", "memory_codec": "exact", "admission": "second-touch"}, "one codec"),
    ],
)
def test_bad_settings_say_what_to_do(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=says):
        KVStore(tmp_path, **settings)
