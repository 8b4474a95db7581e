# SPDX-License-Identifier: Apache-2.0
"""One process: the contract, damage of every file, recovery, limits."""

import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest

from kvlib.codecs.container import parse_header
from kvlib.errors import ConfigError, IncompatibleDataError, StoreClosedError, StoreError
from kvlib.store import blockio, segment_check, segment_known
from kvlib.store.segment_ledger import Ledger
from kvlib.store.segments import SegmentStore
from kvlib.testing.records import make_record
from kvlib.testing.tiers import TierContract, read

MIB = 1 << 20
PAGE = 4096


class TestSegmentStore(TierContract):
    """The segment tier keeps the contract."""

    persistent = True
    overhead = PAGE

    @pytest.fixture
    def make_tier(self, tmp_path):
        return lambda capacity: SegmentStore(tmp_path / "kv", capacity=capacity)


class TestBuffered(TierContract):
    """So it does through the page cache, in segments so small that records are split."""

    persistent = True
    overhead = PAGE

    @pytest.fixture
    def make_tier(self, tmp_path):
        return lambda capacity: SegmentStore(
            tmp_path / "kv", capacity=capacity, direct=False, segment=5 * PAGE
        )


@pytest.fixture
def open_store(tmp_path):
    """A function that opens the same folder again and again."""

    def opened(capacity=MIB, **options):
        return SegmentStore(tmp_path / "kv", capacity=capacity, **options)

    return opened


def whole(record) -> bytes:
    return b"".join(record[1])


def where(store, key):
    """Segment file and offset of a record in one run."""
    (extent,) = store._room.lookup(key.to_bytes()).extents
    return store._home.files.path(extent.segment), extent.first * store._granule


def patch(path: Path, offset: int, data: bytes) -> None:
    """Write past the store, and make the page cache forget what O_DIRECT would not see."""
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, data, offset)
    os.fsync(fd)
    os.close(fd)


def data_file(folder: Path) -> Path:
    return folder / "kv" / "index.lmdb" / "data.mdb"


# -- damage of records


@pytest.mark.parametrize("direct", [True, False])
def test_every_flipped_bit_of_a_record_is_a_counted_miss(open_store, monkeypatch, direct):
    """No single flipped bit of header page or container is served."""
    key, parts = make_record(1, size=200)
    good = b"".join(parts)
    with open_store(direct=direct) as store:
        assert store.put(key, parts)
        store._commit.flush()
        path, offset = where(store, key)
        page = path.read_bytes()[offset : offset + 2 * PAGE]
        dropped = []
        monkeypatch.setattr(store, "_remove", lambda *what: dropped.append(what))  # it stays
        fd = os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0))
        memory = memoryview(mmap.mmap(-1, 2 * PAGE))
        memory[:] = page
        for bit in [*range(8 * 240), *range(8 * PAGE - 64, 8 * (PAGE + len(good)))]:
            memory[bit // 8] ^= 1 << bit % 8
            os.pwrite(fd, memory, offset)
            before = store.stats()
            assert read(store, key) is None, f"bit {bit}"
            after = store.stats()
            assert after.misses == before.misses + 1
            assert after.corrupt + after.errors == before.corrupt + before.errors + 1
            assert len(dropped) == after.corrupt
            memory[bit // 8] ^= 1 << bit % 8
        os.pwrite(fd, memory, offset)
        os.close(fd)
        assert read(store, key) == good


def test_a_record_under_another_s_place_is_not_served(open_store):
    """Records that changed places are intact, and foreign."""
    one, two = make_record(1), make_record(2)
    with open_store() as store:
        store.put(*one)
        store.put(*two)
        store._commit.flush()
        (path, a), (_, b) = where(store, one[0]), where(store, two[0])
        data = path.read_bytes()
        patch(path, a, data[b : b + 2 * PAGE])
        patch(path, b, data[a : a + 2 * PAGE])
        for record in (one, two):
            assert read(store, record[0]) is None
            assert store.put(*record)
            assert read(store, record[0]) == whole(record)
        assert store.stats().corrupt == 2


def test_an_old_generation_of_the_same_key_is_not_served(open_store):
    """A lost write, that leaves what lay there before, is seen even if the key is the same."""
    record = make_record(1)
    with open_store(capacity=3 * PAGE) as store:
        store.put(*record)
        store._commit.flush()
        path, offset = where(store, record[0])
        old = path.read_bytes()[offset : offset + 2 * PAGE]
        store.delete(record[0])
        store.put(*record)
        store._commit.flush()
        assert where(store, record[0]) == (path, offset)
        patch(path, offset, old)
        assert read(store, record[0]) is None
        assert store.stats().corrupt == 1


def test_damage_in_another_section_does_not_matter_to_a_part(open_store):
    """A partial read verifies the header and what was asked for, no more and no less."""
    key, parts = record = make_record(1, size=40000)
    good = whole(record)
    sections = parse_header(good).sections
    with open_store() as store:
        store.put(key, parts)
        store._commit.flush()
        path, offset = where(store, key)
        last = sections[-1].offset + sections[-1].stored_bytes - 1
        patch(path, offset + PAGE + last, bytes([good[last] ^ 1]))
        out = bytearray(len(good))
        assert store.get_into(key, out, sections=[2, 0]) == len(good)
        for i in (0, 2):
            start, stop = sections[i].offset, sections[i].offset + sections[i].stored_bytes
            assert out[start:stop] == good[start:stop]
        assert store.get_into(key, out, sections=[3]) is None


@pytest.mark.parametrize("verify", ["always", "first", "never"])
def test_when_checksums_are_looked_at(open_store, verify):
    """ "first" believes what it verified once, "never" everything; header pages always count."""
    key, parts = record = make_record(1, size=9000)
    good = whole(record)
    with open_store(verify=verify) as store:
        store.put(key, parts)
        assert read(store, key) == good
        path, offset = where(store, key)
        at = len(good) - 1
        patch(path, offset + PAGE + at, bytes([good[at] ^ 1]))
        assert (read(store, key) is None) == (verify == "always")
        if verify != "always":
            patch(path, offset + 20, b"\xff")
            assert read(store, key) is None


# -- shapes of records and buffers


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("granule", [PAGE, 16 * PAGE])
def test_records_of_all_sizes_in_pieces_come_back(open_store, direct, granule):
    """Split over extents and arena slots, into buffers at any address."""
    choose = random.Random(7)
    with open_store(
        capacity=13 * MIB, direct=direct, granule=granule, segment=3 * MIB, staging="16MiB"
    ) as store:
        kept = {}
        for seed in range(30):
            size = choose.choice([1, 4000, 100_000, MIB, 5 * MIB, 9 * MIB])
            key, parts = make_record(seed, size=choose.randrange(size + 1))
            want = b"".join(parts)
            assert store.put(key, parts)
            kept[key] = want
            for shift in (0, 512, 1, 4096):
                memory = memoryview(bytearray(len(want) + 2 * PAGE))
                target = memory[shift : shift + len(want)]
                guard = bytes(memory[shift + len(want) :])
                assert store.get_into(key, target) == len(want)
                assert target == want
                assert memory[shift + len(want) :] == guard, "written behind the record"
        assert store.stats().evicted > 0
        held = [key for key in kept if store.contains_many([key])[0]]
        assert any(len(store._room.lookup(key.to_bytes()).extents) > 1 for key in held)
        for key in held:
            assert read(store, key) == kept[key]
            header = parse_header(kept[key])
            out = bytearray(len(kept[key]))
            choice = choose.sample(range(4), choose.randrange(1, 5))
            assert store.get_into(key, out, sections=choice) == len(out)
            for i in choice:
                info = header.sections[i]
                stop = info.offset + info.stored_bytes
                assert out[info.offset : stop] == kept[key][info.offset : stop]
        assert store.check().ok


def test_a_long_header_is_read_whole(open_store):
    """A header beyond what is read first of a record in parts."""
    from kvlib.codecs.container import (
        LayerShape,
        Section,
        SectionFlag,
        SectionKind,
        build_container,
    )

    key, _ = make_record(1)
    layers = range(300)
    parts = build_container(
        [Section(SectionKind.KEYS, n, 8, (bytes([n % 251]) * 8,), SectionFlag.RAW) for n in layers],
        spec_fingerprint=bytes(32),
        storage_fingerprint=key.storage,
        start=0,
        num_tokens=64,
        dtype_code=1,
        codec="test@1",
        layers=[LayerShape(n, 1, 8, 8) for n in layers],
        keys=[key.block],
    )
    want = b"".join(parts)
    assert parse_header(want).header_bytes > 16384
    with open_store() as store:
        store.put(key, parts)
        out = bytearray(len(want))
        assert store.get_into(key, out, sections=[299]) == len(want)
        info = parse_header(want).sections[299]
        assert out[info.offset : info.offset + 8] == want[info.offset : info.offset + 8]
        assert store.get_into(key, bytearray(5000), sections=()) is None
        assert read(store, key) == want


# -- recovery


def put_many(store, seeds, size=3000):
    records = [make_record(seed, size=size) for seed in seeds]
    for record in records:
        assert store.put(*record)
    return records


def test_a_lost_index_is_made_anew_from_the_headers(tmp_path, open_store):
    """Every record comes back, none of what was deleted and written over, and the space adds up."""
    with open_store(capacity=40 * PAGE) as store:
        old = put_many(store, range(20), size=2000)
        for key, _ in old[::2]:
            store.delete(key)
        new = put_many(store, range(100, 110), size=2000)
        held = set(store.keys())
    shutil.rmtree(tmp_path / "kv" / "index.lmdb")
    with open_store(capacity=40 * PAGE) as store:
        assert store._home.rebuilt
        assert held <= set(store.keys())
        for record in [*old[1::2], *new]:
            assert read(store, record[0]) == whole(record)
        assert store.check().ok
        assert store.stats().used_bytes <= 40 * PAGE
        put_many(store, range(200, 230))
        assert store.check().ok


def test_of_two_records_in_one_place_the_newer_is_kept(tmp_path, open_store):
    """A stale header page does not bring its record back into granules that are another's now."""
    two, three, other = (make_record(n, size=size) for n, size in ((1, 99), (2, 6000), (3, 6000)))
    split, new = make_record(4, size=15000), make_record(5, size=99)
    with open_store(capacity=8 * PAGE) as store:
        for record in (two, three, other):
            assert store.put(*record)
        store.delete(two[0])
        store.delete(other[0])
        assert store.put(*split)
        assert store._room.lookup(split[0].to_bytes()).extents == ((0, 5, 3), (0, 0, 2))
        store.delete(split[0])
        assert store.put(*new)
        assert where(store, new[0])[1] == 0
    shutil.rmtree(tmp_path / "kv" / "index.lmdb")
    with open_store(capacity=8 * PAGE) as store:
        assert set(store.keys()) == {three[0], new[0]}
        for record in (three, new):
            assert read(store, record[0]) == whole(record)
        assert store.check().ok


def test_a_killed_store_keeps_its_index(tmp_path, open_store):
    """Without a clean shutdown, in the same boot, the index is walked and kept."""
    with open_store() as store:
        records = put_many(store, range(5))
        store._commit.flush()
        shutil.copytree(tmp_path / "kv", tmp_path / "copy")
    with SegmentStore(tmp_path / "copy", capacity=MIB) as store:
        assert not store._home.rebuilt
        assert [read(store, key) for key, _ in records] == [whole(r) for r in records]
        assert store.check().ok


def test_after_a_power_cut_the_index_is_made_anew(tmp_path, open_store, monkeypatch):
    """An index that was open when the machine went down is not trusted: it was never synced."""
    with open_store() as store:
        records = put_many(store, range(5))
        store._commit.flush()
        shutil.copytree(tmp_path / "kv", tmp_path / "copy")
    monkeypatch.setattr(segment_check, "boot_id", lambda: "another")
    with SegmentStore(tmp_path / "copy", capacity=MIB) as store:
        assert "went down" in store._home.rebuilt
        assert [read(store, key) for key, _ in records] == [whole(r) for r in records]
    with open_store() as store:  # closed cleanly: its checksum vouches for it
        assert not store._home.rebuilt


CHECKED = """
import sys
from kvlib.store.segments import SegmentStore
from kvlib.testing.records import make_record
from kvlib.testing.tiers import read
# A child for each damage would cost a second: one child, many folders.
for folder in sys.stdin.read().split():
    with SegmentStore(folder, capacity=1 << 20) as store:
        for seed in range(30):
            key, parts = make_record(seed, size=1500)
            assert read(store, key) in (None, b"".join(parts)), folder
        held = sum(store.contains_many(list(store.keys())))
        print(int(bool(store._home.rebuilt)), held, flush=True)
        report = store.check(repair=True)
        assert store.check().ok
        assert store.put(*make_record(1000)), folder
        assert not any("granules" in p or "free" in p for p in report.problems), (folder, report)
"""


def damaged_copies(tmp_path, source: Path, damages) -> list[tuple[bool, int]]:
    """Open a copy of a store for each damage of its index, in a child that must not crash."""
    folders = []
    for i, damage in enumerate(damages):
        folder = tmp_path / f"copy-{i}"
        shutil.copytree(source, folder)
        path = folder / "index.lmdb" / "data.mdb"
        path.write_bytes(damage(path.read_bytes()))
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, "-c", CHECKED],
        input="\n".join(folders),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        shutil.rmtree(folder)
    return [(a == "1", int(b)) for a, b in (line.split() for line in done.stdout.splitlines())]


@pytest.fixture
def closed_and_killed(tmp_path, open_store):
    """A store that was closed, and a copy of it as it was when it was open."""
    with open_store() as store:
        put_many(store, range(30), size=1500)
        for seed in range(5):
            store.delete(make_record(seed)[0])
        store._commit.flush()
        shutil.copytree(tmp_path / "kv", tmp_path / "killed")
    return tmp_path / "kv", tmp_path / "killed"


@pytest.mark.parametrize("which", [0, 1], ids=["closed", "killed"])
def test_a_truncated_index_is_made_anew(tmp_path, closed_and_killed, which):
    """Cut anywhere: no signal, no wrong byte, the records are back."""
    source = closed_and_killed[which]
    size = (source / "index.lmdb" / "data.mdb").stat().st_size
    cuts = [0, 1, 100, 4095, 4096, 4097, 8191, 8192, *range(12288, size, 4096), size - 1]
    damages = [lambda data, n=n: data[:n] for n in cuts]
    for rebuilt, held in damaged_copies(tmp_path, source, damages):
        assert rebuilt
        assert held >= 25


@pytest.mark.parametrize("which", [0, 1], ids=["closed", "killed"])
def test_a_flipped_index_never_lies(tmp_path, closed_and_killed, which):
    """Bits flipped anywhere in the index: no signal, no wrong byte. After a clean shutdown each
    one is seen; after a kill those in the tree's structure are, and others when rows are read.
    """
    source = closed_and_killed[which]
    size = (source / "index.lmdb" / "data.mdb").stat().st_size
    choose = random.Random(which)
    spots = [choose.randrange(size) for _ in range(40)] + list(range(0, 200, 19))

    def flipped(data: bytes, at: int) -> bytes:
        bad = bytearray(data)
        bad[at] ^= 1 << choose.randrange(8)
        return bytes(bad)

    damages = [lambda data, at=at: flipped(data, at) for at in spots]
    results = damaged_copies(tmp_path, source, damages)
    assert len(results) == len(spots)
    if which == 0:
        assert all(rebuilt and held >= 25 for rebuilt, held in results)


def test_the_damaged_index_is_kept_aside(tmp_path, open_store):
    """One of them, for whoever wants to look."""
    for _ in range(2):
        with open_store() as store:
            put_many(store, range(3))
        data_file(tmp_path).write_bytes(b"no index")
    with open_store() as store:
        assert store.stats().records == 3
    aside = tmp_path / "kv" / "index.lmdb.damaged"
    assert (aside / "data.mdb").read_bytes() == b"no index"
    with open_store() as store:
        assert not store._home.rebuilt


def test_a_lost_or_short_segment_is_misses(tmp_path, open_store):
    """What lay in it is gone, the rest is served, and the store goes on."""
    with open_store(segment=10 * PAGE) as store:
        put_many(store, range(12))
    segments = sorted((tmp_path / "kv").glob("seg-*.kv"))
    segments[0].unlink()
    os.truncate(segments[1], 3 * PAGE)
    with open_store(segment=10 * PAGE) as store:
        assert store._home.rebuilt
        held = set(store.keys())
        assert held
        for seed in range(12):
            record = make_record(seed, size=3000)
            assert read(store, record[0]) == (whole(record) if record[0] in held else None)
        put_many(store, range(50, 60))
        assert store.check().ok


def test_a_segment_lost_while_open_is_misses(tmp_path, open_store):
    """Records of a segment that disappears are dropped when they are asked for."""
    with open_store() as store:
        records = put_many(store, range(3))
    with open_store() as store:
        for path in (tmp_path / "kv").glob("seg-*.kv"):
            path.unlink()
        assert [read(store, key) for key, _ in records] == [None] * 3
        assert store.stats().records == 0


def test_an_index_cut_off_while_open_is_misses(tmp_path, open_store):
    """Nothing is read from a map that lost its end; the next open makes it anew."""
    with open_store() as store:
        records = put_many(store, range(30))
        store._commit.flush()
        os.truncate(data_file(tmp_path), 8192)
        assert read(store, records[0][0]) is None
        assert store.put(*make_record(99)) is False
        assert store.contains_many([records[0][0]]) == [False]
        assert list(store.keys()) == []
        assert store.stats().errors > 0
    with open_store() as store:
        assert store.stats().records == 30


def test_a_folder_deleted_underneath_is_misses_and_drops(tmp_path, open_store):
    """When the folder disappears, nothing is raised."""
    key, parts = make_record(1)
    with open_store() as store:
        store.put(key, parts)
        store._commit.flush()
        shutil.rmtree(tmp_path / "kv")
        assert read(store, key) is None
        assert store.put(*make_record(2)) is False
        assert store.delete(key) is False
        assert store.stats().records == 0
        assert not store.check().ok


# -- whose folder


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    """Other content, a file, a link, another version, another store's file: nothing changes."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        SegmentStore(tmp_path, capacity=MIB)
    with pytest.raises(ConfigError):
        SegmentStore(tmp_path / "notes.txt", capacity=MIB)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="symbolic link"):
        SegmentStore(tmp_path / "link", capacity=MIB)
    (tmp_path / "real" / "SUPER").write_text("kvlib segment store 1\nwhatever\n")
    with pytest.raises(IncompatibleDataError, match="version b'1'"):
        SegmentStore(tmp_path / "real", capacity=MIB)
    (tmp_path / "real" / "SUPER").write_text("kvlib filestore 1\n")
    with pytest.raises(ConfigError, match="not a segment store's"):
        SegmentStore(tmp_path / "real", capacity=MIB)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "notes.txt", "real"]
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["SUPER"]


def test_a_segment_of_another_store_is_not_ours(tmp_path, open_store):
    """A segment file copied from elsewhere holds no record of ours."""
    with SegmentStore(tmp_path / "other", capacity=MIB) as other:
        put_many(other, range(3))
    with open_store() as store:
        put_many(store, range(3, 6))
    shutil.copy(tmp_path / "other" / "seg-00000000.kv", tmp_path / "kv" / "seg-00000007.kv")
    shutil.rmtree(tmp_path / "kv" / "index.lmdb")
    with open_store() as store:
        assert set(store.keys()) == {make_record(s)[0] for s in range(3, 6)}


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give files away")
def test_another_user_s_folder_is_refused(tmp_path):
    """Not even root takes over a folder that belongs to somebody else."""
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    with pytest.raises(ConfigError, match="12345"):
        SegmentStore(tmp_path / "theirs", capacity=MIB)


def test_files_are_private(tmp_path, open_store):
    """KV is as sensitive as the prompt: nobody else can read any of it."""
    with open_store() as store:
        put_many(store, range(3))
        for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
            mode = path.stat().st_mode & 0o777
            if path.is_dir():
                assert mode == 0o700
            elif path.suffix in (".kv", ".mdb"):
                assert mode == 0o600, path


def test_a_rebuild_that_was_killed_is_done_again(tmp_path, open_store, monkeypatch):
    """Killed between making the index and filling it: the segments are not taken for litter."""
    with open_store() as store:
        records = put_many(store, range(5))
    shutil.rmtree(tmp_path / "kv" / "index.lmdb")
    with monkeypatch.context() as patch:
        patch.setattr("kvlib.store.segment_home.rebuild", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_store()
    with open_store() as store:
        assert [read(store, key) for key, _ in records] == [whole(r) for r in records]
        assert store.check().ok


@pytest.mark.parametrize("bad", [{"granule": 1000}, {"granule": 2048}, {"verify": "maybe"}])
def test_bad_settings_are_errors(open_store, bad):
    """And nothing is made."""
    with pytest.raises(ConfigError):
        open_store(**bad)


# -- limits


@pytest.mark.parametrize("uses", [1, 4096])
def test_records_are_learnt_when_one_is_first_put(open_store, monkeypatch, uses):
    """Or when more was used than is remembered until then; either way in order of use."""
    scans = []
    rows = Ledger.rows
    monkeypatch.setattr(Ledger, "rows", lambda *args: scans.append(1) or rows(*args))
    monkeypatch.setattr(segment_known, "_MAX_STAMPS", uses)
    records = [make_record(seed, size=3000) for seed in range(6)]
    keys = [key for key, _ in records]
    with open_store() as store:
        for record in records[:4]:
            assert store.put(*record)
        capacity = store.stats().used_bytes
    scans.clear()
    with open_store(capacity=capacity) as store:
        assert store.contains_many(keys) == [True] * 4 + [False] * 2
        assert read(store, keys[0]) is not None
        store.touch([keys[1], keys[5]])
        store._commit.flush()
        assert len(scans) == (uses == 1)
        for record in records[4:]:
            assert store.put(*record)
        assert len(scans) == 1
        assert store.contains_many(keys) == [True, True, False, False, True, True]


def test_a_smaller_capacity_evicts_at_open_and_gives_files_back(tmp_path, open_store):
    """A store opened with less room than it holds drops the oldest, and segments of no use."""
    with open_store(capacity=64 * PAGE, segment=8 * PAGE) as store:
        records = put_many(store, range(30))
        assert len(list((tmp_path / "kv").glob("seg-*.kv"))) == 8
    with open_store(capacity=6 * PAGE, segment=8 * PAGE) as store:
        assert list(store.keys()) == [key for key, _ in records[27:]]
        for seed in range(100, 110):
            (record,) = put_many(store, [seed])
            assert store.stats().used_bytes <= 6 * PAGE
        assert store.check().ok
    with open_store(capacity=6 * PAGE) as store:
        assert len(list((tmp_path / "kv").glob("seg-*.kv"))) < 8
        assert read(store, record[0]) == whole(record)
        assert store.check().ok


def test_a_full_index_drops_records_instead_of_failing(open_store):
    """With an index for few records, room in it is made like room on the disk."""
    with open_store(capacity=64 * MIB, index_bytes=1 << 19) as store:
        for seed in range(700):
            record = make_record(seed, size=100)
            assert store.put(*record)
        assert read(store, record[0]) == whole(record)
        stats = store.stats()
        assert stats.evicted > 0
        assert stats.rejected == 0
        assert 400 < stats.records <= 512
        assert store.check().ok


def test_a_map_that_is_full_rejects_and_recovers(tmp_path, open_store):
    """A stalled reader pins the index's old pages until the map is full: puts are dropped, reads
    go on, and when the reader ends so do the drops.
    """
    with open_store(capacity=64 * MIB, index_bytes=1 << 19) as store:
        first = put_many(store, range(20), size=100)
        store._commit.flush()
        env = store._home.index._env
        stalled = env.begin()
        for seed in range(100, 3000):
            if not store.put(*make_record(seed, size=100)):
                break
            store._commit.flush()
        else:
            pytest.fail("the map never filled up")
        assert store.stats().rejected > 0
        assert read(store, first[-1][0]) in (None, whole(first[-1]))
        stalled.abort()
        for seed in range(5000, 5010):
            store.put(*make_record(seed, size=100))
            store._commit.flush()
        record = make_record(6000, size=100)
        assert store.put(*record)
        assert read(store, record[0]) == whole(record)
        assert store.check(repair=True)
        assert store.check().ok


def test_a_stalled_writer_does_not_stall_others_for_ever(open_store, monkeypatch):
    """Who waits too long for the index drops its put; readers do not wait."""
    from kvlib.store import segment_index

    monkeypatch.setattr(segment_index, "_PATIENCE_S", 0.05)
    with open_store() as store:
        (record,) = put_many(store, [1])
        store._commit.flush()
        with store._home.index.write(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(read, store, record[0]).result() == whole(record)
            assert pool.submit(store.put, *make_record(2)).result() is False
        assert store.put(*make_record(2))


def test_a_record_that_fits_nowhere_drops_no_other(open_store, monkeypatch):
    """The disk is full and the record larger than all segments: what is there stays."""
    with open_store(capacity="8MiB", segment="1MiB") as store:
        records = put_many(store, range(10), size=50000)
        store._commit.flush()

        def full(number, size):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(store._home.files, "create", full)
        assert not store.put(*make_record(99, size=3 << 20))
        assert all(read(store, key) == whole((key, parts)) for key, parts in records)
        assert store.stats().evicted == 0
        assert store.check().ok


FULL = """
import resource, signal, sys
from kvlib.store.segments import SegmentStore
from kvlib.testing.records import make_record
from kvlib.testing.tiers import read
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (400000, 400000))
with SegmentStore(sys.argv[1], capacity="64MiB") as store:
    held = 0
    for seed in range(60):
        held += store.put(*make_record(seed, size=5000))
    assert not store.put(*make_record(99, size=900000))
    for seed in range(60):
        key, parts = make_record(seed, size=5000)
        assert read(store, key) in (None, b"".join(parts))
    print(held, store.check().ok, store.stats().records)
"""


def test_a_limit_on_file_sizes_is_survived(tmp_path):
    """Segments are made as large as the system allows; what does not fit is dropped."""
    child = [sys.executable, "-c", FULL, str(tmp_path / "kv")]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    held, ok, records = done.stdout.split()
    assert ok == "True"
    assert int(held) >= 60
    assert int(records) >= 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB in memory."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount")
    except FileNotFoundError:
        pytest.skip("no mount command")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_survived_and_comes_back(small_disk):
    """Somebody else fills the disk: reads are served, puts dropped, until there is room again."""
    with SegmentStore(small_disk / "kv", capacity="64MiB", segment="1MiB") as store:
        first = put_many(store, range(10), size=50000)
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={small_disk / 'filler'}", "bs=4096"],
            capture_output=True,
            check=False,
        )
        assert shutil.disk_usage(small_disk).free == 0
        results = [store.put(*make_record(seed, size=50000)) for seed in range(100, 160)]
        served = [read(store, key) for key, _ in first]
        assert all(got in (None, whole(r)) for got, r in zip(served, first, strict=True))
        (small_disk / "filler").unlink()
        record = make_record(500, size=50000)
        assert store.put(*record)
        store._commit.flush()
        assert read(store, record[0]) == whole(record)
        assert store.check().ok
    assert len(results) == 60


def test_a_record_not_yet_published_is_dropped_in_its_turn(open_store, monkeypatch):
    """What was used longest ago goes first, also if that means to publish it before."""
    monkeypatch.setattr("kvlib.store.segment_commit._GROUP_S", 1e6)
    with open_store(capacity=6 * PAGE) as store:
        records = put_many(store, [0, 1])
        store._commit.flush()
        records += put_many(store, [2])
        store.touch([records[0][0], records[1][0]])
        records += put_many(store, [3])
        held = store.contains_many([key for key, _ in records])
        assert held == [True, True, False, True]


# -- threads


def test_many_gets_of_one_record_at_once(open_store):
    """64 readers of one record, each into its own buffer, while it is dropped and put again."""
    record = make_record(1, size=300_000)
    with open_store(capacity=4 * MIB, staging="16MiB") as store:
        store.put(*record)
        start = threading.Barrier(65)

        def get() -> bytes | None:
            start.wait()
            return read(store, record[0])

        with ThreadPoolExecutor(64) as pool:
            waiting = [pool.submit(get) for _ in range(64)]
            start.wait()
            store.delete(record[0])
            store.put(*record)
            results = [w.result() for w in waiting]
        assert set(results) <= {None, whole(record)}
        assert store.stats().corrupt == 0
        assert store.check().ok
        assert not store._room._leases
        assert not store._room._left


def test_many_puts_of_one_record_at_once(open_store):
    """64 writers of one record make one write, and all are told that it is held."""
    record = make_record(1, size=30_000)
    with open_store() as store, ThreadPoolExecutor(64) as pool:
        assert all(pool.map(lambda _: store.put(*record), range(64)))
        stats = store.stats()
        assert (stats.puts, stats.duplicates, stats.records) == (1, 63, 1)
        assert store.check().ok


def test_a_record_being_read_keeps_its_room(open_store, monkeypatch):
    """Dropped while it is read, its granules go to nobody else until the reader is done."""
    record = make_record(1, size=3000)
    with open_store(capacity=2 * PAGE) as store:
        store.put(*record)
        store._commit.flush()
        inner = blockio.pread
        reading, go_on = threading.Event(), threading.Event()

        def slow(fd, views, offset):
            reading.set()
            assert go_on.wait(10)
            return inner(fd, views, offset)

        monkeypatch.setattr(blockio, "pread", slow)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(read, store, record[0])
            assert reading.wait(10)
            assert store.delete(record[0])
            assert store.put(*make_record(2, size=3000)) is False  # no room yet
            go_on.set()
            assert waiting.result() in (None, whole(record))
        assert store.put(*make_record(2, size=3000))
        assert store.check().ok


def test_opening_and_closing_leaks_no_files(open_store):
    """Fifty opens later as many file descriptors and threads are there as before."""
    with open_store() as store:
        put_many(store, [1])
    before = (len(os.listdir("/proc/self/fd")), threading.active_count())
    for _ in range(50):
        with open_store() as store:
            assert read(store, make_record(1)[0]) is not None
            store.put(*make_record(2, size=10))
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_a_deadline_in_the_middle_of_a_read_is_kept(open_store, monkeypatch):
    """A read that takes too long is given up."""
    record = make_record(1, size=9 * MIB)
    inner = blockio.pread

    def slow(fd, views, offset):
        time.sleep(0.05)
        return inner(fd, views, offset)

    with open_store(capacity=32 * MIB, threads=1) as store:
        store.put(*record)
        monkeypatch.setattr(blockio, "pread", slow)
        buffer = bytearray(10 * MIB)
        assert store.get_into(record[0], buffer, deadline=time.monotonic() + 0.02) is None
        assert store.stats().timeouts == 1


def test_an_index_that_others_lost_is_an_error(tmp_path, open_store):
    """While others have a store open whose index was deleted, nobody starts a second one."""
    with open_store() as store:
        put_many(store, [1])
        shutil.rmtree(tmp_path / "kv" / "index.lmdb")
        with pytest.raises(StoreError, match="others have the store open"):
            open_store()


def test_lmdb_can_walk_an_index():
    """The walker that an index is checked with after a kill is there in the version we pin."""
    assert segment_check._walk is not None, lmdb.__version__


def test_closing_waits_for_what_is_under_way(open_store, monkeypatch):
    """No file is closed under a reader or writer: its number may be another file's then."""
    record = make_record(1, size=3000)
    inner = blockio.pread
    reading, go_on = threading.Event(), threading.Event()

    def slow(fd, views, offset):
        reading.set()
        assert go_on.wait(10)
        return inner(fd, views, offset)

    store = open_store()
    store.put(*record)
    buffer = bytearray(len(whole(record)))
    monkeypatch.setattr(blockio, "pread", slow)
    with ThreadPoolExecutor(2) as pool:
        got = pool.submit(store.get_into, record[0], buffer)
        assert reading.wait(10)
        closing = pool.submit(store.close)
        time.sleep(0.05)
        assert not closing.done()
        go_on.set()
        assert got.result() == len(buffer)
        closing.result()
    assert buffer == whole(record)


def test_threads_that_use_a_store_being_closed_get_its_error(open_store):
    """Whatever they were doing: a result, or that it is closed."""
    records = [make_record(seed, size=9000) for seed in range(20)]
    store = open_store()

    def work(seed: int) -> bool:
        choose = random.Random(seed)
        try:
            while True:
                record = choose.choice(records)
                store.put(*record)
                assert read(store, record[0]) in (None, whole(record))
                store.delete(record[0])
        except StoreClosedError:
            return True

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(work, seed) for seed in range(4)]
        time.sleep(0.2)
        store.close()
        assert all(w.result(timeout=30) for w in waiting)
    with open_store() as store:
        assert not store._home.rebuilt
        assert store.check().ok
