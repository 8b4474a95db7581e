# SPDX-License-Identifier: Apache-2.0
"""KVLC: the one binary form of a block. docs/formats/container.md is its specification.

    header   fixed fields, tagged fields (TLV), section table, xxh3-64, optional MAC       <= 64 KiB
    padding  zeros up to the alignment
    section  one run of bytes each, tiling the rest of the container at that alignment

The header says everything a reader needs before it touches a section, and every size in it is
checked against the bytes that are really there before anything is allocated. Each stored byte is
under a checksum or must be zero. This module moves bytes only; it needs neither torch nor NumPy.
"""

from collections.abc import Sequence
from hashlib import blake2b

import xxhash

from kvlib.codecs import header as front
from kvlib.codecs.header import (
    MAC_BYTES,
    MAGIC,
    MAX_DECODED_BYTES,
    MAX_HEADER_BYTES,
    MAX_POSITION,
    NO_FLAG,
    VERSION,
    Buffer,
    Flag,
    Header,
    LayerShape,
    Section,
    SectionFlag,
    SectionInfo,
    SectionKind,
    align,
    check_mac_key,
    header_size,
    parse_header,
    section_digest,
)
from kvlib.errors import ConfigError, CorruptDataError, UnsupportedInputError
from kvlib.keys import DIGEST_BYTES, BlockKey

__all__ = [
    "MAGIC",
    "MAX_DECODED_BYTES",
    "MAX_HEADER_BYTES",
    "VERSION",
    "Buffer",
    "Container",
    "Flag",
    "Header",
    "LayerShape",
    "Section",
    "SectionFlag",
    "SectionInfo",
    "SectionKind",
    "build_container",
    "header_size",
    "parse_header",
    "verify_padding",
]


def _tlv(tag: int, value: bytes) -> bytes:
    return front.TLV.pack(tag, len(value)) + value


def build_container(
    sections: Sequence[Section],
    *,
    spec_fingerprint: bytes,
    storage_fingerprint: bytes,
    start: int,
    num_tokens: int,
    dtype_code: int,
    codec: str,
    layers: Sequence[LayerShape],
    keys: Sequence[BlockKey] = (),
    flags: Flag = NO_FLAG,
    fidelity: str = "exact",
    head_range: tuple[int, int] | None = None,
    profile: str = "",
    writer: str = "",
    alignment: int = 8,
    mac_key: bytes | None = None,
) -> list[Buffer]:
    """Lay sections out as a container; returns its pieces in order, nothing joined or copied.

    Args:
        sections: in the order they shall lie in.
        spec_fingerprint: 32 bytes, `KVSpec.fingerprint()`.
        storage_fingerprint: 32 bytes, `kvlib.spec.storage_fingerprint`.
        start: index of the first token.
        num_tokens: tokens the block stands for.
        dtype_code: `kvlib.spec.DTYPES[...].code`.
        codec: canonical codec string.
        layers: shapes, ascending in layer_idx.
        keys: keys of the blocks inside, in order; the reader's proof of what it got.
        flags: see `Flag`; MAC is set here.
        fidelity: lowest fidelity among the KV this was computed from.
        head_range: KV heads [first, last) inside, None for all.
        profile: id of the calibration artefact needed to decode.
        writer: who wrote it, for people.
        alignment: power of two in 8..65536; sections start at multiples of it.
        mac_key: 16 to 64 secret bytes: digests become keyed, and readers without the key refuse.

    Raises:
        ConfigError: a bad alignment, key, fingerprint or token range.
        UnsupportedInputError: the header would exceed `MAX_HEADER_BYTES`.
    """
    if alignment & (alignment - 1) or not 8 <= alignment <= 1 << 16:
        raise ConfigError(f"alignment must be a power of two in 8..65536, got {alignment}")
    check_mac_key(mac_key)
    if {len(spec_fingerprint), len(storage_fingerprint), *map(len, keys)} != {DIGEST_BYTES}:
        raise ConfigError(f"fingerprints and block keys have {DIGEST_BYTES} bytes each")
    if start < 0 or not 0 <= num_tokens <= MAX_POSITION - start:
        raise ConfigError(f"tokens {start} + {num_tokens} leave 0..2**31: positions are int32")
    if mac_key is not None:
        flags |= Flag.MAC
    tlv = _tlv(front.TAG_CODEC, codec.encode()) + _tlv(front.TAG_KEYS, b"".join(keys))
    tlv += _tlv(
        front.TAG_LAYERS,
        b"".join(
            front.LAYER.pack(
                s.layer_idx, s.num_kv_heads, s.k_head_dim, s.v_head_dim, s.channels, s.kind, 0
            )
            for s in layers
        ),
    )
    if profile:
        tlv += _tlv(front.TAG_PROFILE, profile.encode())
    if fidelity != "exact":
        tlv += _tlv(front.TAG_FIDELITY, fidelity.encode())
    if head_range is not None:
        tlv += _tlv(front.TAG_HEADS, front.HEADS.pack(*head_range))
    if writer:
        tlv += _tlv(front.TAG_WRITER, writer.encode())
    trailer = 8 + (MAC_BYTES if mac_key is not None else 0)
    header_bytes = front.FIXED.size + len(tlv) + front.SECTION.size * len(sections) + trailer
    if header_bytes > MAX_HEADER_BYTES:
        raise UnsupportedInputError(
            f"a header of {header_bytes} bytes for {len(sections)} sections exceeds "
            f"{MAX_HEADER_BYTES}; encode fewer layers at once"
        )
    table = bytearray()
    body: list[Buffer] = []
    end = header_bytes
    for section in sections:
        offset = align(end, alignment)
        if offset > end:
            body.append(bytes(offset - end))
        body.extend(section.parts)
        end = offset + section.stored_bytes
        table += front.SECTION.pack(
            section.kind,
            section.layer_idx,
            section.flags,
            offset,
            section.stored_bytes,
            section.raw_bytes,
            section_digest(section.parts, mac_key),
        )
    total_bytes = align(end, alignment)
    if total_bytes > end:
        body.append(bytes(total_bytes - end))
    fixed = front.FIXED.pack(
        MAGIC,
        VERSION,
        flags,
        header_bytes,
        total_bytes,
        spec_fingerprint,
        storage_fingerprint,
        start,
        num_tokens,
        len(tlv),
        len(sections),
        len(layers),
        dtype_code,
        alignment.bit_length() - 1,
    )
    header = fixed + tlv + bytes(table)
    header += xxhash.xxh3_64_intdigest(header).to_bytes(8, "little")
    if mac_key is not None:
        header += blake2b(
            header, digest_size=MAC_BYTES, key=mac_key, person=front.PERSON_HEADER
        ).digest()
    return [header, *body]


class Container:
    """A whole container in memory; sections are verified when they are first asked for.

    Args:
        data: exactly one container.
        mac_key: see `parse_header`.
        verified: the bytes were verified already (by a tier that just read them): check the header
            only.
        max_decoded_bytes: see `parse_header`.

    Raises:
        CorruptDataError, IncompatibleDataError: see `parse_header`.
    """

    def __init__(
        self,
        data: Buffer,
        *,
        mac_key: bytes | None = None,
        verified: bool = False,
        max_decoded_bytes: int = MAX_DECODED_BYTES,
    ) -> None:
        self.view = memoryview(data).cast("B").toreadonly()
        self.header = parse_header(self.view, mac_key=mac_key, max_decoded_bytes=max_decoded_bytes)
        if self.header.total_bytes != self.view.nbytes:
            raise CorruptDataError(
                f"the container is {self.header.total_bytes} bytes long, {self.view.nbytes} are "
                "there"
            )
        self._sections = {(s.kind, s.layer_idx): s for s in self.header.sections}
        self._verified = set(self._sections) if verified else set()

    def find(self, kind: SectionKind, layer_idx: int) -> SectionInfo | None:
        """The table row of a section, None if there is none."""
        return self._sections.get((kind, layer_idx))

    def read(self, kind: SectionKind, layer_idx: int) -> tuple[SectionInfo, memoryview]:
        """A section's row and its verified bytes (a read-only view).

        Raises:
            CorruptDataError: there is no such section, or its bytes do not match.
        """
        info = self.find(kind, layer_idx)
        if info is None:
            raise CorruptDataError(f"layer {layer_idx} has no {kind.name.lower()} section")
        data = self.view[info.offset : info.offset + info.stored_bytes]
        if (kind, layer_idx) not in self._verified:
            self.header.verify(info, data)
            self._verified.add((kind, layer_idx))
        return info, data

    def verify(self) -> None:
        """Check every section, and that the padding between them is zero.

        Raises:
            CorruptDataError: naming the first that fails.
        """
        verify_padding(self.header, self.view)
        for kind, layer_idx in self._sections:
            self.read(kind, layer_idx)


def verify_padding(header: Header, view: memoryview) -> None:
    """Check that the bytes between sections are zero: no byte goes unaccounted for."""
    end = header.header_bytes
    for edge, size in [
        *((s.offset, s.stored_bytes) for s in header.sections),
        (header.total_bytes, 0),
    ]:
        if edge != end and view[end:edge] != bytes(edge - end):
            raise CorruptDataError(f"padding before byte {edge} is not zero")
        end = edge + size
