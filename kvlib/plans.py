# SPDX-License-Identifier: Apache-2.0
"""Decisions as data: what a policy wants done to a layer, and the one executor.

A policy returns plans and never touches a tensor. `apply_plan` carries the plans of one layer out
in this order, whatever order they are given in: KeepTokens, MergeTokens, AppendToken, Reposition,
KeepChannels, Demote. Entry indices of KeepTokens, MergeTokens and Demote refer to the layer **as it
was before any plan**, row by row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kvlib.blocks import SYNTHETIC, LayerKV, Row
from kvlib.errors import ConfigError, ShapeError
from kvlib.layer_kv import Gaps
from kvlib.spec import RopeSpec

__all__ = [
    "AppendToken",
    "AppliedPlan",
    "Demote",
    "KeepChannels",
    "KeepTokens",
    "MergeTokens",
    "Plan",
    "Reposition",
    "apply_plan",
    "other_channels",
]


@dataclass(frozen=True, slots=True, eq=False)
class KeepTokens:
    """Keep these entries, drop the others.

    Attributes:
        rows: int64 [n_h] for each KV head, ascending and unique; lengths may differ.
        gaps: which entries go, where that is one range of each row; None if it is not known.
    """

    rows: tuple[Tensor, ...]
    gaps: Gaps | None = None

    @classmethod
    def without(cls, gaps: Gaps) -> "KeepTokens":
        """All but one range of each row: a step's plan, cheap since `rows` are made when read."""
        plan = object.__new__(cls)
        object.__setattr__(plan, "gaps", gaps)
        return plan

    def __getattr__(self, name: str) -> Any:
        """`rows`, if they have not been made."""
        if name != "rows":
            raise AttributeError(name)
        assert self.gaps is not None  # noqa: S101
        rows = []
        tails = self.gaps.tails or (0,) * len(self.gaps.lengths)
        for n, gone, tail in zip(self.gaps.lengths, self.gaps.ranges, tails, strict=True):
            index = torch.arange(n - len(gone) - tail, device=self.gaps.device)
            rows.append(index + len(gone) * (index >= gone.start))
        object.__setattr__(self, "rows", tuple(rows))
        return self.rows


@dataclass(frozen=True, slots=True, eq=False)
class MergeTokens:
    """Replace entries by weighted sums: x[dst] = sum over pairs with that dst of weight * x[src].

    A destination that should contribute itself is listed as a pair with src == dst. Sums are in
    float32 over the values from before the plan; sources may be entries that KeepTokens drops,
    destinations must be kept.

    Attributes:
        head: int64 [M] KV head of each pair.
        src: int64 [M] entry index within that head's row.
        dst: int64 [M] entry index within that head's row.
        weight: float32 [M].
        axis: which of keys and values are merged.
    """

    head: Tensor
    src: Tensor
    dst: Tensor
    weight: Tensor
    axis: Literal["both", "keys", "values"] = "both"


@dataclass(frozen=True, slots=True, eq=False)
class AppendToken:
    """Append one synthetic entry (position -1) to the rows of some heads.

    Attributes:
        heads: ascending KV heads that get one.
        keys: [len(heads), C].
        values: [len(heads), Dv].
        mass: how many tokens each stands for; the entry's logit gets + log(mass) ...
        bias: ... unless float32 [len(heads)] is given, which is then added instead.
    """

    heads: tuple[int, ...]
    keys: Tensor
    values: Tensor
    mass: tuple[float, ...]
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reposition:
    """Move entries to other positions, re-rotating their keys by the difference.

    Attributes:
        positions: new position of every entry as KeepTokens (and AppendToken) left them: int32,
            packed row after row, `SYNTHETIC` where the entry is synthetic.
    """

    positions: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class KeepChannels:
    """Keep these key channels, drop the others.

    Attributes:
        channels: int64 [Hkv, C], ascending: indices into the model's key channels.
        whole_tail: the last so many entries of every row, and all later tokens, keep all their
            channels (`LayerKV.rest`); None prunes later tokens too.
    """

    channels: Tensor
    whole_tail: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Demote:
    """Take these entries out of the layer, but hand them back instead of dropping them.

    Attributes:
        rows: int64 [n_h] for each KV head, ascending and unique; every one must be kept by
            KeepTokens if there is one.
    """

    rows: tuple[Tensor, ...]


Plan: TypeAlias = KeepTokens | MergeTokens | AppendToken | Reposition | KeepChannels | Demote
_ORDER = (KeepTokens, MergeTokens, AppendToken, Reposition, KeepChannels, Demote)


def other_channels(channels: Tensor, width: int) -> Tensor:
    """The channels of 0..width-1 that are not in int64 [Hkv, C], ascending: [Hkv, width - C]."""
    others = torch.ones(len(channels), width, dtype=torch.bool, device=channels.device)
    others.scatter_(1, channels, False)
    return others.nonzero()[:, 1].view(len(channels), -1)


class AppliedPlan(NamedTuple):
    """The layer after its plans, and the entries that go to a lower tier."""

    layer: LayerKV
    demoted: LayerKV | None


def apply_plan(
    layer: LayerKV, plans: Plan | Sequence[Plan], *, rope: RopeSpec | None = None
) -> AppliedPlan:
    """Carry out the plans of one layer.

    The input is left untouched; the result does not reference what was dropped.

    Args:
        layer: any form.
        plans: at most one of each kind.
        rope: the layer's rotary embedding; needed by Reposition.

    Raises:
        ShapeError: indices out of range, not ascending, or a destination that is not kept.
        ConfigError: two plans of one kind; a Reposition without fixed frequencies or of pruned
            keys.
    """
    by_kind = _sort_plans(plans)
    source = layer.rows()
    device = layer.keys.device
    kept = [torch.arange(len(row.positions), device=device) for row in source]
    keep = by_kind.get(KeepTokens)
    if isinstance(keep, KeepTokens):
        _check_rows(keep.rows, layer, "KeepTokens")
        kept = [row.to(device) for row in keep.rows]
        if all(len(index) == n for index, n in zip(kept, layer.lengths, strict=True)):
            keep = None  # everything stays: no copy, and a range of positions survives
    demote = by_kind.get(Demote)
    if len(by_kind) == (KeepTokens in by_kind) and keep is None:
        return AppliedPlan(layer, None)

    rows, rest = source, layer.rest
    if rest is not None and {MergeTokens, AppendToken, KeepChannels} & set(by_kind):
        raise ConfigError(
            f"layer {layer.layer_idx}: keys with pruned channels beside whole ones cannot be "
            "merged, joined by synthetic ones or pruned again"
        )
    if keep is not None:
        selected = layer.select(kept)
        rows, rest = selected.rows(), selected.rest
    merge = by_kind.get(MergeTokens)
    if isinstance(merge, MergeTokens):
        rows = _merge(rows, source, kept, merge, layer.layer_idx)
    append = by_kind.get(AppendToken)
    if isinstance(append, AppendToken):
        rows = _append(rows, append, layer.layer_idx)
    move = by_kind.get(Reposition)
    if isinstance(move, Reposition):
        if layer.channels is not None:
            raise ConfigError(
                f"layer {layer.layer_idx}: keys with pruned channels cannot be moved to other "
                "positions"
            )
        rows = _reposition(rows, move, rope, layer.layer_idx)
    channels = layer.channels
    prune = by_kind.get(KeepChannels)
    if isinstance(prune, KeepChannels):
        rest = _rest(rows, layer, prune)
        rows, channels = _keep_channels(rows, layer, prune)
    changed = LayerKV.from_rows(layer.layer_idx, rows, channels=channels)
    if rest is not None:
        changed = replace(changed, rest=rest)
    if (
        isinstance(layer.positions, range)
        and changed.is_dense
        and keep is None
        and not {AppendToken, Reposition} & set(by_kind)
    ):
        changed = replace(changed, positions=layer.positions)
    if not isinstance(demote, Demote):
        return AppliedPlan(changed, None)
    return _demote(changed, kept, demote, layer)


def _sort_plans(plans: Plan | Sequence[Plan]) -> dict[type, Plan]:
    given: list[Plan] = [plans] if isinstance(plans, _ORDER) else list(plans)
    by_kind: dict[type, Plan] = {}
    for plan in given:
        kind = type(plan)
        if kind not in _ORDER:
            raise ConfigError(
                f"{kind.__name__} is not a plan; expected one of "
                f"{', '.join(k.__name__ for k in _ORDER)}"
            )
        if kind in by_kind:
            raise ConfigError(
                f"two {kind.__name__} plans for one layer; a layer takes at most one of each kind"
            )
        by_kind[kind] = plan
    return by_kind


def _check_rows(rows: Sequence[Tensor], layer: LayerKV, name: str) -> None:
    if len(rows) != layer.num_kv_heads:
        raise ShapeError(
            f"{name} has {len(rows)} rows for the {layer.num_kv_heads} KV heads of layer "
            f"{layer.layer_idx}"
        )
    for head, (row, n) in enumerate(zip(rows, layer.lengths, strict=True)):
        if row.dtype != torch.int64 or row.dim() != 1:
            raise ShapeError(
                f"{name}, head {head}: expected int64 [n], got {row.dtype} {tuple(row.shape)}"
            )
        if len(row) and (int(row[0]) < 0 or int(row[-1]) >= n or bool((row[1:] <= row[:-1]).any())):
            raise ShapeError(
                f"{name}, head {head}: indices must ascend without repeats within 0..{n - 1}"
            )


def _merge(
    rows: Sequence[Row],
    source: Sequence[Row],
    kept: Sequence[Tensor],
    plan: MergeTokens,
    layer_idx: int,
) -> list[Row]:
    if plan.axis not in ("both", "keys", "values"):
        raise ConfigError(f"the axis of a merge is both, keys or values, got {plan.axis!r}")
    sizes = {tuple(x.shape) for x in (plan.head, plan.src, plan.dst, plan.weight)}
    if len(sizes) != 1 or plan.head.dim() != 1:
        raise ShapeError(
            f"layer {layer_idx}: head, src, dst and weight of a merge must have one length, got "
            f"{sizes}"
        )
    if len(plan.head) and not 0 <= int(plan.head.min()) <= int(plan.head.max()) < len(rows):
        raise ShapeError(f"layer {layer_idx}: a merge names a KV head outside 0..{len(rows) - 1}")
    out = []
    for head, row in enumerate(rows):
        mine = (plan.head == head).nonzero()[:, 0]
        if len(mine) == 0:
            out.append(row)
            continue
        src, dst = plan.src[mine], plan.dst[mine]
        n = len(source[head].positions)
        if int(torch.cat([src, dst]).min()) < 0 or int(torch.cat([src, dst]).max()) >= n:
            raise ShapeError(
                f"layer {layer_idx}, head {head}: a merge index lies outside 0..{n - 1}"
            )
        slot = torch.full((n,), -1, dtype=torch.int64, device=row.keys.device)
        slot[kept[head]] = torch.arange(len(kept[head]), device=row.keys.device)
        target = slot[dst]
        if bool((target < 0).any()):
            raise ShapeError(
                f"layer {layer_idx}, head {head}: a merge writes into an entry that is not kept"
            )
        weight = plan.weight[mine].to(torch.float32)[:, None]
        keys, values = row.keys, row.values
        if plan.axis != "values":
            keys = _weighted(keys, source[head].keys, src, target, weight)
        if plan.axis != "keys":
            values = _weighted(values, source[head].values, src, target, weight)
        out.append(row._replace(keys=keys, values=values))
    return out


def _weighted(x: Tensor, source: Tensor, src: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    total.index_add_(0, target, weight * source[src].to(torch.float32))
    touched = torch.unique(target)
    merged = x.clone()
    merged[touched] = total[touched].to(x.dtype)
    return merged


def _append(rows: Sequence[Row], plan: AppendToken, layer_idx: int) -> list[Row]:
    n = len(plan.heads)
    if not (len(plan.keys) == len(plan.values) == len(plan.mass) == n) or len(set(plan.heads)) != n:
        raise ShapeError(
            f"layer {layer_idx}: AppendToken needs one key, value and mass for each of its "
            "distinct heads"
        )
    widths = (rows[0].keys.shape[-1], rows[0].values.shape[-1])
    if (tuple(plan.keys.shape), tuple(plan.values.shape)) != ((n, widths[0]), (n, widths[1])):
        raise ShapeError(
            f"layer {layer_idx}: AppendToken has keys {tuple(plan.keys.shape)} and values "
            f"{tuple(plan.values.shape)}; expected {(n, widths[0])} and {(n, widths[1])}"
        )
    if plan.bias is None:
        if any(not 0 < m < math.inf for m in plan.mass):
            raise ShapeError(
                f"layer {layer_idx}: the mass of an appended entry must be positive, got "
                f"{plan.mass}"
            )
    elif tuple(plan.bias.shape) != (n,) or not bool(torch.isfinite(plan.bias).all()):
        raise ShapeError(
            f"layer {layer_idx}: the bias of appended entries must be {n} finite numbers, got "
            f"{plan.bias}"
        )
    out = list(rows)
    for i, head in enumerate(plan.heads):
        if not 0 <= head < len(rows):
            raise ShapeError(f"layer {layer_idx}: AppendToken names KV head {head} of {len(rows)}")
        row = rows[head]
        bias = math.log(plan.mass[i]) if plan.bias is None else float(plan.bias[i])
        old = row.weights()
        out[head] = Row(
            torch.cat([row.keys, plan.keys[i : i + 1].to(row.keys)]),
            torch.cat([row.values, plan.values[i : i + 1].to(row.values)]),
            torch.cat([row.positions, row.positions.new_full((1,), SYNTHETIC)]),
            torch.cat([old, old.new_full((1,), bias)]),
        )
    return out


def _reposition(
    rows: Sequence[Row], plan: Reposition, rope: RopeSpec | None, layer_idx: int
) -> list[Row]:
    total = sum(len(row.positions) for row in rows)
    if plan.positions.dtype != torch.int32 or tuple(plan.positions.shape) != (total,):
        raise ShapeError(
            f"layer {layer_idx}: Reposition has {plan.positions.dtype} "
            f"{tuple(plan.positions.shape)}; expected int32 [{total}]"
        )
    out = []
    start = 0
    for row in rows:
        new = plan.positions[start : start + len(row.positions)].to(row.positions.device)
        start += len(row.positions)
        synthetic = row.positions == SYNTHETIC
        if bool((synthetic != (new == SYNTHETIC)).any()):
            raise ShapeError(
                f"layer {layer_idx}: a synthetic entry has no position to move from or to"
            )
        real = new[~synthetic]
        if bool((real < 0).any()) or bool((real[1:] <= real[:-1]).any()):
            raise ShapeError(
                f"layer {layer_idx}: positions must ascend without repeats within a row"
            )
        shift = torch.where(synthetic, 0, new - row.positions)
        out.append(row._replace(keys=rotate(row.keys, shift, rope), positions=new))
    return out


def rotate(keys: Tensor, shift: Tensor, rope: RopeSpec | None) -> Tensor:
    """Rotate post-RoPE keys [n, D] by `shift` int32 [n] positions.

    Computed in float32 with float64 angles.

    The model's attention scaling (yarn) is in the keys already and is not applied again.

    Raises:
        ConfigError: `rope` is None, or its frequencies depend on the sequence length.
        ShapeError: it rotates more channels than the keys have.
    """
    if rope is None:
        raise ConfigError("moving keys to other positions needs the layer's RopeSpec")
    frequencies = torch.tensor(rope.inverse_frequencies(), dtype=torch.float64, device=keys.device)
    angle = shift.to(torch.float64)[:, None] * frequencies  # [n, rotary_dim / 2]
    cos, sin = angle.cos().to(torch.float32), angle.sin().to(torch.float32)
    x = keys.to(torch.float32)
    first, last = rope.first_channel, rope.first_channel + rope.rotary_dim
    if last > keys.shape[-1]:
        raise ShapeError(f"RoPE rotates channels up to {last} of keys of {keys.shape[-1]} channels")
    turned = x[:, first:last]
    if rope.interleaved:
        a, b = turned[:, 0::2], turned[:, 1::2]
        pair = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        pair = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    moved = torch.cat([x[:, :first], pair, x[:, last:]], dim=-1).to(keys.dtype)
    return torch.where((shift == 0)[:, None], keys, moved)  # what stays keeps its bits


def _keep_channels(
    rows: Sequence[Row], layer: LayerKV, plan: KeepChannels
) -> tuple[list[Row], Tensor]:
    channels = plan.channels.to(layer.keys.device)
    width = layer.keys.shape[-1]
    if channels.dtype != torch.int64 or channels.dim() != 2 or channels.shape[0] != len(rows):
        raise ShapeError(
            f"layer {layer.layer_idx}: KeepChannels is {channels.dtype} {tuple(channels.shape)}; "
            f"expected int64 [{len(rows)}, C]"
        )
    if channels.numel() and (
        int(channels.min()) < 0 or bool((channels[:, 1:] <= channels[:, :-1]).any())
    ):
        raise ShapeError(
            f"layer {layer.layer_idx}: KeepChannels must ascend without repeats in every head"
        )
    out = []
    for head, row in enumerate(rows):
        held = (
            torch.arange(width, device=channels.device)
            if layer.channels is None
            else layer.channels[head]
        )
        where = torch.searchsorted(held, channels[head].contiguous())
        found = where < len(held)
        if not bool(found.all()) or not bool((held[where] == channels[head]).all()):
            raise ShapeError(
                f"layer {layer.layer_idx}, head {head}: KeepChannels names a channel that is not "
                "there"
            )
        out.append(row._replace(keys=row.keys[:, where]))
    return out, channels


def _rest(rows: Sequence[Row], layer: LayerKV, plan: KeepChannels) -> Tensor | None:
    """The channels that `plan` prunes, of the entries that keep them."""
    if plan.whole_tail is None:
        return None
    if plan.whole_tail < 0 or layer.channels is not None:
        raise ShapeError(
            f"layer {layer.layer_idx}: whole_tail is {plan.whole_tail}; expected 0 or more, and "
            "None for keys whose channels were pruned before"
        )
    device = layer.keys.device
    others = other_channels(plan.channels.to(device), layer.keys.shape[-1])
    longest = min(plan.whole_tail, max(len(row.positions) for row in rows))
    rest = layer.keys.new_zeros(len(rows), longest, others.shape[1])
    for head, row in enumerate(rows):
        mine = row.keys[max(len(row.keys) - longest, 0) :]
        rest[head, longest - len(mine) :] = mine[:, others[head]]
    return rest


def _demote(changed: LayerKV, kept: Sequence[Tensor], plan: Demote, layer: LayerKV) -> AppliedPlan:
    _check_rows(plan.rows, layer, "Demote")
    leave, stay = [], []
    for head, (index, row) in enumerate(zip(kept, plan.rows, strict=True)):
        gone = torch.isin(index, row.to(index.device))
        if int(gone.sum()) != len(row):
            raise ShapeError(
                f"Demote, head {head}: an entry is to be demoted that KeepTokens drops"
            )
        extra = changed.lengths[head] - len(index)  # appended entries stay
        gone = torch.cat([gone, gone.new_zeros(extra)])
        leave.append(gone.nonzero()[:, 0])
        stay.append((~gone).nonzero()[:, 0])
    return AppliedPlan(changed.select(stay), changed.select(leave))
