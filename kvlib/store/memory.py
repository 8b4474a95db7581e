# SPDX-License-Identifier: Apache-2.0
"""The memory tier: whole records in RAM, bounded; a replacement policy says which goes first."""

import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from time import monotonic
from typing import ClassVar, NamedTuple, Self

from kvlib.blocks import KVBlock
from kvlib.codecs.container import Buffer, parse_header
from kvlib.errors import CodecError, StoreClosedError
from kvlib.keys import BlockKey, StoreKey
from kvlib.store.replacement import Hint, Replacement
from kvlib.store.replacement.roster import Roster
from kvlib.store.sizes import parse_bytes
from kvlib.store.terms import NO_TERMS, Terms, WallClock
from kvlib.store.tier import CheckReport, Pins, TierStats, verify_record

__all__ = ["MemoryTier", "Opened"]


class Opened(NamedTuple):
    """What a record was found to be.

    Attributes:
        keys: of the blocks it holds.
        block: these blocks; all numbers lie in the record.
        nbytes: of the record.
    """

    keys: tuple[BlockKey, ...]
    block: KVBlock
    nbytes: int


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
        self._opened: dict[StoreKey, Opened] = {}
        clock = WallClock().seconds
        self._roster: Roster[StoreKey] = Roster(replacement, self._capacity, clock)
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
        data = self._take_note(key, looks=sections is not None and not sections, deadline=deadline)
        if data is None:
            return None
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

    def lend(self, key: StoreKey, deadline: float | None = None) -> memoryview | None:
        """A record as it lies here, read-only, for as long as anything refers to it.

        Else as `get_into`: what is dropped meanwhile is no longer counted, but not overwritten.
        """
        data = self._take_note(key, deadline=deadline)
        if data is None:
            return None
        with self._lock:
            self._count(hits=1, read_bytes=len(data))
        return memoryview(data)

    def keep_open(self, key: StoreKey, record: memoryview, opened: Opened) -> None:
        """Remember what a record that was lent is, for as long as it stays."""
        with self._lock:
            if self._open().get(key) is record.obj:
                self._opened[key] = opened

    def lend_opened(self, key: StoreKey, deadline: float | None = None) -> Opened | None:
        """A record that is open already; see `lend`. None: it is not, or not there."""
        if key not in self._opened:
            return None
        data = self._take_note(key, deadline=deadline)
        with self._lock:
            opened = None if data is None else self._opened.get(key)
            if opened is not None:
                self._count(hits=1, read_bytes=opened.nbytes)
            return opened

    def _take_note(
        self, key: StoreKey, *, looks: bool = False, deadline: float | None = None
    ) -> bytes | None:
        """A record that somebody reads, or (`looks`) asks what it is: reading it comes after."""
        with self._lock:
            records = self._open()
            if deadline is not None and monotonic() > deadline:
                self._count(timeouts=1)
                return None
            self._expire(key)
            data = records.get(key)
            if data is None:
                self._count(misses=1)
            elif looks:
                self._roster.touch(key)
            else:
                self._roster.hit(key)
            return data

    def put(self, key: StoreKey, parts: Sequence[Buffer], terms: Terms | None = None) -> bool:
        """See `Tier.put`."""
        size = sum(memoryview(part).nbytes for part in parts)
        terms = terms or NO_TERMS
        with self._lock:
            records = self._open()
            self._expire(key)
            if key in records:
                self._roster.touch(key, terms.hint)
                self._count(duplicates=1)
                return True
            if not self._make_room(key, size, terms):
                self._count(rejected=1)
                return False
            # Joined under the lock: room that is counted must not be taken twice.
            records[key] = b"".join(parts)
            self._roster.insert(key, size, terms)
            self._count(puts=1, records=1, used_bytes=size, written_bytes=size)
            return True

    def _make_room(self, key: StoreKey, size: int, terms: Terms) -> bool:
        """Drop what must go for a record, or nothing if that is not enough (locked)."""
        most = self._capacity if terms.quota is None else min(self._capacity, terms.quota)
        if size > most or not self._roster.admit(key, size, terms):
            return False
        pinned = self._pins.keys
        own: list[StoreKey] = []
        if terms.quota is not None:
            over = self._roster.used_bytes(terms.tenant) + size - terms.quota
            own = list(self._roster.victims(over, pinned, terms.tenant))
            if self._bytes_of(own) < over:  # the others are pinned
                return False
        need = self._stats.used_bytes - self._bytes_of(own) + size - self._capacity
        others = list(self._roster.victims(need, {*pinned, *own} if own else pinned))
        if self._bytes_of(others) < need:
            return False
        for victim in [*own, *others]:
            self._evict(victim)
        return True

    def _bytes_of(self, keys: Sequence[StoreKey]) -> int:
        records = self._open()
        return sum(len(records[key]) for key in keys)

    def _evict(self, key: StoreKey) -> None:
        over = self._roster.is_over(key)
        self._take_out(key, evicted=not over)
        self._count(evicted=not over, expired=over)

    def _take_out(self, key: StoreKey, *, evicted: bool = False) -> None:
        data = self._open().pop(key)
        self._opened.pop(key, None)
        self._roster.remove(key, evicted=evicted)
        self._count(records=-1, used_bytes=-len(data))

    def _expire(self, key: StoreKey) -> None:
        """Drop a record if its time is over."""
        if self._roster.is_over(key):
            self._evict(key)

    def contains_many(self, keys: Sequence[StoreKey]) -> list[bool]:
        """See `Tier.contains_many`."""
        with self._lock:
            records = self._open()
            for key in keys:
                self._expire(key)
            return [key in records for key in keys]

    def size(self, key: StoreKey) -> int | None:
        """See `Tier.size`."""
        with self._lock:
            records = self._open()
            self._expire(key)
            data = records.get(key)
            return None if data is None else len(data)

    def terms(self, key: StoreKey) -> Terms | None:
        """See `Tier.terms`."""
        with self._lock:
            self._open()
            return self._roster.terms(key)

    def touch(self, keys: Sequence[StoreKey], hint: Hint | None = None) -> None:
        """See `Tier.touch`."""
        with self._lock:
            self._open()
            for key in keys:
                self._roster.touch(key, hint)

    def trim(self, most_bytes: int, tenant: bytes | None = None) -> int:
        """See `Tier.trim`."""
        with self._lock:
            self._open()
            used = self._stats.used_bytes if tenant is None else self._roster.used_bytes(tenant)
            victims = list(self._roster.victims(used - most_bytes, self._pins.keys, tenant))
            for victim in victims:
                self._evict(victim)
            return len(victims)

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
            if key not in self._open():
                return False
            self._take_out(key)
            return True

    def keys(self) -> Iterator[StoreKey]:
        """See `Tier.keys`."""
        with self._lock:
            self._open()
            return self._roster.keys()

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
                self._opened.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
