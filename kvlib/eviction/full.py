# SPDX-License-Identifier: Apache-2.0
"""The full cache: nothing is evicted. What every other policy is compared with."""

from dataclasses import dataclass
from typing import ClassVar

from kvlib.eviction.base import About, Needs
from kvlib.eviction.scored import PolicyBase

__all__ = ["Full"]


@dataclass(frozen=True, slots=True)
class Full(PolicyBase):
    """Keep everything."""

    name: ClassVar[str] = "full"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "Every entry stays. It is what all other policies are compared with. With it a "
            "KVCache is transformers' own DynamicCache, bit for bit."
        ),
        when="never",
        cost="none",
        paper="none",
        differs="nothing to differ from",
    )

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs(steps=False)
