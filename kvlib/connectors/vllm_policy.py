# SPDX-License-Identifier: Apache-2.0
"""kvlib's replacement policies for vLLM's own CPU tier.

vLLM asks a module for a class by name. Here the name is ``kvlib:`` and a method string of one of
`kvlib.store.replacement.REPLACEMENTS`, parameters and installed plugins included:

    "eviction_policy": "kvlib:s3fifo:small=0.2",
    "cache_policy_module_path": "kvlib.connectors.vllm_policy"
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys

from kvlib.store.replacement import REPLACEMENTS, Replacement, ReplacementState

__all__ = ["PREFIX", "KvlibCachePolicy"]

PREFIX = "kvlib:"
"""What names begin with."""


class KvlibCachePolicy(CachePolicy):  # type: ignore[misc]
    """A replacement policy over chunks, which all count as one byte.

    vLLM says what a request has used when the request ends: chunks that it read are hits, those
    that it only stored are put in order. Whether a chunk that comes back was let go too early, a
    policy learns when the chunk is put in, after room was made for it; in a tier of kvlib's it
    learns that before.

    Args:
        cache_capacity: chunks.
    """

    replacement: ClassVar[Replacement] = REPLACEMENTS.build("lru")

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.clear()

    def clear(self) -> None:
        """Forget everything, whether it is in use or not."""
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._busy: set[OffloadKey] = set()
        self._state: ReplacementState[Any] = self.replacement.start(self.cache_capacity)

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """The chunk; None if it is not held."""
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        """A chunk is held from now on; it is in use until it is written."""
        self._state.admit(key, 1)
        self._state.insert(key, 1)
        self._chunks[key] = chunk
        if chunk.ref_cnt != 0:
            self._busy.add(key)

    def remove(self, key: OffloadKey) -> None:
        """A chunk could not be written."""
        self._state.remove(key)
        del self._chunks[key]
        self._busy.discard(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Put chunks in order, the first one to stay longest: no second use."""
        for key in reversed(list(keys)):
            self._state.touch(key)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Nothing yet: `insert` tells the policy."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """What a request has used, its end first: the start of a prompt stays longest."""
        for key in reversed(order_request_keys(key_groups, req_context)):
            if key in reused_keys:
                self._state.hit(key)
            else:
                self._state.touch(key)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """Drop exactly `n` chunks that are neither in use nor protected; None and nothing else."""
        if n == 0:
            return []
        keep = self._busy | protected
        if len(self._chunks) - sum(key in self._chunks for key in keep) < n:
            return None
        victims = list(self._state.victims(n, keep))
        for key in victims:
            self._state.remove(key, evicted=True)
        return [(key, self._chunks.pop(key)) for key in victims]

    def mark_evictable(self, key: OffloadKey) -> None:
        """Nobody uses a chunk any more."""
        self._busy.discard(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """Somebody uses a chunk."""
        self._busy.add(key)


def __getattr__(name: str) -> Any:
    """The class of a method string."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    policy = REPLACEMENTS.build(name.removeprefix(PREFIX))
    return type(name, (KvlibCachePolicy,), {"replacement": policy})
