# SPDX-License-Identifier: Apache-2.0
"""SpecKV: a draft model looks ahead (arXiv 2506.08373, section 3).

SnapKV votes with the end of the prompt. Here a draft model first writes what the answer may be; the
model reads that behind its prompt, and its queries vote too. An entry's score is the most attention
that any voting query of its group pays to it, maximum-pooled over neighbouring positions. The
highest stay, with the window; the draft's answer leaves nothing behind.

The draft is a second model with the same token ids (``KVCache(..., draft=model)``), or the model's
own first layers with its final norm and output matrix behind them (`layers`). It decodes greedily.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvlib.attention import column_maxima, keys_only
from kvlib.budget import round_budget
from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, ProbeView, Resources
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget, keeps_all

__all__ = ["SpecKV", "first_layers"]


@dataclass(frozen=True, slots=True)
class SpecKV(ScoredPolicy):
    """Votes of a drafted answer.

    Args:
        budget: entries per head after the prompt, window included: a fraction of it or a number of
            tokens.
        lookahead: tokens that the draft writes.
        window: last queries of the prompt that vote too; their tokens always stay.
        kernel: positions pooled, odd; 1 for none.
        layers: of the model itself that are the draft; 0 for the one that the cache was given.
    """

    budget: float | int = 0.5
    lookahead: int = 32
    window: int = 32
    kernel: int = 7
    layers: int = 0
    name: ClassVar[str] = "speckv"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar[About] = About(
        idea=(
            "A small model's guess at the answer shows what the answer will look at. The model "
            "reads the guess behind its prompt, and an entry's score is the most attention that "
            "the guess or the end of the prompt pays to it. The guess is then forgotten."
        ),
        when="once, at the end of the prompt",
        cost="the draft's prefill and steps; one short pass over the cache",
        paper=(
            "Draft-based Approximate Inference for LLMs, arXiv 2506.08373; "
            "furiosa-ai/draft-based-approx-llm"
        ),
        differs=(
            "Decides for each KV head. The prompt's own pass is dense: its sparse prefill is not "
            "part of this. The model's own first layers may be the draft."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        for name in ("lookahead", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"speckv: {name} must be 1 or more, got {getattr(self, name)}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"speckv: kernel must be odd, got {self.kernel}")
        if self.layers < 0:
            raise ConfigError(f"speckv: layers must be 0 or more, got {self.layers}")

    @property
    def needs(self) -> Needs:
        """The end of the prompt, and an extra pass."""
        if keeps_all(self.budget):
            return Needs(steps=False)
        return Needs(last_queries=self.window, probe=True, whole_model=True, steps=False)

    def check(self, resources: Resources) -> None:
        """There has to be a draft with the same token ids."""
        if not self.needs.probe:
            return
        if self.layers:
            num = len(resources.model.get_decoder().layers)
            if self.layers > num:
                raise ConfigError(f"speckv: layers is {self.layers}; the model has {num}")
            return
        if resources.draft is None:
            raise ConfigError(
                "speckv needs a draft: give KVCache(..., draft=model) a smaller model with the "
                "same tokenizer, or let the model's own first layers be one (speckv:layers=4)"
            )
        if not hasattr(resources.draft, "config"):
            raise ConfigError(
                f"speckv: draft is a model, not its name, got {resources.draft!r:.80}"
            )
        sizes = [x.config.get_text_config().vocab_size for x in (resources.model, resources.draft)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"speckv: the draft has {sizes[1]} token ids, the model {sizes[0]}; they must "
                "share a tokenizer"
            )

    def protected(self, budget: int) -> Protect:
        """The window's own tokens."""
        return Protect(window=self.window)

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """The drafted answer; none where everything stays."""
        if len(prompt) <= round_budget(self.budget, len(prompt)):
            return ()
        draft = resources.draft
        if self.layers:
            draft = first_layers(resources.model, self.layers)
        return (_greedy(draft, prompt, self.lookahead),)

    def on_probe(self, view: ProbeView) -> None:
        """Note the most attention that the draft pays to each entry."""
        held = view.layer.keys.shape[1]
        every = keys_only(view.layer.layer_idx, torch.cat([view.layer.keys, view.keys], dim=1))
        most = column_maxima(view.query, every, view.logits)[..., :held]
        view.state.entries["ahead"] = most.amax(1)

    def scores(self, view: LayerView) -> Tensor:
        """Pooled maxima [Hkv, S] over the draft's queries and the window's."""
        if view.last_queries is None:
            raise ConfigError("speckv needs the last queries of the prompt, and did not get them")
        late = column_maxima(view.last_queries, view.layer, view.logits).amax(1)
        most = torch.maximum(late, view.state.entries["ahead"])
        # The window's own entries stay anyway and do not lift their neighbours.
        most = most[:, : most.shape[1] - self.window]
        if self.kernel > 1 and most.shape[1]:
            most = torch.nn.functional.max_pool1d(most, self.kernel, 1, self.kernel // 2)
        return torch.nn.functional.pad(most, (0, view.layer.keys.shape[1] - most.shape[1]))


def first_layers(model: Any, num: int) -> Any:
    """A model of the first layers of another one, which it shares all weights with."""
    twin = _shallow(model)
    decoder = model.get_decoder()
    short = _shallow(decoder)
    short.layers = decoder.layers[:num]
    name = next(name for name, module in model.named_children() if module is decoder)
    setattr(twin, name, short)
    return twin


def _shallow(module: Any) -> Any:
    """A module with the same children, which can be replaced without touching the original."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _greedy(model: Any, prompt: Tensor, num: int) -> Tensor:
    """The `num` tokens that a model writes after a prompt, each the likeliest."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids, written = prompt[None].to(model.device), []
    for _ in range(num):
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        written.append(ids[0])
    return torch.cat(written).to(prompt.device)
