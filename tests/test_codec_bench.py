# SPDX-License-Identifier: Apache-2.0
"""`kvlib bench codec`, on a tiny model with random weights and on real text."""

import json
import math
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from kvlib.artefacts import save_artefact
from kvlib.blocks import KVBlock
from kvlib.calibration.documents import test_documents as real_texts
from kvlib.cli import app, main
from kvlib.codec_bench import measure as module
from kvlib.codec_bench import results as results_module
from kvlib.codec_bench.curves import Point, bits_at, compare, frontier
from kvlib.codec_bench.grid import default_methods, make_grid, profile_methods
from kvlib.codec_bench.measure import Task, check_codec, measure, prepare, spec_of, texts_of
from kvlib.codec_bench.results import run, short_form, steps
from kvlib.codec_bench.speed import measure_speeds
from kvlib.codecs import MatrixCodec, build_codec, decode_block, encode_block
from kvlib.codecs.base import raw_view
from kvlib.codecs.transforms import KIND
from kvlib.errors import ConfigError, CorruptDataError, UnknownPluginError
from kvlib.evals.models import load_eval_model
from kvlib.testing.models import random_block, tiny_spec

TASK = Task(tokens=80, following=16, record=32, dtype="bfloat16")
SIZES = ["--tokens", "80", "--following", "16", "--record", "32"]


@pytest.fixture(scope="module")
def loaded(text_model_folder):
    return load_eval_model(str(text_model_folder))


@pytest.fixture(scope="module")
def spec(loaded):
    return spec_of(loaded, "bfloat16")


@pytest.fixture(scope="module")
def document(loaded, spec):
    ids = texts_of(loaded, TASK, ["source"])["source"]
    return prepare(loaded, spec, "source", ids, TASK)


def bench(*arguments):
    result = CliRunner().invoke(app, ["bench", "codec", *map(str, arguments)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def fails(monkeypatch, capsys, *arguments):
    """The one line on the error stream, and status 1."""
    monkeypatch.setattr("sys.argv", ["kvlib", "bench", "codec", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# Quality and rate


def test_a_document_is_read_from_its_beginning(loaded, document):
    """Bytes are the tokens of this tokenizer: prompt, continuation and targets are the text's."""
    text = loaded.tokenizer(real_texts()["source"])["input_ids"]
    assert document.ids[0].tolist() == text[80:96]
    assert document.targets.tolist() == text[81:97]
    assert [block.num_tokens for block in document.blocks] == [32, 32, 16]
    assert document.values == 80 * 3 * 2 * 16


def test_numbers_agree_with_an_independent_computation(text_model_folder, document, loaded):
    """Rate, KL, agreement and likelihood of int4, from transformers alone and whole containers."""
    model = AutoModelForCausalLM.from_pretrained(text_model_folder, dtype=torch.float32)
    model.train(False)
    ids = texts_of(loaded, TASK, ["source"])["source"]
    codec = build_codec("int4")

    def behind(change):
        cache, stored = DynamicCache(config=model.config), 0
        for index, layer in enumerate(model(ids[:, :80]).past_key_values.layers):
            pair = [x.to(torch.bfloat16) for x in (layer.keys, layer.values)]
            cache.update(*change(index, *pair), index)
        for block in document.blocks:
            stored += len(b"".join(encode_block(block, codec)))
        return torch.log_softmax(model(ids[:, 80:96], past_key_values=cache).logits[0].double(), -1)

    decoded = [decode_block(b"".join(encode_block(b, codec)), b.spec) for b in document.blocks]

    def coded(index, keys, values):
        out = [
            torch.cat([getattr(block.layers[index], name) for block in decoded], dim=1)[None]
            for name in ("keys", "values")
        ]
        assert (out[0] - keys).abs().max() > 0
        return [x.float() for x in out]

    with torch.no_grad():
        true = behind(lambda index, *pair: [x.float() for x in pair])
        mine = behind(coded)
    (found,) = measure(loaded, document, codec)
    size = sum(len(b"".join(encode_block(block, codec))) for block in document.blocks)
    assert found.bits == pytest.approx(8 * size / (80 * 3 * 2 * 16), rel=1e-12)
    kl = torch.nn.functional.kl_div(mine, true, reduction="none", log_target=True).sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-3)
    assert found.kl > 0
    assert found.top1 == float((mine.argmax(-1) == true.argmax(-1)).double().mean())
    nll = torch.nn.functional.nll_loss(mine, ids[0, 81:97])
    assert found.nll == pytest.approx(float(nll), rel=1e-6)


def test_kl_is_from_the_reference():
    """Not the other way round: 0.9 ln(0.9 / 0.5) + 0.1 ln(0.1 / 0.5), and 0 for an equal row."""
    true = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).log() + 5
    mine = torch.tensor([[0.5, 0.5], [0.3, 0.7]]).log() - 5
    kl, top1, nll = module._compare(true, mine, torch.tensor([1, 1]))
    assert kl == pytest.approx((0.9 * math.log(1.8) + 0.1 * math.log(0.2)) / 2, rel=1e-6)
    assert top1 == 1
    assert nll == pytest.approx(-(math.log(0.5) + math.log(0.7)) / 2, rel=1e-6)


def test_lossless_costs_nothing_and_fewer_bits_cost_more(loaded, document):
    """exact is the reference itself; coarser codecs lose more and take less."""
    exact, *lossy = [
        measure(loaded, document, build_codec(method))[0]
        for method in ("exact", "int8", "kivi:bits=4", "kivi:bits=2")
    ]
    assert (exact.kl, exact.top1, exact.nll) == (0, 1, document.nll)
    losses, bits = [q.kl for q in lossy], [q.bits for q in lossy]
    assert 0 < losses[0] < losses[1] < losses[2]
    assert bits[0] > bits[1] > bits[2]


def test_first_tokens_that_are_put_back_are_exact_and_paid_for(loaded, document, monkeypatch):
    """The model sees the true first tokens and the coded others; 4 raw tokens are added."""
    seen = []
    logits = module.continuation_logits

    def watch(model, pairs, ids):
        seen.append([(k.clone(), v.clone()) for k, v in pairs])
        return logits(model, pairs, ids)

    monkeypatch.setattr(module, "continuation_logits", watch)
    plain, fair = measure(loaded, document, build_codec("kivi:bits=2"), (0, 4))
    raw = 8 * 4 * 3 * 2 * 16 * 2  # bits of 4 tokens: 3 layers, 2 heads, 8 + 8 channels, 2 bytes
    assert fair.bits - plain.bits == pytest.approx(raw / document.values)
    assert fair.kl != plain.kl
    true = document.blocks[0]
    for layer, before, after in zip(true.layers, *seen, strict=True):
        for x, coded, mixed in zip((layer.keys, layer.values), before, after, strict=True):
            assert not torch.equal(coded[:, :4], x[:, :4].float())
            assert torch.equal(mixed[:, :4], x[:, :4].float())
            assert torch.equal(mixed[:, 4:], coded[:, 4:])


def test_documents_stay_as_they_are(loaded, document):
    """Putting tokens back changes what was decoded, never the reference."""
    before = [layer.keys.clone() for layer in document.blocks[0].layers]
    measure(loaded, document, build_codec("exact"), (0, 4))
    measure(loaded, document, build_codec("int4"), (4,))
    after = [layer.keys for layer in document.blocks[0].layers]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken(MatrixCodec):
    """Takes its time, and says that it is lossless."""

    name: ClassVar[str] = "broken"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    lossless: ClassVar[bool] = True

    def encode_matrix(self, x):
        time.sleep(0.002)
        return [raw_view(x)[:, :1].tobytes()]

    def decode_matrix(self, data, out):
        out.zero_()


def test_a_codec_that_only_says_that_it_is_lossless_is_refused(loaded, document):
    """A lossless codec is held to its word."""
    with pytest.raises(CorruptDataError, match="is called lossless and is not"):
        measure(loaded, document, Broken())


def test_the_model_without_text_gets_tokens_anyway():
    """recall has no tokenizer: random ids, the same every time."""
    recall = load_eval_model("recall:vocab=64")
    first, again = texts_of(recall, TASK), texts_of(recall, TASK)
    assert list(first) == ["topics", "docstrings", "source"]
    assert {ids.shape for ids in first.values()} == {(1, 97)}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["topics"], first["source"])


# The grid


def test_the_built_in_grid_has_every_family():
    """All that needs no calibration, and what of it gets exact first tokens for fairness."""
    grid = make_grid(default_methods(), 4)
    fixed = ["fp8", "int8", "int4", "kivi", "kivi:bits=2"]
    fixed += ["hadamard", "hadamard:bits=3", "hadamard:bits=2"]
    assert [entry.label for entry in grid] == [
        "exact",
        *(label for name in fixed for label in (name, f"{name} +sinks")),
        *("cachegen:variant=lmcache", "cachegen:variant=lmcache +sinks"),
        *("kvlc:level=0.35", "kvlc:level=0.5", "kvlc:level=0.7"),
    ]
    assert {entry.label for entry in grid if entry.put_back} == {f"{x} +sinks" for x in fixed}
    families = {entry.family for entry in grid if " +sinks" not in entry.family}
    near = "kvlc near, no profile"
    assert families == {"exact", "fp8", "int", "kivi", "hadamard", "lmcache", near}


def test_a_codec_with_the_parameter_keeps_its_own_first_tokens(monkeypatch):
    """`sinks=4` where there is such a parameter; no row where it is set already."""
    from kvlib.codecs import CODECS

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Sinking(Broken):
        name: ClassVar[str] = "sinking"
        lossless: ClassVar[bool] = False
        sinks: int = 0

    monkeypatch.setitem(CODECS._loaded, "sinking", Sinking)
    (plain, fair) = make_grid(["sinking"], 4)
    assert (plain.codec.sinks, fair.codec.sinks, fair.put_back) == (0, 4, 0)
    assert (plain.family, fair.family) == ("sinking", "sinking +sinks")
    assert fair.label == "sinking +sinks"
    assert fair.method == "sinking@1:sinks=4"
    assert [e.family for e in make_grid(["sinking:sinks=4"], 4)] == ["sinking +sinks"]
    assert len(make_grid(["sinking", "sinking:sinks=4"], 4)) == 2
    for method in ("kvlc", "kvlc:sinks=0"):  # exact first tokens unless one insists
        (only,) = make_grid([method], 4)
        assert only.family == "kvlc near, no profile"
    assert len(make_grid(["int4", "exact"], 0)) == 2


def test_what_is_given_twice_is_measured_once():
    """Also when written differently."""
    grid = make_grid(["int4", "int4:group=32", "int4:group=64"], 0)
    assert [(e.label, e.family) for e in grid] == [("int4", "int"), ("int4:group=64", "int")]


def profile_file(path, model="0" * 64, presets="near small"):
    settings = {"presets": presets, "group": 2, "layers": 3}
    tensors = {"near.K": torch.ones(3)}
    return save_artefact(path, kind=KIND, model=model, tensors=tensors, settings=settings)


def test_a_profile_adds_its_presets_and_levels(tmp_path):
    """Every preset that it has, at six levels, apart from near without a profile."""
    file = str(tmp_path / "p.kvlc")
    profile_file(file)
    methods = profile_methods(file, None)
    assert len(methods) == 12
    grid = make_grid(["kvlc:level=0.35", *methods], 4)
    families = [entry.family for entry in grid]
    assert families == ["kvlc near, no profile"] + ["kvlc near"] * 6 + ["kvlc small"] * 6
    assert len({entry.label for entry in grid}) == 13
    assert str(tmp_path) not in " ".join(entry.label for entry in grid)
    assert "digest=" in grid[1].label  # else it would have the name of the first one
    assert "digest=" not in grid[7].label


def test_cachegen_levels_are_those_of_its_profile(tmp_path):
    """One method for each."""
    file = str(tmp_path / "c.safetensors")
    tensors = {"levels": torch.tensor([0.25, 0.5], dtype=torch.float64)}
    save_artefact(file, kind="cachegen", model="m", tensors=tensors, settings={})
    assert profile_methods(None, file) == [
        f"cachegen:level=0.25,profile={file}",
        f"cachegen:level=0.5,profile={file}",
    ]
    with pytest.raises(ConfigError, match="is an artefact of 'cachegen'"):
        profile_methods(file, None)


def test_no_methods_and_unknown_ones_are_refused():
    """By name, with the nearest."""
    with pytest.raises(UnknownPluginError, match="no codec is named 'int5'"):
        make_grid(["exact", "int5"], 4)
    with pytest.raises(ConfigError, match="no methods are given"):
        make_grid([], 4)


# Curves


def line(base, slope, losses):
    """Bits that fall by `slope` for each factor e in KL."""
    return [Point(base - slope * math.log(kl), kl) for kl in losses]


def test_bits_are_interpolated_over_log_kl_and_never_beyond():
    """Exact on a family that is a line there."""
    points = line(1.0, 0.5, [0.1, 0.001])
    for kl in (0.001, 0.0123, 0.1):
        assert bits_at(points, kl) == pytest.approx(1 - 0.5 * math.log(kl))
    assert bits_at(points, 0.00099) is None
    assert bits_at(points, 0.101) is None
    assert bits_at([], 0.01) is None


def test_points_that_others_beat_do_not_count():
    """More bits for more loss is no point of the curve, nor is a loss of 0."""
    good = [Point(4.0, 0.001), Point(2.0, 0.1)]
    assert frontier([*good, Point(4.5, 0.01), Point(5.0, 0.2), Point(11.0, 0.0)]) == good


def test_families_are_compared_where_both_were_measured():
    """Twice the bits everywhere is a ratio of 2; a single point is compared at its own loss."""
    ours = line(1.0, 0.5, [0.002, 0.004, 0.02])
    twice = [Point(2 * p.bits, p.kl) for p in line(1.0, 0.5, [0.0001, 0.008])]
    families = {"kvlc small": ours, "cachegen": twice, "lmcache": [Point(9.0, 0.004)]}
    found = compare(families)
    assert {(c.other, c.kl) for c in found} == {
        *(("cachegen", kl) for kl in (0.002, 0.003, 0.005)),
        ("lmcache", 0.004),
    }
    for one in found:
        want = 2 if one.other == "cachegen" else 9 / (1 - 0.5 * math.log(0.004))
        assert one.ratio == pytest.approx(want)
    text = next(c for c in found if c.other == "lmcache").text()
    assert text.startswith("at KL 0.004, lmcache needs 2.3")
    assert "times the bits of kvlc small" in text


def test_comparisons_are_made_for_each_document_too():
    """Ratios of 2 and 4 at the same loss, and none where a document does not reach it."""

    def row(family, bits, losses):
        each = [{"bits": b, "kl": kl} for b, kl in zip(bits, losses, strict=True)]
        mean = {"mean": sum(losses) / 2}
        return {
            "family": family,
            "bits_per_value": {"mean": sum(bits) / 2},
            "kl": mean,
            "documents": each,
        }

    ours = [row("kvlc near", (2, 2), (0.001, 0.001)), row("kvlc near", (1, 1), (0.1, 0.1))]
    other = row("lmcache", (4, 8), (0.001, 0.001))
    (found,) = results_module._comparisons([*ours, other], ["a", "b"])
    assert (found["kl"], found["ratio"]) == (0.001, 3)
    assert found["by_document"] == {"a": 2, "b": 4}
    assert found["text"].endswith("; by document 2.00 to 4.00 times")
    uneven = row("lmcache", (4, 8), (0.0005, 0.0015))
    (found,) = results_module._comparisons([*ours, uneven], ["a", "b"])
    at_own_loss = 8 / (2 - math.log(1.5) / math.log(100))
    assert found["by_document"] == {"a": None, "b": pytest.approx(at_own_loss)}
    assert "by document" not in found["text"]


# Speeds


def test_waiting_is_wall_time_and_no_cpu_time():
    """A codec that sleeps takes wall time; everybody encodes and decodes in each repeat."""
    spec = tiny_spec()
    blocks = random_block(spec, 64).split(32)
    turns = []
    found, copies, raw_bytes = measure_speeds(
        {"slow": Broken(), "int8": build_codec("int8")}, blocks, 3, lambda: turns.append(1)
    )
    assert len(turns) == 2 * 4  # one turn of each is not kept
    assert raw_bytes == 64 * 2 * 2 * 16 * 4
    encode, decode = found["slow"]
    assert [len(x) for x in (encode.wall, encode.cpu, decode.wall, copies.cpu)] == [3] * 4
    assert all(seconds >= 2 * 4 * 0.002 for seconds in encode.wall)
    summary = encode.summary(raw_bytes)
    assert summary["mb_per_cpu_s"]["median"] > 1.5 * summary["mb_per_s"]["median"]
    wall = sorted(raw_bytes / seconds / 1e6 for seconds in encode.wall)
    assert summary["mb_per_s"] == {"min": wall[0], "median": wall[1], "max": wall[2]}


def test_threads_are_given_back():
    """Timing uses one thread of torch and leaves the number as it was."""
    before = torch.get_num_threads()
    used = []
    torch.set_num_threads(2)
    try:
        measure_speeds(
            {"exact": build_codec("exact")},
            [random_block(tiny_spec(), 4)],
            1,
            lambda: used.append(torch.get_num_threads()),
        )
        assert (set(used), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


# The run


def test_means_and_errors_are_over_documents(loaded, spec):
    """Each document counts alike; the error is the deviation over the root of their number."""
    entries = make_grid(["exact", "int4"], 4)
    texts = texts_of(loaded, TASK)
    told = []
    results = run(
        loaded, spec, entries, texts, TASK, timed=1, repeats=2, step=lambda what: told.append(what)
    )
    assert len(told) == steps(entries, 3, 1, 2) == 3 * 3 + 2 * 3
    assert [row["label"] for row in results["methods"]] == ["exact", "int4", "int4 +sinks"]
    for row in results["methods"]:
        each = torch.tensor([one["kl"] for one in row["documents"]], dtype=torch.float64)
        assert len(each) == 3
        assert row["kl"]["mean"] == pytest.approx(float(each.mean()))
        assert row["kl"]["se"] == pytest.approx(float(each.std()) / 3**0.5)
        nll = sum(one["nll"] for one in row["documents"]) / 3
        assert row["perplexity"] == pytest.approx(math.exp(nll))
        assert ("encode" in row) == (row["put_back"] == 0)
    exact, int4, _ = results["methods"]
    assert exact["kl"] == {"mean": 0, "se": 0}
    assert exact["nll"]["mean"] == pytest.approx(
        sum(one["reference_nll"] for one in results["documents"]) / 3
    )
    assert int4["kl"]["mean"] > 0
    assert all(0 < one["cast_kl"] < 1e-4 for one in results["documents"])
    short = short_form(results)
    assert "documents" not in short["methods"][1]
    assert set(short["methods"][1]["encode"]) == {"mb_per_cpu_s", "mb_per_s", "cores"}
    assert set(short["memcpy"]) == {"mb_per_cpu_s", "mb_per_s", "cores"}
    assert len(results["methods"][1]["encode"]["cpu_s"]) == 2


def test_a_single_document_has_no_error(loaded, spec):
    """And no speeds were asked for."""
    texts = texts_of(loaded, TASK, ["source"])
    results = run(loaded, spec, make_grid(["int4"], 0), texts, TASK, timed=0, repeats=5)
    assert results["methods"][0]["kl"]["se"] is None
    assert "memcpy" not in results
    assert "encode" not in results["methods"][0]
    assert results["settings"]["repeats"] == 0


def test_the_command_writes_what_it_prints(text_model_folder, tmp_path):
    """A table, a report that needs nothing else, and the same numbers in JSON, last on stdout."""
    out, file = tmp_path / "new" / "report", tmp_path / "all.json"
    text = bench(
        *("--model", text_model_folder, *SIZES, "--methods", " int4; exact;"),
        *("--repeats", 2, "--timed", 1, "--out", out, "--json", file),
    )
    assert "int4 +sinks" in text
    last = json.loads(text.splitlines()[-1])
    full = json.loads((out / "results.json").read_text())
    assert full == json.loads(file.read_text())
    assert last == short_form(full)
    assert last["benchmark"] == "codec"
    assert [row["family"] for row in last["methods"]] == ["int", "int +sinks", "exact"]
    assert last["settings"]["bytes_per_token"] == 3 * 2 * 16 * 2
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "int4 +sinks" in page
    assert not any(mark in page for mark in ("<script", "<link", "src=", "@import"))
    assert (out / "report.svg").read_text().startswith("<svg")


def test_the_drawing_has_a_line_for_each_family(text_model_folder, tmp_path, monkeypatch):
    """Families are lines; what loses nothing has no place on a logarithmic axis."""
    from kvlib.codec_bench import report

    drawn = []
    figure = report.figure

    def watch(*arguments):
        drawing, axes = figure(*arguments)
        drawn.extend(axes)
        return drawing, axes

    monkeypatch.setattr(report, "figure", watch)
    bench(
        *("--model", text_model_folder, *SIZES, "--timed", 0, "--out", tmp_path),
        *("--methods", "exact;int4;int8;kivi:bits=2", "--documents", "source"),
    )
    lines = {x.get_label(): x for x in drawn[0].lines if not x.get_label().startswith("_")}
    assert set(lines) == {"int", "int +sinks", "kivi", "kivi +sinks"}
    assert drawn[0].get_yscale() == "log"
    x, y = lines["int"].get_data()
    assert len(x) == 2
    assert x[0] < x[1]
    assert y[0] > y[1] > 0
    assert lines["int"].get_color() == lines["int +sinks"].get_color()
    assert lines["int"].get_linestyle() != lines["int +sinks"].get_linestyle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "in8"], "no codec is named 'in8'"),
        (["--methods", ";"], "no methods are given"),
        (["--methods", "int4:group=1"], "group"),
        (["--methods", "int4", "--dtype", "int8"], "dtype is float32, bfloat16 or float16"),
        (["--methods", "int4", "--record", "3"], "--sinks 4 must fit in a record of 3 tokens"),
        (["--methods", "int4", "--documents", "letters"], "documents are topics, docstrings"),
        (["--methods", "int4", "--tokens", "60000"], "--tokens"),
        (["--profile", "nowhere.kvlc"], "cannot read artefact 'nowhere.kvlc'"),
    ],
)
def test_mistakes_are_one_line(text_model_folder, monkeypatch, capsys, arguments, message):
    """Before anything is measured."""
    assert message in fails(monkeypatch, capsys, "--model", text_model_folder, *arguments)


def test_a_profile_of_another_model_is_refused_before_measuring(loaded, spec, tmp_path):
    """By the codec itself, as soon as the model is known."""
    file = tmp_path / "p.kvlc"
    profile_file(file)
    with pytest.raises(ConfigError, match="was measured on model"):
        check_codec(build_codec(f"kvlc:profile={file}"), spec)


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch, capsys):
    """A file where the folder should be; no model is loaded for that."""
    (tmp_path / "taken").write_text("")
    message = fails(
        monkeypatch, capsys, "--model", "nowhere", "--methods", "int4", "--out", tmp_path / "taken"
    )
    assert "cannot write" in message


def test_blocks_of_the_reference_are_those_of_the_model(document, spec):
    """Cast, cut into records, at their positions."""
    whole = KVBlock.join(document.blocks)
    assert (whole.start, whole.num_tokens, whole.spec) == (0, 80, spec)
    assert {x.keys.dtype for x in whole.layers} == {torch.bfloat16}
