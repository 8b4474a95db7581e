# SPDX-License-Identifier: Apache-2.0
"""Attention over `LayerKV` against plain SDPA of the same tensors, and what the statistics cost.

One layer with SmolLM2's shape (9 query heads, 3 KV heads, 64 channels), one thread. SDPA gets the
keys as transformers would give them. Peak memory is that of one column-sum pass beyond its inputs
and results, against one head's full matrix of float32 probabilities.
"""

import sys
from typing import Any

import common
import torch
from torch.profiler import ProfilerActivity, profile

from kvlib.attention import attend, column_sums
from kvlib.blocks import LayerKV

HEADS, KV_HEADS, WIDTH = 9, 3, 64


def tensors(
    entries: int, queries: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, LayerKV]:
    """Random queries and a dense layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    layer = LayerKV(
        layer_idx=0,
        keys=draw(KV_HEADS, entries, WIDTH),
        values=draw(KV_HEADS, entries, WIDTH),
        positions=range(entries),
    )
    return draw(HEADS, queries, WIDTH), layer


def sdpa(query: torch.Tensor, layer: LayerKV) -> torch.Tensor:
    """Plain SDPA; for a single query no mask is needed."""
    return torch.nn.functional.scaled_dot_product_attention(
        query[None],
        layer.keys[None],
        layer.values[None],
        is_causal=query.shape[1] > 1,
        enable_gqa=True,
    )


def peak_bytes(run: Any, device: str) -> int:
    """Largest sum of allocations that were alive at once while `run` ran."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    alive = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"device": args.device, "threads": 1, "cases": {}}

    def synced(run: Any) -> Any:
        def once() -> None:
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()

        return once

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for title, entries, queries in (("prefill 4096", 4096, 4096), ("step over 2048", 2048, 1)):
            q, layer = tensors(entries, queries, dtype, args.device)
            cases = {
                "sdpa": lambda q=q, layer=layer: sdpa(q, layer),
                "attend": lambda q=q, layer=layer: attend(q, layer),
                "attend with column sums": lambda q=q, layer=layer: attend(
                    q, layer, with_column_sums=True
                ),
                "column sums of 32 queries": lambda q=q, layer=layer: column_sums(
                    q[:, -32:], layer
                ),
            }
            inner = 1 if queries > 1 else 100
            repeated = {
                key: synced(lambda case=case, inner=inner: [case() for _ in range(inner)])
                for key, case in cases.items()
            }
            times = common.interleave(repeated, repeats=args.repeats)
            row = {
                key: {
                    "seconds": [t / inner for t in times[key]],
                    "ratio_to_sdpa": common.ratios(times[key], times["sdpa"]),
                }
                for key in cases
            }
            result["cases"][f"{name} {title}"] = row
            for key, found in row.items():
                ratio = found["ratio_to_sdpa"]
                print(f"{name} {title}, {key}: {ratio['median']:.2f}x of SDPA", file=sys.stderr)
    q, layer = tensors(8192, 8192, torch.float32, args.device)
    full = 8192 * 8192 * 4
    sums = column_sums(q, layer).nbytes
    used = peak_bytes(lambda: column_sums(q, layer), args.device) - sums
    result["memory"] = {
        "tokens": 8192,
        "beyond_inputs_and_results": used,
        "one_head_full_matrix": full,
        "share": used / full,
    }
    print(f"memory: {used / full:.2%} of one head's full matrix", file=sys.stderr)
    common.finish("attention", result, args.json)


if __name__ == "__main__":
    main()
