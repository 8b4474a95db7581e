# SPDX-License-Identifier: Apache-2.0
"""Records to measure with: valid containers that cost nearly nothing to make.

All records of one size share their payload (random, so nothing can compress it) and its checksums;
only the key differs, and with it the header.
"""

from hashlib import blake2b

import numpy as np
import xxhash

from kvlib.codecs.container import (
    Buffer,
    LayerShape,
    Section,
    SectionFlag,
    SectionKind,
    build_container,
)
from kvlib.keys import DIGEST_BYTES, BlockKey, StoreKey

__all__ = ["Blocks"]

_LEAST_SECTION = 64
_CHECKSUM_BYTES = 8


class Blocks:
    """Records of one size.

    Args:
        nbytes: of each container; rounded down to a multiple of 8.
        layers: with two sections each; fewer if they do not fit.
    """

    def __init__(self, nbytes: int, layers: int) -> None:
        self.nbytes = nbytes // 8 * 8
        self._storage = blake2b(b"bench", digest_size=DIGEST_BYTES).digest()
        while layers > 1 and self._header_bytes(layers) + 2 * layers * _LEAST_SECTION > nbytes:
            layers //= 2
        payload = self.nbytes - self._header_bytes(layers)
        each = payload // (2 * layers) // 8 * 8
        sizes = [each] * (2 * layers - 1)
        sizes.append(payload - sum(sizes))
        parts = self._build(layers, sizes)
        self._head = bytes(memoryview(parts[0]))
        self._body = parts[1:]
        self._at = self._head.index(bytes(DIGEST_BYTES - 1) + b"\1")

    def _header_bytes(self, layers: int) -> int:
        return -(-memoryview(self._build(layers, [0] * 2 * layers)[0]).nbytes // 8) * 8

    def _build(self, layers: int, sizes: list[int]) -> list[Buffer]:
        noise = memoryview(np.random.default_rng(0).bytes(sum(sizes)))
        sections = []
        at = 0
        for i, size in enumerate(sizes):
            kind = SectionKind.VALUES if i % 2 else SectionKind.KEYS
            part = noise[at : at + size]
            sections.append(Section(kind, i // 2, size, (part,), SectionFlag.RAW))
            at += size
        return build_container(
            sections,
            spec_fingerprint=self._storage,
            storage_fingerprint=self._storage,
            start=0,
            num_tokens=64,
            dtype_code=1,
            codec="bench@1",
            layers=[LayerShape(layer, 8, 128, 128) for layer in range(layers)],
            keys=[BlockKey(bytes(DIGEST_BYTES - 1) + b"\1")],
        )

    def key(self, number: int) -> StoreKey:
        """The key of a record."""
        text = number.to_bytes(8, "little")
        return StoreKey(BlockKey(blake2b(text, digest_size=DIGEST_BYTES).digest()), self._storage)

    def record(self, number: int) -> tuple[StoreKey, list[Buffer]]:
        """A record: its key, and the container in pieces; numbers are unique over all sizes."""
        key = self.key(number)
        front = self._head[: self._at] + key.block + self._head[self._at + DIGEST_BYTES :]
        front = front[:-_CHECKSUM_BYTES]
        checksum = xxhash.xxh3_64_intdigest(front).to_bytes(_CHECKSUM_BYTES, "little")
        return key, [front + checksum, *self._body]
