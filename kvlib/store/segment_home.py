# SPDX-License-Identifier: Apache-2.0
"""The folder of a segment store: who may open it, who has it open, and in what state it is.

    SUPER              what this folder is
    index.lmdb/        the index
    seg-<number>.kv    records, in files whose room is taken when they are made
    locks/gate         held while a store is opened or closed
    locks/open         shared by all open stores: who gets it alone knows that nobody else is here
    locks/write        held while the index is written
    locks/<id>         held by one open store as long as it lives; `held` rows name it
    OPEN, CLEAN        see `kvlib.store.segment_check`

A lock dies with its process, however that dies, so nothing has to be cleaned up by hand.
"""

import contextlib
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from kvlib.errors import ConfigError, CorruptDataError, StoreError, StoreTimeoutError
from kvlib.store.blockio import SegmentFiles
from kvlib.store.segment_check import doubt, is_clean, mark_clean, mark_open
from kvlib.store.segment_format import Super
from kvlib.store.segment_index import Index, IndexFaultError
from kvlib.store.segment_recovery import find_segments, rebuild

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Home"]

_GATE_S = 60.0


class Home:
    """An open folder.

    Args:
        root: the folder; made if missing, readable by its owner only.
        granule: bytes of a granule if the store is made now.
        map_size: most bytes the index may take.
        direct: try O_DIRECT.

    Attributes:
        files: the open segments.
        index: the open index.
        me: 16 bytes that name this open store in `held` rows.
        rebuilt: why the index was made anew at this open, empty if it was not.

    Raises:
        ConfigError: the folder is foreign, somebody else's, damaged, or cannot be made.
        IncompatibleDataError: it was written by another version; nothing is touched.
        StoreTimeoutError: somebody else has been opening it for a minute.
        StoreError: the index is damaged while others have it open.
    """

    def __init__(self, root: Path, *, granule: int, map_size: int, direct: bool = True) -> None:
        if fcntl is None:
            raise ConfigError("a segment store needs file locks; use the file tier on this system")
        self.root = root
        self.me = uuid.uuid4().bytes
        self.rebuilt = ""
        self._fds: list[int] = []
        self._opened = False
        try:
            _check_folder(root)
            self._locks = root / "locks"
            self._locks.mkdir(mode=0o700, exist_ok=True)
            with self._gate():
                self.super = self._read_super(granule)
                self.files = SegmentFiles(root, direct=direct)
                self._alone = self._lock_fd("open")
                if self._is_alone():
                    self._open_alone(map_size)
                else:
                    self._open_beside_others(map_size)
                self._mine = self._lock_fd(self.me.hex())
                _try_lock(self._mine, fcntl.LOCK_EX)
                fcntl.flock(self._alone, fcntl.LOCK_SH)
        except BaseException as exc:
            if self._opened:
                self.index.close()
            self._close_fds()
            if isinstance(exc, OSError | lmdb.Error | IndexFaultError):
                raise ConfigError(f"cannot open a store in {root}: {exc}") from exc
            raise

    # -- locks

    def _lock_fd(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self._locks / name, flags, 0o600)
        self._fds.append(fd)
        return fd

    @contextmanager
    def _gate(self) -> Iterator[None]:
        fd = self._lock_fd("gate")
        try:
            limit = time.monotonic() + _GATE_S
            while not _try_lock(fd, fcntl.LOCK_EX):
                if time.monotonic() > limit:
                    raise StoreTimeoutError(
                        f"somebody has been opening or closing the store in {self.root} for "
                        f"{_GATE_S:.0f} s; it may be made anew from its segments. Try again later"
                    )
                time.sleep(0.002)
            yield
        finally:
            self._fds.remove(fd)
            os.close(fd)

    def _is_alone(self) -> bool:
        """Take the lock that all open stores share; whether nobody else has it."""
        limit = time.monotonic() + _GATE_S
        while True:
            if _try_lock(self._alone, fcntl.LOCK_EX):
                return True
            if _try_lock(self._alone, fcntl.LOCK_SH):
                return False
            if time.monotonic() > limit:
                raise StoreTimeoutError(f"{self.root} is locked by something that is no store")
            # Somebody was killed while opening: its gate came free before this lock will.
            time.sleep(0.001)

    def is_dead(self, holder: bytes) -> bool:
        """Whether the open store of that name is gone."""
        if holder == self.me:
            return False
        try:
            fd = os.open(self._locks / holder.hex(), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            dead = stat.S_ISREG(os.fstat(fd).st_mode) and _try_lock(fd, fcntl.LOCK_EX)
            if dead:
                (self._locks / holder.hex()).unlink(missing_ok=True)
            return dead
        finally:
            os.close(fd)

    # -- opening

    def _read_super(self, granule: int) -> Super:
        path = self.root / "SUPER"
        if not path.exists():
            left = path.with_suffix(".new")
            with left.open("wb") as file:
                file.write(Super.new(granule).to_bytes())
                file.flush()
                os.fsync(file.fileno())
            left.replace(path)
            folder = os.open(self.root, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return Super.parse(path.read_bytes(), str(path))

    @property
    def _data(self) -> Path:
        return self.root / "index.lmdb" / "data.mdb"

    def _open_index(self, map_size: int) -> None:
        self.index = Index.open(self.root / "index.lmdb", self._locks / "write", map_size)
        self._opened = True

    def _close_index(self) -> None:
        self._opened = False
        self.index.close()

    def _open_alone(self, map_size: int) -> None:
        """Nobody else has it open: check the index, make it anew if in doubt, clear up."""
        clean = None
        if self._data.exists():
            clean = is_clean(self.root, self._data)
            why = doubt(self.root, self._data) if clean is None else ""
            why = "it was changed since it was closed" if clean is False else why
        else:
            why = "there is none" if find_segments(self.root) else ""
        mark_open(self.root)  # before it changes: as long as CLEAN is there, it must match
        if not why:
            # Without its lock file: what a killed process left in there is of no use to anybody.
            self._data.with_name("lock.mdb").unlink(missing_ok=True)
            try:
                self._open_index(map_size)
            except (lmdb.Error, OSError) as exc:
                why = f"it cannot be opened: {exc}"
            else:
                why = self._look(repair=not clean)
                if why:
                    self._close_index()
        if why:
            self.rebuilt = why
            self._set_aside()
            self._open_index(map_size)
            rebuild(self.root, self.files, self.super, self.index)
        for lock in self._locks.iterdir():
            if len(lock.name) == 32:
                lock.unlink(missing_ok=True)
        with self.index.write() as txn:
            self.index.ledger.sweep(txn, lambda _: True)

    def _look(self, *, repair: bool) -> str:
        """Compare the index with the segments; why it cannot be used."""
        if not self.index.ledger.is_ours:
            return "it holds other databases"
        try:
            with self.index.write() as txn:
                known = self.index.ledger.segments(txn)
                filled = self.index.ledger.is_filled(txn)
                if repair:
                    self.index.ledger.repair(txn)
        except (IndexFaultError, CorruptDataError) as exc:
            return str(exc)
        there = find_segments(self.root)
        if there and not filled:
            return "somebody was killed while it was made"
        for number, granules in known.items():
            if there.get(number, 0) < granules * self.super.granule:
                return f"segment {number} is missing or cut off"
        for number in there.keys() - known.keys():
            self.files.remove(number)  # made by somebody who was killed before it was entered
        return ""

    def _set_aside(self) -> None:
        """Keep a damaged index for whoever wants to look at it; one of them."""
        folder = self.root / "index.lmdb"
        aside = self.root / "index.lmdb.damaged"
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)

    def _open_beside_others(self, map_size: int) -> None:
        """Others have it open: the index is as good as it is for them."""
        if not self._data.exists():
            raise StoreError(
                f"the index of {self.root} was deleted while others have the store open. Close it "
                "everywhere; it is then made anew"
            )
        self._open_index(map_size)

    # -- closing

    def close(self) -> None:
        """Leave; the last one to leave notes that the index is whole."""
        try:
            with self._gate():
                alone = _try_lock(self._alone, fcntl.LOCK_EX)
                whole = alone and self.index.sync()
                self._close_index()
                if whole:
                    mark_clean(self.root, self._data)
                (self._locks / self.me.hex()).unlink(missing_ok=True)
        except (OSError, lmdb.Error, StoreTimeoutError):
            pass  # not noted as clean: the next open looks more closely
        finally:
            self.files.close()
            self._close_fds()

    def _close_fds(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()


def _try_lock(fd: int, kind: int) -> bool:
    """Take a lock without waiting; whether it was free."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _check_folder(root: Path) -> None:
    """Make the folder, or check that it is a segment store's or empty.

    Raises:
        ConfigError: it is neither, or not ours.
        OSError: it cannot be made or read.
    """
    if root.is_symlink():
        raise ConfigError(f"{root} is a symbolic link; give the folder itself")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = root.stat().st_uid
    if owner != os.getuid():
        raise ConfigError(f"{root} belongs to user {owner}, not to us ({os.getuid()})")
    content = sorted(path.name for path in root.iterdir())
    if "SUPER" in content:
        if (root / "SUPER").is_symlink():
            raise ConfigError(f"{root}/SUPER is a symbolic link; nothing is read through it")
        Super.parse((root / "SUPER").read_bytes(), str(root / "SUPER"))
    elif content and set(content) - {"locks", "SUPER.new"}:
        raise ConfigError(
            f"{root} is not empty and no segment store: it holds {', '.join(content[:5])}. Give an "
            "empty or new folder"
        )
