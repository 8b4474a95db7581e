# SPDX-License-Identifier: Apache-2.0
"""The half of `KvlibConnector` that the scheduler asks: keys, accounts, and what is to be done."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from vllm import envs

from kvlib.codecs import build_codec
from kvlib.codecs.base import describe_codec
from kvlib.connectors.config import ConnectorConfig
from kvlib.connectors.ledger import Ledger, RequestState
from kvlib.connectors.mover import Mover
from kvlib.connectors.moves import Staged
from kvlib.connectors.vllm_meta import Answer, KvlibMetadata
from kvlib.connectors.vllm_worker import mover_of
from kvlib.keys import BLOCK_TOKENS
from kvlib.spec import KVSpec

if TYPE_CHECKING:
    from collections import Counter

__all__ = ["SchedulerHalf"]

_FINISH_WAIT_S = 0.1
_DRIVEN_WAIT_S = 2.0
_GRACE_S = 1.0
_REST_S = 0.0005
_LONG_REST_S = 0.005
_MOMENT_S = 0.05


class SchedulerHalf:
    """See the module.

    Args:
        vllm_config: vLLM's.
        config: of the connector.
        spec: what the numbers mean.
        page_tokens: tokens of a page.
        counts: counters to add to.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: ConnectorConfig,
        spec: KVSpec,
        page_tokens: int,
        counts: "Counter[str]",
    ) -> None:
        transfer = vllm_config.kv_transfer_config
        self._engine = str(transfer.engine_id)
        self._world = vllm_config.parallel_config.world_size
        self._deadline_s = config.deadline
        # An engine core in a process of its own makes a step as soon as pages are to be freed; one
        # that its caller drives may not make another for long, and keep them. On a CPU a step takes
        # longer than a copy, and the engine's cache may be reset right after the answer.
        slow = vllm_config.device_config.device_type == "cpu"
        self._patience_s = (
            (_FINISH_WAIT_S if slow else 0.0)
            if envs.VLLM_ENABLE_V1_MULTIPROCESSING
            else _DRIVEN_WAIT_S
        )
        self._read = transfer.is_kv_consumer
        self._write = transfer.is_kv_producer
        codec = build_codec(config.codec)
        self._fidelity = describe_codec(codec)
        self.counts = counts
        self.ledger = Ledger(
            spec,
            page_tokens,
            salt=config.salt,
            lossless=codec.lossless,
            save=config.save,
            min_tokens=config.min_tokens,
        )
        self._requests: dict[str, Any] = {}
        self._outbox = KvlibMetadata()
        self._answers: dict[str, Staged] = {}
        self._questions: dict[str, int] = {}  # the last one of each request
        self._partial: dict[str, Answer] = {}  # not all ranks have answered
        self._numbers = count()
        self._idle_since: float | None = None
        self._pages: dict[str, tuple[int, ...]] = {}  # that are being loaded

    @property
    def _peer(self) -> Mover | None:
        """What moves the blocks, where that happens in this process and nowhere else."""
        return mover_of(self._engine) if self._world == 1 else None

    def state(self, request: Any) -> RequestState:
        """The account of a request, begun when it is first heard of."""
        ticket = request.request_id
        state = self.ledger.requests.get(ticket)
        if state is None:
            plain = (
                not request.mm_features
                and request.prompt_embeds is None
                and request.lora_request is None
                and request.pooling_params is None
                and not request.resumable
            )
            hints = (request.kv_transfer_params or {}).get("kvlib")
            hints = hints if isinstance(hints, dict) else {}
            state = self.ledger.begin(
                ticket,
                cache_salt=request.cache_salt,
                read=plain
                and self._read
                and hints.get("read", True)
                and not request.skip_reading_prefix_cache,
                write=plain and self._write and hints.get("write", True),
            )
            self._requests[ticket] = request
            if not plain:
                self.counts["skipped_requests"] += 1
        return state

    def look_up(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond `num_computed_tokens` that lie verified in host memory; None: wait."""
        state = self.state(request)
        if state.loading:
            return 0, False
        if state.asked and num_computed_tokens < state.first * BLOCK_TOKENS:
            self._release(state)  # the engine lost some of what it had: ask for more
            self.ledger.restart(state)
        if not state.asked:
            self._ask(state, request, num_computed_tokens)
        if state.staged is None:
            staged = self._answer(state)
            if staged is None:
                return None, False
            self.ledger.settled(state, staged)
            hit = max(staged.num_blocks - state.first, 0)
            self.counts["hit_blocks"] += hit
            self.counts["missed_blocks"] += max(len(state.keys) - state.first - hit, 0)
        tokens = self.ledger.offer(state, request.num_tokens, num_computed_tokens)
        return tokens, tokens > 0

    def _ask(self, state: RequestState, request: Any, local_tokens: int) -> None:
        state.asked = True
        blocks = self.ledger.wanted(state, request.all_token_ids, local_tokens)
        if not blocks:
            state.staged = Staged(0)
            return
        self.counts["lookups"] += 1
        keys = state.keys_for(request.all_token_ids, blocks)
        state.first = local_tokens // BLOCK_TOKENS
        state.deadline = time.monotonic() + self._deadline_s
        peer = self._peer
        if peer is not None:
            peer.stage(state.ticket, keys, state.first, state.deadline)
        else:
            self._forget_answer(state.ticket)
            number = self._questions[state.ticket] = next(self._numbers)
            self._outbox.stages.append(
                (state.ticket, number, tuple(keys), state.first, self._deadline_s)
            )

    def _answer(self, state: RequestState) -> Staged | None:
        peer = self._peer
        staged = self._answers.get(state.ticket) if peer is None else peer.staged(state.ticket)
        if staged is None and time.monotonic() > state.deadline + _GRACE_S:
            self.counts["lookups_late"] += 1
            self._release(state)
            return Staged(0)
        return staged

    def _release(self, state: RequestState) -> None:
        peer = self._peer
        if peer is not None:
            peer.release(state.ticket)
        else:
            self._forget_answer(state.ticket)
            self._outbox.releases.append(state.ticket)

    def _forget_answer(self, ticket: str) -> None:
        """Of workers that live elsewhere: also one that is still on its way."""
        self._answers.pop(ticket, None)
        self._partial.pop(ticket, None)
        self._questions.pop(ticket, None)

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The engine takes what was offered, or leaves it."""
        state = self.state(request)
        if state.loading:
            return  # the second call, after the load
        self.ledger.taken(state, num_external_tokens)
        if num_external_tokens:
            size = self.ledger.page_tokens
            first = state.local_tokens // size
            pages = blocks.get_block_ids()[0][first : first + num_external_tokens // size]
            self._pages[state.ticket] = tuple(pages)
            self._outbox.loads.append((state.ticket, tuple(pages), state.local_tokens))
        elif state.asked:
            self._release(state)
            self.ledger.restart(state)  # should it ever ask again, it has lost its pages

    def meta(self) -> KvlibMetadata:
        """What the workers are to do in this step."""
        meta, self._outbox = self._outbox, KvlibMetadata()
        return meta

    def plan(self, scheduled: Any) -> None:
        """Note what a step (a `SchedulerOutput`) completes, and whose pages it takes away."""
        if scheduled.num_scheduled_tokens:
            self._idle_since = None
        elif self.ledger.requests and not self._outbox.loads:
            self._rest()
        for ticket in scheduled.preempted_req_ids or ():
            self._outbox.preempted.append(ticket)
            state = self.ledger.requests.get(ticket)
            if state is not None:
                self.ledger.preempted(state)
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for ticket, tokens in scheduled.num_scheduled_tokens.items():
            request = self._requests.get(ticket)
            state = self.ledger.requests.get(ticket)
            if request is None or state is None or ticket not in computed:
                continue
            state.scheduled += tokens
            due = self.ledger.due(
                state,
                request.all_token_ids,
                computed[ticket] + tokens,
                prompt_tokens=request.num_prompt_tokens,
            )
            if due is not None:
                state.planned = state.scheduled
                pages = scheduled.kv_connector_block_state.get_block_ids(ticket)[0]
                self._outbox.saves.append(self.ledger.save(state, due, pages, self._fidelity))

    def _rest(self) -> None:
        """Nothing to compute: all wait for blocks, which threads of this process bring.

        An engine that asks without a pause takes the interpreter from them. What is in memory is
        there in a moment, so it waits for that; what takes longer is a disk, which needs no
        interpreter, and others may come meanwhile.
        """
        peer = self._peer
        if peer is None:
            return
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        long = now - self._idle_since < _MOMENT_S
        if peer.wait_progress(_LONG_REST_S if long else _REST_S):
            self._idle_since = None

    def update(self, connector_output: Any) -> None:
        """What became of stages and loads."""
        meta = connector_output.kv_connector_worker_meta
        if meta is not None:
            for (ticket, number), answer in meta.staged.items():
                if self._questions.get(ticket) != number:
                    continue  # nobody waits for it any more
                known = self._partial[ticket] = answer.join(self._partial.get(ticket))
                if known.ranks >= self._world:
                    self._forget_answer(ticket)
                    self._answers[ticket] = Staged(known.num_blocks, known.fidelity)
        invalid = set(connector_output.invalid_block_ids or ())  # perhaps not of the last rank
        for ticket, pages in self._pages.items():
            state = self.ledger.requests.get(ticket)
            if state is not None and not invalid.isdisjoint(pages):
                state.read = False
        for ticket in connector_output.finished_recving or ():
            self._pages.pop(ticket, None)
            state = self.ledger.requests.get(ticket)
            if state is not None:
                self._forget_answer(ticket)
                self.ledger.restart(state)  # should it ever ask again, it has lost its pages

    def finished(self, request: Any, block_ids: Sequence[int]) -> bool:
        """Store what is left of a request; whether its pages must be kept until that is done."""
        ticket = request.request_id
        state = self.ledger.requests.get(ticket)
        if state is None:
            return False
        peer = self._peer
        due = self.ledger.due(
            state,
            request.all_token_ids,
            request.num_computed_tokens - request.num_in_flight_tokens,
            prompt_tokens=request.num_prompt_tokens,
            last=True,
        )
        self.ledger.end(ticket)
        self._requests.pop(ticket, None)
        self._forget_answer(ticket)
        self._pages.pop(ticket, None)
        if due is not None:
            save = self.ledger.save(state, due, block_ids, self._fidelity)
            if peer is not None:
                peer.save(save)
            else:
                self._outbox.saves.append(save)
        if state.loading:
            return False  # vLLM keeps the pages until it hears of that
        # With overlapping steps, a step that is still to come in the worker may begin to save.
        coming = state.planned > state.scheduled - request.num_in_flight_tokens
        if peer is not None and not coming and peer.wait_saved(ticket, self._patience_s):
            return False
        if peer is None and not state.saved:
            return False
        self._outbox.finishing.append(ticket)
        return True

    def renew(self) -> None:
        """Make all that is stored unreachable for this engine, as after a change of weights."""
        spec = self.ledger.spec
        for state in self.ledger.requests.values():
            if state.asked and not state.loading:
                self._release(state)  # of the old weights
                self.ledger.restart(state)
        self.ledger.renew(replace(spec, model_id=f"{spec.model_id}#reset:{uuid4().hex}"))
        self.counts["resets"] += 1
