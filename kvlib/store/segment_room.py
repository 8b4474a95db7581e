# SPDX-License-Identifier: Apache-2.0
"""Who gets room in a segment store, and what this process knows of its records.

Room is taken in the same transaction that drops the records it belonged to, before a byte is
written, so the capacity holds at every moment for all processes together. What another process
stores or drops is found when it is looked up; for replacement, the index is compared with what is
known here before records are dropped, at most every few seconds.

A record that is dropped while this process reads it keeps its granules until the last reader is
done. Readers of other processes are not waited for: they compare the record's generation after
reading, and a record that went away meanwhile is a miss. Granules are written over only after the
transaction that dropped their record, so a generation that is still there proves the bytes.
"""

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from kvlib.errors import CorruptDataError
from kvlib.store.segment_commit import Written
from kvlib.store.segment_format import Entry, granules_of
from kvlib.store.segment_home import Home
from kvlib.store.segment_index import IndexFaultError
from kvlib.store.segment_lru import Replacement

if TYPE_CHECKING:
    import lmdb

__all__ = ["NO_ROOM", "Room"]

NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_RESCAN_S = 5.0
_RETRY_S = 1.0
_FIRST_BYTES = 64 << 20  # of the first segment
_MAX_STAMPS = 4096


class _InVainError(Exception):
    """Even what was dropped did not make room enough: the transaction is undone, nothing lost."""


class Room:
    """The accounts of one open store.

    Args:
        home: the open folder.
        capacity: granules that records and writers may hold.
        segment_granules: of a new segment, at most.
        max_records: that the index has room for.
        policy: which record goes first.
        nudge: asks for `publish` soon, in another thread.
    """

    def __init__(
        self,
        home: Home,
        *,
        capacity: int,
        segment_granules: int,
        max_records: int,
        policy: Replacement,
        nudge: Callable[[], None],
    ) -> None:
        self.capacity = capacity
        self._home = home
        self._index = home.index
        self._ledger = home.index.ledger
        self._segment_granules = segment_granules
        self._max_records = max_records
        self._policy = policy
        self._nudge = nudge
        self._lock = threading.Lock()
        self._known: set[bytes] = set()  # to the policy
        self._pending: dict[bytes, Entry] = {}
        self._used: dict[bytes, None] = {}  # since the last commit, in order
        self._leases: Counter[bytes] = Counter()
        self._left: dict[bytes, list[Entry]] = {}  # dropped while leased
        self._owed: list[Entry] = []  # to be freed with the next transaction
        self._seen = 0
        self._scanned = 0.0
        self._pins: Counter[bytes] = Counter()
        self._full_until = 0.0  # the disk: no new segment is tried
        self.evicted = 0
        self.rescan()

    # -- transactions

    @contextmanager
    def _write(self) -> "Iterator[lmdb.Transaction[bytes]]":
        """A write transaction that first frees what is owed."""
        with self._lock:
            owed, self._owed = self._owed, []
        try:
            with self._index.write(self._committed) as txn:
                for entry in owed:
                    self._ledger.give_back(txn, self._home.me, entry)
                yield txn
        except BaseException as exc:
            with self._lock:
                self._owed += owed
            if isinstance(exc, CorruptDataError):
                raise IndexFaultError(f"the index is damaged: {exc}") from exc
            raise

    def _committed(self, number: int) -> None:
        with self._lock:
            if number == self._seen + 1:  # nobody else wrote since
                self._seen = number

    def rescan(self, *, at_most_every: float = 0.0) -> None:
        """Learn what other processes stored and dropped.

        Raises:
            IndexFaultError: the index cannot be read.
        """
        now = time.monotonic()
        with self._lock:
            if self._index.last_txn == self._seen or now - self._scanned < at_most_every:
                return
            self._scanned = now
        with self._index.read() as txn:
            number = txn.id()
            rows = self._ledger.stamps(txn)
        rows.sort()
        unit = self._home.super.granule
        with self._lock:
            for name in self._known - {row[1] for row in rows} - self._pending.keys():
                self._forget(name)
            for _, name, size in rows:
                if name not in self._known:
                    self._known.add(name)
                    self._policy.on_insert(name, granules_of(size, unit) * unit)
            self._seen = max(self._seen, number)

    # -- what is known

    def lookup(self, name: bytes) -> Entry | None:
        """Where a record lies; also one that is written and not yet published.

        Raises:
            CorruptDataError: its row is damaged.
            IndexFaultError: the index cannot be read.
        """
        entry = self._pending.get(name)
        if entry is None:
            with self._index.read() as txn:
                entry = self._ledger.get(txn, name)
        return entry

    def contains(self, names: list[bytes]) -> list[bool]:
        """Whether there is a row of each."""
        pending = set(self._pending) if self._pending else ()  # first: it moves into the index
        with self._index.read() as txn:
            get = txn.get
            if pending:
                return [name in pending or get(name) is not None for name in names]
            return [get(name) is not None for name in names]

    def held(self) -> tuple[int, int]:
        """Records and granules held."""
        with self._lock:
            pending = list(self._pending)
        with self._index.read() as txn:
            new = sum(txn.get(name) is None for name in pending)
            return self._ledger.count(txn) + new, self._ledger.state(txn).used

    def names(self) -> list[bytes]:
        """All records, the one to be dropped first at the front."""
        self.rescan()
        with self._lock:
            return list(self._policy.victims())

    def is_pending(self, names: Iterable[bytes]) -> bool:
        """Whether one of these is not yet published."""
        return any(name in self._pending for name in names)

    def touch(self, names: Iterable[bytes]) -> None:
        """Mark records as used."""
        with self._lock:
            for name in names:
                if name in self._known:
                    self._policy.on_hit(name)
                    self._used.pop(name, None)
                    self._used[name] = None
            due = len(self._used) > _MAX_STAMPS
        if due:
            self._nudge()

    def pin(self, names: Iterable[bytes]) -> None:
        """Do not drop these records to make room."""
        with self._lock:
            self._pins.update(names)

    def unpin(self, names: Iterable[bytes]) -> None:
        """Undo one `pin` of each."""
        with self._lock:
            self._pins.subtract(names)
            self._pins = +self._pins

    def found(self, name: bytes, entry: Entry) -> None:
        """A record was read that another process may have written."""
        with self._lock:
            if name not in self._known:
                self._policy.on_insert(name, entry.granules * self._home.super.granule)
                self._known.add(name)

    def _forget(self, name: bytes) -> None:
        """The lock is held."""
        self._known.discard(name)
        self._used.pop(name, None)
        self._policy.on_remove(name)

    def missed(self, name: bytes) -> None:
        """A record is not there (any more)."""
        with self._lock:
            if name in self._known and name not in self._pending:
                self._forget(name)

    # -- leases

    @contextmanager
    def lease(self, name: bytes) -> Iterator[None]:
        """Keep the granules of a record from being given to another one."""
        with self._lock:
            self._leases[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases[name] -= 1
                if self._leases[name] == 0:
                    del self._leases[name]
                    left = self._left.pop(name, [])
                    self._owed += left
                else:
                    left = []
            if left:
                self._nudge()  # not here: a reader does not wait for the index's writers

    def settle(self) -> None:
        """Free what is owed, now or with the next transaction that succeeds."""
        try:
            with self._write():
                pass
        except (IndexFaultError, CorruptDataError, OSError):
            return

    def _take_out(
        self, txn: "lmdb.Transaction[bytes]", name: bytes, generation: int | None
    ) -> bool:
        """Remove a record within a transaction; what is being read stays held."""
        with self._lock:
            leased = name in self._leases
        try:
            entry = self._ledger.remove(
                txn, name, generation=generation, holder=self._home.me if leased else None
            )
        except CorruptDataError:
            self._ledger.repair(txn)
            return True
        if entry is not None and leased:
            with self._lock:
                if name in self._leases:
                    self._left.setdefault(name, []).append(entry)
                else:
                    self._owed.append(entry)
        return entry is not None

    def drop(self, name: bytes, generation: int | None = None) -> bool:
        """Remove a published record; whether it was there.

        Raises:
            IndexFaultError: the index cannot be written; the record stays.
        """
        with self._write() as txn:
            there = self._take_out(txn, name, generation)
        if there or generation is None:
            self.missed(name)
        return there

    # -- taking room

    def reserve(self, size: int, granules: int, *, insist: bool = False) -> Entry | None:
        """Take room for a record, dropping others if need be.

        Args:
            size: bytes of the container.
            granules: that it takes.
            insist: where the record to be dropped is not published yet, drop the next one instead.

        Returns:
            Where it goes; None if there is none: everything is being written or read, or the disk
            is full.

        Raises:
            IndexFaultError: the index cannot be written.
        """
        dropped: list[bytes] = []
        try:
            with self._write() as txn:
                entry = self._make_room(txn, size, granules, dropped, insist)
                if entry is None and dropped:
                    raise _InVainError
        except _InVainError:
            return None
        with self._lock:
            self.evicted += len(dropped)
            for name in dropped:
                if name not in self._pending:
                    self._forget(name)
        return entry

    def _make_room(
        self,
        txn: "lmdb.Transaction[bytes]",
        size: int,
        granules: int,
        dropped: list[bytes],
        insist: bool,
    ) -> Entry | None:
        victims: Iterator[bytes] | None = None
        can_grow = True
        while True:
            used = self._ledger.state(txn).used
            fits = used + granules <= self.capacity
            if fits and self._ledger.count(txn) + len(self._pending) < self._max_records:
                entry = self._ledger.reserve(txn, self._home.me, size, granules)
                if entry is not None:
                    return entry
                if can_grow:
                    can_grow = self._grow(txn, granules)
                    if can_grow:
                        continue
            if victims is None:
                victims = self._victims(insist)
            name = next(victims, None)
            if name is None:
                return None
            if self._take_out(txn, name, None):
                dropped.append(name)

    def _victims(self, insist: bool) -> Iterator[bytes]:
        """Records to drop, the first one first, but none that is read, or not yet published."""
        tried: set[bytes] = set()
        depth = 16
        while True:
            with self._lock:
                known = len(self._known)
                names = [
                    name
                    for name in islice(self._policy.victims(), depth)
                    if name not in tried and name not in self._leases and name not in self._pins
                ]
                tried.update(names)
                pending = self._pending.keys() & names
            for name in names:
                if name not in pending:
                    yield name
                elif not insist:
                    return
            if depth >= known:
                return
            depth *= 4

    def _grow(self, txn: "lmdb.Transaction[bytes]", granules: int) -> bool:
        """Make one more segment; whether there was room for it."""
        segments = self._ledger.segments(txn)
        held = sum(segments.values())
        # A store takes twice the room that it has each time: a small one stays small.
        least = max(held, _FIRST_BYTES // self._home.super.granule, granules)
        left = min(least, self._segment_granules, self.capacity - held)
        if segments and time.monotonic() < self._full_until:
            return False
        while left > 0:
            try:
                self._home.files.create(
                    self._ledger.state(txn).segments, left * self._home.super.granule
                )
            except OSError as exc:
                if exc.errno not in NO_ROOM:
                    return False
                if left <= granules:
                    self._full_until = time.monotonic() + _RETRY_S
                    return False
                left = max(left // 2, granules)  # the disk is smaller than the capacity
            else:
                self._ledger.add_segment(txn, left)
                return True
        return False

    def sweep(self) -> int:
        """Free what processes held that are dead by now.

        Raises:
            IndexFaultError: the index cannot be written.
        """
        with self._write() as txn:
            try:
                return self._ledger.sweep(txn, self._home.is_dead)
            except CorruptDataError:
                return len(self._ledger.repair(txn))

    def shrink(self, *, evict: bool = True) -> None:
        """Drop records until the capacity holds, and whole segments that it has no use for.

        Raises:
            IndexFaultError: the index cannot be written.
        """
        dropped: list[bytes] = []
        gone = []
        with self._write() as txn:
            victims = iter([name for name in self.names() if name not in self._pins])
            while evict and self._ledger.state(txn).used > self.capacity:
                name = next(victims, None)
                if name is None:
                    break
                if self._take_out(txn, name, None):
                    dropped.append(name)
            segments = self._ledger.segments(txn)
            for number, granules in sorted(segments.items(), reverse=True):
                if sum(segments.values()) - granules >= self.capacity and self._ledger.drop_segment(
                    txn, number, granules
                ):
                    gone.append(number)
                    del segments[number]
        for name in dropped:
            self.missed(name)
        for number in gone:
            self._home.files.remove(number)
        self.evicted += len(dropped)

    def audit(self, *, repair: bool) -> list[str]:
        """What is wrong with the accounts; see `Ledger.audit` and `Ledger.repair`.

        Raises:
            IndexFaultError: the index cannot be read or written.
        """
        if repair:
            with self._write() as txn:
                return self._ledger.repair(txn)
        with self._index.read() as txn:
            return self._ledger.audit(txn)

    # -- from reserved to published

    def written(self, name: bytes, entry: Entry) -> None:
        """A reserved record has its bytes: readers of this process find it from now on."""
        with self._lock:
            self._pending[name] = entry
            self._known.add(name)
            self._policy.on_insert(name, entry.granules * self._home.super.granule)
            self._used.pop(name, None)
            self._used[name] = None

    def abandon(self, entry: Entry) -> None:
        """A reserved record was not written; its room is freed."""
        with self._lock:
            self._owed.append(entry)
        self.settle()

    def publish(self, group: list[Written]) -> bool:
        """Bring written records to the device and into the index, and note what was used.

        Returns:
            Whether that worked; if not, the records are dropped.
        """
        with self._lock:
            order, self._used = self._used, {}
            if not order and not group and not self._owed:
                return True
        by_name = {written.name: written for written in group}
        for name in by_name.keys() - order.keys():
            order[name] = None
        try:
            self._home.files.sync(
                sorted({extent.segment for w in group for extent in w.entry.extents})
            )
            with self._write() as txn:
                run: list[bytes] = []
                for name in order:
                    if name not in by_name:
                        run.append(name)
                        continue
                    self._ledger.stamp(txn, run)
                    run = []
                    self._ledger.publish(txn, self._home.me, name, by_name[name].entry)
                self._ledger.stamp(txn, run)
            self._index.check_readers(every=_RESCAN_S)
            worked = True
        except (IndexFaultError, CorruptDataError, OSError):
            worked = False
        with self._lock:
            for name, entry in group:
                self._pending.pop(name, None)
                if not worked:
                    self._forget(name)
                    self._owed.append(entry)
        return worked
