# SPDX-License-Identifier: Apache-2.0
"""The memory tier: whole records in RAM, bounded; a replacement policy says which goes first."""

import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import ClassVar, Self

from kvlib.codecs.container import Buffer, parse_header
from kvlib.errors import CodecError, StoreClosedError
from kvlib.keys import StoreKey
from kvlib.store.replacement import REPLACEMENTS, Replacement, ReplacementState
from kvlib.store.sizes import parse_bytes
from kvlib.store.tier import CheckReport, Pins, TierStats, verify_record

__all__ = ["MemoryTier"]


class MemoryTier:
    """Records held as bytes objects.

    Args:
        capacity: hard limit of the bytes held.
        mac_key: the key of the records put; reads are copies of them.
        replacement: which records go first: method string of one of `REPLACEMENTS`, or the policy.
    """

    name: ClassVar[str] = "memory"
    persistent: ClassVar[bool] = False

    def __init__(
        self,
        capacity: int | str,
        *,
        mac_key: bytes | None = None,
        replacement: str | Replacement = "arc",
    ) -> None:
        self._capacity = parse_bytes(capacity, "capacity")
        self._mac_key = mac_key
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._records: dict[StoreKey, bytes] | None = {}
        policy = REPLACEMENTS.build(replacement) if isinstance(replacement, str) else replacement
        self._order: ReplacementState[StoreKey] = policy.start(self._capacity)
        self._pins = Pins()
        self._stats = TierStats(capacity_bytes=self._capacity)

    def _open(self) -> dict[StoreKey, bytes]:
        if os.getpid() != self._pid:
            raise StoreClosedError("this memory tier was made before a fork; make one in the child")
        if self._records is None:
            raise StoreClosedError("this memory tier is closed")
        return self._records

    def _count(self, **more: int) -> None:
        values = {name: getattr(self._stats, name) + n for name, n in more.items()}
        self._stats = replace(self._stats, **values)

    def get_into(
        self,
        key: StoreKey,
        buf: Buffer,
        sections: Collection[int] | None = None,
        deadline: float | None = None,
    ) -> int | None:
        """See `Tier.get_into`."""
        with self._lock:
            records = self._open()
            if deadline is not None and monotonic() > deadline:
                self._count(timeouts=1)
                return None
            data = records.get(key)
            if data is None:
                self._count(misses=1)
                return None
            if sections is None or sections:
                self._order.hit(key)
            else:
                self._order.touch(key)  # somebody looks what it is; reading it comes after
        out = memoryview(buf).cast("B")
        spans = [(0, len(data))]
        if sections is not None:
            header = parse_header(data, mac_key=self._mac_key)
            chosen = [header.sections[i] for i in sections]
            spans = [(0, header.header_bytes), *((s.offset, s.stored_bytes) for s in chosen)]
        if max(start + size for start, size in spans) > out.nbytes:
            return None
        for start, size in spans:
            out[start : start + size] = data[start : start + size]
        with self._lock:
            self._count(hits=1, read_bytes=sum(size for _, size in spans))
        return len(data)

    def put(self, key: StoreKey, parts: Sequence[Buffer]) -> bool:
        """See `Tier.put`."""
        size = sum(memoryview(part).nbytes for part in parts)
        with self._lock:
            records = self._open()
            if key in records:
                self._order.touch(key)
                self._count(duplicates=1)
                return True
            if size > self._capacity or not self._order.admit(key, size):
                self._count(rejected=1)
                return False
            need = self._stats.used_bytes + size - self._capacity
            victims = list(self._order.victims(need, self._pins.keys))
            if sum(len(records[victim]) for victim in victims) < need:  # the others are pinned
                self._count(rejected=1)
                return False
            for victim in victims:
                self._order.remove(victim, evicted=True)
                self._count(evicted=1, records=-1, used_bytes=-len(records.pop(victim)))
            # Joined under the lock: room that is counted must not be taken twice.
            records[key] = b"".join(parts)
            self._order.insert(key, size)
            self._count(puts=1, records=1, used_bytes=size, written_bytes=size)
            return True

    def contains_many(self, keys: Sequence[StoreKey]) -> list[bool]:
        """See `Tier.contains_many`."""
        with self._lock:
            records = self._open()
            return [key in records for key in keys]

    def size(self, key: StoreKey) -> int | None:
        """See `Tier.size`."""
        with self._lock:
            data = self._open().get(key)
            return None if data is None else len(data)

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.touch`."""
        with self._lock:
            self._open()
            for key in keys:
                self._order.touch(key)

    def pin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.pin`."""
        with self._lock:
            self._open()
            self._pins.pin(keys)

    def unpin(self, keys: Sequence[StoreKey]) -> None:
        """See `Tier.unpin`."""
        with self._lock:
            self._pins.unpin(keys)

    def delete(self, key: StoreKey) -> bool:
        """See `Tier.delete`."""
        with self._lock:
            data = self._open().pop(key, None)
            if data is None:
                return False
            self._order.remove(key)
            self._count(records=-1, used_bytes=-len(data))
            return True

    def keys(self) -> Iterator[StoreKey]:
        """See `Tier.keys`."""
        with self._lock:
            self._open()
            return self._order.keys()

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        with self._lock:
            self._open()
            return self._stats

    def check(self, *, repair: bool = False) -> CheckReport:
        """See `Tier.check`."""
        with self._lock:
            records = dict(self._open())
            used = self._stats.used_bytes
        problems = []
        repaired = 0
        for key, data in records.items():
            try:
                verify_record(key, memoryview(data), mac_key=self._mac_key)
            except CodecError as exc:
                problems.append(f"{key.block.hex()[:16]}: {exc}")
                if repair:
                    repaired += self.delete(key)
        if used != sum(map(len, records.values())):
            problems.append(f"{used} bytes counted, {sum(map(len, records.values()))} held")
        return CheckReport(records=len(records), problems=tuple(problems), repaired=repaired)

    def close(self) -> None:
        """See `Tier.close`."""
        if os.getpid() == self._pid:
            with self._lock:
                self._records = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
