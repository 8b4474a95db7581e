# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S101 (this is for tests)
"""What `kvlib.testing.policies` runs policies over, and how it looks over their shoulder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache as cached
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvlib.blocks import LayerKV
from kvlib.eviction import About, LayerState, LayerView, Needs, Plans, Policy, ProbeView, Resources
from kvlib.eviction.scored import PolicyBase
from kvlib.testing.models import tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "HEADS",
    "HEAD_DIM",
    "LAYERS",
    "Note",
    "Recorder",
    "contract_model",
    "numbers_of",
    "positions_of",
    "random_tokens",
]

HEADS = 2
LAYERS = 2
HEAD_DIM = 8


def contract_model(group: int = 3, *, tied: bool = False) -> "PreTrainedModel":
    """A random Llama of 2 layers and 2 KV heads in float64, whose attention is far from uniform.

    Args:
        group: query heads for each KV head.
        tied: all logits are 0: every token is as good as another.
    """
    return _make_model(group, tied)


@cached
def _make_model(group: int, tied: bool) -> "PreTrainedModel":
    model = tiny_model(
        hidden_size=HEADS * group * HEAD_DIM,
        num_attention_heads=HEADS * group,
        num_key_value_heads=HEADS,
        num_hidden_layers=LAYERS,
        head_dim=HEAD_DIM,
    ).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(0 if tied else 8)
    return model


def random_tokens(batch: int, num: int, *, seed: int = 0) -> Tensor:
    """Token ids [batch, num]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 199, (batch, num), generator=generator)


@dataclass(frozen=True, slots=True)
class Note:
    """What a policy was shown of one layer when it decided, and had noted itself by then.

    Attributes:
        layer_idx: index in the model.
        num_new: tokens of the forward pass.
        num_prompt: tokens of the prompt.
        num_seen: tokens of the sequence.
        positions: of every entry, by head, the new ones included.
        entries: the per-entry numbers of the policy, by name and head.
    """

    layer_idx: int
    num_new: int
    num_prompt: int
    num_seen: int
    positions: list[list[int]]
    entries: dict[str, list[Tensor]]


class Recorder(PolicyBase):
    """A policy that lets another one decide and takes notes."""

    name: ClassVar[str] = "recorder"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.notes: list[Note] = []

    @property
    def about(self) -> About:
        """The other's."""
        return self._policy.about

    @property
    def needs(self) -> Needs:
        """The other's, and every step, to take notes of it."""
        return replace(self._policy.needs, steps=True)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Pass it on."""
        self._policy.on_prefill_chunk(view)

    def on_prefill_piece(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Pass it on."""
        return self._policy.on_prefill_piece(views)

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """Pass it on."""
        return self._policy.probes(prompt, resources)

    def on_probe(self, view: ProbeView) -> None:
        """Pass it on."""
        self._policy.on_probe(view)

    def rerun(self, prompt: Tensor, views: Sequence[LayerView]) -> Tensor | None:
        """Pass it on and take notes."""
        chosen = self._policy.rerun(prompt, views)
        self._take_notes(views)
        return chosen

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Pass it on and take notes."""
        plans = self._policy.on_prefill_end(views)
        self._take_notes(views)
        return plans

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Pass it on and take notes."""
        asked = self._policy.needs.steps
        plans: Sequence[Plans] = self._policy.on_step(views) if asked else [()] * len(views)
        self._take_notes(views)
        return plans

    def _take_notes(self, views: Sequence[LayerView]) -> None:
        for view in views:
            self.notes.append(
                Note(
                    view.layer.layer_idx,
                    view.num_new,
                    view.num_prompt,
                    view.num_seen,
                    positions_of(view.layer),
                    numbers_of(view.state, view.layer),
                )
            )


def positions_of(layer: LayerKV) -> list[list[int]]:
    """Positions of every entry, by head."""
    return [row.positions.tolist() for row in layer.rows()]


def numbers_of(state: LayerState, layer: LayerKV) -> dict[str, list[Tensor]]:
    """Per-entry numbers of a policy, by name and head."""
    for name, x in state.entries.items():
        assert x.shape == layer.keys.shape[:-1], name
    return {
        name: [part.clone() for part in (x if layer.is_dense else x.split(list(layer.lengths)))]
        for name, x in state.entries.items()
    }
