# SPDX-License-Identifier: Apache-2.0
"""All measurements of a store's disk, one after another, and the numbers as one JSON object."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from kvlib.errors import ConfigError
from kvlib.machine import environment
from kvlib.store_bench.disk import FILL, Plan, Step, blocks_steps, measure_blocks
from kvlib.store_bench.disk_index import INDEX_STEPS, measure_index
from kvlib.store_bench.disk_mixed import MIXED_STEPS, measure_mixed
from kvlib.store_bench.raw import RawFile

__all__ = ["SIZES", "TARGETS", "Effort", "plan_for", "run", "steps", "work_folder"]

SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)

TARGETS: tuple[tuple[str, str, str, int, int, float], ...] = (
    ("reads of 1 MiB or more, unverified", "read", "segment unverified", 1 << 20, 1 << 40, 0.90),
    ("reads of 1 MiB or more, verified", "read", "segment", 1 << 20, 1 << 40, 0.85),
    ("writes of 4 MiB or more", "write", "segment", 4 << 20, 1 << 40, 0.75),
    ("writes of 1 MiB", "write", "segment", 1 << 20, 1 << 20, 0.60),
)
"""Name, operation, what, sizes from and to, and the least share of the raw device's speed."""

_LOOKUP_US = 3.0
_BATCH_SHARE = 4  # of the room: the raw file, the store, files, and what churn needs
_LEAST_PER_BATCH = 4
_LEAST_BYTES = 1 << 23
_RECORDS_SHARE = 1 << 15  # bytes of the room for each record of the index


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        repeats: of each pass.
        records: in the store that is looked up and restarted, at most.
        keys: of a batch of lookups.
        reads: of each mixed load.
    """

    repeats: int = 5
    records: int = 10_000
    keys: int = 1_000
    reads: int = 400


@contextmanager
def work_folder(parent: Path, size: int) -> Iterator[Path]:
    """A folder to work in, removed after.

    Raises:
        ConfigError: it cannot be made, or has not so many bytes free.
    """
    try:
        free = shutil.disk_usage(parent).free
        if free < size:
            raise ConfigError(
                f"{parent} has {free / 2**30:.1f} GiB free; --size {size / 2**30:.1f} GiB needs "
                "that much. Give a smaller --size or another --path"
            )
        folder = Path(tempfile.mkdtemp(prefix="kvlib-bench-", dir=parent))
    except OSError as exc:
        raise ConfigError(f"cannot work in {parent}: {exc.strerror}. Give another --path") from exc
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan_for(folder: Path, size: int, effort: Effort, callers: int, layers: int) -> Plan:
    """What fits into `size` bytes.

    Raises:
        ConfigError: nothing of use does.
    """
    if size < _LEAST_BYTES:
        raise ConfigError(f"--size is at least {_LEAST_BYTES >> 20} MiB, got {size} bytes")
    batch = size // _BATCH_SHARE
    return Plan(
        folder=folder,
        batch_bytes=batch,
        sizes=tuple(x for x in SIZES if batch // x >= _LEAST_PER_BATCH),
        repeats=effort.repeats,
        callers=callers,
        layers=layers,
    )


def steps(plan: Plan) -> int:
    """How many steps `run` tells."""
    return blocks_steps(plan) + INDEX_STEPS + MIXED_STEPS


def run(plan: Plan, size: int, effort: Effort, step: Step) -> dict[str, Any]:
    """Measure everything.

    Args:
        plan: see `plan_for`.
        size: bytes the plan was made for.
        effort: see `Effort`.
        step: told what was just done.

    Raises:
        StoreError: a record that was written did not come back, or found no room.
        OSError: the device failed.
    """
    begun = time.perf_counter()
    numbers = count()
    rows = []
    with RawFile(plan.folder / "raw", plan.batch_bytes) as raw:
        for block in plan.sizes:
            rows += measure_blocks(plan, raw, block, numbers, step)
            shutil.rmtree(plan.folder / f"segment-{block}")
        mixed = measure_mixed(plan, raw, effort.reads, numbers, step)
        direct = raw.direct
    records = min(effort.records, size // _RECORDS_SHARE)
    index = measure_index(plan, records, effort.keys, numbers, step)
    return {
        "benchmark": "store",
        "schema": 1,
        "settings": {
            "size": size,
            "batch_bytes": plan.batch_bytes,
            "repeats": plan.repeats,
            "callers": plan.callers,
            "layers": plan.layers,
            "processes": 1,
            "fill": FILL,
            "direct": direct,
            "reads": "cold: past this machine's page cache, or dropped from it before",
            "writes": "to the device: flushed, and the store closed",
        },
        "environment": environment(),
        "blocks": rows,
        "index": index,
        "mixed": mixed,
        "targets": _targets(rows, index),
        "seconds": time.perf_counter() - begun,
    }


def _targets(rows: list[dict[str, Any]], index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target, the worst of what it is about, and whether that meets it."""
    found: list[dict[str, Any]] = []

    def add(name: str, wanted: float, seen: float, is_met: Callable[[float, float], bool]) -> None:
        found.append({"name": name, "wanted": wanted, "seen": seen, "met": is_met(seen, wanted)})

    for state in ("fresh", "churned"):
        for name, operation, what, least, most, wanted in TARGETS:
            shares = [
                row["of_raw"]["median"]
                for row in rows
                if (row["state"], row["operation"], row["what"]) == (state, operation, what)
                and least <= row["block_bytes"] <= most
            ]
            if shares:
                after = " after churn" if state == "churned" else ""
                add(f"{name}{after}: share of raw", wanted, min(shares), lambda a, b: a >= b)
    micros = index["lookup"]["us_per_key"]["hit"]["median"]
    add("lookup: us a key", _LOOKUP_US, micros, lambda a, b: a <= b)
    return found
