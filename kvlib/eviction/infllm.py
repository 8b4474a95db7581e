# SPDX-License-Identifier: Apache-2.0
"""InfLLM's representative tokens as a scorer (arXiv 2402.04617, sections 3.2 and 3.3).

InfLLM evicts nothing: it keeps distant blocks of tokens in CPU memory, and fetches those whose
representatives suit the current queries. Here its measure of a block decides what stays. A block's
representatives are the tokens that received most attention while they were inside the local window
(from queries less than `window` tokens behind, in a softmax over that window), over all heads. A
block's score is the mean of q . k over its representatives, over all query heads and the last
`queries` queries of the prompt. All tokens of a block share its score, so whole blocks stay, the
same ones in every head of a layer; of the last one that fits in part, its first tokens. The initial
tokens and the last ones always stay.

The paper rotates keys of distant blocks to one common position before it compares; here keys are
taken as they are cached.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import check_budget, keep_highest, keeps_all

__all__ = ["InfLLM"]


@dataclass(frozen=True, slots=True)
class InfLLM(ScoredPolicy):
    """Blocks by their representative tokens.

    Args:
        budget: entries per head after the prompt: a fraction of it or a number of tokens.
        block: tokens of a block. The paper's 128 suits contexts far longer than its local window.
        representatives: tokens that stand for a block.
        window: local window in which a token's attention counts.
        queries: last queries of the prompt that choose.
        sinks: first tokens that always stay.
        recent: last tokens that always stay.
    """

    budget: float | int = 0.5
    block: int = 32
    representatives: int = 4
    window: int = 512
    queries: int = 64
    sinks: int = 16
    recent: int = 64
    name: ClassVar[str] = "infllm"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar[About] = About(
        idea=(
            "A few tokens can stand for a block of them. Those that received most attention from "
            "their neighbourhood represent it, and the last queries of the prompt rank blocks by "
            "them. Whole blocks stay, the same in every head of a layer."
        ),
        when="once, at the end of the prompt",
        cost="one more Q K^T over the prompt; no state",
        paper=(
            "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context "
            "Memory, arXiv 2402.04617; thunlp/InfLLM"
        ),
        differs=(
            "The paper fetches blocks for each query and drops none; this is its measure used to "
            "evict. Keys are compared with the positions they were cached at."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        for name in ("block", "representatives", "window", "queries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"infllm: {name} must be 1 or more, got {getattr(self, name)}")
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ConfigError(f"infllm: {name} must be 0 or more, got {getattr(self, name)}")

    @property
    def needs(self) -> Needs:
        """Attention from nearby, and the last queries themselves."""
        if keeps_all(self.budget):
            return Needs(steps=False)
        return Needs(prefill_local_sums=self.window, last_queries=self.queries, steps=False)

    def protected(self, budget: int) -> Protect:
        """Initial and local tokens."""
        return Protect(sinks=self.sinks, window=self.recent)

    def observe(self, view: LayerView) -> None:
        """Add what the queries of a piece of the prompt looked at nearby."""
        if view.local_sums is None:
            return
        old = view.state.entries.get("local")
        received = view.local_sums.sum(1)
        view.state.entries["local"] = received if old is None else old + received

    def scores(self, view: LayerView) -> Tensor:
        """[1, S]: every token has its block's score."""
        if view.last_queries is None:
            raise ConfigError("infllm needs the last queries of the prompt, and did not get them")
        keys = view.layer.keys.float()
        local = view.state.entries["local"].sum(0)
        queries = view.last_queries.float().unflatten(0, (len(keys), -1)).mean((1, 2))
        # Linear in the queries: their mean says it all.
        logits = torch.einsum("hd,hsd->s", queries, keys) / len(keys)
        held = len(local)
        scores = logits.new_empty(held)
        for start in range(0, held, self.block):
            stop = min(start + self.block, held)
            num = min(self.representatives, stop - start)
            chosen = keep_highest(local[None, start:stop], num)[0] + start
            scores[start:stop] = logits[chosen].mean()
        return scores[None]
