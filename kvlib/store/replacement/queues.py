# SPDX-License-Identifier: Apache-2.0
"""The two structures that policies are made of: a queue that counts bytes, and keys by rank."""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, KeysView
from typing import Any, Generic

from kvlib.store.replacement.base import Key

__all__ = ["MAX_GHOSTS", "Queue", "Ranked"]

MAX_GHOSTS = 1 << 20
"""Keys of records that are gone that one list remembers; bytes bound them too, where known."""


class Queue(Generic[Key]):
    """Keys in the order in which they were pushed, with their sizes.

    Attributes:
        nbytes: of all of them.
    """

    __slots__ = ("_sizes", "nbytes")

    def __init__(self) -> None:
        self._sizes: OrderedDict[Key, int] = OrderedDict()
        self.nbytes = 0

    def push(self, key: Key, size: int) -> None:
        """Add a key that is not in it, as the newest."""
        self._sizes[key] = size
        self.nbytes += size

    def push_oldest(self, key: Key, size: int) -> None:
        """Add a key that is not in it, as the oldest."""
        self.push(key, size)
        self._sizes.move_to_end(key, last=False)

    def pop(self, key: Key) -> int | None:
        """Take a key out; its size, or None if it is not there."""
        size = self._sizes.pop(key, None)
        self.nbytes -= size or 0
        return size

    def pop_oldest(self) -> tuple[Key, int]:
        """Take the oldest out: its key and size."""
        key, size = self._sizes.popitem(last=False)
        self.nbytes -= size
        return key, size

    def renew(self, key: Key) -> None:
        """Make a key the newest."""
        self._sizes.move_to_end(key)

    def size(self, key: Key) -> int:
        """Bytes of a key that is in it."""
        return self._sizes[key]

    def keys(self) -> KeysView[Key]:
        """The keys, oldest first."""
        return self._sizes.keys()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def snapshot(self) -> list[list[Any]]:
        """[key, size] pairs, oldest first."""
        return [[key, size] for key, size in self._sizes.items()]

    def restore(self, pairs: Iterable[Any]) -> None:
        """Fill an empty queue from `snapshot`."""
        for key, size in pairs:
            if isinstance(size, bool) or not isinstance(size, int) or size < 0 or key in self:
                raise ValueError(f"{key!r:.80} of {size!r:.80} bytes")
            self.push(key, size)


class Ranked(Generic[Key]):
    """Keys by a rank that changes; of equal ranks, the one set longest ago is first.

    A heap whose stale entries are skipped, and dropped once they are the majority.
    """

    __slots__ = ("_count", "_current", "_heap")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._current: dict[Key, int] = {}
        self._count = 0

    def set(self, key: Key, rank: float) -> None:
        """Give a key a rank, anew if it had one."""
        self._count += 1
        self._current[key] = self._count
        heapq.heappush(self._heap, (rank, self._count, key))
        if len(self._heap) > 2 * len(self._current) + 16:
            self._heap = [x for x in self._heap if self._current.get(x[2]) == x[1]]
            heapq.heapify(self._heap)

    def discard(self, key: Key) -> None:
        """Forget a key."""
        self._current.pop(key, None)

    def ascending(self) -> Iterator[tuple[float, Key]]:
        """(rank, key) pairs, least rank first; valid until the next change.

        A walk of the heap that takes it no apart: what comes next is among the children of what
        came before, so k pairs cost k log k.
        """
        heap = self._heap
        while heap and self._current.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
        ahead = [(heap[0], 0)] if heap else []
        while ahead:
            (rank, count, key), at = heapq.heappop(ahead)
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap):
                    heapq.heappush(ahead, (heap[child], child))
            if self._current.get(key) == count:
                yield rank, key

    def __len__(self) -> int:
        return len(self._current)
