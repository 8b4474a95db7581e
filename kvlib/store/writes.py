# SPDX-License-Identifier: Apache-2.0
"""How blocks become records: what is missing is cut, encoded and put, the end of a prompt first."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec
from kvlib.codecs.base import codec_fingerprint
from kvlib.codecs.pack import encode_block
from kvlib.errors import ShapeError
from kvlib.keys import BLOCK_TOKENS, BlockKey, StoreKey
from kvlib.spec import KVSpec
from kvlib.store.directory import Directory, Identity
from kvlib.store.records import groups_to_write, is_dense
from kvlib.store.reports import PutReport
from kvlib.store.stack import TierStack

if TYPE_CHECKING:
    from kvlib.store.replacement.admission import SecondTouch

__all__ = ["Form", "Staging", "Writer", "forms_of", "identities_of"]


@dataclass(frozen=True, slots=True)
class Form:
    """An encoding of new blocks, and which tiers get it.

    Attributes:
        identity: what it is stored under.
        codec: what encodes it.
        persistent: for the persistent tiers, for the others, or (None) for all.
    """

    identity: Identity
    codec: Codec
    persistent: bool | None


def identities_of(
    spec: KVSpec, codecs: Mapping[str, Codec], accept: Sequence[str]
) -> list[Identity]:
    """The forms in which blocks are acceptable, best first.

    Args:
        spec: what the numbers mean.
        codecs: by canonical string, best first.
        accept: fidelities of ancestors, best first.
    """
    forms = [(f, text, codec) for f in dict.fromkeys(accept) for text, codec in codecs.items()]
    return [
        Identity(
            ancestors=f,
            codec=text,
            lossless=codec.lossless,
            storage=codec_fingerprint(spec, codec, fidelity=f),
            rank=rank,
        )
        for rank, (f, text, codec) in enumerate(forms)
    ]


def forms_of(identities: Sequence[Identity], codecs: Mapping[str, Codec]) -> list[Form]:
    """What is written where: one form everywhere, or the first in memory and the second on disk."""
    tiers = (None,) if len(identities) == 1 else (False, True)
    return [Form(x, codecs[x.codec], tier) for x, tier in zip(identities, tiers, strict=True)]


class Staging:
    """A bound on the bytes that wait to be stored.

    Args:
        capacity: in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self.used_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Reserve; False if there is no room."""
        with self._lock:
            if self.used_bytes + num_bytes > self._capacity:
                return False
            self.used_bytes += num_bytes
            return True

    def give(self, num_bytes: int) -> None:
        """Give back."""
        with self._lock:
            self.used_bytes -= num_bytes


class Writer:
    """Puts blocks into tiers.

    Args:
        tiers: where to.
        directory: what is there.
        second_touch: admission to the persistent tiers; None admits everything.
        mac_key: see `kvlib.codecs.container.build_container`.
    """

    def __init__(
        self,
        tiers: TierStack,
        directory: Directory,
        second_touch: "SecondTouch[StoreKey] | None",
        mac_key: bytes | None,
    ) -> None:
        self._tiers = tiers
        self._directory = directory
        self._second_touch = second_touch
        self._mac_key = mac_key

    @staticmethod
    def check(spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock) -> None:
        """Refuse what cannot be stored under these keys.

        Raises:
            ShapeError: the block is not whole blocks, lacks layers, or goes beyond the keys.
        """
        if (
            block.start % BLOCK_TOKENS
            or block.stop % BLOCK_TOKENS
            or block.stop // BLOCK_TOKENS > len(keys)
            or len(block.layers) != spec.num_layers
            or block.spec != spec
            or not all(is_dense(layer) for layer in block.layers)
        ):
            raise ShapeError(
                f"cannot store tokens [{block.start}, {block.stop}) of {len(block.layers)} layers "
                f"under {len(keys)} keys: expected whole blocks of {BLOCK_TOKENS} tokens over all "
                f"{spec.num_layers} layers of the same spec, nothing evicted"
            )

    def put(
        self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock, forms: Sequence[Form]
    ) -> PutReport:
        """Store the blocks that no record holds; see `KVStore.put`."""
        first, last = block.start // BLOCK_TOKENS, block.stop // BLOCK_TOKENS
        present, missing = self._present([form.identity for form in forms], keys[:last], first)
        report = PutReport(present_blocks=last - first - len(missing))
        for group in reversed(groups_to_write(missing)):
            mine = tuple(keys[i] for i in group)
            part = block.slice(group[0] * BLOCK_TOKENS, (group[-1] + 1) * BLOCK_TOKENS)
            written = [size for form in forms if (size := self._write(form, mine, part))]
            if written:
                report = replace(
                    report,
                    stored_blocks=report.stored_blocks + len(group),
                    stored_bytes=report.stored_bytes + sum(written),
                    raw_bytes=report.raw_bytes + len(group) * BLOCK_TOKENS * spec.bytes_per_token(),
                )
            else:
                report = replace(report, dropped_blocks=report.dropped_blocks + len(group))
        self._tiers.touch(present)
        return report

    def _present(
        self, identities: Sequence[Identity], keys: Sequence[BlockKey], first: int
    ) -> tuple[list[StoreKey], list[int]]:
        """The records that hold these blocks, and those from `first` on that none holds.

        Records before `first` are used like the others: what comes after them must not outlive
        them.
        """
        run = self._directory.run(identities, keys)
        records = [found.key for found in run]
        missing: list[int] = []
        # The walk begins at the start: block `first` may lie in a record that begins before it.
        at = max(sum(found.count for found in run), first)
        while at < len(keys):
            found = self._directory.find(identities, keys, at)
            if found is None:
                missing.append(at)
                at += 1
            else:
                records.append(found.key)
                at += found.count
        return records, missing

    def _write(self, form: Form, mine: tuple[BlockKey, ...], part: KVBlock) -> int | None:
        """Encode and write one record; its size, or None when no tier took it."""
        key = StoreKey(mine[0], form.identity.storage)
        persistent = form.persistent
        touch = self._second_touch
        if touch is not None and persistent is not False and not touch.wanted(key):
            if persistent:
                return None
            persistent = False

        def write() -> int | None:
            parts = encode_block(
                part,
                form.codec,
                keys=mine,
                fidelity=form.identity.ancestors,
                mac_key=self._mac_key,
            )
            held = self._tiers.put(key, parts, persistent=persistent)
            return sum(memoryview(p).nbytes for p in parts) if held else None

        return self._tiers.once(key, write)

    def copy_down(self, key: StoreKey) -> None:
        """Write a record of the memory tier to disk, if it was wanted before and is not there."""
        if self._second_touch is None or not self._second_touch.wanted(key):
            return
        if not self._tiers.contains(key, persistent=True):
            data, _ = self._tiers.read(key)
            if data is not None:
                self._tiers.put(key, [data], persistent=True)
