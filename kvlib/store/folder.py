# SPDX-License-Identifier: Apache-2.0
"""The folder of a `FileStore`: who may open it, and where half-written files live.

Every open store writes into a folder of its own, ``tmp/<id>/``, and holds a lock on
``tmp/<id>.lock`` as long as it lives. Whoever opens the store later may remove the folders whose
lock is free: their owner is dead. The lock is taken before the folder is made, so the folder of a
living owner is locked.
"""

import os
import re
import shutil
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from kvlib.errors import ConfigError, IncompatibleDataError
from kvlib.keys import DIGEST_BYTES, BlockKey, StoreKey
from kvlib.store.file_record import End, physical_bytes
from kvlib.store.fileio import scandir

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FORMAT",
    "RECORD_NAME",
    "Entry",
    "OwnFolder",
    "open_folder",
    "record_files",
    "record_key",
]

FORMAT = "kvlib filestore 2\n"
RECORD_NAME = re.compile(r"([0-9a-f]{128})\.kvlc")
_ORPHAN_AGE_S = 3600.0


@dataclass(slots=True)
class Entry:
    """A record in the index.

    `size` is its container's; `stamped` when its file's time was last set to tell its use; `end`
    what the end of its file says; `used` whether it was used since.
    """

    size: int
    stamped: float
    end: End
    used: bool = False

    @property
    def physical(self) -> int:
        """Bytes on disk, in whole pages."""
        return physical_bytes(self.size)


def record_key(name: str) -> StoreKey:
    """The key that 128 hexadecimal digits stand for."""
    data = bytes.fromhex(name)
    return StoreKey(BlockKey(data[:DIGEST_BYTES]), data[DIGEST_BYTES:])


def record_files(root: Path) -> list[tuple[int, StoreKey, int]]:
    """Time of last use (nanoseconds), key and bytes of all record files, oldest use first."""
    found = []
    for shelf in scandir(root):
        if len(shelf.name) == 2 and shelf.is_dir(follow_symlinks=False):
            for file in scandir(shelf.path):
                match = RECORD_NAME.fullmatch(file.name)
                try:
                    if match and file.is_file(follow_symlinks=False):
                        status = file.stat(follow_symlinks=False)
                        found.append((status.st_mtime_ns, record_key(match[1]), status.st_size))
                except OSError:
                    continue
    found.sort()
    return found


def open_folder(path: Path) -> None:
    """Make the store's folder, or check that it is one.

    Raises:
        ConfigError: a symbolic link, a file, another user's folder, or foreign content.
        IncompatibleDataError: a store of another version; nothing in it is touched.
    """
    try:
        if path.is_symlink():
            raise ConfigError(f"{path} is a symbolic link; give the folder itself")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
        marker = path / "FORMAT"
        if hasattr(os, "getuid") and owner != os.getuid():
            raise ConfigError(f"{path} belongs to user {owner}, not to us ({os.getuid()})")
        if marker.exists():
            seen = marker.read_text(encoding="utf-8", errors="replace")
            if seen != FORMAT:
                raise IncompatibleDataError(
                    f"{path} holds {seen[:80]!r}; this kvlib reads {FORMAT!r}. Use another folder"
                )
            return
        content = sorted(p.name for p in path.iterdir())
        if content and not all(name == "tmp" or name.startswith("FORMAT.") for name in content):
            raise ConfigError(
                f"{path} is not empty and no kvlib store: it holds {', '.join(content[:5])}. Give "
                "an empty or new folder"
            )
        temporary = path / f"FORMAT.{uuid.uuid4().hex}"
        temporary.write_text(FORMAT, encoding="utf-8")
        temporary.replace(marker)
    except OSError as exc:
        raise ConfigError(f"cannot open a store in {path}: {exc}") from exc


def _lock(fd: int) -> bool:
    """Take the lock of an open file without waiting; whether it was free."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class OwnFolder:
    """The folder for one store's half-written files.

    Args:
        root: the store's folder.
    """

    def __init__(self, root: Path) -> None:
        tmp = root / "tmp"
        tmp.mkdir(mode=0o700, exist_ok=True)
        name = uuid.uuid4().hex
        self._lock_file = tmp / f"{name}.lock"
        self._fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _lock(self._fd)
        self.path = tmp / name
        self.path.mkdir(mode=0o700)

    def sweep(self) -> int:
        """Remove what dead owners left; how many folders that were."""
        swept = 0
        for lock_file in self.path.parent.glob("*.lock"):
            if lock_file != self._lock_file and self._is_dead(lock_file):
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                lock_file.unlink(missing_ok=True)
                swept += 1
        return swept

    def _is_dead(self, lock_file: Path) -> bool:
        try:
            age = time.time() - lock_file.stat().st_mtime
            if fcntl is None:
                return age > _ORPHAN_AGE_S
            if not lock_file.with_suffix("").exists() and age < _ORPHAN_AGE_S:
                return False  # it may be about to take its lock
            fd = os.open(lock_file, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and _lock(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Remove the folder and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_file.unlink(missing_ok=True)
        os.close(self._fd)
