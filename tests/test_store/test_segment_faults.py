# SPDX-License-Identifier: Apache-2.0
"""A segment store whose calls fail: each n-th one in turn, and at random against a dict."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvlib.errors import ConfigError
from kvlib.store import blockio, segment_commit, segment_index
from kvlib.store import terms as clocks
from kvlib.store.replacement import REPLACEMENTS, Hint
from kvlib.store.segment_accounts import Account
from kvlib.store.segments import SegmentStore
from kvlib.store.terms import Terms
from kvlib.testing.records import make_record
from kvlib.testing.tiers import read

PAGE = 4096
REAL = {name: getattr(blockio, name) for name in ("pread", "pwrite", "sync", "allocate")}


class Faults:
    """Makes the n-th of the coming calls of one kind fail in some way, once."""

    def __init__(self) -> None:
        self.armed: dict[str, list] = {}  # function -> [calls to go, what happens]
        self.fired = 0

    def arm(self, name: str, nth: int, what: str) -> None:
        self.armed[name] = [nth, what]

    def due(self, name: str) -> str | None:
        plan = self.armed.get(name)
        if plan is None:
            return None
        plan[0] -= 1
        if plan[0] > 0:
            return None
        del self.armed[name]
        self.fired += 1
        return plan[1]

    def call(self, name: str, *args):
        what = self.due(name)
        if what is None:
            return REAL[name](*args)
        if what == "short" and name in ("pread", "pwrite"):
            fd, views, offset = args
            half = views[0][: max(512, views[0].nbytes // 1024 * 512)]
            return REAL[name](fd, [half], offset)
        if what == "none" and name in ("pread", "pwrite"):
            return 0
        if what == "torn" and name == "pwrite":
            fd, views, offset = args
            REAL[name](fd, [views[0][: max(512, views[0].nbytes // 1024 * 512)]], offset)
            raise OSError(errno.EIO, "torn")
        raise OSError(getattr(errno, what, errno.EIO), "injected")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in REAL:
            patch.setattr(blockio, name, lambda *args, name=name: self.call(name, *args))
        begin = segment_index.Index.write

        def write(index, committed=None):
            if (what := self.due("index")) is not None:
                raise segment_index.IndexFaultError("injected", full=what == "ENOSPC")
            return begin(index, committed)

        patch.setattr(segment_index.Index, "write", write)


@pytest.mark.parametrize("what", ["EIO", "ENOSPC", "short", "none", "torn"])
@pytest.mark.parametrize("which", ["pread", "pwrite", "sync", "allocate", "index"])
def test_whichever_call_fails_nothing_is_raised_and_nothing_lies(tmp_path, which, what):
    """Every call in turn fails once, in each way; afterwards the store is whole and works."""
    records = [make_record(seed, size=2500 * seed) for seed in range(5)]
    capacity = 12 * PAGE
    for nth in range(1, 60):
        faults = Faults()
        with SegmentStore(tmp_path / str(nth), capacity=capacity, segment=8 * PAGE) as store:
            with pytest.MonkeyPatch.context() as patch:
                faults.install(patch)
                faults.arm(which, nth, what)
                for key, parts in records:
                    store.put(key, parts)
                    assert read(store, key) in (None, b"".join(parts))
                    assert store.stats().used_bytes <= capacity
                store._commit.flush()
                store.delete(records[2][0])
                for key, parts in records:
                    assert read(store, key) in (None, b"".join(parts))
            report = store.check()
            assert report.ok, (nth, report)
            for key, parts in records:
                assert store.put(key, parts)
                assert read(store, key) == b"".join(parts)
            store._commit.flush()
            assert store.stats().used_bytes <= capacity
            assert store.check().ok
        shutil.rmtree(tmp_path / str(nth))
        if not faults.fired:
            assert nth > 1
            return
    pytest.fail("the sweep never reached a clean run")


def test_a_lost_flush_loses_the_group_and_says_so(tmp_path, monkeypatch):
    """Records whose flush failed are not entered; their room is free again."""
    faults = Faults()
    faults.install(monkeypatch)
    with SegmentStore(tmp_path / "kv", capacity=20 * PAGE) as store:
        faults.arm("sync", 1, "EIO")
        assert store.put(*make_record(1))
        store._commit.flush()
        assert read(store, make_record(1)[0]) is None
        assert store.put(*make_record(1))  # pays what is owed
        store._commit.flush()
        stats = store.stats()
        assert (stats.records, stats.used_bytes) == (1, 2 * PAGE)
        assert (stats.puts, stats.rejected, stats.errors) == (1, 1, 1)


def crash(store: SegmentStore) -> None:
    """Leave a store as kill -9 does: nothing is published, noted or tidied."""
    with store._commit._changed:
        store._commit._group.clear()
        store._commit._closed = True
        store._commit._changed.notify_all()
    if store._commit._thread is not None:
        store._commit._thread.join()
    store._io.close()
    store._home.index.close()
    store._home.files.close()
    store._home._close_fds()
    store._closed = True


CAPACITY = 24 * PAGE
SIZES = (0, 300, 3000, 7000, 20_000, 40_000, 90_000)
SEEDS = st.integers(0, 13)
RECORDS = [make_record(seed, size=SIZES[seed % len(SIZES)] + seed) for seed in range(14)]
WHOLE = [b"".join(parts) for _, parts in RECORDS]


QUOTA = 10 * PAGE
TERMS = (
    Terms(),
    Terms(ttl=5, tenant=b"tenant 1"),
    Terms(tenant=b"tenant 2", quota=QUOTA, hint=Hint(priority=-1)),
    Terms(ttl=2, tenant=b"tenant 2", quota=QUOTA),
)


class SegmentMachine(RuleBasedStateMachine):
    """Every read is exact or a miss, whatever fails, is damaged or dies; nothing is served beyond
    its time; capacity and quota hold.
    """

    @initialize(policy=st.sampled_from(REPLACEMENTS.names()))
    def begin(self, policy: str) -> None:
        self.policy = policy
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.now = clocks._wall_ms()
        self.patch.setattr(clocks, "_elapsed_ms", lambda: self.now)
        self.patch.setattr(clocks, "_wall_ms", lambda: self.now)
        self.until: dict[int, float] = {}  # the latest end of the time of any put
        self.faults = Faults()
        self.faults.install(self.patch)
        self.patch.setattr(segment_commit, "_GROUP_S", 1e6)  # groups end where a rule says so
        self.allowed: set[int] = set()
        self.ever: set[int] = set()
        self.damaged = False
        self.open()

    def open(self) -> None:
        self.faults.armed.clear()
        self.store = SegmentStore(
            self.folder / "kv", capacity=CAPACITY, segment=10 * PAGE, replacement=self.policy
        )
        if self.store._home.rebuilt:
            self.allowed = set(self.ever)  # what was deleted may be found again: it is exact
        self.store.trim(QUOTA, b"tenant 2")  # as `KVStore` does

    @rule(seconds=st.sampled_from([1, 2, 6]))
    def pass_time(self, seconds: int) -> None:
        self.now += 1000 * seconds

    @rule(seed=SEEDS, terms=st.sampled_from(TERMS))
    def put(self, seed: int, terms: Terms) -> None:
        fired = self.faults.fired
        held = self.store.put(*RECORDS[seed], terms)
        if held:
            self.allowed.add(seed)
            self.ever.add(seed)
            until = self.now + 1000 * (float("inf") if terms.ttl is None else terms.ttl)
            self.until[seed] = max(self.until.get(seed, 0), until)
        must = self.policy != "belady" and len(WHOLE[seed]) + PAGE <= QUOTA
        if not held and not must:
            return
        if fired == self.faults.fired and not self.faults.armed:
            assert held
            if read(self.store, RECORDS[seed][0]) is None:  # it was there, and damaged
                assert self.damaged
                if not self.store.put(*RECORDS[seed], terms):
                    assert not must
                    return
            assert read(self.store, RECORDS[seed][0]) == WHOLE[seed]

    @rule(seed=SEEDS)
    def get(self, seed: int) -> None:
        got = read(self.store, RECORDS[seed][0])
        assert got is None or (seed in self.allowed and got == WHOLE[seed])
        assert got is None or self.now < self.until[seed]

    @rule(seed=SEEDS, index=st.integers(0, 3))
    def part(self, seed: int, index: int) -> None:
        from kvlib.codecs.container import parse_header

        buffer = bytearray(len(WHOLE[seed]))
        if self.store.get_into(RECORDS[seed][0], buffer, sections=[index]) is not None:
            assert seed in self.allowed
            info = parse_header(WHOLE[seed]).sections[index]
            stop = info.offset + info.stored_bytes
            assert buffer[info.offset : stop] == WHOLE[seed][info.offset : stop]

    @rule(seed=SEEDS)
    def delete(self, seed: int) -> None:
        if self.store.delete(RECORDS[seed][0]) or not self.faults.armed:
            errors = self.store.stats().errors
            if read(self.store, RECORDS[seed][0]) is None and errors == self.store.stats().errors:
                self.allowed.discard(seed)

    @rule(seeds=st.lists(SEEDS, max_size=4))
    def touch(self, seeds: list[int]) -> None:
        self.store.touch([RECORDS[seed][0] for seed in seeds])

    @rule()
    def flush(self) -> None:
        self.store._commit.flush()

    @rule(
        which=st.sampled_from(["pread", "pwrite", "sync", "allocate", "index"]),
        nth=st.integers(1, 4),
        what=st.sampled_from(["EIO", "ENOSPC", "short", "none", "torn"]),
    )
    def fault(self, which: str, nth: int, what: str) -> None:
        self.faults.arm(which, nth, what)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule()
    def die(self) -> None:
        crash(self.store)
        self.open()

    @rule(
        place=st.floats(0, 1, exclude_max=True),
        bit=st.integers(0, 7),
        how=st.sampled_from(["cut", "flip", "remove"]),
        clean=st.booleans(),
    )
    def damage_index(self, place: float, bit: int, how: str, clean: bool) -> None:
        self.store.close() if clean else crash(self.store)
        path = self.folder / "kv" / "index.lmdb" / "data.mdb"
        content = bytearray(path.read_bytes())
        at = int(place * len(content))
        if how == "cut":
            os.truncate(path, at)
        elif how == "flip":
            content[at] ^= 1 << bit
            path.write_bytes(content)
        else:
            path.unlink()
        self.allowed = set(self.ever)
        self.open()

    @rule(which=st.integers(0, 9), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage_segment(self, which: int, place: float, bit: int) -> None:
        paths = sorted((self.folder / "kv").glob("seg-*.kv"))
        if not paths:
            return
        self.damaged = True
        path = paths[which % len(paths)]
        at = int(place * path.stat().st_size)
        fd = os.open(path, os.O_RDWR)
        byte = os.pread(fd, 1, at)[0]
        os.pwrite(fd, bytes([byte ^ 1 << bit]), at)
        os.fsync(fd)
        os.close(fd)

    @invariant()
    def bounded(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.stats().used_bytes <= CAPACITY
        if not self.store.stats().errors:
            accounts = self.store._room.limits()[1]
            assert accounts.get(b"tenant 2", Account()).used * PAGE <= QUOTA

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.faults.armed.clear()
        self.store.check(repair=True)
        report = self.store.check()
        assert report.ok, report
        for seed in range(len(RECORDS)):
            self.get(seed)
        self.store.close()
        self.patch.undo()
        shutil.rmtree(self.folder)


TestSegmentMachine = SegmentMachine.TestCase
TestSegmentMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("which", ["SUPER", "locks"])
def test_a_folder_that_cannot_be_opened_is_an_error(tmp_path, which):
    """What is no store's any more is refused by name, without a traceback from below."""
    with SegmentStore(tmp_path / "kv", capacity=CAPACITY) as store:
        store.put(*RECORDS[1])
    path = tmp_path / "kv" / which
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir() if which == "SUPER" else path.write_text("")
    with pytest.raises(ConfigError):
        SegmentStore(tmp_path / "kv", capacity=CAPACITY)


def test_an_index_that_grows_while_it_is_looked_at_is_whole(tmp_path, monkeypatch):
    """A commit in another thread between the two looks is no sign of damage."""
    key, parts = make_record(0)
    with SegmentStore(tmp_path / "store", capacity=1 << 24) as store:
        assert store.put(key, parts)
        index = store._home.index
        look = os.fstat

        def slow(file):
            status = look(file)
            index._least = max(index._least, status.st_size + 4096)
            return status

        monkeypatch.setattr(segment_index.os, "fstat", slow)
        assert index.last_txn > 0
