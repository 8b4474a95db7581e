# SPDX-License-Identifier: Apache-2.0
"""The leaves of a long context that memory holds; see `kvlib.store.leaves`."""

import mmap
import threading
from collections import OrderedDict
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kvlib.errors import CapacityError, ConfigError, StoreClosedError
from kvlib.store.leaves import Bytes, LeafFile

__all__ = ["LeafPool", "LeafStats"]

_READERS = 2
_FEW = 32
"""Leaves that are read one after another sooner than threads are woken for them."""


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
    """The leaves of a context that are in memory: those that layers asked for last.

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
        self._held: dict[tuple[int, int], int] = {}
        self._stale: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._current: dict[int, set[int]] = {}  # what each layer asked for last, that layer last
        self._retired: list[int] = []
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
        """Give the memory of some slots back to the system.

        Raises:
            CapacityError: none would be left.
        """
        if count >= self._usable:
            raise CapacityError(f"{count} of {self._usable} slots for leaves are to be given up")
        slots = self._room(count, set())
        if len(slots) < count:
            self._settle(set())
        slots += self._room(count - len(slots), set())
        size = self.file.shape.slot_bytes
        for slot in slots:
            if hasattr(self._map, "madvise"):
                self._map.madvise(mmap.MADV_DONTNEED, slot * size, size)
        self._usable -= len(slots)
        self._retired.extend(slots)

    def regrow(self, count: int) -> None:
        """Take retired slots back into use, as many as there are."""
        back = [self._retired.pop() for _ in range(min(count, len(self._retired)))]
        self._free.extend(back)
        self._usable += len(back)

    def stats(self) -> LeafStats:
        """A snapshot of the counters."""
        return self._stats

    def _count(self, **more: float) -> None:
        self._stats = replace(
            self._stats, **{k: getattr(self._stats, k) + n for k, n in more.items()}
        )

    def _room(self, wanted: int, keep: "set[tuple[int, int]]") -> list[int]:
        """As many slots as there are, up to `wanted`.

        Free ones first, then those of leaves that their layer did not ask for last time, the ones
        that were given up longest ago. What layers did ask for is asked for again in the next step,
        layer after layer: the layer that was served last has the longest to wait, so its leaves go
        first. (LRU would drop exactly what comes next.)
        """
        slots = [self._free.pop() for _ in range(min(wanted, len(self._free)))]
        victims: list[tuple[int, int]] = []
        missing = wanted - len(slots)
        for key in self._stale:
            if len(victims) == missing:
                break
            if key not in keep and key not in self._pinned:
                victims.append(key)
        for layer in reversed(self._current) if len(victims) < missing else ():
            for leaf in sorted(self._current[layer], reverse=True):
                if len(victims) == missing:
                    break
                key = layer, leaf
                if key in self._held and key not in keep and key not in self._pinned:
                    victims.append(key)
        for key in victims:
            slots.append(self._held.pop(key))
            self._stale.pop(key, None)
        self._count(evicted=len(victims))
        return slots

    def _hold(self, key: tuple[int, int], slot: int) -> None:
        """A leaf is in memory; nobody has asked for it since."""
        self._held[key] = slot
        if key[1] not in self._current.get(key[0], ()):
            self._stale[key] = None

    def _asked(self, layer: int, leaves: Sequence[int]) -> None:
        """Remember what a layer asked for; what it no longer does is stale."""
        mine = set(leaves)
        for leaf in sorted(self._current.pop(layer, set()) - mine):
            if (layer, leaf) in self._held:
                self._stale[layer, leaf] = None
        self._current[layer] = mine
        for leaf in leaves:
            self._stale.pop((layer, leaf), None)

    def _start(self, layer: int, leaves: Sequence[int], slots: Sequence[int]) -> None:
        """Begin to read leaves into slots."""
        if self._closed:
            raise StoreClosedError("this cache is closed")
        step = max(-(-len(leaves) // _READERS), _FEW)
        for at in range(0, len(leaves), max(step, 1)):
            some, places = leaves[at : at + step], slots[at : at + step]
            future = self._readers.submit(self._read, layer, some, places)
            for leaf, slot in zip(some, places, strict=True):
                self._coming[layer, leaf] = slot, future
        self._count(fetched=len(leaves), fetched_bytes=len(leaves) * self.file.shape.slot_bytes)

    def _fetch(self, layer: int, leaves: Sequence[int], slots: Sequence[int]) -> None:
        """Read a few leaves here and now."""
        try:
            self._read(layer, leaves, slots)
        except BaseException:
            self._free.extend(slots)
            raise
        for leaf, slot in zip(leaves, slots, strict=True):
            self._hold((layer, leaf), slot)
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
                self._hold((layer, leaf), slot)
            del self._coming[layer, leaf]
        if failed is not None:
            raise failed

    def _settle(self, but: Set[tuple[int, int]]) -> None:
        """Wait for what nobody has asked for; what failed will fail again for those who do."""
        wait([future for key, (_, future) in self._coming.items() if key not in but])
        self._harvest(but)

    def _harvest(self, but: Set[tuple[int, int]] = frozenset()) -> None:
        """Take in what has arrived without anybody asking; what failed will fail again for them."""
        for key, (slot, future) in list(self._coming.items()):
            if future.done() and key not in but:
                del self._coming[key]
                if future.cancelled() or future.exception() is not None:
                    self._free.append(slot)
                else:
                    self._hold(key, slot)

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
                self._settle(wanted)
                slots += self._room(len(missing) - len(slots), wanted)
            slots.sort()
            if len(missing) > _FEW:
                self._start(layer, missing, slots)
            else:
                self._fetch(layer, missing, slots)
        if missing or ahead:
            self._land(layer, leaves)
        self._count(
            hits=len(leaves) - len(missing) - len(ahead),
            ahead=len(ahead),
            wait_seconds=perf_counter() - begun if missing or ahead else 0.0,
        )
        self._asked(layer, leaves)
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
        """Append leaves to the file, and keep them in memory while there is room.

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
            self._hold((layer, first + i), place)

    def close(self) -> None:
        """Give the file up, and end the threads."""
        if not self._closed:
            self._closed = True
            self._readers.shutdown(wait=False, cancel_futures=True)
            if threading.current_thread().name.startswith("kvlib-leaves"):
                # Garbage collection may run this in a reader, which cannot wait for itself.
                threading.Thread(target=self._finish).start()
            else:
                self._finish()

    def _finish(self) -> None:
        self._readers.shutdown(wait=True)
        self.file.close()
