# SPDX-License-Identifier: Apache-2.0
"""`kvlc`: the contract of every preset, its definition, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import kvlib
from kvlib.blocks import KVBlock
from kvlib.codecs import (
    Container,
    build_codec,
    codec_from_canonical,
    decode_block,
    describe_codec,
    encode_block,
)
from kvlib.codecs.container import Flag, SectionKind
from kvlib.codecs.transforms import forget_profile, load_profile
from kvlib.errors import (
    ConfigError,
    CorruptDataError,
    IncompatibleDataError,
    UnsupportedInputError,
)
from kvlib.registry import describe
from kvlib.spec import KVSpec, LayerKind, LayerSpec, RopeSpec, RopeState
from kvlib.testing.codecs import CodecContract, sample_blocks, sample_spec
from kvlib.testing.models import random_block, tiny_model
from tests.oracles import kvlc as oracle
from tests.test_codecs.profiles import random_profile

PRESETS = ("near", "balanced", "small", "archive")
ROPE = RopeSpec(theta=10000.0, rotary_dim=8)
SPEC = KVSpec(
    model_id="kvlc",
    dtype="float32",
    layers=[LayerSpec(num_kv_heads=2, k_head_dim=8, v_head_dim=6, rope=ROPE)] * 5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def profile(folder):
    file = folder / "spec.kvlc"
    random_profile(SPEC, file)
    return file


@pytest.fixture(scope="module")
def contract_profile(folder):
    """One file: the element type is not part of a profile's model."""
    file = folder / "contract.kvlc"
    random_profile(sample_spec("float32"), file)
    return file


def smooth(spec=SPEC, tokens=50, seed=0, start=0):
    """A block whose keys are like a model's: turned, with means and deviations by channel."""
    rng = np.random.default_rng(seed)
    pairs = []
    for x in spec.layers:
        rows = []
        for width in (x.k_head_dim, x.v_head_dim):
            mean, size = rng.standard_normal(width) * 2, rng.uniform(0.1, 3, width)
            y = rng.standard_normal((x.num_kv_heads, tokens, width)) * size + mean
            rows.append(torch.from_numpy(y).float())
        pairs.append((rows[0], rows[1]))
    return KVBlock.dense(spec, pairs, start=start)


def coded(block, codec, **options):
    return b"".join(encode_block(block, codec, **options))


# -- the contract


class KvlcContract(CodecContract):
    """Errors: half a step in each coefficient, through the widest row of any transform."""

    def max_error(self, codec, x):
        wide = x.double().numpy()
        usable = np.abs(wide) < torch.finfo(x.dtype).max / 4
        known = wide[usable]
        size = np.sqrt(np.mean(known**2)) if known.size else 0.0
        if codec.profile is None:
            step = codec.level or 0.5
            spread = step * max(size, 0 if size else 1.0)
        elif codec.preset == "near":
            spread = codec.level * 0.1
        else:
            tensors = load_profile(codec.profile).artefact.tensors
            rows = [
                float(y.double().abs().sum(-1).max())
                for name, y in tensors.items()
                if name.endswith(".decode")
            ]
            spread = codec.level * max(rows)
        largest = np.abs(known).max() if known.size else 0.0
        rounding = {torch.float32: 2.0**-18, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
        bound = 0.75 * spread + largest * rounding[x.dtype] + 2.0**-24
        return np.where(usable, bound, np.nan)


@pytest.mark.parametrize("method", ["kvlc", "kvlc:level=0.05,chunk=16,sinks=0"], scope="class")
class TestNear(KvlcContract):
    @pytest.fixture
    def codec(self, method):
        return build_codec(method)


@pytest.mark.parametrize("preset", ["balanced", "archive"], scope="class")
class TestProfiled(KvlcContract):
    @pytest.fixture
    def codec(self, preset, contract_profile):
        return build_codec(f"kvlc:preset={preset},level=0.7,chunk=32,profile={contract_profile}")

    def max_error(self, codec, x):
        bound = super().max_error(codec, x)
        # An archive's transform of lower rank loses what lies beside its axes.
        return (
            bound + np.abs(x.double().numpy()).max(initial=0) * 4
            if codec.preset == "archive"
            else bound
        )


# -- the definition


@pytest.mark.parametrize("start", [0, 2, 700])
@pytest.mark.parametrize("tokens", [33, 50])
def test_near_is_its_definition(tokens, start):
    """Decoded numbers are those of a float64 oracle, up to the last bits of float32."""
    block = smooth(tokens=tokens, start=start)
    codec = build_codec("kvlc:level=0.3,chunk=32")
    decoded = decode_block(coded(block, codec), SPEC)
    for layer, back in zip(block.layers, decoded.layers, strict=True):
        positions = range(start, start + tokens)
        for x, y, rope in ((layer.keys, back.keys, ROPE), (layer.values, back.values, None)):
            expected, margin = oracle.near(x.double().numpy(), positions, 0.3, 32, 4, rope)
            assert margin > 1e-6  # no coefficient lies on an edge between two integers
            np.testing.assert_allclose(y.double().numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_profiled_is_its_definition(preset, profile):
    """The best coefficients in the metric, rounded, and back."""
    block = smooth(tokens=40)
    codec = build_codec(f"kvlc:preset={preset},level=0.7,chunk=32,profile={profile}")
    decoded = decode_block(coded(block, codec), SPEC)
    tensors = {k: v.double().numpy() for k, v in load_profile(profile).artefact.tensors.items()}
    rows = {
        kind: [
            [(x.keys if kind == "K" else x.values).double().numpy() for x in b.layers]
            for b in (block, decoded)
        ]
        for kind in "KV"
    }
    for kind, (given, found) in rows.items():
        rope = ROPE if kind == "K" else None
        expected, margin = oracle.profiled(
            given, range(40), preset, kind, tensors, 0.7, 32, 4, rope
        )
        assert margin > 1e-5
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=5e-4)


def test_keys_are_turned_back():
    """Keys that differ by their positions alone cost nothing but their mean."""
    rng = np.random.default_rng(0)
    one = torch.from_numpy(rng.standard_normal((2, 1, 8))).float()
    block = smooth(tokens=256)
    same = oracle.turned(one.double().numpy().repeat(256, axis=1), range(256), ROPE, 1)
    layers = [(torch.from_numpy(same).float(), x.values * 0) for x in block.layers]
    block = KVBlock.dense(SPEC, layers)
    flat = replace(SPEC, rope_state=RopeState.NONE)
    codec = build_codec("kvlc:level=0.01")
    sizes = []
    for spec in (SPEC, flat):
        data = coded(replace(block, spec=spec), codec)
        sizes.append(sum(s.stored_bytes for s in Container(data).header.sections if s.kind == 1))
    assert sizes[0] < 0.2 * sizes[1]


def test_sinks_and_strange_numbers_are_exact():
    block = smooth(tokens=40)
    keys = block.layers[2].keys
    keys[1, 20, 3] = torch.nan
    keys[0, 30, 0] = torch.inf
    block.layers[2].values[1, 7, 0] = 3e38
    for preset in ("kvlc", "kvlc:chunk=16"):
        decoded = decode_block(coded(block, build_codec(preset)), SPEC)
        for a, b in zip(block.layers, decoded.layers, strict=True):
            assert torch.equal(a.keys[:, :4], b.keys[:, :4])
            assert torch.equal(a.values[:, :4], b.values[:, :4])
            assert not torch.equal(a.keys[:, 4:16], b.keys[:, 4:16])
        for token in (20, 30):
            mine, theirs = keys[:, token], decoded.layers[2].keys[:, token]
            assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
        assert torch.equal(block.layers[2].values[:, 7], decoded.layers[2].values[:, 7])
        assert decoded.layers[2].keys[:, 21:30].isfinite().all()


def test_too_many_strange_numbers_store_the_tensor():
    block = smooth(tokens=40)
    block.layers[0].keys[:, :, 0] = torch.nan
    data = coded(block, build_codec("kvlc"))
    decoded = decode_block(data, SPEC)
    assert decoded.layers[0].equal(replace(block.layers[0], values=decoded.layers[0].values))


# -- several layers together


@pytest.mark.parametrize("layers", [[0], [1], [3, 2], [4], [0, 3]])
def test_layers_of_a_group_can_be_asked_for_alone(profile, layers):
    block = smooth(tokens=40)
    codec = build_codec(f"kvlc:preset=archive,profile={profile}")
    data = coded(block, codec)
    whole = decode_block(data, SPEC)
    some = decode_block(data, SPEC, layers=layers)
    assert [x.layer_idx for x in some.layers] == sorted(layers)
    for layer in some.layers:
        assert layer.equal(whole.layers[layer.layer_idx])


def test_layers_that_kept_different_tokens_are_not_coded_together(profile):
    """Nor heads; what is decoded is still right."""
    block = smooth(tokens=64)
    rng = np.random.default_rng(1)
    layers = []
    for layer in block.layers:
        if layer.layer_idx == 1:  # one token fewer than its neighbour
            keys, values, positions = layer.keys[:, 1:], layer.values[:, 1:], range(1, 64)
            layer = replace(layer, keys=keys, values=values, positions=positions)
            layer = replace(layer, positions=layer.positions_tensor())
        if layer.layer_idx == 2:  # heads differ
            kept = torch.from_numpy(
                np.sort(rng.permuted(np.tile(np.arange(64), (2, 1)), axis=1)[:, :50])
            )
            keys = layer.keys.gather(1, kept[..., None].expand(-1, -1, 8))
            values = layer.values.gather(1, kept[..., None].expand(-1, -1, 6))
            layer = replace(layer, keys=keys, values=values, positions=kept.int())
        layers.append(layer)
    block = replace(block, layers=tuple(layers))
    for preset in PRESETS[1:]:
        codec = build_codec(f"kvlc:preset={preset},level=0.05,profile={profile}")
        decoded = decode_block(coded(block, codec), SPEC)
        assert len(decoded.layers) == 5  # in no pair of layers both hold the same tokens
        for a, b in zip(block.layers, decoded.layers, strict=True):
            assert (a.keys - b.keys).abs().max() < 0.1
            assert (a.values - b.values).abs().max() < 0.1


def test_a_group_that_is_not_whole(profile):
    """A rank that has layers 1 to 3 codes 2 and 3 together, and 1 alone."""
    block = smooth(tokens=40)
    part = replace(block, layers=block.layers[1:4])
    data = coded(part, build_codec(f"kvlc:preset=archive,level=0.05,profile={profile}"))
    sizes = {s.layer_idx: s.stored_bytes for s in Container(data).header.sections if s.kind == 1}
    assert sizes[3] == 1
    assert min(sizes[1], sizes[2]) > 100
    decoded = decode_block(data, SPEC)
    assert (decoded.layers[0].keys - part.layers[0].keys).abs().max() < 0.1


def test_pruned_channels_are_coded_like_near(profile):
    block = smooth(tokens=40)
    layer = block.layers[0]
    channels = torch.tensor([[0, 2, 5], [1, 2, 7]])
    keys = layer.keys.gather(2, channels[:, None].expand(-1, 40, -1))
    layers = (replace(layer, keys=keys, channels=channels), *block.layers[1:])
    codec = build_codec(f"kvlc:preset=archive,level=0.1,profile={profile}")
    decoded = decode_block(coded(replace(block, layers=layers), codec), SPEC)
    assert (decoded.layers[0].keys - keys).abs().max() <= 0.1 * 0.1 / 2 + 1e-6


def test_ranks(profile):
    """Codecs that mix heads refuse some of the heads; the others take them."""
    block = smooth(tokens=20)
    layers = tuple(
        replace(x, keys=x.keys[:1].clone(), values=x.values[:1].clone()) for x in block.layers
    )
    part = replace(block, layers=layers)
    for preset in ("small", "archive"):
        codec = build_codec(f"kvlc:preset={preset},profile={profile}")
        with pytest.raises(UnsupportedInputError, match="cannot store heads"):
            coded(part, codec, head_range=(0, 1))
    near = build_codec("kvlc")
    assert decode_block(coded(part, near, head_range=(0, 1)), SPEC).layers[0].num_kv_heads == 1


# -- profiles


def test_another_models_profile_is_refused(profile):
    codec = build_codec(f"kvlc:preset=small,profile={profile}")
    other = replace(SPEC, model_id="other")
    with pytest.raises(ConfigError, match="was measured on model"):
        coded(smooth(other), codec)
    data = coded(smooth(), codec)
    with pytest.raises(IncompatibleDataError):
        decode_block(data, other)


def test_profiles_are_found_by_their_digest(profile, tmp_path, monkeypatch):
    codec = build_codec(f"kvlc:preset=small,profile={profile}")
    text = describe_codec(codec)
    assert str(profile) not in text
    assert codec.digest in text
    assert str(profile) in describe(codec)
    assert codec_from_canonical(text) == codec
    header = Container(coded(smooth(), codec)).header
    assert header.profile == codec.digest
    assert Flag.PROFILE_NEEDED in header.flags
    assert Flag.MIXES_HEADS in header.flags
    assert Flag.ROPE_REMOVED in header.flags
    forget_profile(codec.digest)
    monkeypatch.setenv("KVLIB_PROFILES", str(tmp_path))
    with pytest.raises(IncompatibleDataError, match="pass profile=FILE"):
        codec_from_canonical(text)
    (tmp_path / f"{codec.digest}.safetensors").write_bytes(profile.read_bytes())
    assert codec_from_canonical(text) == codec
    forget_profile(codec.digest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset=smal", "Did you mean 'small'"),
        ("preset=small", "kvlib calibrate codec"),
        ("bits=2.0", "kvlib calibrate codec"),
        ("level=0", "above 0"),
        ("level=-1.0", "above 0"),
        ("chunk=8", "16..4096"),
        ("sinks=-1", "0..4096"),
        ("level=1.0,kl=0.1,profile=PROFILE", "one of level, bits and kl"),
        ("preset=small,bits=9.0,profile=PROFILE", "1 to 3"),
        ("preset=small,kl=1.0,profile=PROFILE", "0.001 to 0.1"),
        ("preset=small,profile=nosuch.kvlc", "kvlib calibrate"),
        ("preset=small,digest=0011223344556677", "profile=FILE"),
        ("preset=small,digest=../etc", "not the digest"),
    ],
)
def test_bad_parameters(text, message, profile):
    with pytest.raises(ConfigError, match=message):
        build_codec("kvlc:" + text.replace("PROFILE", str(profile)))


def test_rates_are_read_off_the_curve(profile):
    """Levels between those measured, on logarithmic scales."""
    block = smooth(tokens=40)

    def size(text):
        return len(coded(block, build_codec(f"kvlc:preset=small,{text},profile={profile}")))

    assert size("bits=2.0") == pytest.approx(size("level=1.0"), abs=8)
    assert size("kl=0.1") == pytest.approx(size("level=2.0"), abs=8)
    assert size(f"kl={0.001**0.5 * 0.01**0.5}") == pytest.approx(size(f"level={0.5**0.5}"), abs=8)


# -- damage


def test_damaged_sections_are_refused(profile):
    """Every bit of a small section, under a right checksum: an error of ours, or numbers."""
    block = smooth(tokens=12)
    for preset in ("near", "archive"):
        codec = build_codec(f"kvlc:preset={preset},profile={profile}")
        sections = codec.encode(block)

        class Forged:
            def __init__(self, sections, codec=codec):
                self.sections, self.codec = sections, codec

            def __getattr__(self, name):
                return getattr(self.codec, name)

            def encode(self, block):
                return self.sections

        errors = others = 0
        data = b"".join(bytes(x) for x in sections[0].parts)
        for bit in range(0, 8 * len(data), 3):
            mutant = bytearray(data)
            mutant[bit // 8] ^= 1 << bit % 8
            forged = [replace(sections[0], parts=(bytes(mutant),)), *sections[1:]]
            record = b"".join(encode_block(block, Forged(forged)))
            try:
                decode_block(record, SPEC, codec_for=lambda _, codec=codec: codec)
                others += 1
            except CorruptDataError:
                errors += 1
        assert errors > 100
        assert others > 0


# -- in use


def test_a_store_serves_it(tmp_path):
    """A lossy hit carries its fidelity, saves the suffix, and is a miss to exact readers."""
    model = tiny_model()
    store = kvlib.KVStore(tmp_path, disk="10MiB", codec="kvlc")
    prefix = kvlib.PrefixCache(model, store, model_id="tiny")
    ids = torch.arange(150) % 60
    first = prefix.prefill(ids)
    assert first.put.stored_blocks == 2
    again = prefix.restore(ids)
    assert again.restored_tokens == 128
    assert again.fidelity == describe_codec(store.codec)
    exact = kvlib.PrefixCache(model, kvlib.KVStore(tmp_path, disk="10MiB"), model_id="tiny")
    assert exact.restore(ids).restored_tokens == 0


def test_kinds_of_layers():
    """MLA: a latent that is not turned beside a part that is."""
    rope = RopeSpec(theta=10000.0, rotary_dim=8, first_channel=12, interleaved=True)
    mla = LayerSpec(kind=LayerKind.MLA, num_kv_heads=1, k_head_dim=20, v_head_dim=0, rope=rope)
    spec = KVSpec(model_id="mla", dtype="bfloat16", layers=[mla] * 2)
    block = random_block(spec, 70)
    codec = build_codec("kvlc:level=0.05")
    data = coded(block, codec)
    decoded = decode_block(data, spec)
    for a, b in zip(block.layers, decoded.layers, strict=True):
        assert (a.keys.float() - b.keys.float()).abs().max() < 0.1
    kinds = {s.kind for s in Container(data).header.sections}
    assert kinds == {SectionKind.KEYS, SectionKind.VALUES}


def test_sample_blocks_of_every_preset(contract_profile):
    """Groups, heads and layers that evictions left in any form come back in that form."""
    for name, block in sample_blocks("bfloat16", tokens=(33,), contents=("normal",)):
        for preset in PRESETS:
            codec = build_codec(f"kvlc:preset={preset},level=0.05,profile={contract_profile}")
            decoded = decode_block(coded(block, codec), block.spec)
            for a, b in zip(block.layers, decoded.layers, strict=True):
                assert a.lengths == b.lengths, name
                assert torch.equal(a.positions_tensor(), b.positions_tensor())
