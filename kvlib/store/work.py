# SPDX-License-Identifier: Apache-2.0
"""Threads that take the most urgent task first, and what waits for a task.

Two queues, one for what somebody waits for (loads, prefetches) and one for what nobody does
(stores). Loads go first, the most urgent of them before the others; but after `FAIR` loads in a row
a waiting store has its turn, so neither starves. What is still in a queue can be cancelled, and
what is past its deadline when its turn comes is not begun.
"""

import heapq
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from enum import IntEnum
from itertools import count
from time import monotonic
from typing import Any, TypeVar

from kvlib.errors import StoreClosedError

__all__ = ["FAIR", "Priority", "Task", "WorkPool"]

FAIR = 8
"""Loads in a row before a waiting store has its turn."""

T = TypeVar("T")


class Priority(IntEnum):
    """How urgent a task is; smaller numbers go first."""

    DEMAND = 0
    """Somebody waits for it now."""
    PREFETCH = 10
    """Somebody may ask for it soon."""
    STORE = 20
    """Nobody waits for it."""


class Task(Future[T]):
    """A `Future` with a place in the queue."""

    def __init__(self, call: Callable[[], T], deadline: float | None) -> None:
        super().__init__()
        self._call = call
        self._deadline = deadline

    def run(self) -> None:
        """Do it, unless it was cancelled or its time is over (then it counts as cancelled)."""
        if self._deadline is not None and monotonic() > self._deadline:
            self.cancel()
        if not self.set_running_or_notify_cancel():
            return
        try:
            result = self._call()
        except BaseException as exc:  # noqa: BLE001 (whoever waits gets it)
            self.set_exception(exc)
        else:
            self.set_result(result)
        finally:
            del self._call  # and what it holds

    def outcome(self) -> T | None:
        """The result once it is there; None if it was cancelled or too late."""
        try:
            return self.result()
        except CancelledError:
            return None


class WorkPool:
    """A few threads and two queues.

    Args:
        threads: how many, at least 1.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._ready = threading.Condition()
        self._order = count()
        self._loads: list[tuple[float, int, Task[Any]]] = []
        self._stores: list[tuple[float, int, Task[Any]]] = []
        self._in_a_row = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(max(threads, 1))
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        call: Callable[[], T],
        *,
        priority: float = Priority.DEMAND,
        deadline: float | None = None,
    ) -> Task[T]:
        """Queue a call.

        Args:
            call: what to do.
            priority: see `Priority`; numbers between are allowed. Equal ones go in order.
            deadline: `time.monotonic()` after which it is not begun any more.

        Raises:
            StoreClosedError: the pool is closed.
        """
        task = Task(call, deadline)
        queue = self._stores if priority >= Priority.STORE else self._loads
        with self._ready:
            if self._closed:
                raise StoreClosedError("this store is closed")
            heapq.heappush(queue, (priority, next(self._order), task))
            self._ready.notify()
        return task

    def _next(self) -> Task[Any] | None:
        """Wait for the next task; None when there will be none."""
        with self._ready:
            while not self._loads and not self._stores:
                if self._closed:
                    return None
                self._ready.wait()
            if self._stores and (not self._loads or self._in_a_row >= FAIR):
                self._in_a_row = 0
                return heapq.heappop(self._stores)[2]
            self._in_a_row += 1
            return heapq.heappop(self._loads)[2]

    def _work(self) -> None:
        while True:
            task = self._next()
            if task is None:
                return
            task.run()
            del task

    def close(self) -> None:
        """Finish the stores, cancel the loads, and end the threads."""
        with self._ready:
            self._closed = True
            loads, self._loads = self._loads, []
            self._ready.notify_all()
        for _, _, task in loads:
            task.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
