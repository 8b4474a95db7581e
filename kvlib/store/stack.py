# SPDX-License-Identifier: Apache-2.0
"""Several tiers as one: read from the fastest that has a record, write to those that shall."""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np

from kvlib.codecs.container import Buffer
from kvlib.errors import ConfigError
from kvlib.keys import StoreKey
from kvlib.store import blockio
from kvlib.store.cost import CostModel
from kvlib.store.files import FileStore
from kvlib.store.flight import SingleFlight
from kvlib.store.segments import SegmentStore
from kvlib.store.tier import Tier

__all__ = ["TierStack", "open_disk"]


class TierStack:
    """Tiers, the fastest first.

    Args:
        tiers: at least one.
        cost: learns how fast they read.
    """

    def __init__(self, tiers: Sequence[Tier], cost: CostModel) -> None:
        self.tiers = list(tiers)
        self._cost = cost
        self._flight = SingleFlight()

    def read(self, key: StoreKey, deadline: float | None = None) -> tuple[memoryview | None, bool]:
        """A record's verified bytes, and whether another caller's read gave them.

        They are put into the tiers above the one that had them. Concurrent reads are one.
        """
        while True:
            data, shared = self._flight.run(("get", key), lambda: self._read(key, deadline))
            if data is not None or not shared or (deadline is not None and monotonic() > deadline):
                return data, shared
            # Another caller's read, which may have had less time than we have.

    def _read(self, key: StoreKey, deadline: float | None) -> memoryview | None:
        for depth, tier in enumerate(self.tiers):
            size = tier.size(key)
            if size is None:
                continue
            data = np.empty(size, np.uint8).data
            begun = perf_counter()
            got = tier.get_into(key, data, deadline=deadline)
            if got is None:
                continue
            self._cost.read(tier.name, got, perf_counter() - begun)
            view = data[:got].toreadonly()
            for above in self.tiers[:depth]:
                above.put(key, [view])
            return view
        return None

    def contains(self, key: StoreKey, *, persistent: bool) -> bool:
        """Whether a tier of that kind seems to have a record."""
        return any(
            tier.contains_many([key])[0] for tier in self.tiers if tier.persistent == persistent
        )

    def put(self, key: StoreKey, parts: Sequence[Buffer], *, persistent: bool | None) -> bool:
        """Write to the tiers of that kind, or to all; whether any holds it now."""
        held = [
            tier.put(key, parts)
            for tier in reversed(self.tiers)
            if persistent is None or tier.persistent == persistent
        ]
        return any(held)

    def once(self, key: StoreKey, call: Callable[[], int | None]) -> int | None:
        """One of several concurrent puts of a record."""
        written, _ = self._flight.run(("put", key), call)
        return written

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """Mark as used from last to first: the start of a prompt is evicted last."""
        for tier in self.tiers:
            tier.touch(keys[::-1])

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


def open_disk(path: Path, tier: str | None, capacity: int, mac_key: bytes | None) -> Tier:
    """The disk tier of a folder: the one that made it, unless another one is asked for.

    Raises:
        ConfigError: there is no such tier, or see the tiers.
    """
    if tier is None:
        tier = "file" if (path / "FORMAT").exists() or not blockio.supports() else "segment"
    if tier == "file":
        return FileStore(path, capacity=capacity, mac_key=mac_key)
    if tier == "segment":
        return SegmentStore(path, capacity=capacity, mac_key=mac_key)
    raise ConfigError(f"tier={tier!r}: expected 'segment' or 'file'")
