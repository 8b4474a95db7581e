# SPDX-License-Identifier: Apache-2.0
"""A load under way: records are found, read, then decoded layer by layer, by the store's threads.

The run of leading blocks that a load will give is known only in the end: a record that cannot be
read, verified or decoded ends it there. Until then the run only ever becomes shorter.

With a `DeviceTier` blocks land on its device: copied from what it holds, or decoded into the host's
memory and copied from there, once into the result and once into the tier. What is handed out is
never what the tier holds.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec
from kvlib.codecs.container import Container
from kvlib.codecs.unpack import decode_block, lies_in
from kvlib.errors import CapacityError, CodecError, ShapeError, StoreClosedError
from kvlib.keys import BLOCK_TOKENS, StoreKey
from kvlib.spec import KVSpec
from kvlib.store.cost import CostModel
from kvlib.store.directory import Found
from kvlib.store.heads import HeadRange, local_spec
from kvlib.store.memory import Opened
from kvlib.store.records import Layers, allocate, copy_layers, is_dense
from kvlib.store.reports import Loaded
from kvlib.store.stack import TierStack
from kvlib.store.work import Task, WorkPool

if TYPE_CHECKING:
    from kvlib.store.device import DeviceTier, Slot
    from kvlib.store.reform import Reform

__all__ = ["Load", "Reader"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Record:
    """What has become of one record of a load."""

    found: Found
    batches: int = 0
    """Leading batches of layers that are decoded."""
    decoded: set[int] = field(default_factory=set)
    stored_bytes: int = 0
    block: KVBlock | None = None
    """What it holds, of loads whose records stay apart."""
    reform: bool = False
    """Whether it goes into memory in another form."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What loads need of a store.

    Attributes:
        corrupt: told of a record that verified but did not decode; it drops it.
        shared: told of a read that another load's gave.
        finished: told the records that arrived, how many blocks they hold and how many were asked.
        device: where blocks go, None for the CPU.
        head_range: KV heads that records hold.
        reform: brings into memory what was read elsewhere, in another form; None: as it is.
    """

    tiers: TierStack
    pool: WorkPool
    cost: CostModel
    codec_for: Callable[[str], Codec]
    mac_key: bytes | None
    forget: Callable[[StoreKey], None]
    corrupt: Callable[[StoreKey], None]
    shared: Callable[[], None]
    finished: Callable[[Sequence[Found], int, int], None]
    device: "DeviceTier | None" = None
    head_range: HeadRange = None
    reform: "Reform | None" = None


class Load:
    """Leading blocks of a prompt on their way; from `KVStore.load_async`.

    Args:
        reader: the store's.
        spec: what the numbers mean.
        look: finds the records, in order; one of the store's threads calls it, since it may read
            the disk.
        asked: blocks that were asked for.
        layers: layers to decode at a time; None for all at once.
        priority: see `kvlib.store.work.Priority`.
        deadline: `time.monotonic()` after which to end with what has arrived.
        apart: give each record's blocks by themselves, and those that memory holds uncoded as they
            lie there; only for a store on the CPU, and for all layers at once.

    Attributes:
        tensors: after `wait_layer`: keys and values of each layer, [Hkv, T, D] on the CPU or the
            store's device, with room for all blocks that may arrive. What `wait_layer` counts is
            there; the rest is undefined.
    """

    def __init__(
        self,
        reader: Reader,
        spec: KVSpec,
        look: Callable[[], Sequence[Found]],
        asked: int,
        *,
        layers: int | None,
        priority: float,
        deadline: float | None,
        apart: bool = False,
    ) -> None:
        self._reader = reader
        self._apart = apart
        self._spec = spec
        self._shapes = local_spec(spec, reader.head_range)
        self._look = look
        self._asked = asked
        self._priority = priority
        self._number = reader.pool.number()  # older loads are finished before newer ones begin
        self._deadline = deadline
        self._changed = threading.Condition()
        self._ending = threading.Lock()
        self._tasks: list[Task[bool]] = []
        self._records: list[_Record] = []
        self._found = False
        """Whether `_records` is what it will be."""
        self._limit = 0
        self._result: Loaded | None = None
        step = layers or spec.num_layers
        self._batches = [
            range(at, min(at + step, spec.num_layers)) for at in range(0, spec.num_layers, step)
        ]
        self._stream = None if reader.device is None else reader.device.caller_stream()
        self.tensors: list[tuple[Tensor, Tensor]] = self._allocate(0)
        self._submit(0, self._find, -1.0)

    def _allocate(self, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        device = self._reader.device
        if device is None:
            return allocate(self._shapes, num_tokens)
        return device.allocate(self._shapes, num_tokens, self._stream)

    # -- what the threads do

    def _submit(
        self, i: int, call: Callable[[], bool], later: float, slot: "Slot | None" = None
    ) -> None:
        """Queue a task of a record; if it is never begun, the run ends before that record.

        Args:
            i: the record.
            call: the task; False if it came to nothing.
            later: its place among the tasks of this load.
            slot: told if it came to nothing.
        """
        me = weakref.ref(self)  # else tasks, their callbacks and the tensors keep each other

        def ended(task: Future[bool]) -> None:
            error = None if task.cancelled() else task.exception()
            fine = not task.cancelled() and error is None and task.result()
            if slot is not None and not fine:
                slot.failed()
            load = me()
            if load is not None and (task.cancelled() or error is not None):
                load._end_at(i)
            if error is not None:
                _LOG.error("a load failed unexpectedly", exc_info=error)

        try:
            task = self._reader.pool.submit(
                call,
                priority=self._priority,
                deadline=self._deadline,
                order=(self._number, later),
            )
        except StoreClosedError:
            if slot is not None:
                slot.failed()
            self._end_at(i)
            return
        self._tasks.append(task)
        task.add_done_callback(ended)

    def _end_at(self, i: int) -> bool:
        """End the run before record i; False, for tasks to return."""
        with self._changed:
            self._limit = min(self._limit, i)
            self._found = True
            self._changed.notify_all()
        return False

    def _late(self) -> bool:
        return self._deadline is not None and monotonic() > self._deadline

    def _find(self) -> bool:
        """Find the records, and make room for what they hold."""
        if self._found:  # given up
            return False
        run = self._look()
        blocks = 0 if self._apart else sum(found.count for found in run)
        tensors = self._allocate(blocks * BLOCK_TOKENS)
        with self._changed:
            if self._found:
                return False
            self._records = [_Record(found) for found in run]
            self._limit = len(run)
            self.tensors = tensors
            self._found = True
            self._changed.notify_all()
        for i in range(len(run)):
            self._submit(i, partial(self._read, i), i / len(run))
        return True

    def _read(self, i: int) -> bool:
        record = self._records[i]
        found = record.found
        if i >= self._limit:
            return False
        reader = self._reader
        if reader.device is not None and reader.device.fetch(
            found.key, found.held, self._views(i, range(self._spec.num_layers))
        ):
            self._decoded(i, None)
            return True
        if self._apart:
            opened = reader.tiers.opened(found.key, self._deadline)
            if opened is not None and opened.keys == found.held:
                record.stored_bytes = opened.nbytes
                self._take(i, opened.block)
                return True
        record.reform = reader.reform is not None and reader.reform.wants(found)
        data, shared = reader.tiers.read(found.key, self._deadline, up=not record.reform)
        if shared:
            reader.shared()
        if data is None or self._late():
            if data is None and not self._late():
                reader.forget(found.key)  # what was remembered of it is no longer so
            return self._end_at(i)
        first = found.first * BLOCK_TOKENS
        try:
            container = Container(data, mac_key=reader.mac_key, verified=True)
            header = container.header
            if header.keys != found.held:  # evicted, and written again with other blocks
                reader.forget(found.key)
                return self._end_at(i)
            if (header.start, header.num_tokens) != (first, len(found.held) * BLOCK_TOKENS):
                raise ShapeError(f"record of tokens {header.start}+{header.num_tokens}")
            if header.head_range != reader.head_range:
                raise ShapeError(f"record of heads {header.head_range}")
            heads = [(i, layer.num_kv_heads) for i, layer in enumerate(self._shapes.layers)]
            if [(s.layer_idx, s.num_kv_heads) for s in header.layers] != heads:
                raise ShapeError(f"record of {len(header.layers)} layers, or of other heads")
        except (CodecError, ShapeError):
            return self._spoilt(i)
        record.stored_bytes = len(data)
        whole = found.count == len(found.held) and not self._apart
        batches = self._batches if whole else [None]
        slot = None
        terms = None if reader.device is None else reader.tiers.terms(found.key)
        if reader.device is not None and whole and terms is not None:
            slot = reader.device.reserve(
                found.key, found.held, self._shapes, parts=len(batches), ttl=terms.ttl
            )
        if len(batches) == 1:
            fine = False
            try:
                fine = self._decode(i, container, batches[0], slot)
            finally:
                if slot is not None and not fine:
                    slot.failed()
            return fine
        for at, batch in enumerate(batches):
            later = 1 + at + i / len(self._records)
            self._submit(i, partial(self._decode, i, container, batch, slot), later, slot)
        return True

    def _spoilt(self, i: int) -> bool:
        self._reader.corrupt(self._records[i].found.key)
        return self._end_at(i)

    def _views(self, i: int, layers: Iterable[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Where layers of a record go."""
        found = self._records[i].found
        first = (found.first - self._records[0].found.first) * BLOCK_TOKENS
        place = slice(first, first + found.count * BLOCK_TOKENS)
        return {j: (k[:, place], v[:, place]) for j in layers for k, v in [self.tensors[j]]}

    def _decode(
        self, i: int, container: Container, batch: range | None, slot: "Slot | None"
    ) -> bool:
        """Decode some layers of a record into their place, or all of one that is used in part."""
        if i >= self._limit or self._late():
            return self._end_at(i)
        found = self._records[i].found
        device = self._reader.device
        layers = range(self._spec.num_layers) if batch is None else batch
        views = {} if self._apart else self._views(i, layers)
        room: Layers | None = None if batch is None else views
        if device is not None and batch is not None:
            room = device.staging(self._shapes, layers, len(found.held) * BLOCK_TOKENS)
        begun = perf_counter()
        try:
            block = decode_block(
                container,
                self._spec,
                codec_for=self._reader.codec_for,
                layers=batch,
                out=room,
                lend=self._apart,
            )
            if any(not is_dense(layer) for layer in block.layers):
                raise ShapeError("record of evicted tokens under a prefix key")
        except CapacityError:  # there is no memory now: the record is as good as before
            return self._end_at(i)
        except (CodecError, ShapeError):
            return self._spoilt(i)
        self._reader.cost.decode(block.nbytes, perf_counter() - begun)
        record = self._records[i]
        if record.reform and self._reader.reform is not None:
            self._reader.reform.begin(self._spec, found, block)
        if self._apart:
            if lies_in(block, container.view):
                opened = Opened(found.held, block, container.view.nbytes)
                self._reader.tiers.keep_open(found.key, container.view, opened)
            self._take(i, block)
            return True
        if room is not views:
            first = found.first * BLOCK_TOKENS
            ours = block.slice(first, first + found.count * BLOCK_TOKENS)
            source = {layer.layer_idx: (layer.keys, layer.values) for layer in ours.layers}
            if device is None:
                copy_layers(source, views)
            else:
                device.upload(source, views, slot)
                if slot is not None:
                    slot.filled()
        self._decoded(i, batch)
        return True

    def _take(self, i: int, block: KVBlock) -> None:
        """A whole record's blocks, of which ours are kept apart from those of the others."""
        found = self._records[i].found
        first = found.first * BLOCK_TOKENS
        self._records[i].block = block.slice(first, first + found.count * BLOCK_TOKENS)
        self._decoded(i, None)

    def _decoded(self, i: int, batch: range | None) -> None:
        """Some layers of a record are where they belong, or (None) all."""
        with self._changed:
            record = self._records[i]
            every = range(len(self._batches)) if batch is None else [self._batches.index(batch)]
            record.decoded.update(every)
            while record.batches in record.decoded:
                record.batches += 1
            self._changed.notify_all()

    # -- what the caller does

    @property
    def num_blocks(self) -> int:
        """Leading blocks that may still arrive, or did; all asked for, until they were found."""
        self._reader.pool.check_process()
        with self._changed:
            return self._blocks() if self._found else self._asked

    def _blocks(self) -> int:
        return sum(record.found.count for record in self._records[: self._limit])

    def _arrived(self, batches: int) -> int:
        """Leading records of which so many batches of layers are there."""
        for i, record in enumerate(self._records[: self._limit]):
            if record.batches < batches:
                return i
        return self._limit

    def _settled(self, batches: int) -> bool:
        """Whether so many batches of layers are there of all records that will arrive."""
        return self._found and self._arrived(batches) == self._limit

    def done(self) -> bool:
        """Whether `result` returns at once."""
        self._reader.pool.check_process()
        with self._changed:
            return self._settled(len(self._batches))

    def wait_layer(self, layer_idx: int, timeout: float | None = None) -> int:
        """Wait for a layer of all blocks that will arrive.

        Args:
            layer_idx: the layer; those before it are waited for, too.
            timeout: seconds to wait at most.

        Returns:
            The leading blocks whose keys and values of this and all earlier layers are in
            `tensors` now; later calls may return fewer, never more than this one would have after
            an endless wait.

        Raises:
            ShapeError: there is no such layer.
            StoreClosedError: in a forked child, which has none of the threads that would do it.
        """
        self._reader.pool.check_process()
        if not 0 <= layer_idx < self._spec.num_layers:
            raise ShapeError(f"layer {layer_idx} of a model with {self._spec.num_layers} layers")
        batches = layer_idx // len(self._batches[0]) + 1
        with self._changed:
            self._changed.wait_for(lambda: self._settled(batches), self._patience(timeout))
            arrived = self._records[: self._arrived(batches)]
            return sum(record.found.count for record in arrived)

    def _patience(self, timeout: float | None) -> float | None:
        """Seconds to wait at most: nobody waits beyond the deadline."""
        if self._deadline is None:
            return timeout
        left = max(self._deadline - monotonic(), 0.0)
        return left if timeout is None else min(left, timeout)

    def cancel(self) -> None:
        """Give up what has not arrived; `result` has what did."""
        self._reader.pool.check_process()
        with self._changed:
            self._limit = self._arrived(len(self._batches))
            self._found = True
            self._changed.notify_all()
        for task in list(self._tasks):
            task.cancel()

    def result(self, timeout: float | None = None) -> Loaded:
        """Wait for all of it.

        Args:
            timeout: seconds to wait at most; then it ends with the blocks that are there.

        Returns:
            See `KVStore.load`.

        Raises:
            StoreClosedError: see `wait_layer`.
        """
        self._reader.pool.check_process()
        last = len(self._batches)
        with self._changed:
            self._changed.wait_for(lambda: self._settled(last), self._patience(timeout))
        with self._ending:
            if self._result is None:
                self.cancel()
                self._result = self._end()
            return self._result

    def _end(self) -> Loaded:
        arrived = self._records[: self._limit]
        blocks = self._blocks()
        self._tasks.clear()
        self._reader.finished([record.found for record in arrived], blocks, self._asked)
        if not blocks:
            return Loaded()
        worst = max((record.found.identity for record in arrived), key=lambda x: x.rank)
        block = None
        if not self._apart:
            tokens = blocks * BLOCK_TOKENS
            out = self.tensors
            if tokens < out[0][0].shape[1]:  # give the rest back
                out = [(k[:, :tokens].clone(), v[:, :tokens].clone()) for k, v in out]
            block = KVBlock.dense(self._spec, out, start=arrived[0].found.first * BLOCK_TOKENS)
        return Loaded(
            num_blocks=blocks,
            block=block,
            blocks=tuple(x.block for x in arrived if x.block is not None),
            fidelity=worst.fidelity,
            ancestors=worst.ancestors,
            stored_bytes=sum(record.stored_bytes for record in arrived),
        )
