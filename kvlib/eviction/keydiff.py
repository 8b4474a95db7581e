# SPDX-License-Identifier: Apache-2.0
"""KeyDiff: keep the keys that differ from the others (arXiv 2504.15364, section 4).

In each head, the anchor is the mean of all held keys after each is scaled to length 1; an entry's
score is minus the cosine of its key with the anchor. The most typical keys go, until the budget is
met: after the prompt, and after every step. No query and no attention is looked at, so it costs two
passes over the keys, and works beside any attention kernel.

The paper bounds the prompt's memory too, by evicting after each block of it; here a prompt is
evicted once at its end, as in NVIDIA kvpress. Keys are scored as cached, rotary embedding included.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs
from kvlib.eviction.key_lengths import key_lengths
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget, keeps_all

__all__ = ["KeyDiff"]

_TINY = 1e-12
"""Least length that a key is divided by."""


@dataclass(frozen=True, slots=True)
class KeyDiff(ScoredPolicy):
    """Distance from the mean key.

    Args:
        budget: entries per head: a fraction of the prompt or a number of tokens.
        window: last entries that always stay, within the budget; the paper has none.
    """

    budget: float | int = 0.5
    window: int = 0
    name: ClassVar[str] = "keydiff"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "Keys that resemble the others carry little. In each head the most typical keys, "
            "by cosine with the mean of all unit keys, go first. No query is looked at."
        ),
        when="at the end of the prompt and in every step",
        cost="two passes over the held keys in each step; 4 bytes an entry and KV head",
        paper=(
            "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference "
            "in Resource-Constrained Environments, arXiv 2504.15364"
        ),
        differs=(
            "The paper evicts after each block of the prompt, here once at its end, as in "
            "NVIDIA kvpress."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.window < 0:
            raise ConfigError(f"keydiff: window must be 0 or more, got {self.window}")

    @property
    def needs(self) -> Needs:
        """Nothing besides the keys."""
        return Needs(step_keys=not keeps_all(self.budget))

    def protected(self, budget: int) -> Protect:
        """The last entries."""
        return Protect(window=self.window)

    def scores(self, view: LayerView) -> Tensor:
        """Minus the cosine of each key with its head's anchor."""
        if view.layer.is_dense:
            return self.of_keys(view.layer.keys, key_lengths(view, _TINY))
        rows = [self.of_keys(row.keys[None], None)[0] for row in view.layer.rows()]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @staticmethod
    def of_keys(keys: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Scores [Hkv, S] of keys [Hkv, S, D], whose lengths [Hkv, S] may be known."""
        wide = keys.float()
        if lengths is None:
            lengths = torch.linalg.vector_norm(wide, dim=-1).clamp_(min=_TINY)
        anchor = lengths.reciprocal()[:, None] @ wide / keys.shape[1]
        anchor = normalize(anchor, dim=-1)
        cosines: Tensor = (anchor @ wide.transpose(1, 2))[:, 0] / lengths
        return cosines.neg_()
