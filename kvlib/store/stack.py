# SPDX-License-Identifier: Apache-2.0
"""Several tiers as one: read from the fastest that has a record, write to those that shall."""

from collections.abc import Callable, Sequence
from time import monotonic, perf_counter
from typing import TypeVar

import numpy as np

from kvlib.codecs.container import Buffer
from kvlib.keys import StoreKey
from kvlib.store.cost import CostModel
from kvlib.store.flight import SingleFlight
from kvlib.store.memory import MemoryTier, Opened
from kvlib.store.replacement import Hint
from kvlib.store.rules import Rules
from kvlib.store.terms import Terms
from kvlib.store.tier import Tier

__all__ = ["TierStack"]

T = TypeVar("T")


class TierStack:
    """Tiers, the fastest first.

    Args:
        tiers: at least one.
        cost: learns how fast they read.
        rules: on what terms records are put.
    """

    def __init__(self, tiers: Sequence[Tier], cost: CostModel, rules: Rules | None = None) -> None:
        self.tiers = list(tiers)
        self._rules = rules or Rules()
        self._cost = cost
        self._flight = SingleFlight()

    def read(
        self, key: StoreKey, deadline: float | None = None, *, up: bool = True
    ) -> tuple[memoryview | None, bool]:
        """A record's verified bytes, and whether another caller's read gave them.

        They are put into the tiers above the one that had them, unless `up` says no. Concurrent
        reads are one.
        """
        while True:
            data, shared = self._flight.run(("get", key), lambda: self._read(key, deadline, up=up))
            if data is not None or not shared or (deadline is not None and monotonic() > deadline):
                return data, shared
            # Another caller's read, which may have had less time than we have.

    def _read(self, key: StoreKey, deadline: float | None, *, up: bool) -> memoryview | None:
        for depth, tier in enumerate(self.tiers):
            size = tier.size(key)
            if size is None:
                continue
            begun = perf_counter()
            if isinstance(tier, MemoryTier):
                view = tier.lend(key, deadline)
            else:
                data = np.empty(size, np.uint8).data
                got = tier.get_into(key, data, deadline=deadline)
                view = None if got is None else data[:got].toreadonly()
            if view is None:
                continue
            self._cost.read(tier.name, view.nbytes, perf_counter() - begun)
            if depth and up:
                terms = self.terms(key)
                for above in self.tiers[:depth] if terms is not None else ():
                    above.put(key, [view], terms)
            return view
        return None

    def opened(self, key: StoreKey, deadline: float | None = None) -> Opened | None:
        """A record that memory holds open; see `MemoryTier.lend_opened`."""
        first = self.tiers[0]
        return first.lend_opened(key, deadline) if isinstance(first, MemoryTier) else None

    def keep_open(self, key: StoreKey, record: memoryview, opened: Opened) -> None:
        """See `MemoryTier.keep_open`."""
        first = self.tiers[0]
        if isinstance(first, MemoryTier):
            first.keep_open(key, record, opened)

    def contains(self, key: StoreKey, *, persistent: bool) -> bool:
        """Whether a tier of that kind seems to have a record."""
        return any(
            tier.contains_many([key])[0] for tier in self.tiers if tier.persistent == persistent
        )

    def put(
        self,
        key: StoreKey,
        parts: Sequence[Buffer],
        *,
        persistent: bool | None,
        terms: Terms | None = None,
    ) -> bool:
        """Write to the tiers of that kind, or to all; whether any holds it now.

        Without terms, it is kept on those on which another tier has it, else on the store's.
        """
        terms = terms or self.terms(key) or self._rules.terms()
        held = [
            tier.put(key, parts, terms)
            for tier in reversed(self.tiers)
            if persistent is None or tier.persistent == persistent
        ]
        return any(held)

    def once(self, key: StoreKey, call: Callable[[], T]) -> tuple[T, bool]:
        """One of several concurrent puts of a record, and whether it was another caller's."""
        return self._flight.run(("put", key), call)

    def takes(self, *, persistent: bool) -> bool:
        """Whether there is a tier of that kind."""
        return any(tier.persistent == persistent for tier in self.tiers)

    def terms(self, key: StoreKey) -> Terms | None:
        """On what terms a record is put where it is not yet; None if no tier may serve it now.

        Who has read a record asks afterwards: if it is gone by then, nobody knows when its time is
        over, and it must not be kept anywhere.
        """
        for tier in self.tiers:
            terms = tier.terms(key)
            if terms is not None and (terms.ttl is None or terms.ttl > 0):
                return self._rules.again(terms)
        return None

    def touch(self, keys: Sequence[StoreKey], hint: Hint | None = None) -> None:
        """Mark as used from last to first: the start of a prompt is evicted last."""
        for tier in self.tiers:
            tier.touch(keys[::-1], hint)

    def pin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.pin`."""
        for tier in self.tiers:
            tier.pin(keys)

    def unpin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.unpin`."""
        for tier in self.tiers:
            tier.unpin(keys)

    def delete(self, key: StoreKey) -> None:
        """Drop a record everywhere."""
        for tier in self.tiers:
            tier.delete(key)

    def close(self) -> None:
        """Close all tiers."""
        for tier in self.tiers:
            tier.close()
