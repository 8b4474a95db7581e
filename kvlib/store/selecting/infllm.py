# SPDX-License-Identifier: Apache-2.0
"""InfLLM (arXiv 2402.04617): leaves by the tokens that represent them.

A leaf's representatives are its tokens that received most attention from the tokens near behind
them: from queries less than `window` tokens later, in a softmax over that window, over all heads.
Its relevance is the mean of q . k over its representatives, over all heads of the layer and all
queries of the step, so all heads read the same leaves.

The paper rotates keys of distant blocks to one common position before it compares; here keys are
taken as attended. `kvlib.eviction.infllm` evicts by the same measure.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError, ShapeError
from kvlib.store.abstracts import Rows
from kvlib.store.selecting.base import BudgetedSelector, HeadShape, LayerSelector

__all__ = ["InfLLM"]

_QUERIES = 256  # whose attention is computed at a time


@dataclass(frozen=True, slots=True)
class InfLLM(BudgetedSelector):
    """Leaves by their representative tokens.

    Args:
        leaf: tokens of a leaf; the paper's blocks have 128.
        representatives: tokens that stand for a leaf.
        window: tokens behind a token whose attention to it counts.
    """

    leaf: int = 128
    representatives: int = 4
    window: int = 512
    name: ClassVar[str] = "infllm"

    def __post_init__(self) -> None:
        """Check the parameters."""
        BudgetedSelector.__post_init__(self)
        for name in ("representatives", "window"):
            if getattr(self, name) < 1:
                raise ConfigError(f"infllm: {name} must be 1 or more, got {getattr(self, name)}")

    @property
    def needs_queries(self) -> bool:
        """Attention received is what representatives are chosen by."""
        return True

    def open(self, shape: HeadShape) -> LayerSelector:
        """Begin a layer of a sequence."""
        return _Representatives(self, shape)


class _Representatives(LayerSelector):
    """Representatives of the leaves that `window` has passed, and all of those after them."""

    def __init__(self, method: InfLLM, shape: HeadShape) -> None:
        super().__init__(shape)
        self._method = method
        self._means = Rows((shape.kv_heads, shape.dim), torch.float32)  # relevance is linear in it
        self._keys = torch.empty(shape.kv_heads, 0, shape.dim)  # from the first leaf not passed on
        self._sums = torch.empty(0)

    def _append(self, keys: Tensor, queries: Tensor | None) -> None:
        if queries is None:
            raise ConfigError("infllm chooses representatives by attention: append needs queries")
        shape, tokens = self.shape, keys.shape[1]
        if queries.shape != (shape.q_heads, tokens, shape.dim):
            raise ShapeError(
                f"queries are {tuple(queries.shape)}, expected "
                f"[{shape.q_heads}, {tokens}, {shape.dim}]"
            )
        held = self._keys.shape[1]
        self._keys = torch.cat([self._keys, keys.float()], 1)
        self._sums = torch.cat([self._sums, torch.zeros(tokens)])
        for first in range(0, tokens, _QUERIES):
            self._watch(queries[:, first : first + _QUERIES], held + first)
        self._pass_by()

    def _watch(self, queries: Tensor, first: int) -> None:
        """Add the attention of queries, the first of which is of the held token `first`."""
        count = queries.shape[1]
        start = max(first - self._method.window + 1, 0)
        rows = self.shape.grouped(queries)  # [kv_heads, group * count, dim]
        logits = rows @ self._keys[:, start : first + count].transpose(1, 2)
        ahead = torch.arange(first, first + count)[:, None] - torch.arange(start, first + count)
        near = (ahead >= 0) & (ahead < self._method.window)
        logits = logits.unflatten(1, (-1, count)).masked_fill_(~near, -torch.inf)
        self._sums[start : first + count] += logits.softmax(-1).sum((0, 1, 2))

    def _pass_by(self) -> None:
        """Keep only the representatives of leaves that no further query is near to."""
        leaf = self._method.leaf
        done = max(self._keys.shape[1] - self._method.window, 0) // leaf * leaf
        if done:
            self._means.extend(self._chosen(done))
            self._keys, self._sums = self._keys[:, done:].clone(), self._sums[done:].clone()

    def _chosen(self, stop: int) -> Tensor:
        """Mean representative of each whole leaf of the first `stop` tokens held."""
        leaf = self._method.leaf
        num = min(self._method.representatives, leaf)
        best = self._sums[:stop].unflatten(0, (-1, leaf)).topk(num).indices  # [n, num]
        best = best + torch.arange(0, stop, leaf)[:, None]
        return self._keys[:, best].mean(2).transpose(0, 1)

    def relevance(self, query: Tensor) -> Tensor:
        leaf, held = self._method.leaf, self._keys.shape[1]
        means = [self._means.data]
        if whole := held // leaf * leaf:
            means.append(self._chosen(whole))
        if whole < held:
            num = min(self._method.representatives, held - whole)
            best = self._sums[whole:].topk(num).indices + whole
            means.append(self._keys[:, best].mean(1)[None])
        rows = self.shape.grouped(query).mean(1)  # [kv_heads, dim]
        return torch.einsum("hd,nhd->n", rows, torch.cat(means))[None]

    @property
    def nbytes(self) -> int:
        return self._means.nbytes + self._keys.nbytes + self._sums.nbytes
