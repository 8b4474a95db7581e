# SPDX-License-Identifier: Apache-2.0
"""What the halves of `KvlibConnector` tell each other through vLLM, once a step."""

from dataclasses import dataclass, field
from typing import NamedTuple, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvlib.connectors.moves import Save
from kvlib.spec import EXACT

__all__ = ["Answer", "KvlibMetadata", "KvlibWorkerMetadata"]


@dataclass
class KvlibMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler's half tells the workers in a step.

    Attributes:
        stages: ticket, number of the question, keys, first block, seconds to wait.
        releases: tickets whose staged blocks nobody wants.
        loads: ticket, pages, first token.
        saves: blocks that are complete when the step is over.
        preempted: tickets whose pages are given away now.
        finishing: tickets whose pages are kept until they are copied out.
    """

    stages: list[tuple[str, int, tuple[bytes, ...], int, float]] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    loads: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    finishing: list[str] = field(default_factory=list)


class Answer(NamedTuple):
    """What staging came to on some ranks.

    Attributes:
        num_blocks: leading blocks that all of them have.
        fidelity: the lowest among theirs.
        ranks: how many they are.
    """

    num_blocks: int
    fidelity: str
    ranks: int = 1

    def join(self, other: "Answer | None") -> "Answer":
        """What these and other ranks have."""
        if other is None:
            return self
        return Answer(
            min(self.num_blocks, other.num_blocks),
            other.fidelity if self.fidelity == EXACT else self.fidelity,
            self.ranks + other.ranks,
        )


@dataclass
class KvlibWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What workers tell the scheduler's half.

    Attributes:
        staged: what all ranks that answered have, by ticket and number of the question: an answer
            to an earlier one may still be on its way.
    """

    staged: dict[tuple[str, int], Answer] = field(default_factory=dict)

    def aggregate(self, other: "KVConnectorWorkerMetadata") -> "KvlibWorkerMetadata":
        """A hit is what all ranks have."""
        staged = dict(self.staged)
        for question, answer in cast("KvlibWorkerMetadata", other).staged.items():
            staged[question] = answer.join(staged.get(question))
        return KvlibWorkerMetadata(staged)
