# SPDX-License-Identifier: Apache-2.0
"""`PrefixCache`: compute the KV of a long prompt once, restore it in any later process.

    store = kvlib.KVStore("~/kv", disk="20GiB")
    prefix = kvlib.PrefixCache(model, store)
    output = prefix.generate(**inputs, max_new_tokens=64)

The first call computes and stores; a later call with the same beginning, in this process or
another, restores what is stored of it and computes only the rest. With the codec `exact` the
restored keys and values are the computed ones, bit for bit. One sequence at a time; models with
full attention in every layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvlib.blocks import KVBlock
from kvlib.errors import ConfigError
from kvlib.keys import BLOCK_TOKENS, BlockKey, Extra
from kvlib.model_spec import one_sequence, spec_for_model
from kvlib.spec import EXACT, LayerKind
from kvlib.store.store import KVStore, PutReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PrefillReport", "PrefixCache", "RestoredCache"]


class RestoredCache(DynamicCache):
    """A `DynamicCache` that may begin with restored tokens.

    Attributes:
        restored_tokens: tokens that came from the store.
        fidelity: lowest fidelity among them, `EXACT` if nothing was lost.
    """

    restored_tokens: int = 0
    fidelity: str = EXACT


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillReport:
    """What `PrefixCache.prefill` did.

    Attributes:
        cache: KV of all tokens, ready to be continued.
        restored_tokens: taken from the store.
        computed_tokens: run through the model.
        put: what was stored.
    """

    cache: RestoredCache
    restored_tokens: int
    computed_tokens: int
    put: PutReport


class PrefixCache:
    """Prefix reuse for a transformers model, through a `KVStore`.

    Args:
        model: a decoder with full attention in every layer, on any device.
        store: where blocks live; its codec and salt apply.
        model_id: identity of the weights; needed only when they came from neither a hub nor a
            folder.
        adapter: identity of an active adapter.
        extras: what every request depends on besides its tokens.

    Raises:
        ConfigError: the model cannot be identified, or has layers that are not full attention
            (named).
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        store: KVStore,
        *,
        model_id: str | None = None,
        adapter: str = "",
        extras: Sequence[Extra] = (),
    ) -> None:
        self.model = model
        self.store = store
        self.spec = spec_for_model(model, model_id=model_id, adapter=adapter)
        self.spec.require((LayerKind.FULL,), "PrefixCache")
        self._extras = tuple(extras)

    def _keys(self, ids: Tensor) -> list[BlockKey]:
        return self.store.block_keys(self.spec, ids, extras=self._extras)

    def restore(
        self, input_ids: "Tensor | Sequence[int]", *, deadline: float | None = None
    ) -> RestoredCache:
        """A cache that begins with as much of the prompt as is stored, in whole blocks.

        At least the last token is always left to compute, since a model needs one token to produce
        its next.

        Args:
            input_ids: int [T] or [1, T]: the whole prompt, without padding.
            deadline: `time.monotonic()` after which to go on with what has arrived.

        Returns:
            A cache for `model.generate(input_ids, past_key_values=cache)`; empty if nothing is
            stored.
        """
        ids = one_sequence(input_ids)
        keys = self._keys(ids[: max(len(ids) - 1, 0)])
        loaded = self.store.load(self.spec, keys, deadline=deadline)
        cache = RestoredCache(config=self.model.config)
        if loaded.block is not None:
            for layer, kv in zip(cache.layers, loaded.block.layers, strict=True):
                # `require` let full attention only through.
                assert isinstance(layer, DynamicLayer)  # noqa: S101
                keys_, values = (
                    kv.keys[None].to(self.model.device),
                    kv.values[None].to(self.model.device),
                )
                layer.lazy_initialization(keys_, values)
                layer.keys, layer.values = keys_, values  # `update` would copy them
            cache.restored_tokens = loaded.num_blocks * BLOCK_TOKENS
            cache.fidelity = loaded.fidelity
        return cache

    def save(self, input_ids: "Tensor | Sequence[int]", cache: DynamicCache) -> PutReport:
        """Store the whole blocks of a prompt that `cache` holds and the store does not.

        Args:
            input_ids: int [T] or [1, T]: the tokens that the cache begins with.
            cache: filled by the model: a `DynamicCache`, or what `restore` returned and the model
                continued. If tokens at its front were restored with loss, what follows is stored as
                computed from lossy KV.

        Raises:
            ConfigError: the cache holds another kind of layer, several sequences, or nothing.
        """
        ids = one_sequence(input_ids)
        layers: list[tuple[Tensor, Tensor]] = []
        for index, layer in enumerate(cache.layers):
            shape = tuple(getattr(getattr(layer, "keys", None), "shape", ()))
            if type(layer) is not DynamicLayer or len(shape) != 4 or shape[0] != 1:
                raise ConfigError(
                    f"cannot save layer {index}: a {type(layer).__name__} with keys {shape}; "
                    "expected a DynamicLayer of [1, Hkv, T, D]"
                )
            assert layer.keys is not None and layer.values is not None  # noqa: S101, PT018
            layers.append((layer.keys[0], layer.values[0]))
        tokens = min(len(ids), *(k.shape[1] for k, _ in layers)) // BLOCK_TOKENS * BLOCK_TOKENS
        start = cache.restored_tokens if isinstance(cache, RestoredCache) else 0
        if tokens <= start:
            return PutReport(present_blocks=tokens // BLOCK_TOKENS)
        block = KVBlock.dense(
            self.spec, [(k[:, start:tokens], v[:, start:tokens]) for k, v in layers], start=start
        )
        fidelity = cache.fidelity if isinstance(cache, RestoredCache) else EXACT
        return self.store.put(self.spec, self._keys(ids[:tokens]), block, fidelity=fidelity)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: "Tensor | Sequence[int]",
        *,
        chunk_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PrefillReport:
        """Restore what is stored of a text, compute the rest, and store it.

        Args:
            input_ids: int [T] or [1, T].
            chunk_tokens: run the model over that many tokens at a time; None for all at once.
            progress: called with (tokens done, tokens in all) after the restore and after each
                chunk.
        """
        ids = one_sequence(input_ids)
        if len(ids) == 0:
            raise ConfigError("there are no tokens to prefill")
        cache = self.restore(ids)
        done = cache.restored_tokens
        step = chunk_tokens or len(ids)
        if progress is not None:
            progress(done, len(ids))
        while done < len(ids):
            chunk = ids[None, done : done + step].to(self.model.device)
            self.model.base_model(input_ids=chunk, past_key_values=cache, use_cache=True)
            done += chunk.shape[1]
            if progress is not None:
                progress(done, len(ids))
        restored = cache.restored_tokens
        report = self.save(ids, cache)
        return PrefillReport(
            cache=cache, restored_tokens=restored, computed_tokens=len(ids) - restored, put=report
        )

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        save: bool = True,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` with the stored prefix restored and new blocks stored afterwards.

        Args:
            input_ids: int [1, T].
            attention_mask: [1, T]; all ones (padding would shift what a token's key means).
            save: store the prompt's new blocks afterwards; False only restores.
            **kwargs: passed on to `model.generate`.

        Returns:
            What `model.generate` returns.

        Raises:
            ConfigError: several sequences or beams, padding, or a `past_key_values` of the
                caller's.
        """
        ids = one_sequence(input_ids)
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ConfigError(
                "attention_mask has zeros: PrefixCache takes one sequence without padding"
            )
        if "past_key_values" in kwargs:
            raise ConfigError(
                "generate() restores its own past_key_values; use restore() and save() to handle a "
                "cache"
            )
        settings = kwargs.get("generation_config") or self.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.get(name) or getattr(settings, name, None) or 1) > 1:
                raise ConfigError(
                    f"{name} > 1 expands the cache to several sequences; PrefixCache takes one at "
                    "a time"
                )
        cache = self.restore(ids)
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
        output = generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            past_key_values=cache,
            **kwargs,
        )
        if save:
            self.save(ids, cache)
        return output
