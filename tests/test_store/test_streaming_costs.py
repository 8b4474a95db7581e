# SPDX-License-Identifier: Apache-2.0
"""The streaming controller on a store's own measurements."""

import numpy as np
import pytest

from kvlib import KVStore
from kvlib.codecs.streaming import (
    Chunk,
    ChunkOffer,
    Context,
    LinkEstimate,
    Progress,
    StreamController,
)
from kvlib.store.cost import HALF_LIFE, CostModel
from kvlib.testing.models import random_block, tiny_spec

CHUNKS = [Chunk(256, (8_000_000, 4_000_000, 2_000_000), 16_000_000)] * 6


def model(bytes_per_s, *, prefill_s=0.05, decode_s=0.001, latency_s=0.0):
    """A model that has seen enough of a machine that always takes the same time."""
    cost = CostModel()
    for size in (1_000_000, 2_000_000, 4_000_000, 8_000_000) * 3:
        cost.read("segment", size, latency_s + size / bytes_per_s)
        cost.decode(2 * size, decode_s * size / 8_000_000)
    for position in (0, 256, 512, 1024):
        cost.prefill(256, position, prefill_s)
    return cost


def choose(cost, left_s, *, exact=False, lossless_levels=0):
    context = Context.measured(cost, CHUNKS, lossless_levels=lossless_levels)
    link = cost.link("segment", 4_000_000)
    return StreamController(reserve=0.0).choose(Progress(context, 0, left_s, link, exact=exact))


@pytest.mark.parametrize(
    ("bytes_per_s", "level"),
    [
        (1e9, 0),  # 48 MB in 0.05 s
        (200e6, 1),  # 24 MB in 0.12 s, 48 MB in 0.24 s
        (80e6, 2),  # 12 MB in 0.15 s, 24 MB in 0.3 s
        (1e6, None),  # 12 s for the coarsest; computing all takes 0.3 s
    ],
)
def test_the_level_follows_from_what_the_store_measured(bytes_per_s, level):
    choice = choose(model(bytes_per_s, prefill_s=0.03), 0.2)
    assert choice.level == level
    if level is not None:
        sizes = sum(chunk.nbytes[level] for chunk in CHUNKS)
        assert choice.predicted_s == pytest.approx(sizes / bytes_per_s + 0.001, rel=1e-3)


def test_a_slow_model_and_a_slow_decoder_change_the_choice():
    """On one link: what is cheap to compute is computed, what is slow to decode is not fetched."""
    assert choose(model(5e6, prefill_s=10.0), 3.0).level == 2
    assert choose(model(5e6, prefill_s=0.1), 0.65).level is None
    assert choose(model(1e9, prefill_s=0.01, decode_s=0.001), 0.1).level == 0
    assert choose(model(1e9, prefill_s=0.01, decode_s=5.0), 0.1).level is None


def test_latency_counts_into_the_pace():
    swift, tired = model(1e8), model(1e8, latency_s=0.1)
    assert swift.link("segment", 4_000_000).s_per_byte == pytest.approx(1e-8, rel=1e-6)
    assert tired.link("segment", 4_000_000).s_per_byte == pytest.approx(0.14 / 4e6, rel=1e-6)
    assert choose(swift, 0.5).level == 0
    assert choose(tired, 0.5).level == 2


def test_exact_requests_take_no_lossy_level():
    assert choose(model(80e6), 0.2).level == 2
    assert choose(model(80e6), 0.2, exact=True, lossless_levels=1).level in (0, None)


def test_nothing_is_weighed_before_it_was_measured():
    cost = CostModel()
    assert cost.link("segment", 1000) == LinkEstimate()
    assert Context.measured(cost, CHUNKS) is None
    cost.decode(1000, 0.001)
    assert Context.measured(cost, CHUNKS) is None
    cost.prefill(256, 0, 0.1)
    assert Context.measured(cost, CHUNKS) is not None
    cost.read("segment", 1000, 0.5)
    link = cost.link("segment", 1000)
    assert (link.s_per_byte, link.deviation) == pytest.approx((5e-4, 5e-4))


def test_positions_go_on_where_the_context_begins():
    cost = CostModel()
    for n, p in ((100, 0), (100, 900), (300, 2000), (50, 50)) * 4:
        cost.prefill(n, p, 1e-3 * n + 1e-6 * n * (p + n / 2))
        cost.decode(n, 1e-6 * n)
    chunks = [Chunk(100, (10,), 1000), Chunk(200, (20,), 2000)]
    expected = [
        ChunkOffer(n, (size,), 1e-6 * 10 * n, 1e-3 * n + 1e-6 * n * (p + n / 2))
        for n, size, p in ((100, 10, 500), (200, 20, 600))
    ]
    got = Context.measured(cost, chunks, start=500).offers
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.tokens, mine.nbytes) == (theirs.tokens, theirs.nbytes)
        assert mine.decode_s == pytest.approx(theirs.decode_s, rel=1e-5)
        assert mine.prefill_s == pytest.approx(theirs.prefill_s, rel=1e-5)


def test_the_deviation_is_that_of_the_samples():
    """Against NumPy: weighted residuals of the same fit, older samples counting less."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(10_000, 10_000_000, 200).astype(float)
    seconds = 0.002 + sizes * 1e-9 * rng.uniform(0.7, 1.3, 200)
    cost = CostModel()
    for size, second in zip(sizes, seconds, strict=True):
        cost.read("segment", int(size), float(second))
    age = 0.5 ** (np.arange(200)[::-1] / HALF_LIFE)
    x, w = np.stack([np.ones(200), sizes], 1), age / sizes
    fit, *_ = np.linalg.lstsq(x * np.sqrt(w)[:, None], seconds * np.sqrt(w), rcond=None)
    assert (fit > 0).all()
    sigma2 = (w * (seconds - x @ fit) ** 2).sum() / (age.sum() - 2)
    link = cost.link("segment", 1_000_000)
    assert link.s_per_byte == pytest.approx((fit[0] + fit[1] * 1e6) / 1e6, rel=1e-5)
    assert link.deviation == pytest.approx(np.sqrt(sigma2 * 1e6) / 1e6, rel=1e-4)


def test_a_store_s_loads_are_enough_to_choose_by(tmp_path):
    spec = tiny_spec()
    with KVStore(tmp_path, memory=0) as store:
        tokens = list(range(64 * 16))
        keys = store.block_keys(spec, tokens)
        store.put(spec, keys, random_block(spec, len(tokens)))
        store.load(spec, keys)
        store.cost.prefill(1024, 0, 100.0)
        (tier,) = store.stats().tiers
        raw = 256 * spec.bytes_per_token()
        chunks = [Chunk(256, (raw,), raw)] * 4
        context = Context.measured(store.cost, chunks, lossless_levels=1)
        progress = Progress(context, 0, 60.0, store.cost.link(tier, raw), exact=True)
        assert StreamController().choose(progress).level == 0
