# SPDX-License-Identifier: Apache-2.0
"""The device tier: decoded blocks on a torch device, in front of all tiers that hold records.

A load that finds its blocks here neither reads, nor decodes, nor copies from the host: one copy on
the device and they are there. A record's blocks lie in one tensor, named like the record: the key
says which codec and which ancestors the numbers went through, so what a lossy codec made is never
taken for anything else. Only loads fill this tier; it holds nothing that a record did not say.

**Bound.** Bytes are counted as the allocator gives them out, in units of 512, before it is asked;
an ARC (or another policy) says what goes. What loads hand out is the caller's and not counted.

**CUDA.** All copies run on a stream of the tier's own, beside the engine's work, from pinned memory
where they come from the host. Tensors for callers are allocated on the caller's stream, for which
the tier's waits before it writes: their memory may still be read by what the caller did before.
Blocks count as arrived when their copies have ended, so no caller has to know of our stream.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.errors import ConfigError, StoreClosedError
from kvlib.keys import BLOCK_TOKENS, BlockKey, StoreKey
from kvlib.spec import KVSpec
from kvlib.store.records import Layers, copy_layers
from kvlib.store.replacement import REPLACEMENTS, Replacement, ReplacementState
from kvlib.store.sizes import parse_bytes
from kvlib.store.terms import WallClock, is_over
from kvlib.store.tier import CheckReport, TierStats

__all__ = ["DeviceTier", "Slot"]

_UNIT = 512


@dataclass(frozen=True, slots=True)
class _Held:
    """Decoded blocks: their keys, all numbers in one tensor, views of it by layer, their end."""

    keys: tuple[BlockKey, ...]
    flat: Tensor
    layers: Layers
    until: int

    @property
    def nbytes(self) -> int:
        return _physical(self.flat.nbytes)


class Slot:
    """Room for a record's blocks that are being decoded; held once all parts were filled.

    Args:
        tier: whose room.
        key: of the record.
        held: the room.
        parts: how many times `filled` or `failed` will be called.
    """

    def __init__(self, tier: "DeviceTier", key: StoreKey, held: _Held, parts: int) -> None:
        self._tier = tier
        self._key = key
        self._held = held
        self._lock = threading.Lock()
        self._left = parts
        self._ok = True

    @property
    def layers(self) -> Layers:
        """Where the blocks go."""
        return self._held.layers

    def filled(self) -> None:
        """A part of it was filled."""
        self._part(ok=True)

    def failed(self) -> None:
        """A part of it will never be filled."""
        self._part(ok=False)

    def _part(self, *, ok: bool) -> None:
        with self._lock:
            self._left -= 1
            self._ok &= ok
            over = not self._left
        if over:
            self._tier._settle(self._key, self._held, ok=self._ok)


class DeviceTier:
    """Decoded blocks on a device. Thread-safe; unusable in a forked child.

    Args:
        device: ``cpu`` or a CUDA device.
        capacity: most bytes held, those of blocks that are on their way included.
        replacement: what goes first: method string of one of `REPLACEMENTS`, or the policy.

    Raises:
        ConfigError: another kind of device, one that is not there, or a bad size.
    """

    name: ClassVar[str] = "device"

    def __init__(
        self,
        device: str | torch.device,
        capacity: int | str,
        *,
        replacement: str | Replacement = "arc",
    ) -> None:
        self.device = _checked(device)
        self._capacity = parse_bytes(capacity, "device_bytes")
        self._clock = WallClock()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._held: dict[StoreKey, _Held] | None = {}
        self._coming: set[StoreKey] = set()
        policy = REPLACEMENTS.build(replacement) if isinstance(replacement, str) else replacement
        self._order: ReplacementState[StoreKey] = policy.start(self._capacity)
        self._stats = TierStats(capacity_bytes=self._capacity)
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None

    def _open(self) -> dict[StoreKey, _Held]:
        if os.getpid() != self._pid:
            raise StoreClosedError("this device tier was made before a fork; make one in the child")
        if self._held is None:
            raise StoreClosedError("this device tier is closed")
        return self._held

    def _count(self, **more: int) -> None:
        values = {name: getattr(self._stats, name) + n for name, n in more.items()}
        self._stats = replace(self._stats, **values)

    # -- the device

    def caller_stream(self) -> "torch.cuda.Stream | None":
        """The stream that the calling thread works on; None without CUDA."""
        return None if self._stream is None else torch.cuda.current_stream(self.device)

    def allocate(
        self, spec: KVSpec, num_tokens: int, stream: "torch.cuda.Stream | None"
    ) -> list[tuple[Tensor, Tensor]]:
        """Room on the device for a caller; see `kvlib.store.records.allocate`.

        Args:
            spec: what the numbers mean.
            num_tokens: of every layer.
            stream: the caller's, from `caller_stream`.
        """
        with torch.cuda.stream(stream):
            room = [_room(spec, j, num_tokens, self.device) for j in range(spec.num_layers)]
        if self._stream is not None and stream is not None:
            self._stream.wait_stream(stream)
        return room

    def staging(self, spec: KVSpec, layers: Iterable[int], num_tokens: int) -> Layers:
        """Room in the host's memory to decode into, pinned where `upload` gains by that."""
        pinned = self._stream is not None
        return {j: _room(spec, j, num_tokens, torch.device("cpu"), pinned) for j in layers}

    def upload(self, source: Layers, to: Layers, slot: Slot | None) -> None:
        """Copy layers from the host to a caller's tensors and into a slot, and wait for it."""
        with self._copying():
            if slot is not None:  # first: a caller may write into `to` whenever it likes
                ours = {j: slot.layers[j] for j in to}
                copy_layers(source, ours, non_blocking=True)
                source = ours
            copy_layers(source, to, non_blocking=True)

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies go to our stream; they have ended in the end."""
        with torch.cuda.stream(self._stream):
            yield
            if self._stream is not None:
                done = torch.cuda.Event()
                done.record(self._stream)
                done.synchronize()

    # -- what it holds

    def record_keys(self, key: StoreKey) -> tuple[BlockKey, ...] | None:
        """Keys of the blocks of a record that is held, else None. Reads nothing."""
        with self._lock:
            held = self._fresh(key)
            return None if held is None else held.keys

    def _fresh(self, key: StoreKey) -> _Held | None:
        """What is held under a key, dropped if its time is over."""
        held = self._open().get(key)
        if held is not None and is_over(held.until, self._clock.now()):
            self._drop(key)
            return None
        return held

    def _drop(self, key: StoreKey, *, evicted: bool = False) -> None:
        held = self._open().pop(key)
        self._order.remove(key, evicted=evicted)
        self._count(records=-1, used_bytes=-held.nbytes, evicted=int(evicted))

    def fetch(self, key: StoreKey, keys: tuple[BlockKey, ...], to: Layers) -> bool:
        """Copy a record's leading blocks to a caller's tensors.

        Args:
            key: the record.
            keys: of all its blocks.
            to: keys and values of every layer, [Hkv, T, D]; T says how many blocks.

        Returns:
            Whether they were here; if not, nothing was written.
        """
        with self._lock:
            held = self._fresh(key)
            if held is None or held.keys != keys:
                self._count(misses=1)
                return False
            self._order.hit(key)
        tokens = next(iter(to.values()))[0].shape[1]
        source = {j: (k[:, :tokens], v[:, :tokens]) for j, (k, v) in held.layers.items()}
        with self._copying():
            copy_layers(source, to, non_blocking=True)
        read = sum(k.nbytes + v.nbytes for k, v in to.values())
        with self._lock:
            self._count(hits=1, read_bytes=read)
        return True

    def reserve(
        self,
        key: StoreKey,
        keys: tuple[BlockKey, ...],
        spec: KVSpec,
        *,
        parts: int,
        ttl: float | None = None,
    ) -> Slot | None:
        """Make room for a record's blocks.

        Args:
            key: the record.
            keys: of all its blocks.
            spec: what its numbers mean.
            parts: in how many parts it will be filled.
            ttl: seconds for which the record may be served; None for ever.

        Returns:
            Where to decode to; None if it is here, on its way, or not to be had.
        """
        tokens = len(keys) * BLOCK_TOKENS
        size = _physical(tokens * spec.bytes_per_token())
        with self._lock:
            held = self._open()
            if key in held or key in self._coming:
                return None
            if size > self._capacity or not self._order.admit(key, size):
                self._count(rejected=1)
                return None
            need = self._stats.used_bytes + size - self._capacity
            victims = list(self._order.victims(need))
            if sum(held[victim].nbytes for victim in victims) < need:  # the rest is on its way
                self._count(rejected=1)
                return None
            for victim in victims:
                self._drop(victim, evicted=True)
            self._coming.add(key)
            self._count(used_bytes=size)
        until = self._clock.until(ttl)
        try:
            with torch.cuda.stream(self._stream):
                flat, layers = _packed(spec, tokens, self.device)
        except RuntimeError:  # the device has no memory left
            with self._lock:
                self._coming.discard(key)
                self._count(errors=1, used_bytes=-size)
            return None
        return Slot(self, key, _Held(keys, flat, layers, until), parts)

    def _settle(self, key: StoreKey, held: _Held, *, ok: bool) -> None:
        """Hold what came, or give its room back."""
        with self._lock:
            self._coming.discard(key)
            if not ok or self._held is None:
                self._count(used_bytes=-held.nbytes)
                return
            self._held[key] = held
            self._order.insert(key, held.nbytes)
            self._count(puts=1, records=1, written_bytes=held.flat.nbytes)

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """Mark records as used, the last one as used last."""
        with self._lock:
            self._open()
            for key in keys:
                self._order.touch(key)

    def delete(self, key: StoreKey) -> bool:
        """Drop a record's blocks; whether they were here."""
        with self._lock:
            here = key in self._open()
            if here:
                self._drop(key)
            return here

    def keys(self) -> list[StoreKey]:
        """The records held, the one used longest ago first."""
        with self._lock:
            self._open()
            return list(self._order.keys())

    def stats(self) -> TierStats:
        """A snapshot of the counters; `used_bytes` includes what is on its way."""
        with self._lock:
            self._open()
            return self._stats

    def check(self) -> CheckReport:
        """Count again what is held."""
        with self._lock:
            held = self._open()
            counted = sum(x.nbytes for x in held.values())
            problems = []
            if not self._coming and counted != self._stats.used_bytes:
                problems.append(f"{self._stats.used_bytes} bytes counted, {counted} held")
            if set(held) != set(self._order.keys()):
                problems.append("the replacement policy knows other records than are held")
            return CheckReport(records=len(held), problems=tuple(problems))

    def close(self) -> None:
        """Release everything."""
        if os.getpid() == self._pid:
            with self._lock:
                self._held = None


def _checked(device: str | torch.device) -> torch.device:
    """A device that we can work with.

    Raises:
        ConfigError: it is not one.
    """
    try:
        found = torch.device(device)
    except RuntimeError as exc:
        raise ConfigError(f"device={device!r} is none that torch knows: {exc}") from exc
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # A bare "cuda" has no index, whatever torch's annotations say.
        current = torch.cuda.current_device() if count else 0
        index = current if str(found) == "cuda" else found.index
        if index >= count:
            raise ConfigError(f"device={device!r}: torch sees {count} CUDA devices here")
        return torch.device("cuda", index)
    if found.type != "cpu":
        raise ConfigError(f"device={device!r}: expected 'cpu' or a CUDA device such as 'cuda:0'")
    return found


def _physical(nbytes: int) -> int:
    return -(-nbytes // _UNIT) * _UNIT


def _room(
    spec: KVSpec, layer: int, tokens: int, device: torch.device, pinned: bool = False
) -> tuple[Tensor, Tensor]:
    kind, dtype = spec.layers[layer], getattr(torch, spec.dtype)
    k, v = (
        torch.empty((kind.num_kv_heads, tokens, dim), dtype=dtype, device=device, pin_memory=pinned)
        for dim in (kind.k_head_dim, kind.v_head_dim)
    )
    return k, v


def _packed(spec: KVSpec, tokens: int, device: torch.device) -> tuple[Tensor, Layers]:
    """One tensor for all layers, and views of it."""
    heads = [(j, x.num_kv_heads, x.k_head_dim, x.v_head_dim) for j, x in enumerate(spec.layers)]
    total = sum(h * (k + v) for _, h, k, v in heads) * tokens
    flat = torch.empty(total, dtype=getattr(torch, spec.dtype), device=device)
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    rest = flat
    for j, h, k, v in heads:
        keys, values, rest = rest.split(
            [h * tokens * k, h * tokens * v, len(rest) - h * tokens * (k + v)]
        )
        layers[j] = (keys.view(h, tokens, k), values.view(h, tokens, v))
    return flat, layers
