# SPDX-License-Identifier: Apache-2.0
"""What a segment store's index costs: looking keys up, and opening the store again.

A store is opened after it was closed, after a process that had it open ended without closing it,
and after its index was deleted, so that all header pages are read.
"""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlib.errors import StoreError
from kvlib.store.segments import SegmentStore
from kvlib.store_bench.blocks import Blocks
from kvlib.store_bench.disk import GRANULE, Numbers, Plan, Step, spread

__all__ = ["INDEX_STEPS", "abandon", "measure_index"]

INDEX_STEPS = 5
_RECORD_BYTES = 12 << 10  # one granule with its header page
_LAYERS = 16
_LOOKUPS = 100


def abandon(path: str, capacity: int, number: int) -> None:
    """Open a store, put a record, and never close it; for a process that ends then."""
    store = SegmentStore(path, capacity=capacity, granule=GRANULE)
    blocks = Blocks(_RECORD_BYTES, _LAYERS)
    store.put(*blocks.record(number))
    store.delete(blocks.key(number))


def measure_index(
    plan: Plan, records: int, keys: int, numbers: Numbers, step: Step
) -> dict[str, Any]:
    """Lookups and restarts of a store.

    Args:
        plan: see `Plan`.
        records: in the store.
        keys: of a batch that is looked up.
        numbers: see `Numbers`.
        step: see `Step`.
    """
    path = plan.folder / "index"
    capacity = (records + 16) * GRANULE
    blocks = Blocks(_RECORD_BYTES, _LAYERS)
    mine = [next(numbers) for _ in range(records)]

    def reopened() -> float:
        """Seconds to open it; everything must be there."""
        begun = time.perf_counter()
        store = SegmentStore(path, capacity=capacity, granule=GRANULE)
        seconds = time.perf_counter() - begun
        with store:
            held = store.stats().records
        if held < records:  # an index made anew also finds what was deleted before
            raise StoreError(f"{held} of {records} records were there after a restart")
        return seconds

    def restarts(before: Callable[[], None]) -> list[float]:
        seconds = []
        for _ in range(plan.repeats):
            before()
            seconds.append(reopened())
        return seconds

    with SegmentStore(path, capacity=capacity, granule=GRANULE) as store:
        for number in mine:
            store.put(*blocks.record(number))
    step(f"{records:,} records")
    lookups = _lookups(path, capacity, blocks, mine, keys)
    step("lookups")
    clean = restarts(lambda: None)
    step("restarts")
    unclean = restarts(lambda: _abandon_elsewhere(path, capacity, next(numbers)))
    step("restarts, not closed before")
    lost = restarts(lambda: shutil.rmtree(path / "index.lmdb"))
    step("restarts without an index")
    shutil.rmtree(path)
    return {
        "records": records,
        "lookup": lookups,
        "restart_s": {
            name: spread(found)
            for name, found in (("clean", clean), ("unclean", unclean), ("index_lost", lost))
        },
    }


def _lookups(
    path: Path, capacity: int, blocks: Blocks, numbers: list[int], keys: int
) -> dict[str, Any]:
    """Microseconds a key of a batch, of keys that are there and of keys that are not."""
    draw = random.Random(1)
    there = [blocks.key(number) for number in numbers]
    absent = [blocks.key(-1 - number & 0xFFFF_FFFF_FFFF) for number in numbers]
    found = {}
    with SegmentStore(path, capacity=capacity, granule=GRANULE) as store:
        for name, some, expected in (("hit", there, True), ("miss", absent, False)):
            micros = []
            for _ in range(_LOOKUPS):
                batch = draw.choices(some, k=keys)
                begun = time.perf_counter()
                answers = store.contains_many(batch)
                micros.append((time.perf_counter() - begun) / keys * 1e6)
                if answers != [expected] * keys:
                    raise StoreError("a lookup gave a wrong answer")
            summary = spread(micros)
            del summary["all"]
            found[name] = {**summary, "p99": sorted(micros)[int(0.99 * len(micros))]}
    return {"keys": keys, "batches": _LOOKUPS, "us_per_key": found}


def _abandon_elsewhere(path: Path, capacity: int, number: int) -> None:
    code = (
        "import os, sys; from kvlib.store_bench.disk_index import abandon; "
        "abandon(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])); os._exit(0)"
    )
    command = [sys.executable, "-c", code, str(path), str(capacity), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StoreError(
            f"the process that should leave the store open failed: {done.stderr!s:.400}"
        )
