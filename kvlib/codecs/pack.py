# SPDX-License-Identifier: Apache-2.0
"""How a block becomes a container, and a container a block, whatever the codec."""

import importlib.metadata
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV
from kvlib.codecs.base import Codec, CodecCaps, codec_fingerprint, describe_codec
from kvlib.codecs.container import (
    MAX_DECODED_BYTES,
    Buffer,
    Container,
    Flag,
    Header,
    LayerShape,
    Section,
    SectionFlag,
    SectionKind,
    build_container,
)
from kvlib.codecs.header import WHOLE_BLOCK
from kvlib.errors import (
    CapacityError,
    ConfigError,
    CorruptDataError,
    IncompatibleDataError,
    ShapeError,
    UnsupportedInputError,
)
from kvlib.keys import BlockKey
from kvlib.spec import DTYPES, EXACT, KVSpec, LayerKind, storage_digest

__all__ = ["LayerOut", "decode_block", "encode_block"]

_KIND_CODES = {LayerKind.FULL: 1, LayerKind.SLIDING: 2, LayerKind.MLA: 3}
_DTYPE_NAMES = {dtype.code: dtype.name for dtype in DTYPES.values()}

LayerOut = tuple[Tensor, Tensor]
"""Where to decode a dense layer: keys [Hkv, T, C], values [Hkv, T, Dv], last dim contiguous."""


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
        _check_heads(block.spec, layer.layer_idx, layer.num_kv_heads, head_range)
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
    flags = _codec_flags(codec, caps) | (Flag.POSITIONS_EXPLICIT if explicit else Flag(0))
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
        writer=f"kvlib {_version()}",
        alignment=alignment,
        mac_key=mac_key,
    )


def _codec_flags(codec: Codec, caps: CodecCaps) -> Flag:
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


def _check_heads(
    spec: KVSpec, layer_idx: int, num_kv_heads: int, head_range: tuple[int, int] | None
) -> None:
    """All heads when there is no range; never more than the range holds."""
    want = spec.layers[layer_idx].num_kv_heads
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


def _version() -> str:
    try:
        return importlib.metadata.version("kvlib")
    except importlib.metadata.PackageNotFoundError:  # run from a tree that was never installed
        return "unknown"


def _layer_shape(spec: KVSpec, layer: LayerKV) -> LayerShape:
    want = spec.layers[layer.layer_idx]
    return LayerShape(
        layer_idx=layer.layer_idx,
        num_kv_heads=layer.num_kv_heads,
        k_head_dim=want.k_head_dim,
        v_head_dim=want.v_head_dim,
        channels=0 if layer.channels is None else layer.channels.shape[-1],
        kind=_KIND_CODES[want.kind],
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


@dataclass(frozen=True, slots=True)
class _Rows:
    """The entries of a layer as its side sections declare them."""

    lengths: tuple[int, ...] | None
    positions: range | Tensor
    log_weight: Tensor | None
    channels: Tensor | None
    lead: tuple[int, ...]


def decode_block(
    data: Buffer | Container,
    spec: KVSpec,
    *,
    codec_for: Callable[[str], Codec] | None = None,
    layers: Collection[int] | None = None,
    out: Mapping[int, LayerOut] | None = None,
    executor: Executor | None = None,
    mac_key: bytes | None = None,
    max_decoded_bytes: int = MAX_DECODED_BYTES,
) -> KVBlock:
    """Decode a container into a block of CPU tensors that alias nothing.

    Args:
        data: one container, or one already opened.
        spec: what the caller expects; a container of another model is refused.
        codec_for: gives the codec of a canonical string, refusing what it does not know; the
            registry by default.
        layers: decode only these layers; other sections are neither verified nor read.
        out: decode dense layers straight into these tensors (keys and values views of the right
            shape and dtype).
        executor: decode layers side by side on these threads.
        mac_key: see `kvlib.codecs.container.parse_header`.
        max_decoded_bytes: refuse containers that claim more.

    Raises:
        CorruptDataError: truncated, flipped or malformed bytes.
        IncompatibleDataError: another model, dtype, version or codec.
        ShapeError: an `out` tensor does not fit.
        CapacityError: there is no memory for what the container claims to hold.
    """
    container = (
        data
        if isinstance(data, Container)
        else Container(data, mac_key=mac_key, max_decoded_bytes=max_decoded_bytes)
    )
    header = container.header
    _check_identity(header, spec)
    if codec_for is None:
        from kvlib.codecs import codec_from_canonical  # the registry imports this module

        codec_for = codec_from_canonical
    codec = codec_for(header.codec)
    caps = _check_codec(header, codec, spec)
    identity = storage_digest(
        header.spec_fingerprint,
        header.codec,
        header.fidelity,
        header.head_range,
        tuple(shape.layer_idx for shape in header.layers),
        header.profile,
    )
    if identity != header.storage_fingerprint:
        raise CorruptDataError("the storage fingerprint contradicts the header it stands in")
    for shape in header.layers:
        try:
            _check_heads(spec, shape.layer_idx, shape.num_kv_heads, header.head_range)
        except ShapeError as exc:
            raise CorruptDataError(str(exc)) from exc
    wanted = [s for s in header.layers if layers is None or s.layer_idx in layers]
    if layers is not None and len(wanted) != len(set(layers)):
        raise CorruptDataError(
            f"layers {sorted(set(layers) - {s.layer_idx for s in wanted})} are not in the container"
        )

    layers_out = tuple(
        _empty_layer(container, spec, shape, None if out is None else out.get(shape.layer_idx))
        for shape in wanted
    )

    def fill(some: Sequence[LayerKV]) -> None:
        try:
            codec.decode(container, spec, some)
        except MemoryError as exc:
            raise CapacityError(f"no memory to decode layer {some[0].layer_idx}") from exc

    if executor is None:
        fill(layers_out)
    else:
        group: dict[int, list[LayerKV]] = {}
        for layer in layers_out:
            group.setdefault(layer.layer_idx // caps.layer_group, []).append(layer)
        futures = [executor.submit(fill, some) for some in group.values()]
        wait(futures)  # also after an error: nothing writes into `out` once this has returned
        for future in futures:
            future.result()
    try:
        block = KVBlock(
            spec=spec, start=header.start, num_tokens=header.num_tokens, layers=layers_out
        )
    except ShapeError as exc:
        if out is not None:
            raise
        raise CorruptDataError(f"the container's layers contradict each other: {exc}") from exc
    if layers is None:
        container.verify()  # padding, and sections that no layer asked for
    return block


def _check_codec(header: Header, codec: Codec, spec: KVSpec) -> CodecCaps:
    """Every flag must be one that this reader acts on, and agree with codec and contents."""
    try:
        caps = codec.caps(spec)
    except ConfigError as exc:
        raise IncompatibleDataError(str(exc)) from exc
    features = Flag.ROPE_REMOVED | Flag.MIXES_HEADS | Flag.PROFILE_NEEDED
    explicit = any(s.kind is SectionKind.POSITIONS for s in header.sections)
    want = _codec_flags(codec, caps) | (Flag.POSITIONS_EXPLICIT if explicit else Flag(0))
    if header.profile != caps.profile or (header.flags ^ want) & features:
        raise IncompatibleDataError(
            f"the container asks for {header.flags & features!r} and profile "
            f"{header.profile!r:.80}; {header.codec!r:.120} has {want & features!r} and "
            f"{caps.profile!r}"
        )
    if (header.flags ^ want) & ~Flag.MAC:
        raise CorruptDataError(f"the flags {header.flags!r} contradict the container's contents")
    if caps.mixes_heads and header.head_range is not None:
        raise CorruptDataError(f"{header.codec!r:.120} cannot store a range of heads")
    return caps


def _check_identity(header: Header, spec: KVSpec) -> None:
    if header.spec_fingerprint != spec.fingerprint():
        raise IncompatibleDataError(
            f"the container holds KV of spec {header.spec_fingerprint.hex()[:16]}..., expected "
            f"{spec.fingerprint().hex()[:16]}... (model {spec.model_id!r}, {spec.dtype}): another "
            "model, adapter, dtype or RoPE setting wrote it"
        )
    if _DTYPE_NAMES.get(header.dtype_code) != spec.dtype:
        raise CorruptDataError(
            f"dtype code {header.dtype_code} contradicts the spec's {spec.dtype}"
        )
    for shape in header.layers:
        if shape.layer_idx >= spec.num_layers:
            raise CorruptDataError(
                f"layer {shape.layer_idx} of a model with {spec.num_layers} layers"
            )
        want = spec.layers[shape.layer_idx]
        seen = (shape.k_head_dim, shape.v_head_dim, shape.kind)
        if (
            seen != (want.k_head_dim, want.v_head_dim, _KIND_CODES.get(want.kind))
            or shape.num_kv_heads > want.num_kv_heads
        ):
            raise CorruptDataError(
                f"layer {shape.layer_idx} has shape {shape}; the spec says {want}"
            )


def _empty_layer(
    container: Container, spec: KVSpec, shape: LayerShape, out: LayerOut | None
) -> LayerKV:
    """The layer with everything but its keys and values, which the codec fills."""
    rows = _decode_rows(container, shape)
    k_width = shape.channels or shape.k_head_dim
    dtype = getattr(torch, spec.dtype)
    _check_claims(container, shape, rows, k_width, dtype.itemsize)
    if out is None:
        try:
            keys = torch.empty((*rows.lead, k_width), dtype=dtype)
            values = torch.empty((*rows.lead, shape.v_head_dim), dtype=dtype)
        except RuntimeError as exc:
            raise CapacityError(f"no memory for layer {shape.layer_idx}: {exc}") from exc
    else:
        keys, values = out
        for name, x, width in (("keys", keys, k_width), ("values", values, shape.v_head_dim)):
            if (
                tuple(x.shape) != (*rows.lead, width)
                or x.dtype != dtype
                or x.device.type != "cpu"
                or (x.numel() and width > 1 and x.stride(-1) != 1)
            ):
                raise ShapeError(
                    f"layer {shape.layer_idx}: cannot decode {name} into {x.dtype} "
                    f"{tuple(x.shape)} on {x.device}; expected {dtype} {(*rows.lead, width)} on "
                    "cpu, last dimension contiguous"
                )
    layer = LayerKV(
        layer_idx=shape.layer_idx,
        keys=keys,
        values=values,
        positions=rows.positions,
        row_lengths=rows.lengths,
        log_weight=rows.log_weight,
        channels=rows.channels,
    )
    try:
        layer.validate()
    except ShapeError as exc:
        raise CorruptDataError(f"malformed side information: {exc}") from exc
    return layer


def _check_claims(
    container: Container, shape: LayerShape, rows: _Rows, k_width: int, itemsize: int
) -> None:
    """Compare what the shape needs with what the section table claims, before allocating either."""
    entries = int(np.prod(rows.lead, dtype=object))
    for kind, width in ((SectionKind.KEYS, k_width), (SectionKind.VALUES, shape.v_head_dim)):
        info = container.find(kind, shape.layer_idx)
        if info is None:
            raise CorruptDataError(f"layer {shape.layer_idx} has no {kind.name.lower()} section")
        if info.raw_bytes != entries * width * itemsize:
            raise CorruptDataError(
                f"layer {shape.layer_idx}: {entries} entries of {width} channels need "
                f"{entries * width * itemsize} bytes of {kind.name.lower()}; the section table "
                f"says {info.raw_bytes}"
            )


def _decode_rows(container: Container, shape: LayerShape) -> _Rows:
    header = container.header
    heads = shape.num_kv_heads

    def read(kind: SectionKind, dtype: str, count: int) -> Tensor | None:
        info = container.find(kind, shape.layer_idx)
        if info is None:
            return None
        size = count * np.dtype(dtype).itemsize
        if info.stored_bytes != size or info.raw_bytes != size or info.flags != SectionFlag.RAW:
            raise CorruptDataError(
                f"layer {shape.layer_idx}: {kind.name.lower()} take {info.stored_bytes} bytes; "
                f"expected {size}"
            )
        data = np.frombuffer(container.read(kind, shape.layer_idx)[1], dtype)
        return torch.from_numpy(data.astype(np.dtype(dtype).newbyteorder("=")))

    packed = container.find(SectionKind.ROW_LENGTHS, shape.layer_idx)
    lengths: tuple[int, ...] | None = None
    if packed is not None:
        lengths_tensor = read(SectionKind.ROW_LENGTHS, "<u4", heads)
        lengths = (
            tuple(int(n) for n in lengths_tensor.tolist()) if lengths_tensor is not None else ()
        )
        lead: tuple[int, ...] = (sum(lengths),)
    else:
        per_head = header.num_tokens
        info = container.find(SectionKind.POSITIONS, shape.layer_idx)
        if info is not None:
            per_head, rest = divmod(info.stored_bytes, heads * 4)
            if rest:
                raise CorruptDataError(
                    f"layer {shape.layer_idx}: positions do not divide over {heads} heads"
                )
        lead = (heads, per_head)
    entries = int(np.prod(lead, dtype=object))
    given = read(SectionKind.POSITIONS, "<i4", entries)
    positions: range | Tensor
    if given is not None:
        real = given[given != SYNTHETIC]
        stop = header.start + header.num_tokens
        if len(real) and not header.start <= int(real.min()) <= int(real.max()) < stop:
            raise CorruptDataError(f"layer {shape.layer_idx}: positions leave the block's tokens")
        positions = given.reshape(lead)
    elif lengths is None:
        positions = range(header.start, header.start + header.num_tokens)
    else:
        raise CorruptDataError(
            f"layer {shape.layer_idx} has rows of different length but no positions"
        )
    weight = read(SectionKind.LOG_WEIGHT, "<f4", entries)
    channels = read(SectionKind.CHANNELS, "<u2", heads * shape.channels)
    if (channels is None) != (shape.channels == 0):
        raise CorruptDataError(
            f"layer {shape.layer_idx}: the channel list is missing or unexpected"
        )
    if channels is not None:
        channels = channels.to(torch.int64).reshape(heads, shape.channels)
        if channels.numel() and int(channels.max()) >= shape.k_head_dim:
            raise CorruptDataError(
                f"layer {shape.layer_idx}: a channel list leaves the {shape.k_head_dim} channels"
            )
    return _Rows(
        lengths, positions, None if weight is None else weight.reshape(lead), channels, lead
    )
