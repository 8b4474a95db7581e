# SPDX-License-Identifier: Apache-2.0
"""kvlib's counters among SGLang's Prometheus metrics.

With ``--enable-metrics`` SGLang collects the metrics of all its processes through files
(prometheus_client's multiprocess mode), so a counter made in the scheduler's process appears at
``/metrics`` by itself.
"""

import time
from collections import Counter
from importlib import import_module
from typing import Any

from kvlib.connectors.counters import COUNTERS

__all__ = ["Publisher"]

_INTERVAL_S = 1.0


class Publisher:
    """Adds counters named ``sglang:kvlib_<name>_total`` to the process's registry.

    Args:
        labels: of all of them.
    """

    def __init__(self, labels: dict[str, str]) -> None:
        self._labels = labels
        self._counters: dict[str, Any] = {}
        self._known: Counter[str] = Counter()
        self._due = 0.0

    def is_due(self) -> bool:
        """Whether it is time to publish again."""
        return time.monotonic() >= self._due

    def publish(self, counts: "Counter[str]") -> None:
        """Add what was counted since the last call.

        Args:
            counts: all that was counted so far.
        """
        self._due = time.monotonic() + _INTERVAL_S
        for name, value in counts.items():
            more = value - self._known[name]
            if more > 0 and name in COUNTERS:
                self._counter(name).inc(more)
                self._known[name] = value

    def _counter(self, name: str) -> Any:
        # Only now: prometheus_client picks its storage when it is imported, which must not be
        # before SGLang has said where.
        if name not in self._counters:
            make = import_module("prometheus_client").Counter
            self._counters[name] = make(
                f"sglang:kvlib_{name}", COUNTERS[name], labelnames=list(self._labels)
            ).labels(**self._labels)
        return self._counters[name]
