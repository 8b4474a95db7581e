# SPDX-License-Identifier: Apache-2.0
"""Who must not wait for a disk does not, and who must, does not wait for ever."""

import os
import threading
import time
from contextlib import contextmanager

import pytest

from kvlib import KVStore
from kvlib.errors import StoreClosedError
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
TOKENS = list(range(64 * 11))


def filled(folder, **settings):
    with KVStore(folder, memory=0, **settings) as store:
        block = random_block(SPEC, 64 * 11)
        keys = store.block_keys(SPEC, TOKENS)
        assert store.put(SPEC, keys, block).stored_blocks == 11
    return keys, block


@contextmanager
def stalled(store):
    """Until `go`, every call of the disk tier that reads or looks waits, 20 seconds at most."""
    go = threading.Event()
    tier = store._stack.tiers[-1]

    def slowly(call):
        def wait(*args, **settings):
            assert go.wait(20), "somebody waits for the disk"
            return call(*args, **settings)

        return wait

    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_into", "size", "contains_many", "touch"):
            patch.setattr(tier, name, slowly(getattr(tier, name)))
        yield go
        go.set()


@pytest.mark.parametrize("tier", ["file", "segment"])
def test_a_stalled_disk_holds_up_nobody_who_asked_not_to_wait(tmp_path, tier):
    keys, block = filled(tmp_path, tier=tier)
    with KVStore(tmp_path, memory="8MiB", tier=tier) as store, stalled(store) as go:
        load = store.load_async(SPEC, keys)
        prefetch = store.prefetch(SPEC, keys)
        looking = store.match_async(SPEC, keys)
        put = store.put_async(SPEC, keys, block)
        lease = store.pin(SPEC, keys, from_memory=True)
        assert store.match(SPEC, keys, from_memory=True) == lease.num_blocks == 0
        assert (load.num_blocks, prefetch.num_blocks) == (11, 11)  # nobody knows better yet
        assert load.wait_layer(0, timeout=0.01) == 0
        assert [x.done() for x in (load, prefetch, looking, put)] == [False] * 4
        go.set()
        assert load.result().block.equal(block)
        assert looking.result(20) == 11
        prefetch.result(20)
        assert prefetch.num_blocks == 11
        assert put.result(20).present_blocks == 11
        assert store.match(SPEC, keys, from_memory=True) == 11


def test_a_load_that_has_arrived_is_handed_over_while_the_disk_stalls(tmp_path):
    """Noting that it was used waits for the disk, the caller does not."""
    keys, block = filled(tmp_path, tier="file")
    with KVStore(tmp_path, memory="8MiB", tier="file") as store:
        load = store.load_async(SPEC, keys)
        while not load.done():
            time.sleep(0.001)
        with stalled(store):
            assert load.result().block.equal(block)


def test_a_load_on_a_stalled_disk_ends_with_its_deadline(tmp_path):
    keys, _ = filled(tmp_path, tier="file")
    with KVStore(tmp_path, memory=0, tier="file") as store, stalled(store) as go:
        assert store.load(SPEC, keys, deadline=time.monotonic() + 0.02).num_blocks == 0
        cancelled = store.load_async(SPEC, keys)
        cancelled.cancel()
        assert cancelled.done()
        assert cancelled.result().num_blocks == cancelled.num_blocks == 0
        go.set()
        assert store.load(SPEC, keys).num_blocks == 11


@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_memory_knows_what_was_put_loaded_or_looked_up(tmp_path, codec):
    filled(tmp_path, codec=codec)
    with KVStore(tmp_path, memory=0, codec=codec) as store:
        more = store.block_keys(SPEC, [*TOKENS, *range(64 * 52)])
        assert store.match(SPEC, more, from_memory=True) == 0
        assert store.match_async(SPEC, more).result(20) == 11
        assert store.match(SPEC, more, from_memory=True) == 11
        with store.pin(SPEC, more, from_memory=True) as lease:
            assert lease.num_blocks == 11
        assert store.match(SPEC, more[:6], from_memory=True) == 6
        store.put(SPEC, more, random_block(SPEC, 64 * 63))
        with stalled(store):
            assert store.match(SPEC, more, from_memory=True) == 63
    with KVStore(tmp_path, memory=0, codec=codec) as store:
        assert store.load(SPEC, more[:12]).num_blocks == 12
        assert store.match(SPEC, more[:12], from_memory=True) == 12


@pytest.mark.parametrize("tier", ["file", "segment"])
def test_what_is_gone_is_forgotten_when_it_is_missed(tmp_path, tier):
    """The memory may be of what another process has dropped; a load or a look puts that right."""
    keys, _ = filled(tmp_path, tier=tier)
    for ask in ("load", "match_async"):
        with KVStore(tmp_path, memory=0, tier=tier) as store:
            store.put(SPEC, keys, random_block(SPEC, 64 * 11))
            assert store.match(SPEC, keys) == 11
            for key in list(store._stack.tiers[0].keys()):
                store._stack.tiers[0].delete(key)
            assert store.match(SPEC, keys, from_memory=True) == 11
            if ask == "load":
                assert store.load(SPEC, keys).num_blocks == 0
            else:
                assert store.match_async(SPEC, keys).result(20) == 0
            assert store.match(SPEC, keys, from_memory=True) == 0


def in_child(call):
    """A fork's exit status: 0 if `call` raised StoreClosedError; a child that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            call()
        except StoreClosedError:
            status = 0
        finally:
            os._exit(status)
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "it hung"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_waits_for_nothing_that_its_parent_began(tmp_path):
    keys, block = filled(tmp_path)
    with KVStore(tmp_path, memory="8MiB", threads=1) as store:
        go = threading.Event()
        store._pool.submit(lambda: go.wait(60))
        load, prefetch = store.load_async(SPEC, keys), store.prefetch(SPEC, keys)
        put, looking = store.put_async(SPEC, keys, block), store.match_async(SPEC, keys)
        calls = [load.result, load.done, load.cancel, prefetch.result, put.result, looking.result]
        assert [in_child(call) for call in [*calls, lambda: load.wait_layer(0)]] == [0] * 7
        go.set()
        assert load.result().num_blocks == 11
        assert in_child(load.result) == 0


def test_prefetch_counts_what_memory_took(tmp_path):
    keys, _ = filled(tmp_path)
    with KVStore(tmp_path, memory="40KiB") as store:
        memory = store._memory
        sizes = [store._stack.tiers[-1].size(key) for key in store._stack.tiers[-1].keys()]
        assert max(sizes) > 40 << 10 > min(sizes)
        brought = store.prefetch(SPEC, keys).result(20)
        assert memory.stats().rejected == 2
        assert brought == 3


def test_a_prefetch_may_be_cancelled_before_it_knows_what_to_read(tmp_path):
    keys, _ = filled(tmp_path)
    with KVStore(tmp_path, memory="8MiB", threads=1) as store:
        go = threading.Event()
        store._pool.submit(lambda: go.wait(20))
        prefetch = store.prefetch(SPEC, keys)
        assert prefetch.result(timeout=0.01) == 0
        prefetch.cancel()
        go.set()
        assert prefetch.result(20) == 0
        assert prefetch.done()
        assert store._memory.stats().records == 0
