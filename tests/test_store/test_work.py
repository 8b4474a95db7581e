# SPDX-License-Identifier: Apache-2.0
import threading
import time
from concurrent.futures import CancelledError

import pytest

from kvlib.errors import StoreClosedError
from kvlib.store.work import FAIR, Priority, WorkPool


@pytest.fixture
def held():
    """A pool of one thread, which a task holds until `go` is set."""
    pool = WorkPool(1, "test")
    go, begun = threading.Event(), threading.Event()

    def hold():
        begun.set()
        go.wait(10)

    pool.submit(hold)
    assert begun.wait(10)
    yield pool, go
    go.set()
    pool.close()


def test_the_most_urgent_goes_first(held):
    pool, go = held
    seen = []
    wanted = [Priority.PREFETCH, Priority.DEMAND, 3.5, Priority.DEMAND]
    tasks = [pool.submit(lambda i=i: seen.append(i), priority=p) for i, p in enumerate(wanted)]
    go.set()
    for task in tasks:
        task.result(10)
    assert seen == [1, 3, 2, 0]


def test_stores_wait_but_do_not_starve(held):
    pool, go = held
    seen = []
    tasks = [pool.submit(lambda: seen.append("store"), priority=Priority.STORE)]
    tasks += [pool.submit(lambda: seen.append("load")) for _ in range(2 * FAIR)]
    go.set()
    for task in tasks:
        task.result(10)
    # The task that held the thread was the first load in a row.
    assert seen.index("store") == FAIR - 1


def test_cancelled_and_late_tasks_are_not_begun(held):
    pool, go = held
    seen = []
    cancelled = pool.submit(lambda: seen.append("cancelled"))
    late = pool.submit(lambda: seen.append("late"), deadline=time.monotonic())
    fine = pool.submit(lambda: seen.append("fine"), deadline=time.monotonic() + 60)
    assert cancelled.cancel()
    time.sleep(0.001)
    go.set()
    fine.result(10)
    assert seen == ["fine"]
    assert cancelled.outcome() is None
    assert late.outcome() is None
    with pytest.raises(CancelledError):
        late.result()


def test_errors_reach_who_waits():
    pool = WorkPool(2, "test")
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result(10)
    assert pool.submit(lambda: 7).outcome() == 7
    pool.close()


def test_closing_finishes_stores_and_cancels_loads(held):
    pool, go = held
    seen = []
    store = pool.submit(lambda: seen.append("store"), priority=Priority.STORE)
    load = pool.submit(lambda: seen.append("load"))
    threading.Timer(0.05, go.set).start()
    pool.close()
    assert seen == ["store"]
    assert store.done()
    assert load.cancelled()
    with pytest.raises(StoreClosedError):
        pool.submit(lambda: None)
