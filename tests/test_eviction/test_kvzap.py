# SPDX-License-Identifier: Apache-2.0
"""KVzap: scores and networks against their definitions, what stays, and what is refused."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kvlib
from kvlib.artefacts import load_artefact, model_identity, save_artefact
from kvlib.calibration import calibrate
from kvlib.calibration.kvzap import Moments, _Fit, repetition_scores, ridge
from kvlib.cli import app
from kvlib.errors import ConfigError
from kvlib.eviction import build_policy
from kvlib.eviction.joint import Joint
from kvlib.eviction.kvzap import KVzap, predict
from kvlib.eviction.threshold import Threshold
from kvlib.model_spec import spec_for_model
from kvlib.testing.models import tiny_model
from tests.oracles import kvzap as oracle


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Words:
    """A tokenizer of one id a letter."""

    chat_template = None

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) % 199 for c in text]


def ids(n, batch=1, seed=0):
    return torch.randint(0, 199, (batch, n), generator=torch.Generator().manual_seed(seed))


def peaked(group=3, **changes):
    """A model whose attention is far from uniform."""
    model = tiny_model(num_attention_heads=2 * group, hidden_size=16 * group, **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6)
            elif "layernorm" in name:
                weight.mul_(torch.linspace(0.5, 2, len(weight)))
    return model


def random_networks(model, *, hidden=None, seed=0, layers=None, file="n.kvzap", model_id="tiny"):
    """A profile of random networks, and the networks by layer."""
    rng = np.random.default_rng(seed)
    width = model.config.hidden_size
    sizes = [width, 2] if hidden is None else [width, hidden, 2]
    networks, tensors = {}, {}
    for index in range(model.config.num_hidden_layers) if layers is None else layers:
        networks[index] = [
            (
                rng.standard_normal((out, into)).astype(np.float32) / np.float32(into**0.5),
                rng.standard_normal(out).astype(np.float32),
            )
            for into, out in pairwise(sizes)
        ]
        for i, (weight, bias) in enumerate(networks[index]):
            tensors[f"{index}.{i}.weight"] = torch.from_numpy(weight)
            tensors[f"{index}.{i}.bias"] = torch.from_numpy(bias)
    tensors["layers"] = torch.tensor(sorted(networks))
    save_artefact(
        file,
        kind="kvzap",
        model=model_identity(spec_for_model(model, model_id=model_id)),
        tensors=tensors,
        settings={},
    )
    return networks


class Grabbed:
    """What a model's attention modules are given, by layer, over all passes."""

    def __init__(self, model):
        self.parts = {}
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._grab, with_kwargs=True)

    def _grab(self, module, args, kwargs):
        self.parts.setdefault(module.layer_idx, []).append(kwargs["hidden_states"][0].numpy())

    def scores(self, networks):
        """[layers][Hkv][n] of all tokens so far."""
        found = [
            oracle.network(networks[index], np.concatenate(parts))
            for index, parts in sorted(self.parts.items())
        ]
        return np.stack(found)


def held(cache):
    return [
        [row.positions.tolist() for row in cache.layer_kv(index).rows()]
        for index in range(len(cache.layers))
    ]


# Scores


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("words", [False, True])
def test_scores_are_the_definitions(group, plus, words):
    """Out of attention matrices, values, output weights and the lengths of hidden states."""
    model = peaked(group, num_hidden_layers=2, attn_implementation="eager").double()
    prompt = ids(15, seed=group)[0]
    tokenizer = Words() if words else None
    request = "\n\nRepeat the previous context exactly.\n"
    expected, inputs = oracle.plus_scores(
        model, prompt.tolist(), tokenizer.encode(request, False) if words else [], plus=plus
    )
    found = repetition_scores(model, tokenizer, prompt, plus=plus, model_id="tiny")
    assert [one.layer_idx for one in found] == [0, 1]
    for one, scores, hidden in zip(found, expected, inputs, strict=True):
        np.testing.assert_allclose(one.scores, scores, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(one.hidden, hidden, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_model_without_output_weights_is_named():
    """KVzip+ cannot be had of it; KVzip can."""
    model = tiny_model("GPTNeoXConfig")
    with pytest.raises(ConfigError, match="no attention modules with a linear o_proj"):
        repetition_scores(model, None, ids(10)[0], model_id="x")
    assert len(repetition_scores(model, None, ids(10)[0], plus=False, model_id="x")) == 3


# Networks


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.5])
def test_ridge_is_least_squares(penalty):
    """With a row for each penalty, as numpy solves it; in pieces or at once."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 7)) * 10.0 ** np.arange(-3, 4) + 5
    y = x @ rng.standard_normal((7, 3)) + rng.standard_normal((200, 3)) + 2
    moments = Moments()
    for rows in np.split(np.arange(200), [3, 90, 91]):
        moments.add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
    weight, bias = (part.numpy() for part in ridge(moments, penalty))
    design = np.hstack([x, np.ones((200, 1))])
    extra = np.hstack([np.diag(np.sqrt(200 * penalty) * x.std(0)), np.zeros((7, 1))])
    solution = np.linalg.lstsq(
        np.vstack([design, extra]), np.vstack([y, np.zeros((7, 3))]), rcond=None
    )[0]
    np.testing.assert_allclose(weight, solution[:-1].T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, solution[-1], rtol=1e-6, atol=1e-6)


def test_a_channel_that_never_changes_has_no_weight():
    """Its covariances are 0, and there is nothing to solve."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((50, 3)))
    x[:, 1] = 4.0
    moments = Moments()
    moments.add(x, 2 * x[:, :1] + 1)
    weight, bias = ridge(moments, 0.0)
    np.testing.assert_allclose(weight, [[2, 0, 0]], atol=1e-9)
    np.testing.assert_allclose(bias, [1], atol=1e-9)


def test_a_hidden_layer_learns_what_a_line_cannot():
    """R^2 on held-out pairs tells them apart; scales and offsets of inputs do not matter."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 32, generator=generator)
    y = torch.stack([x[:, 0].abs() * 3 - 7, x[:, 1]], 1).double()
    x = x * torch.logspace(-2, 2, 32) + 3
    every = torch.arange(1000)
    share = {}
    for kind in ("linear", "mlp"):
        fit = _Fit(kind)
        for start in range(0, 3000, 1000):
            part = slice(start, start + 1000)
            fit.add(x[part], y[part], every, held_out=start == 2000)
        network = fit.solve(0)
        seen, share[kind] = fit.judge(network)
        maps = [tuple(part.numpy() for part in one) for one in network]
        np.testing.assert_allclose(seen, oracle.network(maps, x[2000:]).T, rtol=1e-3, atol=1e-3)
        left, whole = (y[2000:] - seen).square().sum(), (y[2000:] - y[2000:].mean(0)).square().sum()
        assert share[kind] == pytest.approx(float(1 - left / whole))
    assert [len(part) for part in network[0]] == [4, 4]
    assert share["linear"] < 0.5
    assert share["mlp"] > 0.8


def test_calibration_finds_the_line():
    """Of the tokens of all texts but every eighth's, without sinks; the artefact says how well."""
    model = peaked(num_hidden_layers=2)
    calls = []
    found = calibrate(
        "kvzap", model, None, "tiny", "c.kvzap", progress=lambda *x: calls.append(x),
        prompts=3, tokens=80, pairs=20, seed=5,
    )  # fmt: skip
    generator, sizes = torch.Generator().manual_seed(5), random.Random(5)
    texts = []
    for _ in range(3):
        length = sizes.randint(60, 80)
        prompt = torch.randint(0, 199, (1, length), generator=generator)[0]
        some = torch.randperm(length - 4, generator=generator)[:20]
        texts.append((repetition_scores(model, None, prompt, model_id="tiny"), some.numpy()))
    assert len({len(some[0].scores[0]) for some, _ in texts}) > 1
    predicted = []
    for place in range(2):
        pairs = [
            (one[place].hidden[4:].numpy(), np.log(one[place].scores.numpy()[:, 4:].T))
            for one, _ in texts
        ]
        x, y = (np.concatenate(part).astype(float) for part in zip(*pairs[:2], strict=True))
        design = np.vstack([
            np.hstack([x, np.ones((len(x), 1))]),
            np.hstack([np.diag(np.sqrt(1e-3 * len(x)) * x.std(0)), np.zeros((48, 1))]),
        ])  # fmt: skip
        solution = np.linalg.lstsq(design, np.vstack([y, np.zeros((48, 2))]), rcond=None)[0]
        weight, bias = (found.tensors[f"{place}.0.{name}"] for name in ("weight", "bias"))
        np.testing.assert_allclose(weight, solution[:-1].T, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(bias, solution[-1], rtol=1e-3, atol=1e-3)
        x, y = (part[texts[2][1]] for part in pairs[2])
        seen = x @ solution[:-1] + solution[-1]
        predicted.append(seen.ravel())
        r2 = 1 - ((y - seen) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert float(found.tensors["r2"][place]) == pytest.approx(r2, abs=1e-3)
    every = np.sort(np.concatenate(predicted))
    expected = [every[int(share * len(every))] for share in (0.25, 0.5, 0.75, 0.9)]
    np.testing.assert_allclose(found.tensors["quantiles"], expected, atol=1e-3)
    assert found.tensors["layers"].tolist() == [0, 1]
    assert found.settings == {
        "prompts": "3", "tokens": "80", "kind": "linear", "pairs": "20", "seed": "5"
    }  # fmt: skip
    assert calls == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    cache = kvlib.KVCache(model, "kvzap:profile=c.kvzap,budget=20,window=4", model_id="tiny")
    model(ids(50), past_key_values=cache)
    assert sum(n for layer in range(2) for n in cache.layer_kv(layer).lengths) == 80


def test_calibration_is_repeatable_and_has_two_kinds():
    """The same seed gives the same file."""
    model = peaked(num_hidden_layers=2)
    options = {"prompts": 2, "tokens": 60, "kind": "mlp"}
    digests = [
        calibrate("kvzap", model, None, "tiny", f"{n}.kvzap", seed=seed, **options).digest
        for n, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]
    tensors = load_artefact("0.kvzap", "kvzap").tensors
    assert tensors["1.0.weight"].shape == (6, 48)
    assert tensors["1.1.weight"].shape == (2, 6)
    assert build_policy("kvzap:profile=0.kvzap").digest == digests[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cubic"}, "kind is linear or mlp, got 'cubic'"),
        ({"prompts": 1}, "at least 2 prompts"),
        ({"tokens": 8}, "more than 8 tokens"),
        ({"pairs": 0}, "and 1 pair, got 64, 1000 and 0"),
    ],
)
def test_wrong_calibrations_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        calibrate("kvzap", tiny_model(), None, "tiny", "x.kvzap", **options)


def test_the_command(monkeypatch):
    """A table of how well each layer is predicted, thresholds to choose from, and the method."""
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--model", "recall", "-o", "r.kvzap", "--prompts", "3", "--tokens", "60"]
    done = CliRunner().invoke(app, ["calibrate", "kvzap", *arguments])
    assert done.exit_code == 0, done.output
    assert "3 texts of up to 60 tokens, linear" in done.output
    assert "R^2 on held-out texts" in done.output
    assert "removes 75% of held-out entries" in done.output
    assert "kvzap:profile=r.kvzap" in done.output
    assert "r2" in load_artefact("r.kvzap", "kvzap").tensors


# The policy


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("chunk", [None, 9])
def test_choices_are_the_oracles(group, hidden, chunk):
    """The heads of all layers compete for the budget; what comes later stays."""
    model = peaked(group)
    networks = random_networks(model, hidden=hidden, seed=group)
    grabbed = Grabbed(model)
    method = "kvzap:profile=n.kvzap,budget=15,window=6,sinks=2"
    cache = kvlib.KVCache(model, method, model_id="tiny", prefill_chunk_size=chunk)
    for part in ids(40, seed=group).split(chunk or 40, 1):
        model(part, past_key_values=cache)
    cache.end_prefill()
    expected, margin = oracle.joint(grabbed.scores(networks), 15, 2, 6)
    assert margin > 1e-5
    assert held(cache) == expected
    assert len({len(row) for layer in expected for row in layer}) > 2
    model(ids(3, seed=9), past_key_values=cache)
    later = [40, 41, 42]
    assert held(cache) == [[[*row, *later] for row in layer] for layer in expected]
    for layer in cache.layers:  # scores are forgotten
        assert layer.rows[0].state.entries == {}


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize(("sinks", "window"), [(2, 6), (0, 1), (0, 12)])
def test_what_is_below_tau_goes_when_it_leaves_the_window(group, hidden, sinks, window):
    """After every pass a head holds the window, the sinks, and what scored tau or more."""
    model = peaked(group)
    networks = random_networks(model, hidden=hidden, seed=group)
    grabbed = Grabbed(model)
    method = f"kvzap:profile=n.kvzap,tau=0.25,window={window},sinks={sinks}"
    cache = kvlib.KVCache(model, method, model_id="tiny")
    seen = 0
    for num in (30, 1, 1, 1, 5, 1, 1, 20, 1):
        model(ids(num, seed=seen), past_key_values=cache)
        seen += num
        scores = grabbed.scores(networks)
        assert np.abs(scores - 0.25).min() > 1e-6
        expected = [
            [oracle.survivors(row, 0.25, seen, sinks, window) for row in layer] for layer in scores
        ]
        assert held(cache) == expected
        for index, layer in enumerate(cache.layers):  # what was predicted stays with its entry
            numbers = torch.cat([
                torch.tensor(scores[index][h][row])
                for h, row in enumerate(expected[index])
            ])  # fmt: skip
            state = layer.rows[0].state if layer.rows else layer.states[0]
            mine = state.entries["scores"].flatten().double()
            torch.testing.assert_close(mine, numbers, atol=1e-5, rtol=1e-5)
    assert len({len(row) for layer in expected for row in layer}) > 3


@torch.no_grad()
def test_sequences_of_a_padded_batch_fare_as_alone():
    """Scores belong to tokens, not to columns."""
    model = peaked()
    random_networks(model)
    method = "kvzap:profile=n.kvzap,tau=0.1,window=4"
    tokens = ids(30, 2)
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[0, :11] = 0
    batch = kvlib.KVCache(model, method, model_id="tiny")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(tokens, attention_mask=mask, position_ids=places, past_key_values=batch)
    for row, mine in enumerate((tokens[:1, 11:], tokens[1:])):
        alone = kvlib.KVCache(model, method, model_id="tiny")
        model(mine, past_key_values=alone)
        for index in range(3):
            one, other = batch.layer_kv(index, row), alone.layer_kv(index)
            assert one.lengths == other.lengths
            assert torch.equal(one.positions_tensor(), other.positions_tensor())


def test_what_it_asks_for():
    """Nothing for the full budget, in steps only with tau, all layers together only without."""
    assert not KVzap(budget=1.0).needs.any_signal
    assert not KVzap(budget=1.0, tau=-4.0).needs.steps
    one, other = KVzap().needs, KVzap(tau=-4).needs
    assert (one.hidden, one.whole_model, one.steps) == (True, True, False)
    assert (other.hidden, other.whole_model, other.steps) == (True, False, True)
    assert KVzap().allocator == Joint()
    assert KVzap(tau=-3.5).allocator == Threshold(-3.5)
    assert KVzap().window == 128


@torch.no_grad()
def test_the_budget_does_not_matter_with_tau():
    """Any but 1.0, which keeps everything."""
    model = peaked()
    random_networks(model)
    found = []
    for budget in (3, 0.5, 1.0):
        method = f"kvzap:profile=n.kvzap,tau=0,window=4,budget={budget}"
        cache = kvlib.KVCache(model, method, model_id="tiny")
        model(ids(30), past_key_values=cache)
        found.append(held(cache))
    assert found[0] == found[1] != found[2]
    assert found[2] == [[list(range(30))] * 2] * 3


# Refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kvzap:budget=0.5", "kvlib calibrate kvzap --model M -o FILE and pass profile=FILE"),
        ("kvzap:profile=none.kvzap", "cannot read artefact 'none.kvzap'.*kvlib calibrate kvzap"),
        ("kvzap:digest=0123456789abcdef", "digest is that of a profile: give profile=FILE too"),
        ("kvzap:profile=n.kvzap,digest=0123456789abcdef", "the method says 0123456789abcdef"),
        ("kvzap:profile=n.kvzap,window=-1", "window and sinks must be 0 or more, got -1 and 4"),
        ("kvzap:profile=n.kvzap,sinks=-1", "window and sinks must be 0 or more, got 128 and -1"),
        ("kvzap:profile=n.kvzap,budget=0", "kvzap: a budget of 0 tokens"),
        ("kvzap:profile=other.kvzap", "was measured on model .* run kvlib calibrate kvzap for it"),
        ("kvzap:profile=lazy.kvzap", "is an artefact of 'lazy'; 'kvzap' needs its own"),
        ("kvzap:profile=empty.kvzap", "'empty.kvzap' lacks networks: make it again"),
        ("kvzap:profile=broken.kvzap", "'broken.kvzap' lacks networks: make it again"),
    ],
)
def test_what_is_wrong_is_named(method, message):
    model = tiny_model()
    random_networks(model)
    random_networks(model, file="other.kvzap", model_id="another")
    for kind, file, tensors in (
        ("lazy", "lazy.kvzap", {"window": torch.tensor(3)}),
        ("kvzap", "empty.kvzap", {"layers": torch.tensor([0])}),
        (
            "kvzap",
            "broken.kvzap",
            {
                "layers": torch.tensor([0]),
                "0.0.weight": torch.zeros(3, 48),
                "0.0.bias": torch.zeros(2),
            },
        ),
    ):
        save_artefact(file, kind=kind, model="m", tensors=tensors, settings={})
    with pytest.raises(ConfigError, match=message):
        kvlib.KVCache(model, method, model_id="tiny")


@pytest.mark.parametrize("tau", [float("nan"), float("-inf")])
def test_tau_is_a_number(tau):
    with pytest.raises(ConfigError, match="kvzap: tau is a finite number"):
        KVzap(tau=tau)


@torch.no_grad()
def test_networks_that_do_not_fit_are_named():
    """Fewer layers than the model's, or other widths."""
    model, wide = tiny_model(), tiny_model(hidden_size=96)
    random_networks(model, layers=[0, 1])
    identity = {"model_id": "tiny"}
    with pytest.raises(ConfigError, match="no network for layer 2"):
        model(ids(9), past_key_values=kvlib.KVCache(model, "kvzap:profile=n.kvzap", **identity))
    random_networks(model, file="wide.kvzap")
    policy = build_policy("kvzap:profile=wide.kvzap")
    with pytest.raises(ConfigError, match="48 channels and 2 KV heads; layer 0 has 96 and 2"):
        wide(ids(9), past_key_values=kvlib.KVCache(wide, policy, **identity, _restoring=True))


def test_predictions_are_float32_whatever_the_model():
    """Half precision would round the scores of a whole prompt to a few values."""
    network = ((torch.ones(2, 4), torch.zeros(2)),)
    assert predict(network, torch.ones(3, 4, dtype=torch.bfloat16)).dtype == torch.float32
