# SPDX-License-Identifier: Apache-2.0
"""GemFilter: what it chooses, and that the cache holds a run over just that."""

import gc
import math
import weakref
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import DynamicCache

import kvlib
from kvlib.blocks import LayerKV
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, Needs, build_policy
from kvlib.eviction.full import Full
from kvlib.eviction.gemfilter import GemFilter
from kvlib.eviction.scored import PolicyBase
from kvlib.plans import rotate
from kvlib.selection import select_tokens
from kvlib.spec import RopeSpec
from kvlib.testing.models import tiny_model
from tests.oracles import gemfilter

HEADS, WIDTH, LAYERS = 2, 8, 3


def ids(n, batch=1, seed=0):
    return torch.randint(0, 199, (batch, n), generator=torch.Generator().manual_seed(seed))


def sharp(model):
    """Far from uniform attention: a wrong choice then changes the logits."""
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(6)
    return model.double()


@dataclass(frozen=True)
class Reruns(PolicyBase):
    """Runs the tokens it is given again."""

    index: object
    prompts: list = field(default_factory=list)
    name: ClassVar[str] = "reruns"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar = Full.about

    @property
    def needs(self):
        return Needs(rerun=True, whole_model=True, steps=False)

    def rerun(self, prompt, views):
        self.prompts.append(prompt.tolist())
        assert [view.layer.layer_idx for view in views] == list(range(LAYERS))
        return self.index


class Watched(GemFilter):
    """Takes notes of its choices, and of who holds the first pass."""

    __slots__ = ()
    notes: ClassVar[list] = []
    first: ClassVar[list] = []

    def rerun(self, prompt, views):
        index = GemFilter.rerun(self, prompt, views)
        self.notes.append(index if index is None else index.tolist())
        self.first.extend(weakref.ref(v.layer.keys.untyped_storage()) for v in views)
        return index


@pytest.fixture(autouse=True)
def _forget():
    Watched.notes.clear()
    Watched.first.clear()


def view_of(query, keys):
    keys = torch.as_tensor(keys)
    num = keys.shape[1]
    positions = torch.arange(num, dtype=torch.int32).expand(len(keys), -1)
    return LayerView(
        layer=LayerKV(layer_idx=0, keys=keys, values=keys, positions=positions),
        state=LayerState(),
        num_new=num,
        num_prompt=num,
        num_seen=num,
        last_queries=torch.as_tensor(query)[:, None],
    )


# The choice


@given(
    st.sampled_from([1, 3, 4, 7]),
    st.integers(2, 40),
    st.sampled_from([1, 3, 5, 9]),
    st.floats(0.01, 0.99),
    st.sampled_from([np.float32, np.float64]),
    st.integers(0, 2**32 - 1),
)
def test_chooses_the_oracles_tokens(group, num, kernel, share, kind, seed):
    rng = np.random.default_rng(seed)
    query = rng.standard_normal((HEADS * group, WIDTH)).astype(kind)
    keys = rng.standard_normal((HEADS, num, WIDTH)).astype(kind)
    count = math.ceil(share * num)
    expected, margin = gemfilter.chosen(gemfilter.pooled_products(query, keys, kernel), count)
    assume(margin > 1e-3)
    policy = GemFilter(count, kernel=kernel)
    assert policy.choose(view_of(query, keys)).tolist() == expected


@pytest.mark.parametrize(
    ("raw", "kernel", "count", "expected"),
    [
        ([0.0] * 8, 5, 3, [0, 1, 7]),  # ties: the earlier stay, and the last
        ([-1.0] * 10, 5, 4, [0, 1, 8, 9]),  # zeros beyond the ends are higher than these
        ([0, 0, 0, 9, 0, 0, 0, 0, 0], 3, 4, [2, 3, 4, 8]),  # neighbours are lifted
        ([0, 0, 0, 9, 0, 0, 0, 5, 0], 1, 3, [3, 7, 8]),  # not without pooling
        ([9, 8, 7, -50], 1, 1, [3]),  # the last is chosen whatever it scores
        ([-9, 8, 7, -50], 1, 3, [1, 2, 3]),  # products, not their size
    ],
)
def test_choices_by_hand(raw, kernel, count, expected):
    keys = torch.zeros(1, len(raw), 2)
    keys[0, :, 0] = torch.tensor(raw)
    query = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert GemFilter(count, kernel=kernel).choose(view_of(query, keys)).tolist() == expected


def test_every_query_head_counts_once():
    """The sum is over query heads; a small one outvotes none, and no scale is taken off."""
    keys = torch.tensor([[[1.0], [0.0], [0.0]], [[0.0], [1.0], [0.0]]])
    query = torch.tensor([[2.0], [2.0], [5.0], [-2.0]])
    assert GemFilter(2, kernel=1).choose(view_of(query, keys)).tolist() == [0, 2]
    query[3] = 0
    assert GemFilter(2, kernel=1).choose(view_of(query, keys)).tolist() == [1, 2]


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_policy_and_function_choose_as_the_oracle(group, layer):
    """From the layer's own projections, rotated by hand; -1 is layer 1 of 3."""
    model = sharp(tiny_model(num_attention_heads=2 * group, hidden_size=16 * group))
    prompt = ids(40, seed=group)
    outputs = {}
    attention = model.model.layers[1 if layer == -1 else layer].self_attn
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.__setitem__(name, output[0])
        )
        for name in ("q_proj", "k_proj")
    ]
    model(prompt, use_cache=False)
    for handle in handles:
        handle.remove()
    query, keys = (x.view(40, -1, WIDTH).transpose(0, 1).numpy() for x in outputs.values())
    turned = [[gemfilter.rotated(row[n], n) for n in range(40)] for row in keys]
    last = [gemfilter.rotated(row[39], 39) for row in query]
    expected, margin = gemfilter.chosen(gemfilter.pooled_products(last, turned, 5), 10)
    assert margin > 1e-6
    cache = kvlib.KVCache(model, Watched(0.25, layer))
    model(prompt, past_key_values=cache)
    assert Watched.notes == [expected]
    assert select_tokens(model, prompt, budget=0.25, layer=layer).tolist() == expected
    assert select_tokens(model, prompt[0], budget=10, layer=layer).tolist() == expected


def test_the_default_layer_is_a_share():
    policy = GemFilter()
    assert [policy.layer_of(n) for n in (1, 2, 3, 16, 28, 32, 80)] == [0, 1, 1, 6, 11, 13, 32]
    assert GemFilter(layer=0).layer_of(32) == 0


@torch.no_grad()
def test_the_function_runs_the_first_layers_only():
    """Nothing is left of it, and prompts within the budget run nothing at all."""
    model = sharp(tiny_model())
    prompt = ids(30)
    before = model(prompt).logits
    ran = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    assert len(select_tokens(model, prompt, budget=7, layer=1)) == 7
    assert ran == [0, 1]
    assert select_tokens(model, prompt, budget=30).tolist() == list(range(30))
    assert select_tokens(model, prompt, budget=1.0).tolist() == list(range(30))
    assert ran == [0, 1]
    gc.collect()
    assert not model.model._forward_hooks
    assert model.config._attn_implementation != "kvlib"
    assert torch.equal(model(prompt).logits, before)


@pytest.mark.parametrize("wrong", ["a text", [1, 2, 3], torch.ones(1, 9), torch.ones(9) > 0])
def test_the_function_takes_token_ids(wrong):
    """Neither text nor lists nor numbers of another kind."""
    with pytest.raises(ConfigError, match=r"input_ids are .*; select_tokens takes token ids"):
        select_tokens(tiny_model(), wrong, budget=4)


@torch.no_grad()
def test_the_function_before_generate():
    """The chosen tokens make a prompt of their own."""
    model = sharp(tiny_model())
    prompt = ids(30, seed=2)
    chosen = select_tokens(model, prompt, budget=9)
    short = prompt[:, chosen]
    written = model.generate(short, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(written[:, :9], short)
    assert chosen[-1] == 29


# What the cache holds


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ROPES)
def test_the_cache_is_a_run_over_the_chosen(kind):
    """Values and logits of a fresh cache that begins at 0; keys turned by the distance."""
    model = sharp(tiny_model(rope_parameters=ROPES[kind]))
    prompt, *later = torch.split(ids(51, seed=3), [40, 1, 5, 1, 4], dim=1)
    cache = kvlib.KVCache(model, Watched(12))
    first = model(prompt, past_key_values=cache).logits
    assert torch.equal(first, model(prompt).logits)
    (chosen,) = Watched.notes
    fresh = DynamicCache(config=model.config)
    model(prompt[:, chosen], past_key_values=fresh)
    for index in range(LAYERS):
        held = cache.layer_kv(index)
        assert held.positions_tensor().tolist() == [list(range(28, 40))] * HEADS
        torch.testing.assert_close(held.values, fresh.layers[index].values[0], rtol=0, atol=1e-5)
        back = torch.full((HEADS * 12,), -28)
        rope = cache._ropes[index]
        at_0 = rotate(held.keys.flatten(0, 1), back, rope).view_as(held.keys)
        torch.testing.assert_close(at_0, fresh.layers[index].keys[0], rtol=0, atol=1e-4)
    whole = kvlib.KVCache(model)
    model(prompt, past_key_values=whole)
    seen = 40
    for tokens in later:
        mine = model(tokens, past_key_values=cache).logits
        places = torch.arange(seen - 28, seen - 28 + tokens.shape[1])[None]
        theirs = model(tokens, past_key_values=fresh, position_ids=places).logits
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        every = model(tokens, past_key_values=whole).logits
        assert float((mine - every).abs().max()) > 1e-2  # the choice makes a difference
        seen += tokens.shape[1]
        assert cache.get_seq_length() == seen


@torch.no_grad()
def test_generate_begins_with_the_whole_prompts_token():
    model = sharp(tiny_model())
    prompt = ids(40, seed=4)
    out = model.generate(
        prompt,
        past_key_values=kvlib.KVCache(model, Watched(8)),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, 40:]
    assert out[0] == model(prompt).logits[0, -1].argmax()
    short = torch.cat([prompt[:, Watched.notes[0]], out[None]], dim=1)
    follow = model(short).logits[0, 8:-1].argmax(-1)
    assert out[1:].tolist() == follow.tolist()


@torch.no_grad()
def test_the_first_pass_is_freed():
    """Bytes are those of the chosen tokens; nobody holds the prompt's keys any more."""
    model = tiny_model()
    cache = kvlib.KVCache(model, Watched(10))
    model(ids(200), past_key_values=cache)
    per_head = 10 * (2 * WIDTH * 4 + 4)  # keys, values, positions
    assert cache.nbytes == LAYERS * HEADS * per_head
    gc.collect()
    assert len(Watched.first) == LAYERS
    assert all(reference() is None for reference in Watched.first)


@torch.no_grad()
def test_each_sequence_has_its_own():
    """In a padded batch and in pieces; one within the budget stays as it is, and whole batches."""
    model = sharp(tiny_model())
    lengths = (30, 9, 22)
    mask = torch.tensor([[0] * (30 - n) + [1] * n for n in lengths])
    prompt = ids(30, 3)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    batch = kvlib.KVCache(model, Watched(12))
    model(prompt, attention_mask=mask, position_ids=places, past_key_values=batch)
    together = list(Watched.notes)
    for row, n in enumerate(lengths):
        alone = kvlib.KVCache(model, Watched(12), prefill_chunk_size=8)
        for piece in prompt[row : row + 1, 30 - n :].split(8, 1):
            model(piece, past_key_values=alone)
        assert Watched.notes[-1] == together[row]
        for index in range(LAYERS):
            mine, its = batch.layer_kv(index, row), alone.layer_kv(index)
            assert mine.positions_tensor().tolist() == its.positions_tensor().tolist()
            torch.testing.assert_close(mine.keys, its.keys, rtol=0, atol=1e-9)
            torch.testing.assert_close(mine.values, its.values, rtol=0, atol=1e-9)
    assert together[1] is None
    # Rows of different lengths, as beam search reorders them.
    batch.reorder_cache(torch.tensor([2, 0]))
    assert [batch.layer_kv(0, row).lengths[0] for row in range(2)] == [12, 12]


@torch.no_grad()
def test_tokens_that_are_taken_back_choose_nothing():
    """With a rollback open the decision waits, and the last token left chooses."""
    model = sharp(tiny_model())
    prompt = ids(40, seed=6)
    cache = kvlib.KVCache(model, Watched(10))
    cache.activate_past_recording()
    model(prompt, past_key_values=cache)
    cache.crop(-4)
    plain = kvlib.KVCache(model, Watched(10))
    model(prompt[:, :36], past_key_values=plain)
    assert Watched.notes[0] == Watched.notes[1]
    for index in range(LAYERS):
        mine, its = cache.layer_kv(index), plain.layer_kv(index)
        torch.testing.assert_close(mine.keys, its.keys, rtol=0, atol=1e-9)
    step = ids(1, seed=9)
    logits = [model(step, past_key_values=x).logits for x in (cache, plain)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-9)


# The plumbing


@torch.no_grad()
def test_any_policy_may_have_tokens_run_again():
    """The prompt is shown without padding; None and all tokens keep what is held, bit for bit."""
    model = tiny_model().double()
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[0, :6] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = ids(20)
    options = {"attention_mask": mask, "position_ids": places}
    plain = kvlib.KVCache(model)
    model(prompt, past_key_values=plain, **options)
    for index in (None, torch.arange(14)):
        policy = Reruns(index)
        cache = kvlib.KVCache(model, policy)
        model(prompt, past_key_values=cache, **options)
        assert policy.prompts == [prompt[0, 6:].tolist()]
        assert torch.equal(cache.layer_kv(1).keys, plain.layer_kv(1).keys)
        assert cache.nbytes == plain.nbytes
    cache = kvlib.KVCache(model, Reruns(torch.tensor([0, 13])))
    model(prompt, past_key_values=cache, **options)
    assert cache.layer_kv(2).positions_tensor().tolist() == [[12, 13]] * HEADS
    cache.reset()
    model(prompt, past_key_values=cache, **options)
    assert cache.layer_kv(2).lengths == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    "index",
    [[], [0, 0], [3, 1], [-1, 2], [0, 30], [[0, 1]], [0.0, 1.0], list(range(31))],
)
def test_choices_that_make_no_sense_are_refused(index):
    cache = kvlib.KVCache(tiny_model(), Reruns(torch.tensor(index)))
    with pytest.raises(ConfigError, match=r"'reruns' chose .* ascending"):
        cache._model(ids(30), past_key_values=cache)
    with pytest.raises(ConfigError, match="failed: make a new one"):
        cache._model(ids(1), past_key_values=cache)


def test_what_is_refused():
    for method, message in (
        ("gemfilter:kernel=4", "kernel must be odd, got 4"),
        ("gemfilter:layer=-2", "layer must be 0 or more, or -1"),
        ("gemfilter:budget=0", "0 tokens leaves nothing"),
        ("gemfilter+think", "'gemfilter' .* 'think' .* cannot work together"),
        ("gemfilter+adakv", "put a scoring policy"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_policy(method)
    model = tiny_model()
    with pytest.raises(ConfigError, match="layer is 3, but the model's layers are 0 to 2"):
        kvlib.KVCache(model, "gemfilter:layer=3")
    with pytest.raises(ConfigError, match="layer is 3, but"):
        select_tokens(model, ids(9), layer=3)
    with pytest.raises(ConfigError, match="kernel must be odd"):
        select_tokens(model, ids(9), kernel=2)
    with pytest.raises(ConfigError, match=r"takes one sequence.*call it for each"):
        select_tokens(model, ids(9, 2))
    with pytest.raises(ConfigError, match="give input_ids"):
        model(
            inputs_embeds=torch.zeros(1, 5, 48), past_key_values=kvlib.KVCache(model, "gemfilter")
        )
    with pytest.raises(ConfigError, match="whole model"):
        Needs(rerun=True)


@torch.no_grad()
def test_models_that_are_refused():
    """Sliding windows, and frequencies that depend on a length; taken at the full budget."""
    sliding = tiny_model(
        "Gemma3TextConfig", sliding_window=8, layer_types=None, num_hidden_layers=6
    )
    dynamic = tiny_model(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    )
    for model, message in ((sliding, "layer 0 is of kind sliding"), (dynamic, "not fixed")):
        with pytest.raises(ConfigError, match=message):
            kvlib.KVCache(model, "gemfilter")
        kvlib.KVCache(model, "gemfilter:budget=1.0")
    with pytest.raises(ConfigError, match="layer 2 has a sliding window"):
        select_tokens(sliding, ids(30))
    full = next(i for i, kind in enumerate(sliding.config.layer_types) if "full" in kind)
    assert len(select_tokens(sliding, ids(30), layer=full)) == 15
    assert len(select_tokens(dynamic, ids(30))) == 15


def test_rope_is_what_the_tests_think_it_is():
    """The distances above are turned by frequencies that the model itself has."""
    rope = RopeSpec(theta=10000.0, rotary_dim=WIDTH)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    places = torch.tensor([0, 5, 39])
    seen = rotate(x, places, rope)
    for row, place, mine in zip(x, places.tolist(), seen, strict=True):
        np.testing.assert_allclose(mine, gemfilter.rotated(row.numpy(), place), atol=1e-5)
