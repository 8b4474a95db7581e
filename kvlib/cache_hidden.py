# SPDX-License-Identifier: Apache-2.0
"""What goes into a decoder's attention modules, for policies that ask for hidden states.

A cache is given keys and values, and the attention function queries; hidden states are seen by
neither. So the modules of the decoder that know which layer they belong to are hooked, as long as
the cache lives. The innermost of them that has been entered when attention is computed is the
attention module, whatever a model calls it, and what it was given is what the policy sees.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kvlib.errors import ConfigError
from kvlib.eviction.base import Needs
from kvlib.model_hooks import running, untraced

__all__ = ["HiddenStates", "watch_hidden"]


class HiddenStates:
    """Hidden states of one cache, from a forward pass to the decision about it.

    Args:
        needs: of the cache's policies.
    """

    def __init__(self, needs: Needs) -> None:
        self._wanted, self._steps = needs.hidden, needs.steps
        self._entered: tuple[nn.Module, Tensor | None] | None = None
        self._held: dict[tuple[int, int], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held between a pass and its decision."""
        return sum(x.numel() * x.element_size() for x in self._held.values())

    def enter(self, module: nn.Module, hidden: Tensor | None) -> None:
        """A module that knows its layer is about to run on [B, T, d_model]."""
        if self._wanted:
            self._entered = module, hidden

    def leave(self, module: nn.Module) -> Tensor | None:
        """What `module`, which computes attention now, was given; None if that is not known."""
        entered, self._entered = self._entered, None
        return entered[1] if entered is not None and entered[0] is module else None

    def keep(
        self, layer_idx: int, hidden: Tensor | None, valid: Tensor | None, *, is_step: bool
    ) -> None:
        """Hold the hidden states of a pass over one layer, if its decision is to see them.

        Args:
            layer_idx: index in the model.
            hidden: [B, T, d_model].
            valid: bool [B, T], which of them are tokens; None for all.
            is_step: the pass is not one of the prompt.

        Raises:
            ConfigError: they are wanted and not known.
        """
        if not self._wanted or (is_step and not self._steps):
            return
        if hidden is None:
            raise ConfigError(
                f"layer {layer_idx}'s attention was not called with hidden states as its first "
                "argument or as hidden_states=: use a policy that does not read them"
            )
        for sequence, x in enumerate(hidden.detach()):
            tokens = x if valid is None else x[valid[sequence].to(x.device)]
            self._held[layer_idx, sequence] = tokens

    def take(self, layer_idx: int, sequence: int, removed: int) -> Tensor | None:
        """Hand out the hidden states [T, d_model] of a pass without its last `removed` tokens."""
        hidden = self._held.pop((layer_idx, sequence), None)
        return None if hidden is None else hidden[: len(hidden) - removed]

    def clear(self) -> None:
        """Forget a pass that failed."""
        self._entered = None
        self._held = {}

    def copy_from(self, other: "HiddenStates") -> None:
        """Hold what another one holds, as far as it is wanted; tensors are shared, not written."""
        self._held = dict(other._held) if self._wanted else {}


def watch_hidden(decoder: nn.Module, cache: object) -> None:
    """Hook a decoder's layers until `cache` is gone.

    Args:
        decoder: see `kvlib.model_hooks.decoder_of`.
        cache: whose life the hooks share.
    """
    handles = [
        module.register_forward_pre_hook(_enter, with_kwargs=True)
        for module in decoder.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    weakref.finalize(cache, _remove, handles).atexit = False


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


@untraced
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the cache of the running pass; without state, so that copies of a model may have it."""
    cache = running()
    if cache is not None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        cache.enter(module, hidden if isinstance(hidden, Tensor) else None)
