# SPDX-License-Identifier: Apache-2.0
"""What is dropped is freed, and nbytes is what is held."""

import weakref

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.testing.models import tiny_model

POLICIES = ("streaming", "snapkv", "h2o")


def wide_model():
    """Heads of 64 channels, as real models have them, in bfloat16."""
    return tiny_model(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64
    ).bfloat16()


def ids(num: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 199, (batch, num), generator=torch.Generator().manual_seed(1))


def storages(cache: kvlib.KVCache) -> int:
    """Bytes of the distinct storages that a cache keeps alive."""
    seen: dict[int, int] = {}

    def add(x) -> None:
        if isinstance(x, torch.Tensor):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()

    for layer in cache.layers:
        add(layer.keys)
        add(layer.values)
        for row in getattr(layer, "rows", None) or ():
            for x in (row.layer.keys, row.layer.values, row.layer.positions):
                add(x)
            for x in (*row.state.entries.values(), *row.state.values.values()):
                add(x)
        for state in getattr(layer, "states", ()):
            for x in (*state.entries.values(), *state.values.values()):
                add(x)
    add(cache._columns.positions)
    add(cache._columns.valid)
    return sum(seen.values())


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_quarter_is_a_quarter(policy):
    """At 0.25, right after the prefill, in bfloat16: at most 0.26 of the full cache's bytes."""
    model = wide_model()
    full = DynamicCache(config=model.config)
    model(ids(2048), past_key_values=full)
    bytes_full = sum(x.keys.nbytes + x.values.nbytes for x in full.layers)
    cache = kvlib.KVCache(model, f"{policy}:budget=0.25")
    model(ids(2048), past_key_values=cache)
    assert cache.nbytes <= 0.26 * bytes_full
    assert cache.layer_kv(0).lengths == (512, 512)


@pytest.mark.parametrize("policy", ["full", *(f"{p}:budget=0.25" for p in POLICIES)])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_nbytes_is_what_is_held(policy, batch):
    """After the prefill, after steps, and after a question: the storages, no more and no less."""
    model = wide_model()
    cache = kvlib.KVCache(model, policy)
    for num in (200, 1, 1, 30, 1):
        model(ids(num, batch), past_key_values=cache)
        assert cache.nbytes == storages(cache)


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_the_full_tensors_are_gone(policy):
    """The keys of the prompt, as the model made them, are freed when the layer is evicted."""
    model = wide_model()
    cache = kvlib.KVCache(model, f"{policy}:budget=0.25")
    alive = []
    update = type(cache.layers[0]).update

    def watched(self, keys, values, *args, **more):
        alive.append((weakref.ref(keys), weakref.ref(values)))
        return update(self, keys, values, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache.layers[0]), "update", watched)
        held_at: list[int] = []
        hooks = [
            layer.register_forward_hook(lambda *_: held_at.append(cache.nbytes))
            for layer in model.model.layers
        ]
        model(ids(400), past_key_values=cache)
        for hook in hooks:
            hook.remove()
    assert len(alive) == 3
    assert all(ref() is None for pair in alive for ref in pair)
    # Layers are evicted one by one: what is held grows by a quarter of a layer each.
    layer = 400 * 2 * 64 * 2 * 2
    assert held_at[0] < 0.35 * layer
    assert held_at[-1] < 3 * 0.35 * layer


@pytest.mark.parametrize("config", ["GPT2Config", "GPTNeoXConfig", "Phi3Config"])
@torch.no_grad()
def test_a_joint_projection_is_not_kept_alive(config):
    """Keys and values that are views of a larger product are copied out of it."""
    model = tiny_model(config, pad_token_id=0)
    cache = kvlib.KVCache(model)
    model(ids(40, 2), past_key_values=cache)
    assert cache.nbytes == storages(cache)


@torch.no_grad()
def test_a_window_does_not_keep_the_whole_prompt_alive():
    """Sliding layers hold their window after a long prompt, and nbytes counts what is alive."""
    model = tiny_model("Gemma3TextConfig", sliding_window=16, num_hidden_layers=6)
    cache = kvlib.KVCache(model, "h2o:budget=0.25")
    for num in (400, 1, 1):
        model(ids(num), past_key_values=cache)
        assert cache.nbytes == storages(cache)
        for layer in cache.layers[:5]:
            assert layer.keys.untyped_storage().nbytes() <= layer.keys.nbytes * 16 / 15


@torch.no_grad()
def test_growing_rows_are_not_copied_in_every_step():
    """After its one eviction, a row that only grows gets room ahead."""
    model = wide_model()
    cache = kvlib.KVCache(model, "snapkv:budget=0.5")
    model(ids(400), past_key_values=cache)
    places = set()
    for _ in range(40):
        model(ids(1), past_key_values=cache)
        places.add(cache.layer_kv(0).keys.untyped_storage().data_ptr())
    assert len(places) < 10
    assert cache.nbytes < 1.1 * 3 * 2 * 240 * (64 * 2 * 2 + 4)


@torch.no_grad()
def test_a_plan_that_keeps_everything_frees_the_batch():
    """Where one sequence is evicted and another is not, neither holds the whole batch."""
    model = wide_model()
    cache = kvlib.KVCache(model, "streaming:budget=100")
    mask = torch.ones(2, 200, dtype=torch.int64)
    mask[0, :150] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids(200, 2), attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert [cache.layer_kv(0, row).lengths for row in range(2)] == [(50, 50), (100, 100)]
    assert cache.nbytes == storages(cache)
