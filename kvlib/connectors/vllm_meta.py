# SPDX-License-Identifier: Apache-2.0
"""What the halves of `KvlibConnector` tell each other through vLLM, once a step."""

from dataclasses import dataclass, field
from typing import cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvlib.connectors.mover import Save

__all__ = ["KvlibMetadata", "KvlibWorkerMetadata"]


@dataclass
class KvlibMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler's half tells the workers in a step.

    Attributes:
        stages: ticket, keys, first block, seconds to wait.
        releases: tickets whose staged blocks nobody wants.
        loads: ticket, pages, first token.
        saves: blocks that are complete when the step is over.
        preempted: tickets whose pages are given away now.
        finishing: tickets whose pages are kept until they are copied out.
    """

    stages: list[tuple[str, tuple[bytes, ...], int, float]] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    loads: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    finishing: list[str] = field(default_factory=list)


@dataclass
class KvlibWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What workers tell the scheduler's half: blocks, fidelity and reporting ranks by ticket."""

    staged: dict[str, tuple[int, str, int]] = field(default_factory=dict)

    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "KvlibWorkerMetadata":
        """A hit is what all ranks have."""
        staged = dict(self.staged)
        for ticket, (blocks, fidelity, ranks) in cast("KvlibWorkerMetadata", other).staged.items():
            mine = staged.get(ticket)
            if mine is not None:
                lower = min((mine[0], mine[1]), (blocks, fidelity))
                staged[ticket] = (*lower, mine[2] + ranks)
            else:
                staged[ticket] = (blocks, fidelity, ranks)
        return KvlibWorkerMetadata(staged)
