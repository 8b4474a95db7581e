# SPDX-License-Identifier: Apache-2.0
"""The tiers and codecs of a `KVStore`, from what it was asked for."""

from collections.abc import Mapping
from pathlib import Path

from kvlib.codecs import Codec, build_codec
from kvlib.codecs.base import describe_codec
from kvlib.errors import ConfigError
from kvlib.store import blockio
from kvlib.store.files import FileStore
from kvlib.store.memory import MemoryTier
from kvlib.store.replacement import REPLACEMENTS
from kvlib.store.rules import check_watermarks, replacement_for
from kvlib.store.segments import SegmentStore
from kvlib.store.sizes import parse_bytes
from kvlib.store.tier import Tier

__all__ = ["choose_codecs", "open_tiers"]


def choose_codecs(
    codec: str | Codec, memory_codec: str | Codec | None, *, tiers: int, always: bool
) -> tuple[Codec, Codec]:
    """The codecs of the disk tier and of the memory tier.

    Args:
        codec: of the store.
        memory_codec: of the memory tier's records, where it is another one.
        tiers: how many the store has.
        always: whether everything that is put goes to disk at once.

    Raises:
        ConfigError: two codecs that do not go together, or not with the tiers.
    """
    whole = build_codec(codec) if isinstance(codec, str) else codec
    quick = build_codec(memory_codec) if isinstance(memory_codec, str) else memory_codec
    if quick is None or describe_codec(quick) == describe_codec(whole):
        return whole, whole
    if tiers < 2:
        raise ConfigError(
            "memory_codec needs a memory tier and a path; with one tier, codec says it all"
        )
    if not quick.lossless:
        raise ConfigError(
            f"memory_codec={describe_codec(quick)!r} loses something: only a lossless one saves "
            "what another form on disk has lost"
        )
    if not always:
        raise ConfigError(
            "admission='second-touch' needs one codec for both tiers: leave memory_codec out"
        )
    return whole, quick


def open_tiers(
    path: Path | None,
    *,
    memory: int | str,
    disk: int | str,
    tier: str | None,
    mac_key: bytes | None,
    replacement: str | Mapping[str, str] | None,
    watermarks: tuple[float, float] | None,
    min_free: int | str,
) -> list[Tier]:
    """The tiers of a store that hold records, the fastest first; see `KVStore`.

    Raises:
        ConfigError: a bad size or name, or see the tiers.
        UnknownPluginError: there is no such replacement policy.
    """
    memory_bytes, disk_bytes = parse_bytes(memory, "memory"), parse_bytes(disk, "disk")
    floor = parse_bytes(min_free, "min_free")
    marks = check_watermarks(watermarks)
    policies = {name: replacement_for(name, replacement) for name in ("memory", "disk")}
    for policy in policies.values():
        REPLACEMENTS.build(policy)  # a bad one is an error before anything is made
    if not memory_bytes and path is None:
        raise ConfigError("a store needs memory, a path, or both; got memory=0 and no path")
    tiers: list[Tier] = []
    if memory_bytes:
        tiers.append(MemoryTier(memory_bytes, mac_key=mac_key, replacement=policies["memory"]))
    if path is not None:
        tiers.append(_open_disk(path, tier, disk_bytes, mac_key, policies["disk"], floor, marks))
    return tiers


def _open_disk(
    path: Path,
    tier: str | None,
    capacity: int,
    mac_key: bytes | None,
    replacement: str,
    min_free: int,
    marks: tuple[float, float] | None,
) -> Tier:
    """The disk tier of a folder: the one that made it, unless another one is asked for."""
    if tier is None:
        tier = "file" if (path / "FORMAT").exists() or not blockio.supports() else "segment"
    if tier == "file":
        return FileStore(
            path, capacity=capacity, mac_key=mac_key, replacement=replacement, min_free=min_free
        )
    if tier != "segment":
        raise ConfigError(f"tier={tier!r}: expected 'segment' or 'file'")
    store = SegmentStore(
        path, capacity=capacity, mac_key=mac_key, replacement=replacement, min_free=min_free
    )
    high, low = (int(mark * capacity) for mark in marks or (0.0, 0.0))
    store.note_limits(high=high, low=low, min_free=min_free)
    return store
