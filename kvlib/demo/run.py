# SPDX-License-Identifier: Apache-2.0
"""`kvlib demo`, step by step: prefill, store by codec, answer in a second process, report."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvlib.codecs import build_codec
from kvlib.demo.policies import compare_policies, methods_of, short_method
from kvlib.demo.prompt import demo_prompt
from kvlib.demo.report import write_report
from kvlib.demo.worker import kv_digests
from kvlib.errors import KVLibError
from kvlib.eviction import build_policy
from kvlib.keys import BLOCK_TOKENS
from kvlib.machine import environment
from kvlib.prefix import PrefixCache
from kvlib.smollm2 import load_folder, smollm2_folder
from kvlib.store.store import KVStore

__all__ = ["DemoResult", "run_demo"]

SEED = 0
CONTINUATION_TOKENS = 128
PREFILL_CHUNK = 512


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found.

    Attributes:
        data: everything, as in report.json.
        folder: where the reports are.
    """

    data: dict[str, Any]
    folder: Path


def run_demo(
    *,
    out: Path,
    num_tokens: int = 4096,
    codecs: Sequence[str] = ("exact", "int8", "int4"),
    policies: Sequence[str] = ("streaming", "snapkv", "h2o"),
    budgets: Sequence[str] = ("0.5", "0.25"),
    policy_codec: str = "int8",
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    keep: bool = False,
    console: Console | None = None,
    model_folder: Path | None = None,
) -> DemoResult:
    """Run the demo and write report.html, report.json and report.svg into `out`.

    Args:
        out: folder of the reports, made if missing.
        num_tokens: tokens of the shared prefix, rounded down to whole blocks.
        codecs: method strings to compare; the first is also timed against recomputation.
        policies: eviction policies to compare at every budget.
        budgets: fractions of the context that they keep.
        policy_codec: codec that evicted caches are piped into.
        new_tokens: tokens of the answer.
        repeats: restored answers that are timed.
        threads: threads of torch in both processes; all cores by default.
        keep: leave the stored blocks in `out`/store.
        console: where to draw; the terminal by default.
        model_folder: another transformers model than SmolLM2.

    Raises:
        KVLibError: a second process failed; the message ends with what it said.
    """
    console = console or Console()
    started = time.perf_counter()
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    num_tokens = num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    methods = methods_of(policies, budgets)
    for method in methods:
        build_policy(method)
    for codec in (*codecs, policy_codec):
        build_codec(codec)  # a typo is an error now, not after the prefill
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="kvlib-demo-"))
    try:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
            data = _Steps(work, progress, num_tokens, threads, model_folder).run(
                tuple(codecs), (methods, policy_codec), new_tokens, repeats
            )
        if keep:
            shutil.rmtree(out / "store", ignore_errors=True)
            shutil.copytree(work / "store", out / "store")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    data["seconds_total"] = time.perf_counter() - started
    write_report(data, out)
    _show(data, out, console)
    return DemoResult(data, out)


class _Steps:
    """The steps of one run, with a progress line for each."""

    def __init__(
        self, work: Path, progress: Progress, num_tokens: int, threads: int, folder: Path | None
    ) -> None:
        self._work = work
        self._progress = progress
        self._num_tokens = num_tokens
        self._threads = threads
        self._folder = folder

    def run(
        self,
        codecs: tuple[str, ...],
        policies: tuple[list[str], str],
        new_tokens: int,
        repeats: int,
    ) -> dict[str, Any]:
        """Everything that goes into report.json but the total time."""
        step = self._progress.add_task("Loading SmolLM2-135M-Instruct", total=None, note="")
        folder = self._folder or smollm2_folder()
        model, tokenizer = load_folder(folder)
        text, question = demo_prompt(tokenizer, self._num_tokens + CONTINUATION_TOKENS)
        prefix_ids, continuation = text[: self._num_tokens], text[self._num_tokens :]
        self._done(step, f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")
        request = {
            "model": str(folder),
            "prefix_ids": prefix_ids,
            "question_ids": question,
            "continuation_ids": continuation,
            "reference_logits": str(self._work / "reference.npy"),
            "new_tokens": new_tokens,
            "repeats": repeats,
            "threads": self._threads,
            "seed": SEED,
        }
        rows, prefill_s = self._store_all(model, codecs, prefix_ids, request)
        for index, row in enumerate(rows):
            step = self._progress.add_task(
                f"Second process answers from {row['codec']}", total=None, note=""
            )
            recompute_repeats = 2 if index == 0 else 0
            row |= self._second_process(
                request | {"store": row.pop("path"), "codec": row["codec"]}, recompute_repeats
            )
            self._done(step, f"first token after {statistics.median(row['first_token_s']):.2f} s")
        _relate(rows)
        context = prefix_ids[: max(self._num_tokens * 3 // 8, BLOCK_TOKENS)]
        follow = prefix_ids[len(context) : len(context) + CONTINUATION_TOKENS] or continuation
        evicted = self._evict((model, tokenizer), context, follow, policies)
        spec = rows[0].pop("spec")
        for row in rows[1:]:
            row.pop("spec")
        return {
            "schema": "kvlib-demo/2",
            "arguments": {
                "num_tokens": self._num_tokens,
                "codecs": list(codecs),
                "new_tokens": new_tokens,
                "repeats": repeats,
                "threads": self._threads,
                "seed": SEED,
            },
            "environment": environment(),
            "model": {"name": folder.name, **spec},
            "prefill": {
                "tokens": self._num_tokens,
                "seconds": prefill_s,
                "chunk_tokens": PREFILL_CHUNK,
            },
            "question_tokens": len(question),
            "continuation_tokens": len(continuation),
            "codecs": rows,
            "policies": {
                "context_tokens": len(context),
                "continuation_tokens": len(follow),
                "codec": policies[1],
                "rows": evicted,
            },
        }

    def _evict(
        self,
        loaded: tuple[Any, Any],
        context: list[int],
        follow: list[int],
        policies: tuple[list[str], str],
    ) -> list[dict[str, Any]]:
        """What each policy holds and changes; `loaded` is the model and its tokenizer."""
        steps: dict[str, Any] = {}

        def tick(method: str, note: str) -> None:
            if note:
                self._done(steps[method], note)
            else:
                text = f"Evicting {len(context)} tokens with {method}"
                steps[method] = self._progress.add_task(text, total=None, note="")

        return compare_policies(*loaded, context, follow, policies[0], policies[1], progress=tick)

    def _store_all(
        self, model: Any, codecs: tuple[str, ...], ids: list[int], request: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], float]:
        """Prefill once, save with each codec, and note what the full cache says."""
        step = self._progress.add_task(
            f"Prefilling {len(ids)} tokens", total=len(ids), note="once, in this process"
        )
        marks: list[float] = []

        def tick(done: int, _: int) -> None:
            marks.append(time.perf_counter())
            speed = done / max(marks[-1] - marks[0], 1e-9)
            self._progress.update(
                step, completed=done, note=f"{speed:.0f} tokens/s" if done else ""
            )

        rows = []
        cache = None
        for codec in codecs:
            path = self._work / "store" / codec.replace(":", "-").replace(",", "-")
            with KVStore(path, memory=0, codec=codec, disk="64GiB", tier="file") as store:
                prefix = PrefixCache(model, store)
                if cache is None:
                    report = prefix.prefill(ids, chunk_tokens=PREFILL_CHUNK, progress=tick)
                    cache, put, start = report.cache, report.put, marks[-1]
                    write = self._progress.add_task(f"Storing with {codec}", total=1, note="")
                else:
                    write = self._progress.add_task(f"Storing with {codec}", total=1, note="")
                    start = time.perf_counter()
                    put = prefix.save(ids, cache)
                seconds = time.perf_counter() - start
            stored = sum(file.stat().st_size for file in path.rglob("*.kvlc"))
            self._done(write, f"{stored / 2**20:.1f} MiB in {seconds:.2f} s")
            rows.append(
                {
                    "codec": codec,
                    "path": str(path),
                    "raw_bytes": put.raw_bytes,
                    "stored_bytes": stored,
                    "ratio": put.raw_bytes / stored,
                    "save_s": seconds,
                    "spec": {
                        "bytes_per_token": prefix.spec.bytes_per_token(),
                        "dtype": prefix.spec.dtype,
                        "layers": prefix.spec.num_layers,
                        "fingerprint": prefix.spec.fingerprint().hex(),
                    },
                }
            )
        request["kv_digests"] = kv_digests(cache, len(ids))
        with torch.no_grad():
            continuation = torch.tensor([request["continuation_ids"]])
            logits = model(input_ids=continuation, past_key_values=cache, use_cache=True).logits[0]
        np.save(request["reference_logits"], logits.to(torch.float32).numpy())
        return rows, marks[-1] - marks[0]

    def _second_process(self, request: dict[str, Any], recompute_repeats: int) -> dict[str, Any]:
        files = [self._work / "request.json", self._work / "result.json"]
        request["recompute_repeats"] = recompute_repeats
        files[0].write_text(json.dumps(request), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "kvlib.demo.worker", *map(str, files)],
            capture_output=True,
            text=True,
            check=False,
            # Waiting threads that spin would slow a machine that has other work many times over.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        )
        if done.returncode:
            raise KVLibError(
                f"the second process failed with status {done.returncode}:\n{done.stderr[-2000:]}"
            )
        result: dict[str, Any] = json.loads(files[1].read_text(encoding="utf-8"))
        return result

    def _done(self, step: Any, note: str) -> None:
        self._progress.update(step, total=1, completed=1, note=note)


def _relate(rows: list[dict[str, Any]]) -> None:
    """Compare each codec with recomputation, which the first row's process measured."""
    recomputed = statistics.median(rows[0]["recomputed_first_token_s"])
    expected = rows[0].pop("recomputed_answer_ids")
    for row in rows:
        row["recomputed_median_s"] = recomputed
        row["first_token_median_s"] = statistics.median(row["first_token_s"])
        row["speedup"] = recomputed / row["first_token_median_s"]
        row["answer_equal"] = row["answer_ids"] == expected
    rows[0]["recomputed_answer_ids"] = expected


def _show(data: dict[str, Any], out: Path, console: Console) -> None:
    rows = data["codecs"]
    table = Table(
        title=f"{data['prefill']['tokens']} tokens restored in a second process; recomputing them "
        f"takes {rows[0]['recomputed_median_s']:.1f} s"
    )
    for name in ("codec", "MiB", "ratio", "first token", "sooner", "answer", "KL", "top-1"):
        justify: Any = "left" if name in ("codec", "answer") else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(
            row["codec"],
            f"{row['stored_bytes'] / 2**20:.1f}",
            f"{row['ratio']:.2f}x",
            f"{row['first_token_median_s']:.2f} s",
            f"{row['speedup']:.1f}x",
            "same" if row["answer_equal"] else "differs",
            f"{row['kl_mean']:.0e}" if row["kl_mean"] else "0",
            f"{row['top1_agreement']:.1%}",
        )
    console.print(table)
    _show_policies(data["policies"], console)
    first = rows[0]
    console.print(
        f"[bold]Answer from {first['codec']}:[/] {first['answer_text'].strip()}", highlight=False
    )
    console.print(
        f"Another salt found {first['other_salt_tokens']} tokens; a prompt that shares "
        f"{first['partial_shared_tokens']} tokens restored {first['partial_restored_tokens']}.",
        highlight=False,
    )
    console.print(
        f"{out / 'report.html'} has the plots, {out / 'report.json'} every number "
        f"({data['seconds_total']:.0f} s in all).",
        highlight=False,
    )


def _show_policies(data: dict[str, Any], console: Console) -> None:
    codec = data["codec"]
    table = Table(
        title=f"{data['context_tokens']} tokens under each eviction policy, alone and as {codec}",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    names = ("method", "MiB", "KL", "top-1", "prefill", "step", f"{codec} MiB", "KL", "top-1")
    for name in names:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in data["rows"]:
        piped = row["piped"]
        table.add_row(
            short_method(row["method"]),
            f"{row['held_bytes'] / 2**20:.1f}",
            f"{abs(row['kl_mean']):.3f}",
            f"{row['top1_agreement']:.0%}",
            f"{row['prefill_s']:.1f} s",
            f"{row['decode_median_s'] * 1e3:.0f} ms",
            f"{piped['bytes'] / 2**20:.1f}",
            f"{abs(piped['kl_mean']):.3f}",
            f"{piped['top1_agreement']:.0%}",
        )
    console.print(table)
