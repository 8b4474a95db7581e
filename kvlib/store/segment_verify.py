# SPDX-License-Identifier: Apache-2.0
"""Looking at every record of a segment store, and at its accounts."""

from kvlib.errors import CodecError, CorruptDataError
from kvlib.store.fileio import TooLateError
from kvlib.store.segment_format import key_of
from kvlib.store.segment_index import IndexFaultError
from kvlib.store.segment_read import RecordReader
from kvlib.store.segment_room import Room
from kvlib.store.tier import CheckReport, verify_record

__all__ = ["check_records"]


def check_records(
    room: Room, reader: RecordReader, mac_key: bytes | None, *, repair: bool
) -> CheckReport:
    """Read and verify every record, and audit the accounts; see `Tier.check`."""
    problems = []
    repaired = 0
    try:
        names = room.names()
    except IndexFaultError as exc:
        return CheckReport(records=0, problems=(str(exc),))
    for name in names:
        problem = _problem(room, reader, name, mac_key)
        if problem:
            problems.append(f"{name.hex()[:16]}: {problem}")
            if repair:
                repaired += _drop(room, name)
    try:
        wrong = room.audit(repair=repair)
    except (IndexFaultError, CorruptDataError) as exc:
        return CheckReport(records=len(names), problems=(*problems, str(exc)))
    repaired += len(wrong) if repair else 0
    return CheckReport(records=len(names), problems=(*problems, *wrong), repaired=repaired)


def _drop(room: Room, name: bytes) -> bool:
    try:
        return room.drop(name)
    except IndexFaultError:
        return False  # it stays, and is named again


def _problem(room: Room, reader: RecordReader, name: bytes, mac_key: bytes | None) -> str | None:
    key = key_of(name)
    for _ in range(3):
        entry = None
        try:
            entry = room.lookup(name)
            if entry is None:
                return None  # dropped meanwhile
            data = memoryview(bytearray(entry.size))
            with room.lease(name):
                reader.whole(key, entry, data, believe=True)
            verify_record(key, data, mac_key=mac_key)
        except (CodecError, OSError, TooLateError, IndexFaultError) as exc:
            if entry is None or room.is_current(name, entry):
                return str(exc) or type(exc).__name__
        else:
            return None
    return None
