# SPDX-License-Identifier: Apache-2.0
"""results.json, report.html and report.svg of a run."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvlib.codec_bench.grid import SINKS
from kvlib.pages import LINES, STYLE, TEXT, figure, inline, svg

__all__ = ["COLUMNS", "cells", "write_report"]

COLUMNS = ("method", "bits/value", "KL, nats", "±", "top-1", "ppl", "encode", "decode")
_MARKERS = "osD^v"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A method as text, for `COLUMNS`; speeds in MB of raw KV a CPU second."""
    bits, kl = row["bits_per_value"], row["kl"]
    return (
        row["label"],
        f"{bits['mean']:.3f}",
        _small(kl["mean"]),
        "" if kl["se"] is None else _small(kl["se"]),
        f"{row['top1']['mean']:.1%}",
        f"{row['perplexity']:.3f}",
        *(_speed(row.get(name)) for name in ("encode", "decode")),
    )


def _small(x: float) -> str:
    return f"{x:.5f}" if abs(x) >= 5e-4 else f"{x:.1e}" if x else "0"


def _speed(times: Mapping[str, Any] | None) -> str:
    return "" if times is None else f"{times['mb_per_cpu_s']['median']:,.0f}"


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """Write results.json, report.html and report.svg into a folder that is there."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    drawing = _plot(results["methods"])
    (out / "report.svg").write_text(drawing, encoding="utf-8")
    (out / "report.html").write_text(_page(results, inline(drawing)), encoding="utf-8")


def _plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bits a value against KL, a line for each family; what loses nothing has no place in it."""
    drawing, (axis,) = figure(9.6, 5.6)
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kl"]["mean"] > 0:
            families.setdefault(row["family"], []).append(row)
    bases = list(dict.fromkeys(name.removesuffix(SINKS) for name in families))
    for name, mine in families.items():
        place = bases.index(name.removesuffix(SINKS))
        color = LINES[place % len(LINES)]
        marker = _MARKERS[place // len(LINES) % len(_MARKERS)]
        fair = name.endswith(SINKS)
        mine = sorted(mine, key=lambda r: r["bits_per_value"]["mean"])
        axis.plot(
            [row["bits_per_value"]["mean"] for row in mine],
            [row["kl"]["mean"] for row in mine],
            color=color,
            marker=marker,
            markersize=5,
            markerfacecolor="none" if fair else color,
            linestyle="--" if fair else "-",
            linewidth=1.1,
            label=name,
        )
        for row in mine:
            if row["kl"]["se"] is not None:
                x, y, error = row["bits_per_value"]["mean"], row["kl"]["mean"], row["kl"]["se"]
                ends = [max(y - error, y / 10), y + error]
                axis.plot([x, x], ends, color=color, linewidth=0.8, alpha=0.5)
    axis.set_yscale("log")
    axis.set_xlabel("bits a value, every stored byte counted", color=TEXT)
    axis.set_ylabel("KL, nats a token (logarithmic)", color=TEXT)
    if families:
        drawing.legend(loc="outside right upper", frameon=False, labelcolor=TEXT, fontsize=9)
    return svg(drawing, "white")


def _table(results: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{name}" for name in (*COLUMNS, "cores"))
    lines = []
    for row in results["methods"]:
        cores = [row[x]["cores"] for x in ("encode", "decode") if x in row]
        texts = (*cells(row), f"{max(cores):.1f}" if cores else "")
        lines.append("<tr>" + "".join(f"<td>{html.escape(text)}" for text in texts))
    return (
        f"<div class=wide><table><thead><tr>{head}</thead><tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


def _ranges(results: Mapping[str, Any]) -> str:
    """Least, median and greatest speeds, of CPU time and of wall time."""
    if "memcpy" not in results:
        return ""
    rows = [("copying the bytes", results["memcpy"])]
    for row in results["methods"]:
        rows += [(f"{row['label']}, {x}", row[x]) for x in ("encode", "decode") if x in row]
    lines = []
    for name, times in rows:
        parts = [
            f"{times[unit]['median']:,.0f} ({times[unit]['min']:,.0f} to {times[unit]['max']:,.0f})"
            for unit in ("mb_per_cpu_s", "mb_per_s")
        ]
        lines.append(f"<tr><td>{html.escape(name)}" + "".join(f"<td>{part}" for part in parts))
    settings = results["settings"]
    return (
        f"<h2>Speed on one core</h2><p class=soft>MB of raw KV a second: medians of "
        f"{settings['repeats']} repeats over {settings['timed_records']} records, with the least "
        "and the greatest; codecs took turns.</p><div class=wide><table><thead><tr><th>what<th>of "
        f"CPU time<th>of wall time</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _page(results: Mapping[str, Any], drawing: str) -> str:
    settings, model = results["settings"], results["model"]
    name = html.escape(Path(model["name"]).name)
    lines = "".join(f"<li>{html.escape(x['text'])}" for x in results["comparisons"])
    compared = f"<h2>At equal quality</h2><ul>{lines}</ul>" if lines else ""
    names = ", ".join(html.escape(x["name"]) for x in results["documents"])
    reference = ", ".join(f"{x['reference_perplexity']:.2f}" for x in results["documents"])
    cast = ", ".join(f"{x['cast_kl']:.1e}" for x in results["documents"])
    machine = results["environment"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvlib bench codec: {name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE} td {{ white-space: nowrap; }}</style></head>
<body><h1>What codecs cost: {name}, KV in {settings["dtype"]}</h1>
<div class=wide>{drawing}</div>
<p class=soft>Bars are standard errors over {len(results["documents"])} documents. Dashed lines with
hollow marks: the first tokens exact. What loses nothing is only in the table.</p>
{_table(results)}
{compared}
{_ranges(results)}
<h2>How to read it</h2>
<p>The model (computing in {model["dtype"]}) read {settings["tokens"]:,} tokens of each of these
texts, which nothing was calibrated on: {names}. Their keys and values, cast to {settings["dtype"]},
are the reference; the cast itself cost {cast} nats. Records of {settings["record"]} tokens were
encoded and decoded, and the next {settings["following"]} tokens were read behind what came back.
Bits count whole containers, headers and checksums included; a profile, which all records of a model
share, is not in them. KL, top-1 agreement and perplexity are over these tokens; the reference's
perplexities are {reference}.</p>
<p>"+sinks" marks a codec whose first tokens, on which attention leans, are exact, as those of kvlc
are: by its own parameter, or put back after decoding with their bytes added. Comparisons
interpolate bits over log KL between the best points of a family, never beyond them: of the means
over documents, and of each document alone where it reaches that KL in both families.</p>
<footer><p>{html.escape(str(machine["cpu"]))}, Python {machine["python"]}, torch
{html.escape(str(machine["packages"]["torch"]))}, kvlib
{html.escape(str(machine["packages"]["kvlib"]))}. Every number is in results.json.</p></footer>
</body></html>
"""
