# SPDX-License-Identifier: Apache-2.0
"""What an operator writes into an entry of vLLM's `secondary_tiers`, checked. Imports no engine."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from kvlib.connectors.chunks import chunk_codec
from kvlib.errors import ConfigError
from kvlib.registry import suggest
from kvlib.store.opening import open_tiers
from kvlib.store.tier import Tier

__all__ = ["TierOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierOptions:
    """What stands beside `type` and `module_path` in an entry of `secondary_tiers`.

    Attributes:
        path: folder, shared by all engines of this machine; None keeps everything in memory.
        disk: capacity on disk.
        memory: capacity of encoded chunks in memory, beside vLLM's CPU tier; 0 for none.
        codec: ``exact`` or ``none``.
        salt: engines with different salts share nothing.
        model_id: identity of the weights; needed where vLLM was given the name of a hub repository,
            and where flags change what the model computes (quantization, overrides).
        ttl: for how long a chunk is served, such as ``12h``; None for ever.
        quota: most bytes that this salt's chunks hold in each medium.
        replacement: see `KVStore`.
        min_free: bytes of the file system that are left to others.
        tier: ``segment`` or ``file``; see `KVStore`.
        threads: that read, decode, encode and write.
        deadline: seconds that a request waits for a look-up, and again for its chunks, at most.
        on_reset: what a reset of vLLM's cache means: ``keep``, or ``forget`` all that was stored,
            for engines whose weights change while they run.
        enable_kv_events: tell vLLM's KV events of chunks stored.
        locality: ``LOCAL`` or ``REMOTE``: for requests that choose their tiers, and for events.
    """

    path: str | None = None
    disk: int | str = "64GiB"
    memory: int | str = 0
    codec: str = "exact"
    salt: str = ""
    model_id: str | None = None
    ttl: float | str | None = None
    quota: int | str | None = None
    replacement: str | None = None
    min_free: int | str = 0
    tier: str | None = None
    threads: int = 4
    deadline: float = 10.0
    on_reset: str = "keep"
    enable_kv_events: bool = False
    locality: str | None = None

    @classmethod
    def parse(cls, given: dict[str, Any]) -> Self:
        """From an engine's JSON.

        Raises:
            ConfigError: an unknown name, or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown option {name!r} of KvlibTier.{suggest(name, known)}")
        return cls(**given)

    def open_tiers(self) -> list[Tier]:
        """The tiers that these options ask for, the fastest first.

        Raises:
            ConfigError: see `KVStore`.
        """
        return open_tiers(
            None if self.path is None else Path(self.path).expanduser(),
            memory=self.memory,
            disk=self.disk,
            tier=self.tier,
            mac_key=None,
            replacement=self.replacement,
            watermarks=None,
            min_free=self.min_free,
        )

    def __post_init__(self) -> None:
        """Check what is not checked where it is used."""
        chunk_codec(self.codec)
        if self.on_reset not in ("keep", "forget"):
            raise ConfigError(f"on_reset={self.on_reset!r}: expected keep or forget")
        if self.locality not in (None, "LOCAL", "REMOTE"):
            raise ConfigError(f"locality={self.locality!r}: expected LOCAL or REMOTE")
        for name, least in (("threads", 1), ("deadline", 0.001)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
                raise ConfigError(f"{name}={value!r}: expected a number, at least {least}")
        for name in ("salt", "path", "model_id"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected text")
