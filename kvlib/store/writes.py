# SPDX-License-Identifier: Apache-2.0
"""How blocks become records: what is missing is cut, encoded and put, the end of a prompt first."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from time import monotonic
from typing import TYPE_CHECKING

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec
from kvlib.codecs.base import codec_fingerprint
from kvlib.codecs.container import Buffer
from kvlib.codecs.pack import encode_block
from kvlib.errors import ShapeError
from kvlib.keys import BLOCK_TOKENS, BlockKey, StoreKey
from kvlib.spec import KVSpec
from kvlib.store.directory import Directory, Identity
from kvlib.store.heads import HeadRange, check_block_heads, local_spec
from kvlib.store.records import groups_to_write, is_dense
from kvlib.store.reports import PutReport
from kvlib.store.stack import TierStack
from kvlib.store.terms import Terms

if TYPE_CHECKING:
    from kvlib.store.replacement.admission import SecondTouch

__all__ = ["Form", "Staging", "Writer", "Written", "forms_of", "identities_of"]

_REFUSED_S = 1.0


@dataclass(frozen=True, slots=True)
class Form:
    """An encoding of new blocks, and which tiers get it.

    Attributes:
        identity: what it is stored under.
        codec: what encodes it.
        persistent: for the persistent tiers, for the others, or (None) for all.
        terms: on which it is kept; None for those of the store.
    """

    identity: Identity
    codec: Codec
    persistent: bool | None
    terms: Terms | None = None


def identities_of(
    spec: KVSpec,
    codecs: Mapping[str, Codec],
    accept: Sequence[str],
    head_range: HeadRange = None,
) -> list[Identity]:
    """The forms in which blocks are acceptable, best first.

    Args:
        spec: what the numbers mean.
        codecs: by canonical string, best first.
        accept: fidelities of ancestors, best first.
        head_range: KV heads that the blocks hold.
    """
    forms = [(f, text, codec) for f in dict.fromkeys(accept) for text, codec in codecs.items()]
    return [
        Identity(
            ancestors=f,
            codec=text,
            lossless=codec.lossless,
            storage=codec_fingerprint(spec, codec, fidelity=f, head_range=head_range),
            rank=rank,
        )
        for rank, (f, text, codec) in enumerate(forms)
    ]


def forms_of(
    identities: Sequence[Identity], codecs: Mapping[str, Codec], terms: Terms | None = None
) -> list[Form]:
    """What is written where: one form everywhere, or the first in memory and the second on disk."""
    tiers = (None,) if len(identities) == 1 else (False, True)
    return [
        Form(x, codecs[x.codec], tier, terms) for x, tier in zip(identities, tiers, strict=True)
    ]


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

    @property
    def left(self) -> int:
        """Bytes that there is room for."""
        return self._capacity - self.used_bytes

    def give(self, num_bytes: int) -> None:
        """Give back."""
        with self._lock:
            self.used_bytes -= num_bytes


@dataclass(frozen=True, slots=True)
class Written:
    """What came of some blocks.

    Attributes:
        stored: how many were written now.
        present: how many were there before.
        nbytes: written.
    """

    stored: int = 0
    present: int = 0
    nbytes: int = 0

    def __add__(self, more: "Written") -> "Written":
        return Written(
            self.stored + more.stored, self.present + more.present, self.nbytes + more.nbytes
        )


class Writer:
    """Puts blocks into tiers.

    Args:
        tiers: where to.
        directory: what is there.
        second_touch: admission to the persistent tiers; None admits everything.
        mac_key: see `kvlib.codecs.container.build_container`.
        head_range: KV heads that all blocks hold.
    """

    def __init__(
        self,
        tiers: TierStack,
        directory: Directory,
        second_touch: "SecondTouch[StoreKey] | None",
        mac_key: bytes | None,
        head_range: HeadRange = None,
    ) -> None:
        self._tiers = tiers
        self._directory = directory
        self._second_touch = second_touch
        self._mac_key = mac_key
        self._head_range = head_range
        self._refused = -_REFUSED_S

    def check(self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock) -> None:
        """Refuse what cannot be stored under these keys.

        Raises:
            ShapeError: the block is not whole blocks, lacks layers, goes beyond the keys, or holds
                other heads.
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
        check_block_heads(block, spec, self._head_range)

    def put(
        self, spec: KVSpec, keys: Sequence[BlockKey], block: KVBlock, forms: Sequence[Form]
    ) -> PutReport:
        """Store the blocks that no record holds; see `KVStore.put`."""
        first, last = block.start // BLOCK_TOKENS, block.stop // BLOCK_TOKENS
        present, missing = self._present([form.identity for form in forms], keys[:last], first)
        report = PutReport(present_blocks=last - first - len(missing))
        block_bytes = BLOCK_TOKENS * local_spec(spec, self._head_range).bytes_per_token()
        for group in reversed(groups_to_write(missing)):
            mine = tuple(keys[i] for i in group)
            part = block.slice(group[0] * BLOCK_TOKENS, (group[-1] + 1) * BLOCK_TOKENS)
            written = [self._write_all(form, mine, part) for form in forms]
            stored = max(w.stored for w in written)
            there = max(w.stored + w.present for w in written)
            report = replace(
                report,
                stored_blocks=report.stored_blocks + stored,
                present_blocks=report.present_blocks + there - stored,
                dropped_blocks=report.dropped_blocks + len(group) - there,
                stored_bytes=report.stored_bytes + sum(w.nbytes for w in written),
                raw_bytes=report.raw_bytes + stored * block_bytes,
            )
        terms = forms[0].terms
        self._tiers.touch(present, None if terms is None else terms.hint)
        return report

    def missing(self, identity: Identity, keys: Sequence[BlockKey]) -> list[int]:
        """Which of these blocks no record of this form holds."""
        return self._present([identity], keys, 0)[1]

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

    def _write_all(self, form: Form, mine: tuple[BlockKey, ...], part: KVBlock) -> Written:
        """Write blocks as one record, or what somebody else's shorter record leaves of them."""
        done = self.put_record(form, mine, part)
        at = done.stored + done.present
        if not 0 < at < len(mine):
            return done
        for key in mine[at:]:  # what is not a whole chunk is stored block by block
            start = part.start + at * BLOCK_TOKENS
            done += self.put_record(form, (key,), part.slice(start, start + BLOCK_TOKENS))
            at += 1
        return done

    def put_record(self, form: Form, mine: tuple[BlockKey, ...], part: KVBlock) -> Written:
        """Encode and write one record, unless one is there: whose blocks then count as present."""

        def encode() -> list[Buffer]:
            return encode_block(
                part,
                form.codec,
                keys=mine,
                fidelity=form.identity.ancestors,
                head_range=self._head_range,
                mac_key=self._mac_key,
            )

        key = StoreKey(mine[0], form.identity.storage)
        return self.record(key, mine, encode, persistent=form.persistent, terms=form.terms)

    def record(
        self,
        key: StoreKey,
        mine: tuple[BlockKey, ...],
        encode: Callable[[], Sequence[Buffer]],
        *,
        persistent: bool | None = None,
        terms: Terms | None = None,
    ) -> Written:
        """Write one record, unless one of the same name is there: whose blocks count as present.

        Args:
            key: its name.
            mine: keys of the blocks in it.
            encode: makes the container, if it is wanted.
            persistent: which tiers get it, see `Form`.
            terms: on which it is kept; None for those of the store.
        """
        touch = self._second_touch
        if touch is not None and persistent is not False and not touch.wanted(key):
            persistent = False
        if persistent is False and not self._tiers.takes(persistent=False):
            return Written()

        def write() -> Written:
            held = self._directory.record_keys(key) or ()  # since we looked last
            same = sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(held, mine, strict=False))
            )
            if same:
                return Written(present=same)
            parts = encode()
            if not self._tiers.put(key, parts, persistent=persistent, terms=terms):
                return Written()
            self._directory.remember(key, mine)
            return Written(stored=len(mine), nbytes=sum(memoryview(p).nbytes for p in parts))

        while True:
            written, shared = self._tiers.once(key, write)
            if not shared:
                return written
            # Another caller's put, perhaps of fewer blocks than ours: look what is there now.

    def copy_down(self, keys: Sequence[StoreKey]) -> None:
        """Offer records that were used to the disk, if only memory has them.

        They are those that the disk had no room for, that `second_touch` waited with, or that the
        disk let go of. Their use says that they are worth it; one that is never used again costs
        nothing more. A disk that refuses one is left alone for a while.
        """
        if not self._tiers.takes(persistent=True) or monotonic() < self._refused + _REFUSED_S:
            return
        for key in reversed(keys):
            if self._tiers.contains(key, persistent=True):
                continue
            if self._second_touch is not None and not self._second_touch.wanted(key):
                continue
            data, _ = self._tiers.read(key)
            terms = self._tiers.terms(key)
            if data is None or terms is None:
                continue
            if not self._tiers.put(key, [data], persistent=True, terms=terms):
                self._refused = monotonic()
                return
