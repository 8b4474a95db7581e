# SPDX-License-Identifier: Apache-2.0
"""The front of a KVLC container: what is in it, and how it is read and checked.

docs/formats/container.md is the specification. Reading is bounded in work and memory by 64 KiB,
whatever the bytes claim; every size is checked against what is really there.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from hashlib import blake2b
from struct import Struct, error
from typing import NamedTuple

import xxhash

from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError
from kvlib.keys import BLOCK_TOKENS, DIGEST_BYTES, BlockKey

__all__ = [
    "MAGIC",
    "MAX_DECODED_BYTES",
    "MAX_HEADER_BYTES",
    "VERSION",
    "Buffer",
    "Flag",
    "Header",
    "LayerShape",
    "Section",
    "SectionFlag",
    "SectionInfo",
    "SectionKind",
    "header_size",
    "parse_header",
]

Buffer = bytes | bytearray | memoryview

MAGIC = b"\x89KVLC\r\n\x1a"
"""A high bit, CR LF and Ctrl-Z: a transfer in text mode or cut short is seen at once."""

VERSION = 1
MAX_HEADER_BYTES = 1 << 16
MAC_BYTES = 16
PERSON_HEADER = b"KVLC header"  # BLAKE2b personalization: one MAC can never pass for the other
_PERSON_SECTION = b"KVLC section"
MAX_DECODED_BYTES = 4 << 30
"""Default limit on what a container may claim to decode to."""
WHOLE_BLOCK = 0xFFFF
"""The layer_idx of CODEC sections that belong to no single layer."""
MAX_POSITION = 1 << 31
"""Positions are int32: no block stops beyond this."""

FIXED = Struct("<8sHHIQ32s32sQIIIHBB")  # 112 bytes
TLV = Struct("<HI")
LAYER = Struct(
    "<HHHHHBB"
)  # layer, heads, key width, value width, kept channels (0 = all), kind, zero
HEADS = Struct("<HH")
SECTION = Struct("<HHIQQQ16s")  # 48 bytes

TAG_CODEC = 0x8001
TAG_KEYS = 0x8002
TAG_LAYERS = 0x8003
TAG_PROFILE = 0x8004
TAG_FIDELITY = 0x8005
TAG_HEADS = 0x8006
TAG_WRITER = 0x0001
_CRITICAL = 0x8000


class Flag(IntFlag):
    """Header flags; a reader refuses bits it does not know."""

    LOSSLESS = 1
    ROPE_REMOVED = 2
    MIXES_HEADS = 4
    PROFILE_NEEDED = 8
    POSITIONS_EXPLICIT = 16
    MAC = 32


class SectionKind(IntEnum):
    """What a section holds."""

    KEYS = 1
    VALUES = 2
    POSITIONS = 3
    """int32 of every entry, row after row; present only when positions are not a range."""
    LOG_WEIGHT = 4
    """float32 of every entry."""
    CHANNELS = 5
    """uint16 [Hkv, C]."""
    ROW_LENGTHS = 6
    """uint32 of every head; present only when heads differ in length."""
    CODEC = 7
    """Side information that only the codec reads."""
    STATE = 8
    """What an eviction policy remembers (`kvlib.codecs.state`); of the whole block."""


_OF_WHOLE_BLOCK = (SectionKind.CODEC, SectionKind.STATE)


class SectionFlag(IntFlag):
    """Flags of one section."""

    RAW = 1
    """The codec stepped aside: the section holds the tensor's own bytes."""


_STATE, _CODEC, _RAW = int(SectionKind.STATE), int(SectionKind.CODEC), int(SectionFlag.RAW)
_KINDS = {kind.value: kind for kind in SectionKind}  # calling an enum costs ten times as much
_SECTION_FLAGS = {flags: SectionFlag(flags) for flags in (0, SectionFlag.RAW.value)}
_NO_MORE = bytes(8)  # what a digest has after a checksum
NO_FLAG = Flag(0)
NO_SECTION_FLAG = SectionFlag(0)


@dataclass(frozen=True, slots=True)
class Section:
    """A section to be written: its bytes in pieces, and the size it decodes to."""

    kind: SectionKind
    layer_idx: int
    raw_bytes: int
    parts: tuple[Buffer, ...]
    flags: SectionFlag = NO_SECTION_FLAG

    @property
    def stored_bytes(self) -> int:
        """Bytes it takes in the container."""
        return sum(memoryview(part).nbytes for part in self.parts)


class SectionInfo(NamedTuple):
    """A row of the section table; a record may have hundreds, and tuples are made quickly."""

    kind: SectionKind
    layer_idx: int
    flags: SectionFlag
    offset: int
    stored_bytes: int
    raw_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Shape of one layer's rows.

    `channels` is the number of key channels kept, 0 when all `k_head_dim` are; `kind` is 1 full, 2
    sliding, 3 mla.
    """

    layer_idx: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    channels: int = 0
    kind: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The parsed front of a container."""

    flags: Flag
    header_bytes: int
    total_bytes: int
    spec_fingerprint: bytes
    storage_fingerprint: bytes
    start: int
    num_tokens: int
    dtype_code: int
    alignment: int
    codec: str
    keys: tuple[BlockKey, ...]
    layers: tuple[LayerShape, ...]
    sections: tuple[SectionInfo, ...]
    fidelity: str = "exact"
    head_range: tuple[int, int] | None = None
    profile: str = ""
    writer: str = ""
    mac_key: bytes | None = field(default=None, repr=False)

    def verify(self, info: SectionInfo, data: memoryview) -> None:
        """Check a section's bytes against its digest.

        Raises:
            CorruptDataError: naming the section.
        """
        if data.nbytes != info.stored_bytes or not hmac.compare_digest(
            section_digest((data,), self.mac_key), info.digest
        ):
            raise CorruptDataError(
                f"section {info.kind.name.lower()} of layer {info.layer_idx} does not match its "
                "checksum"
            )


def section_digest(parts: Sequence[Buffer], mac_key: bytes | None) -> bytes:
    """16 bytes: xxh3-64 (little-endian) and zeros, or a keyed BLAKE2b."""
    if mac_key is not None:
        mac = blake2b(digest_size=MAC_BYTES, key=mac_key, person=_PERSON_SECTION)
        for part in parts:
            mac.update(part)
        return mac.digest()
    if len(parts) == 1:  # a digest is big-endian
        return xxhash.xxh3_64_digest(parts[0])[::-1] + _NO_MORE
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part)
    return state.digest()[::-1] + _NO_MORE


def align(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def check_mac_key(mac_key: bytes | None) -> None:
    if mac_key is not None and not 16 <= len(mac_key) <= 64:
        raise ConfigError(f"a MAC key has 16 to 64 bytes, got {len(mac_key)}")


def header_size(front: Buffer) -> int:
    """Bytes of the header, from the first 16 bytes of a container.

    Raises:
        CorruptDataError: too short, not a container, or an impossible size.
        IncompatibleDataError: another version.
    """
    front = bytes(memoryview(front)[:16])
    if len(front) < 16 or front[:8] != MAGIC:
        raise CorruptDataError(
            f"not a KVLC container: it begins {front[:8].hex(' ') or 'with nothing'}"
        )
    version = int.from_bytes(front[8:10], "little")
    size = int.from_bytes(front[12:16], "little")
    if version != VERSION:
        raise IncompatibleDataError(
            f"container version {version}; this kvlib reads version {VERSION}"
        )
    if not FIXED.size + 8 <= size <= MAX_HEADER_BYTES:
        raise CorruptDataError(
            f"header of {size} bytes; expected {FIXED.size + 8} to {MAX_HEADER_BYTES}"
        )
    return size


def parse_header(
    data: Buffer, *, mac_key: bytes | None = None, max_decoded_bytes: int = MAX_DECODED_BYTES
) -> Header:
    """Read and check the header at the front of `data`, in work and memory bounded by 64 KiB.

    Args:
        data: at least the header; may be the whole container.
        mac_key: when given, a container without a valid MAC under this key is refused.
        max_decoded_bytes: refuse a container that claims to decode to more.

    Raises:
        CorruptDataError: truncated, flipped, or inconsistent.
        IncompatibleDataError: another version, unknown flags or critical tags, or a MAC that this
            reader has no key for (or the other way round).
    """
    check_mac_key(mac_key)
    view = memoryview(data).cast("B")
    size = header_size(view)
    if size > view.nbytes:
        raise CorruptDataError(
            f"header of {size} bytes in {view.nbytes} bytes of data: it is truncated"
        )
    head = bytes(view[:size])
    (
        _,
        _,
        flag_bits,
        _,
        total_bytes,
        spec_fingerprint,
        storage_fingerprint,
        start,
        num_tokens,
        tlv_bytes,
        num_sections,
        num_layers,
        dtype_code,
        alignment_log2,
    ) = FIXED.unpack_from(head)
    has_mac = bool(flag_bits & Flag.MAC)
    trailer = 8 + (MAC_BYTES if has_mac else 0)
    body = size - trailer
    if (
        body < FIXED.size
        or xxhash.xxh3_64_intdigest(head[:body]).to_bytes(8, "little") != head[body : body + 8]
    ):
        raise CorruptDataError("the header does not match its checksum")
    if has_mac != (mac_key is not None):
        raise IncompatibleDataError(
            "the container is authenticated and no key was given"
            if has_mac
            else "the container carries no MAC, but one is required"
        )
    if mac_key is not None:
        mac = blake2b(
            head[: body + 8], digest_size=MAC_BYTES, key=mac_key, person=PERSON_HEADER
        ).digest()
        if not hmac.compare_digest(mac, head[body + 8 :]):
            raise CorruptDataError("the header's MAC does not verify under the given key")
    unknown = flag_bits & ~int(sum(Flag))
    if unknown:
        raise IncompatibleDataError(f"the header has unknown flags {unknown:#x}")
    if start + num_tokens > MAX_POSITION:
        raise CorruptDataError(f"tokens {start} + {num_tokens} exceed 2**31: positions are int32")
    if not 3 <= alignment_log2 <= 16:
        raise CorruptDataError(f"alignment 2**{alignment_log2}; expected 2**3 to 2**16")
    if FIXED.size + tlv_bytes + num_sections * SECTION.size != body:
        raise CorruptDataError(
            f"{tlv_bytes} bytes of tagged fields and {num_sections} sections do not fill a header "
            f"of {size} bytes"
        )
    tags = _parse_tlv(head[FIXED.size : FIXED.size + tlv_bytes])
    layers = _parse_layers(tags[TAG_LAYERS], num_layers)
    keys = tags[TAG_KEYS]
    if len(keys) % DIGEST_BYTES:
        raise CorruptDataError(
            f"{len(keys)} bytes of block keys; expected a multiple of {DIGEST_BYTES}"
        )
    num_keys = len(keys) // DIGEST_BYTES
    if num_keys > 1 and num_tokens != num_keys * BLOCK_TOKENS:
        raise CorruptDataError(f"{num_keys} block keys for {num_tokens} tokens")
    alignment = 1 << alignment_log2
    sections = _parse_sections(
        head[FIXED.size + tlv_bytes : body], size, total_bytes, alignment, max_decoded_bytes
    )
    known_layers = {layer.layer_idx for layer in layers}
    stray = {s.layer_idx for s in sections if s.layer_idx != WHOLE_BLOCK} - known_layers
    if stray:
        raise CorruptDataError(
            f"sections of layers {sorted(stray)} that the header does not describe"
        )
    return Header(
        flags=Flag(flag_bits),
        header_bytes=size,
        total_bytes=total_bytes,
        spec_fingerprint=spec_fingerprint,
        storage_fingerprint=storage_fingerprint,
        start=start,
        num_tokens=num_tokens,
        dtype_code=dtype_code,
        alignment=alignment,
        codec=_text(tags[TAG_CODEC]),
        keys=tuple(BlockKey(keys[i : i + DIGEST_BYTES]) for i in range(0, len(keys), DIGEST_BYTES)),
        layers=layers,
        sections=sections,
        fidelity=_text(tags.get(TAG_FIDELITY, b"exact")),
        head_range=_parse_heads(tags.get(TAG_HEADS)),
        profile=_text(tags.get(TAG_PROFILE, b"")),
        writer=_text(tags.get(TAG_WRITER, b"")),
        mac_key=mac_key,
    )


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CorruptDataError(f"a text field of the header is not UTF-8: {exc}") from exc


def _parse_heads(data: bytes | None) -> tuple[int, int] | None:
    if data is None:
        return None
    if len(data) != HEADS.size:
        raise CorruptDataError(f"a head range of {len(data)} bytes; expected {HEADS.size}")
    first, last = HEADS.unpack(data)
    if first >= last:
        raise CorruptDataError(f"the head range {first}..{last} is empty")
    return first, last


def _parse_tlv(data: bytes) -> dict[int, bytes]:
    known = {
        TAG_CODEC,
        TAG_KEYS,
        TAG_LAYERS,
        TAG_PROFILE,
        TAG_FIDELITY,
        TAG_HEADS,
        TAG_WRITER,
    }
    tags: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        try:
            tag, length = TLV.unpack_from(data, at)
        except error as exc:
            raise CorruptDataError("a tagged field of the header is cut off") from exc
        at += TLV.size
        if length > len(data) - at:
            raise CorruptDataError(f"tag {tag:#06x} claims {length} bytes of {len(data) - at} left")
        if tag in tags:
            raise CorruptDataError(f"tag {tag:#06x} occurs twice")
        if tag not in known and tag & _CRITICAL:
            raise IncompatibleDataError(f"the header has the unknown critical tag {tag:#06x}")
        tags[tag] = data[at : at + length]
        at += length
    missing = {TAG_CODEC, TAG_KEYS, TAG_LAYERS} - set(tags)
    if missing:
        raise CorruptDataError(
            f"the header lacks tags {', '.join(f'{tag:#06x}' for tag in sorted(missing))}"
        )
    return tags


def _parse_layers(data: bytes, num_layers: int) -> tuple[LayerShape, ...]:
    if len(data) != num_layers * LAYER.size:
        raise CorruptDataError(
            f"{len(data)} bytes describe {num_layers} layers; expected {num_layers * LAYER.size}"
        )
    layers = []
    last = -1
    for layer_idx, heads, k_dim, v_dim, channels, kind, zero in LAYER.iter_unpack(data):
        if kind not in (1, 2, 3):
            raise IncompatibleDataError(f"layer {layer_idx} is of the unknown kind {kind}")
        if layer_idx <= last or not heads or not k_dim or channels > k_dim or zero:
            raise CorruptDataError(f"layer {layer_idx} is out of order or has an impossible shape")
        last = layer_idx
        layers.append(LayerShape(layer_idx, heads, k_dim, v_dim, channels, kind))
    return tuple(layers)


def _parse_sections(
    data: bytes, header_bytes: int, total_bytes: int, alignment: int, max_decoded_bytes: int
) -> tuple[SectionInfo, ...]:
    sections = []
    seen: set[tuple[int, int]] = set()
    end = header_bytes
    decoded = 0
    for kind, layer_idx, flags, offset, stored, raw, digest in SECTION.iter_unpack(data):
        if offset != align(end, alignment) or stored > total_bytes - offset:
            raise CorruptDataError(
                f"section at {offset} of {stored} bytes: sections must tile the container in order"
            )
        whole = layer_idx == WHOLE_BLOCK
        if (whole and kind not in _OF_WHOLE_BLOCK) or (not whole and kind == _STATE):
            raise CorruptDataError(
                f"a section of kind {kind} cannot belong to "
                f"{'the whole block' if whole else f'layer {layer_idx}'}"
            )
        if kind == _STATE and (stored != raw or flags != _RAW):
            raise CorruptDataError("policy state is stored as it is, with the flag RAW")
        if kind not in _KINDS or flags not in _SECTION_FLAGS:
            raise IncompatibleDataError(f"section of unknown kind {kind} or flags {flags:#x}")
        if (kind, layer_idx) in seen:
            raise CorruptDataError(
                f"layer {layer_idx} has two {SectionKind(kind).name.lower()} sections"
            )
        if stored > raw and kind != _CODEC:
            raise CorruptDataError(
                f"layer {layer_idx}: {stored} bytes stored for {raw} decoded; raw is never exceeded"
            )
        seen.add((kind, layer_idx))
        end = offset + stored
        decoded += raw
        sections.append(
            SectionInfo(_KINDS[kind], layer_idx, _SECTION_FLAGS[flags], offset, stored, raw, digest)
        )
    if align(end, alignment) != total_bytes:
        raise CorruptDataError(f"sections end at {end} in a container of {total_bytes} bytes")
    if decoded > max_decoded_bytes:
        raise CorruptDataError(
            f"the container claims to decode to {decoded} bytes; the limit is {max_decoded_bytes}"
        )
    return tuple(sections)
