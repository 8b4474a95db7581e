# SPDX-License-Identifier: Apache-2.0
"""Head ranges: a tensor-parallel rank stores the KV heads that it holds, one record per range.

Keys of blocks and fingerprints are those of the whole model, so that all ranks mean the same
blocks; what is stored of a prompt is the minimum over the ranges. A range is counted in the layer
that has most KV heads; a layer with fewer has its share of them, one at least.
"""

from collections.abc import Iterable
from dataclasses import replace

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec
from kvlib.codecs.base import describe_codec
from kvlib.errors import ConfigError, ShapeError
from kvlib.spec import KVSpec, LayerSpec

__all__ = ["HeadRange", "check_block_heads", "check_head_range", "check_model", "local_spec"]

HeadRange = tuple[int, int] | None
"""KV heads [first, last) that a rank holds, None for all."""

_SOME_MODEL = KVSpec(
    model_id="some model",
    layers=(LayerSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64),),
    dtype="float32",
)


def check_head_range(head_range: HeadRange, codecs: Iterable[Codec]) -> HeadRange:
    """A range that some model could have, with codecs that can store one, as far as is known yet.

    Raises:
        ConfigError: it is no range, or a codec mixes heads whatever the model.
    """
    if head_range is None:
        return None
    try:
        first, last = head_range
    except (TypeError, ValueError):
        first, last = -1, -1
    if type(first) is not int or type(last) is not int or not 0 <= first < last:
        raise ConfigError(
            f"head_range={head_range!r}: expected (first, last) with 0 <= first < last for the KV "
            "heads [first, last) that this rank holds, or None for all"
        )
    for codec in codecs:
        try:
            mixes = codec.caps(_SOME_MODEL).mixes_heads
        except ConfigError:  # calibrated for a model: `check_model` asks it about that one
            continue
        if mixes:
            raise _mixing(codec, head_range)
    return first, last


def check_model(spec: KVSpec, codecs: Iterable[Codec], head_range: HeadRange) -> None:
    """Refuse a model that does not have a rank's heads, or that a codec cannot store some heads of.

    Raises:
        ConfigError: saying which.
    """
    if head_range is None:
        return
    first, last = head_range
    most = _most(spec)
    if last > most or last - first == most:
        advice = "leave it out" if (first, last) == (0, most) else "give this rank's own heads"
        raise ConfigError(
            f"head_range={head_range} of a model with {most} KV heads: a range is some of them, "
            f"not all; {advice}"
        )
    for codec in codecs:
        if codec.caps(spec).mixes_heads:
            raise _mixing(codec, head_range)


def _mixing(codec: Codec, head_range: tuple[int, int]) -> ConfigError:
    return ConfigError(
        f"codec {describe_codec(codec)!r} codes the KV heads of a layer together and cannot store "
        f"head_range={head_range} alone: use one that codes each head by itself (exact, fp8, int8, "
        "kivi, hadamard) for tensor-parallel ranks"
    )


def _most(spec: KVSpec) -> int:
    return max(layer.num_kv_heads for layer in spec.layers)


def local_spec(spec: KVSpec, head_range: HeadRange) -> KVSpec:
    """The shapes of what a rank holds of a model; never an identity, which is the whole model's."""
    if head_range is None:
        return spec
    (first, last), most = head_range, _most(spec)

    def mine(heads: int) -> int:
        return min(max(last * heads // most - first * heads // most, 1), heads)

    layers = tuple(replace(x, num_kv_heads=mine(x.num_kv_heads)) for x in spec.layers)
    return replace(spec, layers=layers)


def check_block_heads(block: KVBlock, spec: KVSpec, head_range: HeadRange) -> None:
    """Refuse a block that holds other heads than a rank's.

    Raises:
        ShapeError: naming the layer.
    """
    for layer, want in zip(block.layers, local_spec(spec, head_range).layers, strict=True):
        if layer.num_kv_heads != want.num_kv_heads:
            range_text = "all heads" if head_range is None else f"head_range={head_range}"
            raise ShapeError(
                f"layer {layer.layer_idx} holds {layer.num_kv_heads} KV heads; this store keeps "
                f"{want.num_kv_heads} ({range_text}): put the heads that this rank holds, or open "
                "the store with their head_range"
            )
