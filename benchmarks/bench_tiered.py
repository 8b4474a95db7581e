# SPDX-License-Identifier: Apache-2.0
"""Decoding over a context whose keys and values are on disk: the ways to choose leaves compared.

SmolLM2 goes on through a real text, token by token, over a `TieredCache` of each method; the caches
take turns, so a busy machine is busy for all. Each step says how long it took, how long it waited
for the disk, what it fetched, and whether its most likely next token is that of full attention with
everything in memory. `full` streams what memory does not hold in every step, a layer ahead: what
methods have to beat. Plain reading of the same file is measured in the same minutes.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pydoc_data.topics import topics
from typing import Any

import common
import torch
from transformers import DynamicCache

import kvlib
from kvlib.smollm2 import load_smollm2
from kvlib.store.leaves import RUN_LEAVES, LeafFile, aligned

METHODS = "full;percent:resident=0.1;quest:budget=0.15;leoam:budget=0.15;leoam:codes=16,budget=0.15"


def raw_rate(file: LeafFile, layers: int, stop: float) -> float:
    """Bytes a second of reading the file from front to back in large pieces, two at a time."""
    from concurrent.futures import ThreadPoolExecutor

    size = file.shape.slot_bytes
    done = 0
    begun = time.perf_counter()
    rooms = [list(aligned(RUN_LEAVES * size).reshape(-1, size)) for _ in range(2)]

    def read(job: tuple[int, int, int]) -> int:
        layer, at, count = job
        views = rooms[job[1] // RUN_LEAVES % 2][:count]
        file.fill(views, layer, at)
        return count * size

    jobs = [
        (layer, at, min(RUN_LEAVES, file.count(layer) - at))
        for layer in range(layers)
        for at in range(0, file.count(layer), RUN_LEAVES)
    ]
    with ThreadPoolExecutor(2) as pool:
        while time.perf_counter() - begun < stop:
            done += sum(pool.map(read, jobs))
    return done / (time.perf_counter() - begun)


def summary(rows: list[dict[str, Any]], kv_bytes: int) -> dict[str, Any]:
    """Medians over the steps."""
    out = {name: statistics.median(r[name] for r in rows) for name in ("seconds", "wait_seconds")}
    quarters = statistics.quantiles([r["seconds"] for r in rows], n=4)
    return {
        **out,
        "seconds_quartiles": [quarters[0], quarters[2]],
        "mean_wait_seconds": statistics.mean(r["wait_seconds"] for r in rows),
        "mean_fetched_share": statistics.mean(r["fetched_bytes"] for r in rows) / kv_bytes,
        "most_fetched_share": max(r["fetched_bytes"] for r in rows) / kv_bytes,
        "same_top1": statistics.mean(r["same"] for r in rows),
        "kl": statistics.mean(r["kl"] for r in rows),
    }


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=1)
    parser.add_argument("--tokens", type=int, default=8000, help="of the context")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--resident", type=float, default=0.2, help="share of the KV in memory")
    parser.add_argument("--methods", default=METHODS, help="separated by ;")
    parser.add_argument("--ahead", default="leoam:budget=0.15", help="those also with ahead=True")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2(torch.float32)
    text = "\n\n".join(topics[name] for name in sorted(topics))[20000:]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens + args.steps]
    context = ids[:, : args.tokens]
    folder = tempfile.mkdtemp(prefix="kvlib-bench-tiered-")
    note = lambda text: print(text, end="", file=sys.stderr, flush=True)  # noqa: E731
    caches, rows = {}, {}
    with kvlib.KVStore(folder, memory=0, disk="4GiB") as store:
        plain_methods = [(method, False) for method in args.methods.split(";")]
        for method, ahead in plain_methods + [(m, True) for m in args.ahead.split(";") if m]:
            spec_bytes = args.tokens * 2 * 30 * 3 * 64 * 4
            cache = kvlib.TieredCache(
                model,
                store=store,
                resident=int(args.resident * spec_bytes),
                select=method,
                ahead=ahead,
            )
            method = f"{method}, ahead" if ahead else method
            begun = time.perf_counter()
            report = cache.prefill(
                context, progress=lambda a, b, m=method: note(f"\r{m}: {a} of {b} tokens")
            )
            note(f", {report.restored_tokens} restored, {time.perf_counter() - begun:.0f} s\n")
            caches[method], rows[method] = cache, []
        whole = DynamicCache()
        for at in range(0, args.tokens - 1, 512):
            piece = context[:, at : min(at + 512, args.tokens - 1)]
            model.base_model(input_ids=piece, past_key_values=whole)
        raw, plain = [], []
        for step in range(args.steps):
            token = ids[:, args.tokens - 1 + step][None]
            begun = time.perf_counter()
            want = model(input_ids=token, past_key_values=whole).logits[0, -1].log_softmax(-1)
            plain.append(time.perf_counter() - begun)
            for method, cache in caches.items():
                before = cache.stats()
                begun = time.perf_counter()
                got = model(input_ids=token, past_key_values=cache).logits[0, -1].log_softmax(-1)
                seconds = time.perf_counter() - begun
                after = cache.stats()
                rows[method].append(
                    {
                        "seconds": seconds,
                        "wait_seconds": after.wait_seconds - before.wait_seconds,
                        "fetched_bytes": after.fetched_bytes - before.fetched_bytes,
                        "same": bool(got.argmax() == want.argmax()),
                        "kl": float((want.exp() * (want - got)).sum()),
                    }
                )
            if step % 8 == 0:
                cache = next(iter(caches.values()))
                raw.append(raw_rate(cache._pool.file, 30, 0.5))
            note(f"\rstep {step + 1} of {args.steps}")
        kv_bytes = next(iter(caches.values())).kv_bytes
        result = {
            "model": "smollm2, float32",
            "threads": 1,
            "context_tokens": args.tokens,
            "steps": args.steps,
            "kv_bytes": kv_bytes,
            "raw_bytes_per_second": statistics.median(raw),
            "all_in_memory_seconds": statistics.median(plain),
            "methods": {
                method: {
                    **summary(rows[method], kv_bytes),
                    "resident_share": cache.nbytes / kv_bytes,
                    "disk_bytes": cache.disk_bytes,
                }
                for method, cache in caches.items()
            },
            "rows": rows,
        }
    note(f"\n{kv_bytes / 1e6:.0f} MB; raw disk {statistics.median(raw) / 1e9:.2f} GB/s\n")
    for method, found in result["methods"].items():
        note(
            f"{method:28s} {found['seconds'] * 1e3:6.0f} ms a token, waits "
            f"{found['mean_wait_seconds'] * 1e3:6.1f} ms, fetches "
            f"{found['mean_fetched_share']:.3f} of the KV, top-1 {found['same_top1']:.3f}, holds "
            f"{found['resident_share']:.3f}\n"
        )
    for cache in caches.values():
        cache.close()
    shutil.rmtree(folder, ignore_errors=True)
    common.finish("tiered", result, args.json)


if __name__ == "__main__":
    main()
