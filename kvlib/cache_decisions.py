# SPDX-License-Identifier: Apache-2.0
"""How a policy's decisions are asked for and carried out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from kvlib.blocks import LayerKV
from kvlib.cache_columns import Columns, NewColumns
from kvlib.cache_layers import EvictableLayer
from kvlib.cache_probe import Probes, check_rerun
from kvlib.cache_rows import LayerRow, extend_entries
from kvlib.cache_signals import Signals
from kvlib.errors import ConfigError
from kvlib.eviction import build_policy
from kvlib.eviction.base import LayerView, Plans, Policy
from kvlib.registry import parse_method
from kvlib.spec import LayerSpec

__all__ = ["Decisions", "Forward", "read_policy"]


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass.

    Attributes:
        new: its columns.
        is_step: whether the prompt was complete before it.
        ends_prefill: whether the prompt is complete after it.
    """

    new: NewColumns
    is_step: bool
    ends_prefill: bool


def read_policy(policy: str | Policy, codec: str | None) -> tuple[Policy, str | None]:
    """The policy object and the codec's method string.

    Raises:
        ConfigError: no policy, two codecs, or parts that do not fit.
        UnknownPluginError: no such policy.
    """
    if not isinstance(policy, str):
        if isinstance(policy, type) or not hasattr(policy, "on_prefill_end"):
            raise ConfigError(
                "a policy is a method string such as 'snapkv:budget=0.25', or an object such as "
                f"SnapKV(budget=0.25); got {policy!r:.80}"
            )
        return policy, codec
    method = parse_method(policy)
    if method.codec is not None:
        if codec is not None:
            raise ConfigError(f"two codecs: {method.codec} in the method and codec={codec!r}")
        codec = str(method.codec)
    return build_policy(replace(method, codec=None)), codec


class Decisions:
    """One policy at work on one cache.

    Args:
        policy: decides.
        specs: the layers of the model.

    Raises:
        ConfigError: the policy runs tokens again, and the model does not allow it.
    """

    def __init__(self, policy: Policy, specs: Sequence[LayerSpec]) -> None:
        self.policy = policy
        needs = policy.needs
        self._whole_model, self._steps = needs.whole_model, needs.steps
        self._probe, self._prefill_plans = needs.probe, needs.prefill_plans
        self._rerun = needs.rerun
        if needs.rerun:
            check_rerun(policy.name, specs)
        self._ropes = [spec.rope for spec in specs]

    @torch.no_grad()
    def commit(
        self,
        layers: Sequence[EvictableLayer],
        forward: Forward,
        removed: Sequence[int],
        columns: Columns,
        signals: Signals,
        held: Callable[[int, int], LayerKV],
        probes: Probes,
    ) -> None:
        """Show layers to the policy and carry its plans out.

        Args:
            layers: all of them if the policy decides for the whole model, else any.
            forward: the pass that is done.
            removed: tokens of it that each sequence has lost again.
            columns: of the cache.
            signals: what was observed.
            held: gives a layer of a sequence.
            probes: runs the policy's extra passes over a sequence.
        """
        if forward.is_step and not self._steps and not any(map(_remembers, layers)):
            return
        chosen: list[list[Plans]] = [[] for _ in layers]
        again: list[list[LayerRow]] = []
        for row in range(columns.batch):
            views = [
                self._view(layer, row, forward, removed[row], columns, signals, held)
                for layer in layers
            ]
            if not forward.is_step:
                for view in views:
                    self.policy.on_prefill_chunk(view)
            together = [views] if self._whole_model else [[view] for view in views]
            plans: list[Plans] = [() for _ in views]
            piece = self._prefill_plans and not (forward.is_step or forward.ends_prefill)
            if self._probe and (piece or forward.ends_prefill):
                probes.run(self.policy, views, row, columns)
            if piece:
                plans = [plan for part in together for plan in self.policy.on_prefill_piece(part)]
            elif forward.ends_prefill and self._rerun:
                again.append(probes.rerun(self.policy, views, row, columns))
            elif forward.ends_prefill:
                plans = [plan for part in together for plan in self.policy.on_prefill_end(part)]
            elif forward.is_step and self._steps:
                plans = [plan for part in together for plan in self.policy.on_step(part)]
            for mine, plan in zip(chosen, plans, strict=True):
                mine.append(plan)
        if any(again):
            for layer in layers:
                _replace(layer, [rows[layer.place] if rows else None for rows in again], held)
        for layer, mine in zip(layers, chosen, strict=True):
            if any(mine):
                self._carry_out(layer, mine, held)

    def _view(
        self,
        layer: EvictableLayer,
        row: int,
        forward: Forward,
        removed: int,
        columns: Columns,
        signals: Signals,
        held: Callable[[int, int], LayerKV],
    ) -> LayerView:
        kv = held(layer.layer_idx, row)
        state = layer.rows[row].state if layer.rows is not None else layer.states[row]
        new = forward.new.tokens(row) - removed
        extend_entries(state, [n - new for n in kv.lengths], kv)
        in_prompt = not forward.is_step and not forward.ends_prefill
        seen = signals.collect(
            layer.layer_idx, row, kv, removed, is_step=forward.is_step, in_prompt=in_prompt
        )
        return LayerView(
            layer=kv,
            state=state,
            num_new=new,
            num_prompt=columns.prompt[row],
            num_seen=columns.seen[row],
            rope=self._ropes[layer.layer_idx],
            place=layer.place,
            num_layers=layer.num_layers,
            hidden=signals.hidden.take(layer.layer_idx, row, removed),
            **seen._asdict(),
        )

    def _carry_out(
        self,
        layer: EvictableLayer,
        plans: Sequence[Plans],
        held: Callable[[int, int], LayerKV],
    ) -> None:
        rows = layer.rows
        if rows is None:
            whole = [
                LayerRow(held(layer.layer_idx, row), state)
                for row, state in enumerate(layer.states)
            ]
            # Nothing may go on holding the batch's tensors: what no plan copies is copied here.
            rows = [row if mine else row.fork() for row, mine in zip(whole, plans, strict=True)]
        for index, mine in enumerate(plans):
            before = rows[index].layer
            if mine:
                rows[index].apply(mine, self._ropes[layer.layer_idx])
            if mine and layer.rows is None and rows[index].layer is before:
                rows[index] = rows[index].fork()  # a plan that changes nothing copies nothing
        layer.fall_apart(rows)


def _replace(
    layer: EvictableLayer,
    fresh: Sequence[LayerRow | None],
    held: Callable[[int, int], LayerKV],
) -> None:
    """Hold a layer's `fresh` rows; of a sequence that has none, what is held now."""

    def kept(index: int) -> LayerRow:
        if layer.rows is not None:
            return layer.rows[index]
        return LayerRow(held(layer.layer_idx, index), layer.states[index]).fork()

    layer.fall_apart([row or kept(index) for index, row in enumerate(fresh)])


def _remembers(layer: EvictableLayer) -> bool:
    """Whether there are numbers that have to follow the layer's rows."""
    states = layer.states if layer.rows is None else [row.state for row in layer.rows]
    return any(state.entries for state in states)
