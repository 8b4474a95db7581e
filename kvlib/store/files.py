# SPDX-License-Identifier: Apache-2.0
"""The file tier: one file a record, for local and network file systems.

    FORMAT                       version of this layout
    <xx>/<128 hex digits>.kvlc   a record: the container alone, named by its StoreKey
    tmp/<owner>/                 half-written files of one open store (`kvlib.store.folder`)

A record is written under a temporary name and renamed, so a reader sees all of it or nothing. It is
not flushed: after a power cut a file may be torn, which its checksums turn into a miss. One level
of 256 folders keeps each at a few thousand names for a million records, and a scan at 256 reads.

Several processes may share a folder. Each finds what the others wrote, since a name that is not in
its index is looked up in the file system. Each keeps the capacity against what it knows; it scans
the folder again before it evicts, at most every few seconds, so together they may exceed the
capacity by what they write within that time.
"""

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

from kvlib.codecs.container import Buffer, header_size
from kvlib.errors import CorruptDataError, IncompatibleDataError, StoreClosedError
from kvlib.keys import StoreKey
from kvlib.store import folder
from kvlib.store.fileio import CREATE, READ, TooLateError, read_at, scandir, write_all
from kvlib.store.sizes import parse_bytes
from kvlib.store.tier import CheckReport, Pins, TierStats, verify_part, verify_record

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

    Raises:
        ConfigError: the folder is foreign, somebody else's, or cannot be made.
        IncompatibleDataError: it was written by another version; nothing is touched.
    """

    name: ClassVar[str] = "file"
    persistent: ClassVar[bool] = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity: int | str | None = None,
        mac_key: bytes | None = None,
    ) -> None:
        self._root = Path(path).expanduser()
        self._capacity = None if capacity is None else parse_bytes(capacity, "capacity")
        self._mac_key = mac_key
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._index: OrderedDict[StoreKey, folder.Entry] = OrderedDict()
        self._stats = TierStats(capacity_bytes=self._capacity)
        self._pins = Pins()
        self._reserved = 0
        self._last_stamp = 0
        self._counter = 0
        self._closed = False
        folder.open_folder(self._root)
        self._own = folder.OwnFolder(self._root)
        self._own.sweep()
        self._scanned = 0.0
        self._scan()
        self._remove(self._make_room(0))

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

    def _add(self, key: StoreKey, size: int, *, last: bool = True) -> None:
        """Put a record into the index; the lock is held."""
        entry = folder.Entry(size, time.monotonic())
        old = self._index.get(key)
        self._index[key] = entry
        self._index.move_to_end(key, last=last)
        self._count(
            records=0 if old else 1, used_bytes=entry.physical - (old.physical if old else 0)
        )

    def _admit(self, key: StoreKey, size: int, *, last: bool = True) -> None:
        """Put a record into the index if its file is there; the lock is held.

        With `_forget_gone` after every unlink, the index never keeps a record that another thread
        deleted meanwhile: what enters before the unlink is forgotten after it, what would enter
        after it finds no file.
        """
        if self._path(key).exists():
            self._add(key, size, last=last)

    def _forget_gone(self, key: StoreKey) -> None:
        """Take a record out of the index unless its file is there."""
        with self._lock:
            if not self._path(key).exists():
                self._forget(key)

    def _forget(self, key: StoreKey) -> bool:
        """Take a record out of the index; the lock is held."""
        entry = self._index.pop(key, None)
        if entry is None:
            return False
        self._count(records=-1, used_bytes=-entry.physical)
        return True

    def _stamp(self) -> int:
        """A file time later than any this store has given; the lock is held."""
        self._last_stamp = max(time.time_ns(), self._last_stamp + 1)
        return self._last_stamp

    def _scan(self) -> None:
        """Bring the index up to what the folder holds; new records count as the oldest."""
        with self._lock:
            before = set(self._index)
        found: list[tuple[int, StoreKey, int]] = []
        for shelf in scandir(self._root):
            if len(shelf.name) == 2 and shelf.is_dir(follow_symlinks=False):
                for file in scandir(shelf.path):
                    match = folder.RECORD_NAME.fullmatch(file.name)
                    try:
                        if match and file.is_file(follow_symlinks=False):
                            stat = file.stat(follow_symlinks=False)
                            found.append(
                                (stat.st_mtime_ns, folder.record_key(match[1]), stat.st_size)
                            )
                    except OSError:
                        continue
        found.sort(reverse=True)
        with self._lock:
            for _, key, size in found:
                if key not in self._index:
                    self._admit(key, size, last=False)
            for key in before - {key for _, key, _ in found}:
                if not self._path(key).exists():
                    self._forget(key)
            self._scanned = time.monotonic()

    # -- room

    def _make_room(self, size: int) -> list[StoreKey] | None:
        """Reserve `size` bytes; the records to delete for it, or None if it can never fit."""
        if self._capacity is None:
            with self._lock:
                self._reserved += size
            return []
        if size > self._capacity:
            return None
        with self._lock:
            full = self._stats.used_bytes + self._reserved + size > self._capacity
            stale = time.monotonic() - self._scanned > _RESCAN_S
        if full and stale:
            self._scan()
        with self._lock:
            need = self._stats.used_bytes + self._reserved + size - self._capacity
            victims = self._take_out(need)
            if victims is not None:  # else the rest is pinned, or reserved by writes under way
                self._reserved += size
        return victims

    def _take_out(self, need: int, *, insist: bool = True) -> list[StoreKey] | None:
        """Forget the oldest until `need` bytes are free; if we insist, all or none (locked)."""
        victims = []
        for key, entry in self._index.items():
            if need <= 0:
                break
            if key not in self._pins.keys:
                victims.append(key)
                need -= entry.physical
        if insist and need > 0:
            return None
        for key in victims:
            self._forget(key)
        self._count(evicted=len(victims))
        return victims

    def _evict(self, size: int) -> None:
        """Delete the records used longest ago until `size` bytes are free."""
        with self._lock:
            victims = self._take_out(size, insist=False)
        self._remove(victims)

    def _remove(self, keys: Sequence[StoreKey] | None) -> None:
        for key in keys or ():
            try:
                self._path(key).unlink(missing_ok=True)
            except OSError:
                self._count(errors=1)
            self._forget_gone(key)

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
        try:
            fd = os.open(self._path(key), READ)
            try:
                status = os.fstat(fd)
                inode = status.st_ino
                if sections is None:
                    got = self._read_whole(fd, key, out, status.st_size, deadline)
                else:
                    got = self._read_parts(fd, key, out, status.st_size, sections, deadline)
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
            self._count(misses=1)
            return None
        with self._lock:
            self._count(hits=1, read_bytes=got)
            if key not in self._index:
                self._admit(key, status.st_size)
        self.touch([key])
        return status.st_size

    def _read_whole(
        self, fd: int, key: StoreKey, out: memoryview, size: int, deadline: float | None
    ) -> int | None:
        if size > out.nbytes:
            return None
        read_at(fd, out[:size], 0, deadline)
        verify_record(key, out[:size], mac_key=self._mac_key)
        return size

    def _read_parts(
        self,
        fd: int,
        key: StoreKey,
        out: memoryview,
        size: int,
        sections: Collection[int],
        deadline: float | None,
    ) -> int | None:
        first = min(size, folder.PAGE, out.nbytes)
        read_at(fd, out[:first], 0, deadline)
        front = header_size(out[:first])
        if front > out.nbytes:
            return None
        if front > first:
            if front > size:
                raise CorruptDataError(f"a header of {front} bytes in a file of {size}")
            read_at(fd, out[first:front], first, deadline)
        header = verify_part(key, out[:front], mac_key=self._mac_key)
        if header.total_bytes != size:
            raise CorruptDataError(f"a record of {header.total_bytes} bytes in a file of {size}")
        if any(
            header.sections[i].offset + header.sections[i].stored_bytes > out.nbytes
            for i in sections
        ):
            return None
        got = front
        for i in sections:
            info = header.sections[i]
            view = out[info.offset : info.offset + info.stored_bytes]
            read_at(fd, view, info.offset, deadline)
            header.verify(info, view)
            got += info.stored_bytes
        return got

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

    def put(self, key: StoreKey, parts: Sequence[Buffer]) -> bool:
        """See `Tier.put`."""
        self._check_open()
        if self.contains_many([key])[0]:
            self._count(duplicates=1)
            self.touch([key])
            return True
        views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
        size = sum(view.nbytes for view in views)
        physical = -(-size // folder.PAGE) * folder.PAGE
        victims = self._make_room(physical)
        if victims is None:
            self._count(rejected=1)
            return False
        self._remove(victims)
        try:
            failed = self._write(key, views)
            if failed in _NO_ROOM:
                self._evict(2 * physical)
                failed = self._write(key, views)
        finally:
            with self._lock:
                self._reserved -= physical
                if not failed:
                    self._admit(key, size)
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
        path = self._path(key)
        try:
            fd = os.open(temporary, CREATE, 0o600)
            try:
                write_all(fd, views)
            finally:
                os.close(fd)
            os.utime(temporary, ns=(stamp, stamp))  # tells the order of use at the next open
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.replace(temporary, path)
        except OSError as exc:
            with contextlib.suppress(OSError):  # if it stays, the next open sweeps it
                temporary.unlink(missing_ok=True)
            return exc.errno or errno.EIO
        return 0

    # -- the rest of the interface

    def contains_many(self, keys: Sequence[StoreKey]) -> list[bool]:
        """See `Tier.contains_many`."""
        self._check_open()
        with self._lock:
            known = [key in self._index for key in keys]
        return [have or self._found(key) is not None for key, have in zip(keys, known, strict=True)]

    def _found(self, key: StoreKey) -> int | None:
        """Size of a record that another process may have written; it enters the index."""
        try:
            size = os.stat(self._path(key), follow_symlinks=False).st_size
        except OSError:
            return None
        with self._lock:
            if key not in self._index:
                self._admit(key, size)
        return size

    def size(self, key: StoreKey) -> int | None:
        """See `Tier.size`."""
        self._check_open()
        with self._lock:
            entry = self._index.get(key)
        return entry.size if entry is not None else self._found(key)

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.touch`."""
        self._check_open()
        due = []
        now = time.monotonic()
        with self._lock:
            for key in keys:
                entry = self._index.get(key)
                if entry is None:
                    continue
                self._index.move_to_end(key)
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
        held = self.contains_many([key])[0]
        with self._lock:
            self._forget(key)
        self._remove([key])
        return held

    def keys(self) -> Iterator[StoreKey]:
        """See `Tier.keys`."""
        self._check_open()
        with self._lock:
            return iter(list(self._index))

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
            problem = folder.problem_of(self._path(key), key, self._mac_key)
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
            due = [(key, self._stamp()) for key, entry in self._index.items() if entry.used]
        self._set_times(due)
        self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
