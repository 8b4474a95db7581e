# SPDX-License-Identifier: Apache-2.0
"""Loads whose records stay apart, and the form in which memory keeps what they brought."""

import time

import pytest

from kvlib import KVStore
from kvlib.blocks import KVBlock
from kvlib.codecs.container import parse_header
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
TOKENS = list(range(64 * 10 + 5))
BLOCK = random_block(SPEC, 640)


def filled(path, **settings):
    with KVStore(path, **settings) as store:
        store.put(SPEC, store.block_keys(SPEC, TOKENS), BLOCK)


def held_in_memory(store):
    """Codecs of the memory tier's records."""
    tier = store._memory
    return [parse_header(tier.lend(key)).codec for key in tier.keys()]


def settle(store):
    """Wait for what goes on in the background."""
    for _ in range(3):
        store._pool.submit(lambda: None, priority=100).result(30)
    limit = time.monotonic() + 30
    while store._staging.used_bytes and time.monotonic() < limit:
        time.sleep(0.001)


@pytest.mark.parametrize("codec", ["exact", "raw", "int8", "kvlc"])
@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
def test_records_together_are_what_load_gives(tmp_path, codec, start):
    filled(tmp_path, codec=codec, memory=0)
    with KVStore(tmp_path, codec=codec, memory="8MiB") as store:
        keys = store.block_keys(SPEC, TOKENS)
        for _ in range(2):  # from disk, then from memory
            found = store.borrow(SPEC, keys, start=start)
            expected = store.load(SPEC, keys, start=start)
            assert found.block is None
            assert (found.num_blocks, found.fidelity) == (expected.num_blocks, expected.fidelity)
            assert found.stored_bytes == expected.stored_bytes
            if start == 10:
                assert (found.blocks, expected.block) == ((), None)
                continue
            assert KVBlock.join(found.blocks).equal(expected.block)


def test_a_damaged_record_ends_the_run(tmp_path):
    filled(tmp_path, memory=0, tier="file")
    with KVStore(tmp_path, memory=0) as store:
        keys = store.block_keys(SPEC, TOKENS)
        files = sorted(tmp_path.rglob("*"), key=lambda path: path.name)
        spoilt = keys[4].hex()
        (file,) = (x for x in files if x.is_file() and x.name.startswith(spoilt[:8]))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        found = store.borrow(SPEC, keys)
        assert found.num_blocks == 4
        assert KVBlock.join(found.blocks).equal(BLOCK.slice(0, 256))


def test_memory_gets_its_own_form_of_what_disk_gave(tmp_path):
    """Also of what another process stored; the next time it is lent from there."""
    filled(tmp_path, memory=0)
    with KVStore(tmp_path, memory="8MiB", memory_codec="raw") as store:
        keys = store.block_keys(SPEC, TOKENS)
        first = store.borrow(SPEC, keys)
        assert KVBlock.join(first.blocks).equal(BLOCK)
        settle(store)
        assert set(held_in_memory(store)) == {"raw@1"}
        reads = store.stats().tiers["segment"].read_bytes
        second = store.borrow(SPEC, keys)
        assert KVBlock.join(second.blocks).equal(BLOCK)
        assert second.stored_bytes > first.stored_bytes
        assert store.stats().tiers["segment"].read_bytes == reads
        assert store._staging.used_bytes == 0


def test_a_lossy_form_is_not_written_as_another(tmp_path):
    """It comes up as it is: its bytes say what was lost, and no other form may."""
    filled(tmp_path, codec="int8", memory=0)
    with KVStore(tmp_path, codec="int8", memory="8MiB", memory_codec="raw") as store:
        keys = store.block_keys(SPEC, TOKENS)
        assert store.borrow(SPEC, keys).fidelity == store.codec_text
        settle(store)
        assert set(held_in_memory(store)) == {store.codec_text}


def test_without_staging_nothing_waits(tmp_path):
    filled(tmp_path, memory=0)
    with KVStore(tmp_path, memory="8MiB", memory_codec="raw", staging=1) as store:
        keys = store.block_keys(SPEC, TOKENS)
        assert KVBlock.join(store.borrow(SPEC, keys).blocks).equal(BLOCK)
        settle(store)
        assert held_in_memory(store) == []
        assert KVBlock.join(store.borrow(SPEC, keys).blocks).equal(BLOCK)


def test_the_time_left_goes_with_it(tmp_path):
    """Another form of a record lives no longer than the record does."""
    with KVStore(tmp_path, memory=0) as store:
        keys = store.block_keys(SPEC, TOKENS)
        store.put(SPEC, keys, BLOCK, ttl=50)
    with KVStore(tmp_path, memory="8MiB", memory_codec="raw") as store:
        store.borrow(SPEC, keys)
        settle(store)
        tier = store._memory
        left = [tier.terms(key).ttl for key in tier.keys()]
        assert left
        assert all(0 < seconds <= 50 for seconds in left)
