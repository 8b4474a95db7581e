# SPDX-License-Identifier: Apache-2.0
"""A process with a vLLM engine in it that does what lines of JSON on its standard input say."""

import json
import os
import sys
import time

MARK = "@@"


def main():
    options = json.loads(sys.argv[1])
    os.environ.update(options.pop("env", {}))
    from vllm import LLM, SamplingParams

    def answer(value):
        sys.stdout.write(MARK + json.dumps(value) + "\n")
        sys.stdout.flush()

    calls = []
    if options.pop("time_calls", False):
        time_calls(calls)
    try:
        llm = LLM(**options)
    except Exception as exc:
        answer({"error": f"{type(exc).__name__}: {exc}"})
        raise
    answer({"started": True})
    for line in sys.stdin:
        call = json.loads(line)
        name = call.pop("call")
        if name == "generate":
            prompts = [
                {"prompt_token_ids": ids, **({"cache_salt": salt} if salt else {})}
                for ids, salt in zip(call["prompts"], call["salts"], strict=True)
            ]
            sampling = SamplingParams(
                temperature=0,
                max_tokens=call["max_tokens"],
                ignore_eos=True,
                extra_args=call.get("extra_args"),
            )
            begun = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            answer(
                {
                    "seconds": time.perf_counter() - begun,
                    "cached": [o.num_cached_tokens for o in outputs],
                    "tokens": [list(o.outputs[0].token_ids) for o in outputs],
                    "reasons": [o.outputs[0].finish_reason for o in outputs],
                }
            )
        elif name == "reset":
            answer({"done": llm.llm_engine.reset_prefix_cache(reset_connector=call["connector"])})
        elif name == "metrics":
            found = {}
            for metric in llm.get_metrics():
                if "kvlib_" in metric.name or "preempt" in metric.name or "spec" in metric.name:
                    found[metric.name.removeprefix("vllm:")] = getattr(metric, "value", None)
            answer(found)
        elif name == "calls":
            answer({"calls": calls})
            calls.clear()
        elif name == "stall":
            stall(call["seconds"])
            answer({"stalled": True})
        elif name == "end":
            break
    del llm
    answer({"ended": True})


def time_calls(calls):
    """Note how long every call of the connector takes on the engine's threads."""
    from kvlib.connectors import vllm

    def timed(name, method):
        def call(*args, **kwargs):
            begun = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                calls.append((name, time.perf_counter() - begun))

        return call

    for name, method in list(vars(vllm.KvlibConnector).items()):
        plain = callable(method) and not isinstance(method, classmethod | property)
        if plain and not name.startswith("_") and name != "register_kv_caches":
            setattr(vllm.KvlibConnector, name, timed(name, method))


def stall(seconds):
    """Let the disk tier take so long for everything it is asked, once."""
    from kvlib.store import blockio

    until = time.monotonic() + seconds

    def slow(method):
        def call(*args, **kwargs):
            time.sleep(max(0.0, until - time.monotonic()))
            return method(*args, **kwargs)

        return call

    files = next(
        value
        for value in vars(blockio).values()
        if isinstance(value, type) and hasattr(value, "read") and hasattr(value, "create")
    )
    for name in ("read", "write", "sync", "create"):
        if hasattr(files, name):
            setattr(files, name, slow(getattr(files, name)))


if __name__ == "__main__":
    main()
