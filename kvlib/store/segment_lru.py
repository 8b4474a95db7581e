# SPDX-License-Identifier: Apache-2.0
"""What a segment store asks of a replacement policy, and the simplest one."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

__all__ = ["LRU", "Replacement"]


class Replacement(Protocol):
    """Which record goes first when room is needed. Called under a lock; does no I/O."""

    def on_insert(self, name: bytes, nbytes: int) -> None:
        """A record was stored (or found): its key's 64 bytes and its physical size."""
        ...

    def on_hit(self, name: bytes) -> None:
        """A record was used; names that are not known are ignored."""
        ...

    def on_remove(self, name: bytes) -> None:
        """A record is gone; names that are not known are ignored."""
        ...

    def victims(self) -> Iterator[bytes]:
        """All records, the one to drop first at the front; valid until the next call of another."""
        ...


class LRU:
    """The record used longest ago goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def on_insert(self, name: bytes, nbytes: int) -> None:
        """See `Replacement`."""
        self._order[name] = None
        self._order.move_to_end(name)

    def on_hit(self, name: bytes) -> None:
        """See `Replacement`."""
        if name in self._order:
            self._order.move_to_end(name)

    def on_remove(self, name: bytes) -> None:
        """See `Replacement`."""
        self._order.pop(name, None)

    def victims(self) -> Iterator[bytes]:
        """See `Replacement`."""
        return iter(self._order)
