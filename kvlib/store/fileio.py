# SPDX-License-Identifier: Apache-2.0
"""Reading and writing files whole, with what each platform offers."""

import os
import time
from collections.abc import Sequence

from kvlib.errors import CorruptDataError

__all__ = ["CREATE", "READ", "TooLateError", "free_bytes", "read_at", "scandir", "write_all"]

READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_IOV_MAX = 512
_HAS_WRITEV = hasattr(os, "writev")


class TooLateError(Exception):
    """The deadline passed in the middle of a read."""


def scandir(path: str | os.PathLike[str]) -> "list[os.DirEntry[str]]":
    """Entries of a folder; none if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """What a file system has left for us; 0 if it does not say."""
    try:
        status = os.statvfs(folder)
    except (OSError, AttributeError):
        return 0
    return status.f_bavail * status.f_frsize


def read_at(fd: int, out: memoryview, offset: int, deadline: float | None) -> None:
    """Fill `out` from `offset`.

    Raises:
        CorruptDataError: the file ends before.
        TooLateError: the deadline passed.
    """
    done = 0
    while done < out.nbytes:
        if deadline is not None and time.monotonic() > deadline:
            raise TooLateError
        if hasattr(os, "preadv"):
            got = os.preadv(fd, [out[done:]], offset + done)
        else:
            os.lseek(fd, offset + done, os.SEEK_SET)
            data = os.read(fd, out.nbytes - done)
            got = len(data)
            out[done : done + got] = data
        if got == 0:
            raise CorruptDataError(f"the file ends after {offset + done} bytes")
        done += got


def write_all(fd: int, views: Sequence[memoryview]) -> None:
    """Write all of the pieces, in order."""
    queue = list(views)
    while queue:
        done = os.writev(fd, queue[:_IOV_MAX]) if _HAS_WRITEV else os.write(fd, queue[0])
        while queue and done >= queue[0].nbytes:
            done -= queue[0].nbytes
            queue.pop(0)
        if done:
            queue[0] = queue[0][done:]
