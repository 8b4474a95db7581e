# SPDX-License-Identifier: Apache-2.0
"""Page-aligned memory for I/O: a fixed number of equal slots, leased for the time of one transfer.

All staging of a segment store is in here, so it is bounded: who finds no free slot waits for one.
A lease is for one piece of a transfer, given back when that piece is done, and nobody waits for a
slot while it holds one; so there is always one that comes back.
"""

import ctypes
import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvlib.store.fileio import TooLateError

__all__ = ["Arena", "address"]

_PATIENCE_S = 30.0


def address(view: memoryview) -> int:
    """Where writable memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0


class Arena:
    """Slots of memory.

    Args:
        slots: how many.
        slot_bytes: bytes of each, a multiple of the page size.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.nbytes = slots * slot_bytes
        memory = memoryview(mmap.mmap(-1, self.nbytes))
        self._free = [memory[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slots)]
        self._returned = threading.Condition()

    @contextmanager
    def slot(self, deadline: float | None = None) -> Iterator[memoryview]:
        """Lease a slot.

        Args:
            deadline: `time.monotonic()` until which to wait for one.

        Raises:
            TooLateError: none came free by then, or within half a minute.
        """
        view = self.take(deadline)
        try:
            yield view
        finally:
            self.give_back(view)

    def take(self, deadline: float | None = None) -> memoryview:
        """A slot that must be given back; see `slot`."""
        limit = time.monotonic() + _PATIENCE_S
        limit = limit if deadline is None else min(limit, deadline)
        with self._returned:
            if not self._returned.wait_for(lambda: self._free, limit - time.monotonic()):
                raise TooLateError
            return self._free.pop()

    def give_back(self, view: memoryview) -> None:
        """End a lease."""
        with self._returned:
            self._free.append(view)
            self._returned.notify()

    def close(self) -> None:
        """Give the memory back; nothing is leased any more."""
        with self._returned:
            self._free.clear()
