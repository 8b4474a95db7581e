# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own, asked by lines of JSON.

Run as ``python -m kvlib.engine_bench.child NAME OPTIONS`` by the engine's Python. Needs nothing of
kvlib but what the engine itself imports.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from kvlib.engine_bench.probes import Calls, stall_disk, time_calls

__all__ = ["MARK", "Answer", "main"]

MARK = "@@kvlib "
"""Begins the lines that are answers: engines print much else."""


class Answer(NamedTuple):
    """What became of a prompt.

    Attributes:
        tokens: generated.
        cached: tokens of the prompt that were not computed.
        seconds: it took.
        calls: of the connector meanwhile, where they are timed.
    """

    tokens: list[int]
    cached: int
    seconds: float
    calls: Calls = []  # noqa: RUF012 (never changed)


Ask = Callable[[Sequence[int], int, "str | None"], Answer]
"""Prompt, tokens to generate, cache_salt."""


_CONNECTOR = {
    "kv_connector": "KvlibConnector",
    "kv_connector_module_path": "kvlib.connectors.vllm",
}


def _vllm(options: dict[str, Any]) -> tuple[Ask, Callable[[], None], Callable[[], None]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    given: dict[str, Any] = {
        "model": options["model"],
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": options["page_tokens"],
        "max_model_len": options["max_tokens"],
    }
    if options["connector"] == "kvlib":
        given["kv_transfer_config"] = {
            **_CONNECTOR,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": options["store"],
        }
    elif options["connector"] == "example":
        given["kv_transfer_config"] = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": options["store"]["path"]},
        }
    llm = LLM(**given)

    def ask(prompt: Sequence[int], new: int, salt: str | None) -> Answer:
        request = {"prompt_token_ids": list(prompt), **({"cache_salt": salt} if salt else {})}
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        begun = time.perf_counter()
        (out,) = llm.generate([request], sampling, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return Answer(list(out.outputs[0].token_ids), int(out.num_cached_tokens or 0), seconds)

    def forget() -> None:
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    return ask, forget, lambda: None


def _sglang(options: dict[str, Any]) -> tuple[Ask, Callable[[], None], Callable[[], None]]:
    import sglang

    given: dict[str, Any] = {
        "model_path": options["model"],
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "dtype": "float32",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "max_total_tokens": 2 * options["max_tokens"],
        "page_size": options["page_tokens"],
        "log_level": "error",
    }
    if options["connector"] == "kvlib":
        given |= {
            "enable_unified_cache_external_linker": True,
            "unified_cache_external_linker_backend": "dynamic",
            "unified_cache_external_linker_config": {
                "linker": "KvlibLinker",
                "linker_module_path": "kvlib.connectors.sglang",
                "linker_extra_config": options["store"],
            },
        }
    engine = sglang.Engine(**given)

    def ask(prompt: Sequence[int], new: int, salt: str | None) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        begun = time.perf_counter()
        out = engine.generate(input_ids=list(prompt), sampling_params=sampling)
        seconds = time.perf_counter() - begun
        return Answer(list(out["output_ids"]), int(out["meta_info"]["cached_tokens"]), seconds)

    return ask, lambda: engine.flush_cache() and None, engine.shutdown


def _transformers(options: dict[str, Any]) -> tuple[Ask, Callable[[], None], Callable[[], None]]:
    from pathlib import Path

    import torch

    import kvlib
    from kvlib.smollm2 import load_folder

    model, _ = load_folder(Path(options["model"]))
    store = kvlib.KVStore(**{k: v for k, v in options["store"].items() if k != "deadline"})
    prefix = kvlib.PrefixCache(model, store)

    @torch.no_grad()
    def ask(prompt: Sequence[int], new: int, salt: str | None) -> Answer:
        ids = torch.tensor([list(prompt)])
        settings: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": new,
            "min_new_tokens": new,
        }
        begun = time.perf_counter()
        if options["connector"] == "kvlib":
            cached = prefix.restore(ids).restored_tokens
            out = prefix.generate(ids, **settings)
        else:
            cached = 0
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]
        return Answer(out[0, ids.shape[1] :].tolist(), cached, time.perf_counter() - begun)

    return ask, lambda: None, store.close


_ENGINES = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers}


def main() -> None:
    """Answer until standard input ends."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    calls: Calls = []
    if options.get("time_calls"):
        time_calls(import_module(_CONNECTOR["kv_connector_module_path"]).KvlibConnector, calls)
    ask, forget, close = _ENGINES[name](options)

    def say(value: Any) -> None:
        sys.stdout.write(f"{MARK}{json.dumps(value)}\n")
        sys.stdout.flush()

    say({"ready": True})
    for line in sys.stdin:
        call = json.loads(line)
        if call.get("forget"):
            forget()
        if call.get("stall"):
            stall_disk(call["stall"])
        calls.clear()
        answer = ask(call["prompt"], call["new"], call.get("salt"))
        say({**answer._asdict(), "calls": calls})
    close()
    say({"closed": True})


if __name__ == "__main__":
    main()
