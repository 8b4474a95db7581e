# SPDX-License-Identifier: Apache-2.0
"""Many small reads in one system call, which go on while something else is computed.

A decoding step wants some twenty leaves of a layer that lie apart. One `preadv` after another pays
the device's delay for each; threads pay for waking up. Linux takes a whole batch in one call
(`io_submit`) and says later which have come (`io_getevents`). Python's standard library does not
have these calls, so they are made through `ctypes`; nothing needs to be installed.

Where there is no such call (another system, a sandbox that forbids it), a batch is read one after
another, and whoever wants it to go on meanwhile gives it to a thread.

A buffer must not be used for anything else before its batch is over: the device writes to it.
"""

import ctypes
import errno
import os
import platform
import sys
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Batch", "Lanes"]

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit, by machine."""

_MOST = 128  # reads of a batch that the system is given
_PREADV = 7

_REQUEST = np.dtype(  # struct iocb of little-endian machines
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<i4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("fd", "<u4"),
        ("pieces", "<u8"),
        ("count", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_fd", "<u4"),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("got", "<i8"), ("more", "<i8")])


class _Lane:
    """A queue of the system's for one batch at a time."""

    def __init__(self, calls: tuple[int, int, int, int]) -> None:
        self._setup, self._destroy, self._wait, self._submit = calls
        # Kept: a cache may be given up while the interpreter ends, when modules are gone already.
        self._libc = ctypes.CDLL(None, use_errno=True).syscall
        self._libc.restype = ctypes.c_long
        self._context = ctypes.c_ulong(0)
        self._requests = np.zeros(_MOST, _REQUEST)
        self._events = np.zeros(_MOST, _EVENT)
        size = _REQUEST.itemsize
        self._places = (self._requests.ctypes.data + size * np.arange(_MOST)).astype(np.uint64)
        self._call(self._setup, ctypes.c_uint(_MOST), ctypes.byref(self._context))

    def _call(self, number: int, *args: object) -> int:
        done = int(self._libc(ctypes.c_long(number), *args))
        if done < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return done

    def submit(self, fd: int, offsets: Sequence[int], firsts: NDArray[np.int64], table: int) -> int:
        """Begin reads; how many the system took.

        Args:
            fd: the file.
            offsets: where each begins in it, `_MOST` at most.
            firsts: int64 [len(offsets) + 1]: its first piece in the table of pieces, and the last
                one's end.
            table: address of the table of (address, bytes).
        """
        count = len(offsets)
        requests = self._requests[:count]
        requests["data"] = np.arange(count)
        requests["opcode"] = _PREADV
        requests["fd"] = fd
        requests["pieces"] = table + 16 * firsts[:-1]
        requests["count"] = np.diff(firsts)
        requests["offset"] = offsets
        return self._call(
            self._submit,
            self._context,
            ctypes.c_long(count),
            ctypes.c_void_p(self._places.ctypes.data),
        )

    def wait(self, least: int) -> NDArray[np.void]:
        """Events of reads that are over, `least` or more: a view that the next call overwrites."""
        while True:
            try:
                count = self._call(
                    self._wait,
                    self._context,
                    ctypes.c_long(least),
                    ctypes.c_long(_MOST),
                    ctypes.c_void_p(self._events.ctypes.data),
                    None,
                )
            except InterruptedError:  # a signal: its handler has run or will
                continue
            return self._events[:count]

    def close(self) -> None:
        """Give the queue up."""
        self._call(self._destroy, self._context)


class Lanes:
    """Queues that batches take and give back.

    Args:
        allowed: False reads one after another on every system.
    """

    def __init__(self, *, allowed: bool = True) -> None:
        known = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
        wide = sys.maxsize > 2**32 and sys.byteorder == "little"
        self._calls = known if allowed and wide else None
        self._idle: list[_Lane] = []
        self._lock = threading.Lock()
        self._closed = False
        lane = self.take()  # a sandbox says no here and not in the middle of a step
        if lane is not None:
            self.give(lane)

    @property
    def overlapping(self) -> bool:
        """Whether batches go on by themselves."""
        return self._calls is not None

    def take(self) -> _Lane | None:
        """A queue, or None where the system has no more of them."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        if self._calls is None:
            return None
        try:
            return _Lane(self._calls)
        except OSError as exc:
            if exc.errno != errno.EAGAIN:  # else the machine's number of queues is used up, for now
                self._calls = None
            return None

    def give(self, lane: _Lane) -> None:
        """Take a queue back that nothing is under way in."""
        with self._lock:
            if not self._closed:
                self._idle.append(lane)
                return
        lane.close()

    def forbid(self) -> None:
        """Read one after another from now on."""
        self._calls = None

    def close(self) -> None:
        """Give all queues up that are not in use; the others go when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.close()


class Batch:
    """Reads that were begun together.

    Args:
        lanes: where to take a queue from.
        fd: the file.
        offsets: where each read begins.
        counts: pieces of each.
        table: uint64 [sum of counts, 2]: address and bytes of each piece, page-aligned.
    """

    def __init__(
        self,
        lanes: Lanes,
        fd: int,
        offsets: Sequence[int],
        counts: Sequence[int],
        table: NDArray[np.uint64],
    ) -> None:
        self._lanes = lanes
        self.got = [0] * len(offsets)
        """Bytes of each read that have come, or minus an errno; 0 also for one not begun."""
        self._come: list[int] = []  # reads that are over, in that order
        self._under_way = 0
        self._lane = lanes.take() if offsets else None
        if self._lane is None:
            return
        firsts = np.concatenate([[0], np.cumsum(counts)])[: _MOST + 1]
        try:
            self._under_way = self._lane.submit(fd, offsets[:_MOST], firsts, table.ctypes.data)
        except OSError as exc:
            if exc.errno != errno.EAGAIN:  # the file system or a sandbox has other ways
                lanes.forbid()
        if not self._under_way:
            self._give_back()

    @property
    def over(self) -> bool:
        """Whether nothing is under way any more."""
        return not self._under_way

    def collect(self, *, wait: bool) -> bool:
        """Take in what has come.

        Args:
            wait: for all of it.

        Returns:
            Whether it is over.
        """
        self._gather(self._under_way if wait else 0)
        while wait and self._under_way:
            self._gather(self._under_way)
        return self.over

    def arrivals(self) -> Iterator[list[int]]:
        """Each read once: as they come, some at a time; then those that were not begun."""
        told = 0
        while self._under_way:
            self._gather(1)
            yield self._come[told:]
            told = len(self._come)
        yield [*self._come[told:], *sorted({*range(len(self.got))}.difference(self._come))]

    def _gather(self, least: int) -> None:
        """Take in what has come, `least` or more."""
        if self._lane is None or not self._under_way:
            return
        events = self._lane.wait(least)
        for index, got in zip(events["data"].tolist(), events["got"].tolist(), strict=True):
            self.got[index] = got
            self._come.append(index)
        self._under_way -= len(events)
        if not self._under_way:
            self._give_back()

    def _give_back(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            self._lanes.give(lane)
