# SPDX-License-Identifier: Apache-2.0
"""KVzip: keep what the model needs to repeat its context (arXiv 2505.23416, section 3).

After the prompt the model is asked, chunk by chunk, to repeat it, and reads the true text as if it
wrote it. An entry's score is the most attention that any of these queries, over the query heads of
its group, pays to it. No question is known yet, so one compressed cache serves all that follow. The
softmax behind a score is taken over the sinks, the chunk's own entries, and the request and
repetition so far (the authors' approximation; the pass itself sees the whole cache).

Heads of all layers compete for one budget (the paper's "pair" level): `joint` allocates, unless the
method says otherwise (``kvzip:budget=0.25+uniform``).

It costs another prefill, and more: every chunk of the prompt runs once more over the whole cache.
Text of the request and chunk sizes are NVIDIA kvpress 0.5.5's. It leaves the tokens of a chat
template's beginning unscored; here they are repeated like all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.attention import column_maxima, keys_only
from kvlib.budget import round_budget
from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, ProbeView, Resources
from kvlib.eviction.joint import Joint
from kvlib.eviction.scored import Allocator, Protect, ScoredPolicy
from kvlib.eviction.select import check_budget, keeps_all
from kvlib.eviction.words import end_of_turn, token_ids

__all__ = ["KVzip"]

_FIRST = "\n\nRepeat the previous context exactly."
_LATER = "\n\nRepeat the part of the previous context exactly, starting with"
_OVERLAP = 8
"""Tokens before a later chunk that tell where to start."""


@dataclass(frozen=True, slots=True)
class KVzip(ScoredPolicy):
    """Attention while repeating the context.

    Args:
        budget: entries per head after the prompt, on average: a fraction of it or a number of
            tokens.
        chunk: tokens repeated at a time.
        sinks: first tokens that always stay, and that every softmax sees.
        instruct: write the request in words before each repetition; that needs
            ``KVCache(..., tokenizer=...)``. Without it the chunk alone is read again.
    """

    budget: float | int = 0.5
    chunk: int = 2048
    sinks: int = 4
    instruct: bool = True
    name: ClassVar[str] = "kvzip"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "What the model looks at while it repeats its context is what any question may need. "
            "After the prompt, each chunk of it is read again behind a request to repeat it, and "
            "an entry's score is the most attention it gets. Heads of all layers compete for one "
            "budget."
        ),
        when="once, at the end of the prompt",
        cost="one to two more prefills; float32 per entry and KV head until the decision",
        paper=(
            "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv "
            "2505.23416; snu-mllab/KVzip, and NVIDIA kvpress 0.5.5"
        ),
        differs=(
            "Entries that lose are freed (kvpress masks them). All heads together keep the budget "
            "exactly, and the beginning of a chat template is scored like the rest."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        if self.chunk < 1 or self.sinks < 0:
            raise ConfigError(
                f"kvzip: chunk must be 1 or more and sinks 0 or more, got {self.chunk} and "
                f"{self.sinks}"
            )

    @property
    def needs(self) -> Needs:
        """Extra passes."""
        wanted = not keeps_all(self.budget)
        return Needs(probe=wanted, whole_model=True, steps=False)

    def check(self, resources: Resources) -> None:
        """Words need a tokenizer."""
        if self.instruct and resources.tokenizer is None and self.needs.probe:
            raise ConfigError(
                "kvzip asks the model in words to repeat its context: give "
                "KVCache(..., tokenizer=...), or set kvzip:instruct=false"
            )

    def protected(self, budget: int) -> Protect:
        """The sinks."""
        return Protect(sinks=self.sinks)

    @property
    def allocator(self) -> Allocator:
        """All heads of all layers together."""
        return Joint()

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """One for each chunk: the request, then the chunk; none where everything stays."""
        if len(prompt) <= round_budget(self.budget, len(prompt)):
            return ()
        chunks = prompt.split(self.chunk)
        out = []
        for index, chunk in enumerate(chunks):
            parts = [chunk]
            if self.instruct:
                before = chunks[index - 1][-_OVERLAP:] if index else prompt[:0]
                request = token_ids(resources.tokenizer, _LATER if index else _FIRST)
                ending = token_ids(resources.tokenizer, end_of_turn(resources.tokenizer))
                parts = [request.to(chunk), before, ending.to(chunk), chunk]
            out.append(torch.cat(parts))
        return out

    def on_probe(self, view: ProbeView) -> None:
        """Note the most attention that each entry of the chunk gets."""
        layer = view.layer
        start = view.index * self.chunk
        stop = min(start + self.chunk, view.num_prompt)
        sinks = min(self.sinks, start)
        near = torch.cat([layer.keys[:, :sinks], layer.keys[:, start:stop], view.keys], dim=1)
        seen = keys_only(layer.layer_idx, near)
        most = column_maxima(view.query, seen, replace(view.logits, window=None)).amax(1)
        scores = view.state.entries.get("scores")
        if scores is None:
            scores = most.new_zeros(len(near), max(layer.lengths))
            view.state.entries["scores"] = scores
        scores[:, start:stop] = most[:, sinks : sinks + stop - start]

    def scores(self, view: LayerView) -> Tensor:
        """The most attention that each entry got."""
        return view.state.entries["scores"]
