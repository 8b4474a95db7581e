# SPDX-License-Identifier: Apache-2.0
"""One layer of a block: `LayerKV`, in one of two forms.

- **dense** (`row_lengths is None`): all KV heads hold equally many entries, keys [Hkv, T, D];
- **packed**: heads differ; the rows of head 0, then of head 1, ... lie in one [N, D] tensor.

Entry means one kept token (or a synthetic one). A layer that nothing was evicted from is dense with
a `range` of positions: it holds nothing besides keys and values and may be a view of an engine's
tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvlib.errors import ShapeError

__all__ = ["SYNTHETIC", "Gaps", "LayerKV", "Row", "keys_only"]

SYNTHETIC = -1
"""Position of an entry that stands for no single token (a compensation token)."""


class Row(NamedTuple):
    """The entries of one KV head: keys [n, C], values [n, Dv], int32 and float32 [n]."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    log_weight: Tensor | None

    def weights(self) -> Tensor:
        """`log_weight`, zeros where there is none."""
        if self.log_weight is not None:
            return self.log_weight
        return torch.zeros(len(self.positions), device=self.keys.device)


class Gaps(NamedTuple):
    """Consecutive entries of each KV head's row, whose length is given; perhaps none.

    Where there are `tails`, so many last entries of each row too, behind its range.
    """

    lengths: tuple[int, ...]
    ranges: tuple[range, ...]
    device: torch.device
    tails: tuple[int, ...] | None = None

    def fit(self, layer: "LayerKV") -> bool:
        """Whether there are such entries in the layer."""
        tails = self.tails or (0,) * len(self.lengths)
        return self.lengths == layer.lengths and all(
            0 <= gone.start <= gone.stop <= n - tail <= n and gone.step == 1
            for n, gone, tail in zip(self.lengths, self.ranges, tails, strict=True)
        )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _storage_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and bits (NaN payloads and the sign of zero included)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = _BITS[a.element_size()]  # of the same size: a view whatever the strides
    return torch.equal(a.view(bits), b.view(bits))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerKV:
    """The keys and values of one layer, one row of entries per KV head.

    Attributes:
        layer_idx: index in the model.
        keys: [Hkv, T, C] dense or [N, C] packed; C is k_head_dim, or the number of kept channels.
        values: [Hkv, T, Dv] or [N, Dv], same dtype and device as `keys`.
        positions: absolute position of every entry. A `range` of length T when all heads hold the
            same consecutive tokens; otherwise an int32 tensor of `keys.shape[:-1]`, ascending
            within a row, synthetic entries (`SYNTHETIC`) last.
        row_lengths: entries of each head when packed, None when dense.
        log_weight: float32 of `keys.shape[:-1]`, added to an entry's attention logit; None means 0.
        channels: int64 [Hkv, C], ascending: which key channels were kept; None means all.
        rest: [Hkv, R, k_head_dim - C], the other channels of the last R entries of every row, whose
            keys are still whole; zeros where an entry has lost them. A row shorter than R uses the
            last of its columns. None where no entry has them.
    """

    layer_idx: int
    keys: Tensor
    values: Tensor
    positions: range | Tensor
    row_lengths: tuple[int, ...] | None = None
    log_weight: Tensor | None = None
    channels: Tensor | None = None
    rest: Tensor | None = None

    def __post_init__(self) -> None:
        """Check shapes and dtypes; `validate` checks contents, which may wait for a device."""
        rank = 3 if self.row_lengths is None else 2
        lead = self.keys.shape[:-1]
        if self.keys.dim() != rank or self.values.dim() != rank or self.values.shape[:-1] != lead:
            form = "[Hkv, T, D]" if rank == 3 else "[N, D] with row_lengths"
            raise ShapeError(
                f"layer {self.layer_idx}: keys {tuple(self.keys.shape)} and values "
                f"{tuple(self.values.shape)} do not agree; expected {form} with equal leading sizes"
            )
        if self.keys.dtype != self.values.dtype or self.keys.device != self.values.device:
            raise ShapeError(
                f"layer {self.layer_idx}: keys are {self.keys.dtype} on {self.keys.device}, values "
                f"{self.values.dtype} on {self.values.device}; expected the same"
            )
        if self.row_lengths is not None and (
            sum(self.row_lengths) != lead[0] or any(n < 0 for n in self.row_lengths)
        ):
            raise ShapeError(
                f"layer {self.layer_idx}: row_lengths {self.row_lengths} do not sum to {lead[0]} "
                "entries"
            )
        if isinstance(self.positions, range):
            if (
                rank != 3
                or self.positions.step != 1
                or len(self.positions) != lead[1]
                or self.positions.start < 0
            ):
                raise ShapeError(
                    f"layer {self.layer_idx}: positions {self.positions} do not fit; a range needs "
                    f"dense rows, step 1 and as many positions as entries ({lead[-1]})"
                )
        else:
            self._check_entry_tensor("positions", self.positions, torch.int32)
        if self.log_weight is not None:
            self._check_entry_tensor("log_weight", self.log_weight, torch.float32)
        if self.channels is not None:
            want = (self.num_kv_heads, self.keys.shape[-1])
            if tuple(self.channels.shape) != want or self.channels.dtype != torch.int64:
                raise ShapeError(
                    f"layer {self.layer_idx}: channels are {self.channels.dtype} "
                    f"{tuple(self.channels.shape)}; expected int64 {want}"
                )

        if self.rest is not None and (
            self.channels is None
            or self.rest.dim() != 3
            or self.rest.shape[0] != self.num_kv_heads
            or self.rest.dtype != self.keys.dtype
            or self.rest.device != self.keys.device
        ):
            raise ShapeError(
                f"layer {self.layer_idx}: rest is {self.rest.dtype} {tuple(self.rest.shape)} on "
                f"{self.rest.device}; expected {self.keys.dtype} [{self.num_kv_heads}, R, pruned "
                "channels] beside channels"
            )

    def _check_entry_tensor(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        if x.shape != self.keys.shape[:-1] or x.dtype != dtype or x.device != self.keys.device:
            raise ShapeError(
                f"layer {self.layer_idx}: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; "
                f"expected {dtype} {tuple(self.keys.shape[:-1])} on {self.keys.device}"
            )

    @classmethod
    def from_rows(
        cls, layer_idx: int, rows: Sequence[Row], *, channels: Tensor | None = None
    ) -> Self:
        """A layer from one `Row` per head: dense if they are equally long, else packed."""
        lengths = tuple(row.keys.shape[0] for row in rows)
        dense = len(set(lengths)) == 1
        weighted = any(row.log_weight is not None for row in rows)

        def together(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(parts)) if dense else torch.cat(list(parts))

        return cls(
            layer_idx=layer_idx,
            keys=together([row.keys for row in rows]),
            values=together([row.values for row in rows]),
            positions=together([row.positions for row in rows]),
            row_lengths=None if dense else lengths,
            log_weight=together([row.weights() for row in rows]) if weighted else None,
            channels=channels,
        )

    @property
    def is_dense(self) -> bool:
        """Whether all heads hold the same number of entries in a [Hkv, T, D] tensor."""
        return self.row_lengths is None

    @property
    def apart(self) -> bool:
        """Whether `rows` are at hand, and the tensors of all of them have to be put together."""
        return False

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.keys.shape[0] if self.row_lengths is None else len(self.row_lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each head."""
        return (
            (self.keys.shape[1],) * self.keys.shape[0]
            if self.row_lengths is None
            else self.row_lengths
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, metadata included."""
        tensors = [self.keys, self.values, self.log_weight, self.channels, self.rest]
        if isinstance(self.positions, Tensor):
            tensors.append(self.positions)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def positions_tensor(self) -> Tensor:
        """Positions as int32 of `keys.shape[:-1]`; a `range` is expanded over the heads."""
        if isinstance(self.positions, range):
            p = torch.arange(
                self.positions.start,
                self.positions.stop,
                dtype=torch.int32,
                device=self.keys.device,
            )
            return p.expand(self.keys.shape[0], -1)
        return self.positions

    def row(self, head: int) -> Row:
        """Views of the entries of KV head `head`."""
        positions = self.positions_tensor()
        index: int | slice = head
        if self.row_lengths is not None:
            starts = [0, *accumulate(self.row_lengths)]
            index = slice(starts[head], starts[head + 1])
        weight = None if self.log_weight is None else self.log_weight[index]
        return Row(self.keys[index], self.values[index], positions[index], weight)

    def alone(self, head: int) -> "LayerKV":
        """Views of the entries of KV head `head`, as a dense layer."""
        row = self.row(head)
        return LayerKV(
            layer_idx=self.layer_idx,
            keys=row.keys[None],
            values=row.values[None],
            positions=row.positions[None],
            log_weight=None if row.log_weight is None else row.log_weight[None],
            channels=None if self.channels is None else self.channels[head : head + 1],
        )

    def rows(self) -> list[Row]:
        """`row` of every head."""
        return [self.row(head) for head in range(self.num_kv_heads)]

    def with_entries(self, keys: Tensor, values: Tensor, positions: Tensor) -> "LayerKV":
        """The same dense layer with other entries, which the caller answers for.

        What `replace` does, without the checks: a step of a small model takes them 60 times.
        """
        new = object.__new__(LayerKV)
        put = object.__setattr__
        put(new, "layer_idx", self.layer_idx)
        put(new, "keys", keys)
        put(new, "values", values)
        put(new, "positions", positions)
        put(new, "row_lengths", None)
        put(new, "log_weight", self.log_weight)
        put(new, "channels", self.channels)
        put(new, "rest", self.rest)
        return new

    def select(self, rows: Sequence[Tensor]) -> "LayerKV":
        """Copies of chosen entries: int64 indices into each head's row, one tensor a head."""
        if len(rows) != self.num_kv_heads:
            raise ShapeError(
                f"layer {self.layer_idx}: {len(rows)} index rows for {self.num_kv_heads} KV heads"
            )
        num = len(rows[0])
        if self.is_dense and all(len(row) == num for row in rows):
            return self._select_dense(torch.stack(list(rows)).to(self.keys.device))
        starts = [0, *accumulate(self.lengths)][:-1]
        parts = [row.to(self.keys.device) + start for row, start in zip(rows, starts, strict=True)]
        index = torch.cat(parts)
        lengths = tuple(len(row) for row in rows)
        equal = len(set(lengths)) == 1

        def picked(x: Tensor) -> Tensor:
            flat = x.flatten(0, 1) if self.is_dense else x
            out = flat.index_select(0, index)
            return out.unflatten(0, (len(rows), num)) if equal else out

        weight = self.log_weight
        return replace(
            self,
            keys=picked(self.keys),
            values=picked(self.values),
            positions=picked(self.positions_tensor()),
            row_lengths=None if equal else lengths,
            log_weight=None if weight is None else picked(weight),
            rest=self.select_rest(rows),
        )

    def select_rest(self, rows: Sequence[Tensor]) -> Tensor | None:
        """`rest` of `select(rows)`, a copy."""
        if self.rest is None:
            return None
        tail = self.rest.shape[1]
        slots = [
            row[row >= n - tail].to(self.rest.device) - (n - tail)
            for row, n in zip(rows, self.lengths, strict=True)
        ]
        longest = max(len(mine) for mine in slots)
        out = self.rest.new_zeros(len(slots), longest, self.rest.shape[-1])
        for head, mine in enumerate(slots):
            out[head, longest - len(mine) :] = self.rest[head, mine]
        return out

    def _select_dense(self, index: Tensor) -> "LayerKV":
        """Dense rows from dense rows: int64 [Hkv, n]; every entry is copied once."""

        def picked(x: Tensor) -> Tensor:
            out = x.new_empty(*index.shape, x.shape[-1])
            for head in range(len(index)):
                torch.index_select(x[head], 0, index[head], out=out[head])
            return out

        weight = self.log_weight
        return replace(
            self,
            keys=picked(self.keys),
            values=picked(self.values),
            positions=self.positions_tensor().gather(1, index),
            log_weight=None if weight is None else weight.gather(1, index),
            rest=self.select_rest(list(index)),
        )

    def slice(self, start: int, stop: int) -> "LayerKV":
        """The entries with position in [start, stop).

        Views when dense over a range, copies otherwise.

        Raises:
            ShapeError: the layer holds synthetic entries, which belong to no position.
        """
        if isinstance(self.positions, range):
            first = min(max(start - self.positions.start, 0), len(self.positions))
            last = min(max(stop - self.positions.start, first), len(self.positions))
            weight = None if self.log_weight is None else self.log_weight[:, first:last]
            return replace(
                self,
                keys=self.keys[:, first:last],
                values=self.values[:, first:last],
                positions=self.positions[first:last],
                log_weight=weight,
            )
        if bool((self.positions == SYNTHETIC).any()):
            raise ShapeError(
                f"layer {self.layer_idx} holds synthetic entries, which belong to no position: it "
                "can only be kept whole"
            )
        # In int64: the end of the longest sequence, 2^31, is no int32, and would wrap around.
        places = [row.positions.long() for row in self.rows()]
        return self.select([((at >= start) & (at < stop)).nonzero()[:, 0] for at in places])

    def validate(self) -> None:
        """Check contents: positions ascending and unique in each row, synthetic last.

        Channels ascending; no NaN weight.

        Raises:
            ShapeError: naming the first row that is wrong.
        """
        if isinstance(self.positions, Tensor):
            for head, row in enumerate(self.rows()):
                real = row.positions[: int((row.positions != SYNTHETIC).sum())]
                if bool((real < 0).any()) or bool((real[1:] <= real[:-1]).any()):
                    raise ShapeError(
                        f"layer {self.layer_idx}, head {head}: positions must ascend without "
                        f"repeats, synthetic entries ({SYNTHETIC}) last"
                    )
        if self.log_weight is not None and not bool(torch.isfinite(self.log_weight).all()):
            raise ShapeError(f"layer {self.layer_idx}: log_weight holds a value that is not finite")
        if self.channels is not None and bool(
            (self.channels[:, 1:] <= self.channels[:, :-1]).any() | (self.channels < 0).any()
        ):
            raise ShapeError(
                f"layer {self.layer_idx}: channels must ascend without repeats in every head"
            )

    def equal(self, other: "LayerKV") -> bool:
        """Whether both hold the same bits; a range equals the same positions written out."""
        if (self.layer_idx, self.lengths) != (other.layer_idx, other.lengths):
            return False
        if self.keys.shape[-1] != other.keys.shape[-1] or (self.channels is None) != (
            other.channels is None
        ):
            return False
        mine, theirs = self.channels, other.channels
        if mine is not None and theirs is not None and not torch.equal(mine, theirs):
            return False
        if (self.rest is None) != (other.rest is None):
            return False
        a, b = self.rest, other.rest
        if a is not None and b is not None and not _storage_equal(a, b):
            return False
        for row, its in zip(self.rows(), other.rows(), strict=True):
            if not all(_storage_equal(a, b) for a, b in zip(row[:3], its[:3], strict=True)):
                return False
            if (row.log_weight is None) != (its.log_weight is None):
                return False
            a, b = row.log_weight, its.log_weight
            if a is not None and b is not None and not _storage_equal(a, b):
                return False
        return True


def keys_only(layer_idx: int, keys: Tensor) -> LayerKV:
    """A layer of keys [Hkv, S, D] without values: for statistics."""
    positions = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
    return LayerKV(
        layer_idx=layer_idx,
        keys=keys,
        values=keys[..., :0],
        positions=positions.expand(len(keys), -1),
    )
