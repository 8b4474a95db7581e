# SPDX-License-Identifier: Apache-2.0
"""The command `kvlib bench codec`."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvlib.errors import ConfigError

__all__ = ["codec"]

console = Console()
_FILE_WIDTH = 140  # of tables that do not go to a terminal


def codec(
    model: Annotated[str, typer.Option(help="smollm2, recall, or a model folder.")] = "smollm2",
    methods: Annotated[
        str | None, typer.Option(help="Codecs separated by ';', instead of those built in.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="From kvlib calibrate codec: adds its presets of kvlc.")
    ] = None,
    cachegen_profile: Annotated[
        str | None, typer.Option(help="From kvlib calibrate cachegen: adds its levels.")
    ] = None,
    sinks: Annotated[
        int,
        typer.Option(min=0, help="First tokens that are exact in '+sinks' rows; 0: no such rows."),
    ] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens cached of each document.")] = 2048,
    following: Annotated[int, typer.Option(min=1, help="Tokens read behind them.")] = 256,
    record: Annotated[int, typer.Option(min=1, help="Tokens of a container.")] = 256,
    dtype: Annotated[
        str, typer.Option(help="Of the cache: float32, bfloat16 or float16.")
    ] = "bfloat16",
    documents: Annotated[
        str | None, typer.Option(help="Of topics, docstrings and source, separated by ','.")
    ] = None,
    timed: Annotated[
        int, typer.Option(min=0, help="Records that speeds are taken on; 0: no speeds.")
    ] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Of each timing.")] = 5,
    device: Annotated[str, typer.Option(help="Of the model: cpu, cuda, ...")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json, report.html and report.svg.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="File for all numbers, raw times included.")
    ] = None,
) -> None:
    """Rate, quality and speed of codecs on real text; the last line printed is JSON."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy loads: one core
    from kvlib.codec_bench.grid import default_methods, make_grid, profile_methods
    from kvlib.codec_bench.measure import Task, check_codec, spec_of, texts_of
    from kvlib.codec_bench.results import run, short_form, steps

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype is float32, bfloat16 or float16, got {dtype!r:.80}")
    if sinks > min(record, tokens):
        raise ConfigError(f"--sinks {sinks} must fit in a record of {min(record, tokens)} tokens")
    given = default_methods() if methods is None else methods.split(";")
    given = [text.strip() for text in given if text.strip()]
    entries = make_grid(given + profile_methods(profile, cachegen_profile), sinks)
    _prepare_outputs(out, as_json)
    from kvlib.evals.models import load_eval_model

    loaded = load_eval_model(model, "float32", device)
    spec = spec_of(loaded, dtype)
    for entry in entries:
        check_codec(entry.codec, spec)
    task = Task(tokens=tokens, following=following, record=record, dtype=dtype)
    names = None if documents is None else [x.strip() for x in documents.split(",") if x.strip()]
    texts = texts_of(loaded, task, names)
    try:
        with _bar(steps(entries, len(texts), timed, repeats)) as step:
            results = run(
                loaded, spec, entries, texts, task, timed=timed, repeats=repeats, step=step
            )
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. Nothing was written.", highlight=False)
        raise typer.Exit(130) from None
    _show(results)
    if out is not None:
        from kvlib.codec_bench.report import write_report

        write_report(results, out)
        text = f"{out / 'report.html'} has the plot, {out / 'results.json'} all numbers."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if as_json is not None:
        as_json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(short_form(results)) + "\n")


def _prepare_outputs(out: Path | None, as_json: Path | None) -> None:
    """Find out now, not after minutes of measuring, that nothing can be written."""
    from kvlib.calibration import writable_file

    if as_json is not None:
        writable_file(as_json)
    if out is not None:
        writable_file(out / "results.json")
        if find_spec("matplotlib") is None:
            raise ConfigError("--out draws with matplotlib: pip install 'kvlib[demo]'")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on the error stream, which hardly draws: it must not disturb the timing."""
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    text = TextColumn("{task.description}")
    console = Console(stderr=True)
    bar = Progress(*columns, text, console=console, transient=True, refresh_per_second=2)
    task = bar.add_task("loading", total=total)
    with bar:
        yield lambda what: bar.update(task, advance=1, description=what)


def _show(results: dict[str, Any]) -> None:
    from kvlib.codec_bench.report import COLUMNS, cells

    settings = results["settings"]
    table = Table(
        title=f"{results['model']['name']}: {settings['tokens']:,} tokens of "
        f"{len(results['documents'])} documents in {settings['dtype']}, records of "
        f"{settings['record']}"
    )
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    table.columns[0].overflow, table.columns[0].min_width = "fold", 16
    for row in results["methods"]:
        table.add_row(*map(escape, cells(row)))
    wide = console if console.is_terminal else Console(width=_FILE_WIDTH)
    wide.print(table)
    if "memcpy" in results:
        copied = results["memcpy"]["mb_per_cpu_s"]["median"]
        console.print(
            f"Speeds in MB of raw KV a second of CPU time, one core; copying: {copied:,.0f}.",
            highlight=False,
        )
    for found in results["comparisons"]:
        console.print(found["text"], markup=False, highlight=False, soft_wrap=True)
