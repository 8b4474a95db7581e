# SPDX-License-Identifier: Apache-2.0
"""`KvlibLinker` in a real SGLang on a CPU, with a real model."""

import os
import random
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kvlib import KVStore, PrefixCache
from kvlib.keys import BLOCK_TOKENS
from kvlib.model_spec import spec_for_model
from kvlib.smollm2 import load_folder

NEW = 12
PROMPT = 1793  # 28 blocks and the token that is always computed
WHOLE = PROMPT // BLOCK_TOKENS * BLOCK_TOKENS


def prompt(seed, tokens=PROMPT):
    """Words that no other seed begins with."""
    return [1, *random.Random(seed).choices(range(300, 40000), k=tokens - 1)]


PROMPTS = {
    "first": prompt(1),
    "other": prompt(2, 700),
    "third": prompt(3, 900),
    "stranger": prompt(4, 600),
    "flipped": prompt(5, 800),
    "cut": prompt(6, 800),
    "deleted": prompt(7, 600),
    "theirs": prompt(8, 1000),
}


@contextmanager
def engine(folder, **options):
    import sglang

    made = sglang.Engine(
        model_path=str(folder),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        dtype="float32",
        disable_overlap_schedule=True,
        disable_cuda_graph=True,
        max_total_tokens=8192,
        log_level="warning",
        **options,
    )
    try:
        yield made
    finally:
        made.shutdown()


def linked(path, **options):
    """Launch options for an engine with the linker; everything is read from the disk."""
    return {
        "enable_metrics": True,
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "KvlibLinker",
            "linker_module_path": "kvlib.connectors.sglang",
            "linker_extra_config": {"path": str(path), "memory": 0, "disk": "2GiB", "deadline": 60},
        },
        **options,
    }


def ask(running, ids, new=NEW):
    """Output ids and cached tokens of a prompt, or of some at a time."""
    begun = time.perf_counter()
    answer = running.generate(
        input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    )
    taken = time.perf_counter() - begun
    if isinstance(answer, list):
        return [(a["output_ids"], a["meta_info"]["cached_tokens"]) for a in answer]
    return answer["output_ids"], answer["meta_info"]["cached_tokens"], taken


def flush(running):
    running.flush_cache()


def published():
    """kvlib's metrics of all SGLang processes of this test run, as of the last publication."""
    from prometheus_client import CollectorRegistry, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    return {
        metric.name.removeprefix("sglang:kvlib_"): sum(
            s.value for s in metric.samples if s.name.endswith("_total")
        )
        for metric in registry.collect()
        if "kvlib_" in metric.name
    }


def counters():
    """The same with all that happened so far: unchanged for longer than publications are apart."""
    found, since_when = published(), time.monotonic()
    while time.monotonic() - since_when < 1.5:
        time.sleep(0.1)
        now = published()
        if now != found:
            found, since_when = now, time.monotonic()
    return found


def since(before, name, at_least=1, seconds=10.0):
    """How much a counter grew; waits for the next publication."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        grown = published().get(name, 0) - before.get(name, 0)
        if grown >= at_least:
            break
        time.sleep(0.2)
    return grown


def stored(path, spec, ids, blocks, seconds=30.0):
    """Wait until so many blocks of a prompt are on the disk."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with KVStore(path, memory=0) as store:
            found = store.match(spec, store.block_keys(spec, ids))
        if found >= blocks:
            break
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def model(model_folder):
    return load_folder(model_folder)[0]


@pytest.fixture(scope="module")
def spec(model):
    return spec_for_model(model)


@pytest.fixture(scope="module")
def expected(model_folder):
    """What SGLang says without the linker."""
    with engine(model_folder, page_size=64, disable_radix_cache=True) as plain:
        answers = {name: ask(plain, ids) for name, ids in PROMPTS.items()}
    return {name: output for name, (output, _, _) in answers.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("sglang") / "store"


@pytest.fixture(scope="module")
def linked_engine(model_folder, path, expected):
    """One engine for most tests; long prompts are prefilled in chunks."""
    with engine(model_folder, **linked(path, page_size=64, chunked_prefill_size=512)) as made:
        yield made


@pytest.fixture
def running(linked_engine):
    """Nothing is on the device."""
    flush(linked_engine)
    return linked_engine


def test_a_prompt_comes_back_after_a_flush(running, path, spec, expected):
    """Chunked prefill stores every block; a hit fills the pages and changes no token."""
    before = counters()
    output, cached, _ = ask(running, PROMPTS["first"])
    assert (output, cached) == (expected["first"], 0)
    assert stored(path, spec, PROMPTS["first"], WHOLE // BLOCK_TOKENS) == WHOLE // BLOCK_TOKENS
    flush(running)
    output, cached, _ = ask(running, PROMPTS["first"])
    assert output == expected["first"]
    assert cached >= 0.95 * WHOLE
    assert since(before, "loaded_tokens", cached) == cached
    assert since(before, "saved_tokens", WHOLE) >= WHOLE
    flush(running)
    _, _, recomputed = ask(running, prompt(99), new=1)
    flush(running)
    _, cached, hit = ask(running, PROMPTS["first"], new=1)
    assert cached >= 0.95 * WHOLE
    staged = since(before, "stage_us") / 2e6
    _, _, floor = ask(running, PROMPTS["first"], new=1)
    print(  # noqa: T201
        f"\nfirst token of {PROMPT} tokens: {recomputed:.2f} s computed, {hit:.2f} s on a hit, "
        f"{recomputed / hit:.1f} times sooner; a look-up held the scheduler {staged:.2f} s; "
        f"{floor:.2f} s with all of it on the device"
    )
    assert since(before, "errors", 1, seconds=1) == 0


def test_requests_at_a_time(running, path, spec, expected):
    """Some compute, some load, in one batch."""
    names = ["first", "other", "third"]
    answers = ask(running, [PROMPTS[name] for name in names])
    assert [output for output, _ in answers] == [expected[name] for name in names]
    assert answers[0][1] >= 0.95 * WHOLE
    for name in names:
        assert stored(path, spec, PROMPTS[name], len(PROMPTS[name]) // BLOCK_TOKENS)
    flush(running)
    answers = ask(running, [PROMPTS[name] for name in names])
    assert [output for output, _ in answers] == [expected[name] for name in names]
    for name, (_, cached) in zip(names, answers, strict=True):
        assert cached >= 0.95 * (len(PROMPTS[name]) // 64 * 64)


def test_a_part_on_the_device_and_the_rest_in_the_store(running, expected):
    """The tail is loaded behind what the device has."""
    ask(running, PROMPTS["first"][:400], new=1)
    before = counters()
    output, cached, _ = ask(running, PROMPTS["first"])
    assert output == expected["first"]
    assert cached >= 0.95 * WHOLE
    assert since(before, "loaded_tokens") == cached - 384


def test_transformers_reads_what_sglang_wrote(running, path, model, expected):
    """The same keys, the same numbers."""
    with KVStore(path, memory=0) as store:
        prefix = PrefixCache(model, store)
        ids = torch.tensor([PROMPTS["first"]])
        assert prefix.restore(ids).restored_tokens == WHOLE
        output = prefix.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert output[0, PROMPT:].tolist() == expected["first"]


def test_sglang_reads_what_transformers_wrote(running, path, model, expected):
    """In another process, while the engine runs."""
    with KVStore(path, memory=0) as store, torch.inference_mode():
        PrefixCache(model, store).prefill(PROMPTS["theirs"])
    output, cached, _ = ask(running, PROMPTS["theirs"])
    assert output == expected["theirs"]
    assert cached >= 0.95 * (len(PROMPTS["theirs"]) // 64 * 64)


def test_salted_requests_share_nothing_with_others(running, expected):
    """Neither way."""

    def salted(salt):
        answer = running.generate(
            input_ids=PROMPTS["other"],
            sampling_params={"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True},
            cache_salt=salt,
        )
        return answer["output_ids"], answer["meta_info"]["cached_tokens"]

    assert salted("tenant") == (expected["other"], 0)
    flush(running)
    output, cached = salted("tenant")
    assert output == expected["other"]
    assert cached >= 0.95 * (len(PROMPTS["other"]) // 64 * 64)


def test_the_model_has_one_identity(running, model_folder, spec):
    """SGLang's own configuration gives the fingerprint that transformers' model gives."""
    from sglang.srt.server_args import ServerArgs

    from kvlib.connectors.config import ConnectorConfig
    from kvlib.connectors.sglang_config import spec_of

    args = ServerArgs(model_path=str(model_folder), dtype="float32", device="cpu")
    assert spec_of(args, ConnectorConfig()).fingerprint() == spec.fingerprint()
    half = ServerArgs(model_path=str(model_folder), dtype="float16", device="cpu")
    assert spec_of(half, ConnectorConfig()).fingerprint() != spec.fingerprint()


def test_blocks_of_another_model_are_not_served(running, path, spec, expected):
    """The same tokens, other weights."""
    from dataclasses import replace

    from kvlib.blocks import KVBlock

    ids = PROMPTS["stranger"]
    other = replace(spec, model_id="user:another model")
    blocks = len(ids) // BLOCK_TOKENS
    shape = (spec.layers[0].num_kv_heads, blocks * BLOCK_TOKENS, spec.layers[0].k_head_dim)
    block = KVBlock.dense(other, [(torch.ones(shape), torch.ones(shape)) for _ in spec.layers])
    with KVStore(path, memory=0) as store:
        keys = store.block_keys(other, ids)
        assert store.put(other, keys, block).stored_blocks == blocks
    output, cached, _ = ask(running, ids)
    assert (output, cached) == (expected["stranger"], 0)


def test_a_flipped_byte_is_a_miss(running, path, spec, expected):
    """The damaged record and what follows it are computed again."""
    ids = PROMPTS["flipped"]
    ask(running, ids, new=1)
    assert stored(path, spec, ids, len(ids) // BLOCK_TOKENS)
    flush(running)
    before = counters()
    segment = max(path.glob("seg-*.kv"), key=lambda x: x.stat().st_mtime)
    data = bytearray(segment.read_bytes())
    for at in range(1 << 16, len(data), 1 << 16):
        data[at] ^= 0x10
    _overwrite(segment, data)
    output, _, _ = ask(running, ids)
    assert output == expected["flipped"]
    assert since(before, "corrupt_records") >= 1


def test_a_truncated_segment_is_a_miss(running, path, spec, expected):
    """While the engine has it open."""
    ids = PROMPTS["cut"]
    ask(running, ids, new=1)
    assert stored(path, spec, ids, len(ids) // BLOCK_TOKENS)
    flush(running)
    before = counters()
    for segment in path.glob("seg-*.kv"):
        os.truncate(segment, segment.stat().st_size // 3)
    output, cached, _ = ask(running, ids)
    assert output == expected["cut"]
    assert since(before, "lookups") >= 1
    assert cached < len(ids)


def test_new_weights_put_the_store_out_of_reach(running, model_folder, expected):
    """kvlib cannot know whether they are the same."""
    before = counters()
    running.update_weights_from_disk(str(model_folder))
    output, cached, _ = ask(running, PROMPTS["other"])
    assert (output, cached) == (expected["other"], 0)
    assert since(before, "resets") >= 1
    flush(running)
    output, cached, _ = ask(running, PROMPTS["other"])
    assert output == expected["other"]
    assert cached > 0  # its own


def test_a_deleted_directory_is_a_miss(running, path, expected):
    """Last in this engine: nothing is stored any more."""
    ask(running, PROMPTS["deleted"], new=1)
    flush(running)
    kept = path.with_name("kept")
    shutil.copytree(path, kept)
    shutil.rmtree(path)
    output, _, _ = ask(running, PROMPTS["deleted"])
    assert output == expected["deleted"]


def test_another_process_with_other_pages_reads_it(model_folder, path, model, expected, spec):
    """A restart, with pages of 16 tokens instead of 64; what page size wrote it does not matter."""
    again = Path(str(path) + "-16")
    with KVStore(again, memory=0) as store, torch.inference_mode():
        PrefixCache(model, store).prefill(PROMPTS["first"][: 40 * 16])
    with engine(model_folder, **linked(again, page_size=16, enable_metrics=False)) as restarted:
        output, cached, _ = ask(restarted, PROMPTS["first"])
        assert output == expected["first"]
        assert cached == 640
        assert stored(again, spec, PROMPTS["first"], WHOLE // BLOCK_TOKENS) == WHOLE // BLOCK_TOKENS
        ask(restarted, PROMPTS["first"][:48], new=1)
        flush(restarted)
        ask(restarted, PROMPTS["first"][:48], new=1)  # a device hit within a block
        output, cached, _ = ask(restarted, PROMPTS["first"])
        assert output == expected["first"]
        assert cached >= 0.95 * WHOLE


def _overwrite(path, data):
    with path.open("r+b") as file:
        file.write(data)
