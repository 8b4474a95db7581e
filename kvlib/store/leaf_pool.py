# SPDX-License-Identifier: Apache-2.0
"""The leaves of a long context that memory holds; see `kvlib.store.leaves`."""

import mmap
import threading
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kvlib.errors import (
    CapacityError,
    ConfigError,
    CorruptDataError,
    StoreClosedError,
    StoreError,
)
from kvlib.store.leaves import RUN_LEAVES, Bytes, LeafFile, Reading

__all__ = ["LeafPool", "LeafStats"]

_READERS = 2
_FEW = 32
"""Leaves that are checked here sooner than threads are woken for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafStats:
    """Counters of a pool.

    Attributes:
        hits: leaves asked for that memory held.
        ahead: leaves asked for that a prefetch had begun to read.
        fetched: leaves read from the file, prefetched ones too.
        fetched_bytes: bytes of them.
        wait_seconds: time that `ask` and `rest` took for what was not in memory.
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

    `get` gives leaves, and they stay until the next call; or `ask` gives those that memory holds,
    and `rest` the others, once they have come. `prefetch` begins to read more meanwhile. Not for
    several threads.

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
        self._pinned: dict[tuple[int, int], None] = {}  # in the order of pinning
        self._coming: dict[tuple[int, int], tuple[int, Reading]] = {}
        self._awaited: set[tuple[int, int]] = set()
        self._late: tuple[int, list[int]] = 0, []
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="kvlib-leaves")
        self._stats = LeafStats()
        self._closed = False

    @property
    def num_slots(self) -> int:
        """Leaves that memory holds at most."""
        return self._usable

    @property
    def nbytes(self) -> int:
        """Bytes of memory, in whole pages."""
        used = self._usable * self.file.shape.slot_bytes
        return -(-used // mmap.PAGESIZE) * mmap.PAGESIZE

    def retire(self, count: int) -> None:
        """Give the memory of some slots back to the system.

        Leaves that memory keeps move out of its end, so that what goes is one run of whole pages.

        Raises:
            CapacityError: none would be left.
        """
        if count >= self._usable:
            raise CapacityError(f"{count} of {self._usable} slots for leaves are to be given up")
        last = self._usable - count
        self._awaited, self._late = set(), (0, [])
        self._settle({key for key, (slot, _) in self._coming.items() if slot < last})
        while len(self._pinned) > last // 2:  # as `pin` promises, and so that there is room
            self._pinned.popitem()
        free = self._room(count)
        if len(free) < count:  # the rest is on its way here
            self._settle(set())
            free += self._room(count - len(free))
        self._free.extend(free)
        below = [slot for slot in self._free if slot < last]
        for key, slot in self._held.items():
            if slot >= last:
                self._held[key] = to = below.pop()
                self._memory[to] = self._memory[slot]
        self._free = below
        self._usable = last
        first = self.nbytes
        if hasattr(self._map, "madvise") and first < len(self._map):
            self._map.madvise(mmap.MADV_DONTNEED, first, len(self._map) - first)

    def regrow(self, count: int) -> None:
        """Take retired slots back into use, as many as there are."""
        more = min(count, len(self._memory) - self._usable)
        self._free.extend(range(self._usable, self._usable + more))
        self._usable += more

    def stats(self) -> LeafStats:
        """A snapshot of the counters."""
        return self._stats

    def _count(self, **more: float) -> None:
        self._stats = replace(
            self._stats, **{k: getattr(self._stats, k) + n for k, n in more.items()}
        )

    def _room(self, wanted: int, keep: Set[tuple[int, int]] = frozenset()) -> list[int]:
        """As many slots as there are, up to `wanted`, for other leaves than those of `keep`.

        Free ones first, then those of leaves that their layer did not ask for last time, the ones
        that were given up longest ago. What layers did ask for is asked for again in the next step,
        layer after layer: the layer that was served last has the longest to wait, so its leaves go
        first. (LRU would drop exactly what comes next.)
        """
        slots = [self._free.pop() for _ in range(min(wanted, len(self._free)))]
        missing = wanted - len(slots)
        stay = [keep, self._awaited, self._pinned]
        victims = [*islice(self._victims(stay), missing)] if missing else []
        for key in victims:
            slots.append(self._held.pop(key))
            self._stale.pop(key, None)
        self._count(evicted=len(victims))
        return slots

    def _victims(self, stay: Sequence[Container[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
        for key in self._stale:
            if not any(key in x for x in stay):
                yield key
        for layer in reversed(self._current):
            for leaf in sorted(self._current[layer], reverse=True):
                key = layer, leaf
                if key in self._held and not any(key in x for x in stay):
                    yield key

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
        """Begin to read leaves into slots.

        Threads wait for and check what takes long, or what does not go on by itself.
        """
        if self._closed:
            raise StoreClosedError("this cache is closed")
        for at in range(0, len(leaves), RUN_LEAVES):
            some, places = leaves[at : at + RUN_LEAVES], slots[at : at + RUN_LEAVES]
            reading = self.file.begin(layer, some, self._memory, places)
            for leaf, slot in zip(some, places, strict=True):
                self._coming[layer, leaf] = slot, reading
            if len(leaves) > _FEW or not reading.overlaps:
                self._readers.submit(reading.finish)
        self._count(fetched=len(leaves), fetched_bytes=len(leaves) * self.file.shape.slot_bytes)

    def _land(self, layer: int, leaves: Sequence[int]) -> None:
        """Wait for leaves that are coming."""
        failed: Exception | None = None
        for leaf in leaves:
            if (layer, leaf) in self._coming:
                failed = self._take_in((layer, leaf)) or failed
        if failed is not None:
            raise failed

    def _take_in(self, key: tuple[int, int]) -> Exception | None:
        """Wait for a leaf that is coming; why it did not come."""
        slot, reading = self._coming[key]
        failed: Exception | None = None
        try:
            reading.finish()
        except (StoreError, CorruptDataError) as exc:
            failed = exc
            self._free.append(slot)
        else:
            self._hold(key, slot)
        del self._coming[key]
        return failed

    def _settle(self, but: Set[tuple[int, int]]) -> None:
        """Wait for what nobody has asked for; what failed will fail again for those who do."""
        for key in [key for key in self._coming if key not in but]:
            self._take_in(key)

    def _harvest(self) -> None:
        """Take in what has arrived without anybody asking; what failed will fail again for them."""
        arrived = {x for x in {reading for _, reading in self._coming.values()} if x.arrived()}
        for key in [key for key, (_, reading) in self._coming.items() if reading in arrived]:
            if key not in self._awaited:  # `rest` takes those, and says if they did not come
                self._take_in(key)

    def prefetch(self, layer: int, leaves: Sequence[int]) -> None:
        """Begin to read those of these leaves that memory does not hold, as far as there is room.

        Args:
            layer: which.
            leaves: ascending. They take the place of those used longest ago, but not of each other.
        """
        self._harvest()
        missing = [leaf for leaf in leaves if not self._has(layer, leaf)]
        slots = sorted(self._room(len(missing), {(layer, leaf) for leaf in leaves}))
        self._start(layer, missing[: len(slots)], slots)

    def get(self, layer: int, leaves: Sequence[int]) -> Tensor:
        """Leaves in memory; see `ask`, which this waits for.

        Returns:
            int64 [n]: their slots in `slots`.

        Raises:
            CapacityError: there are more leaves than slots.
            CorruptDataError: one is damaged.
            StoreError: the device fails.
        """
        self.ask(layer, leaves)
        self.rest()
        return self._places(layer, leaves)

    def ask(self, layer: int, leaves: Sequence[int]) -> Tensor:
        """Begin to read those of these leaves that memory does not hold; `rest` waits for them.

        Args:
            layer: which.
            leaves: ascending, at most `num_slots` of them. They stay until the next `ask`, whatever
                is prefetched meanwhile.

        Returns:
            int64 [n]: the slots of those that memory does hold.

        Raises:
            CapacityError: there are more leaves than slots.
        """
        if len(leaves) > self.num_slots:
            raise CapacityError(f"{len(leaves)} leaves asked for, memory holds {self.num_slots}")
        begun = perf_counter()
        self._awaited = {(layer, leaf) for leaf in leaves}
        here = [leaf for leaf in leaves if (layer, leaf) in self._held]
        missing = [leaf for leaf in leaves if not self._has(layer, leaf)]
        if missing:
            slots = self._room(len(missing))
            if len(slots) < len(missing):  # prefetches of other layers took the rest
                self._settle(self._awaited)
                slots += self._room(len(missing) - len(slots))
            self._start(layer, missing, sorted(slots))
        self._asked(layer, leaves)
        self._late = layer, [leaf for leaf in leaves if (layer, leaf) in self._coming]
        self._count(
            hits=len(here),
            ahead=len(leaves) - len(here) - len(missing),
            wait_seconds=perf_counter() - begun if missing else 0.0,
        )
        return self._places(layer, here)

    def rest(self) -> Tensor:
        """Wait for what was asked for and was not in memory.

        Returns:
            int64 [n]: its slots.

        Raises:
            CorruptDataError: a leaf is damaged.
            StoreError: the device fails.
        """
        layer, late = self._late
        begun = perf_counter()
        if late:
            self._land(layer, late)
            self._count(wait_seconds=perf_counter() - begun)
        return self._places(layer, late)

    def others(self, layer: int, leaves: Sequence[int]) -> Tensor:
        """Slots of a layer's leaves that memory holds and nobody asks for now: int64 [n].

        Args:
            layer: which.
            leaves: what it does ask for in this step, all of it.
        """
        mine = set(leaves)
        return self._places(
            layer, [leaf for of, leaf in self._stale if of == layer and leaf not in mine]
        )

    def _places(self, layer: int, leaves: Sequence[int]) -> Tensor:
        return torch.tensor([self._held[layer, leaf] for leaf in leaves], dtype=torch.int64)

    def _has(self, layer: int, leaf: int) -> bool:
        """Whether a leaf is in memory or on its way."""
        return (layer, leaf) in self._held or (layer, leaf) in self._coming

    def pin(self, layer: int, leaves: Sequence[int]) -> None:
        """Keep leaves that are in memory, or will be, from now on; at most half of the slots."""
        fresh = [(layer, leaf) for leaf in leaves if (layer, leaf) not in self._pinned]
        self._pinned |= dict.fromkeys(fresh[: max(self.num_slots // 2 - len(self._pinned), 0)])

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
        self._settle(set())  # the device still writes to memory that is about to go
        self.file.close()
