# SPDX-License-Identifier: Apache-2.0
"""Passes over a complete prompt besides its own.

**Probes** (`Policy.probes`) leave nothing behind. A probe's tokens see everything that the cache
holds of one sequence, and each other, as if they followed it. Their keys and values live in the
running layer only. In each layer the policy is shown the probe's queries beside what is held.

A **rerun** (`Policy.rerun`) runs some of the prompt's tokens again as if they were the prompt, at
consecutive positions; its keys and values take the place of what is held. The last token keeps its
position, so that later ones follow. Where rotary frequencies are fixed only differences between
positions matter, and the pass is the same as one that begins at 0.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvlib.attention import attend
from kvlib.blocks import LayerKV
from kvlib.cache_columns import Columns
from kvlib.cache_layers import EvictableLayer, alone
from kvlib.cache_rows import LayerRow
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerState, LayerView, Policy, ProbeView, Resources
from kvlib.model_hooks import AttentionCall
from kvlib.spec import LayerKind, LayerSpec

__all__ = ["Probes", "check_rerun"]


def check_rerun(name: str, specs: Sequence[LayerSpec]) -> None:
    """Refuse a policy of this name, which runs tokens again, for a model with these layers.

    Raises:
        ConfigError: a layer has a sliding window, or frequencies that depend on a length.
    """
    for index, spec in enumerate(specs):
        if spec.kind is not LayerKind.FULL:
            raise ConfigError(
                f"{name} runs tokens of the prompt again through every layer, but layer {index} is "
                f"of kind {spec.kind}: it takes a model whose layers all have full attention"
            )
        if spec.rope is not None:
            try:
                spec.rope.inverse_frequencies()
            except ConfigError as exc:
                raise ConfigError(f"{name} runs tokens at other positions: {exc}") from exc


class Probes:
    """The extra passes of one cache.

    Args:
        cache: the `KVCache`.
        decoder: runs the text layers.
        resources: what policies may use.
    """

    def __init__(self, cache: Any, decoder: nn.Module, resources: Resources) -> None:
        self.resources = resources
        self._cache = weakref.ref(cache)  # no cycle: a dropped cache is freed at once
        self._decoder = decoder
        self._pieces: list[Tensor] = []
        self._now: _Running | None = None

    @property
    def running(self) -> bool:
        """Whether a probe runs now."""
        return self._now is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the prompt's token ids, which are kept until the probes have run."""
        return sum(x.numel() * x.element_size() for x in self._pieces)

    def take_prompt(self, arguments: dict[str, Any]) -> None:
        """Keep the tokens of a pass with these arguments of the decoder's forward.

        Raises:
            ConfigError: it was given embeddings.
        """
        ids = arguments.get("input_ids")
        if ids is None:
            raise ConfigError(
                "this policy runs extra passes made of the prompt's tokens: give input_ids, not "
                "inputs_embeds"
            )
        self._pieces.append(ids)

    def copy_prompt(self, other: "Probes") -> None:
        """Take the tokens that another cache has kept."""
        self._pieces = list(other._pieces)

    def clear(self) -> None:
        """The prompt is no longer needed."""
        self._pieces = []

    def truncate(self, num: int) -> None:
        """Only the first `num` columns of the prompt are left."""
        if self._pieces:
            self._pieces = [torch.cat(self._pieces, dim=1)[:, :num]]

    def take(self, order: Sequence[int]) -> None:
        """Make the batch consist of these sequences."""
        self._pieces = [piece[list(order)] for piece in self._pieces]

    def _prompt(self, columns: Columns, row: int) -> Tensor:
        """The token ids of one sequence, without padding."""
        ids = torch.cat([piece[row] for piece in self._pieces])
        if columns.valid is not None:
            ids = ids[columns.valid[row, : len(ids)].to(ids.device)]
        return ids

    def run(self, policy: Policy, views: Sequence[LayerView], row: int, columns: Columns) -> None:
        """Run every probe of one sequence.

        Args:
            policy: looks on.
            views: of the sequence, all evictable layers.
            row: index in the batch.
            columns: of the cache.
        """
        cache: Any = self._cache()
        ids = self._prompt(columns, row)
        by_layer = {view.layer.layer_idx: view for view in views}
        sliding = [layer for layer in cache.layers if not isinstance(layer, EvictableLayer)]
        start = columns.last_position(row) + 1
        try:
            for index, tokens in enumerate(policy.probes(ids, self.resources)):
                if not len(tokens):
                    continue
                self._now = _Running(policy, index, start, by_layer)
                places = torch.arange(start, start + len(tokens), device=ids.device)[None]
                with _borrowed(sliding, row):
                    self._decoder(
                        input_ids=tokens.to(ids.device)[None],
                        position_ids=places,
                        past_key_values=cache,
                        use_cache=True,
                    )
        finally:
            self._now = None

    def rerun(
        self, policy: Policy, views: Sequence[LayerView], row: int, columns: Columns
    ) -> list[LayerRow]:
        """Run what the policy chooses of one sequence again.

        Args:
            policy: chooses.
            views: of the sequence, all layers.
            row: index in the batch.
            columns: of the cache.

        Returns:
            What each layer holds then; empty to keep what is held.
        """
        ids = self._prompt(columns, row)
        chosen = policy.rerun(ids, views)
        if chosen is None:
            return []
        index = _checked(policy, chosen, len(ids)).to(ids.device)
        if len(index) == len(ids):
            return []
        stop = columns.last_position(row) + 1
        positions = torch.arange(stop - len(index), stop, dtype=torch.int32, device=ids.device)
        # Not our own kind of cache: the policy is to see nothing of this pass.
        again: Any = DynamicCache(config=self.resources.model.config)
        self._decoder(
            input_ids=ids[index][None],
            position_ids=positions[None].long(),
            past_key_values=again,
            use_cache=True,
        )
        rows = []
        for view, layer in zip(views, again.layers, strict=True):
            keys, values = alone(layer.keys)[0], alone(layer.values)[0]
            kv = LayerKV(
                layer_idx=view.layer.layer_idx,
                keys=keys,
                values=values,
                positions=positions.to(keys.device).repeat(len(keys), 1),
            )
            rows.append(LayerRow(kv, LayerState(values=view.state.values)))
        return rows

    def attend(
        self, layer: EvictableLayer, call: AttentionCall, hidden: Tensor | None = None
    ) -> Tensor:
        """The attention of a running probe's tokens in one layer, [1, n, Hq, Dv]."""
        assert layer.pending is not None and self._now is not None  # noqa: S101, PT018
        keys, values = (x[0] for x in layer.pending)
        layer.pending = None
        now, logits = self._now, call.logits()
        view = now.views[layer.layer_idx]
        now.policy.on_probe(
            ProbeView(
                layer=view.layer,
                state=view.state,
                index=now.number,
                query=call.query[0],
                keys=keys,
                logits=logits,
                num_prompt=view.num_prompt,
                hidden=None if hidden is None else hidden[0],
            )
        )
        row = LayerRow(view.layer, LayerState())
        positions = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
        row.append(keys, values, positions + now.start)
        return attend(call.query[0], row.layer, logits).output.transpose(0, 1)[None]


def _checked(policy: Policy, chosen: Tensor, num: int) -> Tensor:
    """Indices that a policy gave into `num` tokens."""
    if (
        chosen.dtype != torch.int64
        or chosen.dim() != 1
        or not 0 < len(chosen) <= num
        or not 0 <= int(chosen[0]) <= int(chosen[-1]) < num
        or bool((chosen[1:] <= chosen[:-1]).any())
    ):
        raise ConfigError(
            f"policy {policy.name!r} chose {tuple(chosen.shape)} {chosen.dtype} tokens of {num} to "
            "run again; it takes int64 [n] of at least one index, ascending"
        )
    return chosen


class _Running(NamedTuple):
    """One probe: whose, which, at what position it starts, over what."""

    policy: Policy
    number: int
    start: int
    views: dict[int, LayerView]


@contextmanager
def _borrowed(sliding: Sequence[Any], row: int) -> Iterator[None]:
    """Let sliding layers hold one sequence for a while; they replace their tensors."""
    before = [(x.keys, x.values, x.cumulative_length) for x in sliding]
    for layer in sliding:
        layer.keys, layer.values = layer.keys[row : row + 1], layer.values[row : row + 1]
    try:
        yield
    finally:
        for layer, (keys, values, length) in zip(sliding, before, strict=True):
            layer.keys, layer.values, layer.cumulative_length = keys, values, length
