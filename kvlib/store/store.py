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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec
from kvlib.codecs.base import describe_codec
from kvlib.errors import ConfigError, StoreClosedError
from kvlib.keys import BLOCK_TOKENS, BlockKey, StoreKey
from kvlib.spec import EXACT, KVSpec
from kvlib.store.abstract_maker import AbstractMaker
from kvlib.store.abstract_records import AbstractRecords
from kvlib.store.by_record import ByRecord
from kvlib.store.cost import CostModel
from kvlib.store.device import DeviceTier
from kvlib.store.directory import Directory, Found
from kvlib.store.endings import Ending
from kvlib.store.heads import check_head_range
from kvlib.store.leases import Leases
from kvlib.store.loads import Load, Reader
from kvlib.store.lookups import Lookups
from kvlib.store.opening import choose_codecs, open_tiers
from kvlib.store.puts import Put
from kvlib.store.records import BLOCKS_PER_RECORD, copied
from kvlib.store.reform import Reform
from kvlib.store.replacement import Hint
from kvlib.store.replacement.admission import SecondTouch
from kvlib.store.reports import Loaded, PutReport, StoreStats
from kvlib.store.rules import Relief, Rules, check_watermarks, replacement_for
from kvlib.store.sizes import parse_bytes
from kvlib.store.snapshots import SnapshotRecords
from kvlib.store.stack import TierStack
from kvlib.store.terms import Terms
from kvlib.store.work import Priority, WorkPool
from kvlib.store.writes import Staging, Writer, forms_of

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCKS_PER_RECORD", "KVStore", "Loaded", "PutReport", "StoreStats"]

_LAYER_BATCHES = 8
_ADMISSIONS = ("always", "second-touch")


class KVStore(Lookups, ByRecord, SnapshotRecords, AbstractRecords):
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
        device: ``cpu`` or a CUDA device: loads give their blocks there, and it keeps decoded ones.
        device_bytes: most bytes of decoded blocks kept there.
        replacement: which records go first: a method string such as ``s3fifo`` for all tiers, or
            one for each (``{"memory": "arc", "disk": "lru"}``, the default, and ``device``).
        ttl: how long records may be served, in seconds or such as ``7d``; None for ever.
        quota: most bytes that the records of this salt may hold in each tier. Beyond it their own
            oldest ones go, never another salt's.
        watermarks: (high, low), such as ``(0.95, 0.85)``: a tier that is fuller than the high share
            of its capacity is brought down to the low one in the background.
        min_free: bytes of the disk's file system that are left to others.
        head_range: KV heads [first, last) that this rank of a tensor-parallel engine holds, counted
            in the layer that has most; None for all. Blocks put and loaded have these heads alone;
            `block_keys` are those of all ranks. Of a prompt, what all ranks have is stored.
        abstracts: method string, such as ``leoam``, whose abstracts every put writes beside its
            blocks, where these come back as they are: a `TieredCache` then makes none.

    Thread-safe; concurrent loads of a record read it once, concurrent puts write it once. Open it
    again after a fork. Use it as a context manager, or call `close`; else it ends with its last
    user or the interpreter (`kvlib.store.endings`).

    These never wait for a disk: `load_async`, `prefetch`, `put_async`, `match_async`, and `match`
    and `pin` with ``from_memory=True``. All others may.

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
        device: "str | torch.device | None" = None,
        device_bytes: int | str = "2GiB",
        replacement: str | Mapping[str, str] | None = None,
        ttl: float | str | None = None,
        quota: int | str | None = None,
        watermarks: tuple[float, float] | None = None,
        min_free: int | str = 0,
        head_range: tuple[int, int] | None = None,
        abstracts: str | None = None,
    ) -> None:
        if remote is not None:
            raise ConfigError(f"remote={remote!r}: this version has no remote tiers; leave it out")
        if admission not in _ADMISSIONS:
            raise ConfigError(f"admission={admission!r}: expected {' or '.join(_ADMISSIONS)}")
        rules = Rules(salt=salt, mac_key=mac_key, ttl=ttl, quota=quota)
        self._staging = Staging(parse_bytes(staging, "staging"))
        self.codec, self.memory_codec = choose_codecs(
            codec,
            memory_codec,
            tiers=(parse_bytes(memory, "memory") > 0) + (path is not None),
            always=admission == _ADMISSIONS[0],
        )
        self.codec_text = describe_codec(self.codec)
        self._codecs = {describe_codec(c): c for c in (self.memory_codec, self.codec)}
        self.head_range = check_head_range(head_range, self._codecs.values())
        if abstracts is not None and head_range is not None:
            raise ConfigError("abstracts= is for blocks with all heads: leave out head_range=")
        self._maker = None if abstracts is None else AbstractMaker(abstracts)
        self.path = None if path is None else Path(path).expanduser()
        policy = replacement_for("device", replacement)
        self._device = (
            None if device is None else DeviceTier(device, device_bytes, replacement=policy)
        )
        tiers = open_tiers(
            self.path,
            memory=memory,
            disk=disk,
            tier=tier,
            mac_key=mac_key,
            replacement=replacement,
            watermarks=watermarks,
            min_free=min_free,
        )
        self.salt = salt
        rules.enforce(tiers)
        self._mac_key = mac_key
        self._pid = os.getpid()
        self._memory = next((x for x in tiers if not x.persistent), None)
        self.cost = CostModel()
        self._rules = rules
        self._stack = TierStack(tiers, self.cost, rules)
        self._second_touch = SecondTouch[StoreKey]() if admission == _ADMISSIONS[1] else None
        self._leases = Leases(self._stack)
        self._pool = WorkPool(threads or min(4, os.cpu_count() or 1), "kvlib-store")
        self._relief = Relief(tiers, self._pool, check_watermarks(watermarks))
        self._ending = Ending(self, self._pool, self._stack.close)
        self._lock = threading.Lock()
        self._closed = False
        self._stats = StoreStats(tiers={})
        self._directory = Directory(tiers, mac_key, self._device)
        self._writer = Writer(
            self._stack, self._directory, self._second_touch, mac_key, self.head_range
        )
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
            device=self._device,
            head_range=self.head_range,
        )
        self._background_reader = replace(self._reader, finished=self._finished_later)
        self._reform = None
        if len(tiers) > 1 and len(self._codecs) > 1:
            self._reform = Reform(
                self._stack,
                self._writer,
                self._pool,
                self._staging,
                self.memory_codec,
                self.head_range,
            )

    # -- reading

    def load(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        deadline: float | None = None,
        start: int = 0,
        hint: Hint | None = None,
    ) -> Loaded:
        """Restore the longest stored run of leading blocks.

        Args:
            spec: what the numbers mean; all its layers are restored.
            keys: of a prompt's blocks, from its start.
            accept: see `match`.
            deadline: `time.monotonic()` after which to return what has arrived.
            start: first block that is wanted; what comes before is only looked up.
            hint: what is known of the next use, for the replacement policies.

        Returns:
            Verified blocks in fresh tensors on the CPU or the store's device. Whatever could not be
            read, verified or decoded ends the run there.

        Raises:
            ConfigError: the model has recurrent layers.
        """
        reader = self._reader if deadline is None else self._background_reader
        load = self._load(spec, keys, accept, None, Priority.DEMAND, deadline, start, reader, hint)
        return load.result()

    def load_async(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        priority: float = Priority.DEMAND,
        deadline: float | None = None,
        layers: int | None = None,
        hint: Hint | None = None,
    ) -> Load:
        """Begin to restore the longest stored run of leading blocks, the first layers first.

        Args:
            spec: see `load`.
            keys: see `load`.
            accept: see `match`.
            priority: see `kvlib.store.work.Priority`.
            deadline: see `load`.
            layers: layers that become ready together; None for an eighth of them.
            hint: see `load`.

        Returns:
            What to wait for: `Load.wait_layer`, `Load.result`, `Load.cancel`.

        Raises:
            ConfigError: the model has recurrent layers.
        """
        group = lcm(*(codec.caps(spec).layer_group for codec in self._codecs.values()))
        step = max(layers or -(-spec.num_layers // _LAYER_BATCHES), 1)
        step = -(-step // group) * group
        return self._load(
            spec, keys, accept, step, priority, deadline, reader=self._background_reader, hint=hint
        )

    def _load(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        accept: Sequence[str] | None,
        layers: int | None,
        priority: float,
        deadline: float | None,
        start: int = 0,
        reader: Reader | None = None,
        hint: Hint | None = None,
        *,
        apart: bool = False,
    ) -> Load:
        self._begin(spec)
        identities = self._identities(spec, accept)

        def look() -> list[Found]:
            self._leases.expire()
            run = self._directory.loadable_run(identities, keys)
            return [found for found in run if found.first + found.count > start]

        reader = reader or self._reader
        if hint is not None:
            later = reader is self._background_reader
            finished = partial(self._finished_later if later else self._finished, hint=hint)
            reader = replace(reader, finished=finished)
        return Load(
            reader,
            spec,
            look,
            len(keys),
            layers=layers,
            priority=priority,
            deadline=deadline,
            apart=apart,
        )

    def _finished(
        self, arrived: Sequence[Found], blocks: int, asked: int, hint: Hint | None = None
    ) -> None:
        self._count(loads=1, hit_blocks=blocks, missed_blocks=asked - blocks)
        keys = [found.key for found in arrived]
        with suppress(StoreClosedError):  # what has arrived is there all the same
            self._touch(keys, hint)
            self._offer(arrived)

    def _finished_later(
        self, arrived: Sequence[Found], blocks: int, asked: int, hint: Hint | None = None
    ) -> None:
        """The same for those who must not wait for a disk."""
        self._count(loads=1, hit_blocks=blocks, missed_blocks=asked - blocks)
        touch = partial(self._touch, [found.key for found in arrived], hint)
        with suppress(StoreClosedError):
            self._pool.submit(touch, priority=Priority.STORE)
            self._offer(arrived)

    def _offer(self, arrived: Sequence[Found]) -> None:
        """Let the disk have what was used and only memory has."""
        if self._memory is None or self.path is None:
            return
        keys = [x.key for x in arrived if x.identity.codec == self.codec_text]
        self._pool.submit(partial(self._writer.copy_down, keys), priority=Priority.STORE)

    def _spoilt(self, key: StoreKey) -> None:
        self._count(corrupt_records=1)
        self._drop(key)

    # -- writing

    def put(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        block: KVBlock,
        *,
        fidelity: str = EXACT,
        ttl: float | str | None = None,
        hint: Hint | None = None,
    ) -> PutReport:
        """Store the blocks of a prompt that are not stored yet.

        Args:
            spec: what the numbers mean.
            keys: of the prompt's blocks from its start, at least to the end of `block`.
            block: dense KV of all layers of the tokens [start, stop), both multiples of 64.
            fidelity: `EXACT`, or the lowest fidelity among the KV this was computed from
                (`Loaded.fidelity`).
            ttl: how long these blocks may be served; None for as long as the store says. Blocks
                that are stored already keep the time they have.
            hint: what is known of the next use, for the replacement policies.

        Returns:
            What was stored; want of room or a failing medium is counted, never raised.

        Raises:
            ConfigError: a bad `ttl`, or a model that does not have the store's heads, or is another
                than that of the profile in `abstracts=`.
            ShapeError: the block is not whole blocks, lacks layers, holds other heads, or goes
                beyond the keys.
            UnsupportedInputError: the codec cannot represent it.
        """
        self._begin(spec)
        self._writer.check(spec, keys, block)
        return self._write(spec, keys, block, fidelity, self._rules.terms(ttl, hint))

    def put_async(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        block: KVBlock,
        *,
        fidelity: str = EXACT,
        copy: bool = True,
        ttl: float | str | None = None,
        hint: Hint | None = None,
    ) -> Put:
        """Store blocks in the background; they are copied before this returns.

        Args:
            spec: see `put`.
            keys: see `put`.
            block: see `put`.
            fidelity: see `put`.
            copy: False gives the block away: nobody changes its CPU tensors any more.
            ttl: see `put`; it begins when they are written.
            hint: see `put`.

        Returns:
            What to wait for. Where `staging` has no room the blocks are dropped and counted, at
            once.

        Raises:
            ShapeError: see `put`. `UnsupportedInputError` comes with the result.
        """
        self._begin(spec)
        self._writer.check(spec, keys, block)
        terms = self._rules.terms(ttl, hint)
        size = block.nbytes
        if not self._staging.take(size):
            dropped = (block.stop - block.start) // BLOCK_TOKENS
            self._count(staging_drops=dropped)
            return Put(None, PutReport(dropped_blocks=dropped))
        try:
            mine = copied(block) if copy else block
            write = partial(self._write, spec, keys, mine, fidelity, terms)
            task = self._pool.submit(write, priority=Priority.STORE)
        except BaseException:
            self._staging.give(size)
            raise
        task.add_done_callback(lambda _: self._staging.give(size))
        return Put(task, None)

    @property
    def staging_left(self) -> int:
        """Bytes that `put_async` has room for now."""
        return self._staging.left

    def _write(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        block: KVBlock,
        fidelity: str,
        terms: Terms,
    ) -> PutReport:
        self._leases.expire()
        identities = self._identities(spec, (fidelity,))
        report = self._writer.put(spec, keys, block, forms_of(identities, self._codecs, terms))
        self._count(stored_blocks=report.stored_blocks)
        if fidelity == EXACT and not report.dropped_blocks:
            self._put_made(spec, keys, block, terms)
        self._relief.look()
        return report

    # -- upkeep

    def stats(self) -> StoreStats:
        """A snapshot of the counters of the store and its tiers."""
        device = {} if self._device is None else {self._device.name: self._device.stats()}
        with self._lock:
            tiers = {tier.name: tier.stats() for tier in self._stack.tiers}
            return replace(self._stats, tiers=device | tiers)

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
        self._ending.close()
        if self._device is not None:
            self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
