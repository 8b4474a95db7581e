# SPDX-License-Identifier: Apache-2.0
"""EpiCache against attention matrices of transformers, its bounds, and its layer budgets."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from typer.testing import CliRunner

import kvlib
from kvlib.artefacts import model_identity, save_artefact
from kvlib.calibration import calibrate
from kvlib.calibration.epicache import key_similarity
from kvlib.cli import app
from kvlib.errors import ConfigError
from kvlib.eviction import build_policy
from kvlib.eviction.epicache import INSTRUCTION, EpiCache, layer_budgets, patch_digest
from kvlib.model_hooks import decoder_of
from kvlib.model_spec import spec_for_model
from kvlib.testing.models import tiny_model
from tests.oracles import epicache as oracle

LAYERS, HEADS = 3, 2


def model_of(group, seed=0):
    """Tiny, in float64, with attention far from uniform."""
    model = tiny_model(
        num_attention_heads=HEADS * group,
        hidden_size=8 * HEADS * group,
        attn_implementation="eager",
        seed=seed,
    ).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6)
    return model


def ids(num, seed=0):
    return torch.randint(0, 199, (num,), generator=torch.Generator().manual_seed(seed))


def profile(path, sensitivity, model, model_id="tiny"):
    save_artefact(
        path,
        kind="epicache",
        model=model_identity(spec_for_model(model, model_id=model_id)),
        tensors={
            "layers": torch.arange(len(sensitivity)),
            "sensitivity": torch.tensor(sensitivity),
        },
        settings={},
    )
    return str(path)


def positions(cache):
    layers = [cache.layer_kv(index) for index in range(len(cache.layers))]
    return [[row.positions.tolist() for row in layer.rows()] for layer in layers]


def prefill(model, cache, prompt, block):
    """Feed a prompt in blocks; returns what was held after each."""
    held = []
    for piece in prompt.split(block):
        model(piece[None], past_key_values=cache)
        held.append(positions(cache))
    cache.end_prefill()
    return held


# The block loop


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize(
    ("block", "num", "sinks", "uniform"),
    [(8, 40, 2, False), (7, 41, 0, False), (13, 42, 3, True), (100, 40, 2, False)],
)
def test_choices_are_the_oracles(group, block, num, sinks, uniform):
    """After every block, every head of every layer holds what the definition says."""
    model, prompt, patch = model_of(group, seed=group), ids(num, seed=group), ids(5, seed=9)
    expected, _, margin = oracle.block_loop(
        model,
        prompt.tolist(),
        patch.tolist(),
        block=block,
        budgets=[10] * LAYERS,
        sinks=sinks,
        uniform=uniform,
    )
    assert margin > 1e-5
    method = f"epicache:budget=10,sinks={sinks}" + "+uniform" * uniform
    cache = kvlib.KVCache(model, method, prefill_chunk_size=block, patch=patch)
    assert prefill(model, cache, prompt, block) == expected
    assert positions(cache) == expected[-1]  # the end of the prompt changes nothing any more
    for layer in positions(cache):
        assert sum(map(len, layer)) == 10 * HEADS
    if not uniform:
        assert len({len(row) for layer in expected[-1] for row in layer}) > 1


@torch.no_grad()
def test_with_the_question_as_patched_prompt():
    """One episode, whose patched prompt is the question: answers are the oracle's too."""
    model, prompt, question = model_of(3), ids(48, seed=1), ids(6, seed=2)
    expected, seen, margin = oracle.block_loop(
        model, prompt.tolist(), question.tolist(), block=12, budgets=[14] * LAYERS, sinks=2
    )
    assert margin > 1e-5
    cache = kvlib.KVCache(
        model, "epicache:budget=14,sinks=2", prefill_chunk_size=12, patch=question
    )
    assert prefill(model, cache, prompt, 12) == expected
    for layer, rows in enumerate(expected[-1]):
        for head, row in enumerate(rows):
            for i in range(48, 54):
                seen[layer, head, i, [*row, *range(48, i + 1)]] = True
    _, logits = oracle.attention(model, [*prompt.tolist(), *question.tolist()], seen)
    mine = model(question[None], past_key_values=cache).logits[0]
    np.testing.assert_allclose(mine, logits[48:], atol=1e-5)
    later = positions(cache)  # every later token stays
    for before, after in zip(expected[-1], later, strict=True):
        assert after == [[*row, *range(48, 54)] for row in before]


@torch.no_grad()
def test_layer_budgets_are_the_oracles(tmp_path):
    """With a profile, each layer goes back to its own share."""
    exact, prompt, patch = model_of(3, seed=4), ids(45, seed=4), ids(5, seed=9)
    model = copy.deepcopy(exact).float()
    numbers = [0.0, 0.3, 0.1]
    path = profile(tmp_path / "p", numbers, model)
    budgets = oracle.layer_budgets(numbers, 1.1, 0.25, 12)
    assert sum(budgets) == 12 * LAYERS
    assert budgets[1] > budgets[2] > budgets[0] == 3
    expected, _, margin = oracle.block_loop(
        exact, prompt.tolist(), patch.tolist(), block=10, budgets=budgets, sinks=1
    )
    assert margin > 1e-4
    policy = EpiCache(budget=12, sinks=1, profile=path)
    cache = kvlib.KVCache(model, policy, prefill_chunk_size=10, patch=patch, model_id="tiny")
    assert prefill(model, cache, prompt, 10) == expected
    assert [sum(map(len, layer)) for layer in positions(cache)] == [2 * n for n in budgets]
    assert policy.digest in cache.method


# Bounds


@torch.no_grad()
@pytest.mark.parametrize("with_profile", [False, True])
def test_no_layer_ever_holds_more_than_budget_and_block(with_profile, tmp_path):
    """Looked at after every layer of every pass, the patched prompt's own included."""
    model, prompt, patch = tiny_model(), ids(230), ids(9, seed=1)
    budgets = [20] * LAYERS
    policy = EpiCache(budget=20)
    if with_profile:
        path = profile(tmp_path / "p", [0.1, 0.2, 0.3], model)
        policy = EpiCache(budget=20, alpha=2.0, profile=path)
        budgets = oracle.layer_budgets([0.1, 0.2, 0.3], 2.0, 0.25, 20)
    cache = kvlib.KVCache(model, policy, prefill_chunk_size=16, patch=patch, model_id="tiny")
    most, whole = [0] * LAYERS, [0]

    def look(*_):
        now = [0] * LAYERS
        for index, layer in enumerate(cache.layers):
            if layer.rows is not None:
                now[index] = sum(layer.rows[0].layer.lengths) / HEADS
            elif layer.keys is not None:
                now[index] = layer.keys.shape[2]
        most[:] = map(max, most, now)
        whole.append(sum(now))

    hooks = [x.register_forward_hook(look) for x in decoder_of(model).layers]
    prefill(model, cache, prompt, 16)
    for hook in hooks:
        hook.remove()
    # Up to the average nothing goes, also in a layer that will keep less.
    assert all(n <= max(mine, 20) + 16 for n, mine in zip(most, budgets, strict=True))
    assert max(most) == max(budgets) + 16
    assert max(whole) == LAYERS * (20 + 16)
    assert [sum(cache.layer_kv(i).lengths) for i in range(LAYERS)] == [2 * n for n in budgets]


@torch.no_grad()
def test_the_patched_prompt_leaves_nothing():
    """No entry, no position and no number of it; the prompt's next token is at its own place."""
    model, prompt, patch = tiny_model(), ids(50), ids(9, seed=1)
    cache = kvlib.KVCache(model, "epicache:budget=20", prefill_chunk_size=16, patch=patch)
    prefill(model, cache, prompt, 16)
    assert cache.get_seq_length() == 50
    assert max(max(row) for layer in positions(cache) for row in layer) < 50
    for layer in cache.layers:
        assert layer.rows[0].state.entries == {}
    model(ids(1)[None], past_key_values=cache)
    assert all(row[-1] == 50 for layer in positions(cache) for row in layer)
    whole = kvlib.KVCache(model, "epicache:budget=50", prefill_chunk_size=16, patch=patch)
    prefill(model, whole, prompt, 16)  # what fits is not even probed
    plain = kvlib.KVCache(model)
    for piece in prompt.split(16):
        model(piece[None], past_key_values=plain)
    for index in range(LAYERS):
        assert torch.equal(whole.layer_kv(index).keys, plain.layer_kv(index).keys)


@torch.no_grad()
def test_a_fraction_is_one_of_what_has_come():
    """It grows with the prompt, until that ends."""
    model = tiny_model()
    cache = kvlib.KVCache(
        model, "epicache:budget=0.5+uniform", prefill_chunk_size=10, patch=ids(4, seed=1)
    )
    held = prefill(model, cache, ids(45), 10)
    assert [len(state[0][0]) for state in held] == [5, 10, 15, 20, 23]
    model(ids(10)[None], past_key_values=cache)
    assert cache.layer_kv(0).lengths == (33, 33)


@torch.no_grad()
def test_the_system_prompt_stays():
    """The first tokens are held by every head, however little attention they get."""
    model = model_of(3)
    cache = kvlib.KVCache(
        model, "epicache:budget=12,sinks=9", prefill_chunk_size=10, patch=ids(4, seed=1)
    )
    for state in prefill(model, cache, ids(60), 10):
        assert all(row[:9] == list(range(9)) for layer in state for row in layer)


# Layer budgets


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0, 8),
    st.sampled_from([0.0, 0.25, 0.9, 1.0]),
    st.integers(0, 5000),
)
def test_layer_budgets_sum_to_the_total(sensitivity, alpha, floor, budget):
    """Exactly, and each layer has its floor."""
    found = layer_budgets(tuple(sensitivity), alpha, floor, budget)
    assert sum(found) == len(sensitivity) * budget
    assert min(found) >= int(floor * budget)


@pytest.mark.parametrize(
    ("sensitivity", "alpha", "floor", "expected"),
    [
        ((0.1, 0.2, 0.3), 1.0, 0.0, (50, 100, 150)),
        ((0.0, 0.1, 0.3), 1.0, 0.0, (0, 75, 225)),  # the first layer's keys see no attention
        ((0.0, 0.1, 0.3), 1.0, 0.25, (25, 81, 194)),  # 25 each, 225 by the formula
        ((0.1, 0.2, 0.2), 2.0, 0.0, (34, 133, 133)),
        ((0.1, 0.5, 0.3), 0.0, 0.0, (100, 100, 100)),
        ((0.0, 0.0), 1.0, 0.0, (100, 100)),
        ((1e-200, 2e-200), 8.0, 0.0, (1, 199)),
    ],
)
def test_layer_budgets_by_hand(sensitivity, alpha, floor, expected):
    assert layer_budgets(sensitivity, alpha, floor, 100) == expected


def test_a_profile_of_another_model_is_refused(tmp_path):
    """So are one of another kind, and one that makes no sense."""
    model = tiny_model()
    path = profile(tmp_path / "p", [0.1, 0.2, 0.3], model, model_id="another")
    with pytest.raises(ConfigError, match="was measured on model"):
        kvlib.KVCache(model, EpiCache(profile=path), patch=ids(3), model_id="tiny")
    kvlib.KVCache(model, EpiCache(profile=path), patch=ids(3), model_id="another")
    with pytest.raises(ConfigError, match="digest"):
        EpiCache(profile=path, digest="0" * 16)
    with pytest.raises(ConfigError, match="expected one of 0 or more for each"):
        EpiCache(profile=profile(tmp_path / "n", [0.1, float("nan"), 0.3], model))
    save_artefact(tmp_path / "q", kind="epicache", model="x", tensors={}, settings={})
    with pytest.raises(ConfigError, match=r"lacks layers, sensitivity.*kvlib calibrate epicache"):
        EpiCache(profile=str(tmp_path / "q"))


# The patched prompt


class Words:
    """A tokenizer of one id a letter."""

    chat_template = None

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) % 199 for c in text]


@torch.no_grad()
def test_where_the_patched_prompt_comes_from():
    """Given ids come first; without them the instruction, in the tokenizer's words."""
    model, patch = tiny_model(), ids(7)
    policy = build_policy("epicache:budget=10")
    cache = kvlib.KVCache(model, policy, tokenizer=Words(), patch=patch)
    given_ids = policy.probes(torch.arange(11), cache._probes.resources)
    assert [x.tolist() for x in given_ids] == [patch.tolist()]
    assert policy.probes(torch.arange(10), cache._probes.resources) == ()
    cache = kvlib.KVCache(model, policy, tokenizer=Words())
    (written,) = policy.probes(torch.arange(11), cache._probes.resources)
    assert written.tolist() == [ord(c) % 199 for c in INSTRUCTION + "\n"]


@torch.no_grad()
@pytest.mark.parametrize(
    "patch", [[1, 2], torch.zeros(0).long(), torch.ones(1, 3).long(), torch.ones(3)]
)
def test_a_patched_prompt_is_token_ids(patch):
    """One or more, in one row."""
    with pytest.raises(ConfigError, match=r"epicache: patch is int64 \[n\], one token id or more"):
        kvlib.KVCache(tiny_model(), "epicache:budget=8", patch=patch)


def test_the_digest_names_the_patched_prompt():
    """A method with a digest takes that patched prompt only, and works in copies."""
    model, patch = tiny_model(), ids(7)
    digest = patch_digest(patch)
    assert len(digest) == 16
    assert digest != patch_digest(ids(7, seed=1))
    method = f"epicache:budget=10,patch={digest}"
    cache = kvlib.KVCache(model, method, patch=patch, model_id="tiny")
    model(ids(30)[None], past_key_values=cache)
    assert f"patch={digest}" in cache.method
    restored = kvlib.KVCache.from_snapshot(model, cache.to_snapshot(), model_id="tiny")
    for twin in (cache.fork(), restored, restored.fork()):
        assert positions(twin) == positions(cache)
    for wrong in ({"patch": ids(7, seed=1)}, {"tokenizer": Words()}):
        with pytest.raises(ConfigError, match="same token ids, or leave the parameter patch out"):
            kvlib.KVCache(model, method, **wrong)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("epicache:budget=10", "give KVCache.*patch=token ids.*or KVCache.*tokenizer="),
        ("epicache:budget=0", "leaves nothing"),
        ("epicache:alpha=-1.0", "alpha must be 0 or more"),
        ("epicache:floor=1.5", r"share in \[0, 1\]"),
        ("epicache:sinks=-1", "sinks must be 0 or more"),
    ],
)
def test_what_is_missing_is_named(method, message):
    with pytest.raises(ConfigError, match=message):
        kvlib.KVCache(tiny_model(), method)


# Calibration


@torch.no_grad()
@pytest.mark.parametrize("piece", [16, 512])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_similarity_is_that_of_masked_passes(piece, attention, monkeypatch):
    """Of the keys that transformers caches with and without such a mask."""
    monkeypatch.setattr("kvlib.calibration.epicache._PIECE", piece)
    model, tokens = model_of(3), ids(50)[None]
    model.set_attn_implementation(attention)
    calls = []
    found = key_similarity(model, tokens, window=7, sinks=2, progress=lambda *x: calls.append(x))
    mask = torch.full((50, 50), -torch.inf, dtype=torch.float64)
    for i in range(50):
        mask[i, : min(2, i + 1)] = 0
        mask[i, max(i - 6, 0) : i + 1] = 0
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    model(tokens, past_key_values=caches[0])
    model(tokens, past_key_values=caches[1], attention_mask=mask[None, None])
    assert found.keys() == {0, 1, 2}
    for index, sigma in found.items():
        full, near = (cache.layers[index].keys[0].numpy() for cache in caches)
        lengths = np.linalg.norm(full, axis=-1) * np.linalg.norm(near, axis=-1)
        assert sigma == pytest.approx(((full * near).sum(-1) / lengths).mean(), abs=1e-9)
    assert found[0] == pytest.approx(1, abs=1e-12)
    assert found[2] < 0.999
    num = 2 * -(-50 // piece)
    assert calls == [(i, num) for i in range(1, num + 1)]


def test_sliding_layers_are_left_out(tmp_path):
    """They see what they always see; the artefact names the others, and the policy knows them."""
    model = tiny_model("Gemma3TextConfig", sliding_window=8, layer_types=None, num_hidden_layers=12)
    path = str(tmp_path / "p")
    options = {"tokens": 60, "window": 10, "sinks": 2}
    found = calibrate("epicache", model, None, "tiny", path, **options)
    assert found.tensors["layers"].tolist() == [5, 11]
    first, last = found.tensors["sensitivity"].tolist()
    assert first == 0 < last  # what comes before layer 5 sees the same in both passes
    assert found.settings == {"tokens": "60", "window": "10", "sinks": "2", "seed": "0"}
    policy = EpiCache(budget=20, profile=path, floor=0.0)
    cache = kvlib.KVCache(model, policy, prefill_chunk_size=16, patch=ids(3), model_id="tiny")
    with torch.no_grad():
        for piece in ids(70).split(16):
            model(piece[None], past_key_values=cache)
    held = [sum(cache.layer_kv(index).lengths) for index in (5, 11)]
    assert held == [0, 2 * 40]
    with torch.no_grad():  # a layer that holds nothing goes on all the same
        logits = model(ids(3)[None], past_key_values=cache).logits
    assert logits.isfinite().all()


def test_what_cannot_be_calibrated(tmp_path):
    """A text that is not longer than what is seen of it."""
    for options in ({"tokens": 20, "window": 16, "sinks": 4}, {"window": 0}, {"sinks": -1}):
        with pytest.raises(ConfigError, match="longer than window and sinks"):
            calibrate("epicache", tiny_model(), None, "tiny", tmp_path / "p", **options)


def test_the_command_prints_a_method_that_works(tmp_path, monkeypatch):
    """It names each layer's sensitivity."""
    monkeypatch.chdir(tmp_path)
    command = ["calibrate", "epicache", "--model", "recall:vocab=64", "-o", "p"]
    options = ["--tokens", "40", "--window", "10", "--sinks", "2"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    assert "layer 1" in result.output
    assert "epicache:profile=p" in result.output
    assert build_policy("epicache:profile=p").digest in result.output
