# SPDX-License-Identifier: Apache-2.0
"""The index as a book of accounts: where each record lies, what is free, who holds the rest.

Every granule of every segment is in exactly one place: in a record's row, in a row of `held`
(reserved by a writer, or given up while it is still being read), or in a free run. Each method runs
inside one transaction and leaves that so. What is held has a holder; the rows of a holder that died
are freed by whoever finds it dead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvlib.errors import CorruptDataError
from kvlib.keys import DIGEST_BYTES
from kvlib.store.granules import FreeRuns
from kvlib.store.segment_accounts import Accounts
from kvlib.store.segment_format import (
    Entry,
    Extent,
    pack_entry,
    peek_entry,
    unpack_entry,
)
from kvlib.store.terms import NO_TENANT

if TYPE_CHECKING:
    import lmdb

__all__ = ["HOLDER_BYTES", "Ledger", "Limits", "Space", "State"]

HOLDER_BYTES = 16
_DATABASES = (b"records", b"starts", b"sizes", b"segments", b"held", b"state", b"tenants")
_STATE = Struct("<QQIQ")
_LIMITS = Struct("<QQQQ")
_SEGMENT = Struct(">I")
_GENERATION = Struct(">Q")


class State(NamedTuple):
    """Counters of the store.

    `tick` is the next generation or stamp; `used` the granules that are not free; `segments` the
    number the next segment file gets; `clock` the latest time that anybody wrote, in milliseconds
    since 1970.
    """

    tick: int = 1
    used: int = 0
    segments: int = 0
    clock: int = 0


class Limits(NamedTuple):
    """What the last `KVStore` that opened the folder keeps to, in bytes; 0 where there is none."""

    capacity: int = 0
    high: int = 0
    low: int = 0
    min_free: int = 0


class Ledger:
    """The databases of an open environment.

    Args:
        env: opened with room for seven databases.
    """

    def __init__(self, env: "lmdb.Environment") -> None:
        self._env = env
        opened = [env.open_db(name) for name in _DATABASES]
        self.records, starts, sizes, self._segments, self._held, self._state, tenants = opened
        self.accounts = Accounts(tenants)
        self.free = FreeRuns(starts, sizes)

    @property
    def is_ours(self) -> bool:
        """Whether the environment holds our databases and no others."""
        return self._env.stat()["entries"] == len(_DATABASES)

    # -- looking

    def state(self, txn: "lmdb.Transaction[bytes]") -> State:
        """The counters."""
        data = txn.get(b"state", db=self._state)
        return State(*_STATE.unpack(data)) if data else State()

    def is_filled(self, txn: "lmdb.Transaction[bytes]") -> bool:
        """Whether anything was ever entered."""
        return txn.get(b"state", db=self._state) is not None

    def _set(self, txn: "lmdb.Transaction[bytes]", state: State) -> None:
        txn.put(b"state", _STATE.pack(*state), db=self._state)

    def get(self, txn: "lmdb.Transaction[bytes]", name: bytes) -> Entry | None:
        """Where a record lies.

        Raises:
            CorruptDataError: its row is damaged.
        """
        data = txn.get(name, db=self.records)
        return None if data is None else unpack_entry(name, data)

    def count(self, txn: "lmdb.Transaction[bytes]") -> int:
        """Records held."""
        return txn.stat(self.records)["entries"]

    def entries(self, txn: "lmdb.Transaction[bytes]") -> Iterator[tuple[bytes, Entry | None]]:
        """All records in order of their keys; None for a row that is damaged."""
        with txn.cursor(db=self.records) as cursor:
            for name, data in cursor:
                try:
                    yield name, unpack_entry(name, data)
                except CorruptDataError:
                    yield name, None

    def rows(self, txn: "lmdb.Transaction[bytes]") -> list[tuple[bytes, Entry]]:
        """Key and row, without extents, of all records, the one used longest ago first.

        The rows are unchecked: a damaged one is found by its reader.
        """
        with txn.cursor(db=self.records) as cursor:
            rows = [
                (name, peek_entry(data)) for name, data in cursor if len(name) == 2 * DIGEST_BYTES
            ]
        rows.sort(key=_stamp_of)
        return rows

    def limits(self, txn: "lmdb.Transaction[bytes]") -> Limits:
        """What `set_limits` noted last."""
        data = txn.get(b"limits", db=self._state)
        return Limits(*_LIMITS.unpack(data)) if data else Limits()

    def set_limits(self, txn: "lmdb.Transaction[bytes]", limits: Limits) -> None:
        """Note what the store is kept to, for whoever looks at it."""
        txn.put(b"limits", _LIMITS.pack(*limits), db=self._state)

    def note_time(self, txn: "lmdb.Transaction[bytes]", now: int) -> None:
        """Remember that it is this late."""
        state = self.state(txn)
        if now > state.clock:
            self._set(txn, state._replace(clock=now))

    def segments(self, txn: "lmdb.Transaction[bytes]") -> dict[int, int]:
        """Granules of each segment."""
        with txn.cursor(db=self._segments) as cursor:
            return {_SEGMENT.unpack(k)[0]: _SEGMENT.unpack(v)[0] for k, v in cursor}

    def held(self, txn: "lmdb.Transaction[bytes]") -> Iterator[tuple[bytes, int, Entry | None]]:
        """Holder, generation and place of everything held; None for a damaged row."""
        with txn.cursor(db=self._held) as cursor:
            for key, data in cursor:
                try:
                    entry = unpack_entry(key, data)
                except CorruptDataError:
                    entry = None
                yield key[:HOLDER_BYTES], _GENERATION.unpack(key[HOLDER_BYTES:])[0], entry

    # -- taking and giving back

    def add_segment(self, txn: "lmdb.Transaction[bytes]", granules: int) -> int:
        """Enter a new segment, all free; returns its number."""
        state = self.state(txn)
        number = state.segments
        txn.put(_SEGMENT.pack(number), _SEGMENT.pack(granules), db=self._segments)
        self.free.release(txn, [Extent(number, 0, granules)])
        self._set(txn, state._replace(segments=number + 1))
        return number

    def drop_segment(self, txn: "lmdb.Transaction[bytes]", number: int, granules: int) -> bool:
        """Take a segment out if all of it is free."""
        if Extent(number, 0, granules) not in set(self.free.runs(txn)):
            return False
        self.free.take(txn, Extent(number, 0, granules))
        return txn.delete(_SEGMENT.pack(number), db=self._segments)

    def reserve(
        self,
        txn: "lmdb.Transaction[bytes]",
        holder: bytes,
        size: int,
        granules: int,
        *,
        expires: int = 0,
        tenant: bytes = NO_TENANT,
        quota: int = 0,
        now: int = 0,
    ) -> Entry | None:
        """Take room for a record that is about to be written; None if four runs do not hold it.

        Args:
            txn: a write transaction.
            holder: who writes it.
            size: bytes of the container.
            granules: that it takes.
            expires: when its time is over, in milliseconds since 1970; 0 for never.
            tenant: on whose account it is.
            quota: granules that the caller holds this tenant to; 0 for none. Only noted here.
            now: how late it is; see `note_time`.
        """
        extents = self.free.allocate(txn, granules)
        if extents is None:
            return None
        state = self.state(txn)
        entry = Entry(size, state.tick, 0, extents, expires, tenant)
        clock = max(state.clock, now)
        self._set(txn, State(state.tick + 1, state.used + granules, state.segments, clock))
        self.accounts.charge(txn, tenant, granules, quota)
        self._hold(txn, holder, entry)
        return entry

    def _hold(self, txn: "lmdb.Transaction[bytes]", holder: bytes, entry: Entry) -> None:
        key = holder + _GENERATION.pack(entry.generation)
        txn.put(key, pack_entry(key, entry), db=self._held)

    def give_back(self, txn: "lmdb.Transaction[bytes]", holder: bytes, entry: Entry) -> None:
        """Free what is held."""
        if txn.delete(holder + _GENERATION.pack(entry.generation), db=self._held):
            self._free(txn, entry)

    def _free(self, txn: "lmdb.Transaction[bytes]", entry: Entry) -> None:
        self.free.release(txn, entry.extents)
        state = self.state(txn)
        self._set(txn, state._replace(used=state.used - entry.granules))
        self.accounts.charge(txn, entry.tenant, -entry.granules)

    def publish(
        self,
        txn: "lmdb.Transaction[bytes]",
        holder: bytes,
        order: Mapping[bytes, Entry | None],
        now: int,
    ) -> None:
        """Enter written records and mark others as used, the last one as used last.

        Args:
            txn: a write transaction.
            holder: who wrote them.
            order: entries of those that were written, None for those that were used.
            now: how late it is; see `note_time`.
        """
        tick = self.state(txn).tick
        for name, entry in order.items():
            if entry is None:
                tick += self._stamp(txn, name, tick)
            else:
                tick += self._enter(txn, holder, name, entry._replace(stamp=tick))
        state = self.state(txn)  # room was freed where another one was faster
        self._set(txn, state._replace(tick=tick, clock=max(state.clock, now)))

    def _enter(
        self, txn: "lmdb.Transaction[bytes]", holder: bytes, name: bytes, entry: Entry
    ) -> bool:
        """Enter a written record; False if another one of that key was faster, and room is freed.

        A holder whose row is gone was taken for dead, and its room may be another record's by now.
        """
        key = holder + _GENERATION.pack(entry.generation)
        if txn.get(key, db=self._held) is None:
            return False
        if not txn.put(name, pack_entry(name, entry), db=self.records, overwrite=False):
            self.give_back(txn, holder, entry)
            return False
        return txn.delete(key, db=self._held)

    def _stamp(self, txn: "lmdb.Transaction[bytes]", name: bytes, tick: int) -> bool:
        """Mark a record as used; whether it is there."""
        try:
            entry = self.get(txn, name)
        except CorruptDataError:
            return False  # found by whoever reads it
        if entry is None:
            return False
        return txn.put(name, pack_entry(name, entry._replace(stamp=tick)), db=self.records)

    def remove(
        self,
        txn: "lmdb.Transaction[bytes]",
        name: bytes,
        *,
        generation: int | None = None,
        holder: bytes | None = None,
    ) -> Entry | None:
        """Take a record out.

        Args:
            txn: a write transaction.
            name: its key's 64 bytes.
            generation: only if it is still this one.
            holder: keep its room for this holder, who frees it when the last reader is done.

        Returns:
            Where it lay, None if it was not there.

        Raises:
            CorruptDataError: its row is damaged, or the free runs are; `repair` is needed.
        """
        entry = self.get(txn, name)
        if entry is None or generation not in (None, entry.generation):
            return None
        txn.delete(name, db=self.records)
        if holder is None:
            self._free(txn, entry)
        else:
            self._hold(txn, holder, entry)
        return entry

    def sweep(self, txn: "lmdb.Transaction[bytes]", is_dead: Callable[[bytes], bool]) -> int:
        """Free what dead holders left; how many rows that were."""
        rows = list(self.held(txn))
        dead = {holder for holder in {row[0] for row in rows} if is_dead(holder)}
        swept = [(holder, entry) for holder, _, entry in rows if holder in dead]
        for holder, entry in swept:
            if entry is None:
                raise CorruptDataError("a row of held granules is damaged")
            self.give_back(txn, holder, entry)
        return len(swept)

    # -- checking

    def _rows(self, txn: "lmdb.Transaction[bytes]") -> "Iterator[_Row]":
        lengths = {self.records: 2 * DIGEST_BYTES, self._held: HOLDER_BYTES + _GENERATION.size}
        for database in lengths:
            with txn.cursor(db=database) as cursor:
                for key, data in cursor:
                    if len(key) != lengths[database]:
                        raise CorruptDataError(f"a row under a key of {len(key)} bytes")
                    try:
                        yield _Row(database, key, unpack_entry(key, data))
                    except CorruptDataError:
                        yield _Row(database, key, None)

    def audit(self, txn: "lmdb.Transaction[bytes]") -> list[str]:
        """Look whether every granule is in exactly one place; a line for everything that is not.

        Raises:
            CorruptDataError: there are rows that cannot be ours; the index must be made anew.
        """
        return self._audit(txn)[0]

    def _is_tiled(self, txn: "lmdb.Transaction[bytes]", rows: "list[_Row]") -> bool:
        """Whether records, holders and free runs cover all segments without gap or overlap."""
        runs = [extent for row in rows if row.entry for extent in row.entry.extents]
        runs += self.free.runs(txn)
        runs.sort()
        ends = dict.fromkeys(self.segments(txn), 0)
        for segment, first, length in runs:
            if ends.get(segment) != first:
                return False
            ends[segment] = first + length
        return ends == self.segments(txn)

    def _audit(
        self, txn: "lmdb.Transaction[bytes]"
    ) -> "tuple[list[str], list[_Row], Space | None]":
        rows = list(self._rows(txn))
        entries = [row.entry for row in rows if row.entry]
        state = self.state(txn)
        top = max((max(entry.generation, entry.stamp) for entry in entries), default=0)
        problems = []
        if state.used != sum(entry.granules for entry in entries):
            problems.append(f"{state.used} granules counted, not those that are held")
        if state.tick <= top:
            problems.append(f"the next generation is {state.tick}, {top} was given already")
        problems += self.accounts.audit(txn, entries)
        if state.segments <= max(self.segments(txn), default=-1):
            problems.append(f"the next segment is {state.segments}, which there is already")
        if self._is_tiled(txn, rows) and len(entries) == len(rows):
            return problems, [], None
        bad = []
        space = Space(self.segments(txn))
        for row in sorted(rows, key=lambda r: -r.entry.generation if r.entry else 0):
            if row.entry is None or not space.take(row.entry.extents):
                bad.append(row)
                problems.append(f"{row.key.hex()[:16]}: a damaged row, or its room is another's")
        if not bad:
            problems.append("the free runs are not what records and writers leave")
        return problems, bad, space

    def repair(self, txn: "lmdb.Transaction[bytes]") -> list[str]:
        """Drop rows that are damaged or overlap newer ones, and make the free runs anew.

        Returns:
            What was wrong.

        Raises:
            CorruptDataError: see `audit`.
        """
        problems, bad, space = self._audit(txn)
        if not problems:
            return []
        for row in bad:
            txn.delete(row.key, db=row.database)
        entries = [row.entry for row in self._rows(txn) if row.entry]
        top = max((max(entry.generation, entry.stamp) for entry in entries), default=0)
        if space is not None:
            self.free.clear(txn)
            for run in space.gaps():
                self.free.release(txn, [run])
        used = sum(entry.granules for entry in entries)
        state = self.state(txn)
        segments = max(state.segments, max(self.segments(txn), default=-1) + 1)
        self._set(txn, State(max(state.tick, top + 1), used, segments, state.clock))
        self.accounts.make(txn, entries)
        return problems

    def fill(
        self,
        txn: "lmdb.Transaction[bytes]",
        segments: dict[int, int],
        records: Iterable[tuple[bytes, Entry]],
    ) -> None:
        """Make the whole index anew from what was found in the segments.

        Args:
            txn: a write transaction on an empty index.
            segments: granules of each.
            records: without overlaps, from the one used longest ago to the one used last.
        """
        for number, granules in segments.items():
            txn.put(_SEGMENT.pack(number), _SEGMENT.pack(granules), db=self._segments)
        space = Space(segments)
        top = 0
        found = list(records)
        kept: list[Entry] = []
        for _, entry in found:
            top = max(top, entry.generation)
        for tick, (name, entry) in enumerate(found, top + 1):
            if space.take(entry.extents):
                txn.put(name, pack_entry(name, entry._replace(stamp=tick)), db=self.records)
                kept.append(entry)
        self.accounts.make(txn, kept)
        for run in space.gaps():
            self.free.release(txn, [run])
        self._set(txn, State(top + 1 + len(found), space.used, max(segments, default=-1) + 1))


def _stamp_of(row: tuple[bytes, Entry]) -> int:
    return row[1].stamp


class _Row(NamedTuple):
    """A row that gives granules to somebody; no entry if it is damaged."""

    database: "lmdb._Database"
    key: bytes
    entry: Entry | None


class Space:
    """A map of all granules, one byte each, for checking.

    Args:
        segments: granules of each.
    """

    def __init__(self, segments: dict[int, int]) -> None:
        self._taken = {number: bytearray(granules) for number, granules in segments.items()}

    def take(self, extents: Iterable[Extent]) -> bool:
        """Mark granules as taken; False, and nothing marked, if one is taken or not there."""
        runs = list(extents)
        for i, (segment, first, length) in enumerate(runs):
            here = self._taken.get(segment, b"")
            fits = length > 0 and first + length <= len(here)
            if not fits or any(here[first : first + length]):
                for other in runs[:i]:
                    self._taken[other.segment][other.first : other.first + other.length] = bytes(
                        other.length
                    )
                return False
            self._taken[segment][first : first + length] = b"\1" * length
        return True

    @property
    def used(self) -> int:
        """Granules taken."""
        return sum(sum(taken) for taken in self._taken.values())

    def gaps(self) -> list[Extent]:
        """The runs that are not taken, by place."""
        runs = []
        for segment, taken in sorted(self._taken.items()):
            at = 0
            while (start := taken.find(0, at)) >= 0:
                at = taken.find(1, start)
                at = len(taken) if at < 0 else at
                runs.append(Extent(segment, start, at - start))
        return runs
