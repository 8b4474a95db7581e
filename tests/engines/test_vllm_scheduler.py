# SPDX-License-Identifier: Apache-2.0
"""`KvlibConnector` under vLLM's own scheduler, step by step, with pages that are checked."""

import threading
import time

import pytest
from vllm_steps import Steps

PROMPT = [(i * 37) % 499 for i in range(700)]
WAYS = [
    pytest.param({}, id="together"),
    pytest.param({"apart": True}, id="apart"),
    pytest.param({"late": True}, id="overlapping"),
    pytest.param({"late": True, "apart": True, "drafts": True}, id="overlapping-apart-drafts"),
]
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Makes engines on one store."""
    made = []

    def make(**given):
        made.append(Steps(tmp_path / "model", tmp_path / "kv", monkeypatch, **given))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def filled(engine):
    """Makes engines whose store holds `PROMPT` and whose pages hold nothing."""

    def make(**given):
        one = engine(**given)
        one.add("first", PROMPT)
        one.run()
        one.saved()
        one.reset()
        return one

    return make


def held(one, name, of):
    """Let a method of some part wait; what lets it go on, and what tells that it waits."""
    go, waits, method = threading.Event(), threading.Event(), getattr(of, name)

    def slow(*args, **kwargs):
        waits.set()
        assert go.wait(20)
        return method(*args, **kwargs)

    setattr(of, name, slow)
    return go, waits


@ways
@pytest.mark.parametrize("page", [16, 48, 128])
def test_a_prompt_is_stored_looked_up_loaded_and_over(engine, way, page):
    """Match, allocate, load, finish: in chunks, with pages of any size; a prefix cut mid-way."""
    one = engine(page=page, batch=200, pages=16000 // page, **way)
    one.add("a", PROMPT, max_tokens=70)
    one.run()
    one.saved()
    assert one.cached["a"] == 0
    one.reset()
    one.add("b", PROMPT)
    one.add("d", PROMPT[:64])
    one.add("e", [3] * 10)
    one.run()
    assert one.cached["b"] == 640 // page * page
    one.reset()
    one.add("c", PROMPT[:500] + [1] * 100)
    one.run()
    assert one.cached["c"] == 448 // page * page
    assert one.received == ["b", "c"]
    assert not one.invalid
    one.assert_empty()


@ways
def test_a_prompt_of_whole_pages_leaves_a_token_to_compute(filled, way):
    one = filled(page=64, **way)
    one.add("a", PROMPT[:640])
    one.run()
    assert one.cached["a"] == 576
    one.assert_empty()


@ways
def test_a_request_waits_while_others_go_on_and_may_be_aborted(filled, way):
    """None while the store is asked; a request that ends meanwhile leaves nothing."""
    one = filled(**way)
    go, waits = held(one, "match", one.mover.store)
    one.add("a", PROMPT)
    one.add("gone", PROMPT[:600])
    short = one.add("short", [5] * 20)
    one.until(lambda: short.is_finished() and waits.is_set())
    assert not one.outputs["a"]
    one.abort("gone")
    one.step()
    go.set()
    one.run()
    assert one.cached["a"] == 640
    assert one.received == ["a"]
    one.assert_empty()


@ways
def test_an_abort_while_pages_are_filled(filled, way):
    """The pages stay until the load is over, are freed once, and nothing is left."""
    one = filled(**way)
    go, waits = held(one, "write_layer", one.mover.pages)
    one.add("a", PROMPT)
    one.until(waits.is_set)
    one.abort("a")
    for _ in range(5):
        one.step()
    assert one.scheduler.kv_cache_manager.usage > 0
    go.set()
    one.run()
    one.add("b", PROMPT)
    one.run()
    assert one.cached["b"] == 640
    one.assert_empty()


@ways
def test_pages_that_could_not_be_filled_are_computed(filled, way):
    """At once: nobody waits, and nothing is tried again."""
    one = filled(**way)
    write = one.mover.pages.write_layer
    calls = []

    def broken(*args):
        calls.append(args)
        write(*args)
        if len(calls) == 2:
            raise RuntimeError("the device says no")

    one.mover.pages.write_layer = broken
    begun = time.monotonic()
    one.add("a", PROMPT)
    one.run()
    assert time.monotonic() - begun < 8
    assert one.received == ["a"]
    assert len(one.invalid) == 40
    assert len(calls) == 2
    one.assert_empty()


@ways
def test_preempted_requests_come_back(engine, way):
    """More requests than pages: some lose theirs while they are copied out; all is found later."""
    one = engine(pages=110, **way)
    read = one.mover.pages.read_layer

    def slow(*args):
        time.sleep(0.02)
        return read(*args)

    one.mover.pages.read_layer = slow
    prompts = [[i, *PROMPT[:300]] for i in range(6)]
    for i, prompt in enumerate(prompts):
        one.add(f"a{i}", prompt, max_tokens=150)
    requests = list(one.scheduler.requests.values())
    one.run(60)
    assert sum(request.num_preemptions for request in requests) > 0
    one.assert_empty()
    one.mover.pages.read_layer = read
    one.saved()
    one.reset()
    for i, prompt in enumerate(prompts):
        one.add(f"b{i}", prompt)
        one.run()
        assert one.cached[f"b{i}"] == 256
        one.reset()
    one.assert_empty()


@ways
def test_an_abort_before_pages_are_copied_out(engine, way):
    """Also when the step that completes blocks is still to come: nobody gets the pages sooner."""
    one = engine(pages=45, **way)
    go, _ = held(one, "read_layer", one.mover.pages)
    a = one.add("a", PROMPT[:512])
    one.until(lambda: a.num_computed_tokens > 0)
    one.abort("a")
    one.add("b", [9] * 512)
    timer = threading.Timer(0.5, go.set)
    timer.start()
    one.run()
    timer.join()
    one.saved()
    one.assert_empty()
    one.reset()
    one.add("c", PROMPT[:520])
    one.run()
    assert one.cached["c"] == 512
    one.assert_empty()


@ways
def test_new_weights_while_requests_wait(filled, way):
    """What was staged of the old ones is not served."""
    one = filled(**way)
    go, waits = held(one, "match", one.mover.store)
    one.add("a", PROMPT)
    one.until(waits.is_set)
    go.set()
    assert one.mover.wait_staged("a", 10).num_blocks == 10
    one.reset(connector=True)
    one.run()
    assert one.cached["a"] == 0
    assert one.received == []
    one.assert_empty()


@ways
def test_the_engine_loses_pages_while_the_store_is_asked(filled, way):
    """What it had is asked for, too."""
    one = filled(**way)
    one.add("half", PROMPT[:330])
    one.run()
    one.received.clear()
    go, waits = held(one, "match", one.mover.store)
    one.add("a", PROMPT)
    one.until(waits.is_set)
    one.reset()
    go.set()
    one.run()
    assert one.cached["a"] == 640
    assert one.received == ["a"]
    assert not one.invalid
    one.assert_empty()


@ways
def test_running_requests_are_reset(filled, way):
    """They lose their pages between two steps, and ask again."""
    one = filled(**way)
    one.add("a", PROMPT, max_tokens=20)
    one.until(lambda: one.outputs["a"])
    assert one.scheduler.reset_prefix_cache(reset_running_requests=True)
    begun = time.monotonic()
    one.run()
    assert time.monotonic() - begun < 8
    assert not one.invalid
    one.assert_empty()


def test_prompt_logprobs_are_computed(filled):
    """A request that may not read the engine's cache does not read the store."""
    one = filled()
    one.add("a", PROMPT, sampling={"prompt_logprobs": 1})
    one.run()
    assert one.received == []
    one.assert_empty()


@pytest.mark.parametrize("hints", ["no", 3, {"read": False}, {"kvlib": 1}])
def test_hints_of_any_form(filled, hints):
    one = filled()
    one.add("a", PROMPT, sampling={"extra_args": {"kv_transfer_params": {"kvlib": hints}}})
    one.run()
    assert one.cached["a"] == (0 if hints == {"read": False} else 640)
    one.assert_empty()


@pytest.mark.parametrize(("role", "hit"), [("kv_producer", 0), ("kv_consumer", 640)])
def test_roles(filled, engine, role, hit):
    filled()
    one = engine(role=role)
    one.add("a", PROMPT)
    one.add("b", [1, *PROMPT])
    one.run()
    assert one.cached["a"] == hit
    assert one.mover.counts["saved_tokens"] == (0 if hit else 1344)
    one.assert_empty()
