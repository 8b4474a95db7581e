# SPDX-License-Identifier: Apache-2.0
"""Hidden states for policies: those that transformers itself shows, of the cache's own passes."""

import copy
import gc
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import Needs
from kvlib.eviction.full import Full
from kvlib.eviction.scored import PolicyBase
from kvlib.plans import KeepTokens
from kvlib.testing.models import tiny_model


def ids(n, batch=1, seed=0):
    return torch.randint(0, 199, (batch, n), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Notes(PolicyBase):
    """Notes the hidden states it is shown, by layer; drops every other entry of the prompt."""

    needs: Needs = field(default_factory=lambda: Needs(hidden=True))
    drops: bool = False
    fails: bool = False
    seen: list = field(default_factory=list)
    probed: list = field(default_factory=list)
    name: ClassVar[str] = "notes"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar = Full.about

    def note(self, view):
        if self.fails:
            raise RuntimeError("on purpose")
        if view.hidden is not None:
            assert len(view.hidden) == view.num_new
        self.seen.append((view.place, view.hidden))

    def on_prefill_chunk(self, view):
        self.note(view)

    def on_prefill_end(self, views):
        if not self.drops:
            return [() for _ in views]
        every = [torch.arange(0, n, 2) for n in views[0].layer.lengths]
        return [(KeepTokens(tuple(every)),) for _ in views]

    def on_step(self, views):
        for view in views:
            self.note(view)
        return [() for _ in views]

    def probes(self, prompt, resources):
        return (ids(4, seed=8)[0],) if self.needs.probe else ()

    def on_probe(self, view):
        self.probed.append(view.hidden)

    def of(self, place):
        """All that was shown of a layer, in order."""
        parts = [x for at, x in self.seen if at == place and x is not None]
        return torch.cat(parts)


@torch.no_grad()
def expected(model, tokens, **options):
    """Of every layer [T, d], by transformers' own means."""
    found = model(tokens, output_hidden_states=True, use_cache=False, **options).hidden_states
    layers = model.model.layers
    return [layer.input_layernorm(x)[0] for layer, x in zip(layers, found, strict=False)]


def hooks_of(model):
    return sum(len(m._forward_pre_hooks) for m in model.model.modules() if m is not model.model)


def close(x, y):
    torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("chunk", [None, 7, 10])
def test_they_are_transformers_own(whole, chunk):
    """In a prompt, in its pieces, and in steps of one token and of many."""
    model = tiny_model().double()
    policy = Notes(Needs(hidden=True, whole_model=whole))
    cache = kvlib.KVCache(model, policy, prefill_chunk_size=chunk)
    tokens = ids(40)
    for part in tokens[:, :30].split(chunk or 30, 1):
        model(part, past_key_values=cache)
    cache.end_prefill()
    for part in (tokens[:, 30:31], tokens[:, 31:38], tokens[:, 38:]):
        model(part, past_key_values=cache)
    for place, x in enumerate(expected(model, tokens)):
        close(policy.of(place), x)
    assert cache._signals.nbytes == 0
    if chunk == 10:  # the prompt was ended by hand: a pass of no tokens
        assert [x for _, x in policy.seen].count(None) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen3Config", "Gemma3TextConfig", "GPTNeoXConfig"])
def test_other_models(name):
    """Whatever else in a model knows its layer, what counts is given to the attention module."""
    more = {"sliding_window": 8, "layer_types": None} if name.startswith("Gemma") else {}
    model = tiny_model(name, num_hidden_layers=6, **more).double()
    policy = Notes()
    seen = {}

    def grab(module, args, kwargs):
        seen[module.layer_idx] = kwargs.get("hidden_states", args[0] if args else None)

    attention = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    hooks = [m.register_forward_pre_hook(grab, with_kwargs=True) for m in attention]
    cache = kvlib.KVCache(model, policy)
    model(ids(30), past_key_values=cache)
    full = [layer.layer_idx for layer in cache.layers if not layer.is_sliding]
    assert len(policy.seen) == len(full) == len(hooks) - sum(x.is_sliding for x in cache.layers)
    for (_, x), index in zip(policy.seen, full, strict=True):
        assert torch.equal(x, seen[index][0])
    assert cache._signals.hidden._entered is None


@torch.no_grad()
def test_after_eviction():
    """Rows that fell apart are shown the same: one state for each new token."""
    model = tiny_model().double()
    policy = Notes(drops=True)
    cache = kvlib.KVCache(model, policy)
    grabbed = []
    layer = model.model.layers[1].self_attn
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: grabbed.append(kwargs["hidden_states"]), with_kwargs=True
    )
    for num in (20, 1, 5):
        model(ids(num, seed=num), past_key_values=cache)
    handle.remove()
    assert cache.layer_kv(1).lengths == (16, 16)
    assert torch.equal(policy.of(1), torch.cat(grabbed, 1)[0])


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_removed(left):
    """Each sequence sees what it would alone; padding may stand on either side."""
    model = tiny_model().double()
    tokens = ids(12, 2)
    mask = torch.ones(2, 12, dtype=torch.int64)
    if left:
        mask[1, :5] = 0
    else:
        mask[1, 7:] = 0
    policy = Notes()
    cache = kvlib.KVCache(model, policy)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(tokens, attention_mask=mask, position_ids=places, past_key_values=cache)
    later, mask = ids(3, 2, seed=4), torch.cat([mask, torch.ones(2, 3, dtype=torch.int64)], 1)
    places = mask[:, :12].sum(1, keepdim=True) + torch.arange(3)
    model(later, attention_mask=mask, position_ids=places, past_key_values=cache)
    alone = [torch.cat([tokens[:1], later[:1]], 1)]
    alone.append(torch.cat([tokens[1:, 5:] if left else tokens[1:, :7], later[1:]], 1))
    for row in range(2):
        for place, x in enumerate(expected(model, alone[row])):
            mine = [h for at, h in policy.seen if at == place][row::2]
            close(torch.cat(mine), x)


@torch.no_grad()
@pytest.mark.parametrize("removed", [0, 1, 4])
def test_tokens_that_were_taken_back_are_not_shown(removed):
    """Neither in the prompt nor in a step."""
    model = tiny_model().double()
    policy = Notes()
    cache = kvlib.KVCache(model, policy)
    cache.activate_past_recording()
    tokens = ids(20)
    model(tokens, past_key_values=cache)
    assert not policy.seen
    assert cache._signals.nbytes == 3 * 20 * 48 * 8
    cache.crop(-removed)
    kept = [tokens[:, : 20 - removed]]
    model(ids(6, seed=1), past_key_values=cache)
    cache.crop(-removed)
    kept.append(ids(6, seed=1)[:, : 6 - removed])
    assert cache._signals.nbytes == 0
    for place, x in enumerate(expected(model, torch.cat(kept, 1))):
        close(policy.of(place), x)


@torch.no_grad()
def test_two_caches_do_not_mix():
    """Passes by turns over one model, and passes over caches of other kinds between them."""
    model = tiny_model().double()
    policies = Notes(), Notes()
    caches = [kvlib.KVCache(model, policy) for policy in policies]
    other = kvlib.KVCache(model, "full")
    streams = ids(20, seed=1), ids(20, seed=2)
    for start, stop in ((0, 12), (12, 13), (13, 20)):
        for cache, tokens in zip(caches, streams, strict=True):
            model(ids(5, seed=3), past_key_values=DynamicCache(config=model.config))
            model(ids(5, seed=3), past_key_values=other)
            model(tokens[:, start:stop], past_key_values=cache)
    for policy, tokens in zip(policies, streams, strict=True):
        assert len(policy.seen) == 9
        for place, x in enumerate(expected(model, tokens)):
            close(policy.of(place), x)
    assert other._signals.hidden._entered is None


@torch.no_grad()
def test_deferred_policies_are_shown_the_prompt():
    """Each of them, and the cache's own; one that asks for nothing gets nothing."""
    model = tiny_model().double()
    every = [Notes(), Notes(Needs(hidden=True, whole_model=True)), Notes(Needs())]
    cache = kvlib.KVCache(model, "full", defer=every)
    model(ids(20), past_key_values=cache)
    for policy in every:
        twin = cache.decided(policy)
        model(ids(3, seed=1), past_key_values=twin)
    for place, x in enumerate(expected(model, torch.cat([ids(20), ids(3, seed=1)], 1))):
        close(every[0].of(place), x)
        close(every[1].of(place), x)
    assert [x for _, x in every[2].seen] == [None] * 6  # the prompt and a step of 3 layers
    assert cache._signals.hidden.nbytes > 0
    model(ids(1), past_key_values=cache)  # its own policy asks for none
    assert cache._signals.hidden.nbytes == 0


@torch.no_grad()
def test_steps_that_are_not_decided_about_hold_nothing():
    """A policy that says steps=False costs nothing in them."""
    model = tiny_model()
    policy = Notes(Needs(hidden=True, steps=False))
    cache = kvlib.KVCache(model, policy)
    model(ids(20), past_key_values=cache)
    model(ids(3), past_key_values=cache)
    assert len(policy.seen) == 3
    assert cache._signals.nbytes == 0


@torch.no_grad()
def test_probes_are_shown_their_own():
    """As if they followed the prompt; the prompt's own are what they were."""
    model = tiny_model().double()
    policy = Notes(Needs(hidden=True, probe=True, whole_model=True))
    cache = kvlib.KVCache(model, policy)
    model(ids(20), past_key_values=cache)
    whole = expected(model, torch.cat([ids(20), ids(4, seed=8)], 1))
    for place, x in enumerate(whole):
        close(policy.of(place), x[:20])
        # Attention over a held layer is computed in float32.
        torch.testing.assert_close(policy.probed[place], x[20:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hooks_go_with_the_cache():
    """The last cache takes them along; a policy that does not ask has none."""
    model = tiny_model()
    kvlib.KVCache(model, "full")
    assert hooks_of(model) == 0
    first, second = kvlib.KVCache(model, Notes()), kvlib.KVCache(model, Notes())
    assert hooks_of(model) == 6
    twin = copy.deepcopy(model)  # takes hooks along: they do nothing there
    del first
    gc.collect()
    assert hooks_of(model) == 3
    model(ids(5), past_key_values=second)
    assert len(second.policy.seen) == 3
    del second
    gc.collect()
    assert hooks_of(model) == 0
    mine = kvlib.KVCache(twin, Notes())
    twin(ids(5), past_key_values=mine)
    assert len(mine.policy.seen) == 3
    twin(ids(5), use_cache=False)
    assert len(mine.policy.seen) == 3


@torch.no_grad()
@pytest.mark.parametrize("where", ["model", "policy", "last layer"])
def test_a_pass_that_fails_leaves_nothing(where):
    """No hidden states stay behind, and the next cache is not disturbed."""
    model = tiny_model().double()
    policy = Notes(Needs(hidden=True, whole_model=where != "model"), fails=where == "policy")
    cache = kvlib.KVCache(model, policy)

    def fail(*_):
        raise RuntimeError("on purpose")

    block = model.model.layers[1 if where == "model" else 2]
    handle = None if where == "policy" else block.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(ids(20), past_key_values=cache)
    if handle is not None:
        handle.remove()
    assert cache._signals.hidden.nbytes == 0
    assert cache._signals.hidden._entered is None
    fresh = Notes()
    model(ids(9), past_key_values=kvlib.KVCache(model, fresh))
    for place, x in enumerate(expected(model, ids(9))):
        close(fresh.of(place), x)


@torch.no_grad()
def test_attention_that_hides_its_input_is_refused(monkeypatch):
    """A layer whose hidden states cannot be seen is named."""
    model = tiny_model()
    cache = kvlib.KVCache(model, Notes())
    monkeypatch.setattr(type(cache), "enter", lambda self, module, hidden: None)
    with pytest.raises(ConfigError, match="layer 0's attention was not called with hidden states"):
        model(ids(5), past_key_values=cache)
