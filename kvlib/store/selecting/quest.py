# SPDX-License-Identifier: Apache-2.0
"""Quest (arXiv 2406.10774): leaves by a bound of their greatest logit.

For each page of keys the least and the greatest value of every channel bound q . k from above. Of
each KV head the pages with the greatest bounds are read. With query heads that share a KV head, a
page counts by the greatest of their bounds, as they are; the paper's models have no such groups.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.store.abstracts import BOX_DTYPES, AbstractForm, Boxes
from kvlib.store.selecting.base import BudgetedSelector, HeadShape, LayerSelector

__all__ = ["Quest"]


@dataclass(frozen=True, slots=True)
class Quest(BudgetedSelector):
    """The bound, for each KV head or for all together.

    Args:
        heads: ``joint``: the same leaves for all KV heads of a layer; ``each``: others for each.
        dtype: of the least and greatest values, see `kvlib.store.abstracts.BOX_DTYPES`.
    """

    heads: str = "joint"
    dtype: str = "int8"
    name: ClassVar[str] = "quest"

    def __post_init__(self) -> None:
        """Check the parameters."""
        BudgetedSelector.__post_init__(self)
        if self.heads not in ("joint", "each"):
            raise ConfigError(f"quest: heads must be joint or each, got {self.heads!r:.80}")
        if self.dtype not in BOX_DTYPES:
            raise ConfigError(f"quest: dtype is one of {', '.join(BOX_DTYPES)}: {self.dtype!r:.80}")

    @property
    def form(self) -> AbstractForm | None:
        """Boxes, as `leoam` has them."""
        return self._box_form(self.dtype)

    def open(self, shape: HeadShape) -> LayerSelector:
        """Begin a layer of a sequence."""
        return _Bounds(self, shape)


class _Bounds(LayerSelector):
    def __init__(self, method: Quest, shape: HeadShape) -> None:
        super().__init__(shape)
        self._joint = method.heads == "joint"
        self._boxes = Boxes(shape.kv_heads, shape.dim, leaf=method.leaf, dtype=method.dtype)

    def _append(self, keys: Tensor, queries: Tensor | None) -> None:
        self._boxes.append(keys)

    def take(self, first: int, stop: int) -> Tensor:
        return self._boxes.take(first // self._boxes.leaf, stop // self._boxes.leaf)

    def _extend(self, rows: Tensor) -> int:
        self._boxes.extend(rows)
        return len(rows) * self._boxes.leaf

    def relevance(self, query: Tensor) -> Tensor:
        bounds = self._boxes.scores(self.shape.grouped(query), 1.0)
        return bounds.amax((0, 1))[None] if self._joint else bounds.amax(1)

    @property
    def nbytes(self) -> int:
        return self._boxes.nbytes
