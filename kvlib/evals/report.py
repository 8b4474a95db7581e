# SPDX-License-Identifier: Apache-2.0
"""results.json and report.html of a run: what was kept against what it cost, with intervals."""

import html
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from kvlib.errors import KVLibError
from kvlib.evals.scoring import EvalMethod
from kvlib.evals.statistics import LEVEL, RESAMPLES, Interval
from kvlib.evals.summary import FEW_CONTEXTS, Row, summarize
from kvlib.evals.tasks import build_task
from kvlib.pages import LINES, STYLE, TEXT, figure, inline, svg
from kvlib.registry import describe, parse_method

__all__ = ["cell_name", "percent", "short_method", "with_interval", "write_report"]

LOWER_IS_BETTER = ("kl", "nll")


def write_report(header: dict[str, Any], records: Sequence[dict[str, Any]], out: Path) -> list[Row]:
    """Write results.json, report.html and report.svg into `out`; returns the rows."""
    rows = summarize(records)
    results = {
        "schema": 1,
        "model": header["model"],
        "kvlib": header.get("kvlib"),
        "statistics": {"level": LEVEL, "resamples": RESAMPLES, "clusters": "contexts"},
        "rows": [asdict(row) for row in rows],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    drawing = _pareto(rows) if rows else ""
    (out / "report.svg").write_text(drawing, encoding="utf-8")
    page = _page(header, rows, inline(drawing))
    (out / "report.html").write_text(page, encoding="utf-8")
    return rows


def short_method(method: str) -> str:
    """A method without what has its default value; a budget always stays."""
    try:
        parsed = EvalMethod.parse(method)
    except KVLibError:  # of a tool that is not installed here
        return method
    calls = parse_method(method)
    parts = getattr(parsed.policy, "parts", (parsed.policy,))
    if len(parts) != len(calls.policies):  # an allocator that began the method, or nothing
        calls = replace(calls, policies=parse_method(describe(parsed.policy)).policies)
    shorts = [_short(part, call.params) for part, call in zip(parts, calls.policies, strict=True)]
    texts = ["+".join(shorts)]
    if calls.codec is not None:
        texts.append(_short(parsed.codec, calls.codec.params))
    return " | ".join(texts)


def _short(plugin: Any, params: Sequence[tuple[str, str]]) -> str:
    usual = {f.name: f.default for f in fields(plugin) if f.default is not MISSING}
    kept = [
        f"{name}={value}"
        for name, value in params
        if name == "budget" or getattr(plugin, name) != usual.get(name, MISSING)
    ]
    return f"{plugin.name}:{','.join(kept)}" if kept else str(plugin.name)


def _short_task(task: str) -> str:
    """A task without the parameters that have their default values."""
    try:
        built = build_task(task)
    except KVLibError:
        return task
    return _short(built, parse_method(task).policies[0].params)


def cell_name(row: Any) -> str:
    """The task, its length, and what is not usual about it."""
    parts = [_short_task(row.task), f"{row.length:,} tokens"]
    if row.mode != "unaware":
        parts.append("question-aware")
    if getattr(row, "stepwise", False):
        parts.append("stepwise")
    return ", ".join(parts)


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share as text."""
    return "" if value is None else f"{value:{'+' if sign else ''}.1%}"


def with_interval(interval: Interval | None, metric: str, *, sign: bool = False) -> str:
    """A mean with its interval: per cent, or nats."""
    if interval is None:
        return ""

    def text(value: float) -> str:
        plus = "+" if sign else ""
        if metric in LOWER_IS_BETTER:
            return f"{value:{plus}.3f}"
        return f"{100 * value:{plus}.0f}"

    unit = "" if metric in LOWER_IS_BETTER else " %"
    if interval.low is None or interval.high is None:
        return f"{text(interval.mean)}{unit}"
    return f"{text(interval.mean)}{unit} [{text(interval.low)}, {text(interval.high)}]"


def _cells(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cell = (row.task, row.version, row.length, row.mode, row.stepwise)
        cells.setdefault(cell, []).append(row)
    return cells


def _dominated(row: Row, others: Sequence[Row]) -> bool:
    """Whether another method of the cell holds no more and scores no less, one of them strictly."""
    sign = -1 if row.metric in LOWER_IS_BETTER else 1
    mine = (-row.held_share, sign * row.score.mean)
    theirs = [(-other.held_share, sign * other.score.mean) for other in others if other is not row]
    return any(a >= mine[0] and b >= mine[1] and (a, b) != mine for a, b in theirs)


def _family(method: str) -> str:
    try:
        parsed = parse_method(method)
    except KVLibError:
        return method
    policy = parsed.policies[0].name if parsed.policies else "full"
    return policy if parsed.codec is None else f"{policy} | {parsed.codec.name}"


def _pareto(rows: Sequence[Row]) -> str:
    """A panel for each cell: share of bytes held (logarithmic) against the score."""
    from matplotlib.lines import Line2D

    cells = _cells(rows)
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    drawing, axes = figure(9.6, 2.9 * lines + 0.4, columns, lines)
    families = list(dict.fromkeys(_family(row.method) for row in rows))
    colors = dict(zip(families, LINES * len(families), strict=False))
    for axis, group in zip(axes, cells.values(), strict=False):
        for family in families:
            mine = sorted(
                (row for row in group if _family(row.method) == family), key=lambda r: r.held_share
            )
            if mine:
                _line(axis, mine, group, colors[family])
        _panel(axis, group)
    for axis in axes[len(cells) :]:
        axis.set_visible(False)
    drawing.legend(
        [Line2D([], [], color=colors[name], marker="o") for name in families],
        families,
        loc="outside lower center",
        ncols=min(len(families), 6),
        frameon=False,
        labelcolor=TEXT,
    )
    return svg(drawing, "white")


def _line(axis: Any, rows: Sequence[Row], group: Sequence[Row], color: str) -> None:
    scale = 1 if rows[0].metric in LOWER_IS_BETTER else 100
    for row in rows:
        hollow = _dominated(row, group)
        axis.plot(
            row.held_share,
            scale * row.score.mean,
            marker="o",
            color=color,
            markerfacecolor="none" if hollow else color,
            clip_on=False,
        )
        if row.score.low is not None and row.score.high is not None:
            ends = [scale * row.score.low, scale * row.score.high]
            axis.plot([row.held_share] * 2, ends, color=color, linewidth=1, alpha=0.6)
    x, y = [row.held_share for row in rows], [scale * row.score.mean for row in rows]
    axis.plot(x, y, color=color, linewidth=0.8)


def _panel(axis: Any, group: Sequence[Row]) -> None:
    metric = group[0].metric
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    if metric not in LOWER_IS_BETTER:
        axis.set_ylim(0, 104)
    axis.set_title(cell_name(group[0]), color=TEXT, fontsize=10)
    axis.set_xlabel("bytes held / full cache", color=TEXT)
    names = {"exact": "exact, %", "token_accuracy": "tokens right, %", "kl": "KL, nats"}
    axis.set_ylabel(names.get(metric, metric), color=TEXT)


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        seconds = row.seconds
        cells = (
            html.escape(short_method(row.method)),
            percent(row.held_share),
            with_interval(row.score, row.metric),
            with_interval(row.delta, row.metric, sign=True),
            f"{row.scores['kl']:.3f}" if "kl" in row.scores else "",
            percent(row.scores.get("top1")),
            f"{row.scores['nll']:.3f}",
            percent(row.scores.get("evidence_kept")),
            percent(row.peak_share),
            f"{seconds['prefill_s']:.2f} s" if "prefill_s" in seconds else "",
            f"{seconds['first_token_s']:.2f} s" if "first_token_s" in seconds else "",
            f"{1e3 * seconds['step_s']:.0f} ms" if "step_s" in seconds else "",
        )
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    names = (
        "method",
        "bytes held",
        "score",
        "minus full",
        "KL",
        "top-1",
        "nll",
        "evidence kept",
        "peak bytes",
        "prefill",
        "first token",
        "step",
    )
    head = "".join(f"<th>{name}" for name in names)
    return (
        f"<div class=wide><table><thead><tr>{head}</thead><tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


def _page(header: dict[str, Any], rows: Sequence[Row], drawing: str) -> str:
    model = header["model"]
    parts = []
    for group in _cells(rows).values():
        first = group[0]
        few = (
            f" With {first.contexts} contexts the intervals are too narrow."
            if first.contexts < FEW_CONTEXTS
            else ""
        )
        counts = sorted({(row.contexts, row.questions) for row in group})
        asked = "; ".join(f"{contexts} contexts, {n} questions" for contexts, n in counts)
        parts.append(
            f"<h2>{html.escape(cell_name(first))}</h2><p class=soft>"
            f"<code>{html.escape(first.task)}</code>, {asked}.{few}</p>{_table(group)}"
        )
    name = html.escape(Path(model["name"]).name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvlib eval: {name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE} td {{ white-space: nowrap; }}</style></head>
<body><h1>What is kept, and what it costs: {name} in {html.escape(model["dtype"])}</h1>
<div class=wide>{drawing}</div>
<p class=soft>Bars are {LEVEL:.0%} intervals. A hollow mark is dominated: another method holds no
more and scores no less.</p>
{"".join(parts)}
<h2>How to read it</h2>
<p>All methods get the same contexts and questions. Unless a task says question-aware, a context is
compressed before any question is known. Bytes are those of the tensors held right after the
prompt, the policy's own included (behind a codec: of the encoded record), over those of the full
cache; peak bytes are the most the cache held while the prompt ran. Scores are exact answers, right
tokens for copy, and KL divergence from the full cache for text; the difference from the full cache
is taken per question, and intervals come from {RESAMPLES:,} bootstrap resamples of contexts. KL,
top-1 agreement and negative log-likelihood (nll, nats per token) are over the answers. Evidence
kept is the share of the answer's tokens that are still held, over layers and heads. Times are
medians of the contexts that were timed; the first token counts from the prompt, or from the record
where there is one.</p>
<footer><p>Every sample is in samples.jsonl, every number in results.json. kvlib
{html.escape(str(header.get("kvlib")))}, model fingerprint {html.escape(model["fingerprint"][:16])}.
</p></footer></body></html>
"""
