# SPDX-License-Identifier: Apache-2.0
"""Small valid records, for testing tiers without models or codecs."""

from hashlib import blake2b

from kvlib.codecs.container import (
    Buffer,
    LayerShape,
    Section,
    SectionFlag,
    SectionKind,
    build_container,
)
from kvlib.keys import BlockKey, StoreKey

__all__ = ["make_record"]


def make_record(
    seed: int, *, size: int = 64, mac_key: bytes | None = None
) -> tuple[StoreKey, list[Buffer]]:
    """A record of two layers and about `size` payload bytes, all of it determined by `seed`.

    Returns:
        Its key, and the container in pieces.
    """

    def noise(label: str, n: int) -> bytes:
        out = b"".join(blake2b(f"{label} {seed} {i}".encode()).digest() for i in range(n // 64 + 1))
        return out[:n]

    key = StoreKey(BlockKey(noise("block", 32)), noise("storage", 32))
    quarter = max(8, size // 4)
    sections = [
        Section(kind, layer, quarter, (noise(f"{kind} {layer}", quarter),), SectionFlag.RAW)
        for layer in range(2)
        for kind in (SectionKind.KEYS, SectionKind.VALUES)
    ]
    parts = build_container(
        sections,
        spec_fingerprint=noise("spec", 32),
        storage_fingerprint=key.storage,
        start=0,
        num_tokens=64,
        dtype_code=1,
        codec="test@1",
        layers=[LayerShape(layer, 1, 8, 8) for layer in range(2)],
        keys=[key.block],
        mac_key=mac_key,
    )
    return key, parts
