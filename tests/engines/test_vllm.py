# SPDX-License-Identifier: Apache-2.0
"""`KvlibConnector` in the real engine with a real model, against the same engine without it."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
from vllm_engine import Engine

MODEL = Path(os.environ["KVLIB_ENGINE_MODEL"])
LONG = 4100
PAGE = 32


@pytest.fixture(scope="module")
def text():
    """Token ids of long real text."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))


@pytest.fixture(scope="module")
def prompts(text):
    """Prompts of each test: a long one, a batch that shares a prefix, one cut mid-way, others."""
    shared = text[6000:6200]
    return {
        "long": [text[:LONG]],
        "batch": [shared + text[7000 + 200 * i : 7150 + 200 * i] for i in range(3)],
        "cut": [shared + text[7000:7100] + text[9000:9100]],
        "short": [text[9500:9540]],
        "fault": [text[10000:10350]],
        "salt": [text[11000:11200]],
    }


@pytest.fixture(scope="module")
def without():
    """An engine without kvlib."""
    with Engine(MODEL, enable_prefix_caching=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(without, prompts):
    """What the engine says without kvlib."""
    return {name: without.generate(*batch)["tokens"] for name, batch in prompts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The store that several engines of this module share."""
    return tmp_path_factory.mktemp("store") / "kv"


@pytest.fixture(scope="module")
def engine(folder, plain):
    """An engine with kvlib."""
    with Engine(MODEL, folder) as engine:
        yield engine


def test_a_long_prompt_is_stored_and_found_again(engine, prompts, plain):
    (prompt,) = prompts["long"]
    cold = engine.generate(prompt)
    assert cold["cached"] == [0]
    assert cold["tokens"] == plain["long"]
    engine.reset()
    warm = engine.generate(prompt)
    assert warm["cached"][0] >= 0.95 * len(prompt)
    assert warm["tokens"] == plain["long"]
    counts = engine.counts()
    assert counts["loaded_tokens"] == warm["cached"][0]
    assert counts["saved_tokens"] >= len(prompt) // 64 * 64
    assert counts["errors"] == counts["load_errors"] == counts["stage_errors"] == 0


def test_a_new_process_finds_it(engine, folder, prompts, plain):
    """Also while the first one is there; with chunked prefill, and without prefix caching."""
    options = {"max_num_batched_tokens": 512, "enable_prefix_caching": False}
    with Engine(MODEL, folder, fresh=True, **options) as other:
        warm = other.generate(*prompts["long"])
        assert warm["cached"][0] >= 0.95 * LONG
        assert warm["tokens"] == plain["long"]
        batch = other.generate(*prompts["batch"])  # stored in chunks of 512 tokens
        assert batch["tokens"] == plain["batch"]
        again = other.generate(*prompts["batch"])
        assert min(again["cached"]) >= 320 - PAGE
        assert again["tokens"] == plain["batch"]
        assert other.counts()["errors"] == 0


def test_a_batch_with_a_shared_prefix(engine, prompts, plain):
    engine.reset()
    batch = engine.generate(*prompts["batch"])
    assert batch["tokens"] == plain["batch"]
    engine.reset()
    again = engine.generate(*prompts["batch"])
    assert again["tokens"] == plain["batch"]
    assert min(again["cached"]) >= 320 - PAGE


def test_a_prefix_cut_midway(engine, prompts, plain):
    """Blocks before the first token that differs are loaded, and nothing after."""
    engine.reset()
    cut = engine.generate(*prompts["cut"])
    assert cut["tokens"] == plain["cut"]
    assert 256 <= cut["cached"][0] <= 300


def test_part_of_it_is_in_the_engine(engine, prompts, plain):
    """The engine holds the first half: only the second is loaded."""
    engine.reset()
    (prompt,) = prompts["long"]
    engine.generate(prompt[:2048], max_tokens=1)
    before = engine.counts()["loaded_tokens"]
    warm = engine.generate(prompt)
    assert warm["tokens"] == plain["long"]
    assert warm["cached"][0] >= 0.95 * len(prompt)
    assert engine.counts()["loaded_tokens"] - before <= len(prompt) - 1984


def test_a_prompt_shorter_than_a_block(engine, prompts, plain):
    assert engine.generate(*prompts["short"])["tokens"] == plain["short"]


def test_salts_share_nothing(engine, prompts, plain):
    """Two clients' salts, and none, are three worlds; the same salt is one."""
    for salt in ("a", "b", None):
        engine.reset()
        cold = engine.generate(*prompts["salt"], salts=[salt])
        assert cold["cached"] == [0]
        assert cold["tokens"] == plain["salt"]
    for salt in ("a", None):
        engine.reset()
        warm = engine.generate(*prompts["salt"], salts=[salt])
        assert warm["cached"][0] == 192
        assert warm["tokens"] == plain["salt"]


def test_hints_of_a_client(engine, text):
    """A request may ask not to be stored, and not to be served."""
    prompt = text[11500:11700]
    engine.generate(prompt, extra_args={"kv_transfer_params": {"kvlib": {"write": False}}})
    engine.reset()
    assert engine.generate(prompt)["cached"] == [0]
    engine.reset()
    hint = {"kv_transfer_params": {"kvlib": {"read": False}}}
    assert engine.generate(prompt, extra_args=hint)["cached"] == [0]
    engine.reset()
    assert engine.generate(prompt)["cached"] == [192]


def test_what_was_generated_is_found_too(engine, text):
    """The next turn of a conversation begins with the answer."""
    prompt = text[12000:12100]
    out = engine.generate(prompt, max_tokens=100)["tokens"][0]
    engine.reset()
    turn = engine.generate(prompt + out + text[12200:12230])
    assert turn["cached"][0] >= 192


def test_a_reset_of_the_connector_makes_all_unreachable(folder, prompts, plain):
    """As after new weights; another engine with the old ones finds them."""
    with Engine(MODEL, folder) as other:
        assert other.generate(*prompts["salt"])["cached"] == [192]
        other.reset(connector=True)
        gone = other.generate(*prompts["salt"])
        assert gone["cached"] == [0]
        assert gone["tokens"] == plain["salt"]
        other.reset()
        assert other.generate(*prompts["salt"])["cached"] == [192]  # of the new epoch


def store_files(folder):
    """The segment files of a store."""
    return sorted(folder.glob("seg-*.kv"))


def test_faults_while_the_engine_runs(tmp_path, prompts, plain):
    """Flipped bytes, a cut segment, a deleted folder: computed again, counted, never wrong."""
    folder = tmp_path / "kv"
    (prompt,) = prompts["fault"]
    with Engine(MODEL, folder, extra={"memory": 0}) as engine:
        assert engine.generate(prompt)["tokens"] == plain["fault"]
        engine.reset()
        assert engine.generate(prompt)["cached"] == [320]

        rng = random.Random(0)
        for path in store_files(folder):
            with path.open("r+b") as file:
                size = path.stat().st_size
                for at in range(0, size, 1 << 16):
                    file.seek(at + rng.randrange(1 << 15))
                    byte = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte[0] ^ 0x40]))
        engine.reset()
        damaged = engine.generate(prompt)
        assert damaged["tokens"] == plain["fault"]
        assert damaged["cached"][0] < 320
        engine.reset()
        assert engine.generate(prompt)["tokens"] == plain["fault"]

        for path in store_files(folder):
            os.truncate(path, path.stat().st_size // 3)
        engine.reset()
        assert engine.generate(prompt)["tokens"] == plain["fault"]

        shutil.rmtree(folder)
        engine.reset()
        gone = engine.generate(prompt)
        assert gone["tokens"] == plain["fault"]
        assert gone["reasons"] == ["length"]


def test_a_full_disk(tmp_path, prompts, plain):
    """What cannot be stored is dropped and counted."""
    folder = tmp_path / "kv"
    with Engine(MODEL, folder, extra={"memory": 0, "disk": "8MiB"}) as engine:
        for name in ("fault", "salt", "batch"):
            assert engine.generate(*prompts[name])["tokens"] == plain[name]
        engine.reset()
        assert engine.generate(*prompts["fault"])["tokens"] == plain["fault"]
    assert sum(path.stat().st_size for path in store_files(folder)) <= 8 << 20


def test_a_stalled_disk(tmp_path, prompts, plain):
    """The disk hangs: a request waits as long as it was told to, the engine never does."""
    extra = {"memory": 0, "deadline": 1.0}
    with Engine(MODEL, tmp_path / "kv", extra=extra, time_calls=True) as engine:
        engine.generate(*prompts["fault"])
        engine.reset()
        engine.ask("calls")
        engine.ask("stall")
        slow = engine.generate(*prompts["fault"], max_tokens=32)
        assert slow["cached"] == [0]
        assert slow["tokens"][0][:8] == plain["fault"][0]
        calls = engine.ask("calls")["calls"]
        assert len(calls) > 250
        engine.ask("stall", over=True)
        engine.reset()
        assert engine.generate(*prompts["fault"])["tokens"] == plain["fault"]


def test_another_model_never_hits(tmp_path, prompts, plain):
    """The same weights under another name are another model to the store."""
    with Engine(MODEL, tmp_path / "kv", extra={"model_id": "one"}) as one:
        one.generate(*prompts["salt"])
    with Engine(MODEL, tmp_path / "kv", extra={"model_id": "two"}) as two:
        other = two.generate(*prompts["salt"])
        assert other["cached"] == [0]
        assert other["tokens"] == plain["salt"]


def test_two_engines_and_a_kill(tmp_path, prompts, plain):
    """One is killed while it stores; the other goes on, and nothing wrong is found afterwards."""
    folder = tmp_path / "kv"
    with Engine(MODEL, folder) as survivor:
        victim = Engine(MODEL, folder)
        victim.begin(
            "generate", prompts=prompts["batch"], salts=[None] * 3, max_tokens=64, extra_args=None
        )
        assert survivor.generate(*prompts["fault"])["tokens"] == plain["fault"]
        limit = time.monotonic() + 60
        while not store_files(folder) and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(random.Random(1).random())
        victim.kill()
        survivor.reset()
        assert survivor.generate(*prompts["batch"])["tokens"] == plain["batch"]
        assert survivor.generate(*prompts["fault"])["tokens"] == plain["fault"]
        assert survivor.counts()["errors"] == 0


def test_a_lossy_codec_says_so(tmp_path, prompts):
    """kvlc needs a fifth of the bytes, at the quality that it states."""
    folder = tmp_path / "kv"
    (prompt,) = prompts["fault"]
    with Engine(MODEL, folder, extra={"codec": "kvlc:preset=near"}) as engine:
        cold = engine.generate(prompt, max_tokens=1)
        engine.reset()
        warm = engine.generate(prompt, max_tokens=1)
        assert warm["cached"] == [320]
        assert warm["tokens"] == cold["tokens"]
        counts = engine.counts()
        assert counts["stored_bytes_read"] * 5 < counts["staged_bytes"]


def test_ngram_speculation_stores_accepted_tokens_only(tmp_path, without, text):
    """Drafts that were refused leave no trace in the store."""
    prompt = (text[100:164] * 3)[:180]
    speculative = {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    plain = without.generate(prompt, max_tokens=90)["tokens"][0]
    with Engine(MODEL, tmp_path / "kv", speculative_config=speculative) as engine:
        assert engine.generate(prompt, max_tokens=90)["tokens"][0] == plain
        metrics = engine.ask("metrics")
        assert metrics["spec_decode_num_accepted_tokens"] > 0
        assert metrics["spec_decode_num_accepted_tokens"] < metrics["spec_decode_num_draft_tokens"]
        engine.reset()
        turn = prompt + plain + text[:5]
        again = engine.generate(turn, max_tokens=20)
        assert again["cached"][0] >= 256
    assert without.generate(turn, max_tokens=20)["tokens"] == again["tokens"]


def test_preemption(tmp_path, without, text):
    """More requests than the engine has pages for: some lose theirs while they are being saved."""
    many = [text[13000 + 300 * i : 13150 + 300 * i] for i in range(4)]
    expected = without.generate(*many, max_tokens=48)["tokens"]
    small = {"num_gpu_blocks_override": 18, "max_model_len": 512}
    with Engine(MODEL, tmp_path / "kv", **small) as engine:
        assert engine.generate(*many, max_tokens=48)["tokens"] == expected
        assert engine.ask("metrics")["num_preemptions"] > 0
        assert engine.counts()["errors"] == 0
        engine.reset()
        again = engine.generate(*many, max_tokens=48)
        assert again["tokens"] == expected
        assert min(again["cached"]) >= 128


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"transfer": {"kv_load_failure_policy": "fail"}}, "recompute"),
        ({"extra": {"cdoec": "exact"}}, "codec"),
        ({"extra": {"codec": "kvlz"}}, "kvlc"),
        ({"kv_cache_dtype": "fp8"}, "auto"),
    ],
)
def test_what_is_not_served_is_refused_at_the_start(tmp_path, given, words):
    with pytest.raises(RuntimeError, match=words):
        Engine(MODEL, tmp_path / "kv", **given)
