# SPDX-License-Identifier: Apache-2.0
"""`kvlib calibrate abstracts`: codebooks of a model, and files that are refused."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

import kvlib
from kvlib.artefacts import load_artefact, model_identity, save_artefact
from kvlib.calibration import calibrate
from kvlib.calibration.documents import sample_texts
from kvlib.cli import app
from kvlib.errors import ConfigError
from kvlib.model_spec import spec_for_model
from kvlib.registry import describe
from kvlib.store.abstracts_book import CHECKSUM, KIND, checksum, load_books
from kvlib.store.abstracts_pq import Codebook
from kvlib.store.selecting import SELECTORS, HeadShape, Selection
from kvlib.testing.models import tiny_model
from kvlib.testing.recall_model import recall_model

pytest.importorskip("faiss")

OPTIONS = {"codes": 4, "prompts": 2, "tokens": 200, "samples": 300}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model():
    model = tiny_model(num_hidden_layers=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(20)
    return model


def queries_and_keys(model, ids):
    """Of every layer, after the rotary embedding, by transformers itself."""
    decoder = model.model
    with torch.no_grad():
        states = decoder(ids, output_hidden_states=True).hidden_states
        cos, sin = decoder.rotary_emb(states[0], torch.arange(ids.shape[1])[None])
        for layer, x in zip(decoder.layers, states, strict=False):
            attention = layer.self_attn
            q, k = (
                y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for y in (
                    attention.q_proj(layer.input_layernorm(x)),
                    attention.k_proj(layer.input_layernorm(x)),
                )
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            yield q[0], k[0]


def test_codebooks_are_those_of_the_models_keys_and_queries(model):
    """Fitted to the keys of all texts and to the second moment of all queries."""
    calls = []
    found = calibrate(
        "abstracts", model, None, "tiny", "p", progress=lambda *x: calls.append(x), **OPTIONS
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.model == model_identity(spec_for_model(model, model_id="tiny"))
    texts = sample_texts(model, None, None, 2, 200, 0)
    per_text = [list(queries_and_keys(model, ids)) for ids in texts]
    _, books = load_books("p")
    spread = np.linspace(0, 199, 150).astype(int)
    for layer, book in enumerate(books):
        keys = torch.cat([text[layer][1][:, spread] for text in per_text], 1)
        queries = torch.cat([text[layer][0] for text in per_text], 1).double()
        rows = queries.reshape(2, -1, 8)  # three query heads for each KV head
        second = torch.einsum("hnd,hne->hde", rows, rows)
        want = Codebook.train(keys, second, parts=4, samples=300, rounds=10)
        torch.testing.assert_close(book.mean, want.mean, rtol=1e-4, atol=1e-4)
        # Axes may point either way, so what is compared is what comes out of them.
        turns = [x.into.double() @ x.back.double().transpose(1, 2) for x in (book, want)]
        torch.testing.assert_close(turns[0], turns[1], rtol=0.05, atol=0.05)
        scores = []
        for x in (book, want):
            codes = x.encode(keys).long().permute(1, 2, 0)  # [H, parts, n]
            table = x.table(rows[:, :5].float()).unflatten(1, (4, 256))
            scores.append(
                sum(table[:, p].gather(1, codes[:, p, :, None].expand(-1, -1, 5)) for p in range(4))
            )
        true = torch.einsum("hnd,hrd->hnr", keys - book.mean[:, None], rows[:, :5].float())
        off = [(x - true).square().mean().sqrt() / true.std() for x in scores]
        assert max(off) < 0.2
        assert abs(off[0] - off[1]) < 0.02


def test_equal_calibrations_are_equal_files(model):
    a, b, c = (
        calibrate("abstracts", model, None, "tiny", f"p{seed}{n}", seed=seed, **OPTIONS)
        for n, seed in enumerate((0, 0, 1))
    )
    assert a.digest == b.digest != c.digest


def test_the_command_prints_a_method_that_works():
    """With the model that it was measured on."""
    command = ["calibrate", "abstracts", "--model", "recall:vocab=64", "-o", "sub/p.abs"]
    options = ["--prompts", "1", "--tokens", "300", "--samples", "300"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    found = load_artefact("sub/p.abs", KIND)
    assert found.digest in result.output
    assert "2 layers, 2 KV heads, 128 channels" in result.output
    method = "leoam:profile=sub/p.abs,codes=8"
    assert method in result.output
    model = recall_model(64)
    cache = kvlib.TieredCache(model, model_id="kvlib-recall-64", resident="16MiB", select=method)
    cache.prefill(torch.arange(300) % 64)
    assert cache.num_tokens == 299


def test_a_text_of_ones_own(tmp_path):
    """Documents are put together and cut; too little text is refused."""
    (tmp_path / "short.txt").write_text("one two three")
    command = ["calibrate", "abstracts", "--model", "recall:vocab=64", "-o", "p"]
    result = CliRunner().invoke(app, [*command, "--text", str(tmp_path / "nowhere.txt")])
    assert "cannot read the text" in str(result.exception)

    def tokenizer(text):
        return {"input_ids": [int(x) for x in text.split()]}

    texts = {"a": "1 2 3 4 5", "b": "6 7 8"}
    pieces = sample_texts(tiny_model(), tokenizer, texts, 3, 4, 0)
    assert [x.shape for x in pieces] == [(1, 4), (1, 4)]
    assert sorted(torch.cat(pieces, 1)[0].tolist()) == list(range(1, 9))
    (piece,) = sample_texts(tiny_model(), tokenizer, texts, 3, 400, 0)
    assert piece.shape == (1, 8)
    with pytest.raises(ConfigError, match="8 tokens; a codebook needs 256"):
        calibrate("abstracts", tiny_model(), tokenizer, "tiny", "p", codes=4, texts=texts)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codes": 3}, "codes must divide the 8 channels"),
        ({"codes": 0}, "codes must divide"),
        ({"prompts": 0}, "a text or more"),
        ({"tokens": 0}, "a text or more"),
        ({"samples": 255}, "256 samples"),
        ({"tokens": 10, "prompts": 2}, "20 tokens; a codebook needs 256"),
    ],
)
def test_sizes_without_sense_are_refused(model, options, says):
    with pytest.raises(ConfigError, match=says):
        calibrate("abstracts", model, None, "tiny", "p", **(OPTIONS | options))


def test_models_with_windows_are_refused():
    windows = tiny_model(
        "Qwen2Config",
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        use_sliding_window=True,
        sliding_window=16,
    )
    with pytest.raises(ConfigError, match="calibrate abstracts"):
        calibrate("abstracts", windows, None, "tiny", "p", **OPTIONS)


# Files


@pytest.fixture
def data(model, tmp_path):
    calibrate("abstracts", model, None, "tiny", "p", **OPTIONS)
    return (tmp_path / "p").read_bytes()


def test_a_damaged_file_is_refused(data, tmp_path):
    """Cut off anywhere, or with a byte flipped anywhere: in what it says as in the codebooks."""
    build = SELECTORS.build
    build("leoam:codes=4,profile=p")
    places = np.random.default_rng(0).integers(0, len(data), 60).tolist()
    for n, at in enumerate([*range(0, 900, 23), *places, len(data) - 1]):
        (tmp_path / f"flip{n}").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ConfigError):
            build(f"leoam:codes=4,profile=flip{n}")
    for n, size in enumerate([0, 7, 8, 500, len(data) // 2, len(data) - 1]):
        (tmp_path / f"cut{n}").write_bytes(data[:size])
        with pytest.raises(ConfigError, match="not an artefact"):
            build(f"leoam:codes=4,profile=cut{n}")
    with pytest.raises(ConfigError, match="cannot read artefact 'nowhere'"):
        build("leoam:codes=4,profile=nowhere")


def test_other_artefacts_are_refused(data, model):
    found = load_artefact("p", KIND)
    save_artefact("q", kind="razor", model=found.model, tensors=found.tensors, settings={})
    with pytest.raises(ConfigError, match="artefact of 'razor'"):
        load_books("q")
    for change in (
        {"mean": found.tensors["mean"][:1]},
        {"centroids": found.tensors["centroids"].float()},
        {"centroids": found.tensors["centroids"][..., :1]},
        {"into": found.tensors["into"][:, :, :4]},
        {"mean": found.tensors["mean"][0]},
        {"more": found.tensors["mean"].clone()},
    ):
        tensors = dict(found.tensors) | change
        settings = {CHECKSUM: checksum(found.model, {}, tensors)}
        save_artefact("q", kind=KIND, model=found.model, tensors=tensors, settings=settings)
        with pytest.raises(ConfigError, match="no codebooks that fit together"):
            load_books("q")
    less = {k: x for k, x in found.tensors.items() if k != "back"}
    settings = {CHECKSUM: checksum(found.model, {}, less)}
    save_artefact("q", kind=KIND, model=found.model, tensors=less, settings=settings)
    with pytest.raises(ConfigError, match="no codebooks that fit together"):
        load_books("q")


def test_what_does_not_go_together_is_refused(data):
    """Bytes of a code, a digest, a model's layers; nothing is chosen by codebooks of others."""
    found = load_artefact("p", KIND)
    with pytest.raises(ConfigError, match="give codes=4"):
        SELECTORS.build("leoam:profile=p")
    with pytest.raises(ConfigError, match="give codes=4"):
        SELECTORS.build("leoam:codes=8,profile=p")
    with pytest.raises(ConfigError, match="the method says"):
        SELECTORS.build(f"leoam:codes=4,profile=p,digest={'0' * 16}")
    with pytest.raises(ConfigError, match="give profile=FILE"):
        SELECTORS.build(f"leoam:codes=4,digest={found.digest}")
    selector = SELECTORS.build("leoam:codes=4,profile=p")
    assert selector.digest == found.digest
    assert SELECTORS.build(describe(selector)) == selector
    for shape, layers in ((HeadShape(6, 2, 8, 1.0), 3), (HeadShape(3, 1, 8, 1.0), 2)):
        with pytest.raises(ConfigError, match="is of a model with 2 layers of 2 KV heads"):
            Selection(selector, shape, layers)
    with pytest.raises(ConfigError, match="open_layers"):
        selector.open(HeadShape(6, 2, 8, 1.0))
    selector.check_model(found.model)
    with pytest.raises(ConfigError, match="this model is 0000"):
        selector.check_model("0" * 64)
