# SPDX-License-Identifier: Apache-2.0
"""One layer of one sequence once something was evicted: a `LayerKV` that grows and is cut down.

Dense rows grow in buffers with a little room ahead, and the common step, which drops one entry of
each head and perhaps merges some, moves what lies behind or before it in place. Rows of unequal
length, or with compensation tokens, do the same in buffers of their own (`kvlib.cache_ragged`).
Everything else is copied.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvlib.blocks import SYNTHETIC, LayerKV
from kvlib.cache_ragged import SLACK, LooseKV, LooseRows, find_gaps, slide
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerState, Plans
from kvlib.layer_kv import Gaps
from kvlib.plans import (
    AppendToken,
    Demote,
    KeepTokens,
    MergeTokens,
    apply_plan,
    other_channels,
)
from kvlib.spec import RopeSpec

__all__ = ["LayerRow", "extend_entries"]

_MERGED = {"both": (0, 1), "keys": (0,), "values": (1,)}
"""Which of a row's buffers a merge writes to."""


class LayerRow:
    """One layer of one sequence: a `LayerKV` that can grow and be cut down, and policy state."""

    def __init__(self, layer: LayerKV, state: LayerState) -> None:
        self.layer = layer
        self.state = state
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None
        self._start = 0  # where the entries begin in the buffers
        self._loose: LooseRows | None = None  # where rows are unequal, or weighted
        self._shrinks = False  # was cut down since it last grew: much slack would be wasted

    @property
    def nbytes(self) -> int:
        """Bytes held, space to grow and policy state included."""
        if self._loose is not None:
            return self._loose.nbytes + self.state.nbytes
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
        loose = self._loose
        if loose is None and isinstance(layer.positions, range):
            self._append_rows(keys, values, positions)
        elif loose is None and layer.is_dense and layer.log_weight is None:
            self._append_dense(keys, values, positions)
        elif layer.rest is None:
            if loose is None or loose.is_frozen:
                loose = LooseRows(layer)
                self._loose, self._buffers, self._start = loose, None, 0
            loose.append(keys, values, positions, 64 if self._shrinks else 16)
            self._shrinks = False
            self.layer = loose.view()
        else:
            self._append_rows(keys, values, positions)
        if rest is not None:
            self.layer = replace(self.layer, rest=rest)

    def _append_rows(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Into rows that are unequal or weighted, with `rest` or a range: copies everything."""
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
            size = new + min(SLACK, new // (64 if self._shrinks else 16) + 1)
            self._shrinks, self._start = False, 0
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
        elif buffers[0].shape[1] < self._start + new:  # room is left in front only
            for x in buffers:
                x[:, :old] = x[:, self._start : self._start + old].clone()
            self._start = 0
        where = slice(self._start + old, self._start + new)
        for x, more in zip(buffers, (keys, values, positions), strict=True):
            x[:, where] = more
        self._view(new)

    def _view(self, size: int) -> None:
        assert self._buffers is not None  # noqa: S101
        where = slice(self._start, self._start + size)
        self.layer = self.layer.with_entries(*(x[:, where] for x in self._buffers))

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
        self._loose = None

    def apply(self, plans: Plans, rope: RopeSpec | None) -> None:
        """Carry out a policy's plans; what they drop is freed."""
        before = self.layer
        if self._loose is not None:
            if self._cut_loose(self._loose, plans):
                return
        elif self._compact(plans):
            return
        applied = apply_plan(before, plans, rope=rope)
        if applied.demoted is not None:
            raise ConfigError("this cache has no lower tier to demote entries to")
        if applied.layer is before:
            return
        follow_plans(self.state, before, plans, applied.layer)
        self.layer = applied.layer
        self._buffers, self._start, self._loose = None, 0, None
        self._shrinks = True

    def _cut_loose(self, loose: LooseRows, plans: Plans) -> bool:
        """Carry out plans that drop a range of each row and append synthetic entries, in place."""
        kinds = {type(plan): plan for plan in plans}
        keep, append = kinds.pop(KeepTokens, None), kinds.pop(AppendToken, None)
        if kinds or len(plans) > 2 or not isinstance(keep, KeepTokens):
            return False
        before = self.layer
        gaps = find_gaps(keep, before)
        extra = append if isinstance(append, AppendToken) else None
        if gaps is None or not loose.apply(gaps, extra):
            return False
        self.layer = loose.view()
        if not self.state.entries:
            pass
        elif extra is None and gaps.tails is None:
            _drop_entries(self.state, gaps)
        else:
            follow_plans(self.state, before, plans, self.layer)
        if self.layer.is_dense and self.layer.row(0).log_weight is None:
            self.layer, self._loose = loose.view().packed(), None
        return True

    def _compact(self, plans: Plans) -> bool:
        """Carry out plans that keep and merge entries within the buffers, moving what has to move.

        The common step of a cache at its budget drops one entry of each head. A copy of everything
        would cost more than the attention itself.
        """
        layer, buffers = self.layer, self._buffers
        only = next((plan for plan in plans if isinstance(plan, KeepTokens)), None)
        merge = next((plan for plan in plans if isinstance(plan, MergeTokens)), None)
        if (
            buffers is None
            or only is None
            or len(plans) != 1 + (merge is not None)
            or not layer.is_dense
            or (merge is not None and layer.rest is not None)
        ):
            return False
        held = layer.keys.shape[1]
        if only.gaps is not None and layer.rest is None:
            return self._close(only, merge)
        num = len(only.rows[0])
        if (
            len({len(row) for row in only.rows}) > 1
            or len(only.rows) != layer.num_kv_heads
            or buffers[0].shape[1] > num + num // 8 + SLACK  # too much room would stay
            or (buffers[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            return False
        if not num:
            return False
        index = torch.stack(list(only.rows)).to(layer.keys.device)
        order = torch.arange(num, device=index.device)
        gone = held - num
        if gone == 1:  # the usual step: fewer questions say as much
            gap = (index == order).sum(1)
            if not torch.equal(index, order + (order >= gap[:, None])):
                return False
            gaps = gap.tolist()
            front, back = min(gaps), num - max(gaps)
        else:
            checks = [
                (index[:, 1:] <= index[:, :-1]).any(),
                index[:, 0].amin(),
                index[:, -1].amax(),
                (index == order).sum(1).amin(),  # ascending: the front of the row, which may stay
                (index == order + gone).sum(1).amin(),  # or its back
            ]
            found = torch.stack([x.long() for x in checks]).tolist()
            disorder, lowest, highest, front, back = found
            if disorder or lowest < 0 or highest >= held:
                return False  # apply_plan says what is wrong
        merged: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        if merge is not None:
            changes = _merged(merge, buffers, self._start, held, index)
            if changes is None:
                return False
            merged = changes
        rest = layer.select_rest(only.rows)
        # Either what lies behind the gaps moves to the front, or what lies before them to the back.
        begin, end, shift = (front, num, 0) if front >= back else (0, num - back, gone)
        heads, room = buffers[0].shape[:2]
        firsts = torch.arange(self._start, heads * room, room, device=index.device)
        source = (index[:, begin:end] + firsts[:, None]).flatten()
        where = slice(self._start + shift + begin, self._start + shift + end)
        for x in buffers:
            moved = x.flatten(0, 1).index_select(0, source)
            x[:, where] = moved.view(heads, -1, *x.shape[2:])
        self._start += shift
        for x, head, slot, new in merged:
            x[head, slot + self._start] = new
        for name, entry in self.state.entries.items():
            self.state.entries[name] = entry.gather(1, index.to(entry.device))
        self._view(num)
        if rest is not None:
            self.layer = replace(self.layer, rest=rest)
        return True

    def _close(self, keep: KeepTokens, merge: MergeTokens | None) -> bool:
        """`_compact` for a plan that says itself which range of each row goes."""
        layer, buffers, gaps = self.layer, self._buffers, keep.gaps
        assert buffers is not None and gaps is not None  # noqa: S101, PT018
        held = layer.keys.shape[1]
        counts = {len(gone) for gone in gaps.ranges}
        gone = counts.pop()
        num, room = held - gone, buffers[0].shape[1]
        if (
            counts
            or num < 1
            or gaps.tails is not None
            or not gaps.fit(layer)
            or room > num + num // 8 + SLACK
            or (buffers[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            return False
        merged: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        if merge is not None:
            changes = _merged_few(merge, buffers, self._start, gaps)
            if changes is None:
                return False
            merged = changes
        before = sum(gap.start for gap in gaps.ranges)
        to_the_back = before <= num * len(gaps.ranges) - before
        for x in buffers:
            flat = x.flatten(0, 1)
            for head, gap in enumerate(gaps.ranges):
                first = head * room + self._start
                if to_the_back:
                    slide(flat, first + gone, first, gap.start)
                else:
                    slide(flat, first + gap.start, first + gap.stop, held - gap.stop)
        self._start += gone if to_the_back else 0
        for x, of, slot, new in merged:
            x[of, slot + self._start] = new
        _drop_entries(self.state, gaps)
        self._view(num)
        return True

    def fork(self) -> "LayerRow":
        """A copy that shares nothing."""
        layer = self.layer
        if isinstance(layer, LooseKV):
            layer = layer.packed()
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


def _merged(
    plan: MergeTokens, buffers: Sequence[Tensor], start: int, held: int, kept: Tensor
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]] | None:
    """What a merge writes: buffer, head, slot among `kept` int64 [Hkv, n], and new entries.

    None for a plan that `apply_plan` refuses.
    """
    device = kept.device
    head, src, dst = (x.to(device) for x in (plan.head, plan.src, plan.dst))
    if not (len(head) == len(src) == len(dst) == len(plan.weight)) or plan.axis not in _MERGED:
        return None
    if not len(head):
        return []
    heads = len(kept)
    if int(head.min()) < 0 or int(head.max()) >= heads:
        return None
    if int(torch.minimum(src, dst).min()) < 0 or int(torch.maximum(src, dst).max()) >= held:
        return None
    targets, pair = torch.unique(head * held + dst, return_inverse=True)
    head_of, dst_of = targets // held, targets % held
    slot = torch.searchsorted(kept[head_of], dst_of[:, None])[:, 0].clamp(max=kept.shape[1] - 1)
    if bool((kept[head_of, slot] != dst_of).any()):
        return None
    return _sums(plan, buffers, (head, src + start), pair, (head_of, slot))


def _merged_few(
    plan: MergeTokens, buffers: Sequence[Tensor], start: int, gaps: Gaps
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]] | None:
    """`_merged` where `gaps` say what goes, for a few pairs: looked at one by one."""
    pairs = list(zip(plan.head.tolist(), plan.src.tolist(), plan.dst.tolist(), strict=False))
    if {len(x) for x in (plan.head, plan.src, plan.dst, plan.weight)} != {len(pairs)}:
        return None
    places: dict[tuple[int, int], int] = {}
    group = []
    for head, src, dst in pairs:
        if not (0 <= head < len(gaps.lengths) and 0 <= src < gaps.lengths[head]):
            return None
        gone = gaps.ranges[head]
        if not 0 <= dst < gaps.lengths[head] or dst in gone:
            return None
        slot = dst - len(gone) if dst >= gone.start else dst
        group.append(places.setdefault((head, slot), len(places)))
    if plan.axis not in _MERGED:
        return None
    if not pairs:
        return []
    device = buffers[0].device
    source = plan.head.to(device), plan.src.to(device) + start
    to = torch.tensor(list(places), device=device).unbind(1)
    return _sums(plan, buffers, source, torch.tensor(group, device=device), (to[0], to[1]))


def _sums(
    plan: MergeTokens,
    buffers: Sequence[Tensor],
    source: tuple[Tensor, Tensor],
    group: Tensor,
    to: tuple[Tensor, Tensor],
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What `_merged` returns, of pairs by destination: source, `group` and destinations."""
    weight = plan.weight.to(group.device, torch.float32)[:, None]
    out = []
    for which in _MERGED[plan.axis]:
        x = buffers[which]
        total = x.new_zeros(len(to[0]), x.shape[-1], dtype=torch.float32)
        total.index_add_(0, group, weight * x[source].to(torch.float32))
        out.append((x, *to, total.to(x.dtype)))
    return out


def _gather_channels(keys: Tensor, channels: Tensor) -> Tensor:
    """The channels int64 [Hkv, C] of keys [Hkv, T, D]."""
    return keys.gather(-1, channels[:, None, :].expand(-1, keys.shape[1], -1))


def extend_entries(state: LayerState, old: Sequence[int], layer: LayerKV) -> None:
    """Give new entries (before the synthetic ones) the number 0 in every per-entry tensor.

    Args:
        state: whose tensors have the shape of the layer before it grew.
        old: entries per head before.
        layer: the grown layer.
    """
    if tuple(old) == layer.lengths:
        return
    if not state.entries:
        return
    weighted = layer.row(0).log_weight is not None if layer.apart else layer.log_weight is not None
    for name, x in state.entries.items():
        grown = layer.lengths[0] - old[0]
        if layer.is_dense and not weighted:
            state.entries[name] = torch.nn.functional.pad(x, (0, grown))
            continue
        rows: list[Tensor] = []
        parts = x.unbind(0) if x.dim() == 2 else x.split(list(old))
        if not weighted:
            for part, was, now in zip(parts, old, layer.lengths, strict=True):
                rows += [part, x.new_zeros(now - was)]
            state.entries[name] = torch.cat(rows)
            continue
        for head, part in enumerate(parts):
            row = layer.row(head)
            at = int((row.positions != SYNTHETIC).sum()) - (layer.lengths[head] - old[head])
            rows.append(_insert(part, at, part.new_zeros(layer.lengths[head] - old[head])))
        state.entries[name] = torch.stack(rows) if layer.is_dense else torch.cat(rows)


def _drop_entries(state: LayerState, gaps: Gaps) -> None:
    """Take a range of each row out of every per-entry tensor."""
    left_over = {n - len(gone) for n, gone in zip(gaps.lengths, gaps.ranges, strict=True)}
    equal = len(left_over) == 1  # then the rows are dense, whatever they were
    for name, x in state.entries.items():
        flat, parts, start = x.flatten(), [], 0
        for n, gone in zip(gaps.lengths, gaps.ranges, strict=True):
            parts += [flat[start : start + gone.start], flat[start + gone.stop : start + n]]
            start += n
        left = torch.cat(parts)
        state.entries[name] = left.view(len(gaps.lengths), -1) if equal else left


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
