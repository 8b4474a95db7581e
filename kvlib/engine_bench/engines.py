# SPDX-License-Identifier: Apache-2.0
"""Engines as children of this process, and what is measured with them."""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kvlib.engine_bench.child import MARK, Answer
from kvlib.errors import ConfigError, ConnectorError
from kvlib.model_spec import CACHE_FOLDER

__all__ = ["Child", "Engine", "connector_calls", "find_engines", "first_tokens", "matrix"]

_PAGES = {"transformers": 64, "vllm": 32, "sglang": 16}
Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that is installed somewhere.

    Attributes:
        name: transformers, vllm or sglang.
        python: the interpreter of its environment.
        site: folder to be put first on its module path, None for none.
    """

    name: str
    python: Path
    site: Path | None = None


def find_engines(vllm: Path | None, sglang: Path | None, site: Path | None) -> list[Engine]:
    """Transformers here, and the engines given or made by ``make test-engines``.

    Args:
        vllm: Python of vLLM's environment; None for the newest one in kvlib's cache folder.
        sglang: Python of SGLang's.
        site: what SGLang needs to be imported on a CPU.

    Raises:
        ConfigError: an interpreter that was given is not there.
    """
    found = [Engine("transformers", Path(sys.executable))]
    for name, python in (("vllm", vllm), ("sglang", sglang)):
        if python is not None and not python.is_file():
            raise ConfigError(f"{python}: there is no such interpreter")
        if python is None:
            made = (CACHE_FOLDER.expanduser() / "engines").glob(f"{name}-*/.installed")
            newest = max(made, key=lambda file: file.stat().st_mtime, default=None)
            if newest is None:
                continue
            python = newest.parent / "bin" / "python"
        found.append(Engine(name, python, site if name == "sglang" else None))
    return found


@dataclass(slots=True)
class Child:
    """An engine that runs; use it as a context manager.

    Attributes:
        engine: which.
        model: folder of the model.
        store: options of the store.
        connector: ``kvlib``, ``example`` (vLLM's own), or ``none``.
        max_tokens: longest prompt and answer.
        time_calls: of the connector, which `Answer.calls` has then (vLLM only).
    """

    engine: Engine
    model: Path
    store: dict[str, Any]
    connector: str = "kvlib"
    max_tokens: int = 4608
    time_calls: bool = False
    _process: "subprocess.Popen[str] | None" = None
    _said: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        options = {
            "model": str(self.model),
            "store": self.store,
            "connector": self.connector,
            "max_tokens": self.max_tokens,
            "page_tokens": _PAGES[self.engine.name],
            "time_calls": self.time_calls,
        }
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.engine.site is not None:
            old = env.get("PYTHONPATH", "")
            env["PYTHONPATH"] = os.pathsep.join(x for x in (str(self.engine.site), old) if x)
        self._process = subprocess.Popen(
            [
                str(self.engine.python),
                "-m",
                "kvlib.engine_bench.child",
                self.engine.name,
                json.dumps(options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        self._answer()
        return self

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None  # noqa: S101, PT018
        for line in self._process.stdout:
            if line.startswith(MARK):
                said: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return said
            self._said.append(line)
        raise ConnectorError(
            f"{self.engine.name} ended unexpectedly; its last lines: {''.join(self._said[-20:])}"
        )

    def ask(
        self, prompt: Sequence[int], *, new: int = 8, forget: bool = True, stall: float = 0
    ) -> Answer:
        """Continue a prompt greedily.

        Args:
            prompt: tokens.
            new: tokens to generate.
            forget: empty the engine's own prefix cache before.
            stall: seconds that the disk stands still from then on.
        """
        assert self._process is not None and self._process.stdin is not None  # noqa: S101, PT018
        call = {"prompt": list(prompt), "new": new, "forget": forget, "stall": stall}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return Answer(**self._answer())

    def __exit__(self, kind: object, *exc: object) -> None:
        process = self._process
        if process is None:
            return
        if kind is not None:
            process.kill()
        else:
            assert process.stdin is not None  # noqa: S101 (made with a pipe)
            process.stdin.close()
            self._answer()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def matrix(
    engines: Sequence[Engine],
    model: Path,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    step: Step,
    *,
    new: int = 16,
) -> list[dict[str, Any]]:
    """Each engine stores a prompt of its own; then each, started anew, reads all of them.

    Args:
        engines: writers and readers.
        model: folder of the model.
        folder: of the one store.
        prompts: one for each engine.
        step: told what is done.
        new: tokens to generate.

    Returns:
        A cell for each writer and reader: tokens of the prompt, cached, and whether the answer is
        the one that the reader gives when it computes all itself.
    """
    store = {"path": str(folder), "memory": 0, "disk": "4GiB"}
    written: dict[str, Answer] = {}
    for engine, prompt in zip(engines, prompts, strict=True):
        with Child(engine, model, store) as child:
            written[engine.name] = child.ask(prompt, new=new)
        step(f"{engine.name} wrote")
    cells = []
    for reader in engines:
        with Child(reader, model, store, connector="none") as child:
            own = [child.ask(prompt, new=new).tokens for prompt in prompts]
        with Child(reader, model, store) as child:
            for writer, prompt, expected in zip(engines, prompts, own, strict=True):
                answer = child.ask(prompt, new=new)
                cells.append(
                    {
                        "writer": writer.name,
                        "reader": reader.name,
                        "tokens": len(prompt),
                        "cold": written[writer.name].cached,
                        "cached": answer.cached,
                        "same": answer.tokens == expected,
                        "seconds": answer.seconds,
                    }
                )
        step(f"{reader.name} read")
    return cells


def first_tokens(
    engine: Engine,
    model: Path,
    folder: Path,
    prompt: Sequence[int],
    step: Step,
    *,
    repeats: int,
    codecs: Sequence[str],
) -> list[dict[str, Any]]:
    """Seconds to the first token: computed, and from the store by each codec, memory or disk.

    For vLLM also with its own ExampleConnector. Its engines are all up at once and asked in turns,
    so what is compared was measured within a second of each other. SGLang's take a core while they
    wait, so they are up one after another.
    """
    runs: list[tuple[str, str, dict[str, Any]]] = []
    for i, codec in enumerate(codecs):
        for place, memory in (("memory", "1GiB"), ("disk", 0)):
            store = {"path": str(folder / f"{place}{i}"), "codec": codec, "memory": memory}
            runs.append((f"{codec}, {place}", "kvlib", store))
    if engine.name == "vllm":
        runs.insert(0, ("vLLM's ExampleConnector", "example", {"path": str(folder / "example")}))
    times: list[list[float]] = [[] for _ in runs]
    cold: list[float] = []
    cached = [0] * len(runs)
    together = [range(len(runs))] if engine.name == "vllm" else [[i] for i in range(len(runs))]
    for some in together:
        with ExitStack() as stack:
            children = {}
            for i in some:
                name, connector, store = runs[i]
                child = stack.enter_context(Child(engine, model, store, connector=connector))
                child.ask(prompt[:100], new=1)
                cold.append(child.ask(prompt, new=1).seconds)
                child.ask(prompt, new=1)
                children[i] = child
                step(f"{engine.name}, {name}: stored")
            for turn in range(repeats):
                for at in range(len(some)):
                    i = some[(at + turn) % len(some)]
                    answer = children[i].ask(prompt, new=1)
                    times[i].append(answer.seconds)
                    cached[i] = answer.cached
    step(f"{engine.name}: {repeats} times from each")
    out: list[dict[str, Any]] = []
    for (name, connector, store), seconds, tokens in zip(runs, times, cached, strict=True):
        path = Path(str(store["path"]))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        row = {
            "engine": engine.name,
            "from": name,
            "connector": connector,
            "prompt": len(prompt),
            "cached": tokens,
            "computed_seconds": statistics.median(cold),
            "seconds": seconds,
            "median": statistics.median(seconds),
            "stored_bytes": size,
        }
        if engine.name == "vllm" and connector == "kvlib":
            row["of_example"] = statistics.median(
                mine / theirs for mine, theirs in zip(seconds, times[0], strict=True)
            )
        out.append(row)
    return out


def connector_calls(
    engine: Engine,
    model: Path,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    step: Step,
    *,
    stall: float = 5.0,
    repeats: int = 10,
) -> dict[str, Any]:
    """Milliseconds that the connector's calls hold vLLM, also with a disk that stands still.

    Args:
        engine: vLLM.
        model: folder of the model.
        folder: of the store.
        prompts: two that share nothing.
        step: told what is done.
        stall: seconds that the disk stands still: once while a stored prompt is asked for, once
            while a new one is to be stored.
        repeats: look-ups that are timed.

    Returns:
        Of each phase and method: calls, their median, 99th percentile and maximum; and of `lookup`
        the first call for each request, which asks for its whole prompt.
    """
    known, new = prompts
    ask = "get_num_new_matched_tokens"
    store = {"path": str(folder), "memory": 0}
    lookups: list[float] = []
    out: dict[str, Any] = {"prompt": len(known), "stall_seconds": stall}
    with Child(engine, model, store, time_calls=True) as child:
        child.ask(known, new=1)
        for _ in range(repeats):
            answer = child.ask(known, new=1)
            lookups.append(next(seconds for name, seconds in answer.calls if name == ask))
        out["lookup"] = _spread(lookups)
        step(f"{repeats} look-ups")
        answer = child.ask(known, new=8, stall=stall)
        out["found"] = {"cached": answer.cached, "seconds": answer.seconds, **_all(answer.calls)}
        step("asked for a stored prompt, with the disk standing still")
        answer = child.ask(new, new=64, stall=stall)
        out["stored"] = {"cached": answer.cached, "seconds": answer.seconds, **_all(answer.calls)}
        step("stored a new prompt, with the disk standing still")
    return out


def _all(calls: Sequence[tuple[str, float]]) -> dict[str, Any]:
    by_name: dict[str, list[float]] = {}
    for name, seconds in calls:
        by_name.setdefault(name, []).append(seconds)
    return {
        "all": _spread([seconds for _, seconds in calls]),
        "methods": {name: _spread(seconds) for name, seconds in sorted(by_name.items())},
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(1e3 * x for x in seconds)
    return {
        "calls": len(ordered),
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[min(math.ceil(0.99 * len(ordered)), len(ordered)) - 1],
        "max_ms": ordered[-1],
    }
