# SPDX-License-Identifier: Apache-2.0
"""Threads that take the most urgent task first, and what waits for a task.

Two queues, one for what somebody waits for (loads, prefetches) and one for what nobody does
(stores). Loads go first, the most urgent of them before the others; but after `FAIR` loads in a row
a waiting store has its turn, so neither starves. What is still in a queue can be cancelled, and
what is past its deadline when its turn comes is not begun.

A forked child has the queues but not the threads: whoever would wait there for ever is told so.
"""

import heapq
import os
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

_IDLE_S = 5.0

T = TypeVar("T")


class Priority(IntEnum):
    """How urgent a task is; smaller numbers go first."""

    DEMAND = 0
    """Somebody waits for it now."""
    PREFETCH = 10
    """Somebody may ask for it soon."""
    STORE = 20
    """Nobody waits for it."""


def _check_process(pid: int) -> None:
    """Refuse to wait in another process than this one.

    Raises:
        StoreClosedError: it was forked since.
    """
    if os.getpid() != pid:
        raise StoreClosedError(
            "this was begun before a fork, by threads that the child process does not have; open "
            "a new store there"
        )


class Task(Future[T]):
    """A `Future` with a place in the queue."""

    def __init__(self, call: Callable[[], T], deadline: float | None) -> None:
        super().__init__()
        self._call: Callable[[], T] | None = call
        self._deadline = deadline
        self._pid = os.getpid()

    def result(self, timeout: float | None = None) -> T:
        """See `Future.result`.

        Raises:
            StoreClosedError: in a forked child.
        """
        _check_process(self._pid)
        return super().result(timeout)

    def run(self) -> None:
        """Do it, unless it was cancelled or its time is over (then it counts as cancelled)."""
        if self._deadline is not None and monotonic() > self._deadline:
            self.cancel()
        call, self._call = self._call, None  # it may hold much, also when it is never made
        if not self.set_running_or_notify_cancel() or call is None:
            return
        try:
            result = call()
        except BaseException as exc:  # noqa: BLE001 (whoever waits gets it)
            self.set_exception(exc)
        else:
            self.set_result(result)

    def outcome(self) -> T | None:
        """The result once it is there; None if it was cancelled or too late."""
        try:
            return self.result()
        except CancelledError:
            return None


_Entry = tuple[float, int, float, int, Task[Any]]  # priority, number, place, when it came


class WorkPool:
    """A few threads and two queues.

    Args:
        threads: how many, at least 1.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pid = os.getpid()
        self._ready = threading.Condition()
        self._order = count()
        self._loads: list[_Entry] = []
        self._stores: list[_Entry] = []
        self._in_a_row = 0
        self._closed = False
        self._then: Callable[[], None] | None = None
        self._working = max(threads, 1)
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(self._working)
        ]
        for thread in self._threads:
            thread.start()

    def check_process(self) -> None:
        """Refuse to wait for these threads where they are not.

        Raises:
            StoreClosedError: in a forked child.
        """
        _check_process(self._pid)

    def number(self) -> int:
        """A place in the order, for several tasks of one cause; see `submit`."""
        return next(self._order)

    def submit(
        self,
        call: Callable[[], T],
        *,
        priority: float = Priority.DEMAND,
        deadline: float | None = None,
        order: tuple[int, float] | None = None,
    ) -> Task[T]:
        """Queue a call.

        Args:
            call: what to do.
            priority: see `Priority`; numbers between are allowed.
            deadline: `time.monotonic()` after which it is not begun any more.
            order: among those of equal priority, smaller ones first: a `number` and a place under
                it. None: behind all that came before.

        Raises:
            StoreClosedError: the pool is closed.
        """
        task = Task(call, deadline)
        queue = self._stores if priority >= Priority.STORE else self._loads
        with self._ready:
            if self._closed:
                raise StoreClosedError("this store is closed")
            number, place = (next(self._order), 0.0) if order is None else order
            heapq.heappush(queue, (priority, number, place, next(self._order), task))
            self._ready.notify()
        return task

    def _next(self) -> Task[Any] | None:
        """Wait for the next task; None when there will be none."""
        with self._ready:
            while not self._loads and not self._stores:
                if self._closed:
                    return None
                # `retire` may run inside of `wait`, in this very thread, and then wake all but us.
                self._ready.wait(_IDLE_S)
            if self._stores and (not self._loads or self._in_a_row >= FAIR):
                self._in_a_row = 0
                return heapq.heappop(self._stores)[-1]
            self._in_a_row += 1
            return heapq.heappop(self._loads)[-1]

    def _work(self) -> None:
        while True:
            task = self._next()
            if task is None:
                break
            task.run()
            del task
        with self._ready:
            self._working -= 1
            then = self._then if not self._working else None
        if then is not None:
            then()

    def retire(self, then: Callable[[], None]) -> None:
        """Finish what is queued and end the threads, without waiting for them.

        For a garbage collection, which may interrupt anything: it waits for nothing and empties no
        queue.

        Args:
            then: what the last thread does in the end.
        """
        with self._ready:  # reentrant
            self._then = then
            self._closed = True
            self._ready.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Finish the stores, cancel the loads, and end the threads.

        Args:
            timeout: seconds to wait for the threads at most.

        Returns:
            Whether they have ended.
        """
        with self._ready:
            self._closed = True
            loads, self._loads = self._loads, []
            self._ready.notify_all()
        for *_, task in loads:
            task.cancel()
            task.run()  # tells those that wait; the call is not made
        until = None if timeout is None else monotonic() + timeout
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(None if until is None else max(until - monotonic(), 0.0))
        return not any(
            thread.is_alive()
            for thread in self._threads
            if thread is not threading.current_thread()
        )
