# SPDX-License-Identifier: Apache-2.0
"""`KvlibHiCacheStorage` with SGLang's own host pools and storage classes, on a CPU."""

import threading
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheFile,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory

from kvlib.connectors.sglang_hicache import KvlibHiCacheStorage
from kvlib.errors import ConfigError

LAYERS, HEADS, DIM, SLOTS = 3, 2, 32, 256
LAYOUTS = ["layer_first", "page_first", "page_first_direct"]
MHA_LAYOUTS = [*LAYOUTS, "page_head"]


def host_pool(kind="mha", layout="page_first", page=16, dtype=torch.float16, seed=0):
    """A host pool of SGLang's, full of numbers."""
    common = {"size": SLOTS, "page_size": page, "dtype": dtype, "device": "cpu"}
    host = {
        "host_to_device_ratio": 2.0,
        "host_size": 0,
        "page_size": page,
        "layout": layout,
        "pin_memory": False,
        "device_capacity_tokens": SLOTS,
        "start_layer": 0,
        "end_layer": LAYERS,
    }
    if kind == "mha":
        pool = MHATokenToKVPool(
            head_num=HEADS, head_dim=DIM, layer_num=LAYERS, enable_memory_saver=False, **common
        )
        made = MHATokenToKVPoolHost(pool.get_device_pool_infos()[0].buffer_info, **host)
    else:
        pool = MLATokenToKVPool(
            kv_lora_rank=64, qk_rope_head_dim=16, layer_num=LAYERS, enable_memory_saver=False,
            **common,
        )  # fmt: skip
        made = MLATokenToKVPoolHost(
            pool.get_device_pool_infos()[0].buffer_info, target_layer_num=LAYERS, **host
        )
    fill(made, seed)
    return made


def fill(pool, seed):
    generator = torch.Generator().manual_seed(seed)
    buffer = pool.kv_buffer
    buffer.copy_(torch.randn(buffer.shape, generator=generator).to(buffer.dtype))


def storage_config(model, path, *, mla=False, tp=(0, 1), extra=None, **options):
    return HiCacheStorageConfig(
        tp_rank=tp[0],
        tp_size=tp[1],
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=mla,
        enable_storage_metrics=True,
        is_page_first_layout=True,
        model_name=str(model),
        extra_config={
            "backend_name": "kvlib",
            "module_path": "kvlib.connectors.sglang_hicache",
            "class_name": "KvlibHiCacheStorage",
            "interface_v1": True,
            "prefetch_threshold": 256,
            "kvlib": {"path": str(path), "disk": "64MiB", "model_id": str(model), **options},
            **(extra or {}),
        },
    )


def storage(pool, path, model="a model", **options):
    """Through SGLang's own factory, as its cache controller makes one."""
    config = storage_config(model, path, mla=isinstance(pool, MLATokenToKVPoolHost), **options)
    made = StorageBackendFactory.create_backend("dynamic", config, pool)
    made.register_mem_pool_host(pool)
    made.on_host_pools_registered()
    return made


def names(count, first=0):
    return [f"{i:064x}" for i in range(first, first + count)]


def slots(pool, pages):
    size = pool.page_size
    return torch.cat([torch.arange(page * size, (page + 1) * size) for page in pages])


def pages_of(pool, pages):
    return [pool.get_data_page(page * pool.page_size).clone() for page in pages]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


KINDS = [("mha", x) for x in MHA_LAYOUTS] + [("mla", x) for x in LAYOUTS]


@pytest.mark.parametrize(("kind", "layout"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pages_come_back_bit_for_bit_in_another_process_lifetime(path, kind, layout, dtype):
    """Every layout of SGLang's pools, also into other pages than those they came from."""
    pool = host_pool(kind, layout, dtype=dtype)
    wanted = pages_of(pool, [1, 4, 2, 9])
    with_nan = pool.get_data_page(16).view(-1)
    with_nan[:2] = torch.tensor([float("nan"), -0.0], dtype=dtype)
    pool.set_from_flat_data_page(16, with_nan)
    wanted[0] = pages_of(pool, [1])[0]
    keys = names(4)
    first = storage(pool, path)
    assert first.batch_exists(keys) == 0
    assert first.batch_set_v1(keys, slots(pool, [1, 4, 2, 9])) == [True] * 4
    first.close()
    fill(pool, 99)
    untouched = pages_of(pool, [0, 1, 3, 5, 8, 10])
    again = storage(pool, path)
    assert again.batch_exists([*keys, "no such page"]) == 4
    assert again.batch_get_v1(keys, slots(pool, [2, 6, 7, 4])) == [True] * 4
    read = pages_of(pool, [2, 6, 7, 4])
    assert all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(read, wanted, strict=True)
    )
    for before, after in zip(untouched, pages_of(pool, [0, 1, 3, 5, 8, 10]), strict=True):
        assert torch.equal(before, after)
    again.close()


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_several_pools(path, kind, layout):
    """The v2 interface: keys and values beside a side-car pool with pages of another size."""
    pool = host_pool(kind, layout)
    side = host_pool("mla" if kind == "mha" else "mha", "page_first", seed=5)
    made = storage(pool, path)
    made.register_mem_host_pool_v2(side, PoolName.INDEXER)
    keys = names(3)
    transfers = [
        PoolTransfer(name=PoolName.KV, host_indices=slots(pool, [1, 2, 3]), keys=keys),
        PoolTransfer(name=PoolName.INDEXER, host_indices=slots(side, [4, 5, 6]), keys=keys),
    ]
    wanted = pages_of(pool, [1, 2, 3]), pages_of(side, [4, 5, 6])
    assert made.batch_set_v2(transfers) == {PoolName.KV: [True] * 3, PoolName.INDEXER: [True] * 3}
    fill(pool, 7)
    fill(side, 8)
    assert made.batch_get_v2(transfers) == {PoolName.KV: [True] * 3, PoolName.INDEXER: [True] * 3}
    read = pages_of(pool, [1, 2, 3]), pages_of(side, [4, 5, 6])
    assert all(torch.equal(x, y) for a, b in zip(read, wanted, strict=True)
               for x, y in zip(a, b, strict=True))  # fmt: skip
    wrong = [PoolTransfer(name=PoolName.KV, host_indices=slots(pool, [1]), keys=keys)]
    assert made.batch_get_v2(wrong) == {PoolName.KV: [False] * 3}
    unknown = [PoolTransfer(name=PoolName.SWA, host_indices=slots(pool, [1]), keys=keys[:1])]
    assert made.batch_get_v2(unknown) == {PoolName.SWA: [False]}
    made.close()


def test_hits_agree_with_the_file_back_end(path, tmp_path):
    """SGLang's own `HiCacheFile` is the oracle, for all ways in which pages of two pools can be
    there."""
    pool = host_pool()
    side = host_pool(seed=3)
    config = storage_config("m", path, extra={"file_storage_path": str(tmp_path / "files")})
    oracle = HiCacheFile(config)
    oracle.register_mem_pool_host(pool)
    ours = KvlibHiCacheStorage(config)
    for back_end in (oracle, ours):
        back_end.register_mem_host_pool_v2(pool, PoolName.KV)
        back_end.register_mem_host_pool_v2(side, PoolName.MAMBA)
    ours.register_mem_pool_host(pool)
    for number, (have, aux) in enumerate(product(range(4), product([False, True], repeat=3))):
        keys = names(3, first=10 * number)
        for name, pages in (
            (PoolName.KV, list(range(have))),
            (PoolName.MAMBA, [i for i in range(3) if aux[i]]),
        ):
            transfer = PoolTransfer(
                name=name,
                host_indices=slots(pool, pages) if pages else torch.empty(0, dtype=torch.int64),
                keys=[keys[i] for i in pages],
            )
            for back_end in (oracle, ours):
                assert all(back_end.batch_set_v2([transfer])[name])
        asked = [
            None,
            [PoolTransfer(name=PoolName.MAMBA, keys=keys)],
            [PoolTransfer(name=PoolName.MAMBA, keys=keys[-1:],
                          hit_policy=PoolHitPolicy.TRAILING_PAGES)],
            [PoolTransfer(name=PoolName.MAMBA, keys=keys[-2:],
                          hit_policy=PoolHitPolicy.TRAILING_PAGES)],
        ]  # fmt: skip
        for transfers in asked:
            theirs = oracle.batch_exists_v2(keys, transfers)
            mine = ours.batch_exists_v2(keys, transfers)
            assert mine.kv_hit_pages == theirs.kv_hit_pages
            assert mine.restorable_prefix_pages == theirs.restorable_prefix_pages
    ours.close()


def test_pages_by_value(path):
    """What SGLang does without `interface_v1`."""
    pool = host_pool()
    made = storage(pool, path)
    keys = names(2)
    pages = pages_of(pool, [1, 2])
    assert made.batch_set(keys, pages)
    assert made.set(names(1, 7)[0], pages[0])
    targets = [pool.get_dummy_flat_data_page() for _ in range(3)]
    got = made.batch_get([*keys, "not there"], targets)
    assert torch.equal(got[0], pages[0])
    assert torch.equal(got[1], pages[1])
    assert got[2] is None
    assert made.get(keys[0], torch.empty(3)) is None
    assert made.exists(keys[0])
    assert not made.exists("not there")
    made.close()


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another model"},
        {"dtype": torch.bfloat16},
        {"layout": "layer_first"},
        {"page": 32},
        {"tp": (1, 2)},
        {"salt": "tenant"},
    ],
    ids=lambda x: next(iter(x)),
)
def test_what_sglangs_keys_lack_is_in_ours(path, other):
    """The same keys, other bytes: a miss."""
    pool = host_pool()
    first = storage(pool, path)
    keys = names(2)
    assert first.batch_set_v1(keys, slots(pool, [1, 2])) == [True, True]
    first.close()
    shape = {k: v for k, v in other.items() if k in ("dtype", "layout", "page")}
    options = {k: v for k, v in other.items() if k not in shape}
    stranger = host_pool(seed=1, **shape)
    before = stranger.kv_buffer.clone()
    second = storage(stranger, path, **options)
    assert second.batch_exists(keys) == 0
    assert second.batch_get_v1(keys, slots(stranger, [1, 2])) == [False, False]
    assert torch.equal(stranger.kv_buffer, before)
    second.close()


def test_latent_pages_are_one_for_all_ranks(path):
    """MLA: the ranks of a tensor-parallel group hold the same; their Mamba states are not."""
    pool = host_pool("mla")
    first = storage(pool, path, tp=(0, 2))
    first.register_mem_host_pool_v2(pool, PoolName.MAMBA)
    transfers = [
        PoolTransfer(name=name, host_indices=slots(pool, [1]), keys=names(1))
        for name in (PoolName.KV, PoolName.MAMBA)
    ]
    first.batch_set_v2(transfers)
    first.close()
    second = storage(pool, path, tp=(1, 2))
    second.register_mem_host_pool_v2(pool, PoolName.MAMBA)
    assert second.batch_get_v2(transfers) == {PoolName.KV: [True], PoolName.MAMBA: [False]}
    second.close()


def damage(path, how):
    for segment in path.glob("seg-*.kv"):
        data = bytearray(segment.read_bytes())
        if how == "flip":
            for at in range(0, len(data), 512):
                data[at] ^= 1
            segment.write_bytes(data)
        else:
            segment.write_bytes(data[:4096])


@pytest.mark.parametrize("how", ["flip", "truncate"])
def test_damaged_pages_are_misses(path, how):
    """Nothing of them reaches SGLang's pool."""
    pool = host_pool()
    first = storage(pool, path)
    keys = names(4)
    first.batch_set_v1(keys, slots(pool, [1, 2, 3, 4]))
    first.close()
    damage(path, how)
    before = pool.kv_buffer.clone()
    second = storage(pool, path)
    assert second.batch_get_v1(keys, slots(pool, [5, 6, 7, 8])) == [False] * 4
    assert torch.equal(pool.kv_buffer, before)
    if how == "flip":
        assert second.stats()["segment"].corrupt + second.corrupt == 4
    second.close()


def test_the_disk_is_bounded(path):
    """Old pages make room for new ones."""
    pool = host_pool()
    made = storage(pool, path, disk="1MiB", codec="none")
    for first in range(0, 200, 8):
        made.batch_set_v1(names(8, first), slots(pool, range(1, 9)))
    stats = made.stats()["segment"]
    assert stats.used_bytes <= 1 << 20
    assert stats.evicted
    assert made.batch_exists(names(8, 192)) == 8
    assert not made.exists(names(1)[0])
    made.close()


def test_threads(path):
    """SGLang prefetches and backs up from several threads."""
    pool = host_pool()
    made = storage(pool, path)
    wanted = pages_of(pool, range(1, 9))
    errors = []

    def work(first):
        for _ in range(5):
            keys = names(8, first)
            if not all(made.batch_set_v1(keys, slots(pool, range(1, 9)))):
                errors.append("set")
            got = made.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
            if not all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)):
                errors.append("get")

    threads = [threading.Thread(target=work, args=(n % 2 * 8,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    made.close()


def test_clear_drops_this_configuration_only(path):
    """Others share the folder."""
    pool = host_pool()
    mine, others = storage(pool, path), storage(pool, path, model="another model")
    for made in (mine, others):
        made.batch_set_v1(names(2), slots(pool, [1, 2]))
    assert mine.clear()
    assert mine.batch_exists(names(2)) == 0
    assert others.batch_exists(names(2)) == 2
    mine.close()
    others.close()
    assert others.batch_get_v1(names(2), slots(pool, [1, 2])) == [False, False]
    assert others.batch_exists(names(2)) == 0


def test_metrics_are_sglangs(path):
    """Pages and bandwidth of each batch."""
    pool = host_pool()
    made = storage(pool, path)
    made.batch_set_v1(names(2), slots(pool, [1, 2]))
    made.batch_get_v1(names(1), slots(pool, [1]))
    stats = made.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([2], [1])
    assert min(*stats.backup_bandwidth, *stats.prefetch_bandwidth) > 0
    assert made.get_stats().backup_pgs == []
    made.close()


def test_sglangs_fault_injector(path, monkeypatch):
    """Every call may fail or be slow: what comes back is right, or a miss."""
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.5")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.002")
    pool = host_pool()
    wanted = pages_of(pool, [1, 2])
    made = storage(pool, path)
    assert type(made).__name__ == "HiCacheStorageFailureInjector"
    outcomes = set()
    for _ in range(60):
        made.batch_set_v1(names(2), slots(pool, [1, 2]))
        done = made.batch_get_v1(names(2), slots(pool, [3, 4]))
        outcomes.add(all(done))
        if all(done):
            assert all(map(torch.equal, pages_of(pool, [3, 4]), wanted))
        fill_two = torch.zeros_like(wanted[0])
        pool.set_from_flat_data_page(3 * 16, fill_two)
        pool.set_from_flat_data_page(4 * 16, fill_two)
    assert outcomes == {True, False}
    made.close()


def test_bad_options_are_errors(path):
    """At start-up, not later."""
    with pytest.raises(ConfigError, match="loses something"):
        storage(host_pool(), path, codec="int4")
    with pytest.raises(ConfigError, match="on_reset"):
        storage(host_pool(), path, on_reset="keep")
    with pytest.raises(ConfigError, match="pat"):
        storage(host_pool(), path, patth="x")
    config = storage_config("no such folder", path)
    config.extra_config["kvlib"].pop("model_id")
    with pytest.raises(Exception, match="model"):
        KvlibHiCacheStorage(config)


def test_a_pool_without_whole_pages_is_refused(path):
    """SGLang refuses the attach then."""
    from kvlib.errors import ConnectorError

    def no_page(index, flat=True):
        raise NotImplementedError("no flat pages")

    pool = SimpleNamespace(get_data_page=no_page, layout="odd", dtype=torch.float16)
    made = KvlibHiCacheStorage(storage_config("m", path))
    with pytest.raises(ConnectorError, match="page_first"):
        made.register_mem_host_pool_v2(pool, PoolName.KV)
    made.close()
