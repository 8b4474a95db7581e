# SPDX-License-Identifier: Apache-2.0
"""How a block becomes a container, whatever the codec; `kvlib.codecs.unpack` is the way back."""

import importlib.metadata
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV
from kvlib.codecs.base import Codec, CodecCaps, codec_fingerprint, describe_codec
from kvlib.codecs.container import (
    Buffer,
    Flag,
    LayerShape,
    Section,
    SectionFlag,
    SectionKind,
    build_container,
)
from kvlib.codecs.header import WHOLE_BLOCK
from kvlib.errors import ShapeError, UnsupportedInputError
from kvlib.keys import BlockKey
from kvlib.spec import DTYPES, EXACT, KVSpec, LayerKind

__all__ = ["KIND_CODES", "check_heads", "codec_flags", "encode_block", "writer_text"]

KIND_CODES = {LayerKind.FULL: 1, LayerKind.SLIDING: 2, LayerKind.MLA: 3}


def encode_block(
    block: KVBlock,
    codec: Codec,
    *,
    keys: Sequence[BlockKey] = (),
    fidelity: str = EXACT,
    head_range: tuple[int, int] | None = None,
    alignment: int = 8,
    mac_key: bytes | None = None,
    state: bytes | None = None,
) -> list[Buffer]:
    """Encode a block as a container, returned in pieces (`b"".join(...)` makes one bytes object).

    Pieces may share memory with the block: write or join them before its tensors change.

    Args:
        block: any form of layers, on any device.
        codec: from `kvlib.codecs.build`.
        keys: keys of the blocks of 64 tokens inside, echoed in the header.
        fidelity: lowest fidelity among the KV the block was computed from; see
            `kvlib.spec.storage_fingerprint`.
        head_range: KV heads [first, last) that the block holds, None for all.
        alignment: see `kvlib.codecs.container.build_container`.
        mac_key: see there.
        state: bytes of the STATE section, None for none.

    Raises:
        UnsupportedInputError: the codec cannot represent the block, or mixes heads of which the
            block holds only some.
        ConfigError: the codec's calibration artefact belongs to another model.
        ShapeError: positions, weights or channels are malformed (`LayerKV.validate`) or leave the
            block: a reader would refuse them.
    """
    for layer in block.layers:
        _check_contents(block, layer)
        check_heads(block.spec, layer.layer_idx, layer.num_kv_heads, head_range)
    caps = codec.caps(block.spec)
    if caps.mixes_heads and head_range is not None:
        raise UnsupportedInputError(
            f"{describe_codec(codec)} codes the heads of a layer together and cannot store heads "
            f"{head_range[0]}..{head_range[1] - 1} alone: use a codec that codes each head by "
            "itself for tensor-parallel ranks"
        )
    sections: dict[int, list[Section]] = {layer.layer_idx: [] for layer in block.layers}
    sections[WHOLE_BLOCK] = []  # last
    for section in codec.encode(block):
        sections[section.layer_idx].append(section)
    if state is not None:
        raw = SectionFlag.RAW
        sections[WHOLE_BLOCK].append(
            Section(SectionKind.STATE, WHOLE_BLOCK, len(state), (state,), raw)
        )
    explicit = False
    for layer in block.layers:
        extra = _side_sections(layer)
        explicit |= any(s.kind is SectionKind.POSITIONS for s in extra)
        sections[layer.layer_idx][:0] = extra
    flags = codec_flags(codec, caps) | (Flag.POSITIONS_EXPLICIT if explicit else Flag(0))
    return build_container(
        [section for mine in sections.values() for section in mine],
        spec_fingerprint=block.spec.fingerprint(),
        storage_fingerprint=codec_fingerprint(
            block.spec,
            codec,
            fidelity=fidelity,
            head_range=head_range,
            layers=[layer.layer_idx for layer in block.layers],
        ),
        start=block.start,
        num_tokens=block.num_tokens,
        dtype_code=DTYPES[block.spec.dtype].code,
        codec=describe_codec(codec),
        layers=[_layer_shape(block.spec, layer) for layer in block.layers],
        keys=keys,
        flags=flags,
        fidelity=fidelity,
        head_range=head_range,
        profile=caps.profile,
        writer=writer_text(),
        alignment=alignment,
        mac_key=mac_key,
    )


def codec_flags(codec: Codec, caps: CodecCaps) -> Flag:
    """The header flags that follow from the codec alone."""
    flags = Flag(0)
    for is_set, flag in (
        (codec.lossless, Flag.LOSSLESS),
        (caps.removes_rope, Flag.ROPE_REMOVED),
        (caps.mixes_heads, Flag.MIXES_HEADS),
        (bool(caps.profile), Flag.PROFILE_NEEDED),
    ):
        if is_set:
            flags |= flag
    return flags


def _check_contents(block: KVBlock, layer: LayerKV) -> None:
    layer.validate()
    if isinstance(layer.positions, Tensor):
        real = layer.positions[layer.positions != SYNTHETIC]
        if len(real) and not block.start <= int(real.min()) <= int(real.max()) < block.stop:
            raise ShapeError(
                f"layer {layer.layer_idx}: positions {int(real.min())}..{int(real.max())} leave "
                f"the block [{block.start}, {block.stop})"
            )
    if layer.channels is not None:
        width = block.spec.layers[layer.layer_idx].k_head_dim
        if not layer.channels.numel() or int(layer.channels.max()) >= width:
            raise ShapeError(
                f"layer {layer.layer_idx}: channels must name at least one of the {width} of a key"
            )


def check_heads(
    spec: KVSpec, layer_idx: int, num_kv_heads: int, head_range: tuple[int, int] | None
) -> None:
    """All heads when there is no range; never more than the range holds."""
    want = spec.layers[layer_idx].num_kv_heads
    if head_range is None and num_kv_heads == want:
        return
    most = max(layer.num_kv_heads for layer in spec.layers)
    first, last = (0, most) if head_range is None else head_range
    if not 0 <= first < last <= most or num_kv_heads > min(want, last - first):
        raise ShapeError(
            f"layer {layer_idx} holds {num_kv_heads} KV heads; the head range {head_range} of "
            f"{most} does not fit"
        )
    if head_range == (0, most):
        raise ShapeError(f"head range {head_range} holds all heads: leave it out")
    if head_range is None and num_kv_heads != want:
        raise ShapeError(
            f"layer {layer_idx} holds {num_kv_heads} of {want} KV heads: give head_range"
        )


@cache
def writer_text() -> str:
    """What a container says of who wrote it."""
    try:
        return f"kvlib {importlib.metadata.version('kvlib')}"
    except importlib.metadata.PackageNotFoundError:  # run from a tree that was never installed
        return "kvlib unknown"


def _layer_shape(spec: KVSpec, layer: LayerKV) -> LayerShape:
    want = spec.layers[layer.layer_idx]
    return LayerShape(
        layer_idx=layer.layer_idx,
        num_kv_heads=layer.num_kv_heads,
        k_head_dim=want.k_head_dim,
        v_head_dim=want.v_head_dim,
        channels=0 if layer.channels is None else layer.channels.shape[-1],
        kind=KIND_CODES[want.kind],
    )


def _side_sections(layer: LayerKV) -> list[Section]:
    """Positions, weights, channels, row lengths: raw, where the dense case does not imply them."""
    out = []

    def add(kind: SectionKind, x: Tensor, dtype: str) -> None:
        data = x.detach().cpu().contiguous().numpy().astype(dtype).tobytes()
        out.append(Section(kind, layer.layer_idx, len(data), (data,), SectionFlag.RAW))

    if layer.row_lengths is not None:
        add(SectionKind.ROW_LENGTHS, torch.tensor(layer.row_lengths, dtype=torch.int64), "<u4")
    if isinstance(layer.positions, Tensor):
        add(SectionKind.POSITIONS, layer.positions, "<i4")
    if layer.log_weight is not None:
        add(SectionKind.LOG_WEIGHT, layer.log_weight, "<f4")
    if layer.channels is not None:
        add(SectionKind.CHANNELS, layer.channels, "<u2")
    return out
