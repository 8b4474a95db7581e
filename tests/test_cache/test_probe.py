# SPDX-License-Identifier: Apache-2.0
"""Extra passes over a prompt: what they see, and that they leave nothing behind."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import Needs
from kvlib.eviction.full import Full
from kvlib.eviction.scored import PolicyBase
from kvlib.testing.models import tiny_model


def ids(n, batch=1, seed=0):
    return torch.randint(0, 199, (batch, n), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Looks(PolicyBase):
    """Keeps everything, runs the tokens it is given behind the prompt, and takes notes."""

    tokens: tuple
    prompts: list = field(default_factory=list)
    views: list = field(default_factory=list)
    name: ClassVar[str] = "looks"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar = Full.about

    @property
    def needs(self):
        return Needs(probe=True, whole_model=True, steps=False)

    def probes(self, prompt, resources):
        self.prompts.append(prompt.tolist())
        return self.tokens

    def on_probe(self, view):
        self.views.append(view)


@dataclass(frozen=True)
class LastQueries(PolicyBase):
    """Notes so many last queries of a prompt, by layer."""

    num: int
    seen: dict = field(default_factory=dict)
    name: ClassVar[str] = "last"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar = Full.about

    @property
    def needs(self):
        return Needs(last_queries=self.num, steps=False)

    def on_prefill_end(self, views):
        self.seen.update({view.layer.layer_idx: view.last_queries for view in views})
        return [() for _ in views]


def models():
    yield "llama", tiny_model().double()
    yield (
        "sliding",
        tiny_model("Gemma3TextConfig", sliding_window=8, layer_types=None, num_hidden_layers=6),
    )


@torch.no_grad()
@pytest.mark.parametrize(("name", "model"), list(models()), ids=[name for name, _ in models()])
def test_probes_see_the_prompt_and_leave_nothing(name, model):
    """Queries and keys are those of tokens that follow the prompt; later passes do not notice."""
    prompt, step = ids(30), ids(3, seed=5)
    policy = Looks((ids(5, seed=1)[0], ids(0)[0], ids(7, seed=2)[0]))
    cache = kvlib.KVCache(model, policy)
    plain = kvlib.KVCache(model)
    first = model(prompt, past_key_values=cache).logits
    assert torch.equal(first, model(prompt, past_key_values=plain).logits)
    assert policy.prompts == [prompt[0].tolist()]
    full = [i for i, x in enumerate(plain.layers) if not x.is_sliding]
    assert [v.layer.layer_idx for v in policy.views] == full * 2
    assert [v.index for v in policy.views] == [0] * len(full) + [2] * len(full)
    for view in policy.views:
        tokens = policy.tokens[view.index][None]
        longer = kvlib.KVCache(model)
        model(torch.cat([prompt, tokens], 1), past_key_values=longer)
        expected = longer.layer_kv(view.layer.layer_idx).keys
        torch.testing.assert_close(view.keys, expected[:, 30:], rtol=1e-4, atol=1e-5)
        assert torch.equal(view.layer.keys, plain.layer_kv(view.layer.layer_idx).keys)
        last = LastQueries(tokens.shape[1])
        model(torch.cat([prompt, tokens], 1), past_key_values=kvlib.KVCache(model, last))
        expected = last.seen[view.layer.layer_idx]
        assert view.query.shape == expected.shape
        torch.testing.assert_close(view.query, expected, rtol=1e-4, atol=1e-5)
        assert view.num_prompt == 30
    for _ in range(2):
        mine = model(step, past_key_values=cache).logits
        assert torch.equal(mine, model(step, past_key_values=plain).logits)
    assert cache.get_seq_length() == 36
    for index in full:
        assert torch.equal(cache.layer_kv(index).keys, plain.layer_kv(index).keys)
    assert cache.nbytes == plain.nbytes


@torch.no_grad()
def test_each_sequence_has_its_own():
    """Of a padded batch, and of a prompt in pieces: the prompt without its padding."""
    model = tiny_model().double()
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    prompt = ids(20, 2)
    policy = Looks((ids(4, seed=3)[0],))
    cache = kvlib.KVCache(model, policy)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    model(prompt, attention_mask=mask, position_ids=places, past_key_values=cache)
    assert policy.prompts == [prompt[0].tolist(), prompt[1, 6:].tolist()]
    alone = Looks(policy.tokens)
    pieces = kvlib.KVCache(model, alone, prefill_chunk_size=5)
    for piece in prompt[1:, 6:].split(5, 1):
        model(piece, past_key_values=pieces)
    assert alone.prompts == [prompt[1, 6:].tolist()]
    for mine, its in zip(policy.views[3:], alone.views, strict=True):
        torch.testing.assert_close(mine.query, its.query, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.keys, its.keys, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_prompt_is_what_is_left_of_it():
    """Tokens that were taken back between pieces are not in it, and sequences may change places."""
    model = tiny_model().double()
    policy = Looks((ids(4, seed=3)[0],))
    cache = kvlib.KVCache(model, policy, prefill_chunk_size=5)
    cache.activate_past_recording()
    pieces = [ids(n, 2, seed=n) for n in (5, 6, 3)]
    model(pieces[0], past_key_values=cache)
    cache.crop(-2)
    model(pieces[1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    model(pieces[2], past_key_values=cache)
    cache.crop(0)
    first = torch.cat([pieces[0][:, :3], pieces[1]], dim=1)[[1, 0]]
    assert policy.prompts == torch.cat([first, pieces[2]], dim=1).tolist()


@torch.no_grad()
def test_what_probes_refuse():
    """Embeddings; a policy that does not decide for the whole model; one that fails."""
    model = tiny_model()
    cache = kvlib.KVCache(model, Looks((ids(4)[0],)))
    with pytest.raises(ConfigError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 5, 48), past_key_values=cache)
    with pytest.raises(ConfigError, match="whole model"):
        Needs(probe=True)

    class Fails(Looks):
        def on_probe(self, view):
            raise ZeroDivisionError

    cache = kvlib.KVCache(model, Fails((ids(4)[0],)))
    with pytest.raises(ZeroDivisionError):
        model(ids(10), past_key_values=cache)
    with pytest.raises(ConfigError, match="failed: make a new one"):
        model(ids(1), past_key_values=cache)
    model(ids(10), past_key_values=kvlib.KVCache(model))  # the model itself is as it was
