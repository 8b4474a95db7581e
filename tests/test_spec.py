# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.errors import ConfigError
from kvlib.spec import (
    DTYPES,
    EXACT,
    KVSpec,
    LayerKind,
    LayerSpec,
    RopeSpec,
    RopeState,
    storage_digest,
    storage_fingerprint,
)
from kvlib.testing.strategies import specs

ROPE = RopeSpec(theta=1e4, rotary_dim=8, kind="linear", params=(("factor", 2.0),))
LAYER = LayerSpec(num_kv_heads=2, k_head_dim=16, v_head_dim=8, rope=ROPE)
SPEC = KVSpec(model_id="m", layers=(LAYER, LAYER), dtype="float16")


def with_rope(**changes):
    return with_layer(rope=replace(ROPE, **changes))


def with_layer(**changes):
    return replace(SPEC, layers=(LAYER, replace(LAYER, **changes)))


VARIANTS = {
    "model_id": replace(SPEC, model_id="n"),
    "dtype": replace(SPEC, dtype="bfloat16"),
    "adapter": replace(SPEC, adapter="lora"),
    "weight_quantization": replace(SPEC, weight_quantization="awq"),
    "kv_scales": replace(SPEC, kv_scales="x"),
    "rope_state": replace(SPEC, rope_state=RopeState.PRE),
    "rope_state none": replace(SPEC, rope_state=RopeState.NONE),
    "fewer layers": replace(SPEC, layers=(LAYER,)),
    "more layers": replace(SPEC, layers=(LAYER,) * 3),
    "heads": with_layer(num_kv_heads=1),
    "key width": with_layer(k_head_dim=17),
    "value width": with_layer(v_head_dim=16),
    "sliding": with_layer(kind=LayerKind.SLIDING, window=8),
    "window": with_layer(kind=LayerKind.SLIDING, window=9),
    "mla": with_layer(kind=LayerKind.MLA, num_kv_heads=1, v_head_dim=0),
    "mla's twin": with_layer(num_kv_heads=1, v_head_dim=0),
    "other layer": replace(SPEC, layers=(replace(LAYER, num_kv_heads=1), LAYER)),
    "no rope": with_layer(rope=None),
    "theta": with_rope(theta=10001.0),
    "rotary_dim": with_rope(rotary_dim=6),
    "kind": with_rope(kind="default"),
    "param value": with_rope(params=(("factor", 3.0),)),
    "param name": with_rope(params=(("other", 2.0),)),
    "param more": with_rope(params=(("factor", 2.0), ("other", 0.0))),
    "param none": with_rope(params=()),
    "interleaved": with_rope(interleaved=True),
    "first_channel": with_rope(first_channel=1),
    "text moved": replace(SPEC, adapter="m"),
    "text moved on": replace(SPEC, weight_quantization="m"),
    "text moved far": replace(SPEC, kv_scales="m"),
}


def test_each_field_alone_changes_the_fingerprint():
    """Any difference in what the numbers mean is another fingerprint, and no two agree."""
    prints = [SPEC.fingerprint(), *(spec.fingerprint() for spec in VARIANTS.values())]
    assert all(len(p) == 32 for p in prints)
    assert len(set(prints)) == len(prints)


@given(specs(), specs())
def test_fingerprints_are_equality(a, b):
    """Specs are equal if and only if their fingerprints are."""
    assert (a == b) == (a.fingerprint() == b.fingerprint())
    twin = KVSpec(
        model_id=a.model_id, layers=list(a.layers), dtype=a.dtype, rope_state=str(a.rope_state)
    )
    assert twin.fingerprint() == a.fingerprint()


def test_spelling_does_not_matter():
    """Integers for floats, lists for tuples, and unsorted params name the same numbers."""
    rope = RopeSpec(theta=10000, rotary_dim=8, kind="yarn", params=[("b", 1), ("a", 2)])
    same = RopeSpec(theta=1e4, rotary_dim=8, kind="yarn", params=(("a", 2.0), ("b", 1.0)))
    assert rope == same
    specs_ = [
        KVSpec(model_id="m", layers=[replace(LAYER, rope=r)], dtype="float16", rope_state="post")
        for r in (rope, same)
    ]
    assert specs_[0].fingerprint() == specs_[1].fingerprint()
    assert replace(LAYER, kind="full") == LAYER


def test_storage_fingerprint_differs_in_each_field():
    """Codec, fidelity, head range, layers, profile and model each make another stored form."""
    base = {"spec": SPEC, "codec": "exact@1"}
    changes = [
        {},
        {"spec": VARIANTS["adapter"]},
        {"codec": "exact@2"},
        {"codec": "int4@1:group=32"},
        {"codec": "int4@1:group=64"},
        {"fidelity": "int4@1:group=32"},
        {"fidelity": "exact@1"},
        {"head_range": (0, 1)},
        {"head_range": (1, 2)},
        {"layers": (0,)},
        {"layers": (1,)},
        {"layers": ()},
        {"profile": "p"},
        {"codec": "p", "profile": "exact@1"},
    ]
    prints = {storage_fingerprint(**{**base, **change}) for change in changes}
    assert len(prints) == len(changes)
    assert SPEC.fingerprint() not in prints
    assert storage_fingerprint(SPEC, "exact@1", layers=[0, 1]) == storage_fingerprint(
        SPEC, "exact@1", fidelity=EXACT
    )


def test_storage_fingerprint_skips_recurrent_layers():
    """By default the layers are those that keep tokens; a header's fields give the same digest."""
    state = LayerSpec(kind=LayerKind.RECURRENT, num_kv_heads=0, k_head_dim=0, v_head_dim=0)
    spec = KVSpec(model_id="m", layers=(LAYER, state, LAYER), dtype="float16")
    default = storage_fingerprint(spec, "exact@1")
    assert default == storage_fingerprint(spec, "exact@1", layers=(0, 2))
    assert default == storage_digest(spec.fingerprint(), "exact@1", "exact", None, (0, 2), "")


def test_bytes_per_token():
    """Bytes count keys and values of every layer that keeps tokens."""
    state = LayerSpec(kind=LayerKind.RECURRENT, num_kv_heads=0, k_head_dim=0, v_head_dim=0)
    for name, dtype in DTYPES.items():
        spec = KVSpec(model_id="m", layers=(LAYER, state, LAYER), dtype=name)
        assert spec.bytes_per_token() == 2 * 2 * (16 + 8) * dtype.itemsize
        assert torch.empty(0, dtype=getattr(torch, name)).element_size() == dtype.itemsize
    assert len({dtype.code for dtype in DTYPES.values()}) == len(DTYPES)


def test_require_names_layers_as_ranges():
    """A component's refusal names kinds and layers found, as ranges, and what it supports."""
    sliding = LayerSpec(
        kind=LayerKind.SLIDING, num_kv_heads=1, k_head_dim=4, v_head_dim=4, window=2
    )
    state = LayerSpec(kind=LayerKind.RECURRENT, num_kv_heads=0, k_head_dim=0, v_head_dim=0)
    layers = (sliding, LAYER, sliding, sliding, sliding, state, LAYER, sliding, state)
    spec = KVSpec(model_id="hybrid", layers=layers, dtype="float16")
    spec.require(LayerKind, "everything")
    with pytest.raises(ConfigError) as info:
        spec.require([LayerKind.FULL, LayerKind.MLA], "snapkv")
    assert str(info.value) == (
        "snapkv supports full, mla layers only; model 'hybrid' has sliding layers 0, 2-4, 7; "
        "recurrent layers 5, 8"
    )
    with pytest.raises(ConfigError, match=r"recurrent layers 5, 8$"):
        spec.require(iter([LayerKind.FULL, LayerKind.SLIDING]), "x")


WRONG = [
    lambda: replace(SPEC, model_id=""),
    lambda: replace(SPEC, model_id=None),
    lambda: replace(SPEC, model_id=b"m"),
    lambda: replace(SPEC, adapter=None),
    lambda: replace(SPEC, kv_scales=1),
    lambda: replace(SPEC, weight_quantization=None),
    lambda: replace(SPEC, dtype="float64"),
    lambda: replace(SPEC, dtype="torch.float16"),
    lambda: replace(SPEC, dtype=torch.float16),
    lambda: replace(SPEC, layers=()),
    lambda: replace(SPEC, layers=(LAYER,) * 65536),
    lambda: replace(SPEC, rope_state="posts"),
    lambda: replace(LAYER, kind="fulll"),
    lambda: replace(LAYER, num_kv_heads=0),
    lambda: replace(LAYER, num_kv_heads=-1),
    lambda: replace(LAYER, num_kv_heads=65536),
    lambda: replace(LAYER, num_kv_heads=True),
    lambda: replace(LAYER, num_kv_heads=2.0),
    lambda: replace(LAYER, k_head_dim=0),
    lambda: replace(LAYER, v_head_dim=-1),
    lambda: replace(LAYER, v_head_dim="8"),
    lambda: replace(LAYER, window=4),
    lambda: replace(LAYER, kind=LayerKind.SLIDING),
    lambda: replace(LAYER, kind=LayerKind.SLIDING, window=-1),
    lambda: replace(LAYER, kind=LayerKind.MLA),
    lambda: replace(LAYER, kind=LayerKind.MLA, num_kv_heads=1),
    lambda: replace(LAYER, kind=LayerKind.RECURRENT),
    lambda: replace(LAYER, k_head_dim=7),
    lambda: replace(LAYER, rope=replace(ROPE, first_channel=9)),
    lambda: replace(ROPE, rotary_dim=0),
    lambda: replace(ROPE, rotary_dim=7),
    lambda: replace(ROPE, rotary_dim=-2),
    lambda: replace(ROPE, rotary_dim=8.0),
    lambda: replace(ROPE, rotary_dim=65536),
    lambda: replace(ROPE, first_channel=-1),
    lambda: replace(ROPE, first_channel=1.0),
    lambda: replace(ROPE, theta=0),
    lambda: replace(ROPE, theta=-1.0),
    lambda: replace(ROPE, theta=math.inf),
    lambda: replace(ROPE, theta=math.nan),
    lambda: replace(ROPE, theta=10**400),
    lambda: replace(ROPE, theta="x"),
    lambda: replace(ROPE, theta=None),
    lambda: replace(ROPE, kind=None),
    lambda: replace(ROPE, params=(("a", math.nan),)),
    lambda: replace(ROPE, params=(("a", math.inf),)),
    lambda: replace(ROPE, params=(("a", "x"),)),
    lambda: replace(ROPE, params=(("a", 1.0), ("a", 1.0))),
    lambda: replace(ROPE, params=("a",)),
    lambda: replace(ROPE, params=5),
]


@pytest.mark.parametrize("make", WRONG, ids=map(str, range(len(WRONG))))
def test_wrong_specs(make):
    """Numbers out of range, and kinds whose shapes contradict them, are ConfigErrors."""
    with pytest.raises(ConfigError):
        make()


# ---- rotary frequencies, against transformers ----

SCALINGS = {
    "default": [{}],
    "linear": [{"factor": 4.0}],
    "llama3": [
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "factor": 32.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 512,
        },
    ],
    "yarn": [
        {"factor": 4.0, "original_max_position_embeddings": 32768, **extra}
        for extra in (
            {},
            {"truncate": True},
            {"truncate": False},
            {"beta_fast": 16.0, "beta_slow": 2.0},
            {"beta_fast": 20.0, "beta_slow": 1.5, "truncate": False},
            {"attention_factor": 1.2},
        )
    ]
    + [{"factor": 2.0, "original_max_position_embeddings": 8}],
}


@pytest.mark.parametrize(
    ("kind", "params"),
    [(kind, params) for kind, many in SCALINGS.items() for params in many],
    ids=lambda x: x if isinstance(x, str) else ",".join(map(str, x.values())) or "-",
)
@pytest.mark.parametrize("theta", [1e4, 5e5, 150000.0])
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_frequencies_are_those_of_transformers(kind, params, theta, partial):
    """Frequencies equal transformers' own to float32's precision, truncated ramps or not."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=65536,
        rope_parameters={
            "rope_type": kind,
            "rope_theta": theta,
            "partial_rotary_factor": partial,
            **params,
        },
    )
    dim = int(64 * partial)
    if kind == "default":
        expected = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert len(expected) == dim // 2
    rope = RopeSpec(theta=theta, rotary_dim=dim, kind=kind, params=tuple(params.items()))
    ours = torch.tensor(rope.inverse_frequencies(), dtype=torch.float64)
    # float32: powers, reciprocals and a ramp each round once or twice.
    torch.testing.assert_close(ours, expected.double(), rtol=2e-6, atol=0)


def test_default_frequencies_are_the_models():
    """The default frequencies are those that a transformers model itself uses."""
    from kvlib.testing.models import tiny_model

    model = tiny_model(head_dim=16)
    buffer = model.model.rotary_emb.inv_freq
    rope = RopeSpec(theta=model.config.rope_parameters["rope_theta"], rotary_dim=16)
    torch.testing.assert_close(
        torch.tensor(rope.inverse_frequencies()), buffer.float(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "Default", ""])
def test_frequencies_that_are_not_fixed(kind):
    """Kinds that depend on the length, or are unknown, are refused by name when asked."""
    rope = replace(ROPE, kind=kind)
    with pytest.raises(ConfigError, match=f"kind '{kind}' are not fixed"):
        rope.inverse_frequencies()


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("linear", {}),
        ("llama3", {"factor": 8.0}),
        ("yarn", {"factor": 8.0}),
        ("yarn", {"original_max_position_embeddings": 8.0}),
        ("linear", {"factor": 0.0}),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 64.0,
            },
        ),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": -5.0}),
        ("yarn", {"factor": 8.0, "original_max_position_embeddings": 64.0, "beta_fast": 0.0}),
    ],
)
def test_frequencies_of_wrong_numbers(kind, params):
    """Missing parameters are named; numbers that make no frequencies are ConfigErrors."""
    with pytest.raises(ConfigError, match=kind):
        replace(ROPE, kind=kind, params=tuple(params.items())).inverse_frequencies()


@given(st.sampled_from(list(SCALINGS)), st.integers(1, 64), st.floats(10, 1e7))
def test_frequencies_fall(kind, half, theta):
    """Frequencies are positive, at most 1, and never rise with the channel."""
    params = tuple(SCALINGS[kind][0].items())
    rope = RopeSpec(theta=theta, rotary_dim=2 * half, kind=kind, params=params)
    f = rope.inverse_frequencies()
    assert len(f) == half
    assert 0 < f[-1] <= f[0] <= 1
    assert f == sorted(f, reverse=True)
