# SPDX-License-Identifier: Apache-2.0
"""CacheGen: both variants against loops in float64, what they store, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvlib.artefacts import load_artefact, model_identity, save_artefact
from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV, Row
from kvlib.calibration import calibrate
from kvlib.calibration.cachegen import measure, table
from kvlib.cli import app
from kvlib.codecs import (
    Container,
    build_codec,
    cachegen_profile,
    decode_block,
    describe_codec,
    encode_block,
)
from kvlib.codecs.cachegen import CacheGenCodec
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError, UnsupportedInputError
from kvlib.model_spec import spec_for_model
from kvlib.spec import KVSpec, LayerSpec
from kvlib.testing.codecs import CodecContract, sample_blocks, sample_spec
from kvlib.testing.models import random_block, tiny_model
from tests.oracles import cachegen as oracle

ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
LEVELS = [0.25, 0.5, 1.0, 3.0]
GOLDEN = Path(__file__).parents[1] / "golden" / "cachegen.json"


def write_profile(path, spec, *, levels=LEVELS, seeds=range(3), tokens=150, scale=1.0):
    """A profile from normal numbers."""
    blocks = [random_block(spec, tokens, seed=seed) for seed in seeds]
    for block in blocks:
        for layer in block.layers:
            layer.keys.mul_(scale)
            layer.values.mul_(scale)
    tensors = measure(spec, lambda: blocks, levels)
    save_artefact(
        path, kind="cachegen", model=model_identity(spec), tensors=tensors, settings={"seeds": 3}
    )
    return str(path)


def toy_spec(layers=7, heads=3, width=4, dtype="float32", values=None):
    layer = LayerSpec(num_kv_heads=heads, k_head_dim=width, v_head_dim=values or width)
    return KVSpec(model_id="toy", layers=(layer,) * layers, dtype=dtype)


@pytest.fixture(scope="module")
def contract_profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    return write_profile(folder / "p.safetensors", sample_spec("float32"))


@pytest.fixture(scope="module")
def toy_profile(tmp_path_factory):
    return write_profile(tmp_path_factory.mktemp("toy") / "p.safetensors", toy_spec())


def code(codec, block, **options):
    """A container, and what it decodes to."""
    data = b"".join(encode_block(block, codec))
    return data, decode_block(data, block.spec, codec_for=lambda text: codec, **options)


def read_as(data, spec, codec):
    return decode_block(data, spec, codec_for=lambda text: codec)


def sections(data):
    return {(s.kind, s.layer_idx): s for s in Container(data).header.sections}


def is_raw(data, kind, layer_idx):
    return bool(sections(data)[kind, layer_idx].flags & SectionFlag.RAW)


# The contract


class Bounded(CodecContract):
    def max_error(self, codec, x):
        wide = x.double().numpy()
        if not np.isfinite(wide).all():
            return np.full(wide.shape, np.nan)  # stored raw
        size = np.abs(wide).max()
        error = 2.0**-21 * size + 2.0**-140
        if codec.variant == "lmcache":
            axes = (0, 2) if wide.ndim == 3 else (1,)
            step = np.abs(wide).max(axes, keepdims=True) / 30  # half of one of 15 levels
        else:
            step = max(self.width(codec) / 2, size / 253)
        rounding = np.maximum((size + step) * ULP[x.dtype], SMALLEST[x.dtype])
        return np.broadcast_to(step + error + rounding, wide.shape)

    def blocks(self, codec, *, tokens=(5,), contents=("normal", "bits")):
        if codec.sinks:  # once more, with other parameters: one dtype is enough
            yield from sample_blocks("bfloat16", tokens=tokens, contents=contents)
        else:
            yield from super().blocks(codec, tokens=tokens, contents=contents)

    def width(self, codec):
        """The widest bin of any layer."""
        sigma = load_artefact(codec.profile, "cachegen").tensors["sigma"]
        return codec.level * 1.5 * sigma.max().item()


class TestPaper(Bounded):
    @pytest.fixture
    def codec(self, contract_profile):
        return CacheGenCodec(profile=contract_profile)


class TestPaperOtherwise(Bounded):
    @pytest.fixture
    def codec(self, contract_profile):
        return CacheGenCodec(profile=contract_profile, level=3.0, chunk=23, sinks=70)


class TestLMCache(Bounded):
    @pytest.fixture
    def codec(self):
        return CacheGenCodec(variant="lmcache")


class TestLMCacheOtherwise(Bounded):
    @pytest.fixture
    def codec(self):
        return CacheGenCodec(variant="lmcache", chunk=40, sinks=70)


# The paper's variant


def check_paper(codec, layer, back, kind, sigma, place, num_layers):
    """A layer's keys or values are what the oracle makes of them; how near a bin came to another.

    Where that is too near, float32 may have chosen the other.
    """
    nearest = 0.5
    x, y = ((z.keys, z.values)[kind] for z in (layer, back))
    width = oracle.width(codec.level, sigma, place, num_layers)
    if layer.is_dense:
        planes = [(x.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1))]
    else:
        planes = [
            ((a.keys, a.values)[kind], (b.keys, b.values)[kind])
            for a, b in zip(layer.rows(), back.rows(), strict=True)
        ]
    for a, b in planes:
        for first in range(0, len(a), codec.chunk):
            part = slice(first, first + codec.chunk)
            want, least = oracle.paper(a[part].double().numpy(), width)
            nearest = min(nearest, least)
            if least > 1e-5:
                np.testing.assert_allclose(b[part].numpy(), want, rtol=1e-5, atol=1e-5)
    return nearest


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 9, 10, 11, 20, 25, 31]),
    st.sampled_from(LEVELS),
    st.booleans(),
)
def test_paper_is_the_oracle(toy_profile, seed, n, level, ragged):
    """Dense and ragged layers of every third decode to what the definition says."""
    codec = CacheGenCodec(profile=toy_profile, level=level, chunk=25)
    sigma = load_artefact(toy_profile, "cachegen").tensors["sigma"]
    block = random_block(toy_spec(), n, seed=seed % 1000)
    if ragged:
        layers = []
        for layer in block.layers:
            rows = [
                Row(r.keys[i:], r.values[i:], r.positions[i:], None)
                for i, r in enumerate(layer.rows())
            ]
            layers.append(LayerKV.from_rows(layer.layer_idx, rows) if n > 3 else layer)
        block = replace(block, layers=tuple(layers))
    data, back = code(codec, block)
    for place, (layer, mine) in enumerate(zip(block.layers, back.layers, strict=True)):
        for kind, name in enumerate((SectionKind.KEYS, SectionKind.VALUES)):
            if is_raw(data, name, place):
                assert n < 10
                continue
            assume(
                check_paper(codec, layer, mine, kind, sigma[place, kind].item(), place, 7) > 1e-5
            )


def test_paper_of_pruned_keys(toy_profile):
    """Heads that kept other channels are coded with the tables of those."""
    codec = CacheGenCodec(profile=toy_profile, level=0.25)
    sigma = load_artefact(toy_profile, "cachegen").tensors["sigma"]
    block = random_block(toy_spec(), 40, seed=3)
    channels = torch.tensor([[0, 3], [1, 2], [0, 1]])
    layers = []
    for layer in block.layers:
        keys = layer.keys.gather(2, channels[:, None].expand(-1, 40, -1))
        layers.append(replace(layer, keys=keys, channels=channels))
    block = replace(block, layers=tuple(layers))
    data, back = code(codec, block)
    assert not is_raw(data, SectionKind.KEYS, 0)
    for place, (layer, mine) in enumerate(zip(block.layers, back.layers, strict=True)):
        assert check_paper(codec, layer, mine, 0, sigma[place, 0].item(), place, 7) > 1e-6


def test_each_channel_has_its_own_tables(tmp_path):
    """Tables of the right channels: swapped channels take more bytes, and still come back."""
    spec = toy_spec(layers=1, heads=2, width=8)
    spread = torch.tensor([0.05, 8.0] * 4)

    def draw(seed):
        block = random_block(spec, 400, seed=seed)
        for layer in block.layers:
            layer.keys.mul_(spread)
        return block

    tensors = measure(spec, lambda: [draw(1), draw(2)], [0.5])
    path = tmp_path / "p"
    save_artefact(path, kind="cachegen", model=model_identity(spec), tensors=tensors, settings={})
    codec = CacheGenCodec(profile=str(path))
    block = draw(3)
    swapped = replace(block, layers=tuple(replace(x, keys=x.keys.flip(-1)) for x in block.layers))
    pruned = replace(
        block,
        layers=tuple(
            replace(x, keys=x.keys[..., 1::2], channels=torch.tensor([[1, 3, 5, 7]] * 2))
            for x in block.layers
        ),
    )
    sizes = []
    for b in (block, swapped, pruned):
        data, back = code(codec, b)
        key = SectionKind.KEYS, 0
        assert not sections(data)[key].flags & SectionFlag.RAW
        sizes.append(sections(data)[key].stored_bytes)
        width = 0.25 * tensors["sigma"][0, 0].item()
        assert (back.layers[0].keys - b.layers[0].keys).abs().max() < max(width, 0.3)
    assert sizes[1] > 1.2 * sizes[0]
    assert sizes[2] < sizes[0]  # had they the tables of channels 0..3, half would be escapes


def test_sigma_and_thirds(tmp_path):
    """What is measured is the oracle's; bins widen from third to third."""
    spec = toy_spec(layers=4, width=2)
    blocks = [random_block(spec, n, seed=n) for n in (37, 20)]
    tensors = measure(spec, lambda: blocks, [1.0])
    path = tmp_path / "p"
    save_artefact(path, kind="cachegen", model=model_identity(spec), tensors=tensors, settings={})
    codec = CacheGenCodec(profile=str(path), level=1)
    for place in range(4):
        for kind in range(2):
            lists = [(b.layers[place].keys, b.layers[place].values)[kind] for b in blocks]
            want = oracle.sigma([x.transpose(0, 1).flatten(1).numpy() for x in lists])
            assert tensors["sigma"][place, kind].item() == pytest.approx(want, rel=1e-6)
            found = codec._profile.tables(place, kind, 1.0).width
            assert found == pytest.approx(oracle.width(1.0, want, place, 4), rel=1e-6)
    assert [oracle.width(1.0, 1.0, place, 4) for place in range(4)] == [0.5, 0.5, 1.0, 1.5]


def test_escapes(tmp_path):
    """What tables do not cover comes back as well, anchors and deltas, in few bytes each."""
    spec = toy_spec(layers=1)
    codec = CacheGenCodec(profile=write_profile(tmp_path / "p", spec), level=0.25)
    block = random_block(spec, 60, seed=9)
    keys = block.layers[0].keys
    plain = sections(code(codec, block)[0])[SectionKind.KEYS, 0].stored_bytes
    keys[1, 17, 2] = 5e4
    keys[2, 23, 0] = -300.0
    keys[0, 40] = torch.tensor([90.0, 3.0, -70.0, 1.0])  # an anchor
    data, back = code(codec, block)
    info = sections(data)[SectionKind.KEYS, 0]
    assert plain < info.stored_bytes < plain + 200
    width = codec._profile.tables(0, 0, 0.25).width
    error = (back.layers[0].keys - keys).abs()
    error[:, ::10] = 0
    assert error[1, 17, 2] <= width / 2 + 0.01
    error[1, 17, 2] = 0
    assert error.max() <= width / 2 + 1e-4
    keys[1, 17, 2] = 1e9  # too many bins for float32
    data, back = code(codec, block)
    assert is_raw(data, SectionKind.KEYS, 0)
    assert not is_raw(data, SectionKind.VALUES, 0)
    assert back.layers[0].keys.equal(keys)


@pytest.mark.parametrize("variant", ["paper", "lmcache"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_only_the_affected_section_is_raw(toy_profile, variant, bad):
    """One number that cannot be coded makes that layer's keys or values raw, and no other."""
    codec = CacheGenCodec(variant=variant, profile=toy_profile if variant == "paper" else None)
    block = random_block(toy_spec(), 300)
    clean, _ = code(codec, block)
    assert not any(s.flags for s in sections(clean).values())
    block.layers[2].values[1, 299, 0] = bad
    data, back = code(codec, block)
    raw = [key for key, s in sections(data).items() if s.flags & SectionFlag.RAW]
    assert raw == [(SectionKind.VALUES, 2)]
    want = block.layers[2].values.view(torch.int32)
    assert back.layers[2].values.view(torch.int32).equal(want)


def test_one_profile_has_many_levels(toy_profile):
    """Coarser levels are smaller and worse; each is a codec of its own."""
    block = random_block(toy_spec(), 250, seed=5)
    sizes, errors, texts = [], [], set()
    for level in LEVELS:
        codec = build_codec(f"cachegen:profile={toy_profile},level={level}")
        data, back = code(codec, block)
        sizes.append(len(data))
        errors.append((back.layers[6].values - block.layers[6].values).abs().mean().item())
        texts.add(describe_codec(codec))
        assert codec.digest in describe_codec(codec)
        with pytest.raises(IncompatibleDataError):
            read_as(data, replace(block.spec, model_id="other"), codec)
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert len(texts) == len(LEVELS)
    assert CacheGenCodec(profile=toy_profile).level == 0.5


def test_readers_find_the_profile(toy_profile, tmp_path, monkeypatch):
    """Where a profile lies is no part of what is stored; its digest finds it."""
    codec = CacheGenCodec(profile=toy_profile, level=1.0)
    block = random_block(toy_spec(), 30)
    data, back = code(codec, block)
    assert "profile" not in Container(data).header.codec
    assert decode_block(data, block.spec).equal(back)
    monkeypatch.setattr(cachegen_profile, "_read", {})
    monkeypatch.setenv("KVLIB_PROFILES", str(tmp_path))
    with pytest.raises(IncompatibleDataError, match=f"{codec.digest}.safetensors"):
        decode_block(data, block.spec)
    (tmp_path / f"{codec.digest}.safetensors").write_bytes(Path(toy_profile).read_bytes())
    assert decode_block(data, block.spec).equal(back)
    with pytest.raises(ConfigError, match="is not the digest"):
        CacheGenCodec(digest="../p")


# LMCache's variant


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([30, 100, 257]), st.sampled_from([3, 10, 12]))
def test_lmcache_is_the_oracle(seed, n, num_layers):
    """Levels by layer and kind, and what tokens decode to."""
    spec = toy_spec(layers=num_layers, heads=2, width=8)
    codec = CacheGenCodec(variant="lmcache", chunk=300)
    block = random_block(spec, n, seed=seed)
    data, back = code(codec, block)
    for place in {0, 1, 2, num_layers - 1}:
        for kind, name in enumerate(("keys", "values")):
            if is_raw(data, SectionKind(kind + 1), place):
                continue
            x, y = (
                getattr(z.layers[place], name).transpose(0, 1).flatten(1) for z in (block, back)
            )
            bins = oracle.lmcache_bins(name, place, num_layers)
            codes, want, least = oracle.lmcache(x.double().numpy(), bins)
            assume(least > 1e-5)
            np.testing.assert_allclose(y.numpy(), want, rtol=1e-5, atol=1e-6)
            assert len(np.unique(codes)) <= bins - 1
    assert {oracle.lmcache_bins("keys", i, 12) for i in (0, 9)} == {32}
    assert oracle.lmcache_bins("keys", 10, 12) == oracle.lmcache_bins("values", 2, 12) == 16


@pytest.mark.parametrize(("n", "chunk"), [(256, 256), (700, 700), (300, 256)])
def test_lmcache_holds_what_lmcaches_blob_does(n, chunk):
    """Side information is no smaller than LMCache's; the rest is within 2% of the entropy."""
    spec = toy_spec(layers=12, heads=3, width=64, dtype="bfloat16")
    codec = CacheGenCodec(variant="lmcache", chunk=chunk)
    block = random_block(spec, n, seed=1)
    data, _ = code(codec, block)
    for place, kind, name in ((0, 0, "keys"), (11, 1, "values")):
        x = getattr(block.layers[place], name).transpose(0, 1).flatten(1).double().numpy()
        side = entropy = lanes = 0
        for first in range(0, n, chunk):
            part = x[first : first + chunk]
            codes, _, _ = oracle.lmcache(part, oracle.lmcache_bins(name, place, 12))
            side += oracle.lmcache_side_bytes(*part.shape, 2)
            entropy += oracle.empirical_bits(codes) / 8
            lanes += 4 * 64 * -(-len(part) // 256)
        stored = sections(data)[SectionKind(kind + 1), place].stored_bytes
        assert side + entropy < stored < side + 1.01 * entropy + lanes


# Tokens that are exact


@pytest.mark.parametrize("variant", ["paper", "lmcache"])
def test_sinks(toy_profile, variant):
    """The first tokens of a sequence come back bit for bit; those of a later block are coded."""
    profile = toy_profile if variant == "paper" else None
    codec = CacheGenCodec(variant=variant, profile=profile, sinks=5)
    for start, exact in ((0, 5), (3, 2), (5, 0)):
        block = random_block(toy_spec(), 300, start=start)
        _, back = code(codec, block)
        for a, b in zip(block.layers, back.layers, strict=True):
            for x, y in ((a.keys, b.keys), (a.values, b.values)):
                assert x[:, :exact].equal(y[:, :exact])
                assert not x[:, exact].equal(y[:, exact])
    block = random_block(toy_spec(layers=7), 300)
    positions = [[0, 2, 4, 6], [0, 1, 2, 3], [0, 4, 5, SYNTHETIC]]
    dense = torch.tensor([[*p[:3], *range(20, 316), p[3] if p[3] < 0 else 400] for p in positions])
    ragged, even = [], []
    for layer in block.layers:
        rows = [
            Row(r.keys[: 298 + h], r.values[: 298 + h], dense[h, : 298 + h].int(), None)
            for h, r in enumerate(layer.rows())
        ]
        ragged.append(LayerKV.from_rows(layer.layer_idx, rows))
        even.append(replace(layer, positions=dense.int()))
    for layers, exact in ((ragged, (3, 3, 2)), (even, (2, 2, 2))):
        mine = replace(block, num_tokens=500, layers=tuple(layers))
        _, back = code(codec, mine)
        for a, b in zip(mine.layers, back.layers, strict=True):
            for x, y, n in zip(a.rows(), b.rows(), exact, strict=True):
                assert x.keys[:n].equal(y.keys[:n])
                assert not x.keys[n].equal(y.keys[n])


# Malformed sections


class Forged:
    """A codec that writes given sections under another's name."""

    def __init__(self, codec, made):
        self._codec, self._made = codec, made

    def __getattr__(self, name):
        return getattr(self._codec, name)

    def encode(self, block):
        return self._made


@pytest.mark.parametrize("variant", ["paper", "lmcache"])
def test_hostile_sections(tmp_path, variant):
    """Bits flipped, sections cut and grown: an error of ours, or other numbers."""
    spec = toy_spec(layers=1, heads=2, width=8, dtype="bfloat16")
    profile = write_profile(tmp_path / "p", spec) if variant == "paper" else None
    n = 24 if variant == "paper" else 100
    codec = CacheGenCodec(variant=variant, profile=profile, chunk=100)
    block = random_block(spec, n)
    block.layers[0].keys[0, 5, 3] = 200.0
    made = codec.encode(block)
    assert not any(s.flags for s in made)
    body = b"".join(bytes(p) for p in made[0].parts)

    def read(mutant):
        forged = [replace(made[0], parts=(bytes(mutant),)), made[1]]
        data = b"".join(encode_block(block, Forged(codec, forged)))
        return decode_block(data, spec, codec_for=lambda _: codec)

    for size in range(0, len(body), 2 if len(body) < 500 else 9):
        with pytest.raises(CorruptDataError):
            read(body[:size])
    with pytest.raises(CorruptDataError):
        read(body + b"\0")
    rng = np.random.default_rng(0)
    refused = 0
    flips = rng.permutation(8 * len(body))[:700]
    for bit in flips:
        mutant = bytearray(body)
        mutant[bit // 8] ^= 1 << bit % 8
        try:
            read(mutant)
        except CorruptDataError:
            refused += 1
    assert refused > 0.5 * len(flips)
    for _ in range(150):
        mutant = bytearray(body)
        at = int(rng.integers(len(body)))
        mutant[at : at + 4] = b"\xff" * 4
        try:
            read(mutant[: len(body)])
        except CorruptDataError:
            refused += 1


def test_other_heads_are_refused(toy_profile):
    """A rank's share of the heads is no layer of the profile's."""
    codec = CacheGenCodec(profile=toy_profile)
    block = random_block(toy_spec(), 20)
    some = [replace(x, keys=x.keys[:2], values=x.values[:2]) for x in block.layers]
    with pytest.raises(UnsupportedInputError, match="2 of 3"):
        codec.encode(replace(block, layers=tuple(some)))


# Parameters and profiles


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cachegen:variant=other", "paper or lmcache"),
        ("cachegen:chunk=0", "1..32768"),
        ("cachegen:chunk=32769", "1..32768"),
        ("cachegen:sinks=-1", "0 or more"),
        ("cachegen:digest=00", "profile=FILE"),
        ("cachegen:variant=lmcache,level=0.5", "leave profile"),
        ("cachegen:variant=lmcache,profile=x", "leave profile"),
        ("cachegen:profile=/nowhere/p", "kvlib calibrate cachegen"),
        ("cachegen:profile={},level=0.4", "0.25, 0.5, 1.0, 3.0"),
        ("cachegen:profile={},digest=0011223344556677", "digest"),
    ],
)
def test_wrong_parameters(toy_profile, text, match):
    """Refused, with the remedy."""
    with pytest.raises(ConfigError, match=match):
        build_codec(text.format(toy_profile))


def test_profiles_of_others(toy_profile, tmp_path):
    """Without a profile, or with another model's, nothing is encoded or decoded."""
    block = random_block(toy_spec(), 20)
    with pytest.raises(ConfigError, match="kvlib calibrate cachegen"):
        code(CacheGenCodec(), block)
    codec = CacheGenCodec(profile=toy_profile)
    other = random_block(toy_spec(layers=6), 20)
    for act in (lambda: codec.caps(other.spec), lambda: codec.encode(other)):
        with pytest.raises(ConfigError, match="measured on model"):
            act()
    caps = codec.caps(block.spec)
    assert (caps.profile, caps.mixes_heads) == (codec.digest, True)
    assert not caps.fixed_rate
    assert CacheGenCodec(variant="lmcache").caps(other.spec).profile == ""
    twin = write_profile(tmp_path / "twin", toy_spec(), seeds=range(5, 8))
    data, _ = code(codec, block)
    with pytest.raises(IncompatibleDataError, match="profile"):
        decode_block(data, block.spec, codec_for=lambda _: CacheGenCodec(profile=twin))


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("levels", lambda x: -x, "levels"),
        ("levels", lambda x: x.float(), "levels"),
        ("levels", lambda x: x[:0], "levels"),
        ("levels", None, "levels"),
        ("layers", lambda x: x.flip(0), "layers"),
        ("sigma", lambda x: x * 0, "sigma"),
        ("sigma", lambda x: x * float("nan"), "sigma"),
        ("sigma", lambda x: x[:1], "sigma"),
        ("0.keys.anchors", None, "anchors"),
        ("0.keys.anchors", lambda x: x[:5], "anchors"),
        ("0.values.deltas.1", lambda x: x.int(), "deltas"),
        ("0.values.deltas.1", lambda x: x.roll(1, 0) * 0, "add up"),
        ("0.values.deltas.1", lambda x: x.roll(128, 1), "gaps|escape"),
    ],
    ids=range(13),
)
def test_malformed_profiles(tmp_path, toy_profile, name, change, match):
    """A file with the right name and model, and the wrong things in it."""
    tensors = dict(load_artefact(toy_profile, "cachegen").tensors)
    x = tensors.pop(name)
    if change is not None:
        tensors[name] = change(x)
    spec = toy_spec()
    path = tmp_path / "p"
    save_artefact(path, kind="cachegen", model=model_identity(spec), tensors=tensors, settings={})
    with pytest.raises(ConfigError, match=match):
        CacheGenCodec(profile=str(path)).encode(random_block(spec, 20))


def test_tables_follow_the_counts():
    """Rows add up, have no gap, cover more than was seen, and cost little more than the best."""
    rng = np.random.default_rng(0)
    counts = np.zeros((6, 256), np.int64)
    for row, (spread, num) in enumerate([(0.01, 10**5), (1, 3000), (30, 3000), (90, 10**5)]):
        values = np.rint(rng.standard_normal(num) * spread)
        there = np.where(np.abs(values) <= 127, values + 127, 255).astype(int)
        np.add.at(counts[row], there, 1)
    counts[4, 3] = 7  # far from zero
    found = table(counts).astype(int)
    assert (found.sum(1) == 4096).all()
    assert (found[:, 255] > 0).all()
    for row, seen in zip(found, counts, strict=True):
        inside = np.flatnonzero(row[:255])
        assert (np.diff(inside) == 1).all()
        assert row[127] > 0
        assert (row[seen > 0] > 0).all()
        if seen.sum() > 100:
            p = seen[seen > 0] / seen.sum()
            extra = (p * np.log2(p * 4096 / row[seen > 0])).sum()
            assert extra < 0.04


def test_calibrate(tmp_path, monkeypatch):
    """A model's profile codes the model's KV; it is the same each time."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    told = []
    options = {"prompts": 2, "tokens": 40, "levels": "1/0.5"}
    found = calibrate(
        "cachegen", model, None, "m", "p", progress=lambda *x: told.append(x), **options
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.tensors["levels"].tolist() == [0.5, 1.0]
    assert calibrate("cachegen", model, None, "m", "q", **options).digest == found.digest
    spec = spec_for_model(model, model_id="m")
    codec = CacheGenCodec(profile="p")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    block = KVBlock.dense(spec, [(x.keys[0], x.values[0]) for x in cache.layers])
    data, back = code(codec, block)
    assert len(data) < 0.6 * block.nbytes
    for layer, mine in zip(block.layers, back.layers, strict=True):
        error = (layer.keys - mine.keys).square().mean() / layer.keys.var()
        assert 0 < error < 0.1
    for wrong in ({"levels": "a/b"}, {"levels": "0"}, {"prompts": 0}, {"tokens": 14}):
        with pytest.raises(ConfigError):
            calibrate("cachegen", model, None, "m", "r", **wrong)


def test_the_command_prints_a_method_that_works(tmp_path, monkeypatch):
    """Its level is one that was measured."""
    monkeypatch.chdir(tmp_path)
    command = ["calibrate", "cachegen", "--model", "recall:vocab=256", "-o", "p"]
    command += ["--prompts", "1", "--tokens", "30", "--levels", "0.3/2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    codec = build_codec("cachegen:profile=p,level=2")
    assert "cachegen:profile=p,level=2" in result.output
    assert codec.digest in result.output


# Bytes that must not change


def test_backends_write_the_same(toy_profile, monkeypatch):
    """Sections do not depend on the entropy coder's backend."""
    block = random_block(toy_spec(), 60)
    for codec in (CacheGenCodec(profile=toy_profile), CacheGenCodec(variant="lmcache")):
        made = []
        for backend in ("numba", "numpy", "torch"):
            monkeypatch.setenv("KVLIB_RANS", backend)
            data, back = code(codec, block)
            made.append((data, back.layers[3].keys.numpy().tobytes()))
        assert made[0] == made[1] == made[2]


def golden_block(spec, n):
    """Numbers that need no generator."""
    i = torch.arange(n * 8, dtype=torch.float32).reshape(n, 2, 4)
    x = (i * i * 7 + i * 3) % 41 / 8 - 2.5
    x[5, 1, 2] = 77.0
    return KVBlock.dense(
        spec, [(x.transpose(0, 1).to(torch.bfloat16), -x.transpose(0, 1).to(torch.bfloat16))]
    )


def golden_profile(path, spec):
    """Triangles around zero, wider for later channels; sigma 1 and 0.75."""
    tensors = {
        "levels": torch.tensor([0.5], dtype=torch.float64),
        "layers": torch.tensor([0]),
        "sigma": torch.tensor([[1.0, 0.75]]),
    }
    for kind in ("keys", "values"):
        for i, name in enumerate(("anchors", "deltas.0")):
            rows = np.zeros((8, 256), np.int16)
            for c, row in enumerate(rows):
                radius = 20 + 5 * c + 40 * (1 - i)
                radius = min(radius, 127)
                places = np.arange(-radius, radius + 1)
                row[127 + places] = radius + 1 - np.abs(places)
                row[255] = 3
                row[:] = np.maximum(row.astype(int) * 4096 // row.astype(int).sum() - 1, row > 0)
                row[127] += 4096 - row.sum()
            tensors[f"0.{kind}.{name}"] = torch.from_numpy(rows)
    save_artefact(path, kind="cachegen", model=model_identity(spec), tensors=tensors, settings={})
    return str(path)


def golden_cases(folder):
    spec = toy_spec(layers=1, heads=2, width=4, dtype="bfloat16")
    paper = CacheGenCodec(profile=golden_profile(Path(folder) / "p", spec), chunk=16, sinks=2)
    yield "paper", paper, golden_block(spec, 24)
    yield "lmcache", CacheGenCodec(variant="lmcache", chunk=300), golden_block(spec, 290)


def golden_bytes(codec, block):
    made = codec.encode(block)
    assert not any(s.flags for s in made)
    return [b"".join(bytes(p) for p in s.parts).hex() for s in made]


def test_golden_sections(tmp_path):
    """Sections written by version 1 stay as they are, and decode to the same numbers."""
    golden = json.loads(GOLDEN.read_text())
    for name, codec, block in golden_cases(tmp_path):
        assert codec.version == 1
        want = golden[name]
        assert golden_bytes(codec, block) == want["sections"]
        _, back = code(codec, block)
        numbers = [
            x.view(torch.int16).numpy().tobytes().hex()
            for x in (back.layers[0].keys, back.layers[0].values)
        ]
        assert numbers == want["decoded"]
