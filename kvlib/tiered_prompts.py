# SPDX-License-Identifier: Apache-2.0
"""What a `TieredCache` takes out of a store, and puts into it: blocks of a prompt, and abstracts.

Blocks and their abstracts are written together. Abstracts say something of the numbers that come
out of the store, so behind a lossy codec they are written when the blocks are restored for the
first time; and so are those of blocks that somebody else has stored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.keys import BLOCK_TOKENS, BlockKey
from kvlib.spec import EXACT, KVSpec
from kvlib.store.abstract_records import Abstracts
from kvlib.store.abstracts import AbstractForm
from kvlib.store.reports import Loaded
from kvlib.store.store import KVStore

__all__ = ["Prompts", "Take", "TieredReport"]

Take = Callable[[int, int, int], Tensor]
"""The abstracts of a layer's tokens [first, stop), see `kvlib.store.selecting.Selection.take`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TieredReport:
    """What `TieredCache.prefill` did.

    Attributes:
        restored_tokens: taken from the store.
        abstract_tokens: of these, whose abstracts were taken from the store, too.
        computed_tokens: run through the model.
        stored_blocks: blocks of 64 tokens that were stored.
    """

    restored_tokens: int
    abstract_tokens: int = 0
    computed_tokens: int
    stored_blocks: int


class Prompts:
    """Prompts of one model in a store.

    Args:
        store: the store.
        spec: what the numbers mean.
        form: of the abstracts that belong to the blocks; None for none.
    """

    def __init__(self, store: KVStore, spec: KVSpec, form: AbstractForm | None) -> None:
        self._store = store
        self._spec = spec
        self._form = form

    def load(self, keys: Sequence[BlockKey]) -> Iterator[tuple[Loaded, KVBlock, Abstracts | None]]:
        """Restore record by record what is stored of a prompt: blocks, and abstracts of some.

        The abstracts are those of a block's first tokens; None if there are none.
        """
        for loaded in self._store.load_pieces(self._spec, keys):
            block = loaded.block
            if block is None:
                return
            abstracts = None
            if self._form is not None and loaded.ancestors == EXACT:
                first, last = block.start // BLOCK_TOKENS, block.stop // BLOCK_TOKENS
                abstracts = self._store.load_abstracts(
                    self._spec, keys[:last], self._form, fidelity=loaded.fidelity, start=first
                )
            yield loaded, block, abstracts

    def save_restored(
        self,
        keys: Sequence[BlockKey],
        loaded: Loaded,
        block: KVBlock,
        there: Abstracts | None,
        take: Take,
    ) -> None:
        """Store the abstracts that a restored block had none of."""
        if loaded.ancestors == EXACT and (there is None or there.stop < block.stop):
            start = block.start if there is None else there.stop
            self._put_abstracts(keys, start, block.stop, loaded.fidelity, take)

    def save(self, keys: Sequence[BlockKey], block: KVBlock, fidelity: str, take: Take) -> int:
        """Store computed blocks with their abstracts; the blocks stored now."""
        report = self._store.put(self._spec, keys, block, fidelity=fidelity)
        if fidelity == EXACT and self._store.gives_back and not report.dropped_blocks:
            self._put_abstracts(keys, block.start, block.stop, EXACT, take)
        return report.stored_blocks

    def _put_abstracts(
        self, keys: Sequence[BlockKey], start: int, stop: int, fidelity: str, take: Take
    ) -> None:
        if self._form is None:
            return
        rows = tuple(take(layer, start, stop) for layer in range(self._spec.num_layers))
        self._store.put_abstracts(
            self._spec, keys, Abstracts(self._form, start, rows), fidelity=fidelity
        )
