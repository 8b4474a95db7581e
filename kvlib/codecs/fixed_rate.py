# SPDX-License-Identifier: Apache-2.0
"""What the fixed-rate codecs share: encoding head by head, packing of codes, rounding.

`kvlib.codecs.fp8`, `.kivi` and `.hadamard` follow number formats that attention kernels compute on.
They need no calibration, look at each layer and KV head alone, and spend the same bits everywhere.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import KVBlock, LayerKV
from kvlib.codecs.base import CodecCaps, raw_section, read_raw, unsupported_dtype
from kvlib.codecs.container import Buffer, Container, Section, SectionKind
from kvlib.errors import CorruptDataError
from kvlib.spec import KVSpec

__all__ = [
    "FLOAT16_MAX",
    "Floats",
    "Halves",
    "Matrix",
    "RowCodec",
    "code_bytes",
    "expect_size",
    "outward",
    "pack_codes",
    "read_halves",
    "round_into",
    "split_rows",
    "unpack_codes",
]

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Halves = np.ndarray[tuple[int, ...], np.dtype[np.float16]]
Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

FLOAT16_MAX = np.float32(65504)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CAPS = CodecCaps(fixed_rate=True)


class Matrix(NamedTuple):
    """Which matrix [N, D] is at hand: the keys or values of a layer, head after head.

    Attributes:
        kind: KEYS or VALUES.
        layer_idx: of the layer.
        lengths: entries of each KV head; their sum is N.
        width: D.
    """

    kind: SectionKind
    layer_idx: int
    lengths: tuple[int, ...]
    width: int

    @property
    def entries(self) -> int:
        """N."""
        return sum(self.lengths)


class RowCodec:
    """Base of the fixed-rate codecs: two matrices a layer, whose rows of entries are known.

    A subclass gives `encode_rows` and `decode_rows`. Where its output would not be smaller than the
    tensor, the tensor's own bytes are stored instead, so encoding never grows a section.
    """

    name: ClassVar[str]

    def caps(self, spec: KVSpec) -> CodecCaps:
        """See `Codec.caps`."""
        return _CAPS

    def encode_rows(self, matrix: Matrix, x: Tensor) -> list[Buffer] | None:
        """Encode a contiguous CPU matrix, N, D > 0; None when it must be stored raw."""
        raise NotImplementedError

    def decode_rows(self, matrix: Matrix, data: memoryview, out: Sequence[Tensor]) -> None:
        """Decode into one view [n, D] a head, checking every size before using it."""
        raise NotImplementedError

    def encode(self, block: KVBlock) -> list[Section]:
        """See `Codec.encode`."""
        return [
            self._encode_one(Matrix(kind, layer.layer_idx, layer.lengths, x.shape[-1]), x)
            for layer in block.layers
            for kind, x in ((SectionKind.KEYS, layer.keys), (SectionKind.VALUES, layer.values))
        ]

    def _encode_one(self, matrix: Matrix, x: Tensor) -> Section:
        raw_bytes = x.numel() * x.element_size()
        if not raw_bytes:
            return raw_section(matrix.kind, matrix.layer_idx, x)
        if x.dtype not in _DTYPES:
            raise unsupported_dtype(self.name, x, _DTYPES)
        x = x.detach().to("cpu").reshape(-1, matrix.width).contiguous()
        parts = self.encode_rows(matrix, x)
        if parts is not None and sum(memoryview(p).nbytes for p in parts) < raw_bytes:
            return Section(matrix.kind, matrix.layer_idx, raw_bytes, tuple(parts))
        return raw_section(matrix.kind, matrix.layer_idx, x)

    def decode(self, container: Container, spec: KVSpec, layers: Sequence[LayerKV]) -> None:
        """See `Codec.decode`."""
        for layer in layers:
            for kind, out in ((SectionKind.KEYS, layer.keys), (SectionKind.VALUES, layer.values)):
                if read_raw(container, kind, layer.layer_idx, out) or not out.numel():
                    continue
                if out.dtype not in _DTYPES:
                    raise unsupported_dtype(self.name, out, _DTYPES)
                matrix = Matrix(kind, layer.layer_idx, layer.lengths, out.shape[-1])
                heads = list(out) if layer.is_dense else list(out.split(matrix.lengths))
                self.decode_rows(matrix, container.read(kind, layer.layer_idx)[1], heads)


def expect_size(name: str, matrix: Matrix, data: memoryview, size: int) -> None:
    """Check the size of a section.

    Raises:
        CorruptDataError: it is not `size`.
    """
    if data.nbytes != size:
        raise CorruptDataError(
            f"layer {matrix.layer_idx}: {matrix.kind.name.lower()} of {data.nbytes} bytes; {name} "
            f"needs {size} for {matrix.entries} entries of {matrix.width} channels"
        )


def read_halves(what: str, data: memoryview, *, negative: bool = False) -> Floats:
    """Stored float16 numbers as float32.

    Raises:
        CorruptDataError: one is not finite, or below 0 where that must not be.
    """
    numbers: Floats = np.frombuffer(data, "<f2").astype(np.float32)
    if not np.isfinite(numbers).all() or (not negative and bool((numbers < 0).any())):
        raise CorruptDataError(f"a {what} is negative or not finite")
    return numbers


def outward(x: Floats, towards: float) -> Halves:
    """float16 of `x`, rounded down (towards=-inf) or up (+inf)."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
        back = half.astype(np.float32)
        wrong = back > x if towards < 0 else back < x
        # + 0 turns -0.0 into 0.0: which of two zeros is the least differs between machines.
        return np.where(wrong, np.nextafter(half, np.float16(towards)), half) + np.float16(0)


def round_into(out: Tensor, rows: Floats) -> None:
    """Round float32 `rows` to the dtype of `out` [n, D], to nearest even.

    In pieces too small for torch to start threads for: decoding runs on a pool of threads already,
    and a second pool under it costs more than it brings.
    """
    if out.dtype == torch.float32:
        np.copyto(out.numpy(), rows)
        return
    step = max(1, 16384 // rows.shape[1])
    for first in range(0, len(rows), step):
        out[first : first + step].copy_(torch.from_numpy(rows[first : first + step]))


def split_rows(rows: Floats, lengths: Sequence[int]) -> list[Floats]:
    """The rows of each head, as views."""
    return np.split(rows, list(accumulate(lengths))[:-1])


def code_bytes(width: int, bits: int) -> int:
    """Bytes of `width` codes of `bits` bits."""
    return -(-width * bits // 8)


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Rows of codes [N, D], N, D > 0, as rows of bytes, the first code in the lowest bits.

    Eight codes of b bits fill b bytes, so a 32-bit word holds them for every b up to 4.
    """
    width = codes.shape[1]
    eights = np.pad(codes, ((0, 0), (0, -width % 8))).reshape(len(codes), -1, 8)
    words = eights[:, :, 0].astype(np.uint32)
    for i in range(1, 8):
        words |= eights[:, :, i].astype(np.uint32) << np.uint32(bits * i)
    rows = words.astype("<u4").view(np.uint8).reshape(*words.shape, 4)[:, :, :bits]
    return np.ascontiguousarray(rows.reshape(len(codes), -1)[:, : code_bytes(width, bits)])


def unpack_codes(rows: Bytes, width: int, bits: int) -> Bytes:
    """Codes [N, width] from rows of bytes.

    Raises:
        CorruptDataError: bits behind the last code of a row are not zero.
    """
    unused = 8 * rows.shape[1] - width * bits
    if unused and bool((rows[:, -1] >> (8 - unused)).any()):
        raise CorruptDataError("bits behind the last code of a row are not zero")
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % bits))).reshape(len(rows), -1, bits)
    words = padded[:, :, 0].astype(np.uint32)
    for i in range(1, bits):
        words |= padded[:, :, i].astype(np.uint32) << np.uint32(8 * i)
    codes = np.empty((*words.shape, 8), np.uint8)
    for i in range(8):
        codes[:, :, i] = words >> np.uint32(bits * i) & np.uint32(2**bits - 1)
    return codes.reshape(len(rows), -1)[:, :width]
