# SPDX-License-Identifier: Apache-2.0
"""`KvlibConnector`: prefixes of vLLM that persist, compressed and verified.

Named in vLLM's `--kv-transfer-config`; `kvlib connectors vllm` prints one. vLLM makes two of them,
one that the scheduler asks (`SchedulerHalf`: keys and accounts) and one in each worker
(`WorkerHalf`: a store and the pages); what one tells the other goes through vLLM's metadata, or
directly where both live in one process. A request whose prefix may be stored waits (the look-up
answers None) until the blocks lie verified in host memory: what is promised then is a copy in
memory.

Whatever goes wrong in here is a miss: the engine computes what it did not get.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from kvlib.connectors.config import ConnectorConfig
from kvlib.connectors.guard import guarded
from kvlib.connectors.vllm_config import check_config, check_version, spec_of
from kvlib.connectors.vllm_meta import KvlibMetadata, KvlibWorkerMetadata
from kvlib.connectors.vllm_scheduler import SchedulerHalf
from kvlib.connectors.vllm_stats import KvlibPromMetrics, KvlibStats
from kvlib.connectors.vllm_worker import WorkerHalf

__all__ = ["KvlibConnector"]

_LOG = logging.getLogger(__name__)


class KvlibConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See the module; options: `kvlib.connectors.config.ConnectorConfig`.

    Raises:
        EngineVersionError: another vLLM than was tested.
        ConfigError: an option, or something of vLLM's own configuration that this connector does
            not serve.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_version()
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        self.config = ConnectorConfig.parse(extra)
        check_config(vllm_config, kv_cache_config, self.config)
        self.spec = spec_of(vllm_config, self.config)
        self.counts: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()
        self.worker: WorkerHalf | None = None
        self.scheduler: SchedulerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            page_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
            self.scheduler = SchedulerHalf(
                vllm_config, self.config, self.spec, page_tokens, self.counts
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a save that is dropped is a later miss."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """See vLLM."""
        return KvlibStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        """See vLLM."""
        return KvlibPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # -- in a worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Test the layout of the engine's pages, and open the store; see `WorkerHalf`."""
        self.worker = WorkerHalf(self._vllm_config, self.config, self.spec, kv_caches)

    @guarded(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Let go of pages that are given to others in this step."""
        preempted = cast("KvlibMetadata", kv_connector_metadata).preempted
        if preempted and self.worker is not None:
            self.worker.mover.stop_saving(preempted)

    @guarded(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin what the scheduler's half asked for."""
        if self.worker is not None:
            self.worker.begin(cast("KvlibMetadata", self._get_connector_metadata()))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests are scheduled when they are loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: whole blocks are copied out after the step."""

    @guarded(lambda: None)
    def wait_for_save(self) -> None:
        """Begin to copy out the blocks that this step completed."""
        if self.worker is not None:
            self.worker.save(cast("KvlibMetadata", self._get_connector_metadata()))

    @guarded(lambda: (None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose pages are copied out, and whose are filled (or failed)."""
        return (None, None) if self.worker is None else self.worker.finished(finished_req_ids)

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were not filled."""
        return set() if self.worker is None else self.worker.failed()

    @guarded(lambda: None)
    def build_connector_worker_meta(self) -> KvlibWorkerMetadata | None:
        """What was staged since the last step; for ranks that live elsewhere."""
        return None if self.worker is None else self.worker.report()

    # -- in the scheduler

    def _half(self) -> SchedulerHalf:
        assert self.scheduler is not None  # noqa: S101 (vLLM asks the scheduler's half only)
        return self.scheduler

    @guarded(lambda: None)
    def on_new_request(self, request: Any) -> None:
        """Begin an account."""
        self._half().state(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens beyond `num_computed_tokens` that lie verified in host memory; None: wait."""
        return self._half().look_up(request, num_computed_tokens)

    @guarded(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The engine takes what was offered, or leaves it."""
        self._half().allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KvlibMetadata:
        """What the workers are to do in this step."""
        self._plan(scheduler_output)
        return self._half().meta()

    @guarded(lambda: None)
    def _plan(self, scheduler_output: Any) -> None:
        self._half().plan(scheduler_output)

    @guarded(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        """What became of stages and loads."""
        self._half().update(connector_output)

    @guarded(lambda: (False, None))
    def request_finished(
        self, request: Any, block_ids: Sequence[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Store what is left of a request; whether its pages must be kept until that is done."""
        return self._half().finished(request, block_ids), None

    @guarded(lambda: False)
    def reset_cache(self) -> bool:
        """Make all that is stored unreachable for this engine, as after a change of weights."""
        self._half().renew()
        return True

    # -- in both

    @guarded(lambda: None)
    def get_kv_connector_stats(self) -> KvlibStats | None:
        """Counters since the last call."""
        now = self.counts + (Counter() if self.worker is None else self.worker.mover.counts)
        news = now - self._reported
        self._reported = now
        return KvlibStats(data=dict(news)) if news else None

    @guarded(lambda: None)
    def shutdown(self) -> None:
        """Finish what is being stored, and close the store."""
        if self.worker is not None:
            worker, self.worker = self.worker, None
            worker.close()
