# SPDX-License-Identifier: Apache-2.0
"""Leaves of a long context, in a file.

A **leaf** is `LEAF_TOKENS` consecutive tokens of one layer: the keys of all KV heads, then the
values, in one run of bytes, padded to whole pages. It is what a decoding step asks for, so it is
the unit of reading, of checksums and of what memory holds (`kvlib.store.leaf_pool`).

The file is scratch: it has no name, so nothing of it outlives the process. Leaves of a layer that
were written one after another lie one after another (in runs of `RUN_LEAVES`), so that reading
many is reading long runs. What is read is checked against checksums that stay in memory.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from kvlib.errors import CapacityError, ConfigError, CorruptDataError, StoreError
from kvlib.spec import KVSpec
from kvlib.store import blockio

__all__ = ["LEAF_TOKENS", "RUN_LEAVES", "LeafFile", "LeafShape", "aligned"]

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
    ) -> None:
        if not blockio.supports():
            raise ConfigError("leaves need POSIX I/O, which this system does not have")
        self.shape = shape
        self._runs: list[list[int]] = [[] for _ in range(num_layers)]  # offsets in the file
        self._counts = [0] * num_layers
        self._digests: list[list[int]] = [[] for _ in range(num_layers)]
        self._size = 0
        self._lock = threading.Lock()
        self._fd = self._open(folder, direct)

    @staticmethod
    def _open(folder: str | os.PathLike[str] | None, direct: bool) -> int:
        try:
            fd, path = tempfile.mkstemp(prefix="kvlib-leaves-", dir=folder)
        except OSError as exc:
            raise ConfigError(f"cannot make a file for leaves in {folder or 'tmp'}: {exc}") from exc
        try:
            flag = getattr(os, "O_DIRECT", 0)
            if direct and flag:
                try:
                    other = os.open(path, os.O_RDWR | flag | os.O_CLOEXEC)
                except OSError:  # refused by the file system
                    return fd
                os.close(fd)
                return other
            return fd
        finally:
            Path(path).unlink()

    def __len__(self) -> int:
        """Leaves of the first layer."""
        return self._counts[0]

    def count(self, layer: int) -> int:
        """Leaves of a layer."""
        return self._counts[layer]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._size

    def _offset(self, layer: int, leaf: int) -> int:
        return self._runs[layer][leaf // RUN_LEAVES] + leaf % RUN_LEAVES * self.shape.slot_bytes

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
            data = slots[done : done + count].data.cast("B")
            try:
                put = 0
                while put < data.nbytes:
                    put += blockio.pwrite(self._fd, [data[put:]], offset + put)
            except OSError as exc:
                raise CapacityError(f"cannot write leaves of layer {layer}: {exc}") from exc
            done += count
        digests = [xxhash.xxh3_64_intdigest(slot.data) for slot in slots]
        with self._lock:
            self._runs[layer] = runs
            self._size = max(self._size, end)
            self._counts[layer] = first + len(slots)
            self._digests[layer].extend(digests)

    def read(self, layer: int, leaves: Sequence[int], slots: Sequence[Bytes]) -> None:
        """Read leaves, checked; those that lie one after another in one go.

        Args:
            layer: which.
            leaves: ascending.
            slots: where to, uint8 [slot_bytes] each, page-aligned.

        Raises:
            CorruptDataError: what came is not what was written.
            StoreError: the device fails.
        """
        at = 0
        while at < len(leaves):
            last = at + 1
            while (
                last < len(leaves)
                and leaves[last] == leaves[last - 1] + 1
                and leaves[last] % RUN_LEAVES
            ):
                last += 1
            self.fill(slots[at:last], layer, leaves[at])
            at = last
        known = self._digests[layer]
        for leaf, slot in zip(leaves, slots, strict=True):
            if xxhash.xxh3_64_intdigest(slot.data) != known[leaf]:
                raise CorruptDataError(f"leaf {leaf} of layer {layer} is damaged")

    def fill(self, slots: Sequence[Bytes], layer: int, leaf: int) -> None:
        """Read leaves of one run, from `leaf` on, unchecked.

        Raises:
            CorruptDataError: the file is too short.
            StoreError: the device fails.
        """
        offset = self._offset(layer, leaf)
        views = [slot.data for slot in slots]
        left = sum(view.nbytes for view in views)
        while left:
            try:
                got = blockio.pread(self._fd, views, offset)
            except OSError as exc:
                raise StoreError(f"cannot read leaves: {exc}") from exc
            if not got:
                raise CorruptDataError(f"the file of leaves ends at byte {offset}")
            offset, left = offset + got, left - got
            while got and got >= views[0].nbytes:
                got -= views.pop(0).nbytes
            if got:
                views[0] = views[0][got:]

    def close(self) -> None:
        """Give the file up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
