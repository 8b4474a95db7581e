# SPDX-License-Identifier: Apache-2.0
"""Runs on disk: the same numbers however they come about, nothing twice, nothing foreign."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kvlib.errors import ConfigError
from kvlib.evals.profiles import get_profile, make_cells
from kvlib.evals.runner import RunOptions, run, units_of
from kvlib.evals.samples import FILE, SampleFile, key_of, read_samples

METHODS = "full;streaming:budget=0.5;random:budget=0.5,window=0 | int4"
CELLS = make_cells("recall:questions=10", (101, 61), METHODS, 3, modes=("unaware", "aware"))
OPTIONS = RunOptions("recall:vocab=256")
TIMES = ("prefill_s", "encode_s", "restore_s", "first_token_s", "step_s", "peak_memory_bytes")


def numbers(folder):
    """Everything that has to repeat itself, by key."""
    _, records = read_samples(folder)
    return {
        key_of(record): {name: x for name, x in record.items() if name not in TIMES}
        for record in records
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(CELLS, OPTIONS, folder)
    return folder


def test_a_run_has_every_result_once(finished):
    """Cells, contexts, methods; equal again with the same seed."""
    found = numbers(finished)
    assert len(found) == len((finished / FILE).read_text().splitlines()) - 1 == 2 * 2 * 3 * 3
    assert {key.method for key in found} == set(CELLS[0].methods)
    assert {(key.length, key.mode, key.number) for key in found} == {
        (length, mode, i) for length in (101, 61) for mode in ("unaware", "aware") for i in range(3)
    }


def test_the_same_seed_gives_the_same_numbers(finished, tmp_path):
    """Bit for bit, in another folder; another seed gives others."""
    run(CELLS, OPTIONS, tmp_path / "again")
    assert numbers(tmp_path / "again") == numbers(finished)
    run(CELLS[:1], RunOptions("recall:vocab=256", seed=1), tmp_path / "other")
    ours = [r["questions"] for r in numbers(finished).values()]
    assert [r["questions"] for r in numbers(tmp_path / "other").values()] != ours[:9]


def test_a_finished_run_is_not_run_again(finished):
    """No new line, and nothing planned."""
    before = (finished / FILE).read_bytes()
    plans = []
    run(CELLS, OPTIONS, finished, on_plan=lambda done, total: plans.append((done, total)))
    assert plans == [(36, 36)]
    assert (finished / FILE).read_bytes() == before


def test_a_larger_grid_runs_what_is_missing(finished, tmp_path):
    """More methods and contexts in the same folder; the rest is left alone."""
    run(CELLS[:2], OPTIONS, tmp_path)
    before = (tmp_path / FILE).read_bytes()
    new = []
    more = make_cells("recall:questions=10", (101,), METHODS + ";h2o:budget=0.5", 4)
    run(more, OPTIONS, tmp_path, on_record=new.append)
    assert len(new) == 3 + 4  # the new method on three contexts, four methods on the fourth
    assert (tmp_path / FILE).read_bytes().startswith(before)


def test_two_workers_give_the_same_numbers(finished, tmp_path):
    """Processes of their own; only the order of lines may differ."""
    run(CELLS, RunOptions("recall:vocab=256", workers=2), tmp_path)
    assert numbers(tmp_path) == numbers(finished)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_to_the_same_numbers(finished, tmp_path, workers):
    """kill -9 in the middle, a torn last line, and again: every result once, the same numbers."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from kvlib.evals.profiles import make_cells\n"
        "from kvlib.evals.runner import RunOptions, run\n"
        f"cells = make_cells('recall:questions=10', (101, 61), {METHODS!r}, 3, "
        "modes=('unaware', 'aware'))\n"
        f"run(cells, RunOptions('recall:vocab=256', workers={workers}), Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    file = tmp_path / FILE
    end = time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 8:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = file.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert kept.count(b"\n") < 37, "killed too late to show anything"
    with file.open("ab") as torn:
        torn.write(b'{"sample":{"task":"rec')
    run(CELLS, RunOptions("recall:vocab=256", workers=workers), tmp_path)
    assert file.read_bytes().startswith(kept)
    assert file.read_bytes().count(b"\n") == 37
    assert numbers(tmp_path) == numbers(finished)


def test_workers_end_with_their_parent(tmp_path):
    """A killed run leaves no process behind."""
    code = (
        "import sys, time\n"
        "from kvlib.evals.runner import RunOptions, _Process\n"
        "worker = _Process(RunOptions('recall:vocab=256'))\n"
        "worker.describe()\n"
        "print(worker._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{child}") and not _is_zombie(child):
        assert time.monotonic() < end, "the worker outlives its parent"
        time.sleep(0.05)


def _is_zombie(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_folder_belongs_to_one_model_and_one_process(finished):
    """Results of another model are not mixed in; two runs do not write at once."""
    before = (finished / FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"results with name 'recall:vocab=256' .* --out"):
        run(CELLS, RunOptions("recall:vocab=512"), finished)
    with pytest.raises(ConfigError, match="dtype"):
        run(CELLS, RunOptions("recall:vocab=256", dtype="bfloat16"), finished)
    header, _ = read_samples(finished)
    held = SampleFile(finished, header)
    with pytest.raises(ConfigError, match="another process is writing"):
        run(CELLS, OPTIONS, finished)
    held.close()
    assert (finished / FILE).read_bytes() == before


def test_a_new_version_of_a_policy_is_run_again(tmp_path, monkeypatch):
    """Its old lines stay in the file, and count no more."""
    from kvlib.eviction.streaming import Streaming

    cells = make_cells("recall:questions=5", (61,), "full;streaming:budget=0.5", 2)
    run(cells, OPTIONS, tmp_path)
    monkeypatch.setattr(Streaming, "version", 2)
    new = []
    run(cells, OPTIONS, tmp_path, on_record=new.append)
    assert [record["versions"] for record in new] == ["streaming@2"] * 2
    _, records = read_samples(tmp_path)
    assert sorted(record["versions"] for record in records) == ["full@1"] * 2 + ["streaming@2"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"kind":"other","schema":1}\n', "begins with kind 'other'"),
        ('{"kind":"kvlib-samples","schema":9}\n', "schema 9"),
        ('{"kind":"kvlib-samples","schema":1,"model":{}}\n{"a":1}\n', "line 2 is no sample"),
        ("not json\n", "line 1 is no sample"),
        ("[]\n", "line 1 is no sample"),
        ('{"kind":"kvlib-samples","schema":1}\n', "names no model"),
    ],
)
def test_a_foreign_file_is_named(tmp_path, text, message):
    """With the line that is wrong."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_samples(tmp_path)


def test_errors_of_workers_and_options(tmp_path):
    """What cannot run is said before anything is written, by workers too."""
    for workers in (1, 2):
        with pytest.raises(ConfigError, match="cannot load model 'no/such/model'"):
            run(CELLS, RunOptions("no/such/model", workers=workers), tmp_path)
        cells = make_cells("table", (1024,), "full", 1)
        with pytest.raises(ConfigError, match="has no tokenizer"):
            run(cells, RunOptions("recall:vocab=256", workers=workers), tmp_path / str(workers))
    assert not (tmp_path / FILE).exists()
    for options, message in (
        (RunOptions("recall:vocab=256", workers=0), "workers must be 1"),
        (RunOptions("recall:vocab=256", dtype="int8"), "dtype is float32"),
        (RunOptions("recall:size=3"), "recall:vocab=8192"),
        (RunOptions("recall:vocab=256", device="nothing"), "cannot use device 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(CELLS, options, tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'aware'"):
        make_cells("recall", (101,), "full", 1, modes=("awre",))
    with pytest.raises(ConfigError, match="1 or more"):
        make_cells("recall", (0,), "full", 1)
    with pytest.raises(ConfigError, match="no methods"):
        make_cells("recall", (101,), " ; ", 1)
    with pytest.raises(ConfigError, match="Did you mean 'smoke'"):
        get_profile("smokey")


def test_a_rerun_with_a_new_version_that_was_cut_short(tmp_path, monkeypatch):
    """Results of two versions are never averaged: those of the newest count, however few."""
    from kvlib.eviction.streaming import Streaming

    cells = make_cells("recall:questions=5", (61,), "full;streaming:budget=0.5", 3)
    run(cells, OPTIONS, tmp_path)
    monkeypatch.setattr(Streaming, "version", 2)
    run(make_cells("recall:questions=5", (61,), "streaming:budget=0.5", 1), OPTIONS, tmp_path)
    _, records = read_samples(tmp_path)
    assert sorted(record["versions"] for record in records) == ["full@1"] * 3 + ["streaming@2"]


@pytest.mark.parametrize("line", ["no message\n", '{"record": {"torn'])
def test_a_worker_that_talks_nonsense_ends_the_run(tmp_path, monkeypatch, line):
    """A line that is no message, or the half of one: an error, never a wait for ever."""
    code = (
        "import sys, json\n"
        "print(json.dumps({'model': {'name': 'x', 'fingerprint': ''}}), flush=True)\n"
        f"sys.stdin.readline(); sys.stdin.readline()\nsys.stdout.write({line!r})\n"
    )
    real = subprocess.Popen

    def fake(command, **options):
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr("kvlib.evals.runner.subprocess.Popen", fake)
    with pytest.raises(ConfigError, match="an evaluation worker"):
        run(CELLS, RunOptions("recall:vocab=256", workers=2), tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    """A file where the folder should be."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot write to"):
        run(CELLS, OPTIONS, tmp_path / "file")


def test_units_are_contexts():
    """What is done is left out; long contexts come first; probes are the first contexts."""
    units = units_of(get_profile("smoke").cells, OPTIONS, set())
    assert [unit.length for unit in units] == sorted((u.length for u in units), reverse=True)
    assert all(unit.probe == (unit.index == 0 and "=25" in unit.task) for unit in units)
    assert json.dumps(units[0].methods)
