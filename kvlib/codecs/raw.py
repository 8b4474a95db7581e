# SPDX-License-Identifier: Apache-2.0
"""`raw`: the tensors' own bytes, for tiers where decoding would cost more than the room it saves.

Every section is marked raw (`SectionFlag.RAW`); of a record that lies in memory, keys and values
can be used where they are, without a copy.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.codecs.base import CodecCaps, MatrixCodec
from kvlib.codecs.container import Buffer
from kvlib.errors import CorruptDataError
from kvlib.spec import KVSpec

__all__ = ["RawCodec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawCodec(MatrixCodec):
    """No coding; it has no parameters."""

    name: ClassVar[str] = "raw"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    lossless: ClassVar[bool] = True

    def caps(self, spec: KVSpec) -> CodecCaps:
        """Sizes depend on shapes only."""
        return CodecCaps(fixed_rate=True)

    def encode_matrix(self, x: Tensor) -> list[Buffer] | None:
        """Leave it as it is."""
        return None

    def decode_matrix(self, data: memoryview, out: Tensor) -> None:
        """Refuse what is not marked raw: this codec writes nothing else."""
        raise CorruptDataError(f"a section of {data.nbytes} bytes is coded, and its codec is raw")
