# SPDX-License-Identifier: Apache-2.0
"""Taking tokens back: exactly, or not at all."""

import pytest
import torch

import kvlib
from kvlib.errors import ConfigError
from kvlib.testing.models import tiny_model

METHODS = ("full", "streaming:budget=0.25", "snapkv:budget=0.25,window=8", "h2o:budget=0.25")
MODELS = {
    "llama": ("LlamaConfig", {}),
    "hybrid": ("Gemma3TextConfig", {"sliding_window": 16, "num_hidden_layers": 7}),
}


@pytest.fixture(params=MODELS)
def model(request):
    name, changes = MODELS[request.param]
    return tiny_model(name, **changes)


def ids(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 199, (1, num), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, cache, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, past_key_values=cache).logits[0]


def same(a: kvlib.KVCache, b: kvlib.KVCache) -> None:
    """The same entries and the same policy state, up to rounding of the keys."""
    assert a.num_columns == b.num_columns
    for index, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)):
        if x.is_sliding:
            assert (x.keys - y.keys).abs().max() < 1e-5
            continue
        mine, theirs = a.layer_kv(index), b.layer_kv(index)
        assert torch.equal(mine.positions_tensor(), theirs.positions_tensor())
        assert (mine.keys - theirs.keys).abs().max() < 1e-5
        assert (x.rows is None) == (y.rows is None)
        left, right = ((z.rows[0].state if z.rows else z.states[0]) for z in (x, y))
        assert left.entries.keys() == right.entries.keys()
        for name, numbers in left.entries.items():
            assert numbers.shape == mine.keys.shape[:-1]
            assert (numbers - right.entries[name]).abs().max() < 1e-4
        assert left.values.keys() == right.values.keys()
        assert all(torch.equal(v, right.values[k]) for k, v in left.values.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("removed", [0, 1, 3, 6])
def test_a_step_without_the_tokens_taken_back(model, method, removed):
    """Six tokens and `removed` taken back leave what six - `removed` tokens would have left."""
    recorded, plain = (kvlib.KVCache(model, method) for _ in range(2))
    for cache in (recorded, plain):
        forward(model, cache, ids(60))
    recorded.activate_past_recording()
    tokens = ids(6, seed=1)
    forward(model, recorded, tokens)
    recorded.crop(-removed)
    if removed < 6:
        forward(model, plain, tokens[:, : 6 - removed])
    same(recorded, plain)
    more = ids(2, seed=2)
    assert (forward(model, recorded, more) - forward(model, plain, more)).abs().max() < 1e-5
    recorded.crop(0)
    same(recorded, plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("prompt", "removed"), [(60, 5), (200, 7), (200, 128), (20, 12)])
def test_a_prompt_without_the_tokens_taken_back(model, method, prompt, removed):
    """The same for candidates behind a prompt: budget, votes and sums are those of the rest."""
    recorded, plain = (kvlib.KVCache(model, method) for _ in range(2))
    recorded.activate_past_recording()
    tokens = ids(prompt)
    forward(model, recorded, tokens)
    recorded.crop(-removed)
    forward(model, plain, tokens[:, : prompt - removed])
    same(recorded, plain)
    forward(model, recorded, ids(3, seed=2))
    forward(model, plain, ids(3, seed=2))
    recorded.crop(0)
    same(recorded, plain)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_taken_back_counts(model, method):
    """A forward pass that nobody crops is decided when the next one comes."""
    recorded, plain = (kvlib.KVCache(model, method) for _ in range(2))
    recorded.activate_past_recording()
    for tokens in (ids(60), ids(1, seed=1), ids(4, seed=2), ids(1, seed=3)):
        for cache in (recorded, plain):
            forward(model, cache, tokens)
    recorded.crop(0)
    same(recorded, plain)


def test_what_cannot_be_restored_is_refused():
    """Decided tokens, more than the newest pass, more than are kept, and positive numbers."""
    model = tiny_model()
    cache = kvlib.KVCache(model, "h2o:budget=0.25")
    forward(model, cache, ids(60))
    with pytest.raises(ConfigError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ConfigError, match="negative"):
        cache.crop(3)
    cache.crop(0)
    cache.activate_past_recording()
    forward(model, cache, ids(2))
    with pytest.raises(ConfigError, match=r"cannot take back 3 tokens.*had 2"):
        cache.crop(-3)
    cache.crop(-2)
    with pytest.raises(ConfigError, match="has decided"):
        cache.crop(-1)
    forward(model, cache, ids(200))
    with pytest.raises(ConfigError, match="at most 128"):
        cache.crop(-129)
    with pytest.raises(ConfigError, match="not one of its layers"):
        cache.layers[0].crop(-1)
    snap = kvlib.KVCache(model, "snapkv:budget=500")
    forward(model, snap, ids(60))
    with pytest.raises(ConfigError, match="snapkv"):
        snap.crop(-1)


def test_an_undecided_cache_can_be_cropped_like_any_other():
    """With `full` nothing was decided: the state before the tokens is restored at any time."""
    model = tiny_model()
    cache, plain = (kvlib.KVCache(model) for _ in range(2))
    forward(model, cache, ids(60))
    cache.crop(-20)
    forward(model, plain, ids(60)[:, :40])
    same(cache, plain)
    assert (forward(model, cache, ids(3)) - forward(model, plain, ids(3))).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="of 43 tokens"):
        cache.crop(-44)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_assisted_generation(model, method, kind):
    """It runs under every policy; under `full` it gives the tokens of greedy search."""
    draft = tiny_model(num_hidden_layers=1, seed=3)
    how = {"assistant_model": draft} if kind == "draft" else {"prompt_lookup_num_tokens": 4}
    prompt = torch.cat(
        [ids(20), ids(20), ids(20)], dim=1
    )  # repeats itself: look-ups find something
    plain = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = kvlib.KVCache(model, method)
    found = model.generate(prompt, past_key_values=cache, **plain, **how)
    assert found.shape == (1, 84)
    assert cache.num_columns == 83
    if method == "full":
        assert torch.equal(found, model.generate(prompt, **plain))
    elif "snapkv" not in method:
        budgets = {n for i in range(len(cache.layers)) for n in lengths(cache, i)}
        assert len(budgets) == 1
        assert 15 <= budgets.pop() <= 17  # a quarter of the prompt and its accepted candidates


def lengths(cache: kvlib.KVCache, index: int) -> tuple[int, ...]:
    return () if cache.layers[index].is_sliding else cache.layer_kv(index).lengths


def test_a_refusal_changes_nothing():
    """Where a sliding layer cannot go back, the others stay as they are."""
    model = tiny_model("Gemma3TextConfig", sliding_window=16, num_hidden_layers=7)
    cache, plain = (kvlib.KVCache(model) for _ in range(2))
    for each in (cache, plain):
        forward(model, each, ids(60))
    with pytest.raises(ConfigError, match="sliding window"):
        cache.crop(-3)
    same(cache, plain)
    assert torch.equal(forward(model, cache, ids(3)), forward(model, plain, ids(3)))
