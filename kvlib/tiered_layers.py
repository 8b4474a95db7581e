# SPDX-License-Identifier: Apache-2.0
"""A layer of a `TieredCache`, as transformers sees it, and its newest tokens."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvlib.errors import ConfigError
from kvlib.store.leaves import LeafShape

__all__ = ["SPARE", "Newest", "TieredLayer"]

SPARE = 32
"""Tokens by which the room for the newest grows."""


class TieredLayer(CacheLayerMixin):
    """A layer of a `TieredCache`, for transformers' eyes."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: Any, layer_idx: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = weakref.proxy(cache)
        self.layer_idx = layer_idx
        self.pending: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note that keys have come."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values [1, Hkv, T, D]; they join the cache when attention runs."""
        self._cache.expect_update(self.layer_idx)
        self.is_initialized = True
        self.pending = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical sizes: every token ever seen."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return int(self._cache.num_tokens)

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused."""
        raise ConfigError("a TieredCache cannot be cropped")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused."""
        raise ConfigError("a TieredCache holds one sequence: no beams")


class Newest:
    """The newest tokens of a layer, in memory that grows at its end.

    They are where the keys are that came last: those out of a store move to the model's first ones.

    Args:
        shape: of the layer.

    Attributes:
        tokens: held.
        nbytes: held, room to grow included. Ready made: each layer asks for those of all.
    """

    def __init__(self, shape: LeafShape) -> None:
        self._room = [
            torch.empty((shape.heads, 0, dim), dtype=shape.dtype)
            for dim in (shape.k_dim, shape.v_dim)
        ]
        self.tokens = self.nbytes = 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take keys and values [heads, T, D]."""
        last = self.tokens + keys.shape[1]
        for i, x in enumerate((keys, values)):
            room = self._room[i] = self._room[i].to(x.device)
            if last > room.shape[1]:
                grown = room.new_empty((room.shape[0], last + SPARE, room.shape[2]))
                grown[:, : self.tokens] = room[:, : self.tokens]
                self._room[i] = room = grown
            room[:, self.tokens : last] = x
        self.tokens = last
        self._weigh()

    def all(self) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, tokens, D]: views."""
        keys, values = (x[:, : self.tokens] for x in self._room)
        return keys, values

    def drop(self, count: int) -> None:
        """Forget the first tokens, and room that is far too large."""
        rest = self.tokens - count
        for i, room in enumerate(self._room):
            kept = room[:, count : self.tokens]
            if room.shape[1] > rest + 2 * SPARE:
                self._room[i] = room.new_empty((room.shape[0], rest + SPARE, room.shape[2]))
                self._room[i][:, :rest] = kept
            else:
                room[:, :rest] = kept.clone()
        self.tokens = rest
        self._weigh()

    def _weigh(self) -> None:
        self.nbytes = sum(x.nbytes for x in self._room)
