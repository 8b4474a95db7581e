# SPDX-License-Identifier: Apache-2.0
"""`kvlib calibrate`: the head search of RazorAttention, and the command."""

import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import kvlib
from kvlib.artefacts import load_artefact, model_identity
from kvlib.attention import Logits
from kvlib.blocks import LayerKV
from kvlib.calibration import CALIBRATIONS, calibrate
from kvlib.calibration.razor import diagonal_scores, repeated_block
from kvlib.cli import app, main
from kvlib.codecs import CODECS
from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.eviction import POLICIES, build_policy
from kvlib.model_spec import spec_for_model
from kvlib.testing.models import tiny_model
from kvlib.testing.recall_model import RETRIEVAL_HEAD, recall_model
from tests.oracles import razor as oracle


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Scores


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize(("start", "block"), [(0, 2), (1, 2), (1, 9), (0, 13)])
def test_scores_are_the_oracles(group, start, block):
    """Echo and induction of random queries and keys, with and without BOS."""
    rng = np.random.default_rng(group)
    num = start + 4 * block
    q = rng.standard_normal((2 * group, num, 8)).astype(np.float32) * 2
    k = rng.standard_normal((2, num, 8)).astype(np.float32)
    layer = LayerKV(layer_idx=0, keys=torch.tensor(k), values=torch.tensor(k), positions=range(num))
    mine = diagonal_scores(torch.tensor(q), layer, start, block, Logits())
    echo, induction = oracle.head_scores(q, k, start, block)
    np.testing.assert_allclose(mine[0].flatten(), echo, atol=1e-6)
    np.testing.assert_allclose(mine[1].flatten(), induction, atol=1e-6)


def test_hand_built_heads():
    """A head that copies has induction 1; BOS takes its share of the softmax and counts not."""
    block = 6
    token = torch.arange(4 * block) % block
    codes = torch.eye(block)
    nothing, everything = torch.zeros(1, block), torch.ones(1, block)
    query = 300 * torch.cat([nothing, codes[token]])[None]
    followed = codes[token.roll(1)]  # each token after the one that it is asked for with
    followed[0] = 0  # there is none before the first
    shared = sum(m / (m + 1) for m in (1, 2, 3)) / 3  # m occurrences, and one more that matches
    for keys, echo, induction in (
        (torch.cat([nothing, followed]), 0, 1),
        (torch.cat([everything, followed]), 0, shared),  # BOS matches too
        (torch.cat([nothing, codes[token]]), shared, 0),  # the token itself does
    ):
        places = range(len(keys))
        layer = LayerKV(layer_idx=0, keys=keys[None], values=keys[None], positions=places)
        found = diagonal_scores(query, layer, 1, block, Logits()).flatten().tolist()
        assert found == pytest.approx([echo, induction], abs=1e-6)


def queries_and_keys(model, ids):
    """Of every layer, after the rotary embedding, by transformers itself."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    decoder = model.model
    with torch.no_grad():
        states = decoder(ids, output_hidden_states=True).hidden_states
        cos, sin = decoder.rotary_emb(states[0], torch.arange(ids.shape[1])[None])
        for layer, x in zip(decoder.layers, states, strict=False):
            normed = layer.input_layernorm(x)
            attention = layer.self_attn
            q, k = (
                y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for y in (attention.q_proj(normed), attention.k_proj(normed))
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            yield q[0].numpy(), k[0].numpy()


@pytest.mark.parametrize("bos", [None, 7])
def test_a_models_scores_are_the_oracles(bos):
    """Over two draws, the best query head of each KV head; the artefact holds the tables."""
    model = tiny_model(num_hidden_layers=2, bos_token_id=bos, eos_token_id=None, pad_token_id=None)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(20)
    calls = []
    found = calibrate(
        "razor",
        model,
        None,
        "tiny",
        "p.razor",
        progress=lambda *x: calls.append(x),
        block=9,
        draws=2,
        induction=0.3,
        echo=0.3,
        seed=5,
    )
    tables = np.zeros((2, 2, 2, 3))  # echo and induction, layer, KV head, group
    for draw in range(2):
        ids, start, size = repeated_block(model, None, 9, seed=5 + draw)
        assert (start, size) == (int(bos is not None), 9)
        for index, (q, k) in enumerate(queries_and_keys(model, ids)):
            scores = np.array(oracle.head_scores(q, k, start, size))
            tables[:, index] += scores.reshape(2, 2, 3) / 2
    echo, induction = tables.max(-1)
    np.testing.assert_allclose(found.tensors["echo"], echo, atol=1e-5)
    np.testing.assert_allclose(found.tensors["induction"], induction, atol=1e-5)
    assert np.ptp(induction) > 0.01
    places = {tuple(x) for x in found.tensors["retrieval"].nonzero().tolist()}
    assert places == oracle.retrieval(induction.tolist(), echo.tolist(), 1, 1)
    assert found.tensors["layers"].tolist() == [0, 1]
    assert found.model == model_identity(spec_for_model(model, model_id="tiny"))
    assert found.settings == {
        "block": "9",
        "repeats": "4",
        "bos": str(int(bos is not None)),
        "draws": "2",
        "induction": "0.3",
        "echo": "0.3",
        "seed": "5",
    }
    assert calls == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]


def test_the_recall_models_heads_are_found():
    """Of its four KV heads one retrieves, with an induction score of 1."""
    model = recall_model(256)
    found = calibrate("razor", model, None, "recall", "p.razor", block=50, draws=2)
    induction = found.tensors["induction"]
    assert float(induction[RETRIEVAL_HEAD]) == pytest.approx(1, abs=0.03)
    others = induction.clone()
    others[RETRIEVAL_HEAD] = 0
    assert float(others.max()) < 0.1
    assert [tuple(x) for x in found.tensors["retrieval"].nonzero().tolist()] == [RETRIEVAL_HEAD]
    policy = build_policy("razor:profile=p.razor")
    assert policy.roles.whole == {0: frozenset(), 1: frozenset({RETRIEVAL_HEAD[1]})}
    kvlib.KVCache(model, policy, model_id="recall")
    with pytest.raises(ConfigError, match="was measured on model"):
        kvlib.KVCache(model, policy, model_id="another")


def test_sliding_layers_are_left_out():
    """They are in no table; the policy counts layers as the model does."""
    model = tiny_model(
        "Qwen2Config",
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=16,
    )
    found = calibrate("razor", model, None, "tiny", "p.razor", block=10, draws=1, induction=0.6)
    assert found.tensors["layers"].tolist() == [0, 2]
    assert found.tensors["induction"].shape == (2, 2)
    policy = "razor:profile=p.razor,s0=4,c=100.0,induction=1.0"
    cache = kvlib.KVCache(model, policy, model_id="tiny")
    with torch.no_grad():
        model(torch.arange(40)[None], past_key_values=cache, use_cache=True)
    assert [cache.layer_kv(i).lengths for i in (0, 2)] == [(40, 40)] * 2
    cache = kvlib.KVCache(model, policy.replace("1.0", "0.0"), model_id="tiny")
    with torch.no_grad():
        model(torch.arange(40)[None], past_key_values=cache, use_cache=True)
    assert [cache.layer_kv(i).lengths for i in (0, 2)] == [(9, 9)] * 2


# The block


class Words:
    """As much of a tokenizer as the search asks for."""

    bos_token_id = 3
    all_special_ids = (3, 4)
    added_tokens_decoder = dict.fromkeys((3, 4, 30))

    def __len__(self):
        return 32


def test_a_block_is_of_distinct_ordinary_tokens():
    """BOS first; no special and no added token, none twice, none beyond the tokenizer."""
    model = tiny_model(bos_token_id=None, eos_token_id=[5, 6], pad_token_id=None)
    seen = set()
    for seed in range(3):
        ids, start, size = repeated_block(model, Words(), 20, seed=seed)
        assert (start, size, ids.shape) == (1, 20, (1, 81))
        first, *rest = ids[0].tolist()
        assert first == 3
        assert rest == rest[:20] * 4
        assert len(set(rest)) == 20
        seen |= set(rest)
    assert seen <= set(range(32)) - {3, 4, 5, 6, 30}
    assert repeated_block(model, Words(), 20, seed=2)[0].equal(ids)
    assert not repeated_block(model, Words(), 20, seed=3)[0].equal(ids)
    assert repeated_block(model, Words(), 500, seed=0)[2] == 27  # all there are


@pytest.mark.parametrize(("bos", "size"), [(None, 25), (1, 24)])
def test_a_block_fits_the_models_positions(bos, size):
    """Four of them, and BOS."""
    model = tiny_model(max_position_embeddings=100, bos_token_id=bos)
    assert repeated_block(model, None, 2500, seed=0)[2] == size


def test_what_cannot_be_searched():
    """Too short a block, no draws, wrong shares, no rotary embedding, no full attention."""
    model = tiny_model()
    for options, message in (
        ({"block": 1}, "a block of 1 tokens is no repetition"),
        ({"draws": 0}, "draws must be 1 or more, got 0"),
        ({"induction": 1.5}, "shares in"),
        ({"echo": -0.5}, "shares in"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate("razor", model, None, "tiny", "p.razor", **options)
    plain = tiny_model("GPT2Config", n_embd=48, n_head=6, n_layer=2, vocab_size=99)
    with pytest.raises(ConfigError, match="no rotary embedding"):
        calibrate("razor", plain, None, "tiny", "p.razor", block=9)
    windows = tiny_model(
        "Qwen2Config",
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        use_sliding_window=True,
        sliding_window=16,
    )
    with pytest.raises(ConfigError, match="no full-attention layers"):
        calibrate("razor", windows, None, "tiny", "p.razor", block=9)
    with pytest.raises(UnknownPluginError, match="Did you mean 'razor'"):
        calibrate("rasor", model, None, "tiny", "p.razor")


def test_every_calibration_belongs_to_a_policy_or_codec():
    """The table names policies and codecs; "codec" is kvlc's, "abstracts" are leoam's."""
    assert set(CALIBRATIONS) <= {*POLICIES.names(), *CODECS.names(), "codec", "abstracts"}


# The command


def test_calibrate_razor_prints_the_heads_and_the_method():
    """It writes the artefact; the method that it prints works with the model."""
    command = ["calibrate", "razor", "--model", "recall:vocab=256", "-o", "sub/p.razor"]
    result = CliRunner().invoke(app, [*command, "--block", "40", "--draws", "1"])
    assert result.exit_code == 0, result.output
    assert "1 of 4 KV heads" in result.output
    assert re.search(r"layer 1, KV head 0 +│ induction (1.000|0.99\d)", result.output)
    found = load_artefact("sub/p.razor", "razor")
    assert found.digest in result.output
    assert found.settings["block"] == "40"
    method = "razor:profile=sub/p.razor,induction=0.14,echo=0.01"
    assert method in result.output
    kvlib.KVCache(recall_model(256), method, model_id="kvlib-recall-256")


def test_calibrate_lazy_prints_its_window():
    """The same for a method without a table of its own."""
    command = ["calibrate", "lazy", "--model", "recall:vocab=64", "-o", "p.lazy"]
    options = ["--samples", "1", "--tokens", "20", "--new-tokens", "8"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    window = int(load_artefact("p.lazy", "lazy").tensors["window"])
    assert re.search(rf"window +│ {window}\b", result.output)
    method = "lazy:profile=p.lazy,alpha=0.0001"
    assert method in result.output
    assert build_policy(method).name == "lazy"


def test_a_path_that_no_method_can_hold_is_refused_first(monkeypatch, capsys):
    """Before the model is loaded."""
    monkeypatch.setattr(
        "sys.argv", ["kvlib", "calibrate", "razor", "--model", "nowhere", "-o", "my file"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "spaces" in error
    assert "path 'my file'" in error


@pytest.mark.parametrize("out", ["sub", "a-file/p.razor", "sub/p.razor/"])
def test_a_file_that_cannot_be_written_is_refused_first(out, tmp_path, monkeypatch, capsys):
    """Before the model is loaded, in one line."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "p.razor").mkdir()
    (tmp_path / "a-file").write_text("here before")
    monkeypatch.setattr(
        "sys.argv", ["kvlib", "calibrate", "razor", "--model", "nowhere", "-o", out]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "cannot write" in error
    assert "Traceback" not in error
    with pytest.raises(ConfigError, match=f"cannot write '{out}'"):
        calibrate("razor", tiny_model(), None, "tiny", out, block=9)
    assert (tmp_path / "a-file").read_text() == "here before"


def test_a_file_that_is_there_stays_until_there_is_another(tmp_path, monkeypatch):
    """A calibration that fails or is interrupted leaves it, and leaves none where none was."""
    (tmp_path / "p.razor").write_text("here before")
    for out in ("p.razor", "sub/new"):
        with pytest.raises(ConfigError, match="draws"):
            calibrate("razor", tiny_model(), None, "tiny", out, draws=0)
    assert (tmp_path / "p.razor").read_text() == "here before"
    assert not (tmp_path / "sub" / "new").exists()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvlib.calibration.razor.calibrate", interrupted)
    command = ["calibrate", "razor", "--model", "recall:vocab=64", "-o", "p.razor"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert "p.razor was not written" in result.output
    assert (tmp_path / "p.razor").read_text() == "here before"


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    """As it is when the policy reads the file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    calibrate("razor", tiny_model(), None, "tiny", "~/p.razor", block=9, draws=1)
    assert (tmp_path / "p.razor").exists()
    assert build_policy("razor:profile=~/p.razor").digest


@pytest.mark.parametrize("seed", [2**64, -(2**64), 1.5])
def test_a_seed_is_a_whole_number_that_torch_takes(seed):
    """Others are refused for every method."""
    for name in CALIBRATIONS:
        with pytest.raises(ConfigError, match="seed is a whole number"):
            calibrate(name, tiny_model(), None, "tiny", "p", seed=seed)


def test_help_names_what_can_be_calibrated():
    """Each has a command."""
    result = CliRunner().invoke(app, ["calibrate", "--help"])
    assert result.exit_code == 0
    for name in CALIBRATIONS:
        assert name in result.output
