# SPDX-License-Identifier: Apache-2.0
"""What a segment store writes: SUPER, the header page of a record, the index's row of it.

docs/formats/segments.md is the specification. Everything here is under an xxh3-64 of its own; the
container behind a header page brings its own checksums, so no byte is hashed twice.
"""

import uuid as uuids
from struct import Struct
from typing import NamedTuple

import xxhash

from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError
from kvlib.keys import DIGEST_BYTES, BlockKey, StoreKey
from kvlib.store.terms import NO_TENANT, is_over

__all__ = [
    "EXPIRES",
    "HEADER_MAGIC",
    "MAX_EXTENTS",
    "NEVER",
    "PAGE",
    "VERSION",
    "Entry",
    "Extent",
    "Super",
    "default_granule",
    "granules_of",
    "key_of",
    "pack_entry",
    "pack_header",
    "padded",
    "parse_header_page",
    "peek_entry",
    "peek_expires",
    "unpack_entry",
]

PAGE = 4096
"""Unit of all I/O: O_DIRECT takes nothing finer on any device in use."""

VERSION = 2
HEADER_MAGIC = b"\x89KVSEG\r\n"
MAX_EXTENTS = 4
"""Runs of granules that one record may be split over."""

_HEADER = Struct("<8sHHI16s64sQQQ8s")
_EXTENT = Struct("<III")
_ROW = Struct("<QQQQ8s")
_U64 = Struct("<Q")
EXPIRES = slice(24, 32)
"""Where a row of the index says when its record is over; `NEVER` for those that last."""
NEVER = bytes(8)
_NAME = "kvlib segment store"


class Extent(NamedTuple):
    """A run of granules: number of the segment file, first granule in it, how many."""

    segment: int
    first: int
    length: int


class Entry(NamedTuple):
    """Where a record lies.

    `size` is the container's bytes. `generation` is never given twice in a store: a row that still
    has the generation it had before a read proves that nobody wrote over what was read. `stamp`
    orders records by use. `expires` is when its time is over, in milliseconds since 1970, 0 for
    never; `tenant` the 8 bytes of whose account it is on.
    """

    size: int
    generation: int
    stamp: int
    extents: tuple[Extent, ...]
    expires: int = 0
    tenant: bytes = NO_TENANT

    def is_over(self, now: int) -> bool:
        """Whether its time is over."""
        return is_over(self.expires, now)

    @property
    def granules(self) -> int:
        """Granules it occupies."""
        return sum(extent.length for extent in self.extents)


def padded(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def granules_of(size: int, granule: int) -> int:
    """Granules that a container of `size` bytes takes with its header page."""
    return -(-(PAGE + size) // granule)


def default_granule(capacity: int) -> int:
    """About a million granules: scanning their first pages takes as long for any capacity."""
    wanted = 1 << max(0, (capacity >> 20).bit_length() - 1)
    return min(max(PAGE, wanted), 1 << 16)


def key_of(name: bytes) -> StoreKey:
    """The StoreKey that 64 bytes stand for."""
    return StoreKey(BlockKey(name[:DIGEST_BYTES]), name[DIGEST_BYTES:])


class Super(NamedTuple):
    """The file that says what a folder is.

    `uuid` (16 bytes) is in every header page: files of another store are never taken for ours.
    `granule` is the unit of space in bytes.
    """

    uuid: bytes
    granule: int

    @classmethod
    def new(cls, granule: int) -> "Super":
        """Of a store that is being made."""
        return cls(uuids.uuid4().bytes, granule)

    def to_bytes(self) -> bytes:
        """The file's content: a few lines of text, the last one their checksum."""
        text = f"{_NAME} {VERSION}\nuuid {self.uuid.hex()}\ngranule {self.granule}\n".encode()
        return text + f"xxh3 {xxhash.xxh3_64_hexdigest(text)}\n".encode()

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Super":
        """Read the file's content.

        Raises:
            ConfigError: not a segment store's, or damaged.
            IncompatibleDataError: of another version.
        """
        lines = data.split(b"\n")
        name, _, version = lines[0].rpartition(b" ")
        if name != _NAME.encode():
            raise ConfigError(f"{where} is not a segment store's: it begins {data[:40]!r}")
        if version != str(VERSION).encode():
            raise IncompatibleDataError(
                f"{where} is of version {version[:20]!r}; this kvlib reads {VERSION}. Use another "
                "folder"
            )
        try:
            uuid = bytes.fromhex(lines[1].removeprefix(b"uuid ").decode())
            found = cls(uuid, int(lines[2].removeprefix(b"granule ")))
        except (IndexError, ValueError):
            found = None
        if found is None or found.to_bytes() != data:
            raise ConfigError(
                f"{where} does not match its checksum; the store cannot be used. Remove its folder"
            )
        return found


def pack_header(store: Super, name: bytes, entry: Entry) -> bytes:
    """The header page of a record.

    Args:
        store: the store's SUPER.
        name: the 64 bytes of its key.
        entry: where it lies; `stamp` is not part of the page.
    """
    page = _HEADER.pack(
        HEADER_MAGIC,
        VERSION,
        len(entry.extents),
        store.granule,
        store.uuid,
        name,
        entry.generation,
        entry.size,
        entry.expires,
        entry.tenant,
    ) + b"".join(_EXTENT.pack(*extent) for extent in entry.extents)
    page = page.ljust(PAGE - _U64.size, b"\0")
    return page + _U64.pack(xxhash.xxh3_64_intdigest(page))


def parse_header_page(page: memoryview, store: Super) -> tuple[bytes, Entry]:
    """Read a header page; returns the key's 64 bytes and where the record lies (stamp 0).

    Raises:
        CorruptDataError: not a header page of this store, or not intact.
        IncompatibleDataError: of another version.
    """
    head = bytes(page[:PAGE])
    if len(head) < PAGE or head[:8] != HEADER_MAGIC:
        raise CorruptDataError(f"no record's header page: it begins {head[:8].hex(' ')}")
    body = PAGE - _U64.size
    if _U64.pack(xxhash.xxh3_64_intdigest(head[:body])) != head[body:]:
        raise CorruptDataError("a record's header page does not match its checksum")
    fields = _HEADER.unpack_from(head)
    _, version, count, granule, uuid, name, generation, size, expires, tenant = fields
    if version != VERSION:
        raise IncompatibleDataError(f"a record's header page of version {version}, not {VERSION}")
    if (uuid, granule) != store:
        raise CorruptDataError(f"a record of the store {uuid.hex()}, not of {store.uuid.hex()}")
    end = _HEADER.size + count * _EXTENT.size
    if not 1 <= count <= MAX_EXTENTS:
        raise CorruptDataError(f"a record of {count} extents; expected 1 to {MAX_EXTENTS}")
    extents = tuple(Extent(*e) for e in _EXTENT.iter_unpack(head[_HEADER.size : end]))
    entry = Entry(size, generation, 0, extents, expires, tenant)
    if entry.granules != granules_of(size, granule) or not all(e.length for e in extents):
        raise CorruptDataError(f"{size} bytes in {entry.granules} granules of {granule}")
    return name, entry


def pack_entry(name: bytes, entry: Entry) -> bytes:
    """The index's row of a record, under a checksum that covers the key, too."""
    row = _ROW.pack(entry.size, entry.generation, entry.stamp, entry.expires, entry.tenant)
    row += b"".join(_EXTENT.pack(*extent) for extent in entry.extents)
    return row + _U64.pack(xxhash.xxh3_64_intdigest(name + row))


def peek_expires(data: bytes) -> int:
    """When a row of the index says that its record is over, unchecked; 0 if it is cut off."""
    return int(_U64.unpack(data[EXPIRES])[0]) if len(data) >= _ROW.size else 0


def peek_entry(data: bytes) -> Entry:
    """A row of the index, unchecked and without its extents; zeros if it is cut off."""
    if len(data) < _ROW.size:
        return Entry(0, 0, 0, ())
    size, generation, stamp, expires, tenant = _ROW.unpack_from(data)
    return Entry(size, generation, stamp, (), expires, tenant)


def unpack_entry(name: bytes, data: bytes) -> Entry:
    """Read a row of the index.

    Raises:
        CorruptDataError: it does not match its checksum.
    """
    row = data[: -_U64.size]
    if (
        len(data) < _ROW.size + _EXTENT.size + _U64.size
        or _U64.pack(xxhash.xxh3_64_intdigest(name + row)) != data[-_U64.size :]
    ):
        raise CorruptDataError(f"the index's row of {name.hex()[:16]} does not match its checksum")
    size, generation, stamp, expires, tenant = _ROW.unpack_from(row)
    extents = tuple(Extent(*e) for e in _EXTENT.iter_unpack(row[_ROW.size :]))
    return Entry(size, generation, stamp, extents, expires, tenant)
