# SPDX-License-Identifier: Apache-2.0
"""`TieredCache`: decode over a context whose keys and values do not fit into memory.

    cache = kvlib.TieredCache(model, store=store, resident="256MiB", select="leoam:budget=0.1")
    cache.prefill(input_ids, progress=print)
    output = model.generate(input_ids, past_key_values=cache, max_new_tokens=64)

All keys and values go to disk in leaves of 16 tokens (`kvlib.store.leaves`). In memory are the
newest tokens, a small abstract of every leaf, and as many leaves as `resident` allows: those that
layers asked for last. A decoding step asks the abstracts which leaves its query needs, fetches
those that are not in memory, and attends to them and the newest tokens alone. Passes over several
tokens (a prompt, a question) attend to everything, leaves streaming by: they are exact.

What is held between the layers of a pass counts towards `resident`: keys, values, abstracts, room
to grow. What one layer works with comes on top: the leaves it attends to at a time, logits, and in
`prefill` a piece of the prompt. One sequence; models with full attention in every layer.
"""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvlib.artefacts import model_identity
from kvlib.attention import Logits
from kvlib.blocks import KVBlock
from kvlib.cache_columns import Columns, NewColumns
from kvlib.errors import CapacityError, ConfigError
from kvlib.keys import BLOCK_TOKENS, BlockKey
from kvlib.model_hooks import AttentionCall, HookedCache, decoder_of, untraced, watch
from kvlib.model_spec import one_sequence, spec_for_model
from kvlib.spec import EXACT, LayerKind
from kvlib.store.leaf_pool import LeafPool, LeafStats
from kvlib.store.leaves import LEAF_TOKENS, Index, LeafFile, LeafShape, aligned
from kvlib.store.selecting import SELECTORS, BudgetedSelector, HeadShape, Selection
from kvlib.store.selecting.percent import Percent
from kvlib.store.sizes import parse_bytes
from kvlib.store.store import KVStore
from kvlib.tiered_attention import Part, attend_leaves, attend_part, join
from kvlib.tiered_guess import QueryGuess
from kvlib.tiered_layers import SPARE, Newest, TieredLayer
from kvlib.tiered_prompts import Prompts, TieredReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TieredCache", "TieredReport"]

_STAGING_LEAVES = 64


class TieredCache(Cache, HookedCache):
    """A cache whose leaves are on disk, but for a bounded part; see the module.

    Args:
        model: a decoder with full attention in every layer.
        store: where `prefill` looks for the prompt's blocks and stores new ones; its folder holds
            the leaves' file. None: nothing outlives the cache.
        resident: most bytes in memory, what a layer works with aside.
        select: method string of what chooses leaves: ``leoam:budget=0.1``, ``quest``, ``infllm``,
            ``full``, ``percent``.
        recent: newest tokens that always stay in memory, at least.
        ahead: fetch what the next layer seems to need while this one computes. It pays where a
            layer computes for longer than choosing takes.
        model_id: see `kvlib.PrefixCache`.
        scratch: folder of the leaves' file, where it shall not be the store's.
        direct: read and write leaves past the page cache where the file system allows it.

    Raises:
        ConfigError: a model of another kind, a bad size or method, or too little memory.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        store: KVStore | None = None,
        resident: int | str = "256MiB",
        select: str = "leoam:budget=0.1",
        recent: int = 64,
        ahead: bool = False,
        model_id: str | None = None,
        scratch: str | os.PathLike[str] | None = None,
        direct: bool = True,
    ) -> None:
        if store is None:
            model_id = model_id or "unnamed"  # nothing is kept under that name
        self.spec = spec_for_model(model, model_id=model_id)
        self.spec.require((LayerKind.FULL,), "TieredCache")
        self._shape = LeafShape.of(self.spec)
        self.store = store
        self.select = select
        self.resident_bytes = parse_bytes(resident, "resident")
        self._recent = max(recent, LEAF_TOKENS)
        num_layers = self.spec.num_layers
        made: list[Any] = [TieredLayer(self, i) for i in range(num_layers)]
        super().__init__(layers=made)
        self._model = model
        self._decoder = decoder_of(model)
        self._method = SELECTORS.build(select)
        self._method.check_model(model_identity(self.spec))
        self._prompts = None if store is None else Prompts(store, self.spec, self._method.form)
        self._sparse = isinstance(self._method, BudgetedSelector)
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        # Queries are given to it as they count: times the scale that the model's attention has.
        shape = HeadShape(heads, self._shape.heads, self._shape.k_dim, 1.0)
        self._selection = Selection(self._method, shape, num_layers)
        self._newest = [Newest(self._shape) for _ in range(num_layers)]
        fixed = num_layers * (self._recent + 3 * SPARE) * self._shape.nbytes // LEAF_TOKENS
        slots = (self.resident_bytes - fixed) // self._shape.slot_bytes
        if slots < 2 * num_layers:
            least = fixed + 2 * num_layers * self._shape.slot_bytes
            raise ConfigError(
                f"resident={resident!r} is too little for {num_layers} layers: the newest tokens "
                f"and two leaves a layer need {least / 1e6:.1f} MB"
            )
        folder = scratch if scratch is not None else (None if store is None else store.path)
        file = LeafFile(self._shape, num_layers, folder, direct=direct)
        self._pool = LeafPool(file, slots)
        weakref.finalize(self, self._pool.close)
        self._columns = Columns()
        self._new: NewColumns | None = None
        self._attended = 0
        self._saving: list[tuple[Tensor, Tensor]] | None = None
        self._failed = False
        self._filling = False  # a prompt: attention is to everything
        self.steps = 0
        watch(self._decoder, self)
        self._guess = QueryGuess(self._decoder, self, heads, self._shape.k_dim) if ahead else None

    # -- what it is

    @property
    def num_tokens(self) -> int:
        """Tokens seen."""
        return int(self._columns.num)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: leaves, the newest tokens, abstracts."""
        newest = sum(layer.nbytes for layer in self._newest)
        return self._pool.nbytes + newest + self._selection.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the leaves' file."""
        return self._pool.file.nbytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all tokens, wherever they are."""
        return self.num_tokens * self.spec.bytes_per_token()

    def stats(self) -> LeafStats:
        """Counters of the leaves in memory."""
        return self._pool.stats()

    # -- a forward pass, as the hooks report it

    def begin_forward(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """See `kvlib.model_hooks.HookedCache`."""
        if decoder is not self._decoder:
            raise ConfigError("this TieredCache was made for another model; make one for each")
        self._check_usable()
        if arguments.get("output_attentions"):
            raise ConfigError("TieredCache returns no attention weights: leave them out")
        new = self._columns.read(arguments)
        if len(new.positions) != 1 or new.valid is not None:
            raise ConfigError("TieredCache takes one sequence without padding")
        self._new = new
        self._attended = 0
        self._columns.add(new, to_prompt=True)

    def _check_usable(self) -> None:
        if self._failed:
            raise ConfigError(
                "an earlier forward pass over this TieredCache failed: make a new one"
            )

    def expect_update(self, layer_idx: int) -> None:
        """Refuse keys that do not come from a forward pass of the cache's own model."""
        if self._new is None:
            raise ConfigError(
                f"layer {layer_idx} was given keys outside of a forward pass of the model that "
                "this TieredCache was made for"
            )

    def enter(self, module: nn.Module, hidden: Tensor | None) -> None:
        """See `kvlib.model_hooks.HookedCache`."""

    def needs_mask(self) -> bool:
        """See `kvlib.model_hooks.HookedCache`."""
        return False

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values [1, Hkv, T, D] of a layer."""
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.no_grad()
    def attend(self, key: Tensor, call: AttentionCall) -> Tensor | None:
        """See `kvlib.model_hooks.HookedCache`."""
        index: int = getattr(call.module, "layer_idx")  # noqa: B009
        layer: Any = self.layers[index]
        if layer.pending is None or layer.pending[0] is not key:
            raise ConfigError(
                f"{type(call.module).__name__} does not attend to the keys that it caches: "
                "TieredCache does not support this model"
            )
        logits = call.logits()
        if not logits.is_plain:
            raise ConfigError("TieredCache supports neither soft-capped logits nor sinks")
        keys, values = (x[0].detach() for x in layer.pending)
        layer.pending = None
        newest = self._newest[index]
        newest.append(keys, values)
        if self._saving is not None:
            self._saving.append((keys.cpu().clone(), values.cpu().clone()))
        query = self._scaled(call.query[0], logits)
        asking = query.flatten(0, 1).cpu() if self._method.needs_queries else None
        self._selection.append(index, keys.cpu(), asking)
        part: Part | None = None
        if query.shape[2] == 1 and self._sparse and not self._filling:
            part = self._chosen(index, query, logits)
        else:
            for slots in self._stream(index):
                part = join(part, self._attend_leaves(query, slots))
        seen = newest.tokens - keys.shape[1]
        part = join(part, attend_part(query, *newest.all(), causal=seen + 1))
        self._attended += 1
        self._seal(index)
        self._shrink()
        output = part.output().flatten(0, 1).transpose(0, 1)[None]
        return output.to(call.query.dtype)

    def _scaled(self, query: Tensor, logits: Logits) -> Tensor:
        """Queries [Hq, T, D] as [Hkv, G, T, D], times the scale."""
        scale = query.shape[-1] ** -0.5 if logits.scale is None else logits.scale
        rows: Tensor = query.detach().unflatten(0, (self._shape.heads, -1)) * scale
        return rows

    def _select(self, index: int, query: Tensor) -> Index:
        """Leaves in the file that the abstracts choose for a scaled query [Hq, 1, D], ascending."""
        chosen = self._selection.select(index, query.cpu())
        leaves: Index = (chosen[0] if len(chosen) == 1 else chosen.unique()).numpy()
        return leaves[leaves < self._pool.file.count(index)]

    def _chosen(self, index: int, query: Tensor, logits: Logits) -> Part | None:
        """Attention to the leaves that the abstracts choose; the newest are in memory anyway.

        While those are read that memory does not hold, attention runs over those it does: the
        chosen ones, and the layer's others, which cost no reading.
        """
        leaves = self._select(index, query.flatten(0, 1))
        part, most = None, self._pool.num_slots  # a choice may be more than memory holds
        for at in range(0, max(len(leaves), 1), most):
            last = at + most >= len(leaves)
            slots = self._pool.ask(index, leaves[at : at + most])
            if last:
                slots = torch.cat([slots, self._pool.others(index, leaves)])
            if len(slots):
                part = join(part, self._attend_leaves(query, slots))
            if last:
                self._fetch_ahead(index + 1, logits)  # it may take slots that were attended to
            slots = self._pool.rest()
            if len(slots):
                part = join(part, self._attend_leaves(query, slots))
        return part

    def _fetch_ahead(self, index: int, logits: Logits) -> None:
        """Begin to read what the next layer seems to need; layers have the same scale."""
        if self._guess is None or index == self.spec.num_layers:
            return
        guess = self._guess.query(index)
        if guess is not None:
            scaled = self._scaled(guess, logits).flatten(0, 1)
            self._pool.prefetch(index, self._select(index, scaled))

    def _attend_leaves(self, query: Tensor, slots: Tensor) -> Part:
        return attend_leaves(query, self._shape, self._pool.slots, slots)

    def _stream(self, index: int) -> Iterator[Tensor]:
        """Slots of all leaves of a layer, some at a time: what memory holds before what is read."""
        count = self._pool.file.count(index)
        if isinstance(self._method, Percent):
            self._pool.pin(index, range(self._method.pinned(self.num_tokens)))
        step = max(min(self._pool.num_slots // 2, 4 * _STAGING_LEAVES), 1)
        for at in range(0, count, step):
            here = self._pool.ask(index, range(at, min(at + step, count)))
            if at + step < count:
                self._pool.prefetch(index, range(at + step, min(at + 2 * step, count)))
            elif index + 1 < self.spec.num_layers:
                first = self._pool.file.count(index + 1)
                self._pool.prefetch(index + 1, range(min(step, first)))
            if len(here):
                yield here
            late = self._pool.rest()
            if len(late):
                yield late

    def _seal(self, index: int) -> None:
        """Make leaves of the newest tokens but `recent` of them."""
        newest = self._newest[index]
        count = (newest.tokens - self._recent) // LEAF_TOKENS
        if count <= 0:
            return
        keys, values = newest.all()
        size = self._shape.slot_bytes
        staging = aligned(min(count, _STAGING_LEAVES) * size).reshape(-1, size)
        for at in range(0, count, _STAGING_LEAVES):
            some = min(count - at, _STAGING_LEAVES)
            tokens = slice(at * LEAF_TOKENS, (at + some) * LEAF_TOKENS)
            self._shape.pack(keys[:, tokens].cpu(), values[:, tokens].cpu(), staging[:some])
            self._pool.add(index, staging[:some])
        newest.drop(count * LEAF_TOKENS)

    def _shrink(self) -> None:
        """Abstracts grow with the context; leaves in memory make room for them."""
        over = self.nbytes - self.resident_bytes
        if over <= 0:
            self._pool.regrow(-over // self._shape.slot_bytes)
            return
        count = -(-over // self._shape.slot_bytes)
        if count >= self._pool.num_slots:
            raise CapacityError(
                f"resident={self.resident_bytes / 1e6:.1f} MB is too little for "
                f"{self.num_tokens} tokens: the abstracts of {self.select!r} take "
                f"{self._selection.nbytes / 1e6:.1f} MB, and leaves need some"
            )
        self._pool.retire(count)

    def end_forward(self, *, failed: bool) -> None:
        """See `kvlib.model_hooks.HookedCache`."""
        new, self._new = self._new, None
        if self._guess is not None:
            self._guess.forget()
        if failed or new is None or self._attended != self.spec.num_layers:
            self._failed = True
            if not failed:
                raise ConfigError(
                    f"only {self._attended} of {self.spec.num_layers} layers ran over this "
                    "TieredCache: it cannot be used where layers are skipped"
                )
            return
        self._columns.advance(new)
        self._columns.settle(keep_positions=False)
        self.steps += new.num == 1 and not self._filling

    # -- whole prompts

    def _keys(self, ids: Tensor) -> list[BlockKey]:
        return [] if self.store is None else self.store.block_keys(self.spec, ids)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: "Tensor | Sequence[int]",
        *,
        chunk_tokens: int = 512,
        save: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> TieredReport:
        """Fill an empty cache with all tokens of a prompt but the last.

        What the store has of it is restored, the rest computed, a piece at a time, and stored. The
        last token is left to `generate`, which needs one to begin with.

        Args:
            input_ids: int [T] or [1, T].
            chunk_tokens: run the model over that many tokens at a time, a multiple of 64.
            save: store new blocks, and abstracts.
            progress: called with (tokens done, tokens in all) after each piece.

        Raises:
            ConfigError: the cache is not empty, or a bad `chunk_tokens`.
        """
        ids = one_sequence(input_ids)
        if not len(ids):
            raise ConfigError("there are no tokens to prefill")
        self._check_usable()
        if self.num_tokens:
            raise ConfigError(
                f"prefill wants an empty cache; this one has {self.num_tokens} tokens"
            )
        if chunk_tokens < BLOCK_TOKENS or chunk_tokens % BLOCK_TOKENS:
            raise ConfigError(f"chunk_tokens={chunk_tokens}: expected a multiple of {BLOCK_TOKENS}")
        total = len(ids) - 1
        keys = self._keys(ids[:total])
        try:
            done, summed, fidelity = self._restore(keys, ids, total, save, progress)
        except BaseException:
            self._failed = True  # layers may differ in what they took
            raise
        restored, stored = done, 0
        embedding: Any = self._model.get_input_embeddings()
        while done < total:
            count = min(chunk_tokens - done % chunk_tokens, total - done)
            self._saving = [] if save and self._prompts is not None else None
            chunk = ids[None, done : done + count].to(embedding.weight.device)
            self._filling = True
            try:
                self._model.base_model(input_ids=chunk, past_key_values=self, use_cache=True)
            finally:
                self._filling = False
            stored += self._save(keys, done, fidelity)
            done += count
            if progress is not None:
                progress(done, total)
        return TieredReport(
            restored_tokens=restored,
            abstract_tokens=summed,
            computed_tokens=total - restored,
            stored_blocks=stored,
        )

    def _restore(
        self,
        keys: Sequence[BlockKey],
        ids: Tensor,
        total: int,
        save: bool,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[int, int, str]:
        """Take what the store has: tokens, those that came with abstracts, and their fidelity."""
        done, summed, fidelity = 0, 0, EXACT
        if self._prompts is None or self._method.needs_queries:  # the store has no queries
            return done, summed, fidelity
        for loaded, block, abstracts in self._prompts.load(keys):
            rows = () if abstracts is None else abstracts.layers
            layers = [(x.keys, x.values, None) for x in block.layers]
            self._fill(ids[done : block.stop], layers, rows)
            if save:
                take = self._selection.take
                self._prompts.save_restored(keys, loaded, block, abstracts, take)
            done = block.stop
            summed += 0 if abstracts is None else abstracts.num_tokens
            fidelity = loaded.fidelity if loaded.fidelity != EXACT else fidelity
            if progress is not None:
                progress(done, total)
        return done, summed, fidelity

    def _fill(
        self,
        ids: Tensor,
        layers: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        abstracts: Sequence[Tensor] = (),
    ) -> None:
        """Take the next tokens without a pass: keys, values and scaled queries of all layers.

        Of the first of these tokens there may be `abstracts` of all layers: their keys are not
        looked at.
        """
        for index, (keys, values, queries) in enumerate(layers):
            self._newest[index].append(keys, values)
            known = self._selection.extend(index, abstracts[index]) if abstracts else 0
            self._selection.append(index, keys[:, known:], queries)
            self._seal(index)
            self._shrink()
        new = self._columns.read({"input_ids": ids[None]})
        self._columns.add(new, to_prompt=True)
        self._columns.advance(new)
        self._columns.settle(keep_positions=False)

    def _save(self, keys: Sequence[BlockKey], done: int, fidelity: str) -> int:
        """Store the whole blocks of a piece that begins at token `done`."""
        saving, self._saving = self._saving, None
        if not saving or self._prompts is None:
            return 0
        tokens = saving[0][0].shape[1] // BLOCK_TOKENS * BLOCK_TOKENS
        if not tokens or done % BLOCK_TOKENS:
            return 0
        block = KVBlock.dense(
            self.spec, [(k[:, :tokens], v[:, :tokens]) for k, v in saving], start=done
        )
        return self._prompts.save(keys, block, fidelity, self._selection.take)

    def reset(self) -> None:
        """Refused: make a new one."""
        raise ConfigError("a TieredCache is not used twice: make a new one")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: leaves are not taken back."""
        raise ConfigError("a TieredCache cannot be cropped")

    def close(self) -> None:
        """Give the file up; the memory goes with the cache."""
        self._pool.close()
