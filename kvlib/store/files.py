# SPDX-License-Identifier: Apache-2.0
"""The file tier: one file a record, for local and network file systems.

    FORMAT                       version of this layout
    <xx>/<128 hex digits>.kvlc   a record, named by its StoreKey (`kvlib.store.file_record`)
    tmp/<owner>/                 half-written files of one open store (`kvlib.store.folder`)

A record is written under a temporary name and renamed, so a reader sees all of it or nothing. It is
not flushed: after a power cut a file may be torn, which its checksums turn into a miss. One level
of 256 folders keeps each at a few thousand names for a million records, and a scan at 256 reads.

Several processes may share a folder. Each finds what the others wrote, since a name that is not in
its index is looked up in the file system. Each keeps the capacity against what it knows; it scans
the folder again before it evicts, at most every few seconds, so together they may exceed the
capacity, or a tenant's quota, by what they write within that time.
"""

import errno
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

from kvlib.codecs.container import Buffer
from kvlib.errors import CorruptDataError, IncompatibleDataError, StoreClosedError
from kvlib.keys import StoreKey
from kvlib.store import file_record, folder
from kvlib.store.file_record import END_BYTES, End
from kvlib.store.fileio import READ, TooLateError, free_bytes
from kvlib.store.replacement import Hint, Replacement
from kvlib.store.replacement.roster import Roster
from kvlib.store.sizes import parse_bytes
from kvlib.store.terms import NO_TERMS, Terms, WallClock, is_over
from kvlib.store.tier import CheckReport, Pins, TierStats

__all__ = ["FileStore"]

_RESCAN_S = 5.0
_STAMP_S = 30.0
_NO_ROOM = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


class FileStore:
    """A persistent tier in a folder.

    Args:
        path: the folder; made if missing, readable by its owner only.
        capacity: hard limit of bytes on disk, counted in whole pages of 4 KiB; None for no limit.
        mac_key: 16 to 64 secret bytes: only records authenticated under it are read.
        replacement: which records go first: method string of one of `REPLACEMENTS`, or the policy.
        min_free: bytes of the file system that are left to others: with less, what comes takes the
            room of what goes.

    Opening it reads the last bytes of every file.

    Raises:
        ConfigError: the folder is foreign, somebody else's, or cannot be made.
        IncompatibleDataError: it was written by another version; nothing is touched.
    """

    name: ClassVar[str] = "file"
    persistent: ClassVar[bool] = True
    _EXPIRES: ClassVar[bool] = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity: int | str | None = None,
        mac_key: bytes | None = None,
        replacement: str | Replacement = "lru",
        min_free: int | str = 0,
    ) -> None:
        self._root = Path(path).expanduser()
        self._capacity = None if capacity is None else parse_bytes(capacity, "capacity")
        self._mac_key = mac_key
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._min_free = parse_bytes(min_free, "min_free")
        self._clock = WallClock()
        most = sys.maxsize if self._capacity is None else self._capacity
        self._index: dict[StoreKey, folder.Entry] = {}
        self._roster: Roster[StoreKey] = Roster(replacement, most, self._clock.seconds)
        self._stats = TierStats(capacity_bytes=self._capacity)
        self._pins = Pins()
        self._reserved: Counter[bytes] = Counter()  # bytes of writes under way, by tenant
        self._last_stamp = 0
        self._counter = 0
        self._closed = False
        folder.open_folder(self._root)
        self._own = folder.OwnFolder(self._root)
        self._own.sweep()
        self._scanned = 0.0
        self._scan()
        self.trim(most)

    # -- small things

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise StoreClosedError("this FileStore was opened before a fork; open one in the child")
        if self._closed:
            raise StoreClosedError("this FileStore is closed")

    def _path(self, key: StoreKey) -> Path:
        name = key.to_bytes().hex()
        return self._root / name[:2] / f"{name}.kvlc"

    def _count(self, **more: int) -> None:
        """Add to counters."""
        with self._lock:
            values = {name: getattr(self._stats, name) + n for name, n in more.items()}
            self._stats = replace(self._stats, **values)

    def _admit(
        self, key: StoreKey, size: int, end: End, hint: Hint | None = None
    ) -> folder.Entry | None:
        """Put a record into the index if its file is there; the lock is held.

        With `_forget_gone` after every unlink, the index never keeps a record that another thread
        deleted meanwhile: what enters before the unlink is forgotten after it, what would enter
        after it finds no file.
        """
        if not self._path(key).exists():
            return None
        self._forget(key)
        entry = self._index[key] = folder.Entry(size, time.monotonic(), end)
        terms = Terms(ttl=self._clock.left(end.expires), tenant=end.tenant, hint=hint)
        self._roster.insert(key, entry.physical, terms)
        self._count(records=1, used_bytes=entry.physical)
        return entry

    def _forget_gone(self, key: StoreKey) -> None:
        """Take a record out of the index unless its file is there."""
        with self._lock:
            if not self._path(key).exists():
                self._forget(key)

    def _forget(self, key: StoreKey, *, evicted: bool = False) -> bool:
        """Take a record out of the index; the lock is held."""
        entry = self._index.pop(key, None)
        if entry is None:
            return False
        self._roster.remove(key, evicted=evicted)
        self._count(records=-1, used_bytes=-entry.physical)
        return True

    def _live(self, key: StoreKey) -> folder.Entry | None:
        """A record of the index or the folder; one whose time is over is dropped."""
        with self._lock:
            entry = self._index.get(key)
        entry = entry or self._found(key)
        if entry is None or not self._is_over(entry.end):
            return entry
        self._expire(key)
        return None

    def _is_over(self, end: End) -> bool:
        return self._EXPIRES and is_over(end.expires, self._clock.now())

    def _expire(self, key: StoreKey) -> None:
        """Drop a record whose time is over; it is counted once, by whoever finds it first."""
        with self._lock:  # for both: in between others would find the file and enter it anew
            self._count(expired=self._forget(key))
            self._remove([key])

    def _stamp(self) -> int:
        """A file time later than any this store has given; the lock is held."""
        self._last_stamp = max(time.time_ns(), self._last_stamp + 1)
        return self._last_stamp

    def _scan(self) -> None:
        """Bring the index up to what the folder holds; of what is new, the order of use is kept."""
        with self._lock:
            before = set(self._index)
        found = folder.record_files(self._root)
        if found and not before:  # nobody used it later than now, whatever the clock says
            self._clock.at_least(found[-1][0] // 10**6)
            self._last_stamp = max(self._last_stamp, found[-1][0])
        for _, key, total in found:
            if key not in before:
                self._enter(key, total)
        with self._lock:
            for key in before - {key for _, key, _ in found}:
                if not self._path(key).exists():
                    self._forget(key)
            self._scanned = time.monotonic()

    def _enter(self, key: StoreKey, total: int) -> folder.Entry | None:
        """Put a file of `total` bytes into the index."""
        end = file_record.peek_end(self._path(key), key, total)
        with self._lock:
            if key in self._index:
                return self._index[key]
            return self._admit(key, max(total - END_BYTES, 0), end)

    # -- room

    def _make_room(self, key: StoreKey, physical: int, terms: Terms) -> list[StoreKey] | None:
        """Reserve room for a record; the records to delete for it, or None if it can never fit."""
        quota = sys.maxsize if terms.quota is None else terms.quota
        capacity = sys.maxsize if self._capacity is None else self._capacity
        if physical > min(quota, capacity):
            return None
        with self._lock:
            full = max(self._beyond(capacity), self._beyond(quota, terms.tenant)) + physical > 0
            stale = time.monotonic() - self._scanned > _RESCAN_S
        if full and stale:
            self._scan()
        with self._lock:
            if not self._roster.admit(key, physical, terms):
                return None
            pinned = self._pins.keys
            need = self._beyond(quota, terms.tenant) + physical
            own = list(self._roster.victims(need, pinned, terms.tenant))
            if self._physical(own) < need:
                return None  # the rest is pinned, or reserved by writes under way
            need = max(self._beyond(capacity), self._short(physical)) + physical
            need -= self._physical(own)
            others = list(self._roster.victims(need, {*pinned, *own} if own else pinned))
            if self._physical(others) < need:
                return None
            self._take_out([*own, *others])
            self._reserved[terms.tenant] += physical
        return [*own, *others]

    def _beyond(self, limit: int, tenant: bytes | None = None) -> int:
        """Bytes by which all records, or a tenant's, with writes under way, exceed a limit."""
        if tenant is None:
            return self._stats.used_bytes + self._reserved.total() - limit
        return self._roster.used_bytes(tenant) + self._reserved[tenant] - limit

    def _short(self, physical: int) -> int:
        """0 if the file system is to have no less room afterwards, else `-physical`."""
        short = self._min_free and free_bytes(self._root) - physical < self._min_free
        return 0 if short else -physical

    def _physical(self, keys: Sequence[StoreKey]) -> int:
        return sum(self._index[key].physical for key in keys)

    def _take_out(self, keys: Sequence[StoreKey]) -> None:
        """Forget records that make room; the lock is held."""
        for key in keys:
            over = self._roster.is_over(key)
            self._forget(key, evicted=not over)
            self._count(evicted=not over, expired=over)

    def _remove(self, keys: Sequence[StoreKey]) -> None:
        for key in keys:
            try:
                self._path(key).unlink(missing_ok=True)
            except OSError:
                self._count(errors=1)
            self._forget_gone(key)

    def trim(self, most_bytes: int, tenant: bytes | None = None) -> int:
        """See `Tier.trim`."""
        self._check_open()
        with self._lock:
            need = self._beyond(most_bytes, tenant)
            victims = list(self._roster.victims(need, self._pins.keys, tenant))
            self._take_out(victims)
        self._remove(victims)
        return len(victims)

    # -- reading

    def get_into(
        self,
        key: StoreKey,
        buf: Buffer,
        sections: Collection[int] | None = None,
        deadline: float | None = None,
    ) -> int | None:
        """See `Tier.get_into`."""
        self._check_open()
        out = memoryview(buf).cast("B")
        inode = -1
        size = 0
        try:
            fd = os.open(self._path(key), READ)
            try:
                status = os.fstat(fd)
                inode = status.st_ino
                end = file_record.read_end(fd, key, status.st_size, deadline)
                size = status.st_size - END_BYTES
                over = self._is_over(end)
                got = None
                if not over:
                    got = file_record.read(fd, key, out, size, sections, self._mac_key, deadline)
            finally:
                os.close(fd)
        except FileNotFoundError:
            self._forget_gone(key)
            self._count(misses=1)
            return None
        except TooLateError:
            self._count(timeouts=1, misses=1)
            return None
        except CorruptDataError:
            self._drop(key, inode)
            self._count(corrupt=1, misses=1)
            return None
        except (IncompatibleDataError, OSError):  # a later version's, under another MAC, or EIO
            self._count(errors=1, misses=1)
            return None
        if got is None:
            self._live(key)  # if its time is over, it goes
            self._count(misses=1)
            return None
        with self._lock:
            self._count(hits=1, read_bytes=got)
            if key not in self._index:
                self._admit(key, size, end)
            if sections is None or sections:
                self._roster.hit(key)
        self.touch([key])
        return size

    def _drop(self, key: StoreKey, inode: int) -> None:
        """Delete a damaged record, unless another file has taken its place meanwhile."""
        path = self._path(key)
        try:
            if os.lstat(path).st_ino == inode:
                path.unlink(missing_ok=True)
        except OSError:
            pass  # gone already, or it stays and is found damaged again
        self._forget_gone(key)

    # -- writing

    def put(self, key: StoreKey, parts: Sequence[Buffer], terms: Terms | None = None) -> bool:
        """See `Tier.put`."""
        self._check_open()
        terms = terms or NO_TERMS
        if self._live(key) is not None:
            self._count(duplicates=1)
            self.touch([key], terms.hint)
            return True
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        size = sum(view.nbytes for view in views)
        end = End(self._clock.until(terms.ttl), terms.tenant)
        views.append(memoryview(file_record.pack_end(key, end)))
        physical = file_record.physical_bytes(size)
        victims = self._make_room(key, physical, terms)
        if victims is None:
            self._count(rejected=1)
            return False
        self._remove(victims)
        try:
            failed = self._write(key, views)
            if failed in _NO_ROOM:
                self.trim(self._stats.used_bytes - 2 * physical)
                failed = self._write(key, views)
        finally:
            with self._lock:
                self._reserved[terms.tenant] -= physical
                if not failed:
                    self._admit(key, size, end, terms.hint)
                    self._count(puts=1, written_bytes=size)
        if failed:
            self._count(rejected=1, errors=0 if failed in _NO_ROOM else 1)
            return False
        return True

    def _write(self, key: StoreKey, views: Sequence[memoryview]) -> int:
        """Write a record and rename it to its name; 0, or the errno of what failed."""
        with self._lock:
            self._counter += 1
            temporary = self._own.path / f"{self._counter}.tmp"
            stamp = self._stamp()
        return file_record.write(temporary, self._path(key), views, stamp)

    # -- the rest of the interface

    def contains_many(self, keys: Sequence[StoreKey]) -> list[bool]:
        """See `Tier.contains_many`."""
        self._check_open()
        return [self._live(key) is not None for key in keys]

    def _found(self, key: StoreKey) -> folder.Entry | None:
        """A record that another process may have written; it enters the index."""
        try:
            total = os.stat(self._path(key), follow_symlinks=False).st_size
        except OSError:
            return None
        return self._enter(key, total)

    def size(self, key: StoreKey) -> int | None:
        """See `Tier.size`."""
        self._check_open()
        entry = self._live(key)
        return None if entry is None else entry.size

    def terms(self, key: StoreKey) -> Terms | None:
        """See `Tier.terms`."""
        self._check_open()
        with self._lock:
            entry = self._index.get(key)
        entry = entry or self._found(key)
        if entry is None:
            return None
        return Terms(ttl=self._clock.left(entry.end.expires), tenant=entry.end.tenant)

    def touch(self, keys: Sequence[StoreKey], hint: Hint | None = None) -> None:
        """See `Tier.touch`."""
        self._check_open()
        due = []
        now = time.monotonic()
        with self._lock:
            for key in keys:
                entry = self._index.get(key)
                if entry is None:
                    continue
                self._roster.touch(key, hint)
                entry.used = True
                if now - entry.stamped > _STAMP_S:
                    entry.stamped = now
                    entry.used = False
                    due.append((key, self._stamp()))
        self._set_times(due)

    def _set_times(self, due: Sequence[tuple[StoreKey, int]]) -> None:
        for key, stamp in due:
            try:
                os.utime(self._path(key), ns=(stamp, stamp))
            except OSError:
                continue  # gone, or not ours: the order of use is a hint

    def pin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.pin`."""
        with self._lock:
            self._pins.pin(keys)

    def unpin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.unpin`."""
        with self._lock:
            self._pins.unpin(keys)

    def delete(self, key: StoreKey) -> bool:
        """See `Tier.delete`."""
        self._check_open()
        held = self._live(key) is not None
        self._remove([key])
        return held

    def keys(self) -> Iterator[StoreKey]:
        """See `Tier.keys`."""
        self._check_open()
        with self._lock:
            return self._roster.keys()

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        self._check_open()
        with self._lock:
            return self._stats

    def check(self, *, repair: bool = False) -> CheckReport:
        """See `Tier.check`."""
        self._check_open()
        with self._lock:
            counted = (len(self._index), self._stats.used_bytes)
        self._scan()
        with self._lock:
            entries = dict(self._index)
        problems = []
        repaired = 0
        for key in entries:
            problem = file_record.problem_of(self._path(key), key, self._mac_key)
            if problem:
                problems.append(f"{key.block.hex()[:16]}: {problem}")
                if repair:
                    repaired += self.delete(key)
        held = (len(entries), sum(entry.physical for entry in entries.values()))
        if counted != held:
            problems.append(f"{counted} records and bytes counted, {held} held")
            repaired += repair  # the scan corrected it
        return CheckReport(records=len(entries), problems=tuple(problems), repaired=repaired)

    def close(self) -> None:
        """See `Tier.close`."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        with self._lock:
            due = [(key, self._stamp()) for key in self._roster.keys() if self._index[key].used]
        self._set_times(due)
        self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
