# SPDX-License-Identifier: Apache-2.0
"""`kvlib eval`: run a grid, report it, compare runs, export prompts."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvlib.errors import ConfigError, KVLibError

if TYPE_CHECKING:
    from kvlib.evals.profiles import Cell, Profile

__all__ = ["app"]

app = typer.Typer(help="Measure what methods keep, cost and change; `eval` alone runs a grid.")
console = Console()

ProfileOption = Annotated[str, typer.Option(help="smoke (seconds) or quick (minutes).")]
ModelOption = Annotated[
    str | None, typer.Option(help="smollm2, recall, or a model folder; else the profile's.")
]
TasksOption = Annotated[
    str | None, typer.Option(help="Tasks separated by ';', instead of the profile's.")
]
LengthsOption = Annotated[
    str | None, typer.Option(help="Tokens of a context, separated by ','; 1024 if tasks are given.")
]
ContextsOption = Annotated[
    int | None, typer.Option(min=1, help="Contexts in each cell, instead of the profile's.")
]
ModesOption = Annotated[str | None, typer.Option(help="unaware, aware, or both by ','.")]
SeedOption = Annotated[int, typer.Option(help="Of the samples.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]


def _grid(
    profile: str,
    *,
    tasks: str | None,
    lengths: str | None,
    methods: str | None,
    contexts: int | None,
    modes: str | None,
) -> "Profile":
    """The profile with what was said otherwise."""
    from kvlib.evals.profiles import get_profile, make_cells

    chosen = get_profile(profile)
    try:
        sizes = [int(part) for part in lengths.split(",")] if lengths is not None else None
    except ValueError as exc:
        raise ConfigError(f"lengths are numbers separated by ',', got {lengths!r}") from exc
    ways = None if modes is None else [part.strip() for part in modes.split(",")]
    if tasks is not None:
        every = methods or ";".join(chosen.cells[0].methods)
        cells = make_cells(
            tasks, sizes or [1024], every, contexts or 10, modes=ways or ["unaware"], probes=1
        )
        return replace(chosen, cells=cells)
    found: dict[tuple[str, int, str], Cell] = {}
    for cell in chosen.cells:
        for new in make_cells(
            cell.task,
            sizes or [cell.length],
            methods or ";".join(cell.methods),
            contexts or cell.contexts,
            modes=ways or [cell.mode],
            probes=cell.probes,
        ):
            found.setdefault((new.task, new.length, new.mode), new)
    return replace(chosen, cells=tuple(found.values()))


class _Progress:
    """A bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
        self._start, self._new, self._done, self._total = 0.0, 0, 0, 0

    def plan(self, done: int, total: int) -> None:
        """What is there, and how many there will be."""
        self._start, self._done, self._total = time.monotonic(), done, total
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("starting", total=total, completed=done)
        else:
            self._print(f"{done} of {total} results are there")

    def record(self, record: dict[str, Any]) -> None:
        """A new result."""
        self._done, self._new = self._done + 1, self._new + 1
        sample = record["sample"]
        what = f"{sample['task'].partition(':')[0]} {sample['length']}, context {sample['index']}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, description=what)
        elif self._done == self._total or self._new % max(1, self._total // 20) == 0:
            left = (time.monotonic() - self._start) / self._new * (self._total - self._done)
            self._print(f"{self._done} of {self._total}: {what}; about {left:.0f} s left")

    @staticmethod
    def _print(text: str) -> None:
        Console(stderr=True).print(text, highlight=False)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


class _Tables:
    """A table for each cell of the grid, under its title."""

    def __init__(self, *columns: str) -> None:
        self._columns = columns
        self._tables: dict[object, tuple[str, Table]] = {}

    def add(self, cell: object, title: str, *values: str) -> None:
        """A row."""
        if cell not in self._tables:
            table = Table()
            for number, name in enumerate(self._columns):
                table.add_column(name, justify="right" if number else "left")
            self._tables[cell] = (title, table)
        self._tables[cell][1].add_row(*values)

    def print(self) -> None:
        """All of them, in the order of their first rows."""
        for title, table in self._tables.values():
            console.print(title, style="bold", highlight=False)
            console.print(table)


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    profile: ProfileOption = "quick",
    model: ModelOption = None,
    tasks: TasksOption = None,
    lengths: LengthsOption = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods separated by ';', instead of the profile's.")
    ] = None,
    contexts: ContextsOption = None,
    modes: ModesOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    device: Annotated[str, typer.Option(help="Of torch.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each.")
    ] = None,
    stepwise: Annotated[
        bool, typer.Option(help="Feed answers token by token: exact for policies that act then.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; what it holds is not run again.")
    ] = Path("eval-report"),
) -> None:
    """Run what is missing of a grid of tasks, lengths and methods, and write its report."""
    if context.invoked_subcommand is not None:
        for name in context.params:
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                raise ConfigError(
                    f"--{name.replace('_', '-')} stands before {context.invoked_subcommand!r} and "
                    "would be ignored: options of a subcommand come after it"
                )
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads
    from kvlib.evals.runner import RunOptions, run
    from kvlib.evals.samples import FILE

    chosen = _grid(
        profile, tasks=tasks, lengths=lengths, methods=methods, contexts=contexts, modes=modes
    )
    options = RunOptions(
        model=model or chosen.model,
        dtype=dtype or chosen.dtype,
        device=device,
        seed=seed,
        workers=workers or chosen.workers,
        stepwise=stepwise,
    )
    progress = _Progress()
    interrupted = False
    try:
        run(chosen.cells, options, out, on_plan=progress.plan, on_record=progress.record)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        progress.stop()
    if not interrupted or (out / FILE).exists():
        _report(out)
    if interrupted:
        console.print("Interrupted. The same command goes on where this one stopped.")
        raise typer.Exit(130)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Of a run.")]) -> None:
    """Write results.json and report.html again from a run's samples."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder of a run")
    _report(folder)


def _report(folder: Path) -> None:
    from kvlib.evals.report import cell_name, percent, short_method, with_interval, write_report
    from kvlib.evals.samples import read_samples

    header, records = read_samples(folder)
    rows = write_report(header, records, folder)
    tables = _Tables("method", "held", "score", "minus full", "KL")
    for row in rows:
        cell = (row.task, row.version, row.length, row.mode, row.stepwise)
        tables.add(
            cell,
            f"{cell_name(row)}: {row.questions} questions, {row.contexts} contexts",
            short_method(row.method),
            percent(row.held_share),
            with_interval(row.score, row.metric),
            with_interval(row.delta, row.metric, sign=True),
            f"{row.scores['kl']:.3f}" if "kl" in row.scores else "",
        )
    tables.print()
    console.print(f"{folder / 'report.html'} has the plots, {folder / 'results.json'} all numbers.")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Run folder or samples file.")],
    second: Annotated[Path, typer.Argument(help="The same, or another one.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Two methods separated by ';': that of the first and that of the second run."
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="A score; else each task's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Compare two runs, or two methods, on the questions that both answered."""
    from kvlib.evals.metrics import SCORES
    from kvlib.evals.profiles import canonical_methods
    from kvlib.evals.report import cell_name, short_method, with_interval
    from kvlib.evals.summary import compare as compare_samples

    if metric is not None and metric not in SCORES:
        raise ConfigError(f"metric is one of {', '.join(SCORES)}, got {metric!r}")
    ours, theirs = _records(first), _records(second)
    if methods is None:
        found = compare_samples(ours, theirs, metric=metric)
    else:
        pair = canonical_methods(methods)
        if len(pair) != 2:
            raise ConfigError(f"--methods takes two different methods, got {methods!r}")
        mine = [record for record in ours if record["method"] == pair[0]]
        found = compare_samples(mine, theirs, pairs=lambda _: pair[1], metric=metric)
    if not found:
        raise ConfigError(
            f"{first} and {second} have no question and method in common: the same tasks, lengths, "
            "modes, seed and methods (or --methods) are needed"
        )
    if as_json:
        print(json.dumps([asdict(one) for one in found]))  # noqa: T201
        return
    tables = _Tables("method", "first", "second", "second - first", "p", "second is")
    for one in found:
        names = [short_method(one.first), short_method(one.second)]
        low = one.metric in ("kl", "nll")
        scores = [f"{x:.3f}" if low else f"{x:.1%}" for x in (one.first_score, one.second_score)]
        tables.add(
            (one.task, one.length, one.mode),
            f"{cell_name(one)}: {one.questions} questions, {one.contexts} contexts",
            names[0] if names[0] == names[1] else " -> ".join(names),
            *scores,
            with_interval(one.delta, one.metric, sign=True),
            "" if one.p is None else f"{one.p:.2g}",
            "" if one.verdict == "no difference shown" else one.verdict,
        )
    tables.print()
    console.print(
        "Differences are per question, intervals over contexts (95 %, bootstrap); p is McNemar's, "
        "corrected for the number of comparisons (Holm). Better and worse are said where the "
        "interval leaves out 0, with 5 contexts or more."
    )


def _records(path: Path) -> Sequence[dict[str, Any]]:
    """Records with their methods in full, however they were written."""
    from kvlib.evals.samples import read_samples
    from kvlib.evals.scoring import EvalMethod

    _, records = read_samples(path)
    for record in records:
        try:
            record["method"] = EvalMethod.parse(record["method"]).text
        except KVLibError:
            continue  # another tool's
    return records


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="File to write: JSON lines.")],
    profile: ProfileOption = "quick",
    model: ModelOption = None,
    tasks: TasksOption = None,
    lengths: LengthsOption = None,
    contexts: ContextsOption = None,
    modes: ModesOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
) -> None:
    """Write a grid's prompts as token ids, for another tool to answer."""
    from kvlib.evals.export import export_prompts

    chosen = _grid(
        profile, tasks=tasks, lengths=lengths, methods=None, contexts=contexts, modes=modes
    )
    num = export_prompts(chosen.cells, model or chosen.model, dtype or chosen.dtype, seed, out)
    console.print(f"{num} contexts in {out}")
