# SPDX-License-Identifier: Apache-2.0
"""Decoded blocks on a device, in front of all other tiers."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib import KVStore
from kvlib.errors import ConfigError, StoreClosedError
from kvlib.keys import BlockKey, StoreKey
from kvlib.store import loads
from kvlib.store import terms as clocks
from kvlib.store.device import DeviceTier
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
TOKENS = list(range(64 * 11))
BLOCK = random_block(SPEC, 64 * 11)
DEVICES = [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
devices = pytest.mark.parametrize("device", DEVICES)


def equal(block, expected, device):
    """The same numbers, on that device."""
    assert all(
        x.device.type == device for layer in block.layers for x in (layer.keys, layer.values)
    )
    pairs = zip(block.layers, expected.layers, strict=True)
    return (block.start, block.stop) == (expected.start, expected.stop) and all(
        torch.equal(a.keys.cpu(), b.keys) and torch.equal(a.values.cpu(), b.values)
        for a, b in pairs
    )


def filled(store, block=BLOCK):
    keys = store.block_keys(SPEC, TOKENS)
    store.put(SPEC, keys, block)
    return keys


def refuse(monkeypatch, store):
    """From now on nothing is read and nothing decoded."""

    def fail(*args, **settings):
        raise AssertionError("read or decoded")

    monkeypatch.setattr(loads, "decode_block", fail)
    for tier in store._stack.tiers:
        monkeypatch.setattr(tier, "get_into", fail)


@devices
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("codec", ["exact", "int8"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_second_load_neither_reads_nor_decodes(
    tmp_path, monkeypatch, codec, where, layers, device
):
    with KVStore(tmp_path, memory="8MiB" if where == "memory" else 0, codec=codec) as plain:
        keys = filled(plain)
        expected = plain.load(SPEC, keys)
    with KVStore(tmp_path, memory=0, codec=codec, device=device) as store:
        first = store.load_async(SPEC, keys, layers=layers).result()
        assert equal(first.block, expected.block, device)
        assert store.stats().tiers["device"].records == 5
        refuse(monkeypatch, store)
        for num_blocks in (11, 9, 6, 3, 1):  # also records of which only a part is asked for
            again = store.load_async(SPEC, keys[:num_blocks], layers=layers).result()
            assert (again.num_blocks, again.fidelity) == (num_blocks, first.fidelity)
            assert again.stored_bytes == 0
            assert equal(again.block, expected.block.slice(0, num_blocks * 64), device)
        pieces = list(store.load_pieces(SPEC, keys))
        assert [piece.num_blocks for piece in pieces] == [4, 4, 1, 1, 1]
        assert store.stats().tiers["device"].misses == 5
        assert store.check()["device"].ok


@devices
def test_what_was_evicted_everywhere_else_is_still_found(tmp_path, device):
    with KVStore(memory="8MiB", device=device) as store:
        keys = filled(store)
        store.load(SPEC, keys)
        for key in list(store._memory.keys()):
            store._memory.delete(key)
        assert store.match(SPEC, keys) == 11
        assert equal(store.load(SPEC, keys).block, BLOCK, device)
        # It is not stored there, though: what is put is written, and what cannot be pinned is not.
        assert store.pin(SPEC, keys).num_blocks == 0
        assert store.put(SPEC, keys, BLOCK).stored_blocks == 11
        assert store.pin(SPEC, keys).num_blocks == 11


@devices
def test_nothing_returned_aliases_what_is_held(device):
    """Not even what is written into a load's tensors while it is still arriving."""
    with KVStore(memory="8MiB", device=device) as store:
        keys = filled(store)
        for _ in range(3):
            load = store.load_async(SPEC, keys, layers=1)
            for layer in range(SPEC.num_layers):
                load.wait_layer(layer)
                for tensor in load.tensors[layer]:
                    tensor.fill_(7.0)
            assert load.result().num_blocks == 11
        assert equal(store.load(SPEC, keys).block, BLOCK, device)


@devices
def test_a_caller_that_writes_at_once_spoils_nothing(device):
    """Blocks enter the tier before they are handed out, so each of many loads gets them whole."""
    with KVStore(memory="8MiB", device=device, threads=4) as store:
        keys = filled(store)

        def use(seed):
            choose = random.Random(seed)
            for _ in range(10):
                num_blocks = choose.randint(1, 11)
                loaded = store.load(SPEC, keys[:num_blocks])
                assert equal(loaded.block, BLOCK.slice(0, num_blocks * 64), device)
                for layer in loaded.block.layers:
                    layer.keys.zero_()
                    layer.values.zero_()
                if choose.random() < 0.3:
                    store._device.delete(choose.choice(list(store._device.keys()) or [None]))
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(use, range(4)))
        assert store.check()["device"].ok


def test_lossy_and_exact_blocks_never_mix(tmp_path):
    """The exact form is served as long as anybody has it, the lossy one only as what it is."""
    with KVStore(
        tmp_path, memory="8MiB", codec="int8", memory_codec="exact", device="cpu"
    ) as store:
        keys = filled(store)
        assert store.load(SPEC, keys).block.equal(BLOCK)
        for key in list(store._memory.keys()):
            store._memory.delete(key)
        got = store.load(SPEC, keys)
        assert got.fidelity == "exact"  # from the device
        assert got.block.equal(BLOCK)
        for key in list(store._device.keys()):
            store._device.delete(key)
        lossy = store.load(SPEC, keys)
        assert lossy.fidelity == store.codec_text
        assert not lossy.block.equal(BLOCK)
        again = store.load(SPEC, keys)
        assert (again.fidelity, again.stored_bytes) == (store.codec_text, 0)
        assert again.block.equal(lossy.block)
        assert store.load(SPEC, keys, accept=()).num_blocks == 0


def test_other_salts_and_ancestors_find_nothing_on_the_device(tmp_path):
    with KVStore(memory="8MiB", device="cpu", salt="a") as store:
        keys = filled(store)
        store.load(SPEC, keys)
        other = tiny_spec(model_id="other")
        assert store.load(other, keys).num_blocks == 0
        assert store.load(SPEC, keys, accept=("int8@1:group=64",)).num_blocks == 0


@devices
def test_it_is_bounded_and_keeps_what_is_used_again(device):
    record = 256 * SPEC.bytes_per_token()
    room = 4 * record
    with KVStore(memory="64MiB", device=device, device_bytes=room) as store:
        hot = list(range(256))
        prompts = [hot, *([i] * 256 for i in range(1, 12))]
        for i, tokens in enumerate(prompts):
            store.put(SPEC, store.block_keys(SPEC, tokens), random_block(SPEC, 256, seed=i))
        for i, tokens in enumerate(prompts):
            for wanted in (hot, tokens, hot):
                assert store.load(SPEC, store.block_keys(SPEC, wanted)).num_blocks == 4
            stats = store.stats().tiers["device"]
            assert stats.used_bytes == min(i + 1, 4) * record <= stats.capacity_bytes
        assert stats.evicted == 8
        before = stats.misses
        store.load(SPEC, store.block_keys(SPEC, hot))
        assert store.stats().tiers["device"].misses == before
        assert store.check()["device"].ok
    with KVStore(memory="64MiB", device=device, device_bytes=record - 1) as store:
        keys = filled(store)
        assert equal(store.load(SPEC, keys).block, BLOCK, device)  # the tails fit, one by one
        assert store.stats().tiers["device"].rejected == 2


def test_blocks_on_their_way_count_and_give_their_room_back(tmp_path, monkeypatch):
    with KVStore(memory="8MiB", device="cpu", device_bytes="1MiB", threads=1) as store:
        keys = filled(store)
        decode, seen = loads.decode_block, []

        def fail(container, spec, *, layers, **options):
            seen.append(store.stats().tiers["device"].used_bytes)
            if layers[-1] == SPEC.num_layers - 1:
                raise RuntimeError("the last layer cannot be decoded")
            return decode(container, spec, layers=layers, **options)

        monkeypatch.setattr(loads, "decode_block", fail)
        assert store.load_async(SPEC, keys, layers=1).result().num_blocks == 0
        store._pool.submit(lambda: None, priority=5).result(20)
        assert min(seen) > 0
        assert store.stats().tiers["device"].used_bytes == 0
        assert store.check()["device"].ok
        monkeypatch.setattr(loads, "decode_block", decode)
        assert store.load(SPEC, keys).block.equal(BLOCK)


def test_a_damaged_record_leaves_the_device_too(tmp_path):
    with KVStore(memory="8MiB", device="cpu") as store:
        keys = filled(store)
        store.load(SPEC, keys)
        for key in list(store._device.keys()):
            store._spoilt(key)
        assert list(store._device.keys()) == []
        assert store.load(SPEC, keys).num_blocks == 0


def test_no_memory_on_the_device_is_no_error(monkeypatch):
    with KVStore(memory="8MiB", device="cpu") as store:
        keys = filled(store)

        def fail(*args):
            raise torch.OutOfMemoryError("no memory left")

        monkeypatch.setattr("kvlib.store.device._packed", fail)
        assert store.load(SPEC, keys).block.equal(BLOCK)
        stats = store.stats().tiers["device"]
        assert (stats.records, stats.used_bytes, stats.errors) == (0, 0, 5)


def names(count):
    return [StoreKey(BlockKey(bytes([i]) * 32), b"s" * 32) for i in range(count)]


def put(tier, key, keys, fill, *, ok=True, ttl=None):
    slot = tier.reserve(key, keys, SPEC, parts=2, ttl=ttl)
    if slot is not None:
        for pair in slot.layers.values():
            for tensor in pair:
                tensor.fill_(fill)
        slot.filled() if ok else slot.failed()
        slot.filled()
    return slot is not None


def fetch(tier, key, keys, tokens):
    to = dict(enumerate(tier.allocate(SPEC, tokens, None)))
    return (
        {float(x.unique()) for pair in to.values() for x in pair}
        if tier.fetch(key, keys, to)
        else None
    )


@given(
    st.lists(st.tuples(st.sampled_from("pfbtd"), st.integers(0, 7), st.integers(1, 4)), max_size=40)
)
@settings(max_examples=60)
def test_any_history_keeps_the_bound_and_the_numbers(steps):
    """Against a dict that remembers what was put: what is found is that, and room is exact."""
    unit = 64 * SPEC.bytes_per_token()
    tier, put_last = DeviceTier("cpu", 9 * unit), {}
    for action, i, blocks in steps:
        key = names(8)[i]
        keys = tuple(BlockKey(bytes([i, j]) * 16) for j in range(blocks))
        if action in "pb" and put(tier, key, keys, float(i), ok=action == "p"):
            if action == "p":
                put_last[key] = keys
        elif action == "f" and key in put_last:
            assert fetch(tier, key, put_last[key], 64) in (None, {float(i)})
            assert fetch(tier, key, (*put_last[key], key.block), 64) is None  # other blocks
        elif action == "t":
            tier.touch([key])
        elif action == "d":
            tier.delete(key)
        held = {key: tier.record_keys(key) for key in names(8)}
        assert all(found in (None, put_last.get(key)) for key, found in held.items())
        blocks_held = sum(len(found) for found in held.values() if found)
        assert tier.stats().used_bytes == blocks_held * unit <= 9 * unit
        assert tier.check().ok


def test_what_has_a_time_is_not_served_after_it():
    tier = DeviceTier("cpu", "1MiB")
    (key,) = names(1)
    assert put(tier, key, (key.block,), 1.0, ttl=0.02)
    assert tier.record_keys(key) == (key.block,)
    time.sleep(0.03)
    assert tier.record_keys(key) is None
    assert tier.stats().used_bytes == 0
    assert put(tier, key, (key.block,), 2.0, ttl=60.0)
    assert fetch(tier, key, (key.block,), 64) == {2.0}


def test_time_passes_on_the_device_while_the_machine_sleeps(monkeypatch):
    """As in all tiers; setting the clock changes nothing."""
    elapsed, wall = clocks._elapsed_ms(), clocks._wall_ms()
    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: elapsed)
    tier = DeviceTier("cpu", "1MiB")
    (key,) = names(1)
    assert put(tier, key, (key.block,), 1.0, ttl=60)
    monkeypatch.setattr(clocks, "_wall_ms", lambda: wall + 10**9)
    assert tier.record_keys(key) == (key.block,)
    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: elapsed + 60_000)
    assert tier.record_keys(key) is None


def test_a_record_s_time_holds_on_the_device_too():
    with KVStore(memory="8MiB", device="cpu", ttl=1.5) as store:
        keys = filled(store)
        assert store.load(SPEC, keys).num_blocks == 11
        assert store.stats().tiers["device"].records == 5
        time.sleep(1.6)
        assert store.match(SPEC, keys) == 0
        assert store.load(SPEC, keys).num_blocks == 0
        assert store.stats().tiers["device"].records < 5


@pytest.mark.parametrize(
    ("device", "says"),
    [("meta", "expected 'cpu'"), ("drum", "none that torch knows"), ("cuda:99", "CUDA devices")],
)
def test_bad_devices_say_what_to_do(device, says):
    with pytest.raises(ConfigError, match=says):
        KVStore(device=device)
    with pytest.raises(ConfigError, match="device_bytes"):
        KVStore(device="cpu", device_bytes="much")


def test_after_closing_it_is_closed():
    with KVStore(device="cpu") as store:
        keys = filled(store)
        store.load(SPEC, keys)
        tier = store._device
    with pytest.raises(StoreClosedError):
        tier.record_keys(names(1)[0])


@pytest.mark.gpu
def test_copies_wait_for_what_the_caller_s_stream_still_reads():
    """Blocks that a busy stream let go of are handed out again only when it has done with them."""
    with KVStore(memory="64MiB", device="cuda") as store:
        keys = filled(store)
        store.load(SPEC, keys)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                block = store.load(SPEC, keys).block
                torch.cuda._sleep(10_000_000)
                copy = block.layers[0].keys.clone()
                del block
                again = store.load(SPEC, keys).block
                for layer in again.layers:
                    layer.keys.zero_()
                assert torch.equal(copy.cpu(), BLOCK.layers[0].keys)
