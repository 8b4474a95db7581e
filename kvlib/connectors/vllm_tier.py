# SPDX-License-Identifier: Apache-2.0
"""`KvlibTier`: kvlib's tiers behind vLLM's own offloading (`OffloadingConnector`).

vLLM copies chunks of KV between the device and a CPU tier of its own, and knows hybrid models,
tensor parallelism and preemption. This is the tier behind it: whatever vLLM puts into its CPU tier
comes here too, and what has left that tier is fetched from here, verified.

All methods run on the scheduler's thread and only look at what other threads have left there: no
method touches a disk, and but for `drain_jobs` and `shutdown` none waits. A chunk that cannot be
had is a chunk that was never stored: vLLM computes it again.
"""

import json
import logging
import threading
from collections.abc import Iterable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

import numpy as np
import torch
from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvlib.connectors.chunks import ChunkStore, Row
from kvlib.connectors.tier_options import TierOptions
from kvlib.connectors.vllm_config import check_version
from kvlib.model_spec import model_id_text, origin_identity
from kvlib.store.rules import Rules
from kvlib.store.work import Priority, WorkPool

__all__ = ["COUNTERS", "GAUGES", "KvlibTier"]

if TYPE_CHECKING:
    from kvlib.store.tier import TierStats

_LOG = logging.getLogger(__name__)
_PREFIX = "vllm:kvlib_tier_"

COUNTERS = {
    "hits": "Chunks read from a medium and verified.",
    "misses": "Chunks asked of a medium that it did not have.",
    "corrupt": "Damaged records: found, counted as a miss, and dropped.",
    "timeouts": "Reads that a medium was asked for too late.",
    "errors": "Reads and writes that a medium failed.",
    "puts": "Chunks written.",
    "duplicates": "Chunks that were there already.",
    "rejected": "Chunks not stored for want of room.",
    "evicted": "Chunks dropped to make room.",
    "expired": "Chunks dropped because their time was over.",
    "read_bytes": "Bytes read, encoded.",
    "written_bytes": "Bytes written, encoded.",
}
"""What is counted of each medium (label `medium`)."""

GAUGES = {
    "records": "Chunks held.",
    "used_bytes": "Bytes held.",
    "capacity_bytes": "Bytes that may be held.",
}
"""What is told of each medium (label `medium`)."""

_OWN = {
    "lookups_late": "Chunks given up because the tier did not answer in time.",
    "promotions_late": "Promotions given up because their chunks did not come in time.",
    "undecodable": "Chunks that were read whole and could not be decoded; they were dropped.",
    "failures": "Unexpected errors in the tier's threads; each was a miss or a dropped store.",
}


def _page_layout(config: Any) -> str:
    """What decides the order of bytes within a page, beside what vLLM's own namespace has."""
    if not current_platform.is_cpu():
        return f"{current_platform.device_name} {config.kv_cache_layout}"
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype = getattr(torch, config.model.dtype, torch.uint8)
    sizes = sorted({group.tokens_per_block for group in config.groups})
    return f"cpu {[_get_attn_isa(dtype, size) for size in sizes]} {config.kv_cache_layout}"


def _identity(spec: Any, options: TierOptions, nbytes: int) -> str:
    """All that makes the bytes of two engines differ for the same tokens.

    Raises:
        ConfigError: the weights cannot be identified.
    """
    config = spec.config
    own = FileMapper.from_offloading_spec(
        root_dir="",
        offloading_spec=spec,
        blocks_per_file=spec.blocks_per_chunk,
        parallel_agnostic=True,
    ).get_run_config()  # what vLLM's own file tier takes for the same
    name = config.model.name
    if options.model_id:
        own["model_name"] = model_id_text(options.model_id)
    else:
        own["model_name"] = origin_identity(name, None, f"the model {name!r}")
    own["engine"] = "vllm " + ".".join(vllm_version.split(".")[:2])
    own["pages"] = _page_layout(config)
    own["nbytes"] = nbytes
    own["salt"] = options.salt
    return json.dumps(own, sort_keys=True)


class _Job:
    """A job of vLLM's, whose chunks are moved one by one by any thread. Used under a lock."""

    def __init__(self, job: TransferJob, deadline: float) -> None:
        self.id = job.job_id
        self.keys = list(job.keys)
        self.is_promotion = job.is_promotion
        self.begun = monotonic()
        self.deadline = self.begun + deadline
        self.left = len(self.keys)
        self.done: set[OffloadKey] = set()
        self.writing = 0
        """Threads that write into vLLM's memory now."""
        self.over = False
        """Its result was given: vLLM's memory is no longer ours."""


class _Lookups(AsyncLookupManager):  # type: ignore[misc]
    """vLLM's own queue of look-ups and its thread."""

    def __init__(self, chunks: ChunkStore, tier_type: str) -> None:
        self._chunks = chunks
        self._busy_since: float | None = None
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        """On a thread of its own."""
        self._busy_since = monotonic()
        try:
            return self._chunks.contains(keys)
        finally:
            self._busy_since = None

    def hangs(self, seconds: float) -> bool:
        """Whether the medium has not answered for so long."""
        since = self._busy_since
        return since is not None and monotonic() - since > seconds


class KvlibTier(SecondaryTierManager):  # type: ignore[misc]
    """See the module; `TierOptions` has the options.

    Args:
        offloading_spec: vLLM's description of the chunks.
        primary_kv_view: vLLM's CPU tier, [chunks, bytes].
        tier_type: the name in the configuration.
        backpressure_detector: vLLM's.
        options: see `TierOptions`.

    Raises:
        ConfigError: an option that cannot be, or weights that cannot be identified.
        EngineVersionError: another vLLM than was tested.
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **options: Any,
    ) -> None:
        check_version()
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._options = chosen = TierOptions.parse(options)
        self.locality = None if chosen.locality is None else Locality(chosen.locality)
        config = offloading_spec.config
        # Behind the pages, a row is filled up with bytes that mean nothing.
        copies = 1 if offloading_spec.replicated_layout else config.parallel.world_size
        pages = config.worker_kv_bytes_per_block * config.cache.blocks_per_chunk * copies
        self._nbytes = min(pages, self.block_size_bytes)
        identity = _identity(offloading_spec, chosen, self._nbytes)
        rules = Rules(salt=chosen.salt, ttl=chosen.ttl, quota=chosen.quota)
        tiers = chosen.open_tiers()
        self._chunks = ChunkStore(
            tiers,
            identity=identity,
            dtype=config.model.dtype,
            nbytes=self._nbytes,
            codec=chosen.codec,
            rules=rules,
        )
        self._pool = WorkPool(int(chosen.threads), "kvlib-tier")
        self._lookups = _Lookups(self._chunks, tier_type)
        self._changed = threading.Condition()
        # Under its lock:
        self._jobs: dict[int, _Job] = {}  # whose result was not given
        self._overdue: set[_Job] = set()  # given up, and a thread still waits for the medium
        self._results: list[tuple[_Job, JobResult]] = []
        self._counts = dict.fromkeys(_OWN, 0)
        self._stats: dict[str, TierStats] = {}
        self._closed = False
        # The scheduler's alone:
        self._asked: dict[str, float] = {}  # since when a request waits for look-ups
        self._told: dict[tuple[str, str], int] = {}
        self._events: list[OffloadingEvent] | None = None
        if chosen.enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events:
            self._events = []

    # -- looking up

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Chunk by chunk, as they are computed."""
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """At once: RETRY until the answer is there, MISS if it does not come in time."""
        found = self._lookups.lookup(key, req_context)
        hangs = bool(self._overdue) or self._lookups.hangs(self._options.deadline)
        if found is None and not hangs:
            since = self._asked.setdefault(req_context.req_id, monotonic())
            if monotonic() - since <= self._options.deadline:
                return LookupResult.RETRY
        if found is None or (found and hangs):  # do without it
            self._count("lookups_late")
            return LookupResult.MISS
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Begin the look-ups of this step."""
        self._lookups.flush()
        for request in context.new_req_ids:
            self._asked.pop(request, None)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget what it looked up."""
        self._asked.pop(req_context.req_id, None)
        self._lookups.cleanup(req_context.req_id)

    # -- moving chunks

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to copy chunks out of vLLM's memory."""
        self._submit(job_metadata, self._store, Priority.STORE)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to fetch chunks into vLLM's memory."""
        self._submit(job_metadata, self._load, Priority.DEMAND)

    def _submit(self, metadata: TransferJob, move: Any, priority: Priority) -> None:
        job = _Job(metadata, self._options.deadline)
        moves = list(zip(job.keys, map(int, metadata.chunk_ids), strict=True))
        with self._changed:
            self._jobs[job.id] = job
            if self._closed or not moves:
                self._finish(job)
                return
        if not job.is_promotion:
            moves.reverse()  # the end of a prompt is stored first, and dropped first
        for key, chunk in moves:
            self._pool.submit(partial(self._run, job, key, chunk, move), priority=priority)

    def _run(self, job: _Job, key: OffloadKey, chunk: int, move: Any) -> None:
        moved = False
        try:
            moved = not job.over and move(job, key, chunk)
        except Exception:  # noqa: BLE001 (whatever it is: a chunk that is not there)
            self._count("failures")
            _LOG.exception("a chunk could not be moved")
        self._ran(job, key, moved=moved)

    def _ran(self, job: _Job, key: OffloadKey, *, moved: bool) -> None:
        with self._changed:
            job.left -= 1
            if moved and not job.over:
                job.done.add(key)
            if job.left:
                return
            self._overdue.discard(job)
        stats: dict[str, TierStats] = {}
        try:
            if job.is_promotion:
                self._chunks.touch([key for key in job.keys if key in job.done])
            stats = self._chunks.stats()
        finally:
            with self._changed:
                self._stats = stats or self._stats
                if not job.over:
                    self._finish(job)

    def _finish(self, job: _Job) -> None:
        """Give a job's result (locked)."""
        job.over = True
        del self._jobs[job.id]
        success = len(job.done) == len(set(job.keys))
        partly = tuple(job.done) if job.is_promotion and job.done and not success else None
        result = JobResult(
            job_id=job.id,
            success=success,
            successful_keys=partly,
            transfer_time=monotonic() - job.begun,
            transfer_bytes=len(job.done) * self.block_size_bytes,
        )
        self._results.append((job, result))
        self._changed.notify_all()

    def _row(self, chunk: int) -> Row:
        # A new view each time: vLLM releases its memory when nothing refers to it any more.
        return np.asarray(self._primary_kv_view)[chunk, : self._nbytes].view(np.uint8)

    def _store(self, job: _Job, key: OffloadKey, chunk: int) -> bool:
        return self._chunks.put(key, self._row(chunk))

    def _load(self, job: _Job, key: OffloadKey, chunk: int) -> bool:
        record = self._chunks.read(key, job.deadline)
        if record is None:
            return False
        with self._changed:
            if job.over:
                return False
            job.writing += 1
        try:
            return self._chunks.unpack(key, record, self._row(chunk))
        finally:
            with self._changed:
                job.writing -= 1

    def _give_up(self) -> None:
        """End promotions that take too long; none whose chunks are being written now (locked)."""
        now = monotonic()
        for job in list(self._jobs.values()):
            if job.is_promotion and now > job.deadline and not job.writing:
                self._counts["promotions_late"] += 1
                self._overdue.add(job)
                self._finish(job)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """What came to an end since it was last asked, and what was given up."""
        with self._changed:
            self._give_up()
            finished, self._results = self._results, []
        for job, result in finished:
            if job.is_promotion and not result.success:
                # Else the same promotion would be tried again and again.
                self._lookups.mark_miss([key for key in job.keys if key not in job.done])
            if not job.is_promotion and job.done and self._events is not None:
                stored = [key for key in job.keys if key in job.done]
                self._events.append(
                    OffloadingEvent(
                        keys=stored, medium=self.medium, removed=False, locality=self.locality
                    )
                )
        return [result for _, result in finished]

    def drain_jobs(self) -> None:
        """Wait for all jobs; vLLM is about to forget its CPU tier."""
        with self._changed:
            while self._jobs:
                self._give_up()
                self._changed.wait(0.1)
        if self._options.on_reset == "forget":
            self._chunks.forget(uuid4().hex)

    # -- telling

    def _count(self, name: str) -> None:
        with self._changed:
            self._counts[name] += 1

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Of chunks stored; those dropped are not told."""
        events = self._events or []
        if events:
            self._events = []
        return events

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """See `COUNTERS` and `GAUGES`."""
        out: dict[str, OffloadingMetricMetadata] = {
            _PREFIX + name: OffloadingCounterMetadata(text, ("medium",))
            for name, text in COUNTERS.items()
        }
        for name, text in GAUGES.items():
            out[_PREFIX + name] = OffloadingGaugeMetadata(text, ("medium",))
        for name, text in _OWN.items():
            out[_PREFIX + name] = OffloadingCounterMetadata(text)
        return out

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What has happened since it was last asked, as far as the threads have told."""
        out = OffloadingConnectorStats()
        with self._changed:
            stats, own = self._stats, dict(self._counts)
        own["undecodable"] = self._chunks.corrupt
        for medium, held in stats.items():
            for name in COUNTERS:
                self._tell(out, name, medium, getattr(held, name))
            for name in GAUGES:
                out.set_gauge(_PREFIX + name, getattr(held, name) or 0, (medium,))
        for name, value in own.items():
            self._tell(out, name, "", value)
        return None if out.is_empty() else out

    def _tell(self, out: OffloadingConnectorStats, name: str, medium: str, value: int) -> None:
        more = value - self._told.get((name, medium), 0)
        if more > 0:  # a put that failed late is taken back; Prometheus does not take it back
            self._told[name, medium] = value
            out.increase_counter(_PREFIX + name, more, (medium,) if medium else ())

    # -- the end

    def shutdown(self) -> None:
        """Store what is queued, for as long as the deadline allows, and close everything."""
        with self._changed:
            if self._closed:
                return
            self._changed.wait_for(lambda: not self._jobs, self._options.deadline)
            self._closed = True
            for job in list(self._jobs.values()):
                self._finish(job)  # what is in the queue is not begun any more
        self._lookups.shutdown()
        self._pool.close()  # waits for what has begun: it may be using vLLM's memory
        self._chunks.close()
