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

from kvlib.attention import Logits, column_sums
from kvlib.blocks import LayerKV
from kvlib.cache_layers import LayerRow
from kvlib.eviction.base import LayerState, Needs

__all__ = ["MAX_ROLLBACK", "Signals"]

MAX_ROLLBACK = 128
"""Tokens of the newest forward pass that can be taken back while a rollback is being recorded."""


@dataclass(slots=True)
class _Observed:
    """What is known of one layer of one sequence.

    Attributes:
        logits: how the layer makes logits.
        sums: column sums of the queries that cannot be taken back.
        tail: [Hq, m, D], queries that can.
        window: [Hq, w + m, D], last queries of the prompt, or of a later pass.
        window_sums: the same as sums, where they came with the attention itself.
    """

    logits: Logits
    sums: Tensor | None = None
    tail: Tensor | None = None
    window: Tensor | None = None
    window_sums: Tensor | None = None


class Collected(NamedTuple):
    """For a `LayerView`."""

    column_sums: Tensor | None
    window_sums: Tensor | None


class Signals:
    """What a policy asked for, by layer and sequence."""

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self._held: dict[tuple[int, int], _Observed] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held between a pass and its decision, and of the prompt's last queries."""
        tensors = [
            x
            for seen in self._held.values()
            for x in (seen.sums, seen.tail, seen.window, seen.window_sums)
        ]
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    def wants(self, *, is_step: bool) -> bool:
        """Whether queries have to be observed."""
        needs = self._needs
        if is_step:
            return needs.step_column_sums or needs.step_query_window > 0
        return needs.prefill_column_sums or needs.query_window > 0

    def come_with_attention(self, num: int) -> bool:
        """Whether the column sums of a step of `num` tokens are all that is wanted."""
        needs = self._needs
        one = num == 1 and needs.step_query_window > 0  # its sums are those of the last queries
        return one or (needs.step_column_sums and not needs.step_query_window)

    def put(self, layer_idx: int, sequence: int, sums: Tensor | None) -> None:
        """Take column sums that came with the attention itself."""
        needs = self._needs
        self._held[layer_idx, sequence] = _Observed(
            Logits(),
            sums=sums if needs.step_column_sums else None,
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
        needs = self._needs
        sums_wanted = needs.step_column_sums if is_step else needs.prefill_column_sums
        window = needs.step_query_window if is_step else needs.query_window
        if not (sums_wanted or window) or query.shape[1] == 0:
            return
        seen = self._held.setdefault((layer_idx, sequence), _Observed(logits))
        seen.logits = logits
        loose = min(query.shape[1], MAX_ROLLBACK) if may_roll_back else 0
        fixed = query.shape[1] - loose
        if sums_wanted:
            seen.tail = query[:, fixed:].clone() if loose else None
            if fixed:
                sums = column_sums(query[:, :fixed], _without_last(held(), loose), logits)
                seen.sums = torch.nn.functional.pad(sums, (0, loose))
        if window:
            last = query if seen.window is None else torch.cat([seen.window, query], dim=1)
            seen.window = last[:, -(window + loose) :].clone()

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
            return Collected(None, None)
        sums = None if seen.sums is None else seen.sums[..., : max(held.lengths)]
        if seen.tail is not None and seen.tail.shape[1] > removed:
            late = column_sums(seen.tail[:, : seen.tail.shape[1] - removed], held, seen.logits)
            sums = late if sums is None else sums + late
        window = seen.window_sums
        seen.sums = seen.tail = None
        if seen.window is not None:
            needs = self._needs
            left = seen.window[:, : seen.window.shape[1] - removed]
            seen.window = left[:, -(needs.step_query_window if is_step else needs.query_window) :]
            if not in_prompt and seen.window.shape[1]:
                window = column_sums(seen.window, held, seen.logits)
        if not in_prompt:
            del self._held[layer_idx, sequence]
        return Collected(sums, window)

    def fork(self, needs: Needs | None = None) -> "Signals":
        """A copy, perhaps for fewer needs; its tensors are shared: none is ever written to."""
        twin = Signals(needs or self._needs)
        twin._held = {key: replace(seen) for key, seen in self._held.items()}
        for seen in twin._held.values():
            if not twin._needs.prefill_column_sums:
                seen.sums = None
            if not twin._needs.query_window:
                seen.window = None
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
