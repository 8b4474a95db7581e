# SPDX-License-Identifier: Apache-2.0
"""The full cache: nothing is evicted. What every other policy is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlib.eviction.base import LayerView, Needs, Plans

__all__ = ["Full"]


@dataclass(frozen=True, slots=True)
class Full:
    """Keep everything."""

    name: ClassVar[str] = "full"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs(steps=False)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Nothing to note."""

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """No plans."""
        return [() for _ in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """No plans."""
        return [() for _ in views]
