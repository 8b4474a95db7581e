# SPDX-License-Identifier: Apache-2.0
"""What is done before the first request."""

from dataclasses import replace

import pytest

from kvlib.codecs.exact import ExactCodec
from kvlib.codecs.integer import Int8Codec
from kvlib.connectors.warm import warm_up
from kvlib.spec import KVSpec, LayerSpec
from kvlib.store.store import KVStore

LAYER = LayerSpec(num_kv_heads=6, k_head_dim=32, v_head_dim=16)
SPEC = KVSpec(model_id="user:m", layers=(LAYER, replace(LAYER, num_kv_heads=3)), dtype="bfloat16")


@pytest.fixture
def seen(monkeypatch):
    """Shapes of what is encoded, and numbers of the layers that are decoded, by codec."""
    encoded, decoded = {}, {}

    def watch(kind):
        encode, decode = kind.encode, kind.decode

        def encode_seen(self, block):
            encoded[kind.name] = [
                (tuple(x.keys.shape), tuple(x.values.shape)) for x in block.layers
            ]
            return encode(self, block)

        def decode_seen(self, container, spec, layers):
            decoded.setdefault(kind.name, set()).update(x.layer_idx for x in layers)
            decode(self, container, spec, layers)

        monkeypatch.setattr(kind, "encode", encode_seen)
        monkeypatch.setattr(kind, "decode", decode_seen)

    watch(ExactCodec)
    watch(Int8Codec)
    return encoded, decoded


@pytest.mark.parametrize(
    ("head_range", "heads"), [(None, (6, 3)), ((0, 2), (2, 1)), ((3, 6), (3, 2))]
)
def test_a_rank_warms_with_the_heads_it_holds(seen, tmp_path, head_range, heads):
    """One record through each codec of its store, both ways, and nothing is put there."""
    with KVStore(tmp_path, codec="int8", memory_codec="exact", head_range=head_range) as store:
        warm_up(store, SPEC)
        assert {tier.puts for tier in store.stats().tiers.values()} == {0}
    encoded, decoded = seen
    shapes = [((h, 256, 32), (h, 256, 16)) for h in heads]
    assert encoded == {"int8": shapes, "exact": shapes}
    assert decoded == {"int8": {0, 1}, "exact": {0, 1}}
