# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a long context a step reads: what all methods share.

A `Selector` is the method and its parameters, as a method string writes them. For each sequence it
opens a `LayerSelector` a layer, which is given the keys as they come and gives every leaf a
relevance for the queries of a step. What is chosen from that is decided here, the same way for all.

**Budget.** `budget` is the share (or the number) of the tokens so far that a layer reads for one KV
head in one step. The first `sinks` and the last `recent` tokens are read every time and are **part
of it**; the leaves that are left go to the most relevant ones. Where the budget is too small for
these, the recent ones give way, then the sinks; the last leaf, which may be unfinished, is always
read. So a step reads at most max(1, budget // leaf) leaves; a budget of all tokens reads all.

**Unit.** A leaf is `LEAF_TOKENS` tokens; methods with a `leaf` of more choose and read that many
together. The same leaves are read for all KV heads of a layer (`heads=joint`: one read brings all
heads) or others for each (`heads=each`: better chosen, but leaves of one head must be readable).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.budget import round_budget
from kvlib.errors import ConfigError, ShapeError
from kvlib.keys import BLOCK_TOKENS
from kvlib.store.abstracts import AbstractForm, Boxes, check_keys
from kvlib.store.leaves import LEAF_TOKENS

__all__ = ["BudgetedSelector", "HeadShape", "LayerSelector", "Selector", "merge_heads"]


@dataclass(frozen=True, slots=True)
class HeadShape:
    """The attention of a layer.

    Attributes:
        q_heads: query heads.
        kv_heads: KV heads; each serves q_heads / kv_heads query heads in a row.
        dim: channels of a key.
        scale: of the logits: softmax(scale * q . k).
    """

    q_heads: int
    kv_heads: int
    dim: int
    scale: float

    def __post_init__(self) -> None:
        """Check that the groups are whole."""
        if min(self.q_heads, self.kv_heads, self.dim) < 1 or self.q_heads % self.kv_heads:
            raise ConfigError(
                f"{self.q_heads} query heads cannot share {self.kv_heads} KV heads of {self.dim} "
                "channels"
            )

    def grouped(self, query: Tensor) -> Tensor:
        """Queries [q_heads, t, dim] as [kv_heads, q_heads / kv_heads * t, dim], scaled, float32.

        Raises:
            ShapeError: they are of another shape, or there are none.
        """
        if query.dim() != 3 or query.shape[::2] != (self.q_heads, self.dim) or not query.shape[1]:
            raise ShapeError(
                f"queries are {tuple(query.shape)}, expected [{self.q_heads}, tokens, {self.dim}] "
                "with 1 token or more"
            )
        return query.float().mul(self.scale).reshape(self.kv_heads, -1, self.dim)


class LayerSelector:
    """What a method knows of one layer of one sequence; as it stands, one that reads everything.

    Args:
        shape: the layer's attention.
    """

    def __init__(self, shape: HeadShape) -> None:
        self.shape = shape
        self.num_tokens = 0

    def append(self, keys: Tensor, queries: Tensor | None = None) -> None:
        """Take note of the next tokens.

        Args:
            keys: [kv_heads, t, dim], post-RoPE.
            queries: [q_heads, t, dim], post-RoPE, of the same tokens; only where the method's
                `needs_queries` is set.

        Raises:
            ShapeError: keys or queries of another shape.
            ConfigError: queries are needed and missing.
        """
        check_keys(keys, self.shape.kv_heads, self.shape.dim)
        if keys.shape[1]:
            self._append(keys, queries)
            self.num_tokens += keys.shape[1]

    def _append(self, keys: Tensor, queries: Tensor | None) -> None:
        """Take note of keys of the right shape, not empty."""

    def take(self, first: int, stop: int) -> Tensor:
        """The abstracts of tokens [first, stop), whole units of the method's form.

        Returns:
            uint8 [units, row bytes].

        Raises:
            ConfigError: the method's abstracts are no rows of bytes (`Selector.form` is None).
        """
        raise ConfigError(f"{type(self).__name__} has no abstracts to take out")

    def extend(self, rows: Tensor) -> int:
        """Take note of the next tokens by their abstracts, as `take` gave them.

        Returns:
            How many tokens these are.

        Raises:
            ShapeError: rows of another size, or tokens before them that are no whole unit.
            ConfigError: see `take`.
        """
        tokens = self._extend(rows)
        self.num_tokens += tokens
        return tokens

    def _extend(self, rows: Tensor) -> int:
        raise ConfigError(f"{type(self).__name__} has no abstracts to put back")

    def relevance(self, query: Tensor) -> Tensor | None:
        """How much the queries of a step ask for each unit of leaves, in any scale.

        Args:
            query: [q_heads, t, dim], post-RoPE.

        Returns:
            float32 [kv_heads or 1, units], or None: everything is read.
        """
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0


@dataclass(frozen=True, slots=True)
class Selector(ABC):
    """A method with its parameters.

    Attributes:
        name: as in method strings.
    """

    name: ClassVar[str]

    @property
    def needs_queries(self) -> bool:
        """Whether `LayerSelector.append` must be given the tokens' queries."""
        return False

    @property
    def form(self) -> AbstractForm | None:
        """What `LayerSelector.take` gives, and may be stored with a block; None if nothing."""
        return None

    def check_model(self, identity: str) -> None:  # noqa: B027 (most need no calibration)
        """Refuse a model (`kvlib.artefacts.model_identity`) that it was not calibrated for.

        Raises:
            ConfigError: naming both.
        """

    @abstractmethod
    def open(self, shape: HeadShape) -> LayerSelector:
        """Begin a layer of a sequence."""

    def open_layers(self, shape: HeadShape, num_layers: int) -> list[LayerSelector]:
        """Begin all layers of a sequence."""
        return [self.open(shape) for _ in range(num_layers)]

    def choose(self, relevance: Tensor | None, num_tokens: int) -> Tensor:
        """Leaves to read.

        Args:
            relevance: [rows, units], or None for everything.
            num_tokens: tokens of the sequence.

        Returns:
            int64 [rows, n], ascending in each row. Here, with 1 row: all leaves.
        """
        return torch.arange(-(-num_tokens // LEAF_TOKENS))[None]


@lru_cache(typed=True)  # 1 is a token, 1.0 is everything
def _budget_tokens(budget: float | int, num_tokens: int) -> int:
    """`round_budget`, which is exact and slow, once for all layers of a step."""
    return round_budget(budget, num_tokens)


@dataclass(frozen=True, slots=True)
class BudgetedSelector(Selector):
    """A method that reads a part.

    Args:
        budget: share of the tokens so far, or a number of tokens, that a layer reads in a step for
            one KV head, `sinks` and `recent` included.
        leaf: tokens that are chosen and read together; a multiple of `LEAF_TOKENS`.
        sinks: first tokens, always read.
        recent: last tokens, always read.
    """

    budget: float | int = 0.1
    leaf: int = LEAF_TOKENS
    sinks: int = LEAF_TOKENS
    recent: int = 4 * LEAF_TOKENS

    def __post_init__(self) -> None:
        """Check the parameters."""
        if round_budget(self.budget, 1) == 0:
            raise ConfigError(f"{self.name}: a budget of 0 tokens reads nothing: give 1 or more")
        if self.leaf < LEAF_TOKENS or self.leaf % LEAF_TOKENS:
            raise ConfigError(
                f"{self.name}: leaf must be a multiple of {LEAF_TOKENS}, got {self.leaf}"
            )
        for name in ("sinks", "recent"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{self.name}: {name} must be 0 or more, got {self!r:.80}")

    def _box_form(self, dtype: str) -> AbstractForm | None:
        """The form of boxes of this method's leaves, if a block has whole ones."""
        return None if BLOCK_TOKENS % self.leaf else Boxes.form(dtype, self.leaf)

    def num_units(self, num_tokens: int) -> int:
        """Units of `leaf` tokens that a layer reads for a KV head in one step."""
        tokens = _budget_tokens(self.budget, num_tokens)
        units = -(-num_tokens // self.leaf)
        return units if tokens >= num_tokens else max(1, tokens // self.leaf)

    def choose(self, relevance: Tensor | None, num_tokens: int) -> Tensor:
        """See `Selector.choose`: the last units, the first ones, then those of most relevance."""
        units = -(-num_tokens // self.leaf)
        num = self.num_units(num_tokens) if num_tokens else 0
        if relevance is None or num == units:
            return Selector.choose(self, None, num_tokens)
        recent = units - max(num_tokens - self.recent, 0) // self.leaf
        recent = min(max(recent, 1), num)
        sinks = min(-(-self.sinks // self.leaf), num - recent)
        ranked = relevance.nan_to_num(nan=torch.inf).clamp(max=torch.finfo(torch.float32).max)
        ranked[:, units - recent :] = torch.inf
        ranked[:, :sinks] = torch.inf
        chosen = ranked.topk(num, sorted=False).indices.sort().values
        each = self.leaf // LEAF_TOKENS
        leaves = (chosen[..., None] * each + torch.arange(each)).flatten(1)
        return leaves[:, : -(-num_tokens // LEAF_TOKENS) - (units - num) * each]


def merge_heads(scores: Tensor, reduce: str, *, joint: bool) -> Tensor:
    """One relevance out of those of the queries that share what is read.

    Args:
        scores: [kv_heads, rows, units], logits of every query.
        reduce: ``mass``: the softmax over the units, summed over the queries; right where scores
            tell the attention that a unit receives. ``max``: the greatest score; right where scores
            only rank. Heads whose queries are large then choose more, and this is better than
            to let all choose alike (benchmarks/selection.py).
        joint: over all KV heads, else for each.

    Returns:
        [1 or kv_heads, units].
    """
    if joint:
        scores = scores.flatten(0, 1)[None]
    if reduce == "mass":
        return scores.softmax(-1).sum(1)
    return scores.amax(1)
