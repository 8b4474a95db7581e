# SPDX-License-Identifier: Apache-2.0
"""Lengths of keys, remembered from step to step: a step then takes those of new entries only."""

import torch
from torch import Tensor

from kvlib.eviction.base import LayerView

__all__ = ["forget_lengths", "key_lengths"]

_LENGTHS = "lengths"
"""Per entry in the state; 0, which new entries have, where it is not known."""


def key_lengths(view: LayerView, least: float) -> Tensor:
    """Float32 [Hkv, S]: the length of every key of a dense layer, and at least `least`."""
    keys, entries = view.layer.keys, view.state.entries
    held = entries.get(_LENGTHS)
    if held is None:
        found: Tensor = torch.linalg.vector_norm(keys.float(), dim=-1)
        entries[_LENGTHS] = found.clamp_(min=least)
        return found
    unknown = (held == 0).nonzero(as_tuple=True)
    if len(unknown[0]):
        found = torch.linalg.vector_norm(keys[unknown].float(), dim=-1)
        held[unknown] = found.clamp_(min=least)
    return held


def forget_lengths(view: LayerView, head: Tensor, entry: Tensor) -> None:
    """The keys of these entries will be others."""
    held = view.state.entries.get(_LENGTHS)
    if held is not None:
        held[head, entry] = 0
