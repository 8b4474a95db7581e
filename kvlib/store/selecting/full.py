# SPDX-License-Identifier: Apache-2.0
"""Full loading: every step reads everything."""

from dataclasses import dataclass
from typing import ClassVar

from kvlib.store.selecting.base import HeadShape, LayerSelector, Selector

__all__ = ["Full"]


@dataclass(frozen=True, slots=True)
class Full(Selector):
    """Every leaf, every step."""

    name: ClassVar[str] = "full"

    def open(self, shape: HeadShape) -> LayerSelector:
        """Begin a layer of a sequence."""
        return LayerSelector(shape)
