# SPDX-License-Identifier: Apache-2.0
"""Writing and reading records of one size, against the raw device, before and after churn.

Every repetition times the raw device and the stores in turns (reads a slice of their bytes at a
time), and a ratio is taken within its repetition, so that a machine that is slow for a while is
slow for both.
Writes end when everything is on the device and the store is closed. Reads are in random order, each
block once, and cold: past the page cache of this machine, or dropped from it before (what lies
below, such as a hypervisor, may be warm).
"""

import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from kvlib.errors import StoreError
from kvlib.store.blockio import sync
from kvlib.store.fileio import READ
from kvlib.store.files import FileStore
from kvlib.store.segment_format import granules_of
from kvlib.store.segment_read import Verify
from kvlib.store.segments import SegmentStore
from kvlib.store.tier import Tier
from kvlib.store_bench.blocks import Blocks
from kvlib.store_bench.raw import Pass, RawFile, aligned, at_once

if TYPE_CHECKING:
    from itertools import count

__all__ = ["FILL", "GRANULE", "Numbers", "Plan", "blocks_steps", "measure_blocks", "spread"]

FILL = 0.9
GRANULE = 1 << 14
"""Of a store of 16 GiB, which these stores are small stand-ins of."""

_CHURN = 3
_SLICE_BYTES = 1 << 27
"""A disk's speed may change within a second: no turn is longer than it takes to move these."""

_ORDER = {"raw": 0, "segment": 1, "segment unverified": 2, "file": 3}  # of the rows
_VARIANTS = (0.5, 1.0, 1.5)
_FILE_SHARE = 4  # the file tier gets a share of the records: an unlink may take milliseconds
_MOST_FILES = 512

Step = Callable[[str], None]
"""Told what was just done."""

_Way: TypeAlias = "Callable[[list[tuple[Blocks, int]], list[int]], Pass]"
"""Times what some records, or as many blocks of the raw file at places, take."""

Numbers: TypeAlias = "count[int]"
"""Gives each record a number of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        folder: to work in.
        batch_bytes: of the records of one pass.
        sizes: bytes of a record.
        repeats: of each measurement, after one that is not kept.
        callers: threads that read or write at a time.
        layers: of each record, which has two sections a layer.
    """

    folder: Path
    batch_bytes: int
    sizes: tuple[int, ...]
    repeats: int
    callers: int
    layers: int


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most, and all."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def blocks_steps(plan: Plan) -> int:
    """How many steps `measure_blocks` tells, for all sizes."""
    return len(plan.sizes) * (2 * (plan.repeats + 1) + 1)


def measure_blocks(
    plan: Plan, raw: RawFile, size: int, numbers: Numbers, step: Step
) -> list[dict[str, Any]]:
    """Rows for records of one size: raw, segment and file tier; fresh and after churn."""
    run = _Blocks(plan, raw, size, numbers)
    taken = _Taken("fresh", size)
    for turn in range(plan.repeats + 1):  # the first one writes to extents that are new
        run.fresh(taken if turn else _Taken("", size))
        if turn <= min(2, plan.repeats):
            run.files(taken if turn else _Taken("", size))
        step(f"{size >> 10:,} KiB")
    rows = taken.rows()
    run.churn(_CHURN)
    step(f"{size >> 10:,} KiB, {_CHURN}x churn")
    taken = _Taken("churned", size)
    for turn in range(plan.repeats + 1):
        run.churned(taken if turn else _Taken("", size))
        step(f"{size >> 10:,} KiB after churn")
    return rows + taken.rows()


class _Taken:
    """The passes of one state, by operation and by what did it, in order of repetition."""

    def __init__(self, state: str, size: int) -> None:
        self._state, self._size = state, size
        self._passes: dict[tuple[str, str], list[Pass]] = {}

    def add(self, operation: str, what: str, taken: Pass) -> None:
        self._passes.setdefault((operation, what), []).append(taken)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for operation, what in sorted(self._passes, key=lambda x: (x[0] == "read", _ORDER[x[1]])):
            passes = self._passes[operation, what]
            raw = self._passes[operation, "raw"]
            shares = [p.mb_per_s / r.mb_per_s for p, r in zip(passes, raw, strict=False)]
            rows.append(
                {
                    "state": self._state,
                    "block_bytes": self._size,
                    "operation": operation,
                    "what": what,
                    "mb_per_s": spread([p.mb_per_s for p in passes]),
                    "of_raw": spread(shares),
                    "cpu_s_per_gb": statistics.median(p.cpu_s_per_gb for p in passes),
                    "pass_bytes": passes[-1].nbytes,
                }
            )
        return rows


def _writer(tier: Tier) -> Callable[[tuple[Blocks, int]], int]:
    def write(item: tuple[Blocks, int]) -> int:
        blocks, number = item
        if not tier.put(*blocks.record(number)):
            raise StoreError("a record found no room: the disk is full, or failed")
        return blocks.nbytes

    return write


def _reader(tier: Tier, most: int) -> Callable[[tuple[Blocks, int]], int]:
    memory = aligned(most)

    def read(item: tuple[Blocks, int]) -> int:
        blocks, number = item
        if tier.get_into(blocks.key(number), memory) != blocks.nbytes:
            raise StoreError("a record that was written did not come back")
        return blocks.nbytes

    return read


class _Blocks:
    """A segment store with records of one size, and what it is compared with."""

    def __init__(self, plan: Plan, raw: RawFile, size: int, numbers: Numbers) -> None:
        self._plan, self._raw, self._size, self._numbers = plan, raw, size, numbers
        self._count = max(1, plan.batch_bytes // size)
        self._variants = [Blocks(int(size * x), plan.layers) for x in _VARIANTS]
        self._blocks = self._variants[1]
        self._path = plan.folder / f"segment-{size}"
        used = self._count * self._physical(self._blocks)
        self._capacity = int(used / FILL) + 2 * GRANULE  # of the segment files
        self._full = self._capacity  # what the store may hold of that; less, once it is churned
        self._live: list[tuple[Blocks, int]] = []
        self._draw = random.Random(size)

    @staticmethod
    def _physical(blocks: Blocks) -> int:
        return granules_of(blocks.nbytes, GRANULE) * GRANULE

    def _open(self, verify: Verify = "always") -> SegmentStore:
        return SegmentStore(self._path, capacity=self._full, granule=GRANULE, verify=verify)

    def _new(self, blocks: Blocks, how_many: int) -> list[tuple[Blocks, int]]:
        return [(blocks, next(self._numbers)) for _ in range(how_many)]

    # -- passes

    def _in_turns(
        self,
        taken: _Taken,
        operation: str,
        items: list[tuple[Blocks, int]],
        ways: dict[str, _Way],
        slices: int = 1,
    ) -> None:
        """Time each way with all items, and as many places of the raw file, slice by slice."""
        places = list(range(self._count))
        self._draw.shuffle(places)
        slices = max(1, min(len(items), slices))
        passes: dict[str, list[Pass]] = {what: [] for what in ways}
        for i in range(slices):
            part = slice(i, len(items), slices)
            order = list(ways)
            self._draw.shuffle(order)
            for what in order:
                passes[what].append(ways[what](items[part], places[part]))
        for what, parts in passes.items():
            taken.add(operation, what, Pass.joined(parts))

    def _write(self, taken: _Taken, items: list[tuple[Blocks, int]]) -> None:
        """Time writing `items` to an open store, which is closed after."""
        callers = self._plan.callers

        def segment(some: list[tuple[Blocks, int]], _: list[int]) -> Pass:
            store = self._open()
            return at_once(some, callers, lambda: _writer(store), store.close)

        def raw(_: list[tuple[Blocks, int]], places: list[int]) -> Pass:
            return self._raw.write(self._size, places, callers)

        self._in_turns(taken, "write", items, {"raw": raw, "segment": segment})
        self._live += items

    def _read(self, taken: _Taken, items: list[tuple[Blocks, int]]) -> None:
        callers = self._plan.callers

        def segment(verify: Verify, some: list[tuple[Blocks, int]], _: list[int]) -> Pass:
            with self._open(verify) as store:
                return at_once(some, callers, lambda: _reader(store, self._size))

        def raw(_: list[tuple[Blocks, int]], places: list[int]) -> Pass:
            return self._raw.read(self._size, places, callers)

        self._draw.shuffle(items)
        ways: dict[str, _Way] = {
            "raw": raw,
            "segment": partial(segment, "always"),
            "segment unverified": partial(segment, "never"),
        }
        slices = self._plan.batch_bytes // _SLICE_BYTES  # not of writes: each would have its flush
        self._in_turns(taken, "read", items, ways, slices)

    def fresh(self, taken: _Taken) -> None:
        """Write a batch into an empty store and read it."""
        with self._open() as store:
            self._delete(store, len(self._live))
        self._write(taken, self._new(self._blocks, self._count))
        self._read(taken, list(self._live))

    def files(self, taken: _Taken) -> None:
        """The same with the file tier, some of the records."""
        items = self._new(self._blocks, max(1, min(_MOST_FILES, self._count // _FILE_SHARE)))
        folder = self._plan.folder / "file"
        with FileStore(folder) as store:

            def flush() -> None:
                for blocks, number in items:
                    name = blocks.key(number).to_bytes().hex()
                    _flush(folder / name[:2] / f"{name}.kvlc")

            callers = self._plan.callers
            taken.add("write", "file", at_once(items, callers, lambda: _writer(store), flush))
            flush()  # now clean, so that they leave the page cache
            self._draw.shuffle(items)
            taken.add("read", "file", at_once(items, callers, lambda: _reader(store, self._size)))
            for blocks, number in items:
                store.delete(blocks.key(number))

    # -- churn

    def _delete(self, store: SegmentStore, how_many: int) -> None:
        """Delete records at random."""
        for _ in range(min(how_many, len(self._live))):
            i = self._draw.randrange(len(self._live))
            self._live[i], self._live[-1] = self._live[-1], self._live[i]
            blocks, number = self._live.pop()
            store.delete(blocks.key(number))

    def churn(self, times: int) -> None:
        """Rewrite the store, 90 % full, with records of varied sizes, deleting at random."""
        self._full = int(FILL * self._capacity)
        with self._open() as store:
            written = 0
            write = _writer(store)
            while written < times * self._full:
                blocks = self._draw.choice(self._variants)
                room = self._physical(blocks)
                while store.stats().used_bytes + room > self._full and self._live:
                    self._delete(store, 1)
                item = (blocks, next(self._numbers))
                write(item)
                self._live.append(item)
                written += room

    def churned(self, taken: _Taken) -> None:
        """Write into what churn left, each put evicting what it needs, and read that."""
        items = self._new(self._blocks, max(1, int(FILL * self._count)))
        self._write(taken, items)
        self._read(taken, items)
        self.churn(1)


def _flush(path: Path) -> None:
    """Bring a file to the device and let the page cache forget it."""
    fd = os.open(path, READ)
    try:
        sync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
