# SPDX-License-Identifier: Apache-2.0
"""What every policy does with hints, around its own order of the records nothing is known of.

Records go in this order: those whose time to live is over; then by priority, the lowest first.
Within a priority, the policy's own victim is set against the record whose next use is furthest
ahead. The latter will pay one hit for the room that it takes until then. The former pays what
records of unknown next use have paid lately: their bytes x time over their bytes hit is how long
one waits for a hit there. The one that waits longer goes.

A record with a known next use is kept outside the policy's order. It enters that order, as if it
were new, when it was used and nothing more is said, or when the expected time has passed.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Generic, cast

from kvlib.errors import CorruptDataError, IncompatibleDataError
from kvlib.registry import describe
from kvlib.store.replacement.base import Clock, Hint, Key, Order, Replacement, enough
from kvlib.store.replacement.queues import Ranked

__all__ = ["END", "HintedState"]

_NOTHING = Hint()
END: Any = object()
"""Instead of a key, where an order ends."""


def _number(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError("not a number")
    return number


@dataclass(slots=True)
class _Record:
    size: int
    cost: float
    used: float  # the clock at the last use
    priority: int = 0
    expires: float = math.inf
    due: float | None = None  # the clock at the next use; None: unknown, it is in the order


class _Earnings:
    """How long records of unknown next use wait for a hit: bytes x time over bytes hit.

    Both sums are halved whenever eight times of what is held has come in: what was, fades.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._came = 0
        self._room = 0.0
        self._hit = 0.0
        self._until: float | None = None  # the clock up to which room is counted

    def change(self, more: int, now: float) -> None:
        """Bytes come in, or go."""
        if self._until is not None:
            self._room += self.nbytes * (now - self._until)
        self._until = now
        self.nbytes += more
        if more > 0:
            self._came += more
            if self._came > 8 * self.nbytes:
                self._room, self._hit, self._came = self._room / 2, self._hit / 2, 0

    def hit(self, size: int) -> None:
        """A record was read."""
        self._hit += size

    def wait(self, now: float) -> float:
        """In the clock's unit; endless while nothing was hit."""
        self.change(0, now)
        return self._room / self._hit if self._hit else math.inf

    def snapshot(self, now: float) -> list[float]:
        """All but the bytes held."""
        self.change(0, now)
        return [self._came, self._room, self._hit]

    def restore(self, data: Any, nbytes: int, now: float) -> None:
        """What `snapshot` gave; now is `now`."""
        came, room, hit = data
        self._came, self._room, self._hit = int(came), _number(room), _number(hit)
        self.nbytes, self._until = nbytes, now


class _Level(Generic[Key]):
    """The records of one priority."""

    def __init__(self, order: Order[Key]) -> None:
        self.order = order
        self.furthest: Ranked[Key] = Ranked()  # by -due


class HintedState(Generic[Key]):
    """A `ReplacementState` made of an `Order`.

    Args:
        policy: whose state it is; named in snapshots.
        make_order: an empty order of the policy.
        clock: see `Clock`.

    Attributes:
        nbytes: of all records held.
    """

    def __init__(
        self, policy: Replacement, make_order: Callable[[], Order[Key]], clock: Clock
    ) -> None:
        self._policy = policy
        self._make_order = make_order
        self._clock = clock
        self._records: OrderedDict[Key, _Record] = OrderedDict()  # oldest use first
        self.nbytes = 0
        self._levels: dict[int, _Level[Key]] = {0: _Level(make_order())}
        self._earnings = _Earnings()
        self._soonest: Ranked[Key] = Ranked()  # by due
        self._expiring: Ranked[Key] = Ranked()  # by expires

    # -- where a record is

    def _level(self, priority: int) -> _Level[Key]:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level(self._make_order())
        return level

    def _place(self, key: Key, record: _Record, now: float) -> None:
        level = self._level(record.priority)
        self._set_expiry(key, record)
        if record.due is None:
            level.order.insert(key, record.size, record.cost)
            self._earnings.change(record.size, now)
        else:
            level.furthest.set(key, -record.due)
            self._soonest.set(key, record.due)

    def _set_expiry(self, key: Key, record: _Record) -> None:
        if record.expires < math.inf:
            self._expiring.set(key, record.expires)
        else:
            self._expiring.discard(key)

    def _take(self, key: Key, record: _Record, *, evicted: bool) -> None:
        level = self._levels[record.priority]
        self._expiring.discard(key)
        if record.due is None:
            level.order.remove(key, evicted=evicted)
            self._earnings.change(-record.size, self._clock())
        else:
            level.furthest.discard(key)
            self._soonest.discard(key)

    def _give_up(self, now: float) -> None:
        """Hand what was expected by now, and did not come, to the policy."""
        late = list(takewhile(lambda pair: pair[0] < now, self._soonest.ascending()))
        for _, key in late:
            record = self._records[key]
            self._take(key, record, evicted=False)
            record.due = None
            self._place(key, record, now)

    # -- what the tier says

    def admit(self, key: Key, size: int, hint: Hint | None = None) -> bool:
        """See `ReplacementState.admit`."""
        hint = hint or _NOTHING
        if hint.next_use is not None:
            return True
        return self._level(hint.priority).order.admit(key, size)

    def insert(self, key: Key, size: int, hint: Hint | None = None) -> None:
        """See `ReplacementState.insert`."""
        if key in self._records:
            self.remove(key)
        record = _Record(size, (hint or _NOTHING).cost, self._clock())
        self._records[key] = record
        self.nbytes += size
        if hint is not None:
            self._learn(record, hint)
        self._place(key, record, record.used)

    @staticmethod
    def _learn(record: _Record, hint: Hint) -> None:
        record.priority = hint.priority
        record.expires = math.inf if hint.ttl is None else record.used + hint.ttl
        record.due = None if hint.next_use is None else record.used + hint.next_use

    def hit(self, key: Key, hint: Hint | None = None) -> None:
        """See `ReplacementState.hit`. Without a hint, priority and time to live stay."""
        record = self._records.get(key)
        if record is None:
            return
        self._records.move_to_end(key)
        record.used = self._clock()
        foretold = record.due is not None
        foretells = hint is not None and hint.next_use is not None
        rises = hint is not None and hint.priority != record.priority
        moves = foretold or foretells or rises
        if not foretold:
            self._earnings.hit(record.size)
        if moves:
            self._take(key, record, evicted=False)
        record.due = None  # if a use was expected, this is it
        if hint is not None:
            self._learn(record, hint)
        if moves:
            self._place(key, record, record.used)
        elif hint is not None:
            self._set_expiry(key, record)
        if not foretold and not foretells:
            self._levels[record.priority].order.hit(key)

    def touch(self, key: Key, hint: Hint | None = None) -> None:
        """See `ReplacementState.touch`."""
        record = self._records.get(key)
        if record is None:
            return
        self._records.move_to_end(key)
        record.used = self._clock()
        if hint is not None and self._relearn(key, record, hint):
            return
        level = self._levels[record.priority]
        if record.due is None:
            level.order.touch(key)
        else:
            level.furthest.set(key, -record.due)  # of equal ones, the one used last stays longest

    def _relearn(self, key: Key, record: _Record, hint: Hint) -> bool:
        """Take a hint that came without a use; whether the record changed its place for it."""
        moves = hint.next_use is not None or hint.priority != record.priority
        due = record.due
        if moves:
            self._take(key, record, evicted=False)
        self._learn(record, hint)
        if hint.next_use is None:
            record.due = due
        if moves:
            self._place(key, record, record.used)
        else:
            self._set_expiry(key, record)
        return moves

    def remove(self, key: Key, *, evicted: bool = False) -> None:
        """See `ReplacementState.remove`."""
        record = self._records.pop(key, None)
        if record is not None:
            self.nbytes -= record.size
            self._take(key, record, evicted=evicted)

    # -- what it answers

    def victims(self, need_bytes: int, protected: Set[Key] = frozenset()) -> Iterator[Key]:
        """See `ReplacementState.victims`."""
        now = self._clock()
        if self._soonest:
            self._give_up(now)
        if not self._soonest and not self._expiring and len(self._levels) == 1:
            return self._levels[0].order.victims(need_bytes, protected)
        over = [key for _, key in takewhile(lambda x: x[0] <= now, self._expiring.ascending())]
        keys = self._in_order(over, need_bytes, protected, now)
        return enough(keys, lambda key: self._records[key].size, need_bytes, protected)

    def _in_order(
        self, over: list[Key], need_bytes: int, protected: Set[Key], now: float
    ) -> Iterator[Key]:
        yield from over
        done = {*protected, *over}
        for priority in sorted(self._levels):
            level = self._levels[priority]
            unknown = level.order.victims(need_bytes, done)
            known = (key for _, key in level.furthest.ascending() if key not in done)
            yield from self._merge(unknown, known, now)

    def _merge(self, unknown: Iterator[Key], known: Iterator[Key], now: float) -> Iterator[Key]:
        """The records of two orders, the one that is expected later first."""
        ahead, idle = next(known, END), next(unknown, END)
        while ahead is not END or idle is not END:
            if self._expected(ahead, now) > self._expected(idle, now):
                yield cast("Key", ahead)
                ahead = next(known, END)
            else:
                yield cast("Key", idle)
                idle = next(unknown, END)

    def _expected(self, key: Key | object, now: float) -> float:
        """Time to the next hit; -1, before all others, at the end of an order."""
        if key is END:
            return -1.0
        record = self._records[cast("Key", key)]
        if record.due is None:
            return max(now - record.used, self._earnings.wait(now))
        return record.due - now

    def keys(self) -> Iterator[Key]:
        """See `ReplacementState.keys`."""
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    # -- through a restart

    def snapshot(self) -> dict[str, Any]:
        """See `ReplacementState.snapshot`. Times are relative to now."""
        now = self._clock()
        return {
            "version": self._policy.version,
            "policy": describe(self._policy),
            "records": [
                [
                    key,
                    record.size,
                    record.cost,
                    now - record.used,
                    record.priority,
                    None if record.expires == math.inf else record.expires - now,
                    None if record.due is None else record.due - now,
                ]
                for key, record in self._records.items()
            ],
            "earnings": self._earnings.snapshot(now),
            "orders": [
                [priority, level.order.snapshot()]
                for priority, level in sorted(self._levels.items())
            ],
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        """See `ReplacementState.restore`."""
        fresh = HintedState(self._policy, self._make_order, self._clock)
        try:
            mine = self._policy.version, describe(self._policy)
            if (data["version"], data["policy"]) != mine:
                raise IncompatibleDataError(
                    f"a snapshot of {data['policy']!r:.80} version {data['version']!r:.20}, "
                    f"expected {mine[1]!r} version {mine[0]}; start without it"
                )
            fresh._fill(data)
        except (AttributeError, KeyError, IndexError, OverflowError, TypeError, ValueError) as exc:
            raise CorruptDataError(
                f"malformed snapshot of a replacement policy ({exc}); start without it"
            ) from exc
        self._records, self._levels = fresh._records, fresh._levels
        self.nbytes = sum(record.size for record in self._records.values())
        self._earnings = fresh._earnings
        self._soonest, self._expiring = fresh._soonest, fresh._expiring

    def _fill(self, data: Mapping[str, Any]) -> None:
        now = self._clock()
        sizes: dict[int, dict[Key, tuple[int, float]]] = {}
        for key, size, cost, idle, priority, ttl, ahead in data["records"]:
            if (
                key in self._records
                or type(size) is not int
                or size < 0
                or type(priority) is not int
            ):
                raise ValueError(f"record {key!r:.80} of {size!r:.20} bytes")
            record = _Record(size, _number(cost), now - _number(idle), priority)
            record.expires = math.inf if ttl is None else now + _number(ttl)
            record.due = None if ahead is None else now + _number(ahead)
            self._records[key] = record
            self._set_expiry(key, record)
            if record.due is None:
                sizes.setdefault(priority, {})[key] = size, record.cost
            else:
                self._level(priority).furthest.set(key, -record.due)
                self._soonest.set(key, record.due)
        known = sum(size for level in sizes.values() for size, _ in level.values())
        self._earnings.restore(data["earnings"], known, now)
        for priority, order in data["orders"]:
            mine = sizes.pop(priority, {})
            self._level(priority).order.restore(order, mine)
            if set(self._level(priority).order.keys()) != mine.keys():
                raise ValueError("the order and the records disagree")
        if sizes:
            raise ValueError("records without an order")
