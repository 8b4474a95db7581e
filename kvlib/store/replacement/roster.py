# SPDX-License-Identifier: Apache-2.0
"""What a tier knows of its records: which goes first, and what is on whose account.

The one way from a tier to a replacement policy. It adds what no policy sees: the tenant of each
record, in order of use, so that a quota is kept with that tenant's own records.
"""

from collections.abc import Iterator, Mapping, Set
from itertools import takewhile
from typing import Any, Generic

from kvlib.store.replacement import REPLACEMENTS, Replacement, ReplacementState
from kvlib.store.replacement.base import Clock, Hint, Key, enough
from kvlib.store.replacement.queues import Queue, Ranked
from kvlib.store.terms import NO_TERMS, Terms

__all__ = ["Roster"]


class Roster(Generic[Key]):
    """The records of one tier. Not thread-safe: used under the tier's lock.

    Args:
        policy: method string of one of `REPLACEMENTS`, or the policy.
        capacity_bytes: the tier's.
        clock: in seconds; `Hint` speaks of it.

    Raises:
        UnknownPluginError: there is no such policy.
        ConfigError: a parameter out of range.
    """

    def __init__(self, policy: str | Replacement, capacity_bytes: int, clock: Clock) -> None:
        made = REPLACEMENTS.build(policy) if isinstance(policy, str) else policy
        self._state: ReplacementState[Any] = made.start(capacity_bytes, clock)
        self._clock = clock
        self._tenant: dict[Key, bytes] = {}
        self._until: dict[Key, float] = {}  # of those that expire
        self._expiring: Ranked[Key] = Ranked()
        self._queues: dict[bytes, Queue[Key]] = {}

    def admit(self, key: Key, size: int, terms: Terms = NO_TERMS) -> bool:
        """Whether a record that is not held shall come in; ask before asking for victims."""
        return self._state.admit(key, size, terms.hint_for_policy)

    def insert(self, key: Key, size: int, terms: Terms = NO_TERMS) -> None:
        """A record of `size` physical bytes is held from now on."""
        if key in self._tenant:
            self.remove(key)
        self._tenant[key] = terms.tenant
        if terms.ttl is not None:
            self._until[key] = self._clock() + terms.ttl
            self._expiring.set(key, self._until[key])
        queue = self._queues.get(terms.tenant)
        if queue is None:
            queue = self._queues[terms.tenant] = Queue()
        queue.push(key, size)
        self._state.insert(key, size, terms.hint_for_policy)

    def hit(self, key: Key) -> None:
        """A record was read; one that is not held is ignored, here and below."""
        tenant = self._tenant.get(key)
        if tenant is not None:
            self._queues[tenant].renew(key)
            self._state.hit(key)

    def touch(self, key: Key, hint: Hint | None = None) -> None:
        """A record was used last, by a use that was told already; see `ReplacementState.touch`."""
        tenant = self._tenant.get(key)
        if tenant is None:
            return
        self._queues[tenant].renew(key)
        until = self._until.get(key)
        if hint is not None and until is not None:
            hint = Terms(ttl=until - self._clock(), hint=hint).hint_for_policy
        self._state.touch(key, hint)

    def remove(self, key: Key, *, evicted: bool = False) -> None:
        """A record is gone: to make room if `evicted`, else deleted, expired or damaged."""
        tenant = self._tenant.pop(key, None)
        if tenant is None:
            return
        if self._until.pop(key, None) is not None:
            self._expiring.discard(key)
        queue = self._queues[tenant]
        queue.pop(key)
        if not queue:
            del self._queues[tenant]
        self._state.remove(key, evicted=evicted)

    def victims(
        self, need_bytes: int, protected: Set[Key] = frozenset(), tenant: bytes | None = None
    ) -> Iterator[Key]:
        """Records to drop, the first one first, until `need_bytes` are free or none is left.

        Those whose time is over come first. Valid until another method is called.

        Args:
            need_bytes: to be freed.
            protected: never among them.
            tenant: only its records: after those that are over, the ones used longest ago.
        """
        if tenant is None:
            return self._state.victims(need_bytes, protected)
        queue = self._queues.get(tenant, Queue())
        over = [key for key in self.over() if key in queue]
        keys = dict.fromkeys([*over, *queue]) if over else queue
        return enough(keys, queue.size, need_bytes, protected)

    def over(self) -> Iterator[Key]:
        """Records whose time is over, the longest ago first; valid until the next change."""
        now = self._clock()
        return (key for _, key in takewhile(lambda x: x[0] <= now, self._expiring.ascending()))

    def is_over(self, key: Key) -> bool:
        """Whether a record's time is over; False for one that is not held."""
        until = self._until.get(key)
        return until is not None and until <= self._clock()

    @property
    def expires(self) -> bool:
        """Whether any record has a time to live."""
        return bool(self._until)

    def terms(self, key: Key) -> Terms | None:
        """The time left to a record and its tenant; None if it is not held."""
        tenant = self._tenant.get(key)
        if tenant is None:
            return None
        until = self._until.get(key)
        return Terms(ttl=None if until is None else until - self._clock(), tenant=tenant)

    def used_bytes(self, tenant: bytes) -> int:
        """What a tenant's records hold."""
        queue = self._queues.get(tenant)
        return 0 if queue is None else queue.nbytes

    @property
    def tenants(self) -> Mapping[bytes, int]:
        """Bytes held, by tenant."""
        return {tenant: queue.nbytes for tenant, queue in self._queues.items()}

    def keys(self) -> Iterator[Key]:
        """All keys, the one used longest ago first."""
        return self._state.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._tenant

    def __len__(self) -> int:
        return len(self._tenant)
