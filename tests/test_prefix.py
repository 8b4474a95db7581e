# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvlib
from kvlib.errors import ConfigError
from kvlib.testing.models import tiny_model

SECOND_PROCESS = """
import json, sys
import torch, transformers
import kvlib
folder, path, salt, ids, new = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with kvlib.KVStore(path, salt=salt) as store:
    prefix = kvlib.PrefixCache(model, store)
    restored = prefix.restore(ids).restored_tokens
    out = prefix.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
print(json.dumps([restored, out[0].tolist()]))
"""


@pytest.fixture
def model(tmp_path: Path):
    """A tiny model that came from a folder, and so has an identity."""
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()


def prompt(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 199, (1, n), generator=torch.Generator().manual_seed(seed))


def plain(model, ids: torch.Tensor, new: int = 12) -> list[int]:
    """Greedy output of transformers alone."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)[0].tolist()


def in_second_process(
    model, path: Path, ids: torch.Tensor, salt: str = ""
) -> tuple[int, list[int]]:
    request = json.dumps([model.config._name_or_path, str(path), salt, ids[0].tolist(), 12])
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, request], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    restored, tokens = json.loads(done.stdout.splitlines()[-1])
    return restored, tokens


def test_second_process_restores_and_answers_the_same(model, tmp_path):
    """A prompt stored by this process is restored by another, token for token the same output."""
    ids = prompt(400)
    with kvlib.KVStore(tmp_path / "kv") as store:
        first = kvlib.PrefixCache(model, store).generate(ids, max_new_tokens=12, do_sample=False)
    restored, tokens = in_second_process(model, tmp_path / "kv", ids)
    assert restored == 384
    assert first[0].tolist() == tokens == plain(model, ids)
    assert in_second_process(model, tmp_path / "kv", ids, salt="other")[0] == 0


def test_restored_keys_and_values_are_bit_equal(model):
    """With the codec exact, what comes back is what the model computed."""
    ids = prompt(300)
    prefix = kvlib.PrefixCache(model, kvlib.KVStore())
    report = prefix.prefill(ids)
    assert (report.restored_tokens, report.computed_tokens) == (0, 300)
    assert report.put.stored_blocks == 4
    cache = prefix.restore(ids)
    assert cache.restored_tokens == 256
    assert cache.fidelity == "exact"
    for mine, theirs in zip(cache.layers, report.cache.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys[:, :, :256])
        assert torch.equal(mine.values, theirs.values[:, :, :256])


@pytest.mark.parametrize(
    ("shared", "hit"), [(0, 0), (63, 0), (64, 64), (130, 128), (257, 256), (320, 320)]
)
def test_partial_hits_restore_the_shared_whole_blocks(model, shared, hit):
    """A prompt that shares its beginning restores the shared blocks and answers the same."""
    prefix = kvlib.PrefixCache(model, kvlib.KVStore())
    stored = prompt(330, seed=1)
    prefix.prefill(stored)
    ids = torch.cat([stored[:, :shared], prompt(400 - shared, seed=2)], dim=1)
    ids[0, shared] = (int(stored[0, shared]) + 1) % 199
    assert prefix.restore(ids).restored_tokens == hit
    assert prefix.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist() == plain(model, ids)


def test_one_token_is_always_left_to_compute(model):
    """A prompt that is stored to its last token still leaves one block's worth to the model."""
    prefix = kvlib.PrefixCache(model, kvlib.KVStore())
    ids = prompt(128)
    prefix.prefill(ids)
    assert prefix.restore(ids).restored_tokens == 64
    assert prefix.restore(ids[:, :64]).restored_tokens == 0
    assert prefix.restore(torch.cat([ids, ids[:, :1]], dim=1)).restored_tokens == 128


def test_a_conversation_grows_turn_by_turn(model):
    """Each turn restores what the turns before stored and stores only what is new."""
    store = kvlib.KVStore()
    prefix = kvlib.PrefixCache(model, store)
    ids = prompt(200)
    for turn in range(4):
        before = store.stats().stored_blocks
        cache = prefix.restore(ids)
        assert cache.restored_tokens == (
            0 if turn == 0 else 192 + 100 * (turn - 1) - (192 + 100 * (turn - 1)) % 64
        )
        out = prefix.generate(ids, max_new_tokens=5, do_sample=False)
        assert out[0].tolist() == plain(model, ids, new=5)
        assert (
            store.stats().stored_blocks - before == len(ids[0]) // 64 - cache.restored_tokens // 64
        )
        ids = torch.cat([ids, prompt(100, seed=turn + 9)], dim=1)


def test_another_model_adapter_dtype_or_salt_never_hits(model, tmp_path):
    """Each thing the numbers depend on separates the caches."""
    ids = prompt(200)
    path = tmp_path / "kv"
    with kvlib.KVStore(path) as store:
        kvlib.PrefixCache(model, store, model_id="a").prefill(ids)
        assert kvlib.PrefixCache(model, store, model_id="a").restore(ids).restored_tokens == 192
        for other in (
            kvlib.PrefixCache(model, store, model_id="b"),
            kvlib.PrefixCache(model, store),
            kvlib.PrefixCache(model, store, model_id="a", adapter="lora"),
            kvlib.PrefixCache(model, store, model_id="a", extras=[kvlib.Extra("image", b"1")]),
            kvlib.PrefixCache(model.to(torch.bfloat16), store, model_id="a"),
        ):
            assert other.restore(ids).restored_tokens == 0
    model.to(torch.float32)
    for settings in ({"salt": "tenant"}, {"codec": "int8"}):
        with kvlib.KVStore(path, **settings) as store:
            assert kvlib.PrefixCache(model, store, model_id="a").restore(ids).restored_tokens == 0


def test_weights_of_the_same_shape_are_told_apart(tmp_path):
    """Two models that differ only in their weights have different identities."""
    from transformers import AutoModelForCausalLM

    specs = []
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(tmp_path / str(seed))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(seed))
        specs.append(kvlib.PrefixCache(loaded, kvlib.KVStore()).spec.fingerprint())
    assert specs[0] != specs[1]


def test_a_model_without_identity_is_refused():
    """A bare in-memory model cannot persist: the error names model_id=."""
    with pytest.raises(ConfigError, match="model_id="):
        kvlib.PrefixCache(tiny_model(), kvlib.KVStore())


@pytest.mark.parametrize(
    ("config_class", "changes", "named"),
    [
        ("MistralConfig", {"sliding_window": 32}, "sliding layers 0-2"),
        ("Gemma3TextConfig", {"num_hidden_layers": 6, "sliding_window": 32}, "sliding layers 0-4"),
        ("DeepseekV3Config", {"head_dim": None, "first_k_dense_replace": 9}, "mla layers 0-2"),
        ("Qwen3NextConfig", {"num_hidden_layers": 4}, "recurrent layers 0-2"),
    ],
)
def test_unsupported_layers_are_refused_by_name(config_class, changes, named):
    """A model with other than full attention layers is refused, and the error says which layers."""
    changes = {k: v for k, v in changes.items() if v is not None}
    with pytest.raises(ConfigError, match=named):
        kvlib.PrefixCache(tiny_model(config_class, **changes), kvlib.KVStore(), model_id="m")


@pytest.mark.parametrize(
    ("config_class", "changes"),
    [
        ("Qwen3Config", {}),
        ("PhiConfig", {"partial_rotary_factor": 0.5, "hidden_size": 48, "num_attention_heads": 6}),
        (
            "GPT2Config",
            {
                "n_embd": 48,
                "n_head": 6,
                "n_layer": 3,
                "n_positions": 2048,
                "num_key_value_heads": 6,
            },
        ),
    ],
)
def test_full_attention_models_give_the_same_output(config_class, changes):
    """QK-norm, partial rotary and no rotary at all: restored output equals plain generation."""
    model = tiny_model(config_class, **changes)
    prefix = kvlib.PrefixCache(model, kvlib.KVStore(), model_id="m")
    ids = prompt(300)
    prefix.prefill(ids, chunk_tokens=100)
    assert prefix.restore(ids).restored_tokens == 256
    assert prefix.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist() == plain(model, ids)


def test_lossy_ancestry_never_answers_an_exact_request(model):
    """KV computed after an int8 prefix is kept apart from exact KV, whatever codec stores it."""
    ids = prompt(330)
    lossy = kvlib.PrefixCache(model, kvlib.KVStore(codec="int8"), model_id="m")
    lossy.prefill(ids[:, :128])
    cache = lossy.prefill(ids).cache
    assert (cache.restored_tokens, cache.fidelity) == (128, "int8@1:group=64")

    exact_store = kvlib.KVStore(codec="exact")
    exact = kvlib.PrefixCache(model, exact_store, model_id="m")
    assert (
        exact.save(ids, cache).stored_blocks == 3
    )  # blocks 2..4; the restored ones are not re-encoded
    keys = exact_store.block_keys(exact.spec, ids[0])
    assert exact_store.load(exact.spec, keys).num_blocks == 0
    exact.prefill(ids)
    restored = exact.restore(ids)
    assert (restored.restored_tokens, restored.fidelity) == (320, "exact")


def test_a_lossy_store_says_so_and_goes_on_from_its_own_blocks(model):
    """With int8, a later turn finds blocks born of exact and of int8 ancestors alike."""
    ids = prompt(400)
    prefix = kvlib.PrefixCache(model, kvlib.KVStore(codec="int8"), model_id="m")
    prefix.prefill(ids[:, :200])
    prefix.prefill(ids)
    cache = prefix.restore(ids)
    assert (cache.restored_tokens, cache.fidelity) == (384, "int8@1:group=64")


def test_corrupt_records_slow_a_request_but_never_change_it(model, tmp_path):
    """A flipped byte on disk is a counted miss; the output is that of recomputation."""
    ids = prompt(600)
    with kvlib.KVStore(tmp_path / "kv", memory=0, tier="file") as store:
        kvlib.PrefixCache(model, store).prefill(ids)
        expected = plain(model, ids)
        files = sorted((tmp_path / "kv").rglob("*.kvlc"))
        assert len(files) == 3  # two chunks of 4 blocks, one tail block
        for file in files:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 16
            file.write_bytes(data)
    with kvlib.KVStore(tmp_path / "kv", memory=0) as store:
        prefix = kvlib.PrefixCache(model, store)
        assert prefix.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist() == expected
        assert store.stats().tiers["file"].corrupt >= 1
        for _ in files:  # each call finds at least one more damaged record, and stores it again
            prefix.prefill(ids)
        assert prefix.restore(ids).restored_tokens == 576


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"past_key_values": None}],
)
def test_what_one_sequence_cannot_do_is_refused(model, arguments):
    """Beams, several samples and a foreign cache get a clear error before anything runs."""
    prefix = kvlib.PrefixCache(model, kvlib.KVStore())
    with pytest.raises(ConfigError):
        prefix.generate(prompt(70), max_new_tokens=2, **arguments)


def test_batches_and_padding_are_refused(model):
    """Two sequences or a mask with zeros get a clear error."""
    prefix = kvlib.PrefixCache(model, kvlib.KVStore())
    with pytest.raises(ConfigError, match="one sequence"):
        prefix.restore(torch.ones((2, 70), dtype=torch.long))
    mask = torch.ones((1, 70), dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ConfigError, match="padding"):
        prefix.generate(prompt(70), attention_mask=mask)


def test_sampling_and_streaming_work_after_a_restore(model):
    """Sampled output with a seed equals plain sampling; a streamer sees every token."""
    ids = prompt(200)
    prefix = kvlib.PrefixCache(model, kvlib.KVStore())
    prefix.prefill(ids)
    settings = {"max_new_tokens": 10, "do_sample": True, "top_k": 20}
    torch.manual_seed(5)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    torch.manual_seed(5)
    got = prefix.generate(ids, streamer=streamer, **settings)
    assert got.tolist() == want.tolist()
    assert streamer.tokens == want[0].tolist()


def test_progress_reaches_the_end(model):
    """The callback sees the restored tokens first and all tokens last."""
    prefix = kvlib.PrefixCache(model, kvlib.KVStore())
    prefix.prefill(prompt(150))
    seen: list[tuple[int, int]] = []
    prefix.prefill(
        torch.cat([prompt(150), prompt(150, seed=3)], dim=1),
        chunk_tokens=64,
        progress=lambda *x: seen.append(x),
    )
    assert seen[0] == (128, 300)
    assert seen[-1] == (300, 300)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_generate_can_leave_the_store_as_it_is(model):
    """With save=False nothing is stored, and the output is the same."""
    store = kvlib.KVStore()
    prefix = kvlib.PrefixCache(model, store)
    ids = prompt(200)
    out = prefix.generate(ids, save=False, max_new_tokens=12, do_sample=False)
    assert out[0].tolist() == plain(model, ids)
    assert store.stats().stored_blocks == 0
