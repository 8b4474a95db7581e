# SPDX-License-Identifier: Apache-2.0
"""The `kvlib` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvlib.calibration.cli import app as calibrate_app
from kvlib.codec_bench.cli import codec as bench_codec
from kvlib.codec_cli import app as codec_app
from kvlib.connectors.cli import connectors, doctor, why_miss
from kvlib.engine_bench.cli import engines as bench_engines
from kvlib.errors import KVLibError
from kvlib.evals.cli import app as eval_app
from kvlib.store_bench.disk_cli import store as bench_store
from kvlib.store_bench.replay_cli import replay as bench_replay
from kvlib.store_cli import app as store_app

__all__ = ["app", "main"]

app = typer.Typer(
    help="KV-cache management and compression for LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(eval_app, name="eval")
app.add_typer(calibrate_app, name="calibrate")
bench_app = typer.Typer(
    help="Measure parts of kvlib; the last line printed is JSON.", no_args_is_help=True
)
bench_app.command("codec")(bench_codec)
bench_app.command("store")(bench_store)
bench_app.command("replay")(bench_replay)
bench_app.command("engines")(bench_engines)
app.add_typer(bench_app, name="bench")
app.add_typer(codec_app, name="codec")
app.add_typer(store_app, name="store")
app.add_typer(connectors, name="connectors")
app.command("doctor")(doctor)
app.command("why-miss")(why_miss)
console = Console()


@app.callback()
def _root() -> None:
    """Keep `kvlib <command>` a group even while it has few commands."""


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for report.html, report.json and report.svg.")
    ] = Path("demo-report"),
    tokens: Annotated[int, typer.Option(min=256, help="Length of the shared prefix.")] = 4096,
    codecs: Annotated[
        str, typer.Option(help="Codecs to compare, separated by ';'.")
    ] = "exact;int8;int4",
    policies: Annotated[
        str, typer.Option(help="Eviction policies to compare, separated by ';'.")
    ] = "streaming;snapkv;h2o",
    budgets: Annotated[
        str, typer.Option(help="Fractions of the context they keep, separated by ';'.")
    ] = "0.5;0.25",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for the answer.")] = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch; all cores by default.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep the stored blocks beside the report.")] = False,
) -> None:
    """Store a long prompt with each codec, answer from it in a second process, compare policies."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads; see kvlib.demo.run
    from kvlib.demo import run_demo

    def items(text: str) -> tuple[str, ...]:
        return tuple(item.strip() for item in text.split(";") if item.strip())

    run_demo(
        out=out,
        num_tokens=tokens,
        codecs=items(codecs),
        policies=items(policies),
        budgets=items(budgets),
        new_tokens=new_tokens,
        threads=threads,
        keep=keep,
        console=console,
    )


@app.command("list")
def list_plugins() -> None:
    """Print every registered policy and its parts, codec, tier, replacement, selector and task."""
    from kvlib.codecs import CODECS, build_codec
    from kvlib.evals.tasks import TASKS, build_task
    from kvlib.eviction import ALLOCATORS, POLICIES, PROTECTORS
    from kvlib.registry import describe
    from kvlib.store import TIERS
    from kvlib.store.replacement import REPLACEMENTS
    from kvlib.store.selecting import SELECTORS

    table = Table("family", "name", "status", "lossless", "with its defaults")
    table.columns[-1].overflow = "fold"
    for name in POLICIES.names():
        policy = POLICIES.build(name)
        table.add_row("policy", name, policy.status, "", describe(policy))
    for family, registry in (("allocator", ALLOCATORS), ("protector", PROTECTORS)):
        for name in registry.names():
            part = registry.build(name)
            table.add_row(family, name, part.status, "", describe(part))
    for name in CODECS.names():
        codec = build_codec(name)
        table.add_row(
            "codec", name, codec.status, "yes" if codec.lossless else "no", describe(codec)
        )
    for name in TIERS.names():
        tier = TIERS.get(name)
        table.add_row(
            "tier", name, "stable", "", "survives a restart" if tier.persistent else "in memory"
        )
    for name in REPLACEMENTS.names():
        replacement = REPLACEMENTS.build(name)
        table.add_row("replacement", name, replacement.status, "", describe(replacement))
    for name in SELECTORS.names():
        table.add_row("selector", name, "experimental", "", describe(SELECTORS.build(name)))
    for name in TASKS.names():
        task = build_task(name)
        table.add_row("task", name, task.status, "", describe(task))
    console.print(table)


def main() -> None:
    """Run the command line; an error of ours is one line and exit status 1."""
    try:
        app()
    except KVLibError as exc:
        text = f"[bold red]{type(exc).__name__}[/]: {escape(str(exc))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        sys.exit(1)
