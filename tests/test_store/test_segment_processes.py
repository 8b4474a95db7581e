# SPDX-License-Identifier: Apache-2.0
"""Several processes on one folder, and kill -9 at any moment."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvlib.store import blockio
from kvlib.store.segments import SegmentStore
from kvlib.testing.kills import kill_trials
from kvlib.testing.records import make_record
from kvlib.testing.tiers import read

PAGE = 4096
CAPACITY = 60 * PAGE
TRIALS = int(os.environ.get("KVLIB_KILL_TRIALS", "500"))
LOG = logging.getLogger(__name__)


def whole(record) -> bytes:
    return b"".join(record[1])


def test_killed_users_leave_a_whole_store(tmp_path):
    """After kill -9 at any moment, of writers and readers: every open works, every record is exact
    or gone, the accounts add up, and those left alone went on.
    """
    report = kill_trials(tmp_path / "kv", TRIALS)
    LOG.info("%s", report)
    assert report.failures == []
    assert report.trials == TRIALS
    assert report.killed >= TRIALS
    assert report.survivors > 0
    assert report.damaged > 0
    assert report.records > TRIALS // 2  # 299 of 300 were seen on a busy disk


def test_the_harness_sees_wrong_bytes(tmp_path, monkeypatch):
    """Without checksums and with a writer that lies, the trials fail: the harness has teeth."""
    from kvlib.store.segment_io import RecordIO

    inner = RecordIO.write

    def lying(self, entry, header, views):
        return inner(self, entry, header, [memoryview(bytes(view)[::-1]) for view in views])

    monkeypatch.setattr(RecordIO, "write", lying)
    monkeypatch.setattr("kvlib.store.segment_read._Arriving.landed", lambda self, stop: None)
    assert kill_trials(tmp_path / "kv", 5).failures != []


USER = """
import json, random, sys, time
from kvlib.store.segments import SegmentStore
from kvlib.testing.records import make_record
from kvlib.testing.tiers import read
folder, seed, capacity = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
seconds = float(sys.argv[4])
choose = random.Random(seed)
records = [make_record(n, size=150 * n) for n in range(60)]
most = hits = foreign = 0
mine = set()
with SegmentStore(folder, capacity=capacity) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        key, parts = choose.choice(records)
        action = choose.random()
        if action < 0.4:
            if store.put(key, parts):
                mine.add(key)
        elif action < 0.5:
            store.delete(key)
            mine.discard(key)
        else:
            got = read(store, key)
            assert got in (None, b"".join(parts)), "wrong bytes"
            hits += got is not None
            foreign += got is not None and key not in mine
        most = max(most, store.stats().used_bytes)
    stats = store.stats()
    print(json.dumps([most, hits, foreign, stats.corrupt, stats.errors, stats.evicted]), flush=True)
"""


def start(folder: Path, count: int, seconds: float) -> list[subprocess.Popen]:
    users = []
    for seed in range(count):
        command = [sys.executable, "-c", USER, folder, str(seed), str(CAPACITY), str(seconds)]
        users.append(
            subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for user in users:
        assert user.stdout.readline() == "ready\n"
    for user in users:
        user.stdin.write("go\n")
        user.stdin.flush()
    return users


def results(users: list[subprocess.Popen]) -> list[list[int]]:
    found = []
    for user in users:
        out, _ = user.communicate(timeout=60)
        assert user.returncode == 0
        found.append(json.loads(out))
    return found


def test_three_processes_share_a_folder_and_its_capacity(tmp_path):
    """Each finds what the others stored; together they never exceed the capacity; nothing lies."""
    users = start(tmp_path / "kv", 3, 2.0)
    for most, hits, foreign, corrupt, errors, evicted in results(users):
        assert most <= CAPACITY
        assert hits > 0
        assert foreign > 0
        assert (corrupt, errors) == (0, 0)
        assert evicted > 0
    with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as store:
        assert not store._home.rebuilt
        assert store.check().ok
        assert store.stats().used_bytes <= CAPACITY


def test_a_stopped_process_stops_nobody(tmp_path):
    """One that is suspended and one that is killed leave the third one working."""
    users = start(tmp_path / "kv", 3, 3.0)
    users[0].send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    users[1].kill()
    users[1].communicate()
    most, hits, _, corrupt, _, _ = results(users[2:])[0]
    assert corrupt == 0  # its puts fail while the suspended one holds the index: those are errors
    assert most <= CAPACITY
    assert hits > 0
    users[0].send_signal(signal.SIGCONT)
    assert results(users[:1])[0][3] == 0
    with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as store:
        assert store.check().ok


def test_two_open_stores_find_each_other_s_records(tmp_path):
    """In one process, too: what one writes or deletes, the other finds or misses."""
    record = make_record(1)
    key = record[0]
    with (
        SegmentStore(tmp_path / "kv", capacity=CAPACITY) as one,
        SegmentStore(tmp_path / "kv", capacity=CAPACITY) as two,
    ):
        one.put(*record)
        one._commit.flush()
        assert two.contains_many([key]) == [True]
        assert read(two, key) == whole(record)
        assert list(two.keys()) == [key]
        two.delete(key)
        assert read(one, key) is None
        assert list(one.keys()) == []
        one.put(*record)
        two.put(*record)  # neither knows of the other's yet
        one._commit.flush()
        two._commit.flush()
        assert one.stats().records == 1
        assert one.stats().used_bytes == 2 * PAGE
        assert one.check().ok
    with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as store:
        assert read(store, key) == whole(record)


def test_the_one_makes_room_among_the_other_s_records(tmp_path):
    """Capacity is nobody's own: a newcomer drops what others used longest ago."""
    with (
        SegmentStore(tmp_path / "kv", capacity=10 * PAGE) as old,
        SegmentStore(tmp_path / "kv", capacity=10 * PAGE) as new,
    ):
        theirs = [make_record(seed) for seed in range(5)]
        for record in theirs:
            old.put(*record)
        old._commit.flush()
        assert old.stats().used_bytes == 10 * PAGE
        mine = make_record(9)
        assert new.put(*mine)
        assert new.stats().used_bytes <= 10 * PAGE
        assert [read(old, key) is not None for key, _ in theirs] == [False, *[True] * 4]
        new._commit.flush()
        assert read(old, mine[0]) == whole(mine)


def test_a_record_written_over_while_another_process_reads_it_is_a_miss(tmp_path, monkeypatch):
    """Without any checksum: the header page came before, the rest after somebody wrote over it."""
    old, new = make_record(1, size=3 << 20), make_record(2, size=3 << 20)
    capacity = (3 << 20) + 4 * PAGE
    with (
        SegmentStore(tmp_path / "kv", capacity=capacity, verify="never", threads=1) as reader,
        SegmentStore(tmp_path / "kv", capacity=capacity) as writer,
    ):
        writer.put(*old)
        writer._commit.flush()
        inner = blockio.pread
        turn = 0

        def pread(fd, views, offset):
            nonlocal turn
            turn += 1
            if turn == 3:
                assert writer.delete(old[0])
                assert writer.put(*new)
            return inner(fd, views, offset)

        monkeypatch.setattr(blockio, "pread", pread)
        assert read(reader, old[0]) is None
        assert turn >= 3
        assert reader.stats().corrupt == 0
        writer._commit.flush()
        assert read(reader, new[0]) == whole(new)


def test_room_held_by_a_dead_writer_is_freed(tmp_path):
    """What a killed process had reserved is found when room is short."""
    with SegmentStore(tmp_path / "kv", capacity=10 * PAGE) as store:
        store.put(*make_record(1))
        code = (
            "import os, sys\n"
            "from kvlib.store.segments import SegmentStore\n"
            "store = SegmentStore(sys.argv[1], capacity=10 * 4096)\n"
            "store._room.reserve(30000, 8)\n"
            "os._exit(0)\n"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "kv")], check=True)
        assert store.stats().used_bytes == 10 * PAGE
        assert store.put(*make_record(2, size=20000))
        assert store.stats().used_bytes <= 10 * PAGE
        assert store.check().ok


def test_a_process_that_dies_while_opening_is_waited_for(tmp_path):
    """The system frees its locks one after the other: the gate may be open before the rest is."""
    with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as store:
        store.put(*make_record(1))
    dying = os.open(tmp_path / "kv" / "locks" / "open", os.O_RDWR)
    fcntl.flock(dying, fcntl.LOCK_EX)
    timer = threading.Timer(0.1, os.close, [dying])
    timer.start()
    with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as store:
        assert read(store, make_record(1)[0]) == whole(make_record(1))
    timer.join()


def test_a_child_may_open_the_store_itself(tmp_path):
    """After a fork the parent's store is refused, and a new one on the same folder works."""
    record = make_record(1)
    with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as store:
        store.put(*record)
        store._commit.flush()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as mine:
                    status = int(read(mine, record[0]) != whole(record))
                    status += not mine.put(*make_record(2))
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert read(store, record[0]) == whole(record)
        assert read(store, make_record(2)[0]) == whole(make_record(2))
        assert store.check().ok


@pytest.mark.slow
def test_a_soak_leaks_nothing(tmp_path):
    """Ten minutes (KVLIB_SOAK_S) of puts, reads and deletes: memory, files and threads stay."""
    seconds = float(os.environ.get("KVLIB_SOAK_S", "600"))

    def resident() -> int:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.split("VmRSS:")[1].split()[0])

    records = [make_record(seed, size=200 * seed) for seed in range(200)]
    with SegmentStore(tmp_path / "kv", capacity=100 * 6 * PAGE) as store:
        started = time.monotonic()
        warm = most = 0
        turn = 0
        while (now := time.monotonic()) < started + seconds:
            turn += 1
            record = records[turn * 7919 % len(records)]
            if turn % 3 == 0:
                store.put(*record)
            elif turn % 29 == 0:
                store.delete(record[0])
            else:
                assert read(store, record[0]) in (None, whole(record))
            if not warm and now > started + seconds / 5:
                warm, files = resident(), len(os.listdir("/proc/self/fd"))
            if turn % 10_000 == 0:
                most = max(most, resident())
        LOG.info(
            "%d turns in %.0f s; resident %d KiB after a fifth, %d at the end, %d at most; "
            "%d files open, %d at the end",
            turn, seconds, warm, resident(), most, files, len(os.listdir("/proc/self/fd")),
        )  # fmt: skip
        assert resident() - warm < 1024 * seconds / 60
        assert len(os.listdir("/proc/self/fd")) == files
        assert store.check().ok
        assert store.stats().errors == 0
