# SPDX-License-Identifier: Apache-2.0
"""A record's file in a `FileStore`: the container, and 32 bytes that say on what terms it is kept.

    offset                bytes
    0                     size   the container (docs/formats/container.md)
    size                  8      magic 89 4b 56 45 4e 44 0d 0a
    size + 8              8      when its time is over, in milliseconds since 1970; 0 for never
    size + 16             8      tenant: whose account it is on
    size + 24             8      xxh3-64 of the key's 64 bytes and the 24 bytes before

Integers are unsigned and little-endian. Terms are part of the file, not beside it: renaming it puts
both in place, on any file system, and copying it keeps both.
"""

import contextlib
import errno
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import xxhash

from kvlib.codecs.container import header_size
from kvlib.errors import CodecError, CorruptDataError
from kvlib.keys import StoreKey
from kvlib.store.fileio import CREATE, READ, read_at, write_all
from kvlib.store.terms import NO_TENANT
from kvlib.store.tier import verify_part, verify_record

__all__ = [
    "END_BYTES",
    "PAGE",
    "End",
    "pack_end",
    "peek_end",
    "physical_bytes",
    "problem_of",
    "read",
    "read_end",
    "write",
]

PAGE = 4096
END_BYTES = 32
_MAGIC = b"\x89KVEND\r\n"
_END = Struct("<8sQ8s")
_SUM = Struct("<Q")


class End(NamedTuple):
    """The end of a record's file: when its time is over (0: never), and its tenant."""

    expires: int = 0
    tenant: bytes = NO_TENANT


def physical_bytes(size: int) -> int:
    """What a container of `size` bytes takes on disk, in whole pages."""
    return -(-(size + END_BYTES) // PAGE) * PAGE


def pack_end(key: StoreKey, end: End) -> bytes:
    """The last 32 bytes of a record's file."""
    data = _END.pack(_MAGIC, end.expires, end.tenant)
    return data + _SUM.pack(xxhash.xxh3_64_intdigest(key.to_bytes() + data))


def read_end(fd: int, key: StoreKey, total: int, deadline: float | None = None) -> End:
    """The end of an open file of `total` bytes.

    Raises:
        CorruptDataError: it is damaged, or another record's.
        OSError, TooLateError: see `read_at`.
    """
    if total < END_BYTES:
        raise CorruptDataError(f"a record's file of {total} bytes: it is cut off")
    data = bytearray(END_BYTES)
    read_at(fd, memoryview(data), total - END_BYTES, deadline)
    magic, expires, tenant = _END.unpack_from(data)
    if magic != _MAGIC or pack_end(key, End(expires, tenant)) != data:
        raise CorruptDataError(f"a record's file ends {data[:8].hex(' ')}, or fails its checksum")
    return End(expires, tenant)


def peek_end(path: Path, key: StoreKey, total: int) -> End:
    """The end of a file; of one that is damaged or gone, as if nothing had been said."""
    try:
        fd = os.open(path, READ)
        try:
            return read_end(fd, key, total)
        finally:
            os.close(fd)
    except (OSError, CodecError):
        return End()  # whoever reads it finds that


def read(
    fd: int,
    key: StoreKey,
    out: memoryview,
    size: int,
    sections: Collection[int] | None,
    mac_key: bytes | None,
    deadline: float | None,
) -> int | None:
    """Read and verify a container, or its header and some sections; see `Tier.get_into`.

    Args:
        fd: the open file.
        key: of the record.
        out: where to.
        size: of the container.
        sections: None for all of it.
        mac_key: that it was authenticated under.
        deadline: see `Tier.get_into`.

    Returns:
        Bytes read, or None if `out` is too small.

    Raises:
        CorruptDataError, IncompatibleDataError: see `verify_record`.
        OSError, TooLateError: see `read_at`.
    """
    if sections is not None:
        return _read_parts(fd, key, out, size, sections, mac_key, deadline)
    if size > out.nbytes:
        return None
    read_at(fd, out[:size], 0, deadline)
    verify_record(key, out[:size], mac_key=mac_key)
    return size


def _read_parts(
    fd: int,
    key: StoreKey,
    out: memoryview,
    size: int,
    sections: Collection[int],
    mac_key: bytes | None,
    deadline: float | None,
) -> int | None:
    first = min(size, PAGE, out.nbytes)
    read_at(fd, out[:first], 0, deadline)
    front = header_size(out[:first])
    if front > out.nbytes:
        return None
    if front > first:
        if front > size:
            raise CorruptDataError(f"a header of {front} bytes in a file of {size}")
        read_at(fd, out[first:front], first, deadline)
    header = verify_part(key, out[:front], mac_key=mac_key)
    if header.total_bytes != size:
        raise CorruptDataError(f"a record of {header.total_bytes} bytes in a file of {size}")
    chosen = [header.sections[i] for i in sections]
    if any(info.offset + info.stored_bytes > out.nbytes for info in chosen):
        return None
    for info in chosen:
        view = out[info.offset : info.offset + info.stored_bytes]
        read_at(fd, view, info.offset, deadline)
        header.verify(info, view)
    return front + sum(info.stored_bytes for info in chosen)


def write(temporary: Path, path: Path, views: Sequence[memoryview], stamp: int) -> int:
    """Write a record's file and rename it to its name; 0, or the errno of what failed.

    Args:
        temporary: its name until it is whole.
        path: its name.
        views: its bytes, end included.
        stamp: its time in nanoseconds, which tells the order of use at the next open.
    """
    try:
        fd = os.open(temporary, CREATE, 0o600)
        try:
            write_all(fd, views)
        finally:
            os.close(fd)
        os.utime(temporary, ns=(stamp, stamp))
        path.parent.mkdir(mode=0o700, exist_ok=True)
        os.replace(temporary, path)
    except OSError as exc:
        with contextlib.suppress(OSError):  # if it stays, the next open sweeps it
            temporary.unlink(missing_ok=True)
        return exc.errno or errno.EIO
    return 0


def problem_of(path: Path, key: StoreKey, mac_key: bytes | None) -> str | None:
    """What is wrong with a record's file; None if nothing is."""
    try:
        fd = os.open(path, READ)
        try:
            total = os.fstat(fd).st_size
            read_end(fd, key, total)
            size = total - END_BYTES
            read(fd, key, memoryview(bytearray(size)), size, None, mac_key, None)
        finally:
            os.close(fd)
    except (CodecError, OSError) as exc:
        return str(exc)
    return None
