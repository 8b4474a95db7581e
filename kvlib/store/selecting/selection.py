# SPDX-License-Identifier: Apache-2.0
"""A method at work on one sequence: its abstracts, layer by layer."""

from torch import Tensor

from kvlib.store.selecting.base import HeadShape, Selector

__all__ = ["Selection"]


class Selection:
    """Which leaves each layer reads, for one sequence.

    Args:
        selector: the method.
        shape: the attention of every layer.
        num_layers: layers.
    """

    def __init__(self, selector: Selector, shape: HeadShape, num_layers: int) -> None:
        self.selector = selector
        self._layers = selector.open_layers(shape, num_layers)
        self._weights = [layer.nbytes for layer in self._layers]

    @property
    def num_tokens(self) -> int:
        """Tokens of the first layer."""
        return self._layers[0].num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(self._weights)

    def append(self, layer: int, keys: Tensor, queries: Tensor | None = None) -> None:
        """See `LayerSelector.append`."""
        self._layers[layer].append(keys, queries)
        self._weights[layer] = self._layers[layer].nbytes

    def take(self, layer: int, first: int, stop: int) -> Tensor:
        """See `LayerSelector.take`."""
        return self._layers[layer].take(first, stop)

    def extend(self, layer: int, rows: Tensor) -> int:
        """See `LayerSelector.extend`."""
        tokens = self._layers[layer].extend(rows)
        self._weights[layer] = self._layers[layer].nbytes
        return tokens

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
        return self.selector.choose(held.relevance(query), held.num_tokens)
