# SPDX-License-Identifier: Apache-2.0
"""KVzip against attention matrices of transformers, and what it asks for."""

import pytest
import torch

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import build_policy
from kvlib.testing.models import tiny_model
from tests.oracles import kvzip as oracle


class Words:
    """A tokenizer of one id a letter."""

    def __init__(self, template=None):
        self.chat_template = template

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) % 199 for c in text]

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return f"<user>{messages[0]['content']}<end><answer>"


def requests(tokenizer, prompt, chunk, ending):
    """What stands before each chunk."""
    if tokenizer is None:
        return [[] for _ in range(0, len(prompt), chunk)]
    first = "\n\nRepeat the previous context exactly."
    later = "\n\nRepeat the part of the previous context exactly, starting with"
    out = [[*tokenizer.encode(first, False), *tokenizer.encode(ending, False)]]
    for start in range(chunk, len(prompt), chunk):
        before = prompt[max(start - 8, start - chunk) : start]
        out.append([*tokenizer.encode(later, False), *before, *tokenizer.encode(ending, False)])
    return out


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("chunk", [7, 16, 100])
@pytest.mark.parametrize("words", [False, True])
def test_choices_are_the_oracles(group, chunk, words):
    """Every head of every layer keeps what the definition says."""
    model = tiny_model(
        num_attention_heads=2 * group, hidden_size=16 * group, attn_implementation="eager"
    ).double()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.mul_(6)
    prompt = torch.randint(0, 199, (40,), generator=torch.Generator().manual_seed(group + chunk))
    tokenizer = Words("x" if chunk == 16 else None) if words else None
    ending = "<end><answer>" if chunk == 16 else "\n"
    expected, margin = oracle.joint(
        oracle.scores(
            model,
            prompt.tolist(),
            requests(tokenizer, prompt.tolist(), chunk, ending),
            chunk=chunk,
            sinks=2,
        ),
        15,
        2,
    )
    assert margin > 1e-5
    text = "true" if words else "false"
    cache = kvlib.KVCache(
        model,
        f"kvzip:budget=15,chunk={chunk},sinks=2,instruct={text}",
        tokenizer=tokenizer,
        model_id="tiny",
    )
    model(prompt[None], past_key_values=cache)
    for index, layer in enumerate(expected):
        held = cache.layer_kv(index)
        assert [row.positions.tolist() for row in held.rows()] == layer
    assert len({len(row) for layer in expected for row in layer}) > 1
    for layer in cache.layers:  # scores are forgotten
        assert layer.rows[0].state.entries == {}


@torch.no_grad()
def test_a_prompt_within_the_budget_is_not_repeated():
    """No pass is run where nothing can go."""
    model = tiny_model()
    policy = build_policy("kvzip:budget=50,instruct=false")
    assert policy.probes(torch.arange(50), None) == ()
    assert len(policy.probes(torch.arange(51), None)) == 1
    assert not build_policy("kvzip:budget=1.0").needs.probe
    kvlib.KVCache(model, "kvzip:budget=1.0")  # and needs no tokenizer


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kvzip:budget=0.5", "give KVCache.*tokenizer=.*instruct=false"),
        ("kvzip:chunk=0,instruct=false", "chunk must be 1 or more"),
        ("kvzip:sinks=-1,instruct=false", "sinks 0 or more"),
    ],
)
def test_what_is_missing_is_named(method, message):
    with pytest.raises(ConfigError, match=message):
        kvlib.KVCache(tiny_model(), method)
