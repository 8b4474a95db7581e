# SPDX-License-Identifier: Apache-2.0
"""`kvlib eval` as a user calls it."""

import json
import math
import re

import pytest
from typer.testing import CliRunner

from kvlib.cli import app
from kvlib.errors import ConfigError
from kvlib.evals.report import short_method
from kvlib.evals.samples import read_samples


def eval_(*arguments, code=0):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    if code is None:
        return result
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke profile, run once."""
    out = tmp_path_factory.mktemp("smoke")
    text = eval_("--profile", "smoke", "--out", out)
    return out, text


def rows(folder, length, mode):
    results = json.loads((folder / "results.json").read_text())["rows"]
    return {
        row["method"].partition(",")[0]: row
        for row in results
        if (row["length"], row["mode"]) == (length, mode)
    }


def test_smoke_agrees_with_theory(smoke):
    """Lossless: everything; blind policies: what they keep; with the question in sight: all."""
    out, _ = smoke
    for length in (1001, 4001):
        found = rows(out, length, "unaware")
        for method in ("full", "full | exact"):
            assert found[method]["score"]["mean"] == 1
            assert found[method]["scores"]["kl"] == 0
        for share in (0.5, 0.25) if length == 1001 else (0.25,):
            for policy in ("streaming", "random", "snapkv", "h2o"):
                row = found[f"{policy}:budget={share}"]
                error = math.sqrt(share * (1 - share) / row["questions"])
                assert abs(row["score"]["mean"] - share) < 3 * error, row
                assert share <= row["held_share"] <= share + 0.005
    found = rows(out, 1001, "aware")
    assert found["snapkv:budget=0.25"]["score"]["mean"] == 1
    assert found["streaming:budget=0.25"]["score"]["mean"] < 0.5


def test_an_answer_is_right_where_its_evidence_is_held(smoke):
    """Streaming keeps the same in all heads: each question is right exactly then."""
    out, _ = smoke
    _, records = read_samples(out)
    found = [
        question
        for record in records
        if record["method"].startswith("streaming")
        for question in record["questions"]
    ]
    assert len(found) >= 180
    assert all(question["exact"] == question["evidence_kept"] for question in found)


def test_the_report_says_what_happened(smoke):
    """Console, HTML and JSON; written again from the samples they are the same."""
    out, text = smoke
    assert "recall:questions=25, 1,001 tokens: 75 questions, 3 contexts" in text
    assert "snapkv:budget=0.25" in text
    page = (out / "report.html").read_text()
    for part in (
        "<svg",
        "recall:questions=15, 4,001 tokens",
        "question-aware",
        "full | int4",
        "evidence kept",
    ):
        assert part in page
    assert not re.search(r"(src|href)=.?http", page)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    eval_("report", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_running_again_runs_nothing(smoke):
    """The same command: the same samples."""
    out, _ = smoke
    before = (out / "samples.jsonl").read_bytes()
    text = eval_("--profile", "smoke", "--out", out)
    assert "45 of 45 results are there" in text
    assert (out / "samples.jsonl").read_bytes() == before


def test_compare(smoke, tmp_path):
    """A run with itself; two methods; JSON; nothing in common."""
    out, _ = smoke
    text = eval_("compare", out, out)
    assert "recall:questions=25, 1,001 tokens: 75 questions, 3 contexts" in text
    assert "│ better" not in text
    assert "│  worse" not in text
    found = json.loads(eval_("compare", out, out, "--methods", "full;snapkv:budget=0.25", "--json"))
    assert {(one["length"], one["mode"], one["verdict"]) for one in found} == {
        (1001, "unaware", "too few contexts"),
        (4001, "unaware", "too few contexts"),
        (1001, "aware", "too few contexts"),
    }
    (paired,) = [one for one in found if (one["length"], one["mode"]) == (1001, "unaware")]
    assert paired["questions"] == paired["only_first"] / (1 - paired["second_score"])
    assert paired["p"] < 1e-9
    result = eval_("compare", out, out, "--methods", "full;h2o:budget=0.1", code=None)
    assert isinstance(result.exception, ConfigError)
    assert "no question and method in common" in str(result.exception)
    result = eval_("compare", out, tmp_path / "nothing", code=None)
    assert "expected a run folder or a samples file" in str(result.exception)
    result = eval_("compare", out, out, "--metric", "speed", code=None)
    assert "metric is one of exact" in str(result.exception)


def test_another_tools_samples_are_compared(smoke, tmp_path):
    """A file of lines with methods in short, as another tool writes them."""
    out, _ = smoke
    header, records = read_samples(out)
    theirs = tmp_path / "theirs.jsonl"
    lines = [{**header, "tool": "another 1.0"}]
    for record in records:
        if record["method"] == "streaming:budget=0.25,sinks=4":
            lines.append({**record, "method": "streaming:budget=0.25"})
            del lines[-1]["stepwise"]
    theirs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json.loads(eval_("compare", out, theirs, "--json"))
    assert {one["first"] for one in found} == {"streaming:budget=0.25,sinks=4"}
    assert {one["length"] for one in found} == {1001, 4001}


def test_export_gives_the_same_prompts(smoke, tmp_path):
    """Token ids of a grid: what kvlib's own methods were asked."""
    file = tmp_path / "prompts.jsonl"
    text = eval_("export", file, "--profile", "smoke", "--contexts", 1)
    assert "3 contexts" in text
    header, *lines = map(json.loads, file.read_text().splitlines())
    assert header["kind"] == "kvlib-prompts"
    out, _ = smoke
    _, records = read_samples(out)
    for line in lines:
        assert len(line["context"]) == line["sample"]["length"]
        (mine,) = [
            record
            for record in records
            if record["sample"] == line["sample"]
            and record["mode"] == line["mode"]
            and record["method"] == "full"
        ]
        assert len(mine["questions"]) == len(line["questions"])


def test_a_grid_of_ones_own(tmp_path, text_model_folder):
    """Tasks, lengths, methods and modes from the command line, with a model folder."""
    arguments = (
        *("--model", text_model_folder, "--tasks", "table:pairs=8;copy", "--lengths", "600,800"),
        *("--methods", "full; streaming:budget=0.5", "--modes", "unaware,aware"),
        *("--contexts", 1, "--out", tmp_path, "--workers", 1),
    )
    text = eval_(*arguments)
    for cell in ("table:pairs=8, 600 tokens:", "copy, 800 tokens, question-aware:"):
        assert cell in text
    _, records = read_samples(tmp_path)
    assert len(records) == 2 * 2 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile", "smok"), "Did you mean 'smoke'"),
        (("--profile", "smoke", "--methods", "snapvk"), "Did you mean 'snapkv'"),
        (("--profile", "smoke", "--tasks", "recal"), "Did you mean 'recall'"),
        (("--tasks", "recall", "--lengths", "many"), "lengths are numbers"),
        (("--profile", "smoke", "--methods", "full | zip"), "no codec is named 'zip'"),
    ],
)
def test_wrong_options_are_named(arguments, message, tmp_path):
    """Before a model is loaded."""
    result = eval_(*arguments, "--out", tmp_path / "out", code=None)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_options_before_a_subcommand_are_refused(tmp_path):
    """They would be ignored."""
    result = eval_("--profile", "smoke", "export", tmp_path / "x", code=None)
    assert "--profile stands before 'export'" in str(result.exception)


def test_a_part_of_a_profile(tmp_path):
    """Other lengths, modes or methods keep the rest of the profile's cells."""
    text = eval_(
        *("--profile", "smoke", "--lengths", "61,81", "--modes", "aware", "--contexts", 1),
        *("--methods", "full", "--out", tmp_path / "a"),
    )
    assert "recall:questions=25, 61 tokens, question-aware: 25 questions" in text
    assert "recall:questions=15, 81 tokens, question-aware: 15 questions" in text
    for arguments, message in (
        (("--tasks", ";"), "no tasks were given"),
        (("--device", "cuda:99", "--model", "recall:vocab=64"), "cannot use device"),
    ):
        result = eval_("--profile", "smoke", *arguments, "--out", tmp_path / "b", code=None)
        assert message in str(result.exception)
    result = eval_("export", tmp_path / "no" / "x.jsonl", code=None)
    assert "there is no folder" in str(result.exception)
    result = eval_("report", tmp_path / "a" / "samples.jsonl", code=None)
    assert "is no folder of a run" in str(result.exception)


def test_short_names():
    """Defaults are left out, a budget never is; foreign methods stay as they are."""
    assert short_method("snapkv:budget=0.5,window=32,kernel=5,pool=avg,group=mean") == (
        "snapkv:budget=0.5"
    )
    assert short_method("snapkv:budget=0.25,window=16") == "snapkv:budget=0.25,window=16"
    assert short_method("full | int4:group=32") == "full | int4"
    assert short_method("full | int4:group=64") == "full | int4:group=64"
    assert short_method("knorm:budget=0.5") == "knorm:budget=0.5"
