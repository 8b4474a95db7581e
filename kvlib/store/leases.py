# SPDX-License-Identifier: Apache-2.0
"""Leases: records that stay while somebody means to read them, but not for ever."""

import threading
from collections.abc import Sequence
from time import monotonic
from typing import Self

from kvlib.keys import StoreKey
from kvlib.store.stack import TierStack

__all__ = ["Lease", "Leases"]


class Lease:
    """Records that are not evicted until `release`, or until its time is over.

    Args:
        leases: who gave it.
        keys: of the records.
        num_blocks: leading blocks in them.
        until: `time.monotonic()` when it ends.

    Attributes:
        num_blocks: see above. A hint like `KVStore.match`: only a load makes certain.
    """

    def __init__(
        self, leases: "Leases", keys: Sequence[StoreKey], num_blocks: int, until: float
    ) -> None:
        self._leases = leases
        self.keys = tuple(keys)
        self.num_blocks = num_blocks
        self.until = until

    def release(self) -> None:
        """End it; ending it twice is allowed."""
        self._leases.end(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class Leases:
    """The leases of a store.

    Args:
        tiers: whose records they hold.
    """

    def __init__(self, tiers: TierStack) -> None:
        self._tiers = tiers
        self._lock = threading.Lock()
        self._given: set[Lease] = set()

    def give(self, keys: Sequence[StoreKey], num_blocks: int, seconds: float) -> Lease:
        """A new lease."""
        lease = Lease(self, keys, num_blocks, monotonic() + seconds)
        self._tiers.pin(lease.keys)
        with self._lock:
            self._given.add(lease)
        return lease

    def end(self, lease: Lease) -> None:
        """Take one back."""
        with self._lock:
            if lease not in self._given:
                return
            self._given.remove(lease)
        self._tiers.unpin(lease.keys)

    def expire(self) -> None:
        """Take back those whose time is over: their owner forgot them, or died."""
        now = monotonic()
        if not self._given:
            return
        with self._lock:
            over = [lease for lease in self._given if lease.until < now]
        for lease in over:
            self.end(lease)

    def __len__(self) -> int:
        """Leases that are out."""
        return len(self._given)
