# SPDX-License-Identifier: Apache-2.0
"""Who gets room in a segment store.

Room is taken in the same transaction that drops the records it belonged to, before a byte is
written, so the capacity and each tenant's quota hold at every moment for all processes together.

A record that is dropped while this process reads it keeps its granules until the last reader is
done. Readers of other processes are not waited for: they compare the record's generation after
reading, and a record that went away meanwhile is a miss. Granules are written over only after the
transaction that dropped their record, so a generation that is still there proves the bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from kvlib.errors import CorruptDataError
from kvlib.store.replacement import Hint, Replacement
from kvlib.store.segment_accounts import Account
from kvlib.store.segment_commit import Written
from kvlib.store.segment_format import Entry
from kvlib.store.segment_growth import Growth
from kvlib.store.segment_home import Home
from kvlib.store.segment_index import IndexFaultError
from kvlib.store.segment_known import Known
from kvlib.store.segment_ledger import Limits
from kvlib.store.terms import NO_TERMS, Terms

if TYPE_CHECKING:
    import lmdb

__all__ = ["Room"]

_RESCAN_S = 5.0
_TRIM_RECORDS = 64  # dropped in one transaction: puts are not kept waiting


class _InVainError(Exception):
    """Even what was dropped did not make room enough: the transaction is undone, nothing lost."""


class Room(Known):
    """The accounts of one open store.

    Args:
        home: the open folder.
        capacity: granules that records and writers may hold.
        growth: what makes segments.
        max_records: that the index has room for.
        policy: which record goes first.
        expires: drop records whose time is over; a store that is only looked at does not.
        nudge: asks for `publish` soon, in another thread.
    """

    def __init__(
        self,
        home: Home,
        *,
        capacity: int,
        growth: Growth,
        max_records: int,
        policy: str | Replacement,
        expires: bool,
        nudge: Callable[[], None],
    ) -> None:
        self.capacity = capacity
        super().__init__(home, capacity, policy, expires=expires, nudge=nudge)
        self._growth = growth
        self._max_records = max_records
        self._leases: Counter[bytes] = Counter()
        self._left: dict[bytes, list[Entry]] = {}  # dropped while leased
        self._owed: list[Entry] = []  # to be freed with the next transaction

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

    def reserve(
        self,
        size: int,
        granules: int,
        *,
        name: bytes = b"",
        terms: Terms = NO_TERMS,
        insist: bool = False,
    ) -> Entry | None:
        """Take room for a record, dropping others if need be.

        Args:
            size: bytes of the container.
            granules: that it takes.
            name: of the record: one of that name whose time is over goes first.
            terms: for how long it is kept, and on whose account.
            insist: where the record to be dropped is not published yet, drop the next one instead.

        Returns:
            Where it goes; None if there is none: everything is being written or read, or the disk
            is full.

        Raises:
            IndexFaultError: the index cannot be written.
        """
        dropped: list[bytes] = []
        quota = None if terms.quota is None else terms.quota // self._unit
        now = self.clock.now()
        try:
            with self._write() as txn:
                if name in self._over and self._drop_over(txn, name):
                    dropped.append(name)
                take = partial(
                    self._ledger.reserve,
                    txn,
                    self._home.me,
                    size,
                    granules,
                    expires=self.clock.until(terms.ttl),
                    tenant=terms.tenant,
                    quota=quota or 0,
                    now=now,
                )
                entry = self._make_room(txn, take, granules, terms.tenant, quota, dropped, insist)
                if entry is None and dropped:
                    raise _InVainError
        except _InVainError:
            return None
        self._gone(dropped)
        return entry

    def _gone(self, names: Iterable[bytes]) -> None:
        """These were dropped to make room, in a transaction that is committed."""
        with self._lock:
            for name in names:
                counted = self._over.pop(name, None) is not None  # when it was noticed
                over = counted or self._roster.is_over(name)
                self.expired += over and not counted
                self.evicted += not over
                if name not in self._pending:
                    self._forget(name, evicted=not over)

    def _make_room(
        self,
        txn: "lmdb.Transaction[bytes]",
        take: Callable[[], Entry | None],
        granules: int,
        tenant: bytes,
        quota: int | None,
        dropped: list[bytes],
        insist: bool,
    ) -> Entry | None:
        """Drop records until so many granules can be taken; None if they cannot."""
        victims: dict[bytes | None, Iterator[bytes]] = {}  # of all, or of the one who pays
        can_grow = True
        while True:
            pays = quota is not None and (
                self._ledger.accounts.get(txn, tenant).used + granules > quota
            )
            used = self._ledger.state(txn).used  # at least as many granules as there are records
            if not pays and (
                used + granules <= self.capacity
                and (
                    used < self._max_records
                    or self._ledger.count(txn) + len(self._pending) < self._max_records
                )
            ):
                entry = take()
                if entry is not None:
                    return entry
                if can_grow:
                    can_grow = self._growth.grow(txn, granules, self.capacity)
                    if can_grow:
                        continue
            whose = tenant if pays else None  # nobody pays for another one's quota
            if whose not in victims:
                victims[whose] = self._victims(granules, self._leases, insist, whose)
            name = next(victims[whose], None)
            if name is None:
                return None
            if self._take_out(txn, name, None):
                dropped.append(name)

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
        with self._index.read() as txn:
            beyond = evict and self._ledger.state(txn).used > self.capacity
        if beyond:
            self.rescan()
        dropped: list[bytes] = []
        with self._write() as txn:
            if beyond:
                self._drop_until(txn, self.capacity, dropped)
            gone = self._growth.take_out(txn, self.capacity)
        self._gone(dropped)
        for number in gone:
            self._home.files.remove(number)

    def trim(self, granules: int, tenant: bytes | None = None) -> int:
        """Drop records until all, or a tenant's, hold no more granules; how many went.

        It is noted as that tenant's quota. Where nothing has to go, only its account is read.

        Raises:
            IndexFaultError: the index cannot be written.
        """
        with self._index.read() as txn:
            beyond = self._used_by(txn, tenant) > granules
            account = Account() if tenant is None else self._ledger.accounts.get(txn, tenant)
        noted = not account.used or account.quota == granules
        if beyond:
            self.rescan()
        total = 0
        while beyond or not noted:
            dropped: list[bytes] = []
            with self._write() as txn:
                if tenant is not None and not noted:
                    self._ledger.accounts.charge(txn, tenant, 0, granules)
                self._drop_until(txn, granules, dropped, tenant, _TRIM_RECORDS)
            self._gone(dropped)
            total += len(dropped)
            noted = True
            beyond = len(dropped) == _TRIM_RECORDS
        return total

    def _used_by(self, txn: "lmdb.Transaction[bytes]", tenant: bytes | None) -> int:
        """Granules that all records hold, or a tenant's."""
        if tenant is None:
            return self._ledger.state(txn).used
        return self._ledger.accounts.get(txn, tenant).used

    def _drop_until(
        self,
        txn: "lmdb.Transaction[bytes]",
        granules: int,
        dropped: list[bytes],
        tenant: bytes | None = None,
        most: int | None = None,
    ) -> None:
        beyond = self._used_by(txn, tenant) - granules
        victims = self._victims(beyond, self._leases, insist=True, tenant=tenant)
        while self._used_by(txn, tenant) > granules and len(dropped) != most:
            name = next(victims, None)
            if name is None:
                return
            if self._take_out(txn, name, None):
                dropped.append(name)

    def note_limits(self, limits: Limits) -> None:
        """Note what the store is kept to.

        Raises:
            IndexFaultError: the index cannot be written.
        """
        with self._write() as txn:
            self._ledger.set_limits(txn, limits)

    def note_time(self) -> None:
        """Remember how late it is, if any record has a time to live; a failure is a pity."""
        with self._lock:
            if self._early is None and not self._roster.expires:
                return
        with suppress(IndexFaultError, OSError), self._write() as txn:
            self._ledger.note_time(txn, self.clock.now())

    def limits(self) -> tuple[Limits, dict[bytes, Account]]:
        """What the store is kept to, and what each tenant holds, in granules.

        Raises:
            IndexFaultError: the index cannot be read.
        """
        with self._index.read() as txn:
            try:
                return self._ledger.limits(txn), self._ledger.accounts.all(txn)
            except CorruptDataError as exc:
                raise IndexFaultError(f"the index is damaged: {exc}") from exc

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

    def written(self, name: bytes, entry: Entry, hint: Hint | None = None) -> None:
        """A reserved record has its bytes: readers of this process find it from now on."""
        with self._lock:
            self._pending[name] = entry
            self._over.pop(name, None)
            self._insert(name, entry, hint)
            self._mark(name)

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
            order: dict[bytes, Entry | None] = dict.fromkeys(self._used)
            self._used = {}
            over = dict(self._over)
            if not order and not group and not self._owed and not over:
                return True
            due = self._is_due()
        order.update(group)
        try:
            self._home.files.sync(
                sorted({extent.segment for w in group for extent in w.entry.extents})
            )
            with self._write() as txn:
                self._ledger.publish(txn, self._home.me, order, self.clock.now())
                dropped = [name for name in over if self._drop_over(txn, name)]
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
        if worked:
            self._gone(dropped)
            with self._lock:
                for name, generation in over.items():  # others dropped it, or wrote it anew
                    if self._over.get(name) == generation:
                        del self._over[name]
        if due:
            with suppress(IndexFaultError):
                self.rescan()
        return worked

    def _drop_over(self, txn: "lmdb.Transaction[bytes]", name: bytes) -> bool:
        """Drop a record whose time is over; whether there was one."""
        try:
            entry = self._ledger.get(txn, name)
        except CorruptDataError:
            self._ledger.repair(txn)
            return True
        if entry is None or not entry.is_over(self.clock.now()):
            return False
        return self._take_out(txn, name, entry.generation)
