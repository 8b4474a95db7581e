# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a prompt to keep, before anything is generated from them.

`select_tokens` is GemFilter (`kvlib.eviction.gemfilter`) as its authors run it: only the model's
first layers see the whole prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvlib.budget import round_budget
from kvlib.cache import KVCache
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView, Needs, Plans
from kvlib.eviction.gemfilter import GemFilter

__all__ = ["select_tokens"]


@torch.no_grad()
def select_tokens(
    model: Any,
    input_ids: Tensor,
    *,
    budget: float | int = 0.5,
    layer: int = -1,
    kernel: int = 5,
) -> Tensor:
    """The tokens of a prompt that `GemFilter` chooses; only layers up to `layer` are run.

        chosen = select_tokens(model, ids, budget=1024)
        model.generate(ids[:, chosen])

    Args:
        model: a transformers decoder that `KVCache` takes. Layers with a sliding window may be
            among those that are run, but cannot choose.
        input_ids: int64 [n] or [1, n], without padding.
        budget: see `GemFilter`.
        layer: likewise.
        kernel: likewise.

    Returns:
        Indices into the prompt, int64 [k], ascending.

    Raises:
        ConfigError: a parameter is refused, there are no token ids of one sequence, or the layer
            has a sliding window.
    """
    policy = _Early(budget, layer, kernel)
    given: Any = getattr(input_ids, "dtype", type(input_ids).__name__)
    if given not in (torch.int64, torch.int32):
        raise ConfigError(
            f"input_ids are {given}; select_tokens takes token ids, such as "
            'tokenizer(text, return_tensors="pt").input_ids'
        )
    if input_ids.dim() > 2 or (input_ids.dim() == 2 and len(input_ids) != 1):
        raise ConfigError(
            f"input_ids are {tuple(input_ids.shape)}; select_tokens takes one sequence, [n] or "
            "[1, n]: call it for each"
        )
    ids = input_ids.reshape(1, -1)
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    policy = _Early(budget, policy.layer_of(total), kernel)
    if ids.shape[1] <= round_budget(budget, ids.shape[1]):
        return torch.arange(ids.shape[1], device=ids.device)

    cache = KVCache(model, policy)
    try:
        model.get_decoder()(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    except _Chosen as chosen:
        return chosen.index.to(ids.device)
    raise ConfigError(
        f"layer {policy.layer} has a sliding window and does not see the whole prompt: choose one "
        "with full attention"
    )


class _Chosen(Exception):  # noqa: N818 (it is no error)
    """Ends a forward pass once its tokens are chosen: later layers are not needed."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index = index


class _Early(GemFilter):
    """Chooses as soon as its layer's attention is done."""

    __slots__ = ()

    @property
    def needs(self) -> Needs:
        """Layers one by one."""
        return Needs(last_queries=1, steps=False)

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Stop in the layer that chooses."""
        for view in views:
            if view.layer.layer_idx == self.layer:
                raise _Chosen(self.choose(view))
        return [() for _ in views]
