# SPDX-License-Identifier: Apache-2.0
"""What a `KVStore` keeps its records to: time to live, quota, watermarks, replacement policies."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from kvlib.codecs.header import check_mac_key
from kvlib.errors import ConfigError, StoreClosedError
from kvlib.registry import suggest
from kvlib.store.replacement import Hint
from kvlib.store.sizes import parse_bytes, parse_seconds
from kvlib.store.terms import NO_TENANT, Terms, tenant_tag
from kvlib.store.work import Priority, WorkPool

if TYPE_CHECKING:
    from kvlib.store.tier import Tier

__all__ = ["Relief", "Rules", "check_watermarks", "replacement_for"]

_DEFAULTS = {"device": "arc", "memory": "arc", "disk": "lru"}


def replacement_for(tier: str, given: str | Mapping[str, str] | None) -> str:
    """The replacement policy of a tier (``device``, ``memory`` or ``disk``).

    Raises:
        ConfigError: `given` names another tier.
    """
    if given is None:
        return _DEFAULTS[tier]
    if isinstance(given, str):
        return given
    for name in given:
        if name not in _DEFAULTS:
            raise ConfigError(
                f"replacement={dict(given)!r}: there is no tier {name!r}."
                f"{suggest(str(name), _DEFAULTS)}"
            )
    return given.get(tier, _DEFAULTS[tier])


def check_watermarks(watermarks: tuple[float, float] | None) -> tuple[float, float] | None:
    """The marks (high, low), each a share of a tier's capacity.

    Raises:
        ConfigError: not two numbers, or not 0 < low < high <= 1.
    """
    if watermarks is None:
        return None
    try:
        high, low = (float(mark) for mark in watermarks)
    except (TypeError, ValueError):
        high = low = 0.0
    if not 0 < low < high <= 1:
        raise ConfigError(
            f"watermarks={watermarks!r}: expected two shares of the capacity, the high one first, "
            "such as (0.95, 0.85)"
        )
    return high, low


class Rules:
    """On what terms a store puts records.

    Args:
        salt: that makes its tenant.
        mac_key: see `tenant_tag`.
        ttl: of its records, where a put says nothing else; None for ever.
        quota: most bytes that the tenant's records may hold in each tier; None for no bound.

    Attributes:
        tenant: see `tenant_tag`.

    Raises:
        ConfigError: a bad time, size or key.
    """

    def __init__(
        self,
        *,
        salt: str | bytes = "",
        mac_key: bytes | None = None,
        ttl: float | str | None = None,
        quota: int | str | None = None,
    ) -> None:
        check_mac_key(mac_key)
        self.tenant = tenant_tag(salt, mac_key) if salt else NO_TENANT
        self._ttl = None if ttl is None else parse_seconds(ttl, "ttl")
        self._quota = None if quota is None else parse_bytes(quota, "quota")

    def terms(self, ttl: float | str | None = None, hint: Hint | None = None) -> Terms:
        """Of a record that is put now.

        Raises:
            ConfigError: a bad time.
        """
        seconds = self._ttl if ttl is None else parse_seconds(ttl, "ttl")
        return Terms(ttl=seconds, tenant=self.tenant, quota=self._quota, hint=hint)

    def enforce(self, tiers: Sequence["Tier"]) -> None:
        """Bring the tenant within its quota: it may have become smaller, or an index made anew."""
        if self._quota is not None:
            for tier in tiers:
                tier.trim(self._quota, self.tenant)

    def again(self, terms: Terms) -> Terms:
        """Of a record that a tier holds, to be put into another one; its time goes on."""
        return replace(terms, quota=self._quota if terms.tenant == self.tenant else None)


class Relief:
    """Makes room before it is needed, so that puts rarely wait for records to be dropped.

    Args:
        tiers: to be watched.
        pool: whose threads do it, when nothing more urgent is to be done.
        marks: above the high one, a tier is brought down to the low one; None for never.
    """

    def __init__(
        self, tiers: Sequence["Tier"], pool: WorkPool, marks: tuple[float, float] | None
    ) -> None:
        self._tiers = tiers
        self._pool = pool
        self._marks = marks
        self._lock = Lock()
        self._busy: set[int] = set()

    def look(self) -> None:
        """Something was put: begin to make room where it is short."""
        if self._marks is None:
            return
        high, low = self._marks
        with suppress(StoreClosedError):
            self._look(high, low)

    def _look(self, high: float, low: float) -> None:
        for at, tier in enumerate(self._tiers):
            stats = tier.stats()
            capacity = stats.capacity_bytes
            if capacity is None or stats.used_bytes <= high * capacity:
                continue
            with self._lock:
                if at in self._busy:
                    continue
                self._busy.add(at)
            call = partial(self._trim, at, int(low * capacity))
            self._pool.submit(call, priority=Priority.STORE)

    def _trim(self, at: int, most_bytes: int) -> None:
        try:
            self._tiers[at].trim(most_bytes)
        finally:
            with self._lock:
                self._busy.discard(at)
