# SPDX-License-Identifier: Apache-2.0
"""The leaves of a long context that memory holds: those used last; see `kvlib.store.leaves`."""

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kvlib.errors import CapacityError, ConfigError, StoreClosedError
from kvlib.store.leaves import Bytes, LeafFile

__all__ = ["LeafPool", "LeafStats"]

_READERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafStats:
    """Counters of a pool.

    Attributes:
        hits: leaves asked for that memory held.
        ahead: leaves asked for that a prefetch had begun to read.
        fetched: leaves read from the file, prefetched ones too.
        fetched_bytes: bytes of them.
        wait_seconds: time that `get` waited for the file.
        evicted: leaves that memory gave up.
    """

    hits: int = 0
    ahead: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    wait_seconds: float = 0.0
    evicted: int = 0


class LeafPool:
    """The leaves of a context that are in memory: those used last.

    Args:
        file: all leaves.
        num_slots: leaves that memory holds at most.

    `get` gives leaves to one thread, and they stay until the next call; `prefetch` begins to read
    others meanwhile. Not for several threads.

    Raises:
        ConfigError: no room for a leaf.
    """

    def __init__(self, file: LeafFile, num_slots: int) -> None:
        if num_slots < 1:
            raise ConfigError("there is no room for a single leaf: give TieredCache more memory")
        self.file = file
        size = file.shape.slot_bytes
        self._map = mmap.mmap(-1, num_slots * size)
        self._memory = np.frombuffer(self._map, np.uint8).reshape(num_slots, size)
        self._usable = num_slots
        self._tensor = torch.from_numpy(self._memory)
        self._free = list(range(num_slots))[::-1]
        self._held: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._pinned: set[tuple[int, int]] = set()
        self._coming: dict[tuple[int, int], tuple[int, Future[None]]] = {}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="kvlib-leaves")
        self._stats = LeafStats()
        self._closed = False

    @property
    def num_slots(self) -> int:
        """Leaves that memory holds at most."""
        return self._usable

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._usable * self.file.shape.slot_bytes

    def retire(self, count: int) -> None:
        """Give the memory of some slots back to the system, for good.

        Raises:
            CapacityError: none would be left.
        """
        if count >= self._usable:
            raise CapacityError(f"{count} of {self._usable} slots for leaves are to be given up")
        slots = self._room(count, set())
        for key in list(self._coming) if len(slots) < count else []:
            self._land(key[0], [key[1]])
        slots += self._room(count - len(slots), set())
        size = self.file.shape.slot_bytes
        for slot in slots:
            if hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_DONTNEED, slot * size, size)
        self._usable -= len(slots)

    def stats(self) -> LeafStats:
        """A snapshot of the counters."""
        return self._stats

    def _count(self, **more: float) -> None:
        self._stats = replace(
            self._stats, **{k: getattr(self._stats, k) + n for k, n in more.items()}
        )

    def _room(self, wanted: int, keep: "set[tuple[int, int]]") -> list[int]:
        """As many slots as there are, up to `wanted`: free ones, then those used longest ago."""
        slots = [self._free.pop() for _ in range(min(wanted, len(self._free)))]
        if len(slots) < wanted:
            for key in list(self._held):
                if key not in keep and key not in self._pinned:
                    slots.append(self._held.pop(key))
                    self._count(evicted=1)
                    if len(slots) == wanted:
                        break
        return slots

    def _start(self, layer: int, leaves: Sequence[int], slots: Sequence[int]) -> None:
        """Begin to read leaves into slots."""
        if self._closed:
            raise StoreClosedError("this cache is closed")
        step = -(-len(leaves) // _READERS)
        for at in range(0, len(leaves), max(step, 1)):
            some, places = leaves[at : at + step], slots[at : at + step]
            future = self._readers.submit(self._read, layer, some, places)
            for leaf, slot in zip(some, places, strict=True):
                self._coming[layer, leaf] = slot, future
        self._count(fetched=len(leaves), fetched_bytes=len(leaves) * self.file.shape.slot_bytes)

    def _read(self, layer: int, leaves: Sequence[int], slots: Sequence[int]) -> None:
        self.file.read(layer, leaves, [self._memory[slot] for slot in slots])

    def _land(self, layer: int, leaves: Sequence[int]) -> None:
        """Wait for leaves that are coming."""
        coming = [
            (leaf, *self._coming[layer, leaf]) for leaf in leaves if (layer, leaf) in self._coming
        ]
        failed: Exception | None = None
        for leaf, slot, future in coming:
            try:
                future.result()
            except Exception as exc:  # noqa: BLE001 (raised below, once all slots are accounted for)
                failed = exc
                self._free.append(slot)
            else:
                self._held[layer, leaf] = slot
            del self._coming[layer, leaf]
        if failed is not None:
            raise failed

    def _harvest(self) -> None:
        """Take in what has arrived without anybody asking; what failed will fail again for them."""
        for key, (slot, future) in list(self._coming.items()):
            if future.done():
                del self._coming[key]
                if future.cancelled() or future.exception() is not None:
                    self._free.append(slot)
                else:
                    self._held[key] = slot

    def prefetch(self, layer: int, leaves: Sequence[int]) -> None:
        """Begin to read those of these leaves that memory does not hold, as far as there is room.

        Args:
            layer: which.
            leaves: ascending. They take the place of those used longest ago, but not of each other.
        """
        self._harvest()
        missing = [
            leaf
            for leaf in leaves
            if (layer, leaf) not in self._held and (layer, leaf) not in self._coming
        ]
        slots = sorted(self._room(len(missing), {(layer, leaf) for leaf in leaves}))
        self._start(layer, missing[: len(slots)], slots)

    def get(self, layer: int, leaves: Sequence[int]) -> Tensor:
        """Leaves in memory.

        Args:
            layer: which.
            leaves: ascending, at most `num_slots` of them.

        Returns:
            int64 [n]: their slots in `slots`.

        Raises:
            CapacityError: there are more leaves than slots.
            CorruptDataError: one is damaged.
            StoreError: the device fails.
        """
        if len(leaves) > self.num_slots:
            raise CapacityError(f"{len(leaves)} leaves asked for, memory holds {self.num_slots}")
        wanted = {(layer, leaf) for leaf in leaves}
        ahead = [leaf for leaf in leaves if (layer, leaf) in self._coming]
        missing = [
            leaf
            for leaf in leaves
            if (layer, leaf) not in self._held and (layer, leaf) not in self._coming
        ]
        begun = perf_counter()
        if missing:
            slots = self._room(len(missing), wanted)
            if len(slots) < len(missing):  # prefetches of other layers took the rest
                for key in list(self._coming):
                    if key not in wanted:
                        self._land(key[0], [key[1]])
                slots += self._room(len(missing) - len(slots), wanted)
            self._start(layer, missing, sorted(slots))
        if missing or ahead:
            self._land(layer, leaves)
        self._count(
            hits=len(leaves) - len(missing) - len(ahead),
            ahead=len(ahead),
            wait_seconds=perf_counter() - begun if missing or ahead else 0.0,
        )
        for leaf in leaves:
            self._held.move_to_end((layer, leaf))
        return torch.tensor([self._held[layer, leaf] for leaf in leaves], dtype=torch.int64)

    def pin(self, layer: int, leaves: Sequence[int]) -> None:
        """Keep leaves that are in memory, or will be, from now on; at most half of the slots."""
        fresh = [(layer, leaf) for leaf in leaves if (layer, leaf) not in self._pinned]
        self._pinned.update(fresh[: max(self.num_slots // 2 - len(self._pinned), 0)])

    @property
    def slots(self) -> Tensor:
        """The memory: uint8 [num_slots, slot_bytes]."""
        return self._tensor

    def add(self, layer: int, slots: Bytes) -> None:
        """Append leaves to the file, and keep the last of them in memory while there is room.

        Args:
            layer: which.
            slots: uint8 [n, slot_bytes], page-aligned.

        Raises:
            CapacityError: the disk is full.
        """
        first = self.file.count(layer)
        self.file.append(layer, slots)
        for i, slot in enumerate(slots):
            if not self._free:
                break
            place = self._free.pop()
            self._memory[place] = slot
            self._held[layer, first + i] = place

    def close(self) -> None:
        """Give memory and file up."""
        if not self._closed:
            self._closed = True
            self._readers.shutdown(wait=True, cancel_futures=True)
            self.file.close()
