# SPDX-License-Identifier: Apache-2.0
"""A process with a vLLM engine in it that does what lines of JSON on its standard input say.

Most of an engine's start is the import of vLLM, so it is imported once, by a process that starts no
engine itself: `python vllm_child.py FD` forks one for every message on its socket, each a process
of its own with its own standard streams, and ends when the socket is closed at the other end.
"""

import atexit
import gc
import importlib
import json
import os
import socket
import sys
import threading
import time

MARK = "@@"

# What an engine imports before it has started.
MODULES = (
    "kvlib.connectors.vllm",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
)


def main():
    """Import; in every forked process, run its engine."""
    atexit.register(leave)  # the first to be registered is the last to be called
    with socket.socket(fileno=int(sys.argv[1])) as tests:
        for module in MODULES:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # what is there is not looked through again by every engine
        options = fork_engines(tests)
    if options is not None:
        run(options)


def leave():
    """End at once: to take all modules apart would take seconds."""
    sys.stdout.flush()
    os._exit(0)


def fork_engines(tests):
    """Fork a process for every message, and answer with a descriptor of it.

    Args:
        tests: the socket: a message is the options as JSON, and what will be the standard input and
            output.

    Returns:
        A forked process's options; in this process, None when the tests are over.
    """
    while True:
        message, streams, *_ = socket.recv_fds(tests, 1 << 20, 2)
        while reap():
            pass
        if not message:
            return None
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("only one thread of a process is there after a fork")
        child = os.fork()
        if not child:
            for stream, number in zip((*streams, streams[1]), range(3), strict=True):
                os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        if not child:
            return json.loads(message)
        descriptor = os.pidfd_open(child)  # before it is reaped, which is when its number is free
        socket.send_fds(tests, [b"started"], [descriptor])
        os.close(descriptor)


def reap():
    """Whether an engine's process had ended."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return 0


def run(options):
    """An engine, until it is told to end."""
    os.environ.update(options.pop("env", {}))
    from vllm import LLM, SamplingParams, envs

    # vLLM lets processes on a CPU import everything anew, for the sake of threads that are bound
    # to cores: here they are not, and what it starts is forked too.
    envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"] = lambda: "fork"

    def answer(value):
        sys.stdout.write(MARK + json.dumps(value) + "\n")
        sys.stdout.flush()

    calls, going = [], threading.Event()
    if options.pop("time_calls", False):
        from kvlib.connectors.vllm import KvlibConnector
        from kvlib.engine_bench.probes import time_calls

        time_calls(KvlibConnector, calls)
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
            if call.get("over"):
                going.set()
            else:
                stall(going)
            answer({"stalled": not going.is_set()})
        elif name == "end":
            break
    del llm
    answer({"ended": True})


def stall(over):
    """Let the disk tier's files do nothing that they are asked, until the event is set."""
    from kvlib.store import blockio

    def slow(method):
        def call(*args, **kwargs):
            over.wait()
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
