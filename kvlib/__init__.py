# SPDX-License-Identifier: Apache-2.0
"""kvlib: KV-cache management and compression for LLM inference.

The public names load on first use; `import kvlib` itself imports none of its dependencies.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlib.blocks import KVBlock, LayerKV
    from kvlib.budget import Budget
    from kvlib.cache import KVCache
    from kvlib.episodes import EpisodicCache
    from kvlib.errors import KVLibError
    from kvlib.keys import BlockKey, Extra, StoreKey, block_keys
    from kvlib.plans import apply_plan
    from kvlib.prefix import PrefixCache
    from kvlib.spec import KVSpec, LayerKind, LayerSpec, RopeSpec
    from kvlib.store.store import KVStore
    from kvlib.tiered import TieredCache

_HOME = {
    "BlockKey": "kvlib.keys",
    "Budget": "kvlib.budget",
    "EpisodicCache": "kvlib.episodes",
    "Extra": "kvlib.keys",
    "KVBlock": "kvlib.blocks",
    "KVCache": "kvlib.cache",
    "KVLibError": "kvlib.errors",
    "KVSpec": "kvlib.spec",
    "KVStore": "kvlib.store.store",
    "LayerKV": "kvlib.blocks",
    "LayerKind": "kvlib.spec",
    "LayerSpec": "kvlib.spec",
    "PrefixCache": "kvlib.prefix",
    "RopeSpec": "kvlib.spec",
    "StoreKey": "kvlib.keys",
    "TieredCache": "kvlib.tiered",
    "apply_plan": "kvlib.plans",
    "block_keys": "kvlib.keys",
}

__all__ = [
    "BlockKey",
    "Budget",
    "EpisodicCache",
    "Extra",
    "KVBlock",
    "KVCache",
    "KVLibError",
    "KVSpec",
    "KVStore",
    "LayerKV",
    "LayerKind",
    "LayerSpec",
    "PrefixCache",
    "RopeSpec",
    "StoreKey",
    "TieredCache",
    "apply_plan",
    "block_keys",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
