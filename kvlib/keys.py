# SPDX-License-Identifier: Apache-2.0
"""Content addresses: what a block of KV is *of*, as 32 bytes.

A key is the proof of content: equal keys mean equal tokens, prefix, model and salt. It is the same
in every process and on every engine. Hash: BLAKE2b with a 32-byte digest, never cut, over a
canonical pre-image (`encode`) that is versioned, type-tagged and length-prefixed, so that two
different values never share a pre-image. The bytes are specified, with test vectors, in
docs/formats/block.md.

This module needs only the standard library, so that any process can compute keys.
"""

import sys
from array import array
from collections.abc import Mapping, Sequence
from enum import IntEnum
from hashlib import blake2b
from struct import pack
from typing import TYPE_CHECKING, Any, NamedTuple, NewType, TypeAlias

from kvlib.errors import ConfigError

if TYPE_CHECKING:
    import numpy
    import torch

TokenIds: TypeAlias = "Sequence[int] | numpy.ndarray[Any, Any] | torch.Tensor"

__all__ = [
    "BLOCK_TOKENS",
    "DIGEST_BYTES",
    "BlockKey",
    "Extra",
    "Namespace",
    "StoreKey",
    "block_keys",
    "digest",
    "encode",
    "root_key",
    "snapshot_key",
]

BLOCK_TOKENS = 64
"""Tokens in a block: the grain of keys and of hits on every engine."""

DIGEST_BYTES = 32

BlockKey = NewType("BlockKey", bytes)
"""32 bytes that name one block of one prefix under one model and salt."""

_PREAMBLE = b"kvlib\x00\x01"  # name, NUL, version of the pre-image encoding
_UINT32_MAX = 0xFFFFFFFF


class Namespace(IntEnum):
    """First field of every pre-image; keys of different kinds can never be equal."""

    PREFIX = 1
    """A block at its place in a prefix (`block_keys`)."""
    SEGMENT = 2
    """Reserved: text reused at any position."""
    SNAPSHOT = 3
    """An evicted cache of one exact token list (`snapshot_key`)."""
    STATE = 4
    """Reserved: recurrent state at one exact position."""
    SPEC = 5
    """`KVSpec.fingerprint()`."""
    STORAGE = 6
    """`storage_fingerprint()`."""
    MODEL = 7
    """Identity of a model's files."""


class StoreKey(NamedTuple):
    """What a tier's record is addressed by: the content, and the form it is stored in.

    `block` is the key of the record's first block, `storage` the storage fingerprint.
    """

    block: BlockKey
    storage: bytes

    def to_bytes(self) -> bytes:
        """The 64 bytes `block` + `storage`."""
        return self.block + self.storage


class Extra(NamedTuple):
    """Something besides token ids that KV depends on: an image, prompt embeddings, audio.

    `kind` names it, `digest` identifies its content (never a file name or a client's id), `offset`
    is its first token's index within the block (0 for extras of the whole request; negative where
    it began in an earlier block).
    """

    kind: str
    digest: bytes
    offset: int = 0


def encode(value: object) -> bytes:
    """Canonical bytes of `value`: type tag, length or count where it varies, data.

    Accepts None, bool, int (64-bit signed), float (finite), str, bytes, and tuples or lists of
    these. Two values of different type or content never encode alike.

    Raises:
        ConfigError: another type, an integer beyond 64 bits, or a float that is not finite.
    """
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"b" + (b"\x01" if value else b"\x00")
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise ConfigError(f"cannot hash the integer {value}: it does not fit in 64 bits")
        return b"i" + pack("<q", value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(f"cannot hash {value}: only finite floats have one canonical form")
        return b"f" + pack("<d", value + 0.0)  # + 0.0 turns -0.0 into 0.0
    if isinstance(value, str):
        data = _utf8(value)
        return b"s" + pack("<Q", len(data)) + data
    if isinstance(value, bytes | bytearray):
        return b"y" + pack("<Q", len(value)) + value
    if isinstance(value, list | tuple):
        return b"l" + pack("<Q", len(value)) + b"".join(encode(item) for item in value)
    raise ConfigError(
        f"cannot hash a {type(value).__name__}: expected None, bool, int, float, str, bytes or a "
        "tuple"
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ConfigError(f"cannot hash text with a lone surrogate: {exc}") from exc


def digest(namespace: Namespace, *fields: object) -> bytes:
    """BLAKE2b-256 of the preamble, the namespace byte and the canonical encoding of each field."""
    preimage = _PREAMBLE + bytes([namespace]) + b"".join(encode(field) for field in fields)
    return blake2b(preimage, digest_size=DIGEST_BYTES).digest()


def _token_bytes(tokens: "TokenIds") -> bytes:
    """Token ids, from a list, NumPy array or torch tensor, as little-endian uint32."""
    given: Any = tokens
    if hasattr(given, "detach"):  # torch, without importing it
        given = given.detach().cpu().numpy()
    if hasattr(given, "astype"):
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise ConfigError(
                f"token ids must be a flat list of integers, got {given.dtype} of shape "
                f"{given.shape}"
            )
        if given.size and (int(given.min()) < 0 or int(given.max()) > _UINT32_MAX):
            raise ConfigError(
                f"token ids must lie in 0..2**32-1, got {int(given.min())}..{int(given.max())}"
            )
        data: bytes = given.astype("<u4").tobytes()
        return data
    if isinstance(tokens, str | bytes | bytearray):  # an array would take these for machine words
        raise ConfigError(f"token ids must be a list of integers, got {type(tokens).__name__}")
    try:
        ids = array("I", given)
    except (TypeError, ValueError, OverflowError) as exc:
        raise ConfigError(f"token ids must be integers in 0..2**32-1: {exc}") from exc
    if sys.byteorder == "big":  # pragma: no cover
        ids.byteswap()
    return ids.tobytes()


def _extra_fields(extras: Sequence[Extra]) -> tuple[tuple[str, bytes, int], ...]:
    fields = []
    for given in extras:  # bytes(5) would be five zero bytes: one key for every such content
        extra: Any = given
        types = tuple(map(type, extra)) if isinstance(extra, tuple) else (type(extra),)
        if types not in ((str, bytes, int), (str, bytearray, int)):
            raise ConfigError(f"an extra is (str, bytes, int), got {[t.__name__ for t in types]}")
        kind, content, offset = extra
        fields.append((kind, bytes(content), offset))
    return tuple(sorted(fields))


def _salt_bytes(salt: str | bytes) -> bytes:
    given: Any = salt
    if isinstance(given, str):
        return _utf8(given)
    if not isinstance(given, bytes | bytearray):
        raise ConfigError(f"a salt is text or bytes, got {type(given).__name__}")
    return bytes(given)


def _check_digest(value: Any, what: str) -> bytes:
    if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
        raise ConfigError(f"{what} is {DIGEST_BYTES} bytes, got {value!r:.80}")
    return value


def _check_fingerprint(fingerprint: bytes) -> bytes:
    return _check_digest(fingerprint, "a fingerprint from KVSpec.fingerprint()")


def root_key(
    fingerprint: bytes, *, salt: str | bytes = "", extras: Sequence[Extra] = ()
) -> BlockKey:
    """The parent of every first block: H(PREFIX, "root", model fingerprint, salt, request extras).

    Args:
        fingerprint: `KVSpec.fingerprint()`, 32 bytes.
        salt: isolates tenants; different salts share no key.
        extras: what the whole request depends on besides its tokens; their order does not matter.
    """
    return BlockKey(
        digest(
            Namespace.PREFIX,
            "root",
            _check_fingerprint(fingerprint),
            _salt_bytes(salt),
            _extra_fields(extras),
        )
    )


def block_keys(
    fingerprint: bytes,
    tokens: "TokenIds",
    *,
    salt: str | bytes = "",
    extras: Sequence[Extra] = (),
    block_extras: Mapping[int, Sequence[Extra]] | None = None,
    parent: BlockKey | None = None,
) -> list[BlockKey]:
    """Keys of the full blocks of a prompt, each chained to the one before.

    key(i) = H(PREFIX, "block", key(i-1), the block's token ids as bytes, its extras), where key(-1)
    is `root_key`. A last block of fewer than `BLOCK_TOKENS` tokens has no key.

    Args:
        fingerprint: `KVSpec.fingerprint()`, 32 bytes.
        tokens: [T] integers in 0..2**32-1: a sequence, NumPy array or torch tensor.
        salt: see `root_key`.
        extras: see `root_key`.
        block_extras: extras of single blocks, by block index within `tokens` (0 is the first block
            given here, also after `parent`).
        parent: continue a chain after this key instead of starting at the root; `salt` and `extras`
            are in it already and must then be left out.

    Raises:
        ConfigError: token ids out of range, extras of a block that is not there, or `parent`
            together with `salt` or `extras`.
    """
    _check_fingerprint(fingerprint)
    if parent is None:
        parent = root_key(fingerprint, salt=salt, extras=extras)
    elif salt or extras:
        raise ConfigError(
            "a chain that continues from `parent` already holds its salt and extras; pass neither"
        )
    _check_digest(parent, "a parent key")
    data = _token_bytes(tokens)
    size = BLOCK_TOKENS * 4
    absent = [index for index in block_extras or () if not 0 <= index < -(-len(data) // size)]
    if absent:
        raise ConfigError(
            f"extras are given for blocks {absent} of {len(data) // 4} tokens: no key would hold "
            "them"
        )
    # The fields of digest(PREFIX, "block", parent, tokens, extras), with the constant bytes made
    # once.
    head = _PREAMBLE + bytes([Namespace.PREFIX]) + encode("block") + b"y" + pack("<Q", DIGEST_BYTES)
    middle = b"y" + pack("<Q", size)
    no_extras = encode(())
    view = memoryview(data)
    key: bytes = parent
    keys: list[BlockKey] = []
    for index in range(len(data) // size):
        tail = no_extras
        if block_extras and index in block_extras:
            tail = encode(_extra_fields(block_extras[index]))
        block = view[index * size : (index + 1) * size]
        key = blake2b(b"".join((head, key, middle, block, tail)), digest_size=DIGEST_BYTES).digest()
        keys.append(BlockKey(key))
    return keys


def snapshot_key(
    fingerprint: bytes,
    tokens: "TokenIds",
    method: str,
    *,
    artefacts: Sequence[str] = (),
    salt: str | bytes = "",
    extras: Sequence[Extra] = (),
) -> BlockKey:
    """Key of an evicted cache: its tokens, method string with defaults, and artefact ids.

    A snapshot is restored whole and never answers a prefix look-up. Extras of single tokens are
    given with their index in `tokens` as offset.
    """
    if isinstance(artefacts, str):
        raise ConfigError(f"artefacts are a list of ids, got the text {artefacts!r:.80}")
    return BlockKey(
        digest(
            Namespace.SNAPSHOT,
            _check_fingerprint(fingerprint),
            _salt_bytes(salt),
            _extra_fields(extras),
            _token_bytes(tokens),
            method,
            tuple(artefacts),
        )
    )
