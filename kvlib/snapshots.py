# SPDX-License-Identifier: Apache-2.0
"""An evicted cache as a value: what it holds, and what its policy remembers.

A snapshot is restored whole (design decision 17): what was evicted is gone, so it stands for one
token sequence under one method and answers nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.keys import TokenIds
from kvlib.spec import KVSpec

__all__ = ["Snapshot", "SnapshotStore"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Snapshot:
    """One sequence of a cache.

    Attributes:
        method: the policy with all its parameters, as text.
        block: what is held of every layer; it stands for all tokens seen, [0, num_tokens).
        state: the policy's memory and counters, by name.
    """

    method: str
    block: KVBlock
    state: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        state = sum(x.numel() * x.element_size() for x in self.state.values())
        return self.block.nbytes + state


class SnapshotStore(Protocol):
    """What `KVCache.save` and `KVCache.load` need of a store; `kvlib.KVStore` is one."""

    def put_snapshot(
        self, tokens: TokenIds, snapshot: Snapshot, *, codec: str | None = None
    ) -> int | None:
        """Store it under its tokens; its size in bytes, None if there was no room."""

    def load_snapshot(
        self, spec: KVSpec, tokens: TokenIds, method: str, *, codec: str | None = None
    ) -> Snapshot | None:
        """The snapshot of exactly these tokens and this method, None for a miss."""
