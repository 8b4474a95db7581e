# SPDX-License-Identifier: Apache-2.0
"""Abstracts of a restored prompt: the store's where it has them, made of the keys where not."""

import pytest
import torch

from kvlib import KVStore, TieredCache
from kvlib.artefacts import model_identity
from kvlib.calibration import calibrate
from kvlib.errors import ConfigError
from kvlib.model_spec import spec_for_model
from kvlib.store.abstracts import Boxes
from kvlib.store.selecting import SELECTORS
from kvlib.testing.models import tiny_model

TOKENS = 700
WHOLE = 640  # the last token is left to `generate`, and 59 are no block


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4)


@pytest.fixture(scope="module")
def ids(model):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator)


@pytest.fixture(scope="module")
def profile(model, tmp_path_factory):
    pytest.importorskip("faiss")
    file = tmp_path_factory.mktemp("profile") / "tiny.abs"
    calibrate("abstracts", model, None, "tiny", file, codes=4, tokens=300, samples=600)
    return file


def cache_of(model, store, select="leoam:budget=0.2"):
    return TieredCache(model, store=store, model_id="tiny", resident="1MiB", select=select)


def rows(cache):
    """The abstracts of all layers, as bytes."""
    return [cache._selection.take(i, 0, WHOLE) for i in range(cache.spec.num_layers)]


@torch.no_grad()
def steps(model, cache, ids, count=6):
    """Logits of the last token and some after it."""
    out, token = [], ids[:, -1:]
    for _ in range(count):
        out.append(model(input_ids=token, past_key_values=cache).logits[0, -1])
        token = out[-1].argmax().reshape(1, 1)
    return torch.stack(out)


def method(name, profile):
    return name.replace("PROFILE", str(profile)) + ("," if ":" in name else ":") + "budget=0.2"


METHODS = ["leoam", "quest:dtype=bfloat16", "leoam:leaf=32", "leoam:codes=4,profile=PROFILE"]


@pytest.mark.parametrize("tier", ["memory", "file", "segment"])
@pytest.mark.parametrize("name", METHODS)
def test_restored_abstracts_are_the_same(model, ids, tmp_path, profile, name, tier):
    """Computed, restored with the store's, restored without: the same bytes, the same steps."""
    options = {"memory": "16MiB"} if tier == "memory" else {"memory": 0, "tier": tier}
    select = method(name, profile)
    with KVStore(None if tier == "memory" else tmp_path / "kv", **options) as store:
        first = cache_of(model, store, select)
        report = first.prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (0, 0)
        assert report.stored_blocks == WHOLE // 64
        second = cache_of(model, store, select)
        report = second.prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, WHOLE)
        plain = cache_of(model, store, select)
        plain._prompts._form = None
        report = plain.prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, 0)
        want = rows(first)
        for cache in (second, plain):
            assert all(torch.equal(x, y) for x, y in zip(rows(cache), want, strict=True))
        assert torch.equal(steps(model, second, ids), steps(model, plain, ids))


def test_the_boxes_are_those_of_the_keys(model, ids, tmp_path):
    """Of the keys that transformers itself caches."""
    with KVStore(tmp_path / "kv", memory=0) as store:
        cache_of(model, store).prefill(ids)
        cache = cache_of(model, store)
        assert cache.prefill(ids).abstract_tokens == WHOLE
        keys = store.block_keys(cache.spec, ids[0])
        loaded = store.load(cache.spec, keys)
    for layer, found in zip(loaded.block.layers, rows(cache), strict=True):
        boxes = Boxes(*layer.keys.shape[::2])
        boxes.append(layer.keys)
        assert torch.equal(boxes.take(0, WHOLE // 16), found)


def test_codes_with_a_profile_are_restored(model, ids, tmp_path, profile):
    """They need no queries; codes of the sequence's own still do."""
    own = "leoam:codes=4,train=256,budget=0.2"
    given = method("leoam:codes=4,profile=PROFILE", profile)
    assert SELECTORS.build(own).needs_queries
    assert not SELECTORS.build(given).needs_queries
    with KVStore(tmp_path / "kv", memory=0) as store:
        cache_of(model, store, own).prefill(ids)
        assert cache_of(model, store, own).prefill(ids).restored_tokens == 0
        report = cache_of(model, store, given).prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, 0)
        report = cache_of(model, store, given).prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, WHOLE)


def test_codebooks_are_shared(model, tmp_path, profile):
    """Two methods of one file hold its memory once."""
    select = f"leoam:codes=4,profile={profile}"
    one, two = SELECTORS.build(select), SELECTORS.build(select)
    assert one == two
    for a, b in zip(one._books, two._books, strict=True):
        assert a.centroids.data_ptr() == b.centroids.data_ptr()
        assert a.into.data_ptr() == b.into.data_ptr()


def test_blocks_that_others_stored_get_theirs(model, ids, tmp_path):
    """At the first restore, unless nothing shall be stored; what is missing is made of the keys."""
    with KVStore(tmp_path / "kv", memory=0) as store:
        cache_of(model, store, "full").prefill(ids)
        assert store.stats().tiers["segment"].puts == 4
        assert cache_of(model, store).prefill(ids, save=False).abstract_tokens == 0
        assert cache_of(model, store).prefill(ids).abstract_tokens == 0
        assert cache_of(model, store).prefill(ids).abstract_tokens == WHOLE
        assert cache_of(model, store, "leoam:dtype=float32").prefill(ids).abstract_tokens == 0


def test_lost_abstracts_are_made_again(model, ids, tmp_path):
    """Of one record of several: the others are taken, and the lost ones stored anew."""
    with KVStore(tmp_path / "kv", memory=0, tier="file") as store:
        cache = cache_of(model, store)
        cache.prefill(ids)
        want = rows(cache)
        keys = store.block_keys(cache.spec, ids[0])
        files = {f.stat().st_size: f for f in (tmp_path / "kv").glob(f"*/{keys[4].hex()}*")}
        abstracts = files[min(files)]
        data = bytearray(abstracts.read_bytes())
        data[-100] ^= 1
        abstracts.write_bytes(data)
        cache = cache_of(model, store)
        report = cache.prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, WHOLE - 256)
        assert store.stats().tiers["file"].corrupt == 1
        assert all(torch.equal(x, y) for x, y in zip(rows(cache), want, strict=True))
        assert cache_of(model, store).prefill(ids).abstract_tokens == WHOLE


def test_a_prompt_that_shares_a_part_of_a_record(model, ids, tmp_path):
    """Abstracts of what is shared, of a record that holds more."""
    other = ids.clone()
    other[:, 390:] = 5
    with KVStore(tmp_path / "kv", memory=0) as store:
        cache_of(model, store).prefill(ids)
        report = cache_of(model, store).prefill(other)
        assert (report.restored_tokens, report.abstract_tokens) == (384, 384)
        report = cache_of(model, store).prefill(other)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, WHOLE)


def test_behind_a_lossy_codec_they_are_of_decoded_keys(model, ids, tmp_path):
    """Written when the blocks are first restored, so that a lost one changes no choice."""
    with KVStore(tmp_path / "kv", memory=0, codec="int4:group=8") as store:
        computed = cache_of(model, store)
        computed.prefill(ids)
        made = cache_of(model, store)
        assert made.prefill(ids).abstract_tokens == 0
        taken = cache_of(model, store)
        assert taken.prefill(ids).abstract_tokens == WHOLE
        pairs = list(zip(rows(made), rows(taken), strict=True))
        assert all(torch.equal(x, y) for x, y in pairs)
        assert not all(torch.equal(x, y) for x, y in zip(rows(computed), rows(taken), strict=True))


def test_two_codecs_have_abstracts_of_their_own(model, ids, tmp_path):
    """Those of exact keys never stand for decoded ones, and the other way round."""
    options = {"memory": "16MiB", "memory_codec": "exact", "codec": "int4:group=8"}
    with KVStore(tmp_path / "kv", **options) as store:
        computed = cache_of(model, store)
        computed.prefill(ids)
        exact = cache_of(model, store)
        assert exact.prefill(ids).abstract_tokens == WHOLE
        assert all(torch.equal(x, y) for x, y in zip(rows(computed), rows(exact), strict=True))
    with KVStore(tmp_path / "kv", **options) as store:  # memory is empty, the disk has int4
        made = cache_of(model, store)
        report = made.prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, 0)
        taken = cache_of(model, store)
        assert taken.prefill(ids).abstract_tokens == WHOLE
        loaded = store.load(taken.spec, store.block_keys(taken.spec, ids[0]))
    for layer, x, y in zip(loaded.block.layers, rows(made), rows(taken), strict=True):
        boxes = Boxes(*layer.keys.shape[::2])
        boxes.append(layer.keys)
        assert torch.equal(x, boxes.take(0, WHOLE // 16))
        assert torch.equal(y, x)


def test_second_touch_waits_with_them_too(model, ids, tmp_path):
    """What was wanted once is in memory alone."""
    with KVStore(tmp_path / "kv", memory="16MiB", admission="second-touch") as store:
        cache_of(model, store).prefill(ids)
        assert store.stats().tiers["segment"].puts == 0
        assert cache_of(model, store).prefill(ids).abstract_tokens == WHOLE


def test_a_store_without_room_gets_neither(model, ids):
    """Blocks that found no room leave none of their abstracts behind."""
    with KVStore(memory="20KiB") as store:
        report = cache_of(model, store).prefill(ids)
        assert report.stored_blocks == 0
        assert store.stats().tiers["memory"].puts == 0


def test_computed_after_a_lossy_prefix_has_none(model, ids, tmp_path):
    """What such blocks went through has no name that could tell them apart."""
    with KVStore(tmp_path / "kv", memory=0, codec="int4:group=8") as store:
        cache_of(model, store).prefill(ids[:, :257])
        cache_of(model, store).prefill(ids)
        report = cache_of(model, store).prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, 256)
        report = cache_of(model, store).prefill(ids)
        assert (report.restored_tokens, report.abstract_tokens) == (WHOLE, 256)


def test_another_models_profile_is_refused(tmp_path, profile):
    """By name, and by its layers where nobody says what the model is."""
    other = tiny_model(seed=5)
    with pytest.raises(ConfigError, match=r"was measured on model .* kvlib calibrate abstracts"):
        TieredCache(
            other, model_id="other", resident="1MiB", select=f"leoam:codes=4,profile={profile}"
        )
    selector = SELECTORS.build(f"leoam:codes=4,profile={profile}")
    selector.check_model(model_identity(spec_for_model(other, model_id="tiny")))
