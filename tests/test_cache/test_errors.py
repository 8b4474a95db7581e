# SPDX-License-Identifier: Apache-2.0
"""What a cache refuses, and what it leaves alone."""

import copy
import gc
import threading

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.eviction import Needs
from kvlib.eviction.streaming import Streaming
from kvlib.testing.models import tiny_model


@pytest.fixture
def model():
    return tiny_model()


def ids(num: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 199, (batch, num), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, cache, tokens, **more):
    return model(tokens, past_key_values=cache, **more).logits


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "snapkv:budget=0.25 | int8", "codec": "int4"}, "two codecs: int8.*'int4'"),
        ({"policy": "snapkv+h2o"}, "together"),
        ({"policy": "h2o:budgt=0.5"}, "budget"),
        ({"policy": "h2o:budget=2.0"}, r"h2o: .*\(0, 1\]"),
        ({"policy": "snapkv;h2o"}, "several methods"),
        ({"policy": None}, "a policy is a method string such as .*; got None"),
        ({"policy": Streaming}, "or an object such as .*; got <class"),
        ({"policy": "speckv", "draft": "gpt2"}, "draft is a model, not its name, got 'gpt2'"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be 1 or more"),
    ],
)
def test_wrong_arguments(model, arguments, message):
    """Each gets an error that says what was seen."""
    with pytest.raises(ConfigError, match=message):
        kvlib.KVCache(model, **arguments)


def test_unknown_policies_get_a_suggestion(model):
    """And nothing was hooked for them."""
    with pytest.raises(UnknownPluginError, match="snapkv"):
        kvlib.KVCache(model, "snapk:budget=0.5")
    assert not model.model._forward_pre_hooks


def test_a_codec_may_be_given_apart_or_in_the_method(model):
    """Both are the same; a method may be a codec alone."""
    assert kvlib.KVCache(model, "h2o:budget=0.5 | int8").codec == "int8"
    assert kvlib.KVCache(model, "h2o:budget=0.5", codec="int8").codec == "int8"
    alone = kvlib.KVCache(model, "| int4:group=8")
    assert (alone.method, alone.codec) == ("full", "int4:group=8")


# Forward passes


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        (ids(3, batch=2), {}, "holds 1 sequences, the forward has 2"),
        (ids(3), {"attention_mask": torch.ones(1, 3)}, r"\(1, 3\).*\[1, 23\]"),
        (ids(3), {"attention_mask": torch.ones(1, 1, 3, 23)}, r"\(1, 1, 3, 23\)"),
        (
            ids(3),
            {"attention_mask": torch.cat([torch.zeros(1, 1), torch.ones(1, 22)], 1)},
            "hides columns that were tokens",
        ),
        (ids(3), {"position_ids": torch.tensor([[19, 20, 21]])}, "ascend from 20 on"),
        (ids(3), {"position_ids": torch.tensor([[20, 21, 0]])}, "no packing"),
        (ids(3), {"position_ids": torch.zeros(3, 1, 3, dtype=torch.int64)}, r"\(3, 1, 3\)"),
    ],
)
def test_passes_that_do_not_go_on(model, tokens, more, message):
    """They are refused before anything changes: the cache goes on."""
    cache, plain = (kvlib.KVCache(model, "h2o:budget=0.25") for _ in range(2))
    for each in (cache, plain):
        forward(model, each, ids(20))
    with pytest.raises(ConfigError, match=message):
        forward(model, cache, tokens, **more)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(forward(model, cache, ids(2)), forward(model, plain, ids(2)))


def test_what_a_pass_cannot_have(model):
    """Attention weights, and gradient checkpointing, which takes the cache away from the layers."""
    with pytest.raises(ConfigError, match="output_attentions"):
        forward(model, kvlib.KVCache(model), ids(4), output_attentions=True)
    model.activation_checkpointing_enable()
    model.train(True)
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        forward(model, kvlib.KVCache(model), ids(4))


def test_inference_mode_and_no_grad_may_alternate(model):
    """Rows made in inference mode can be grown outside of it, and the other way round."""
    mixed, plain = (kvlib.KVCache(model, "h2o:budget=0.25") for _ in range(2))
    with torch.inference_mode():
        first = model(ids(40), past_key_values=mixed).logits
    assert torch.equal(first, forward(model, plain, ids(40)))
    for turn, token in enumerate(ids(6, seed=1)[0]):
        with torch.inference_mode(mode=turn % 2 == 1):
            found = model(token[None, None], past_key_values=mixed).logits
        assert torch.equal(found, forward(model, plain, token[None, None]))


def test_each_model_has_its_own_caches(model):
    """Another model is refused, whether it has caches of its own or not; so is `update` by hand."""
    other = tiny_model(seed=1)
    cache = kvlib.KVCache(model)
    with pytest.raises(ConfigError, match="make one for each model"):
        forward(other, cache, ids(4))
    kept = kvlib.KVCache(other)
    with pytest.raises(ConfigError, match="make one for each model"):
        forward(other, cache, ids(4))
    forward(other, kept, ids(4))
    with pytest.raises(ConfigError, match="outside of a forward pass"):
        cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    forward(model, cache, ids(4))


def test_a_failed_pass_spoils_the_cache_and_nothing_else(model):
    """What is half updated is not used again; the model is as before."""
    cache = kvlib.KVCache(model, "h2o:budget=0.25")
    forward(model, cache, ids(20))

    def fail(*_):
        raise RuntimeError("out of something")

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of something"):
        forward(model, cache, ids(1))
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="make a new one"):
        forward(model, cache, ids(1))
    forward(model, kvlib.KVCache(model), ids(20))
    cache.reset()
    fresh = kvlib.KVCache(model, "h2o:budget=0.25")
    assert torch.equal(forward(model, cache, ids(20)), forward(model, fresh, ids(20)))
    assert cache.layer_kv(0).equal(fresh.layer_kv(0))


def test_an_interrupted_pass_leaves_the_model_usable(model):
    """Ctrl-C is no Exception, and no hook sees it: the next pass of the decoder cleans up."""
    expected = forward(model, DynamicCache(config=model.config), ids(20))
    cache = kvlib.KVCache(model, "h2o:budget=0.25")
    forward(model, cache, ids(20))

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        forward(model, cache, ids(1))
    hook.remove()
    assert torch.equal(forward(model, DynamicCache(config=model.config), ids(20)), expected)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="make a new one"):
        forward(model, cache, ids(1))


class Unreliable(Streaming):
    """Fails in some layer of every step."""

    def on_step(self, views):
        if views[0].layer.layer_idx == 1:
            raise ValueError("cannot decide")
        return super().on_step(views)


class UnreliableTogether(Unreliable):
    @property
    def needs(self):
        return Needs(whole_model=True)

    def on_step(self, views):
        raise ValueError("cannot decide")


@pytest.mark.parametrize("policy", [Unreliable(budget=0.25), UnreliableTogether(budget=0.25)])
@pytest.mark.parametrize("recording", [False, True])
def test_a_policy_that_fails_spoils_the_cache(model, policy, recording):
    """Half a decision is not built upon: no pass, copy, snapshot or crop of that cache."""
    cache = kvlib.KVCache(model, policy, model_id="tiny")
    forward(model, cache, ids(40))
    if recording:  # then `crop` is what decides
        cache.activate_past_recording()
        forward(model, cache, ids(1))
    with pytest.raises(ValueError, match="cannot decide"):
        cache.crop(0) if recording else forward(model, cache, ids(1))
    assert model.config._attn_implementation == "sdpa"
    for use in (
        lambda: forward(model, cache, ids(1)),
        cache.fork,
        cache.to_snapshot,
        cache.end_prefill,
        lambda: cache.crop(0),
    ):
        with pytest.raises(ConfigError, match="make a new one"):
            use()


def test_skipped_layers_are_noticed(model):
    """A pass that leaves out layers would leave their rows behind the others."""
    cache = kvlib.KVCache(model)
    forward(model, cache, ids(20))
    model.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match="only 2 of 3 layers"):
        forward(model, cache, ids(1))


def test_dropout_is_refused_once_rows_are_ours():
    """It would be left out without a word."""
    model = tiny_model(attention_dropout=0.5)
    model.train(True)
    cache = kvlib.KVCache(model, "h2o:budget=0.25")
    forward(model, cache, ids(20))
    with pytest.raises(ConfigError, match="eval mode"):
        forward(model, cache, ids(1))


def test_a_decision_may_wait_from_inference_mode_into_no_grad(model):
    """A recorded pass in inference mode is decided outside of it."""
    cache = kvlib.KVCache(model, "streaming:budget=0.25")
    forward(model, cache, ids(40))
    for _ in range(3):
        cache.activate_past_recording()
        with torch.inference_mode():
            model(ids(1), past_key_values=cache)
        with torch.no_grad():
            cache.crop(0)
    assert cache.layer_kv(0).lengths == (10, 10)


def test_layers_that_a_policy_does_not_see():
    """`layer_kv` of an empty or a sliding layer says so."""
    model = tiny_model("Gemma3TextConfig", sliding_window=16, num_hidden_layers=6)
    cache = kvlib.KVCache(model)
    with pytest.raises(ConfigError, match="is empty"):
        cache.layer_kv(5)
    with pytest.raises(ConfigError, match="sliding window"):
        cache.layer_kv(0)


def test_masks_that_are_not_causal_are_refused():
    """Bidirectional image tokens would be read as causal without a word."""
    model = tiny_model("Gemma3TextConfig", sliding_window=16, num_hidden_layers=6)
    model.config.use_bidirectional_attention = True
    with pytest.raises(ConfigError, match="overlays its causal mask"):
        forward(model, kvlib.KVCache(model), ids(8))


# The model


def test_the_model_is_left_as_it_was(model):
    """Config and hooks during a pass, after it, and after the last cache is gone."""
    seen = []
    probe = model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    first, second = kvlib.KVCache(model), kvlib.KVCache(model)
    forward(model, first, ids(4))
    forward(model, DynamicCache(config=model.config), ids(4))
    probe.remove()
    assert seen == ["kvlib", "sdpa"]
    assert model.config._attn_implementation == "sdpa"
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    del first
    gc.collect()
    assert len(model.model._forward_pre_hooks) == 1
    del second
    gc.collect()
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks


def test_copies_of_a_model_have_hooks_of_their_own(model):
    """A model copied while caches of it live works with its own caches, with or without them."""
    cache = kvlib.KVCache(model, "h2o:budget=0.25")
    twin = copy.deepcopy(model)
    expected = forward(model, cache, ids(20))
    assert torch.equal(forward(twin, DynamicCache(config=twin.config), ids(20)), expected)
    with pytest.raises(ConfigError, match="make one for each model"):
        forward(twin, kvlib.KVCache(model), ids(20))
    own = kvlib.KVCache(twin, "h2o:budget=0.25")
    assert torch.equal(forward(twin, own, ids(20)), expected)
    assert own.layer_kv(0).equal(cache.layer_kv(0))


def test_weights_are_still_returned_for_ordinary_caches(model):
    """`output_attentions` of an eager model works while a KVCache exists."""
    model.set_attn_implementation("eager")
    cache = kvlib.KVCache(model)
    with torch.no_grad():
        out = model(
            ids(6), past_key_values=DynamicCache(config=model.config), output_attentions=True
        )
    assert out.attentions[0].shape == (1, 6, 6, 6)
    forward(model, cache, ids(6))


def test_ordinary_caches_in_another_thread(model):
    """While one thread runs over KVCaches, another's ordinary passes give the same as ever."""
    expected = {}
    for seed in range(4):
        tokens = ids(40, seed=seed)
        expected[seed] = forward(model, DynamicCache(config=model.config), tokens)
    evicting = kvlib.KVCache(model, "h2o:budget=0.25")
    want = [forward(model, evicting, ids(40))]
    want += [forward(model, evicting, ids(1, seed=s)) for s in range(30)]
    wrong: list[str] = []
    stop = threading.Event()

    def ordinary() -> None:
        while not stop.is_set():
            for seed, logits in expected.items():
                cache = DynamicCache(config=model.config)
                if not torch.equal(forward(model, cache, ids(40, seed=seed)), logits):
                    wrong.append(f"seed {seed}")

    def ours() -> None:
        for _ in range(3):
            cache = kvlib.KVCache(model, "h2o:budget=0.25")
            found = [forward(model, cache, ids(40))]
            found += [forward(model, cache, ids(1, seed=s)) for s in range(30)]
            if not all(torch.equal(a, b) for a, b in zip(found, want, strict=True)):
                wrong.append("KVCache")

    others = [threading.Thread(target=ordinary) for _ in range(2)]
    mine = [threading.Thread(target=ours) for _ in range(2)]
    for thread in (*others, *mine):
        thread.start()
    for thread in mine:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert wrong == []
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "method", ["streaming:budget=0.25", "snapkv:budget=0.25", "h2o:budget=0.25"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(method, dtype):
    """The device gives the plans of the CPU in float32, and fits the budget in bfloat16."""
    model = tiny_model(head_dim=64, hidden_size=384).to("cuda", dtype)
    cache = kvlib.KVCache(model, method)
    tokens = ids(400)
    out = model.generate(
        tokens.cuda(),
        past_key_values=cache,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    twin = cache.fork()
    more = ids(5, seed=1).cuda()
    assert torch.equal(forward(model, cache, more), forward(model, twin, more))
    if dtype is torch.float32:
        on_cpu = tiny_model(head_dim=64, hidden_size=384)
        plain = kvlib.KVCache(on_cpu, method)
        forward(on_cpu, plain, tokens)
        for token in out[0, 400:-1].tolist():
            forward(on_cpu, plain, torch.tensor([[token]]))
        forward(on_cpu, plain, more.cpu())
        kept = [set(c.layer_kv(0).positions[0].tolist()) for c in (cache, plain)]
        assert len(kept[0] & kept[1]) > 0.95 * len(kept[1])  # near-ties fall either way
    else:
        assert set(cache.layer_kv(0).lengths) <= {100, 112}
