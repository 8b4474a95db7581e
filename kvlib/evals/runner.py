# SPDX-License-Identifier: Apache-2.0
"""Runs a grid: contexts are handed to workers, results are written as they come.

A unit of work is one context with the methods that have no result for it yet. The numbers of a unit
depend on nothing but the unit, so it does not matter which worker has it, what ran before, or
whether a run was killed and taken up again. Only this process writes; a worker whose parent is gone
ends at once.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from kvlib.errors import ConfigError
from kvlib.evals.models import EvalModel, load_eval_model, prepare_eval_model
from kvlib.evals.profiles import Cell
from kvlib.evals.samples import Key, SampleFile, sample_names
from kvlib.evals.scoring import EvalMethod, Scorer
from kvlib.evals.tasks import build_task, make_sample

__all__ = ["RunOptions", "Unit", "UnitScorer", "run", "units_of"]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a grid is run.

    Attributes:
        model: see `load_eval_model`.
        dtype: of the model.
        device: of torch.
        seed: of the samples.
        workers: processes; with 1 it is this one.
        stepwise: feed answers token by token.
    """

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    workers: int = 1
    stepwise: bool = False


@dataclass(frozen=True, slots=True)
class Unit:
    """A context and what is to be run on it."""

    task: str
    length: int
    mode: str
    index: int
    methods: tuple[str, ...]
    probe: bool


def _key(cell: Cell, index: int, method: str, options: RunOptions) -> Key:
    version = build_task(cell.task).version
    return Key(
        cell.task,
        version,
        cell.length,
        options.seed,
        index,
        cell.mode,
        options.stepwise,
        method,
    )


def units_of(cells: Sequence[Cell], options: RunOptions, done: set[tuple[Key, str]]) -> list[Unit]:
    """What is left to do: long contexts first, so that workers end at about the same time."""
    units = []
    every = {method for cell in cells for method in cell.methods}
    versions = {method: EvalMethod.parse(method).versions for method in every}
    for cell in cells:
        for index in range(cell.contexts):
            left = [
                method
                for method in cell.methods
                if (_key(cell, index, method, options), versions[method]) not in done
            ]
            if left:
                probe = index < cell.probes
                units.append(Unit(cell.task, cell.length, cell.mode, index, tuple(left), probe))
    return sorted(units, key=lambda unit: (-unit.length, unit.mode == "unaware"))


class UnitScorer:
    """Scores units with a loaded model.

    Args:
        loaded: the model.
        options: of the run.
    """

    def __init__(self, loaded: EvalModel, options: RunOptions) -> None:
        self._source = loaded.source
        self._scorer = Scorer(
            loaded.model,
            model_id=loaded.model_id,
            tokenizer=loaded.tokenizer,
            stepwise=options.stepwise,
        )
        self._options = options

    def score(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """Records for the samples file."""
        task = build_task(unit.task)
        sample = make_sample(task, self._source, unit.length, self._options.seed, unit.index)
        names = sample_names(task, unit.length, self._options.seed, unit.index, sample)
        methods = [EvalMethod.parse(method) for method in unit.methods]
        scored = self._scorer.score(sample, unit.mode, methods, probe=unit.probe)
        for method, found in scored:
            yield {
                "sample": names,
                "mode": unit.mode,
                "stepwise": self._options.stepwise,
                "method": method.text,
                "versions": method.versions,
                **found,
            }


def run(
    cells: Sequence[Cell],
    options: RunOptions,
    out: Path,
    *,
    on_plan: Callable[[int, int], Any] = lambda done, total: None,
    on_record: Callable[[dict[str, Any]], Any] = lambda record: None,
) -> None:
    """Run what is missing in a folder's samples.

    Args:
        cells: the grid.
        options: how.
        out: folder of the run; what it holds of this grid is not run again.
        on_plan: called once with the records that are there and all that there will be.
        on_record: called with every new record.

    Raises:
        ConfigError: the folder belongs to another model, or a worker could not start or failed.
    """
    if options.workers < 1:
        raise ConfigError(f"workers must be 1 or more, got {options.workers}")
    prepare_eval_model(options.model)
    workers = _start_workers(options)
    file: SampleFile | None = None
    try:
        header = {"model": workers[0].describe(), "kvlib": _version(), "tool": "kvlib"}
        file = SampleFile(out, header)
        done = file.done()
        units = units_of(cells, options, done)
        left = sum(len(unit.methods) for unit in units)
        total = sum(cell.contexts * len(cell.methods) for cell in cells)
        on_plan(total - left, total)
        for record in _results(workers, units):
            file.append(record)
            on_record(record)
    finally:
        for worker in workers:
            worker.stop()
        if file is not None:
            file.close()


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvlib")
    except PackageNotFoundError:
        return "not installed"


class _Here:
    """The worker that is this process."""

    def __init__(self, options: RunOptions) -> None:
        import torch

        if options.device == "cpu":
            torch.set_num_threads(1)
        self._loaded = load_eval_model(options.model, options.dtype, options.device)
        self._scorer = UnitScorer(self._loaded, options)

    def describe(self) -> dict[str, Any]:
        return self._loaded.describe()

    def score(self, unit: Unit) -> Iterator[dict[str, Any]]:
        return self._scorer.score(unit)

    def stop(self) -> None:
        pass


class _Process:
    """A worker process; see `kvlib.evals.worker` for what is said to it and by it."""

    def __init__(self, options: RunOptions) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvlib.evals.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._described: dict[str, Any] | None = None
        self._say({name: getattr(options, name) for name in RunOptions.__slots__})

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            pass  # it has ended or was stopped: reading tells

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise ConfigError(
                f"an evaluation worker ended with status {self._process.wait()}; what it printed "
                "is above. Results so far are kept: run the same command again to go on"
            )
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError as exc:
            raise ConfigError(f"an evaluation worker said {line[:80]!r}: no message") from exc
        if "error" in message:
            raise ConfigError(message["error"])
        return message

    def describe(self) -> dict[str, Any]:
        if self._described is None:
            self._described = self._hear()["model"]
        return self._described

    def score(self, unit: Unit) -> Iterator[dict[str, Any]]:
        self.describe()  # it is ready
        self._say({name: getattr(unit, name) for name in Unit.__slots__})
        while "record" in (message := self._hear()):
            yield message["record"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _start_workers(options: RunOptions) -> "list[_Here | _Process]":
    if options.workers == 1:
        return [_Here(options)]
    workers: list[_Here | _Process] = []
    try:
        workers += [_Process(options) for _ in range(options.workers)]
        workers[0].describe()
    except BaseException:
        for worker in workers:
            worker.stop()
        raise
    return workers


def _results(
    workers: "Sequence[_Here | _Process]", units: Sequence[Unit]
) -> Iterator[dict[str, Any]]:
    """Records of all units as they come; the first error of a worker ends it."""
    if len(workers) == 1:
        for unit in units:
            yield from workers[0].score(unit)
        return
    waiting: SimpleQueue[Unit] = SimpleQueue()
    for unit in units:
        waiting.put(unit)
    said: SimpleQueue[dict[str, Any] | BaseException | None] = SimpleQueue()

    def serve(worker: "_Here | _Process") -> None:
        try:
            while True:
                for record in worker.score(waiting.get_nowait()):
                    said.put(record)
        except Empty:
            said.put(None)
        except BaseException as exc:  # noqa: BLE001  # raised where the results are awaited
            said.put(exc)

    for worker in workers:
        threading.Thread(target=serve, args=(worker,), daemon=True).start()
    busy = len(workers)
    while busy:
        message = said.get()
        if isinstance(message, BaseException):
            raise message
        if message is None:
            busy -= 1
        else:
            yield message
