# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a long context a decoding step reads, told from abstracts of their keys alone.

`base` says what a method is and how a budget becomes leaves; then one file a method. `Selection`
is a method at work on a sequence.
"""

from kvlib.registry import Registry
from kvlib.store.selecting.base import BudgetedSelector, HeadShape, LayerSelector, Selector
from kvlib.store.selecting.selection import Selection

__all__ = [
    "SELECTORS",
    "BudgetedSelector",
    "HeadShape",
    "LayerSelector",
    "Selection",
    "Selector",
]

SELECTORS: Registry[Selector] = Registry(
    "selectors",
    {
        "full": "kvlib.store.selecting.full:Full",
        "infllm": "kvlib.store.selecting.infllm:InfLLM",
        "leoam": "kvlib.store.selecting.leoam:LeoAM",
        "percent": "kvlib.store.selecting.percent:Percent",
        "quest": "kvlib.store.selecting.quest:Quest",
    },
)
"""The methods of this version, by the names that method strings use."""
