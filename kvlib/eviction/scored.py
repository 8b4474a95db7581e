# SPDX-License-Identifier: Apache-2.0
"""Policies that score entries and keep the highest: scorer, allocator and protector apart.

A **scorer** gives every entry of every KV head a number. A **protector** names entries that stay
whatever their score. An **allocator** says how many each head of each layer keeps. Any scorer is a
policy by itself, with a uniform allocation and the protector it brings along; in a method string
others take their places: ``snapkv:budget=0.25+adakv:floor=0.2+protect:sinks=4,window=32``.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView, Needs, Plans, ProbeView, Resources
from kvlib.eviction.select import drop_lowest, plan_highest, tokens_to_keep

__all__ = ["Allocator", "PolicyBase", "Protect", "ScoredPolicy", "plan_scored"]


class PolicyBase:
    """A policy that keeps everything and asks for nothing: override what differs."""

    __slots__ = ()

    def check(self, resources: Resources) -> None:
        """Any model will do."""

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Nothing to note."""

    def on_prefill_piece(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """No plans."""
        return [() for _ in views]

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """No extra passes."""
        return ()

    def on_probe(self, view: ProbeView) -> None:
        """Nothing to note."""

    def rerun(self, prompt: Tensor, views: Sequence[LayerView]) -> Tensor | None:
        """Nothing is run again."""
        return None

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """No plans."""
        return [() for _ in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """No plans."""
        return [() for _ in views]


@dataclass(frozen=True, slots=True)
class Protect:
    """Entries that always stay: the first `sinks` and the last `window` of each row.

    In a method it takes the place of what the policy protects by itself: `snapkv+protect:sinks=4`
    no longer protects SnapKV's window. A system prompt is protected by as many sinks as it has
    tokens. Where the budget is smaller than both together, sinks come first, then the newest
    tokens.

    Args:
        sinks: first entries.
        window: last entries.
    """

    sinks: int = 0
    window: int = 0
    name: ClassVar[str] = "protect"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    def __post_init__(self) -> None:
        """Check the parameters."""
        if self.sinks < 0 or self.window < 0:
            raise ConfigError(
                f"protect: sinks and window must be 0 or more, got {self.sinks} and {self.window}"
            )

    def within(self, budget: int) -> tuple[int, int]:
        """How many first and last entries a row of `budget` entries protects."""
        sinks = min(self.sinks, budget)
        return sinks, min(self.window, budget - sinks)

    def mark(self, scores: Tensor, lengths: Sequence[int], budgets: Sequence[int]) -> Tensor:
        """A copy of scores [Hkv, S] with infinity for protected entries, and -inf behind rows."""
        out = scores.clone()
        if len(set(lengths)) == len(set(budgets)) == 1:
            self._mark(out, lengths[0], budgets[0])
            return out
        for row, n, budget in zip(out, lengths, budgets, strict=True):
            self._mark(row[None], n, budget)
        return out

    def _mark(self, scores: Tensor, length: int, budget: int) -> None:
        sinks, window = self.within(budget)
        scores[:, length:] = -torch.inf
        scores[:, : min(sinks, length)] = torch.inf
        scores[:, max(length - window, 0) : length] = torch.inf


@runtime_checkable
class Allocator(Protocol):
    """Says how many entries each head of each layer keeps. A frozen dataclass, like a policy."""

    @property
    def name(self) -> str:
        """As it is registered."""

    @property
    def whole_model(self) -> bool:
        """Whether all layers have to be known together."""

    @property
    def fixed(self) -> bool:
        """Whether what a head is given stays fixed; if not, it is given anew at every decision."""

    def allocate(
        self,
        views: Sequence[LayerView],
        scores: Sequence[Tensor],
        budgets: Sequence[int],
        protect: Protect,
    ) -> list[list[int]]:
        """Entries to keep, [layers][Hkv].

        Args:
            views: layers that are decided together.
            scores: [Hkv, S] of each, nothing marked yet.
            budgets: entries per head that the budget means for each layer.
            protect: entries that stay anyway; they count.
        """


class ScoredPolicy(PolicyBase):
    """A scorer as a policy. Subclasses are frozen dataclasses with at least the field `budget`."""

    __slots__ = ()
    budget: float | int

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """Signals asked for."""

    @abstractmethod
    def scores(self, view: LayerView) -> Tensor:
        """Float32 [Hkv, S], or [1, S] where all heads of a layer keep the same entries."""

    def protected(self, budget: int) -> Protect:
        """What stays anyway of so many entries, unless the method says otherwise."""
        return Protect()

    @property
    def allocator(self) -> Allocator | None:
        """How heads share the budget, unless the method says otherwise; None for uniform."""
        return None

    def observe(self, view: LayerView) -> None:
        """Take note of a forward, of the prompt or later, in `view.state`."""

    def target(self, view: LayerView) -> int | None:
        """Entries per head that the budget means; None for all."""
        return tokens_to_keep(view, self.budget)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Take note."""
        self.observe(view)

    def on_prefill_piece(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Down to the budget, if pieces are evicted at all."""
        return self.on_prefill_end(views)

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """The prompt down to the budget."""
        return plan_scored(self, self.allocator, None, views)

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """As many as came go again, if the budget is full."""
        if not self.needs.steps:
            return [() for _ in views]
        for view in views:
            self.observe(view)
        return plan_scored(self, self.allocator, None, views)


def plan_scored(
    scorer: ScoredPolicy,
    allocator: Allocator | None,
    protect: Protect | None,
    views: Sequence[LayerView],
) -> list[Plans]:
    """Keep the highest-scored and the protected entries of every head.

    Args:
        scorer: gives scores and the budget.
        allocator: None for the same budget everywhere. What one that is `fixed` has given a head
            stays afterwards, in `state.values["budgets"]`.
        protect: entries that stay anyway; None for what the scorer brings along.
        views: layers that are decided together.
    """
    plans: list[Plans] = [() for _ in views]
    fixed = allocator is None or allocator.fixed
    over = []
    for i, view in enumerate(views):
        target = scorer.target(view)
        if target is None:
            continue
        given = view.state.values.get("budgets")
        budgets = None if given is None else given.tolist()
        longest = max(view.layer.lengths)
        if longest > (target if budgets is None else min(budgets)) or (longest and not fixed):
            scores = scorer.scores(view).expand(view.layer.num_kv_heads, -1)
            over.append((i, view, scores, target, budgets))
    fresh = [(view, scores, n) for _, view, scores, n, budgets in over if budgets is None]
    allocated: list[list[int]] = [[n] * view.layer.num_kv_heads for view, _, n in fresh]
    if allocator is not None and fresh:
        guard = protect or scorer.protected(fresh[0][2])
        layers, every, targets = (list(x) for x in zip(*fresh, strict=True))
        allocated = allocator.allocate(layers, every, targets, guard)
        for (view, _, _), mine in zip(fresh, allocated, strict=True) if fixed else ():
            view.state.values["budgets"] = torch.tensor(mine)
    for i, view, scores, target, budgets in over:
        mine = allocated.pop(0) if budgets is None else budgets
        lengths = view.layer.lengths
        if any(n > budget for n, budget in zip(lengths, mine, strict=True)):
            guard = protect or scorer.protected(target)
            safe = [guard.within(budget) for budget in mine]
            plan = drop_lowest(scores, lengths, mine, safe)
            plans[i] = plan or plan_highest(guard.mark(scores, lengths, mine), lengths, mine)
    if not scorer.needs.steps:  # what was noted of the prompt has served its purpose
        for view in views:
            view.state.entries.clear()
    return plans
