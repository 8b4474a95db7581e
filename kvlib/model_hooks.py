# SPDX-License-Identifier: Apache-2.0
"""How `KVCache` gets to see a transformers model's attention, without changing the model.

transformers gives a cache new keys and values and takes back what attention shall read; queries,
masks and the attention itself are out of its sight. So while a forward pass runs over a `KVCache`,
and only then, the decoder's config names the attention implementation ``kvlib``: a function that
knows the cache of the running pass. Two hooks on the decoder switch it on and off. A pass with any
other cache in another thread meanwhile goes on to the implementation that the config named before.
The hooks go away with the last `KVCache` of the model.
"""

import inspect
import sys
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, local
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlib.attention import Logits
from kvlib.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AttentionCall", "HookedCache", "decoder_of", "running", "untraced", "watch"]

IMPLEMENTATION = "kvlib"

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Let torch.compile call `function` as it is, between the graphs that it compiles."""
    reason = "kvlib.KVCache runs between compiled graphs: compile without fullgraph=True"
    as_it_is: F = torch.compiler.disable(function, reason=reason)
    return as_it_is


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention, as the model asked for it.

    Attributes:
        module: the attention module.
        query: [B, Hq, T, D].
        mask: what the model's own mask function made of the pass.
        options: scaling, soft cap, sinks and whatever else the model passes.
        original: the model's own attention, with transformers' signature.
    """

    module: nn.Module
    query: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    original: Callable[..., tuple[Tensor, Tensor | None]]

    def logits(self) -> Logits:
        """How the layer makes logits.

        Raises:
            ConfigError: it adds a position bias.
        """
        if self.options.get("position_bias") is not None:
            name = type(self.module).__name__
            raise ConfigError(f"{name} adds a position bias, which KVCache does not support")
        return Logits(
            scale=self.options.get("scaling"),
            softcap=self.options.get("softcap"),
            sinks=self.options.get("s_aux"),
        )


class HookedCache:
    """A cache that the hooks tell of a forward pass; what they ask of it."""

    def begin_forward(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """A pass with these arguments of the decoder's forward begins."""
        raise NotImplementedError

    def end_forward(self, *, failed: bool) -> None:
        """It ended, or raised."""
        raise NotImplementedError

    def attend(self, key: Tensor, call: AttentionCall) -> Tensor | None:
        """[B, T, Hq, Dv], or None if these keys are not the cache's business."""
        raise NotImplementedError

    def enter(self, module: nn.Module, hidden: Tensor | None) -> None:
        """A module with a `layer_idx` starts to work on these hidden states [B, T, d_model]."""
        raise NotImplementedError

    def needs_mask(self) -> bool:
        """Whether some layer that is not sliding still attends with the model's own mask."""
        raise NotImplementedError


class _Passes(local):
    """The passes over a `KVCache` that run in this thread, innermost last."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, HookedCache]] = []


_passes = _Passes()
_lock = Lock()
_switched: dict[int, tuple[str, int]] = {}
"""By id of a config: the implementation it named, and how many passes need it switched."""
_watched: "weakref.WeakKeyDictionary[nn.Module, _Watch]" = weakref.WeakKeyDictionary()
_gone: "deque[weakref.ref[nn.Module]]" = deque()
"""Decoders one cache of which is gone: garbage collection may find it while the lock is held."""


def running() -> HookedCache | None:
    """The cache of the innermost pass that runs in this thread."""
    return _passes.stack[-1][1] if _passes.stack else None


def decoder_of(model: "PreTrainedModel") -> nn.Module:
    """The module whose forward runs the text layers."""
    decoder: nn.Module = model.get_decoder()
    return decoder


def watch(decoder: nn.Module, cache: HookedCache) -> None:
    """Hook `decoder` until `cache` (and every other cache it is watched for) is gone.

    Args:
        decoder: see `decoder_of`.
        cache: whose life the hooks share.
    """
    with _lock:
        watcher = _watched.get(decoder)
        if watcher is None:
            watcher = _watched[decoder] = _Watch(decoder)
        watcher.users += 1
    weakref.finalize(cache, _forget, weakref.ref(decoder))
    _drain()


def _forget(reference: "weakref.ref[nn.Module]") -> None:
    _gone.append(reference)
    _drain()


def _drain() -> None:
    if not _lock.acquire(blocking=False):
        return  # whoever holds it is not done with the caches: the next one drains
    try:
        while _gone:
            decoder = _gone.popleft()()
            watcher = None if decoder is None else _watched.get(decoder)
            if decoder is not None and watcher is not None:
                watcher.users -= 1
                if watcher.users == 0:
                    watcher.remove()
                    del _watched[decoder]
    finally:
        _lock.release()


class _Watch:
    """The two hooks on one decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        self.users = 0
        self._signature = inspect.signature(decoder.forward)
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def __reduce__(self) -> Any:
        # A copied or saved model takes the hooks along, but nothing watches over the copy.
        return _unwatched, ()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _watched.get(module) is not self:
            return None
        cache = kwargs.get("past_key_values")
        if cache is None and args:
            cache = self._signature.bind_partial(*args, **kwargs).arguments.get("past_key_values")
        return cache if isinstance(cache, HookedCache) else None

    @untraced
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _watched.get(module) is self:
            _end(module, None, failed=True)  # a pass that was interrupted: no hook saw its end
        cache = self._cache(module, args, kwargs)
        if cache is None:
            return
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        cache.begin_forward(module, arguments | arguments.get("kwargs", {}))
        _switch(module.config)
        _passes.stack.append((module, cache))

    @untraced
    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        cache = self._cache(module, args, kwargs)
        if cache is not None:  # else not ours
            _end(module, cache, failed=output is None)


def _end(module: nn.Module, cache: HookedCache | None, *, failed: bool) -> None:
    """End the pass of a decoder that runs in this thread, if it is over this cache (or any)."""
    for index, (decoder, running) in enumerate(_passes.stack):
        if decoder is module and cache in (None, running):
            del _passes.stack[index]
            _restore(module.config)
            running.end_forward(failed=failed)
            return


def _unwatched() -> _Watch:
    return object.__new__(_Watch)


def _switch(config: Any) -> None:
    with _lock:
        name, users = _switched.get(id(config), (config._attn_implementation, 0))
        _switched[id(config)] = (name, users + 1)
        config._attn_implementation_internal = IMPLEMENTATION


def _restore(config: Any) -> None:
    with _lock:
        name, users = _switched[id(config)]
        if users > 1:
            _switched[id(config)] = (name, users - 1)
            return
        del _switched[id(config)]
        config._attn_implementation_internal = name


def _original_name(config: Any) -> str:
    found = _switched.get(id(config))
    if found is None:
        # Another thread's pass has just ended, and the config names its own implementation again.
        name: str = config._attn_implementation
        return "sdpa" if name == IMPLEMENTATION else name
    return found[0]


@untraced
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function ``kvlib`` of transformers' `AttentionInterface`."""
    modeling = sys.modules[type(module).__module__]
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    eager: Any = getattr(modeling, "eager_attention_forward", None)
    original = functions.get_interface(_original_name(module.config), eager)
    if _passes.stack:
        call = AttentionCall(module, query, attention_mask, options, original)
        output = _passes.stack[-1][1].attend(key, call)
        if output is not None:
            return output, None
    result: tuple[Tensor, Tensor | None] = original(
        module, query, key, value, attention_mask, **options
    )
    return result


@untraced
def _mask(*args: Any, **options: Any) -> Any:
    """The mask function ``kvlib``: the model's own, where a layer still needs it."""
    if _passes.stack:
        if options.get("use_vmap") or not options.get("allow_is_causal_skip", True):
            raise ConfigError(
                "this forward pass overlays its causal mask with another one (image tokens, packed "
                "sequences, ...); KVCache supports causal masks, sliding windows and padding"
            )
        if options.get("local_size") is None and not _passes.stack[-1][1].needs_mask():
            return None
    masks = AttentionMaskInterface()
    name = _original_name(options["config"])
    return masks[name](*args, **options) if name in masks else None


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)
