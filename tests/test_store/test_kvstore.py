# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib import KVStore
from kvlib.blocks import KVBlock
from kvlib.codecs import CODECS
from kvlib.errors import ConfigError, ShapeError, StoreClosedError, UnknownPluginError
from kvlib.spec import KVSpec, LayerKind, LayerSpec
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
MIB = 1 << 20


def put(store: KVStore, tokens: list[int], block: KVBlock | None = None, **settings):
    block = random_block(SPEC, len(tokens) // 64 * 64) if block is None else block
    return store.put(SPEC, store.block_keys(SPEC, tokens), block, **settings)


def load(store: KVStore, tokens: list[int], **settings):
    return store.load(SPEC, store.block_keys(SPEC, tokens), **settings)


def record_tokens(store: KVStore) -> list[int]:
    """Tokens of each record held, sorted: how blocks were grouped."""
    tier = store._stack.tiers[-1]
    return sorted(len(store._directory.record_keys(key)) * 64 for key in tier.keys())


@pytest.mark.parametrize("codec", [n for n in CODECS.names() if n != "cachegen"])
@pytest.mark.parametrize("where", ["memory", "disk", "both"])
def test_what_is_put_is_loaded_through_every_codec_and_tier(tmp_path, codec, where):
    """Lossless codecs give the bits back, lossy ones close values under their own fidelity."""
    settings = {
        "memory": 0 if where == "disk" else "8MiB",
        "path": None if where == "memory" else tmp_path,
    }
    tokens = list(range(64 * 7 + 5))
    with KVStore(codec=codec, **settings) as store:
        block = random_block(SPEC, 64 * 7)
        report = put(store, tokens, block)
        assert (report.stored_blocks, report.present_blocks, report.dropped_blocks) == (7, 0, 0)
        assert report.raw_bytes == block.nbytes
        got = load(store, tokens)
        assert got.num_blocks == 7
        if store.codec.lossless:
            assert got.fidelity == "exact"
            assert got.block.equal(block)
        else:
            assert got.fidelity == store.codec_text
            for mine, theirs in zip(got.block.layers, block.layers, strict=True):
                assert (mine.keys - theirs.keys).norm() < 0.2 * theirs.keys.norm()
        assert all(report.ok for report in store.check().values())


def test_chunks_are_four_blocks_and_tails_stay_single(tmp_path):
    """Full groups of four make one record; unfinished ones are stored block by block."""
    with KVStore(tmp_path, memory=0) as store:
        put(store, list(range(64 * 11)))
        assert record_tokens(store) == [64, 64, 64, 256, 256]


def test_a_longer_prompt_encodes_nothing_twice(tmp_path):
    """The blocks that are there stay as they are; new ones fill up to the next boundary."""
    with KVStore(tmp_path, memory=0) as store:
        tokens = list(range(64 * 9))
        put(store, tokens[: 64 * 6])
        report = put(store, tokens, random_block(SPEC, 64 * 9))
        assert (report.stored_blocks, report.present_blocks) == (3, 6)
        assert record_tokens(store) == [64, 64, 64, 128, 256]
        assert load(store, tokens).num_blocks == 9


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), min_size=1, max_size=6))
def test_any_history_of_prompts_restores_every_stored_prefix(history):
    """Prompts that branch off anywhere: each stored prefix is found whole, with its own bytes."""
    with KVStore(memory="64MiB") as store:
        stored: dict[tuple[int, ...], KVBlock] = {}
        for branch, blocks in history:
            # Prompts share the blocks before `branch * 3`.
            tokens = [
                i // 64 if i // 64 < branch * 3 else 1000 * (branch + 1) + i // 64
                for i in range(64 * blocks)
            ]
            parts = []
            for b in range(blocks):
                seed = hash(tuple(tokens[: (b + 1) * 64])) & 0xFFFF
                parts.append(random_block(SPEC, 64, start=b * 64, seed=seed))
            block = KVBlock.join(parts)
            put(store, tokens, block)
            stored[tuple(tokens)] = block
        for tokens, block in stored.items():
            got = load(store, list(tokens))
            assert got.block is not None
            assert got.block.equal(block)


def test_put_of_a_middle_run_extends_what_is_stored():
    """A block that starts after a restored prefix is stored behind it."""
    with KVStore() as store:
        tokens = list(range(64 * 8))
        whole = random_block(SPEC, 64 * 8)
        put(store, tokens, whole.slice(0, 64 * 3))
        put(store, tokens, whole.slice(64 * 3, 64 * 8))
        assert load(store, tokens).block.equal(whole)


def test_salts_and_specs_share_nothing(tmp_path):
    """The same tokens under another salt, model or dtype are a miss."""
    tokens = list(range(128))
    with KVStore(tmp_path, salt="a") as store:
        put(store, tokens)
        other = tiny_spec(model_id="other")
        assert store.load(other, store.block_keys(other, tokens)).num_blocks == 0
    with KVStore(tmp_path, salt="b") as store:
        assert load(store, tokens).num_blocks == 0
    with KVStore(tmp_path, salt="a") as store:
        assert load(store, tokens).num_blocks == 2


def test_mac_key_is_required_and_checked(tmp_path):
    """Records under a MAC key are a miss without it or under another, and the other way round."""
    tokens = list(range(128))
    for writer, readers in ((b"k" * 32, (None, b"x" * 32)), (None, (b"k" * 32,))):
        for reader in readers:
            with KVStore(tmp_path, memory=0, mac_key=writer) as store:
                put(store, tokens)
                assert load(store, tokens).num_blocks == 2
            with KVStore(tmp_path, memory=0, mac_key=reader) as store:
                assert load(store, tokens).num_blocks == 0
                store.check(repair=True)


def test_authenticated_records_pass_through_memory(tmp_path):
    """With a MAC key, records are found in the memory tier and on disk alike."""
    with KVStore(tmp_path, mac_key=b"k" * 32) as store:
        put(store, list(range(256)))
        assert load(store, list(range(256))).num_blocks == 4
        assert load(store, list(range(192)) + [0] * 64).num_blocks == 3
        assert all(report.ok for report in store.check().values())


def test_eviction_takes_the_end_of_a_prompt_first(tmp_path):
    """With room for part of a prompt, its beginning stays; a newer prompt is kept over it."""
    capacity = 400 * 1024  # a record of four blocks takes 60 to 68 KiB
    with KVStore(tmp_path, memory=0, disk=capacity) as store:
        long = list(range(64 * 40))
        report = put(store, long)
        held = load(store, long).num_blocks
        assert 0 < held < 40
        assert report.stored_blocks == 40
        assert store.stats().tiers["segment"].used_bytes <= capacity
        newer = [7] * (64 * 8)
        put(store, newer)
        assert load(store, newer).num_blocks == 8
        assert 0 < load(store, long).num_blocks < held


def test_a_store_too_small_for_a_record_drops_it_and_says_so(tmp_path):
    """Want of room is a counted drop, not an error."""
    with KVStore(tmp_path, memory=0, disk=4096) as store:
        report = put(store, list(range(256)))
        assert (report.stored_blocks, report.dropped_blocks) == (0, 4)
        assert load(store, list(range(256))).num_blocks == 0


def test_64_concurrent_loads_make_one_read(tmp_path):
    """Threads that want one record at once share one read of the disk."""
    tokens = list(range(256))
    with KVStore(tmp_path, memory=0) as store:
        put(store, tokens)
    with KVStore(tmp_path, memory=0, threads=64) as store:
        tier = store._stack.tiers[0]
        inner = tier.get_into
        started, release = threading.Event(), threading.Event()
        reads = []

        def slow(key, buf, sections=None, deadline=None):
            if sections is None:
                reads.append(key)
                started.set()
                assert release.wait(20)
            return inner(key, buf, sections, deadline)

        tier.get_into = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(64) as pool:
            waiting = [pool.submit(load, store, tokens) for _ in range(64)]
            assert started.wait(20)
            limit = time.monotonic() + 20
            while (
                sum(t.name.startswith("kvlib-store") for t in threading.enumerate()) < 64
                or store._pool._loads
            ):
                assert time.monotonic() < limit, "the loads never came together"
            release.set()
            assert [w.result(timeout=20).num_blocks for w in waiting] == [4] * 64
        # Whoever came during the read shared it; a latecomer may read again.
        assert len(reads) + store.stats().shared_reads == 64
        assert len(reads) <= 4


def test_concurrent_puts_and_loads_agree(tmp_path):
    """Threads that put and load the same prompts get their bytes or a miss; all stays sound."""
    blocks = {seed: random_block(SPEC, 64 * 5, seed=seed) for seed in range(4)}
    with KVStore(tmp_path, memory="1MiB", disk="1MiB") as store:

        def work(worker: int) -> int:
            hits = 0
            for i in range(12):
                seed = (worker + i) % 4
                tokens = [seed] * (64 * 5)
                put(store, tokens, blocks[seed])
                got = load(store, tokens)
                if got.block is not None:
                    hits += 1
                    assert got.block.equal(blocks[seed].slice(0, got.num_blocks * 64))
            return hits

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 96
        assert all(report.ok for report in store.check().values())


def test_lossy_ancestors_are_another_identity():
    """Blocks put with a fidelity are found only by requests that accept it."""
    with KVStore() as store:
        tokens = list(range(128))
        put(store, tokens, fidelity="int8@1:group=64")
        assert load(store, tokens).num_blocks == 0
        got = load(store, tokens, accept=("exact", "int8@1:group=64"))
        assert (got.num_blocks, got.fidelity) == (2, "int8@1:group=64")


def test_a_deadline_in_the_past_is_a_miss():
    """Nothing is waited for after the deadline."""
    with KVStore() as store:
        tokens = list(range(128))
        put(store, tokens)
        assert load(store, tokens, deadline=0.0).num_blocks == 0
        assert load(store, tokens).num_blocks == 2


def test_returned_tensors_do_not_alias_storage(tmp_path):
    """Writing into a loaded block changes nothing in the store."""
    with KVStore(tmp_path) as store:
        tokens = list(range(128))
        block = random_block(SPEC, 128)
        put(store, tokens, block)
        first = load(store, tokens).block
        for layer in first.layers:
            layer.keys.zero_()
        assert load(store, tokens).block.equal(block)
        assert not torch.equal(first.layers[0].keys, block.layers[0].keys)


def test_put_does_not_keep_the_caller_s_tensors():
    """Writing into a tensor after put changes nothing in the store."""
    with KVStore() as store:
        tokens = list(range(128))
        block = random_block(SPEC, 128)
        want = block.layers[0].keys.clone()
        put(store, tokens, block)
        block.layers[0].keys.zero_()
        assert torch.equal(load(store, tokens).block.layers[0].keys, want)


def test_wrong_blocks_are_refused():
    """Half blocks, another spec and too few keys are errors that say what was expected."""
    with KVStore() as store:
        tokens = list(range(128))
        for block in (
            random_block(SPEC, 100),
            random_block(tiny_spec(model_id="x"), 128),
            random_block(SPEC, 192),
        ):
            with pytest.raises(ShapeError, match="expected whole blocks"):
                put(store, tokens, block)


def test_recurrent_layers_are_refused_by_name():
    """A spec with recurrent layers gets an error that names them."""
    spec = KVSpec(
        model_id="m",
        layers=(LayerSpec(kind=LayerKind.RECURRENT, num_kv_heads=0, k_head_dim=0, v_head_dim=0),),
        dtype="float32",
    )
    with KVStore() as store, pytest.raises(ConfigError, match="recurrent layers 0"):
        store.load(spec, [])


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"memory": 0}, ConfigError, "memory"),
        ({"memory": "1 gigabit"}, ConfigError, "1 gigabit"),
        ({"codec": "int9"}, UnknownPluginError, "int8"),
        ({"codec": "int8:grup=64"}, ConfigError, "group"),
        ({"remote": "redis://x"}, ConfigError, "remote"),
    ],
)
def test_bad_settings_say_what_to_do(settings, error, says):
    """Every wrong argument gets an error that names it and what was expected."""
    with pytest.raises(error, match=says):
        KVStore(**settings)


def test_closed_and_forked_stores_refuse(tmp_path):
    """After close, and in a forked child, every call raises; closing twice is fine."""
    store = KVStore(tmp_path)
    put(store, list(range(64)))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # no test machinery in the child
        verdict = b"0"
        try:
            store.match(SPEC, [])
        except StoreClosedError:
            verdict = b"1"
        os.write(writer, verdict)
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader)
    os.close(writer)
    store.close()
    store.close()
    with pytest.raises(StoreClosedError):
        load(store, [])


def test_another_process_sees_what_was_stored(tmp_path):
    """A store opened by another process while this one is open finds the records."""
    code = (
        "import sys; from kvlib import KVStore; from kvlib.testing.models import tiny_spec\n"
        "spec = tiny_spec()\n"
        "with KVStore(sys.argv[1], memory=0) as s:\n"
        "    print(s.load(spec, s.block_keys(spec, list(range(256)))).num_blocks)"
    )
    with KVStore(tmp_path) as store:
        put(store, list(range(256)))
        child = [sys.executable, "-c", code, str(tmp_path)]
        answer = subprocess.run(child, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "4"


def test_a_record_written_again_with_other_blocks_is_read_as_it_is():
    """When a record was evicted and its name reused for fewer blocks, those are found."""
    with KVStore() as store:
        whole = random_block(SPEC, 256)
        tokens = list(range(256))
        put(store, tokens, whole)
        assert load(store, tokens).num_blocks == 4
        (tier,) = store._stack.tiers
        for key in list(tier.keys()):
            tier.delete(key)
        put(store, tokens[:128], whole.slice(0, 128))
        assert load(store, tokens).block.equal(whole.slice(0, 128))
        assert store.stats().corrupt_records == 0


def test_evicted_blocks_are_refused_under_prefix_keys():
    """A block that lost tokens cannot be put: prefix keys promise every token."""
    from dataclasses import replace

    with KVStore() as store:
        block = random_block(SPEC, 64)
        layers = [replace(layer, positions=layer.positions_tensor()) for layer in block.layers]
        with pytest.raises(ShapeError, match="nothing evicted"):
            put(store, list(range(64)), replace(block, layers=tuple(layers)))
