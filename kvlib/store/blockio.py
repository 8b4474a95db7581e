# SPDX-License-Identifier: Apache-2.0
"""Reading and writing segment files in whole pages, past the page cache where the system lets us.

O_DIRECT is worth 2 to 5 times the speed of buffered I/O for blocks of a mebibyte and more, and the
memory stays with the tiers that choose what to keep. Where it is refused (tmpfs, some network file
systems) the same calls go through the page cache and tell it to forget. These functions are all
the I/O a segment store does on its segments; tests make them fail one by one.
"""

import mmap
import os
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from kvlib.errors import CorruptDataError
from kvlib.store.fileio import TooLateError

__all__ = ["DIRECT_ALIGNMENT", "SegmentFiles", "allocate", "pread", "pwrite", "supports", "sync"]

DIRECT_ALIGNMENT = 4096
"""What the address of memory must be a multiple of for O_DIRECT, on every device and kernel."""

_SECTOR = 512

_DIRECT = getattr(os, "O_DIRECT", 0)
_FLAGS = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def supports() -> bool:
    """Whether this system has the calls a segment store needs."""
    return hasattr(os, "preadv") and hasattr(os, "pwritev")


def pread(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """One read; how many bytes came."""
    return os.preadv(fd, views, offset)


def pwrite(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """One write; how many bytes went."""
    return os.pwritev(fd, views, offset)


def sync(fd: int) -> None:
    """Wait until what was written has reached the device."""
    getattr(os, "fdatasync", os.fsync)(fd)


def allocate(fd: int, size: int) -> None:
    """Take room for a file of `size` bytes, so that no later write can run out of it.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


def _forget(fd: int, offset: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def _takes_direct(folder: Path) -> bool:
    """Whether a page can be written past the cache in this folder, and read back."""
    probe = folder / f"probe-{uuid.uuid4().hex}"
    page = memoryview(mmap.mmap(-1, DIRECT_ALIGNMENT))
    try:
        fd = os.open(probe, _FLAGS | os.O_CREAT | os.O_EXCL | _DIRECT, 0o600)
        try:
            return os.pwritev(fd, [page], 0) == os.preadv(fd, [page], 0) == len(page)
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


class SegmentFiles:
    """The open segment files of a store.

    Args:
        root: the store's folder.
        direct: try O_DIRECT.
    """

    def __init__(self, root: Path, *, direct: bool = True) -> None:
        self._root = root
        self.direct = bool(direct and _DIRECT) and _takes_direct(root)
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()

    def path(self, number: int) -> Path:
        """Where a segment lies."""
        return self._root / f"seg-{number:08x}.kv"

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | (_DIRECT if self.direct else 0), 0o600)

    def fd(self, number: int) -> int:
        """An open segment.

        Raises:
            OSError: it is gone.
        """
        fd = self._fds.get(number)
        if fd is None:
            with self._lock:
                fd = self._fds.get(number)
                if fd is None:
                    fd = self._fds[number] = self._open(self.path(number), _FLAGS)
        return fd

    def create(self, number: int, size: int) -> None:
        """Make a segment of `size` bytes, its room taken.

        Raises:
            OSError: no room, or the folder is gone; no file stays.
        """
        path = self.path(number)
        try:
            fd = self._open(path, _FLAGS | os.O_CREAT | os.O_TRUNC)
            try:
                allocate(fd, size)
            finally:
                os.close(fd)
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def remove(self, number: int) -> None:
        """Delete a segment that nothing lies in."""
        with self._lock:
            fd = self._fds.pop(number, None)
        if fd is not None:
            os.close(fd)
        self.path(number).unlink(missing_ok=True)

    def read(
        self, number: int, views: Sequence[memoryview], offset: int, deadline: float | None = None
    ) -> None:
        """Fill `views` from `offset` (a multiple of the page size).

        Raises:
            CorruptDataError: the file ends before.
            TooLateError: the deadline passed.
            OSError: the device failed.
        """
        fd = self.fd(number)
        total = sum(view.nbytes for view in views)
        done = 0
        while done < total:
            if deadline is not None and time.monotonic() > deadline:
                raise TooLateError
            got = pread(fd, _rest(views, done), offset + done)
            if got == 0 or (self.direct and got % _SECTOR):
                raise CorruptDataError(f"segment {number} ends after {offset + done + got} bytes")
            done += got
        if not self.direct:
            _forget(fd, offset, total)

    def write(self, number: int, views: Sequence[memoryview], offset: int) -> None:
        """Write all of `views` at `offset`.

        Raises:
            OSError: the device failed or is full.
        """
        fd = self.fd(number)
        total = sum(view.nbytes for view in views)
        done = 0
        while done < total:
            got = pwrite(fd, _rest(views, done), offset + done)
            if got == 0 or (self.direct and got % _SECTOR):
                raise OSError(f"segment {number} took {done + got} of {total} bytes")
            done += got

    def sync(self, numbers: Sequence[int]) -> None:
        """Wait until what was written to these segments has reached the device.

        Raises:
            OSError: it did not.
        """
        for number in numbers:
            fd = self.fd(number)
            sync(fd)
            if not self.direct:
                _forget(fd, 0, 0)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            fds = list(self._fds.values())
            self._fds.clear()
        for fd in fds:
            os.close(fd)


def _rest(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `views` after `done` bytes."""
    if not done:
        return list(views)
    left = []
    for view in views:
        if done < view.nbytes:
            left.append(view[done:])
        done = max(0, done - view.nbytes)
    return left
