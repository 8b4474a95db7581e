# SPDX-License-Identifier: Apache-2.0
"""The contract over every registered policy, and what it catches."""

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from kvlib.artefacts import save_artefact
from kvlib.errors import ConfigError
from kvlib.eviction import ALLOCATORS, POLICIES, Needs, build_policy
from kvlib.eviction.compose import compose
from kvlib.eviction.duo import Duo
from kvlib.eviction.epicache import EpiCache
from kvlib.eviction.h2o import H2O
from kvlib.eviction.kvzap import KVzap
from kvlib.eviction.razor import Razor
from kvlib.eviction.uniform import Uniform
from kvlib.plans import KeepTokens
from kvlib.testing.policies import PolicyContract
from kvlib.testing.recorder import HEAD_DIM, HEADS, LAYERS, random_tokens
from tests.oracles.allocators import pyramid


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


class TestExpected(PolicyContract):
    method: ClassVar[str] = "expected:budget={budget}"
    bounded_after_prefill: ClassVar[bool] = False


class TestTOVA(PolicyContract):
    method: ClassVar[str] = "tova:budget={budget}"


class TestKVzipUniform(PolicyContract):
    method: ClassVar[str] = "kvzip:budget={budget},chunk=16,sinks=1,instruct=false+uniform"
    bounded_after_prefill: ClassVar[bool] = False


class TestInfLLM(PolicyContract):
    method: ClassVar[str] = "infllm:budget={budget},block=4,window=6,queries=3,sinks=1,recent=2"
    bounded_after_prefill: ClassVar[bool] = False


class TestGemFilter(PolicyContract):
    method: ClassVar[str] = "gemfilter:budget={budget}"
    bounded_after_prefill: ClassVar[bool] = False


class TestSpecKV(PolicyContract):
    method: ClassVar[str] = "speckv:budget={budget},lookahead=3,window=4,kernel=3,layers=1"
    bounded_after_prefill: ClassVar[bool] = False


class TestH2OStreaming(PolicyContract):
    method: ClassVar[str] = "h2o:budget={budget},prefill=streaming"
    chunked_prefill_is_exact: ClassVar[bool] = False

    def policy(self, budget):
        if isinstance(budget, float) and 0 < budget < 1:
            budget = 12
        return super().policy(budget)

    def test_fraction_is_one_of_the_prompt(self):
        """A fraction means nothing before the prompt has ended."""
        with pytest.raises(ConfigError, match="budget in tokens"):
            build_policy(self.method.format(budget=0.25))


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


class TestD2O(PolicyContract):
    """Layers differ: what they have been given is asked for, and its sum is checked."""

    method: ClassVar[str] = "d2o:budget={budget},sinks=2"

    def lengths(self, budget, prompt, later):
        num = prompt + later
        if num <= budget:
            return [[num] * HEADS] * LAYERS
        return [[min(mine, num)] * HEADS for mine in self.given]

    def check_rows(self, cache, budget, prompt, later):
        layers = [cache.layers[index] for index in range(LAYERS)]
        states = [x.states[0] if x.rows is None else x.rows[0].state for x in layers]
        self.given = [int(state.values["layer_budget"]) for state in states]
        assert sum(self.given) == LAYERS * budget
        assert min(self.given) * math.e >= max(self.given) - 2
        super().check_rows(cache, budget, prompt, later)


class TestLazy(PolicyContract):
    method: ClassVar[str] = "lazy:budget={budget},window=4,alpha=0.05"
    passes: ClassVar = ((1, 1, 1, 5, 1, 3, 1), (2, 1, 2), (12, 1, 12), (36, 1, 36))

    def lengths(self, budget, prompt, later):
        """The prompt and all that came, down to the budget where a multiple of 4 was reached."""
        steps = next(sizes for sizes in self.passes if later in accumulate(sizes, initial=0))
        held, clock = prompt, 0
        for num in steps:
            if clock == later:
                break
            held, clock = held + num, clock + num
            if clock // 4 > (clock - num) // 4:
                held = min(held, budget)
        return [[held] * HEADS for _ in range(LAYERS)]


class TestRazor(PolicyContract):
    """Sinks, window and mean are a budget of the heads that do not retrieve."""

    method: ClassVar[str] = "razor:heads=0.1,sinks=2,s0={budget}"
    test_fraction_is_one_of_the_prompt = None  # its window is a share of all tokens seen

    def policy(self, budget):
        if budget == 1.0 and isinstance(budget, float):
            return Razor(heads="all")
        if isinstance(budget, float):
            return Razor(heads="0.1", sinks=2, s0=0, c=1 / budget)
        return Razor(heads="0.1", sinks=2, s0=budget - 3, c=1e6)

    def lengths(self, budget, prompt, later):
        num = prompt + later
        return [[min(budget, num), num], [min(budget, num)] * 2]

    @pytest.mark.parametrize("budget", [0, -1, -0.5, 1.5])
    def test_refuses_budgets_without_meaning(self, budget):
        super().test_refuses_budgets_without_meaning(budget)


class TestDuo(PolicyContract):
    """Sinks and window are a budget of the heads that stream; it has no fractions."""

    method: ClassVar[str] = "duo:gates=gates.tsv,sinks=2,window={budget}"
    test_fraction_is_one_of_the_prompt = None

    @pytest.fixture(autouse=True)
    def _gates(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("gates.tsv").write_text("0.1\t0.9\n0.2\t0.3\n", encoding="utf-8")

    def policy(self, budget):
        whole = isinstance(budget, float) and budget == 1.0
        entries = int(20 * budget) if isinstance(budget, float) else budget
        return Duo("gates.tsv", 0.0 if whole else 0.75, sinks=2, window=entries - 2)

    def lengths(self, budget, prompt, later):
        num = prompt + later
        return [[min(budget, num), num], [min(budget, num)] * 2]

    @pytest.mark.parametrize("budget", [0, -1])
    def test_refuses_budgets_without_meaning(self, budget):
        super().test_refuses_budgets_without_meaning(budget)


class SharedInLayers(PolicyContract):
    """Heads differ, and the budget of a layer is exact."""

    def lengths(self, budget, prompt, later):
        return self.held

    def check_rows(self, cache, budget, prompt, later):
        self.held = [list(cache.layer_kv(index).lengths) for index in range(LAYERS)]
        fair = PolicyContract.lengths(self, budget, prompt, later)
        self.check_sums([sum(mine) for mine in self.held], [sum(mine) for mine in fair])
        assert min(map(min, self.held)) > 0
        super().check_rows(cache, budget, prompt, later)

    def check_sums(self, held, fair):
        assert held == fair


class TestSnapKVAdaKV(SharedInLayers):
    method: ClassVar[str] = "snapkv:budget={budget},window=4+adakv:floor=0.2"
    bounded_after_prefill: ClassVar[bool] = False


class TestH2OAdaKV(SharedInLayers):
    method: ClassVar[str] = "h2o:budget={budget}+adakv"


class TestH2OJoint(SharedInLayers):
    """Layers differ too, and the budget of the model is exact."""

    method: ClassVar[str] = "h2o:budget={budget},recent=0.25+joint"

    def check_sums(self, held, fair):
        assert sum(held) == sum(fair)


class TestSnapKVJoint(TestH2OJoint):
    method: ClassVar[str] = "snapkv:budget={budget},window=4+joint:floor=0.3"
    bounded_after_prefill: ClassVar[bool] = False


class TestKVzip(TestH2OJoint):
    method: ClassVar[str] = "kvzip:budget={budget},chunk=16,sinks=1,instruct=false"
    bounded_after_prefill: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class Patched(EpiCache):
    """With a patched prompt, which the contract's caches are not given."""

    def check(self, resources):
        EpiCache.check(self, replace(resources, patch=torch.arange(5)))

    def probes(self, prompt, resources):
        return EpiCache.probes(self, prompt, replace(resources, patch=torch.arange(5)))


@dataclass(frozen=True, slots=True)
class Networked(KVzap):
    """With a profile for each width of the contract's models, which have no name."""

    def check(self, resources):
        KVzap.check(self, replace(resources, identity=None))

    def observe(self, view):
        if view.hidden is not None:
            file = f"{view.hidden.shape[1]}.kvzap"
            KVzap.observe(replace(self, profile=file, digest=None), view)


def random_networks(width):
    """A profile for a model of this width."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"layers": torch.arange(LAYERS)}
    for layer in range(LAYERS):
        tensors[f"{layer}.0.weight"] = torch.randn(HEADS, width, generator=generator)
        tensors[f"{layer}.0.bias"] = torch.zeros(HEADS)
    save_artefact(f"{width}.kvzap", kind="kvzap", model="contract", tensors=tensors, settings={})


class TestKVzap(TestH2OJoint):
    method: ClassVar[str] = "kvzap:profile=48.kvzap,budget={budget},window=4,sinks=1"
    bounded_after_prefill: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def _profile(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for group in (1, 3, 4, 7):
            random_networks(HEADS * group * HEAD_DIM)

    def policy(self, budget):
        return Networked("48.kvzap", budget, window=4, sinks=1)


class TestKVzapThreshold(PolicyContract):
    """Where nothing reaches tau, sinks and window are a budget; it has no fractions."""

    method: ClassVar[str] = "kvzap:profile=48.kvzap,tau=1e9,sinks=2,window={budget}"
    test_fraction_is_one_of_the_prompt = None

    @pytest.fixture(autouse=True)
    def _profile(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for group in (1, 3, 4, 7):
            random_networks(HEADS * group * HEAD_DIM)

    def policy(self, budget):
        entries = int(20 * budget) if isinstance(budget, float) else budget
        return Networked("48.kvzap", budget, tau=1e9, window=entries - 2, sinks=2)


class TestEpiCache(SharedInLayers):
    method: ClassVar[str] = "epicache:budget={budget},sinks=1"
    bounded_after_prefill: ClassVar[bool] = False
    chunked_prefill_is_exact: ClassVar[bool] = False

    def policy(self, budget):
        return Patched(budget, sinks=1)


class TestEpiCacheUniform(TestEpiCache):
    method: ClassVar[str] = "epicache:budget={budget},sinks=1+uniform"

    def policy(self, budget):
        return compose([Patched(budget, sinks=1), Uniform()])


class TestPyramid(PolicyContract):
    method: ClassVar[str] = "pyramid:budget={budget},window=4"

    def lengths(self, budget, prompt, later):
        mine = pyramid(prompt, budget, 4, LAYERS, "20.0")
        assert sum(mine) == LAYERS * min(budget, prompt)
        return [[n + later] * HEADS for n in mine]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the policies under contract read, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("gates.tsv").write_text("0.1\t0.9\n0.2\t0.3\n", encoding="utf-8")
    for group in (1, 3, 4, 7):
        random_networks(HEADS * group * HEAD_DIM)


@pytest.mark.parametrize(
    ("cls", "heads", "layers"),
    [
        (TestSnapKVAdaKV, True, False),
        (TestH2OAdaKV, True, False),
        (TestH2OJoint, True, True),
        (TestSnapKVJoint, True, True),
        (TestKVzip, True, True),
        (TestKVzap, True, True),
        (TestPyramid, False, True),
        (TestEpiCache, True, False),
        (TestEpiCacheUniform, False, False),
    ],
)
@pytest.mark.usefixtures("files")
def test_budgets_are_not_uniform(cls, heads, layers):
    """Else the contract of compositions would be that of their scorers."""
    cache, _ = cls().run([random_tokens(1, 48, seed=1)])
    held = [cache.layer_kv(index).lengths for index in range(LAYERS)]
    assert any(len(set(mine)) > 1 for mine in held) == heads
    assert (len(set(map(sum, held))) > 1) == layers


def contracts():
    found = [PolicyContract]
    for cls in found:
        found += cls.__subclasses__()
    return [cls for cls in found[1:] if cls.__module__ == __name__]


def test_every_registered_policy_is_under_contract():
    """A policy in the table has a contract subclass in this file, in which it is alone."""
    methods = [cls.method for cls in contracts() if hasattr(cls, "method")]
    covered = {method.partition(":")[0] for method in methods if "+" not in method}
    assert sorted(set(POLICIES.names()) - covered) == []


@pytest.mark.usefixtures("files")
def test_contracts_are_of_what_they_name():
    """Whatever `policy` they override; every allocator is at work in one of them."""
    allocators = set()
    for cls in contracts():
        if hasattr(cls, "method"):
            name = cls.method.partition(":")[0]
            table = POLICIES if name in POLICIES.names() else ALLOCATORS
            policy = cls().policy(12)
            parts = getattr(policy, "parts", (policy,))
            assert any(isinstance(part, table.get(name)) for part in parts), cls
            allocators.add(type(getattr(policy, "allocator", None)))
    assert allocators >= {ALLOCATORS.get(name) for name in ALLOCATORS.names()}


def test_only_fractions_are_switched_off():
    """By contracts of policies that have none."""
    tests = [name for name in vars(PolicyContract) if name.startswith("test_")]
    off = {(cls.__name__, x) for cls in contracts() for x in tests if getattr(cls, x) is None}
    fraction = "test_fraction_is_one_of_the_prompt"
    assert off == {(name, fraction) for name in ("TestRazor", "TestDuo", "TestKVzapThreshold")}


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
