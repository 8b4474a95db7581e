# SPDX-License-Identifier: Apache-2.0
"""Snapshots as records: one container for a whole evicted cache, under a key of its own kind.

The key holds all tokens, the method with its parameters and the salt (`kvlib.keys.snapshot_key`),
so a snapshot never answers a look-up of prefixes or of another method.
"""

from collections.abc import Sequence

from kvlib.codecs import Codec
from kvlib.codecs.base import codec_fingerprint
from kvlib.codecs.container import Buffer, Container, SectionKind
from kvlib.codecs.header import WHOLE_BLOCK
from kvlib.codecs.pack import encode_block
from kvlib.codecs.state import decode_state, encode_state
from kvlib.codecs.unpack import decode_block
from kvlib.errors import CorruptDataError
from kvlib.keys import BlockKey, StoreKey
from kvlib.snapshots import Snapshot
from kvlib.spec import KVSpec

__all__ = ["decode_snapshot", "encode_snapshot", "snapshot_record_key"]


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
