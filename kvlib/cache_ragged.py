# SPDX-License-Identifier: Apache-2.0
"""Rows that grow and shrink one by one, in buffers of their own.

In a packed layer the rows lie one behind the other: a token that comes to each moves nearly all of
them. Here every head has buffers with some room, and a step moves the smaller part of a row, or
nothing. The packed form is made when somebody asks for it; attention reads row by row and does not.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvlib.blocks import SYNTHETIC, LayerKV, Row
from kvlib.layer_kv import Gaps
from kvlib.plans import AppendToken, KeepTokens

__all__ = ["SLACK", "LooseKV", "LooseRows", "find_gaps", "slide"]

SLACK = 64
"""Most entries that a growing row allocates ahead, so that most steps copy nothing."""


_MEMORY = ("cpu",)
"""Devices whose tensors lie in this process's memory."""


def slide(x: Tensor, to: int, start: int, num: int) -> None:
    """`x[to : to + num] = x[start : start + num]` of a contiguous tensor; the two may overlap."""
    if num == 0 or to == start:
        return
    if x.device.type not in _MEMORY:
        x[to : to + num] = x[start : start + num].clone()
        return
    size = x.stride(0) * x.element_size()  # torch itself copies overlapping parts twice
    ctypes.memmove(x.data_ptr() + to * size, x.data_ptr() + start * size, num * size)


def find_gaps(keep: KeepTokens, layer: LayerKV) -> Gaps | None:
    """What a plan drops, if that is one range of each row; None if not, or if the plan is wrong."""
    if keep.gaps is not None:
        return keep.gaps if keep.gaps.fit(layer) else None
    if len(keep.rows) != layer.num_kv_heads:
        return None
    ranges = []
    for row, n in zip(keep.rows, layer.lengths, strict=True):
        gone = n - len(row)
        order = torch.arange(len(row), device=row.device)
        if gone < 0 or row.dtype != torch.int64 or row.dim() != 1:
            return None
        first = int((row == order).sum())
        if not torch.equal(row, order + gone * (order >= first)):
            return None
        ranges.append(range(first, first + gone))
    return Gaps(layer.lengths, tuple(ranges), keep.rows[0].device)


class LooseKV(LayerKV):
    """A layer whose rows lie apart: `keys`, `values`, ... are put together whenever they are read.

    Valid until the rows change.
    """

    __slots__ = ("_lengths", "_parts", "_rows")
    _lengths: tuple[int, ...]
    _parts: list[tuple[list[Tensor], int]]
    _rows: list[Row]

    @classmethod
    def of(cls, layer: LayerKV, heads: Sequence["_Head"]) -> "LooseKV":
        """From the present rows, and the rest of `layer`."""
        new = object.__new__(cls)
        lengths = tuple(head.size for head in heads)
        for name, value in (
            ("layer_idx", layer.layer_idx),
            ("row_lengths", None if len(set(lengths)) == 1 else lengths),
            ("channels", layer.channels),
            ("rest", None),
            ("_lengths", lengths),
            ("_parts", [(head.tensors, head.start) for head in heads]),
        ):
            object.__setattr__(new, name, value)
        return new

    def __getattr__(self, name: str) -> Any:
        """One of the tensors that are not there as such."""
        if name == "_rows" and self.apart:  # most views are never looked at
            made = [
                _row([x.narrow(0, start, size) for x in tensors])
                for (tensors, start), size in zip(self._parts, self._lengths, strict=True)
            ]
            object.__setattr__(self, name, made)
            return made
        if name not in ("keys", "values", "positions", "log_weight"):
            raise AttributeError(name)
        parts = [getattr(row, name) for row in self._rows]
        if parts[0] is None:
            return None
        return torch.stack(parts) if self.row_lengths is None else torch.cat(parts)

    @property
    def apart(self) -> bool:
        """True, unless it was put together by `replace`."""
        return hasattr(self, "_parts")

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return len(self._lengths) if self.apart else super().num_kv_heads

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each head."""
        return self._lengths if self.apart else super().lengths

    def row(self, head: int) -> Row:
        """Views of the entries of KV head `head`."""
        return self._rows[head] if self.apart else super().row(head)

    def packed(self) -> LayerKV:
        """A layer with tensors of its own."""
        return LayerKV(
            layer_idx=self.layer_idx,
            keys=self.keys,
            values=self.values,
            positions=self.positions,
            row_lengths=self.row_lengths,
            log_weight=self.log_weight,
            channels=self.channels,
        )

    def select(self, rows: Sequence[Tensor]) -> LayerKV:
        """Copies of chosen entries."""
        return self.packed().select(rows) if self.apart else super().select(rows)


def _row(tensors: list[Tensor]) -> Row:
    return Row(tensors[0], tensors[1], tensors[2], tensors[3] if len(tensors) > 3 else None)


class _Head:
    """One row: keys, values, positions and perhaps weights, in buffers with room around them."""

    def __init__(self, row: Row) -> None:
        self.tensors = [x for x in row if x is not None]
        self.start, self.size = 0, len(row.positions)
        self.synthetic = int((row.positions == SYNTHETIC).sum())
        self.room = 0  # not buffers yet, but parts of the layer's tensors

    def reserve(self, more: int, slack: int) -> None:
        """Make room for so many entries at the end."""
        size = self.size + more
        if self.start + size <= self.room:
            return
        old = self.tensors
        if self.room < size:
            self.room = size + slack
            self.tensors = [x.new_empty(self.room, *x.shape[1:]) for x in old]
            for x, mine in zip(self.tensors, old, strict=True):
                x[: self.size] = mine.narrow(0, self.start, self.size)
        else:
            for x in self.tensors:
                slide(x, 0, self.start, self.size)
        self.start = 0

    def insert(self, new: Sequence[Tensor]) -> None:
        """New tokens [T, ...], before the synthetic entries; there is room."""
        num = len(new[0])
        at = self.start + self.size - self.synthetic
        for x, more in zip(self.tensors, new, strict=True):
            if self.synthetic:
                slide(x, at + num, at, self.synthetic)
            x.narrow(0, at, num).copy_(more)
        self.size += num

    def drop(self, gone: range) -> None:
        """Take out a range of entries; the smaller part beside it moves."""
        num, before, behind = len(gone), gone.start, self.size - gone.stop
        for x in self.tensors:
            if before <= behind:
                slide(x, self.start + num, self.start, before)
            else:
                slide(x, self.start + before, self.start + gone.stop, behind)
        self.start += num if before <= behind else 0
        self.size -= num


class LooseRows:
    """The rows of one layer, to append to and to cut down in place.

    Args:
        layer: any form without `rest`; copied with the first token that comes.
    """

    def __init__(self, layer: LayerKV) -> None:
        self._layer = LooseKV.of(layer, [])  # all but its entries
        self._heads = [_Head(row) for row in layer.rows()]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        tensors = [x for head in self._heads for x in head.tensors]
        if self._layer.channels is not None:
            tensors.append(self._layer.channels)
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def is_frozen(self) -> bool:
        """Whether the buffers cannot be written to: they were made in inference mode."""
        made = self._heads[0].tensors[0].is_inference()
        return made and not torch.is_inference_mode_enabled()

    def view(self) -> LooseKV:
        """The layer as it is now."""
        return LooseKV.of(self._layer, self._heads)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, part: int) -> None:
        """New tokens of every head: keys [Hkv, T, C], values [Hkv, T, Dv], int32 [T].

        A row that has to be copied gets room for `SLACK` more, or for a `part`-th if that is less.
        """
        num = len(positions)
        more = [positions]
        if len(self._heads[0].tensors) > 3:
            more.append(torch.zeros(num, device=keys.device))
        for head, key, value in zip(self._heads, keys, values, strict=True):
            head.reserve(num, min(SLACK, (head.size + num) // part + 1))
            head.insert([key, value, *more])

    def apply(self, gaps: Gaps, append: AppendToken | None) -> bool:
        """Drop and append entries; False, and nothing has changed, if that takes a copy."""
        heads = self._heads
        if self.is_frozen or any(
            head.room > head.size - len(gone) + head.size // 8 + SLACK
            for head, gone in zip(heads, gaps.ranges, strict=True)
        ):
            return False
        tails = gaps.tails or (0,) * len(heads)
        if append is not None and not self._fits(append):
            return False
        for head, gone, tail in zip(heads, gaps.ranges, tails, strict=True):
            head.size -= tail
            head.synthetic -= min(tail, head.synthetic)
            if len(gone):
                real = head.size - head.synthetic
                head.synthetic -= len(range(max(gone.start, real), gone.stop))
                head.drop(gone)
        if append is not None:
            for i, h in enumerate(append.heads):
                head = heads[h]
                head.reserve(1, SLACK)
                at = head.start + head.size
                head.tensors[0][at] = append.keys[i]
                head.tensors[1][at] = append.values[i]
                head.tensors[2][at] = SYNTHETIC
                head.tensors[3][at] = math.log(append.mass[i])
                head.size, head.synthetic = head.size + 1, head.synthetic + 1
        return True

    def _fits(self, plan: AppendToken) -> bool:
        """Whether it is a plan for these rows; if not, `apply_plan` says what is wrong."""
        heads, num = self._heads, len(plan.heads)
        shapes = [(num, x.shape[1]) for x in heads[0].tensors[:2]]
        return (
            plan.bias is None
            and len(heads[0].tensors) > 3
            and len(set(plan.heads)) == num == len(plan.mass)
            and all(0 <= head < len(heads) for head in plan.heads)
            and [tuple(plan.keys.shape), tuple(plan.values.shape)] == shapes
            and all(0 < mass < math.inf for mass in plan.mass)
        )
