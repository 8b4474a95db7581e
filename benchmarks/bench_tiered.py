# SPDX-License-Identifier: Apache-2.0
"""Decoding over a context whose keys and values are on disk: the ways to choose leaves compared.

SmolLM2 goes on through a real text, token by token, over a `TieredCache` of each method; the caches
take turns, so a busy machine is busy for all. Each step says how long it took, how long it waited
for the disk, what it fetched, and whether its most likely next token is that of full attention with
everything in memory. `full` streams what memory does not hold in every step, a layer ahead: what
methods have to beat. Plain reading of the same file, in the two fastest ways known, and streaming
with nothing to compute are measured in turn with the steps.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import common
import numpy as np
import selection
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import kvlib
from kvlib.smollm2 import load_smollm2
from kvlib.store.leaf_io import Batch
from kvlib.store.leaves import RUN_LEAVES, LeafFile, aligned

METHODS = (
    "full;percent:resident=0.1;quest:budget=0.25;leoam:budget=0.05;leoam:budget=0.1;"
    "leoam:budget=0.25;leoam:codes=16,budget=0.2"
)
AHEAD = "leoam:budget=0.25;leoam:codes=16,budget=0.2"


PIECE = 512
KV_BYTES = 2 * 30 * 3 * 64 * 4  # of a token


def keys_and_values(file: Path | None, tokens: int) -> dict[str, torch.Tensor]:
    """The text, and SmolLM2's keys, values and queries of it in all layers; kept in a file."""
    if file is not None and file.exists():
        kv = load_file(file)
    else:
        model = selection.Model()
        text = "\n\n".join(topics[name] for name in sorted(topics))[20000:]
        kv = model.read(model.tokenizer(text, return_tensors="pt").input_ids[0, :tokens])
        if file is not None:
            save_file(kv, file)
    return {name: x[..., :tokens, :] if x.dim() == 3 else x[:tokens] for name, x in kv.items()}


def raw_rate(file: LeafFile, layers: int, way: str, stop: float) -> float:
    """Bytes a second of reading the file from front to back in large pieces, unchecked.

    Args:
        file: the leaves.
        layers: of the model.
        way: ``queue``: four pieces under way by the system's queue; ``threads``: two threads.
        stop: seconds.
    """
    size = file.shape.slot_bytes
    rooms = [aligned(RUN_LEAVES * size).reshape(-1, size) for _ in range(4)]
    pieces = itertools.cycle(
        (layer, range(at, min(at + RUN_LEAVES, file.count(layer))))
        for layer in range(layers)
        for at in range(0, file.count(layer), RUN_LEAVES)
    )
    done = 0
    begun = time.perf_counter()

    def read(room: Any) -> int:
        layer, leaves = next(pieces)
        [(offset, count)] = file.runs(layer, leaves)
        file.fill([x.data for x in room[:count]], offset)
        return count * size

    if way == "threads":
        with ThreadPoolExecutor(2) as pool:
            while time.perf_counter() - begun < stop:
                done += sum(pool.map(read, rooms[:2]))
        return done / (time.perf_counter() - begun)
    under_way: deque[tuple[Batch, Any, int]] = deque()
    while time.perf_counter() - begun < stop:
        if len(under_way) < len(rooms):
            room = rooms[len(under_way)]
        else:
            batch, room, count = under_way.popleft()
            batch.collect(wait=True)
            assert batch.got == [count * size]
            done += count * size
        layer, leaves = next(pieces)
        runs = file.runs(layer, leaves)
        table = np.empty((len(leaves), 2), np.uint64)
        table[:, 0] = room.ctypes.data + size * np.arange(len(leaves))
        table[:, 1] = size
        under_way.append(
            (Batch(file.lanes, file.fd, [runs[0][0]], [runs[0][1]], table), room, len(leaves))
        )
    for batch, _, count in under_way:
        batch.collect(wait=True)
        done += count * size
    return done / (time.perf_counter() - begun)


def stream_rate(cache: kvlib.TieredCache, layers: int, stop: float) -> float:
    """Bytes a second that leaves come in as `full` asks for them: checked, but not attended to."""
    begun, before = time.perf_counter(), cache.stats().fetched_bytes
    while time.perf_counter() - begun < stop:
        for layer in range(layers):
            for _ in cache._stream(layer):
                pass
    return (cache.stats().fetched_bytes - before) / (time.perf_counter() - begun)


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
    parser.add_argument("--ahead", default=AHEAD, help="those also with ahead=True")
    parser.add_argument("--kv", type=Path, default=None, help="file to keep the model's keys in")
    parser.add_argument("--folder", default=None, help="on the disk that is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kv = keys_and_values(args.kv, args.tokens + args.steps)
    model, _ = load_smollm2(torch.float32)
    model.eval()
    layers = model.config.num_hidden_layers
    scale = model.model.layers[0].self_attn.scaling
    ids, seen = kv["ids"][None], args.tokens - 1
    note = lambda text: print(text, end="", file=sys.stderr, flush=True)  # noqa: E731
    caches, rows, filled = {}, {}, {}
    ways = [(method, False) for method in args.methods.split(";")]
    with tempfile.TemporaryDirectory(prefix="kvlib-bench-tiered-", dir=args.folder) as folder:
        for method, ahead in ways + [(m, True) for m in args.ahead.split(";") if m]:
            cache = kvlib.TieredCache(
                model,
                model_id="smollm2",
                scratch=folder,
                resident=int(args.resident * args.tokens * KV_BYTES),
                select=method,
                ahead=ahead,
            )
            method = f"{method}, ahead" if ahead else method
            begun = time.perf_counter()
            for at in range(0, seen, PIECE):
                some = slice(at, min(at + PIECE, seen))
                cache._fill(
                    ids[0, some],
                    [
                        tuple(kv[f"{x}{i}"][:, some] * (scale if x == "q" else 1) for x in "kvq")
                        for i in range(layers)
                    ],
                )
            filled[method] = time.perf_counter() - begun
            note(f"{method}: filled in {filled[method]:.0f} s\n")
            caches[method], rows[method] = cache, []
        whole = DynamicCache()
        for i in range(layers):
            whole.update(*(kv[f"{x}{i}"][None, :, :seen] for x in "kv"), i)
        rates: dict[str, list[float]] = {"queue": [], "threads": [], "stream": []}
        plain = []
        for step in range(args.steps):
            token = ids[:, seen + step][None]
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
                for way, found in rates.items():
                    cache = next(iter(caches.values()))
                    if way == "stream":
                        found.append(stream_rate(cache, layers, 0.7))
                    else:
                        found.append(raw_rate(cache._pool.file, layers, way, 0.7))
            note(f"\rstep {step + 1} of {args.steps}")
        kv_bytes = next(iter(caches.values())).kv_bytes
        result = {
            "model": "smollm2, float32",
            "threads": 1,
            "context_tokens": args.tokens,
            "steps": args.steps,
            "kv_bytes": kv_bytes,
            "raw_bytes_per_second": {
                way: statistics.median(rates[way]) for way in ("queue", "threads")
            },
            "stream_bytes_per_second": statistics.median(rates["stream"]),
            "rates": rates,
            "all_in_memory_seconds": statistics.median(plain),
            "methods": {
                method: {
                    **summary(rows[method], kv_bytes),
                    "resident_share": cache.nbytes / kv_bytes,
                    "disk_bytes": cache.disk_bytes,
                    "fill_seconds": filled[method],
                }
                for method, cache in caches.items()
            },
            "rows": rows,
        }
    speeds = ", ".join(f"{way} {statistics.median(x) / 1e9:.2f}" for way, x in rates.items())
    note(f"\n{kv_bytes / 1e6:.0f} MB; GB/s: {speeds}\n")
    for method, found in result["methods"].items():
        note(
            f"{method:28s} {found['seconds'] * 1e3:6.0f} ms a token, waits "
            f"{found['mean_wait_seconds'] * 1e3:6.1f} ms, fetches "
            f"{found['mean_fetched_share']:.3f} of the KV, top-1 {found['same_top1']:.3f}, holds "
            f"{found['resident_share']:.3f}\n"
        )
    for cache in caches.values():
        cache.close()
    common.finish("tiered", result, args.json)


if __name__ == "__main__":
    main()
