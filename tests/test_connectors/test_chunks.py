# SPDX-License-Identifier: Apache-2.0
"""Chunks that only an engine can read, in kvlib's tiers."""

import numpy as np
import pytest

from kvlib.connectors.chunks import ChunkStore
from kvlib.store.files import FileStore
from kvlib.store.memory import MemoryTier
from kvlib.store.rules import Rules


def make_row(seed, nbytes=6000):
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("codec", ["none", "exact"])
def test_chunks_come_back_from_the_slower_tier_once(tmp_path, codec):
    """What was read lies in memory from then on, for the time that it has left."""

    def opened(**rules):
        tiers = [MemoryTier("1MiB"), FileStore(tmp_path)]
        return ChunkStore(
            tiers, identity="a", dtype="bfloat16", nbytes=6000, codec=codec, rules=Rules(**rules)
        ), *tiers

    store, *_ = opened(ttl=600)
    with store:
        for seed in range(3):
            assert store.put(b"%d" % seed, make_row(seed))
    store, memory, disk = opened()
    with store:
        assert store.contains([b"0", b"1", b"9"]) == [True, True, False]
        for _ in range(2):
            out = np.zeros(6000, np.uint8)
            record = store.read(b"1")
            assert store.unpack(b"1", record, out)
            assert (out == make_row(1)).all()
        assert (memory.stats().hits, disk.stats().hits) == (1, 1)
        assert 0 < memory.terms(store.key(b"1")).ttl <= 600
        assert store.read(b"9") is None


def test_a_chunk_that_is_gone_when_its_time_is_asked_for_is_not_kept(tmp_path, monkeypatch):
    memory, disk = MemoryTier("1MiB"), FileStore(tmp_path)
    settings = {"identity": "a", "dtype": "float32", "nbytes": 6000, "codec": "none"}
    with ChunkStore([memory, disk], rules=Rules(ttl=600), **settings) as store:
        assert store.put(b"1", make_row(1))
        memory.delete(store.key(b"1"))
        get_into = disk.get_into

        def get_last(key, *args, **settings):
            got = get_into(key, *args, **settings)
            disk.delete(key)
            return got

        monkeypatch.setattr(disk, "get_into", get_last)
        assert store.read(b"1") is not None
        assert store.contains([b"1"]) == [False]
