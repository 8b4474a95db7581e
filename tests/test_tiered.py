# SPDX-License-Identifier: Apache-2.0
"""Decoding out of a store: exact where everything is read, near it where a part is."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvlib import KVStore, TieredCache
from kvlib.errors import CapacityError, ConfigError, CorruptDataError, UnknownPluginError
from kvlib.store import blockio
from kvlib.store.leaves import LEAF_TOKENS, LeafShape
from kvlib.testing.models import tiny_model
from kvlib.tiered_attention import attend_leaves, attend_part, join
from kvlib.tiered_layers import Newest

TOKENS = 900


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=4)


@pytest.fixture(scope="module")
def ids(model):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator)


@torch.no_grad()
def steps(model, cache, ids, count=24):
    """Logits of the prompt's last token, and of those that are decoded greedily after it."""
    out, token = [], ids[:, -1:]
    for _ in range(count):
        logits = model(input_ids=token, past_key_values=cache).logits[0, -1]
        out.append(logits)
        token = logits.argmax().reshape(1, 1)
    return torch.stack(out)


@torch.no_grad()
def reference(model, ids):
    cache = DynamicCache()
    model(input_ids=ids[:, :-1], past_key_values=cache)
    return steps(model, cache, ids)


def make(model, tmp_path, **options):
    return TieredCache(model, scratch=tmp_path, **({"resident": "400KiB"} | options))


@pytest.mark.parametrize(
    "select", ["full", "percent:resident=0.3", "leoam:budget=1.0", "quest:budget=1.0"]
)
@pytest.mark.parametrize("chunk_tokens", [64, 512])
def test_reading_everything_is_exact(model, ids, tmp_path, select, chunk_tokens):
    cache = make(model, tmp_path, select=select)
    report = cache.prefill(ids, chunk_tokens=chunk_tokens)
    assert (report.restored_tokens, report.computed_tokens) == (0, TOKENS - 1)
    got, want = steps(model, cache, ids), reference(model, ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert cache.num_tokens == TOKENS - 1 + 24
    assert cache.steps == 24


@pytest.mark.parametrize("select", ["leoam:budget=0.2", "quest:budget=0.2", "infllm:budget=0.2"])
def test_memory_stays_within_its_bound(model, ids, tmp_path, select):
    """At every layer of every pass; and a step reads no more than its budget."""
    cache = make(model, tmp_path, select=select, resident="300KiB")
    most = []
    attend = cache.attend
    cache.attend = lambda key, call: (attend(key, call), most.append(cache.nbytes))[0]
    cache.prefill(ids, chunk_tokens=128)
    before = cache.stats()
    steps(model, cache, ids)
    after = cache.stats()
    assert len(most) == 3 * (8 + 24)
    assert max(most) <= cache.resident_bytes
    assert cache.kv_bytes > cache.resident_bytes
    asked = (after.hits + after.ahead + after.fetched) - (
        before.hits + before.ahead + before.fetched
    )
    leaves = -(-cache.num_tokens // LEAF_TOKENS)
    assert asked <= 3 * 24 * (0.2 * leaves + 1) * 2  # what is asked for may count as ahead, too


def test_the_next_layers_query_is_guessed(model, ids, tmp_path):
    """The first layer's guess at the second is not the query, but near; leaves come ahead."""
    cache = make(model, tmp_path, select="leoam:budget=0.3", resident="250KiB", ahead=True)
    cache.prefill(ids)
    guesses, queries = {}, {}
    attend, ask = cache.attend, cache._guess.query

    def remember(layer):
        guesses[layer] = ask(layer)
        return guesses[layer]

    def see(key, call):
        queries[call.module.layer_idx] = call.query[0]
        return attend(key, call)

    cache.attend, cache._guess.query = see, remember
    steps(model, cache, ids, 4)
    assert sorted(guesses) == [1, 2]
    for layer, guess in guesses.items():
        assert guess.shape == queries[layer].shape
        alike = torch.cosine_similarity(guess.flatten(), queries[layer].flatten(), dim=0)
        assert alike > 0.5
    assert cache.stats().ahead > 0
    assert cache._guess.seen is None
    copy.deepcopy(model)(input_ids=ids[:, :8])


def test_what_is_chosen_matters(model, ids, tmp_path):
    """More budget, nearer to the whole."""
    want = reference(model, ids)
    off = []
    for budget in (0.05, 0.3, 1.0):
        cache = make(model, tmp_path, select=f"leoam:budget={budget}")
        cache.prefill(ids)
        off.append(float((steps(model, cache, ids)[0] - want[0]).abs().max()))
    assert off[0] > off[1] > off[2]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_memory_holds_is_attended_to(model, ids, tmp_path, ahead):
    """A step reads little, but leaves out nothing that costs no reading."""
    cache = make(model, tmp_path, select="leoam:budget=16", resident="4MiB", ahead=ahead)
    cache.prefill(ids)
    torch.testing.assert_close(
        steps(model, cache, ids), reference(model, ids), rtol=1e-4, atol=1e-4
    )
    assert cache.stats().fetched == 0


def test_queries_count_as_the_model_scales_them(ids, tmp_path):
    """Abstracts that estimate attention need the scale of the model, which may be its own."""
    model = tiny_model(seed=4)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    cache = make(model, tmp_path, select="infllm:budget=0.3,leaf=32")
    seen, append = [], cache._selection.append

    def watch(layer, keys, queries=None):
        seen.append((layer, queries))
        append(layer, keys, queries)

    cache._selection.append = watch
    cache.prefill(ids[:, :65])
    plain = make(tiny_model(seed=4), tmp_path, select="infllm:budget=0.3,leaf=32")
    first, append = [], plain._selection.append
    plain._selection.append = lambda layer, keys, queries=None: (
        first.append((layer, queries)),
        append(layer, keys, queries),
    )
    plain.prefill(ids[:, :65])
    assert seen[0][0] == first[0][0] == 0
    torch.testing.assert_close(seen[0][1], 3 * first[0][1])


def test_several_tokens_after_the_prompt_are_exact(model, ids, tmp_path):
    cache = make(model, tmp_path, select="leoam:budget=0.1")
    cache.prefill(ids[:, :600])
    with torch.no_grad():
        got = model(input_ids=ids[:, 599:], past_key_values=cache).logits[0]
        want = model(input_ids=ids).logits[0, 599:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_generate(model, ids, tmp_path):
    cache = make(model, tmp_path, select="full")
    cache.prefill(ids)
    options = {"max_new_tokens": 12, "do_sample": False}
    got = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got, model.generate(ids, **options))
    assert os.listdir(tmp_path) == []


def test_a_prompt_is_restored_from_the_store(model, ids, tmp_path):
    """By another cache and another process' store, without computing it again."""
    seen = []
    with KVStore(tmp_path, memory=0) as store:
        cache = TieredCache(model, store=store, model_id="tiny", resident="400KiB", select="full")
        report = cache.prefill(ids, progress=lambda done, total: seen.append((done, total)))
        assert (report.computed_tokens, report.stored_blocks) == (899, 14)
        assert seen == [(512, 899), (899, 899)]
        want = steps(model, cache, ids)
    with KVStore(tmp_path, memory=0) as store:
        cache = TieredCache(model, store=store, model_id="tiny", resident="400KiB", select="full")
        report = cache.prefill(ids)
        assert (report.restored_tokens, report.computed_tokens) == (896, 3)
        torch.testing.assert_close(steps(model, cache, ids), want, rtol=1e-4, atol=1e-4)
        half = TieredCache(
            model, store=store, model_id="tiny", resident="400KiB", select="leoam:budget=1.0"
        )
        other = ids.clone()
        other[:, 300:] = 5
        report = half.prefill(other)
        assert (report.restored_tokens, report.stored_blocks) == (256, 10)


def test_codes_compute_what_they_cannot_restore(model, ids, tmp_path):
    pytest.importorskip("faiss")
    with KVStore(tmp_path, memory=0) as store:
        for _ in range(2):
            cache = TieredCache(
                model,
                store=store,
                model_id="tiny",
                resident="2MiB",
                select="leoam:budget=1.0,codes=4,train=256",
            )
            assert cache.prefill(ids).restored_tokens == 0


def test_a_prompt_is_never_attended_to_in_part(model, ids, tmp_path):
    """Not even where a last piece has one token."""
    cache = make(model, tmp_path, select="leoam:budget=0.05")
    cache.prefill(ids[:, :514])
    assert cache.steps == 0
    whole = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :513], past_key_values=whole)
    for index, newest in enumerate(cache._newest):
        keys, values = newest.all()
        torch.testing.assert_close(keys[:, -1], whole.layers[index].keys[0, :, -1])
        torch.testing.assert_close(values[:, -1], whole.layers[index].values[0, :, -1])


def test_a_choice_may_be_more_than_memory_holds(model, ids, tmp_path):
    cache = make(model, tmp_path, select="leoam:budget=1.0", resident="150KiB")
    cache.prefill(ids)
    assert cache._pool.num_slots < cache._pool.file.count(0)
    torch.testing.assert_close(
        steps(model, cache, ids), reference(model, ids), rtol=1e-4, atol=1e-4
    )


def test_a_failed_restore_ends_the_cache(model, ids, tmp_path, monkeypatch):
    with KVStore(tmp_path, memory=0) as store:
        options = {"store": store, "model_id": "tiny", "resident": "400KiB", "select": "full"}
        TieredCache(model, **options).prefill(ids)
        cache = TieredCache(model, **options)
        pwrite, calls = blockio.pwrite, []

        def fail(*args):
            calls.append(args)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return pwrite(*args)

        monkeypatch.setattr(blockio, "pwrite", fail)
        with pytest.raises(CapacityError):
            cache.prefill(ids)
        with pytest.raises(ConfigError, match="failed"):
            cache.prefill(ids)


@pytest.mark.parametrize("kind", ["Olmo2Config", "StableLmConfig"])
def test_a_guess_never_fails_a_pass(kind, ids, tmp_path):
    """Models whose queries are made in another way."""
    other = tiny_model(kind)
    small = ids % other.config.vocab_size
    cache = make(other, tmp_path, select="leoam:budget=1.0", ahead=True)
    cache.prefill(small[:, :400])
    got, want = steps(other, cache, small[:, :400], 3), reference(other, small[:, :400])[:3]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_damage_is_an_error_and_nothing_else(model, ids, tmp_path):
    """What cannot be computed again must not be replaced by anything."""
    cache = make(model, tmp_path, select="full", resident="300KiB")
    cache.prefill(ids)
    known = cache._pool.file._digests[1]
    known[:] = [digest ^ 1 for digest in known]
    with pytest.raises(CorruptDataError, match="of layer 1 is damaged"):
        steps(model, cache, ids, 1)
    with pytest.raises(ConfigError, match="failed"):
        steps(model, cache, ids, 1)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"resident": "20KiB"}, ConfigError, "too little"),
        ({"select": "leoam:budget=0"}, ConfigError, "budget"),
        ({"select": "best"}, UnknownPluginError, "best"),
        ({"scratch": "/nowhere/at/all"}, ConfigError, "leaves"),
    ],
)
def test_bad_settings(model, tmp_path, options, error, says):
    with pytest.raises(error, match=says):
        make(model, tmp_path, **options) if "scratch" not in options else TieredCache(
            model, **options
        )


def test_wrong_use(model, ids, tmp_path):
    cache = make(model, tmp_path)
    with pytest.raises(ConfigError, match="one sequence"):
        cache.prefill(ids.repeat(2, 1))
    with pytest.raises(ConfigError, match="no tokens"):
        cache.prefill(ids[:, :0])
    with pytest.raises(ConfigError, match="multiple of 64"):
        cache.prefill(ids, chunk_tokens=100)
    with pytest.raises(ConfigError, match="one sequence"), torch.no_grad():
        model(input_ids=ids.repeat(2, 1), past_key_values=cache)
    cache = make(model, tmp_path)
    cache.prefill(ids)
    with pytest.raises(ConfigError, match="empty"):
        cache.prefill(ids)
    for wrong in (
        lambda: cache.crop(1),
        cache.reset,
        lambda: cache.reorder_cache(torch.tensor([0])),
    ):
        with pytest.raises(ConfigError):
            wrong()
    cache.close()


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    tokens=st.integers(1, 5),
    scale=st.floats(0.1, 30),
    seed=st.integers(0, 10**6),
)
def test_parts_join_to_the_whole(cuts, tokens, scale, seed):
    """Against softmax over all keys, in float64."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(cuts) + tokens
    query = torch.randn((2, 3, tokens, 8), generator=generator) * scale
    keys = torch.randn((2, total, 8), generator=generator)
    values = torch.randn((2, total, 6), generator=generator)
    part, at = None, 0
    for cut in cuts:
        part = join(part, attend_part(query, keys[:, at : at + cut], values[:, at : at + cut]))
        at += cut
    got = join(part, attend_part(query, keys[:, at:], values[:, at:], causal=1)).output()
    logits = torch.einsum("hgtd,hnd->hgtn", query.double(), keys.double())
    hidden = torch.arange(total)[None] > at + torch.arange(tokens)[:, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    want = torch.einsum("hgtn,hnd->hgtd", weights, values.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.builds(
        LeafShape,
        st.integers(1, 3),
        st.sampled_from([1, 5, 16, 40]),
        st.sampled_from([1, 6, 32]),
        st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    ),
    group=st.integers(1, 20),
    tokens=st.integers(1, 2),
    count=st.integers(1, 7),
    compiled=st.booleans(),
    scale=st.floats(0.1, 10),
    seed=st.integers(0, 10**6),
)
def test_leaves_are_attended_to_where_they_lie(shape, group, tokens, count, compiled, scale, seed):
    """In any order, compiled or not, against softmax in float64; what is between is not read."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn((shape.heads, count * LEAF_TOKENS, dim), generator=generator).to(shape.dtype)
        for dim in (shape.k_dim, shape.v_dim)
    )
    memory = torch.full((count + 3, shape.slot_bytes), 0xFF, dtype=torch.uint8)  # NaN
    slots = torch.randperm(count + 3, generator=generator)[:count]
    packed = torch.zeros((count, shape.slot_bytes), dtype=torch.uint8)
    shape.pack(keys, values, packed.numpy())
    memory[slots] = packed
    query = torch.randn((shape.heads, group, tokens, shape.k_dim), generator=generator)
    query *= scale / shape.k_dim**0.5
    got = attend_leaves(query, shape, memory, slots, compiled=compiled)
    logits = torch.einsum("hgtd,hnd->hgtn", query.double(), keys.double())
    want = torch.einsum("hgtn,hnd->hgtd", logits.softmax(-1), values.double())
    torch.testing.assert_close(got.output().double(), want, rtol=1e-4, atol=1e-5)
    whole = got.largest.double() + got.total.double().log()
    torch.testing.assert_close(whole, logits.logsumexp(-1), rtol=1e-5, atol=1e-4)


def test_the_newest_tokens_count_as_what_they_take():
    newest = Newest(LeafShape(2, 4, 6, torch.float32))
    for count, dropped in ((1, 0), (40, 16), (200, 192), (3, 0)):
        newest.append(torch.ones(2, count, 4), torch.ones(2, count, 6))
        newest.drop(dropped)
        assert newest.nbytes == sum(x.untyped_storage().nbytes() for x in newest.all())
