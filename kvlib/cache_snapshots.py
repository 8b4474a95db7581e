# SPDX-License-Identifier: Apache-2.0
"""A sequence of a `KVCache` as a `Snapshot`, and back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvlib.blocks import KVBlock, LayerKV
from kvlib.cache_columns import Columns, NewColumns
from kvlib.cache_layers import EvictableLayer, LayerRow
from kvlib.errors import ConfigError, CorruptDataError
from kvlib.eviction.base import LayerState
from kvlib.snapshots import Snapshot
from kvlib.spec import KVSpec

__all__ = ["fill_from_snapshot", "restored_columns", "snapshot_of"]

_PROMPT = "prompt"


def snapshot_of(
    spec: KVSpec,
    method: str,
    layers: Sequence[Any],
    held: Sequence[LayerKV | None],
    columns: Columns,
    sequence: int,
) -> Snapshot:
    """One sequence; its tensors are copies.

    Args:
        spec: of the model.
        method: the policy as text.
        layers: of the cache.
        held: `KVCache.layer_kv` of each evictable layer, None for the others.
        columns: of the cache.
        sequence: index in the batch.

    Raises:
        ConfigError: positions do not count the sequence's tokens.
    """
    seen = columns.seen[sequence]
    positions = columns.token_positions(sequence)
    plain = torch.arange(seen, dtype=torch.int32, device=positions.device)
    if not torch.equal(positions, plain):
        raise ConfigError(
            f"positions of sequence {sequence} do not count its tokens from 0: pass position_ids "
            "that leave out the padding (generate() does)"
        )
    state = {_PROMPT: torch.tensor(columns.prompt[sequence])}
    parts = []
    for index, (layer, kv) in enumerate(zip(layers, held, strict=True)):
        if kv is None:
            parts.append(_sliding(index, layer, columns, sequence))
            continue
        mine = layer.rows[sequence].state if layer.rows is not None else layer.states[sequence]
        state |= {f"{index:05}/entries/{k}": x.cpu() for k, x in mine.fork().entries.items()}
        state |= {f"{index:05}/values/{k}": x.cpu() for k, x in mine.fork().values.items()}
        if layer.rows is None:  # nothing was evicted
            kv = replace(kv, positions=range(seen))
        parts.append(LayerRow(kv, LayerState()).fork().layer)
    block = KVBlock(spec=spec, start=0, num_tokens=seen, layers=tuple(parts))
    return Snapshot(method=method, block=block, state=state)


def _sliding(index: int, layer: Any, columns: Columns, sequence: int) -> LayerKV:
    keys, values = layer.keys[sequence], layer.values[sequence]
    if columns.valid is not None:
        tokens = columns.valid[sequence, columns.num - keys.shape[1] :]
        keys, values = keys[:, tokens], values[:, tokens]
    seen, n = columns.seen[sequence], keys.shape[1]
    positions = torch.arange(seen - n, seen, dtype=torch.int32, device=keys.device)
    return LayerKV(
        layer_idx=index,
        keys=keys.clone(),
        values=values.clone(),
        positions=positions.expand(keys.shape[0], -1).contiguous(),
    )


def restored_columns(snapshot: Snapshot, device: torch.device) -> Columns:
    """The columns of a cache that begins with this snapshot.

    Raises:
        CorruptDataError: the state lacks the length of the prompt.
    """
    prompt = snapshot.state.get(_PROMPT)
    num = snapshot.block.num_tokens
    if prompt is None or prompt.numel() != 1 or not 0 <= int(prompt) <= num:
        raise CorruptDataError(f"the snapshot's prompt is {prompt} of {num} tokens")
    columns = Columns()
    positions = torch.arange(num, dtype=torch.int32, device=device)[None]
    new = NewColumns(num, None, positions)
    columns.add(new, to_prompt=False)
    columns.advance(new)
    columns.prompt = [int(prompt)]
    return columns


def fill_from_snapshot(layers: Sequence[Any], snapshot: Snapshot, device: torch.device) -> None:
    """Put a snapshot's keys, values and state into the empty layers of a cache."""
    for index, (layer, kv) in enumerate(zip(layers, snapshot.block.layers, strict=True)):
        mine = _to(kv, device)
        if not isinstance(layer, EvictableLayer):
            layer.lazy_initialization(mine.keys[None], mine.values[None])
            layer.keys, layer.values = mine.keys[None], mine.values[None]
            layer.cumulative_length = snapshot.block.num_tokens
            continue
        state = LayerState(
            _named(snapshot, f"{index:05}/entries/", device),
            _named(snapshot, f"{index:05}/values/", torch.device("cpu")),
        )
        for name, x in state.entries.items():
            if x.shape != mine.keys.shape[:-1]:
                raise CorruptDataError(
                    f"layer {index}: {name} has {tuple(x.shape)} entries, the layer "
                    f"{tuple(mine.keys.shape[:-1])}"
                )
        layer.is_initialized = True
        if isinstance(mine.positions, range):
            layer.keys, layer.values = mine.keys[None], mine.values[None]
            layer.states = [state]
        else:
            layer.rows = [LayerRow(mine, state)]


def _named(snapshot: Snapshot, prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): x.to(device, copy=True)
        for name, x in snapshot.state.items()
        if name.startswith(prefix)
    }


def _to(kv: LayerKV, device: torch.device) -> LayerKV:
    def moved(x: Tensor) -> Tensor:
        return x.to(device, copy=True)

    return replace(
        kv,
        keys=moved(kv.keys),
        values=moved(kv.values),
        positions=kv.positions if isinstance(kv.positions, range) else moved(kv.positions),
        log_weight=None if kv.log_weight is None else moved(kv.log_weight),
        channels=None if kv.channels is None else moved(kv.channels),
    )
