# SPDX-License-Identifier: Apache-2.0
"""On what terms a record is kept: for how long, and on whose account.

Times that pass between parts are relative (seconds from now); each tier stores them by its own
clock, as milliseconds since 1970.
"""

import math
import time
from dataclasses import dataclass, replace
from hashlib import blake2b

from kvlib.store.replacement.base import Hint

__all__ = ["NO_TENANT", "NO_TERMS", "TAG_BYTES", "Terms", "WallClock", "is_over", "tenant_tag"]

TAG_BYTES = 8
NO_TENANT = bytes(TAG_BYTES)
"""The tag of records that are on nobody's account, and of the empty salt."""

_LATEST = 253_402_300_800_000  # the year 10,000
_BOOT = getattr(time, "CLOCK_BOOTTIME", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a tier is told with a record.

    Attributes:
        ttl: seconds from now for which it may be served; None for ever.
        tenant: 8 bytes that say on whose account it is; see `tenant_tag`.
        quota: most bytes that this tenant's records may hold in a tier, None for no bound. It is
            kept by this put, and not a property of the record.
        hint: for the replacement policy.
    """

    ttl: float | None = None
    tenant: bytes = NO_TENANT
    quota: int | None = None
    hint: Hint | None = None

    @property
    def hint_for_policy(self) -> Hint | None:
        """The hint with the time to live in it: what is over goes first, whichever policy runs."""
        if self.ttl is None:
            return self.hint
        hint = self.hint or Hint()
        ttl = max(self.ttl, 0.0)
        return replace(hint, ttl=ttl if hint.ttl is None else min(ttl, hint.ttl))


NO_TERMS = Terms()


def tenant_tag(salt: str | bytes, mac_key: bytes | None = None) -> bytes:
    """The 8 bytes that stand for a tenant: a hash of its salt, keyed with the MAC key if any.

    The empty salt, which all share who give none, is `NO_TENANT`.
    """
    data = salt.encode() if isinstance(salt, str) else salt
    if not data:
        return NO_TENANT
    return blake2b(data, digest_size=TAG_BYTES, key=mac_key or b"", person=b"kvlib tenant").digest()


def is_over(expires: int, now: int) -> bool:
    """Whether a record's time is over; `expires` 0 is never."""
    return 0 < expires <= now


def _elapsed_ms() -> int:
    """Milliseconds that pass evenly, also while the machine sleeps where the system counts them."""
    if _BOOT is not None:
        return time.clock_gettime_ns(_BOOT) // 10**6
    return time.monotonic_ns() // 10**6


def _wall_ms() -> int:
    return time.time_ns() // 10**6


class WallClock:
    """The time of day in milliseconds since 1970, as a tier uses it: it never goes back.

    It is read once, and then goes on with the time that passes: a clock that is set while a tier is
    open makes no record expire, and revives none. One that was set back while nobody had the tier
    open stands behind what the tier remembers as the latest time it saw: that is taken instead.

    Args:
        floor: the latest time known of.
    """

    def __init__(self, floor: int = 0) -> None:
        self._base = _wall_ms() - _elapsed_ms()
        self.at_least(floor)

    def now(self) -> int:
        """Milliseconds since 1970."""
        return self._base + _elapsed_ms()

    def seconds(self) -> float:
        """The same in seconds, for replacement policies."""
        return (self._base + _elapsed_ms()) / 1000

    def at_least(self, floor: int) -> None:
        """It is this late already; what is no date is not believed."""
        if floor < _LATEST:
            self._base = max(self._base, floor - _elapsed_ms())

    def until(self, ttl: float | None) -> int:
        """When a time from now is over; 0 for never."""
        return 0 if ttl is None else self.now() + math.ceil(ttl * 1000)

    def left(self, expires: int) -> float | None:
        """Seconds that are left; None for ever, at most 0 if it is over."""
        return None if not expires else (expires - self.now()) / 1000
