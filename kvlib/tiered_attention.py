# SPDX-License-Identifier: Apache-2.0
"""Attention over keys that come piece by piece: the softmax is put together from parts.

Of each part one needs, for every query, the largest logit m, the sum s of exp(logit - m) and the
sum a of exp(logit - m) values. Two parts join as

    m = max(m1, m2);  s = s1 e^(m1 - m) + s2 e^(m2 - m);  a = a1 e^(m1 - m) + a2 e^(m2 - m)

and a / s is the attention over both (the "online softmax" of FlashAttention, arXiv 2205.14135).
All of it is float32.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvlib.store.leaves import LEAF_TOKENS, LeafShape

__all__ = ["Part", "attend_leaves", "attend_part", "join"]

_MOST_ROWS = 16  # for each KV head; with more, a matrix product is worth its copies


@dataclass(frozen=True, slots=True)
class Part:
    """Attention over some of the keys.

    Attributes:
        largest: [Hkv, G, T].
        total: [Hkv, G, T].
        values: [Hkv, G, T, Dv].
    """

    largest: Tensor
    total: Tensor
    values: Tensor

    def output(self) -> Tensor:
        """The attention, if these were all keys: [Hkv, G, T, Dv]."""
        return self.values / self.total[..., None]


def attend_part(query: Tensor, keys: Tensor, values: Tensor, *, causal: int | None = None) -> Part:
    """Attention over some keys.

    Args:
        query: [Hkv, G, T, D], scaled.
        keys: [Hkv, N, D].
        values: [Hkv, N, Dv].
        causal: the first query sees so many keys, each one after it one more; None: all see all.
    """
    heads, group, tokens, _ = query.shape
    rows = query.reshape(heads, group * tokens, -1).float()
    logits = (rows @ keys.float().transpose(1, 2)).view(heads, group, tokens, -1)
    if causal is not None and tokens > 1:
        seen = torch.arange(tokens, device=query.device)[:, None] + causal
        hidden = torch.arange(keys.shape[1], device=query.device) >= seen
        logits.masked_fill_(hidden, float("-inf"))
    largest = logits.amax(dim=-1)
    weights = logits.sub_(largest[..., None]).exp_()
    total = weights.sum(dim=-1)
    mixed = weights.view(heads, group * tokens, -1) @ values.float()
    return Part(largest, total, mixed.view(heads, group, tokens, -1))


@cache
def _kernels() -> Any:
    """`kvlib.tiered_attention_numba`, None without numba."""
    try:
        return import_module("kvlib.tiered_attention_numba")
    except ImportError:
        return None


def attend_leaves(
    query: Tensor, shape: LeafShape, memory: Tensor, slots: Tensor, *, compiled: bool = True
) -> Part:
    """Attention over leaves in memory; see `attend_part`.

    Args:
        query: [Hkv, G, T, D], scaled; on the device where attention runs.
        shape: of a leaf.
        memory: uint8 [num_slots, slot_bytes], contiguous.
        slots: int64 [n], of the leaves.
        compiled: attend to leaves where they lie, with numba, where it is installed and can.
    """
    heads, group, tokens, dim = query.shape
    rows = group * tokens
    can = query.is_cpu and shape.dtype == torch.float32 and rows <= _MOST_ROWS
    kernels = _kernels() if compiled and can else None
    if kernels is None:
        keys, values = (
            x.index_select(0, slots).transpose(0, 1).flatten(1, 2).to(query.device)
            for x in shape.unpack(memory)
        )
        return attend_part(query, keys, values)
    numbers, places = memory.view(torch.float32).numpy(), slots.numpy()
    logits = torch.empty((heads, rows, len(slots) * LEAF_TOKENS))
    asking = query.reshape(heads, rows, dim).float().contiguous()
    kernels.leaf_logits(numbers, places, asking.numpy(), logits.numpy())
    largest = logits.amax(dim=-1)
    weights = logits.sub_(largest[..., None]).exp_()
    mixed = torch.empty((heads, rows, shape.v_dim))
    kernels.leaf_values(numbers, places, weights.numpy(), shape.keys, mixed.numpy())
    return Part(
        largest.view(heads, group, tokens),
        weights.sum(dim=-1).view(heads, group, tokens),
        mixed.view(heads, group, tokens, -1),
    )


def join(one: Part | None, two: Part) -> Part:
    """Attention over the keys of both."""
    if one is None:
        return two
    largest = torch.maximum(one.largest, two.largest)
    a, b = (one.largest - largest).exp(), (two.largest - largest).exp()
    return Part(
        largest,
        one.total * a + two.total * b,
        one.values * a[..., None] + two.values * b[..., None],
    )
