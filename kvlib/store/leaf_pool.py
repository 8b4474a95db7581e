# SPDX-License-Identifier: Apache-2.0
"""The leaves of a long context that memory holds; see `kvlib.store.leaves`.

A step asks for hundreds of leaves of each layer, so what is known of them is in arrays, by leaf and
by slot, and looked up for all at once.
"""

import mmap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvlib.errors import (
    CapacityError,
    ConfigError,
    CorruptDataError,
    StoreClosedError,
    StoreError,
)
from kvlib.store.leaves import RUN_LEAVES, Bytes, Index, LeafFile, Reading

__all__ = ["LeafPool", "LeafStats"]

_READERS = 2
_BATCH_LEAVES = 128  # read in one system call
_NONE: Index = np.empty(0, np.int64)

# The rank of a slot says when its leaf makes room, the lowest first: see `LeafPool._room`.
_CURRENT = 1 << 61  # its layer asked for it in its last step; below this, it is stale
_NEVER = 1 << 62  # not held: free, or its leaf is on its way
_TURN = 1 << 24  # more than there are leaves in a layer


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
        self._layer_of, self._leaf_of = np.full((2, num_slots), -1)  # by slot, -1: it is free
        self._rank = np.full(num_slots, _NEVER)
        # By layer and leaf:
        self._slot_of = np.full((file.num_layers, 0), -1)  # held or on its way; -1: neither
        self._current = np.zeros((file.num_layers, 0), np.bool_)  # asked for in the last step
        self._pinned = np.zeros((file.num_layers, 0), np.bool_)
        self._pins: list[tuple[int, int]] = []  # in the order of pinning
        self._turns = [0] * file.num_layers  # when a layer asked last
        self._turn = self._stamp = 0
        self._coming: list[Reading] = []
        self._awaited: tuple[int, Index] = 0, _NONE
        self._late: tuple[int, Index] = 0, _NONE
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="kvlib-leaves")
        self._counts = asdict(LeafStats())
        self._closed = False
        self._know(max(file.count(layer) for layer in range(file.num_layers)))

    def _know(self, leaves: int) -> None:
        """Make room in the tables for so many leaves of a layer."""
        layers, room = self._slot_of.shape
        if leaves > room:
            more = leaves + leaves // 2 - room
            blank = np.zeros((layers, more), np.bool_)
            self._slot_of = np.hstack([self._slot_of, np.full((layers, more), -1)])
            self._current = np.hstack([self._current, blank])
            self._pinned = np.hstack([self._pinned, blank])

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
        self._awaited = self._late = 0, _NONE
        self._settle(lambda reading: bool((reading.places >= last).any()))
        while len(self._pins) > last // 2:  # as `pin` promises, and so that there is room
            self._pinned[self._pins.pop()] = False
        free = self._room(count)
        if len(free) < count:  # the rest is on its way here
            self._settle()
            free += self._room(count - len(free))
        self._free.extend(free)
        below = [slot for slot in self._free if slot < last]
        moving = np.flatnonzero(self._rank[last:] < _NEVER) + last
        to = np.array([below.pop() for _ in moving], np.int64)
        self._memory[to] = self._memory[moving]
        layers, leaves, ranks = self._layer_of[moving], self._leaf_of[moving], self._rank[moving]
        self._vacate(moving)
        self._place(layers, leaves, to)
        self._rank[to] = ranks
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
        return LeafStats(**self._counts)

    def _count(self, **more: float) -> None:
        for name, n in more.items():
            self._counts[name] += n

    def _place(self, layer: int | Index, leaves: Index, slots: Index) -> None:
        """Give slots to leaves that are on their way."""
        self._slot_of[layer, leaves] = slots
        self._layer_of[slots], self._leaf_of[slots] = layer, leaves

    def _vacate(self, slots: Index) -> None:
        """Forget what is in slots."""
        self._slot_of[self._layer_of[slots], self._leaf_of[slots]] = -1
        self._layer_of[slots] = self._leaf_of[slots] = -1
        self._rank[slots] = _NEVER

    def _room(self, wanted: int, layer: int = 0, keep: Index = _NONE) -> list[int]:
        """As many slots as there are, up to `wanted`, for other leaves than `keep` of a layer.

        Free ones first, then those of leaves that their layer did not ask for last time, the ones
        that were given up longest ago. What layers did ask for is asked for again in the next step,
        layer after layer: the layer that was served last has the longest to wait, so its leaves go
        first. (LRU would drop exactly what comes next.)
        """
        given = self._free[max(len(self._free) - wanted, 0) :][::-1]
        del self._free[len(self._free) - len(given) :]
        missing = wanted - len(given)
        if not missing:
            return given
        rank = self._rank.copy()
        for of, leaves in ((layer, keep), self._awaited):
            slots = self._slot_of[of, leaves]
            rank[slots[slots >= 0]] = _NEVER
        if self._pins:
            rank[self._pinned[self._layer_of, self._leaf_of]] = _NEVER
        victims = np.flatnonzero(rank < _NEVER)
        if len(victims) > missing:
            victims = victims[np.argpartition(rank[victims], missing - 1)[:missing]]
        self._vacate(victims)
        self._count(evicted=len(victims))
        return given + victims.tolist()

    def _hold(self, layer: int, leaves: Index, slots: Index) -> None:
        """Leaves are in memory now, or their layer asks for other ones: rank them."""
        wanted = self._current[layer, leaves]
        turn = _NEVER - 1 - self._turns[layer] * _TURN
        self._rank[slots] = np.where(wanted, turn - leaves, self._stamp + np.arange(len(slots)))
        self._stamp += len(slots)

    def _asked(self, layer: int, leaves: Index) -> None:
        """Remember what a layer asks for; what it no longer does is stale."""
        current = self._current[layer]
        before = np.flatnonzero(current)
        current[before] = False
        current[leaves] = True
        self._turn += 1
        self._turns[layer] = self._turn
        both = np.concatenate([before[~current[before]], leaves])
        slots = self._slot_of[layer, both]
        held = self._is_held(slots)
        self._hold(layer, both[held], slots[held])

    def _is_held(self, slots: Index) -> NDArray[np.bool_]:
        """Which of these slots of leaves, -1 for none, have what has been read."""
        held: NDArray[np.bool_] = (slots >= 0) & (self._rank[slots] < _NEVER)
        return held

    def _start(self, layer: int, leaves: Index, slots: Sequence[int]) -> None:
        """Begin to read leaves into slots.

        Threads read what does not go on by itself. (Checking takes the interpreter, so threads
        would not do it sooner.)
        """
        if self._closed:
            raise StoreClosedError("this cache is closed")
        places = np.array(slots, np.int64)
        self._place(layer, leaves, places)
        size = _BATCH_LEAVES if self.file.lanes.overlapping else RUN_LEAVES
        for at in range(0, len(leaves), size):
            some = slice(at, at + size)
            reading = self.file.begin(layer, leaves[some], self._memory, places[some])
            self._coming.append(reading)
            if not reading.overlaps:
                self._readers.submit(reading.finish)
        self._count(fetched=len(leaves), fetched_bytes=len(leaves) * self.file.shape.slot_bytes)

    def _take_in(self, reading: Reading) -> Exception | None:
        """Wait for what is coming; why it did not come."""
        self._coming.remove(reading)
        try:
            reading.finish()
        except (StoreError, CorruptDataError) as exc:
            self._vacate(reading.places)
            self._free.extend(reading.places.tolist())
            return exc
        self._hold(reading.layer, reading.leaves, reading.places)
        return None

    def _settle(self, which: Callable[[Reading], bool] = lambda _: True) -> None:
        """Wait for what nobody needs now; what failed will fail again for those who ask."""
        for reading in [reading for reading in self._coming if which(reading)]:
            self._take_in(reading)

    def _is_awaited(self, reading: Reading) -> bool:
        """Whether `rest` takes it, and says if it did not come."""
        layer, late = self._late
        if reading.layer != layer or not len(late):
            return False
        return bool(self._current[layer, reading.leaves].any())

    def prefetch(self, layer: int, leaves: Sequence[int] | Index) -> None:
        """Begin to read those of these leaves that memory does not hold, as far as there is room.

        Args:
            layer: which.
            leaves: ascending. They take the place of those used longest ago, but not of each other.
        """
        self._settle(lambda reading: not self._is_awaited(reading) and reading.arrived())
        wanted = np.asarray(leaves, np.int64)
        missing = wanted[self._slot_of[layer, wanted] < 0]
        slots = sorted(self._room(len(missing), layer, wanted))
        self._start(layer, missing[: len(slots)], slots)

    def get(self, layer: int, leaves: Sequence[int] | Index) -> Tensor:
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
        return torch.from_numpy(self._slot_of[layer, np.asarray(leaves, np.int64)])

    def ask(self, layer: int, leaves: Sequence[int] | Index) -> Tensor:
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
        wanted = np.asarray(leaves, np.int64)
        self._awaited, self._late = (layer, wanted), (layer, _NONE)
        missing = wanted[self._slot_of[layer, wanted] < 0]
        if len(missing):
            free = self._room(len(missing))
            if len(free) < len(missing):  # prefetches took the rest, of these leaves perhaps
                self._free += free
                self._settle()
                missing = wanted[self._slot_of[layer, wanted] < 0]
                free = self._room(len(missing))
            self._start(layer, missing, sorted(free))
        self._asked(layer, wanted)
        slots = self._slot_of[layer, wanted]
        here = self._is_held(slots)
        self._late = layer, wanted[~here]
        hits = int(here.sum())
        self._count(
            hits=hits,
            ahead=len(wanted) - hits - len(missing),
            wait_seconds=perf_counter() - begun if len(missing) else 0.0,
        )
        return torch.from_numpy(slots[here])

    def rest(self) -> Tensor:
        """Wait for what was asked for and was not in memory.

        Returns:
            int64 [n]: its slots.

        Raises:
            CorruptDataError: a leaf is damaged.
            StoreError: the device fails.
        """
        layer, late = self._late
        if len(late):
            begun = perf_counter()
            awaited = [reading for reading in self._coming if self._is_awaited(reading)]
            failed = [exc for exc in map(self._take_in, awaited) if exc is not None]
            self._count(wait_seconds=perf_counter() - begun)
            if failed:
                raise failed[0]
        return torch.from_numpy(self._slot_of[layer, late])

    def others(self, layer: int, leaves: Sequence[int] | Index) -> Tensor:
        """Slots of a layer's leaves that memory holds and nobody asks for now: int64 [n].

        Args:
            layer: which.
            leaves: what it does ask for in this step, all of it.
        """
        slots = self._slot_of[layer].copy()
        slots[leaves] = -1
        return torch.from_numpy(slots[(slots >= 0) & (self._rank[slots] < _CURRENT)])

    def pin(self, layer: int, leaves: Sequence[int] | Index) -> None:
        """Keep leaves that are in memory, or will be, from now on; at most half of the slots."""
        wanted = np.asarray(leaves, np.int64)
        self._know(int(wanted.max(initial=-1)) + 1)
        fresh = wanted[~self._pinned[layer, wanted]]
        fresh = fresh[: max(self.num_slots // 2 - len(self._pins), 0)]
        self._pinned[layer, fresh] = True
        self._pins += [(layer, leaf) for leaf in fresh.tolist()]

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
        self._know(first + len(slots))
        kept = min(len(slots), len(self._free))
        places = np.array([self._free.pop() for _ in range(kept)], np.int64)
        leaves = np.arange(first, first + kept)
        self._memory[places] = slots[:kept]
        self._place(layer, leaves, places)
        self._hold(layer, leaves, places)

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
        self._settle()  # the device still writes to memory that is about to go
        self.file.close()
