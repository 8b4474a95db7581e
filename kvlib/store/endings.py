# SPDX-License-Identifier: Apache-2.0
"""What becomes of a store that nobody closes.

Blocks that `KVStore.put_async` took are written all the same: when the store is garbage collected
its threads finish them, close the tiers and end; when the interpreter ends, that is waited for, for
`EXIT_S` seconds in all at most. A device that stalls for longer costs the blocks, not the exit.
"""

import atexit
import logging
import os
import weakref
from collections.abc import Callable
from time import monotonic

from kvlib.store.work import WorkPool

__all__ = ["EXIT_S", "Ending"]

EXIT_S = 10.0
"""Seconds that the interpreter's end waits for stores that were left open."""

_LOG = logging.getLogger(__name__)
_open: "set[Ending]" = set()


class Ending:
    """Ends a store, whoever asks for it: its owner, the garbage collector or the interpreter.

    Args:
        owner: whose end it is.
        pool: its threads.
        close: closes its tiers; called after the threads have ended, and maybe twice.
    """

    def __init__(self, owner: object, pool: WorkPool, close: Callable[[], None]) -> None:
        self._pid = os.getpid()
        self._pool = pool
        self._close = close
        self._left = weakref.finalize(owner, self._abandoned)
        self._left.atexit = False  # `_at_exit` has a limit
        _open.add(self)

    def close(self, timeout: float | None = None) -> None:
        """Finish what is under way and release everything, here and now.

        Args:
            timeout: seconds to wait at most; what is not written then may be lost.
        """
        if os.getpid() != self._pid:
            return
        self._left.detach()
        if self._pool.close(timeout):
            self._finish()
        else:
            _LOG.error("a store was not written within %.0f s and is given up", timeout)

    def _abandoned(self) -> None:
        if os.getpid() == self._pid:
            self._pool.retire(self._finish)

    def _finish(self) -> None:
        self._close()
        _open.discard(self)


@atexit.register
def _at_exit() -> None:
    until = monotonic() + EXIT_S
    for ending in list(_open):
        ending.close(max(until - monotonic(), 0.0))
