# SPDX-License-Identifier: Apache-2.0
"""One medium that holds records: the interface of memory, files, segments and remote stores alike.

A record is one KVLC container, addressed by the `StoreKey` that its header echoes: the key of its
first block and its storage fingerprint. A tier knows nothing of what is inside beyond that header.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self, runtime_checkable

from kvlib.codecs.container import Buffer, Container, Header, parse_header
from kvlib.errors import CorruptDataError
from kvlib.keys import StoreKey
from kvlib.store.replacement.base import Hint
from kvlib.store.terms import Terms

__all__ = [
    "CheckReport",
    "Pins",
    "Tier",
    "TierStats",
    "check_key",
    "verify_part",
    "verify_record",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Counters of a tier since it was opened, and what it holds now.

    Attributes:
        records: held now.
        used_bytes: physical bytes held now (whole 4 KiB pages on disk).
        capacity_bytes: hard limit of `used_bytes`, None without one.
        hits: reads that returned verified bytes.
        misses: reads of a key that was not there.
        corrupt: records that failed a check and were dropped; each is also a miss.
        timeouts: reads given up at their deadline; each is also a miss.
        errors: reads and writes that the medium failed; never raised to the caller.
        puts: records written.
        duplicates: puts of a key that was there already (nothing is written).
        rejected: puts dropped for want of room (larger than the capacity, or the disk is full).
        evicted: records deleted to make room.
        expired: records whose time was over when they were asked for or had to make room; where
            a read was asked for, it is also a miss.
        read_bytes: bytes read.
        written_bytes: bytes written.
    """

    records: int = 0
    used_bytes: int = 0
    capacity_bytes: int | None = None
    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    timeouts: int = 0
    errors: int = 0
    puts: int = 0
    duplicates: int = 0
    rejected: int = 0
    evicted: int = 0
    expired: int = 0
    read_bytes: int = 0
    written_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `Tier.check` found.

    Attributes:
        records: records looked at.
        problems: one line each: corrupt records, counters that disagree with what is held, stray
            files.
        repaired: problems that `repair=True` removed.
    """

    records: int
    problems: tuple[str, ...] = field(default=())
    repaired: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems


class Pins:
    """Keys that are not evicted, each as long as somebody pins it. Used under a tier's lock."""

    def __init__(self) -> None:
        self._counts: Counter[StoreKey] = Counter()

    def pin(self, keys: Iterable[StoreKey]) -> None:
        """Pin once more."""
        self._counts.update(keys)

    def unpin(self, keys: Iterable[StoreKey]) -> None:
        """Undo one `pin`; keys that are not pinned are ignored."""
        self._counts.subtract(keys)
        self._counts = +self._counts

    @property
    def keys(self) -> Set[StoreKey]:
        """What is pinned now."""
        return self._counts.keys()


@runtime_checkable
class Tier(Protocol):
    """A medium that holds records. Thread-safe; unusable in a forked child (`StoreClosedError`).

    A miss is None or False, never an error; a record that fails a check is dropped, counted and a
    miss. The medium's own failures (full disk, I/O error, directory gone) are counted and count as
    misses or dropped puts.
    """

    name: ClassVar[str]
    persistent: ClassVar[bool]
    """Whether records outlive the process."""

    def get_into(
        self,
        key: StoreKey,
        buf: Buffer,
        sections: Collection[int] | None = None,
        deadline: float | None = None,
    ) -> int | None:
        """Read a record to the front of `buf`, verified; nothing returned aliases storage.

        Args:
            key: which record.
            buf: writable, at least `size(key)` bytes (with `sections`, too: sections land at their
                offsets, and the rest of it is undefined).
            sections: indices into the header's section table: read and verify the header and these
                only. An empty collection reads the header alone, for which a `buf` of the header's
                size is enough.
            deadline: `time.monotonic()` after which the caller no longer wants it.

        Returns:
            The record's total bytes, or None: absent, corrupt, too late, or `buf` is too small for
            it by now.
        """
        ...

    def put(self, key: StoreKey, parts: Sequence[Buffer], terms: Terms | None = None) -> bool:
        """Store a record given in pieces; the pieces are not kept.

        The first record of a key stays, on its terms: a second put of it writes nothing. Room is
        reserved before anything is written: a tenant beyond its quota drops records of its own;
        then those go whose time is over, and those that the replacement policy names.

        Args:
            key: its name.
            parts: the container.
            terms: for how long it is kept, and on whose account; None for ever, on nobody's.

        Returns:
            Whether the key is held now.
        """
        ...

    def contains_many(self, keys: Sequence[StoreKey]) -> list[bool]:
        """Whether each key seems to be there: a hint, which only a read makes certain."""
        ...

    def size(self, key: StoreKey) -> int | None:
        """Total bytes of a record, None if it is not there."""
        ...

    def terms(self, key: StoreKey) -> Terms | None:
        """The time left to a record, at most 0 if it is over, and its tenant; None if not there."""
        ...

    def touch(self, keys: Sequence[StoreKey], hint: Hint | None = None) -> None:
        """Mark records as used, the last one as used last; a hint is given to the policy."""
        ...

    def trim(self, most_bytes: int, tenant: bytes | None = None) -> int:
        """Drop records, those that would make room next first, until the tier holds no more.

        Args:
            most_bytes: that may stay.
            tenant: drop and count only its records.

        Returns:
            How many went. Pinned ones and those being written or read stay.
        """
        ...

    def pin(self, keys: Sequence[StoreKey]) -> None:
        """Do not evict these records to make room, whether they are there by now or not.

        They are still deleted when asked to, or found damaged. Holds for this object alone: another
        process may evict them.
        """
        ...

    def unpin(self, keys: Sequence[StoreKey]) -> None:
        """Undo one `pin` of each."""
        ...

    def delete(self, key: StoreKey) -> bool:
        """Drop a record; whether it was there."""
        ...

    def keys(self) -> Iterator[StoreKey]:
        """The keys held, from the one used longest ago to the one used last."""
        ...

    def stats(self) -> TierStats:
        """A snapshot of the counters."""
        ...

    def check(self, *, repair: bool = False) -> CheckReport:
        """Verify every record and the counters; `repair` drops what is wrong."""
        ...

    def close(self) -> None:
        """Release everything; further calls raise `StoreClosedError`. Closing twice is allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def verify_record(key: StoreKey, data: memoryview, *, mac_key: bytes | None = None) -> Header:
    """Check that `data` is one whole container stored under `key`, every byte accounted for.

    Raises:
        CorruptDataError: truncated, flipped, malformed, or under another key.
        IncompatibleDataError: another version or MAC key.
    """
    container = Container(data, mac_key=mac_key)
    check_key(key, container.header)
    container.verify()
    return container.header


def verify_part(key: StoreKey, front: memoryview, *, mac_key: bytes | None = None) -> Header:
    """Check a record's header alone: its checksum and that it is stored under `key`.

    Raises:
        CorruptDataError, IncompatibleDataError: see `verify_record`.
    """
    header = parse_header(front, mac_key=mac_key)
    check_key(key, header)
    return header


def check_key(key: StoreKey, header: Header) -> None:
    """Compare a header's echoed key with the one asked for.

    Raises:
        CorruptDataError: it is another record: the name it lies under is wrong.
    """
    if not header.keys or (header.keys[0], header.storage_fingerprint) != key:
        first = header.keys[0].hex()[:16] if header.keys else "no key"
        raise CorruptDataError(
            f"the record holds {first}.../{header.storage_fingerprint.hex()[:16]}..., asked for "
            f"{key.block.hex()[:16]}.../{key.storage.hex()[:16]}..."
        )
