# SPDX-License-Identifier: Apache-2.0
"""The segment tier: records in preallocated files, at the speed of the device.

A record is one header page that says all there is to know of it, and the container behind it, in
up to four runs of granules of large files. An LMDB environment says where each record lies and what
is free; a cache of the header pages, made anew from them if need be (docs/formats/segments.md).

**Wrong bytes are never served.** A read checks the header page (key, generation, size) and, unless
told otherwise, every checksum of the container; and after the last byte came, that the index still
names this generation. Whatever fails is a miss. **Loss is acceptable**: `put` returns when the
bytes have been handed to the device and this process finds them; the flush and the entry in the
index follow within milliseconds, for all that was put meanwhile. A crash loses the last group.

Any number of processes may open one folder; they need no server. Which process reads, writes or
drops what does not matter: the accounts are in the index (`kvlib.store.segment_ledger`), and the
capacity holds for all of them together. It must be a local file system.
"""

import errno
import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Self

from kvlib.codecs.container import Buffer
from kvlib.errors import (
    ConfigError,
    CorruptDataError,
    IncompatibleDataError,
    KVLibError,
    StoreClosedError,
)
from kvlib.keys import StoreKey
from kvlib.store.arena import Arena
from kvlib.store.blockio import supports
from kvlib.store.fileio import TooLateError
from kvlib.store.flight import SingleFlight
from kvlib.store.replacement import Hint, Replacement
from kvlib.store.segment_commit import GroupCommit, Written
from kvlib.store.segment_format import (
    PAGE,
    Entry,
    default_granule,
    granules_of,
    key_of,
    pack_header,
)
from kvlib.store.segment_growth import NO_ROOM, Growth
from kvlib.store.segment_home import Home
from kvlib.store.segment_index import IndexFaultError
from kvlib.store.segment_io import RecordIO
from kvlib.store.segment_ledger import Limits
from kvlib.store.segment_read import VERIFY, RecordReader, Verify
from kvlib.store.segment_room import Room
from kvlib.store.segment_verify import check_records
from kvlib.store.sizes import parse_bytes
from kvlib.store.terms import NO_TERMS, Terms
from kvlib.store.tier import CheckReport, TierStats

__all__ = ["SegmentStore"]

_SEGMENT_BYTES = 1 << 30
_MAX_SEGMENTS = 120
_ROW_BYTES = 512  # of the index, for a record and the free run behind it, with room to turn round
_LEAST_MAP = 16 << 20
_FIXED_BYTES = 256 << 10  # of the index, whatever is in it
_SLOT_BYTES = 2 << 20
_MAX_VERIFIED = 1 << 20
_RESCAN_S = 5.0
_PATIENCE_S = 60.0


class SegmentStore:
    """A persistent tier in preallocated segment files.

    Args:
        path: the folder; made if missing, readable by its owner only.
        capacity: hard limit of the bytes on disk: whole granules, header pages included.
        mac_key: 16 to 64 secret bytes: only records authenticated under it are read.
        verify: check the container's checksums at every read ("always"), at the first one since
            the store was opened ("first"), or not at all ("never": for measurements only). Header
            pages are always checked.
        granule: bytes of the unit of space, a power of two from 4096; None for about a million
            granules. Fixed when a store is made.
        segment: bytes of a segment file, at most.
        staging: bytes of page-aligned memory for transfers.
        threads: transfers of one large record at a time.
        direct: use O_DIRECT where the file system takes it.
        index_bytes: most bytes the index may take; None for enough.
        replacement: which records go first: method string of one of `REPLACEMENTS`, or the policy.
            Each process has its own; it begins with the order of use that all of them keep.
        min_free: bytes of the file system that are left to others: no segment is made of them.
        shrink: drop what is beyond the capacity now, not only when something is put.

    Raises:
        ConfigError: a bad size, or the folder is foreign, damaged or cannot be made.
        IncompatibleDataError: it was written by another version; nothing is touched.
        StoreTimeoutError: another process has been opening it for a minute.
        StoreError: its index was deleted while another process has it open.
    """

    name: ClassVar[str] = "segment"
    persistent: ClassVar[bool] = True
    _EXPIRES: ClassVar[bool] = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity: int | str,
        mac_key: bytes | None = None,
        verify: Verify = "always",
        granule: int | None = None,
        segment: int | str = _SEGMENT_BYTES,
        staging: int | str = 32 * _SLOT_BYTES,
        threads: int = 2,
        direct: bool = True,
        index_bytes: int | str | None = None,
        replacement: str | Replacement = "lru",
        min_free: int | str = 0,
        shrink: bool = True,
    ) -> None:
        if not supports():
            raise ConfigError("a segment store needs POSIX I/O; use the file tier on this system")
        if verify not in VERIFY:
            raise ConfigError(f"verify={verify!r}: expected one of {', '.join(VERIFY)}")
        self._capacity = parse_bytes(capacity, "capacity")
        if granule is None:
            granule = default_granule(self._capacity)
        if granule < PAGE or granule & (granule - 1) or granule > _SLOT_BYTES:
            raise ConfigError(
                f"granule={granule}: expected a power of two from {PAGE} to {_SLOT_BYTES}"
            )
        floor = parse_bytes(min_free, "min_free")
        slots = max(4, parse_bytes(staging, "staging") // _SLOT_BYTES)
        map_size = (
            _LEAST_MAP + self._capacity // max(granule, 2 * PAGE) * _ROW_BYTES
            if index_bytes is None
            else max(2 * _FIXED_BYTES, parse_bytes(index_bytes, "index_bytes"))
        )
        self._mac_key = mac_key
        self._verify = verify
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._unused = threading.Condition(self._lock)
        self._users = 0
        self._counts = dict.fromkeys(TierStats.__slots__, 0)
        self._verified: set[int] = set()
        self._flight = SingleFlight()
        self._home = Home(
            Path(path).expanduser(), granule=granule, map_size=map_size, direct=direct
        )
        self._super = self._home.super
        self._granule = self._super.granule
        self._commit = GroupCommit(self._publish)
        segment_bytes = max(parse_bytes(segment, "segment"), self._capacity // _MAX_SEGMENTS)
        try:
            growth = Growth(self._home, max(1, segment_bytes // self._granule), floor)
            self._room = Room(
                self._home,
                capacity=self._capacity // self._granule,
                growth=growth,
                max_records=(map_size - _FIXED_BYTES) // _ROW_BYTES,
                policy=replacement,
                expires=self._EXPIRES,
                nudge=self._commit.nudge,
            )
            if shrink:
                self._room.shrink()
        except IndexFaultError as exc:
            self._home.close()
            raise ConfigError(f"cannot open a store in {path}: {exc}") from exc
        except KVLibError:
            self._home.close()
            raise
        self._io = RecordIO(self._home.files, Arena(slots, _SLOT_BYTES), self._granule, threads)
        self._reader = RecordReader(self._io, self._super, mac_key)

    # -- small things

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise StoreClosedError(
                "this SegmentStore was opened before a fork; open one in the child"
            )
        if self._closed:
            raise StoreClosedError("this SegmentStore is closed")

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Keep the store from being closed: a file's number may be another file's afterwards."""
        self._check_open()
        with self._lock:
            self._check_open()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._closed:
                    self._unused.notify_all()

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, n in more.items():
                self._counts[name] += n

    # -- reading

    def get_into(
        self,
        key: StoreKey,
        buf: Buffer,
        sections: Collection[int] | None = None,
        deadline: float | None = None,
    ) -> int | None:
        """See `Tier.get_into`. Aligned to pages, `buf` is read into without a copy."""
        out = memoryview(buf).cast("B")
        name = key.to_bytes()
        with self._use():
            if deadline is not None and time.monotonic() > deadline:
                self._count(timeouts=1, misses=1)
                return None
            try:
                with self._room.lease(name):
                    return self._get(name, key, out, sections, deadline)
            except TooLateError:
                self._count(timeouts=1, misses=1)
            except (IncompatibleDataError, IndexFaultError, OSError):
                self._count(errors=1, misses=1)
            return None

    def _get(
        self,
        name: bytes,
        key: StoreKey,
        out: memoryview,
        sections: Collection[int] | None,
        deadline: float | None,
    ) -> int | None:
        for _ in range(2):  # a record that was dropped and stored again meanwhile is looked up anew
            try:
                entry = self._room.lookup(name)
            except CorruptDataError:
                self._drop(name, None)
                return None
            if entry is None or self._room.is_over(name, entry):
                break
            try:
                got = self._read(key, entry, out, sections, deadline)
            except CorruptDataError:
                if self._room.is_current(name, entry):
                    self._drop(name, entry.generation)
                    return None
                continue
            except OSError as exc:
                if exc.errno not in (errno.EIO, errno.ENOENT):
                    raise
                self._drop(name, entry.generation)  # as long as it is there, no put replaces it
                return None
            if got is None:
                self._count(misses=1)
                return None
            if self._room.is_current(name, entry):
                self._room.read(name, entry, whole=sections is None or len(sections) > 0)
                self._count(hits=1, read_bytes=got)
                return entry.size
        if entry is None:
            self._room.missed(name)
        self._count(misses=1)
        return None

    def _read(
        self,
        key: StoreKey,
        entry: Entry,
        out: memoryview,
        sections: Collection[int] | None,
        deadline: float | None,
    ) -> int | None:
        known = self._verify == "first" and entry.generation in self._verified
        believe = known or self._verify == "never"
        if sections is not None:
            return self._reader.parts(key, entry, out, sections, deadline, believe=believe)
        if entry.size > out.nbytes:
            return None
        got = self._reader.whole(key, entry, out, deadline, believe=believe)
        if self._verify == "first" and len(self._verified) < _MAX_VERIFIED:
            self._verified.add(entry.generation)
        return got

    def _drop(self, name: bytes, generation: int | None) -> None:
        """Remove a damaged record, unless it was replaced meanwhile; a counted miss."""
        self._count(corrupt=1, misses=1)
        self._remove(name, generation)

    def _remove(self, name: bytes, generation: int | None) -> bool:
        if self._room.is_pending(name):
            self._commit.flush()
        try:
            return self._room.drop(name, generation)
        except IndexFaultError:
            self._count(errors=1)
            return False

    # -- writing

    def put(self, key: StoreKey, parts: Sequence[Buffer], terms: Terms | None = None) -> bool:
        """See `Tier.put`. Returns before the record is durable; it can be read at once."""
        name = key.to_bytes()
        wanted = terms or NO_TERMS
        with self._use():
            held, shared = self._flight.run(name, lambda: self._put(name, parts, wanted))
            if shared and held:
                self._count(duplicates=1)
            return held

    def _put(self, name: bytes, parts: Sequence[Buffer], terms: Terms) -> bool:
        try:
            if self._room.contains([name])[0]:
                self._count(duplicates=1)
                self._room.touch([name], terms.hint)
                return True
            if self._room.is_pending(name):  # it expired before it was published
                self._commit.flush()
            views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
            entry = self._reserve(name, sum(view.nbytes for view in views), terms)
        except IndexFaultError as exc:
            self._count(rejected=1, errors=0 if exc.full else 1)
            return False
        if entry is None:
            self._count(rejected=1)
            return False
        try:
            self._io.write(entry, pack_header(self._super, name, entry), views)
        except (OSError, TooLateError) as exc:
            self._room.abandon(entry)
            full = isinstance(exc, OSError) and exc.errno in NO_ROOM
            self._count(rejected=1, errors=0 if full else 1)
            return False
        except BaseException:
            self._room.abandon(entry)
            raise
        self._room.written(name, entry, terms.hint)
        self._commit.add(Written(name, entry))
        self._count(puts=1, written_bytes=entry.size)
        return True

    def _reserve(self, name: bytes, size: int, terms: Terms) -> Entry | None:
        """Take room for a container of `size` bytes; None if there is none."""
        granules = granules_of(size, self._granule)
        quota = self._capacity if terms.quota is None else terms.quota
        if granules > min(self._room.capacity, quota // self._granule):
            return None
        self._room.rescan(at_most_every=_RESCAN_S)
        if not self._room.admits(name, granules, terms):
            return None
        entry = self._room.reserve(size, granules, name=name, terms=terms)
        if entry is None:  # what is in the way may be unpublished, a dead writer's, or not known
            self._commit.flush()
            self._room.sweep()
            self._room.rescan()
            entry = self._room.reserve(size, granules, name=name, terms=terms, insist=True)
        return entry

    def _publish(self, group: list[Written]) -> None:
        if not self._room.publish(group):
            self._count(errors=1, puts=-len(group), rejected=len(group))

    # -- the rest of the interface

    def contains_many(self, keys: Sequence[StoreKey]) -> list[bool]:
        """See `Tier.contains_many`."""
        names = [block + storage for block, storage in keys]
        with self._use():
            try:
                return self._room.contains(names)
            except IndexFaultError:
                self._count(errors=1)
                return [False] * len(keys)

    def size(self, key: StoreKey) -> int | None:
        """See `Tier.size`."""
        with self._use():
            try:
                entry = self._room.lookup(key.to_bytes())
            except (IndexFaultError, CorruptDataError):
                self._count(errors=1)
                return None
            if entry is None or self._room.is_over(key.to_bytes(), entry):
                return None
            return entry.size

    def terms(self, key: StoreKey) -> Terms | None:
        """See `Tier.terms`."""
        with self._use():
            try:
                entry = self._room.lookup(key.to_bytes())
            except (IndexFaultError, CorruptDataError):
                return None
            if entry is None:
                return None
            return Terms(ttl=self._room.clock.left(entry.expires), tenant=entry.tenant)

    def touch(self, keys: Sequence[StoreKey], hint: Hint | None = None) -> None:
        """See `Tier.touch`."""
        with self._use():
            self._room.touch([key.to_bytes() for key in keys], hint)

    def trim(self, most_bytes: int, tenant: bytes | None = None) -> int:
        """See `Tier.trim`."""
        with self._use():
            try:
                self._commit.flush()  # what is not published yet counts, and cannot be dropped
                return self._room.trim(max(most_bytes, 0) // self._granule, tenant)
            except IndexFaultError:
                self._count(errors=1)
                return 0

    def note_limits(self, *, high: int = 0, low: int = 0, min_free: int = 0) -> None:
        """Note in the index what whoever opened the store keeps it to, in bytes; 0 for nothing."""
        with self._use():
            try:
                self._room.note_limits(Limits(self._capacity, high, low, min_free))
            except IndexFaultError:
                self._count(errors=1)

    def pin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.pin`."""
        with self._use():
            self._room.pin([key.to_bytes() for key in keys])

    def unpin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.unpin`."""
        self._room.unpin([key.to_bytes() for key in keys])

    def delete(self, key: StoreKey) -> bool:
        """See `Tier.delete`."""
        with self._use():
            return self._remove(key.to_bytes(), None)

    def keys(self) -> Iterator[StoreKey]:
        """See `Tier.keys`; ours and those of other processes."""
        with self._use():
            try:
                return iter([key_of(name) for name in self._room.names()])
            except IndexFaultError:
                self._count(errors=1)
                return iter(())

    def stats(self) -> TierStats:
        """See `Tier.stats`; `used_bytes` includes room taken by writes under way."""
        with self._use():
            try:
                records, used = self._room.held()
            except IndexFaultError:
                records, used = 0, 0
        with self._lock:
            counts = dict(self._counts)
        counts.update(
            records=records,
            used_bytes=used * self._granule,
            capacity_bytes=self._capacity,
            evicted=self._room.evicted,
            expired=self._room.expired,
        )
        return TierStats(**counts)

    def check(self, *, repair: bool = False) -> CheckReport:
        """See `Tier.check`."""
        with self._use():
            self._commit.flush()
            return check_records(self._room, self._reader, self._mac_key, repair=repair)

    def close(self) -> None:
        """See `Tier.close`."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._unused.wait_for(lambda: not self._users, _PATIENCE_S):
                return  # the device hangs: nothing can be closed under those that wait for it
        self._commit.close()
        self._room.publish([])
        self._room.note_time()
        self._io.close()
        self._home.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
