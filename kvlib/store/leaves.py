# SPDX-License-Identifier: Apache-2.0
"""Leaves of a long context, in a file.

A **leaf** is `LEAF_TOKENS` consecutive tokens of one layer: the keys of all KV heads, then the
values, in one run of bytes, padded to whole pages. It is what a decoding step asks for, so it is
the unit of reading, of checksums and of what memory holds (`kvlib.store.leaf_pool`).

The file is scratch: it has no name, so nothing of it outlives the process. Leaves of a layer that
were written one after another lie one after another (in runs of `RUN_LEAVES`), so that reading
many is reading long runs. What is read is checked against checksums that stay in memory.
"""

import errno
import mmap
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from kvlib.errors import CapacityError, ConfigError, CorruptDataError, StoreError
from kvlib.spec import KVSpec
from kvlib.store import blockio
from kvlib.store.leaf_io import Batch, Lanes

__all__ = ["LEAF_TOKENS", "RUN_LEAVES", "Index", "LeafFile", "LeafShape", "Reading", "aligned"]

LEAF_TOKENS = 16
RUN_LEAVES = 64
_PAGE = 4096

Bytes = NDArray[np.uint8]
Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LeafShape:
    """What a leaf of a layer is.

    Attributes:
        heads: KV heads.
        k_dim: channels of a key.
        v_dim: channels of a value.
        dtype: of both.
    """

    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype

    @property
    def keys(self) -> int:
        """Numbers of the keys."""
        return self.heads * LEAF_TOKENS * self.k_dim

    @property
    def numbers(self) -> int:
        """Numbers of keys and values."""
        return self.keys + self.heads * LEAF_TOKENS * self.v_dim

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.numbers * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes in the file and in memory: whole pages."""
        return -(-self.nbytes // _PAGE) * _PAGE

    @classmethod
    def of(cls, spec: KVSpec) -> "LeafShape":
        """The leaf of a model whose layers are alike.

        Raises:
            ConfigError: they are not.
        """
        first = spec.layers[0]
        alike = {(x.num_kv_heads, x.k_head_dim, x.v_head_dim) for x in spec.layers}
        if len(alike) > 1:
            raise ConfigError(
                f"layers differ in their heads: {sorted(alike)}; leaves need equal ones"
            )
        dtype = getattr(torch, spec.dtype)
        return cls(first.num_kv_heads, first.k_head_dim, first.v_head_dim, dtype)

    def pack(self, keys: Tensor, values: Tensor, out: Bytes) -> None:
        """Write whole leaves: keys and values [heads, n * LEAF_TOKENS, D] into [n, slot_bytes]."""
        n = len(out)
        flat = torch.from_numpy(out)[:, : self.nbytes].view(self.dtype)
        for first, last, x, dim in (
            (0, self.keys, keys, self.k_dim),
            (self.keys, self.numbers, values, self.v_dim),
        ):
            target = flat[:, first:last].unflatten(1, (self.heads, LEAF_TOKENS, dim))
            target.copy_(x.view(self.heads, n, LEAF_TOKENS, dim).transpose(0, 1))

    def unpack(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Slots uint8 [n, slot_bytes] as keys and values [n, heads, LEAF_TOKENS, D]: views."""
        flat = slots[:, : self.nbytes].view(self.dtype)
        keys = flat[:, : self.keys].unflatten(1, (self.heads, LEAF_TOKENS, self.k_dim))
        values = flat[:, self.keys :].unflatten(1, (self.heads, LEAF_TOKENS, self.v_dim))
        return keys, values


def aligned(num_bytes: int) -> Bytes:
    """Page-aligned memory."""
    return np.frombuffer(mmap.mmap(-1, max(num_bytes, _PAGE)), np.uint8)[:num_bytes]


class LeafFile:
    """The leaves of a context on disk.

    Args:
        shape: of each leaf.
        num_layers: layers.
        folder: where the file lies; None for the system's folder of temporary files.
        direct: use O_DIRECT where the file system takes it.
        overlap: let reads go on by themselves where the system can; see `kvlib.store.leaf_io`.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(
        self,
        shape: LeafShape,
        num_layers: int,
        folder: str | os.PathLike[str] | None = None,
        *,
        direct: bool = True,
        overlap: bool = True,
    ) -> None:
        self.shape = shape
        self._slot_bytes = shape.slot_bytes
        self._runs: list[list[int]] = [[] for _ in range(num_layers)]  # offsets in the file
        self._counts = [0] * num_layers
        self._digests: list[list[int]] = [[] for _ in range(num_layers)]
        self._size = 0
        self._lock = threading.Lock()
        self._seeking = None if blockio.supports() else threading.Lock()
        self.fd, self.direct = _open(folder, direct=direct)
        self.lanes = Lanes(allowed=overlap)

    def __len__(self) -> int:
        """Leaves of the first layer."""
        return self._counts[0]

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self._counts)

    def count(self, layer: int) -> int:
        """Leaves of a layer."""
        return self._counts[layer]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._size

    def _offset(self, layer: int, leaf: int) -> int:
        return self._runs[layer][leaf // RUN_LEAVES] + leaf % RUN_LEAVES * self._slot_bytes

    def append(self, layer: int, slots: Bytes) -> None:
        """Write leaves behind the last one of a layer.

        Args:
            layer: which.
            slots: uint8 [n, slot_bytes], page-aligned.

        Raises:
            CapacityError: the disk is full or fails; nothing was appended.
        """
        size = self.shape.slot_bytes
        done = 0
        with self._lock:
            first = self._counts[layer]
            runs = list(self._runs[layer])
            end = self._size
            while len(runs) * RUN_LEAVES < first + len(slots):
                runs.append(end)
                end += RUN_LEAVES * size
        while done < len(slots):
            leaf = first + done
            count = min(len(slots) - done, RUN_LEAVES - leaf % RUN_LEAVES)
            offset = runs[leaf // RUN_LEAVES] + leaf % RUN_LEAVES * size
            try:
                self._move([slots[done : done + count].data.cast("B")], offset, write=True)
            except OSError as exc:
                raise CapacityError(f"cannot write leaves of layer {layer}: {exc}") from exc
            done += count
        digests = [xxhash.xxh3_64_intdigest(slot.data) for slot in slots]
        with self._lock:
            self._runs[layer] = runs
            self._size = max(self._size, end)
            self._counts[layer] = first + len(slots)
            self._digests[layer].extend(digests)

    def _move(self, views: list[memoryview], offset: int, *, write: bool) -> int:
        """Read or write all of `views` at `offset`; the bytes that went, less at the file's end.

        Raises:
            OSError: the device fails or is full.
        """
        done = 0
        while views:
            try:
                if self._seeking is None:
                    move = blockio.pwrite if write else blockio.pread
                    count = move(self.fd, views, offset + done)
                else:
                    with self._seeking:
                        count = _seek_and_move(self.fd, views[0], offset + done, write=write)
            except OSError as exc:
                if exc.errno != errno.EINVAL or not self.direct:
                    raise
                self._go_indirect()
                continue
            if not count:
                break
            done += count
            views = _rest(views, count)
        return done

    def _go_indirect(self) -> None:
        """O_DIRECT was taken when the file was opened and is refused now: use the page cache."""
        import fcntl  # where there is O_DIRECT, there is this

        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False

    def begin(
        self,
        layer: int,
        leaves: Sequence[int] | Index,
        memory: Bytes,
        places: Sequence[int] | Index,
    ) -> "Reading":
        """Begin to read leaves; those that lie one after another in one go.

        Args:
            layer: which.
            leaves: ascending.
            memory: uint8 [slots, slot_bytes], contiguous, page-aligned.
            places: slot of each leaf. Nothing else may use them before the reading is over.
        """
        return Reading(self, layer, leaves, memory, places)

    def read(self, layer: int, leaves: Sequence[int], memory: Bytes, places: Sequence[int]) -> None:
        """Read leaves, checked; see `begin` and `Reading.finish`."""
        self.begin(layer, leaves, memory, places).finish()

    def runs(self, layer: int, leaves: Sequence[int] | Index) -> list[tuple[int, int]]:
        """Leaves that lie one after another: (offset, how many) of each run."""
        size, starts = self._slot_bytes, self._runs[layer]
        leaves = np.asarray(leaves).tolist()
        found: list[tuple[int, int]] = []
        begin, count, follows = 0, 0, -1
        for leaf in leaves:
            if leaf == follows and leaf % RUN_LEAVES:
                count += 1
            else:
                if count:
                    found.append((begin, count))
                begin, count = starts[leaf // RUN_LEAVES] + leaf % RUN_LEAVES * size, 1
            follows = leaf + 1
        if count:
            found.append((begin, count))
        return found

    def fill(self, views: list[memoryview], offset: int) -> None:
        """Read what lies at `offset`, unchecked.

        Raises:
            CorruptDataError: the file is too short.
            StoreError: the device fails.
        """
        try:
            done = self._move(views, offset, write=False)
        except OSError as exc:
            raise StoreError(f"cannot read leaves: {exc}") from exc
        if done < sum(view.nbytes for view in views):
            raise CorruptDataError(f"the file of leaves ends at byte {offset + done}")

    def check(self, layer: int, leaves: Sequence[int], views: Sequence[memoryview]) -> None:
        """Compare leaves with what was written.

        Raises:
            CorruptDataError: one is damaged.
        """
        known, digest = self._digests[layer], xxhash.xxh3_64_intdigest
        for leaf, view in zip(leaves, views, strict=True):
            if digest(view) != known[leaf]:
                raise CorruptDataError(f"leaf {leaf} of layer {layer} is damaged")

    def close(self) -> None:
        """Give the file up. Nothing may be under way."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.lanes.close()


class Reading:
    """Leaves on their way into memory; see `LeafFile.begin`. For any thread.

    Attributes:
        layer: which.
        leaves: int64 [n], ascending.
        places: int64 [n]: slot of each.
        overlaps: whether it goes on by itself; else `finish` does all the work.
    """

    def __init__(
        self,
        file: LeafFile,
        layer: int,
        leaves: Sequence[int] | Index,
        memory: Bytes,
        places: Sequence[int] | Index,
    ) -> None:
        self.layer = layer
        self.leaves, self.places = np.asarray(leaves, np.int64), np.asarray(places, np.int64)
        self._file = file
        self._size = memory.shape[1]
        self._bytes = memory.reshape(-1).data
        self._runs = file.runs(layer, leaves)
        table = np.empty((len(self.places), 2), np.uint64)
        np.multiply(self.places, self._size, out=table[:, 0], casting="unsafe")
        table[:, 0] += np.uint64(memory.ctypes.data)
        table[:, 1] = self._size
        offsets, counts = [x[0] for x in self._runs], [x[1] for x in self._runs]
        self._batch = Batch(file.lanes, file.fd, offsets, counts, table)
        self.overlaps = not self._batch.over
        self._lock = threading.Lock()
        self._done = False
        self._failed: Exception | None = None

    def arrived(self) -> bool:
        """Whether `finish` would not wait for the device."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._done or (self.overlaps and self._batch.collect(wait=False))
        finally:
            self._lock.release()

    def finish(self) -> None:
        """Wait for all of it, and check it.

        Raises:
            CorruptDataError: a leaf is damaged, or the file is too short.
            StoreError: the device fails.
        """
        with self._lock:
            if not self._done:
                try:
                    self._take()
                except (StoreError, CorruptDataError) as exc:
                    self._failed = exc
                self._batch.collect(wait=True)
                self._done = True
        if self._failed is not None:
            raise self._failed

    def _take(self) -> None:
        """Check runs as they come; read what did not come, or only in part."""
        leaves, places = self.leaves.tolist(), self.places.tolist()
        firsts = list(accumulate((count for _, count in self._runs), initial=0))
        size = self._size
        for runs in self._batch.arrivals():
            some = [i for run in runs for i in range(firsts[run], firsts[run + 1])]
            views = [self._bytes[places[i] * size : (places[i] + 1) * size] for i in some]
            at = 0
            for run in runs:
                offset, count = self._runs[run]
                done = max(self._batch.got[run], 0)  # what failed is tried again, and says why then
                if done < count * size:
                    self._file.fill(_rest(views[at : at + count], done), offset + done)
                at += count
            self._file.check(self.layer, [leaves[i] for i in some], views)


def _rest(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `views` after `done` bytes."""
    left = []
    for view in views:
        if done < view.nbytes:
            left.append(view[done:] if done else view)
        done = max(0, done - view.nbytes)
    return left


def _open(folder: str | os.PathLike[str] | None, *, direct: bool) -> tuple[int, bool]:
    """A file without a name, and whether it is read past the page cache."""
    temporary = getattr(os, "O_TEMPORARY", 0)  # of a system that removes no open files
    try:
        fd, path = tempfile.mkstemp(prefix="kvlib-leaves-", dir=folder)
        if temporary:
            os.close(fd)
            return os.open(path, os.O_RDWR | os.O_BINARY | temporary), False  # type: ignore[attr-defined,unused-ignore]
    except OSError as exc:
        raise ConfigError(f"cannot make a file for leaves in {folder or 'tmp'}: {exc}") from exc
    try:
        flag = getattr(os, "O_DIRECT", 0)
        if direct and flag:
            try:
                other = os.open(path, os.O_RDWR | flag | os.O_CLOEXEC)
            except OSError:  # refused by the file system
                return fd, False
            os.close(fd)
            return other, True
        return fd, False
    finally:
        Path(path).unlink()


def _seek_and_move(fd: int, view: memoryview, offset: int, *, write: bool) -> int:
    """One read or write, of a system that has none with an offset."""
    os.lseek(fd, offset, os.SEEK_SET)
    if write:
        return os.write(fd, view)
    data = os.read(fd, view.nbytes)
    view[: len(data)] = data
    return len(data)
