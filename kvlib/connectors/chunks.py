# SPDX-License-Identifier: Apache-2.0
"""KV that only an engine can read, kept in kvlib's tiers.

An engine with an offloading framework of its own hands out *chunks*: rows of bytes in the order of
its own pages, under names that it made. Nothing here knows what is in them. A chunk is stored as
what its bytes are, a matrix of numbers of the cache's dtype, in a container like any other record:
checksums, key and identity are checked before a byte of it is given back.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec, MatrixCodec, build_codec, decode_block, describe_codec, encode_block
from kvlib.codecs.base import codec_fingerprint
from kvlib.codecs.container import Buffer, Container
from kvlib.errors import CodecError, ConfigError, IncompatibleDataError, ShapeError
from kvlib.keys import BlockKey, Namespace, StoreKey, digest
from kvlib.spec import DTYPES, KVSpec, LayerSpec
from kvlib.store.cost import CostModel
from kvlib.store.rules import Rules
from kvlib.store.stack import TierStack
from kvlib.store.tier import Tier, TierStats

__all__ = ["ChunkStore", "Row", "chunk_codec"]

Row = NDArray[np.uint8]
"""The bytes of a chunk, [nbytes], in the engine's own memory."""

_MAX_WIDTH = 128
_OPAQUE = "float8_e4m3fn"  # one byte a number: what no other dtype fits is bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoCodec(MatrixCodec):
    """The bytes as they are."""

    name: ClassVar[str] = "none"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    lossless: ClassVar[bool] = True

    def encode_matrix(self, x: torch.Tensor) -> list[Buffer] | None:
        """Step aside."""
        return None


def chunk_codec(text: str) -> Codec:
    """The codec of chunks: ``none``, or one that gives every bit back.

    Raises:
        ConfigError: it would change them.
        UnknownPluginError: there is no such codec.
    """
    if text == _NoCodec.name:
        return _NoCodec()
    codec = build_codec(text)
    if not codec.lossless:
        raise ConfigError(
            f"codec={text!r} loses something, and what is in a chunk is the engine's own affair: "
            "use exact or none, or KvlibConnector, which knows keys from values"
        )
    return codec


class ChunkStore:
    """Chunks of one engine's configuration.

    Args:
        tiers: the fastest first; closed with this store.
        identity: all that makes the bytes of two engines differ for the same name: the model, the
            layout of its pages, the engine's version. Of another identity nothing is found.
        dtype: of the numbers in a chunk, by torch's name; any other text stands for bytes.
        nbytes: of a chunk.
        codec: see `chunk_codec`.
        rules: on what terms chunks are kept.

    Raises:
        ConfigError: see `chunk_codec`.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        identity: str,
        dtype: str,
        nbytes: int,
        codec: str,
        rules: Rules,
    ) -> None:
        self._tiers = tuple(tiers)
        self._codec = chunk_codec(codec)
        self._rules = rules
        self._stack = TierStack(tiers, CostModel(), rules)
        known = DTYPES.get(dtype, DTYPES[_OPAQUE])
        dtype = known.name if nbytes % known.itemsize == 0 else _OPAQUE
        self._dtype: torch.dtype = getattr(torch, dtype)
        # Wide enough that a channel's numbers stand in one column, as codecs like it.
        width = gcd(nbytes // DTYPES[dtype].itemsize, _MAX_WIDTH)
        self._shape = (1, nbytes // DTYPES[dtype].itemsize // width, width)
        layer = LayerSpec(num_kv_heads=1, k_head_dim=width, v_head_dim=0)
        self._spec = KVSpec(model_id=identity, layers=(layer,), dtype=dtype)
        self._lock = threading.Lock()
        self.corrupt = 0

    @property
    def _storage(self) -> bytes:
        return codec_fingerprint(self._spec, self._codec)

    def forget(self, epoch: str) -> None:
        """What is stored so far belongs to something else from now on."""
        self._spec = replace(self._spec, adapter=epoch)

    def key(self, name: bytes) -> StoreKey:
        """What a tier calls a chunk."""
        return self._key(name, self._spec, self._storage)

    @staticmethod
    def _key(name: bytes, spec: KVSpec, storage: bytes) -> StoreKey:
        block = digest(Namespace.PREFIX, "engine chunk", spec.fingerprint(), name)
        return StoreKey(BlockKey(block), storage)

    def contains(self, names: Sequence[bytes]) -> list[bool]:
        """Whether each chunk seems to be there; see `Tier.contains_many`."""
        spec, storage = self._spec, self._storage
        keys = [self._key(name, spec, storage) for name in names]
        found = [tier.contains_many(keys) for tier in self._tiers]
        return [any(here) for here in zip(*found, strict=True)]

    def put(self, name: bytes, row: Row) -> bool:
        """Store a chunk, whose bytes must not change meanwhile; whether it is held now."""
        key = self.key(name)
        missing = [tier for tier in self._tiers if not tier.contains_many([key])[0]]
        if not missing:
            return True
        block = KVBlock.dense(self._spec, [self._tensors(row)])
        parts = encode_block(block, self._codec, keys=(key.block,))
        terms = self._rules.terms()
        held = [tier.put(key, parts, terms) for tier in reversed(missing)]
        return any(held) or len(missing) < len(self._tiers)

    def read(self, name: bytes, deadline: float | None = None) -> Container | None:
        """The record of a chunk, verified; None if there is none, or it comes too late.

        Args:
            name: of the chunk.
            deadline: `time.monotonic()` after which it is not wanted.
        """
        key = self.key(name)
        record, _ = self._stack.read(key, deadline)
        return None if record is None else self._open(key, record)

    def _open(self, key: StoreKey, record: memoryview) -> Container | None:
        try:
            return Container(record, verified=True)
        except CodecError:
            self._spoilt(key)
            return None

    def unpack(self, name: bytes, record: Container, row: Row) -> bool:
        """Put the bytes of a chunk into `row`; whether they are right, else `row` is undefined."""
        key = self.key(name)
        try:
            decode_block(record, self._spec, codec_for=self._codec_for, out={0: self._tensors(row)})
        except (CodecError, ShapeError):
            self._spoilt(key)
            return False
        return True

    def _codec_for(self, canonical: str) -> Codec:
        if canonical != describe_codec(self._codec):
            raise IncompatibleDataError(
                f"a chunk of codec {canonical!r}, expected {describe_codec(self._codec)!r}"
            )
        return self._codec

    def _tensors(self, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [1, N, W], which share the memory of `row`, and no values."""
        keys = torch.from_numpy(row).view(self._dtype).view(self._shape)
        return keys, keys.new_empty((*self._shape[:2], 0))

    def _spoilt(self, key: StoreKey) -> None:
        with self._lock:
            self.corrupt += 1
        for tier in self._tiers:
            tier.delete(key)

    def touch(self, names: Sequence[bytes]) -> None:
        """These were used, from first to last: what comes first in a prompt goes last."""
        keys = [self.key(name) for name in reversed(names)]
        for tier in self._tiers:
            tier.touch(keys)

    def stats(self) -> dict[str, TierStats]:
        """Of every tier, by name."""
        return {tier.name: tier.stats() for tier in self._tiers}

    def close(self) -> None:
        """Close the tiers."""
        for tier in self._tiers:
            tier.close()

    def __enter__(self) -> "ChunkStore":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()
