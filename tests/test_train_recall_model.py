# SPDX-License-Identifier: Apache-2.0
"""The script that trains a recall model: its prompts, and that it learns and can be repeated."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaForCausalLM

SCRIPT = Path(__file__).parents[1] / "examples" / "train_recall_model.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    return module


script = load()

SMALL = 32  # tokens


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(script, "TOKENS_PER_STEP", 512)
    monkeypatch.setattr(script, "FINAL_QUESTIONS", 32)


def trained(seed, steps=30):
    model = script.make_model(SMALL, seed=seed)
    return model, script.train(model, max_tokens=SMALL, steps=steps, seed=seed)


def test_copy_batch(generator):
    batch = script.copy_batch(3, 10, 40, generator)
    assert batch.input_ids.shape == (3, 20)
    for row, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        first = row[1:11]
        assert row == [script.BOS, *first, *first[:-1]]
        assert len(set(first)) == 10
        assert min(first) >= 2
        assert max(first) < 40
        following = dict(itertools.pairwise(first))
        assert targets == [following[row[at]] for at in batch.positions]


@pytest.mark.parametrize("questions", [1, 4])
def test_recall_batch(generator, questions):
    batch = script.recall_batch(5, 12, 26, generator, questions=questions)
    assert batch.input_ids.shape == (5, 1 + 2 * 12 + 2 * questions)
    assert batch.positions.tolist() == list(range(26, 26 + 2 * questions, 2))
    for row, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        pairs = row[1:25]
        assert row[0] == script.BOS
        assert sorted(pairs) == list(range(2, 26))  # all of the ids, and no id twice
        assert set(row[25::2]) == {script.SEP}
        asked = [row[at] for at in batch.positions]
        assert asked == row[26::2]
        assert len(set(asked)) == questions
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert targets == [values[key] for key in asked]


def test_any_pair_is_asked_for(generator):
    batch = script.recall_batch(200, 3, 8, generator)
    asked = {row[1:7].index(row[8]) for row in batch.input_ids.tolist()}
    assert asked == {0, 2, 4}


def test_the_longest_prompt_fits():
    model = script.make_model()
    pairs = script.held_out_pairs(1025)
    assert pairs == [16, 64, 256, 500, 511]
    batch = script.recall_batch(1, pairs[-1], model.config.vocab_size, torch.Generator())
    assert batch.input_ids.shape == (1, 1025)
    assert 0.4e6 < model.num_parameters() < 0.6e6


@pytest.mark.usefixtures("small_steps")
def test_the_loss_falls(generator):
    before, after = script.make_model(SMALL, seed=1), trained(1)[0]
    batch = script.copy_batch(64, 15, SMALL + 3, generator)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                script.answers(model, batch).flatten(0, 1), batch.targets.flatten()
            )
            for model in (before, after)
        ]
    assert losses[1] < losses[0] - 0.1


@pytest.mark.usefixtures("small_steps")
def test_a_seed_gives_the_same_weights():
    (first, result), (second, again), (other, _) = trained(3, 5), trained(3, 5), trained(4, 5)
    assert result.scores == again.scores
    assert not result.converged
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.usefixtures("small_steps")
def test_the_step_limit(tmp_path, capsys):
    out = tmp_path / "out"
    assert script.main([str(out), "--max-tokens", str(SMALL), "--steps", "2"]) == 1
    assert "after 2 steps" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", [".", "file"])
def test_only_an_empty_folder_is_written_to(tmp_path, capsys, name):
    (tmp_path / "file").write_text("of the user")
    with pytest.raises(SystemExit) as exit_info:
        script.main([str(tmp_path / name)])
    assert exit_info.value.code == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("tokens", [15, 2049])
def test_lengths_that_cannot_be_trained(tmp_path, capsys, tokens):
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), "--max-tokens", str(tokens)])
    assert "--max-tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_training_in_full(tmp_path):
    assert script.main([str(tmp_path)]) == 0
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["settings"]["max_tokens"] == 1025
    assert [score["pairs"] for score in record["scores"]] == [16, 64, 256, 500, 511]
    assert all(score["accuracy"] >= 0.99 for score in record["scores"])
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert script.evaluate(model, 500, 128, seed=99).accuracy >= 0.98
