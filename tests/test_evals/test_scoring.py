# SPDX-License-Identifier: Apache-2.0
"""Scores against plain forward passes without any cache, and what is counted."""

import math

import numpy as np
import pytest
import torch

import kvlib
from kvlib.codecs import build_codec
from kvlib.errors import ConfigError
from kvlib.evals.metrics import answer_scores
from kvlib.evals.scoring import EvalMethod, Scorer
from kvlib.evals.tasks import Question, Sample
from kvlib.store.snapshots import encode_snapshot
from kvlib.testing.models import tiny_model
from kvlib.testing.recall_model import recall_model, recall_prompt

METHODS = [
    "full",
    "full | exact",
    "full | int4",
    "streaming:budget=0.5",
    "snapkv:budget=0.25,window=4",
    "h2o:budget=0.25 | int8",
]


def parse(*methods):
    return [EvalMethod.parse(method) for method in methods]


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def sample():
    """Two questions of different lengths about 60 random tokens."""
    ids = torch.randint(5, 199, (100,), generator=torch.Generator().manual_seed(4)).tolist()
    questions = (
        Question(tuple(ids[60:64]), tuple(ids[64:66]), tuple(ids[66:71]), evidence=(10, 11, 50)),
        Question((), tuple(ids[71:72]), tuple(ids[72:74])),
    )
    return Sample(tuple(ids[:60]), questions)


def oracle(logits, answer):
    """Scores in numpy, from the definition."""
    x = logits.double().numpy()
    logp = x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
    logp -= x.max(1, keepdims=True)
    hits = [int(row.argmax()) == token for row, token in zip(x, answer, strict=True)]
    nll = -np.mean([logp[i, token] for i, token in enumerate(answer)])
    return all(hits), np.mean(hits), nll, logp


@torch.no_grad()
@pytest.mark.parametrize("mode", ["unaware", "aware"])
@pytest.mark.parametrize("stepwise", [False, True])
def test_the_full_cache_scores_what_a_plain_pass_scores(model, sample, mode, stepwise):
    """One forward pass over everything, without a cache; lossless methods equal it."""
    scorer = Scorer(model, model_id="tiny", stepwise=stepwise)
    found = {
        method.text: record
        for method, record in scorer.score(sample, mode, parse("full", "full | exact"))
    }
    assert found["full"]["questions"] == found["full | exact"]["questions"]
    for question, scored in zip(sample.questions, found["full"]["questions"], strict=True):
        ask = [*sample.context, *question.question, *question.prefix]
        ids = torch.tensor([[*ask, *question.answer[:-1]]])
        logits = model(ids).logits[0, len(ask) - 1 :]
        exact, accuracy, nll, _ = oracle(logits, question.answer)
        assert scored["exact"] == exact
        assert scored["token_accuracy"] == pytest.approx(accuracy)
        assert scored["nll"] == pytest.approx(nll, abs=1e-4)
        assert scored["kl"] == 0
        assert scored["top1"] == 1


@torch.no_grad()
@pytest.mark.parametrize("mode", ["unaware", "aware"])
def test_each_method_scores_what_its_own_cache_gives(model, sample, mode):
    """The shared prefill changes nothing: a cache of each method alone, question by question."""
    scored = {
        method.text: record
        for method, record in Scorer(model, model_id="tiny").score(sample, mode, parse(*METHODS))
    }
    assert list(scored) == [method.text for method in parse(*METHODS)]
    for text in METHODS:
        (method,) = parse(text)
        record = scored[method.text]
        held = []
        for question, its in zip(sample.questions, record["questions"], strict=True):
            aware = mode == "aware"
            prompt = sample.context + (question.question if aware else ())
            ask = question.prefix if aware else question.question + question.prefix
            cache = kvlib.KVCache(model, method.policy, model_id="tiny")
            model(torch.tensor([prompt]), past_key_values=cache)
            held.append(cache.nbytes)
            if method.codec is not None:
                snapshot = cache.to_snapshot()
                held[-1] = len(b"".join(encode_snapshot(snapshot, method.codec)))
                from kvlib.store.snapshots import decode_snapshot

                record_bytes = b"".join(encode_snapshot(snapshot, method.codec))
                back = decode_snapshot(record_bytes, snapshot.block.spec, snapshot.method)
                cache = kvlib.KVCache.from_snapshot(model, back, model_id="tiny")
            ids = torch.tensor([[*ask, *question.answer[:-1]]])
            logits = model(ids, past_key_values=cache).logits[0, len(ask) - 1 :]
            _, _, nll, _ = oracle(logits, question.answer)
            assert its["nll"] == pytest.approx(nll, abs=1e-4)
        mean = sum(held) / len(held)
        assert record["held_bytes"] == pytest.approx(mean if mode == "aware" else held[0])
    assert scored["full"]["held_bytes"] == scored["full"]["full_bytes"]


@torch.no_grad()
def test_what_is_known_of_a_probe(model, sample):
    """Peaks and seconds, for the contexts that are timed."""
    scorer = Scorer(model, model_id="tiny")
    methods = parse("full", "full | int4", "streaming:budget=0.25")
    plain = dict(enumerate(scorer.score(sample, "unaware", methods)))
    assert "prefill_s" not in plain[0][1]
    found = {m.text: record for m, record in scorer.score(sample, "unaware", methods, probe=True)}
    full, stored, evicted = found.values()
    assert full["questions"] == plain[0][1]["questions"]
    assert full["peak_cache_bytes"] == full["held_bytes"]
    assert full["first_token_s"] > full["prefill_s"] > 0
    assert len(full["step_s"]) == 4
    assert stored["first_token_s"] > stored["restore_s"] > 0
    # One layer of three is whole while the others hold a quarter.
    whole = full["held_bytes"]
    assert 0.25 * whole < evicted["peak_cache_bytes"] < 0.75 * whole
    assert evicted["held_bytes"] < 0.3 * whole


@torch.no_grad()
def test_evidence_kept_follows_the_positions(model, sample):
    """Streaming at a quarter: 4 sinks and the last 11 of 60 tokens."""
    (method,) = parse("streaming:budget=0.25")
    ((_, record),) = Scorer(model, model_id="tiny").score(sample, "unaware", [method])
    assert record["questions"][0]["evidence_kept"] == pytest.approx(1 / 3)
    assert record["questions"][1]["evidence_kept"] is None


@torch.no_grad()
def test_stepwise_lets_a_policy_act_between_tokens():
    """The evidence leaves the window while the answer is written; in one pass it does not."""
    model = recall_model(256)
    prompt = recall_prompt(20, 256)
    # The asked value is the oldest token of the window after the prompt.
    (method,) = parse("streaming:budget=17,sinks=0")
    last = len(prompt.input_ids) - 17
    index = (last - 2 + 1) // 2
    noise = tuple(prompt.keys[:3])
    question = Question((), noise + prompt.question(index), (prompt.values[index],))
    asked = Question((), noise, (1, prompt.keys[index], prompt.values[index]))
    for one, expected in ((question, [1, 1]), (asked, [1, 0])):
        rights = []
        for stepwise in (False, True):
            scorer = Scorer(model, model_id="r", stepwise=stepwise)
            sample = Sample(prompt.input_ids, (one,))
            ((_, record),) = scorer.score(sample, "unaware", [method])
            rights.append(round(record["questions"][0]["token_accuracy"] * len(one.answer)))
        assert rights == expected


def test_scores_against_the_definition():
    """On random logits, in numpy."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 50, generator=generator)
    reference = 3 * torch.randn(7, 50, generator=generator)
    answer = logits.argmax(-1).tolist()
    answer[2] = (answer[2] + 1) % 50
    exact, accuracy, nll, mine = oracle(logits, answer)
    _, _, _, full = oracle(reference, answer)
    found = answer_scores(logits, reference, answer)
    assert found["exact"] == exact == 0
    assert found["token_accuracy"] == pytest.approx(accuracy) == pytest.approx(6 / 7)
    assert found["nll"] == pytest.approx(nll)
    assert found["kl"] == pytest.approx(float((np.exp(full) * (full - mine)).sum(1).mean()))
    agree = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    assert found["top1"] == pytest.approx(float(agree))
    assert answer_scores(reference, reference, answer)["kl"] == 0
    logits[0, 0] = math.nan
    with pytest.raises(ConfigError, match="not finite"):
        answer_scores(logits, reference, answer)


def test_methods_have_one_text():
    """Defaults are filled in; the codec is a part of it."""
    (method,) = parse("snapkv:window=8 | int4")
    assert method.text == "snapkv:budget=0.5,window=8,kernel=5,pool=avg,group=mean | int4:group=32"
    assert method.versions == "snapkv@1 | int4@1"
    assert parse("| int8")[0].text == "full | int8:group=64"
    assert build_codec("int8") == parse("full|int8")[0].codec
