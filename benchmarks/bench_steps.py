# SPDX-License-Identifier: Apache-2.0
"""What a step costs under each policy, over a plain SDPA step with as many tokens held.

One token's forward pass over a cache that a policy keeps at its budget, against the same pass over
transformers' `DynamicCache` filled with as many tokens as the policy holds on average over layers
and heads. All in turn in one process, on one thread, compared pair by pair. Both go on for the same
number of steps; where a policy lets its rows grow (LazyEviction between its windows, policies that
decide once), the plain cache grows alike.
"""

import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch
from bench_cache import Bench, held, random_model, smollm2

import kvlib


def methods(held_tokens: int, prompt: int, layers: int, heads: int) -> dict[str, str]:
    """Method strings by name; with a few retrieval heads where roles are needed."""
    some = "/".join(f"{i}.{i % heads}" for i in range(0, layers, 2))
    budget = f"budget={held_tokens}"
    return {
        "full": "full",
        "streaming": f"streaming:{budget}",
        "h2o": f"h2o:{budget}",
        "tova": f"tova:{budget}",
        "keydiff": f"keydiff:{budget}",
        "d2o": f"d2o:{budget}",
        "lazy": f"lazy:budget={prompt - 8},window=16",
        "razor": f"razor:heads={some},s0={held_tokens},c={prompt}.0",
        "razor lag 16": f"razor:heads={some},s0={held_tokens},c={prompt}.0,lag=16",
        "duo": f"duo:gates={gates(layers, heads)},window={held_tokens}",
        "duo lag 16": f"duo:gates={gates(layers, heads)},window={held_tokens},lag=16",
        "snapkv": f"snapkv:{budget}",
        "snapkv+adakv": f"snapkv:{budget}+adakv",
        "h2o+adakv": f"h2o:{budget}+adakv",
        "think": "think:ratio=0.4",
        "h2o+think": f"h2o:{budget}+think:ratio=0.4",
    }


def gates(layers: int, heads: int) -> Path:
    """A file of gates in which one head in six is a retrieval head."""
    path = Path(tempfile.mkdtemp()) / "gates.tsv"
    rows = [[1.0 if (i * heads + h) % 6 == 0 else 0.0 for h in range(heads)] for i in range(layers)]
    path.write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n")
    return path


def mean_held(cache: Any) -> float:
    """Entries held, on average over layers and heads."""
    if not isinstance(cache, kvlib.KVCache):
        return float(cache.get_seq_length())
    lengths = [cache.layer_kv(i).lengths for i in range(len(cache.layers))]
    return statistics.mean(n for layer in lengths for n in layer)


def compare(bench: Bench, name: str, method: str, prompt: int, repeats: int) -> dict[str, Any]:
    """One policy and the plain cache beside it."""
    cache = bench.filled(method, prompt)
    token = bench.ids[:, :1]
    for _ in range(4):  # decisions that wait for a step
        bench.forward(token, cache)
    tokens = round(mean_held(cache))
    plain = bench.filled("plain", tokens)
    cases = {
        "policy": lambda: bench.forward(token, cache),
        "plain": lambda: bench.forward(token, plain),
    }
    times = common.interleave(cases, repeats=repeats, warmup=3)
    row = {
        "method": re.sub("gates=[^,]*/", "gates=", method),  # the folder is a temporary one
        "held_tokens": tokens,
        "held_tokens_after": mean_held(cache),
        "plain_tokens_after": mean_held(plain),
        "held_bytes": held(cache),
        "plain_bytes": held(plain),
        "seconds": common.summary(times["policy"]),
        "plain_seconds": common.summary(times["plain"]),
        "ratio_to_plain": common.ratios(times["policy"], times["plain"]),
    }
    ratio = row["ratio_to_plain"]
    print(
        f"{name}: {ratio['median']:.2f}x of a plain step over {tokens} tokens "
        f"({ratio['min']:.2f} to {ratio['max']:.2f})",
        file=sys.stderr,
    )
    return row


def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "random"])
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--tokens", type=int, default=2560, help="length of the prompt")
    parser.add_argument("--held", type=int, default=2048, help="budget in tokens")
    parser.add_argument("--only", default="", help="names separated by ','")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, ids = (smollm2 if args.model == "smollm2" else random_model)(args.tokens)
    config = model.config
    wanted = methods(args.held, args.tokens, config.num_hidden_layers, config.num_key_value_heads)
    if args.only:
        wanted = {name: wanted[name] for name in args.only.split(",")}
    result: dict[str, Any] = {
        "model": args.model,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": 1,
        "prompt_tokens": args.tokens,
        "budget_tokens": args.held,
        "steps": {},
    }
    for dtype in args.dtypes.split(","):
        bench = Bench(model.to(args.device, getattr(torch, dtype)), ids, args.device)
        result["steps"][dtype] = {
            name: compare(bench, name, method, args.tokens, args.repeats)
            for name, method in wanted.items()
        }
    common.finish("steps", result, args.json)


if __name__ == "__main__":
    main()
