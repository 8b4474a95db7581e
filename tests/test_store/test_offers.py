# SPDX-License-Identifier: Apache-2.0
"""What is encoded, what is written where, when a tier is offered it again, and what is reported."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvlib import KVStore
from kvlib.store import writes
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
TOKENS = list(range(64 * 11))


def filled(store, tokens=TOKENS):
    block = random_block(SPEC, len(tokens) // 64 * 64)
    return block, store.put(SPEC, store.block_keys(SPEC, tokens), block)


def idle(store):
    """Wait for what has been queued."""
    store._pool.submit(lambda: None, priority=99).result(20)


def records(store):
    return [tier.stats().records for tier in store._stack.tiers]


def refusing(monkeypatch, tier, *, times=10**9):
    """A full disk, for so many puts."""
    inner, left = tier.put, [times]

    def put(*args, **settings):
        left[0] -= 1
        return inner(*args, **settings) if left[0] < 0 else False

    monkeypatch.setattr(tier, "put", put)
    return left


def test_what_the_disk_refused_is_offered_again_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(writes, "_REFUSED_S", 0.0)
    with KVStore(tmp_path, memory="8MiB", threads=1) as store:
        keys = store.block_keys(SPEC, TOKENS)
        refusing(monkeypatch, store._stack.tiers[1], times=5)
        block, report = filled(store)
        assert report.stored_blocks == 11
        assert records(store) == [5, 0]
        assert store.load(SPEC, keys[:4]).num_blocks == 4
        idle(store)
        assert records(store) == [5, 1]  # what nobody used is not written
        assert store.load_async(SPEC, keys).result().num_blocks == 11
        idle(store)
        assert records(store) == [5, 5]
    with KVStore(tmp_path, memory=0) as store:
        assert store.load(SPEC, keys).block.equal(block)


def test_a_disk_that_refuses_is_left_alone_for_a_while(tmp_path, monkeypatch):
    with KVStore(tmp_path, memory="8MiB", threads=1) as store:
        keys = store.block_keys(SPEC, TOKENS)
        left = refusing(monkeypatch, store._stack.tiers[1])
        filled(store)
        before = left[0]
        for _ in range(5):
            assert store.load(SPEC, keys).num_blocks == 11
            idle(store)
        assert left[0] == before - 1
        monkeypatch.setattr(writes, "_REFUSED_S", 0.0)
        store.load(SPEC, keys)
        idle(store)
        assert left[0] == before - 2


def test_what_the_disk_let_go_of_comes_back_by_its_use(tmp_path):
    with KVStore(tmp_path, memory="8MiB", threads=1) as store:
        keys = store.block_keys(SPEC, TOKENS)
        filled(store)
        disk = store._stack.tiers[1]
        for key in list(disk.keys()):
            disk.delete(key)
        store.load(SPEC, keys)
        idle(store)
        assert records(store) == [5, 5]


def test_the_memory_s_own_form_is_not_for_the_disk(tmp_path):
    with KVStore(tmp_path, memory="8MiB", codec="int8", memory_codec="exact", threads=1) as store:
        keys = store.block_keys(SPEC, TOKENS)
        filled(store)
        disk = store._stack.tiers[1]
        for key in list(disk.keys()):
            disk.delete(key)
        assert store.load(SPEC, keys).fidelity == "exact"
        idle(store)
        assert records(store) == [5, 0]


def counted(monkeypatch):
    calls = []
    encode = writes.encode_block

    def count(block, *args, **settings):
        calls.append(block.num_tokens // 64)
        return encode(block, *args, **settings)

    monkeypatch.setattr(writes, "encode_block", count)
    return calls


def test_what_no_tier_would_take_is_not_encoded(tmp_path, monkeypatch):
    """Without memory, second-touch admission has nowhere to put what comes first."""
    calls = counted(monkeypatch)
    with KVStore(tmp_path, memory=0, admission="second-touch") as store:
        _, report = filled(store)
        assert (report.stored_blocks, report.dropped_blocks, report.stored_bytes) == (0, 11, 0)
        assert calls == []
        _, report = filled(store)
        assert report.stored_blocks == 11
        assert sum(calls) == 11


@pytest.mark.parametrize("where", ["memory", "disk", "both"])
@pytest.mark.parametrize(("first", "second"), [(1, 4), (4, 1), (1, 9), (9, 1), (4, 4), (6, 11)])
def test_concurrent_puts_of_different_lengths_report_what_was_stored(
    tmp_path, monkeypatch, first, second, where
):
    """The one that comes while the other encodes stores the rest, and no more than that."""
    begun, go = threading.Event(), threading.Event()
    encode = writes.encode_block
    block = random_block(SPEC, 64 * 11)

    def slow(part, *args, **settings):
        if part.start == 0 and not begun.is_set():
            begun.set()
            assert go.wait(20)
        return encode(part, *args, **settings)

    monkeypatch.setattr(writes, "encode_block", slow)
    settings = {"memory": 0 if where == "disk" else "8MiB"}
    with KVStore(None if where == "memory" else tmp_path, **settings) as store:
        keys = store.block_keys(SPEC, TOKENS)

        def put(blocks):
            return store.put(SPEC, keys[:blocks], block.slice(0, blocks * 64))

        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(put, first)
            assert begun.wait(20)
            other = pool.submit(put, second)
            threading.Timer(0.05, go.set).start()
            reports = [one.result(20), other.result(20)]
        most = max(first, second)
        assert sum(r.stored_blocks for r in reports) == most
        for report, asked in zip(reports, (first, second), strict=True):
            assert report.stored_blocks + report.present_blocks == asked
            assert report.dropped_blocks == 0
            assert report.raw_bytes == report.stored_blocks * 64 * SPEC.bytes_per_token()
        held = [t.stats().used_bytes for t in store._stack.tiers if not t.persistent]
        assert held in ([], [sum(r.stored_bytes for r in reports)])
        assert store.stats().stored_blocks == most
        assert store.load(SPEC, keys).block.equal(block.slice(0, most * 64))
