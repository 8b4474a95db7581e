# SPDX-License-Identifier: Apache-2.0
"""What is read from disk comes into memory in memory's own form (`memory_codec`).

Else a prompt that memory has lost, or never had because another process stored it, would be decoded
at every hit. Only what the disk's form gives back exactly is written in another one.
"""

from functools import partial
from typing import TYPE_CHECKING

from kvlib.blocks import KVBlock
from kvlib.codecs import Codec
from kvlib.codecs.base import describe_codec
from kvlib.errors import StoreClosedError
from kvlib.spec import KVSpec
from kvlib.store.directory import Found
from kvlib.store.heads import HeadRange
from kvlib.store.work import Priority, WorkPool
from kvlib.store.writes import Form, Staging, Writer, identities_of

if TYPE_CHECKING:
    from kvlib.store.stack import TierStack

__all__ = ["Reform"]


class Reform:
    """See the module.

    Args:
        tiers: where records are.
        writer: writes to them.
        pool: does it when nothing more urgent is to be done.
        staging: bounds what waits for that.
        codec: of the memory tier.
        head_range: KV heads that records hold.
    """

    def __init__(
        self,
        tiers: "TierStack",
        writer: Writer,
        pool: WorkPool,
        staging: Staging,
        codec: Codec,
        head_range: HeadRange,
    ) -> None:
        self._tiers = tiers
        self._writer = writer
        self._pool = pool
        self._staging = staging
        self._codec = codec
        self._text = describe_codec(codec)
        self._head_range = head_range

    def wants(self, found: Found) -> bool:
        """Whether a record that is about to be read is to be written in memory's form."""
        form = found.identity
        return (
            form.lossless
            and form.codec != self._text
            and not self._tiers.contains(found.key, persistent=False)
        )

    def begin(self, spec: KVSpec, found: Found, block: KVBlock) -> None:
        """Put a whole record's blocks into memory, in the background; without room, not at all."""
        terms = self._tiers.terms(found.key)
        size = block.nbytes
        if terms is None or not self._staging.take(size):
            return
        (form,) = identities_of(
            spec, {self._text: self._codec}, [found.identity.ancestors], self._head_range
        )
        write = partial(
            self._writer.put_record, Form(form, self._codec, False, terms), found.held, block
        )
        try:
            task = self._pool.submit(write, priority=Priority.STORE)
        except StoreClosedError:
            self._staging.give(size)
            return
        task.add_done_callback(lambda _: self._staging.give(size))
