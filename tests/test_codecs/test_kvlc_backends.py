# SPDX-License-Identifier: Apache-2.0
"""`kvlc` writes and reads the same bits compiled by numba and without."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvlib.blocks import KVBlock, LayerKV, Row
from kvlib.codecs import build_codec, decode_block, encode_block
from kvlib.codecs.kvlc_kernels import kernels
from kvlib.codecs.rans import backends
from kvlib.codecs.rope import angles
from kvlib.spec import DTYPES, KVSpec, LayerSpec, RopeSpec
from kvlib.testing.codecs import sample_blocks, sample_spec
from tests.test_codecs.profiles import random_profile

pytestmark = pytest.mark.skipif("numba" not in backends(), reason="numba does not work here")

DTYPES_TAKEN = ("float32", "float16", "bfloat16")
ROPES = {
    "whole": RopeSpec(theta=1e4, rotary_dim=16),
    "interleaved": RopeSpec(theta=1e4, rotary_dim=16, interleaved=True),
    "partial": RopeSpec(theta=1e4, rotary_dim=6),
    "partial, interleaved": RopeSpec(theta=1e4, rotary_dim=10, interleaved=True, first_channel=3),
    "none": None,
}


def bits(x):
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def both(monkeypatch, do):
    """What `do` returns on either backend."""
    results = []
    for name in ("numba", "numpy"):
        monkeypatch.setenv("KVLIB_RANS", name)
        assert kernels().__name__ == f"kvlib.codecs.kvlc_{name}"
        results.append(do())
    return results


def check(monkeypatch, block, method):
    codec = build_codec(method)

    def run():
        data = b"".join(encode_block(block, codec))
        decoded = decode_block(data, block.spec)
        return data, [bits(x) for y in decoded.layers for x in (y.keys, y.values)]

    compiled, plain = both(monkeypatch, run)
    assert compiled[0] == plain[0]
    assert compiled[1] == plain[1]
    return compiled[0]


def spec_of(rope, dtype="bfloat16", layers=4):
    layer = LayerSpec(num_kv_heads=3, k_head_dim=16, v_head_dim=12, rope=rope)
    return KVSpec(model_id="kvlc-backends", dtype=dtype, layers=[layer] * layers)


def lifelike(spec, tokens, seed=0, start=0):
    """Channels with means, deviations, tails and outliers of their own."""
    rng = np.random.default_rng(seed)
    layers = []
    for shape in spec.layers:
        pair = []
        for width in (shape.k_head_dim, shape.v_head_dim):
            size = np.exp(rng.uniform(-3, 2, width))
            x = rng.standard_t(4, (shape.num_kv_heads, tokens, width)) * size
            x = x + rng.standard_normal(width) * 3
            pair.append(torch.from_numpy(x).to(getattr(torch, spec.dtype)))
        layers.append(tuple(pair))
    return KVBlock.dense(spec, layers, start=start)


def evicted(block, seed=0):
    """Every head keeps other tokens; every second layer as many in all heads."""
    rng = np.random.default_rng(seed)
    layers = []
    for layer in block.layers:
        rows, n = [], layer.lengths[0]
        for row in layer.rows():
            size = n // 2 if layer.layer_idx % 2 else int(rng.integers(0, n))
            index = torch.from_numpy(np.sort(rng.permutation(n)[:size]))
            rows.append(Row(row.keys[index], row.values[index], row.positions[index], None))
        layers.append(LayerKV.from_rows(layer.layer_idx, rows))
    return replace(block, layers=tuple(layers))


def alike(block, seed=0):
    """All heads of all layers keep the same tokens, not next to each other."""
    index = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(block.num_tokens)))
    index = index[: block.num_tokens // 2 * 2 : 2]
    index = index.sort().values
    layers = []
    for layer in block.layers:
        rows = [
            Row(row.keys[index], row.values[index], row.positions[index], None)
            for row in layer.rows()
        ]
        layers.append(LayerKV.from_rows(layer.layer_idx, rows))
    return replace(block, layers=tuple(layers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.mark.parametrize("dtype", DTYPES_TAKEN)
@pytest.mark.parametrize("method", ["kvlc", "kvlc:level=0.01,sinks=0,chunk=16"])
def test_sample_blocks(dtype, method, monkeypatch):
    assert set(DTYPES_TAKEN) <= set(DTYPES)
    for _, block in sample_blocks(dtype, tokens=(1, 65), contents=("normal", "bits", "wide")):
        check(monkeypatch, block, method)


@pytest.mark.parametrize("preset", ["near", "balanced", "small", "archive"])
def test_sample_blocks_with_a_profile(preset, folder, monkeypatch):
    file = folder / "sample.kvlc"
    if not file.exists():
        random_profile(sample_spec("float32"), file)
    for dtype in DTYPES_TAKEN:
        for _, block in sample_blocks(dtype, tokens=(33,), contents=("normal", "bits")):
            check(monkeypatch, block, f"kvlc:preset={preset},level=0.05,profile={file}")


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dtype", DTYPES_TAKEN)
def test_lifelike(dtype, rope, monkeypatch):
    """Escapes, low bits, several chunks, strided and evicted tensors, every kind of rotation."""
    block = lifelike(spec_of(ROPES[rope], dtype, layers=2), 300, start=64)
    sizes = [len(check(monkeypatch, block, f"kvlc:level={x}")) for x in (0.01, 0.3, 2)]
    assert sizes == sorted(sizes, reverse=True)
    for other in (block.slice(67, 150), evicted(block), alike(block)):
        check(monkeypatch, other, "kvlc:level=0.3,chunk=50")


@pytest.mark.parametrize("preset", ["near", "balanced", "small", "archive"])
def test_lifelike_with_a_profile(preset, folder, monkeypatch):
    spec = spec_of(ROPES["partial"])
    file = folder / "lifelike.kvlc"
    if not file.exists():
        random_profile(spec, file)
    block = lifelike(spec, 200)
    for level in (0.01, 0.5):
        for each in (block, evicted(block), alike(block)):
            check(monkeypatch, each, f"kvlc:preset={preset},level={level},profile={file}")


def test_a_channel_alone(monkeypatch):
    """NumPy would add up a single column in another order."""
    shape = LayerSpec(num_kv_heads=1, k_head_dim=1, v_head_dim=1)
    spec = KVSpec(model_id="kvlc-backends", dtype="float32", layers=[shape] * 12)
    for seed in range(4):
        check(monkeypatch, lifelike(spec, 256, seed), "kvlc:level=0.02,sinks=0")


def test_threads(monkeypatch):
    """Decoding on several threads, with either backend, gives what one thread gives."""
    block = lifelike(spec_of(ROPES["whole"], layers=12), 100)
    data = b"".join(encode_block(block, build_codec("kvlc")))

    def run():
        with ThreadPoolExecutor(3) as executor:
            return decode_block(data, block.spec, executor=executor)

    alone = decode_block(data, block.spec)
    for decoded in both(monkeypatch, run):
        assert decoded.equal(alone)


# -- single functions, where containers would hide a difference


def numbers(shape, seed=0, size=10.0):
    return (np.random.default_rng(seed).standard_normal(shape) * size).astype(np.float32)


@pytest.mark.parametrize("size", [1.0, 300.0, 1e6, 3e6])
def test_quantize(size, monkeypatch):
    """Sums are exact whatever their size; halves are rounded to even."""
    rows = numbers((300, 7), size=size)
    rows[:4, 0] = [0.5, 1.5, 2.5, -0.5]
    mean = np.zeros(7, np.float32)
    args = rows, mean, np.float32(1), 2.0**24
    for values, total, square in both(monkeypatch, lambda: kernels().quantize(*args)):
        assert values[:4, 0].tolist() == [0, 2, 2, 0]
        assert np.array_equal(values, np.rint(rows))
        wide = values.astype(object)
        assert total.tolist() == wide.sum(axis=0).tolist()
        assert square.tolist() == (wide**2).sum(axis=0).tolist()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 2.0**24, -(2.0**24)])
def test_what_quantize_refuses(wrong, monkeypatch):
    rows = numbers((9, 5))
    rows[3, 2] = wrong
    zero = np.zeros(5, np.float32)
    do = lambda: kernels().quantize(rows, zero, np.float32(1), 2.0**24)  # noqa: E731
    with np.errstate(invalid="ignore"):
        assert both(monkeypatch, do) == [None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rope", ROPES)
def test_placing_and_gathering(dtype, rope, monkeypatch):
    """Strided tensors, some rows of them; nothing else is touched; ties go to even."""
    index = np.array([0, 2, 3, 7])
    turning = None if ROPES[rope] is None else (angles(ROPES[rope], index * 100), ROPES[rope])
    rows, bias = numbers((4, 3 * 19), 1), numbers(3 * 19, 2)
    rows[:, ::5], bias[::5] = 1 + np.arange(1, 5)[:, None] * 2.0**-8, 0
    rows[0, 1], rows[1, 1], rows[2, 1] = np.inf, -np.inf, np.nan

    def run():
        whole = torch.full((3, 9, 40), 5.0, dtype=dtype)
        part = whole[:, :8, 10:29]
        with np.errstate(invalid="ignore"):
            kernels().place([part], index, rows.copy(), bias, turning)
        rest = whole.clone()
        rest[:, index, 10:29] = 5
        assert bool((rest == 5).all())
        back = part.clone().nan_to_num(1.0, 2.0, 3.0)
        wide = torch.zeros((3, 8, 24), dtype=dtype)
        wide[:, :, 2:21] = back
        got, fit = kernels().gather([wide[:, :, 2:21]], index, turning, 1e4)
        assert fit
        same = part.nan_to_num(0.25, np.inf, -np.inf)  # NaN has many forms
        return bits(same), got.tobytes(), back, got

    one, two = both(monkeypatch, run)
    assert one[:2] == two[:2]
    if turning is None:
        expected = one[2][:, index].float().transpose(0, 1).reshape(4, -1).numpy()
        assert np.array_equal(one[3], expected)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 4.0, -4.0])
def test_what_gathering_reports(wrong, monkeypatch):
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        x = torch.from_numpy(numbers((2, 6, 5), size=0.5).clip(-3.9, 3.9)).to(dtype)
        index = np.array([0, 1, 2, 4])
        x[1, 3, 2] = wrong
        do = lambda: kernels().gather([x], index, None, 4.0)[1]  # noqa: B023, E731
        assert both(monkeypatch, do) == [True, True]
        x[1, 2, 2] = wrong
        assert both(monkeypatch, do) == [False, False]
