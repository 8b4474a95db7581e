# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: what of a cache is worth keeping. One file a policy.

A policy looks at `LayerView`s and answers with plans (`kvlib.plans`); it never touches a tensor of
the cache. `kvlib.KVCache` shows it the views and carries its plans out.
"""

from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerState, LayerView, Needs, Plans, Policy
from kvlib.registry import MethodCall, Registry, parse_method

__all__ = ["POLICIES", "LayerState", "LayerView", "Needs", "Plans", "Policy", "build_policy"]

POLICIES: Registry[Policy] = Registry(
    "policies",
    {
        "full": "kvlib.eviction.full:Full",
        "h2o": "kvlib.eviction.h2o:H2O",
        "keydiff": "kvlib.eviction.keydiff:KeyDiff",
        "random": "kvlib.eviction.random:Random",
        "snapkv": "kvlib.eviction.snapkv:SnapKV",
        "streaming": "kvlib.eviction.streaming:Streaming",
        "tova": "kvlib.eviction.tova:TOVA",
    },
)


def build_policy(method: str | MethodCall) -> Policy:
    """The policy that a method string (``name:key=value,...``) describes.

    Raises:
        ConfigError: the text is malformed, has several policies or a codec, or a value is refused.
        UnknownPluginError: unknown name.
    """
    if isinstance(method, str):
        parsed = parse_method(method)
        if parsed.codec is not None or len(parsed.policies) != 1:
            raise ConfigError(
                f"expected one policy, got {method!r}; policies that work together ('+') are not "
                "there yet, and a codec ('|') is given where bytes are stored"
            )
        method = parsed.policies[0]
    return POLICIES.build(method)
