# SPDX-License-Identifier: Apache-2.0
"""What a codec is: it turns the tensors of a `KVBlock` into sections of bytes, and back.

Everything else in a container (header, positions, weights, channel lists, row lengths, checksums)
is the same for all codecs; see `kvlib.codecs.pack`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import KVBlock, LayerKV
from kvlib.codecs.container import (
    Buffer,
    Container,
    Section,
    SectionFlag,
    SectionKind,
)
from kvlib.errors import (
    CorruptDataError,
    UnsupportedInputError,
)
from kvlib.registry import identity
from kvlib.spec import EXACT, KVSpec, storage_fingerprint

__all__ = [
    "Codec",
    "CodecCaps",
    "MatrixCodec",
    "codec_fingerprint",
    "describe_codec",
    "older_versions",
    "raw_section",
    "raw_view",
    "read_raw",
    "unsupported_dtype",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecCaps:
    """What users of a codec have to know before they store or split what it makes.

    Attributes:
        fixed_rate: encoded sizes depend on shapes only.
        mixes_heads: KV heads of a layer are coded together, so a rank that holds some of the heads
            cannot use it.
        removes_rope: keys are stored unrotated; decoding needs the positions.
        profile: id of the calibration artefact that decoding needs, "" without one.
        layer_group: so many consecutive layers, from a multiple of it on, are decoded together.
    """

    fixed_rate: bool = False
    mixes_heads: bool = False
    removes_rope: bool = False
    profile: str = ""
    layer_group: int = 1


_PLAIN = CodecCaps()


def raw_view(x: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """The bytes of a CPU tensor, uint8 [..., D * itemsize], sharing memory.

    The last dimension must be contiguous.
    """
    if x.shape[-1] == 0:
        return np.empty(x.shape, np.uint8)
    if x.stride(-1) != 1 and (x.shape[-1] == 1 or not x.numel()):
        x = x.as_strided(x.shape, (*x.stride()[:-1], 1))  # contiguous; torch wants to see it
    return x.view(torch.uint8).numpy()


@runtime_checkable
class Codec(Protocol):
    """A storage codec: frozen, synchronous, deterministic; blocks are decoded before they are used.

    Attributes:
        name: its name in method strings.
        version: part of its canonical string; changed bytes are a new version, and old versions
            decode forever.
        status: "stable" or "experimental".
        lossless: whether decoding gives the encoded bits back.

    A class whose version is not the first has an attribute `older`, the classes of the versions
    before (`older_versions`): what a canonical string of theirs is read with.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    status: ClassVar[str]
    lossless: ClassVar[bool]

    def caps(self, spec: KVSpec) -> CodecCaps:
        """What it does with blocks of `spec`.

        Raises:
            ConfigError: its calibration artefact belongs to another model.
        """
        ...

    def encode(self, block: KVBlock) -> list[Section]:
        """KEYS and VALUES sections (and CODEC ones) of every layer of `block`, layer after layer.

        Raises:
            UnsupportedInputError: the codec cannot represent that block.
        """
        ...

    def decode(self, container: Container, spec: KVSpec, layers: Sequence[LayerKV]) -> None:
        """Fill the keys and values of `layers` in place.

        Args:
            container: what `encode` made, and the side sections beside it.
            spec: of the block.
            layers: on the CPU, complete and valid but for the numbers in keys and values, whose
                last dimension is contiguous; the others need not be.

        Raises:
            CorruptDataError: the sections are malformed.
        """
        ...


class MatrixCodec:
    """Base of codecs that treat keys and values of a layer as two matrices of entries.

    A subclass gives `encode_matrix` and `decode_matrix`. Where its output would not be smaller than
    the tensor, the tensor's own bytes are stored instead (`SectionFlag.RAW`), so encoding never
    grows a section.
    """

    def caps(self, spec: KVSpec) -> CodecCaps:
        """See `Codec.caps`."""
        return _PLAIN

    def encode_matrix(self, x: Tensor) -> list[Buffer] | None:
        """Encode a contiguous CPU matrix [N, D], N, D > 0; None when it must be stored raw."""
        raise NotImplementedError

    def decode_matrix(self, data: memoryview, out: Tensor) -> None:
        """Decode into `out` [..., D] (N entries in all), checking every size before using it."""
        raise NotImplementedError

    def encode(self, block: KVBlock) -> list[Section]:
        """See `Codec.encode`."""
        sections = []
        for layer in block.layers:
            for kind, x in ((SectionKind.KEYS, layer.keys), (SectionKind.VALUES, layer.values)):
                sections.append(self._encode_one(kind, layer.layer_idx, x))
        return sections

    def _encode_one(self, kind: SectionKind, layer_idx: int, x: Tensor) -> Section:
        matrix = x.detach().to("cpu").reshape(-1, x.shape[-1]).contiguous() if x.numel() else x
        raw_bytes = x.numel() * x.element_size()
        parts = self.encode_matrix(matrix) if raw_bytes else []
        if parts is not None and sum(memoryview(p).nbytes for p in parts) < raw_bytes:
            return Section(kind, layer_idx, raw_bytes, tuple(parts))
        return raw_section(kind, layer_idx, matrix)

    def decode(self, container: Container, spec: KVSpec, layers: Sequence[LayerKV]) -> None:
        """See `Codec.decode`."""
        for layer in layers:
            for kind, out in ((SectionKind.KEYS, layer.keys), (SectionKind.VALUES, layer.values)):
                if not read_raw(container, kind, layer.layer_idx, out) and out.numel():
                    self.decode_matrix(container.read(kind, layer.layer_idx)[1], out)


def older_versions(codec: "type[Codec]") -> "Mapping[int, type[Codec]]":
    """The classes of a codec's earlier versions, by version; none of a codec that has but one."""
    return getattr(codec, "older", {})


def raw_section(kind: SectionKind, layer_idx: int, x: Tensor) -> Section:
    """The section that holds the own bytes of `x`, on the CPU and contiguous."""
    raw_bytes = x.numel() * x.element_size()
    raw = (raw_view(x).data.cast("B"),) if raw_bytes else ()
    return Section(kind, layer_idx, raw_bytes, raw, SectionFlag.RAW)


def read_raw(container: Container, kind: SectionKind, layer_idx: int, out: Tensor) -> bool:
    """Copy a section that holds the tensor's own bytes into `out`; False if it is an encoded one.

    Raises:
        CorruptDataError: its size is not that of `out`.
    """
    info, data = container.read(kind, layer_idx)
    raw_bytes = out.numel() * out.element_size()
    if info.raw_bytes != raw_bytes:
        raise CorruptDataError(
            f"layer {layer_idx}: {kind.name.lower()} decode to {info.raw_bytes} bytes; the "
            f"shape needs {raw_bytes}"
        )
    if not info.flags & SectionFlag.RAW:
        return False
    if info.stored_bytes != raw_bytes:
        raise CorruptDataError(
            f"layer {layer_idx}: a raw section of {info.stored_bytes} bytes for {raw_bytes}"
        )
    if raw_bytes:
        target = raw_view(out)
        np.copyto(target, np.frombuffer(data, np.uint8).reshape(target.shape))
    return True


def describe_codec(codec: Codec) -> str:
    """The codec's canonical string, ``int8@1:group=64``: part of storage identities.

    Fields marked with `kvlib.registry.PLACE`, such as a profile's path beside its digest, are not
    in it.
    """
    name, colon, rest = identity(codec).partition(":")
    return f"{name}@{codec.version}{colon}{rest}"


def codec_fingerprint(
    spec: KVSpec,
    codec: Codec,
    *,
    fidelity: str = EXACT,
    head_range: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
) -> bytes:
    """`kvlib.spec.storage_fingerprint` of what `codec` makes of blocks of `spec`."""
    return storage_fingerprint(
        spec,
        describe_codec(codec),
        fidelity=fidelity,
        head_range=head_range,
        layers=layers,
        profile=codec.caps(spec).profile,
    )


def unsupported_dtype(
    codec: str, x: Tensor, supported: Sequence[torch.dtype]
) -> UnsupportedInputError:
    """The error for a dtype a codec does not take."""
    names = ", ".join(str(d).removeprefix("torch.") for d in supported)
    return UnsupportedInputError(
        f"{codec} takes {names}; got {str(x.dtype).removeprefix('torch.')} (use exact for it)"
    )
