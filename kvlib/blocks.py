# SPDX-License-Identifier: Apache-2.0
"""The one data type: a run of tokens of one sequence over some layers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from kvlib.errors import ShapeError
from kvlib.layer_kv import SYNTHETIC, LayerKV, Row
from kvlib.spec import KVSpec, LayerKind

__all__ = ["SYNTHETIC", "KVBlock", "LayerKV", "Row"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class KVBlock:
    """A run of tokens [start, start + num_tokens) of one sequence, over some layers of a model.

    Attributes:
        spec: what the numbers mean.
        start: index of the run's first token in the sequence.
        num_tokens: tokens the run stands for, evicted ones included.
        layers: ascending in `layer_idx`.
    """

    spec: KVSpec
    start: int
    num_tokens: int
    layers: tuple[LayerKV, ...]

    def __post_init__(self) -> None:
        """Check every layer against the spec."""
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.start < 0 or self.num_tokens < 0 or self.stop > 1 << 31:
            raise ShapeError(
                f"a block cannot start at {self.start} with {self.num_tokens} tokens: positions "
                "are int32"
            )
        last = -1
        for layer in self.layers:
            if not last < layer.layer_idx < self.spec.num_layers:
                raise ShapeError(
                    f"layer_idx {layer.layer_idx} is out of order or beyond the model's "
                    f"{self.spec.num_layers} layers"
                )
            last = layer.layer_idx
            self._check_layer(layer)

    def _check_layer(self, layer: LayerKV) -> None:
        want = self.spec.layers[layer.layer_idx]
        if layer.rest is not None:
            raise ShapeError(
                f"layer {layer.layer_idx} has entries whose keys are still whole beside pruned "
                "ones: they do not fit in a block (a Snapshot keeps them in its state)"
            )
        if want.kind is LayerKind.RECURRENT:
            raise ShapeError(
                f"layer {layer.layer_idx} is recurrent: its state has no tokens and fits in no "
                "block"
            )
        width = want.k_head_dim if layer.channels is None else layer.keys.shape[-1]
        seen = (
            str(layer.keys.dtype).removeprefix("torch."),
            layer.keys.shape[-1],
            layer.values.shape[-1],
        )
        if seen != (self.spec.dtype, width, want.v_head_dim):
            raise ShapeError(
                f"layer {layer.layer_idx} holds {seen[0]} keys of {seen[1]} and values of "
                f"{seen[2]} channels; the spec says {self.spec.dtype}, {width} and "
                f"{want.v_head_dim}"
            )
        if layer.num_kv_heads > want.num_kv_heads:  # fewer: a tensor-parallel rank's share
            raise ShapeError(
                f"layer {layer.layer_idx} holds {layer.num_kv_heads} KV heads; the spec says "
                f"{want.num_kv_heads}"
            )
        if isinstance(layer.positions, range) and layer.positions != range(self.start, self.stop):
            raise ShapeError(
                f"layer {layer.layer_idx} holds positions "
                f"{layer.positions.start}..{layer.positions.stop}; the block is [{self.start}, "
                f"{self.stop})"
            )

    @classmethod
    def dense(
        cls, spec: KVSpec, layers: Sequence[tuple[Tensor, Tensor]], *, start: int = 0
    ) -> Self:
        """A block of all layers from (keys, values) pairs [Hkv, T, D]; copies nothing."""
        if len(layers) != spec.num_layers:
            raise ShapeError(f"{len(layers)} layers given; the spec has {spec.num_layers}")
        num_tokens = layers[0][0].shape[-2]
        return cls(
            spec=spec,
            start=start,
            num_tokens=num_tokens,
            layers=tuple(
                LayerKV(layer_idx=i, keys=k, values=v, positions=range(start, start + num_tokens))
                for i, (k, v) in enumerate(layers)
            ),
        )

    @property
    def stop(self) -> int:
        """Index after the run's last token."""
        return self.start + self.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, metadata included."""
        return sum(layer.nbytes for layer in self.layers)

    def slice(self, start: int, stop: int) -> "KVBlock":
        """The tokens [start, stop), given as indices in the sequence.

        Raises:
            ShapeError: the range leaves the block, or a layer holds synthetic entries.
        """
        if not self.start <= start <= stop <= self.stop:
            raise ShapeError(
                f"[{start}, {stop}) is not inside the block [{self.start}, {self.stop})"
            )
        if (start, stop) == (self.start, self.stop):
            return self
        layers = tuple(layer.slice(start, stop) for layer in self.layers)
        return KVBlock(spec=self.spec, start=start, num_tokens=stop - start, layers=layers)

    def split(self, *at: int) -> list["KVBlock"]:
        """Cut at ascending token indices of the sequence: n cuts give n + 1 blocks."""
        edges = [self.start, *at, self.stop]
        return [self.slice(a, b) for a, b in pairwise(edges)]

    @staticmethod
    def join(blocks: Sequence["KVBlock"]) -> "KVBlock":
        """One block from consecutive runs of the same model and layers; the inverse of `split`.

        Raises:
            ShapeError: nothing to join, or the runs are not consecutive or differ in spec, layers
                or channels.
        """
        if not blocks:
            raise ShapeError("cannot join zero blocks")
        first = blocks[0]
        for left, right in pairwise(blocks):
            if right.start != left.stop:
                raise ShapeError(
                    f"cannot join [{left.start}, {left.stop}) and [{right.start}, {right.stop})"
                )
            if right.spec != first.spec:
                raise ShapeError("cannot join blocks of different specs")
            if [x.layer_idx for x in right.layers] != [x.layer_idx for x in first.layers]:
                raise ShapeError("cannot join blocks over different layers")
        if len(blocks) == 1:
            return first
        layers = tuple(
            _join_layers([block.layers[i] for block in blocks]) for i in range(len(first.layers))
        )
        num_tokens = sum(block.num_tokens for block in blocks)
        return KVBlock(spec=first.spec, start=first.start, num_tokens=num_tokens, layers=layers)

    def equal(self, other: "KVBlock") -> bool:
        """Whether both hold the same tokens of the same spec bit for bit."""
        return (
            (self.spec, self.start, self.num_tokens) == (other.spec, other.start, other.num_tokens)
            and len(self.layers) == len(other.layers)
            and all(a.equal(b) for a, b in zip(self.layers, other.layers, strict=True))
        )


def _join_layers(parts: Sequence[LayerKV]) -> LayerKV:
    first = parts[0]
    for part in parts[1:]:
        same = (part.channels is None) == (first.channels is None) and (
            part.channels is None
            or first.channels is None
            or torch.equal(part.channels, first.channels)
        )
        if part.num_kv_heads != first.num_kv_heads or not same:
            raise ShapeError(
                f"layer {first.layer_idx}: cannot join blocks that differ in KV heads or channels"
            )
    ranges = [part.positions for part in parts if isinstance(part.positions, range)]
    if len(ranges) == len(parts) and all(part.log_weight is None for part in parts):
        return replace(
            first,
            keys=torch.cat([part.keys for part in parts], dim=1),
            values=torch.cat([part.values for part in parts], dim=1),
            positions=range(ranges[0].start, ranges[-1].stop),
        )
    weighted = any(part.log_weight is not None for part in parts)
    rows = []
    for head in range(first.num_kv_heads):
        mine = [part.row(head) for part in parts]
        if any(bool((row.positions == SYNTHETIC).any()) for row in mine[:-1]):
            raise ShapeError(
                f"layer {first.layer_idx}: only the last block may hold synthetic entries"
            )
        keys, values = (torch.cat([getattr(r, x) for r in mine]) for x in ("keys", "values"))
        weight = torch.cat([r.weights() for r in mine]) if weighted else None
        rows.append(Row(keys, values, torch.cat([r.positions for r in mine]), weight))
    return LayerKV.from_rows(first.layer_idx, rows, channels=first.channels)
