# SPDX-License-Identifier: Apache-2.0
"""Signals between a forward pass and the policy's decision.

Normally the decision follows at once. While a rollback is being recorded it waits until it is known
which of the pass's last tokens stay, so that a token that was taken back has influenced nothing:
their queries are kept instead of what they looked at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvlib.attention import Logits, column_maxima, column_sums
from kvlib.blocks import LayerKV
from kvlib.cache_hidden import HiddenStates
from kvlib.cache_rows import LayerRow
from kvlib.eviction.base import LayerState, Needs, QueryMoments
from kvlib.plans import rotate
from kvlib.spec import RopeSpec

__all__ = ["MAX_ROLLBACK", "Signals"]

MAX_ROLLBACK = 128
"""Tokens of the newest forward pass that can be taken back while a rollback is being recorded."""


_BY_ENTRY = ("sums", "maxima", "local")


@dataclass(slots=True)
class _Observed:
    """What is known of one layer of one sequence.

    Attributes:
        logits: how the layer makes logits.
        sums: column sums of the queries that cannot be taken back.
        maxima: column maxima of them.
        local: column sums of them within a window.
        tail: [Hq, m, D], queries that can.
        window: [Hq, w + m, D], last queries of the prompt, or of a later pass.
        window_sums: the same as sums, where they came with the attention itself.
        moments: of the prompt's queries that cannot be taken back.
    """

    logits: Logits
    sums: Tensor | None = None
    maxima: Tensor | None = None
    local: Tensor | None = None
    tail: Tensor | None = None
    window: Tensor | None = None
    window_sums: Tensor | None = None
    moments: "_Moments | None" = None

    def tensors(self) -> list[Tensor]:
        """All that are held."""
        every = [self.sums, self.maxima, self.local, self.tail, self.window, self.window_sums]
        if self.moments is not None:
            every += [self.moments.first, self.moments.second]
        return [x for x in every if x is not None]


class _Moments(NamedTuple):
    """Sums over queries: how many, float64 [Hq, D] and [Hq, D, D]."""

    num: int
    first: Tensor
    second: Tensor

    def plus(self, queries: Sequence[Tensor]) -> "_Moments":
        """With more queries [t, D] of each head; a head at a time, or float64 would fill memory."""
        first, second = self.first.clone(), self.second.clone()
        for head, mine in enumerate(queries):
            x = mine.double()
            first[head] += x.sum(0)
            second[head] += x.T @ x
        return _Moments(self.num + len(queries[0]), first, second)

    def result(self) -> QueryMoments:
        """Mean and covariance; of no queries at all, zeros."""
        count = max(self.num, 1)
        mean = self.first / count
        covariance = self.second / count - mean[:, :, None] * mean[:, None, :]
        return QueryMoments(self.num, mean.float(), covariance.float())


class Collected(NamedTuple):
    """For a `LayerView`."""

    column_sums: Tensor | None = None
    local_sums: Tensor | None = None
    window_sums: Tensor | None = None
    column_maxima: Tensor | None = None
    last_queries: Tensor | None = None
    query_moments: QueryMoments | None = None
    logits: Logits = Logits()


class Signals:
    """What a policy asked for, by layer and sequence.

    Args:
        needs: what is computed.
        ropes: rotary embedding of each layer of the model.

    Attributes:
        hidden: what goes into the attention modules.
    """

    def __init__(self, needs: Needs, ropes: Sequence[RopeSpec | None] = ()) -> None:
        self.hidden = HiddenStates(needs)
        self._needs = needs
        self._ropes = ropes
        self._held: dict[tuple[int, int], _Observed] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held between a pass and its decision, and of the prompt's last queries."""
        tensors = [x for seen in self._held.values() for x in seen.tensors()]
        return sum(x.numel() * x.element_size() for x in tensors) + self.hidden.nbytes

    def _window(self, *, is_step: bool) -> int:
        needs = self._needs
        if is_step:
            return needs.step_query_window
        return max(needs.query_window, needs.last_queries)

    def wants(self, *, is_step: bool) -> bool:
        """Whether queries have to be observed."""
        needs = self._needs
        if self._window(is_step=is_step):
            return True
        if is_step:
            return needs.step_column_sums or needs.step_maxima
        some = needs.prefill_column_sums or needs.prefill_local_sums > 0
        return some or needs.query_moments is not None

    def come_with_attention(self, num: int) -> bool:
        """Whether the column sums of a step of `num` tokens are all that is wanted."""
        needs = self._needs
        if num == 1:  # then sums, maxima and those of the last queries are the same
            return self.wants(is_step=True)
        return needs.step_column_sums and not (needs.step_query_window or needs.step_maxima)

    def put(self, layer_idx: int, sequence: int, sums: Tensor | None, logits: Logits) -> None:
        """Take column sums that came with the attention itself."""
        needs = self._needs
        self._held[layer_idx, sequence] = _Observed(
            logits,
            sums=sums if needs.step_column_sums else None,
            maxima=sums if needs.step_maxima else None,
            window_sums=sums if needs.step_query_window else None,
        )

    def observe(
        self,
        layer_idx: int,
        sequence: int,
        query: Tensor,
        held: Callable[[], LayerKV],
        logits: Logits,
        *,
        is_step: bool,
        may_roll_back: bool,
    ) -> None:
        """Note a pass over one layer of one sequence.

        Args:
            layer_idx: index in the model.
            sequence: index in the batch.
            query: [Hq, t, D], the queries of the sequence's new tokens.
            held: gives the layer with those tokens in it.
            logits: how it makes logits.
            is_step: the prompt is complete.
            may_roll_back: the last `MAX_ROLLBACK` tokens may be taken back.
        """
        if not self.wants(is_step=is_step) or query.shape[1] == 0:
            return
        seen = self._held.setdefault((layer_idx, sequence), _Observed(logits))
        seen.logits = logits
        loose = min(query.shape[1], MAX_ROLLBACK) if may_roll_back else 0
        fixed = query.shape[1] - loose
        seen.tail = query[:, fixed:].clone() if loose else None
        if fixed:
            layer = held()
            late = _without_last(layer, loose) if loose else layer
            self._look(seen, query[:, :fixed], late, is_step=is_step)
            for name in _BY_ENTRY:
                x = getattr(seen, name)
                setattr(seen, name, None if x is None else torch.nn.functional.pad(x, (0, loose)))
        if window := self._window(is_step=is_step):
            last = query if seen.window is None else torch.cat([seen.window, query], dim=1)
            seen.window = last[:, -(window + loose) :].clone()

    def _look(self, seen: _Observed, query: Tensor, layer: LayerKV, *, is_step: bool) -> None:
        """Add what queries, whose tokens are the layer's last, look at."""
        needs = self._needs
        if needs.step_column_sums if is_step else needs.prefill_column_sums:
            sums = column_sums(query, layer, seen.logits)
            seen.sums = sums if seen.sums is None else seen.sums + sums
        if not is_step and needs.prefill_local_sums:
            near = replace(seen.logits, window=needs.prefill_local_sums)
            sums = column_sums(query, layer, near)
            seen.local = sums if seen.local is None else seen.local + sums
        if is_step and needs.step_maxima:
            most = column_maxima(query, layer, seen.logits)
            seen.maxima = most if seen.maxima is None else torch.maximum(seen.maxima, most)
        if not is_step and needs.query_moments is not None:
            positions = layer.positions_tensor()[0][-query.shape[1] :]
            rope = self._ropes[layer.layer_idx]
            skip = max(needs.query_moments - (max(layer.lengths) - query.shape[1]), 0)
            plain = [_unrotated(x[skip:], positions[skip:], rope) for x in query]
            heads, _, width = query.shape
            old = seen.moments
            if old is None:
                zeros = torch.zeros(heads, width, width, dtype=torch.float64, device=query.device)
                old = _Moments(0, zeros[..., 0], zeros)
            seen.moments = old.plus(plain)

    def collect(
        self,
        layer_idx: int,
        sequence: int,
        held: LayerKV,
        removed: int,
        *,
        is_step: bool,
        in_prompt: bool,
    ) -> Collected:
        """The signals of the pass, without its last `removed` tokens.

        Args:
            layer_idx: index in the model.
            sequence: index in the batch.
            held: the layer without those tokens.
            removed: tokens taken back.
            is_step: the pass was not one of the prompt.
            in_prompt: more of the prompt follows.
        """
        seen = self._held.get((layer_idx, sequence))
        if seen is None:
            return Collected()
        longest = max(held.lengths)
        for name in _BY_ENTRY:
            x = getattr(seen, name)
            setattr(seen, name, None if x is None else x[..., :longest])
        if seen.tail is not None and seen.tail.shape[1] > removed:
            late = seen.tail[:, : seen.tail.shape[1] - removed]
            self._look(seen, late, held, is_step=is_step)
        sums, maxima, local = seen.sums, seen.maxima, seen.local
        seen.sums = seen.maxima = seen.local = seen.tail = None
        if in_prompt:
            if seen.window is not None:
                left = seen.window[:, : seen.window.shape[1] - removed]
                seen.window = left[:, -self._window(is_step=is_step) :]
            return Collected(sums, local, logits=seen.logits)
        del self._held[layer_idx, sequence]
        window, last = seen.window_sums, None
        if seen.window is not None and seen.window.shape[1] > removed:
            left = seen.window[:, : seen.window.shape[1] - removed]
            needs = self._needs
            voting = needs.step_query_window if is_step else needs.query_window
            if voting:
                window = column_sums(left[:, -voting:], held, seen.logits)
            if needs.last_queries and not is_step:
                last = left[:, -needs.last_queries :]
        moments = None if seen.moments is None else seen.moments.result()
        return Collected(sums, local, window, maxima, last, moments, seen.logits)

    def fork(self, needs: Needs | None = None) -> "Signals":
        """A copy, perhaps for fewer needs; its tensors are shared: none is ever written to."""
        twin = Signals(needs or self._needs, self._ropes)
        twin.hidden.copy_from(self.hidden)
        twin._held = {key: replace(seen) for key, seen in self._held.items()}
        for seen in twin._held.values():
            if not twin._needs.prefill_column_sums:
                seen.sums = None
            if not twin._needs.prefill_local_sums:
                seen.local = None
            if not twin._window(is_step=False):
                seen.window = None
            if twin._needs.query_moments is None:
                seen.moments = None
        return twin

    def take(self, order: Sequence[int]) -> None:
        """Make the batch consist of these sequences."""
        old = self._held
        self._held = {
            (layer_idx, new): replace(seen)
            for (layer_idx, sequence), seen in old.items()
            for new, i in enumerate(order)
            if i == sequence
        }


def _without_last(layer: LayerKV, num: int) -> LayerKV:
    """The layer as it was `num` tokens ago."""
    if num == 0:
        return layer
    row = LayerRow(layer, LayerState())
    row.truncate(num)
    return row.layer


def _unrotated(query: Tensor, positions: Tensor, rope: RopeSpec | None) -> Tensor:
    """Queries [t, D] of one head turned back by their positions; an attention factor stays."""
    if rope is None:
        return query
    return rotate(query.float(), -positions.to(query.device), rope)
