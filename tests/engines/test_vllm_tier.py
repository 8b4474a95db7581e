# SPDX-License-Identifier: Apache-2.0
"""`KvlibTier` under vLLM's own `TieringOffloadingManager`, with copying workers on the CPU."""

import shutil
import threading
import time
import uuid
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm_cpu_offload import CpuTieringSpec

from kvlib.connectors import vllm_tier
from kvlib.connectors.vllm_tier import COUNTERS, GAUGES, KvlibTier
from kvlib.errors import ConfigError, EngineVersionError
from kvlib.store.segments import SegmentStore

LAYERS, BLOCK, HEADS, DIM = 3, 16, 2, 32
DTYPE = torch.bfloat16
PAGE = HEADS * BLOCK * 2 * DIM * DTYPE.itemsize
BLOCKS = 64
WAIT = 20.0


def parallel(world=1, **given):
    sizes = {"tp_size": world, "pp_size": 1, "pcp_size": 1, "dcp_size": 1} | given
    return OffloadingParallelConfig(
        rank=0,
        world_size=world,
        data_parallel_index=0,
        data_parallel_size=1,
        data_parallel_rank_local=None,
        is_parallelism_agnostic=False,
        **sizes,
    )


class Node:
    """An engine's side of the offloading: pages, a manager and a worker."""

    def __init__(self, path, *, per_chunk=2, chunks=16, groups=1, world=1, events=False, **tier):
        names = tuple(f"layer.{i}" for i in range(LAYERS))
        self.per_chunk = per_chunk
        row = PAGE * LAYERS * per_chunk * world
        extra = {
            "cpu_bytes_to_use": chunks * (-(-row // 4096) * 4096),
            "secondary_tiers": [
                {
                    "type": "KvlibTier",
                    "module_path": "kvlib.connectors.vllm_tier",
                    "path": None if path is None else str(path),
                    "disk": "32MiB",
                    "model_id": "a model",
                    **tier,
                }
            ],
        }
        self.extra = extra
        self.config = OffloadingConfig(
            groups=tuple(OffloadingGroupConfig(BLOCK, names, g) for g in range(groups)),
            worker_kv_bytes_per_block=PAGE * LAYERS,
            enable_kv_cache_events=events,
            extra_config=extra,
            engine_id=f"test_{uuid.uuid4().hex}",
            model=OffloadingModelConfig("some/model", "bfloat16"),
            cache=OffloadingCacheConfig(BLOCK, per_chunk),
            parallel=parallel(world),
        )
        self.pages = [torch.zeros((BLOCKS, PAGE), dtype=torch.int8) for _ in names]
        refs = [CanonicalKVCacheRef(i, PAGE) for i in range(LAYERS)]
        self.spec = CpuTieringSpec(self.config)
        self.manager = self.spec.get_manager()
        self.worker = self.spec.get_worker(
            CanonicalKVCaches(
                [CanonicalKVCacheTensor(x, PAGE) for x in self.pages], [refs] * groups
            )
        )
        self.tier = self.manager.secondary_tiers[0]
        self.groups = groups
        self.counted = {}
        self._numbers = iter(range(1 << 20))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.manager.shutdown()
        self.worker.shutdown()

    def request(self):
        ctx = ReqContext(f"request-{next(self._numbers)}")
        self.manager.on_new_request(ctx)
        return ctx

    def step(self, *new):
        self.manager.on_schedule_end(ScheduleEndContext(new, []))

    def settle(self):
        until = time.monotonic() + WAIT
        while self.manager.has_pending_work():
            assert time.monotonic() < until
            self.step()
            time.sleep(0.002)

    def fill(self, seed):
        """Numbers as KV has them, and some that no computation makes."""
        rng = torch.Generator().manual_seed(seed)
        for i, pages in enumerate(self.pages):
            scale = torch.rand(DIM, generator=rng) * 4**i
            x = torch.randn((BLOCKS, PAGE // DTYPE.itemsize // DIM, DIM), generator=rng) * scale
            x = x.to(DTYPE)
            x[0, 0, :4] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40])
            pages.copy_(x.view(torch.int8).view(BLOCKS, PAGE))
        return [pages.clone() for pages in self.pages]

    def _spec(self, blocks, first=0):
        sizes = [len(blocks)] + [0] * (self.groups - 1)
        return GPULoadStoreSpec(list(blocks), sizes, [first] + [0] * (self.groups - 1))

    def store(self, keys, blocks, *, settle=True):
        ctx = self.request()
        out = self.manager.prepare_store(keys, ctx)
        assert out is not None
        assert out.keys_to_store == list(keys)
        self.worker.submit_store(0, self._spec(blocks), out.store_spec)
        self.manager.complete_store(keys, ctx)
        self.step(ctx.req_id)
        self.manager.on_request_finished(ctx)
        if settle:
            self.settle()

    def look(self, keys, ctx=None, *, seconds=WAIT):
        """What look-ups come to once all are answered."""
        mine = ctx or self.request()
        until = time.monotonic() + seconds
        open_answers = (LookupResult.RETRY, LookupResult.HIT_PENDING)
        while True:
            found = [self.manager.lookup(key, mine) for key in keys]
            self.step()
            if not any(answer in open_answers for answer in found):
                break
            assert time.monotonic() < until, found
            time.sleep(0.002)
        if ctx is None:
            self.step(mine.req_id)
            self.manager.on_request_finished(mine)
        return [answer is LookupResult.HIT for answer in found]

    def load(self, keys, blocks, first=0):
        ctx = self.request()
        assert all(self.look(keys, ctx))
        source = self.manager.prepare_load(keys, ctx)
        self.worker.submit_load(1, source, self._spec(blocks, first))
        self.manager.complete_load(keys, ctx)
        self.manager.on_request_finished(ctx)

    def reset(self):
        """Forget vLLM's own tier."""
        self.manager.reset_cache()
        for pages in self.pages:
            pages.fill_(77)

    def counts(self):
        """All counters so far, and the gauges as they are."""
        stats = self.tier.get_stats()
        if stats is not None:
            for name, values in stats.data["data"].items():
                short = name.removeprefix("vllm:kvlib_tier_")
                more = sum(values.values())
                if short in GAUGES:
                    self.counted[short] = more
                else:
                    self.counted[short] = self.counted.get(short, 0) + more
        return self.counted


def names(count, seed=0, group=0):
    return [make_offload_key(sha256(b"%d %d" % (seed, i)).digest(), group) for i in range(count)]


def same(node, blocks, expected):
    return all(
        torch.equal(x[to], y[source])
        for x, y in zip(node.pages, expected, strict=True)
        for source, to in blocks
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kv"


@pytest.mark.parametrize("codec", ["exact", "none"])
@pytest.mark.parametrize("per_chunk", [1, 2])
def test_what_went_to_disk_comes_back_bit_for_bit(folder, codec, per_chunk):
    with Node(folder, codec=codec, per_chunk=per_chunk) as node:
        kv, keys = node.fill(1), names(5)
        count = 5 * per_chunk
        node.store(keys, range(count))
        node.reset()
        node.load(keys, range(20, 20 + count))
        assert same(node, zip(range(count), range(20, 20 + count), strict=True), kv)
        counts = node.counts()
        assert counts["puts"] == counts["hits"] == counts["records"] == 5
        raw = PAGE * LAYERS * count
        stored = counts["written_bytes"]
        assert stored < 0.95 * raw if codec == "exact" else raw < stored < raw + 5 * 1024


def test_a_load_may_begin_in_the_middle_of_a_chunk(folder):
    with Node(folder, per_chunk=4) as node:
        kv, keys = node.fill(2), names(2)
        node.store(keys, range(8))
        node.reset()
        node.load(keys, range(30, 35), first=3)
        assert same(node, [(3 + i, 30 + i) for i in range(5)], kv)
        assert all((x[35:] == 77).all() for x in node.pages)


def test_groups_of_a_hybrid_model_are_kept_apart(folder):
    with Node(folder, groups=2) as node:
        node.fill(3)
        keys = names(2, group=0)
        node.store(keys, range(4))
        node.reset()
        assert node.look(names(2, group=1)) == [False, False]
        assert node.look(keys) == [True, True]


def test_numbers_without_a_dtype_of_ours_are_bytes(folder):
    with Node(folder) as node:
        config = node.config
    object.__setattr__(config, "model", OffloadingModelConfig("some/model", "fp8_ds_mla"))
    object.__setattr__(config, "worker_kv_bytes_per_block", PAGE * LAYERS - 1)
    spec = CpuTieringSpec(config)
    manager = spec.get_manager()
    tier = manager.secondary_tiers[0]
    rows = np.asarray(manager.primary_tier.get_kv_memoryview())
    rng = np.random.default_rng(0)
    rows[0, :] = rng.integers(-128, 128, rows.shape[1])
    size = 2 * (PAGE * LAYERS - 1)
    key = names(1)[0]
    assert tier._chunks.put(key, tier._row(0))
    assert tier._chunks.unpack(key, tier._chunks.read(key), tier._row(1))
    assert (rows[1, :size] == rows[0, :size]).all()
    assert not rows[1, size:].any()  # what fills a row up is not ours
    del rows
    manager.shutdown()


def test_a_chunk_holds_the_pages_of_all_ranks(folder):
    size = PAGE * LAYERS * 2 * 3
    with Node(folder, world=3) as node:
        rows = np.asarray(node.manager.primary_tier.get_kv_memoryview())
        rows[4, :size] = given = np.random.default_rng(0).integers(-128, 128, size, np.int8)
        del rows
        keys, ctx = names(1), node.request()
        node.tier.submit_store(TransferJob(7, keys, np.array([4]), False, ctx))
        node.tier.drain_jobs()
        node.tier.submit_load(TransferJob(8, keys, np.array([5]), True, ctx))
        node.tier.drain_jobs()
        assert [(x.job_id, x.success) for x in node.tier.get_finished_jobs()] == [
            (7, True),
            (8, True),
        ]
        assert (node.tier._row(5).view(np.int8) == given).all()
        node.manager.on_request_finished(ctx)


def test_a_new_process_finds_it_and_others_do_not(folder):
    keys = names(3)
    with Node(folder) as node:
        kv = node.fill(4)
        node.store(keys, range(6))
    with Node(folder) as node:
        node.load(keys, range(40, 46))
        assert same(node, zip(range(6), range(40, 46), strict=True), kv)
    for other in (
        {"model_id": "another model"},
        {"salt": "a tenant"},
        {"per_chunk": 1},
        {"world": 2},
        {"groups": 2},
    ):
        with Node(folder, **other) as node:
            assert node.look(keys) == [False] * 3, other
    with Node(folder, codec="none") as node:
        assert node.look(keys) == [False] * 3


def test_the_engine_and_its_pages_are_part_of_the_name(folder, monkeypatch):
    keys = names(1)
    with Node(folder) as node:
        node.store(keys, range(2))
    for name, value in (("vllm_version", "0.99.0"), ("_page_layout", lambda _: "other pages")):
        with monkeypatch.context() as patch:
            patch.setattr(vllm_tier, name, value)
            with Node(folder) as node:
                assert node.look(keys) == [False], name
    with Node(folder) as node:
        assert node.look(keys) == [True]


def test_weights_that_cannot_be_told_are_refused(folder):
    with pytest.raises(ConfigError, match=r"some/model.*Pass model_id"):
        Node(folder, model_id=None)


def flip(folder, size=4096):
    """Damage everything in the segments behind their first page."""
    for file in Path(folder).rglob("*"):
        data = bytearray(file.read_bytes()) if file.is_file() and "seg" in file.name else b""
        if len(data) > size:
            for at in range(size, len(data), 512):
                data[at + 300] ^= 0x10
            with file.open("r+b") as f:
                f.write(data)


def test_damage_is_a_failed_promotion_and_is_stored_again(folder):
    with Node(folder, codec="none") as node:
        kv, keys = node.fill(5), names(4)
        node.store(keys, range(8))
        node.reset()
        flip(folder)
        assert node.look(keys) == [False] * 4
        counts = node.counts()
        assert counts["corrupt"] == 4
        assert counts["records"] == 0
        failures = node.manager.get_stats().data["data"]
        assert sum(failures["vllm:kv_offload_tiering_promotion_job_failures"].values()) >= 1
        for pages, given in zip(node.pages, kv, strict=True):
            pages.copy_(given)
        node.store(keys, range(8))
        node.reset()
        node.load(keys, range(20, 28))
        assert same(node, zip(range(8), range(20, 28), strict=True), kv)


def test_one_bad_chunk_spoils_no_other(folder):
    with Node(folder) as node:
        kv, keys = node.fill(6), names(4)
        node.store(keys, range(8))
        node.reset()
        ctx = node.request()
        for key in keys:
            assert node.manager.lookup(key, ctx) is LookupResult.RETRY
        node.step()
        node.tier._chunks._tiers[0].delete(node.tier._chunks.key(keys[2]))
        time.sleep(0.1)
        found = node.look(keys, ctx)
        assert found in ([True, True, False, True], [True, True, False, False])
        node.manager.on_request_finished(ctx)
        node.load(keys[:2], range(20, 24))
        assert same(node, zip(range(4), range(20, 24), strict=True), kv)


def test_a_record_that_does_not_decode_is_dropped(folder):
    with Node(folder) as node:
        node.fill(7)
        keys, chunks = names(1), node.tier._chunks
        node.store(keys, range(2))
        node.reset()
        record = chunks.read(keys[0])
        other = names(1, seed=9)[0]
        parts = [bytes(record.view)]
        chunks._tiers[0].put(chunks.key(other), parts)  # under the wrong name: the tier sees it
        assert chunks.read(other) is None
        row = np.zeros(node.tier._nbytes - 64, np.uint8)  # another size than was stored
        smaller = type(chunks)(
            chunks._tiers,
            identity="x",
            dtype="bfloat16",
            nbytes=len(row),
            codec="exact",
            rules=chunks._rules,
        )
        assert not smaller.unpack(keys[0], record, row)
        assert smaller.corrupt == 1
        assert not row.any()


def test_capacity_holds_and_the_end_of_a_prompt_goes_first(folder):
    with Node(folder, codec="none", per_chunk=1, disk="512KiB", chunks=64, threads=1) as node:
        node.fill(8)
        first, second = names(12), names(36, seed=1)
        node.store(first, range(12))
        node.store(second, range(36))
        counts = node.counts()
        assert counts["used_bytes"] <= counts["capacity_bytes"] == 512 << 10
        assert counts["evicted"] > 0
        node.reset()
        found = node.look(second)
        assert 10 < sum(found) < 36
        assert found == sorted(found, reverse=True)


def test_a_full_disk_drops_stores_and_nothing_else(folder, monkeypatch):
    with Node(folder) as node:
        kv = node.fill(9)
        early, late = names(2), names(2, seed=1)
        node.store(early, range(4))
        with monkeypatch.context() as patch:
            patch.setattr(SegmentStore, "_reserve", lambda *_: None)
            node.store(late, range(4, 8))
        assert node.counts()["rejected"] == 2
        node.reset()
        assert node.look(late) == [False, False]
        node.load(early, range(20, 24))
        assert same(node, zip(range(4), range(20, 24), strict=True), kv)


def test_a_folder_that_is_gone_stops_nothing(folder):
    with Node(folder) as node:
        kv, keys = node.fill(20), names(3)
        node.store(keys, range(6))
        shutil.rmtree(folder)
        node.store(names(3, seed=1), range(6))
        node.reset()
        if all(node.look(keys)):  # files that are open live on
            node.load(keys, range(20, 26))
            assert same(node, zip(range(6), range(20, 26), strict=True), kv)


def test_two_engines_share_a_folder(folder):
    keys = names(4)
    with Node(folder) as a, Node(folder) as b:
        kv = a.fill(10)
        b.fill(10)
        threads = [
            threading.Thread(target=node.store, args=(keys, range(8)), kwargs={"settle": False})
            for node in (a, b)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        a.settle()
        b.settle()
        for node in (a, b):
            node.reset()
            node.load(keys, range(20, 28))
            assert same(node, zip(range(8), range(20, 28), strict=True), kv)
        more = names(2, seed=1)
        a.store(more, range(4))
        until = time.monotonic() + WAIT
        while b.look(more) != [True, True]:  # others see a record once it is durable
            assert time.monotonic() < until


class Gate:
    """Lets calls of a tier wait, before or after they have done what they do."""

    def __init__(self, tier, *methods, after=False):
        self.open = threading.Event()
        self._after = after
        for name in methods:
            setattr(tier, name, self._wait(getattr(tier, name)))

    def _wait(self, method):
        def call(*args, **kwargs):
            done = method(*args, **kwargs) if self._after else None
            assert self.open.wait(WAIT)
            return done if self._after else method(*args, **kwargs)

        return call


def recover(node):
    """Wait until nothing hangs any more; from now on nothing is late."""
    until = time.monotonic() + WAIT
    while node.tier._overdue or node.tier._lookups.hangs(0):
        assert time.monotonic() < until
        time.sleep(0.01)
    node.tier._options = replace(node.tier._options, deadline=WAIT)


def test_a_disk_that_hangs_holds_up_no_call(folder):
    with Node(folder, deadline=0.2) as node:
        kv, keys = node.fill(11), names(3)
        node.store(keys, range(6))
        node.reset()
        gate = Gate(node.tier._chunks._tiers[0], "contains_many", "get_into", "put")
        ctx = node.request()
        slowest, answers = 0.0, []
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            begun = time.monotonic()
            answers.append(node.tier.lookup(keys[0], ctx))
            node.step()
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.005)
        assert answers[0] is LookupResult.RETRY
        assert answers[-1] is LookupResult.MISS
        assert slowest < WAIT / 2  # none waited at the gate
        assert node.counts()["lookups_late"] > 0
        node.manager.on_request_finished(ctx)
        late = node.request()
        assert node.tier.lookup(keys[1], late) is LookupResult.MISS  # at once, while it hangs
        node.manager.on_request_finished(late)
        gate.open.set()
        recover(node)
        node.load(keys, range(20, 26))
        assert same(node, zip(range(6), range(20, 26), strict=True), kv)


def test_a_request_far_back_in_the_queue_does_not_wait_for_ever(folder):
    with Node(folder, deadline=0.5) as node:
        disk = node.tier._chunks._tiers[0]
        contains, asked, pause = disk.contains_many, [], [0.1]

        def slow(keys):
            time.sleep(pause[0])
            asked.append(keys)
            return contains(keys)

        disk.contains_many = slow
        requests = [node.request() for _ in range(40)]
        for i, one in enumerate(requests):
            assert node.tier.lookup(names(1, seed=i)[0], one) is LookupResult.RETRY
            node.step()
        key, ctx = names(1, seed=99)[0], node.request()
        while (answer := node.tier.lookup(key, ctx)) is LookupResult.RETRY:
            node.step()
            time.sleep(0.005)
        assert answer is LookupResult.MISS
        assert len(asked) < len(requests)
        pause[0] = 0.0
        for one in (*requests, ctx):
            node.manager.on_request_finished(one)


@pytest.mark.parametrize("after", [False, True])
def test_chunks_that_do_not_come_are_given_up_and_never_written_later(folder, after):
    with Node(folder, deadline=1.0) as node:
        kv, keys = node.fill(12), names(3)
        node.store(keys, range(6))
        node.reset()
        rows = node.tier._row
        written = []
        node.tier._row = lambda chunk: written.append(chunk) or rows(chunk)
        gate = Gate(node.tier._chunks._tiers[0], "get_into", after=after)
        assert node.look(keys) == [False] * 3
        late = node.counts()["promotions_late"]
        assert late >= 1
        assert node.look(keys) == [False] * 3  # while it hangs, nothing is tried again
        assert node.counts()["promotions_late"] == late
        node.manager.reset_cache()  # returns: vLLM's memory is not ours any more
        gate.open.set()
        recover(node)
        assert not written
        node.load(keys, range(20, 26))
        assert same(node, zip(range(6), range(20, 26), strict=True), kv)


def test_a_reset_waits_for_what_is_under_way(folder):
    with Node(folder) as node:
        kv, keys = node.fill(13), names(3)
        gate = Gate(node.tier._chunks._tiers[0], "put")
        node.store(keys, range(6), settle=False)
        timer = threading.Timer(0.3, gate.open.set)
        timer.start()
        node.reset()
        assert gate.open.is_set()
        timer.join()
        node.load(keys, range(20, 26))
        assert same(node, zip(range(6), range(20, 26), strict=True), kv)


def test_a_reset_may_forget(folder):
    keys = names(2)
    with Node(folder, on_reset="forget") as node:
        node.store(keys, range(4))
        node.reset()
        assert node.look(keys) == [False, False]
        node.store(keys, range(4))
        assert node.tier._chunks.contains(keys) == [True, True]
    with Node(folder) as node:
        assert node.look(keys) == [True, True]  # of the first weights


def test_memory_before_disk(folder):
    with Node(folder, memory="8MiB") as node:
        kv, keys = node.fill(14), names(3)
        node.store(keys, range(6))
        node.reset()
        memory, disk = node.tier._chunks._tiers
        assert [tier.stats().records for tier in (memory, disk)] == [3, 3]
        node.load(keys, range(20, 26))
        assert (memory.stats().hits, disk.stats().hits) == (3, 0)
    with Node(folder, memory="8MiB") as node:
        memory, disk = node.tier._chunks._tiers
        for _ in range(2):
            node.load(keys, range(20, 26))
            node.reset()
        assert (memory.stats().hits, disk.stats().hits) == (3, 3)
        node.load(keys, range(20, 26))
        assert same(node, zip(range(6), range(20, 26), strict=True), kv)


def test_time_to_live(folder):
    with Node(folder, ttl=3, memory="8MiB") as node:
        keys = names(2)
        node.store(keys, range(4))
        node.reset()
        assert node.look(keys) == [True, True]
        node.reset()
        time.sleep(3.1)
        assert node.look(keys) == [False, False]


def test_in_memory_alone():
    with Node(None, memory="8MiB") as node:
        kv, keys = node.fill(15), names(2)
        node.store(keys, range(4))
        node.reset()
        node.load(keys, range(20, 24))
        assert same(node, zip(range(4), range(20, 24), strict=True), kv)


def test_what_breaks_inside_is_a_miss(folder, monkeypatch):
    with Node(folder) as node:
        keys = names(2)
        node.store(keys, range(4))
        node.reset()
        with monkeypatch.context() as patch:
            patch.setattr(node.tier._chunks, "unpack", None)
            assert node.look(keys) == [False, False]
        assert node.counts()["failures"] == 2
        assert node.look(keys) == [True, True]


def test_what_is_queued_at_the_end_is_stored_or_dropped(folder):
    keys = names(3)
    with Node(folder) as node:
        node.store(keys, range(6), settle=False)
    with Node(folder) as node:
        assert node.look(keys) == [True] * 3
    with Node(folder, deadline=0.1) as node:
        gate = Gate(node.tier._chunks._tiers[0], "put")
        node.store(names(3, seed=1), range(6), settle=False)
        timer = threading.Timer(0.5, gate.open.set)
        timer.start()
        node.tier.shutdown()
        node.tier.shutdown()
        timer.join()
        assert not node.tier._jobs


def test_events(folder):
    with Node(folder, events=True, enable_kv_events=True, locality="LOCAL") as node:
        keys = names(3)
        node.store(keys, range(6))
        (event,) = node.tier.take_events()
        assert sorted(event.keys) == sorted(keys)
        assert (event.medium.value, event.removed, event.locality.value) == (
            "STORAGE",
            False,
            "LOCAL",
        )
        assert list(node.tier.take_events()) == []
    with Node(folder, events=True) as node:
        node.store(names(1, seed=1), range(2))
        assert list(node.tier.take_events()) == []


def test_every_metric_is_declared_with_its_labels(folder):
    with Node(folder, memory="1MiB") as node:
        declared = CpuTieringSpec.build_metric_definitions(node.extra)
        keys = names(2)
        node.store(keys, range(4))
        node.reset()
        node.look([*keys, *names(1, seed=1)])
        stats = node.tier.get_stats().data
        assert {"vllm:kvlib_tier_puts", "vllm:kvlib_tier_records"} <= set(stats["data"])
        for name, values in stats["data"].items():
            kind = {"counter": OffloadingCounterMetadata, "gauge": OffloadingGaugeMetadata}
            assert isinstance(declared[name], kind[stats["types"][name]])
            for labels in values:
                assert len(labels) == len(declared[name].labelnames)
        again = node.tier.get_stats().data["types"]
        assert set(again.values()) == {"gauge"}  # a counter is told once
        assert set(KvlibTier.build_metric_definitions({})) >= {
            f"vllm:kvlib_tier_{name}" for name in (*COUNTERS, *GAUGES)
        }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dsk": "1GiB"}, r"unknown option 'dsk'.*'disk'"),
        ({"codec": "int8"}, "loses something"),
        ({"codec": "nope"}, "nope"),
        ({"on_reset": "drop"}, "keep or forget"),
        ({"locality": "here"}, "LOCAL or REMOTE"),
        ({"threads": 0}, "threads=0"),
        ({"deadline": 0}, "deadline=0"),
        ({"deadline": True}, "deadline=True"),
        ({"salt": 3}, "salt=3"),
        ({"disk": "much"}, "much"),
        ({"path": None, "memory": 0}, "memory=0 and no path"),
    ],
)
def test_bad_options(folder, given, message):
    with pytest.raises((ConfigError, LookupError), match=message):
        Node(given.pop("path", folder), **given)


def test_another_vllm_is_refused(folder, monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    with pytest.raises(EngineVersionError, match=r"0\.31\.2.*0\.32"):
        Node(folder)
