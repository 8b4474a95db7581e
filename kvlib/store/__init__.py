# SPDX-License-Identifier: Apache-2.0
"""Where records live: tiers, and the `KVStore` in front of them."""

from kvlib.registry import Registry
from kvlib.store.tier import CheckReport, Tier, TierStats

__all__ = ["TIERS", "CheckReport", "Tier", "TierStats"]

TIERS: Registry[Tier] = Registry(
    "tiers",
    {
        "file": "kvlib.store.files:FileStore",
        "memory": "kvlib.store.memory:MemoryTier",
        "segment": "kvlib.store.segments:SegmentStore",
    },
)
"""The tiers of this version; `KVStore` opens them with their arguments."""
