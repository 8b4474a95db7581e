# SPDX-License-Identifier: Apache-2.0
"""What runs in the background of a `KVStore`: puts and prefetches, to be waited for."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, wait
from contextlib import suppress
from functools import partial
from time import monotonic

from kvlib.errors import StoreClosedError
from kvlib.keys import StoreKey
from kvlib.store.reports import PutReport
from kvlib.store.work import Task, WorkPool

__all__ = ["Prefetch", "Put"]


class Put:
    """A `KVStore.put_async` under way.

    Args:
        task: what does it.
        report: what came of it, where it was over at once.
    """

    def __init__(self, task: Task[PutReport] | None, report: PutReport | None) -> None:
        self._task = task
        self._report = report

    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self._task is None or self._task.done()

    def result(self, timeout: float | None = None) -> PutReport:
        """Wait for the report; see `KVStore.put`.

        Args:
            timeout: seconds to wait at most; then it is a `TimeoutError`.

        Raises:
            StoreClosedError: in a forked child.
        """
        if self._task is None:
            assert self._report is not None  # noqa: S101 (one of them is given)
            return self._report
        return self._task.result(timeout)


class Prefetch:
    """A `KVStore.prefetch` under way.

    Args:
        pool: whose threads do it.
        find: finds the records to bring up, and how many blocks are stored; may read the disk.
        bring: brings a record up; whether it is there then.
        asked: blocks that were asked for.
        priority: see `kvlib.store.work.Priority`.
        deadline: `time.monotonic()` after which not to begin another read.
    """

    def __init__(
        self,
        pool: WorkPool,
        find: Callable[[], tuple[Sequence[StoreKey], int]],
        bring: Callable[[StoreKey], bool],
        *,
        asked: int,
        priority: float,
        deadline: float | None,
    ) -> None:
        self._find = find
        self._bring = bring
        self._blocks = asked
        self._cancelled = False
        self._reads: Sequence[Task[bool]] = ()
        self._submit = partial(pool.submit, priority=priority, deadline=deadline)
        self._walk: Task[None] = self._submit(self._begin)

    def _begin(self) -> None:
        keys, blocks = self._find()
        self._blocks = blocks
        if not self._cancelled:
            with suppress(StoreClosedError):
                self._reads = [self._submit(partial(self._bring, key)) for key in keys]

    @property
    def num_blocks(self) -> int:
        """Leading blocks that seem to be stored; until they were looked for, all asked for."""
        return self._blocks

    def done(self) -> bool:
        """Whether it is over."""
        return self._walk.done() and all(task.done() for task in self._reads)

    def cancel(self) -> None:
        """Give up what has not begun."""
        self._cancelled = True
        self._walk.cancel()
        for task in self._reads:
            task.cancel()

    def result(self, timeout: float | None = None) -> int:
        """Wait for it; the records that were brought up.

        Args:
            timeout: seconds to wait at most; then it counts what is done.

        Raises:
            StoreClosedError: in a forked child.
        """
        until = None if timeout is None else monotonic() + timeout
        with suppress(CancelledError, TimeoutError):
            self._walk.result(timeout)
        wait(self._reads, None if until is None else max(until - monotonic(), 0.0))
        return sum(1 for task in self._reads if task.done() and task.outcome())
