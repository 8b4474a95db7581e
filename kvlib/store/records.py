# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a prompt make a record, and where a loaded run goes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvlib.blocks import KVBlock, LayerKV
from kvlib.spec import KVSpec

__all__ = [
    "BLOCKS_PER_RECORD",
    "Layers",
    "allocate",
    "copied",
    "copy_layers",
    "groups_to_write",
    "is_dense",
]

BLOCKS_PER_RECORD = 4

Layers = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values of some layers, [Hkv, T, D] each."""


def groups_to_write(missing: Sequence[int]) -> list[list[int]]:
    """Blocks of each record to write: runs up to a chunk's end; of an unfinished chunk, singles."""
    runs: list[list[int]] = []
    for index in missing:
        if not runs or index != runs[-1][-1] + 1 or index % BLOCKS_PER_RECORD == 0:
            runs.append([])
        runs[-1].append(index)
    groups: list[list[int]] = []
    for run in runs:
        finished = (run[-1] + 1) % BLOCKS_PER_RECORD == 0
        groups += [run] if finished else [[index] for index in run]
    return groups


def is_dense(layer: LayerKV) -> bool:
    """Whether a layer holds every token of its block, unchanged."""
    plain = layer.log_weight is None and layer.channels is None
    return plain and isinstance(layer.positions, range)


def allocate(spec: KVSpec, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Room for keys [Hkv, T, D] and values [Hkv, T, Dv] of every layer."""
    dtype = getattr(torch, spec.dtype)
    return [
        (
            torch.empty((layer.num_kv_heads, num_tokens, layer.k_head_dim), dtype=dtype),
            torch.empty((layer.num_kv_heads, num_tokens, layer.v_head_dim), dtype=dtype),
        )
        for layer in spec.layers
    ]


def copy_layers(source: Layers, to: Layers, *, non_blocking: bool = False) -> None:
    """Copy keys and values; see `torch.Tensor.copy_`."""
    for layer, tensors in to.items():
        for into, have in zip(tensors, source[layer], strict=True):
            into.copy_(have, non_blocking=non_blocking)


def copied(block: KVBlock) -> KVBlock:
    """A dense block of all layers in CPU tensors of its own."""
    return KVBlock.dense(
        block.spec,
        [(x.keys.cpu().clone(), x.values.cpu().clone()) for x in block.layers],
        start=block.start,
    )
