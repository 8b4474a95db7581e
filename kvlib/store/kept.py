# SPDX-License-Identifier: Apache-2.0
"""A store on disk, opened to be looked after.

Looking changes nothing beyond what opening a store always does: no record is evicted, marked as
used, or dropped for a failed check. That matters most under a wrong MAC key, with which every
record looks damaged.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from kvlib.codecs.container import Buffer
from kvlib.errors import ConfigError, CorruptDataError, StoreError
from kvlib.keys import StoreKey
from kvlib.store.file_record import END_BYTES, physical_bytes, read, read_end
from kvlib.store.fileio import READ
from kvlib.store.files import FileStore
from kvlib.store.segment_accounts import Account
from kvlib.store.segment_format import PAGE, Super, granules_of
from kvlib.store.segment_index import IndexFaultError
from kvlib.store.segment_ledger import Limits
from kvlib.store.segment_recovery import find_segments
from kvlib.store.segments import SegmentStore
from kvlib.store.tier import Tier

__all__ = ["Kept", "Kind", "make_kept", "open_kept", "tier_of"]

Kind = Literal["file", "segment"]

_GRANULE = 1 << 14
"""Of segment stores made here: that of one of 16 GiB, `KVStore`'s default."""


class Kept(Tier, Protocol):
    """A persistent tier that can be looked at without a trace."""

    def peek(
        self, key: StoreKey, out: Buffer, sections: Collection[int] | None = None
    ) -> int | None:
        """As `Tier.get_into`, but it neither drops nor marks anything, and says what is wrong.

        Raises:
            CodecError: damaged, of another version, or under another MAC key.
            OSError, StoreError: the medium or the index failed.
        """
        ...

    def accounts(self, *, repair: bool) -> list[str]:
        """What is wrong beside the records: a line each."""
        ...

    def let_go(self) -> None:
        """Give the file system what no record needs."""
        ...

    def physical(self, nbytes: int) -> int:
        """Bytes on disk of a record of `nbytes`."""
        ...

    def last_use(self, key: StoreKey) -> float | None:
        """When a record was last used, in seconds since 1970, if the tier knows."""
        ...

    def disk_bytes(self) -> int:
        """Taken of the file system."""
        ...

    def tenants(self) -> dict[bytes, tuple[int, int]]:
        """Bytes that each tenant holds, and the quota it was last held to, 0 if none is known."""
        ...

    def limits(self) -> Limits:
        """What the store was last kept to, zeros where the tier does not know."""
        ...


class _KeptFiles(FileStore):
    """See `Kept`."""

    _EXPIRES: ClassVar[bool] = False

    def peek(
        self, key: StoreKey, out: Buffer, sections: Collection[int] | None = None
    ) -> int | None:
        view = memoryview(out).cast("B")
        try:
            fd = os.open(self._path(key), READ)
        except FileNotFoundError:
            return None
        try:
            total = os.fstat(fd).st_size
            read_end(fd, key, total)
            size = total - END_BYTES
            got = read(fd, key, view, size, sections, self._mac_key, None)
        finally:
            os.close(fd)
        return None if got is None else size

    def accounts(self, *, repair: bool) -> list[str]:
        return []  # they were made by the scan of this very open

    def let_go(self) -> None:
        """A file is gone with its record."""

    def physical(self, nbytes: int) -> int:
        return physical_bytes(nbytes)

    def last_use(self, key: StoreKey) -> float | None:
        try:
            return self._path(key).stat().st_mtime
        except OSError:
            return None

    def disk_bytes(self) -> int:
        return self.stats().used_bytes

    def tenants(self) -> dict[bytes, tuple[int, int]]:
        return {tenant: (used, 0) for tenant, used in self._roster.tenants.items()}

    def limits(self) -> Limits:
        return Limits()


class _KeptSegments(SegmentStore):
    """See `Kept`."""

    _EXPIRES: ClassVar[bool] = False

    def peek(
        self, key: StoreKey, out: Buffer, sections: Collection[int] | None = None
    ) -> int | None:
        view = memoryview(out).cast("B")
        name = key.to_bytes()
        try:
            with self._room.lease(name):
                while True:
                    entry = self._room.lookup(name)
                    if entry is None:
                        return None
                    try:
                        got = self._read(key, entry, view, sections, None)
                    except (CorruptDataError, OSError):
                        if self._room.is_current(name, entry):
                            raise
                        continue  # dropped while it was read, and maybe stored again
                    if self._room.is_current(name, entry):
                        return None if got is None else entry.size
        except IndexFaultError as exc:
            raise StoreError(str(exc)) from exc

    def accounts(self, *, repair: bool) -> list[str]:
        try:
            return self._room.audit(repair=repair)
        except (IndexFaultError, CorruptDataError) as exc:
            return [str(exc)]

    def let_go(self) -> None:
        try:
            self._room.sweep()
            self._room.capacity = 0
            self._room.shrink(evict=False)
        except IndexFaultError as exc:
            raise StoreError(f"the records are gone, their room is not: {exc}") from exc

    def physical(self, nbytes: int) -> int:
        return granules_of(nbytes, self._granule) * self._granule

    def last_use(self, key: StoreKey) -> float | None:
        return None  # stamps are an order, not times

    def disk_bytes(self) -> int:
        return sum(find_segments(self._home.root).values())

    def tenants(self) -> dict[bytes, tuple[int, int]]:
        accounts = self._noted()[1]
        return {x: (a.used * self._granule, a.quota * self._granule) for x, a in accounts.items()}

    def limits(self) -> Limits:
        return self._noted()[0]

    def _noted(self) -> tuple[Limits, dict[bytes, Account]]:
        try:
            return self._room.limits()
        except IndexFaultError as exc:
            raise StoreError(str(exc)) from exc


def tier_of(path: Path) -> Kind:
    """Which tier made a folder.

    Raises:
        ConfigError: none did.
    """
    if (path / "SUPER").is_file():
        return "segment"
    if (path / "FORMAT").is_file():
        return "file"
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give the folder of a store")
    raise ConfigError(
        f"{path} is no store: expected a folder with the file SUPER (segment tier) or FORMAT (file "
        "tier)"
    )


def open_kept(
    path: Path,
    *,
    mac_key: bytes | None = None,
    records: int = 0,
    nbytes: int = 0,
    capacity: int | None = None,
) -> Kept:
    """Open a store that is there, so that nothing needs to be evicted.

    Args:
        path: its folder.
        mac_key: that its records were authenticated under.
        records: that shall fit in besides what is there.
        nbytes: they have.
        capacity: instead: what the store may take, evicting what is beyond.

    Raises:
        ConfigError: no store lies there.
        IncompatibleDataError: it was written by another version; nothing is touched.
    """
    if tier_of(path) == "file":
        return _KeptFiles(path, capacity=capacity, mac_key=mac_key)
    shrink = capacity is not None
    if capacity is None:
        granule = Super.parse((path / "SUPER").read_bytes(), str(path / "SUPER")).granule
        capacity = sum(find_segments(path).values()) + nbytes + records * (PAGE + granule)
    # Others may have put more by now: to look at a store must not evict it.
    return _KeptSegments(path, capacity=capacity, mac_key=mac_key, shrink=shrink)


def make_kept(path: Path, kind: Kind, *, mac_key: bytes | None = None) -> Kept:
    """Make an empty store in a new or empty folder, or open the one there if it is of that tier.

    Raises:
        ConfigError: the folder is another tier's, or anything else.
    """
    if path.is_dir() and any(path.iterdir()):
        seen = tier_of(path)
        if seen != kind:
            raise ConfigError(f"{path} is a store of the {seen} tier, not of the {kind} tier")
        return open_kept(path, mac_key=mac_key)
    if kind == "file":
        return _KeptFiles(path, mac_key=mac_key)
    return _KeptSegments(path, capacity=0, mac_key=mac_key, granule=_GRANULE)
