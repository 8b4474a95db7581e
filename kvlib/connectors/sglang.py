# SPDX-License-Identifier: Apache-2.0
"""`KvlibLinker`: prefixes of SGLang that persist, compressed and verified, shared with others.

Named in SGLang's ``--unified-cache-external-linker-config``. Blocks travel between SGLang's device
pools and a `kvlib.KVStore`, with no host tier of SGLang's between. All of SGLang's calls come from
its scheduler thread, which runs every request: nothing here waits for a disk but `lookup`, and that
no longer than it is told to.

SGLang aborts a request whose load fails. So `lookup` promises only what lies verified and decoded
in host memory, and a load is a copy in memory, layer by layer, while the model computes with the
layers that are there. Whatever else goes wrong is a miss, counted: SGLang computes what it did not
get.
"""

import logging
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)
from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.codecs import build_codec
from kvlib.codecs.base import describe_codec
from kvlib.connectors.config import ConnectorConfig
from kvlib.connectors.guard import guarded
from kvlib.connectors.ledger import Ledger, RequestState
from kvlib.connectors.mover import Mover
from kvlib.connectors.moves import Save, Saving
from kvlib.connectors.sglang_config import check_config, check_pool, check_version, spec_of
from kvlib.connectors.sglang_hooks import install
from kvlib.connectors.sglang_pools import pages_of, verify_pool
from kvlib.connectors.sglang_stats import Publisher
from kvlib.keys import BLOCK_TOKENS
from kvlib.store.replacement import Hint
from kvlib.threads import one_torch_thread

__all__ = ["KvlibLinker"]

_LOG = logging.getLogger(__name__)
_LOOKUP_S = 2.0


@dataclass(slots=True)
class _Request:
    """A request whose prefix was looked up.

    Attributes:
        state: its account.
        tokens: ids of those that may be served, or stored.
        taken: the account knows what was loaded.
    """

    state: RequestState
    tokens: Sequence[int]
    taken: bool = False


@dataclass(frozen=True, slots=True)
class _Load:
    """Staged blocks and the slots they go to."""

    rid: str
    parts: list[tuple[KVBlock, Tensor]]


class _Offload(NamedTuple):
    """A copy under way; nothing where there was nothing to copy."""

    save: Save | None
    task: "Saving | None"


class KvlibLinker(UnifiedCacheLinker):  # type: ignore[misc]
    """See the module; options: `kvlib.connectors.config.ConnectorConfig`.

    There ``deadline`` is how long a look-up may hold SGLang's scheduler, 2 seconds if not given: it
    returns what has arrived by then. While one that was given up is still under way, as on a disk
    that stalls, others do not wait at all.

    Raises:
        EngineVersionError: another SGLang than was tested.
        ConfigError: an option, or something of SGLang's own configuration that this linker does not
            serve.
        ConnectorError: SGLang's pools are not laid out as they are known.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        check_version()
        self.config = ConnectorConfig.parse({"deadline": _LOOKUP_S, **(extra_config or {})})
        check_config(server_args, params, components)
        self.spec = spec_of(server_args, self.config)
        self.forward_stream = forward_stream
        self._page = params.page_size
        pool = params.token_to_kv_pool_allocator.get_kvcache()
        pages = pages_of(pool)
        check_pool(self.spec, pool, [(view.shape[1], view.shape[2]) for view in pages.views])
        verify_pool(pool, pages)
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerWiseLoadCounter(pages.num_layers)
        codec = build_codec(self.config.codec)
        self._fidelity = describe_codec(codec)
        self.ledger = Ledger(
            self.spec,
            1,  # the pages of a `SlotPages`; `lookup` rounds to SGLang's
            salt=self.config.salt,
            lossless=codec.lossless,
            save=self.config.save,
            min_tokens=max(self.config.min_tokens, self._page),
        )
        self.counts: Counter[str] = Counter()
        self._requests: dict[str, _Request] = {}
        self._matching: str | None = None
        self._inserting: _Request | None = None
        self._offloading: tuple[int, int, Callable[[], Tensor]] | None = None
        self._late: set[str] = set()
        self._queued: dict[str, _Load] = {}
        self._loads: dict[int, Future[None]] = {}
        self._offloads: deque[_Offload] = deque()
        self._stale = False  # the weights changed, and the device still holds KV of the old ones
        self._closed = False
        self._publisher = Publisher({"model": str(server_args.served_model_name)})
        self._publishes = bool(params.enable_metrics)
        self._loader = ThreadPoolExecutor(1, "kvlib-load", one_torch_thread)
        self.mover = Mover(
            self.config.open_store(),
            self.spec,
            pages,
            staging=self.config.staging_bytes,
            waits_for_room=False,  # the scheduler makes room, and it is what would wait
        )
        install(self)
        weakref.finalize(self, self.mover.close)
        _LOG.info(
            "kvlib: %d layers, pages of %d tokens; store at %s, codec %s",
            pages.num_layers, self._page, self.config.path, self.config.codec,
        )  # fmt: skip

    # -- what the hooks tell

    @guarded(lambda: None)
    def matching(self, req: Any, tokens: Sequence[int], device_tokens: int) -> None:
        """See `Listener.matching`."""
        self._matching = None
        if self._closed or self._stale:
            return
        known = self._requests.get(req.rid)
        if known is None:
            known = self._begin(req)
        known.tokens = tokens
        known.state.local_tokens = device_tokens
        self._matching = req.rid

    def _begin(self, req: Any) -> _Request:
        plain = (
            req.multimodal_inputs is None
            and req.input_embeds is None
            and req.positional_embed_overrides is None
            and req.lora_id is None
            and req.extra_key is None
        )
        if not plain:
            self.counts["skipped_requests"] += 1
        state = self.ledger.begin(req.rid, cache_salt=req.cache_salt, read=plain, write=plain)
        mine = self._requests[req.rid] = _Request(state, ())
        return mine

    @guarded(lambda: None)
    def inserting(self, req: Any | None) -> None:
        """See `Listener.inserting`."""
        self._inserting = None
        if req is None or self._closed or self._stale:
            return
        mine = self._requests.get(req.rid)
        if mine is None:
            mine = self._begin(req)
            mine.state.write = False  # what it was computed from is not known
        mine.tokens = req.full_untruncated_fill_ids
        if self.config.save == "prompt":
            mine.tokens = mine.tokens[: len(req.origin_input_ids)]
        if not mine.taken:
            mine.taken = True
            self.ledger.taken(mine.state, 0)
        self._inserting = mine

    def offloading(self, start: int, stop: int, slots: Callable[[], Tensor]) -> None:
        """See `Listener.offloading`."""
        self._offloading = (start, stop, slots)

    @guarded(lambda: None)
    def released(self, rid: str) -> None:
        """See `Listener.released`."""
        if self._requests.pop(rid, None) is not None:
            self.ledger.end(rid)
            self.mover.forget(rid)

    def weights_change(self) -> None:
        """See `Listener.weights_change`: nothing is served or stored until SGLang's next flush."""
        self._stale = True
        self.counts["resets"] += 1

    # -- look-ups

    @guarded(list)
    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Every prefix length, in pages, that lies verified in host memory."""
        matching, self._matching = self._matching, None
        if matching != rid:
            self.counts["unknown_requests"] += not self._stale
            return []
        mine = self._requests[rid]
        state = mine.state
        if self._ask(rid, mine) is None:
            return []
        tokens = self.ledger.offer(state, len(mine.tokens) + 1, state.local_tokens)
        pages = min(tokens // self._page, len(transfers[0].keys))
        return list(range(1, pages + 1))

    def _ask(self, rid: str, mine: _Request) -> Any:
        """What is staged for a request; None if there is nothing, or not in time."""
        state = mine.state
        if state.asked and state.local_tokens < state.first * BLOCK_TOKENS:
            self.mover.release(rid)  # the device lost some of what it had: ask for more
            self.ledger.restart(state)
        if not state.asked:
            # SGLang has left out the last token already, which is always computed.
            prompt = range(len(mine.tokens) + 1)
            blocks = self.ledger.wanted(state, prompt, state.local_tokens)
            if not blocks:
                return None
            state.asked = True
            state.first = state.local_tokens // BLOCK_TOKENS
            state.deadline = time.monotonic() + self.config.deadline
            self.counts["lookups"] += 1
            self.mover.stage(rid, state.keys_for(mine.tokens, blocks), state.first, state.deadline)
        if state.staged is None:
            staged = self.mover.wait_staged(rid, self._patience(state.deadline))
            if staged is None:
                self.counts["lookups_late"] += rid not in self._late
                self._late.add(rid)
                return None
            self._late.discard(rid)
            if staged.crowded:  # others' blocks are waiting to be loaded: ask again
                self.ledger.restart(state)
                return None
            self.ledger.settled(state, staged)
            hit = max(staged.num_blocks - state.first, 0)
            self.counts["hit_blocks"] += hit
            self.counts["missed_blocks"] += max(len(state.keys) - state.first - hit, 0)
        return state.staged

    def _patience(self, deadline: float) -> float:
        """Seconds that a look-up may hold the scheduler; none while an earlier one is stuck."""
        self._late = {rid for rid in self._late if self.mover.is_staging(rid)}
        return 0.0 if self._late else deadline - time.monotonic()

    # -- loads

    @guarded(lambda: False)
    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Queue what `lookup` promised; False (it is gone) makes SGLang compute it."""
        mine = self._requests.get(rid)
        slots = transfers[0].device_indices
        if mine is None or self._closed or self._stale:
            self.counts["load_refusals"] += 1
            return False
        first = mine.state.local_tokens
        parts = self.mover.staged_part(rid, first, first + len(slots))
        if not parts:
            self.counts["load_refusals"] += 1
            return False
        cuts = list(slots.split([part.num_tokens for part in parts]))
        self._queued[rid] = _Load(rid, list(zip(parts, cuts, strict=True)))
        mine.taken = True
        self.ledger.taken(mine.state, len(slots))
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Forget a load that has not begun."""
        return self._queued.pop(rid, None) is not None

    def start_layer_wise_loading(self) -> int:
        """Begin what is queued; the index by which SGLang waits for its layers, -1 for nothing."""
        if not self._queued:
            return -1
        batch, self._queued = list(self._queued.values()), {}
        index: int = self.layer_done_counter.update_producer()
        ready = self.record_offload_ready()  # the slots may still be read for whom they were before
        self._loads[index] = self._loader.submit(self._load_layers, index, batch, ready)
        return index

    def _load_layers(self, index: int, batch: list[_Load], ready: list[Any]) -> None:
        begun = time.perf_counter()
        counter, pages = self.layer_done_counter, self.mover.pages
        try:
            for event in ready:
                event.synchronize()
            with self._side_stream() as landed:
                for layer in range(pages.num_layers):
                    for load in batch:
                        for block, slots in load.parts:
                            kv = block.layers[layer]
                            pages.write_layer(layer, slots, kv.keys, kv.values)
                    landed()
                    counter.complete(index, layer)
            tokens = sum(len(slots) for load in batch for _, slots in load.parts)
            taken = int((time.perf_counter() - begun) * 1e6)
            self.mover.count(loaded_tokens=tokens, load_us=taken)
        except Exception as exc:  # noqa: BLE001 (SGLang aborts these requests)
            _LOG.exception("kvlib: loading into SGLang's pools failed")
            self.mover.count(load_errors=1)
            counter.fail(index, exc)
        finally:
            for load in batch:
                self.mover.release(load.rid)

    @contextmanager
    def _side_stream(self) -> Iterator[Callable[[], None]]:
        """A stream for copies to the device, beside the model's; gives what waits for it."""
        device = self.mover.pages.views[0].device
        if device.type != "cuda":
            yield lambda: None
            return
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield stream.synchronize

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait for a batch; whether all of it landed."""
        landed: bool = self.layer_done_counter.finish(counter_index)
        task = self._loads.pop(counter_index, None)
        if task is not None:
            wait([task])
        return landed

    # -- offloads

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Store the blocks that end within a node of SGLang's tree."""
        note, self._offloading = self._offloading, None
        offload = self._offload(note, session_id)
        if offload is None:
            return False
        self._offloads.append(offload)
        return True

    @guarded(lambda: None)
    def _offload(
        self, note: tuple[int, int, Callable[[], Tensor]] | None, session: str | None
    ) -> _Offload | None:
        """The copy under way, or nothing where there is nothing to copy; None if it is refused.

        A node need not begin or end with a block: it gets the blocks that end in it, and the slots
        of its ancestors, which stay where they are as long as it does.
        """
        mine = self._inserting
        if note is None or mine is None:
            self.counts["unknown_requests"] += not self._stale
            return None
        start, stop, slots = note
        first, last = start // BLOCK_TOKENS, min(stop, len(mine.tokens)) // BLOCK_TOKENS
        state = mine.state
        if not state.write or first >= last:
            return _Offload(None, None)
        state.keys_for(mine.tokens, last)
        blocks = self.ledger.unstored(state, first, last)
        if blocks is None:
            return _Offload(None, None)
        # The state's keys may go further than this node: a save ends where its keys do.
        part = replace(state, keys=state.keys[:last])
        save = self.ledger.save(part, blocks, slots(), self._fidelity)
        if session:
            save = replace(save, hint=Hint(session=session))
        events = self.record_offload_ready()

        def ready() -> None:
            for event in events:
                event.synchronize()

        return _Offload(save, self.mover.save(save, ready))

    def num_completed_offloads(self) -> int:
        """Offloads at the front of the queue that are over; SGLang asks in every step."""
        if self._publishes and self._publisher.is_due():
            self._publish()
        number = 0
        for offload in self._offloads:
            if offload.task is not None and not offload.task.done():
                break
            number += 1
        return number

    def pop_completed_offload(self) -> bool:
        """Whether the oldest was stored."""
        save, task = self._offloads.popleft()
        if save is None or task is None:
            return True
        self.mover.is_saving(save.ticket)  # so that it forgets those that are over
        if not task.cancelled() and task.exception() is None and task.result() is not None:
            return True
        self.ledger.lost(save)
        return False

    # -- counters

    def stats(self) -> "Counter[str]":
        """All counters; see `kvlib.connectors.counters.COUNTERS`."""
        if not self._closed:
            stored = self.mover.store.stats()
            tiers = sum(tier.corrupt for tier in stored.tiers.values())
            self.counts["corrupt_records"] = stored.corrupt_records + tiers
        return self.counts + self.mover.counts

    @guarded(lambda: None)
    def _publish(self) -> None:
        self._publisher.publish(self.stats())

    # -- the end

    def _quiesce(self) -> None:
        self._queued.clear()
        wait(list(self._loads.values()))
        self._loads.clear()
        self.mover.quiesce()
        self._offloads.clear()
        self.layer_done_counter.reset()
        for rid in self._requests:
            self.ledger.end(rid)
        self._requests.clear()
        self._late.clear()
        self._matching = self._inserting = self._offloading = None

    def reset(self) -> None:
        """SGLang flushes its device: let go of its pools. What is stored stays.

        After new weights it is out of reach, and what is stored from now on is served to this
        engine only.
        """
        self._quiesce()
        if self._stale:
            epoch = f"{self.spec.model_id}#weights:{uuid4().hex}"
            self.ledger.renew(replace(self.spec, model_id=epoch))
            self._stale = False

    def close(self) -> None:
        """Let go of SGLang's pools, finish what is being stored, and close the store."""
        if self._closed:
            return
        self._quiesce()
        counts = self.stats()
        self._closed = True
        self._loader.shutdown(wait=True)
        self.mover.close()
        _LOG.info("kvlib: closed; %s", dict(sorted(counts.items())))
