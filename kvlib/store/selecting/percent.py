# SPDX-License-Identifier: Apache-2.0
"""FlexGen's percentages (arXiv 2303.06865): a fixed share stays in fast memory, all is read.

FlexGen splits the cache between devices by percentages that hold for the whole run. Attention is
over everything; what does not stay in memory is read every step.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvlib.budget import round_budget
from kvlib.errors import ConfigError
from kvlib.store.leaves import LEAF_TOKENS
from kvlib.store.selecting.base import HeadShape, LayerSelector, Selector

__all__ = ["Percent"]


@dataclass(frozen=True, slots=True)
class Percent(Selector):
    """Every leaf, every step; the first ones of each layer never leave memory.

    Args:
        resident: share of the tokens (or a number of them) that stays.
    """

    resident: float | int = 0.2
    name: ClassVar[str] = "percent"

    def __post_init__(self) -> None:
        """Check the parameters."""
        try:
            round_budget(self.resident, 1)
        except ConfigError as exc:
            raise ConfigError(f"percent: resident: {exc}") from exc

    def open(self, shape: HeadShape) -> LayerSelector:
        """Begin a layer of a sequence."""
        return LayerSelector(shape)

    def pinned(self, num_tokens: int) -> int:
        """Leaves, the first ones, that stay in memory."""
        return round_budget(self.resident, num_tokens) // LEAF_TOKENS
