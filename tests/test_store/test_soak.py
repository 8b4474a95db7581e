# SPDX-License-Identifier: Apache-2.0
"""A `KVStore` used in all ways at once for a long time (KVLIB_SOAK_S, in `make release-check`)."""

import gc
import logging
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvlib import KVStore
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
PROMPTS = 40
BLOCKS = [random_block(SPEC, 64 * 11, seed=i) for i in range(PROMPTS)]
LOG = logging.getLogger(__name__)


def held():
    """KiB of memory, open files and threads of this process."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    resident = int(text.split("VmRSS:")[1].split()[0])
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count()


def use(store, seed, until):
    """Everything that a store can do, by chance; the turns made."""
    choose = random.Random(seed)
    turns = hits = 0
    while time.monotonic() < until:
        turns += 1
        i, num_blocks = choose.randrange(PROMPTS), choose.randint(1, 11)
        keys = store.block_keys(SPEC, [i] * (64 * num_blocks))
        block = BLOCKS[i].slice(0, 64 * num_blocks)
        action = choose.randrange(8)
        if action == 0:
            store.put(SPEC, keys, block)
        elif action == 1:
            put = store.put_async(SPEC, keys, block)
            if choose.random() < 0.5:
                put.result(60)
        elif action == 2:
            prefetch = store.prefetch(SPEC, keys)
            prefetch.cancel() if choose.random() < 0.5 else prefetch.result(60)
        elif action == 3:
            with store.pin(SPEC, keys, from_memory=choose.random() < 0.5):
                store.match(SPEC, keys)
        elif action == 4:
            store.match_async(SPEC, keys).result(60)
        elif action == 5:
            for piece in store.load_pieces(SPEC, keys):
                assert piece.block.equal(block.slice(piece.block.start, piece.block.stop))
        else:
            deadline = time.monotonic() + choose.choice((0.0005, 60.0))
            load = store.load_async(SPEC, keys, deadline=deadline)
            if choose.random() < 0.1:
                load.cancel()
            loaded = load.result()
            hits += loaded.num_blocks
            if loaded.block is not None:
                assert loaded.block.equal(block.slice(0, 64 * loaded.num_blocks))
    return turns, hits


@pytest.mark.slow
def test_a_store_in_use_by_many_threads_leaks_nothing(tmp_path):
    """Its tiers are far too small, so all the time something is read, written, evicted, refused."""
    seconds = float(os.environ.get("KVLIB_SOAK_S", "600"))
    rounds = 20
    seen = []
    total = [0, 0]
    for i in range(rounds):
        with (
            KVStore(
                tmp_path, memory="1MiB", disk="3MiB", staging="1MiB", device="cpu",
                device_bytes="512KiB", threads=3,
            ) as store,
            ThreadPoolExecutor(4) as pool,
        ):  # fmt: skip
            until = time.monotonic() + seconds / rounds
            for turns, hits in pool.map(lambda k, i=i: use(store, 4 * i + k, until), range(4)):  # noqa: B023 (they end here)
                total[0] += turns
                total[1] += hits
            assert all(report.ok for report in store.check().values())
            stats = store.stats()
            assert stats.corrupt_records == 0
            assert all(tier.corrupt == tier.errors == 0 for tier in stats.tiers.values())
            assert store._staging.used_bytes == 0 or store._pool._stores
        gc.collect()
        seen.append(held())
    LOG.info("%d turns, %d blocks loaded in %.0f s; KiB, files, threads: %s", *total, seconds, seen)
    early, late = seen[: rounds // 2][-1], seen[-1]
    assert late[0] - early[0] < max(1024 * seconds / 60, 4096)
    assert late[1:] == early[1:]
