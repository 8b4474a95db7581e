# SPDX-License-Identifier: Apache-2.0
"""SGLang's device pools as a `Mover` sees them: memory with pages of one token.

A pool has a row for each token slot, [slots, H, D], whatever SGLang's page size is; requests name
slots. So blocks of 64 tokens fit pages of any size.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvlib.errors import ConnectorError

__all__ = ["SlotPages", "pages_of", "verify_pool"]


class SlotPages:
    """Slots of an MHA or MLA pool.

    Args:
        keys: of each layer, [slots, H, D].
        values: the same, or None for latent vectors, which have no values of their own.
    """

    page_tokens: int = 1

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor] | None) -> None:
        self.views = list(keys)
        self._values = None if values is None else list(values)

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.views)

    def read_layer(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, len(pages), D] of some slots of a layer, as copies on the CPU."""
        slots = pages.to(self.views[layer].device)
        keys = _rows(self.views[layer], slots)
        if self._values is None:
            return keys, keys.new_empty((*keys.shape[:2], 0))
        return keys, _rows(self._values[layer], slots)

    def write_layer(self, layer: int, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [H, len(pages), D] into slots of a layer."""
        slots = pages.to(self.views[layer].device)
        _put(self.views[layer], slots, keys)
        if self._values is not None:
            _put(self._values[layer], slots, values)

    def write_parts(self, parts: Sequence[tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]]) -> None:
        """Put keys and values of all layers into several runs of slots."""
        for pages, layers in parts:
            for layer, (keys, values) in enumerate(layers):
                self.write_layer(layer, pages, keys, values)


def _rows(buffer: Tensor, slots: Tensor) -> Tensor:
    return buffer.index_select(0, slots).transpose(0, 1).contiguous().cpu()


def _put(buffer: Tensor, slots: Tensor, rows: Tensor) -> None:
    source = rows.transpose(0, 1).to(buffer.device, non_blocking=True)
    buffer.index_copy_(0, slots, source)


def pages_of(pool: Any) -> SlotPages:
    """The memory of one of SGLang's pools.

    Args:
        pool: what `get_kvcache()` of SGLang's allocator gives.

    Raises:
        ConnectorError: a pool whose layout is not known here.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    layout = getattr(pool, "kv_cache_layout", "nhd")
    if pool.store_dtype != pool.dtype:
        raise ConnectorError(
            f"SGLang keeps its cache as {pool.store_dtype} for {pool.dtype}: the scales of "
            "quantized caches do not travel with blocks. Use --kv-cache-dtype auto and let kvlib's "
            "codec make blocks small, or KvlibHiCacheStorage"
        )
    if type(pool) is MHATokenToKVPool and layout == "nhd":
        return SlotPages(pool.k_buffer, pool.v_buffer)
    if type(pool) is MLATokenToKVPool:
        return SlotPages(pool.kv_buffer, None)
    raise ConnectorError(
        f"SGLang keeps its cache in a {type(pool).__name__} laid out as {layout!r}; KvlibLinker "
        "knows MHATokenToKVPool (nhd) and MLATokenToKVPool. Use KvlibHiCacheStorage"
    )


def verify_pool(pool: Any, pages: SlotPages) -> None:
    """Write a pattern through SGLang and read it through `pages`, and the other way round.

    Works on the page that SGLang keeps for padding, which holds no request's tokens.

    Args:
        pool: see `pages_of`.
        pages: of that pool.

    Raises:
        ConnectorError: they do not agree.
    """
    slots = torch.randperm(pool.page_size, generator=torch.Generator().manual_seed(20))
    for layer in {0, pages.num_layers - 1}:
        before = pages.read_layer(layer, slots)
        number = pool.start_layer + layer
        ours = [torch.arange(x.numel()).remainder(251).to(x.dtype).view(x.shape) for x in before]
        ours[1] = -ours[1]
        theirs = [x.transpose(0, 1).contiguous().to(pool.device) for x in ours]
        if not theirs[1].shape[2]:
            theirs[1] = theirs[0]
        pool.set_kv_buffer(
            SimpleNamespace(layer_id=number), slots.to(pool.device), theirs[0], theirs[1]
        )
        read = pages.read_layer(layer, slots)
        same = all(torch.equal(x, y) for x, y in zip(read, ours, strict=True))
        pages.write_layer(layer, slots, -ours[0], -ours[1])
        seen = pool.get_key_buffer(number)[slots.to(pool.device)].transpose(0, 1).cpu()
        same = same and torch.equal(seen, -ours[0])
        if ours[1].shape[2]:
            seen = pool.get_value_buffer(number)[slots.to(pool.device)].transpose(0, 1).cpu()
            same = same and torch.equal(seen, -ours[1])
        pages.write_layer(layer, slots, *before)
        if not same:
            raise ConnectorError(
                f"SGLang's {type(pool).__name__} is not laid out as kvlib knows it: a pattern "
                "written through SGLang did not come back. Nothing is loaded or stored; run "
                "without the linker, or use a version that is supported"
            )
