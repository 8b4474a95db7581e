# SPDX-License-Identifier: Apache-2.0
"""Moving one record between callers' memory and its extents, in pieces of one arena slot.

A record on disk is its header page and the container, padded with zeros to whole pages. Positions
here count from the header page. Bytes go straight into a caller's buffer where O_DIRECT can reach
it (the address must fit) and through a slot of the arena otherwise, copied once. A record of
several pieces keeps the device busy: while one is copied or verified, others are on their way.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from kvlib.store.arena import Arena, address
from kvlib.store.blockio import DIRECT_ALIGNMENT, SegmentFiles
from kvlib.store.segment_format import PAGE, Entry, padded

__all__ = ["RecordIO"]


_LEAST_PIECE = 1 << 20
"""A transfer this large keeps the device busy; two of half the size cost a thread's turn more."""


_LEAST_SHARED = 1 << 14
"""A copy of fewer bytes takes less time than letting another thread run meanwhile."""


class _Piece(NamedTuple):
    """A run of one segment: its number, the offset in it, position in the record, bytes."""

    segment: int
    offset: int
    start: int
    nbytes: int


class RecordIO:
    """Reads and writes records.

    Args:
        files: the segments.
        arena: staging memory.
        granule: bytes of a granule.
        threads: transfers of one record at a time.
    """

    def __init__(self, files: SegmentFiles, arena: Arena, granule: int, threads: int) -> None:
        self._files = files
        self._arena = arena
        self._granule = granule
        # Two pools: a read waits for a slot in its thread, a write brings one along.
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="kvlib-read")
        self._writers = ThreadPoolExecutor(threads, thread_name_prefix="kvlib-write")

    def _pieces(self, entry: Entry, start: int, stop: int, most: int) -> Iterator[_Piece]:
        """What to transfer for positions [start, stop), multiples of the page; `most` at a time."""
        base = 0
        for segment, first, length in entry.extents:
            end = base + length * self._granule
            at = max(start, base)
            while at < min(stop, end):
                nbytes = min(min(stop, end) - at, most)
                yield _Piece(segment, first * self._granule + at - base, at, nbytes)
                at += nbytes
            base = end

    # -- reading

    def read(
        self,
        entry: Entry,
        start: int,
        stop: int,
        out: memoryview,
        header: memoryview,
        deadline: float | None,
        landed: Callable[[int], None] | None = None,
    ) -> None:
        """Read positions [start, stop).

        Args:
            entry: where the record lies.
            start: first position.
            stop: position after the last one.
            out: position `PAGE + i` lands at `out[i]`.
            header: position i below `PAGE` lands at `header[i]`; a page.
            deadline: `time.monotonic()` after which to stop.
            landed: called with the position up to which everything is there, now and then.

        Raises:
            CorruptDataError: a segment ends before.
            TooLateError: the deadline passed.
            OSError: the device failed.
        """
        first = start // PAGE * PAGE
        last = padded(stop)
        # In quarters, so that what came first is verified while the rest is on its way.
        quarters = min(4, max(1, (last - first) // _LEAST_PIECE))
        most = min(self._arena.slot_bytes, padded(-(-(last - first) // quarters)))
        pieces = list(self._pieces(entry, first, last, most))
        waiting: list[Future[None]] = []

        def fetch(piece: _Piece) -> None:
            self._read_piece(piece, start, stop, out, header, deadline)

        try:
            waiting += [self._readers.submit(fetch, piece) for piece in pieces[1:]]
            fetch(pieces[0])
            for i, piece in enumerate(pieces):
                if i:
                    waiting[i - 1].result()
                if landed is not None:
                    landed(min(piece.start + piece.nbytes, stop))
        finally:
            for future in waiting:  # nobody writes into the caller's buffer after we returned
                if not future.cancel():
                    future.exception()

    def _read_piece(
        self,
        piece: _Piece,
        start: int,
        stop: int,
        out: memoryview,
        header: memoryview,
        deadline: float | None,
    ) -> None:
        first = max(piece.start, start, PAGE)
        last = max(first, min(piece.start + piece.nbytes, stop))
        target = out[first - PAGE : last - PAGE]
        whole = target.nbytes // PAGE * PAGE  # what can land where it belongs
        if first % PAGE or (self._files.direct and address(target) % DIRECT_ALIGNMENT):
            whole = 0
        with self._arena.slot(deadline) as slot:
            if whole:
                lead = first - piece.start
                tail = piece.nbytes - lead - whole
                views = [slot[:lead], target[:whole], slot[lead : lead + tail]]
                rest, at = target[whole:], lead
            else:
                views = [slot[: piece.nbytes]]
                rest, at = target, first - piece.start
            wanted = [view for view in views if view.nbytes]
            self._files.read(piece.segment, wanted, piece.offset, deadline)
            if piece.start < PAGE:
                header[:] = slot[:PAGE]
            _copy(rest, slot[at : at + rest.nbytes])

    # -- writing

    def write(self, entry: Entry, header: bytes, views: Sequence[memoryview]) -> None:
        """Write a record: its header page, the pieces of its container, zeros up to a page.

        Raises:
            OSError: the device failed or is full.
            TooLateError: the arena stayed full.
        """
        source = _Source([memoryview(header), *views])
        stop = PAGE + padded(entry.size)
        waiting: list[Future[None]] = []
        try:
            for piece in self._pieces(entry, 0, stop, self._arena.slot_bytes):
                slot = self._arena.take()
                try:
                    source.fill(slot[: piece.nbytes])
                    if piece.start + piece.nbytes < stop:
                        # None: the interpreter is ending, and its pools take no more work.
                        with suppress(RuntimeError):
                            waiting.append(self._writers.submit(self._write_piece, piece, slot))
                            continue
                except BaseException:
                    self._arena.give_back(slot)
                    raise
                self._write_piece(piece, slot)
            for future in waiting:
                future.result()
        finally:
            for future in waiting:  # the room may be another record's after we returned
                future.exception()

    def _write_piece(self, piece: _Piece, slot: memoryview) -> None:
        try:
            self._files.write(piece.segment, [slot[: piece.nbytes]], piece.offset)
        finally:
            self._arena.give_back(slot)

    def close(self) -> None:
        """Wait for what is under way."""
        self._readers.shutdown()
        self._writers.shutdown()
        self._arena.close()


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy without the interpreter's lock, which a copy of memoryviews holds, if that is long."""
    if target.nbytes < _LEAST_SHARED:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


class _Source:
    """Bytes in pieces, taken from the front; zeros after their end."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = iter(views)
        self._rest = memoryview(b"")

    def fill(self, target: memoryview) -> None:
        """Fill `target` with the next bytes."""
        done = 0
        while done < target.nbytes:
            if not self._rest.nbytes:
                following = next(self._views, None)
                if following is None:
                    target[done:] = bytes(target.nbytes - done)
                    return
                self._rest = following
                continue
            count = min(self._rest.nbytes, target.nbytes - done)
            _copy(target[done : done + count], self._rest[:count])
            self._rest = self._rest[count:]
            done += count
