# SPDX-License-Identifier: Apache-2.0
"""Which granules are free: best fit over free runs, kept in two databases of the index.

    starts   (segment, first) -> count       neighbours, to join runs that touch
    sizes    (count, segment, first) -> -    the smallest run that is large enough

The free runs lie in LMDB beside the rows of the records, not in a process: taking granules,
deleting the records that held them and writing the row that says who holds them now are one
transaction. So the count is exact for any number of processes at any moment, a killed one leaves
nothing half done, and no process owns a part of the disk that another one lacks.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import TYPE_CHECKING

from kvlib.errors import CorruptDataError
from kvlib.store.segment_format import MAX_EXTENTS, Extent

if TYPE_CHECKING:
    import lmdb

__all__ = ["FreeRuns"]

_START = Struct(">II")  # big-endian, so that LMDB's byte order is the order of the numbers
_COUNT = Struct(">I")
_SIZE = Struct(">III")


class FreeRuns:
    """The free runs of all segments.

    Args:
        starts: database of the runs by place.
        sizes: database of the runs by length.
    """

    def __init__(self, starts: "lmdb._Database", sizes: "lmdb._Database") -> None:
        self._starts = starts
        self._sizes = sizes

    def _add(self, txn: "lmdb.Transaction[bytes]", run: Extent) -> None:
        txn.put(_START.pack(run.segment, run.first), _COUNT.pack(run.length), db=self._starts)
        txn.put(_SIZE.pack(run.length, run.segment, run.first), b"", db=self._sizes)

    def take(self, txn: "lmdb.Transaction[bytes]", run: Extent) -> None:
        """Take one free run out, whole."""
        txn.delete(_START.pack(run.segment, run.first), db=self._starts)
        txn.delete(_SIZE.pack(run.length, run.segment, run.first), db=self._sizes)

    def runs(self, txn: "lmdb.Transaction[bytes]") -> Iterator[Extent]:
        """The free runs, by place."""
        with txn.cursor(db=self._starts) as cursor:
            for key, value in cursor:
                yield Extent(*_START.unpack(key), *_COUNT.unpack(value))

    def allocate(self, txn: "lmdb.Transaction[bytes]", count: int) -> tuple[Extent, ...] | None:
        """Take granules: the smallest run that holds them all, else up to four pieces.

        A record in pieces takes the largest runs whole and the rest by best fit.

        Args:
            txn: a write transaction.
            count: granules, at least 1.

        Returns:
            Where they lie, or None: no four runs hold them, and nothing was taken.
        """
        taken: list[Extent] = []
        left = count
        while left and len(taken) < MAX_EXTENTS:
            with txn.cursor(db=self._sizes) as cursor:
                if not cursor.set_range(_SIZE.pack(left, 0, 0)) and not cursor.last():
                    break
                size, segment, first = _SIZE.unpack(cursor.key())
            run = Extent(segment, first, size)
            self.take(txn, run)
            taken.append(run)
            left -= min(left, size)
        if left:
            for run in taken:
                self._add(txn, run)
            return None
        *whole, last = taken
        used = count - sum(run.length for run in whole)
        if last.length > used:
            self._add(txn, Extent(last.segment, last.first + used, last.length - used))
        return (*whole, Extent(last.segment, last.first, used))

    def release(self, txn: "lmdb.Transaction[bytes]", extents: Sequence[Extent]) -> None:
        """Give granules back, joined with the free runs they touch.

        Raises:
            CorruptDataError: some of them are free already; the transaction must be aborted.
        """
        for segment, first, length in extents:
            start, end = first, first + length
            with txn.cursor(db=self._starts) as cursor:
                after = self._at(cursor) if cursor.set_range(_START.pack(segment, first)) else None
                found = cursor.prev() if after else cursor.last()
                before = self._at(cursor) if found else None
            if before and before.segment == segment and before.first + before.length >= start:
                if before.first + before.length > start:
                    raise CorruptDataError(f"granule {start} of segment {segment} freed twice")
                self.take(txn, before)
                start = before.first
            if after and after.segment == segment and after.first <= end:
                if after.first < end:
                    raise CorruptDataError(
                        f"granule {after.first} of segment {segment} freed twice"
                    )
                self.take(txn, after)
                end = after.first + after.length
            self._add(txn, Extent(segment, start, end - start))

    @staticmethod
    def _at(cursor: "lmdb.Cursor[bytes]") -> Extent:
        return Extent(*_START.unpack(cursor.key()), *_COUNT.unpack(cursor.value()))

    def clear(self, txn: "lmdb.Transaction[bytes]") -> None:
        """Forget all runs."""
        txn.drop(self._starts, delete=False)
        txn.drop(self._sizes, delete=False)
