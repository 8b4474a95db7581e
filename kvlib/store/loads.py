# SPDX-License-Identifier: Apache-2.0
"""A load under way: records are read, then decoded layer after layer, by the store's threads.

The run of leading blocks that a load will give is known only in the end: a record that cannot be
read, verified or decoded ends it there. Until then the run only ever becomes shorter.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic, perf_counter

from torch import Tensor  # noqa: TC002 (an annotation that dataclasses read)

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec
from kvlib.codecs.container import Container
from kvlib.codecs.unpack import decode_block
from kvlib.errors import CapacityError, CodecError, ShapeError, StoreClosedError
from kvlib.keys import BLOCK_TOKENS, StoreKey
from kvlib.spec import KVSpec
from kvlib.store.cost import CostModel
from kvlib.store.directory import Found
from kvlib.store.records import allocate, is_dense
from kvlib.store.reports import Loaded
from kvlib.store.stack import TierStack
from kvlib.store.work import Priority, Task, WorkPool

__all__ = ["Load", "Reader", "load_pieces"]

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Record:
    """What has become of one record of a load."""

    found: Found
    tasks: list[Task[None]] = field(default_factory=list)
    batches: int = 0
    """Leading batches of layers that are decoded."""
    decoded: set[int] = field(default_factory=set)
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reader:
    """What loads need of a store.

    Attributes:
        corrupt: told of a record that verified but did not decode; it drops it.
        shared: told of a read that another load's gave.
        finished: told the records that arrived, how many blocks they hold and how many were asked.
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


class Load:
    """Leading blocks of a prompt on their way; from `KVStore.load_async`.

    Args:
        reader: the store's.
        spec: what the numbers mean.
        run: the records, in order.
        asked: blocks that were asked for.
        layers: layers to decode at a time; None for all at once.
        priority: see `kvlib.store.work.Priority`.
        deadline: `time.monotonic()` after which to end with what has arrived.

    Attributes:
        tensors: keys and values of each layer, [Hkv, T, D] on the CPU, with room for all blocks
            that may arrive. What `wait_layer` counts is there; the rest is undefined.
    """

    def __init__(
        self,
        reader: Reader,
        spec: KVSpec,
        run: Sequence[Found],
        asked: int,
        *,
        layers: int | None,
        priority: float,
        deadline: float | None,
    ) -> None:
        self._reader = reader
        self._spec = spec
        self._asked = asked
        self._priority = priority
        self._number = reader.pool.number()  # older loads are finished before newer ones begin
        self._deadline = deadline
        self._changed = threading.Condition()
        self._ending = threading.Lock()
        self._records = [_Record(found) for found in run]
        self._origin = run[0].first if run else 0
        self._limit = len(run)
        self._result: Loaded | None = None
        step = layers or spec.num_layers
        self._batches = [
            range(at, min(at + step, spec.num_layers)) for at in range(0, spec.num_layers, step)
        ]
        self.tensors: list[tuple[Tensor, Tensor]] = allocate(
            spec, sum(found.count for found in run) * BLOCK_TOKENS
        )
        for i in range(len(run)):
            self._submit(i, partial(self._read, i), i / max(len(run), 1))

    # -- what the threads do

    def _submit(self, i: int, call: Callable[[], None], later: float) -> None:
        """Queue a task of a record; if it is never begun, the run ends before that record."""
        me = weakref.ref(self)  # else tasks, their callbacks and the tensors keep each other

        def ended(task: Future[None]) -> None:
            load = me()
            if load is not None and (task.cancelled() or task.exception() is not None):
                load._end_at(i)
            if not task.cancelled() and task.exception() is not None:
                _LOG.error("a load failed unexpectedly", exc_info=task.exception())

        try:
            task = self._reader.pool.submit(
                call,
                priority=self._priority,
                deadline=self._deadline,
                order=(self._number, later),
            )
        except StoreClosedError:
            self._end_at(i)
            return
        self._records[i].tasks.append(task)
        task.add_done_callback(ended)

    def _end_at(self, i: int) -> None:
        with self._changed:
            self._limit = min(self._limit, i)
            self._changed.notify_all()

    def _late(self) -> bool:
        return self._deadline is not None and monotonic() > self._deadline

    def _read(self, i: int) -> None:
        record = self._records[i]
        found = record.found
        if i >= self._limit:
            return
        data, shared = self._reader.tiers.read(found.key, self._deadline)
        if shared:
            self._reader.shared()
        if data is None or self._late():
            self._end_at(i)
            return
        first = found.first * BLOCK_TOKENS
        try:
            container = Container(data, mac_key=self._reader.mac_key, verified=True)
            header = container.header
            if header.keys != found.held:  # evicted, and written again with other blocks
                self._reader.forget(found.key)
                self._end_at(i)
                return
            if (header.start, header.num_tokens) != (first, len(found.held) * BLOCK_TOKENS):
                raise ShapeError(f"record of tokens {header.start}+{header.num_tokens}")
            if [s.layer_idx for s in header.layers] != list(range(self._spec.num_layers)):
                raise ShapeError(f"record of {len(header.layers)} layers")
        except (CodecError, ShapeError):
            self._spoilt(i)
            return
        record.stored_bytes = len(data)
        batches = self._batches
        whole = found.count == len(found.held)
        if len(batches) == 1 or not whole:
            self._decode(i, container, None)
            return
        for at, batch in enumerate(batches):
            later = 1 + at + i / max(len(self._records), 1)
            self._submit(i, partial(self._decode, i, container, batch), later)

    def _spoilt(self, i: int) -> None:
        self._reader.corrupt(self._records[i].found.key)
        self._end_at(i)

    def _decode(self, i: int, container: Container, batch: range | None) -> None:
        """Decode some layers of a record into their place, or all."""
        if i >= self._limit or self._late():
            self._end_at(i)
            return
        found = self._records[i].found
        first = found.first * BLOCK_TOKENS
        last = first + found.count * BLOCK_TOKENS
        place = slice(first - self._origin * BLOCK_TOKENS, last - self._origin * BLOCK_TOKENS)
        wanted = range(self._spec.num_layers) if batch is None else batch
        views = {j: tuple(x[:, place] for x in self.tensors[j]) for j in wanted}
        whole = found.count == len(found.held)
        begun = perf_counter()
        try:
            block = decode_block(
                container,
                self._spec,
                codec_for=self._reader.codec_for,
                layers=batch,
                out=views if whole else None,  # type: ignore[arg-type]
            )
            if any(not is_dense(layer) for layer in block.layers):
                raise ShapeError("record of evicted tokens under a prefix key")
        except CapacityError:  # there is no memory now: the record is as good as before
            self._end_at(i)
            return
        except (CodecError, ShapeError):
            self._spoilt(i)
            return
        self._reader.cost.decode(block.nbytes, perf_counter() - begun)
        if not whole:
            for layer in block.slice(first, last).layers:
                for to, source in zip(
                    views[layer.layer_idx], (layer.keys, layer.values), strict=True
                ):
                    to.copy_(source)
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
        """Leading blocks that may still arrive, or did."""
        with self._changed:
            return self._blocks()

    def _blocks(self) -> int:
        return sum(record.found.count for record in self._records[: self._limit])

    def _arrived(self, batches: int) -> int:
        """Leading records of which so many batches of layers are there."""
        for i, record in enumerate(self._records[: self._limit]):
            if record.batches < batches:
                return i
        return self._limit

    def done(self) -> bool:
        """Whether `result` returns at once."""
        with self._changed:
            return self._arrived(len(self._batches)) == self._limit

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
        """
        if not 0 <= layer_idx < self._spec.num_layers:
            raise ShapeError(f"layer {layer_idx} of a model with {self._spec.num_layers} layers")
        batches = layer_idx // len(self._batches[0]) + 1
        with self._changed:
            self._changed.wait_for(
                lambda: self._arrived(batches) == self._limit, self._patience(timeout)
            )
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
        with self._changed:
            self._limit = self._arrived(len(self._batches))
            self._changed.notify_all()
        for record in self._records:
            for task in record.tasks:
                task.cancel()

    def result(self, timeout: float | None = None) -> Loaded:
        """Wait for all of it.

        Args:
            timeout: seconds to wait at most; then it ends with the blocks that are there.

        Returns:
            See `KVStore.load`.
        """
        last = len(self._batches)
        with self._changed:
            self._changed.wait_for(
                lambda: self._arrived(last) == self._limit, self._patience(timeout)
            )
        with self._ending:
            if self._result is None:
                self.cancel()
                self._result = self._end()
            return self._result

    def _end(self) -> Loaded:
        arrived = self._records[: self._limit]
        blocks = self._blocks()
        for record in self._records:
            record.tasks.clear()
        self._reader.finished([record.found for record in arrived], blocks, self._asked)
        if not blocks:
            return Loaded()
        tokens = blocks * BLOCK_TOKENS
        out = self.tensors
        if tokens < out[0][0].shape[1]:  # give the rest back
            out = [(k[:, :tokens].clone(), v[:, :tokens].clone()) for k, v in out]
        worst = max((record.found.identity for record in arrived), key=lambda x: x.rank)
        return Loaded(
            num_blocks=blocks,
            block=KVBlock.dense(self._spec, out, start=self._origin * BLOCK_TOKENS),
            fidelity=worst.fidelity,
            stored_bytes=sum(record.stored_bytes for record in arrived),
        )


def load_pieces(reader: Reader, spec: KVSpec, run: Sequence[Found], asked: int) -> Iterator[Loaded]:
    """Load a run record by record, the next one while the caller has the last."""
    given: list[Found] = []
    quiet = replace(reader, finished=lambda *_: None)  # counted and touched as one load, at the end

    def begin(found: Found) -> Load:
        return Load(
            quiet,
            spec,
            [found],
            found.count,
            layers=None,
            priority=Priority.DEMAND,
            deadline=None,
        )

    coming = begin(run[0]) if run else None
    try:
        for i, found in enumerate(run):
            load, coming = coming, begin(run[i + 1]) if i + 1 < len(run) else None
            loaded = Loaded() if load is None else load.result()
            if not loaded.num_blocks:
                break
            given.append(found)
            yield loaded
    finally:
        if coming is not None:
            coming.cancel()
        reader.finished(given, sum(found.count for found in given), asked)
