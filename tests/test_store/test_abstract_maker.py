# SPDX-License-Identifier: Apache-2.0
"""`KVStore(abstracts=...)`: whoever puts blocks, their abstracts lie beside them."""

import pytest
import torch
from transformers import DynamicCache

from kvlib import KVStore, PrefixCache, TieredCache
from kvlib.calibration import calibrate
from kvlib.connectors.config import ConnectorConfig
from kvlib.errors import ConfigError
from kvlib.spec import KVSpec, LayerKind, LayerSpec
from kvlib.store.abstract_maker import AbstractMaker
from kvlib.store.abstracts import Boxes
from kvlib.testing.models import random_block, tiny_model, tiny_spec

SPEC = tiny_spec()
BOXES = Boxes.form("int8", 16)
TOKENS = 6 * 64


def keys_of(store, spec=SPEC, tokens=TOKENS):
    return store.block_keys(spec, torch.arange(tokens))


def boxes_of(block):
    """Of every layer, from all of its keys at once."""
    rows = []
    for layer in block.layers:
        boxes = Boxes(*layer.keys.shape[::2])
        boxes.append(layer.keys)
        rows.append(boxes.take(0, len(boxes)))
    return rows


def same(found, rows):
    return all(torch.equal(x, y) for x, y in zip(found.layers, rows, strict=True))


@pytest.mark.parametrize("tier", ["memory", "file", "segment"])
@pytest.mark.parametrize("background", [False, True])
def test_every_put_writes_them(tmp_path, tier, background):
    """In pieces, put twice, in the background: those of the keys, and read after a restart."""
    block = random_block(SPEC, TOKENS)
    options = (
        {"memory": "8MiB"} if tier == "memory" else {"path": tmp_path, "memory": 0, "tier": tier}
    )
    with KVStore(abstracts="leoam", **options) as store:
        keys = keys_of(store)
        for start, stop in ((0, 320), (320, TOKENS), (0, 320)):
            piece = block.slice(start, stop)
            if background:
                store.put_async(SPEC, keys, piece).result(30)
            else:
                store.put(SPEC, keys, piece)
        found = store.load_abstracts(SPEC, keys, BOXES)
        assert found.num_tokens == TOKENS
        assert same(found, boxes_of(block))
    if tier != "memory":
        with KVStore(**options) as store:
            assert same(store.load_abstracts(SPEC, keys, BOXES), boxes_of(block))


def test_they_are_not_made_again(monkeypatch):
    """Of blocks that have theirs, nothing is computed."""
    made = []
    make = AbstractMaker.make

    def counted(self, spec, block):
        made.append(block.start)
        return make(self, spec, block)

    monkeypatch.setattr(AbstractMaker, "make", counted)
    block = random_block(SPEC, TOKENS)
    with KVStore(abstracts="leoam", memory="8MiB") as store:
        keys = keys_of(store)
        for _ in range(3):
            store.put(SPEC, keys, block)
    assert made == [0]


def test_a_cache_of_tiers_takes_what_a_prefix_cache_stored(tmp_path):
    model = tiny_model(seed=4)
    ids = torch.randint(0, model.config.vocab_size, (1, 300))
    with KVStore(tmp_path, memory=0, abstracts="leoam") as store:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
        PrefixCache(model, store, model_id="tiny").save(ids, cache)
        tiered = TieredCache(model, store=store, model_id="tiny", resident="1MiB", select="leoam")
        report = tiered.prefill(ids)
        assert report.restored_tokens == report.abstract_tokens == 256


@pytest.mark.parametrize(("codec", "memory_codec"), [("int8", None), ("int8", "exact")])
def test_only_of_keys_that_come_back_as_they_are(tmp_path, codec, memory_codec):
    """A lossy codec has none; beside a lossless one in memory, that one's."""
    block = random_block(SPEC, TOKENS)
    options = {"memory": "8MiB" if memory_codec else 0, "codec": codec}
    if memory_codec:
        options["memory_codec"] = memory_codec
    with KVStore(tmp_path, abstracts="leoam", **options) as store:
        keys = keys_of(store)
        store.put(SPEC, keys, block)
        found = store.load_abstracts(SPEC, keys, BOXES)
        assert (found is not None) == bool(memory_codec)
        if found is not None:
            assert same(found, boxes_of(block))


def test_not_behind_a_lossy_prefix():
    block = random_block(SPEC, TOKENS)
    with KVStore(abstracts="leoam", memory="8MiB") as store:
        keys = keys_of(store)
        store.put(SPEC, keys, block, fidelity="int8@1:group=64")
        for fidelity in ("exact", "int8@1:group=64"):
            assert store.load_abstracts(SPEC, keys, BOXES, fidelity=fidelity) is None


def test_models_without_a_cache_of_tiers_are_stored_as_ever():
    """Layers of different shape, or a window: no abstracts, and no error."""
    plain = LayerSpec(num_kv_heads=2, k_head_dim=8, v_head_dim=8)
    wide = LayerSpec(num_kv_heads=1, k_head_dim=8, v_head_dim=8)
    window = LayerSpec(
        num_kv_heads=2, k_head_dim=8, v_head_dim=8, kind=LayerKind.SLIDING, window=4096
    )
    for layers in ((plain, wide), (window, window)):
        spec = KVSpec(model_id="user:m", layers=layers, dtype="float32")
        with KVStore(abstracts="leoam", memory="8MiB") as store:
            keys = keys_of(store, spec)
            assert store.put(spec, keys, random_block(spec, TOKENS)).stored_blocks == 6
            assert store.load_abstracts(spec, keys, BOXES) is None


@pytest.mark.parametrize("method", ["full", "infllm", "leoam:codes=8", "leoam:leaf=128"])
def test_methods_that_need_more_than_a_block(method):
    with pytest.raises(ConfigError, match="alone"):
        KVStore(abstracts=method)


def test_ranks_have_none():
    with pytest.raises(ConfigError, match="head_range"):
        KVStore(abstracts="leoam", head_range=(0, 1))


def test_codes_want_the_profiles_model(tmp_path):
    pytest.importorskip("faiss")
    model = tiny_model(seed=4)
    file = tmp_path / "tiny.abs"
    calibrate("abstracts", model, None, "tiny", file, codes=4, tokens=300, samples=600)
    with (
        KVStore(abstracts=f"leoam:codes=4,profile={file}", memory="8MiB") as store,
        pytest.raises(ConfigError, match="model"),
    ):
        store.put(SPEC, keys_of(store), random_block(SPEC, TOKENS))


def test_the_option_of_connectors():
    with ConnectorConfig.parse({"memory": "8MiB", "abstracts": "leoam"}).open_store() as store:
        keys = keys_of(store)
        store.put(SPEC, keys, random_block(SPEC, TOKENS))
        assert store.load_abstracts(SPEC, keys, BOXES).num_tokens == TOKENS
    with pytest.raises(ConfigError, match="abstracts"):
        ConnectorConfig.parse({"abstracts": 8})
