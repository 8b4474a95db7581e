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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import Self

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec, build_codec, codec_from_canonical
from kvlib.codecs.base import describe_codec
from kvlib.errors import (
    ConfigError,
    StoreClosedError,
)
from kvlib.keys import BLOCK_TOKENS, BlockKey, Extra, StoreKey, TokenIds, block_keys
from kvlib.spec import EXACT, KVSpec, LayerKind
from kvlib.store.cost import CostModel
from kvlib.store.directory import Directory, Found, Identity
from kvlib.store.leases import Lease, Leases
from kvlib.store.loads import Load, Reader, load_pieces
from kvlib.store.memory import MemoryTier
from kvlib.store.puts import Prefetch, Put
from kvlib.store.records import BLOCKS_PER_RECORD
from kvlib.store.replacement.admission import SecondTouch
from kvlib.store.reports import Loaded, PutReport, StoreStats
from kvlib.store.sizes import parse_bytes
from kvlib.store.snapshots import SnapshotRecords
from kvlib.store.stack import TierStack, open_disk
from kvlib.store.tier import CheckReport, Tier
from kvlib.store.work import Priority, WorkPool
from kvlib.store.writes import Staging, Writer, forms_of, identities_of

__all__ = ["BLOCKS_PER_RECORD", "KVStore", "Loaded", "PutReport", "StoreStats"]

_KINDS = (LayerKind.FULL, LayerKind.SLIDING, LayerKind.MLA)
_LAYER_BATCHES = 8
_ADMISSIONS = ("always", "second-touch")


class KVStore(SnapshotRecords):
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
        threads: threads that read, decode, encode and write.
        tier: the disk tier: ``segment`` (local disks), ``file`` (network file systems, and
            other systems), or None for what the folder holds, else for what the system has.
        memory_codec: codec of the memory tier's records, where it is another one; a lossless one
            saves the decoding of what is asked for often. Blocks are encoded once for either.
        admission: which blocks go to disk: ``always``, or those wanted for the second time
            (``second-touch``).
        staging: most bytes of blocks that wait in `put_async`.

    Thread-safe; concurrent loads of a record read it once, concurrent puts write it once. Open it
    again after a fork. Use it as a context manager, or call `close`.

    Attributes:
        path: folder of the disk tier, None without one.
        cost: running measurements of this store, to weigh loading against computing.

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
        tier: str | None = None,
        memory_codec: str | Codec | None = None,
        admission: str = "always",
        staging: int | str = "256MiB",
    ) -> None:
        if remote is not None:
            raise ConfigError(f"remote={remote!r}: this version has no remote tiers; leave it out")
        if admission not in _ADMISSIONS:
            raise ConfigError(f"admission={admission!r}: expected {' or '.join(_ADMISSIONS)}")
        self.codec = build_codec(codec) if isinstance(codec, str) else codec
        self.codec_text = describe_codec(self.codec)
        quick = build_codec(memory_codec) if isinstance(memory_codec, str) else memory_codec
        self.memory_codec = self.codec if quick is None else quick
        self._codecs = {describe_codec(c): c for c in (self.memory_codec, self.codec)}
        self.salt = salt
        self.path = None if path is None else Path(path).expanduser()
        self._mac_key = mac_key
        self._pid = os.getpid()
        self._staging = Staging(parse_bytes(staging, "staging"))
        memory_bytes = parse_bytes(memory, "memory")
        if not memory_bytes and path is None:
            raise ConfigError("a store needs memory, a path, or both; got memory=0 and no path")
        if len(self._codecs) > 1 and not (memory_bytes and path is not None):
            raise ConfigError(
                "memory_codec needs a memory tier and a path; with one tier, codec says it all"
            )
        if len(self._codecs) > 1 and not self.memory_codec.lossless:
            raise ConfigError(
                f"memory_codec={describe_codec(self.memory_codec)!r} loses something: only a "
                "lossless one saves what another form on disk has lost"
            )
        if len(self._codecs) > 1 and admission != _ADMISSIONS[0]:
            raise ConfigError(
                "admission='second-touch' needs one codec for both tiers: leave memory_codec out"
            )
        tiers: list[Tier] = []
        if memory_bytes:
            tiers.append(MemoryTier(memory_bytes, mac_key=mac_key))
        self._memory = tiers[0] if tiers else None
        if self.path is not None:
            tiers.append(open_disk(self.path, tier, parse_bytes(disk, "disk"), mac_key))
        self.cost = CostModel()
        self._stack = TierStack(tiers, self.cost)
        touch: SecondTouch[StoreKey] | None = SecondTouch() if admission == _ADMISSIONS[1] else None
        self._second_touch = touch
        self._leases = Leases(self._stack)
        self._pool = WorkPool(threads or min(4, os.cpu_count() or 1), "kvlib-store")
        self._lock = threading.Lock()
        self._closed = False
        self._stats = StoreStats(tiers={})
        self._directory = Directory(tiers, mac_key)
        self._writer = Writer(self._stack, self._directory, self._second_touch, mac_key)
        self._reader = Reader(
            tiers=self._stack,
            pool=self._pool,
            cost=self.cost,
            codec_for=self._codec_for,
            mac_key=mac_key,
            forget=self._directory.forget,
            corrupt=self._spoilt,
            shared=lambda: self._count(shared_reads=1),
            finished=self._finished,
        )

    # -- keys and identities

    def block_keys(
        self, spec: KVSpec, tokens: "TokenIds", *, extras: Sequence[Extra] = ()
    ) -> list[BlockKey]:
        """Keys of the full blocks of `tokens` under this store's salt; see `block_keys`."""
        return block_keys(spec.fingerprint(), tokens, salt=self.salt, extras=extras)

    def _identities(self, spec: KVSpec, accept: Sequence[str] | None) -> list[Identity]:
        """The forms a request accepts, best first."""
        if accept is None:
            accept = (EXACT, *(t for t, codec in self._codecs.items() if not codec.lossless))
        return identities_of(spec, self._codecs, accept)

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

    def pin(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        seconds: float = 60.0,
        accept: Sequence[str] | None = None,
    ) -> Lease:
        """Keep the stored leading blocks of a prompt from being evicted, for a while.

        Args:
            spec: see `match`.
            keys: see `match`.
            seconds: how long, at most; an owner that dies keeps nothing for ever.
            accept: see `match`.

        Returns:
            A lease, to be released or used as a context manager. It holds in this process: another
            one that shares the folder may evict all the same.
        """
        self._check_open()
        self._leases.expire()
        run = self._directory.run(self._identities(spec, accept), keys)
        num_blocks = sum(found.count for found in run)
        return self._leases.give([found.key for found in run], num_blocks, seconds)

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
        return self._load(spec, keys, accept, None, Priority.DEMAND, deadline).result()

    def load_async(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        priority: float = Priority.DEMAND,
        deadline: float | None = None,
        layers: int | None = None,
    ) -> Load:
        """Begin to restore the longest stored run of leading blocks, the first layers first.

        Args:
            spec: see `load`.
            keys: see `load`.
            accept: see `match`.
            priority: see `kvlib.store.work.Priority`.
            deadline: see `load`.
            layers: layers that become ready together; None for an eighth of them.

        Returns:
            What to wait for: `Load.wait_layer`, `Load.result`, `Load.cancel`.

        Raises:
            ConfigError: the model has recurrent layers.
        """
        group = lcm(*(codec.caps(spec).layer_group for codec in self._codecs.values()))
        step = max(layers or -(-spec.num_layers // _LAYER_BATCHES), 1)
        return self._load(spec, keys, accept, -(-step // group) * group, priority, deadline)

    def load_pieces(
        self, spec: KVSpec, keys: Sequence[BlockKey], *, accept: Sequence[str] | None = None
    ) -> Iterator[Loaded]:
        """Restore the longest stored run of leading blocks record by record.

        Holds two records at a time: the one that it gave last, and the next.

        Args:
            spec: see `load`.
            keys: see `load`.
            accept: see `match`.

        Returns:
            The blocks of one record after another; `Loaded.block` begins where the last one ended.
        """
        self._check_open()
        spec.require(_KINDS, "KVStore")
        self._leases.expire()
        run = self._directory.run(self._identities(spec, accept), keys)
        return load_pieces(self._reader, spec, run, len(keys))

    def _load(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        accept: Sequence[str] | None,
        layers: int | None,
        priority: float,
        deadline: float | None,
    ) -> Load:
        self._check_open()
        spec.require(_KINDS, "KVStore")
        self._leases.expire()
        run = self._directory.run(self._identities(spec, accept), keys)
        return Load(
            self._reader,
            spec,
            run,
            len(keys),
            layers=layers,
            priority=priority,
            deadline=deadline,
        )

    def _finished(self, arrived: Sequence[Found], blocks: int, asked: int) -> None:
        self._count(loads=1, hit_blocks=blocks, missed_blocks=asked - blocks)
        with suppress(StoreClosedError):  # what has arrived is there all the same
            self._stack.touch([found.key for found in arrived])
            for found in arrived if self._second_touch is not None else ():
                write = partial(self._writer.copy_down, found.key)
                self._pool.submit(write, priority=Priority.STORE)

    def _spoilt(self, key: StoreKey) -> None:
        self._count(corrupt_records=1)
        self._drop(key)

    def _codec_for(self, text: str) -> Codec:
        for known, codec in self._codecs.items():
            if text == known:
                return codec
        return codec_from_canonical(text)

    def _drop(self, key: StoreKey) -> None:
        self._directory.forget(key)
        self._stack.delete(key)

    def prefetch(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        priority: float = Priority.PREFETCH,
        deadline: float | None = None,
    ) -> Prefetch:
        """Bring the stored leading blocks of a prompt into the memory tier, encoded as they are.

        Args:
            spec: see `load`.
            keys: see `load`.
            accept: see `match`.
            priority: see `kvlib.store.work.Priority`.
            deadline: `time.monotonic()` after which not to begin another read.

        Returns:
            What to wait for or cancel. Without a memory tier there is nothing to do.
        """
        self._check_open()
        run = self._directory.run(self._identities(spec, accept), keys)
        tasks = [
            self._pool.submit(
                lambda key=found.key: self._stack.read(key, deadline)[0] is not None,  # type: ignore[misc]
                priority=priority,
                deadline=deadline,
            )
            for found in run
            if self._memory is not None and not self._memory.contains_many([found.key])[0]
        ]
        return Prefetch(sum(found.count for found in run), tasks)

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
        self._writer.check(spec, keys, block)
        return self._write(spec, keys, block, fidelity)

    def put_async(
        self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock, *, fidelity: str = EXACT
    ) -> Put:
        """Store blocks in the background; they are copied before this returns.

        Args:
            spec: see `put`.
            keys: see `put`.
            block: see `put`.
            fidelity: see `put`.

        Returns:
            What to wait for. Where `staging` has no room the blocks are dropped and counted, at
            once.

        Raises:
            ShapeError: see `put`. `UnsupportedInputError` comes with the result.
        """
        self._check_open()
        spec.require(_KINDS, "KVStore")
        self._writer.check(spec, keys, block)
        size = block.nbytes
        if not self._staging.take(size):
            dropped = (block.stop - block.start) // BLOCK_TOKENS
            self._count(staging_drops=dropped)
            return Put(None, PutReport(dropped_blocks=dropped))
        try:
            return self._put_copy(spec, keys, block, fidelity, size)
        except BaseException:
            self._staging.give(size)
            raise

    def _put_copy(
        self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock, fidelity: str, size: int
    ) -> Put:
        """Begin to store a copy, whose bytes are reserved."""
        copy = KVBlock.dense(
            spec,
            [(x.keys.cpu().clone(), x.values.cpu().clone()) for x in block.layers],
            start=block.start,
        )

        write = partial(self._write, spec, keys, copy, fidelity)
        task = self._pool.submit(write, priority=Priority.STORE)
        task.add_done_callback(lambda _: self._staging.give(size))
        return Put(task, None)

    def _write(
        self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock, fidelity: str
    ) -> PutReport:
        self._leases.expire()
        identities = self._identities(spec, (fidelity,))
        report = self._writer.put(spec, keys, block, forms_of(identities, self._codecs))
        self._count(stored_blocks=report.stored_blocks)
        return report

    # -- upkeep

    def stats(self) -> StoreStats:
        """A snapshot of the counters of the store and its tiers."""
        with self._lock:
            return replace(
                self._stats, tiers={tier.name: tier.stats() for tier in self._stack.tiers}
            )

    def check(self, *, repair: bool = False) -> dict[str, CheckReport]:
        """Verify every record of every tier; see `Tier.check`."""
        self._check_open()
        return {tier.name: tier.check(repair=repair) for tier in self._stack.tiers}

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
        self._pool.close()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
