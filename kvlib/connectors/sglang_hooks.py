# SPDX-License-Identifier: Apache-2.0
"""What SGLang does not tell a linker: token ids, and when weights change.

SGLang names pages to a linker by hashes of its own, which mean nothing to another engine. The
token ids stand one call above, in the tree's side of the linker; hooks of SGLang's own registry
(`sglang.srt.plugins`), which exist for this, hand them down. A hook tells a `Listener`, and changes
nothing: if it is never called, the linker knows no tokens and everything is a miss.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from kvlib.errors import EngineVersionError

__all__ = ["Listener", "install"]

_LOG = logging.getLogger(__name__)
_LINKER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_WEIGHTS = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
_UPDATES = (
    "begin_weight_update",
    "load_weights_from_distributed",
    "update_weights_from_disk",
    "update_weights_from_ipc",
    "update_weights_from_tensor",
)


class Listener(Protocol):
    """A linker; all calls come from SGLang's scheduler thread."""

    def matching(self, req: Any, tokens: Sequence[int], device_tokens: int) -> None:
        """A look-up of that request's prefix follows.

        Args:
            req: SGLang's request.
            tokens: ids of the leading tokens that may be served.
            device_tokens: of these that the device holds.
        """
        ...

    def inserting(self, req: Any | None) -> None:
        """What is offloaded from now on was computed by that request; None: by nobody known."""
        ...

    def offloading(self, start: int, stop: int, slots: Callable[[], Tensor]) -> None:
        """An offload of tokens [start, stop) follows.

        Args:
            start: counted from the beginning of the sequence.
            stop: likewise.
            slots: those of all tokens [0, stop).
        """
        ...

    def released(self, rid: str) -> None:
        """A request holds nothing any more."""
        ...

    def weights_change(self) -> None:
        """The model's weights are about to be others."""
        ...


_listeners: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _of(linker: Any) -> Listener | None:
    return linker if linker in _listeners else None


def _of_tree(cache: Any) -> Listener | None:
    return None if cache.linker is None else _of(cache.linker.cache_linker)


def _match(wrapper: Any, key: Any, req: Any, result: Any) -> None:
    listener = _of(wrapper.cache_linker)
    if listener is not None:
        listener.matching(req, key.raw_token_ids(), result.device_prefix_len)


def _offload_node(wrapper: Any, node_id: Any, transfers: Any) -> None:
    listener = _of(wrapper.cache_linker)
    if listener is not None:
        cache = wrapper.cache
        node = cache.tree_core.collect_path_info([node_id])[0][-1]
        listener.offloading(
            node.path_start, node.path_end, lambda: cache.path_device_indices(node_id)
        )


def _release_request(wrapper: Any, rid: str) -> None:
    listener = _of(wrapper.cache_linker)
    if listener is not None:
        listener.released(rid)


def _checkpoint(original: Any, cache: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    listener = _of_tree(cache)
    if listener is None:
        return original(cache, req, *args, **kwargs)
    listener.inserting(req)
    try:
        return original(cache, req, *args, **kwargs)
    finally:
        listener.inserting(None)


def _on_release(cache: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    listener = _of_tree(cache)
    if listener is not None:
        listener.released(req.rid)


def _weights(*args: Any, **kwargs: Any) -> None:
    for listener in list(_listeners):
        listener.weights_change()


def install(listener: Listener) -> None:
    """Have the hooks call a linker, for as long as it lives.

    Raises:
        EngineVersionError: SGLang has no such places, or something else stands there.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks: dict[str, tuple[Callable[..., Any], Any]] = {
        f"{_LINKER}.match": (_match, HookType.BEFORE),
        f"{_LINKER}._offload_node": (_offload_node, HookType.BEFORE),
        f"{_LINKER}.release_request": (_release_request, HookType.BEFORE),
        f"{_TREE}.checkpoint_into_tree": (_checkpoint, HookType.AROUND),
        f"{_TREE}.on_release": (_on_release, HookType.BEFORE),
        **{_WEIGHTS + name: (_weights, HookType.BEFORE) for name in _UPDATES},
    }
    if not _installed:
        for target, (hook, kind) in hooks.items():
            HookRegistry.register(target, hook, kind)
        HookRegistry.apply_hooks()  # what plug-ins registered was applied before: this adds ours
        _installed.extend(hooks)
    missing = [target for target in hooks if target not in HookRegistry._patched]
    if missing:
        raise EngineVersionError(
            f"this SGLang has no {', '.join(missing)}: kvlib cannot learn there what it needs to "
            "know. Use a version that is supported"
        )
    _listeners.add(listener)


_installed: list[str] = []
