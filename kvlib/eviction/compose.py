# SPDX-License-Identifier: Apache-2.0
"""Policies that work together: what ``+`` in a method string means.

A composition has a token policy, which decides which entries stay, and around it at most one each
of: an allocator, a protector, and a channel policy, which prunes what the token policy has left. An
allocator and a protector need a policy that scores entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Plans, Policy, ProbeView, Resources
from kvlib.eviction.scored import Allocator, PolicyBase, Protect, ScoredPolicy, plan_scored
from kvlib.plans import apply_plan

__all__ = ["ChannelPolicy", "Composed", "compose"]

_KINDS = {
    "tokens": "policy that decides which tokens stay",
    "allocator": "allocator",
    "protect": "protector",
    "channels": "policy that prunes channels",
}


class ChannelPolicy(PolicyBase):
    """A policy that decides once, at the end of the prompt, and only which channels are kept."""

    __slots__ = ()


@dataclass(frozen=True)
class Composed(PolicyBase):
    """See the module.

    Args:
        tokens: decides which entries stay.
        allocator: shares the budget between heads and layers; None for uniform.
        protect: what stays anyway; None for what the token policy brings along.
        channels: prunes channels of what is left.
    """

    tokens: Policy
    allocator: Allocator | None = None
    protect: Protect | None = None
    channels: Policy | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        extra = [part.name for part in (self.allocator, self.protect) if part is not None]
        if extra and not isinstance(self.tokens, ScoredPolicy):
            raise ConfigError(
                f"{' and '.join(extra)} cannot work with {self.tokens.name!r}, which does not keep "
                "the highest of scores: put a scoring policy such as snapkv or h2o first"
            )
        if self.channels is not None and self.tokens.needs.rerun:
            raise ConfigError(
                f"{self.tokens.name!r} runs the tokens it keeps again and {self.channels.name!r} "
                "judges channels by the queries of the first pass: they cannot work together"
            )
        if self.channels is not None and self.tokens.needs.step_keys:
            raise ConfigError(
                f"{self.tokens.name!r} reads whole keys in every step and {self.channels.name!r} "
                "prunes them: they cannot work together"
            )

    @property
    def parts(self) -> tuple[Any, ...]:
        """The parts that are there, in the order of the method string."""
        every = (self.tokens, self.allocator, self.protect, self.channels)
        return tuple(part for part in every if part is not None)

    @property
    def name(self) -> str:
        """The token policy's."""
        return self.tokens.name

    @property
    def version(self) -> int:
        """Grows with every part's."""
        return sum(part.version for part in self.parts)

    @property
    def status(self) -> str:
        """Experimental if a part is."""
        return "stable" if all(p.status == "stable" for p in self.parts) else "experimental"

    @property
    def about(self) -> About:
        """The token policy's."""
        return self.tokens.about

    @property
    def needs(self) -> Needs:
        """Of all parts."""
        needs = self.tokens.needs
        if self.allocator is not None and self.allocator.whole_model:
            needs = replace(needs, whole_model=True)
        if self.channels is not None:
            needs = Needs.union([needs, self.channels.needs])
        return needs

    def check(self, resources: Resources) -> None:
        """Ask every policy."""
        for part in (self.tokens, self.channels):
            if part is not None:
                part.check(resources)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """The token policy's business."""
        self.tokens.on_prefill_chunk(view)

    def on_prefill_piece(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """The token policy's business."""
        scorer = self._scorer
        return (
            self.tokens.on_prefill_piece(views) if scorer is None else self._scored(scorer, views)
        )

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """The token policy's business."""
        return self.tokens.probes(prompt, resources)

    def on_probe(self, view: ProbeView) -> None:
        """The token policy's business."""
        self.tokens.on_probe(view)

    def rerun(self, prompt: Tensor, views: Sequence[LayerView]) -> Tensor | None:
        """The token policy's business."""
        return self.tokens.rerun(prompt, views)

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Which entries stay, then which channels of those."""
        scorer = self._scorer
        if scorer is None:
            plans = list(self.tokens.on_prefill_end(views))
        else:
            plans = self._scored(scorer, views)
        if self.channels is None:
            return plans
        left = [
            replace(view, layer=apply_plan(view.layer, mine, rope=view.rope).layer)
            if mine
            else view
            for view, mine in zip(views, plans, strict=True)
        ]
        pruned = self.channels.on_prefill_end(left)
        return [(*mine, *more) for mine, more in zip(plans, pruned, strict=True)]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """The token policy's business."""
        if not self.tokens.needs.steps:
            return [() for _ in views]
        scorer = self._scorer
        if scorer is None:
            return self.tokens.on_step(views)
        for view in views:
            scorer.observe(view)
        return self._scored(scorer, views)

    @property
    def _scorer(self) -> ScoredPolicy | None:
        """The token policy if only its scores are wanted of it; None if it decides by itself."""
        alone = self.allocator is None and self.protect is None
        return None if alone or not isinstance(self.tokens, ScoredPolicy) else self.tokens

    def _scored(self, scorer: ScoredPolicy, views: Sequence[LayerView]) -> list[Plans]:
        return plan_scored(scorer, self.allocator or scorer.allocator, self.protect, views)


def compose(parts: Sequence[Any]) -> Policy:
    """One policy from the parts of a method, in whatever order they were written.

    Raises:
        ConfigError: two parts of one kind, or parts that do not fit.
    """
    given: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, ChannelPolicy):
            kind = "channels"
        elif isinstance(part, Protect):
            kind = "protect"
        else:
            kind = "allocator" if isinstance(part, Allocator) else "tokens"
        if kind in given:
            raise ConfigError(
                f"{given[kind].name!r} and {part.name!r} cannot work together: a method has one "
                f"{_KINDS[kind]}; leave one of them out"
            )
        given[kind] = part
    if list(given) == ["tokens"] or list(given) == ["channels"]:
        only: Policy = next(iter(given.values()))
        return only
    if "tokens" not in given:
        from kvlib.eviction.full import Full

        given["tokens"] = Full()
    return Composed(**given)


def own_params(cls: Any) -> set[str]:
    """Names of the parameters that a plug-in takes."""
    return {f.name for f in fields(cls) if f.init}
