# SPDX-License-Identifier: Apache-2.0
"""The demo's second process: it has never seen the prompt, and answers from what the first stored.

Run as ``python -m kvlib.demo.worker REQUEST.json RESULT.json``. Times begin when the model is
loaded and end when `generate` hands out its first token, with and without the store.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from kvlib.evals.metrics import divergence
from kvlib.prefix import PrefixCache
from kvlib.smollm2 import load_folder
from kvlib.store.store import KVStore

__all__ = ["answer", "kv_digests", "main"]


class _FirstToken:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: float | None = None
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt first, then with each token."""
        if not self._prompt and self.seconds is None:
            self.seconds = time.perf_counter() - self.start
        self._prompt = False

    def end(self) -> None:
        """Nothing is left to do."""


def kv_digests(cache: Any, num_tokens: int) -> list[str]:
    """One xxh3 for the keys and one for the values of each layer over the first tokens."""
    out = []
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            data = x[:, :, :num_tokens].contiguous().view(torch.uint8).numpy()
            out.append(xxhash.xxh3_64_hexdigest(data))
    return out


def _generate(model: Any, ids: Tensor, new_tokens: int, prefix: PrefixCache | None) -> Any:
    """Greedy output ids after the prompt, and seconds to the first of them."""
    streamer = _FirstToken()
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "streamer": streamer}
    mask = torch.ones_like(ids)
    if prefix is None:
        output = model.generate(ids, attention_mask=mask, **settings)
    else:  # nothing is saved: every repeat then restores the same tokens
        output = prefix.generate(ids, attention_mask=mask, save=False, **settings)
    return output[0, ids.shape[1] :].tolist(), streamer.seconds


@torch.no_grad()
def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what the request asks; see `kvlib.demo.run` for its fields."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    model, tokenizer = load_folder(Path(request["model"]))
    prefix_ids = torch.tensor([request["prefix_ids"]])
    ids = torch.cat([prefix_ids, torch.tensor([request["question_ids"]])], dim=1)
    new_tokens = request["new_tokens"]
    result: dict[str, Any] = {"first_token_s": [], "restore_s": [], "recomputed_first_token_s": []}

    def open_store(salt: str = "") -> KVStore:
        return KVStore(request["store"], memory=0, codec=request["codec"], salt=salt, tier="file")

    with open_store() as store:
        prefix = PrefixCache(model, store)
        for turn in range(request["repeats"]):
            # The whole answer once; the other turns only time its first token.
            tokens, seconds = _generate(model, ids, 1 if turn else new_tokens, prefix)
            result.setdefault("answer_ids", tokens)
            result["first_token_s"].append(seconds)
            start = time.perf_counter()
            cache = prefix.restore(ids)
            result["restore_s"].append(time.perf_counter() - start)
        result["restored_tokens"] = cache.restored_tokens
        result["fidelity"] = cache.fidelity
        result["kv_bit_equal"] = kv_digests(cache, cache.restored_tokens) == request["kv_digests"]
        result |= _compare_logits(model, cache, request)
        result["answer_text"] = tokenizer.decode(result["answer_ids"], skip_special_tokens=True)
        shared = request["prefix_ids"][: len(request["prefix_ids"]) // 2 + 10]
        result["partial_shared_tokens"] = len(shared)
        result["partial_restored_tokens"] = prefix.restore(shared + [0] * 64).restored_tokens
        result["counters"] = {
            name: getattr(store.stats().tiers["file"], name)
            for name in ("hits", "corrupt", "errors")
        }
    with open_store(salt="another tenant") as store:
        result["other_salt_tokens"] = PrefixCache(model, store).restore(ids).restored_tokens
    for turn in range(request["recompute_repeats"]):
        tokens, seconds = _generate(model, ids, 1 if turn else new_tokens, None)
        result.setdefault("recomputed_answer_ids", tokens)
        result["recomputed_first_token_s"].append(seconds)
    return result


def _compare_logits(model: Any, cache: Any, request: dict[str, Any]) -> dict[str, Any]:
    """KL divergence from the full cache, and agreement of the first choice, per token."""
    reference = torch.from_numpy(np.load(request["reference_logits"], allow_pickle=False))
    continuation = torch.tensor([request["continuation_ids"]])
    logits = model(input_ids=continuation, past_key_values=cache, use_cache=True).logits[0]
    return divergence(reference, logits) | {
        "max_logit_difference": (reference - logits).abs().max().item()
    }


def main() -> None:
    """Read the request, answer it, write the result."""
    request_path, result_path = map(Path, sys.argv[1:3])
    result = answer(json.loads(request_path.read_text(encoding="utf-8")))
    result_path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
