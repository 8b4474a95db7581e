# SPDX-License-Identifier: Apache-2.0
"""The contract over every registered policy, and what it catches."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from kvlib.eviction import POLICIES, Needs, build_policy
from kvlib.eviction.h2o import H2O
from kvlib.plans import KeepTokens
from kvlib.testing.policies import PolicyContract


class TestFull(PolicyContract):
    method: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False


class TestStreaming(PolicyContract):
    method: ClassVar[str] = "streaming:budget={budget}"


class TestSnapKV(PolicyContract):
    method: ClassVar[str] = "snapkv:budget={budget},window=4"
    bounded_after_prefill: ClassVar[bool] = False


class TestKeyDiff(PolicyContract):
    method: ClassVar[str] = "keydiff:budget={budget}"


class TestRandom(PolicyContract):
    method: ClassVar[str] = "random:budget={budget},window=2,sinks=1"
    bounded_after_prefill: ClassVar[bool] = False


class TestTOVA(PolicyContract):
    method: ClassVar[str] = "tova:budget={budget}"


class TestThinK(PolicyContract):
    method: ClassVar[str] = "think:ratio=0.4,window=4,recent=3"
    evicts: ClassVar[bool] = False

    def policy(self, budget):
        return build_policy("think:ratio=0.0" if budget in (1.0, 1000) else self.method)


class TestSnapKVThinK(PolicyContract):
    method: ClassVar[str] = "snapkv:budget={budget},window=4+think:ratio=0.5,window=4,recent=3"
    bounded_after_prefill: ClassVar[bool] = False

    def policy(self, budget):
        if budget in (1.0, 1000):
            return build_policy(f"snapkv:budget={budget}+think:ratio=0.0")
        return build_policy(self.method.format(budget=budget))


class TestH2OThinK(TestSnapKVThinK):
    method: ClassVar[str] = "h2o:budget={budget}+think:ratio=0.5,window=4,recent=3"
    bounded_after_prefill: ClassVar[bool] = True

    def policy(self, budget):
        if budget in (1.0, 1000):
            return build_policy(f"h2o:budget={budget}+think:ratio=0.0")
        return build_policy(self.method.format(budget=budget))


class TestH2O(PolicyContract):
    method: ClassVar[str] = "h2o:budget={budget}"


def contracts():
    found = [PolicyContract]
    for cls in found:
        found += cls.__subclasses__()
    return [cls for cls in found[1:] if cls.__module__ == __name__]


def test_every_registered_policy_is_under_contract():
    """A policy in the table has a contract subclass in this file."""
    covered = {cls.method.partition(":")[0] for cls in contracts() if hasattr(cls, "method")}
    assert sorted(set(POLICIES.names()) - covered) == []


# What it catches: policies that are wrong in one way each


@dataclass(frozen=True)
class Wrong(H2O):
    """H2O with a mistake."""

    def spoil(self, view, plans):
        return plans

    def on_prefill_end(self, views):
        plans = H2O.on_prefill_end(self, views)
        return [self.spoil(view, plan) for view, plan in zip(views, plans, strict=True)]

    def on_step(self, views):
        plans = H2O.on_step(self, views)
        return [self.spoil(view, plan) for view, plan in zip(views, plans, strict=True)]


class KeepsOneMore(Wrong):
    def spoil(self, view, plans):
        held = view.layer.lengths[0]
        if not plans or held <= self.budget + 1:
            return ()
        rows = plans[0].rows
        return (KeepTokens(tuple(torch.unique(torch.cat([x, x.new_tensor([0])])) for x in rows)),)


class RemembersTheLastCaller(Wrong):
    seen: ClassVar[dict[int, torch.Tensor]] = {}

    def spoil(self, view, plans):
        index = view.layer.layer_idx
        shared = self.seen.get(index)
        self.seen[index] = view.state.entries["scores"]
        if plans and shared is not None and shared.shape == view.state.entries["scores"].shape:
            view.state.entries["scores"] = shared
        return plans


class DropsOfAShortPrompt(Wrong):
    def spoil(self, view, plans):
        if view.layer.lengths[0] == view.num_prompt == view.num_new < 10:
            index = torch.arange(1, view.num_prompt)
            return (KeepTokens((index, index)),)
        return plans


class IsRandom(Wrong):
    def on_step(self, views):
        for view in views:
            scores = view.state.entries["scores"]
            scores += torch.rand(()).item()
        return Wrong.on_step(self, views)


class ForgetsChunks(Wrong):
    def on_prefill_chunk(self, view):
        view.state.entries.clear()
        H2O.on_prefill_chunk(self, view)


class RemembersAtFullBudget(Wrong):
    @property
    def needs(self):
        return Needs(prefill_column_sums=True, step_column_sums=True)


class WritesNaN(Wrong):
    def spoil(self, view, plans):
        scores = view.state.entries["scores"]
        scores /= scores - scores.clone()
        return plans


@pytest.mark.parametrize(
    ("wrong", "test", "arguments"),
    [
        (KeepsOneMore, "test_lengths_are_exact", (4, 48)),
        (KeepsOneMore, "test_many_tokens_after_eviction", (24,)),
        (DropsOfAShortPrompt, "test_lengths_are_exact", (1, 1)),
        (RemembersTheLastCaller, "test_requests_share_nothing", ()),
        (IsRandom, "test_deterministic", ()),
        (ForgetsChunks, "test_chunked_prefill_equals_one_shot", (7, True)),
        (RemembersAtFullBudget, "test_full_fraction_remembers_nothing", ()),
        (WritesNaN, "test_ties", ()),
    ],
)
def test_contract_catches_wrong_policies(wrong, test, arguments):
    """Each mistake fails the test that is there for it."""

    class Contract(PolicyContract):
        def policy(self, budget):
            return wrong(budget)

    RemembersTheLastCaller.seen.clear()
    with pytest.raises(AssertionError):
        getattr(Contract(), test)(*arguments)
