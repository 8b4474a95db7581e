# SPDX-License-Identifier: Apache-2.0
"""`KvlibHiCacheStorage`: kvlib's tiers behind SGLang's hierarchical cache (HiCache).

SGLang copies pages between the device and host pools of its own, and knows hybrid models, tensor
parallelism and draft models; this is the storage behind those pools. A page is bytes in SGLang's
own order under SGLang's own key: only an engine of the same configuration can read it. What that
key lacks (model, dtype, page layout, ranks) is the identity of a `ChunkStore`.

SGLang calls from threads of its own, a batch of pages at a time. A page that cannot be had is a
page that was never stored: SGLang's hit is shorter.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics
from torch import Tensor

from kvlib.connectors.chunks import ChunkStore, Row
from kvlib.connectors.sglang_config import check_version
from kvlib.connectors.tier_options import TierOptions
from kvlib.errors import ConfigError, ConnectorError
from kvlib.model_spec import model_id_text, origin_identity
from kvlib.store.rules import Rules
from kvlib.threads import one_torch_thread

__all__ = ["KvlibHiCacheStorage"]

_LOG = logging.getLogger(__name__)
_OPTIONS = "kvlib"
_NOT_HERE = ("locality", "enable_kv_events", "on_reset")  # of vLLM's tier
_MAX_SAMPLES = 4096


def _options(extra_config: Mapping[str, Any]) -> TierOptions:
    """What stands under ``kvlib`` in SGLang's extra configuration.

    Raises:
        ConfigError: an unknown name, or a value that cannot be.
    """
    given = extra_config.get(_OPTIONS, {})
    if not isinstance(given, dict):
        raise ConfigError(f'"{_OPTIONS}": {given!r}: expected a JSON object of options')
    for name in _NOT_HERE:
        if name in given:
            known = [field.name for field in fields(TierOptions) if field.name not in _NOT_HERE]
            raise ConfigError(f"unknown option {name!r}; known: {', '.join(known)}")
    return TierOptions.parse(given)


def _model_identity(options: TierOptions, model_name: str | None) -> str:
    """What identifies the weights: the option, else the folder or hub repository of the engine.

    Raises:
        ConfigError: neither tells.
    """
    if options.model_id:
        return model_id_text(options.model_id)
    name = str(model_name or "")
    if not Path(name).expanduser().is_dir():
        from sglang.srt.runtime_context import get_model

        name = str(getattr(get_model(), "model_path", None) or name)
    return origin_identity(name, None, f"the model {name!r}")


class _Pool:
    """A host pool and the store of its pages."""

    def __init__(self, pool: Any, chunks: ChunkStore, nbytes: int) -> None:
        self.pool = pool
        self.chunks = chunks
        self.nbytes = nbytes  # of a page
        self.page_tokens = int(pool.logical_page_size)
        self._dtype: torch.dtype = pool.dtype

    def put(self, name: bytes, slot: int) -> bool:
        """Store the page that begins at a slot."""
        page = self.pool.get_data_page(slot, flat=True)
        return self.chunks.put(name, _bytes_of(page))

    def get(self, name: bytes, slot: int, deadline: float) -> bool:
        """Fill the page that begins at a slot; it is touched only by what was verified."""
        row = self.fetch(name, deadline)
        if row is None:
            return False
        self.pool.set_from_flat_data_page(slot, row.view(self._dtype))
        return True

    def fetch(self, name: bytes, deadline: float) -> Tensor | None:
        """A page's bytes in order, uint8 [nbytes]; None for a miss."""
        record = self.chunks.read(name, deadline)
        if record is None:
            return None
        row = np.empty(self.nbytes, np.uint8)
        return torch.from_numpy(row) if self.chunks.unpack(name, record, row) else None


def _bytes_of(page: Tensor) -> Row:
    data: Row = page.contiguous().view(torch.uint8).flatten().numpy()
    return data


def _page_bytes(pool: Any) -> int:
    """Bytes of a page of a host pool, in the flat order of SGLang.

    Raises:
        ConnectorError: a pool that gives no flat pages.
    """
    try:
        page = pool.get_data_page(0, flat=True)
    except (NotImplementedError, ValueError) as exc:
        raise ConnectorError(
            f"SGLang's {type(pool).__name__} with layout {pool.layout!r} gives no whole pages: "
            f"{exc}. Use --hicache-mem-layout page_first, or another storage back end"
        ) from exc
    return int(page.numel() * page.element_size())


class KvlibHiCacheStorage(HiCacheStorage):  # type: ignore[misc]
    """See the module. Options stand under ``kvlib`` in ``--hicache-storage-backend-extra-config``.

    They are those of `TierOptions`, without what only vLLM has; ``deadline`` is how long a batch of
    pages may take to be read.

    Args:
        storage_config: SGLang's.
        kwargs: SGLang's; unused.

    Raises:
        EngineVersionError: another SGLang than was tested.
        ConfigError: an option that cannot be, or weights that cannot be identified.
    """

    def __init__(self, storage_config: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        check_version()
        self._config = storage_config
        self.options = chosen = _options(storage_config.extra_config or {})
        self._model = _model_identity(chosen, storage_config.model_name)
        self._rules = Rules(salt=chosen.salt, ttl=chosen.ttl, quota=chosen.quota)
        self._tiers = chosen.open_tiers()
        self._pools: dict[str, _Pool] = {}
        self._threads = ThreadPoolExecutor(int(chosen.threads), "kvlib-hicache", one_torch_thread)
        self._lock = threading.Lock()
        self._metrics = StorageMetrics()
        self.failures = 0
        self._closed = False

    # -- pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """See SGLang: the pool of keys and values.

        Raises:
            ConnectorError: see `register_mem_host_pool_v2`.
        """
        super().register_mem_pool_host(mem_pool_host)
        self.register_mem_host_pool_v2(mem_pool_host, PoolName.KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """See SGLang: one of several pools.

        Raises:
            ConnectorError: it gives no whole pages.
        """
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name, nbytes = str(host_pool_name), _page_bytes(host_pool)
        chunks = ChunkStore(
            self._tiers,
            identity=self._identity(name, host_pool, nbytes),
            dtype=str(host_pool.dtype).removeprefix("torch."),
            nbytes=nbytes,
            codec=self.options.codec,
            rules=self._rules,
        )
        self._pools[name] = _Pool(host_pool, chunks, nbytes)

    def _identity(self, name: str, pool: Any, nbytes: int) -> str:
        """All that makes the bytes of two engines differ for the same key.

        Keys and values of MLA are the same on all tensor-parallel ranks, which then share them; the
        states of Mamba layers never are.
        """
        config = self._config
        replicated = config.is_mla_model and name != PoolName.MAMBA
        ranks = {
            "tp": None if replicated else (config.tp_rank, config.tp_size),
            "pp": (config.pp_rank, config.pp_size),
            "cp": (config.attn_cp_rank, config.attn_cp_size),
            "dcp": (config.dcp_rank, config.dcp_size),
        }
        return json.dumps(
            {
                "engine": "sglang 0.5",
                "model": self._model,
                "pool": name,
                "kind": type(pool).__name__,
                "layout": pool.layout,
                "format": pool.storage_format_tag,
                "dtype": str(pool.dtype),
                "page": [int(pool.logical_page_size), nbytes],
                "shape": [getattr(pool, x, None) for x in ("layer_num", "head_num", "head_dim")],
                "layers": [pool.start_layer, pool.end_layer],
                "split": bool(config.should_split_heads),
                "salt": self.options.salt,
                **ranks,
            },
            sort_keys=True,
        )

    # -- batches of pages

    def _each(self, move: Callable[[int], bool], count: int) -> list[bool]:
        """Move some pages at a time; what fails is a page that was not there."""

        def moved(i: int) -> bool:
            with self._tolerant():
                return move(i)
            return False

        with self._tolerant():
            return list(self._threads.map(moved, range(count)))
        return [False] * count

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """The one place where errors end: as a miss, counted and logged."""
        try:
            yield
        except Exception:  # noqa: BLE001
            self.failures += 1
            if not self._closed:
                _LOG.exception("kvlib: pages of SGLang's could not be moved or looked up")

    def _move(
        self, pool_name: str, keys: Sequence[str], host_indices: Tensor | None, *, out: bool
    ) -> list[bool]:
        pool = self._pools.get(str(pool_name))
        expected = 0 if pool is None else len(keys) * pool.page_tokens
        given = -1 if host_indices is None else host_indices.numel()
        if pool is None or host_indices is None or given != expected:
            self.failures += 1
            _LOG.error("kvlib: %d slots of pool %s given, expected %d", given, pool_name, expected)
            return [False] * len(keys)
        slots = host_indices[:: pool.page_tokens].tolist()
        begun = time.perf_counter()
        if out:
            put = pool.put
            # From last to first: what is dropped for want of room is the end of a prompt.
            order = range(len(keys) - 1, -1, -1)
            done = self._each(lambda i: put(keys[order[i]].encode(), slots[order[i]]), len(keys))
            done.reverse()
        else:
            get, until = pool.get, time.monotonic() + self.options.deadline
            done = self._each(lambda i: get(keys[i].encode(), slots[i], until), len(keys))
            with self._tolerant():
                pool.chunks.touch([k.encode() for k, fine in zip(keys, done, strict=True) if fine])
        self._measure(sum(done), pool.nbytes, time.perf_counter() - begun, out=out)
        return done

    def batch_get_v1(
        self, keys: list[str], host_indices: Tensor, extra_info: Any = None
    ) -> list[bool]:
        """See SGLang: from the storage into pages of the host pool."""
        return self._move(PoolName.KV, keys, host_indices, out=False)

    def batch_set_v1(
        self, keys: list[str], host_indices: Tensor, extra_info: Any = None
    ) -> list[bool]:
        """See SGLang: from pages of the host pool into the storage."""
        return self._move(PoolName.KV, keys, host_indices, out=True)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """See SGLang: `batch_get_v1` for several pools."""
        return {
            t.name: self._move(t.name, t.keys or [], t.host_indices, out=False) for t in transfers
        }

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """See SGLang: `batch_set_v1` for several pools."""
        return {
            t.name: self._move(t.name, t.keys or [], t.host_indices, out=True) for t in transfers
        }

    # -- what there is

    def _present(self, pool_name: str, keys: Sequence[str]) -> list[bool]:
        pool = self._pools.get(str(pool_name))
        if pool is not None:
            with self._tolerant():
                return pool.chunks.contains([key.encode() for key in keys])
        return [False] * len(keys)

    def exists(self, key: str) -> bool:
        """See SGLang."""
        return self._present(PoolName.KV, [key])[0]

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """See SGLang: leading pages that seem to be there."""
        return _leading(self._present(PoolName.KV, keys))

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None
    ) -> Any:
        """See SGLang: prefixes for which every pool has what its policy asks for."""
        pages = _leading(self._present(PoolName.KV, keys))
        hits = {PoolName.KV: pages} if pages else {}
        lengths = set(range(1, pages + 1))
        for transfer in pool_transfers or ():
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # of another form of the pages; it never decides about a hit
            here = self._present(transfer.name, keys[:pages])
            window = len(here)
            if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
                window = max(1, len(transfer.keys or ()))
            fine = {n for n in range(1, pages + 1) if all(here[max(0, n - window) : n])}
            if fine:
                hits[transfer.name] = max(fine)
            lengths &= fine
        return PoolTransferResult(max(lengths, default=0), hits, sorted(lengths))

    # -- pages by value, as SGLang moves them without ``interface_v1``

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Tensor | None:
        """See SGLang: fill a flat page."""
        pool = self._pools.get(PoolName.KV.value)
        if pool is None or target_location is None or _nbytes(target_location) != pool.nbytes:
            return None
        row: list[Tensor | None] = [None]
        until = time.monotonic() + self.options.deadline

        def fetch(_: int) -> bool:
            row[0] = pool.fetch(key.encode(), until)
            return row[0] is not None

        if not self._each(fetch, 1)[0] or row[0] is None:
            return None
        target_location.view(-1).copy_(row[0].view(target_location.dtype))
        filled: Tensor = target_location
        return filled

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Tensor | None]:
        """See SGLang."""
        targets = target_locations or [None] * len(keys)
        return [self.get(key, target) for key, target in zip(keys, targets, strict=True)]

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """See SGLang: store a flat page."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """See SGLang; whether all are held now."""
        pool = self._pools.get(PoolName.KV.value)
        if pool is None or any(value is None or _nbytes(value) != pool.nbytes for value in values):
            return False
        chunks = pool.chunks
        return all(
            self._each(lambda i: chunks.put(keys[i].encode(), _bytes_of(values[i])), len(keys))
        )

    # -- the rest

    def _measure(self, pages: int, nbytes: int, seconds: float, *, out: bool) -> None:
        if not self._config.enable_storage_metrics or not pages:
            return
        speed = pages * nbytes / max(seconds, 1e-9) / 1e9
        with self._lock:
            metrics = self._metrics
            counts = metrics.backup_pgs if out else metrics.prefetch_pgs
            speeds = metrics.backup_bandwidth if out else metrics.prefetch_bandwidth
            if len(counts) < _MAX_SAMPLES:
                counts.append(pages)
                speeds.append(speed)

    def get_stats(self) -> Any:
        """See SGLang: pages and GB/s of the batches since the last call."""
        with self._lock:
            metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    def stats(self) -> dict[str, Any]:
        """Of every tier, by name; see `kvlib.store.tier.TierStats`."""
        return {tier.name: tier.stats() for tier in self._tiers}

    @property
    def corrupt(self) -> int:
        """Pages that were read whole and could not be decoded."""
        return sum(pool.chunks.corrupt for pool in self._pools.values())

    def clear(self) -> bool:
        """See SGLang: drop this configuration's pages; those of other engines stay."""
        mine = {pool.chunks.key(b"").storage for pool in self._pools.values()}
        for tier in self._tiers:
            for key in [key for key in tier.keys() if key.storage in mine]:
                tier.delete(key)
        return True

    def close(self) -> None:
        """Finish what is under way and close the tiers; closing twice is allowed."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True)
        for tier in self._tiers:
            tier.close()


def _leading(present: Sequence[bool]) -> int:
    return next((i for i, here in enumerate(present) if not here), len(present))


def _nbytes(x: Any) -> int:
    return int(x.numel() * x.element_size())
