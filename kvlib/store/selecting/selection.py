# SPDX-License-Identifier: Apache-2.0
"""A method at work on one sequence: its abstracts layer by layer, and each layer's share."""

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.store.selecting.base import HeadShape, Selector

__all__ = ["Selection"]


class Selection:
    """Which leaves each layer reads, for one sequence.

    Args:
        selector: the method.
        shape: the attention of every layer.
        num_layers: layers.
        shares: how much of the budget each layer gets, 1 on average; None for all alike. Read as
            decimals, so that they may sum to `num_layers` exactly.

    Raises:
        ConfigError: `shares` are not one a layer, are negative, or sum to more than `num_layers`.
    """

    def __init__(
        self,
        selector: Selector,
        shape: HeadShape,
        num_layers: int,
        shares: Sequence[float] | None = None,
    ) -> None:
        shares = [1.0] * num_layers if shares is None else [float(x) for x in shares]
        total = sum(Fraction(str(x)) for x in shares)
        if len(shares) != num_layers or min(shares, default=0.0) < 0 or total > num_layers:
            raise ConfigError(
                f"shares are one a layer, not negative, and sum to at most {num_layers}: got "
                f"{len(shares)} that sum to {float(total)}"
            )
        self.selector = selector
        self.shares = shares
        self._layers = [selector.open(shape) for _ in range(num_layers)]

    @property
    def num_tokens(self) -> int:
        """Tokens of the first layer."""
        return self._layers[0].num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self._layers)

    def append(self, layer: int, keys: Tensor, queries: Tensor | None = None) -> None:
        """See `LayerSelector.append`."""
        self._layers[layer].append(keys, queries)

    def adapt(self, queries: Sequence[Tensor], power: float, part: float = 0.9) -> list[int]:
        """Share the budget out anew, by the skew of each layer's attention.

        A layer needs as many units as hold `part` of the attention that its abstracts tell of, on
        average over the queries. Its share is proportional to need^power: flat layers read more at
        the cost of skewed ones; together they read no more than before.

        Args:
            queries: of each layer [q_heads, t, dim], post-RoPE: the last ones of the prompt, say.
            power: 0 for equal shares.
            part: of the attention.

        Returns:
            What each layer needs, in units; empty where the method cannot tell, and nothing
            changed.
        """
        needs = []
        for layer, query in zip(self._layers, queries, strict=True):
            attention = layer.attention(query)
            if attention is None:
                return []
            reached = attention.sort(-1, descending=True).values.cumsum(-1) < part
            needs.append(1 + int(reached.sum(-1).float().mean()))
        weights = [need**power for need in needs]
        # Cut, not rounded, so that they never sum to more than there are layers.
        scale = len(weights) / sum(weights)
        self.shares = [int(weight * scale * 10**6) / 10**6 for weight in weights]
        return needs

    def select(self, layer: int, query: Tensor) -> Tensor:
        """Leaves that a step reads in a layer.

        Args:
            layer: which.
            query: [q_heads, t, dim], post-RoPE: the queries of the step, or a guess at them.

        Returns:
            int64 [kv_heads or 1, n], ascending in each row: with 1 row, the same for all heads. The
            last leaf, which may be unfinished, is always among them.
        """
        held = self._layers[layer]
        return self.selector.choose(held.relevance(query), held.num_tokens, self.shares[layer])
