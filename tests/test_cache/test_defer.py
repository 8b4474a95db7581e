# SPDX-License-Identifier: Apache-2.0
"""Many policies from one prefill: what each would have held after a prefill of its own."""

import pytest
import torch

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import POLICIES, Needs, Resources, build_policy
from kvlib.eviction.compose import own_params
from kvlib.eviction.h2o import H2O
from kvlib.eviction.snapkv import SnapKV
from kvlib.eviction.streaming import Streaming
from kvlib.testing.models import tiny_model


def ids(n, batch=1, seed=0):
    return torch.randint(0, 199, (batch, n), generator=torch.Generator().manual_seed(seed))


def methods():
    budgets = ("0.5", "0.25", "7")
    names = [name for name in POLICIES.names() if "budget" in own_params(POLICIES.get(name))]
    more = {"lazy": ",window=4", "kvzip": ",instruct=false"}
    every = [f"{name}:budget={b}{more.get(name, '')}" for name in names for b in budgets]
    return ["full", "razor:heads=0.1,s0=5", "think:ratio=0.4,window=4,recent=3", *every]


def is_calibrated(policy, resources):
    """Not those that need an artefact, which have tests of their own."""
    try:
        policy.check(resources)
    except ConfigError as exc:
        if "kvlib calibrate" not in str(exc):
            raise
        return False
    return True


class EveryLayerTogether(H2O):
    @property
    def needs(self):
        return Needs(prefill_column_sums=True, step_column_sums=True, whole_model=True)


def same(one, other, layers):
    for row in range(2):
        for layer in range(layers):
            mine, its = one.layer_kv(layer, row), other.layer_kv(layer, row)
            assert torch.equal(mine.keys, its.keys)
            assert torch.equal(mine.values, its.values)
            assert isinstance(mine.positions, range) == isinstance(its.positions, range)
            assert torch.equal(torch.as_tensor(mine.positions), torch.as_tensor(its.positions))
            assert mine.equal(its)
            states = [
                x.states[row] if x.rows is None else x.rows[row].state
                for x in (one.layers[layer], other.layers[layer])
            ]
            for a, b in zip(*((x.entries, x.values) for x in states), strict=True):
                assert a.keys() == b.keys()
                assert all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_every_policy_decides_as_it_would_alone(padded):
    """Keys, values, positions, state and all that follows are bit-equal, in a padded batch too."""
    model = tiny_model()
    options = {"draft": tiny_model(num_hidden_layers=1, seed=3), "patch": ids(5, seed=9)[0]}
    resources = Resources(model=model, **options)
    policies = [build_policy(method) for method in methods()]
    left_out = [p.name for p in policies if not is_calibrated(p, resources)]
    assert left_out == ["kvzap"] * 3
    policies = [p for p in policies if p.name not in left_out]
    policies += [SnapKV(budget=0.25, window=5), EveryLayerTogether(budget=0.5)]
    mask = torch.ones(2, 40, dtype=torch.int64)
    if padded:
        mask[0, :9] = 0
    inputs = {
        "input_ids": ids(40, 2),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    later = {
        "attention_mask": torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1),
        "position_ids": mask.sum(1, keepdim=True) + torch.arange(3),
    }
    shared = kvlib.KVCache(model, defer=policies, **options)
    model(**inputs, past_key_values=shared)
    for policy in policies:
        alone = kvlib.KVCache(model, policy, **options)
        model(**inputs, past_key_values=alone)
        twin = shared.decided(policy)
        assert twin.method == alone.method
        same(twin, alone, 3)
        assert twin.nbytes == alone.nbytes
        for seed in range(2):
            step = ids(3, 2, seed=1 + seed)
            attention = later["attention_mask"]
            if seed:
                attention = torch.cat([attention, torch.ones(2, 3, dtype=torch.int64)], 1)
            more = {"attention_mask": attention, "position_ids": later["position_ids"] + 3 * seed}
            mine = model(step, **more, past_key_values=twin).logits
            assert torch.equal(mine, model(step, **more, past_key_values=alone).logits)
        same(twin, alone, 3)


@torch.no_grad()
def test_the_cache_itself_goes_on_under_its_own_policy():
    """Whatever uses it makes its own decision, and the others are gone."""
    model = tiny_model()
    uses = {
        "step": lambda cache: model(ids(1), past_key_values=cache),
        "fork": lambda cache: cache.fork(),
        "end": lambda cache: cache.end_prefill(),
    }
    for use in uses.values():
        cache = kvlib.KVCache(model, "snapkv:budget=0.25,window=4", defer=[H2O(budget=0.5)])
        model(ids(40), past_key_values=cache)
        cache.decided(H2O(budget=0.5))
        use(cache)
        alone = kvlib.KVCache(model, "snapkv:budget=0.25,window=4")
        model(ids(40), past_key_values=alone)
        held = alone.layer_kv(0).positions
        assert torch.equal(cache.layer_kv(0).positions[:, : held.shape[1]], held)
        with pytest.raises(ConfigError, match="no decision about a prompt is open"):
            cache.decided(H2O(budget=0.5))
    cache.reset()
    model(ids(30), past_key_values=cache)
    assert cache.decided(H2O(budget=0.5)).layer_kv(0).lengths == (15, 15)


def test_what_cannot_be_decided_is_refused():
    """Unobserved signals, chunked prompts, nothing deferred."""
    model = tiny_model()
    cache = kvlib.KVCache(model, defer=[Streaming(budget=0.5)])
    with pytest.raises(ConfigError, match="run the prompt in one pass"):
        cache.decided(Streaming(budget=0.5))
    with torch.no_grad():
        model(ids(40), past_key_values=cache)
    for policy in (H2O(budget=0.5), SnapKV(budget=0.5)):
        with pytest.raises(ConfigError, match="give it in defer"):
            cache.decided(policy)
    cache.decided(Streaming(budget=0.25))  # needs nothing more
    with pytest.raises(ConfigError, match="one pass"):
        kvlib.KVCache(model, defer=[Streaming()], prefill_chunk_size=8)
    with pytest.raises(ConfigError, match="defer"):
        kvlib.KVCache(model).decided(Streaming())


@torch.no_grad()
def test_taking_tokens_back_while_decisions_are_open():
    """Refused, unless it was recorded; then the cache decides as if they had never been there."""
    model = tiny_model()
    policy = SnapKV(budget=0.5, window=4)
    cache = kvlib.KVCache(model, defer=[policy])
    model(ids(40), past_key_values=cache)
    with pytest.raises(ConfigError, match="activate_past_recording"):
        cache.crop(-3)
    cache.decided(policy)
    cache = kvlib.KVCache(model, policy, defer=[H2O(budget=0.5)])
    cache.activate_past_recording()
    model(ids(40), past_key_values=cache)
    cache.crop(-3)
    alone = kvlib.KVCache(model, policy)
    model(ids(40)[:, :37], past_key_values=alone)
    for layer in range(3):
        mine, its = cache.layer_kv(layer), alone.layer_kv(layer)
        assert mine.lengths == (19, 19)
        assert torch.equal(mine.positions_tensor(), its.positions_tensor())
        torch.testing.assert_close(mine.keys, its.keys)
        torch.testing.assert_close(mine.values, its.values)
    with pytest.raises(ConfigError, match="no decision about a prompt is open"):
        cache.decided(H2O(budget=0.5))


@torch.no_grad()
def test_a_policy_that_needs_no_steps_is_not_called_in_them():
    """`Needs.steps`: it costs nothing after the prompt; its numbers still follow the rows."""

    class Once(Streaming):
        @property
        def needs(self):
            return Needs(steps=False)

        def on_prefill_end(self, views):
            plans = super().on_prefill_end(views)
            for view in views:
                view.state.entries["mark"] = torch.ones(view.layer.keys.shape[:-1])
            return plans

        def on_step(self, views):
            raise AssertionError("called")

    model = tiny_model()
    cache = kvlib.KVCache(model, Once(budget=0.5), model_id="tiny")
    model(ids(20), past_key_values=cache)
    for _ in range(3):
        model(ids(1), past_key_values=cache)
    assert cache.layer_kv(0).lengths == (13, 13)
    state = cache.to_snapshot().state
    assert state["00000/entries/mark"].tolist() == [[1.0] * 10 + [0.0] * 3] * 2
