# SPDX-License-Identifier: Apache-2.0
"""What runs in the background of a `KVStore`: puts and prefetches, to be waited for."""

from collections.abc import Sequence
from concurrent.futures import wait

from kvlib.store.reports import PutReport
from kvlib.store.work import Task

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
        """
        if self._task is None:
            assert self._report is not None  # noqa: S101 (one of them is given)
            return self._report
        return self._task.result(timeout)


class Prefetch:
    """A `KVStore.prefetch` under way.

    Args:
        num_blocks: blocks that are stored.
        tasks: one for each record that is to be read.

    Attributes:
        num_blocks: leading blocks that seemed to be stored when it began.
    """

    def __init__(self, num_blocks: int, tasks: Sequence[Task[bool]]) -> None:
        self.num_blocks = num_blocks
        self._tasks = tasks

    def done(self) -> bool:
        """Whether it is over."""
        return all(task.done() for task in self._tasks)

    def cancel(self) -> None:
        """Give up what has not begun."""
        for task in self._tasks:
            task.cancel()

    def result(self, timeout: float | None = None) -> int:
        """Wait for it; the records that were brought up.

        Args:
            timeout: seconds to wait at most; then it counts what is done.
        """
        wait(self._tasks, timeout)
        return sum(1 for task in self._tasks if task.done() and task.outcome())
