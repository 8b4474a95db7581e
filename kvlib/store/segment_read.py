# SPDX-License-Identifier: Apache-2.0
"""Reading a record and believing it: header page always, container and sections by checksum.

A whole record is verified while it arrives: each section as soon as its last piece is there, so
that hashing hides behind the device.
"""

from collections.abc import Collection, Iterator
from typing import Literal

from kvlib.codecs.container import Header, header_size, verify_padding
from kvlib.errors import CorruptDataError
from kvlib.keys import StoreKey
from kvlib.store.segment_format import PAGE, Entry, Super, parse_header_page
from kvlib.store.segment_io import RecordIO
from kvlib.store.tier import verify_part

__all__ = ["VERIFY", "RecordReader", "Verify"]

Verify = Literal["always", "first", "never"]
VERIFY: tuple[Verify, ...] = ("always", "first", "never")

_FRONT = 16 << 10
"""Read first of a record of which only some sections are wanted: most headers fit."""
_GAP = 128 << 10
"""Sections nearer than this are read in one go: a second request costs more than the bytes."""


def _check_page(store: Super, name: bytes, entry: Entry, page: memoryview) -> None:
    """Compare a record's header page with the index's row.

    Raises:
        CorruptDataError: the page is damaged or another record's.
        IncompatibleDataError: it is of another version.
    """
    found, where = parse_header_page(page, store)
    if (found, where) != (name, entry._replace(stamp=0)):
        raise CorruptDataError(
            f"generation {where.generation} of {found.hex()[:16]} lies where generation "
            f"{entry.generation} of {name.hex()[:16]} should"
        )


class _Arriving:
    """Verifies a record from its front on, as far as it has arrived."""

    def __init__(self, key: StoreKey, out: memoryview, size: int, mac_key: bytes | None) -> None:
        self._key, self._out, self._size, self._mac_key = key, out, size, mac_key
        self._header: Header | None = None
        self._next = 0

    def landed(self, stop: int) -> None:
        """Everything up to this position of the record is there.

        Raises:
            CorruptDataError, IncompatibleDataError: see `verify_record`.
        """
        there = stop - PAGE
        if self._header is None:
            if there < min(16, self._size) or there < min(
                header_size(self._out[: min(16, there)]), self._size
            ):
                return
            header = verify_part(self._key, self._out[:there], mac_key=self._mac_key)
            _check_size(header, self._size)
            self._header = header
        out, verify, sections = self._out, self._header.verify, self._header.sections
        while self._next < len(sections):
            info = sections[self._next]
            end = info.offset + info.stored_bytes
            if end > there:
                return
            verify(info, out[info.offset : end])
            self._next += 1
        if there == self._size:
            verify_padding(self._header, self._out)


class RecordReader:
    """Reads records and verifies them.

    Args:
        io: moves the bytes.
        store: the store's SUPER.
        mac_key: see `verify_record`.
    """

    def __init__(self, io: RecordIO, store: Super, mac_key: bytes | None) -> None:
        self._io = io
        self._store = store
        self._mac_key = mac_key

    def whole(
        self,
        key: StoreKey,
        entry: Entry,
        out: memoryview,
        deadline: float | None = None,
        *,
        believe: bool = False,
    ) -> int:
        """Read a whole container to the front of `out`, which is large enough.

        Args:
            key: of the record.
            entry: where it lies.
            out: where to.
            deadline: `time.monotonic()` after which to stop.
            believe: check the header page alone.

        Returns:
            Bytes read.

        Raises:
            CorruptDataError, IncompatibleDataError: damaged, or not what the index says.
            TooLateError: the deadline passed.
            OSError: the device failed.
        """
        page = memoryview(bytearray(PAGE))
        data = out[: entry.size]
        arriving = None if believe else _Arriving(key, data, entry.size, self._mac_key)
        checked = False

        def landed(stop: int) -> None:
            nonlocal checked
            if not checked:
                _check_page(self._store, key.to_bytes(), entry, page)
                checked = True
            if arriving is not None:
                arriving.landed(stop)

        self._io.read(entry, 0, PAGE + entry.size, data, page, deadline, landed)
        return PAGE + entry.size

    def parts(
        self,
        key: StoreKey,
        entry: Entry,
        out: memoryview,
        sections: Collection[int],
        deadline: float | None = None,
        *,
        believe: bool = False,
    ) -> int | None:
        """Read the container's header and some sections to their offsets in `out`.

        Args, Raises: see `whole`.

        Returns:
            Bytes read, None if `out` is too small.
        """
        page = memoryview(bytearray(PAGE))
        there = min(entry.size, _FRONT, out.nbytes)
        self._io.read(entry, 0, PAGE + there, out, page, deadline)
        _check_page(self._store, key.to_bytes(), entry, page)
        front = header_size(out[:there])
        if front > min(out.nbytes, entry.size):
            if front > entry.size:
                raise CorruptDataError(f"a header of {front} bytes in a record of {entry.size}")
            return None
        if front > there:
            self._io.read(entry, PAGE + there, PAGE + front, out, page, deadline)
            there = front
        header = verify_part(key, out[:front], mac_key=self._mac_key)
        _check_size(header, entry.size)
        wanted = [header.sections[i] for i in sections]
        spans = [(info.offset, info.offset + info.stored_bytes) for info in wanted]
        if any(stop > out.nbytes for _, stop in spans):
            return None
        got = PAGE + there
        for start, stop in _joined(spans, there):
            self._io.read(entry, PAGE + start, PAGE + stop, out, page, deadline)
            got += stop - start
        if not believe:
            for info in wanted:
                header.verify(info, out[info.offset : info.offset + info.stored_bytes])
        return got


def _check_size(header: Header, size: int) -> None:
    if header.total_bytes != size:
        raise CorruptDataError(f"a container of {header.total_bytes} bytes in a record of {size}")


def _joined(spans: list[tuple[int, int]], there: int) -> Iterator[tuple[int, int]]:
    """Spans to read for `spans`, in order, where everything before `there` has been read."""
    run: tuple[int, int] | None = None
    for start, stop in sorted(spans):
        start = max(start, there)
        if start >= stop:
            continue
        if run is not None and start - run[1] <= _GAP:
            run = (run[0], max(run[1], stop))
            continue
        if run is not None:
            yield run
        run = (start, stop)
    if run is not None:
        yield run
