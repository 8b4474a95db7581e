# SPDX-License-Identifier: Apache-2.0
"""The demo's reports: report.json (every number), report.html (self-contained), report.svg."""

import html
import json
import statistics
from pathlib import Path
from typing import Any

from kvlib.pages import LINES, STYLE, TEXT, figure, inline, svg

__all__ = ["write_report"]

_BAR = "#3b82c4"
_BASE = "#b0893a"


def write_report(data: dict[str, Any], out: Path) -> None:
    """Write report.json, report.html and report.svg into `out`."""
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    overview = _overview(data)
    (out / "report.svg").write_text(overview, encoding="utf-8")
    evicted = _policy_plot(data["policies"])
    (out / "policies.svg").write_text(evicted, encoding="utf-8")
    kl = inline(_kl_plot(data)) if _lossy(data) else ""
    page = _page(data, inline(overview), kl, inline(evicted))
    (out / "report.html").write_text(page, encoding="utf-8")


def _lossy(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in data["codecs"] if row["fidelity"] != "exact"]


def _overview(data: dict[str, Any]) -> str:
    """Bars: time to first token on a logarithmic axis, and bytes on disk."""
    drawing, (left, right) = figure(9.2, 3.1, 2)
    rows = data["codecs"]
    names = ["recomputed", *(row["codec"] for row in rows)]
    times = [rows[0]["recomputed_median_s"], *(row["first_token_median_s"] for row in rows)]
    bars = left.barh(names, times, color=[_BASE] + [_BAR] * len(rows))
    left.bar_label(bars, [f" {t:.2f} s" for t in times], color=TEXT)
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlim(min(times) / 2, max(times) * 4)
    left.set_title(f"First token after {data['prefill']['tokens']:,} tokens", color=TEXT)
    left.set_xlabel("seconds, logarithmic", color=TEXT)
    names = [f"KV cache ({data['model']['dtype']})", *(row["codec"] for row in rows)]
    sizes = [rows[0]["raw_bytes"] / 2**20, *(row["stored_bytes"] / 2**20 for row in rows)]
    bars = right.barh(names, sizes, color=[_BASE] + [_BAR] * len(rows))
    right.bar_label(bars, [f" {s:.0f} MiB" for s in sizes], color=TEXT)
    right.set_xlim(0, max(sizes) * 1.25)
    right.set_title("Bytes on disk", color=TEXT)
    right.set_xlabel("MiB", color=TEXT)
    for axis in (left, right):
        axis.invert_yaxis()
    return svg(drawing, "white")


def _kl_plot(data: dict[str, Any]) -> str:
    """KL divergence of each continuation token from the full cache, lossy codecs only."""
    drawing, (axis,) = figure(9.2, 2.8)
    for row, color in zip(_lossy(data), LINES * len(data["codecs"]), strict=False):
        axis.plot(row["kl_per_token"], color=color, linewidth=1.3, label=row["codec"])
        axis.axhline(row["kl_mean"], color=color, linewidth=0.8, linestyle="--")
    axis.set_yscale("log")
    axis.set_xlabel("token of the continuation", color=TEXT)
    axis.set_ylabel("KL, nats", color=TEXT)
    axis.legend(frameon=False, labelcolor=TEXT)
    return svg(drawing, "none")


def _policy_plot(data: dict[str, Any]) -> str:
    """Bytes held against divergence: filled alone, hollow piped into a codec."""
    drawing, (axis,) = figure(9.2, 3.4)
    families = dict.fromkeys(row["method"].partition(":")[0] for row in data["rows"])
    for family, color in zip(families, LINES * len(families), strict=False):
        rows = [row for row in data["rows"] if row["method"].partition(":")[0] == family]
        for piped, marker in ((False, color), (True, "none")):
            x = [row["piped"]["bytes"] if piped else row["held_bytes"] for row in rows]
            y = [row["piped"]["kl_mean"] if piped else row["kl_mean"] for row in rows]
            axis.plot(
                [size / 2**20 for size in x],
                y,
                marker="o",
                color=color,
                markerfacecolor=marker,
                linewidth=0.8,
                linestyle=":" if piped else "-",
                label=f"{family} | {data['codec']}" if piped else family,
                clip_on=False,
            )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"MiB held of {data['context_tokens']:,} tokens", color=TEXT)
    axis.set_ylabel("mean KL, nats", color=TEXT)
    axis.legend(frameon=False, labelcolor=TEXT, bbox_to_anchor=(1.01, 1), loc="upper left")
    return svg(drawing, "white")


def _policy_part(data: dict[str, Any], plot: str) -> str:
    lines = []
    for row in data["rows"]:
        piped = row["piped"]
        cells = (
            html.escape(row["method"]),
            f"{row['held_bytes'] / 2**20:.1f}",
            f"{row['held_share']:.1%}",
            f"{row['kl_mean']:.1e}",
            f"{row['top1_agreement']:.1%}",
            f"{row['prefill_s']:.2f} s",
            f"{row['decode_median_s'] * 1e3:.0f} ms",
            f"{piped['bytes'] / 2**20:.1f}",
            f"{piped['kl_mean']:.1e}",
            f"{piped['top1_agreement']:.1%}",
        )
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    codec = html.escape(data["codec"])
    return f"""<h2>What eviction policies hold and change</h2>
<p>Each policy read {data["context_tokens"]:,} tokens, and was then given the
{data["continuation_tokens"]} tokens that follow in the text, in one forward pass; KL and top-1
compare its next-token distributions with those of the full cache. It was not asked a question, so
this shows what it costs to forget text, not whether an answer is found. Bytes are those of the
tensors held right after the prefill. Piped: the evicted cache was encoded with {codec} and decoded
again. Times are of one prefill and the median of single-token steps.</p>
<div class=wide>{plot}</div>
<div class=wide><table><thead><tr><th>method<th>MiB<th>held<th>KL<th>top-1<th>prefill<th>step
<th>| {codec}, MiB<th>KL<th>top-1</thead><tbody>{"".join(lines)}</tbody></table></div>
"""


def _page(data: dict[str, Any], overview: str, kl: str, evicted: str) -> str:
    rows = data["codecs"]
    first = rows[0]
    best = min(rows, key=lambda row: row["stored_bytes"])
    tokens = f"{data['prefill']['tokens']:,}"
    same = "the same answer, token for token" if first["answer_equal"] else "another answer"
    headline = (
        f"{tokens} tokens restored in {first['first_token_median_s']:.2f} s instead of "
        f"{first['recomputed_median_s']:.1f} s: {first['speedup']:.0f}x sooner, {same}"
    )
    lines = "".join(_table_row(row) for row in rows)
    environment = data["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in environment["packages"].items() if v)
    spread = ", ".join(f"{t:.2f}" for t in first["first_token_s"])
    recomputed = ", ".join(f"{t:.2f}" for t in first["recomputed_first_token_s"])
    kl_part = (
        "<h2>What lossy codecs change</h2><p>KL divergence of each next-token distribution from "
        f"that of the full cache, over {data['continuation_tokens']} tokens of the text that "
        f"follow the prefix. Dashed: the mean.</p><div class=wide>{kl}</div>"
        if kl
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>kvlib demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{html.escape(headline)}</h1>
<p class=soft>{html.escape(data["model"]["name"])}, {data["arguments"]["threads"]} threads on
{html.escape(environment["cpu"])}. Smallest here: {html.escape(best["codec"])}, {best["ratio"]:.1f}x
fewer bytes than the cache in {html.escape(data["model"]["dtype"])}.</p>
<div class=wide>{overview}</div>
<h2>By codec</h2><div class=wide><table><thead><tr><th>codec<th>MiB on disk<th>ratio
<th>saved at MB/s<th>first token<th>sooner<th>keys and values<th>answer<th>KL<th>top-1</thead>
<tbody>{lines}</tbody></table></div>
<h2>The answer, from the second process</h2>
<blockquote>{html.escape(first["answer_text"].strip())}</blockquote>
{kl_part}
{_policy_part(data["policies"], evicted)}
<h2>How it was measured</h2>
<p>The first process ran the model over {tokens} tokens of Python's help topics
({data["prefill"]["seconds"]:.1f} s) and stored the keys and values with each codec. For each codec
a second process, which had never seen the text, loaded the model, opened the store and generated an
answer to a question of {data["question_tokens"]} tokens; the time to its first token includes
reading, verifying and decoding the blocks and running the question. Recomputed is the same
<code>generate</code> call without kvlib. Imports and loading the model are in neither; the page
cache is warm. Restored with {html.escape(first["codec"])}: {spread} s; recomputed: {recomputed} s;
the table gives medians.</p>
<p>Another salt found {first["other_salt_tokens"]} tokens. A prompt that shares
{first["partial_shared_tokens"]} tokens restored {first["partial_restored_tokens"]}, the whole
blocks among them.</p>
<footer><p>Run again with <code>kvlib demo</code>. Every raw number is in report.json. Python
{environment["python"]}, {html.escape(packages)}; {html.escape(environment["system"])},
{environment["cores"]} cores.</p></footer></body></html>
"""


def _table_row(row: dict[str, Any]) -> str:
    speed = row["raw_bytes"] / row["save_s"] / 1e6
    cells = (
        html.escape(row["codec"]),
        f"{row['stored_bytes'] / 2**20:.1f}",
        f"{row['ratio']:.2f}x",
        f"{speed:.0f}",
        f"{statistics.median(row['first_token_s']):.2f} s",
        f"{row['speedup']:.1f}x",
        "bit-equal" if row["kv_bit_equal"] else "close",
        "identical" if row["answer_equal"] else "differs",
        f"{row['kl_mean']:.1e}",
        f"{row['top1_agreement']:.1%}",
    )
    return "<tr>" + "".join(f"<td>{cell}" for cell in cells)
