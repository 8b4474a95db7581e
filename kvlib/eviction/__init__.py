# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: what of a cache is worth keeping. One file a policy.

A policy looks at `LayerView`s and answers with plans (`kvlib.plans`); it never touches a tensor of
the cache. `kvlib.KVCache` shows it the views and carries its plans out.
"""

from typing import Any

from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.eviction.base import (
    About,
    LayerState,
    LayerView,
    Needs,
    Plans,
    Policy,
    ProbeView,
    QueryMoments,
    Resources,
)
from kvlib.registry import Method, MethodCall, Registry, parse_method, suggest

__all__ = [
    "ALLOCATORS",
    "POLICIES",
    "PROTECTORS",
    "About",
    "LayerState",
    "LayerView",
    "Needs",
    "Plans",
    "Policy",
    "ProbeView",
    "QueryMoments",
    "Resources",
    "build_policy",
]

POLICIES: Registry[Policy] = Registry(
    "policies",
    {
        "d2o": "kvlib.eviction.d2o:D2O",
        "duo": "kvlib.eviction.duo:Duo",
        "epicache": "kvlib.eviction.epicache:EpiCache",
        "expected": "kvlib.eviction.expected:Expected",
        "full": "kvlib.eviction.full:Full",
        "gemfilter": "kvlib.eviction.gemfilter:GemFilter",
        "h2o": "kvlib.eviction.h2o:H2O",
        "infllm": "kvlib.eviction.infllm:InfLLM",
        "keydiff": "kvlib.eviction.keydiff:KeyDiff",
        "kvzap": "kvlib.eviction.kvzap:KVzap",
        "kvzip": "kvlib.eviction.kvzip:KVzip",
        "lazy": "kvlib.eviction.lazy:Lazy",
        "random": "kvlib.eviction.random:Random",
        "razor": "kvlib.eviction.razor:Razor",
        "snapkv": "kvlib.eviction.snapkv:SnapKV",
        "speckv": "kvlib.eviction.speckv:SpecKV",
        "streaming": "kvlib.eviction.streaming:Streaming",
        "think": "kvlib.eviction.think:ThinK",
        "tova": "kvlib.eviction.tova:TOVA",
    },
)

ALLOCATORS: Registry[Any] = Registry(
    "allocators",
    {
        "adakv": "kvlib.eviction.adakv:AdaKV",
        "joint": "kvlib.eviction.joint:Joint",
        "pyramid": "kvlib.eviction.pyramid:Pyramid",
        "threshold": "kvlib.eviction.threshold:Threshold",
        "uniform": "kvlib.eviction.uniform:Uniform",
    },
)
"""What shares a budget between heads and layers. Alone in a method, one works with SnapKV."""

PROTECTORS: Registry[Any] = Registry("protectors", {"protect": "kvlib.eviction.scored:Protect"})
"""What stays whatever its score."""

_PARTS: tuple[Registry[Any], ...] = (POLICIES, ALLOCATORS, PROTECTORS)


def build_policy(method: str | MethodCall | Method) -> Policy:
    """The policy that a method string describes: ``name:key=value,...``, joined by ``+``.

    Raises:
        ConfigError: the text is malformed, has a codec, parts do not fit, or a value is refused.
        UnknownPluginError: unknown name.
    """
    if isinstance(method, str):
        method = parse_method(method)
    if isinstance(method, MethodCall):
        method = Method((method,))
    if method.codec is not None:
        raise ConfigError(
            f"expected policies, got {str(method)!r}; a codec ('|') is given where bytes are stored"
        )
    calls = list(method.policies) or [MethodCall("full")]
    if len(calls) == 1 and calls[0].name in POLICIES.names():
        return POLICIES.build(calls[0])
    from kvlib.eviction.compose import ChannelPolicy, compose

    chosen = [POLICIES.get(call.name) for call in calls if call.name in POLICIES.names()]
    if calls[0].name in ALLOCATORS.names() and all(issubclass(x, ChannelPolicy) for x in chosen):
        calls[:1] = _with_scorer(calls[0])
    return compose([_build_part(call) for call in calls])


def _build_part(call: MethodCall) -> Any:
    for registry in _PARTS:
        if call.name in registry.names():
            return registry.build(call)
    known = [name for registry in _PARTS for name in registry.names()]
    raise UnknownPluginError(f"no policy is named {call.name!r:.80}.{suggest(call.name, known)}")


def _with_scorer(call: MethodCall) -> list[MethodCall]:
    """An allocator that begins a method works with SnapKV; parameters go where they belong."""
    from kvlib.eviction.compose import own_params

    mine = own_params(ALLOCATORS.get(call.name))
    theirs = own_params(POLICIES.get("snapkv"))
    for key, _ in call.params:
        if key not in mine | theirs:
            raise ConfigError(
                f"neither {call.name!r} nor 'snapkv', which it works with, has a parameter "
                f"{key!r:.80}.{suggest(key, mine | theirs)}"
            )
    scorer = tuple((k, v) for k, v in call.params if k in theirs and k not in mine)
    rest = tuple((k, v) for k, v in call.params if (k, v) not in scorer)
    return [MethodCall("snapkv", scorer), MethodCall(call.name, rest)]
