# SPDX-License-Identifier: Apache-2.0
"""Which records of a tier go first when room is needed.

`base` says what a tier asks and what a policy answers; then one file a policy. `hinted` is what all
of them share: records of which more is known than their past. `admission` decides who may come in.
"""

from kvlib.registry import Registry
from kvlib.store.replacement.base import Hint, Replacement, ReplacementState

__all__ = ["REPLACEMENTS", "Hint", "Replacement", "ReplacementState"]

REPLACEMENTS: Registry[Replacement] = Registry(
    "replacements",
    {
        "arc": "kvlib.store.replacement.arc:ARC",
        "belady": "kvlib.store.replacement.belady:Belady",
        "gdsf": "kvlib.store.replacement.gdsf:GDSF",
        "lfuda": "kvlib.store.replacement.lfuda:LFUDA",
        "lru": "kvlib.store.replacement.lru:LRU",
        "s3fifo": "kvlib.store.replacement.s3fifo:S3FIFO",
    },
)
"""The replacement policies of this version, by the names that method strings use."""
