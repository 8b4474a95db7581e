# SPDX-License-Identifier: Apache-2.0
"""`KVStore`: blocks of a prompt in, the longest stored prefix out, through any codec and any tiers.

**Records.** Up to four consecutive blocks (a chunk) are encoded as one record, cut at multiples of
four blocks from the start of the sequence; the blocks of an unfinished last chunk are records of
their own, so that a conversation that goes on re-encodes nothing. A record is named by the key of
its **first** block and echoes the keys of all its blocks. Keys are chained, so a prompt that shares
any block of a record also shares its first one: walking a prompt's keys from the start finds
everything that is stored of it, without an index beside the records, on any medium that can get and
put.

**Order.** Records are written, and marked as used, from the last to the first: what is used longest
ago is always the end of a prompt, and eviction never takes a parent before its children.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Self

import numpy as np
from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec, build_codec, codec_from_canonical
from kvlib.codecs.base import codec_fingerprint, describe_codec
from kvlib.codecs.container import Container
from kvlib.codecs.pack import encode_block
from kvlib.codecs.unpack import decode_block
from kvlib.errors import (
    CapacityError,
    CodecError,
    ConfigError,
    CorruptDataError,
    ShapeError,
    StoreClosedError,
)
from kvlib.keys import BLOCK_TOKENS, BlockKey, Extra, StoreKey, TokenIds, block_keys, snapshot_key
from kvlib.snapshots import Snapshot
from kvlib.spec import EXACT, KVSpec, LayerKind
from kvlib.store.directory import Directory, Found
from kvlib.store.files import FileStore
from kvlib.store.flight import SingleFlight
from kvlib.store.memory import MemoryTier
from kvlib.store.records import BLOCKS_PER_RECORD, allocate, groups_to_write, is_dense
from kvlib.store.reports import Loaded, PutReport, StoreStats
from kvlib.store.sizes import parse_bytes
from kvlib.store.snapshots import decode_snapshot, encode_snapshot, snapshot_record_key
from kvlib.store.tier import CheckReport, Tier

__all__ = ["BLOCKS_PER_RECORD", "KVStore", "Loaded", "PutReport", "StoreStats"]

_KINDS = (LayerKind.FULL, LayerKind.SLIDING, LayerKind.MLA)


class KVStore:
    """A persistent, bounded, checksummed store of KV blocks.

    Args:
        path: folder of the disk tier (made if missing); None keeps everything in memory.
        memory: capacity of the memory tier, which holds encoded records; 0 for none.
        disk: capacity of the disk tier.
        codec: method string of the codec, such as ``exact`` or ``int4:group=32``. Part of every
            record's identity.
        salt: tenants with different salts share nothing.
        remote: reserved for remote tiers.
        mac_key: 16 to 64 secret bytes: records are authenticated, not only checksummed.
        threads: threads that read and decode.

    Thread-safe. Concurrent loads of a record read it once, concurrent puts write it once. Must be
    opened again after a fork. Use as a context manager, or call `close`.

    Raises:
        ConfigError: neither memory nor path, or a bad size, codec or folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        memory: int | str = "1GiB",
        disk: int | str = "16GiB",
        codec: str | Codec = "exact",
        salt: str | bytes = "",
        remote: str | None = None,
        mac_key: bytes | None = None,
        threads: int | None = None,
    ) -> None:
        if remote is not None:
            raise ConfigError(f"remote={remote!r}: this version has no remote tiers; leave it out")
        self.codec = build_codec(codec) if isinstance(codec, str) else codec
        self.codec_text = describe_codec(self.codec)
        self.salt = salt
        self._mac_key = mac_key
        self._pid = os.getpid()
        self._tiers: list[Tier] = []
        memory_bytes = parse_bytes(memory, "memory")
        if memory_bytes:
            self._tiers.append(MemoryTier(memory_bytes, mac_key=mac_key))
        if path is not None:
            self._tiers.append(
                FileStore(Path(path), capacity=parse_bytes(disk, "disk"), mac_key=mac_key)
            )
        if not self._tiers:
            raise ConfigError("a store needs memory, a path, or both; got memory=0 and no path")
        self._pool = ThreadPoolExecutor(
            threads or min(4, os.cpu_count() or 1), thread_name_prefix="kvlib-store"
        )
        self._flight = SingleFlight()
        self._lock = threading.Lock()
        self._closed = False
        self._directory = Directory(self._tiers, mac_key)
        self._stats = StoreStats(tiers={})

    # -- keys and identities

    def block_keys(
        self, spec: KVSpec, tokens: "TokenIds", *, extras: Sequence[Extra] = ()
    ) -> list[BlockKey]:
        """Keys of the full blocks of `tokens` under this store's salt; see `block_keys`."""
        return block_keys(spec.fingerprint(), tokens, salt=self.salt, extras=extras)

    def _identities(self, spec: KVSpec, accept: Sequence[str] | None) -> list[tuple[str, bytes]]:
        """(fidelity of the ancestors, storage fingerprint) pairs a request accepts, best first."""
        if accept is None:
            accept = (EXACT,) if self.codec.lossless else (EXACT, self.codec_text)
        return [(f, codec_fingerprint(spec, self.codec, fidelity=f)) for f in dict.fromkeys(accept)]

    # -- looking up

    def match(
        self, spec: KVSpec, keys: Sequence[BlockKey], *, accept: Sequence[str] | None = None
    ) -> int:
        """Leading blocks that seem to be stored: a hint; only `load` makes certain.

        Args:
            spec: what the numbers mean.
            keys: of a prompt's blocks, from its start.
            accept: fidelities of ancestors that are acceptable; by default exact ones, and for a
                lossy codec also those that went through that codec.
        """
        self._check_open()
        return sum(
            found.count for found in self._directory.run(self._identities(spec, accept), keys)
        )

    # -- reading

    def load(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> Loaded:
        """Restore the longest stored run of leading blocks.

        Args:
            spec: what the numbers mean; all its layers are restored.
            keys: of a prompt's blocks, from its start.
            accept: see `match`.
            deadline: `time.monotonic()` after which to return what has arrived.

        Returns:
            Verified blocks in fresh CPU tensors. Whatever could not be read, verified or decoded
            ends the run there.

        Raises:
            ConfigError: the model has recurrent layers.
        """
        self._check_open()
        spec.require(_KINDS, "KVStore")
        run = self._directory.run(self._identities(spec, accept), keys)
        total = sum(found.count for found in run) * BLOCK_TOKENS
        out = allocate(spec, total)
        tasks = [self._pool.submit(self._load_record, spec, found, out, deadline) for found in run]
        arrived: list[tuple[Found, int]] = []
        for found, task in zip(run, tasks, strict=True):
            stored_bytes = task.result()
            if stored_bytes is None:
                break
            arrived.append((found, stored_bytes))
        for task in tasks[len(arrived) :]:
            task.cancel()
        num_blocks = sum(found.count for found, _ in arrived)
        self._count(loads=1, hit_blocks=num_blocks, missed_blocks=len(keys) - num_blocks)
        self._touch([found.key for found, _ in arrived])
        if not num_blocks:
            return Loaded()
        tokens = num_blocks * BLOCK_TOKENS
        if tokens < total:  # give the rest back
            for task in tasks[len(arrived) :]:
                if not task.cancelled():
                    task.exception()
            out = [(k[:, :tokens].clone(), v[:, :tokens].clone()) for k, v in out]
        lossy = [found.fidelity for found, _ in arrived if found.fidelity != EXACT]
        fidelity = EXACT if self.codec.lossless else self.codec_text
        return Loaded(
            num_blocks=num_blocks,
            block=KVBlock.dense(spec, out),
            fidelity=lossy[-1] if lossy else fidelity,
            stored_bytes=sum(size for _, size in arrived),
        )

    def _load_record(
        self,
        spec: KVSpec,
        found: Found,
        out: Sequence[tuple[Tensor, Tensor]],
        deadline: float | None,
    ) -> int | None:
        """Read, verify and decode one record into its place; its size, or None for a miss."""
        data, shared = self._flight.run(("get", found.key), lambda: self._read(found.key, deadline))
        if shared:
            self._count(shared_reads=1)
        if data is None or (deadline is not None and monotonic() > deadline):
            return None
        first = found.first * BLOCK_TOKENS
        last = first + found.count * BLOCK_TOKENS
        try:
            container = Container(data, mac_key=self._mac_key, verified=True)
            header = container.header
            if header.keys != found.held:  # evicted, and written again with other blocks
                self._directory.forget(found.key)
                return None
            if (header.start, header.num_tokens) != (first, len(found.held) * BLOCK_TOKENS):
                raise ShapeError(f"record of tokens {header.start}+{header.num_tokens}")
            whole = found.count == len(found.held)
            views = (
                {i: (k[:, first:last], v[:, first:last]) for i, (k, v) in enumerate(out)}
                if whole
                else None
            )
            block = decode_block(container, spec, codec_for=self._codec_for, out=views)
            if len(block.layers) != spec.num_layers:
                raise ShapeError(
                    f"record of {len(block.layers)} layers, expected {spec.num_layers}"
                )
            if any(not is_dense(layer) for layer in block.layers):
                raise ShapeError("record of evicted tokens under a prefix key")
            if not whole:
                for layer, (k, v) in zip(block.slice(first, last).layers, out, strict=True):
                    k[:, first:last] = layer.keys
                    v[:, first:last] = layer.values
        except (CodecError, ShapeError, CapacityError):
            self._count(corrupt_records=1)
            self._drop(found.key)
            return None
        return len(data)

    def _codec_for(self, text: str) -> Codec:
        return self.codec if text == self.codec_text else codec_from_canonical(text)

    def _read(self, key: StoreKey, deadline: float | None) -> memoryview | None:
        """A record's verified bytes from the fastest tier that has it, promoted above it."""
        for depth, tier in enumerate(self._tiers):
            size = tier.size(key)
            if size is None:
                continue
            data = np.empty(size, np.uint8).data
            got = tier.get_into(key, data, deadline=deadline)
            if got is None:
                continue
            view = data[:got].toreadonly()
            for above in self._tiers[:depth]:
                above.put(key, [view])
            return view
        return None

    def _touch(self, keys: Sequence[StoreKey]) -> None:
        """Mark as used from last to first: the start of a prompt is evicted last."""
        for tier in self._tiers:
            tier.touch(keys[::-1])

    def _drop(self, key: StoreKey) -> None:
        self._directory.forget(key)
        for tier in self._tiers:
            tier.delete(key)

    # -- writing

    def put(
        self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock, *, fidelity: str = EXACT
    ) -> PutReport:
        """Store the blocks of a prompt that are not stored yet.

        Args:
            spec: what the numbers mean.
            keys: of the prompt's blocks from its start, at least to the end of `block`.
            block: dense KV of all layers of the tokens [start, stop), both multiples of 64.
            fidelity: `EXACT`, or the lowest fidelity among the KV this was computed from
                (`Loaded.fidelity`).

        Returns:
            What was stored; want of room or a failing medium is counted, never raised.

        Raises:
            ShapeError: the block is not whole blocks, lacks layers, or goes beyond the keys.
            UnsupportedInputError: the codec cannot represent it.
        """
        self._check_open()
        spec.require(_KINDS, "KVStore")
        first, rest = divmod(block.start, BLOCK_TOKENS)
        last, tail = divmod(block.stop, BLOCK_TOKENS)
        if (
            rest
            or tail
            or last > len(keys)
            or len(block.layers) != spec.num_layers
            or block.spec != spec
            or not all(is_dense(layer) for layer in block.layers)
        ):
            raise ShapeError(
                f"cannot store tokens [{block.start}, {block.stop}) of {len(block.layers)} layers "
                f"under {len(keys)} keys: expected whole blocks of {BLOCK_TOKENS} tokens over all "
                f"{spec.num_layers} layers of the same spec, nothing evicted"
            )
        identities = self._identities(spec, (fidelity,))
        present, missing = self._present(identities, keys[:last], first)
        storage = identities[0][1]
        stored_blocks = dropped_blocks = stored_bytes = raw_bytes = 0
        for group in reversed(groups_to_write(missing)):
            written = self._put_record(spec, keys, block, group, storage, fidelity)
            if written is None:
                dropped_blocks += len(group)
            else:
                stored_blocks += len(group)
                stored_bytes += written
                raw_bytes += len(group) * BLOCK_TOKENS * spec.bytes_per_token()
        self._touch(present)
        self._count(stored_blocks=stored_blocks)
        return PutReport(
            stored_blocks=stored_blocks,
            present_blocks=last - first - len(missing),
            dropped_blocks=dropped_blocks,
            stored_bytes=stored_bytes,
            raw_bytes=raw_bytes,
        )

    def _present(
        self, identities: Sequence[tuple[str, bytes]], keys: Sequence[BlockKey], first: int
    ) -> tuple[list[StoreKey], list[int]]:
        """Records that hold blocks from `first` on, and the blocks that no record holds."""
        records: list[StoreKey] = []
        missing: list[int] = []
        # The walk begins at the start: block `first` may lie in a record that begins before it.
        at = max(sum(found.count for found in self._directory.run(identities, keys)), first)
        while at < len(keys):
            found = self._directory.find(identities, keys, at)
            if found is None:
                missing.append(at)
                at += 1
            else:
                records.append(found.key)
                at += found.count
        return records, missing

    def _put_record(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        block: KVBlock,
        group: list[int],
        storage: bytes,
        fidelity: str,
    ) -> int | None:
        """Encode and write one record; its size, or None when no tier took it."""
        mine = tuple(keys[i] for i in group)
        key = StoreKey(mine[0], storage)

        def write() -> int | None:
            part = block.slice(group[0] * BLOCK_TOKENS, (group[-1] + 1) * BLOCK_TOKENS)
            parts = encode_block(
                part, self.codec, keys=mine, fidelity=fidelity, mac_key=self._mac_key
            )
            held = [tier.put(key, parts) for tier in reversed(self._tiers)]
            return sum(memoryview(p).nbytes for p in parts) if any(held) else None

        written, _ = self._flight.run(("put", key), write)
        return written

    # -- snapshots

    def put_snapshot(
        self, tokens: "TokenIds", snapshot: Snapshot, *, codec: str | None = None
    ) -> int | None:
        """Store one sequence of an evicted cache under its tokens and method.

        Args:
            tokens: [T]: every token that the snapshot stands for.
            snapshot: from `KVCache.to_snapshot`.
            codec: method string; the store's own codec by default.

        Returns:
            Bytes of the record; None if no tier took it.

        Raises:
            ShapeError: more or fewer tokens than the snapshot stands for.
            UnsupportedInputError: the codec cannot represent it.
        """
        self._check_open()
        chosen = self.codec if codec is None else build_codec(codec)
        spec = snapshot.block.spec
        if len(tokens) != snapshot.block.num_tokens:
            raise ShapeError(
                f"{len(tokens)} tokens given for a snapshot of {snapshot.block.num_tokens}"
            )
        name = snapshot_key(spec.fingerprint(), tokens, snapshot.method, salt=self.salt)
        parts = encode_snapshot(snapshot, chosen, keys=(name,), mac_key=self._mac_key)
        key = snapshot_record_key(spec, name, chosen)
        held = [tier.put(key, parts) for tier in reversed(self._tiers)]
        return sum(memoryview(p).nbytes for p in parts) if any(held) else None

    def load_snapshot(
        self, spec: KVSpec, tokens: "TokenIds", method: str, *, codec: str | None = None
    ) -> Snapshot | None:
        """The snapshot of exactly these tokens, method and codec; see `put_snapshot`.

        Returns:
            The verified snapshot; None if it is not there or cannot be read.
        """
        self._check_open()
        chosen = self.codec if codec is None else build_codec(codec)
        name = snapshot_key(spec.fingerprint(), tokens, method, salt=self.salt)
        key = snapshot_record_key(spec, name, chosen)
        data = self._read(key, None)
        if data is None:
            return None
        try:
            container = Container(data, mac_key=self._mac_key, verified=True)
            if container.header.keys != (name,):
                raise CorruptDataError("a record under the key of another snapshot")
            return decode_snapshot(container, spec, method)
        except (CodecError, ShapeError, CapacityError):
            self._count(corrupt_records=1)
            self._drop(key)
            return None

    # -- upkeep

    def stats(self) -> StoreStats:
        """A snapshot of the counters of the store and its tiers."""
        with self._lock:
            return replace(self._stats, tiers={tier.name: tier.stats() for tier in self._tiers})

    def check(self, *, repair: bool = False) -> dict[str, CheckReport]:
        """Verify every record of every tier; see `Tier.check`."""
        self._check_open()
        return {tier.name: tier.check(repair=repair) for tier in self._tiers}

    def _count(self, **more: int) -> None:
        with self._lock:
            self._stats = replace(
                self._stats, **{k: getattr(self._stats, k) + n for k, n in more.items()}
            )

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise StoreClosedError(
                "this KVStore was opened before a fork; open a new one in the child process"
            )
        if self._closed:
            raise StoreClosedError("this KVStore is closed")

    def close(self) -> None:
        """Finish what is under way and release everything; closing twice is allowed."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        for tier in self._tiers:
            tier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
