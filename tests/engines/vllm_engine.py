# SPDX-License-Identifier: Apache-2.0
"""Engines in processes of their own, for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

from vllm_child import MARK

HERE = Path(__file__).parent


class Engine:
    """A vLLM engine on the CPU in a child process."""

    def __init__(self, model, store=None, *, env=None, extra=None, transfer=None, **options):
        given = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 4608,
            "disable_log_stats": False,
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
        given["env"] = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            **(env or {}),
        }
        self.log = []
        self.child = subprocess.Popen(
            [sys.executable, str(HERE / "vllm_child.py"), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ),
        )
        started = self._answer()
        if "error" in started:
            self.child.wait()
            raise RuntimeError(started["error"])

    def _answer(self):
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self.log.append(line)
        raise RuntimeError("the engine ended:\n" + "".join(self.log[-60:]))

    def begin(self, call, **more):
        """Ask for something."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"call": call, **more}) + "\n")
        self.child.stdin.flush()

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
        if self.child.poll() is None:
            self.begin("end")
            self.child.communicate(timeout=120)

    def kill(self):
        """kill -9."""
        self.child.kill()
        self.child.communicate()

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        if kind is None:
            self.end()
        else:
            self.kill()
