# SPDX-License-Identifier: Apache-2.0
"""`kvlib bench store` in its quickest form: what it prints, and that it cleans up. No timing."""

import json
import random
from itertools import count

import pytest
from typer.testing import CliRunner

from kvlib.cli import app, main
from kvlib.codecs.container import parse_header
from kvlib.errors import StoreError
from kvlib.store.tier import verify_record
from kvlib.store_bench import disk_run
from kvlib.store_bench.blocks import Blocks
from kvlib.store_bench.disk import Plan, spread
from kvlib.store_bench.disk_index import measure_index
from kvlib.store_bench.raw import RawFile, aligned, at_once


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run on 8 MiB: the JSON of the last line, and what was printed."""
    folder = tmp_path_factory.mktemp("disk")
    out = folder / "all.json"
    arguments = ["bench", "store", "--path", folder, "--size", "8MiB", "--quick", "--json", out]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output + repr(done.exception)
    last = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == last
    assert [p.name for p in folder.iterdir()] == ["all.json"], "what it made is still there"
    return last, done.stdout


def test_every_row_has_its_ratio_to_the_raw_device(results):
    """Sizes of which four fit in a pass; raw, both tiers, both directions, fresh and churned."""
    found, _ = results
    assert (found["benchmark"], found["schema"]) == ("store", 1)
    rows = {(r["state"], r["block_bytes"], r["operation"], r["what"]): r for r in found["blocks"]}
    assert len(rows) == len(found["blocks"])
    wanted = {
        (state, size, operation, what)
        for state in ("fresh", "churned")
        for size in (64 << 10, 256 << 10)
        for operation, what in (
            ("write", "raw"),
            ("write", "segment"),
            ("read", "raw"),
            ("read", "segment"),
            ("read", "segment unverified"),
        )
    } | {("fresh", size, op, "file") for size in (64 << 10, 256 << 10) for op in ("write", "read")}
    assert rows.keys() == wanted
    for (state, size, operation, what), row in rows.items():
        raw = rows[state, size, operation, "raw"]
        shares = [
            a / b for a, b in zip(row["mb_per_s"]["all"], raw["mb_per_s"]["all"], strict=True)
        ]
        assert row["of_raw"]["all"] == pytest.approx(shares)
        assert len(shares) == found["settings"]["repeats"] == 2
        assert row["mb_per_s"]["min"] > 0
        assert row["cpu_s_per_gb"] >= 0
        assert row["pass_bytes"] % size == 0
        if what == "raw":
            assert set(shares) == {1}


def test_index_and_mixed_load_are_there(results):
    """Lookups of 1,000 keys, three kinds of restart, latencies alone and beside a writer."""
    found, _ = results
    index = found["index"]
    assert index["records"] == 256
    assert index["lookup"]["keys"] == 1000
    for name in ("hit", "miss"):
        row = index["lookup"]["us_per_key"][name]
        assert 0 < row["min"] <= row["median"] <= row["max"]
    assert index["restart_s"].keys() == {"clean", "unclean", "index_lost"}
    for row in index["restart_s"].values():
        assert 0 < row["min"] <= row["median"] <= row["max"]
    for what in ("segment", "raw"):
        row = found["mixed"][what]
        assert row["written_mb_per_s"] >= 0
        for name in ("alone_ms", "beside_writer_ms"):
            assert 0 < row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]


def test_it_says_what_it_measured(results):
    """Cold reads, the machine, and the targets that these sizes have."""
    found, text = results
    assert "cold" in text
    assert "cold" in found["settings"]["reads"]
    assert found["environment"]["cores"] >= 1
    assert [row["name"] for row in found["targets"]] == ["lookup: us a key"]
    for title in ("A store filled once", "After 3x churn, 90 % full", "Restart with 256 records"):
        assert title in text


def test_targets_are_compared_with_the_worst_size():
    """A share below what is wanted at one size is a miss, beyond its sizes it does not count."""

    def row(state, size, operation, what, share):
        keys = ("state", "block_bytes", "operation", "what")
        return dict(zip(keys, (state, size, operation, what), strict=True)) | {
            "of_raw": spread([share])
        }

    rows = [
        row("fresh", 64 << 10, "read", "segment", 0.1),
        row("fresh", 1 << 20, "read", "segment", 0.9),
        row("fresh", 4 << 20, "read", "segment", 0.84),
        row("fresh", 1 << 20, "write", "segment", 0.6),
        row("fresh", 4 << 20, "write", "segment", 0.7),
        row("churned", 16 << 20, "write", "segment", 0.8),
    ]
    index = {"lookup": {"us_per_key": {"hit": {"median": 2.9}}}}
    found = {r["name"]: (r["seen"], r["met"]) for r in disk_run._targets(rows, index)}
    assert found == {
        "reads of 1 MiB or more, verified: share of raw": (0.84, False),
        "writes of 4 MiB or more: share of raw": (0.7, False),
        "writes of 1 MiB: share of raw": (0.6, True),
        "writes of 4 MiB or more after churn: share of raw": (0.8, True),
        "lookup: us a key": (2.9, True),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "1000000TB"], "GiB free"),
        (["--size", "1MiB"], "at least 8 MiB"),
        (["--size", "much"], "is not a size"),
        (["--path", "/nonexistent/folder"], "cannot work in"),
    ],
)
def test_wrong_places_and_sizes_are_one_line(tmp_path, monkeypatch, capsys, options, message):
    """And nothing is left behind."""
    arguments = ["bench", "store", "--quick", "--path", str(tmp_path), *options]
    monkeypatch.setattr("sys.argv", ["kvlib", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.strip()]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    """The folder goes, whatever happens in it."""

    def fail(*_):
        raise StoreError("no")

    monkeypatch.setattr(disk_run, "measure_blocks", fail)
    done = CliRunner().invoke(
        app, ["bench", "store", "--quick", "--size", "8MiB", "--path", str(tmp_path)]
    )
    assert isinstance(done.exception, StoreError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nbytes", [6 << 10, 12 << 10, 64 << 10, (1 << 20) + 5])
def test_records_to_measure_with_are_whole_containers(nbytes):
    """Of exactly that size, each under a key of its own, with the sections it should have."""
    blocks = Blocks(nbytes, 32)
    (key, parts), (other, _) = blocks.record(1), blocks.record(2)
    data = memoryview(b"".join(parts))
    verify_record(key, data)
    assert data.nbytes == blocks.nbytes == nbytes // 8 * 8
    assert key == blocks.key(1) != other == blocks.key(2)
    layers = len(parse_header(data).layers)
    assert layers == 32 if nbytes >= 12 << 10 else 0 < layers < 32
    assert len(parse_header(data).sections) == 2 * layers


def test_the_raw_file_reads_what_it_writes(tmp_path):
    """Each block by its number, whoever calls; the file goes in the end."""
    with RawFile(tmp_path / "raw", 1 << 20) as raw:
        numbers = list(range(16))
        random.Random(0).shuffle(numbers)
        assert raw.write(1 << 16, numbers, 2).nbytes == 1 << 20
        taken = raw.read(1 << 16, numbers[:5], 3)
        assert taken.nbytes == 5 << 16
        assert taken.mb_per_s > 0
        assert (tmp_path / "raw").stat().st_size == 1 << 20
        assert (tmp_path / "raw").read_bytes().strip(b"\0\1") == b""
    assert not list(tmp_path.iterdir())


def test_all_callers_share_the_work():
    """Each item once, and what fails is raised."""
    seen = []
    taken = at_once(range(100), 4, lambda: lambda item: seen.append(item) or 2)
    assert (sorted(seen), taken.nbytes) == (list(range(100)), 200)
    with pytest.raises(ZeroDivisionError):
        at_once(range(100), 3, lambda: lambda item: 1 // (item - 50))
    assert len(aligned(10)) >= 10


def test_a_lost_record_is_not_measured_over(tmp_path, monkeypatch):
    """A store that lost records in a restart stops the measurement."""
    monkeypatch.setattr(
        "kvlib.store_bench.disk_index._abandon_elsewhere", lambda *_: _lose(tmp_path)
    )
    plan = Plan(folder=tmp_path, batch_bytes=1 << 20, sizes=(), repeats=1, callers=1, layers=2)
    with pytest.raises(StoreError, match="of 20 records were there after a restart"):
        measure_index(plan, 20, 10, count(), lambda _: None)


def _lose(folder):
    for file in (folder / "index").glob("seg-*.kv"):
        file.unlink()
