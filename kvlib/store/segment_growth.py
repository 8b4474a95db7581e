# SPDX-License-Identifier: Apache-2.0
"""When a segment store makes one more segment, and when it gives segments back."""

import errno
import time
from typing import TYPE_CHECKING

from kvlib.store.fileio import free_bytes
from kvlib.store.segment_home import Home

if TYPE_CHECKING:
    import lmdb

__all__ = ["NO_ROOM", "Growth"]

NO_ROOM = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_RETRY_S = 1.0
_FIRST_BYTES = 64 << 20  # of the first segment
_LEAST_SHARE = 16
"""On a disk that is almost full a segment is at least this part of all before it, so that what
others free bit by bit does not become a file each time: a few hundred segments are the most."""


class Growth:
    """The segments of an open store.

    Args:
        home: the open folder.
        segment_granules: of a new segment, at most.
        min_free: bytes of the file system that are left to others.
    """

    def __init__(self, home: Home, segment_granules: int, min_free: int) -> None:
        self._home = home
        self._ledger = home.index.ledger
        self._unit = home.super.granule
        self._segment_granules = segment_granules
        self._min_free = min_free
        self._full_until = 0.0  # the disk: no new segment is tried

    def _allowed(self) -> int | None:
        """Granules that the file system has to spare; None without a bound."""
        if not self._min_free:
            return None
        return max(free_bytes(self._home.root) - self._min_free, 0) // self._unit

    def grow(self, txn: "lmdb.Transaction[bytes]", granules: int, capacity: int) -> bool:
        """Make one more segment; whether there was room for it.

        Args:
            txn: a write transaction.
            granules: wanted.
            capacity: granules that all segments may have.
        """
        segments = self._ledger.segments(txn)
        held = sum(segments.values())
        # A store takes twice the room that it has each time: a small one stays small.
        least = max(held, _FIRST_BYTES // self._unit, granules)
        left = min(least, self._segment_granules, capacity - held)
        if segments and time.monotonic() < self._full_until:
            return False
        floor = min(max(granules, held // _LEAST_SHARE), left)
        if left > 0 and (allowed := self._allowed()) is not None:
            left = min(left, allowed)
            if left < floor:
                self._full_until = time.monotonic() + _RETRY_S
                return False
        while left > 0:
            try:
                self._home.files.create(self._ledger.state(txn).segments, left * self._unit)
            except OSError as exc:
                if exc.errno not in NO_ROOM:
                    return False
                if left <= floor:
                    self._full_until = time.monotonic() + _RETRY_S
                    return False
                left = max(left // 2, floor)  # the disk is smaller than the capacity
            else:
                self._ledger.add_segment(txn, left)
                return True
        return False

    def take_out(self, txn: "lmdb.Transaction[bytes]", capacity: int) -> list[int]:
        """Take segments out that a capacity has no use for; their files can go after the commit."""
        gone = []
        segments = self._ledger.segments(txn)
        for number, granules in sorted(segments.items(), reverse=True):
            if sum(segments.values()) - granules >= capacity and self._ledger.drop_segment(
                txn, number, granules
            ):
                gone.append(number)
                del segments[number]
        return gone
