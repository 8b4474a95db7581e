# SPDX-License-Identifier: Apache-2.0
"""The demo's second half: what eviction policies hold, and what they change.

Every method reads the same context and is asked for the same continuation, whose next-token
distributions are compared with those of the full cache.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvlib.cache import KVCache
from kvlib.codecs import build_codec
from kvlib.evals.metrics import divergence
from kvlib.store.snapshots import decode_snapshot, encode_snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["compare_policies", "methods_of", "short_method"]

DECODE_TOKENS = 16


def methods_of(policies: Sequence[str], budgets: Sequence[str]) -> list[str]:
    """Method strings: ``full``, then each policy at each budget."""
    return ["full", *(f"{policy}:budget={budget}" for policy in policies for budget in budgets)]


def short_method(method: str) -> str:
    """The policy and its budget, without the other parameters."""
    name, _, rest = method.partition(":")
    budget = [part for part in rest.split(",") if part.startswith("budget=")]
    return f"{name} {budget[0].removeprefix('budget=')}" if budget else name


@torch.no_grad()
def compare_policies(
    model: "PreTrainedModel",
    tokenizer: Any,
    context: Sequence[int],
    continuation: Sequence[int],
    methods: Sequence[str],
    codec: str,
    *,
    progress: Callable[[str, str], Any],
) -> list[dict[str, Any]]:
    """One row per method.

    Args:
        model: any that `KVCache` supports.
        tokenizer: the model's.
        context: token ids that are prefilled.
        continuation: token ids that follow it in the text.
        methods: the first is the reference.
        codec: that snapshots are piped into.
        progress: called with the method and an empty text before, and a note after each.
    """
    ids = torch.tensor([list(context)])
    follow = torch.tensor([list(continuation)])
    rows: list[dict[str, Any]] = []
    reference = torch.empty(0)
    for method in methods:
        progress(method, "")
        cache = KVCache(model, method, tokenizer=tokenizer)
        start = time.perf_counter()
        last = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        prefill_s = time.perf_counter() - start
        row: dict[str, Any] = {
            "method": cache.method,
            "prefill_s": prefill_s,
            "held_bytes": cache.nbytes,
        }
        snapshot = cache.to_snapshot()
        row["decode_s"] = _decode(model, cache, last[0, -1])
        logits = _continue(model, KVCache.from_snapshot(model, snapshot), follow)
        reference = logits if not rows else reference
        row |= divergence(reference, logits)
        encoder = build_codec(codec)
        record = b"".join(encode_snapshot(snapshot, encoder))
        decoded = decode_snapshot(record, snapshot.block.spec, snapshot.method)
        piped = _continue(model, KVCache.from_snapshot(model, decoded), follow)
        row["piped"] = {"codec": codec, "bytes": len(record), **divergence(reference, piped)}
        rows.append(row)
        progress(method, f"{row['held_bytes'] / 2**20:.1f} MiB, top-1 {row['top1_agreement']:.0%}")
    for row in rows:
        row["held_share"] = row["held_bytes"] / rows[0]["held_bytes"]
        row["decode_median_s"] = statistics.median(row["decode_s"])
    return rows


def _continue(model: "PreTrainedModel", cache: KVCache, follow: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=follow, past_key_values=cache).logits[0]
    return logits


def _decode(model: "PreTrainedModel", cache: KVCache, logits: Tensor) -> list[float]:
    """Seconds of each greedy step."""
    seconds = []
    for _ in range(DECODE_TOKENS):
        token = logits.argmax()[None, None]
        start = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache).logits[0, -1]
        seconds.append(time.perf_counter() - start)
    return seconds
