# SPDX-License-Identifier: Apache-2.0
"""kvlib's replacement policies behind vLLM's own CPU tier."""

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory

from kvlib.connectors.vllm_policy import KvlibCachePolicy
from kvlib.errors import ConfigError, UnknownPluginError

MODULE = "kvlib.connectors.vllm_policy"
METHODS = ["lru", "arc", "s3fifo", "s3fifo:small=0.3,promote=2", "gdsf", "lfuda"]
KEYS = [make_offload_key(sha256(bytes([i])).digest(), 0) for i in range(24)]
CTX = ReqContext("request")


def policy(method, capacity=8):
    return CachePolicyFactory.get_cache_policy_cls("kvlib:" + method, MODULE)(capacity)


def ready(chunk_id):
    chunk = ChunkStatus(chunk_id)
    chunk.ref_cnt = 0
    return chunk


def test_names():
    made = CachePolicyFactory.get_cache_policy_cls("kvlib:s3fifo:small=0.3", MODULE)
    assert issubclass(made, KvlibCachePolicy)
    assert (made.replacement.name, made.replacement.small) == ("s3fifo", 0.3)
    with pytest.raises(AttributeError, match="s3fifo"):
        CachePolicyFactory.get_cache_policy_cls("s3fifo", MODULE)
    with pytest.raises(UnknownPluginError, match=r"lruu.*lru"):
        CachePolicyFactory.get_cache_policy_cls("kvlib:lruu", MODULE)
    with pytest.raises(ConfigError, match="small"):
        CachePolicyFactory.get_cache_policy_cls("kvlib:s3fifo:small=2", MODULE)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(0, 23), st.booleans()),
        st.tuples(st.just("write"), st.integers(0, 23)),
        st.tuples(st.just("fail"), st.integers(0, 23)),
        st.tuples(st.just("pin"), st.integers(0, 23)),
        st.tuples(st.just("unpin"), st.integers(0, 23)),
        st.tuples(st.just("touch"), st.lists(st.integers(0, 23), max_size=5)),
        st.tuples(st.just("use"), st.lists(st.integers(0, 23), max_size=6, unique=True)),
        st.tuples(st.just("evict"), st.integers(0, 6), st.sets(st.integers(0, 23), max_size=4)),
        st.tuples(st.just("clear")),
    ),
    max_size=60,
)


@pytest.mark.parametrize("method", METHODS)
@given(steps=steps)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_against_a_dictionary(method, steps):
    """Whatever is asked: the right chunks are held, and eviction is all or nothing."""
    tested, model = policy(method), {}
    for step in steps:
        name, *rest = step
        key = KEYS[rest[0]] if rest and isinstance(rest[0], int) else None
        if name == "insert" and key not in model:
            model[key] = ready(rest[0]) if rest[1] else ChunkStatus(rest[0])
            tested.insert(key, model[key])
        elif name == "write" and key in model and model[key].ref_cnt < 0:
            model[key].ref_cnt = 0
            tested.mark_evictable(key)
        elif name == "fail" and key in model and model[key].ref_cnt < 0:
            del model[key]
            tested.remove(key)
        elif name == "pin" and key in model and model[key].ref_cnt >= 0:
            if model[key].ref_cnt == 0:
                tested.mark_non_evictable(key)
            model[key].ref_cnt += 1
        elif name == "unpin" and key in model and model[key].ref_cnt > 0:
            model[key].ref_cnt -= 1
            if model[key].ref_cnt == 0:
                tested.mark_evictable(key)
        elif name == "touch":
            tested.touch([KEYS[i] for i in rest[0]], CTX)
        elif name == "use":
            used = [KEYS[i] for i in rest[0]]
            tested.on_store_miss(used[3:], CTX)
            tested.on_request_finished([used[:4], used[4:]], set(used[3:]), set(used[:3]), CTX)
        elif name == "evict":
            count, protected = rest[0], {KEYS[i] for i in rest[1]}
            free = [k for k, chunk in model.items() if chunk.ref_cnt == 0 and k not in protected]
            gone = tested.evict(count, protected)
            if count > len(free):
                assert gone is None
            else:
                assert len(gone) == count == len({k for k, _ in gone})
                for k, chunk in gone:
                    assert k in free
                    assert chunk is model.pop(k)
        elif name == "clear":
            tested.clear()
            model.clear()
        for k in KEYS:
            assert tested.get(k) is model.get(k)
    assert sorted(tested._state.keys()) == sorted(model)


def test_the_order_is_the_policys_and_the_start_of_a_prompt_stays():
    lru, fifo = policy("lru", 4), policy("s3fifo:small=0.5", 4)
    for tested in (lru, fifo):
        for i in range(4):
            tested.insert(KEYS[i], ready(i))
        tested.on_request_finished([KEYS[:4]], set(KEYS[:4]), set(), CTX)
        tested.on_request_finished([KEYS[2:3]], set(), {KEYS[2]}, CTX)
    assert [key for key, _ in lru.evict(3, set())] == [KEYS[3], KEYS[1], KEYS[0]]
    assert [key for key, _ in fifo.evict(2, {KEYS[3]})] == [KEYS[1], KEYS[0]]


def test_arc_learns_what_it_let_go_too_early():
    arc = policy("arc", 4)
    for i in range(4):
        arc.insert(KEYS[i], ready(i))
    for i in range(2):
        arc.on_request_finished([[KEYS[i]]], set(), {KEYS[i]}, CTX)
    ((gone, _),) = arc.evict(1, set())
    assert gone == KEYS[2]  # used once; 0 and 1 were used again
    target = arc._state._levels[0].order._target
    arc.on_store_miss([gone], CTX)
    arc.insert(gone, ready(9))
    assert arc._state._levels[0].order._target > target


@pytest.mark.parametrize("method", METHODS)
def test_under_vllms_own_manager(method):
    manager = CPUOffloadingManager(
        num_chunks=6, cache_policy="kvlib:" + method, cache_policy_module_path=MODULE
    )

    def request(keys, *, number):
        """Loads what is there from the start on and stores the rest."""
        ctx = ReqContext(str(number))
        manager.on_new_request(ctx)
        hits = 0
        while hits < len(keys) and manager.lookup(keys[hits], ctx) is LookupResult.HIT:
            hits += 1
        if hits:
            manager.prepare_load(keys[:hits], ctx)
            manager.complete_load(keys[:hits], ctx)
        out = manager.prepare_store(keys, ctx)
        if out is not None:
            assert not set(out.evicted_keys) & set(keys)
            manager.complete_store(out.keys_to_store, ctx)
        manager.on_request_finished(ctx)
        return hits

    assert request(KEYS[:4], number=0) == 0
    assert request(KEYS[:4], number=1) == 4
    assert request(KEYS[:3] + KEYS[10:13], number=2) == 3
    for number in range(3, 9):
        request(KEYS[number * 2 : number * 2 + 2], number=number)
    held = [key for key in KEYS if manager._policy.get(key) is not None]
    assert len(held) == 6
    pinned = ReqContext("pins")
    manager.prepare_load(held[:5], pinned)
    assert manager.prepare_store(KEYS[20:22], ReqContext("other")) is None
    manager.complete_load(held[:5], pinned)
    manager.reset_cache()
    assert all(manager._policy.get(key) is None for key in KEYS)
