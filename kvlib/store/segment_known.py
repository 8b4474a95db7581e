# SPDX-License-Identifier: Apache-2.0
"""What one process knows of the records of a segment store.

What another process stores or drops is found when it is looked up; for replacement, the index is
compared with what is known here before records are dropped, at most every few seconds. Each process
has a replacement policy of its own. What lasts is the order of use, in the stamps of the index: a
policy begins with it when a record is first to be put or dropped. Until then the index is not read
as a whole, so a store opens as fast with many records as with few.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from kvlib.errors import CorruptDataError
from kvlib.store.replacement import Hint, Replacement
from kvlib.store.replacement.roster import Roster
from kvlib.store.segment_format import (
    EXPIRES,
    NEVER,
    Entry,
    granules_of,
    peek_entry,
    peek_expires,
)
from kvlib.store.segment_home import Home
from kvlib.store.segment_index import IndexFaultError
from kvlib.store.terms import NO_TENANT, NO_TERMS, Terms, WallClock, is_over

__all__ = ["Known"]

_MAX_STAMPS = 4096


class _Use(NamedTuple):
    """A record was read if `whole`, else only touched."""

    name: bytes
    whole: bool
    hint: Hint | None


class Known:
    """The records of one open store, as far as this process knows.

    Args:
        home: the open folder.
        capacity: granules that records and writers may hold.
        policy: which record goes first.
        expires: drop records whose time is over; a store that is only looked at does not.
        nudge: asks for a commit soon, in another thread.

    Attributes:
        clock: by which records expire.
        evicted: records dropped to make room.
        expired: records dropped because their time was over.
    """

    def __init__(
        self,
        home: Home,
        capacity: int,
        policy: str | Replacement,
        *,
        expires: bool,
        nudge: Callable[[], None],
    ) -> None:
        self._home = home
        self._index = home.index
        self._ledger = home.index.ledger
        self._unit = home.super.granule
        self._expires = expires
        self._nudge = nudge
        self._lock = threading.Lock()
        with self._index.read() as txn:
            self.clock = WallClock(self._ledger.state(txn).clock)
        self._roster: Roster[bytes] = Roster(policy, capacity * self._unit, self.clock.seconds)
        self._generations: dict[bytes, int] = {}  # of what the roster has
        self._filling = threading.Lock()
        self._early: list[_Use] | None = []  # before the roster was filled; None: it is
        self._pending: dict[bytes, Entry] = {}  # written, not yet in the index
        self._used: dict[bytes, None] = {}  # since the last commit, in order
        self._over: dict[bytes, int] = {}  # generations expired, counted, and still to be dropped
        self._pins: Counter[bytes] = Counter()
        self._seen = 0
        self._scanned = 0.0
        self.evicted = 0
        self.expired = 0

    def _committed(self, number: int) -> None:
        with self._lock:
            if number == self._seen + 1:  # nobody else wrote since
                self._seen = number

    def rescan(self, *, at_most_every: float = 0.0) -> None:
        """Learn what other processes stored and dropped.

        Raises:
            IndexFaultError: the index cannot be read.
        """
        if self._early is not None:
            self._fill()
            return
        now = time.monotonic()
        with self._lock:
            if now - self._scanned < at_most_every or self._index.last_txn == self._seen:
                return
            self._scanned = now
        with self._index.read() as txn:
            number = txn.id()
            rows = self._ledger.rows(txn)
        known = {name for name, _ in rows}
        with self._lock:
            for name in [name for name in self._roster.keys() if name not in known]:
                if name not in self._pending:
                    self._forget(name)
            for name, row in rows:
                if self._generations.get(name) != row.generation and name not in self._pending:
                    self._insert(name, row)
            self._seen = max(self._seen, number)

    def _fill(self) -> None:
        """Learn all records, in order of use, and then what was used since the store was opened.

        Readers go on meanwhile: as long as there is `_early`, nobody else changes the roster.
        """
        with self._filling:
            if self._early is None:
                return
            now = time.monotonic()
            with self._index.read() as txn:
                number = txn.id()
                rows = self._ledger.rows(txn)
            for name, row in rows:
                self._insert(name, row)
            with self._lock:
                early, self._early = self._early, None
                for name, whole, hint in early:
                    self._tell(name, whole=whole, hint=hint)
                self._seen = max(self._seen, number)
                self._scanned = now

    def _insert(self, name: bytes, row: Entry, hint: Hint | None = None) -> None:
        """The lock is held, or the roster is being filled."""
        self._generations[name] = row.generation
        terms = NO_TERMS
        if row.expires or row.tenant != NO_TENANT or hint is not None:
            terms = Terms(ttl=self.clock.left(row.expires), tenant=row.tenant, hint=hint)
        self._roster.insert(name, granules_of(row.size, self._unit) * self._unit, terms)

    def _tell(self, name: bytes, *, whole: bool, hint: Hint | None = None) -> None:
        """Tell the policy of a use, now or when there is one; the lock is held."""
        if self._early is not None:
            self._early.append(_Use(name, whole, hint))
        elif whole:
            self._roster.hit(name)
        else:
            self._roster.touch(name, hint)

    # -- looking

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

    def is_current(self, name: bytes, entry: Entry) -> bool:
        """Whether the index still names this generation: nobody wrote over it until now.

        Raises:
            IndexFaultError: the index cannot be read.
        """
        try:
            now = self.lookup(name)
        except CorruptDataError:
            return False
        return now is not None and now.generation == entry.generation

    def contains(self, names: list[bytes]) -> list[bool]:
        """Whether there is a row of each whose time is not over."""
        pending = dict(self._pending) if self._pending else {}  # first: it moves into the index
        with self._index.read() as txn:
            rows = list(map(txn.get, names))
        found = [row is not None and row[EXPIRES] == NEVER for row in rows]
        if all(found):
            return found
        now = 0
        over: dict[bytes, int] = {}
        for i, name in enumerate(names):
            row = rows[i]
            if found[i] or (row is None and name not in pending):
                continue
            expires = pending[name].expires if row is None else peek_expires(row)
            if expires and self._expires:
                now = now or self.clock.now()
                if is_over(expires, now):
                    over[name] = (pending[name] if row is None else peek_entry(row)).generation
                    continue
            found[i] = True
        if over:
            self._notice(over)
        return found

    def is_over(self, name: bytes, entry: Entry) -> bool:
        """Whether a record's time is over; then it is counted, and dropped soon."""
        if not entry.expires or not self._expires or not entry.is_over(self.clock.now()):
            return False
        self._notice({name: entry.generation})
        return True

    def _notice(self, met: Mapping[bytes, int]) -> None:
        """Count these generations as expired and drop them soon.

        What was dropped since it was met was counted by then, or is by whoever drops it: that
        happens under this lock, too, and after it is gone from the index.
        """
        with self._lock:
            new = {
                name: generation
                for name, generation in met.items()
                if self._over.get(name) != generation and self._is_there(name, generation)
            }
            self._over |= new
            self.expired += len(new)
        if new:
            self._nudge()  # not here: a reader does not wait for the index's writers

    def _is_there(self, name: bytes, generation: int) -> bool:
        """Whether a generation is still to be dropped; if in doubt, whoever drops it finds out."""
        try:
            now = self.lookup(name)
        except (CorruptDataError, IndexFaultError):
            return True
        return now is not None and now.generation == generation

    def held(self) -> tuple[int, int]:
        """Records and granules held."""
        with self._lock:
            pending = list(self._pending)
        with self._index.read() as txn:
            new = sum(txn.get(name) is None for name in pending)
            return self._ledger.count(txn) + new, self._ledger.state(txn).used

    def names(self) -> list[bytes]:
        """All records, the one used longest ago first."""
        self.rescan()
        with self._lock:
            return list(self._roster.keys())

    def is_pending(self, name: bytes) -> bool:
        """Whether a record is written and not yet published."""
        return name in self._pending

    def touch(self, names: Iterable[bytes], hint: Hint | None = None) -> None:
        """Mark records as used."""
        with self._lock:
            for name in names:
                if self._early is not None or name in self._roster:
                    self._tell(name, whole=False, hint=hint)
                    self._mark(name)
            due = self._is_due()
        if due:
            self._nudge()

    def read(self, name: bytes, entry: Entry, *, whole: bool) -> None:
        """A record was read, which another process may have written; or only looked at."""
        with self._lock:
            if self._early is None and self._generations.get(name) != entry.generation:
                self._insert(name, entry)
            self._tell(name, whole=whole)
            self._mark(name)
            due = self._is_due()
        if due:
            self._nudge()

    def _is_due(self) -> bool:
        """Whether what was used is to be noted, so that no list of it grows; the lock is held."""
        return len(self._used) > _MAX_STAMPS or len(self._early or ()) > _MAX_STAMPS

    def _mark(self, name: bytes) -> None:
        """Note for the next commit that it was used; the lock is held."""
        self._used.pop(name, None)
        self._used[name] = None

    def pin(self, names: Iterable[bytes]) -> None:
        """Do not drop these records to make room."""
        with self._lock:
            self._pins.update(names)

    def unpin(self, names: Iterable[bytes]) -> None:
        """Undo one `pin` of each."""
        with self._lock:
            self._pins.subtract(names)
            self._pins = +self._pins

    def _forget(self, name: bytes, *, evicted: bool = False) -> None:
        """The lock is held."""
        if self._early is None:  # else it is being filled: what should not be there, goes later
            self._roster.remove(name, evicted=evicted)
            self._generations.pop(name, None)
        self._used.pop(name, None)

    def missed(self, name: bytes) -> None:
        """A record is not there (any more)."""
        with self._lock:
            if name not in self._pending:
                self._forget(name)

    # -- what goes first

    def admits(self, name: bytes, granules: int, terms: Terms) -> bool:
        """Whether the policy lets a record in; to be asked once before `reserve`."""
        with self._lock:
            return self._roster.admit(name, granules * self._unit, terms)

    def _victims(
        self, granules: int, busy: Collection[bytes], insist: bool, tenant: bytes | None = None
    ) -> Iterator[bytes]:
        """Records to drop, the first one first, but none that is read, or not yet published.

        Args:
            granules: that are probably enough; it goes on if they are not.
            busy: never among them.
            insist: pass over what is not yet published, instead of ending there.
            tenant: only its own.
        """
        tried: set[bytes] = set()
        need = max(granules, 1) * self._unit
        while True:
            with self._lock:
                protected = {*tried, *busy, *self._pins}
                names = list(self._roster.victims(need, protected, tenant))
                pending = self._pending.keys() & names
            tried.update(names)
            for name in names:
                if name not in pending:
                    yield name
                elif not insist:
                    return
            if not names:
                return
