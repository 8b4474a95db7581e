# SPDX-License-Identifier: Apache-2.0
"""What one layer of a `KVCache` holds.

A layer begins **whole**: keys and values [B, Hkv, N, D] as transformers' DynamicCache would hold
them, padding included, and the model's own attention runs over them. With the first eviction it
falls apart into **rows**, one `LayerRow` for each sequence of the batch, which hold only what was
kept. It never goes back.
"""

import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvlib.blocks import LayerKV
from kvlib.cache_rows import LayerRow
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerState
from kvlib.model_spec import layer_specs

__all__ = ["EvictableLayer", "alone", "layer_of", "make_layers"]


def alone(x: Tensor) -> Tensor:
    """The tensor itself, or a copy where it is part of a larger one that it would keep alive.

    Models that compute queries, keys and values in one product hand out such views.
    """
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x


def layer_of(
    layer_idx: int, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor | None
) -> LayerKV:
    """One sequence of a whole layer, without padding: a view where padding is on one side only.

    Args:
        layer_idx: index in the model.
        keys: [Hkv, N, D].
        values: [Hkv, N, Dv].
        positions: int32 [n], of the tokens only.
        valid: bool [N], which columns are tokens; None for all.
    """
    if valid is not None:
        columns = valid.nonzero()[:, 0].to(keys.device)
        first, last = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        if last - first == len(columns):
            keys, values = keys[:, first:last], values[:, first:last]
        else:
            keys, values = keys[:, columns], values[:, columns]
    return LayerKV(
        layer_idx=layer_idx,
        keys=keys,
        values=values,
        positions=positions.to(keys.device).expand(keys.shape[0], -1),
    )


class EvictableLayer(CacheLayerMixin):
    """A full-attention layer of a `KVCache`, for transformers' eyes.

    Attributes:
        keys: [B, Hkv, N, D] while whole, else None.
        values: likewise.
        rows: one for each sequence once something was evicted, else None.
        states: the policy's memory while the layer is whole, one for each sequence.
        pending: new keys and values on their way from `update` to the attention.
        place: index among the evictable layers.
        num_layers: how many those are.
    """

    is_sliding = False
    is_croppable = False  # only while a rollback is being recorded: see KVCache.crop
    supports_early_init = False

    def __init__(self, cache: Any, layer_idx: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = weakref.proxy(cache)  # no cycle: a dropped cache is freed at once
        self.layer_idx = layer_idx
        self.place = 0
        self.num_layers = 1
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self.keys = self.values = None
        self.rows: list[LayerRow] | None = None
        self.states: list[LayerState] = []
        self.pending: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note that keys have come."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, Hkv, T, D]; they join the cache when attention runs."""
        self._cache.expect_update(self.layer_idx)
        if self.pending is not None:
            raise ConfigError(
                f"layer {self.layer_idx} was given keys twice in one forward pass, or its "
                "attention does not go through transformers' attention interface: KVCache does "
                "not support this model"
            )
        self.is_initialized = True
        self.pending = key_states, value_states
        return key_states, value_states

    def fall_apart(self, rows: list[LayerRow]) -> None:
        """Hold these rows from now on, instead of the whole batch."""
        self.rows, self.states = rows, []
        self.keys = self.values = None

    def grow(self) -> tuple[Tensor, Tensor]:
        """Join the pending keys and values to a whole layer; returns all of them."""
        assert self.pending is not None  # noqa: S101
        keys, values = self.pending
        self.pending = None
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=-2)
            values = torch.cat([self.values, values], dim=-2)
        else:
            keys, values = (alone(x) for x in (keys, values))
        self.keys, self.values = keys, values
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        whole = [x for x in (self.keys, self.values) if x is not None]
        total = sum(x.numel() * x.element_size() for x in whole)
        return total + sum(row.nbytes for row in self.rows or self.states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: every token ever seen."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens ever seen, evicted ones included."""
        return int(self._cache.num_columns)

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a layer cannot be rolled back without the others."""
        raise ConfigError("crop the KVCache, not one of its layers")

    def copy_from(self, other: "EvictableLayer") -> None:
        """Hold the same as `other`, sharing nothing that may change."""
        self.is_initialized = other.is_initialized
        self.keys, self.values = other.keys, other.values  # never written to: they grow by copies
        self.rows = None if other.rows is None else [row.fork() for row in other.rows]
        self.states = [state.fork() for state in other.states]

    def take_sequences(self, indices: Tensor) -> None:
        """Make the batch consist of these sequences, in this order, repeated ones copied."""
        order = indices.tolist()
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, indices.to(self.keys.device))
            self.values = self.values.index_select(0, indices.to(self.values.device))
        if self.rows is not None:
            self.rows = _take(self.rows, order)
        else:
            self.states = _take(self.states, order)


def make_layers(cache: Any, config: Any) -> list[Any]:
    """Empty layers for a model with this (text) config: ours, and transformers' sliding ones.

    Raises:
        ConfigError: a layer of another kind, by name.
    """
    kinds = [str(spec.kind) for spec in layer_specs(config)]
    made: list[Any] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicSlidingWindowLayer and getattr(
            config, "attention_chunk_size", None
        ):
            kinds[index] = "chunked"
        if type(layer) is DynamicLayer and kinds[index] == "full":
            made.append(EvictableLayer(cache, index))
        elif type(layer) is DynamicSlidingWindowLayer and kinds[index] == "sliding":
            made.append(layer)
        else:
            raise ConfigError(
                "KVCache supports layers with full and sliding-window attention; layer "
                f"{index} of this {config.model_type!r} model is of kind {kinds[index]} "
                f"({type(layer).__name__})"
            )
    evictable = [layer for layer in made if isinstance(layer, EvictableLayer)]
    for place, layer in enumerate(evictable):
        layer.place, layer.num_layers = place, len(evictable)
    return made


T = TypeVar("T", LayerRow, LayerState)


def _take(items: Sequence[T], order: Sequence[int]) -> list[T]:
    taken: list[T] = []
    for n, i in enumerate(order):
        taken.append(items[i].fork() if i in order[:n] else items[i])
    return taken
