# SPDX-License-Identifier: Apache-2.0
"""The hand-set recall model: exact, and its heads are what they are said to be."""

import math

import pytest
import torch

import kvlib
from kvlib.errors import ConfigError
from kvlib.testing.recall_model import (
    BOS,
    IDLE_HEADS,
    LOCAL_HEAD,
    RETRIEVAL_HEAD,
    SEP,
    recall_model,
    recall_prompt,
)


@torch.no_grad()
def right_answers(model, prompt, policy, indices, *, aware=False):
    """Whether each question is answered, over a cache evicted before it (aware: after it)."""
    context = torch.tensor([prompt.input_ids])
    if not aware:
        cache = kvlib.KVCache(model, policy)
        model(input_ids=context, past_key_values=cache, logits_to_keep=1)
    right = []
    for index in indices:
        question = torch.tensor([prompt.question(index)])
        if aware:
            cache = kvlib.KVCache(model, policy)
            both = torch.cat([context, question], dim=1)
            model(input_ids=both, past_key_values=cache, logits_to_keep=1)
        logits = model(input_ids=question, past_key_values=cache.fork()).logits
        right.append(int(logits[0, -1].argmax()) == prompt.values[index])
    return right


@pytest.fixture(scope="module")
def model():
    return recall_model(8192)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_pairs", [1, 60, 500])
def test_recall_is_exact(dtype, num_pairs):
    """Any dtype, any seed of the codes."""
    for seed in range(3):
        model = recall_model(1024, dtype=dtype, seed=seed)
        prompt = recall_prompt(num_pairs, 1024, seed=seed)
        assert len(prompt.input_ids) == 1 + 2 * num_pairs
        assert all(right_answers(model, prompt, "full", range(0, num_pairs, 7)))


def test_recall_is_exact_at_8001_tokens():
    prompt = recall_prompt(4000, 16384)
    assert all(right_answers(recall_model(16384), prompt, "full", range(0, 4000, 200)))


@pytest.mark.parametrize(("num_pairs", "contexts"), [(500, 4), (2000, 2)])
@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize(
    "policy",
    ["streaming:budget={}", "random:budget={}", "random:budget={},sinks=0,window=0,seed=7"],
)
def test_a_policy_that_is_blind_scores_what_it_keeps(model, num_pairs, contexts, share, policy):
    """1,001 and 4,001 tokens: within 3 standard errors of the fraction kept."""
    right = []
    for seed in range(contexts):
        prompt = recall_prompt(num_pairs, 8192, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        asked = torch.randperm(num_pairs, generator=generator)[:100].tolist()
        right += right_answers(model, prompt, policy.format(share), asked)
    error = math.sqrt(share * (1 - share) / len(right))
    assert abs(sum(right) / len(right) - share) < 3 * error


@pytest.mark.parametrize("num_pairs", [500, 2000])
def test_the_full_cache_scores_everything(model, num_pairs):
    """At 1,001 and 4,001 tokens."""
    prompt = recall_prompt(num_pairs, 8192)
    assert all(right_answers(model, prompt, "full", range(0, num_pairs, num_pairs // 50)))


@pytest.mark.parametrize("policy", ["streaming:budget=0.5", "snapkv:budget=0.25,window=4"])
def test_a_right_answer_means_that_its_entry_is_held(model, policy):
    """The theory itself: one entry of the retrieval head decides, nothing else does."""
    prompt = recall_prompt(300, 8192, seed=5)
    cache = kvlib.KVCache(model, policy)
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt.input_ids]), past_key_values=cache)
    layer, head = RETRIEVAL_HEAD
    held = set(cache.layer_kv(layer).positions[head].tolist())
    expected = [2 + 2 * index in held for index in range(300)]
    assert right_answers(model, prompt, policy, range(300)) == expected
    assert 0 < sum(expected) < 300


def test_a_policy_that_sees_the_question_keeps_its_answer(model):
    """SnapKV at a tenth: blind, it scores about that; with the question in its window, all."""
    prompt = recall_prompt(500, 8192, seed=1)
    asked = range(3, 500, 31)
    blind = right_answers(model, prompt, "snapkv:budget=0.1", asked)
    assert sum(blind) <= 6
    assert all(right_answers(model, prompt, "snapkv:budget=0.1", asked, aware=True))


def test_heads_are_what_they_are_said_to_be():
    """Attention of the query: local, retrieval, idle."""
    model = recall_model(1024)
    model.config._attn_implementation = "eager"
    prompt = recall_prompt(100, 1024)
    ids = torch.tensor([[*prompt.input_ids, *prompt.question(40)]])
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions
    last = ids.shape[1] - 1
    layer, head = LOCAL_HEAD
    assert attention[layer][0, 2 * head, -1, last - 1] > 0.999
    everywhere = torch.arange(1, last + 1)
    assert bool((attention[layer][0, 2 * head][everywhere, everywhere - 1] > 0.999).all())
    layer, head = RETRIEVAL_HEAD
    assert attention[layer][0, 2 * head, -1, 2 + 2 * 40] > 0.999
    for layer, head in IDLE_HEADS:
        row = attention[layer][0, 2 * head : 2 * head + 2, -1]
        assert torch.allclose(row, torch.full_like(row, 1 / (last + 1)))


def test_a_key_that_was_never_given_is_not_answered():
    """Without a match the query goes to BOS, and no token stands out."""
    model = recall_model(1024)
    prompt = recall_prompt(100, 1024)
    absent = next(x for x in range(2, 1024) if x not in prompt.input_ids)
    ids = torch.tensor([[*prompt.input_ids, SEP, absent]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    assert logits.abs().max() < 1e-3


def test_prompts():
    """No key twice, no key among the values, the same for a seed; too many pairs are refused."""
    prompt = recall_prompt(511, 1024, seed=3)
    assert prompt == recall_prompt(511, 1024, seed=3)
    assert prompt != recall_prompt(511, 1024, seed=4)
    assert len({*prompt.keys, *prompt.values}) == 1022
    assert prompt.input_ids[0] == BOS
    assert prompt.question(2) == (SEP, prompt.keys[2])
    for num in (0, 512):
        with pytest.raises(ConfigError, match="from 1 to 511"):
            recall_prompt(num, 1024)
    with pytest.raises(ConfigError, match="4 or more"):
        recall_model(3)


def test_it_is_an_ordinary_checkpoint(tmp_path):
    """Saved and loaded by transformers, the same answers."""
    from transformers import AutoModelForCausalLM

    model = recall_model(256)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([recall_prompt(40, 256).input_ids])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
