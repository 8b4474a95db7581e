# SPDX-License-Identifier: Apache-2.0
"""Copies of a `KVCache`: a sequence as a `Snapshot` and back, and whole layers."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from kvlib.blocks import KVBlock, LayerKV
from kvlib.cache_columns import Columns, NewColumns
from kvlib.cache_layers import EvictableLayer
from kvlib.cache_rows import LayerRow
from kvlib.errors import (
    CodecError,
    ConfigError,
    CorruptDataError,
    IncompatibleDataError,
    ShapeError,
)
from kvlib.eviction.base import LayerState, Needs, Policy
from kvlib.model_spec import spec_for_model
from kvlib.registry import describe
from kvlib.snapshots import Snapshot, SnapshotStore
from kvlib.spec import KVSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvlib.cache_decisions import Forward
    from kvlib.cache_probe import Probes
    from kvlib.cache_signals import Signals

__all__ = ["Copyable"]

_PROMPT = "prompt"
_REST = "rest"
_VERSION = "version"


def _snapshot_of(
    spec: KVSpec,
    policy: Policy,
    layers: Sequence[Any],
    held: Sequence[LayerKV | None],
    columns: Columns,
    sequence: int,
) -> Snapshot:
    """One sequence; its tensors are copies.

    Args:
        spec: of the model.
        policy: that evicted it.
        layers: of the cache.
        held: `KVCache.layer_kv` of each evictable layer, None for the others.
        columns: of the cache.
        sequence: index in the batch.

    Raises:
        ConfigError: positions do not count the sequence's tokens.
    """
    seen = columns.seen[sequence]
    if not columns.plain[sequence]:
        raise ConfigError(
            f"positions of sequence {sequence} do not count its tokens from 0: pass position_ids "
            "that leave out the padding (generate() does)"
        )
    state = {
        _PROMPT: torch.tensor(columns.prompt[sequence]),
        _VERSION: torch.tensor(policy.version),
    }
    parts = []
    for index, (layer, kv) in enumerate(zip(layers, held, strict=True)):
        if kv is None:
            parts.append(_sliding_part(index, layer, columns, sequence))
            continue
        mine = layer.rows[sequence].state if layer.rows is not None else layer.states[sequence]
        state |= {f"{index:05}/entries/{k}": x.cpu() for k, x in mine.fork().entries.items()}
        state |= {f"{index:05}/values/{k}": x.cpu() for k, x in mine.fork().values.items()}
        if layer.rows is None:  # nothing was evicted
            kv = replace(kv, positions=range(seen))
        if kv.rest is not None:
            state[f"{index:05}/{_REST}"] = kv.rest.cpu().clone()
            kv = replace(kv, rest=None)
        parts.append(LayerRow(kv, LayerState()).fork().layer)
    block = KVBlock(spec=spec, start=0, num_tokens=seen, layers=tuple(parts))
    return Snapshot(method=describe(policy), block=block, state=state)


def _sliding_part(index: int, layer: Any, columns: Columns, sequence: int) -> LayerKV:
    keys, values = layer.keys[sequence], layer.values[sequence]
    if columns.valid is not None:
        tokens = columns.valid[sequence, columns.num - keys.shape[1] :]
        keys, values = keys[:, tokens], values[:, tokens]
    seen, n = columns.seen[sequence], keys.shape[1]
    positions = torch.arange(seen - n, seen, dtype=torch.int32, device=keys.device)
    return LayerKV(
        layer_idx=index,
        keys=keys.clone(),
        values=values.clone(),
        positions=positions.expand(keys.shape[0], -1).contiguous(),
    )


def _is_count(x: Tensor) -> bool:
    return x.numel() == 1 and x.dtype == torch.int64


def _restored_columns(snapshot: Snapshot, policy: Policy, device: torch.device) -> Columns:
    """The columns of a cache that begins with this snapshot.

    Raises:
        IncompatibleDataError: another version of the policy took it.
        CorruptDataError: the state lacks the length of the prompt.
    """
    version, prompt = (snapshot.state.get(name) for name in (_VERSION, _PROMPT))
    if version is None or not _is_count(version) or int(version) != policy.version:
        raise IncompatibleDataError(
            f"the snapshot is of version {version} of policy {policy.name!r}, this is version "
            f"{policy.version}: run the prompt again"
        )
    num = snapshot.block.num_tokens
    if prompt is None or not _is_count(prompt) or not 0 <= int(prompt) <= num:
        raise CorruptDataError(f"the snapshot's prompt is {prompt} of {num} tokens")
    columns = Columns()
    positions = torch.arange(num, dtype=torch.int32, device=device)[None]
    new = NewColumns(num, None, positions)
    columns.add(new, to_prompt=False)
    columns.advance(new)
    columns.prompt = [int(prompt)]
    return columns


def _fill_from_snapshot(layers: Sequence[Any], snapshot: Snapshot, device: torch.device) -> None:
    """Put a snapshot's keys, values and state into the empty layers of a cache."""
    for index, (layer, kv) in enumerate(zip(layers, snapshot.block.layers, strict=True)):
        mine = _to(kv, device)
        if not isinstance(layer, EvictableLayer):
            layer.lazy_initialization(mine.keys[None], mine.values[None])
            layer.keys, layer.values = mine.keys[None], mine.values[None]
            layer.cumulative_length = snapshot.block.num_tokens
            continue
        state = LayerState(
            _named(snapshot, f"{index:05}/entries/", device),
            _named(snapshot, f"{index:05}/values/", torch.device("cpu")),
        )
        for name, x in state.entries.items():
            if x.shape != mine.keys.shape[:-1]:
                raise CorruptDataError(
                    f"layer {index}: {name} has {tuple(x.shape)} entries, the layer "
                    f"{tuple(mine.keys.shape[:-1])}"
                )
        rest = snapshot.state.get(f"{index:05}/{_REST}")
        if rest is not None:
            try:
                mine = replace(mine, rest=rest.to(device, copy=True))
            except ShapeError as exc:
                raise CorruptDataError(str(exc)) from exc
        layer.is_initialized = True
        if isinstance(mine.positions, range):
            layer.keys, layer.values = mine.keys[None], mine.values[None]
            layer.states = [state]
        else:
            layer.rows = [LayerRow(mine, state)]


def _copy_into(mine: Sequence[Any], theirs: Sequence[Any]) -> None:
    """Fill the empty layers of a cache with what another one of the same model holds."""
    for layer, other in zip(mine, theirs, strict=True):
        if isinstance(layer, EvictableLayer):
            layer.copy_from(other)
            continue
        layer.record_past = other.record_past
        if other.is_initialized:  # a sliding layer replaces its tensors and never writes to them
            layer.lazy_initialization(other.keys, other.values)
            layer.keys, layer.values = other.keys, other.values
            layer.cumulative_length = other.cumulative_length


def _named(snapshot: Snapshot, prefix: str, device: torch.device) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): x.to(device, copy=True)
        for name, x in snapshot.state.items()
        if name.startswith(prefix)
    }


def _to(kv: LayerKV, device: torch.device) -> LayerKV:
    def moved(x: Tensor) -> Tensor:
        return x.to(device, copy=True)

    return replace(
        kv,
        keys=moved(kv.keys),
        values=moved(kv.values),
        positions=kv.positions if isinstance(kv.positions, range) else moved(kv.positions),
        log_weight=None if kv.log_weight is None else moved(kv.log_weight),
        channels=None if kv.channels is None else moved(kv.channels),
        rest=None if kv.rest is None else moved(kv.rest),
    )


class Copyable:
    """The part of a `KVCache` that makes copies of it."""

    if TYPE_CHECKING:  # what the cache has
        policy: Policy
        codec: str | None
        prefill_chunk_size: int | None
        model_id: str | None
        layers: list[Any]
        _model: "PreTrainedModel"
        _columns: Columns
        _signals: Signals
        _probes: Probes
        _needs: Needs
        _deferred: bool
        _open: Forward | None
        _in_prefill: bool
        _evictable: list[EvictableLayer]
        _sliding: list[Any]

        @property
        def method(self) -> str:
            """See `KVCache`."""

        def layer_kv(self, layer_idx: int, sequence: int = 0) -> LayerKV:
            """See `KVCache`."""

        def _check_usable(self) -> None: ...
        def _commit_open(self, removed: int) -> None: ...

    def fork(self) -> Self:
        """A cache that goes on from here by itself; `copy.deepcopy` does the same."""
        self._check_usable()
        self._commit_open(0)
        twin = self._twin(self.policy)
        twin._signals = self._signals.fork()
        for name in ("record_past", "_in_prefill", "_whole_chunk", "_failed"):
            setattr(twin, name, getattr(self, name))
        return twin

    def _twin(self, policy: Policy) -> Self:
        make: Any = type(self)
        twin: Self = make(
            self._model,
            policy,
            codec=self.codec,
            prefill_chunk_size=self.prefill_chunk_size,
            model_id=self.model_id,
            tokenizer=self._probes.resources.tokenizer,
            draft=self._probes.resources.draft,
            patch=self._probes.resources.patch,
            _restoring=policy is self.policy,  # it was checked when this cache was made
        )
        twin._probes.copy_prompt(self._probes)
        _copy_into(twin.layers, self.layers)
        twin._columns = self._columns.fork()
        return twin

    def decided(self, policy: Policy) -> Self:
        """A copy that goes on under another policy, once the prompt has been run.

        It is what a cache of that policy holds after the same pass, bit for bit, so many methods
        can be compared at the price of one prefill.

        Raises:
            ConfigError: no decision is left open (a later pass, a copy or a snapshot makes the
                cache's own), or the policy needs more than the policies in `defer` do.
        """
        self._check_usable()
        opened = self._open
        if not self._deferred or opened is None:
            raise ConfigError(
                "no decision about a prompt is open: make the cache with defer=[...], run the "
                "prompt in one pass, and take what is decided before anything else"
            )
        if Needs.union([self._needs, policy.needs]) != self._needs:
            raise ConfigError(
                f"{describe(policy)!r} needs signals that were not observed: give it in defer"
            )
        twin = self._twin(policy)
        twin._signals = self._signals.fork(policy.needs)
        twin._open = opened
        twin._commit_open(0)
        return twin

    def __deepcopy__(self, memo: Any) -> Self:
        return self.fork()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make the batch consist of these sequences (beam search)."""
        self._commit_open(0)
        order = beam_idx.tolist()
        for layer in self._evictable:
            layer.take_sequences(beam_idx)
        for layer in self._sliding:
            layer.reorder_cache(beam_idx)
        self._columns.take(order)
        self._signals.take(order)
        self._probes.take(order)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.reorder_cache(torch.arange(self._columns.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def to_snapshot(self, sequence: int | None = None) -> Snapshot:
        """A copy of one sequence: what is held of it, and what the policy remembers.

        Args:
            sequence: index in the batch; may be left out if there is only one.

        Raises:
            ConfigError: nothing is held yet, the prompt is not complete, a sequence has to be
                named, or the model cannot be identified (pass `model_id` to `KVCache`).
        """
        self._check_usable()
        self._commit_open(0)
        if self._columns.batch == 0 or self._in_prefill:
            raise ConfigError("a snapshot needs a complete prompt: see KVCache.end_prefill")
        if sequence is None:
            if self._columns.batch > 1:
                raise ConfigError(f"which of the {self._columns.batch} sequences? to_snapshot(0)")
            sequence = 0
        held = [
            self.layer_kv(index, sequence) if isinstance(layer, EvictableLayer) else None
            for index, layer in enumerate(self.layers)
        ]
        return _snapshot_of(self.spec, self.policy, self.layers, held, self._columns, sequence)

    @classmethod
    def from_snapshot(
        cls,
        model: "PreTrainedModel",
        snapshot: Snapshot,
        *,
        policy: Policy | None = None,
        codec: str | None = None,
        model_id: str | None = None,
    ) -> Self:
        """A cache of one sequence that goes on where the snapshot was taken.

        Args:
            model: the model it was taken from.
            snapshot: from `to_snapshot`.
            policy: the policy itself, where its name is not registered.
            codec: see `KVCache`.
            model_id: see `KVCache`.

        Raises:
            ConfigError: it was taken from another model, or under another policy.
            IncompatibleDataError: another version of the policy took it.
        """
        if policy is not None and describe(policy) != snapshot.method:
            raise ConfigError(
                f"the snapshot was taken under {snapshot.method!r}, this is {describe(policy)!r}"
            )
        make: Any = cls
        cache: Self = make(
            model, policy or snapshot.method, codec=codec, model_id=model_id, _restoring=True
        )
        if cache.spec != snapshot.block.spec:
            raise ConfigError(
                f"the snapshot is of model {snapshot.block.spec.model_id!r} "
                f"({snapshot.block.spec.dtype}), this one is {cache.spec.model_id!r} "
                f"({cache.spec.dtype})"
            )
        cache._columns = _restored_columns(snapshot, cache.policy, model.device)
        _fill_from_snapshot(cache.layers, snapshot, model.device)
        cache._in_prefill = False
        return cache

    def save(self, store: SnapshotStore, input_ids: Tensor, sequence: int | None = None) -> int:
        """Store a sequence, encoded with this cache's codec or else the store's.

        Args:
            store: a `KVStore`.
            input_ids: int [n] or [1, n]: all tokens the cache has seen of the sequence, without
                padding. After `generate` these are all but the last one it returned.
            sequence: see `to_snapshot`.

        Returns:
            Bytes of the record, 0 if there was no room for it.
        """
        snapshot = self.to_snapshot(sequence)
        return store.put_snapshot(input_ids.flatten(), snapshot, codec=self.codec) or 0

    @classmethod
    def load(
        cls,
        model: "PreTrainedModel",
        store: SnapshotStore,
        input_ids: Tensor,
        policy: str | Policy = "full",
        *,
        codec: str | None = None,
        model_id: str | None = None,
    ) -> Self | None:
        """The cache that `save` has stored for these tokens under this method; None for a miss."""
        make: Any = cls
        wanted: Self = make(model, policy, codec=codec, model_id=model_id, _restoring=True)
        tokens = input_ids.flatten()
        found = store.load_snapshot(wanted.spec, tokens, wanted.method, codec=wanted.codec)
        if found is None:
            return None
        try:
            return cls.from_snapshot(
                model, found, policy=wanted.policy, codec=wanted.codec, model_id=model_id
            )
        except CodecError:  # of another version of the policy, or malformed: run the prompt again
            return None

    @cached_property
    def spec(self) -> KVSpec:
        """The model's spec; a ConfigError if its weights cannot be identified (`model_id`)."""
        return spec_for_model(self._model, model_id=self.model_id)
