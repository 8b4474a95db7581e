# SPDX-License-Identifier: Apache-2.0
"""Which records may come into a tier at all: disks wear out, and most records are never read."""

import threading
from collections import OrderedDict
from typing import Generic

from kvlib.errors import ConfigError
from kvlib.store.replacement.base import Key

__all__ = ["SecondTouch"]


class SecondTouch(Generic[Key]):
    """Admits a record when it is offered for the second time. Thread-safe.

    Args:
        most: keys offered once that are remembered, those offered last.
        heads: the first records of a prompt, as many as this, are wanted at once: they are shared
            by more prompts than any others.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, most: int = 1 << 16, *, heads: int = 0) -> None:
        if most < 1 or heads < 0:
            raise ConfigError(f"most={most} is at least 1 and heads={heads} at least 0: both count")
        self._most = most
        self._heads = heads
        self._lock = threading.Lock()
        self._seen: OrderedDict[Key, None] = OrderedDict()

    def wanted(self, key: Key, position: int | None = None) -> bool:
        """Whether a record may come in: it was offered before, or is a head.

        Args:
            key: of the record.
            position: its place among its prompt's records; None if it is not known.
        """
        if position is not None and position < self._heads:
            return True
        with self._lock:
            if key in self._seen:
                del self._seen[key]
                return True
            self._seen[key] = None
            if len(self._seen) > self._most:
                self._seen.popitem(last=False)
            return False

    def __len__(self) -> int:
        return len(self._seen)
