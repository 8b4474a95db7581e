# SPDX-License-Identifier: Apache-2.0
"""Group commit: what several puts wrote becomes durable and visible together.

A flush of the device costs about as much as writing a mebibyte, so one is shared by everything
written within a few milliseconds or mebibytes, by however many threads.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from kvlib.store.segment_format import Entry

__all__ = ["GroupCommit", "Written"]

_GROUP_BYTES = 16 << 20
_GROUP_S = 0.010


class Written(NamedTuple):
    """A record whose bytes were written and that no index names yet."""

    name: bytes
    entry: Entry


class GroupCommit:
    """Collects what was written and publishes it in groups, from a thread of its own.

    Args:
        publish: makes a group durable and visible; raises nothing.
    """

    def __init__(self, publish: Callable[[list[Written]], None]) -> None:
        self._publish = publish
        self._group: list[Written] = []
        self._bytes = 0
        self._since = 0.0
        self._changed = threading.Condition()
        self._one = threading.Lock()  # groups are published in the order they were written
        self._thread: threading.Thread | None = None
        self._closed = False
        self._nudged = False

    def add(self, written: Written) -> None:
        """Publish this with the next group."""
        with self._changed:
            if not self._group:
                self._since = time.monotonic()
            self._group.append(written)
            self._bytes += written.entry.size
            self._start()
            if len(self._group) == 1 or self._bytes >= _GROUP_BYTES:
                self._changed.notify_all()

    def nudge(self) -> None:
        """Publish soon, also if no record was added: there is something else to be noted."""
        with self._changed:
            self._nudged = True
            self._start()
            self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            thread = threading.Thread(target=self._run, name="kvlib-commit", daemon=True)
            with suppress(RuntimeError):  # the interpreter is ending; `close` publishes
                thread.start()
                self._thread = thread

    def flush(self) -> None:
        """Publish everything that was added before this call."""
        with self._one:
            with self._changed:
                group, self._group, self._bytes = self._group, [], 0
                nudged, self._nudged = self._nudged, False
            if group or nudged:
                self._publish(group)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._group or self._nudged or self._closed)
                while self._group and self._bytes < _GROUP_BYTES and not self._closed:
                    left = self._since + _GROUP_S - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                if self._closed:
                    return
            self.flush()

    def close(self) -> None:
        """Publish what is left and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.flush()
