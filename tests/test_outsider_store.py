# SPDX-License-Identifier: Apache-2.0
"""What engines store through kvlib, read back from the files by a reader that shares no code.

The engine is simulated: ledger, mover and pages are those of the adapters.
"""

import importlib.util
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib import KVStore
from kvlib.blocks import KVBlock
from kvlib.connectors.chunks import ChunkStore
from kvlib.connectors.identity import rank_heads, request_salt
from kvlib.connectors.layouts import LAYOUTS, Pages
from kvlib.connectors.ledger import Ledger
from kvlib.connectors.mover import Mover
from kvlib.keys import block_keys, root_key
from kvlib.spec import KVSpec, LayerKind, LayerSpec
from kvlib.store.files import FileStore
from kvlib.store.heads import local_spec
from kvlib.store.records import groups_to_write
from kvlib.store.rules import Rules
from kvlib.store.segments import SegmentStore
from kvlib.testing.models import random_block
from kvlib.testing.records import make_record
from kvlib.testing.strategies import specs

FOLDER = Path(__file__).resolve().parent / "golden"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
LAYER = LayerSpec(num_kv_heads=4, k_head_dim=8, v_head_dim=8)
SPEC = KVSpec(model_id="user:m", layers=(LAYER, LAYER), dtype="bfloat16")
MIXED = replace(SPEC, layers=(LAYER, replace(LAYER, num_kv_heads=2)))
PAGE_TOKENS = 32
MAC_KEY = bytes(range(40))


def load(name: str) -> ModuleType:
    """A script of tests/golden as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


outsider = load("outsider")
reader = load("outsider_store")


def plain_spec(spec: KVSpec) -> dict:
    """A spec as plain data, in the names of block.md's tables."""
    names = ("model_id", "adapter", "weight_quantization", "dtype", "kv_scales")
    sizes = ("num_kv_heads", "k_head_dim", "v_head_dim", "window")
    ropes = ("kind", "theta", "rotary_dim", "interleaved", "params", "first_channel")
    layers = [
        {
            "kind": str(layer.kind),
            **{name: getattr(layer, name) for name in sizes},
            "rope": layer.rope and {name: getattr(layer.rope, name) for name in ropes},
        }
        for layer in spec.layers
    ]
    plain = {name: getattr(spec, name) for name in names}
    return {**plain, "rope_state": str(spec.rope_state), "layers": layers}


def share(whole: KVBlock, spec: KVSpec, head_range: tuple[int, int] | None) -> KVBlock:
    """The heads of a rank, dealt out in order."""
    most = max(layer.num_kv_heads for layer in spec.layers)
    first = 0 if head_range is None else head_range[0]
    held = [layer.num_kv_heads for layer in local_spec(spec, head_range).layers]
    pairs = []
    for x, mine in zip(whole.layers, held, strict=True):
        at = first * x.num_kv_heads // most
        pairs.append((x.keys[at : at + mine], x.values[at : at + mine]))
    return KVBlock.dense(spec, pairs, start=whole.start)


def as_bytes(x: torch.Tensor) -> np.ndarray:
    """[Hkv, T, D] as [Hkv, T, bytes]."""
    return x.contiguous().view(torch.uint8).numpy()


def same(layers: dict, block: KVBlock, blocks: int) -> bool:
    """Whether the outsider's layers are the block's first `blocks`, bit for bit."""
    want = {(x.layer_idx, "keys"): x.keys for x in block.layers}
    want |= {(x.layer_idx, "values"): x.values for x in block.layers}
    return layers.keys() == want.keys() and all(
        np.array_equal(layers[name], as_bytes(x[:, : 64 * blocks])) for name, x in want.items()
    )


class Engine:
    """One rank of an engine whose pages hold a whole prompt's numbers, in scrambled order."""

    def __init__(
        self, store: KVStore, spec: KVSpec, salt: str, tokens: int, *, lossless: bool = True
    ) -> None:
        pages = -(-tokens // PAGE_TOKENS)
        local = local_spec(spec, store.head_range)
        views = [
            torch.zeros(
                (pages, x.num_kv_heads, PAGE_TOKENS, 2 * x.k_head_dim), dtype=torch.bfloat16
            )
            for x in local.layers
        ]
        self.order = random.Random(tokens).sample(range(pages), pages)
        self.pages = Pages(views, LAYOUTS["cpu-vec"])
        self.mover = Mover(store, spec, self.pages, staging=1 << 24)
        self.ledger = Ledger(spec, PAGE_TOKENS, salt=salt, lossless=lossless)
        self.lossy_text = store.codec_text

    def fill(self, block: KVBlock) -> None:
        """Put what the model computed into the pages."""
        ids = torch.tensor(self.order)
        room = len(self.order) * PAGE_TOKENS
        for x in block.layers:
            pad = (0, 0, 0, room - x.keys.shape[1])
            keys, values = (torch.nn.functional.pad(y, pad) for y in (x.keys, x.values))
            self.pages.write_layer(x.layer_idx, ids, keys, values)

    def run(self, ticket, tokens, prompt, steps, *, cache_salt=None, served=None) -> None:
        """A request from its first step to its end; `served` blocks come from the store."""
        state = self.ledger.begin(ticket, cache_salt=cache_salt)
        computed = 0
        if served is not None:
            self.mover.stage(ticket, state.keys_for(tokens, served), 0, time.monotonic() + 30)
            staged = self.mover.wait_staged(ticket, 30)
            assert staged.num_blocks == served
            self.ledger.settled(state, staged)
            self.ledger.taken(state, served * 64)
            state.loading = False
            computed = served * 64
        stops = sorted({*(s for s in steps if s > computed), prompt, len(tokens)})
        for stop in stops:
            self._store(state, tokens[:stop], stop, prompt, last=False)
        self._store(state, tokens, len(tokens), prompt, last=True)
        assert self.mover.wait_saved(ticket, 30)
        self.ledger.end(ticket)

    def _store(self, state, tokens, computed, prompt, *, last) -> None:
        due = self.ledger.due(state, tokens, computed, prompt_tokens=prompt, last=last)
        if due is not None:
            self.mover.save(self.ledger.save(state, due, self.order, self.lossy_text))


# Keys, salts, heads and groups


@settings(max_examples=100)
@given(specs(kinds=list(LayerKind)), st.integers(0, 150), TEXT, st.none() | TEXT)
def test_keys_of_requests_agree(spec, size, salt, cache_salt):
    """Whatever the store's salt and the request's, also where one seems to end in the other."""
    rng = random.Random(size)
    tokens = [rng.getrandbits(32) for _ in range(size)]
    fingerprint = outsider.spec_fingerprint(plain_spec(spec))
    root = outsider.root_key(fingerprint, reader.request_salt(salt, cache_salt))
    salted = request_salt(salt, cache_salt)
    assert root_key(spec.fingerprint(), salt=salted) == root
    mine = block_keys(spec.fingerprint(), tokens, salt=salted)
    assert outsider.block_keys(root, tokens) == mine
    ledger = Ledger(spec, PAGE_TOKENS, salt=salt)
    state = ledger.begin("r", cache_salt=cache_salt)
    for blocks in range(len(mine) + 1):  # each chained to what was known before
        assert state.keys_for(tokens, blocks) == mine[:blocks]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 16))
def test_ranks_hold_the_heads_of_the_page(heads, ranks):
    """Head ranges, and the heads of layers that have fewer, for any model that can be dealt out."""
    most = max(heads)
    if most % ranks and ranks % most:
        return
    spec = replace(SPEC, layers=tuple(replace(LAYER, num_kv_heads=n) for n in heads))
    plain = plain_spec(spec)
    seen = [set() for _ in heads]
    for rank in range(ranks):
        mine, _ = rank_heads(spec, rank, ranks)
        theirs = reader.rank_range(plain, rank, ranks)
        assert theirs == (None if mine is None else list(mine))
        for layer, want in enumerate(local_spec(spec, mine).layers):
            held = reader.heads_of(plain, layer, theirs)
            assert len(held) == want.num_kv_heads
            seen[layer] |= set(held)
    assert seen == [set(range(n)) for n in heads]


@given(st.sets(st.integers(0, 23)))
def test_groups_are_those_of_the_page(missing):
    got = [(group[0], len(group)) for group in groups_to_write(sorted(missing))]
    assert sorted(got) == sorted(reader.groups(missing))


def test_the_salt_in_block_md_is_the_one_of_both():
    page = (FOLDER.parents[1] / "docs" / "formats" / "block.md").read_text(encoding="utf-8")
    part = page.partition("### Salts of engines")[2].partition("## Storage fingerprint")[0]
    assert re.findall(r"`([0-9a-f]{64})`", part) == [request_salt("tenant", "client").hex()]
    assert reader.request_salt("tenant", "client") == request_salt("tenant", "client")


def test_the_example_of_groups_in_block_md():
    """Six blocks, then ten: what the page says comes of it."""
    records = reader.groups(range(6)) + reader.groups(range(6, 10))
    assert records == [(0, 4), (4, 1), (5, 1), (6, 2), (8, 1), (9, 1)]
    assert [len(x) for x in (*groups_to_write(range(6)), *groups_to_write(range(6, 10)))] == [
        count for _, count in records
    ]


# What engines wrote


@settings(max_examples=12, deadline=None)
@given(
    tier=st.sampled_from(["file", "segment"]),
    salts=st.tuples(TEXT, st.none() | TEXT),
    prompt=st.integers(1, 700),
    output=st.integers(0, 400),
    steps=st.lists(st.integers(1, 1100), max_size=4),
    mac_key=st.sampled_from([None, MAC_KEY]),
)
def test_requests_are_read_back_from_the_files(tier, salts, prompt, output, steps, mac_key):
    """Every whole block, bit for bit, in the records the page says, under the request's salt."""
    salt, cache_salt = salts
    tokens = [random.Random(prompt).getrandbits(17) for _ in range(prompt + output)]
    steps = [step for step in steps if step < len(tokens)]
    whole = random_block(SPEC, len(tokens), seed=prompt)
    with tempfile.TemporaryDirectory() as name:
        store = KVStore(
            name, memory=0, disk="64MiB", tier=tier, salt=salt, mac_key=mac_key, threads=1
        )
        engine = Engine(store, SPEC, salt, len(tokens))
        engine.fill(whole)
        engine.run("a", tokens, prompt, steps, cache_salt=cache_salt)
        engine.mover.close()
        records, terms = reader.read_store(Path(name))
    plain = plain_spec(SPEC)
    fingerprint = outsider.spec_fingerprint(plain)
    salted = reader.request_salt(salt, cache_salt)
    keys = outsider.block_keys(outsider.root_key(fingerprint, salted), tokens)
    storage = outsider.storage_fingerprint(fingerprint, "exact@2", [0, 1])
    blocks, layers = reader.read_prefix(records, plain, keys, [storage], mac_key=mac_key)
    assert blocks == len(tokens) // 64
    assert not blocks or same(layers, whole, blocks)
    first = prompt // 64
    want = reader.groups(range(first)) + reader.groups(range(first, blocks))
    found = reader.walk(records, keys, [storage], mac_key)
    assert [(at, count) for at, count, _ in found] == want
    assert records.keys() == {address for *_, address in found}
    # The account is the store's, whatever salt the request brought.
    assert set(terms.values()) <= {(0, reader.tenant(salt.encode(), mac_key))}
    if cache_salt:
        other = outsider.block_keys(outsider.root_key(fingerprint, salt.encode()), tokens)
        assert reader.walk(records, other, [storage], mac_key) == []


@pytest.mark.parametrize("tier", ["file", "segment"])
@pytest.mark.parametrize(("spec", "ranks"), [(SPEC, 2), (SPEC, 8), (MIXED, 2), (MIXED, 4)])
def test_ranks_are_joined_from_the_files(tmp_path, tier, spec, ranks):
    """Each range under its own names, whole layers from all; a hit is the least of the ranges."""
    tokens = list(range(64 * 7 + 3))
    whole = random_block(spec, len(tokens), seed=ranks)
    shortest = 64 * 5
    for rank in range(ranks):
        mine, writes = rank_heads(spec, rank, ranks)
        if not writes:
            continue
        last = len(tokens) if rank else shortest
        store = KVStore(
            tmp_path, memory=0, disk="64MiB", tier=tier, salt="s", head_range=mine, threads=1
        )
        engine = Engine(store, spec, "s", last)
        engine.fill(share(whole.slice(0, last), spec, mine))
        engine.run("a", tokens[:last], last, [200], cache_salt="client")
        engine.mover.close()
    plain = plain_spec(spec)
    fingerprint = outsider.spec_fingerprint(plain)
    root = outsider.root_key(fingerprint, reader.request_salt("s", "client"))
    keys = outsider.block_keys(root, tokens)
    records, _ = reader.read_store(tmp_path)
    read = []
    for rank in range(ranks):
        heads = reader.rank_range(plain, rank, ranks)
        storage = outsider.storage_fingerprint(fingerprint, "exact@2", [0, 1], head_range=heads)
        read.append((heads, *reader.read_prefix(records, plain, keys, [storage], heads)))
    assert {blocks for _, blocks, _ in read} == {5, 7}
    blocks, layers = reader.join_ranks(plain, read)
    assert blocks == 5
    assert same(layers, whole, blocks)


@pytest.mark.parametrize("tier", ["file", "segment"])
def test_what_was_computed_after_a_lossy_prefix_says_so(tmp_path, tier):
    """Blocks behind restored ones lie under the codec's name as fidelity, and follow them."""
    tokens = list(range(64 * 9))
    whole = random_block(SPEC, len(tokens))
    store = KVStore(tmp_path, memory=0, disk="64MiB", tier=tier, codec="int8", threads=1)
    engine = Engine(store, SPEC, "", len(tokens), lossless=False)
    engine.fill(whole)
    engine.run("a", tokens[: 64 * 5], 64 * 5, [])
    for put in list(engine.mover._storing.values()):
        put.result(30).result(30)
    engine.run("b", tokens, len(tokens), [], served=5)
    engine.mover.close()
    plain = plain_spec(SPEC)
    fingerprint = outsider.spec_fingerprint(plain)
    keys = outsider.block_keys(outsider.root_key(fingerprint), tokens)
    codec = "int8@1:group=64"
    exact, lossy = (
        outsider.storage_fingerprint(fingerprint, codec, [0, 1], fidelity)
        for fidelity in ("exact", codec)
    )
    records, _ = reader.read_store(tmp_path)
    assert [x[:2] for x in reader.walk(records, keys, [exact])] == [(0, 4), (4, 1)]
    found = reader.walk(records, keys, [exact, lossy])
    assert [x[:2] for x in found] == [(0, 4), (4, 1), (5, 3), (8, 1)]
    with KVStore(tmp_path, memory=0, disk="64MiB", codec="int8", threads=1) as store:
        loaded = store.load(SPEC, keys)
    blocks, layers = reader.read_prefix(records, plain, keys, [exact, lossy])
    assert blocks == loaded.num_blocks == 9
    assert same(layers, loaded.block, 9)


@pytest.mark.parametrize("codec", ["none", "exact"])
def test_chunks_of_engines_are_read_back(tmp_path, codec):
    """Bytes of an engine's own, under its own name."""
    data = np.random.default_rng(0).integers(0, 256, 6000, dtype=np.uint8)
    with ChunkStore(
        [FileStore(tmp_path)],
        identity='{"salt": "s"}',
        dtype="bfloat16",
        nbytes=6000,
        codec=codec,
        rules=Rules(salt="s"),
    ) as chunks:
        assert chunks.put(b"page 7", data)
    [(address, record)] = reader.read_folder(tmp_path)[0].items()
    header = outsider.verify(record)
    layer = header["layers"][0]
    sizes = {name: layer[name] for name in ("num_kv_heads", "k_head_dim", "v_head_dim")}
    spec = plain_spec(replace(SPEC, model_id='{"salt": "s"}', layers=(LAYER,)))
    spec["layers"][0] |= sizes
    fingerprint = outsider.spec_fingerprint(spec)
    key = outsider.hashed(outsider.PREFIX, "engine chunk", fingerprint, b"page 7")
    assert address == key + outsider.storage_fingerprint(fingerprint, header["codec"], [0])
    if codec == "exact":
        assert outsider.decode(record, spec)[1][0]["keys_bytes"] == data.tobytes()
        return
    assert header["codec"] == "none@1"
    keys = next(x for x in header["sections"] if x["kind"] == outsider.KEYS)
    assert keys["flags"] == outsider.RAW
    assert record[keys["offset"] :][: keys["stored_bytes"]] == data.tobytes()


# Files that are wrong, or no longer right


def test_what_was_replaced_is_not_read_from_segments(tmp_path):
    """An earlier record's granules may hold its bytes for long after: the generation tells."""
    key, old = make_record(1, size=3000)
    _, new = make_record(1, size=6000)  # which the room of the old one cannot hold
    with SegmentStore(tmp_path, capacity=1 << 20) as store:
        assert store.put(key, old)
        assert store.put(*make_record(2))
        assert store.delete(key)
        assert store.put(key, new)
    before, after = (b"".join(map(bytes, parts)) for parts in (old, new))
    assert any(before in path.read_bytes() for path in tmp_path.glob("seg-*.kv"))
    assert reader.read_segments(tmp_path)[0][key.to_bytes()] == after
    shutil.rmtree(tmp_path / "index.lmdb")  # the store's own way to find it from the headers
    with SegmentStore(tmp_path, capacity=1 << 20) as store:
        buffer = bytearray(16384)
        assert bytes(buffer[: store.get_into(key, buffer)]) == after


def test_both_readers_refuse_the_same_files(tmp_path):
    """Cut, flipped at the end, or under another record's name: no reader takes it."""
    with FileStore(tmp_path) as store:
        pairs = [make_record(seed, size=3000) for seed in range(4)]
        for key, parts in pairs:
            assert store.put(key, parts)
    names = [key.to_bytes().hex() for key, _ in pairs]
    paths = [tmp_path / name[:2] / f"{name}.kvlc" for name in names]
    assert len(reader.read_folder(tmp_path)[0]) == 4
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    data = bytearray(paths[1].read_bytes())
    data[-20] ^= 1  # of the time when it is over
    paths[1].write_bytes(data)
    paths[2].write_bytes(paths[3].read_bytes())
    records, _ = reader.read_folder(tmp_path)
    assert records == {pairs[3][0].to_bytes(): b"".join(map(bytes, pairs[3][1]))}
    with FileStore(tmp_path) as store:
        buffer = bytearray(8192)
        got = [store.get_into(key, buffer) for key, _ in pairs]
        assert [size is not None for size in got] == [False, False, False, True]
