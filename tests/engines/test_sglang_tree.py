# SPDX-License-Identifier: Apache-2.0
"""`KvlibLinker` under SGLang's own radix tree and pools, without a model: quick, in one process.

The tree comes from the fixtures that SGLang's wheel ships for its own tests.
"""

import json
import threading
import time
from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.server_args import ServerArgs
from sglang.test.kits.unified_radix_cache import fixtures
from sglang.test.kits.unified_radix_cache.config import CacheConfig

from kvlib import KVStore
from kvlib.connectors.sglang import KvlibLinker
from kvlib.connectors.sglang_config import VERSIONS
from kvlib.connectors.sglang_pools import pages_of, verify_pool
from kvlib.errors import ConfigError, ConnectorError
from kvlib.keys import BLOCK_TOKENS
from kvlib.spec import EXACT

LAYERS, HEADS, DIM = 4, 2, 16


def tokens(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 900, (count,), generator=generator).tolist()


def numbers(ids, layer):
    """What a model would cache: of each token, depending on all before it."""
    state = torch.tensor(ids, dtype=torch.float64).cumsum(0) % 8191
    channels = torch.arange(HEADS * DIM, dtype=torch.float64).view(1, HEADS, DIM)
    keys = torch.sin(state[:, None, None] * (layer + 1) + channels).float()
    return keys, -keys * 2


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """SGLang's fixtures look for an accelerator, and need none."""
    monkeypatch.setattr(fixtures, "get_device", lambda: "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder: what the linker reads of it, and no more."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000,
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": DIM,
        "max_position_embeddings": 2048, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


class Engine:
    """What SGLang's scheduler does with a tree and a linker."""

    def __init__(self, model, path, page=64, **options):
        config = CacheConfig(
            page_size=page, num_layers=LAYERS, kv_size=4096, max_context_len=2048,
            head_num=HEADS, head_dim=DIM, dtype=torch.float32,
        )  # fmt: skip
        self.cache, self.allocator, _ = fixtures.build_fixture(config)
        self.pool = self.allocator.get_kvcache()
        self.page = page
        args = ServerArgs(model_path=str(model), dtype="float32", device="cpu", page_size=page)
        self.linker = KvlibLinker(
            args,
            self.cache.cache_init_params,
            components=set(self.cache.components),
            extra_config={"path": str(path), "memory": 0, "disk": "64MiB", **options},
        )
        self.cache.init_cache_linker(self.linker)
        self.requests = 0

    def request(self, ids, **options):
        self.requests += 1
        given = {
            "rid": f"request {self.requests}",
            "full_untruncated_fill_ids": array("q", ids),
            "origin_input_ids": array("q", ids),
            "last_node": self.cache.root_node_handle(),
            "kv": None,
            **dict.fromkeys(("multimodal_inputs", "input_embeds", "positional_embed_overrides",
                             "lora_id", "extra_key", "cache_salt", "swa_branching_seqlen",
                             "session")),
        }  # fmt: skip
        return _Request(**{**given, **options})

    def match(self, req):
        key = RadixKey(req.full_untruncated_fill_ids[:-1], req.extra_key, cache_salt=req.cache_salt)
        result = self.cache.match_prefix(MatchPrefixParams(key=key, req=req))
        req.last_node = result.last_device_node
        return result

    def load(self, req):
        """Slots of the tail that came from the store."""
        count, _ = self.cache.linker.load_back(req)
        slots = self.cache.linker.private_load_indices.get(req.rid, torch.empty(0))
        self.cache.linker.start_layer_wise_loading()
        failed = self.cache.linker.finish_loads()
        assert failed in ([], [req.rid])
        return None if failed else slots[:count]

    def run(self, ids, **options):
        """Serve a request: match, load, compute the rest, insert; (device, loaded) tokens."""
        req = self.request(ids, **options)
        result = self.match(req)
        device, loaded = result.device_prefix_len, torch.empty(0, dtype=torch.int64)
        if result.host_hit_length:
            loaded = self.load(req)
            assert loaded is not None
            self.check(ids, device, loaded)
        whole = len(ids) // self.page * self.page
        path = self.cache.path_device_indices(req.last_node)[:device]
        have = device + len(loaded)
        fresh = self.allocator.alloc(whole - have)
        for layer in range(LAYERS):
            keys, values = numbers(ids, layer)
            self.pool.k_buffer[layer][fresh] = keys[have:whole]
            self.pool.v_buffer[layer][fresh] = values[have:whole]
        key = RadixKey(array("q", ids[:whole]), req.extra_key, cache_salt=req.cache_salt)
        self.linker.inserting(req)
        try:
            self.cache.insert(InsertParams(key=key, value=torch.cat([path, loaded, fresh])))
        finally:
            self.linker.inserting(None)
        self.linker.released(req.rid)
        self.settle()
        return device, len(loaded)

    def check(self, ids, first, slots):
        for layer in range(LAYERS):
            keys, values = numbers(ids, layer)
            assert torch.equal(self.pool.k_buffer[layer][slots], keys[first : first + len(slots)])
            assert torch.equal(self.pool.v_buffer[layer][slots], values[first : first + len(slots)])

    def settle(self):
        """Wait for copies, and for the store."""
        until = time.monotonic() + 20
        while self.cache.linker.pending_offloads and time.monotonic() < until:
            self.cache.check_hicache_events()
            time.sleep(0.002)
        assert not self.cache.linker.pending_offloads
        capacity = self.linker.config.staging_bytes
        while self.linker.mover.store.staging_left < capacity and time.monotonic() < until:
            time.sleep(0.002)

    def flush(self):
        self.cache.reset()
        self.allocator.clear()

    def stored(self, ids, salt=""):
        from kvlib.keys import block_keys

        keys = block_keys(self.linker.spec.fingerprint(), ids, salt=salt)
        return self.linker.mover.store.match(self.linker.spec, keys)


class _Request(SimpleNamespace):
    __hash__ = object.__hash__


@pytest.fixture
def start(model, tmp_path):
    made = []

    def _start(**options):
        made.append(Engine(model, options.pop("path", tmp_path / "store"), **options))
        return made[-1]

    yield _start
    for engine in made:
        engine.linker.close()


@pytest.mark.parametrize("page", [16, 32, 64])
def test_conversations_come_back_whatever_the_page_size(start, page):
    """Nodes that begin and end within blocks; every whole block is stored, under keys that any
    engine computes."""
    engine = start(page=page)
    ids = tokens(1, 700)
    for turn in (200, 330, 336, 700):
        assert engine.run(ids[:turn])[1] == 0
    branch = ids[:416] + tokens(2, 200)
    engine.run(branch)
    assert engine.stored(ids) == 700 // page * page // BLOCK_TOKENS
    engine.flush()
    assert engine.run(branch) == (0, len(branch) // page * page // 64 * 64)
    device, loaded = engine.run(ids)
    assert device == 416 // page * page
    assert device + loaded == 640 // page * page
    assert engine.linker.stats()["errors"] == 0
    assert engine.linker.stats()["unknown_requests"] == 0


def test_another_page_size_reads_it(start):
    """Page size is no part of a key."""
    first = start(page=32)
    ids = tokens(3, 600)
    first.run(ids)
    first.linker.close()
    second = start(page=16)
    assert second.run(ids) == (0, 576)


def test_blocks_are_those_of_any_other_user_of_the_store(start, tmp_path):
    """What a plain store finds under the documented keys is what the pool held."""
    engine = start()
    ids = tokens(4, 260)
    engine.run(ids)
    spec = engine.linker.spec
    engine.linker.close()
    with KVStore(tmp_path / "store", memory=0) as store:
        loaded = store.load(spec, store.block_keys(spec, ids))
    assert loaded.num_blocks == 4
    for layer in loaded.block.layers:
        keys, values = numbers(ids, layer.layer_idx)
        assert torch.equal(layer.keys, keys[:256].transpose(0, 1))
        assert torch.equal(layer.values, values[:256].transpose(0, 1))


def test_at_least_the_last_token_is_computed(start):
    """A prompt of whole blocks leaves one of them."""
    engine = start()
    ids = tokens(5, 256)
    engine.run(ids)
    engine.flush()
    assert engine.run(ids) == (0, 192)
    assert engine.run([*ids, 7]) == (192 + 64, 0)


def test_salts_share_nothing(start):
    """A client's salt is in every key."""
    engine = start()
    ids = tokens(6, 300)
    engine.run(ids, cache_salt="one")
    engine.flush()
    assert engine.run(ids) == (0, 0)
    engine.flush()
    assert engine.run(ids, cache_salt="two") == (0, 0)
    engine.flush()
    assert engine.run(ids, cache_salt="one") == (0, 256)


@pytest.mark.parametrize(
    "options",
    [{"multimodal_inputs": object()}, {"lora_id": "x"}, {"extra_key": "x"}, {"input_embeds": [0]}],
    ids=lambda x: next(iter(x)),
)
def test_requests_that_tokens_do_not_tell_are_left_out(start, options):
    """Neither stored nor served."""
    engine = start()
    ids = tokens(7, 200)
    engine.run(ids, **options)
    assert engine.stored(ids) == 0
    engine.flush()
    engine.run(ids)
    assert engine.stored(ids) == 3
    engine.flush()
    assert engine.run(ids, **options) == (0, 0)
    assert engine.linker.counts["skipped_requests"] == 2


def test_a_prompt_alone_is_stored_if_asked(start):
    """`save="prompt"`."""
    engine = start(save="prompt")
    ids = tokens(8, 400)
    engine.run(ids, origin_input_ids=array("q", ids[:250]))
    assert engine.stored(ids) == 3


def test_a_stalled_disk_holds_the_scheduler_once(start, monkeypatch):
    """The first look-up waits as long as it may; others not at all, until the disk is back."""
    engine = start(deadline=0.3)
    ids, other = tokens(9, 300), tokens(10, 300)
    engine.run(ids)
    engine.run(other)
    engine.flush()
    gate = threading.Event()
    store = engine.linker.mover.store
    match = store.match
    monkeypatch.setattr(store, "match", lambda *a, **k: (gate.wait(20), match(*a, **k))[1])
    begun = time.monotonic()
    req = engine.request(ids)
    assert engine.match(req).host_hit_length == 0
    assert time.monotonic() - begun >= 0.3
    begun = time.monotonic()
    late = engine.request(other)
    assert engine.match(late).host_hit_length == 0
    assert time.monotonic() - begun < 0.3
    assert engine.linker.counts["lookups_late"] == 2
    gate.set()
    until = time.monotonic() + 10
    while engine.match(engine.request(ids)).host_hit_length == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.run(ids)[1] == 256


def test_a_queue_that_fills_the_staging_room(start):
    """Who finds none waits not for it: SGLang's scheduler, which would make room, is what waits."""
    engine = start(staging="400KiB", deadline=30)
    prompts = [tokens(seed, 300) for seed in (30, 31)]  # 256 KiB each
    for ids in prompts:
        engine.run(ids)
    engine.flush()
    first, second = (engine.request(ids) for ids in prompts)
    assert engine.match(first).host_hit_length == 256
    begun = time.monotonic()
    assert engine.match(second).host_hit_length == 0
    assert time.monotonic() - begun < 15
    assert engine.linker.stats()["staging_full"] == 1
    assert len(engine.load(first)) == 256
    assert engine.match(second).host_hit_length == 256


def test_what_is_gone_is_not_loaded(start):
    """SGLang computes it: a load that was refused aborts nothing."""
    engine = start()
    ids = tokens(11, 300)
    engine.run(ids)
    engine.flush()
    req = engine.request(ids)
    assert engine.match(req).host_hit_length == 256
    free = engine.allocator.available_size()
    engine.linker.mover.release(req.rid)
    assert len(engine.load(req)) == 0
    assert engine.allocator.available_size() == free
    assert engine.linker.counts["load_refusals"] == 1


def test_a_load_that_fails_is_told(start, monkeypatch):
    """SGLang must never compute with what is not there."""
    engine = start()
    ids = tokens(12, 300)
    engine.run(ids)
    engine.flush()
    req = engine.request(ids)
    assert engine.match(req).host_hit_length == 256

    def broken(layer, *args):
        if layer == 2:
            raise RuntimeError("no such device")

    monkeypatch.setattr(engine.linker.mover.pages, "write_layer", broken)
    assert engine.load(req) is None
    assert engine.linker.stats()["load_errors"] == 1
    monkeypatch.undo()
    engine.flush()
    assert engine.run(ids) == (0, 256)


def test_an_error_within_is_a_miss(start, monkeypatch):
    """Counted, and not raised into the scheduler."""
    engine = start()
    ids = tokens(13, 300)
    engine.run(ids)
    engine.flush()
    monkeypatch.setattr(engine.linker.ledger, "wanted", lambda *a: 1 // 0)
    assert engine.run(ids) == (0, 0)
    assert engine.linker.counts["errors"] == 1


def test_a_look_up_of_which_nothing_was_told_is_a_miss(start):
    """Without token ids there is no key."""
    engine = start()
    transfers = [SimpleNamespace(keys=["a", "b"], device_indices=torch.arange(128))]
    assert engine.linker.lookup("unheard of", transfers) == []
    assert not engine.linker.offload(transfers)
    assert not engine.linker.load("unheard of", transfers)
    assert engine.linker.counts["unknown_requests"] == 2


def test_saves_that_find_no_room_are_tried_again(start, monkeypatch):
    """A dropped save is not taken for stored."""
    engine = start()
    ids = tokens(14, 300)
    monkeypatch.setattr(type(engine.linker.mover.store), "staging_left", 0)
    engine.run(ids)
    assert engine.stored(ids) == 0
    monkeypatch.undo()
    engine.run([*ids, 1])
    assert engine.stored(ids) == 4


def test_new_weights(start):
    """Nothing is served or stored until SGLang has flushed; then only what is new."""
    engine = start()
    ids = tokens(15, 300)
    engine.run(ids)
    engine.linker.weights_change()
    other = tokens(16, 300)
    engine.run(other)
    engine.flush()
    assert engine.run(ids) == (0, 0)
    assert engine.stored(other) == 0
    engine.flush()
    assert engine.run(ids) == (0, 256)


@pytest.mark.parametrize("page", [16, 64])
def test_what_was_computed_from_lossy_blocks_is_never_called_exact(start, page):
    """Also where the device holds part of a lossy block."""
    engine = start(page=page, codec="int8")
    ids = tokens(17, 200)
    engine.run(ids)
    engine.flush()
    req = engine.request(ids)
    assert engine.match(req).host_hit_length == 192
    slots = engine.load(req)
    keys = engine.pool.k_buffer[0][slots]
    assert not torch.equal(keys, numbers(ids, 0)[0][:192])
    fork = ids[: 16 if page == 16 else 64] + tokens(18, 240)
    engine.linker.inserting(req)
    engine.cache.insert(InsertParams(key=RadixKey(array("q", ids[:192])), value=slots))
    engine.linker.inserting(None)
    engine.settle()
    device, loaded = engine.run(fork)
    assert device == (16 if page == 16 else 64)
    assert loaded == 0
    store, spec = engine.linker.mover.store, engine.linker.spec
    stored = store.block_keys(spec, fork)
    assert store.match(spec, stored) == 4 if page == 16 else 3
    first = 0 if page == 16 else 1
    assert store.match(spec, stored[first:], accept=(EXACT,)) == 0


def test_requests_that_end_leave_nothing_behind(start):
    """Staged blocks, tickets and accounts."""
    engine = start()
    ids = tokens(19, 300)
    engine.run(ids)
    engine.flush()
    for _ in range(3):
        req = engine.request(ids)
        assert engine.match(req).host_hit_length == 256
        engine.cache.linker.release_request(req.rid)
    engine.run(ids)
    assert not engine.linker._requests
    assert not engine.linker.ledger.requests
    assert not engine.linker.mover._tickets
    assert engine.linker.mover._reserved == 0


def test_closing(start):
    """Twice; what comes afterwards is a miss."""
    engine = start()
    ids = tokens(20, 300)
    engine.run(ids)
    engine.linker.close()
    engine.linker.close()
    engine.flush()
    assert engine.match(engine.request(ids)).host_hit_length == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tp_size": 2}, "tp_size"),
        ({"pp_size": 2}, "pp_size"),
        ({"speculative_algorithm": "EAGLE"}, "draft"),
    ],
)
def test_what_is_not_served_is_refused_at_the_start(model, tmp_path, change, said):
    """With what to do instead."""
    engine = Engine(model, tmp_path / "store")
    args = SimpleNamespace(model_path=str(model), served_model_name="m", **change)
    with pytest.raises(ConfigError, match=said) as error:
        KvlibLinker(args, engine.cache.cache_init_params, components=set(engine.cache.components))
    assert "KvlibHiCacheStorage" in str(error.value)
    engine.linker.close()


def test_components_and_options_are_checked(model, tmp_path):
    """Hybrid models, misspelt options."""
    engine = Engine(model, tmp_path / "store")
    params = engine.cache.cache_init_params
    args = ServerArgs(model_path=str(model), dtype="float32", device="cpu")
    swa = [SimpleNamespace(name="FULL"), SimpleNamespace(name="SWA")]
    with pytest.raises(ConfigError, match="SWA"):
        KvlibLinker(args, params, components=swa)
    with pytest.raises(ConfigError, match="path"):
        KvlibLinker(args, params, components=set(), extra_config={"pth": "x"})
    half = ServerArgs(model_path=str(model), dtype="float16", device="cpu")
    with pytest.raises(ConfigError, match="float16"):
        KvlibLinker(half, params, components=set())
    engine.linker.close()


def test_versions():
    assert VERSIONS.supports("0.5.23")
    assert VERSIONS.supports("0.5.23+cpu")
    for other in ("0.5.22", "0.5.24", "0.6.0", "1", "odd"):
        assert not VERSIONS.supports(other)


def test_latent_pools():
    """MLA: one vector a token."""
    pool = MLATokenToKVPool(
        size=128, page_size=16, dtype=torch.float32, kv_lora_rank=32, qk_rope_head_dim=8,
        layer_num=3, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    pages = pages_of(pool)
    verify_pool(pool, pages)
    assert not any(layer.any() for layer in pool.kv_buffer)
    slots = torch.tensor([40, 3, 77])
    keys = torch.randn(1, 3, 40)
    pages.write_layer(1, slots, keys, torch.empty(1, 3, 0))
    read = pages.read_layer(1, slots)
    assert torch.equal(read[0], keys)
    assert read[1].shape == (1, 3, 0)
    assert torch.equal(pool.kv_buffer[1][slots], keys[0][:, None])


def test_a_pool_of_another_layout_is_refused(monkeypatch):
    """By name, and by what a pattern shows."""
    pool = MHATokenToKVPool(
        size=128, page_size=16, dtype=torch.float32, head_num=2, head_dim=8, layer_num=2,
        device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    pages = pages_of(pool)
    verify_pool(pool, pages)
    pages._values = list(reversed(pages._values))
    with pytest.raises(ConnectorError, match="pattern"):
        verify_pool(pool, pages)
    monkeypatch.setattr(pool, "kv_cache_layout", "hnd")
    with pytest.raises(ConnectorError, match="hnd"):
        pages_of(pool)
    monkeypatch.setattr(pool, "store_dtype", torch.uint8)
    with pytest.raises(ConnectorError, match="quantized"):
        pages_of(pool)
