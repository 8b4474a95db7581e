# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import weakref

import pytest
import torch

import kvlib
from kvlib.codecs import build_codec
from kvlib.codecs.container import Container, SectionKind
from kvlib.codecs.header import WHOLE_BLOCK
from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError, ShapeError
from kvlib.snapshots import Snapshot
from kvlib.store.file_record import END_BYTES
from kvlib.store.snapshots import decode_snapshot, encode_snapshot
from kvlib.testing.models import tiny_model

METHODS = (
    "full",
    "streaming:budget=0.25",
    "snapkv:budget=0.25,window=8",
    "h2o:budget=0.25",
    "h2o:budget=1000",
)
MODELS = {
    "llama": ("LlamaConfig", {}),
    "hybrid": ("Gemma3TextConfig", {"sliding_window": 16, "num_hidden_layers": 7}),
}


@pytest.fixture(params=MODELS)
def model(request):
    name, changes = MODELS[request.param]
    return tiny_model(name, **changes)


def ids(num: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 199, (batch, num), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def filled(model, method: str, *, steps: int = 5) -> kvlib.KVCache:
    """A cache after a prompt of 60 tokens and some steps."""
    cache = kvlib.KVCache(model, method, model_id="tiny")
    model(input_ids=ids(60), past_key_values=cache)
    for token in ids(steps, seed=1)[0]:
        model(input_ids=token[None, None], past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(model, cache: kvlib.KVCache) -> torch.Tensor:
    """Logits of three more steps and a question of four tokens."""
    out = [
        model(input_ids=t[None, None], past_key_values=cache).logits[0] for t in ids(3, seed=2)[0]
    ]
    out.append(model(input_ids=ids(4, seed=3), past_key_values=cache).logits[0])
    return torch.cat(out)


def same_contents(a: kvlib.KVCache, b: kvlib.KVCache) -> None:
    """Same entries, bits and policy state in every layer that a policy sees."""
    for index, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)):
        if x.is_sliding:
            assert torch.equal(x.keys, y.keys)
            assert torch.equal(x.values, y.values)
            continue
        assert a.layer_kv(index).equal(b.layer_kv(index))
        mine, theirs = ((c.rows[0].state if c.rows else c.states[0]) for c in (x, y))
        for left, right in ((mine.entries, theirs.entries), (mine.values, theirs.values)):
            assert left.keys() == right.keys()
            for name in left:
                assert torch.equal(left[name], right[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_restored_cache_goes_on_as_if_nothing_had_happened(model, method):
    """Same logits, same later plans, same state, and the original is not touched."""
    cache = filled(model, method)
    snapshot = cache.to_snapshot()
    restored = kvlib.KVCache.from_snapshot(model, snapshot, model_id="tiny")
    same_contents(cache, restored)
    assert restored.num_columns == cache.num_columns == 65
    expected = go_on(model, cache)
    assert torch.equal(go_on(model, restored), expected)
    same_contents(cache, restored)
    again = kvlib.KVCache.from_snapshot(model, snapshot, model_id="tiny")
    assert torch.equal(go_on(model, again), expected)


@pytest.mark.parametrize("method", METHODS)
def test_through_the_store(model, method, tmp_path):
    """Stored by one object and loaded by another, from disk; exact in every bit."""
    cache = filled(model, method)
    tokens = torch.cat([ids(60), ids(5, seed=1)], dim=1)
    with kvlib.KVStore(tmp_path, memory=0, tier="file") as store:
        size = cache.save(store, tokens)
    (file,) = tmp_path.rglob("*.kvlc")
    assert size == file.stat().st_size - END_BYTES
    with kvlib.KVStore(tmp_path, memory=0) as store:
        found = kvlib.KVCache.load(model, store, tokens[0], method, model_id="tiny")
        same_contents(cache, found)
        assert torch.equal(go_on(model, cache), go_on(model, found))
        load = kvlib.KVCache.load
        assert load(model, store, tokens[0, :-1], method, model_id="tiny") is None
        assert load(model, store, tokens, "h2o:budget=0.75", model_id="tiny") is None
        assert load(model, store, tokens, method, model_id="other") is None
        assert load(model, store, tokens, method, codec="int8", model_id="tiny") is None
        keys = store.block_keys(cache.spec, tokens[0])
        assert store.match(cache.spec, keys) == 0, "a snapshot answered a prefix"
    with kvlib.KVStore(tmp_path, memory=0, salt="another tenant") as store:
        assert kvlib.KVCache.load(model, store, tokens, method, model_id="tiny") is None


@pytest.mark.parametrize("codec", ["exact", "int8", "int4:group=4"])
def test_through_every_codec(codec):
    """Positions and state are exact through any codec; keys are within its error."""
    model = tiny_model()
    cache = filled(model, f"h2o:budget=0.25 | {codec}")
    with kvlib.KVStore() as store:
        cache.save(store, torch.cat([ids(60), ids(5, seed=1)], dim=1))
        tokens = torch.cat([ids(60), ids(5, seed=1)], dim=1)
        found = kvlib.KVCache.load(
            model, store, tokens, f"h2o:budget=0.25 | {codec}", model_id="tiny"
        )
    for index, layer in enumerate(cache.layers):
        mine, theirs = cache.layer_kv(index), found.layer_kv(index)
        assert torch.equal(mine.positions, theirs.positions)
        assert torch.equal(
            layer.rows[0].state.entries["scores"],
            found.layers[index].rows[0].state.entries["scores"],
        )
        bits = {"exact": 99, "int8": 8, "int4:group=4": 4}[codec]
        spread = (mine.keys.amax() - mine.keys.amin()).item()
        assert (mine.keys - theirs.keys).abs().max().item() <= spread / (2**bits - 1)
    go_on(model, found)


def test_a_sequence_of_a_padded_batch_becomes_a_cache_of_its_own():
    """The snapshot of a row equals that of a separate run, without its padding."""
    model = tiny_model()
    tokens = ids(40, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for method in METHODS:
        cache = kvlib.KVCache(model, method, model_id="tiny")
        with torch.no_grad():
            model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        with pytest.raises(ConfigError, match="which of the 2 sequences"):
            cache.to_snapshot()
        restored = kvlib.KVCache.from_snapshot(model, cache.to_snapshot(0), model_id="tiny")
        alone = kvlib.KVCache(model, method, model_id="tiny")
        with torch.no_grad():
            model(tokens[:1, 9:], past_key_values=alone)
        for index in range(3):
            mine, theirs = restored.layer_kv(index), alone.layer_kv(index)
            assert torch.equal(mine.positions_tensor(), theirs.positions_tensor())
            assert (mine.keys - theirs.keys).abs().max() < 1e-5
        assert (go_on(model, restored) - go_on(model, alone)).abs().max() < 1e-5


def test_what_has_no_snapshot_says_so():
    """Empty caches, half prompts, unknown weights, foreign models, positions off by padding."""
    model = tiny_model()
    with pytest.raises(ConfigError, match="complete prompt"):
        kvlib.KVCache(model, model_id="tiny").to_snapshot()
    half = kvlib.KVCache(model, prefill_chunk_size=8, model_id="tiny")
    with torch.no_grad():
        model(ids(8), past_key_values=half)
    with pytest.raises(ConfigError, match="end_prefill"):
        half.to_snapshot()
    half.end_prefill()
    snapshot = half.to_snapshot()
    nameless = kvlib.KVCache(model)
    with torch.no_grad():
        model(ids(8), past_key_values=nameless)
    with pytest.raises(ConfigError, match="model_id"):
        nameless.to_snapshot()
    with pytest.raises(ConfigError, match=r"user:tiny.*user:other"):
        kvlib.KVCache.from_snapshot(model, snapshot, model_id="other")
    padded = kvlib.KVCache(model, model_id="tiny")
    with torch.no_grad():
        mask = torch.ones(1, 8, dtype=torch.int64)
        mask[0, :2] = 0
        model(ids(8), attention_mask=mask, past_key_values=padded)
    with pytest.raises(ConfigError, match="position_ids"):
        padded.to_snapshot()
    with kvlib.KVStore() as store, pytest.raises(ShapeError, match=r"9 tokens.* of 8"):
        half.save(store, ids(9))


def test_a_damaged_record_is_a_miss(tmp_path):
    """Every flipped byte of a stored snapshot makes it a counted miss, never another cache."""
    model = tiny_model(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    cache = filled(model, "h2o:budget=4", steps=1)
    tokens = torch.cat([ids(60), ids(1, seed=1)], dim=1)
    record = b"".join(encode_snapshot(cache.to_snapshot(), build_codec("exact")))
    spec = cache.spec
    for at in range(len(record)):
        broken = bytearray(record)
        broken[at] ^= 1 << (at % 8)
        with pytest.raises((CorruptDataError, IncompatibleDataError)):
            decode_snapshot(broken, spec, cache.method)
    for size in (0, 1, len(record) // 2, len(record) - 1):
        with pytest.raises(CorruptDataError):
            decode_snapshot(record[:size], spec, cache.method)
    with kvlib.KVStore(tmp_path, memory=0, tier="file") as store:
        cache.save(store, tokens)
        (file,) = tmp_path.rglob("*.kvlc")
        data = bytearray(file.read_bytes())
        data[-20] ^= 4
        file.write_bytes(data)
        assert kvlib.KVCache.load(model, store, tokens, "h2o:budget=4", model_id="tiny") is None
        assert store.stats().tiers["file"].corrupt == 1


def test_a_prefix_record_is_no_snapshot():
    """A container without policy state, or with a state that does not fit, is refused."""
    model = tiny_model()
    cache = filled(model, "h2o:budget=0.25")
    snapshot = cache.to_snapshot()
    codec = build_codec("exact")
    from kvlib.codecs.pack import encode_block

    bare = b"".join(encode_block(snapshot.block, codec))
    with pytest.raises(CorruptDataError, match="no state section"):
        decode_snapshot(bare, cache.spec, cache.method)
    container = Container(b"".join(encode_snapshot(snapshot, codec)))
    assert container.find(SectionKind.STATE, WHOLE_BLOCK) is not None

    def changed(**state):
        return Snapshot(method=cache.method, block=snapshot.block, state=snapshot.state | state)

    with pytest.raises(CorruptDataError, match="prompt"):
        kvlib.KVCache.from_snapshot(model, changed(prompt=torch.tensor(66)), model_id="tiny")
    with pytest.raises(IncompatibleDataError, match="version"):
        kvlib.KVCache.from_snapshot(model, changed(version=torch.tensor(2)), model_id="tiny")
    wrong = {"00000/entries/scores": torch.zeros(2, 3)}
    with pytest.raises(CorruptDataError, match="scores"):
        kvlib.KVCache.from_snapshot(model, changed(**wrong), model_id="tiny")


def test_a_snapshot_of_another_version_is_a_miss(monkeypatch):
    """`load` says None, as for anything that cannot be used; the prompt is then run again."""
    from kvlib.eviction.h2o import H2O

    model = tiny_model()
    cache = filled(model, "h2o:budget=0.25")
    tokens = torch.cat([ids(60), ids(5, seed=1)], dim=1)
    with kvlib.KVStore() as store:
        cache.save(store, tokens)
        load = kvlib.KVCache.load
        assert load(model, store, tokens, "h2o:budget=0.25", model_id="tiny") is not None
        monkeypatch.setattr(H2O, "version", 2)
        assert load(model, store, tokens, "h2o:budget=0.25", model_id="tiny") is None


def test_bytes_of_a_snapshot_are_those_of_its_tensors():
    """nbytes counts the block and the state."""
    snapshot = filled(tiny_model(), "h2o:budget=0.25").to_snapshot()
    state = sum(x.numel() * x.element_size() for x in snapshot.state.values())
    assert snapshot.nbytes == snapshot.block.nbytes + state
    assert state > 3 * 2 * 15 * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copier", ["fork", "deepcopy"])
def test_a_fork_goes_on_by_itself(model, method, copier):
    """A fork and its origin give the same logits, in any order, and share nothing that changes."""
    cache = filled(model, method)
    twin = cache.fork() if copier == "fork" else copy.deepcopy(cache)
    expected = go_on(model, cache)
    assert torch.equal(go_on(model, twin), expected)
    same_contents(cache, twin)
    assert twin.nbytes <= 1.1 * cache.nbytes


def test_a_fork_in_the_middle_of_a_prompt():
    """Signals of the pieces so far go along."""
    model = tiny_model()
    for method in METHODS:
        cache = kvlib.KVCache(model, method, prefill_chunk_size=20, model_id="tiny")
        with torch.no_grad():
            model(ids(60)[:, :20], past_key_values=cache)
            caches = cache, cache.fork()
            logits = []
            for each in caches:
                for first in (20, 40):
                    model(ids(60)[:, first : first + 20], past_key_values=each)
                each.end_prefill()
                logits.append(go_on(model, each))
        assert torch.equal(*logits)
        same_contents(*caches)


def test_a_dropped_cache_is_freed_at_once():
    """No reference cycle keeps it until the garbage collector runs."""
    gc.disable()
    try:
        cache = filled(tiny_model(), "h2o:budget=0.25")
        alive = weakref.ref(cache), weakref.ref(cache.layer_kv(0).keys.untyped_storage())
        del cache
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()
