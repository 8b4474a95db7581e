# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment: what it does to a segment store, tried hundreds of times.

Each trial forks a few processes that open one store and put, read and delete records known
beforehand; after a random time some or all of them are killed. Those that were left alone must end
in order. Then a new process opens the store and looks at everything in it. Now and then the index
is cut off or deleted before that, too.

The parent never opens the store and imports neither NumPy nor torch: forking it is cheap.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvlib.keys import StoreKey
from kvlib.store.segment_accounts import Account
from kvlib.store.segments import SegmentStore
from kvlib.store.terms import NO_TERMS, Terms
from kvlib.testing.records import make_record

__all__ = ["KillReport", "kill_trials"]

Record = tuple[StoreKey, bytes]

_CAPACITY = 60 * 4096
_QUOTA = 20 * 4096
_TERMS = (
    NO_TERMS,
    Terms(ttl=3600.0, tenant=b"tenant 1", quota=_QUOTA),
    Terms(ttl=0.002, tenant=b"tenant 2", quota=_QUOTA),
)
_WRONG, _FAILED = 3, 4
_PATIENCE_S = 60.0


@dataclass(slots=True)
class KillReport:
    """What `kill_trials` saw.

    Attributes:
        trials: openings that followed a kill.
        killed: processes killed.
        survivors: processes left alone, that ended in order.
        records: records found and compared, over all trials.
        damaged: trials in which the index was damaged as well.
        failures: a line for everything that must not happen; empty if all is well.
    """

    trials: int = 0
    killed: int = 0
    survivors: int = 0
    records: int = 0
    damaged: int = 0
    failures: list[str] = field(default_factory=list)


def _records() -> list[Record]:
    sizes = [0, 50, 2000, 3700, 4000, 8000, 30_000]
    made = (make_record(seed, size=sizes[seed % len(sizes)] + seed) for seed in range(42))
    return [(key, b"".join(parts)) for key, parts in made]


def _read(store: SegmentStore, key: StoreKey) -> bytes | None:
    size = store.size(key)
    buffer = bytearray(size or 0)
    return None if size is None or store.get_into(key, buffer) is None else bytes(buffer)


def _work(folder: Path, records: Sequence[Record], seed: int, stop: float) -> int:
    """Use the store until `stop`; an exit status."""
    choose = random.Random(seed)
    writes = choose.choice((0.0, 0.5, 0.9))
    time.sleep(choose.uniform(0, 0.01))
    while time.monotonic() < stop:
        with SegmentStore(folder, capacity=_CAPACITY, direct=choose.random() < 0.8) as store:
            until = min(stop, time.monotonic() + choose.choice((0.005, 1.0)))
            while time.monotonic() < until:
                key, want = choose.choice(records)
                if choose.random() >= writes:
                    if _read(store, key) not in (None, want):
                        return _WRONG
                elif choose.random() < 0.85:
                    store.put(key, [want[:100], want[100:]], choose.choice(_TERMS))
                else:
                    store.delete(key)
    return 0


def _look(folder: Path, records: Sequence[Record], report: int, *, whole: bool) -> int:
    """Open the store and compare everything; an exit status."""
    with SegmentStore(folder, capacity=_CAPACITY) as store:
        found = 0
        for key, want in records:
            got = _read(store, key)
            found += got is not None
            if got not in (None, want):
                return _WRONG
        problems = store.check(repair=not whole)
        stats = store.stats()
        used = stats.used_bytes
        if whole and (stats.corrupt or not problems.ok):
            raise AssertionError(f"{stats.corrupt} corrupt records, {problems}")
        if used > _CAPACITY or not store.check().ok:
            raise AssertionError(f"{used} bytes of {_CAPACITY}, {store.check()}")
        for terms in _TERMS[1:]:
            if not whole:  # what had made room was found again
                store.trim(_QUOTA, terms.tenant)
            if store._room.limits()[1].get(terms.tenant, Account()).used * 4096 > _QUOTA:
                raise AssertionError(f"a tenant holds more than {_QUOTA} bytes")
        key, want = records[0]
        if not store.put(key, [want]) or _read(store, key) != want:
            raise AssertionError("a put after the kill did not work")
    os.write(report, found.to_bytes(2, "little"))
    return 0


def _fork(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = _FAILED
    try:
        status = work()
    except BaseException:  # noqa: BLE001  a child's only way out
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(status)


def _end(pid: int) -> int:
    """Wait for a child; its exit status, negative for a signal."""
    limit = time.monotonic() + _PATIENCE_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            os.kill(pid, signal.SIGABRT)
            os.waitpid(pid, 0)
            return -signal.SIGALRM
        time.sleep(0.0005)


def kill_trials(folder: Path, trials: int, *, seed: int = 0) -> KillReport:
    """Kill users of a store in `folder` and look what is left, `trials` times.

    Args:
        folder: an empty or missing folder on the file system to be tried.
        trials: how often.
        seed: of all choices; the moments of the kills depend on the machine, too.
    """
    choose = random.Random(seed)
    records = _records()
    report = KillReport()
    reader, writer = os.pipe()
    try:
        for trial in range(trials):
            count = choose.choice((1, 1, 2, 3))
            num_doomed = count if choose.random() < 0.7 else 1
            stop = time.monotonic() + 0.06
            pids = []
            for i in range(
                count
            ):  # who is to be killed does not end before, however slow forks are
                until = stop + _PATIENCE_S if i < num_doomed else stop
                pids.append(_fork(partial(_work, folder, records, 10 * trial + i, until)))
            doomed = set(pids[:num_doomed])
            time.sleep(choose.uniform(0.001, 0.045))
            for pid in pids:
                if pid in doomed:
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                status = _end(pid)
                if pid not in doomed and status == 0:
                    report.survivors += 1
                elif pid in doomed and status in (0, -signal.SIGKILL):
                    report.killed += status != 0
                else:
                    report.failures.append(f"trial {trial}: a worker ended with {status}")
            whole = True
            data = folder / "index.lmdb" / "data.mdb"
            if trial % 10 == 9 and data.exists():
                whole = False
                report.damaged += 1
                if choose.random() < 0.5:
                    shutil.rmtree(data.parent)
                else:
                    os.truncate(data, choose.randrange(data.stat().st_size + 1))
            look = _fork(partial(_look, folder, records, writer, whole=whole))
            status = _end(look)
            report.trials += 1
            if status:
                report.failures.append(f"trial {trial}: the look at it ended with {status}")
            else:
                report.records += int.from_bytes(os.read(reader, 2), "little")
    finally:
        os.close(reader)
        os.close(writer)
    return report
