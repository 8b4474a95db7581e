# SPDX-License-Identifier: Apache-2.0
"""The part of a `KVStore` that works with keys: what is stored, pinning, bringing it up."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from kvlib.codecs import Codec, codec_from_canonical
from kvlib.keys import BlockKey, Extra, StoreKey, TokenIds, block_keys
from kvlib.spec import EXACT, KVSpec, LayerKind
from kvlib.store.directory import Directory, Found, Identity
from kvlib.store.heads import HeadRange, check_model
from kvlib.store.leases import Lease, Leases
from kvlib.store.puts import Prefetch
from kvlib.store.replacement import Hint
from kvlib.store.work import Priority, Task, WorkPool
from kvlib.store.writes import identities_of

if TYPE_CHECKING:
    from kvlib.store.device import DeviceTier
    from kvlib.store.stack import TierStack
    from kvlib.store.tier import CheckReport, Tier

__all__ = ["Lookups"]

_KINDS = (LayerKind.FULL, LayerKind.SLIDING, LayerKind.MLA)


class Lookups:
    """What `KVStore` can do with a prompt's keys alone."""

    if TYPE_CHECKING:  # what the store has
        salt: str | bytes
        head_range: HeadRange
        _codecs: dict[str, Codec]
        _device: DeviceTier | None
        _directory: Directory
        _leases: Leases
        _memory: Tier | None
        _pool: WorkPool
        _stack: TierStack

        def _check_open(self) -> None: ...

    def block_keys(
        self, spec: KVSpec, tokens: "TokenIds", *, extras: Sequence[Extra] = ()
    ) -> list[BlockKey]:
        """Keys of the full blocks of `tokens` under this store's salt; see `block_keys`."""
        return block_keys(spec.fingerprint(), tokens, salt=self.salt, extras=extras)

    def _begin(self, spec: KVSpec) -> None:
        """Whether blocks of `spec` can be put and loaded now.

        Raises:
            ConfigError: the model has recurrent layers, or see `check_model`.
        """
        self._check_open()
        spec.require(_KINDS, "KVStore")
        check_model(spec, self._codecs.values(), self.head_range)

    def _identities(self, spec: KVSpec, accept: Sequence[str] | None) -> list[Identity]:
        """The forms a request accepts, best first.

        Raises:
            ConfigError: see `check_model`.
        """
        check_model(spec, self._codecs.values(), self.head_range)
        if accept is None:
            accept = (EXACT, *(t for t, codec in self._codecs.items() if not codec.lossless))
        return identities_of(spec, self._codecs, accept, self.head_range)

    def match(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        from_memory: bool = False,
    ) -> int:
        """Leading blocks that seem to be stored: a hint; only `load` makes certain.

        Args:
            spec: what the numbers mean.
            keys: of a prompt's blocks, from its start.
            accept: fidelities of ancestors that are acceptable; by default exact ones, and for a
                lossy codec also those that went through that codec.
            from_memory: go by what this store has put, loaded or looked up before, without asking
                the tiers: at once, but it knows nothing of what others stored, and may know of
                what has been evicted since. `match_async` brings it up to date.
        """
        self._check_open()
        directory = self._directory
        look = directory.remembered_run if from_memory else directory.loadable_run
        return sum(found.count for found in look(self._identities(spec, accept), keys))

    def match_async(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        priority: float = Priority.DEMAND,
    ) -> Task[int]:
        """Begin a `match`; a future of its result, which is remembered from then on.

        Args:
            spec: see `match`.
            keys: see `match`.
            accept: see `match`.
            priority: see `kvlib.store.work.Priority`.
        """
        self._check_open()
        look = partial(self._directory.loadable_run, self._identities(spec, accept), keys)
        return self._pool.submit(lambda: sum(x.count for x in look()), priority=priority)

    def _run(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        accept: Sequence[str] | None,
        from_memory: bool,
    ) -> list[Found]:
        self._check_open()
        directory = self._directory
        look = directory.remembered_run if from_memory else directory.run
        return look(self._identities(spec, accept), keys)

    def pin(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        seconds: float = 60.0,
        accept: Sequence[str] | None = None,
        from_memory: bool = False,
    ) -> Lease:
        """Keep the stored leading blocks of a prompt from being evicted, for a while.

        Args:
            spec: see `match`.
            keys: see `match`.
            seconds: how long, at most; an owner that dies keeps nothing for ever.
            accept: see `match`.
            from_memory: see `match`.

        Returns:
            A lease, to be released or used as a context manager. It holds in this process: another
            one that shares the folder may evict all the same.
        """
        run = self._run(spec, keys, accept, from_memory)
        self._leases.expire()
        num_blocks = sum(found.count for found in run)
        return self._leases.give([found.key for found in run], num_blocks, seconds)

    def touch(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        hint: Hint | None = None,
    ) -> int:
        """Mark the stored leading blocks of a prompt as used, or say what is known of their future.

        Args:
            spec: see `match`.
            keys: see `match`.
            accept: see `match`.
            hint: for the replacement policies: the next use, say, of a request that waits.

        Returns:
            Leading blocks that are stored.
        """
        run = self._run(spec, keys, accept, from_memory=False)
        self._touch([found.key for found in run], hint)
        return sum(found.count for found in run)

    def prefetch(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        priority: float = Priority.PREFETCH,
        deadline: float | None = None,
    ) -> Prefetch:
        """Bring the stored leading blocks of a prompt into the memory tier, encoded as they are.

        Args:
            spec: see `load`.
            keys: see `load`.
            accept: see `match`.
            priority: see `kvlib.store.work.Priority`.
            deadline: `time.monotonic()` after which not to begin another read.

        Returns:
            What to wait for or cancel. Without a memory tier there is nothing to do.
        """
        self._check_open()
        identities, memory = self._identities(spec, accept), self._memory

        def find() -> tuple[list[StoreKey], int]:
            run = self._directory.run(identities, keys)
            names = [] if memory is None else [found.key for found in run]
            here = [] if memory is None else memory.contains_many(names)
            missing = [name for name, have in zip(names, here, strict=True) if not have]
            return missing, sum(found.count for found in run)

        def bring(key: StoreKey) -> bool:
            self._stack.read(key, deadline)
            return memory is not None and memory.contains_many([key])[0]

        return Prefetch(
            self._pool, find, bring, asked=len(keys), priority=priority, deadline=deadline
        )

    def _touch(self, keys: Sequence[StoreKey], hint: Hint | None = None) -> None:
        if self._device is not None:
            self._device.touch(keys[::-1])
        self._stack.touch(keys, hint)

    def _codec_for(self, text: str) -> Codec:
        for known, codec in self._codecs.items():
            if text == known:
                return codec
        return codec_from_canonical(text)

    def _drop(self, key: StoreKey) -> None:
        self._directory.forget(key)
        if self._device is not None:
            self._device.delete(key)
        self._stack.delete(key)

    def check(self, *, repair: bool = False) -> "dict[str, CheckReport]":
        """Verify every record of every tier; see `Tier.check`."""
        self._check_open()
        device = {} if self._device is None else {self._device.name: self._device.check()}
        return device | {tier.name: tier.check(repair=repair) for tier in self._stack.tiers}
