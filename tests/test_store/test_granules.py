# SPDX-License-Identifier: Apache-2.0
"""The allocator and the accounts against a bitmap that knows nothing of runs."""

import tempfile

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvlib.errors import CorruptDataError
from kvlib.store.granules import FreeRuns
from kvlib.store.segment_format import Entry, Extent, pack_entry
from kvlib.store.segment_ledger import Ledger

SIZES = (23, 40)


@pytest.fixture
def runs(tmp_path):
    env = lmdb.open(str(tmp_path), max_dbs=8, sync=False)
    found = FreeRuns(env.open_db(b"starts"), env.open_db(b"sizes"))
    with env.begin(write=True) as txn:
        yield txn, found
    env.close()


def test_the_smallest_run_that_fits_is_taken(runs):
    """Best fit: a large run is not cut while a smaller one will do."""
    txn, free = runs
    free.release(txn, [Extent(0, 0, 10), Extent(0, 20, 4), Extent(1, 0, 6)])
    assert free.allocate(txn, 4) == (Extent(0, 20, 4),)
    assert free.allocate(txn, 5) == (Extent(1, 0, 5),)
    assert list(free.runs(txn)) == [Extent(0, 0, 10), Extent(1, 5, 1)]


def test_a_record_is_split_over_at_most_four_runs(runs):
    """Where no run is large enough the largest are taken whole; five pieces are too many."""
    txn, free = runs
    pieces = [Extent(0, 10 * i, 5) for i in range(5)]
    free.release(txn, pieces)
    assert free.allocate(txn, 21) is None
    assert list(free.runs(txn)) == pieces
    got = free.allocate(txn, 18)
    assert len(got) == 4
    assert sum(run.length for run in got) == 18
    assert sum(run.length for run in free.runs(txn)) == 25 - 18


def test_what_is_left_of_the_largest_run_is_no_candidate_twice(runs):
    """The rest of a split record may not land in a run that is already part of it."""
    txn, free = runs
    free.release(txn, [Extent(0, 0, 10), Extent(0, 20, 3)])
    assert free.allocate(txn, 15) is None
    assert list(free.runs(txn)) == [Extent(0, 0, 10), Extent(0, 20, 3)]
    assert sorted(free.allocate(txn, 13)) == [Extent(0, 0, 10), Extent(0, 20, 3)]
    assert list(free.runs(txn)) == []


@pytest.mark.parametrize("again", [Extent(0, 0, 1), Extent(0, 4, 2), Extent(0, 9, 5)])
def test_freeing_twice_is_refused(runs, again):
    """Granules that are free already are a sign of damage, not of room."""
    txn, free = runs
    free.release(txn, [Extent(0, 0, 10)])
    with pytest.raises(CorruptDataError):
        free.release(txn, [again])


class LedgerMachine(RuleBasedStateMachine):
    """Every granule is in exactly one place, whatever is done in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.env = lmdb.open(self.folder.name, max_dbs=8, sync=False)
        self.ledger = Ledger(self.env)
        self.owner: dict[tuple[int, int], int] = {}  # granule -> generation
        self.writing: dict[int, tuple[bytes, Entry]] = {}
        self.records: dict[bytes, Entry] = {}
        self.segments: dict[int, int] = {}
        self.given: set[int] = set()

    def take(self, entry: Entry) -> None:
        for segment, first, length in entry.extents:
            for granule in range(first, first + length):
                assert granule < self.segments[segment]
                assert (segment, granule) not in self.owner
                self.owner[segment, granule] = entry.generation

    def free(self, entry: Entry) -> None:
        self.owner = {at: g for at, g in self.owner.items() if g != entry.generation}

    def longest(self, pieces: int) -> int:
        """Granules that the largest free runs hold, counted one granule after the other."""
        lengths = []
        for segment, size in self.segments.items():
            run = 0
            for granule in range(size + 1):
                if granule < size and (segment, granule) not in self.owner:
                    run += 1
                else:
                    lengths.append(run)
                    run = 0
        return sum(sorted(lengths)[-pieces:])

    @precondition(lambda self: len(self.segments) < len(SIZES))
    @rule()
    def add_segment(self) -> None:
        size = SIZES[len(self.segments)]
        with self.env.begin(write=True) as txn:
            self.segments[self.ledger.add_segment(txn, size)] = size

    @rule(count=st.integers(1, 12), holder=st.sampled_from([b"a" * 16, b"b" * 16]))
    def reserve(self, count: int, holder: bytes) -> None:
        with self.env.begin(write=True) as txn:
            entry = self.ledger.reserve(txn, holder, 100, count)
        assert (entry is not None) == (self.longest(4) >= count)
        if entry is not None:
            assert entry.granules == count
            assert entry.generation not in self.given
            self.given.add(entry.generation)
            if self.longest(1) >= count:
                assert len(entry.extents) == 1
            self.take(entry)
            self.writing[entry.generation] = (holder, entry)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), name=st.sampled_from([b"k" * 64, b"l" * 64, b"m" * 64]))
    def publish(self, data, name: bytes) -> None:
        generation = data.draw(st.sampled_from(sorted(self.writing)))
        holder, entry = self.writing.pop(generation)
        first = name not in self.records
        used = data.draw(st.permutations(sorted(self.records.keys() - {name})))
        order = {**dict.fromkeys(used), name: entry, b"n" * 64: None}
        now = data.draw(st.integers(0, 9))
        with self.env.begin(write=True) as txn:
            before = self.ledger.state(txn)
            self.ledger.publish(txn, holder, order, now)
            rows = {key: self.ledger.get(txn, key) for key in order}
            after = self.ledger.state(txn)
        assert after.clock == max(before.clock, now)
        assert after.tick == before.tick + len(used) + first
        assert rows[b"n" * 64] is None
        assert (rows[name].generation == entry.generation) is first
        stamps = [rows[key].stamp for key in (*used, name)[: len(used) + first]]
        assert stamps == list(range(before.tick, after.tick))
        if first:
            self.records[name] = entry
        else:
            self.free(entry)

    @precondition(lambda self: self.records)
    @rule(data=st.data(), keep=st.booleans())
    def remove(self, data, keep: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.records)))
        entry = self.records.pop(name)
        with self.env.begin(write=True) as txn:
            assert self.ledger.remove(txn, name, generation=-1) is None
            got = self.ledger.remove(txn, name, holder=b"a" * 16 if keep else None)
        assert got is not None
        assert got.extents == entry.extents
        if keep:
            self.writing[entry.generation] = (b"a" * 16, entry)
        else:
            self.free(entry)

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def give_back(self, data) -> None:
        generation = data.draw(st.sampled_from(sorted(self.writing)))
        holder, entry = self.writing.pop(generation)
        with self.env.begin(write=True) as txn:
            self.ledger.give_back(txn, holder, entry)
            self.ledger.give_back(txn, holder, entry)  # the second time nothing is held
        self.free(entry)

    @rule(dead=st.sampled_from([b"a" * 16, b"b" * 16]))
    def sweep(self, dead: bytes) -> None:
        gone = [g for g, (holder, _) in self.writing.items() if holder == dead]
        with self.env.begin(write=True) as txn:
            assert self.ledger.sweep(txn, lambda holder: holder == dead) == len(gone)
        for generation in gone:
            self.free(self.writing.pop(generation)[1])

    @rule()
    def abort(self) -> None:
        txn = self.env.begin(write=True)
        self.ledger.reserve(txn, b"a" * 16, 1, 2)
        txn.abort()

    @invariant()
    def adds_up(self) -> None:
        with self.env.begin() as txn:
            assert self.ledger.audit(txn) == []
            assert self.ledger.state(txn).used == len(self.owner)
            assert self.ledger.count(txn) == len(self.records)
            free = {
                (segment, granule)
                for segment, first, length in self.ledger.free.runs(txn)
                for granule in range(first, first + length)
            }
        every = {(n, g) for n, size in self.segments.items() for g in range(size)}
        assert free == every - self.owner.keys()

    def teardown(self) -> None:
        self.env.close()
        self.folder.cleanup()


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def filled(env) -> tuple[Ledger, list[Entry]]:
    ledger = Ledger(env)
    with env.begin(write=True) as txn:
        ledger.add_segment(txn, 40)
        entries = []
        for i in range(4):
            entry = ledger.reserve(txn, b"a" * 16, 100 + i, 3)
            entries.append(entry)
            ledger.publish(txn, b"a" * 16, {bytes([i]) * 64: entry}, 0)
        entries.append(ledger.reserve(txn, b"a" * 16, 9, 2))
    return ledger, entries


@pytest.mark.parametrize(
    "how", ["row", "held", "overlap", "outside", "free", "used", "tick", "segments"]
)
def test_damaged_accounts_are_found_and_repaired(tmp_path, how):
    """Whatever is wrong in the accounts is named, and after a repair nothing is."""
    env = lmdb.open(str(tmp_path), max_dbs=8)
    ledger, entries = filled(env)
    with env.begin(write=True) as txn:
        name = b"\1" * 64
        if how == "row":
            txn.put(name, b"x" * 44, db=ledger.records)
        elif how == "held":
            txn.put(b"a" * 16 + entries[4].generation.to_bytes(8, "big"), b"", db=ledger._held)
        elif how in ("overlap", "outside"):
            where = entries[2].extents if how == "overlap" else (Extent(0, 39, 3),)
            moved = entries[1]._replace(extents=where)
            txn.put(name, pack_entry(name, moved), db=ledger.records)
        elif how == "free":
            ledger.free.clear(txn)
        else:
            wrong = {"used": {"used": 1}, "tick": {"tick": 2}, "segments": {"segments": 0}}[how]
            ledger._set(txn, ledger.state(txn)._replace(**wrong))
    with env.begin(write=True) as txn:
        assert ledger.audit(txn) != []
        assert ledger.repair(txn) != []
        assert ledger.audit(txn) == []
        kept = dict(ledger.entries(txn))
        lost = {b"\1" * 64} if how in ("row", "overlap", "outside") else set()
        assert kept.keys() == {bytes([i]) * 64 for i in range(4)} - lost
        assert ledger.state(txn).segments == 1
        assert ledger.state(txn).tick > max(entry.stamp for entry in kept.values())
    env.close()


def test_a_holder_taken_for_dead_publishes_nothing(tmp_path):
    """Its room may be another record's by now."""
    env = lmdb.open(str(tmp_path), max_dbs=8)
    ledger, entries = filled(env)
    with env.begin(write=True) as txn:
        ledger.sweep(txn, lambda _: True)
        ledger.publish(txn, b"a" * 16, {b"z" * 64: entries[4]}, 0)
        assert ledger.get(txn, b"z" * 64) is None
        assert ledger.audit(txn) == []
    env.close()
