# SPDX-License-Identifier: Apache-2.0
"""Moves blocks between an engine's pages and a store, in threads of its own.

Three kinds of work, each named by a ticket (an engine's request): *staging* brings the stored
prefix of a prompt, verified and decoded, into host memory; *loading* copies what is staged into
pages; *saving* copies pages out and hands them to the store. No call waits for a device, a disk or
a lock that is held meanwhile; what has become of the work is asked for afterwards. Nothing raises
for a fault of a medium: what fails is staged as nothing, loaded as failed, or not stored.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.connectors.counters import COUNTERS
from kvlib.connectors.moves import PagedMemory, Save, Saving, Staged
from kvlib.keys import BLOCK_TOKENS, BlockKey
from kvlib.spec import KVSpec
from kvlib.store.heads import local_spec
from kvlib.store.puts import Put
from kvlib.store.reports import Loaded
from kvlib.store.store import KVStore
from kvlib.threads import one_torch_thread

__all__ = ["Mover"]

_LOG = logging.getLogger(__name__)

_PRUNE = 256


@dataclass(slots=True)
class _Ticket:
    """What is under way for one request."""

    staging: Future[None] | None = None
    staged: Staged | None = None
    blocks: tuple[KVBlock, ...] = ()
    reserved: int = 0
    dropped: bool = False
    saves: list[Saving] = field(default_factory=list)

    @property
    def is_saving(self) -> bool:
        return any(not task.done() for task in self.saves)


class Mover:
    """See the module.

    Args:
        store: where blocks live; its head range is what the pages hold.
        spec: what the numbers mean.
        pages: the engine's memory.
        staging: bytes of host memory for what is staged.
        stagers: prefixes that are staged at a time.
        waits_for_room: for what is staged already to be loaded; False where it is not loaded
            before the caller has an answer.
    """

    def __init__(
        self,
        store: KVStore,
        spec: KVSpec,
        pages: PagedMemory,
        *,
        staging: int,
        stagers: int = 2,
        waits_for_room: bool = True,
    ) -> None:
        self.store = store
        self._spec = spec
        local = local_spec(spec, store.head_range)
        self._block_bytes = BLOCK_TOKENS * local.bytes_per_token()
        self.pages = pages
        self._capacity = staging
        self._waits_for_room = waits_for_room
        self._reserved = 0
        self._room = threading.Condition()
        self._tickets: dict[str, _Ticket] = {}
        self._loaded: deque[tuple[str, tuple[int, ...]]] = deque()
        self._storing: dict[BlockKey, Saving] = {}  # by their first blocks
        self._prune_at = _PRUNE
        self._over: set[str] = set()  # requests that ended while they were being saved
        self._closed = False
        self._progress = threading.Event()
        self._stagers = ThreadPoolExecutor(stagers, "kvlib-stage", one_torch_thread)
        self._copier = ThreadPoolExecutor(1, "kvlib-copy", one_torch_thread)
        # All names from the start: others add up the counters while they change.
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))

    def count(self, **more: int) -> None:
        """Add to the counters."""
        with self._room:
            self.counts.update(more)

    # -- staging

    def stage(self, ticket: str, keys: Sequence[BlockKey], first: int, deadline: float) -> None:
        """Begin to bring the stored blocks of a prompt into host memory.

        Args:
            ticket: a request that has nothing under way; what was staged for it is dropped.
            keys: of the prompt's blocks, from its start.
            first: the first block that is needed.
            deadline: `time.monotonic()` at which to be content with what has arrived.
        """
        self.release(ticket)
        with self._room:
            old = self._tickets.get(ticket)
            mine = self._tickets[ticket] = _Ticket(saves=old.saves if old else [])
        mine.staging = self._stagers.submit(self._stage, mine, keys, first, deadline)

    def _stage(self, mine: _Ticket, keys: Sequence[BlockKey], first: int, deadline: float) -> None:
        staged = Staged(0)
        begun = time.perf_counter()
        try:
            self._settle(keys, deadline)
            # Of a prompt longer than there is ever room for: its beginning.
            most = first + self._capacity // self._block_bytes
            found = min(self.store.match(self._spec, keys), most)
            size = (found - first) * self._block_bytes
            if found > first:
                if self._reserve(mine, size, deadline):
                    loaded = self.store.borrow(
                        self._spec, keys[:found], start=first, deadline=deadline
                    )
                    staged = self._keep(mine, loaded, first)
                else:
                    staged = Staged(0, crowded=not self._waits_for_room)
        except Exception:  # noqa: BLE001 (whatever it is, it is a miss)
            _LOG.exception("staging failed")
            self.count(stage_errors=1)
        finally:
            with self._room:
                mine.staged = staged
                if not mine.blocks:
                    self._give_back(mine)
            self._progress.set()
            if staged.num_blocks:
                taken = int((time.perf_counter() - begun) * 1e6)
                self.count(staged_blocks=staged.num_blocks - first, stage_us=taken)

    def _settle(self, keys: Sequence[BlockKey], deadline: float) -> None:
        """Wait for what is being stored of a prompt at this moment."""
        with self._room:
            self._prune()
            tasks = [self._storing[key] for key in keys if key in self._storing]
        for task in tasks:
            with suppress(Exception):  # whatever came of it, what is stored is found
                put = task.result(max(0.0, deadline - time.monotonic()))
                if put is not None:
                    put.result(max(0.0, deadline - time.monotonic()))

    def _prune(self) -> None:
        """Forget what was stored. The lock is held."""
        self._storing = {key: task for key, task in self._storing.items() if not _is_over(task)}
        self._prune_at = max(2 * len(self._storing), _PRUNE)

    def _keep(self, mine: _Ticket, loaded: Loaded, first: int) -> Staged:
        """Hold on to what arrived, unless nobody wants it any more."""
        blocks = loaded.blocks
        if not blocks or blocks[0].start > first * BLOCK_TOKENS:
            return Staged(0)
        with self._room:
            if mine.dropped:
                return Staged(0)
            mine.blocks = blocks
        nbytes = sum(block.nbytes for block in blocks)
        self.count(staged_bytes=nbytes, stored_bytes_read=loaded.stored_bytes)
        return Staged(blocks[-1].stop // BLOCK_TOKENS, loaded.fidelity)

    def _reserve(self, mine: _Ticket, size: int, deadline: float) -> bool:
        """Take room, or wait for it; whether there is."""
        with self._room:
            if not self._waits_for_room:
                deadline = 0.0
            while self._reserved + size > self._capacity:
                left = deadline - time.monotonic()
                if left <= 0 or mine.dropped or self._closed:
                    self.counts["staging_full"] += 1
                    return False
                self._room.wait(min(left, 1.0))
            if mine.dropped:
                return False
            self._reserved += size
            mine.reserved = size
            return True

    def _give_back(self, mine: _Ticket) -> None:
        """The lock is held."""
        if mine.reserved:
            self._reserved -= mine.reserved
            mine.reserved = 0
            self._room.notify_all()

    def staged(self, ticket: str) -> Staged | None:
        """What staging came to; None while it is under way or was never begun."""
        mine = self._tickets.get(ticket)
        return None if mine is None else mine.staged

    def wait_staged(self, ticket: str, seconds: float) -> Staged | None:
        """What staging came to, after waiting a while for it; None if it is still under way."""
        mine = self._tickets.get(ticket)
        if mine is not None and mine.staging is not None:
            wait([mine.staging], max(seconds, 0.0))
        return self.staged(ticket)

    def is_staging(self, ticket: str) -> bool:
        """Whether something is being staged for a request."""
        mine = self._tickets.get(ticket)
        return mine is not None and mine.staging is not None and not mine.staging.done()

    def staged_part(self, ticket: str, first_token: int, stop: int) -> tuple[KVBlock, ...]:
        """What is staged of some tokens of a request, in whole pages; () if it is not all there.

        Its tensors must not be written to; see `KVStore.borrow`.
        """
        with self._room:
            mine = self._tickets.get(ticket)
            blocks = () if mine is None else mine.blocks
        if not blocks or not blocks[0].start <= first_token < stop <= blocks[-1].stop:
            return ()
        if any((block.stop - first_token) % self.pages.page_tokens for block in blocks[:-1]):
            blocks = (KVBlock.join(blocks),)  # pages are larger than blocks
        return tuple(
            block.slice(max(block.start, first_token), min(block.stop, stop))
            for block in blocks
            if block.start < stop and first_token < block.stop
        )

    def release(self, ticket: str) -> None:
        """Drop what is staged, or will be, for a request."""
        with self._room:
            mine = self._tickets.get(ticket)
            if mine is None:
                return
            mine.dropped = True
            if mine.blocks:
                mine.blocks = ()
                self._give_back(mine)
            mine.staged = None
            self._tickets[ticket] = _Ticket(saves=mine.saves)
        if mine.staging is not None:
            mine.staging.cancel()

    def forget(self, ticket: str) -> None:
        """A request is over; what is being saved of it goes on."""
        self.release(ticket)
        with self._room:
            mine = self._tickets.get(ticket)
            if mine is not None and mine.is_saving:
                self._over.add(ticket)
            else:
                self._tickets.pop(ticket, None)

    # -- loading

    def load(self, ticket: str, pages: Sequence[int], first_token: int) -> None:
        """Begin to copy what is staged into pages.

        Args:
            ticket: a request for which `staged` has given blocks.
            pages: to be filled whole.
            first_token: of the first page, counted from the start of the prompt.
        """
        try:
            self._copier.submit(self._load, ticket, tuple(pages), first_token)
        except RuntimeError:  # it is closed, or there are no threads; whoever waits must hear of it
            self._loaded.append((ticket, tuple(pages)))

    def _load(self, ticket: str, pages: tuple[int, ...], first_token: int) -> None:
        failed = pages
        begun = time.perf_counter()
        try:
            size = self.pages.page_tokens
            parts = self.staged_part(ticket, first_token, first_token + len(pages) * size)
            if parts:
                ids = torch.tensor(pages)
                cuts = ids.split([part.num_tokens // size for part in parts])
                self.pages.write_parts(
                    [
                        (some, [(layer.keys, layer.values) for layer in part.layers])
                        for some, part in zip(cuts, parts, strict=True)
                    ]
                )
                self._synchronize()
                failed = ()
            else:
                _LOG.error("nothing is staged for the pages of request %s", ticket)
        except Exception:  # noqa: BLE001 (the engine computes the pages again)
            _LOG.exception("loading into pages failed")
        finally:
            self.count(
                **(
                    {"load_errors": 1}
                    if failed
                    else {
                        "loaded_tokens": len(pages) * self.pages.page_tokens,
                        "load_us": int((time.perf_counter() - begun) * 1e6),
                    }
                )
            )
            self.release(ticket)
            self._loaded.append((ticket, failed))
            self._progress.set()

    def wait_progress(self, seconds: float) -> bool:
        """Wait until something was staged or loaded since the last call; whether it was."""
        if not self._progress.wait(seconds):
            return False
        self._progress.clear()
        return True

    def _synchronize(self) -> None:
        if self.pages.views[0].is_cuda:
            torch.cuda.current_stream(self.pages.views[0].device).synchronize()

    def loaded(self) -> list[tuple[str, tuple[int, ...]]]:
        """Loads that ended since the last call, and the pages that were not filled."""
        out = []
        while self._loaded:
            out.append(self._loaded.popleft())
        return out

    # -- saving

    def save(self, save: Save, ready: Callable[[], None] | None = None) -> Saving:
        """Begin to copy blocks out of pages and to store them.

        Args:
            save: what. The pages must stay as they are until `is_saving` says no.
            ready: waits until the device has computed what lies in them; None if it has.

        Returns:
            Done when the pages are copied out (then it has what the store does with the copy), or
            given up (None).
        """
        with self._room:
            mine = self._tickets.setdefault(save.ticket, _Ticket())
            mine.saves = [task for task in mine.saves if not task.done()]
            if self._closed:
                dropped: Saving = Future()
                dropped.set_result(None)
                return dropped
            task = self._copier.submit(self._save, save, ready)
            mine.saves.append(task)
            if len(self._storing) >= self._prune_at:
                self._prune()
            self._storing[save.keys[save.first]] = task
            return task

    def _save(self, save: Save, ready: Callable[[], None] | None) -> Put | None:
        begun = time.perf_counter()
        blocks = len(save.keys) - save.first
        try:
            size = blocks * self._block_bytes
            if self.store.staging_left < size:  # only this thread takes of it
                self.count(save_drops=blocks)
                return None
            if ready is not None:
                ready()
            block = self._copy_out(save)
            taken = int((time.perf_counter() - begun) * 1e6)
            self.count(saved_tokens=block.num_tokens, save_us=taken)
            return self.store.put_async(
                self._spec,
                save.keys,
                block,
                fidelity=save.fidelity,
                copy=False,
                hint=save.hint,
            )
        except Exception:  # noqa: BLE001 (a later miss)
            _LOG.exception("saving failed")
            self.count(save_errors=1, save_drops=blocks)
            return None

    def _copy_out(self, save: Save) -> KVBlock:
        size = self.pages.page_tokens
        start, stop = save.first * BLOCK_TOKENS, len(save.keys) * BLOCK_TOKENS
        begin = save.first_page * size
        ids = torch.as_tensor(save.pages)
        cut = slice(start - begin, stop - begin)
        layers: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.pages.num_layers):
            keys, values = self.pages.read_layer(layer, ids)
            layers.append((keys[:, cut], values[:, cut]))
        return KVBlock.dense(self._spec, layers, start=start)

    def is_saving(self, ticket: str) -> bool:
        """Whether pages of a request are still to be copied out."""
        with self._room:
            mine = self._tickets.get(ticket)
            if mine is not None and mine.is_saving:
                return True
            if ticket in self._over:
                self._over.discard(ticket)
                self._tickets.pop(ticket, None)
            return False

    def stop_saving(self, tickets: Iterable[str]) -> None:
        """Pages are about to be taken away: give up what has not begun, wait for what has.

        What is waited for is a copy in memory, never a disk.
        """
        running = []
        for ticket in tickets:
            mine = self._tickets.get(ticket)
            for task in mine.saves if mine is not None else ():
                if task.cancel():
                    self.count(save_drops=1)
                else:
                    running.append(task)
        wait(running)

    def wait_saved(self, ticket: str, seconds: float) -> bool:
        """Wait a moment until the pages of a request are copied out; whether they are."""
        mine = self._tickets.get(ticket)
        return mine is None or not wait(mine.saves, seconds).not_done

    # -- the end

    def quiesce(self) -> None:
        """Let go of all pages: wait until they are copied out, and drop what is staged."""
        with self._room:
            tickets = dict(self._tickets)
        wait([task for mine in tickets.values() for task in mine.saves])
        for ticket in tickets:
            self.forget(ticket)

    def close(self) -> None:
        """Finish what is being saved, drop the rest, and close the store."""
        with self._room:
            if self._closed:
                return
            self._closed = True
            for mine in self._tickets.values():
                mine.dropped = True
            self._room.notify_all()
        self._stagers.shutdown(wait=True, cancel_futures=True)
        self._copier.shutdown(wait=True)
        self.store.close()


def _is_over(task: Saving) -> bool:
    """Whether a save was stored, or will never be."""
    if not task.done():
        return False
    put = None if task.cancelled() else task.result()
    return put is None or put.done()
