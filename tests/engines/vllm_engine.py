# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own, for tests."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

from vllm_child import MARK

HERE = Path(__file__).parent


class Starter:
    """A process that has imported vLLM and forks others with an engine each."""

    def __init__(self):
        self.socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The modules beside this one are found by it and by all that it starts.
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        env = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",  # other threads would be missing after a fork
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        with its:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "vllm_child.py"), str(its.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                env={**os.environ, **env},
            )

    def start(self, options):
        """Start an engine: a descriptor of its process, its input and its output."""
        its_input, to = os.pipe()
        out, its_output = os.pipe()
        socket.send_fds(self.socket, [json.dumps(options).encode()], [its_input, its_output])
        os.close(its_input)
        os.close(its_output)
        _, (process,), *_ = socket.recv_fds(self.socket, 16, 1)
        return process, os.fdopen(to, "w"), os.fdopen(out)

    def end(self):
        """End it; its engines go on."""
        self.socket.close()
        self.process.wait()


@functools.cache
def session_starter():
    """What starts the engines of all tests."""
    starter = Starter()
    atexit.register(starter.end)
    return starter


class Engine:
    """A vLLM engine on the CPU in a process of its own.

    `fresh`: one that shares nothing with other engines' processes, not even the seed of `hash`.
    """

    def __init__(
        self, model, store=None, *, env=None, extra=None, transfer=None, fresh=False, **options
    ):
        given = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 4608,
            "disable_log_stats": False,
            "skip_tokenizer_init": True,  # prompts are token ids
            "kv_cache_memory_bytes": 256 << 20,  # 5,500 tokens of SmolLM2-135M
            **options,
        }
        if store is not None:
            given["kv_transfer_config"] = {
                "kv_connector": "KvlibConnector",
                "kv_connector_module_path": "kvlib.connectors.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "path": str(store),
                    "memory": "256MiB",
                    "disk": "2GiB",
                    **(extra or {}),
                },
                **(transfer or {}),
            }
        # All of these are read when an engine starts. Of what is read at the import of vLLM, they
        # all have the same: see `Starter`.
        given["env"] = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **(env or {}),
        }
        self.log = []
        starter = Starter() if fresh else session_starter()
        self.process, self.stdin, self.stdout = starter.start(given)
        if fresh:
            starter.end()
        started = self._answer()
        if "error" in started:
            self._wait()
            raise RuntimeError(started["error"])

    def _answer(self):
        for line in self.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self.log.append(line)
        raise RuntimeError("the engine ended:\n" + "".join(self.log[-60:]))

    def begin(self, call, **more):
        """Ask for something."""
        self.stdin.write(json.dumps({"call": call, **more}) + "\n")
        self.stdin.flush()

    def ask(self, call, **more):
        """Ask for something and wait for the answer."""
        self.begin(call, **more)
        return self._answer()

    def generate(self, *prompts, salts=None, max_tokens=8, **more):
        """Greedy continuations of prompts, as one batch."""
        return self.ask(
            "generate",
            prompts=prompts,
            salts=salts or [None] * len(prompts),
            max_tokens=max_tokens,
            **more,
        )

    def reset(self, *, connector=False):
        """Forget the engine's own prefix cache."""
        assert self.ask("reset", connector=connector)["done"] is True

    def counts(self):
        """kvlib's metrics."""
        return {
            name.removeprefix("kvlib_"): int(value)
            for name, value in self.ask("metrics").items()
            if name.startswith("kvlib_")
        }

    def end(self):
        """Shut it down."""
        if not self.stdin.closed:
            self.begin("end")
            self._wait()

    def kill(self):
        """kill -9."""
        if not self.stdin.closed:
            signal.pidfd_send_signal(self.process, signal.SIGKILL)
            self._wait()

    def _wait(self, seconds=120):
        """Until it has ended, and all that it has started: they share their output."""
        self.stdin.close()
        while select.select([self.stdout], [], [], seconds)[0]:
            if not os.read(self.stdout.fileno(), 1 << 16):
                break
        over = select.select([self.process], [], [], seconds)[0]
        os.close(self.process)
        self.stdout.close()
        assert over, "the engine does not end"

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        if kind is None:
            self.end()
        else:
            self.kill()
