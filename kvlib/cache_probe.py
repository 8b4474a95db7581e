# SPDX-License-Identifier: Apache-2.0
"""Extra passes over a complete prompt that leave nothing behind (`Policy.probes`).

A probe's tokens see everything that the cache holds of one sequence, and each other, as if they
followed it. Their keys and values live in the running layer only. In each layer the policy is shown
the probe's queries beside what is held.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvlib.attention import attend
from kvlib.cache_layers import EvictableLayer
from kvlib.cache_rows import LayerRow
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerState, LayerView, Policy, ProbeView, Resources
from kvlib.model_hooks import AttentionCall

__all__ = ["Probes"]


class Probes:
    """The extra passes of one cache.

    Args:
        decoder: runs the text layers.
        resources: what policies may use.

    Attributes:
        layers: of the cache; set before anything runs.
        running: whether one runs now.
    """

    def __init__(self, decoder: nn.Module, resources: Resources) -> None:
        self.resources = resources
        self.layers: Sequence[Any] = ()
        self._decoder = decoder
        self._pieces: list[Tensor] = []
        self._now: _Running | None = None

    @property
    def running(self) -> bool:
        """Whether one runs now."""
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

    def run(self, cache: Any, policy: Policy, views: Sequence[LayerView], row: int) -> None:
        """Run every probe of one sequence.

        Args:
            cache: that the decoder is given.
            policy: looks on.
            views: of the sequence, all evictable layers.
            row: index in the batch.
        """
        columns = cache.columns
        ids = torch.cat([piece[row] for piece in self._pieces])[: columns.num]
        if columns.valid is not None:
            ids = ids[columns.valid[row, : len(ids)].to(ids.device)]
        by_layer = {view.layer.layer_idx: view for view in views}
        sliding = [layer for layer in self.layers if not isinstance(layer, EvictableLayer)]
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

    def attend(self, layer: EvictableLayer, call: AttentionCall) -> Tensor:
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
            )
        )
        row = LayerRow(view.layer, LayerState())
        positions = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
        row.append(keys, values, positions + now.start)
        return attend(call.query[0], row.layer, logits).output.transpose(0, 1)[None]


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
