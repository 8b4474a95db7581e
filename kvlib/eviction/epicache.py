# SPDX-License-Identifier: Apache-2.0
"""EpiCache's eviction: a prompt block by block, with a patched prompt behind it (arXiv 2509.17396).

Evicting a prompt once, at its end, bounds what is kept but not what is held before. Here the prompt
comes in blocks (``KVCache(..., prefill_chunk_size=512)``). After each of them a **patched prompt**
is read, which stands for the questions to come and leaves nothing behind; an entry's score is the
most attention that any of its queries, over the query heads of the group, pays to it; and the cache
goes back to its budget M. So no layer ever holds more than M entries and one block.

How well that works hangs on how much the patched prompt resembles the question. The paper keeps one
cache for each episode of a conversation, with an excerpt of the episode as its patched prompt:
`kvlib.EpisodicCache` does that on top of this policy. By itself the policy takes the patched prompt
from ``KVCache(..., patch=)``, or else asks in words for the essentials.

The softmax behind a score is over the cached entries alone, as in the authors' code: the patched
prompt's own tokens take no share. All heads of a layer compete for the layer's budget together
(Ada-KV without a floor); ``epicache:budget=2048+uniform`` gives each head the same.

**Layer budgets.** `kvlib calibrate epicache` measures how far a layer's keys change when tokens see
no further than some sinks and a window: s_l = 1 - cosine. Layer l gets M_l, proportional to
s_l ** alpha, and all layers together exactly L * M. Keys of the first layer depend on no attention
at all: s_0 is 0 and the paper's formula leaves it nothing. Its code gives every layer at least M/4,
and exceeds the total; here `floor` is shared out evenly first, and the rest by the formula.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.artefacts import load_artefact
from kvlib.attention import column_maxima
from kvlib.budget import round_budget
from kvlib.errors import ConfigError
from kvlib.eviction.adakv import AdaKV
from kvlib.eviction.base import About, LayerView, Needs, ProbeView, Resources
from kvlib.eviction.scored import Allocator, Protect, ScoredPolicy
from kvlib.eviction.select import by_entry, by_row, check_budget, keeps_all, largest_remainder
from kvlib.eviction.words import end_of_turn, token_ids

__all__ = ["INSTRUCTION", "EpiCache", "layer_budgets", "patch_digest"]

INSTRUCTION = (
    "\n\nExtract what is essential in this part of the conversation: who speaks, what the speakers "
    "are like, what happened and when, personal details, promises and plans, opinions, "
    "relationships, emotional moments and unusual experiences."
)
"""What a patched prompt begins with."""


@dataclass(frozen=True, slots=True)
class EpiCache(ScoredPolicy):
    """Block-wise prefill with a patched prompt.

    Args:
        budget: entries per head and layer, on average: a number of tokens, or a fraction of the
            tokens seen so far, decided anew after every block. Only a number bounds the memory.
        alpha: how much layer budgets follow sensitivities: 0 not at all. The authors' scripts have
            1.1 for Llama and 1.3 for Qwen2.5; they find 2 to 4 best for Qwen3-4B and 8 harmful.
        floor: share of the budget that all layers get alike, in [0, 1].
        sinks: first tokens that always stay; give the length of the system prompt.
        patch: digest of the patched prompt (`kvlib.eviction.epicache.patch_digest`), so that caches
            with different ones have different method strings; none for any.
        profile: file from `kvlib calibrate epicache`; without one, all layers get the same.
        digest: of the profile; filled in when it is read, and checked if it is given.
    """

    budget: float | int = 0.5
    alpha: float = 1.1
    floor: float = 0.25
    sinks: int = 4
    patch: str | None = None
    profile: str | None = None
    digest: str | None = None
    _sensitivity: Mapping[int, float] | None = field(
        init=False, repr=False, compare=False, default=None
    )
    name: ClassVar[str] = "epicache"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "The prompt comes in blocks, and the cache goes back to its budget after each of them, "
            "so memory is bounded during the prefill too. An entry's score is the most attention "
            "that a patched prompt, read after each block and forgotten, pays to it. Layers share "
            "the budget by how much their keys depend on distant context."
        ),
        when="after every block of the prompt, and at its end",
        cost="the patched prompt's tokens again for every block; float32 per entry while deciding",
        paper=(
            "EpiCache: Episodic KV Cache Management for Long-Term Conversation on "
            "Resource-Constrained Environments, arXiv 2509.17396; apple/ml-epicache"
        ),
        differs=(
            "Sinks are protected, the patched prompt starts at the next position (the code's "
            "starts at the last token's), and layer budgets sum to the total exactly: the code "
            "normalises sensitivities to [0, 1] and raises small budgets to M/4 on top."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters and read the profile."""
        check_budget(self.name, self.budget)
        if not (isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"epicache: alpha must be 0 or more, got {self.alpha}")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"epicache: floor is a share in [0, 1], got {self.floor}")
        if self.sinks < 0:
            raise ConfigError(f"epicache: sinks must be 0 or more, got {self.sinks}")
        if self.profile is not None:
            found = load_artefact(self.profile, self.name, self.digest or "")
            object.__setattr__(self, "digest", found.digest)
            object.__setattr__(self, "_sensitivity", self._read(found.tensors))

    def _read(self, tensors: Mapping[str, Tensor]) -> Mapping[int, float]:
        again = "make it again with kvlib calibrate epicache"
        if missing := {"layers", "sensitivity"} - tensors.keys():
            raise ConfigError(
                f"epicache profile {self.profile!r} lacks {', '.join(sorted(missing))}: {again}"
            )
        layers, numbers = tensors["layers"].tolist(), tensors["sensitivity"].tolist()
        if len(layers) != len(numbers) or not all(isfinite(s) and s >= 0 for s in numbers):
            raise ConfigError(
                f"epicache profile {self.profile!r} has sensitivities {numbers} for layers "
                f"{layers}; expected one of 0 or more for each: {again}"
            )
        return dict(zip(layers, numbers, strict=True))

    @property
    def needs(self) -> Needs:
        """Extra passes, and plans between the blocks."""
        if keeps_all(self.budget):
            return Needs(steps=False)
        return Needs(probe=True, whole_model=True, prefill_plans=True, steps=False)

    def check(self, resources: Resources) -> None:
        """There is a patched prompt, the right one, and the profile is this model's."""
        if not self.needs.probe:
            return
        if resources.patch is None and resources.tokenizer is None:
            raise ConfigError(
                "epicache reads a patched prompt behind every block: give KVCache(..., patch=token "
                "ids), or KVCache(..., tokenizer=...) for one in words. kvlib.EpisodicCache does it"
            )
        if resources.patch is not None and not _are_ids(resources.patch):
            raise ConfigError(
                "epicache: patch is int64 [n], one token id or more, got "
                f"{getattr(resources.patch, 'dtype', type(resources.patch).__name__)} "
                f"{list(getattr(resources.patch, 'shape', ()))}"
            )
        if self.patch is not None:
            found = None if resources.patch is None else patch_digest(resources.patch)
            if found != self.patch:
                raise ConfigError(
                    f"epicache: the method names the patched prompt {self.patch}, this cache was "
                    f"given {found or 'none'}: give KVCache(..., patch=) the same token ids, or "
                    "leave the parameter patch out"
                )
        if self.profile is not None and resources.identity is not None:
            profile = load_artefact(self.profile, self.name, self.digest or "")
            profile.check_model(resources.identity())

    def protected(self, budget: int) -> Protect:
        """The sinks."""
        return Protect(sinks=self.sinks)

    @property
    def allocator(self) -> Allocator:
        """All heads of a layer together."""
        return AdaKV(floor=0.0)

    def target(self, view: LayerView) -> int | None:
        """The layer's budget at this length of the prompt; None while all of it fits."""
        mean = self._mean(view.num_prompt)
        if mean is None or self._sensitivity is None:
            return mean
        place = list(self._sensitivity).index(view.layer.layer_idx)
        values = tuple(self._sensitivity.values())
        return layer_budgets(values, self.alpha, self.floor, mean)[place]

    def _mean(self, num_prompt: int) -> int | None:
        budget = self.budget
        mean = budget if isinstance(budget, int) else round_budget(budget, num_prompt)
        return None if num_prompt <= mean else mean

    def observe(self, view: LayerView) -> None:
        """A new block: what the heads were given after the last one is no longer so."""
        view.state.values.pop("budgets", None)

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """The patched prompt; none where everything stays."""
        if self._mean(len(prompt)) is None:
            return ()
        if resources.patch is not None:
            return (resources.patch,)
        text = INSTRUCTION + end_of_turn(resources.tokenizer)
        return (token_ids(resources.tokenizer, text),)

    def on_probe(self, view: ProbeView) -> None:
        """Note the most attention that each entry gets."""
        most = column_maxima(view.query, view.layer, view.logits, own=False)
        view.state.entries["scores"] = by_entry(most.amax(1), view.layer)

    def scores(self, view: LayerView) -> Tensor:
        """The most attention that each entry got."""
        return by_row(view.state.entries["scores"], view.layer)


def _are_ids(given: object) -> bool:
    if not isinstance(given, Tensor):
        return False
    return given.dim() == 1 and len(given) > 0 and given.dtype == torch.int64


def patch_digest(ids: Tensor) -> str:
    """16 hexadecimal digits that name a patched prompt, int64 [n]."""
    return blake2b(ids.cpu().numpy().astype("<i8").tobytes(), digest_size=8).hexdigest()


@lru_cache(maxsize=256)
def layer_budgets(
    sensitivity: tuple[float, ...], alpha: float, floor: float, budget: int
) -> tuple[int, ...]:
    """Entries per head of each layer: together exactly as many as `budget` in every layer.

    Args:
        sensitivity: 0 or more, of each layer.
        alpha: exponent.
        floor: share of the budget that all layers get alike.
        budget: average.
    """
    num = len(sensitivity)
    # Relative to the largest: a power of tiny numbers would be 0 for all of them.
    weights = [Fraction((s / (max(sensitivity) or 1.0)) ** alpha) for s in sensitivity]
    even = Fraction(1, num)
    part = Fraction(str(floor))  # the decimal as it is written
    total = sum(weights)
    shares = [part * even + (1 - part) * (w / total if total else even) for w in weights]
    return tuple(largest_remainder(shares, num * budget))
