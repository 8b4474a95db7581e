# SPDX-License-Identifier: Apache-2.0
"""The part of a `KVStore` that gives what it loads record by record."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvlib.keys import BlockKey
from kvlib.spec import KVSpec
from kvlib.store.directory import Directory, Found, Identity
from kvlib.store.loads import Load, Reader
from kvlib.store.reports import Loaded
from kvlib.store.work import Priority

if TYPE_CHECKING:
    from kvlib.store.leases import Leases
    from kvlib.store.reform import Reform
    from kvlib.store.replacement import Hint

__all__ = ["ByRecord"]


class ByRecord:
    """Loads whose records stay apart."""

    if TYPE_CHECKING:  # what the store has
        _background_reader: Reader
        _directory: Directory
        _leases: Leases
        _reader: Reader
        _reform: Reform | None

        def _begin(self, spec: KVSpec) -> None: ...

        def _identities(self, spec: KVSpec, accept: Sequence[str] | None) -> list[Identity]: ...

        def _load(
            self,
            spec: KVSpec,
            keys: Sequence[BlockKey],
            accept: Sequence[str] | None,
            layers: int | None,
            priority: float,
            deadline: float | None,
            start: int = 0,
            reader: Reader | None = None,
            hint: Hint | None = None,
            *,
            apart: bool = False,
        ) -> Load: ...

    def borrow(
        self,
        spec: KVSpec,
        keys: Sequence[BlockKey],
        *,
        accept: Sequence[str] | None = None,
        deadline: float | None = None,
        start: int = 0,
    ) -> Loaded:
        """As `KVStore.load`, without the copy into one block: for those who copy it themselves.

        Args:
            spec: see `KVStore.load`.
            keys: see `KVStore.load`.
            accept: see `KVStore.match`.
            deadline: see `KVStore.load`.
            start: see `KVStore.load`.

        Returns:
            `Loaded.blocks`, on the CPU. Their tensors must not be written to: what the memory tier
            holds uncoded (`memory_codec="raw"`) is given where it lies. It stays as it is for as
            long as it is referred to, also when the tier lets go of it.

        Raises:
            ConfigError: the model has recurrent layers.
        """
        reader = self._reader if deadline is None else self._background_reader
        load = self._load(
            spec,
            keys,
            accept,
            None,
            Priority.DEMAND,
            deadline,
            start,
            replace(reader, device=None, reform=self._reform),
            apart=True,
        )
        return load.result()

    def load_pieces(
        self, spec: KVSpec, keys: Sequence[BlockKey], *, accept: Sequence[str] | None = None
    ) -> Iterator[Loaded]:
        """Restore the longest stored run of leading blocks record by record.

        Holds two records at a time: the one that it gave last, and the next.

        Args:
            spec: see `load`.
            keys: see `load`.
            accept: see `match`.

        Returns:
            The blocks of one record after another; `Loaded.block` begins where the last one ended.
        """
        self._begin(spec)
        self._leases.expire()
        run = self._directory.loadable_run(self._identities(spec, accept), keys)
        return _pieces(self._reader, spec, run, len(keys))


def _pieces(reader: Reader, spec: KVSpec, run: Sequence[Found], asked: int) -> Iterator[Loaded]:
    """Load a run record by record, the next one while the caller has the last."""
    given: list[Found] = []
    quiet = replace(reader, finished=lambda *_: None)  # counted and touched as one load, at the end

    def begin(found: Found) -> Load:
        return Load(
            quiet,
            spec,
            lambda: [found],
            found.count,
            layers=None,
            priority=Priority.DEMAND,
            deadline=None,
        )

    coming = begin(run[0]) if run else None
    try:
        for i, found in enumerate(run):
            load, coming = coming, begin(run[i + 1]) if i + 1 < len(run) else None
            loaded = Loaded() if load is None else load.result()
            if not loaded.num_blocks:
                break
            given.append(found)
            yield loaded
    finally:
        if coming is not None:
            coming.cancel()
        reader.finished(given, sum(found.count for found in given), asked)
