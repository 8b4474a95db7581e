# SPDX-License-Identifier: Apache-2.0
"""Heads of two kinds: those that keep every token, and the others.

Which heads of a model need the whole context is the model's own, so it is measured once. The
policies that use it (RazorAttention, DuoAttention) differ in how, and in what the others keep.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView

__all__ = ["HeadRoles", "highest_heads", "retrieval_heads"]


@dataclass(frozen=True, slots=True)
class HeadRoles:
    """The KV heads that keep everything.

    Attributes:
        whole: by layer; None for all heads of all layers. What is not named is not whole.
        shape: layers and KV heads that were measured; None where heads were named by hand.
        origin: where it comes from, for messages.
    """

    whole: Mapping[int, frozenset[int]] | None
    shape: tuple[int, int] | None
    origin: str

    @classmethod
    def from_text(cls, policy: str, text: str) -> "HeadRoles":
        """``all``, ``none``, or KV heads such as ``0.1/3.2``: layer.head, joined by ``/``.

        Raises:
            ConfigError: anything else.
        """
        origin = f"{policy}:heads={text}"
        if text == "all":
            return cls(None, None, origin)
        found: dict[int, set[int]] = {}
        for part in [] if text == "none" else text.split("/"):
            layer, dot, head = part.partition(".")
            if not (dot and layer.isdecimal() and head.isdecimal()):
                raise ConfigError(
                    f"{policy}: heads is all, none, or layer.head joined by '/' (0.1/3.2 is KV "
                    f"head 1 of layer 0 and KV head 2 of layer 3), got {text!r:.80}"
                )
            found.setdefault(int(layer), set()).add(int(head))
        return cls({k: frozenset(v) for k, v in found.items()}, None, origin)

    @classmethod
    def from_marks(cls, marks: Tensor, layers: list[int], origin: str) -> "HeadRoles":
        """From bool [L, Hkv], whose rows belong to these layers of the model."""
        whole = {
            layer: frozenset(row.nonzero()[:, 0].tolist())
            for layer, row in zip(layers, marks, strict=True)
        }
        return cls(whole, (marks.shape[0], marks.shape[1]), origin)

    def of(self, layer: int) -> frozenset[int] | None:
        """The KV heads of a layer that keep everything; None for all."""
        return None if self.whole is None else self.whole.get(layer, frozenset())

    def check(self, view: LayerView, layer: int) -> None:
        """Refuse a layer that the roles do not fit.

        Args:
            view: of the layer.
            layer: its number here.

        Raises:
            ConfigError: saying what they are for and what the model has.
        """
        if self.whole is None:
            return
        heads = view.layer.num_kv_heads
        seen = f"this model has {view.num_layers} layers of {heads} KV heads"
        if self.shape is not None:
            if self.shape != (view.num_layers, heads):
                raise ConfigError(
                    f"{self.origin} is for {self.shape[0]} layers of {self.shape[1]} KV heads, "
                    f"{seen} (layers with a sliding window not counted)"
                )
            if layer not in self.whole:
                known = ", ".join(map(str, self.whole))
                raise ConfigError(f"{self.origin} is for layers {known}; this one is {layer}")
            return
        is_last = view.place == view.num_layers - 1
        wrong = [
            f"{index}.{head}"
            for index, every in sorted(self.whole.items())
            for head in sorted(every)
            if (index == layer and head >= heads) or (index > layer and is_last)
        ]
        if wrong:
            raise ConfigError(f"{self.origin} names {', '.join(wrong)}; {seen}, counted from 0")


def highest_heads(scores: Tensor, num: int) -> Tensor:
    """Bool [L, Hkv] with the `num` highest scores [L, Hkv] marked.

    Of equal ones the earlier layer wins, then the lower head.
    """
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    marks = torch.zeros(scores.numel(), dtype=torch.bool)
    marks[order[:num].cpu()] = True
    return marks.view(scores.shape)


def retrieval_heads(
    induction: Tensor, echo: Tensor, induction_share: float, echo_share: float
) -> Tensor:
    """RazorAttention's retrieval heads: the highest by induction and the highest by echo score.

    Args:
        induction: [L, Hkv].
        echo: [L, Hkv].
        induction_share: of all KV heads of all layers together, to the nearest whole number, halves
            upwards. In a small model that can be none.
        echo_share: likewise.

    Returns:
        Bool [L, Hkv], the union.
    """
    nums = [
        int(Fraction(str(share)) * induction.numel() + Fraction(1, 2))
        for share in (induction_share, echo_share)
    ]
    return highest_heads(induction, nums[0]) | highest_heads(echo, nums[1])
