# SPDX-License-Identifier: Apache-2.0
"""The half of `KvlibConnector` that lives beside the pages: it opens the store and moves blocks."""

import logging
import re
import time
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from kvlib.connectors.config import ConnectorConfig
from kvlib.connectors.identity import rank_heads
from kvlib.connectors.layouts import LAYOUTS, PageLayout, Pages, verify_layout
from kvlib.connectors.mover import Mover
from kvlib.connectors.vllm_meta import Answer, KvlibMetadata, KvlibWorkerMetadata
from kvlib.connectors.warm import warm_up
from kvlib.errors import ConnectorError
from kvlib.spec import KVSpec, LayerKind
from kvlib.store.heads import local_spec

__all__ = ["WorkerHalf", "mover_of"]

_LOG = logging.getLogger(__name__)

_movers: "weakref.WeakValueDictionary[str, Mover]" = weakref.WeakValueDictionary()


def mover_of(engine: str) -> Mover | None:
    """What moves the blocks of an engine, if that happens in this process."""
    return _movers.get(engine)


class WorkerHalf:
    """See the module.

    Args:
        vllm_config: vLLM's.
        config: of the connector.
        spec: what the numbers mean.
        kv_caches: the pages of each layer, by name.

    Raises:
        ConnectorError: the layout of the pages is not known, or is not what it is called.
        ConfigError: the store cannot be opened.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: ConnectorConfig,
        spec: KVSpec,
        kv_caches: dict[str, Tensor],
    ) -> None:
        self._vllm_config = vllm_config
        self._spec = spec
        names = sorted(kv_caches, key=_layer_number)
        if len(names) != spec.num_layers:
            raise ConnectorError(
                f"vLLM has {len(names)} layers with a cache of their own, the model has "
                f"{spec.num_layers}: draft models and layers that share a cache are served by "
                "KvlibTier only"
            )
        views = [kv_caches[name] for name in names]
        parallel = vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size
        heads, writes = rank_heads(spec, parallel.rank % ranks, ranks)
        # Ranks with the same heads share what is on disk only.
        self._writes = writes or config.path is None or config.admission != "always"
        seen = [view.shape[1] for view in views]
        want = [layer.num_kv_heads for layer in local_spec(spec, heads).layers]
        if seen != want:
            raise ConnectorError(
                f"rank {parallel.rank} of {ranks} has pages of {seen} KV heads by layer; expected "
                f"{want}: this engine deals heads out in another way. Run without the connector"
            )
        layout = self._layout(names[0], views[0])
        self.mover = Mover(
            config.open_store(heads), spec, Pages(views, layout), staging=config.staging_bytes
        )
        weakref.finalize(self, self.mover.close)
        warm_up(self.mover.store, spec)
        engine = str(vllm_config.kv_transfer_config.engine_id)
        if parallel.world_size == 1 and mover_of(engine) is not None:
            self.mover.close()
            raise ConnectorError(
                f"this process has a KvlibConnector for the engine_id {engine!r} already: name it "
                "once under MultiConnector, and give each engine of a process its own engine_id"
            )
        _movers[engine] = self.mover
        self._engine = engine
        self._failed: set[int] = set()
        self._finishing: set[str] = set()
        self._staging: dict[str, int] = {}  # number of the question that is to be answered
        _LOG.info(
            "kvlib: %d layers, pages of %d tokens laid out as %r; store at %s, codec %s",
            len(views),
            self.mover.pages.page_tokens,
            layout.name,
            config.path,
            config.codec,
        )

    def _layout(self, name: str, view: Tensor) -> PageLayout:
        """The tested layout of the pages."""
        layer = self._vllm_config.compilation_config.static_forward_context[name]
        backend = layer.get_attn_backend().get_name()
        if self._spec.layers[0].kind is LayerKind.MLA:
            verify_layout(LAYOUTS["latent"], view, None)
            return LAYOUTS["latent"]
        if backend == "CPU_ATTN":
            from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

            cache = self._vllm_config.cache_config
            isa = _get_attn_isa(view.dtype, view.shape[2], view.shape[3] // 2, cache.cache_dtype)
            layer.isa = isa  # the engine sets it later; its writer needs it now
            found = LAYOUTS.get(f"cpu-{isa}")
            if found is None:
                raise ConnectorError(
                    f"vLLM's CPU attention packs its pages as {isa!r} here; kvlib knows vec and amx"
                )
        else:
            found = LAYOUTS["rows"]

        def writer(keys: Tensor, values: Tensor, memory: Tensor, slots: Tensor) -> None:
            layer.impl.do_kv_cache_update(layer, keys, values, memory, slots)

        try:
            verify_layout(found, view, writer)
        except ConnectorError as exc:
            raise ConnectorError(f"attention back end {backend}: {exc}") from exc
        return found

    def close(self) -> None:
        """Finish what is being stored, and close the store."""
        _movers.pop(self._engine, None)
        self.mover.close()

    def begin(self, meta: KvlibMetadata) -> None:
        """Begin what the scheduler's half asked for."""
        for ticket in meta.releases:  # first: a request may ask again in the same step
            self._staging.pop(ticket, None)
            self.mover.release(ticket)
        for ticket, number, keys, first, seconds in meta.stages:
            self._staging[ticket] = number
            self.mover.stage(ticket, cast("Any", keys), first, time.monotonic() + seconds)
        for ticket, pages, first_token in meta.loads:
            self.mover.load(ticket, pages, first_token)

    def save(self, meta: KvlibMetadata) -> None:
        """Begin to copy out the blocks that this step completed."""
        saves = meta.saves if self._writes else []
        ready = self._computed() if saves else None
        for save in saves:
            self.mover.save(save, ready)
        self._finishing.update(meta.finishing)

    def _computed(self) -> Callable[[], None] | None:
        """What waits until the device has done what it was given so far."""
        view = self.mover.pages.views[0]
        if not view.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(view.device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def finished(self, over: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose pages are copied out, and whose are filled (or failed).

        Args:
            over: requests that ended.
        """
        received = set()
        for ticket, failed in self.mover.loaded():
            received.add(ticket)
            self._failed.update(failed)
        for ticket in over:
            self._staging.pop(ticket, None)
            self.mover.forget(ticket)
        sent = {ticket for ticket in self._finishing if not self.mover.is_saving(ticket)}
        self._finishing -= sent
        for ticket in sent:
            self.mover.forget(ticket)  # also what was begun after the request was over
        return sent or None, received or None

    def failed(self) -> set[int]:
        """Pages that were not filled, since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def report(self) -> KvlibWorkerMetadata | None:
        """What was staged since the last step; for a scheduler that lives elsewhere."""
        meta = KvlibWorkerMetadata()
        for ticket, number in list(self._staging.items()):
            staged = self.mover.staged(ticket)
            if staged is not None:
                meta.staged[ticket, number] = Answer(staged.num_blocks, staged.fidelity)
                del self._staging[ticket]
        return meta if meta.staged else None


def _layer_number(name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", name))
