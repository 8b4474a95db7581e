# SPDX-License-Identifier: Apache-2.0
"""kvlib's counters in vLLM's log line and in its Prometheus metrics."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvlib.connectors.counters import COUNTERS

__all__ = ["KvlibPromMetrics", "KvlibStats"]


class KvlibStats(KVConnectorStats):  # type: ignore[misc]
    """Counters of an interval, summed over ranks."""

    data: dict[str, int]

    def reset(self) -> None:
        """Forget all."""
        self.data = {}

    def aggregate(self, other: "KVConnectorStats") -> "KvlibStats":
        """Add another rank's, or interval's."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the log line shows."""
        return {f"kvlib_{name}": value for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class KvlibPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Counters named ``vllm:kvlib_<name>_total``, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:kvlib_{name}", documentation=text, labelnames=labelnames
            )
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add an interval's counters."""
        for name, value in transfer_stats_data.items():
            counter = self._counters.get(name, {}).get(engine_idx)
            if counter is not None:
                counter.inc(value)
