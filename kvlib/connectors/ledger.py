# SPDX-License-Identifier: Apache-2.0
"""What a scheduler knows of its requests: their keys, what is stored of them, what is to be stored.

Engine-free: an adapter tells what happened to a request and gets back what is to be done.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvlib.connectors.identity import request_salt
from kvlib.connectors.moves import Save, Staged
from kvlib.keys import BLOCK_TOKENS, BlockKey, block_keys
from kvlib.spec import EXACT, KVSpec
from kvlib.store.records import BLOCKS_PER_RECORD

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ledger", "RequestState"]

_MAX_KNOWN = 1 << 18


@dataclass(slots=True)
class RequestState:
    """A request's account.

    Attributes:
        ticket: names it.
        salt: of its keys.
        spec: what its numbers mean.
        read: whether it may be served from the store.
        write: whether it is stored.
        keys: of its whole blocks, as far as they were needed.
        asked: staging was begun.
        deadline: when it stops to wait for that.
        staged: what that came to.
        first: block from which on staging was asked for.
        local_tokens: that the engine had when it last asked.
        loading: staged blocks are on their way into pages.
        saved: leading blocks that are stored, or about to be, or not to be stored.
        fidelity: of the blocks computed from now on.
        scheduled: tokens that were to be computed so far, over all steps.
        planned: what that was with the last step behind which blocks are stored.
    """

    ticket: str
    salt: str | bytes
    spec: KVSpec
    read: bool = True
    write: bool = True
    keys: list[BlockKey] = field(default_factory=list)
    asked: bool = False
    deadline: float = 0.0
    staged: Staged | None = None
    first: int = 0
    local_tokens: int = 0
    loading: bool = False
    saved: int = 0
    fidelity: str = EXACT
    scheduled: int = 0
    planned: int = 0

    def keys_for(self, tokens: Sequence[int], blocks: int) -> list[BlockKey]:
        """Keys of the first `blocks` whole blocks of `tokens`."""
        have = len(self.keys)
        if have < blocks:
            new = tokens[have * BLOCK_TOKENS : blocks * BLOCK_TOKENS]
            if have:
                more = block_keys(self.spec.fingerprint(), new, parent=self.keys[-1])
            else:
                more = block_keys(self.spec.fingerprint(), new, salt=self.salt)
            self.keys += more
        return self.keys[:blocks]


class Ledger:
    """See the module.

    Args:
        spec: of the engine's cache.
        page_tokens: of its pages.
        salt: of the store.
        lossless: whether the store gives back exactly what it was given.
        save: see `ConnectorConfig`.
        min_tokens: see `ConnectorConfig`.
    """

    def __init__(
        self,
        spec: KVSpec,
        page_tokens: int,
        *,
        salt: str = "",
        lossless: bool = True,
        save: str = "all",
        min_tokens: int = 0,
    ) -> None:
        self.spec = spec
        self.page_tokens = page_tokens
        self._salt = salt
        self._lossless = lossless
        self._save = save
        self._min_tokens = max(min_tokens, 1)
        self.requests: dict[str, RequestState] = {}
        # Keys of blocks that are stored, and (with a lossy codec) of blocks computed from
        # exact ones here. To forget one costs a copy, or takes a block for lossy: never wrong.
        self._stored: OrderedDict[BlockKey, None] = OrderedDict()
        self._exact: OrderedDict[BlockKey, None] = OrderedDict()

    def begin(
        self,
        ticket: str,
        *,
        cache_salt: str | None = None,
        spec: KVSpec | None = None,
        read: bool = True,
        write: bool = True,
    ) -> RequestState:
        """A new request, or the one that is known by that ticket."""
        state = self.requests.get(ticket)
        if state is None:
            state = self.requests[ticket] = RequestState(
                ticket,
                request_salt(self._salt, cache_salt),
                spec or self.spec,
                read=read,
                write=write and self._save != "none",
            )
        return state

    # -- what to fetch

    def wanted(self, state: RequestState, tokens: Sequence[int], local_tokens: int) -> int:
        """Blocks at the start of a prompt that the store may serve; 0 if it is not worth asking.

        At least the last token is left to be computed.
        """
        state.local_tokens = local_tokens
        if not state.read:
            return 0
        whole = (len(tokens) - 1) // self.page_tokens * self.page_tokens
        blocks = min(-(-whole // BLOCK_TOKENS), (len(tokens) - 1) // BLOCK_TOKENS)
        gain = min(blocks * BLOCK_TOKENS, whole) - local_tokens
        return blocks if gain >= self._min_tokens else 0

    def offer(self, state: RequestState, num_tokens: int, local_tokens: int) -> int:
        """Tokens beyond `local_tokens` that staging has made ready, in whole pages."""
        state.local_tokens = local_tokens
        if state.staged is None:
            return 0
        last = min(state.staged.num_blocks * BLOCK_TOKENS, num_tokens - 1)
        return max(last // self.page_tokens * self.page_tokens - local_tokens, 0)

    def settled(self, state: RequestState, staged: Staged) -> None:
        """Staging came to an end."""
        state.staged = staged
        self._remember(self._stored, state.keys[: staged.num_blocks])
        for key in state.keys[staged.num_blocks :]:  # evicted, or never stored
            self._stored.pop(key, None)

    def taken(self, state: RequestState, external_tokens: int) -> None:
        """The engine takes so many of the tokens offered; 0: none."""
        last = (state.local_tokens + external_tokens) // BLOCK_TOKENS
        state.saved = max(state.saved, last if external_tokens else 0)
        if external_tokens and state.staged is not None:
            state.loading = True
            if state.staged.fidelity != EXACT or not self._lossless:
                self._lossy(state)
        elif state.local_tokens and not self._lossless:
            whole, rest = divmod(state.local_tokens, BLOCK_TOKENS)
            known = state.keys[whole - 1 : whole] if whole and not rest else []
            if not known or known[0] not in self._exact:
                self._lossy(state)

    def _lossy(self, state: RequestState) -> None:
        """What follows is computed from blocks that went, or may have gone, through the codec."""
        state.fidelity = ""
        for key in state.keys:
            self._exact.pop(key, None)

    def restart(self, state: RequestState) -> None:
        """If a request asks once more, it is a new question."""
        state.asked = state.loading = False
        state.staged = None

    def preempted(self, state: RequestState) -> None:
        """A request lost its pages, and with them what was to be copied out of them."""
        if not state.loading:
            state.saved = 0
            for key in state.keys:
                self._stored.pop(key, None)

    # -- what to store

    def due(
        self,
        state: RequestState,
        tokens: Sequence[int],
        computed: int,
        *,
        prompt_tokens: int,
        last: bool = False,
    ) -> tuple[int, int] | None:
        """Blocks [first, stop) that are to be stored now.

        Blocks go in groups that make one record, or singly where the prompt or the request ends: a
        record is never encoded twice.

        Args:
            state: the request.
            tokens: all that are certain: prompt and accepted output.
            computed: of these that lie in pages when the step is over.
            prompt_tokens: in the prompt.
            last: the request is over.
        """
        if not state.write or state.loading:
            return None
        stop = min(computed, len(tokens)) // BLOCK_TOKENS
        if self._save == "prompt":
            stop = min(stop, prompt_tokens // BLOCK_TOKENS)
        at_end = last or (computed >= prompt_tokens and state.saved * BLOCK_TOKENS < prompt_tokens)
        if not at_end:
            stop = stop // BLOCKS_PER_RECORD * BLOCKS_PER_RECORD
        elif not last:
            stop = max(
                min(stop, prompt_tokens // BLOCK_TOKENS),
                stop // BLOCKS_PER_RECORD * BLOCKS_PER_RECORD,
            )
        if stop <= state.saved:
            return None
        state.keys_for(tokens, stop)
        first, state.saved = state.saved, stop
        return self.unstored(state, first, stop)

    def unstored(self, state: RequestState, first: int, stop: int) -> tuple[int, int] | None:
        """What of the blocks [first, stop), whose keys are known, is not stored yet."""
        while first < stop and state.keys[first] in self._stored:
            self._stored.move_to_end(state.keys[first])
            first += 1
        return (first, stop) if first < stop else None

    def save(
        self,
        state: RequestState,
        blocks: tuple[int, int],
        pages: "Sequence[int] | Tensor",
        fidelity: str,
    ) -> Save:
        """What storing these blocks takes.

        Args:
            state: the request.
            blocks: see `due`.
            pages: of the request, from its start.
            fidelity: that the store gives blocks computed from what it served.
        """
        first, stop = blocks
        size = self.page_tokens
        first_page = first * BLOCK_TOKENS // size
        last_page = -(-stop * BLOCK_TOKENS // size)
        keys = tuple(state.keys[:stop])
        exact = state.fidelity == EXACT
        self._remember(self._stored, keys[first:])
        if exact and not self._lossless:
            self._remember(self._exact, keys[first:])
        return Save(
            ticket=state.ticket,
            keys=keys,
            first=first,
            pages=pages[first_page:last_page],
            first_page=first_page,
            fidelity=EXACT if exact else fidelity,
        )

    def lost(self, save: Save) -> None:
        """A save came to nothing: its blocks are not stored."""
        for key in save.keys[save.first :]:
            self._stored.pop(key, None)

    def end(self, ticket: str) -> None:
        """The request is over."""
        self.requests.pop(ticket, None)

    def renew(self, spec: KVSpec) -> None:
        """The weights are others now: nothing that was stored is of use, or will be found."""
        self.spec = spec
        self._stored.clear()
        self._exact.clear()
        for state in self.requests.values():
            state.read = state.write = False

    @staticmethod
    def _remember(known: "OrderedDict[BlockKey, None]", keys: Iterable[BlockKey]) -> None:
        for key in keys:
            known[key] = None
            known.move_to_end(key)
        while len(known) > _MAX_KNOWN:
            known.popitem(last=False)
