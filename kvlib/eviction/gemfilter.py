# SPDX-License-Identifier: Apache-2.0
"""GemFilter: an early layer picks the prompt's tokens, the model reads only those (2409.17422).

Before the middle of the model, the last token of the prompt already looks at what its answer needs.
Its query in that layer, after the rotary embedding, meets every key: q.k, without scale or softmax,
summed over all query heads. The sums are averaged over neighbouring positions, and the k highest
tokens are chosen. The model then runs over these tokens alone, at fresh consecutive positions, as
if they were the prompt. This selects input; it evicts nothing.

`GemFilter` is that in a cache. The prompt's own pass is a full one, so it saves memory, not time;
the first generated token comes from its logits, and only later tokens see the chosen ones.
`kvlib.selection.select_tokens` is the cheap way: it runs the first layers only, and the caller
generates from the tokens it returns. Both choose the same.

What differs from the authors' code: the prompt's last token is always chosen, since generation goes
on from it (theirs may drop it). In a cache the chosen tokens stand right before the tokens to come,
not at 0: with fixed rotary frequencies that is the same, and other kinds are refused. The authors'
k is 1024, and their layer 13 of 32 for Llama 3.1, but 19 for Mistral and Phi-3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.budget import round_budget
from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Resources
from kvlib.eviction.scored import PolicyBase
from kvlib.eviction.select import check_budget, keep_highest, keeps_all

__all__ = ["GemFilter"]


@dataclass(frozen=True, slots=True)
class GemFilter(PolicyBase):
    """The tokens that the prompt's last query finds in one early layer, run again.

    Args:
        budget: tokens of the prompt that stay: a fraction of it or a number of tokens.
        layer: the layer that chooses, from 0; -1 for the one at 0.4 of the model's, 13 of 32.
        kernel: positions averaged, odd; 1 for none. Beyond the ends there are zeros.
    """

    budget: float | int = 0.5
    layer: int = -1
    kernel: int = 5
    name: ClassVar[str] = "gemfilter"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar[About] = About(
        idea=(
            "An early layer already knows which tokens the answer needs. The prompt's last query "
            "there picks the tokens with the largest inner products, summed over all heads and "
            "averaged over neighbours. The model then runs again on these tokens alone, and the "
            "cache holds that second run."
        ),
        when="once, at the end of the prompt",
        cost=(
            "a second, shorter prefill, during which both runs are held; it saves memory, not "
            "time (`kvlib.selection.select_tokens` does, ahead of `generate()`)"
        ),
        paper=(
            "Discovering the Gems in Early Layers, arXiv 2409.17422; SalesforceAIResearch/GemFilter"
        ),
        differs=(
            "The first generated token comes from the whole prompt's logits, and the prompt's last "
            "token is always among the chosen. Positions end where the prompt's do instead of "
            "beginning at 0. The default layer is a share of the model's layers; the authors set "
            "13 of 32 for Llama 3.1, 19 for Mistral and Phi-3."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.layer < -1:
            raise ConfigError(f"gemfilter: layer must be 0 or more, or -1, got {self.layer}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"gemfilter: kernel must be odd, got {self.kernel}")

    @property
    def needs(self) -> Needs:
        """The last query, and another run."""
        if keeps_all(self.budget):
            return Needs(steps=False)
        return Needs(last_queries=1, rerun=True, whole_model=True, steps=False)

    def check(self, resources: Resources) -> None:
        """The model has to have the layer."""
        config = resources.model.config.get_text_config(decoder=True)
        self.layer_of(config.num_hidden_layers)

    def layer_of(self, num_layers: int) -> int:
        """The layer that chooses, of a model with so many.

        Raises:
            ConfigError: there is no such layer.
        """
        if self.layer >= num_layers:
            raise ConfigError(
                f"gemfilter: layer is {self.layer}, but the model's layers are 0 to "
                f"{num_layers - 1}"
            )
        return min(round(0.4 * num_layers), num_layers - 1) if self.layer == -1 else self.layer

    def choose(self, view: LayerView) -> Tensor:
        """The tokens that a layer chooses of the prompt: int64 [k], ascending."""
        if view.last_queries is None:
            raise ConfigError("gemfilter needs the prompt's last query, and did not get it")
        scores = self._scores(view.last_queries[:, -1], view.layer.keys)
        scores[-1] = torch.inf
        return keep_highest(scores[None], round_budget(self.budget, len(scores)))[0]

    def _scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """[S]: pooled inner products of a query [Hq, D] with keys [Hkv, S, D]."""
        exact = torch.promote_types(keys.dtype, torch.float32)
        heads, _, width = keys.shape
        # Query heads that share keys are summed first: the sum of their products, for less work.
        shared = query.to(exact).view(heads, -1, width).sum(1)
        scores = (keys.to(exact) @ shared[:, :, None]).sum(0)[:, 0]
        return torch.nn.functional.avg_pool1d(scores[None], self.kernel, 1, self.kernel // 2)[0]

    def rerun(self, prompt: Tensor, views: Sequence[LayerView]) -> Tensor | None:
        """What the layer chooses; None for a prompt within the budget."""
        if len(prompt) <= round_budget(self.budget, len(prompt)):
            return None
        return self.choose(views[self.layer_of(len(views))])
