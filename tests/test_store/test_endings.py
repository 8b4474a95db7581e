# SPDX-License-Identifier: Apache-2.0
"""A store that nobody closes: what it took is written, its threads end, the exit has a limit."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from kvlib import KVStore
from kvlib.store.work import WorkPool
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
TOKENS = list(range(64 * 11))

LEFT_OPEN = """
import logging, sys, time
from kvlib import KVStore
from kvlib.store import endings
from kvlib.testing.models import random_block, tiny_spec
logging.basicConfig()
folder, tier, stalls = sys.argv[1], sys.argv[2], float(sys.argv[3])
endings.EXIT_S = 0.5 if stalls else 20.0
spec = tiny_spec()
store = KVStore(folder, memory=0, tier=tier, threads=1)
if stalls:
    put = store._stack.tiers[0].put
    store._stack.tiers[0].put = lambda *a, **k: time.sleep(stalls)
tokens = list(range(64 * 40))
keys = store.block_keys(spec, tokens)
store.put_async(spec, keys, random_block(spec, 64 * 40))
"""


def run(*args):
    """Run LEFT_OPEN to its end; what it logged."""
    command = [sys.executable, "-c", LEFT_OPEN, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stderr


@pytest.mark.parametrize("tier", ["segment", "file"])
def test_what_put_async_took_is_written_at_the_interpreter_s_end(tmp_path, tier):
    assert run(tmp_path / "kv", tier, 0) == ""
    spec = tiny_spec()
    with KVStore(tmp_path / "kv", memory=0) as store:
        keys = store.block_keys(spec, list(range(64 * 40)))
        loaded = store.load(spec, keys)
        assert loaded.num_blocks == 40
        assert loaded.block.equal(random_block(spec, 64 * 40))
        assert all(report.ok for report in store.check().values())


def test_a_stalled_disk_does_not_hold_the_interpreter_for_ever(tmp_path):
    assert "given up" in run(tmp_path / "kv", "file", 3600)


def ours():
    return [t for t in threading.enumerate() if t.name.startswith("kvlib")]


@pytest.mark.parametrize("tier", ["segment", "file"])
def test_a_forgotten_store_ends_its_threads_and_loses_nothing(tmp_path, tier):
    gc.collect()
    before = len(ours())
    for i in range(3):
        store = KVStore(tmp_path, memory="8MiB", tier=tier)
        tokens = [i] * len(TOKENS)
        store.put_async(SPEC, store.block_keys(SPEC, tokens), random_block(SPEC, 64 * 11, seed=i))
        assert len(ours()) > before
        del store
        limit = time.monotonic() + 20
        while len(ours()) > before:
            gc.collect()
            assert time.monotonic() < limit, ours()
            time.sleep(0.005)
    with KVStore(tmp_path, memory=0) as store:
        for i in range(3):
            loaded = store.load(SPEC, store.block_keys(SPEC, [i] * len(TOKENS)))
            assert loaded.num_blocks == 11
            assert loaded.block.equal(random_block(SPEC, 64 * 11, seed=i))


def test_a_load_keeps_its_store(tmp_path):
    store = KVStore(tmp_path, memory=0)
    keys, block = store.block_keys(SPEC, TOKENS), random_block(SPEC, 64 * 11)
    store.put(SPEC, keys, block)
    load = store.load_async(SPEC, keys)
    del store
    gc.collect()
    assert load.result().block.equal(block)


def test_a_retired_pool_finishes_and_then_calls_back():
    """Also when it is retired by one of its own threads, in the middle of a task."""
    seen = []
    over = threading.Event()
    pool = WorkPool(3, "kvlib-test")
    for i in range(5):
        pool.submit(lambda i=i: seen.append(i), priority=20)
    pool.submit(lambda: pool.retire(over.set), priority=21)
    pool.submit(lambda: seen.append("last"), priority=22)
    assert over.wait(20)
    assert {*range(5), "last"} == set(seen)
    assert pool.close()
