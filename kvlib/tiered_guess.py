# SPDX-License-Identifier: Apache-2.0
"""A guess at the next layer's query, so that what it needs is fetched while this layer computes.

What goes into the attention of one layer is much like what goes into that of the next, since
layers add little to the residual stream. So the next layer's own projection of this layer's input
is a good guess at its query (InfiniGen, arXiv 2406.19707). It decides only what is fetched early,
never what is attended to.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from kvlib.model_hooks import running, untraced

__all__ = ["QueryGuess"]


class QueryGuess:
    """Looks at the attention modules of a model, for one cache.

    Models whose attention has no `q_proj` of a known form give no guesses.

    Args:
        decoder: see `kvlib.model_hooks.decoder_of`.
        cache: whose passes to look at, and whose life the hooks share.
        dim: channels of a query.
    """

    def __init__(self, decoder: nn.Module, cache: object, heads: int, dim: int) -> None:
        self._heads, self._dim = heads, dim
        self._modules = {
            int(getattr(module, "layer_idx")): module  # noqa: B009 (else it is a tensor or a module)
            for module in decoder.modules()
            if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "q_proj")
        }
        self.seen: tuple[Any, Any] | None = None
        look = _Look(weakref.ref(self), weakref.ref(cache))
        handles = [
            module.register_forward_pre_hook(look, with_kwargs=True)
            for module in self._modules.values()
        ]
        weakref.finalize(cache, _remove, handles).atexit = False

    def forget(self) -> None:
        """Let go of what was seen."""
        self.seen = None

    @torch.no_grad()
    def query(self, layer: int) -> Tensor | None:
        """The query [Hq, 1, D] that a layer may have in this step; None if there is no telling."""
        module: Any = self._modules.get(layer)
        if module is None or self.seen is None:
            return None
        hidden, angles = self.seen
        rotate: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != (1, 1) or rotate is None:
            return None
        try:
            return self._query(module, rotate, hidden, angles)
        except Exception:  # noqa: BLE001 (a model of another form: a guess never fails a pass)
            self._modules.clear()
            return None

    def _query(self, module: Any, rotate: Any, hidden: Tensor, angles: Any) -> Tensor | None:
        query = module.q_proj(hidden)
        if query.shape[-1] % self._dim or not isinstance(angles, tuple) or len(angles) != 2:
            return None
        query = query.unflatten(-1, (-1, self._dim))
        if hasattr(module, "q_norm"):
            query = module.q_norm(query)
        query = query.transpose(1, 2)
        turned: Tensor = rotate(query, query, *angles)[0]
        return turned[0] if turned.shape[1] == self._heads else None


class _Look:
    """The hook; a copied or saved model takes it along, and there it sees nothing."""

    def __init__(self, guess: Any = None, owner: Any = None) -> None:
        self._guess, self._owner = guess, owner

    def __reduce__(self) -> Any:
        return _Look, ()

    @untraced
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        guess = None if self._guess is None else self._guess()
        if guess is not None and running() is self._owner():
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            guess.seen = hidden, kwargs.get("position_embeddings")


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
