# SPDX-License-Identifier: Apache-2.0
"""What one layer of a `KVCache` holds.

A layer begins **whole**: keys and values [B, Hkv, N, D] as transformers' DynamicCache would hold
them, padding included, and the model's own attention runs over them. With the first eviction it
falls apart into **rows**, one `LayerRow` for each sequence of the batch, which hold only what was
kept. It never goes back.
"""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from kvlib.blocks import SYNTHETIC, LayerKV
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerState, Plans
from kvlib.model_spec import layer_specs
from kvlib.plans import Demote, KeepTokens, apply_plan, other_channels
from kvlib.spec import RopeSpec

__all__ = ["EvictableLayer", "LayerRow", "alone", "extend_entries", "layer_of", "make_layers"]

SLACK = 64
"""Most entries that a growing row allocates ahead, so that most steps copy nothing."""


class LayerRow:
    """One layer of one sequence: a `LayerKV` that can grow and be cut down, and policy state."""

    def __init__(self, layer: LayerKV, state: LayerState) -> None:
        self.layer = layer
        self.state = state
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None
        self._shrinks = False  # was cut down since it last grew: slack would be wasted

    @property
    def nbytes(self) -> int:
        """Bytes held, space to grow and policy state included."""
        if self._buffers is None:
            return self.layer.nbytes + self.state.nbytes
        weights = self.layer.log_weight, self.layer.channels, self.layer.rest
        held = [*self._buffers, *(x for x in weights if x is not None)]
        return sum(x.numel() * x.element_size() for x in held) + self.state.nbytes

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add new tokens to every head: keys [Hkv, T, D], values [Hkv, T, Dv], int32 [T]."""
        if not len(positions):
            return
        layer = self.layer
        rest = None
        if layer.channels is not None:
            others = other_channels(layer.channels, keys.shape[-1])
            if layer.rest is not None:
                rest = torch.cat([layer.rest, _gather_channels(keys, others)], dim=1)
            keys = _gather_channels(keys, layer.channels)
        if layer.is_dense and layer.log_weight is None and isinstance(layer.positions, Tensor):
            self._append_dense(keys, values, positions)
        else:
            self._append_rows(keys, values, positions)
        if rest is not None:
            self.layer = replace(self.layer, rest=rest)

    def _append_rows(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Into rows that are not equally long, or have weights: one copy of everything."""
        layer = self.layer
        old = layer.positions_tensor()
        weighted = layer.log_weight is not None
        cuts, start = [], 0
        for head, n in enumerate(layer.lengths):
            real = n
            if weighted:  # synthetic entries stay last
                mine = old[head] if layer.is_dense else old[start : start + n]
                real = int((mine != SYNTHETIC).sum())
            cuts.append((start, start + real, start + n))
            start += n

        def joined(x: Tensor, new: Tensor) -> Tensor:
            flat = x.flatten(0, 1) if layer.is_dense else x
            parts: list[Tensor] = []
            for head, (first, middle, last) in enumerate(cuts):
                parts += [flat[first:middle], new[head].to(x.dtype), flat[middle:last]]
            out = torch.cat(parts)
            return out.unflatten(0, (len(cuts), -1)) if layer.is_dense else out

        num = len(positions)
        heads = layer.num_kv_heads
        weight = layer.log_weight
        self.layer = replace(
            layer,
            keys=joined(layer.keys, keys),
            values=joined(layer.values, values),
            positions=joined(old, positions.expand(heads, -1)),
            row_lengths=None if layer.is_dense else tuple(n + num for n in layer.lengths),
            log_weight=None if weight is None else joined(weight, weight.new_zeros(heads, num)),
        )

    def _append_dense(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        layer = self.layer
        old = layer.keys.shape[1]
        new = old + keys.shape[1]
        buffers = self._buffers
        # A tensor made in inference mode cannot be written to outside of it.
        frozen = layer.keys.is_inference() and not torch.is_inference_mode_enabled()
        if buffers is None or buffers[0].shape[1] < new or frozen:
            size = new if self._shrinks else new + min(SLACK, new // 16 + 1)
            self._shrinks = False
            heads = layer.num_kv_heads
            buffers = (
                layer.keys.new_empty(heads, size, keys.shape[-1]),
                layer.values.new_empty(heads, size, values.shape[-1]),
                positions.new_empty(heads, size),
            )
            buffers[0][:, :old] = layer.keys
            buffers[1][:, :old] = layer.values
            buffers[2][:, :old] = layer.positions_tensor()
            self._buffers = buffers
        buffers[0][:, old:new] = keys
        buffers[1][:, old:new] = values
        buffers[2][:, old:new] = positions
        self._view(new)

    def _view(self, size: int) -> None:
        assert self._buffers is not None  # noqa: S101
        keys, values, positions = (x[:, :size] for x in self._buffers)
        self.layer = replace(self.layer, keys=keys, values=values, positions=positions)

    def truncate(self, num: int) -> None:
        """Take the last `num` tokens of every head out again."""
        if num == 0:
            return
        if self._buffers is not None:
            rest = self.layer.rest
            self._view(self.layer.keys.shape[1] - num)
            if rest is not None:
                self.layer = replace(self.layer, rest=rest[:, : rest.shape[1] - num].clone())
            return
        rows = []
        for row in self.layer.rows():
            real = int((row.positions != SYNTHETIC).sum())
            index = torch.arange(len(row.positions), device=row.keys.device)
            rows.append(index[(index < real - num) | (index >= real)])
        self.layer = self.layer.select(rows)

    def apply(self, plans: Plans, rope: RopeSpec | None) -> None:
        """Carry out a policy's plans; what they drop is freed."""
        before = self.layer
        if self._compact(plans):
            return
        applied = apply_plan(before, plans, rope=rope)
        if applied.demoted is not None:
            raise ConfigError("this cache has no lower tier to demote entries to")
        if applied.layer is before:
            return
        follow_plans(self.state, before, plans, applied.layer)
        self.layer = applied.layer
        self._buffers = None
        self._shrinks = True

    def _compact(self, plans: Plans) -> bool:
        """Carry out a plan that only keeps entries within the buffers, moving what has to move.

        The common step of a cache at its budget drops one entry of each head. A copy of everything
        would cost more than the attention itself.
        """
        layer, buffers = self.layer, self._buffers
        only = plans[0] if len(plans) == 1 else None
        if buffers is None or not isinstance(only, KeepTokens) or not layer.is_dense:
            return False
        num = len(only.rows[0])
        held = layer.keys.shape[1]
        if (
            len({len(row) for row in only.rows}) > 1
            or len(only.rows) != layer.num_kv_heads
            or buffers[0].shape[1] > num + num // 8 + SLACK  # too much room would stay
            or (buffers[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            return False
        index = torch.stack(list(only.rows)).to(layer.keys.device)
        order = torch.arange(num, device=index.device)
        ascending = bool((index[:, 1:] > index[:, :-1]).all()) if num else True
        if not num or not ascending or int(index[:, 0].min()) < 0 or int(index.max()) >= held:
            return False  # apply_plan says what is wrong
        rest = layer.select_rest(only.rows)
        unmoved = (index == order).sum(1).tolist()  # ascending: the front of the row
        for head, first in enumerate(unmoved):
            for x in buffers:
                x[head, first:num] = x[head].index_select(0, index[head, first:])
        for name, entry in self.state.entries.items():
            self.state.entries[name] = entry.gather(1, index.to(entry.device))
        self._view(num)
        if rest is not None:
            self.layer = replace(self.layer, rest=rest)
        return True

    def fork(self) -> "LayerRow":
        """A copy that shares nothing."""
        layer = self.layer
        copy = replace(
            layer,
            keys=layer.keys.clone(),
            values=layer.values.clone(),
            positions=layer.positions
            if isinstance(layer.positions, range)
            else layer.positions.clone(),
            log_weight=None if layer.log_weight is None else layer.log_weight.clone(),
            rest=None if layer.rest is None else layer.rest.clone(),
        )
        twin = LayerRow(copy, self.state.fork())
        twin._shrinks = self._shrinks
        return twin


def _insert(x: Tensor, at: int, new: Tensor) -> Tensor:
    return torch.cat([x[:at], new.to(x.dtype), x[at:]])


def _gather_channels(keys: Tensor, channels: Tensor) -> Tensor:
    """The channels int64 [Hkv, C] of keys [Hkv, T, D]."""
    return keys.gather(-1, channels[:, None, :].expand(-1, keys.shape[1], -1))


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


def extend_entries(state: LayerState, old: Sequence[int], layer: LayerKV) -> None:
    """Give new entries (before the synthetic ones) the number 0 in every per-entry tensor.

    Args:
        state: whose tensors have the shape of the layer before it grew.
        old: entries per head before.
        layer: the grown layer.
    """
    if tuple(old) == layer.lengths:
        return
    for name, x in state.entries.items():
        grown = layer.lengths[0] - old[0]
        if layer.is_dense and layer.log_weight is None:
            state.entries[name] = torch.nn.functional.pad(x, (0, grown))
            continue
        rows = []
        parts = x.unbind(0) if x.dim() == 2 else x.split(list(old))
        for head, part in enumerate(parts):
            row = layer.row(head)
            at = int((row.positions != SYNTHETIC).sum()) - (layer.lengths[head] - old[head])
            rows.append(_insert(part, at, part.new_zeros(layer.lengths[head] - old[head])))
        state.entries[name] = torch.stack(rows) if layer.is_dense else torch.cat(rows)


def follow_plans(state: LayerState, before: LayerKV, plans: Plans, after: LayerKV) -> None:
    """Make every per-entry tensor follow the rows through `plans`; appended entries get 0."""
    keep = next((plan.rows for plan in plans if isinstance(plan, KeepTokens)), None)
    demote = next((plan.rows for plan in plans if isinstance(plan, Demote)), None)
    for name, x in state.entries.items():
        rows = []
        parts = x.unbind(0) if x.dim() == 2 else x.split(list(before.lengths))
        for head, part in enumerate(parts):
            index = torch.arange(len(part), device=x.device) if keep is None else keep[head]
            if demote is not None:
                index = index[~torch.isin(index, demote[head])]
            added = after.lengths[head] - len(index)
            rows.append(torch.nn.functional.pad(part[index.to(x.device)], (0, added)))
        state.entries[name] = torch.stack(rows) if after.is_dense else torch.cat(rows)


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
