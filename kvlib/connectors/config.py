# SPDX-License-Identifier: Apache-2.0
"""What an operator writes into an engine's configuration, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from kvlib.codecs import build_codec
from kvlib.errors import ConfigError
from kvlib.registry import suggest
from kvlib.store.sizes import parse_bytes
from kvlib.store.store import KVStore

__all__ = ["ConnectorConfig"]

_SAVES = ("all", "prompt", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorConfig:
    """The options of a connector; the names are those of `KVStore`.

    Attributes:
        path: folder of the store, shared by all engines of this machine; None keeps everything in
            memory.
        memory: capacity of the memory tier of each worker.
        disk: capacity of the disk tier.
        codec: method string.
        memory_codec: of the memory tier; None for ``raw`` where ``exact`` goes to disk: what is
            asked for again is copied, not decoded. ``exact`` holds a fifth to a third more tokens.
        salt: tenants with different salts share nothing.
        model_id: identity of the weights, where they come from neither a hub nor a folder.
        tier: see `KVStore`.
        admission: see `KVStore`.
        threads: see `KVStore`.
        save: what is stored: ``all``, the ``prompt`` only, or ``none`` (a store that is only read).
        min_tokens: prompts with less to gain are not looked up.
        staging: bytes of host memory for blocks on their way in, and as much for those on their way
            out.
        deadline: seconds that a request waits for its prefix at most.
        abstracts: see `KVStore`.
    """

    path: str | None = None
    memory: int | str = "4GiB"
    disk: int | str = "64GiB"
    codec: str = "exact"
    memory_codec: str | None = None
    salt: str = ""
    model_id: str | None = None
    tier: str | None = None
    admission: str = "always"
    threads: int | None = None
    save: str = "all"
    min_tokens: int = 64
    staging: int | str = "2GiB"
    deadline: float = 10.0
    abstracts: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """From an engine's JSON.

        Raises:
            ConfigError: an unknown name, or a value that cannot be.
        """
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"unknown option {name!r} of the connector.{suggest(name, known)}"
                )
        return cls(**given)

    def __post_init__(self) -> None:
        """Check what `KVStore` does not."""
        if self.save not in _SAVES:
            raise ConfigError(f"save={self.save!r}: expected {', '.join(_SAVES)}")
        for name in ("deadline", "min_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"{name}={value!r}: expected a number that is not negative")
        for name in ("path", "salt", "codec", "memory_codec", "abstracts"):
            value = getattr(self, name)
            may_lack = name in ("path", "memory_codec", "abstracts")
            if not isinstance(value, str) and not (may_lack and value is None):
                raise ConfigError(f"{name}={value!r}: expected text")
        for name in ("memory", "disk", "staging"):
            parse_bytes(getattr(self, name), name)
        for codec in (self.codec, self.memory_codec):
            if codec is not None:
                build_codec(codec)

    def _memory_codec(self) -> str | None:
        """That of `KVStore`."""
        both = self.path is not None and parse_bytes(self.memory, "memory") > 0
        if self.memory_codec is None and both and self.admission == "always":
            return "raw" if build_codec(self.codec).name == "exact" else None
        return self.memory_codec

    @property
    def staging_bytes(self) -> int:
        """`staging` as a number."""
        return parse_bytes(self.staging, "staging")

    def open_store(self, head_range: tuple[int, int] | None = None) -> KVStore:
        """The store.

        Args:
            head_range: see `KVStore`.

        Raises:
            ConfigError: see `KVStore`.
        """
        return KVStore(
            self.path,
            memory=self.memory,
            disk=self.disk,
            codec=self.codec,
            memory_codec=self._memory_codec(),
            salt=self.salt,
            threads=self.threads,
            tier=self.tier,
            admission=self.admission,
            staging=self.staging,
            head_range=head_range,
            abstracts=self.abstracts,
        )
