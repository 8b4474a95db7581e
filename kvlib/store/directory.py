# SPDX-License-Identifier: Apache-2.0
"""Which records hold a prompt: found by walking its keys, with headers remembered.

The cache of headers only saves reads. What it says is checked against the tiers each time, and what
a record really holds is checked again when it is loaded. `remembered_run` alone does not look at
the tiers: it is the answer for those who must not wait for a disk, as true as the last look.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvlib.codecs.container import MAX_HEADER_BYTES, parse_header
from kvlib.errors import CodecError
from kvlib.keys import BlockKey, StoreKey
from kvlib.spec import EXACT
from kvlib.store.tier import Tier

if TYPE_CHECKING:
    from kvlib.store.device import DeviceTier

__all__ = ["Directory", "Found", "Identity"]

_HEADER_CACHE_RECORDS = 1 << 16


class Identity(NamedTuple):
    """A form in which blocks may be stored.

    Attributes:
        ancestors: lowest fidelity among the KV they were computed from.
        codec: canonical string.
        lossless: whether the codec gives back what it was given.
        storage: the storage fingerprint of all that.
        rank: how far down the list of what is acceptable it stands.
    """

    ancestors: str
    codec: str
    lossless: bool
    storage: bytes
    rank: int = 0

    @property
    def fidelity(self) -> str:
        """Of what is decoded."""
        return self.ancestors if self.ancestors != EXACT or self.lossless else self.codec


@dataclass(frozen=True, slots=True)
class Found:
    """A record of the walk: its key, our first block in it, how many are ours, all it holds."""

    key: StoreKey
    first: int
    count: int
    held: tuple[BlockKey, ...]
    identity: Identity


class Directory:
    """The records of some tiers, fastest tier first.

    Args:
        tiers: where records are.
        mac_key: see `kvlib.codecs.container.parse_header`.
        device: where blocks are decoded already, in front of all tiers.
    """

    def __init__(
        self, tiers: Sequence[Tier], mac_key: bytes | None, device: "DeviceTier | None" = None
    ) -> None:
        self._tiers = tiers
        self._device = device
        self._mac_key = mac_key
        self._lock = threading.Lock()
        self._headers: OrderedDict[StoreKey, tuple[BlockKey, ...]] = OrderedDict()

    def record_keys(self, key: StoreKey) -> tuple[BlockKey, ...] | None:
        """Keys of the blocks in a record, from the cache or its header; None if it is not there."""
        with self._lock:
            known = self._headers.get(key)
            if known is not None:
                self._headers.move_to_end(key)
        if known is not None and any(tier.contains_many([key])[0] for tier in self._tiers):
            return known
        for tier in self._tiers:
            size = tier.size(key)
            if size is None:
                continue
            front = np.empty(min(size, MAX_HEADER_BYTES), np.uint8)
            if tier.get_into(key, front.data, sections=()) is None:
                continue
            try:
                keys = parse_header(front.data, mac_key=self._mac_key).keys
            except CodecError:
                continue
            self.remember(key, keys)
            return keys
        with self._lock:
            self._headers.pop(key, None)
        return None

    def remember(self, key: StoreKey, keys: tuple[BlockKey, ...]) -> None:
        """Note the keys of the blocks in a record."""
        with self._lock:
            self._headers[key] = keys
            self._headers.move_to_end(key)
            while len(self._headers) > _HEADER_CACHE_RECORDS:
                self._headers.popitem(last=False)

    def find(
        self, identities: Sequence[Identity], keys: Sequence[BlockKey], at: int
    ) -> Found | None:
        """The record that starts with block `at`, under the best identity."""
        return _find(self.record_keys, identities, keys, at)

    def run(self, identities: Sequence[Identity], keys: Sequence[BlockKey]) -> list[Found]:
        """The records that hold the leading blocks of a prompt, in order."""
        return _run(self.record_keys, identities, keys)

    def loadable_run(self, identities: Sequence[Identity], keys: Sequence[BlockKey]) -> list[Found]:
        """The same for who wants to load them: blocks may be left on the device alone.

        For all others these are not stored: they are gone with the process, and cannot be pinned.
        """
        return _run(self._loadable, identities, keys)

    def _loadable(self, key: StoreKey) -> tuple[BlockKey, ...] | None:
        decoded = None if self._device is None else self._device.record_keys(key)
        return self.record_keys(key) if decoded is None else decoded

    def remembered_run(
        self, identities: Sequence[Identity], keys: Sequence[BlockKey]
    ) -> list[Found]:
        """The records that are remembered to hold the leading blocks; touches no tier."""
        with self._lock:
            return _run(self._headers.get, identities, keys)

    def forget(self, key: StoreKey) -> None:
        """Drop what is remembered of a record."""
        with self._lock:
            self._headers.pop(key, None)


_Look = Callable[[StoreKey], "tuple[BlockKey, ...] | None"]


def _find(
    look: _Look, identities: Sequence[Identity], keys: Sequence[BlockKey], at: int
) -> Found | None:
    for identity in identities:
        key = StoreKey(keys[at], identity.storage)
        held = look(key)
        if held:
            count = 0
            while count < len(held) and at + count < len(keys) and held[count] == keys[at + count]:
                count += 1
            if count:
                return Found(key, at, count, held, identity)
    return None


def _run(look: _Look, identities: Sequence[Identity], keys: Sequence[BlockKey]) -> list[Found]:
    run: list[Found] = []
    at = 0
    while at < len(keys):
        found = _find(look, identities, keys, at)
        if found is None:
            break
        run.append(found)
        at += found.count
    return run
