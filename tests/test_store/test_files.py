# SPDX-License-Identifier: Apache-2.0
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvlib.errors import ConfigError, IncompatibleDataError
from kvlib.store import file_record, fileio, files
from kvlib.store.files import FileStore
from kvlib.store.replacement import REPLACEMENTS
from kvlib.store.terms import Terms
from kvlib.testing.records import make_record
from kvlib.testing.tiers import TierContract, read


class TestFileStore(TierContract):
    """The file tier keeps the contract."""

    persistent = True

    @pytest.fixture
    def make_tier(self, tmp_path):
        return lambda capacity: FileStore(tmp_path / "kv", capacity=capacity)


def the_file(folder: Path) -> Path:
    (file,) = folder.rglob("*.kvlc")
    return file


def stray(folder: Path) -> list[Path]:
    """Files that are neither records nor the store's own."""
    return [p for p in (folder / "tmp").rglob("*") if p.is_file() and p.suffix == ".tmp"]


def test_every_flipped_bit_is_a_counted_miss(tmp_path):
    """No single flipped bit of a record is served; the record is dropped."""
    key, parts = make_record(1, size=200)
    with FileStore(tmp_path) as store:
        store.put(key, parts)
        path = the_file(tmp_path)
        good = path.read_bytes()
        for bit in range(len(good) * 8):
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            before = store.stats()
            assert read(store, key) is None, f"bit {bit}"
            after = store.stats()
            assert after.misses == before.misses + 1
            assert after.corrupt + after.errors == before.corrupt + before.errors + 1
        path.write_bytes(good)
        assert read(store, key) == b"".join(parts)


def test_every_truncation_is_a_counted_miss(tmp_path):
    """No record that lost bytes at its end, or gained some, is served."""
    key, parts = make_record(2, size=200)
    with FileStore(tmp_path) as store:
        store.put(key, parts)
        path = the_file(tmp_path)
        good = path.read_bytes()
        for bad in [*(good[:n] for n in range(len(good))), good + b"\0", good * 2]:
            path.write_bytes(bad)
            assert read(store, key) is None
        assert store.stats().corrupt == len(good) + 2
        assert not path.exists()


def test_swapped_records_are_both_misses(tmp_path):
    """A record under another's name is foreign, however intact it is."""
    one, two = make_record(1), make_record(2)
    with FileStore(tmp_path) as store:
        store.put(*one)
        store.put(*two)
        paths = sorted(tmp_path.rglob("*.kvlc"))
        data = [path.read_bytes() for path in paths]
        paths[0].write_bytes(data[1])
        paths[1].write_bytes(data[0])
        for key, parts in (one, two):
            assert read(store, key) is None
            assert store.put(key, parts)
            assert read(store, key) == b"".join(parts)
        assert store.stats().corrupt == 2


def test_a_symlink_is_not_followed(tmp_path):
    """A record's name that is a link to another file is not read."""
    key, parts = make_record(1)
    with FileStore(tmp_path / "kv") as store:
        store.put(key, parts)
        path = the_file(tmp_path / "kv")
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert read(store, key) is None


@pytest.mark.parametrize("which", ["open", "writev", "utime", "replace", "preadv", "fstat"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_failing_call_is_a_miss_or_a_drop(tmp_path, monkeypatch, which, code):
    """Whichever call fails and at whichever turn, nothing is raised and nothing wrong is served."""
    records = [make_record(seed, size=500) for seed in range(4)]
    inner = getattr(os, which)
    for nth in range(1, 30):
        calls = 0

        def failing(*args, nth=nth, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(code, "injected")
            return inner(*args, **kwargs)

        with FileStore(tmp_path / str(nth), capacity=3 * 4096) as store:
            with monkeypatch.context() as patch:
                for module in (files, fileio, file_record):
                    patch.setattr(module.os, which, failing)
                for key, parts in records:
                    store.put(key, parts)
                    assert read(store, key) in (None, b"".join(parts))
                for key, parts in records:
                    assert read(store, key) in (None, b"".join(parts))
            report = store.check(repair=True)
            assert not [p for p in report.problems if "counted" in p], report
            assert stray(tmp_path / str(nth)) == []
            for key, parts in records:
                assert store.put(key, parts)
                assert read(store, key) == b"".join(parts)
        if calls < nth:
            return
    pytest.fail("the sweep never reached a clean run")


def test_a_full_disk_drops_puts_and_serves_the_rest(tmp_path, monkeypatch):
    """While every write fails for want of room, reads go on; with room again, writes do too."""
    old, new = make_record(1), make_record(2)

    def full(fd, views):
        raise OSError(errno.ENOSPC, "No space left on device")

    with FileStore(tmp_path) as store:
        store.put(*old)
        store.touch([old[0]])
        inner = file_record.write_all
        monkeypatch.setattr(file_record, "write_all", full)
        assert store.put(*new) is False
        assert store.stats().rejected == 1
        monkeypatch.setattr(file_record, "write_all", inner)
        assert store.put(*new)
        assert store.check().ok
        assert stray(tmp_path) == []


def test_a_real_full_disk(tmp_path):
    """Under a file-size limit of the system, large puts fail as drops and small ones succeed."""
    code = (
        "import resource, signal, sys\n"
        "from kvlib.store.files import FileStore\n"
        "from kvlib.testing.records import make_record\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "with FileStore(sys.argv[1]) as store:\n"
        "    large, small = make_record(1, size=100000), make_record(2, size=4000)\n"
        "    print(store.put(*large), store.put(*small))\n"
        "    print(store.check().ok, store.stats().records)\n"
    )
    child = [sys.executable, "-c", code, str(tmp_path / "kv")]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True", "1"]
    assert stray(tmp_path / "kv") == []


def test_a_folder_deleted_underneath_is_misses_and_drops(tmp_path):
    """When the folder disappears, nothing is raised."""
    import shutil

    key, parts = make_record(1)
    with FileStore(tmp_path / "kv") as store:
        store.put(key, parts)
        shutil.rmtree(tmp_path / "kv")
        assert read(store, key) is None
        assert store.put(key, parts) is False
        assert store.stats().records == 0


WRITER = """
import random, sys
from kvlib.store.files import FileStore
from kvlib.testing.records import make_record
choose = random.Random(int(sys.argv[2]))
store = FileStore(sys.argv[1], capacity=40 * 4096)
print("ready", flush=True)
while True:
    key, parts = make_record(choose.randrange(60), size=choose.randrange(9000))
    store.delete(key) if choose.random() < 0.1 else store.put(key, parts)
"""


def test_killed_writers_leave_only_whole_records(tmp_path):
    """After kill -9 at any moment: every record verifies, capacity holds, no half file stays."""
    choose = random.Random(3)
    for trial in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(trial)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(choose.uniform(0.005, 0.08))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with FileStore(tmp_path, capacity=40 * 4096) as store:
            report = store.check()
            assert report.ok, report
            assert store.stats().used_bytes <= 40 * 4096
            assert stray(tmp_path) == []
    assert report.records > 0


def test_a_living_writer_s_half_files_are_left_alone(tmp_path):
    """Opening a store does not sweep the temporary folder of one that is open."""
    with FileStore(tmp_path) as first:
        half = first._own.path / "1.tmp"
        half.write_bytes(b"half")
        with FileStore(tmp_path):
            assert half.exists()


def test_two_open_stores_find_each_other_s_records(tmp_path):
    """What one writes or deletes, the other finds or misses, without being opened again."""
    key, parts = make_record(1)
    with FileStore(tmp_path) as one, FileStore(tmp_path) as two:
        one.put(key, parts)
        assert two.contains_many([key]) == [True]
        assert read(two, key) == b"".join(parts)
        two.delete(key)
        assert read(one, key) is None
        assert one.check().ok


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    """Other content, a file, a link and another version are errors; nothing changes."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        FileStore(tmp_path)
    with pytest.raises(ConfigError):
        FileStore(tmp_path / "notes.txt")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="symbolic link"):
        FileStore(tmp_path / "link")
    (tmp_path / "real" / "FORMAT").write_text("kvlib filestore 1\n")
    with pytest.raises(IncompatibleDataError, match="filestore 1"):
        FileStore(tmp_path / "real")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "notes.txt", "real"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_are_private(tmp_path):
    """Records are readable by their owner only: KV is as sensitive as the prompt."""
    with FileStore(tmp_path / "kv") as store:
        store.put(*make_record(1))
        assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700
        assert the_file(tmp_path / "kv").stat().st_mode & 0o777 == 0o600


def test_a_smaller_capacity_evicts_at_open(tmp_path):
    """A store opened with less room than it holds drops what was used longest ago."""
    records = [make_record(seed, size=3000) for seed in range(6)]
    with FileStore(tmp_path) as store:
        for record in records:
            store.put(*record)
    with FileStore(tmp_path, capacity=2 * 4096) as store:
        assert list(store.keys()) == [key for key, _ in records[4:]]
        assert store.check().ok


def test_damage_in_another_section_does_not_matter_to_a_part(tmp_path):
    """A partial read verifies the header and what was asked for, no more and no less."""
    key, parts = make_record(1, size=4000)
    with FileStore(tmp_path) as store:
        store.put(key, parts)
        path = the_file(tmp_path)
        data = bytearray(path.read_bytes())
        data[-33] ^= 1  # in the last section: 32 bytes of terms are behind it
        path.write_bytes(data)
        assert store.get_into(key, bytearray(len(data)), sections=[0]) == len(data) - 32
        assert store.get_into(key, bytearray(len(data)), sections=[3]) is None


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_opening_and_closing_leaks_no_files(tmp_path):
    """Two hundred opens later as many file descriptors are open as before."""
    with FileStore(tmp_path) as store:
        store.put(*make_record(1))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        with FileStore(tmp_path) as store:
            assert read(store, make_record(1)[0]) is not None
    assert len(os.listdir("/proc/self/fd")) == before


CAPACITY = 6 * 4096
SEEDS = st.integers(0, 7)


class FileStoreMachine(RuleBasedStateMachine):
    """A store against a dict: every read is exact or a miss, whatever happens to the files."""

    @initialize(policy=st.sampled_from(REPLACEMENTS.names()))
    def begin(self, policy: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.policy = policy
        self.store = FileStore(self.folder.name, capacity=CAPACITY, replacement=policy)
        self.allowed: set[int] = set()

    @rule(seed=SEEDS, quota=st.sampled_from([None, 4 * 4096]))
    def put(self, seed: int, quota: int | None) -> None:
        key, parts = make_record(seed, size=1500 * seed)
        terms = Terms(ttl=1e6, tenant=b"tenant 1", quota=quota)
        assert self.store.put(key, parts, terms) or self.policy == "belady"
        self.allowed.add(seed)

    @rule(seed=SEEDS)
    def get(self, seed: int) -> None:
        key, parts = make_record(seed, size=1500 * seed)
        got = read(self.store, key)
        assert got is None or (seed in self.allowed and got == b"".join(parts))

    @rule(seed=SEEDS)
    def delete(self, seed: int) -> None:
        self.store.delete(make_record(seed)[0])
        self.allowed.discard(seed)

    @rule(seed=SEEDS)
    def touch(self, seed: int) -> None:
        self.store.touch([make_record(seed)[0]])

    @rule()
    def reopen(self) -> None:
        held = set(self.store.keys())
        self.store.close()
        self.store = FileStore(self.folder.name, capacity=CAPACITY, replacement=self.policy)
        assert set(self.store.keys()) <= held

    @precondition(lambda self: any(Path(self.folder.name).rglob("*.kvlc")))
    @rule(data=st.data(), how=st.sampled_from(["flip", "cut", "remove", "empty"]))
    def damage(self, data, how: str) -> None:
        paths = sorted(Path(self.folder.name).rglob("*.kvlc"))
        path = data.draw(st.sampled_from(paths))
        content = bytearray(path.read_bytes())
        if how == "remove" or not content:
            path.unlink()
            return
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1
        path.write_bytes({"flip": content, "cut": content[:at], "empty": b""}[how])

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "store"):
            assert self.store.stats().used_bytes <= CAPACITY

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check(repair=True)
        assert self.store.check().ok
        self.store.close()
        self.folder.cleanup()


TestFileStoreMachine = FileStoreMachine.TestCase
TestFileStoreMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_record_that_replaced_a_damaged_one_is_not_dropped(tmp_path, monkeypatch):
    """Dropping what was found damaged leaves the good file that took its place meanwhile."""
    key, parts = make_record(1)
    good = b"".join(parts)
    with FileStore(tmp_path) as store:
        store.put(key, parts)
        path = the_file(tmp_path)
        whole = path.read_bytes()
        inner = file_record.verify_record

        def replaced(*args, **kwargs):
            (tmp_path / "new").write_bytes(whole)
            os.replace(tmp_path / "new", path)
            return inner(*args, **kwargs)

        path.write_bytes(whole[:-33] + b"x" + whole[-32:])
        monkeypatch.setattr(file_record, "verify_record", replaced)
        assert read(store, key) is None
        monkeypatch.setattr(file_record, "verify_record", inner)
        assert read(store, key) == good
        assert store.check().ok
