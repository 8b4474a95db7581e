# SPDX-License-Identifier: Apache-2.0
"""The command `kvlib bench engines`."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvlib.errors import ConfigError

__all__ = ["engines"]

console = Console()
_Python = Annotated[
    Path | None,
    typer.Option(help="Python of its environment; by default what `make test-engines` made."),
]


def engines(
    vllm: _Python = None,
    sglang: _Python = None,
    site: Annotated[
        Path | None, typer.Option(help="Folder first on SGLang's module path; for CPUs.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of the model; SmolLM2 if none.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=200, help="Length of the prompts.")] = 1800,
    repeats: Annotated[int, typer.Option(min=2, help="Of each first token.")] = 10,
    codecs: Annotated[str, typer.Option(help="Codecs to be timed, separated by ';'.")] = "exact",
    what: Annotated[
        str, typer.Option(help="matrix, first (tokens), calls (of vLLM's connector), or all.")
    ] = "all",
    as_json: Annotated[
        Path | None, typer.Option("--json", help="File for all numbers, indented.")
    ] = None,
) -> None:
    """Share one store among engines, time first tokens and calls; the last line printed is JSON.

    Each engine stores prompts, and every engine, in a new process, reads what each of them stored.
    """
    from kvlib.engine_bench.engines import connector_calls, find_engines, first_tokens, matrix
    from kvlib.machine import environment
    from kvlib.smollm2 import smollm2_folder

    if what not in ("matrix", "first", "calls", "all"):
        raise ConfigError(f"--what {what}: expected matrix, first, calls or all")
    found = find_engines(vllm, sglang, site)
    folder = (model or smollm2_folder()).expanduser()
    texts = _prompts(folder, tokens, len(found) + 1)
    errors = Console(stderr=True, highlight=False)
    errors.print(f"engines: {', '.join(engine.name for engine in found)}")
    results: dict[str, Any] = {"machine": environment(), "model": folder.name}
    with tempfile.TemporaryDirectory() as place:
        if what in ("matrix", "all"):
            results["matrix"] = matrix(
                found, folder, Path(place) / "kv", texts[: len(found)], errors.print
            )
            _show_matrix(results["matrix"])
        if what in ("first", "all"):
            results["first_tokens"] = [
                row
                for engine in found
                if engine.name != "transformers"
                for row in first_tokens(
                    engine,
                    folder,
                    Path(place) / engine.name,
                    texts[-1],
                    errors.print,
                    repeats=repeats,
                    codecs=[codec.strip() for codec in codecs.split(";")],
                )
            ]
            _show_first(results["first_tokens"])
        vllms = [engine for engine in found if engine.name == "vllm"]
        if what in ("calls", "all") and vllms:
            results["connector_calls"] = connector_calls(
                vllms[0], folder, Path(place) / "calls", texts[-2:], errors.print
            )
            _show_calls(results["connector_calls"])
    if as_json is not None:
        as_json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(results) + "\n")


def _prompts(folder: Path, tokens: int, count: int) -> list[list[int]]:
    """Runs of real text that share nothing."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    if len(ids) < tokens * count:
        raise ConfigError(f"--tokens {tokens}: the text has {len(ids)} tokens for {count} prompts")
    return [ids[i * tokens : (i + 1) * tokens] for i in range(count)]


def _show_matrix(cells: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(cell["reader"] for cell in cells))
    table = Table("written by", *(f"read by {name}" for name in names))
    for writer in names:
        row = [cell for cell in cells if cell["writer"] == writer]
        table.add_row(
            writer,
            *(
                f"{cell['cached']} of {cell['tokens']}, "
                + ("same answer" if cell["same"] else "[red]another answer[/]")
                for cell in row
            ),
        )
    console.print(table)


def _show_first(rows: list[dict[str, Any]]) -> None:
    names = ("engine", "from", "cached", "computed s", "from store s", "times sooner", "MB")
    table = Table(*names, "of ExampleConnector's")
    for row in rows:
        table.add_row(
            row["engine"],
            row["from"],
            f"{row['cached']} of {row['prompt']}",
            f"{row['computed_seconds']:.2f}",
            f"{row['median']:.3f} ({min(row['seconds']):.3f}-{max(row['seconds']):.3f})",
            f"{row['computed_seconds'] / row['median']:.1f}",
            f"{row['stored_bytes'] / 1e6:.0f}",
            f"{row['of_example']:.2f}" if "of_example" in row else "",
        )
    console.print(table)


def _show_calls(found: dict[str, Any]) -> None:
    table = Table("ms, vLLM's calls of KvlibConnector", "calls", "median", "99 %", "most")
    rows = {f"look-up of {found['prompt']} tokens": found["lookup"]}
    for phase in ("found", "stored"):
        name = f"disk still for {found['stall_seconds']:.0f} s, a prompt to be {phase}"
        rows[name] = found[phase]["all"]
    for name, row in rows.items():
        spread = (f"{row[key]:.3f}" for key in ("median_ms", "p99_ms", "max_ms"))
        table.add_row(name, str(row["calls"]), *spread)
    console.print(table)
