# SPDX-License-Identifier: Apache-2.0
"""`exact`: byte planes and zstandard, bit for bit.

The bytes of a float are of two kinds: sign and exponent bits, which repeat, and low mantissa bits,
which are noise. Split by significance, the first kind compresses well and the second is left alone:
general compressors find little in the mixed stream. NaN payloads, infinities and the sign of zero
come back as they were, and fp8 or other one-byte types pass through as a single plane.

Section: one little-endian u32 per plane (bit 31: plane stored raw; bits 0-30: its stored size),
then the planes, least significant first, tiling the section.
"""

from dataclasses import dataclass
from struct import Struct
from typing import ClassVar

import numpy as np
import zstandard
from torch import Tensor

from kvlib.codecs.base import MatrixCodec, raw_view
from kvlib.codecs.container import Buffer
from kvlib.errors import CorruptDataError

__all__ = ["ExactCodec"]

_LEVEL = 1  # higher levels write slower and make KV hardly smaller
_RAW_PLANE = 1 << 31
_MAX_WINDOW = 8 << 20  # the largest that levels up to 19 use
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MIN_GAIN = 0.03  # a plane that shrinks by less is stored raw: reading it back is then a copy


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactCodec(MatrixCodec):
    """Lossless byte planes; it has no parameters."""

    name: ClassVar[str] = "exact"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    lossless: ClassVar[bool] = True

    def encode_matrix(self, x: Tensor) -> list[Buffer] | None:
        """One plane per byte of the element, least significant first.

        None when a plane's size has no room in 31 bits.
        """
        if x.numel() >= _RAW_PLANE:
            return None
        raw = raw_view(x).reshape(-1, x.element_size())
        compressor = zstandard.ZstdCompressor(
            level=_LEVEL, write_checksum=False, write_content_size=True
        )
        sizes = bytearray()
        planes: list[Buffer] = []
        for p in range(raw.shape[1]):
            plane = np.ascontiguousarray(raw[:, p])
            packed = compressor.compress(plane.data)
            if len(packed) <= plane.nbytes * (1 - _MIN_GAIN):
                planes.append(packed)
                sizes += len(packed).to_bytes(4, "little")
            else:
                planes.append(plane.data)
                sizes += (plane.nbytes | _RAW_PLANE).to_bytes(4, "little")
        return [bytes(sizes), *planes]

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
            size = word & ~_RAW_PLANE
            if size > data.nbytes - at:
                raise CorruptDataError(f"plane {p} claims {size} bytes of {data.nbytes - at} left")
            packed = data[at : at + size]
            at += size
            plane = packed if word & _RAW_PLANE else decompress(packed, out.numel())
            if len(plane) != out.numel():
                raise CorruptDataError(
                    f"plane {p} holds {len(plane)} bytes; expected {out.numel()}"
                )
            target[..., p::itemsize] = np.frombuffer(plane, np.uint8).reshape(out.shape)
        if at != data.nbytes:
            raise CorruptDataError(f"{data.nbytes - at} bytes follow the last plane")


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
        return zstandard.ZstdDecompressor().decompress(
            frame, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as exc:
        raise CorruptDataError(f"a zstandard frame is malformed: {exc}") from exc
