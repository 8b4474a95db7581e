# SPDX-License-Identifier: Apache-2.0
"""`kvlib calibrate codec`: what it measures is what errors cost."""

import copy

import numpy as np
import pytest
import torch

from kvlib.blocks import KVBlock
from kvlib.calibration import calibrate, documents
from kvlib.calibration.codec import _measure, _Moments, summary
from kvlib.calibration.codec_trial import continuation_logits, prefill
from kvlib.codecs import build_codec, decode_block, encode_block
from kvlib.codecs.transforms import load_profile
from kvlib.errors import ConfigError
from kvlib.model_spec import spec_for_model
from kvlib.testing.models import tiny_model
from tests.oracles import kvlc as oracle

SMALL = {"documents": 16, "tokens": 96, "following": 32, "group": 2}


@pytest.fixture(scope="module")
def model():
    """Random weights would make a model that minds nothing; these are sure of what they say."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 5
        for layer in model.model.layers:
            for x in (layer.self_attn.q_proj, layer.self_attn.o_proj):
                x.weight *= 2
    return model


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "tiny.kvlc"
    ticks = []
    found = calibrate(
        "codec", model, None, "tiny", file, progress=lambda *x: ticks.append(x), **SMALL
    )
    return file, found, ticks


@pytest.mark.parametrize(("kind", "layer"), [("K", 0), ("K", 2), ("V", 0), ("V", 1)])
def test_the_metric_says_what_errors_cost(model, kind, layer):
    """KL after errors along its greatest and least axes, against half the quadratic form."""
    spec = spec_for_model(model, model_id="tiny")
    model = copy.deepcopy(model).double()
    tokens, following = 48, 24
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    texts = torch.randint(0, vocabulary, (12, 1, tokens + following), generator=generator)
    moments = [_Moments(spec, k) for k in "KV"]
    for ids in texts:
        _measure(model, spec, ids, tokens, moments, generator)
    mine = moments["KV".index(kind)]
    fisher = mine.metrics[layer] / mine.count
    values, axes = torch.linalg.eigh(fisher)
    rope = spec.layers[layer].rope if kind == "K" else None
    costs = {}
    for place in (len(values) // 2, -1):
        ratios = []
        for ids in texts:
            pairs = [[x.double() for x in p] for p in prefill(model, ids[:, :tokens])]
            shape = pairs[layer]["KV".index(kind)].shape
            size = 0.02 / values[-1].sqrt()
            noise = torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
            error = (noise * axes[:, place] * size).reshape(tokens, shape[0], -1).transpose(0, 1)
            error[:, :16] = 0
            error = torch.from_numpy(oracle.turned(error.numpy(), range(tokens), rope, 1))
            with torch.no_grad():
                before = torch.log_softmax(continuation_logits(model, pairs, ids[:, tokens:]), -1)
                pairs[layer]["KV".index(kind)] += error
                after = torch.log_softmax(continuation_logits(model, pairs, ids[:, tokens:]), -1)
            kl = float((before.exp() * (before - after)).sum())
            expected = float((noise[16:] ** 2).sum()) * float(values[place]) * float(size) ** 2 / 2
            ratios.append(kl / expected)
        costs[place] = np.mean(ratios)
    # The greatest axis of 24 draws is great by chance as well, so it promises more than it costs.
    assert 0.35 < costs[-1] < 2.5
    assert 0.4 < costs[len(values) // 2] < 2.5
    assert values[-1] > 3 * values[0].clamp_min(1e-30)


def test_the_profile_serves_its_model(model, made):
    file, found, ticks = made
    assert ticks[-1][0] == ticks[-1][1] == len(ticks)
    spec = spec_for_model(model, model_id="tiny")
    ids = torch.randint(0, 60, (1, 90), generator=torch.Generator().manual_seed(5))
    block = KVBlock.dense(spec, prefill(model, ids))
    for preset in ("near", "balanced", "small", "archive"):
        sizes = []
        for level in (0.2, 1.0, 3.0):
            codec = build_codec(f"kvlc:preset={preset},level={level},profile={file}")
            assert codec.digest == found.digest
            data = b"".join(encode_block(block, codec))
            sizes.append(len(data))
            decode_block(data, spec)
        assert sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(ConfigError, match="was measured on model"):
        codec.encode(KVBlock.dense(spec_for_model(model, model_id="o"), prefill(model, ids)))


def test_the_curve_is_of_the_codec(made):
    """Finer steps take more bits and lose less; level 1 is about where 0.01 nats are lost."""
    file, found, _ = made
    for preset in ("near", "balanced", "small", "archive"):
        levels, bits, kl = load_profile(str(file)).curve(preset)
        assert (np.diff(levels) > 0).all()
        assert (np.diff(bits) < 0).all()
        assert kl[-1] > kl[0]
        if kl[0] < 0.01 < kl[-1]:
            assert np.interp(0.0, np.log(levels), kl) == pytest.approx(0.01, rel=0.25)
    rows = summary(found)
    assert len(rows) == 4 * 7
    assert "bits a value" in rows[0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presets": "tiny"}, "presets are"),
        ({"documents": 5}, "documents must be"),
        ({"tokens": 3}, "tokens must be"),
        ({"group": 0}, "group must be"),
        ({"ridge": 0.0}, "ridge must be"),
    ],
)
def test_bad_options(model, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        calibrate("codec", model, None, "tiny", tmp_path / "x", **(SMALL | options))


def test_documents_are_in_one_half_only(tmp_path):
    """And long enough to be of use."""
    learned, measured = documents.calibration_documents(), documents.test_documents()
    assert len(learned) > 30
    for text in measured.values():
        assert len(text) > 8000
        for other in learned.values():
            assert text[2000:2500] not in other
            assert other[:500] not in text
    file = tmp_path / "a.txt"
    file.write_text("words", encoding="utf-8")
    assert documents.read_documents([file]) == {str(file): "words"}
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the text"):
        documents.read_documents([file])
