# SPDX-License-Identifier: Apache-2.0
"""How a container becomes a block, whatever the codec."""

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV
from kvlib.codecs.base import Codec, CodecCaps, MatrixCodec
from kvlib.codecs.container import (
    MAX_DECODED_BYTES,
    Buffer,
    Container,
    Flag,
    Header,
    LayerShape,
    SectionFlag,
    SectionKind,
)
from kvlib.codecs.pack import KIND_CODES, check_heads, codec_flags
from kvlib.errors import (
    CapacityError,
    ConfigError,
    CorruptDataError,
    IncompatibleDataError,
    ShapeError,
)
from kvlib.spec import DTYPES, KVSpec, storage_digest

__all__ = ["LayerOut", "decode_block", "lies_in"]

_DTYPE_NAMES = {dtype.code: dtype.name for dtype in DTYPES.values()}

LayerOut = tuple[Tensor, Tensor]
"""Where to decode a dense layer: keys [Hkv, T, C], values [Hkv, T, Dv], last dim contiguous."""


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
    lend: bool = False,
) -> KVBlock:
    """Decode a container into a block of CPU tensors that alias nothing, unless `lend` allows it.

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
        lend: give layers that are stored raw as views of `data`, which must not be written to.

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
            check_heads(spec, shape.layer_idx, shape.num_kv_heads, header.head_range)
        except ShapeError as exc:
            raise CorruptDataError(str(exc)) from exc
    wanted = [s for s in header.layers if layers is None or s.layer_idx in layers]
    if layers is not None and len(wanted) != len(set(layers)):
        raise CorruptDataError(
            f"layers {sorted(set(layers) - {s.layer_idx for s in wanted})} are not in the container"
        )

    lending = lend and isinstance(codec, MatrixCodec)
    memory = _as_tensor(container.view) if lending else None
    layers_out: list[LayerKV] = []
    coded: list[LayerKV] = []
    for shape in wanted:
        room = None if out is None else out.get(shape.layer_idx)
        lent = None
        if memory is not None and room is None:
            lent = _lent(container, memory, spec, shape)
        layers_out.append(_empty_layer(container, spec, shape, lent or room))
        if lent is None:
            coded.append(layers_out[-1])

    def fill(some: Sequence[LayerKV]) -> None:
        try:
            codec.decode(container, spec, some)
        except MemoryError as exc:
            raise CapacityError(f"no memory to decode layer {some[0].layer_idx}") from exc

    if executor is None:
        if coded:
            fill(coded)
    else:
        group: dict[int, list[LayerKV]] = {}
        for layer in coded:
            group.setdefault(layer.layer_idx // caps.layer_group, []).append(layer)
        futures = [executor.submit(fill, some) for some in group.values()]
        wait(futures)  # also after an error: nothing writes into `out` once this has returned
        for future in futures:
            future.result()
    try:
        block = KVBlock(
            spec=spec, start=header.start, num_tokens=header.num_tokens, layers=tuple(layers_out)
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
    want = codec_flags(codec, caps) | (Flag.POSITIONS_EXPLICIT if explicit else Flag(0))
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
            seen != (want.k_head_dim, want.v_head_dim, KIND_CODES.get(want.kind))
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


def _as_tensor(view: memoryview) -> Tensor:
    """Read-only memory as uint8, sharing it."""
    base = np.frombuffer(view, np.uint8)
    # torch warns of read-only memory, once for all: this says the same memory is writable.
    memory: Any = (ctypes.c_ubyte * base.nbytes).from_address(base.ctypes.data)
    memory.owner = base
    return torch.frombuffer(memory, dtype=torch.uint8)


def lies_in(block: KVBlock, view: memoryview) -> bool:
    """Whether all numbers of a block lie in that memory."""
    first = np.frombuffer(view, np.uint8).ctypes.data
    return all(
        not x.numel() or first <= x.data_ptr() < first + view.nbytes
        for layer in block.layers
        for x in (layer.keys, layer.values)
    )


def _lent(container: Container, memory: Tensor, spec: KVSpec, shape: LayerShape) -> LayerOut | None:
    """Keys and values of a layer where they lie; None where they are coded, or entries are gone."""
    if container.find(SectionKind.POSITIONS, shape.layer_idx) is not None:
        return None
    dtype = getattr(torch, spec.dtype)
    found: list[Tensor] = []
    lead = (shape.num_kv_heads, container.header.num_tokens)
    for kind, width in (
        (SectionKind.KEYS, shape.channels or shape.k_head_dim),
        (SectionKind.VALUES, shape.v_head_dim),
    ):
        info = container.find(kind, shape.layer_idx)
        nbytes = prod(lead) * width * dtype.itemsize
        if info is None or not nbytes == info.stored_bytes == info.raw_bytes:
            return None
        if not nbytes:  # MLA has no values
            found.append(torch.empty((*lead, width), dtype=dtype))
            continue
        if not info.flags & SectionFlag.RAW or (memory.data_ptr() + info.offset) % dtype.itemsize:
            return None
        container.read(kind, shape.layer_idx)  # verifies it, if nobody did yet
        part = memory[info.offset : info.offset + nbytes]
        found.append(part.view(dtype).view(*lead, width))
    return found[0], found[1]


def _check_claims(
    container: Container, shape: LayerShape, rows: _Rows, k_width: int, itemsize: int
) -> None:
    """Compare what the shape needs with what the section table claims, before allocating either."""
    entries = prod(rows.lead)
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
    entries = prod(lead)
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
