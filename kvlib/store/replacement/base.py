# SPDX-License-Identifier: Apache-2.0
"""What a tier asks of a replacement policy.

A `Replacement` is the policy as its method string says it, without state; `start` makes the
`ReplacementState` of one tier. A state does no I/O, holds no record (only keys and sizes) and is
not thread-safe: the tier calls it under its own lock. To put a record in, a tier calls

    if state.admit(key, size, hint):
        for victim in state.victims(used + size - capacity, pinned):
            delete it; state.remove(victim, evicted=True)
        state.insert(key, size, hint)

An `Order` is the inner part of a policy, which sees only keys, sizes and costs; `kvlib.store.
replacement.hinted.HintedState` makes a state of it.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from time import monotonic
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from kvlib.errors import ConfigError

__all__ = ["Clock", "Hint", "Key", "Order", "Replacement", "ReplacementState", "enough"]

Key = TypeVar("Key", bound=Hashable)
Clock = Callable[[], float]
"""The time now: seconds, or the number of requests so far; `Hint` speaks in the same unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What is known of a record besides its past; nothing by default.

    Attributes:
        session: of the conversation that the record belongs to. No policy here looks at it.
        kind: class of the request (chat, batch, agent). No policy here looks at it.
        priority: records of a lower one go first, whatever the policy says.
        ttl: until when it is worth anything, from now, in the clock's unit; then it goes first.
        next_use: until its next use, from now, in the clock's unit.
        cost: of computing the record anew, in any unit; for `gdsf`.

    Raises:
        ConfigError: a number out of range.
    """

    session: str | None = None
    kind: str | None = None
    priority: int = 0
    ttl: float | None = None
    next_use: float | None = None
    cost: float = 1.0

    def __post_init__(self) -> None:
        for name in ("ttl", "next_use"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} is a time from now, at least 0; got {value!r}")
        if not 0 < self.cost < math.inf:
            raise ConfigError(f"cost is a positive finite number, got {self.cost!r}")


class ReplacementState(Protocol[Key]):
    """What a policy remembers of one tier's records."""

    def admit(self, key: Key, size: int, hint: Hint | None = None) -> bool:
        """Whether a record that is not held shall come in; call it before asking for victims.

        A policy may learn from the key here (ARC: that it let it go too early).
        """
        ...

    def insert(self, key: Key, size: int, hint: Hint | None = None) -> None:
        """A record of `size` bytes is held from now on."""
        ...

    def hit(self, key: Key, hint: Hint | None = None) -> None:
        """A record was read; one that is not held is ignored, here and below."""
        ...

    def touch(self, key: Key, hint: Hint | None = None) -> None:
        """A record was used last, by the same use that `hit` or `insert` has told of already.

        It sets the order among the records of one prompt, and is not a second use. A hint replaces
        what was known; one without `next_use` leaves the next use that was told before.
        """
        ...

    def remove(self, key: Key, *, evicted: bool = False) -> None:
        """A record is gone: to make room if `evicted`, else deleted or found damaged."""
        ...

    def victims(self, need_bytes: int, protected: Set[Key] = frozenset()) -> Iterator[Key]:
        """Records to drop, the first one first, until `need_bytes` are free or none is left.

        Args:
            need_bytes: to be freed.
            protected: never among them.

        Returns:
            Keys; they stay held until `remove`. Valid until another method is called.
        """
        ...

    def keys(self) -> Iterator[Key]:
        """All keys, the one used longest ago first."""
        ...

    def __len__(self) -> int: ...

    def snapshot(self) -> dict[str, Any]:
        """All it remembers as dicts, lists and numbers, with the keys as they are."""
        ...

    def restore(self, data: Mapping[str, Any]) -> None:
        """Take the place that `snapshot` described; on an error nothing changes.

        Raises:
            IncompatibleDataError: of another policy, other parameters or another version.
            CorruptDataError: malformed.
        """
        ...


@runtime_checkable
class Replacement(Protocol):
    """A replacement policy: a frozen dataclass whose fields are its parameters."""

    name: ClassVar[str]
    version: ClassVar[int]
    status: ClassVar[str]

    def start(self, capacity_bytes: int, clock: Clock = monotonic) -> ReplacementState[Any]:
        """The state of an empty tier.

        Args:
            capacity_bytes: the tier's; it bounds what is remembered of records that are gone.
            clock: see `Clock`.
        """
        ...


class Order(Protocol[Key]):
    """An order of records made from their past alone.

    Every key passed to `hit`, `touch` and `remove` is held, those passed to `insert` are not.
    """

    def admit(self, key: Key, size: int) -> bool:
        """See `ReplacementState.admit`."""
        ...

    def insert(self, key: Key, size: int, cost: float) -> None:
        """See `ReplacementState.insert`."""
        ...

    def hit(self, key: Key) -> None:
        """See `ReplacementState.hit`."""
        ...

    def touch(self, key: Key) -> None:
        """See `ReplacementState.touch`."""
        ...

    def remove(self, key: Key, *, evicted: bool) -> None:
        """See `ReplacementState.remove`."""
        ...

    def victims(self, need_bytes: int, protected: Set[Key]) -> Iterator[Key]:
        """See `ReplacementState.victims`."""
        ...

    def keys(self) -> Collection[Key]:
        """All keys, in any order."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """What it remembers, without the sizes and costs of the records held."""
        ...

    def restore(self, data: Mapping[str, Any], sizes: Mapping[Key, tuple[int, float]]) -> None:
        """Fill an order that is empty; `sizes` has size and cost of the records held."""
        ...


def enough(
    keys: Iterable[Key], size_of: Callable[[Key], int], need_bytes: int, protected: Set[Key]
) -> Iterator[Key]:
    """Those of `keys` that are not protected, until they have `need_bytes`."""
    freed = 0
    for key in keys:
        if freed >= need_bytes:
            return
        if key not in protected:
            yield key
            freed += size_of(key)
