# SPDX-License-Identifier: Apache-2.0
"""What a policy declares, sees, remembers and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from kvlib.blocks import LayerKV
from kvlib.budget import round_budget
from kvlib.errors import ConfigError
from kvlib.plans import KeepTokens, Plan

__all__ = [
    "LayerState",
    "LayerView",
    "Needs",
    "Plans",
    "Policy",
    "check_budget",
    "keep_highest",
    "keep_rows",
    "keeps_all",
    "tokens_to_keep",
]

Plans: TypeAlias = Sequence[Plan]
"""The plans of one layer, empty to leave it alone."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Signals that a policy asks for; nothing else is computed.

    Attributes:
        prefill_column_sums: attention that every entry receives from every query of the prompt.
        step_column_sums: the same from the queries of every later step.
        query_window: attention received from this many last queries of the prompt.
        step_query_window: the same from the last queries of every later forward, which may have
            one token or many.
        whole_model: whether plans depend on all layers together. If not, a layer is evicted as soon
            as its own attention is done, before the next layer fills up.
        steps: whether `on_step` is to be called at all; a policy that decides at the end of the
            prompt and then keeps everything says no, and costs nothing afterwards.
    """

    prefill_column_sums: bool = False
    step_column_sums: bool = False
    query_window: int = 0
    step_query_window: int = 0
    whole_model: bool = False
    steps: bool = True

    @classmethod
    def union(cls, every: Sequence["Needs"]) -> "Needs":
        """What all of them need together."""
        return cls(
            prefill_column_sums=any(needs.prefill_column_sums for needs in every),
            step_column_sums=any(needs.step_column_sums for needs in every),
            query_window=max(needs.query_window for needs in every),
            step_query_window=max(needs.step_query_window for needs in every),
            whole_model=any(needs.whole_model for needs in every),
            steps=any(needs.steps for needs in every),
        )

    @property
    def any_signal(self) -> bool:
        """Whether anything has to be computed for the policy."""
        sums = self.prefill_column_sums or self.step_column_sums
        return sums or self.query_window > 0 or self.step_query_window > 0


@dataclass(slots=True)
class LayerState:
    """What a policy remembers of one layer of one sequence. It belongs to the sequence.

    Attributes:
        entries: one number for each entry of the layer, by name: tensors of the layer's
            `keys.shape[:-1]`. They follow the rows: entries that a plan drops lose theirs, new
            entries begin with 0.
        values: anything else, by name.
    """

    entries: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        every = [*self.entries.values(), *self.values.values()]
        return sum(x.numel() * x.element_size() for x in every)

    def fork(self) -> "LayerState":
        """A copy that shares nothing."""
        return LayerState(
            {name: x.clone() for name, x in self.entries.items()},
            {name: x.clone() for name, x in self.values.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """One layer of one sequence, as a policy sees it after a forward pass. Read only, but `state`.

    Attributes:
        layer: every entry, the new ones included.
        state: the policy's own.
        num_new: tokens of this forward; their entries are the last real ones of each row.
        num_prompt: tokens of the prompt, in a prefill those seen so far.
        num_seen: tokens of the sequence, evicted ones included.
        column_sums: float32 [Hkv, G, S], attention received from this forward's queries; None if
            not asked for.
        window_sums: float32 [Hkv, G, S], attention received from the last `query_window` queries of
            the prompt (fewer if it is shorter) at the end of the prefill, and from the last
            `step_query_window` queries of a later forward; None otherwise.
    """

    layer: LayerKV
    state: LayerState
    num_new: int
    num_prompt: int
    num_seen: int
    column_sums: Tensor | None = None
    window_sums: Tensor | None = None


@runtime_checkable
class Policy(Protocol):
    """Decides what is kept. Implementations are frozen dataclasses: their fields are parameters.

    `version` grows when what is remembered changes its meaning: older snapshots are then refused.

    A policy object holds no state and serves any number of sequences. Calls for one layer, in
    order: `on_prefill_chunk` for every forward of the prompt, `on_prefill_end` once after the last
    of them, then `on_step` after every later forward, of one token or of many.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    status: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """Signals asked for."""

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Take note of a forward of the prompt in `view.state`."""

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Plans for each view: all layers if `needs.whole_model`, else one layer at a time."""

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Plans after a later forward, as in `on_prefill_end`."""


def tokens_to_keep(view: LayerView, budget: float | int) -> int | None:
    """Entries per head that a budget means for this sequence; None for all of them.

    A fraction is one of the prompt, fixed when the prompt ends. The fraction 1 keeps everything,
    later tokens too.
    """
    if keeps_all(budget) or view.num_prompt == 0:  # a prompt that was all padding has no fraction
        return None
    if isinstance(budget, int):
        return budget
    held = view.state.values.get("budget")
    if held is None:
        held = torch.tensor(round_budget(budget, view.num_prompt))
        view.state.values["budget"] = held
    return int(held)


def keeps_all(budget: float | int) -> bool:
    """Whether the budget is the fraction 1: nothing is ever evicted."""
    return isinstance(budget, float) and budget == 1.0


def check_budget(name: str, budget: float | int) -> None:
    """Refuse a budget that means no number of tokens.

    Raises:
        ConfigError: naming the policy.
    """
    try:
        round_budget(budget, 1)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    if budget == 0:
        raise ConfigError(f"{name}: a budget of 0 tokens leaves nothing to attend to")


def keep_highest(scores: Tensor, num: int) -> Tensor:
    """Indices [Hkv, num] of the highest scores [Hkv, S] of each head, ascending.

    Of equal scores the lower index is kept.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :num].sort(dim=-1).values


def keep_rows(indices: Tensor) -> Plans:
    """The plan that keeps the same number of entries [Hkv, n] in every head."""
    return (KeepTokens(tuple(indices.unbind(0))),)
