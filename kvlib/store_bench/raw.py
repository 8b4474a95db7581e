# SPDX-License-Identifier: Apache-2.0
"""The device itself: blocks read and written past the page cache, nothing around them.

This is the line that a store's speed is a share of. It is taken on the same file system, with
blocks of the same size and as many callers at a time, in turns with the store's.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvlib.store.blockio import allocate, sync

__all__ = ["Pass", "RawFile", "aligned", "at_once"]

_PIECE = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True)
class Pass:
    """One timed pass.

    Attributes:
        nbytes: moved.
        seconds: of wall time.
        cpu_s: of this process, all threads.
    """

    nbytes: int
    seconds: float
    cpu_s: float

    @classmethod
    def joined(cls, parts: Sequence["Pass"]) -> "Pass":
        """Several passes as one."""
        return cls(
            sum(p.nbytes for p in parts),
            sum(p.seconds for p in parts),
            sum(p.cpu_s for p in parts),
        )

    @property
    def mb_per_s(self) -> float:
        """Megabytes (10^6) a second."""
        return self.nbytes / max(self.seconds, 1e-9) / 1e6

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds for 10^9 bytes."""
        return self.cpu_s / max(self.nbytes, 1) * 1e9


def aligned(nbytes: int) -> memoryview:
    """Memory that O_DIRECT can reach, all of it touched."""
    memory = memoryview(mmap.mmap(-1, max(nbytes, mmap.PAGESIZE)))
    memory[:: mmap.PAGESIZE] = b"\1" * len(memory[:: mmap.PAGESIZE])
    return memory


def at_once(
    items: Iterable[Any],
    callers: int,
    start: Callable[[], Callable[[Any], int]],
    finish: Callable[[], None] = lambda: None,
) -> Pass:
    """Work through items with some callers at a time, timed.

    Args:
        items: each is taken by whoever is free.
        callers: threads.
        start: makes the function of one caller, before the clock runs; it returns bytes moved.
        finish: what belongs to it after the last one, such as a flush.

    Raises:
        BaseException: what a caller raised.
    """
    rest = iter(list(items))
    works = [start() for _ in range(callers)]
    totals: list[int] = []
    failures: list[BaseException] = []

    def call(work: Callable[[Any], int]) -> None:
        try:
            totals.append(sum(map(work, rest)))
        except BaseException as exc:  # noqa: BLE001  raised again below, in the caller's thread
            failures.append(exc)

    threads = [threading.Thread(target=call, args=(work,)) for work in works[1:]]
    cpu, begun = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    call(works[0])
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    finish()
    return Pass(sum(totals), time.perf_counter() - begun, time.process_time() - cpu)


class RawFile:
    """A file of a fixed size, written over once so that no extent is new.

    Args:
        path: made, and removed by `close`.
        nbytes: of it.

    Attributes:
        direct: whether O_DIRECT works there; without it all numbers are those of the page cache.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        piece = aligned(_PIECE)
        self.direct = bool(_DIRECT)
        try:
            self._fd = os.open(path, flags | _DIRECT, 0o600)
        except OSError:
            path.unlink(missing_ok=True)
            self.direct = False
            self._fd = os.open(path, flags, 0o600)
        allocate(self._fd, nbytes)
        for at in range(0, nbytes, _PIECE):
            os.pwritev(self._fd, [piece[: min(_PIECE, nbytes - at)]], at)
        sync(self._fd)

    def read(self, block: int, numbers: Sequence[int], callers: int) -> Pass:
        """Read blocks, by number."""
        return at_once(numbers, callers, lambda: self.reader(block))

    def write(self, block: int, numbers: Sequence[int], callers: int) -> Pass:
        """Write blocks, by number, and wait until the device has them."""
        return at_once(numbers, callers, lambda: self.writer(block), lambda: sync(self._fd))

    def reader(self, block: int) -> Callable[[int], int]:
        """A function that reads the block of a number."""
        memory = aligned(block)[:block]
        return lambda number: os.preadv(self._fd, [memory], number * block)

    def writer(self, block: int) -> Callable[[int], int]:
        """A function that writes the block of a number."""
        memory = aligned(block)[:block]
        return lambda number: os.pwritev(self._fd, [memory], number * block)

    def close(self) -> None:
        """Remove the file."""
        os.close(self._fd)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
