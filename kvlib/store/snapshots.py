# SPDX-License-Identifier: Apache-2.0
"""Snapshots as records: one container for a whole evicted cache, under a key of its own kind.

The key holds all tokens, the method with its parameters and the salt (`kvlib.keys.snapshot_key`),
so a snapshot never answers a look-up of prefixes or of another method.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvlib.codecs import Codec, build_codec
from kvlib.codecs.base import codec_fingerprint
from kvlib.codecs.container import Buffer, Container, SectionKind
from kvlib.codecs.header import WHOLE_BLOCK
from kvlib.codecs.pack import encode_block
from kvlib.codecs.state import decode_state, encode_state
from kvlib.codecs.unpack import decode_block
from kvlib.errors import CapacityError, CodecError, ConfigError, CorruptDataError, ShapeError
from kvlib.keys import BlockKey, StoreKey, TokenIds, snapshot_key
from kvlib.snapshots import Snapshot
from kvlib.spec import KVSpec

if TYPE_CHECKING:
    from kvlib.store.heads import HeadRange
    from kvlib.store.stack import TierStack

__all__ = ["SnapshotRecords", "decode_snapshot", "encode_snapshot", "snapshot_record_key"]


def snapshot_record_key(spec: KVSpec, key: BlockKey, codec: Codec) -> StoreKey:
    """What names the record of a snapshot."""
    return StoreKey(key, codec_fingerprint(spec, codec))


def encode_snapshot(
    snapshot: Snapshot, codec: Codec, *, keys: Sequence[BlockKey] = (), mac_key: bytes | None = None
) -> list[Buffer]:
    """A container with all layers and the policy's state; see `encode_block`."""
    return encode_block(
        snapshot.block, codec, keys=keys, mac_key=mac_key, state=encode_state(snapshot.state)
    )


def decode_snapshot(
    data: Buffer | Container, spec: KVSpec, method: str, *, mac_key: bytes | None = None
) -> Snapshot:
    """The snapshot in a container, in CPU tensors that alias nothing.

    Raises:
        CorruptDataError: damaged bytes, no STATE section, or missing layers.
        IncompatibleDataError: another model, dtype, version or codec.
    """
    container = data if isinstance(data, Container) else Container(data, mac_key=mac_key)
    block = decode_block(container, spec)
    if len(block.layers) != spec.num_layers or block.start:
        raise CorruptDataError(
            f"a snapshot has all {spec.num_layers} layers and begins at token 0; this record has "
            f"{len(block.layers)} and begins at {block.start}"
        )
    _, state = container.read(SectionKind.STATE, WHOLE_BLOCK)
    return Snapshot(method=method, block=block, state=decode_state(state))


class SnapshotRecords:
    """The part of a `KVStore` that keeps snapshots."""

    if TYPE_CHECKING:  # what the store has
        codec: Codec
        salt: str | bytes
        head_range: HeadRange
        _mac_key: bytes | None
        _stack: TierStack

        def _check_open(self) -> None: ...
        def _spoilt(self, key: StoreKey) -> None: ...

    def _check_snapshots(self) -> None:
        self._check_open()
        if self.head_range is not None:
            raise ConfigError(
                f"this store keeps the KV heads {self.head_range} of a tensor-parallel rank; "
                "snapshots hold all heads: keep them in a store without head_range"
            )

    def put_snapshot(
        self, tokens: "TokenIds", snapshot: Snapshot, *, codec: str | None = None
    ) -> int | None:
        """Store one sequence of an evicted cache under its tokens and method.

        Args:
            tokens: [T]: every token that the snapshot stands for.
            snapshot: from `KVCache.to_snapshot`.
            codec: method string; the store's own codec by default.

        Returns:
            Bytes of the record; None if no tier took it.

        Raises:
            ConfigError: the store holds a range of heads only.
            ShapeError: more or fewer tokens than the snapshot stands for.
            UnsupportedInputError: the codec cannot represent it.
        """
        self._check_snapshots()
        chosen = self.codec if codec is None else build_codec(codec)
        spec = snapshot.block.spec
        if len(tokens) != snapshot.block.num_tokens:
            raise ShapeError(
                f"{len(tokens)} tokens given for a snapshot of {snapshot.block.num_tokens}"
            )
        name = snapshot_key(spec.fingerprint(), tokens, snapshot.method, salt=self.salt)
        parts = encode_snapshot(snapshot, chosen, keys=(name,), mac_key=self._mac_key)
        key = snapshot_record_key(spec, name, chosen)
        held = self._stack.put(key, parts, persistent=None)
        return sum(memoryview(p).nbytes for p in parts) if held else None

    def load_snapshot(
        self, spec: KVSpec, tokens: "TokenIds", method: str, *, codec: str | None = None
    ) -> Snapshot | None:
        """The snapshot of exactly these tokens, method and codec; see `put_snapshot`.

        Returns:
            The verified snapshot; None if it is not there or cannot be read.

        Raises:
            ConfigError: the store holds a range of heads only.
        """
        self._check_snapshots()
        chosen = self.codec if codec is None else build_codec(codec)
        name = snapshot_key(spec.fingerprint(), tokens, method, salt=self.salt)
        key = snapshot_record_key(spec, name, chosen)
        data, _ = self._stack.read(key)
        if data is None:
            return None
        try:
            container = Container(data, mac_key=self._mac_key, verified=True)
            if container.header.keys != (name,):
                raise CorruptDataError("a record under the key of another snapshot")
            return decode_snapshot(container, spec, method)
        except CapacityError:
            return None
        except (CodecError, ShapeError):
            self._spoilt(key)
            return None
