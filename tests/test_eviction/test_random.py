# SPDX-License-Identifier: Apache-2.0
"""Random eviction: what is safe, what is drawn, and that it can be drawn again."""

import pytest
import torch

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import build_policy
from kvlib.testing.models import tiny_model


def kept(method, num=100, layer=0):
    """Positions that each head keeps of a prompt."""
    model = tiny_model()
    cache = kvlib.KVCache(model, method)
    ids = torch.randint(0, 199, (1, num), generator=torch.Generator().manual_seed(num))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache.layer_kv(layer).positions.tolist()


def test_sinks_and_window_stay():
    """The first 4 and the last 32, and as many others as the budget has."""
    for head in kept("random:budget=50"):
        assert head[:4] == [0, 1, 2, 3]
        assert head[-32:] == list(range(68, 100))
        assert len(set(head)) == 50


def test_a_small_budget_keeps_the_sinks_and_the_newest():
    """Nothing is drawn then."""
    assert kept("random:budget=20") == [[0, 1, 2, 3, *range(84, 100)]] * 2
    assert kept("random:budget=3") == [[0, 1, 2]] * 2


def test_draws_differ_by_seed_layer_and_head_alone():
    """The same again; another seed, layer or head is another draw."""
    method = "random:budget=0.5,sinks=0,window=0"
    first = kept(method)
    assert kept(method) == first
    assert first[0] != first[1]
    assert kept(f"{method},seed=1") != first
    assert kept(method, layer=1) != first


def test_every_token_is_drawn_alike():
    """400 draws of 10 out of 20: each token 200 times, within 4 standard errors."""
    counts = torch.zeros(20)
    for seed in range(100):
        for layer in range(2):
            for head in kept(f"random:budget=10,sinks=0,window=0,seed={seed}", 20, layer):
                counts[head] += 1
    assert counts.sum() == 4000
    assert (counts - 200).abs().max() < 4 * 10


@pytest.mark.parametrize("text", ["sinks=-1", "window=-1", "seed=-1", "seed=9999999999999999999"])
def test_parameters(text):
    """Refused by name."""
    with pytest.raises(ConfigError, match=f"random: {text.partition('=')[0]} must be"):
        build_policy(f"random:{text}")
