# SPDX-License-Identifier: Apache-2.0
"""What `KVCache` costs: prefill against transformers' own cache, and steps over an evicted cache.

All methods run in turn in one process, on one thread, and are compared with `DynamicCache` (plain
SDPA) pair by pair. Prefill is one forward pass over real text up to the last token's logits, the
eviction included; a step is one token's forward pass.
"""

import sys
from collections.abc import Callable
from typing import Any

import common
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvlib
from kvlib.demo.prompt import demo_text
from kvlib.smollm2 import load_smollm2

POLICIES = ("streaming", "snapkv", "h2o")


def smollm2(tokens: int) -> tuple[Any, torch.Tensor]:
    """The real model and so many tokens of real text."""
    model, tokenizer = load_smollm2()
    ids = tokenizer(demo_text(), return_tensors="pt", truncation=True, max_length=tokens).input_ids
    return model, ids


def random_model(tokens: int) -> tuple[Any, torch.Tensor]:
    """A random Llama of 1.1 billion weights, and random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 17,
    )
    return LlamaForCausalLM(config).eval(), torch.randint(0, 32000, (1, tokens))


class Bench:
    """One model on one device in one dtype."""

    def __init__(self, model: Any, ids: torch.Tensor, device: str) -> None:
        self.model = model
        self.ids = ids.to(device)
        self.device = device

    def cache(self, method: str) -> Any:
        """An empty cache; ``plain`` is transformers' own."""
        if method == "plain":
            return DynamicCache(config=self.model.config)
        return kvlib.KVCache(self.model, method)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, cache: Any) -> None:
        """One forward pass, finished on the device."""
        self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def filled(self, method: str, tokens: int) -> Any:
        """A cache after a prefill."""
        cache = self.cache(method)
        self.forward(self.ids[:, :tokens], cache)
        return cache


def held(cache: Any) -> int:
    """Bytes of keys and values, and for ours of everything else."""
    if isinstance(cache, kvlib.KVCache):
        return cache.nbytes
    return sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


def prefill(bench: Bench, tokens: int, budget: str, repeats: int) -> dict[str, Any]:
    """Seconds of a prefill, and bytes held after it."""
    methods = ["plain", "full", *(f"{name}:budget={budget}" for name in POLICIES)]
    sizes: dict[str, int] = {}

    def run(method: str) -> Callable[[], None]:
        def once() -> None:
            sizes[method] = held(bench.filled(method, tokens))

        return once

    times = common.interleave({name: run(name) for name in methods}, repeats=repeats)
    return {
        name: {
            "seconds": times[name],
            "ratio_to_plain": common.ratios(times[name], times["plain"]),
            "held_bytes": sizes[name],
            "held_share": sizes[name] / sizes["plain"],
        }
        for name in methods
    }


def decode(bench: Bench, tokens: int, budget: str, repeats: int) -> dict[str, Any]:
    """Seconds of single steps over caches that go on growing or being evicted."""
    methods = ["plain", "full", *(f"{name}:budget={budget}" for name in POLICIES)]
    caches = {name: bench.filled(name, tokens) for name in methods}
    token = bench.ids[:, :1]

    def run(method: str) -> Callable[[], None]:
        return lambda: bench.forward(token, caches[method])

    times = common.interleave({name: run(name) for name in methods}, repeats=repeats, warmup=3)
    return {
        name: {
            "seconds": times[name],
            "ratio_to_plain": common.ratios(times[name], times["plain"]),
            "held_bytes": held(caches[name]),
        }
        for name in methods
    }


def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--model", default="smollm2", choices=["smollm2", "random"])
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the timed prefill")
    parser.add_argument("--decode-tokens", type=int, default=8192)
    parser.add_argument("--budget", default="0.25")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, ids = (smollm2 if args.model == "smollm2" else random_model)(
        max(args.tokens, args.decode_tokens)
    )
    result: dict[str, Any] = {
        "model": args.model,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": 1,
        "prefill_tokens": args.tokens,
        "decode_tokens": args.decode_tokens,
        "budget": args.budget,
        "prefill": {},
        "decode": {},
    }
    for dtype in args.dtypes.split(","):
        bench = Bench(model.to(args.device, getattr(torch, dtype)), ids, args.device)
        for name, run, tokens, repeats in (
            ("prefill", prefill, args.tokens, args.repeats),
            ("decode", decode, args.decode_tokens, args.repeats * 7),
        ):
            found = run(bench, tokens, args.budget, repeats)
            result[name][dtype] = found
            for method, row in found.items():
                ratio = row["ratio_to_plain"]
                print(
                    f"{dtype} {name} {method}: {ratio['median']:.2f}x of plain "
                    f"({ratio['min']:.2f} to {ratio['max']:.2f})",
                    file=sys.stderr,
                )
    common.finish("cache", result, args.json)


if __name__ == "__main__":
    main()
