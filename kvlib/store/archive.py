# SPDX-License-Identifier: Apache-2.0
"""Records in a tar file: a store that can be carried to another tier, folder or machine.

An entry is one container, named by the 128 hexadecimal digits of its StoreKey and ``.kvlc``, in the
order of use. The archive is not compressed (records are) and in the GNU format, which any tar
reads. What is kept on terms says so in the names of its owner and group: ``kvlib-<tenant>`` (16
hexadecimal digits) and ``kvlib-<milliseconds since 1970>``, when its time is over.

What comes in may be hostile: headers are read in blocks of 512 bytes, only regular files
with such a name are looked at, and what is not a whole, verified record under that name is refused.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedIOBase
from typing import BinaryIO, NamedTuple

import numpy as np

from kvlib.codecs.container import MAX_HEADER_BYTES, parse_header
from kvlib.codecs.header import MAX_DECODED_BYTES
from kvlib.errors import CodecError, CorruptDataError
from kvlib.store.folder import RECORD_NAME, record_key
from kvlib.store.kept import Kept
from kvlib.store.terms import NO_TENANT, NO_TERMS, Terms, WallClock
from kvlib.store.tier import verify_record
from kvlib.store.upkeep import GIVEN_UP, Step, read_whole

__all__ = ["Exported", "Imported", "contents", "export_records", "import_records"]

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 4096
_MOST_REASONS = 100
_TENANT = re.compile(r"kvlib-([0-9a-f]{16})")
_EXPIRES = re.compile(r"kvlib-([0-9]{1,15})")


@dataclass(slots=True)
class Exported:
    """What `export_records` did.

    Attributes:
        records: written.
        nbytes: of them.
        problems: a line for each record that is not there because it is damaged.
    """

    records: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Imported:
    """What `import_records` did.

    Attributes:
        stored: records that are new in the store.
        duplicate: that were there already.
        refused: entries that are no records, or that found no room.
        nbytes: stored.
        evicted: older records that had to go.
        reasons: of the first refusals.
    """

    stored: int = 0
    duplicate: int = 0
    refused: int = 0
    nbytes: int = 0
    evicted: int = 0
    reasons: list[str] = field(default_factory=list)

    def refuse(self, why: str) -> None:
        """Count an entry that is not stored."""
        self.refused += 1
        if len(self.reasons) < _MOST_REASONS:
            self.reasons.append(why)


def export_records(store: Kept, out: BinaryIO, step: Step = lambda done: None) -> Exported:
    """Write every record, verified, the one used longest ago first, but none whose time is over.

    Raises:
        OSError: the archive cannot be written.
    """
    done = Exported()
    for key in list(store.keys()):
        terms = store.terms(key) or NO_TERMS
        if terms.ttl is not None and terms.ttl <= 0:
            continue
        try:
            data = read_whole(store, key)
        except GIVEN_UP as exc:
            done.problems.append(f"{key.block.hex()[:16]}: {exc}")
            continue
        if data is None:
            continue  # gone meanwhile
        info = tarfile.TarInfo(f"{key.to_bytes().hex()}.kvlc")
        info.size = data.nbytes
        info.mode = 0o600
        if terms.tenant != NO_TENANT:
            info.uname = f"kvlib-{terms.tenant.hex()}"
        if terms.ttl is not None:
            info.gname = f"kvlib-{WallClock().until(terms.ttl)}"
        out.write(info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict"))
        out.write(data)
        out.write(bytes(-data.nbytes % _BLOCK))
        done.records += 1
        done.nbytes += data.nbytes
        step(data.nbytes)
    out.write(bytes(2 * _BLOCK))
    return done


class _Entry(NamedTuple):
    """Where an entry's bytes begin and how many there are; or why it is not looked at."""

    name: str
    offset: int
    nbytes: int
    refused: str = ""
    terms: Terms = NO_TERMS


def _entries(file: BufferedIOBase) -> Iterator[_Entry]:
    """The entries of a tar file, in bounded memory.

    Raises:
        CorruptDataError: it is cut off, or no tar file.
    """
    end = file.seek(0, os.SEEK_END)
    at = 0
    long_name: str | None = None
    while True:
        file.seek(at)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise CorruptDataError(f"the archive is cut off after {at + len(block)} bytes")
        if not any(block):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "latin-1", "strict")
        except (tarfile.HeaderError, ValueError) as exc:
            raise CorruptDataError(f"no tar header at byte {at} of the archive: {exc}") from exc
        start = at + _BLOCK
        nbytes = 0 if info.islnk() or info.issym() or info.isdev() or info.isdir() else info.size
        if not 0 <= nbytes <= end - start:
            raise CorruptDataError(
                f"an entry of {nbytes} bytes at byte {at} of an archive of {end}: it is cut off"
            )
        at = start + -(-nbytes // _BLOCK) * _BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME and nbytes <= _LONGEST_NAME:
            long_name = file.read(nbytes).rstrip(b"\0").decode("latin-1")
            continue
        name, long_name = info.name if long_name is None else long_name, None
        refused = ""
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            refused = f"it is no regular file (type {info.type!r})"
        elif RECORD_NAME.fullmatch(name) is None:
            refused = "expected 128 hexadecimal digits and .kvlc"
        elif nbytes > MAX_DECODED_BYTES:
            refused = f"{nbytes} bytes are more than a record may have"
        yield _Entry(name, start, nbytes, refused, _terms(info))


def _terms(info: tarfile.TarInfo) -> Terms:
    """On what terms an entry was kept, as far as it says."""
    tenant, expires = _TENANT.fullmatch(info.uname), _EXPIRES.fullmatch(info.gname)
    return Terms(
        tenant=bytes.fromhex(tenant[1]) if tenant else NO_TENANT,
        ttl=WallClock().left(int(expires[1])) if expires else None,
    )


def contents(file: BufferedIOBase) -> tuple[int, int]:
    """Records that a tar file seems to hold, and their bytes; only headers are read.

    Raises:
        CorruptDataError: it is cut off, or no tar file.
    """
    count = total = 0
    for entry in _entries(file):
        if not entry.refused:
            count += 1
            total += entry.nbytes
    return count, total


def import_records(
    store: Kept,
    file: BufferedIOBase,
    *,
    mac_key: bytes | None = None,
    step: Step = lambda done: None,
) -> Imported:
    """Store the records of a tar file, each verified before.

    Args:
        store: where to.
        file: can be sought in.
        mac_key: that they must be authenticated under.
        step: see `Step`.

    Raises:
        CorruptDataError: it is cut off, or no tar file; what came before is stored.
    """
    done = Imported()
    before = store.stats().evicted
    for entry in _entries(file):
        if entry.refused:
            done.refuse(f"{_shown(entry.name)}: {entry.refused}")
            continue
        _import(store, file, entry, mac_key, done)
        step(entry.nbytes)
    done.evicted = store.stats().evicted - before
    return done


def _import(
    store: Kept, file: BufferedIOBase, entry: _Entry, mac_key: bytes | None, done: Imported
) -> None:
    key = record_key(entry.name.partition(".")[0])
    try:
        data = _payload(file, entry, mac_key)
        verify_record(key, data, mac_key=mac_key)
    except (CodecError, OSError) as exc:
        done.refuse(f"{_shown(entry.name)}: {exc}")
        return
    if entry.terms.ttl is not None and entry.terms.ttl <= 0:
        done.refuse(f"{_shown(entry.name)}: its time is over")
        return
    held = store.terms(key)
    if held is not None and held.ttl is not None and held.ttl <= 0:
        store.delete(key)  # nobody is served it any more
    if store.contains_many([key])[0]:
        done.duplicate += 1
    elif store.put(key, [data], entry.terms):
        done.stored += 1
        done.nbytes += entry.nbytes
    else:
        done.refuse(f"{_shown(entry.name)}: there is no room for its {entry.nbytes} bytes")


def _payload(file: BufferedIOBase, entry: _Entry, mac_key: bytes | None) -> memoryview:
    """An entry's bytes; the header is believed before memory is taken for the rest.

    Raises:
        CorruptDataError, IncompatibleDataError: it is no container, or one of another size.
    """
    front = min(entry.nbytes, MAX_HEADER_BYTES)
    header = parse_header(_read(file, entry.offset, front), mac_key=mac_key)
    if header.total_bytes != entry.nbytes:
        raise CorruptDataError(
            f"a container of {header.total_bytes} bytes in an entry of {entry.nbytes}"
        )
    return _read(file, entry.offset, entry.nbytes)


def _read(file: BufferedIOBase, offset: int, nbytes: int) -> memoryview:
    data: memoryview = np.empty(nbytes, np.uint8).data
    file.seek(offset)
    done = 0
    while done < nbytes:
        got = file.readinto(data[done:])
        if not got:
            raise CorruptDataError(f"the archive is cut off after {offset + done} bytes")
        done += got
    return data


def _shown(name: str) -> str:
    """A name for a message: of a record its first digits, of anything else what can be shown."""
    return name[:16] if RECORD_NAME.fullmatch(name) else ascii(name[:80])
