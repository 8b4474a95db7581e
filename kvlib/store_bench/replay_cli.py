# SPDX-License-Identifier: Apache-2.0
"""The command `kvlib bench replay`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvlib.errors import ConfigError

__all__ = ["replay"]

console = Console()
_POLICIES = ["lru", "arc", "s3fifo", "lfuda", "gdsf"]
_BLOCKS = (1_000, 5_000, 10_000, 20_000, 50_000)
_FILE_WIDTH = 140  # of tables that do not go to a terminal


def replay(
    trace: Annotated[Path, typer.Argument(help="JSON lines in Mooncake's format.")],
    capacity: Annotated[
        list[str] | None,
        typer.Option(help="Of the tier, such as 64GiB; again for more. 1,000 to 50,000 blocks."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Method string of a replacement policy; again for more. All of them."),
    ] = None,
    block_bytes: Annotated[
        str, typer.Option(help="Stored bytes of a block; 512 tokens of an 8B model by default.")
    ] = "64MiB",
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 512,
    second_touch: Annotated[
        bool, typer.Option(help="Admit a block when it is offered for the second time.")
    ] = False,
    heads: Annotated[
        int, typer.Option(min=0, help="With it: first blocks of a prompt, admitted at once.")
    ] = 0,
    remember: Annotated[
        int, typer.Option(min=1, help="With it: blocks offered once that are remembered.")
    ] = 1 << 18,
    foresight: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of conversations whose next use every policy is told."
        ),
    ] = 0.0,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="File for all numbers, indented.")
    ] = None,
) -> None:
    """Hit ratios of replacement policies on a trace, against Belady's; last line printed: JSON."""
    from kvlib.calibration import writable_file
    from kvlib.store.replacement import REPLACEMENTS
    from kvlib.store.sizes import parse_bytes
    from kvlib.store_bench.grid import run
    from kvlib.store_bench.trace import read_trace

    size = parse_bytes(block_bytes, "--block-bytes")
    if not size:
        raise ConfigError("--block-bytes is at least 1, got 0")
    if not second_touch and (heads or remember != 1 << 18):
        raise ConfigError("--heads and --remember belong to --second-touch, which is not given")
    capacities = [parse_bytes(text, "--capacity") for text in capacity or ()]
    policies = {text: REPLACEMENTS.build(text) for text in policy or _POLICIES}
    policies.pop("belady", None)  # runs in any case
    if as_json is not None:
        writable_file(as_json)
    requests = read_trace(trace, block_tokens)
    capacities = list(dict.fromkeys(capacities)) or [blocks * size for blocks in _BLOCKS]
    columns = BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    text = TextColumn("{task.description}")
    bar = Progress(*columns, text, console=Console(stderr=True), transient=True)
    total = len(requests) * (len(policies) + 1) * len(capacities)
    task = bar.add_task(f"{len(policies) + 1} policies x {len(capacities)} capacities", total=total)
    try:
        with bar:
            results = run(
                requests,
                policies,
                capacities,
                block_bytes=size,
                block_tokens=block_tokens,
                second_touch={"most": remember, "heads": heads} if second_touch else None,
                foresight=foresight,
                step=lambda done: bar.advance(task, done),
            )
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. Nothing was written.", highlight=False)
        raise typer.Exit(130) from None
    results["trace"]["name"] = trace.name
    _show(results)
    if as_json is not None:
        as_json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(results) + "\n")


def _show(results: dict[str, Any]) -> None:
    from kvlib.store_bench.grid import BELADY, cells

    about, settings = results["trace"], results["settings"]
    wide = console if console.is_terminal else Console(width=_FILE_WIDTH)
    wide.print(
        f"{about['name']}: {about['requests']:,} requests in {about['minutes']:.0f} minutes, "
        f"{about['blocks']:,} blocks of {settings['block_tokens']} tokens, "
        f"{about['distinct_blocks']:,} distinct. With any capacity "
        f"{about['most_block_hit_ratio']:.1%} hit.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for ratio, title in (
        ("block_hit_ratio", "Blocks in leading runs that were held, and % of Belady's"),
        ("token_hit_ratio", "Tokens of prompts in leading runs that were held, and % of Belady's"),
    ):
        capacities, table = cells(results, ratio)
        shown = Table("policy", title=title, title_justify="left")
        for capacity in capacities:
            blocks = capacity // settings["block_bytes"]
            shown.add_column(f"{capacity / 2**30:,.1f} GiB\n{blocks:,} blocks", justify="right")
        best = table[BELADY]
        for name, values in table.items():
            shown.add_row(
                name,
                *(
                    f"{value:.1%} {f'({value / most:.0%})' if most else '':>6}"
                    for value, most in zip(values, best, strict=True)
                ),
            )
        wide.print(shown)
