# SPDX-License-Identifier: Apache-2.0
"""Grids of tasks, lengths and methods, and the two that come with kvlib."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvlib.errors import ConfigError
from kvlib.evals.scoring import MODES, EvalMethod
from kvlib.evals.tasks import build_task
from kvlib.registry import describe, parse_grid, suggest

__all__ = ["PROFILES", "Cell", "Profile", "get_profile", "make_cells"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One task at one length: what is averaged.

    Attributes:
        task: with all its parameters.
        length: of a context, in tokens.
        mode: unaware or aware.
        contexts: samples 0 to this.
        methods: with all their parameters.
        probes: contexts whose methods are also timed.
    """

    task: str
    length: int
    mode: str
    contexts: int
    methods: tuple[str, ...]
    probes: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What `kvlib eval` runs.

    Attributes:
        model: see `kvlib.evals.models.load_eval_model`.
        cells: of the grid.
        dtype: of the model.
        workers: processes, each with one thread.
    """

    model: str
    cells: tuple[Cell, ...]
    dtype: str = "float32"
    workers: int = 1


def canonical_methods(text: str) -> tuple[str, ...]:
    """Methods of a grid (separated by ``;``) with every parameter, each once, in order."""
    methods = tuple(dict.fromkeys(EvalMethod.parse(str(m)).text for m in parse_grid(text)))
    if not methods:
        raise ConfigError("no methods were given")
    return methods


def make_cells(
    tasks: str,
    lengths: Sequence[int],
    methods: str,
    contexts: int,
    *,
    modes: Sequence[str] = ("unaware",),
    probes: int = 0,
) -> tuple[Cell, ...]:
    """The cells of a grid.

    Raises:
        ConfigError: a length, mode or number that means nothing, or a malformed task or method.
        UnknownPluginError: an unknown task, policy or codec.
    """
    if contexts < 1 or any(length < 1 for length in lengths):
        raise ConfigError(
            f"lengths {list(lengths)} and {contexts} contexts: 1 or more are expected"
        )
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"no mode is named {mode!r}.{suggest(mode, MODES)}")
    names = [describe(build_task(part)) for part in tasks.split(";") if part.strip()]
    if not names:
        raise ConfigError("no tasks were given")
    every = canonical_methods(methods)
    return tuple(
        Cell(task, length, mode, contexts, every, min(probes, contexts))
        for task in dict.fromkeys(names)
        for length in dict.fromkeys(lengths)
        for mode in dict.fromkeys(modes)
    )


def _grid(policies: Sequence[str]) -> str:
    budgets = [f"{policy}:budget={b}" for policy in policies for b in ("0.5", "0.25")]
    return ";".join(["full", "full | exact", "full | int4", *budgets])


def _smoke() -> Profile:
    methods = _grid(("streaming", "random", "snapkv", "h2o"))
    quarter = [f"{name}:budget=0.25" for name in ("streaming", "random", "snapkv", "h2o")]
    long = ";".join(["full", "full | exact", *quarter])
    few = "full;streaming:budget=0.25;snapkv:budget=0.25"
    return Profile(
        "recall",
        (
            *make_cells("recall:questions=25", (1001,), methods, 3, probes=1),
            *make_cells("recall:questions=15", (4001,), long, 1),
            *make_cells("recall:questions=10", (1001,), few, 2, modes=("aware",)),
        ),
    )


def _quick() -> Profile:
    methods = _grid(("streaming", "snapkv", "h2o"))
    return Profile(
        "smollm2",
        (
            *make_cells("table", (1024,), methods, 8, probes=1),
            *make_cells("records", (1024,), methods, 8),
            *make_cells("needle;labels;copy:questions=3;text", (1024,), methods, 3),
        ),
        workers=2,
    )


PROFILES = {"smoke": _smoke, "quick": _quick}
"""``smoke``: the hand-set recall model, seconds. ``quick``: SmolLM2-135M, minutes."""


def get_profile(name: str) -> Profile:
    """A profile by name.

    Raises:
        ConfigError: unknown, with the nearest names.
    """
    if name not in PROFILES:
        raise ConfigError(f"no profile is named {name!r}.{suggest(name, PROFILES)}")
    return PROFILES[name]()
