# SPDX-License-Identifier: Apache-2.0
"""The LMDB environment of a segment store: opened once a process, guarded, with bounded waits.

LMDB is used without sync, so a commit costs microseconds: a killed process loses nothing (the pages
are the system's), and after a power cut the index is made anew from the header pages. Its traps:

- It maps its file, and a file that lost its end kills the reader with SIGBUS. So a file is checked
  before it is mapped (`kvlib.store.segment_check`), and its size before each transaction.
- It must not be opened twice in a process, nor used after a fork: `Index.open` shares one
  environment among the stores of a process, and never the parent's.
- Waiting for its write lock has no time limit. Ours, a lock on a file, has one, and stands before
  it.
- Readers that died keep old pages alive until `reader_check`.
"""

import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from kvlib.store.segment_ledger import Ledger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Index", "IndexFaultError"]

_MAX_READERS = 512
_PATIENCE_S = 10.0
_CHECK_READERS_S = 5.0


class IndexFaultError(Exception):
    """The index could not be read or written now; never leaves a tier.

    Attributes:
        full: its map or its disk is full.
    """

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class _Reading:
    """See `Index.read`; a class, for a generator costs as much as looking a record up."""

    __slots__ = ("_index", "_txn")

    def __init__(self, index: "Index") -> None:
        self._index = index

    def __enter__(self) -> "lmdb.Transaction[bytes]":
        self._txn = self._index._begin_read()
        return self._txn

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        self._txn.abort()
        if isinstance(exc, lmdb.Error | struct.error):
            raise self._index._unreadable(exc) from exc


_open_here: "dict[tuple[int, int, int], Index]" = {}  # by process, device and inode
_registry = threading.Lock()


class Index:
    """An open index; made by `Index.open`."""

    def __init__(self, folder: Path, write_lock: Path, map_size: int) -> None:
        self._env = lmdb.open(
            str(folder),
            map_size=map_size,
            max_dbs=8,
            max_readers=_MAX_READERS,
            sync=False,
            metasync=False,
            writemap=False,
            mode=0o600,
        )
        self.map_size = map_size
        try:
            self.ledger = Ledger(self._env)
        except BaseException:
            self._env.close()
            raise
        self._file = os.open(folder / "data.mdb", os.O_RDONLY)
        self._lock_file = os.open(write_lock, os.O_RDWR | os.O_CREAT, 0o600)
        self._writer = threading.Lock()
        self._users = 1
        self._least = 0
        self._page = self._env.stat()["psize"]
        self._suspect = False
        self._checked = time.monotonic()
        self._measure()

    @classmethod
    def open(cls, folder: Path, write_lock: Path, map_size: int) -> "Index":
        """The index of a folder; to be closed as often as it was opened.

        Raises:
            lmdb.Error: it cannot be opened.
            OSError: its folder cannot be read.
        """
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        key = (os.getpid(), status.st_dev, status.st_ino)
        with _registry:
            for inherited in [k for k in _open_here if k[0] != key[0] and k[1:] == key[1:]]:
                # A parent's. LMDB would take a second one in this process for the first.
                _open_here.pop(inherited)._env.close()
            index = _open_here.get(key)
            if index is None:
                index = _open_here[key] = cls(folder, write_lock, map_size)
                index._key = key
            else:
                index._users += 1
            return index

    _key: tuple[int, int, int]

    def close(self) -> None:
        """Give up one use of it."""
        with _registry:
            self._users -= 1
            if self._users == 0:
                del _open_here[self._key]
                self._env.close()
                os.close(self._file)
                os.close(self._lock_file)

    def sync(self) -> bool:
        """Bring it to the device; whether it is whole, as far as anybody noticed.

        Raises:
            lmdb.Error: the device failed.
        """
        try:
            self._guard()
        except IndexFaultError:
            return False
        self._env.sync(True)
        return not self._suspect

    def _measure(self) -> int:
        """Note how long the file must be at least; the number of the last write transaction."""
        self._guard()
        info = self._env.info()
        self._least = max(self._least, (info["last_pgno"] + 1) * self._page)
        return info["last_txnid"]

    def _guard(self) -> None:
        """Refuse to touch a map whose file was cut off or deleted underneath."""
        least = self._least  # before we look: another thread's commit lets both grow
        status = os.fstat(self._file)
        if status.st_nlink == 0:
            raise IndexFaultError("the index was deleted")
        if status.st_size < least:
            raise IndexFaultError(f"the index lost its end: {status.st_size} bytes are left")

    @property
    def last_txn(self) -> int:
        """Number of the last write transaction of anybody.

        Raises:
            IndexFaultError: the index lost its end.
        """
        self._guard()
        return self._env.info()["last_txnid"]

    def read(self) -> "_Reading":
        """A short read transaction.

        Raises:
            IndexFaultError: it cannot be read.
        """
        return _Reading(self)

    def _begin_read(self) -> "lmdb.Transaction[bytes]":
        self._guard()
        try:
            return self._env.begin(db=self.ledger.records)
        except lmdb.Error as exc:
            raise self._unreadable(exc) from exc

    def _unreadable(self, exc: Exception) -> IndexFaultError:
        if isinstance(exc, lmdb.ReadersFullError):
            self.check_readers()
            return IndexFaultError("too many readers at once")
        self._suspect = True
        return IndexFaultError(f"the index cannot be read: {exc}")

    @contextmanager
    def write(
        self, committed: Callable[[int], None] | None = None
    ) -> "Iterator[lmdb.Transaction[bytes]]":
        """The write transaction: one at a time among all processes; aborted by any exception.

        Args:
            committed: called with its number when it changed something, before anybody else writes.

        Raises:
            IndexFaultError: nobody let us write within ten seconds, the map or disk is full, or it
                cannot be written.
        """
        if not self._writer.acquire(timeout=_PATIENCE_S):
            raise IndexFaultError("another thread has been writing the index for too long")
        try:
            self._lock()
            try:
                self._guard()
                with self._env.begin(write=True) as txn:
                    number = txn.id()
                    yield txn
                if self._measure() == number and committed is not None:
                    committed(number)
            finally:
                fcntl.lockf(self._lock_file, fcntl.LOCK_UN)
        except (lmdb.MapFullError, lmdb.TxnFullError) as exc:
            self.check_readers()
            raise IndexFaultError("the index is full", full=True) from exc
        except (lmdb.Error, struct.error) as exc:
            self._suspect = True
            full = "No space" in str(exc)
            raise IndexFaultError(f"the index cannot be written: {exc}", full=full) from exc
        finally:
            self._writer.release()

    def _lock(self) -> None:
        # A record lock, not flock: a forked child that outlives us would go on holding the latter.
        limit = time.monotonic() + _PATIENCE_S
        pause = 0.0001
        while True:
            try:
                fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > limit:
                    raise IndexFaultError("another process has been writing too long") from None
                time.sleep(pause)
                pause = min(2 * pause, 0.005)
            else:
                return

    def check_readers(self, *, every: float = 0.0) -> None:
        """Free the slots of readers that died; at most once in `every` seconds."""
        now = time.monotonic()
        if now - self._checked >= every:
            self._checked = now
            self._env.reader_check()
