# SPDX-License-Identifier: Apache-2.0
"""The whole run, and its numbers as one JSON object.

Every document counts alike: a mean is one over documents, and its standard error is their standard
deviation over the root of their number. They are few, and of different kinds.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kvlib.codec_bench.curves import Point, compare, ratio_at
from kvlib.codec_bench.grid import Entry
from kvlib.codec_bench.measure import Document, Quality, Task, measure, prepare
from kvlib.codec_bench.speed import measure_speeds
from kvlib.codecs import Codec
from kvlib.evals.models import EvalModel
from kvlib.machine import environment
from kvlib.spec import KVSpec

if TYPE_CHECKING:
    from kvlib.blocks import KVBlock

__all__ = ["Step", "run", "short_form", "steps"]

Step = Callable[[str], None]
"""Told what was just done."""


def _codecs(entries: Sequence[Entry]) -> dict[str, Codec]:
    return {entry.method: entry.codec for entry in entries}


def steps(entries: Sequence[Entry], documents: int, timed: int, repeats: int) -> int:
    """How often `run` reports a step."""
    codecs = len(_codecs(entries))
    return documents * (codecs + 1) + (codecs * (repeats + 1) if timed else 0)


def run(
    loaded: EvalModel,
    spec: KVSpec,
    entries: Sequence[Entry],
    texts: Mapping[str, Tensor],
    task: Task,
    *,
    timed: int,
    repeats: int,
    step: Step = lambda what: None,
) -> dict[str, Any]:
    """Measure every entry on every document, then the speeds.

    Args:
        loaded: the model.
        spec: of its cache; see `kvlib.codec_bench.measure.spec_of`.
        entries: see `kvlib.codec_bench.grid.make_grid`.
        texts: see `kvlib.codec_bench.measure.texts_of`.
        task: what is run.
        timed: records of the first document that speeds are taken on; 0 for no speeds.
        repeats: of each timing.
        step: see `Step`.
    """
    began = time.perf_counter()
    codecs = _codecs(entries)
    found: list[dict[str, Quality]] = [{} for _ in entries]
    documents: list[dict[str, Any]] = []
    blocks: tuple[KVBlock, ...] = ()
    for name, ids in texts.items():
        document = prepare(loaded, spec, name, ids, task)
        documents.append(_about(document))
        blocks = blocks or document.blocks[:timed]
        step(f"{name}: the reference")
        for method, codec in codecs.items():
            mine = sorted(
                (entry.put_back, i) for i, entry in enumerate(entries) if entry.method == method
            )
            qualities = measure(loaded, document, codec, [put_back for put_back, _ in mine])
            for (_, i), quality in zip(mine, qualities, strict=True):
                found[i][name] = quality
            step(f"{name}: {entries[mine[0][1]].label}")
        del document
    rows = [_row(entry, mine) for entry, mine in zip(entries, found, strict=True)]
    out: dict[str, Any] = {
        "benchmark": "codec",
        "schema": 1,
        "model": loaded.describe(),
        "settings": {
            **asdict(task),
            "timed_records": len(blocks),
            "repeats": repeats if blocks else 0,
            "bytes_per_token": spec.bytes_per_token(),
        },
        "environment": environment(),
        "documents": documents,
        "methods": rows,
    }
    if blocks:
        times, copies, raw_bytes = measure_speeds(
            codecs, blocks, repeats, lambda: step("encoding and decoding in turns")
        )
        for entry, row in zip(entries, rows, strict=True):
            if not entry.put_back:
                encode, decode = times[entry.method]
                row["encode"] = encode.summary(raw_bytes)
                row["decode"] = decode.summary(raw_bytes)
        out["memcpy"] = copies.summary(raw_bytes)
    out["comparisons"] = _comparisons(rows, list(texts))
    out["seconds"] = time.perf_counter() - began
    return out


def _comparisons(
    rows: Sequence[Mapping[str, Any]], documents: Sequence[str]
) -> list[dict[str, Any]]:
    """Families at equal quality: by the means, and by each document alone."""
    means: dict[str, list[Point]] = {}
    alone: list[dict[str, list[Point]]] = [{} for _ in documents]
    for row in rows:
        point = Point(row["bits_per_value"]["mean"], row["kl"]["mean"])
        means.setdefault(row["family"], []).append(point)
        for families, one in zip(alone, row["documents"], strict=True):
            families.setdefault(row["family"], []).append(Point(one["bits"], one["kl"]))
    out = []
    for found in compare(means):
        pair = found.other, found.ours
        each = []
        for families in alone:  # a single point has its own loss in each document
            single = [families[name][0].kl for name in pair if len(families[name]) == 1]
            each.append(ratio_at(families, *pair, single[0] if single else found.kl))
        known = [ratio for ratio in each if ratio is not None]
        text = found.text()
        if len(known) == len(each) > 1:
            text += f"; by document {min(known):.2f} to {max(known):.2f} times"
        by_document = dict(zip(documents, each, strict=True))
        numbers = asdict(found) | {"ratio": found.ratio, "by_document": by_document}
        out.append(numbers | {"text": text})
    return out


def _about(document: Document) -> dict[str, Any]:
    return {
        "name": document.name,
        "values": document.values,
        "reference_nll": document.nll,
        "reference_perplexity": float(np.exp(document.nll)),
        "cast_kl": document.cast_kl,
    }


def _row(entry: Entry, found: Mapping[str, Quality]) -> dict[str, Any]:
    qualities = list(found.values())
    losses = [q.nll for q in qualities]
    return {
        "method": entry.method,
        "label": entry.label,
        "family": entry.family,
        "lossless": entry.codec.lossless,
        "put_back": entry.put_back,
        "bits_per_value": _mean([q.bits for q in qualities]),
        "kl": _mean([q.kl for q in qualities]),
        "top1": _mean([q.top1 for q in qualities]),
        "nll": _mean(losses),
        "perplexity": float(np.exp(np.mean(losses))),
        "documents": [
            asdict(q) | {"name": name, "perplexity": float(np.exp(q.nll))}
            for name, q in found.items()
        ],
    }


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error over documents, which a single one has not."""
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "se": error}


def short_form(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results without what stands for single documents and repeats."""

    def row(full: Mapping[str, Any]) -> dict[str, Any]:
        out = {k: v for k, v in full.items() if k != "documents"}
        return out | {k: times(out[k]) for k in ("encode", "decode") if k in out}

    def times(full: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in full.items() if not k.endswith("_s") or k.startswith("mb_")}

    out = dict(results) | {"methods": [row(x) for x in results["methods"]]}
    return out | ({"memcpy": times(results["memcpy"])} if "memcpy" in results else {})
