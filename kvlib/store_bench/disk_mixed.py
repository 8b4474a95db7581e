# SPDX-License-Identifier: Apache-2.0
"""Reads somebody waits for while something else is written: what a flush does to their latency."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from kvlib.errors import StoreError
from kvlib.store.segment_format import granules_of
from kvlib.store.segments import SegmentStore
from kvlib.store_bench.blocks import Blocks
from kvlib.store_bench.disk import GRANULE, Numbers, Plan, Step
from kvlib.store_bench.raw import RawFile, aligned

__all__ = ["MIXED_STEPS", "measure_mixed"]

MIXED_STEPS = 4
_READ_BYTES = 1 << 20
_WRITE_BYTES = 4 << 20
_WRITTEN = 8  # records of the writer that the store has at a time


def measure_mixed(
    plan: Plan, raw: RawFile, reads: int, numbers: Numbers, step: Step
) -> dict[str, Any]:
    """Latency of single reads, alone and beside one writer: of the store, and of the raw device.

    Args:
        plan: see `Plan`.
        raw: on the same file system.
        reads: of each of the four.
        numbers: see `Numbers`.
        step: see `Step`.
    """
    small, large = Blocks(_READ_BYTES, plan.layers), Blocks(_WRITE_BYTES, plan.layers)
    held = max(4, plan.batch_bytes // 2 // _READ_BYTES)
    granules = held * granules_of(small.nbytes, GRANULE)
    granules += (_WRITTEN + 1) * granules_of(large.nbytes, GRANULE)
    mine = [next(numbers) for _ in range(held)]
    draw = random.Random(2)
    memory = aligned(_READ_BYTES)
    path = plan.folder / "mixed"
    with SegmentStore(path, capacity=granules * GRANULE, granule=GRANULE) as store:
        for number in mine:
            store.put(*small.record(number))

        def read() -> None:
            if store.get_into(small.key(draw.choice(mine)), memory) != small.nbytes:
                raise StoreError("a record that was written did not come back")

        written: list[int] = []

        def write() -> None:
            if len(written) == _WRITTEN:
                store.delete(large.key(written.pop(0)))
            written.append(next(numbers))
            store.put(*large.record(written[-1]))

        segment = _alone_and_beside(read, write, large.nbytes, reads, step)
    blocks = raw.nbytes // _READ_BYTES
    raw_read = raw.reader(_READ_BYTES)
    raw_write = raw.writer(_WRITE_BYTES)
    places = count()
    device = _alone_and_beside(
        lambda: raw_read(draw.randrange(blocks)),
        lambda: raw_write(next(places) % max(1, raw.nbytes // _WRITE_BYTES)),
        _WRITE_BYTES,
        reads,
        step,
    )
    return {
        "read_bytes": _READ_BYTES,
        "write_bytes": _WRITE_BYTES,
        "reads": reads,
        "segment": segment,
        "raw": device,
    }


def _alone_and_beside(
    read: Callable[[], object],
    write: Callable[[], object],
    write_bytes: int,
    reads: int,
    step: Step,
) -> dict[str, Any]:
    alone = _latencies(read, reads)
    step("reads alone")
    with _in_background(write) as done:
        begun = time.perf_counter()
        beside = _latencies(read, reads)
        seconds = time.perf_counter() - begun
        writes = len(done)
    step("reads beside a writer")
    return {
        "alone_ms": alone,
        "beside_writer_ms": beside,
        "written_mb_per_s": writes * write_bytes / seconds / 1e6,
    }


def _latencies(read: Callable[[], object], reads: int) -> dict[str, float]:
    found = []
    for _ in range(reads):
        begun = time.perf_counter()
        read()
        found.append((time.perf_counter() - begun) * 1e3)
    found.sort()
    return {
        name: found[min(len(found) - 1, int(share * len(found)))]
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }


@contextmanager
def _in_background(work: Callable[[], object]) -> Iterator[list[None]]:
    """Repeat something in a thread; what is yielded grows by an item with each."""
    stop = threading.Event()
    done: list[None] = []

    def go() -> None:
        while not stop.is_set():
            work()
            done.append(None)

    thread = threading.Thread(target=go, name="kvlib-bench-writer")
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
