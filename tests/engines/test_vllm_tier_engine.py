# SPDX-License-Identifier: Apache-2.0
"""`KvlibTier` and a policy of kvlib's in the real engine, on pages of the CPU's attention."""

import pytest
from vllm_engine import Engine

CHUNK = 64


def offloading(path, **tier):
    """The engine's options: small pages, larger chunks."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_connector_module_path": None,
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "vllm_cpu_offload",
            "cpu_bytes_to_use": 96 << 20,
            "block_size": CHUNK,
            "offload_prompt_only": False,
            "eviction_policy": "kvlib:s3fifo",
            "cache_policy_module_path": "kvlib.connectors.vllm_policy",
            "secondary_tiers": [
                {
                    "type": "KvlibTier",
                    "module_path": "kvlib.connectors.vllm_tier",
                    "path": str(path),
                    "disk": "1GiB",
                    **tier,
                }
            ],
        },
    }


@pytest.fixture(scope="module")
def prompts(model_folder):
    """A prompt longer than a step, and a batch with a shared beginning."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)[:20]))
    shared = text[2000:2200]
    return {
        "long": [text[:800]],
        "batch": [shared + text[3000 + 200 * i : 3150 + 200 * i] for i in range(3)],
    }


@pytest.fixture(scope="module")
def plain(prompts, model_folder):
    """What the engine says without any connector."""
    with Engine(model_folder, enable_prefix_caching=False, max_num_batched_tokens=512) as engine:
        return {name: engine.generate(*batch)["tokens"] for name, batch in prompts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared by the engines of this module, one after the other."""
    return tmp_path_factory.mktemp("store") / "kv"


@pytest.fixture(scope="module")
def start(folder, model_folder):
    """Starts an engine on the folder."""

    def engine(**tier):
        transfer = offloading(folder, **tier)
        return Engine(model_folder, folder, transfer=transfer, max_num_batched_tokens=512)

    return engine


def assert_same(engine, prompts, plain, *, least):
    """The same answers, with at least that share of the prompts' whole chunks from the tiers."""
    for name, batch in prompts.items():
        out = engine.generate(*batch)
        assert out["tokens"] == plain[name], name
        whole = [(len(prompt) - 1) // CHUNK * CHUNK for prompt in batch]
        assert sum(out["cached"]) >= least * sum(whole), (name, out["cached"])


def test_what_was_stored_is_promoted_and_answers_do_not_change(start, prompts, plain):
    with start() as engine:
        assert_same(engine, prompts, plain, least=0)
        first = engine.ask("metrics")
        assert first["kvlib_tier_puts"] >= 18
        for _ in range(2):
            assert engine.ask("reset", connector=True)["done"]
            assert_same(engine, prompts, plain, least=1)
        second = engine.ask("metrics")
        assert second["kvlib_tier_hits"] >= 36
        assert second.get("kvlib_tier_failures", 0) == 0


def test_a_new_engine_finds_it_and_survives_damage(start, folder, prompts, plain):
    with start() as engine:
        assert_same(engine, prompts, plain, least=1)
        assert engine.ask("reset", connector=True)["done"]
        for file in folder.rglob("*"):
            if file.is_file() and "seg" in file.name:
                data = bytearray(file.read_bytes())
                data[8192::4096] = bytes(byte ^ 0xFF for byte in data[8192::4096])
                with file.open("r+b") as f:
                    f.write(data)
        assert_same(engine, prompts, plain, least=0)
        metrics = engine.ask("metrics")
        assert metrics["kvlib_tier_corrupt"] > 0
        assert engine.ask("reset", connector=True)["done"]
        assert_same(engine, prompts, plain, least=1)  # it was stored again


def test_another_tenant_does_not_find_it(start, prompts, plain):
    with start(salt="another") as engine:
        out = engine.generate(*prompts["long"])
        assert out["cached"] == [0]
        assert out["tokens"] == plain["long"]
