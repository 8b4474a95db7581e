# SPDX-License-Identifier: Apache-2.0
"""The command `kvlib bench store`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvlib.errors import ConfigError

__all__ = ["store"]

console = Console()
_FILE_WIDTH = 140  # of tables that do not go to a terminal


def store(
    path: Annotated[
        Path, typer.Option(help="Folder on the disk to measure; what is made there is removed.")
    ] = Path(),
    size: Annotated[
        str | None, typer.Option(help="Room to take there; 2GiB by default, 256MiB with --quick.")
    ] = None,
    callers: Annotated[
        int, typer.Option(min=1, max=16, help="Threads that read or write, of the raw device too.")
    ] = 2,
    layers: Annotated[
        int, typer.Option(min=1, max=256, help="Of each record: two sections with checksums each.")
    ] = 32,
    quick: Annotated[bool, typer.Option(help="Fewer repetitions, to see that it works.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="File for all numbers, indented.")
    ] = None,
) -> None:
    """The segment tier's speed as a share of the raw device's; the last line printed is JSON."""
    from kvlib.calibration import writable_file
    from kvlib.store.blockio import supports
    from kvlib.store.sizes import parse_bytes
    from kvlib.store_bench.disk_run import Effort, plan_for, run, steps, work_folder

    if not supports():
        raise ConfigError("this system lacks preadv and pwritev, which the segment tier needs")
    text = ("256MiB" if quick else "2GiB") if size is None else size
    room = parse_bytes(text, "--size")
    effort = Effort(repeats=2, records=1_000, reads=50) if quick else Effort()
    if as_json is not None:
        writable_file(as_json)
    with work_folder(path.expanduser(), room) as folder:
        plan = plan_for(folder, room, effort, callers, layers)
        try:
            with _bar(steps(plan)) as step:
                results = run(plan, room, effort, step)
        except OSError as exc:
            raise ConfigError(f"the disk under {path} failed: {exc}") from exc
        except KeyboardInterrupt:
            Console(stderr=True).print("Interrupted. Nothing was written.", highlight=False)
            raise typer.Exit(130) from None
    _show(results)
    if as_json is not None:
        as_json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(results) + "\n")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on the error stream, which hardly draws: it must not disturb the timing."""
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    text = TextColumn("{task.description}")
    errors = Console(stderr=True)
    bar = Progress(*columns, text, console=errors, transient=True, refresh_per_second=1)
    task = bar.add_task("preparing", total=total)
    with bar:
        yield lambda what: bar.update(task, advance=1, description=what)


def _show(results: dict[str, Any]) -> None:
    wide = console if console.is_terminal else Console(width=_FILE_WIDTH)

    def say(text: str) -> None:
        wide.print(text, markup=False, highlight=False, soft_wrap=True)

    settings = results["settings"]
    say(
        f"{settings['callers']} callers, {settings['repeats']} repetitions in turns with the raw "
        f"device, {settings['batch_bytes'] >> 20:,} MiB a pass; medians, and least to most."
    )
    say(f"Reads are {settings['reads']}. Writes are {settings['writes']}.")
    if not settings["direct"]:
        say("O_DIRECT is refused here: everything goes through the page cache, raw line included.")
    for state, title in (
        ("fresh", "A store filled once"),
        ("churned", "After 3x churn, 90 % full"),
    ):
        wide.print(_blocks_table(results["blocks"], state, title))
    wide.print(_mixed_table(results["mixed"]))
    index = results["index"]
    micros = index["lookup"]["us_per_key"]
    say(
        f"Lookups in batches of {index['lookup']['keys']:,}: "
        + ", ".join(
            f"{micros[name]['median']:.2f} us a key that is {text} (p99 {micros[name]['p99']:.2f})"
            for name, text in (("hit", "there"), ("miss", "not"))
        )
        + "."
    )
    restart = index["restart_s"]
    say(
        f"Restart with {index['records']:,} records, seconds: "
        + ", ".join(
            f"{restart[name]['median']:.4f} {text}"
            for name, text in (
                ("clean", "closed before"),
                ("unclean", "not closed"),
                ("index_lost", "index made anew"),
            )
        )
        + "."
    )
    targets = Table("target", "wanted", "worst seen", "", title="Targets", title_justify="left")
    for row in results["targets"]:
        met = "met" if row["met"] else "missed"
        targets.add_row(row["name"], f"{row['wanted']:.2f}", f"{row['seen']:.2f}", met)
    wide.print(targets)


def _blocks_table(rows: list[dict[str, Any]], state: str, title: str) -> Table:
    mine = [row for row in rows if row["state"] == state]
    table = Table("operation", "by", title=f"{title}: MB/s, share of raw, CPU seconds per GB")
    table.title_justify = "left"
    sizes = sorted({row["block_bytes"] for row in mine})
    for size in sizes:
        text = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
        table.add_column(text, justify="right", no_wrap=True)
    cells = {(row["operation"], row["what"], row["block_bytes"]): row for row in mine}
    for operation, what in dict.fromkeys((row["operation"], row["what"]) for row in mine):
        table.add_row(operation, what, *(_cell(cells[operation, what, size]) for size in sizes))
    return table


def _cell(row: dict[str, Any]) -> str:
    speed = row["mb_per_s"]
    text = f"{speed['median']:,.0f} ({speed['min']:,.0f}-{speed['max']:,.0f})"
    if row["what"] == "raw":
        return f"{text}\n{row['cpu_s_per_gb']:.2f} s"
    return f"{text}\n{row['of_raw']['median']:.2f} of raw, {row['cpu_s_per_gb']:.2f} s"


def _mixed_table(mixed: dict[str, Any]) -> Table:
    table = Table(
        "by",
        title=f"Single reads of {mixed['read_bytes'] >> 20} MiB, ms, alone and beside a writer of "
        f"{mixed['write_bytes'] >> 20} MiB records",
    )
    table.title_justify = "left"
    for name in ("alone p50", "p99", "beside p50", "p99", "written MB/s"):
        table.add_column(name, justify="right")
    for what in ("segment", "raw"):
        alone, beside = mixed[what]["alone_ms"], mixed[what]["beside_writer_ms"]
        times = (alone["p50"], alone["p99"], beside["p50"], beside["p99"])
        written = f"{mixed[what]['written_mb_per_s']:,.0f}"
        table.add_row(what, *(f"{ms:.2f}" for ms in times), written)
    return table
