# SPDX-License-Identifier: Apache-2.0
"""What a codec is: it turns the tensors of a `KVBlock` into sections of bytes, and back.

Everything else in a container (header, positions, weights, channel lists, row lengths, checksums)
is the same for all codecs; see `kvlib.codecs.pack`.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import KVBlock
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
from kvlib.registry import describe

__all__ = ["Codec", "MatrixCodec", "describe_codec", "raw_view", "unsupported_dtype"]


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
    """

    name: ClassVar[str]
    version: ClassVar[int]
    status: ClassVar[str]
    lossless: ClassVar[bool]

    def encode(self, block: KVBlock) -> list[Section]:
        """KEYS and VALUES sections (and CODEC ones) of every layer of `block`, layer after layer.

        Raises:
            UnsupportedInputError: the codec cannot represent that block.
        """
        ...

    def decode(self, container: Container, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """Decode one layer into `keys` and `values` (CPU, [Hkv, T, C] or [N, C]).

        Their last dimension is contiguous; the others need not be.

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
        raw = (raw_view(matrix).data.cast("B"),) if raw_bytes else ()
        return Section(kind, layer_idx, raw_bytes, raw, SectionFlag.RAW)

    def decode(self, container: Container, layer_idx: int, keys: Tensor, values: Tensor) -> None:
        """See `Codec.decode`."""
        for kind, out in ((SectionKind.KEYS, keys), (SectionKind.VALUES, values)):
            info, data = container.read(kind, layer_idx)
            raw_bytes = out.numel() * out.element_size()
            if info.raw_bytes != raw_bytes:
                raise CorruptDataError(
                    f"layer {layer_idx}: {kind.name.lower()} decode to {info.raw_bytes} bytes; the "
                    f"shape needs {raw_bytes}"
                )
            if info.flags & SectionFlag.RAW:
                if info.stored_bytes != raw_bytes:
                    raise CorruptDataError(
                        f"layer {layer_idx}: a raw section of {info.stored_bytes} bytes for "
                        f"{raw_bytes}"
                    )
                if raw_bytes:
                    target = raw_view(out)
                    np.copyto(target, np.frombuffer(data, np.uint8).reshape(target.shape))
            elif raw_bytes:
                self.decode_matrix(data, out)


def describe_codec(codec: Codec) -> str:
    """The codec's canonical string, ``int8@1:group=64``: part of storage identities."""
    name, colon, rest = describe(codec).partition(":")
    return f"{name}@{codec.version}{colon}{rest}"


def unsupported_dtype(
    codec: str, x: Tensor, supported: Sequence[torch.dtype]
) -> UnsupportedInputError:
    """The error for a dtype a codec does not take."""
    names = ", ".join(str(d).removeprefix("torch.") for d in supported)
    return UnsupportedInputError(
        f"{codec} takes {names}; got {str(x.dtype).removeprefix('torch.')} (use exact for it)"
    )
