# SPDX-License-Identifier: Apache-2.0
"""`exact`: byte planes and zstandard, bit for bit.

The bytes of a float are of two kinds: sign and exponent bits, which repeat, and low mantissa bits,
which are noise. Split by significance, the first kind compresses well and the second is left alone:
general compressors find little in the mixed stream. NaN payloads, infinities and the sign of zero
come back as they were, and fp8 or other one-byte types pass through as a single plane.

Signs and exponents repeat in two ways. A channel keeps its sign and scale over many tokens, keys
above all: column after column, a Huffman code and short matches find that. And the values of the
first layers come back whole wherever a token does: row after row, long matches find that. Which is
more is known after trying both. The frames are nothing but zstandard, so no reader needs more, and
decoding is as fast without a compiler as with one.

Section: one little-endian u32 per plane (bit 31: stored raw; bit 30: a frame of columns; the rest:
its stored size), then the planes, least significant first, tiling the section.
docs/formats/container.md is the specification.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from kvlib.codecs.base import MatrixCodec, raw_view
from kvlib.codecs.container import Buffer
from kvlib.errors import CorruptDataError

__all__ = ["ExactCodec", "ExactCodec1"]

_RAW_PLANE = 1 << 31
_COLUMNS = 1 << 30
_MAX_WINDOW = 8 << 20  # the largest that levels up to 19 use
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MIN_GAIN = 0.03  # a plane that shrinks by less is stored raw: reading it back is then a copy

_BY_COLUMNS = (torch.float32, torch.bfloat16)
"""Types whose first byte is sign and exponent and nothing else; others gain next to nothing."""

Plane = NDArray[np.uint8]


class _Tools(threading.local):
    """Contexts of zstandard, which serve one thread at a time and take a while to make.

    `rows` is level 1: higher ones write slower and make KV hardly smaller. `columns` looks for
    matches in next to no memory (64 places): in exponents without whole rows that repeat, what a
    larger table finds costs more than the Huffman codes in its place.
    """

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self.rows = zstandard.ZstdCompressor(level=1, write_checksum=False, write_content_size=True)
        self.columns = zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(
                strategy=zstandard.STRATEGY_FAST,
                window_log=17,  # a block, and so a Huffman code, is 128 KiB at most anyway
                chain_log=6,
                hash_log=6,
                search_log=1,
                min_match=7,
                target_length=0,
                write_checksum=False,
                write_content_size=True,
            )
        )


_tools = _Tools()


class _Planes(MatrixCodec):
    """What all versions share."""

    _has_columns: ClassVar[bool]

    @property
    def _sizes(self) -> int:
        """Mask of the bits that hold the size of a plane."""
        return (_COLUMNS if self._has_columns else _RAW_PLANE) - 1

    def encode_matrix(self, x: Tensor) -> list[Buffer] | None:
        """One plane per byte of the element, least significant first.

        None when a plane's size has no room in its bits.
        """
        if x.numel() > self._sizes:
            return None
        raw = raw_view(x).reshape(len(x), -1)
        itemsize = x.element_size()
        table = bytearray()
        planes: list[Buffer] = []
        for p in range(itemsize):
            plane = raw[:, p::itemsize]
            columns = self._has_columns and p == itemsize - 1 and x.dtype in _BY_COLUMNS
            form, stored = self._pack(plane, columns=columns)
            planes.append(stored)
            table += (form | memoryview(stored).nbytes).to_bytes(4, "little")
        return [bytes(table), *planes]

    def _pack(self, plane: Plane, *, columns: bool) -> tuple[int, Buffer]:
        """The smallest form of a plane [N, D]."""
        rows = np.ascontiguousarray(plane)
        form, best = 0, _tools.rows.compress(rows.data)
        if columns:
            packed = _tools.columns.compress(np.ascontiguousarray(rows.T).data)
            if len(packed) < len(best):
                form, best = _COLUMNS, packed
        if len(best) > rows.nbytes * (1 - _MIN_GAIN):
            return _RAW_PLANE, rows.data
        return form, best

    def decode_matrix(self, data: memoryview, out: Tensor) -> None:
        """Put the planes back into the bytes of `out`."""
        itemsize = out.element_size()
        target = raw_view(out)  # uint8 [..., D * itemsize]
        table = Struct(f"<{itemsize}I")
        if data.nbytes < table.size:
            raise CorruptDataError(
                f"an exact section of {data.nbytes} bytes cannot hold {itemsize} planes"
            )
        at = table.size
        for p, word in enumerate(table.unpack_from(data)):
            size = word & self._sizes
            form = word - size
            if size > data.nbytes - at:
                raise CorruptDataError(f"plane {p} claims {size} bytes of {data.nbytes - at} left")
            if form == _RAW_PLANE | _COLUMNS:
                raise CorruptDataError(f"plane {p} claims to be raw and a frame of columns at once")
            stored = data[at : at + size]
            at += size
            plane = stored if form == _RAW_PLANE else decompress(stored, out.numel())
            if len(plane) != out.numel():
                raise CorruptDataError(
                    f"plane {p} holds {len(plane)} bytes; expected {out.numel()}"
                )
            found = np.frombuffer(plane, np.uint8)
            if form == _COLUMNS:
                found = np.moveaxis(found.reshape(out.shape[-1], *out.shape[:-1]), 0, -1)
            target[..., p::itemsize] = found.reshape(out.shape)
        if at != data.nbytes:
            raise CorruptDataError(f"{data.nbytes - at} bytes follow the last plane")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactCodec1(_Planes):
    """Version 1, which had no frames of columns: what it wrote is read, and can still be written.

    A store that older readers share is opened with it (`KVStore(codec=ExactCodec1())`).
    """

    name: ClassVar[str] = "exact"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    lossless: ClassVar[bool] = True
    _has_columns: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactCodec(_Planes):
    """Lossless byte planes; it has no parameters."""

    name: ClassVar[str] = "exact"
    version: ClassVar[int] = 2
    status: ClassVar[str] = "stable"
    lossless: ClassVar[bool] = True
    older: ClassVar[Mapping[int, type[MatrixCodec]]] = {1: ExactCodec1}
    _has_columns: ClassVar[bool] = True


def decompress(frame: memoryview, size: int) -> bytes:
    """Decompress exactly one zstandard frame to exactly `size` bytes.

    python-zstandard allocates whatever a frame's header declares, whatever `max_output_size` says,
    and ignores bytes after the frame by default; so the header is checked first.

    Raises:
        CorruptDataError: anything else than one whole frame of that size, without a dictionary.
    """
    if bytes(frame[:4]) != _ZSTD_MAGIC:
        raise CorruptDataError("a compressed plane does not begin with a zstandard frame")
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if (
            parameters.content_size != size
            or parameters.dict_id
            or parameters.window_size > _MAX_WINDOW
        ):
            raise CorruptDataError(
                f"a zstandard frame declares {parameters.content_size} bytes, dictionary "
                f"{parameters.dict_id} and a window of {parameters.window_size}; expected {size}, "
                f"none and at most {_MAX_WINDOW}"
            )
        return _tools.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise CorruptDataError(f"a zstandard frame is malformed: {exc}") from exc
