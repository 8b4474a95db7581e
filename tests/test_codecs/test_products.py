# SPDX-License-Identifier: Apache-2.0
"""Products of coefficients with decoding matrices, compiled and not."""

import numpy as np
import pytest

from kvlib.codecs import products, rans
from kvlib.codecs.products import Products

COMPILED = products._compiled()


def numbers(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def fused(a, b):
    """fma(a[k], b[k], sum) from k = 0 on; in float64 a product is exact, and so is this mostly."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(a.shape[1]):
        exact = a[:, k, None].astype(np.float64) * b[k].astype(np.float64)
        total = (exact + total).astype(np.float32)
    return total


@pytest.fixture(params=[pytest.param("compiled", marks=pytest.mark.avx512), "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(products, "_compiled", lambda: None)
    return request.param


@pytest.mark.parametrize("width", [64, 192, 24])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 6, 7, 40])
def test_rows(n, count, width, backend):
    """Every matrix fills columns of its own; coefficients that are not given are 0."""
    rng = np.random.default_rng(n)
    matrices = [numbers(rng, 30, width) for _ in range(count)]
    made = Products(matrices)
    for active in (0, 1, 17, 30):
        y = numbers(rng, count, n, active)
        for given in (y, np.asfortranarray(y)):
            rows = made.rows(given)
            assert rows.dtype == np.float32
            assert rows.shape == (n, count * width)
            for i, matrix in enumerate(matrices):
                mine = rows[:, i * width : (i + 1) * width]
                exact = y[i].astype(np.float64) @ matrix[:active].astype(np.float64)
                assert np.allclose(mine, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.avx512
def test_each_number_is_summed_in_order():
    """Whatever else is multiplied with it, and wherever it lies."""
    rng = np.random.default_rng(0)
    matrix = numbers(rng, 96, 128)
    y = numbers(rng, 50, 96)
    made = Products([matrix])
    rows = made.rows(y[None])
    assert (rows == fused(y, matrix)).mean() > 0.999
    for some in (y[:1], y[3:8], y[:6], y[1:50], y[::-1]):
        index = [int(np.flatnonzero((y == x).all(axis=1))[0]) for x in some]
        assert np.array_equal(made.rows(some[None]), rows[index])


def test_a_processor_without_vectors_multiplies_with_numpy(monkeypatch):
    monkeypatch.setattr(rans, "backends", lambda: ("numpy", "torch"))
    products._compiled.cache_clear()
    try:
        assert products._compiled() is None
    finally:
        products._compiled.cache_clear()
