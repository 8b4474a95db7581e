# SPDX-License-Identifier: Apache-2.0
"""What a profile of `kvlc` costs a model: the real codec on text that nothing was learned from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvlib.artefacts import Artefact, model_identity
from kvlib.blocks import KVBlock
from kvlib.codecs import decode_block, encode_block
from kvlib.codecs.kvlc import KvlcCodec
from kvlib.codecs.transforms import KIND, Profile, forget_profile, remember_profile
from kvlib.spec import KVSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CHECKED",
    "HELD_OUT",
    "LADDER",
    "TARGET",
    "Curve",
    "Trial",
    "continuation_logits",
    "prefill",
    "scaled",
]

LADDER = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
"""Steps that are tried, as multiples of a first guess."""
TARGET = 0.01
"""Nats a token that level 1 costs."""
HELD_OUT, CHECKED = 3, 2
"""Documents that the curve is measured on, and others that check it."""
_HALF_MAX = 60000.0  # float16


@torch.no_grad()
def prefill(model: "PreTrainedModel", ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [heads, T, D] of every layer."""
    cache = model.base_model(input_ids=ids.to(model.device), use_cache=True).past_key_values
    return [(x.keys[0].clone(), x.values[0].clone()) for x in cache.layers]


def continuation_logits(
    model: "PreTrainedModel", pairs: Sequence[tuple[Tensor, Tensor]], ids: Tensor
) -> Tensor:
    """Logits [n, vocabulary] of the tokens that follow a cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(pairs):
        cache.update(keys[None], values[None], index)
    logits: Tensor = model(input_ids=ids.to(model.device), past_key_values=cache).logits[0]
    return logits


@dataclass(frozen=True)
class Curve:
    """What steps cost, as float64 [n]; `unit` is the step of level 1."""

    unit: float
    levels: np.ndarray[Any, np.dtype[np.float64]]
    bits: np.ndarray[Any, np.dtype[np.float64]]
    kl: np.ndarray[Any, np.dtype[np.float64]]


def scaled(made: Mapping[str, Tensor], unit: float) -> dict[str, Tensor]:
    """The same transforms, counted in steps of `unit`."""
    out = {}
    for name, x in made.items():
        if name.endswith(".offset"):
            out[name] = x.float()
        elif name.endswith(".statistics"):
            out[name] = (x / unit).float()
        elif name.endswith(".decode"):
            # Beyond float16 lies only what no step of use would make.
            out[name] = (x * unit).clamp(-_HALF_MAX, _HALF_MAX).half()
        else:
            out[name] = (x * unit).float()
    return out


class _Document:
    """A cached text, and what the model says about what follows it."""

    def __init__(self, model: "PreTrainedModel", spec: KVSpec, ids: Tensor, tokens: int) -> None:
        pairs = prefill(model, ids[:, :tokens])
        self.block = KVBlock.dense(spec, [(k.cpu(), v.cpu()) for k, v in pairs])
        self.ids = ids[:, tokens:]
        with torch.no_grad():
            scores = continuation_logits(model, pairs, self.ids).double()
        self.scores = torch.log_softmax(scores, dim=-1)


class Trial:
    """Measures drafts of a profile.

    Args:
        model: that is calibrated.
        spec: its spec.
        samples: `HELD_OUT` documents for the curves and `CHECKED` others.
        tokens: of each that are cached.
        tick: called after each measurement.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        spec: KVSpec,
        samples: Sequence[Tensor],
        tokens: int,
        tick: Callable[[], None],
    ) -> None:
        self._model, self._spec, self._tick = model, spec, tick
        documents = [_Document(model, spec, ids, tokens) for ids in samples]
        self._held, self._others = documents[:HELD_OUT], documents[HELD_OUT:]
        x = spec.layers
        values = sum(y.num_kv_heads * (y.k_head_dim + y.v_head_dim) for y in x)
        following = samples[0].shape[1] - tokens
        # KL of unit errors in every coefficient, to second order, is values * tokens / following
        # / 2; a step's error has a variance of a twelfth of its square.
        self.guess = (24 * TARGET * following / (tokens * values)) ** 0.5

    def curve(
        self,
        preset: str,
        made: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, Any],
    ) -> Curve:
        """Bits and losses at a ladder of steps, and the step that costs `TARGET`.

        Args:
            preset: that `made` belongs to.
            made: its transforms, for a step of 1.
            tensors: of the artefact so far.
            settings: of the artefact.
        """
        steps = np.array(LADDER) * self.guess
        bits, losses = [], []
        for step in steps:
            draft = dict(tensors) | scaled(made, float(step))
            rate, loss = self._measure(preset, draft, settings, self._held)
            bits.append(rate)
            losses.append(max(loss, 1e-12))
            self._tick()
        kl = np.array(losses)
        unit = _crossing(steps, np.maximum.accumulate(kl * (1 + 1e-9 * np.arange(len(kl)))))
        return Curve(unit, steps / unit, np.array(bits), kl)

    def check(
        self, preset: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> float:
        """Nats a token that other documents lose at level 1."""
        loss = self._measure(preset, tensors, settings, self._others)[1]
        self._tick()
        return loss

    @torch.no_grad()
    def _measure(
        self,
        preset: str,
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        documents: Sequence[_Document],
    ) -> tuple[float, float]:
        """Bits a value and nats a token at level 1: means over documents."""
        texts = {k: str(v) for k, v in settings.items()}
        draft = Artefact(KIND, model_identity(self._spec), texts, tensors, "draft")
        remember_profile(Profile(draft))
        try:
            codec = KvlcCodec(preset=preset, level=1.0, digest="draft")
            bits, losses = [], []
            for one in documents:
                record = b"".join(encode_block(one.block, codec))
                layers = decode_block(record, self._spec).layers
                device = self._model.device
                pairs = [(x.keys.to(device), x.values.to(device)) for x in layers]
                scores = continuation_logits(self._model, pairs, one.ids).double()
                scores = torch.log_softmax(scores, dim=-1)
                losses.append(float((one.scores.exp() * (one.scores - scores)).sum(-1).mean()))
                values = sum(x.keys.numel() + x.values.numel() for x in layers)
                bits.append(8 * len(record) / values)
        finally:
            forget_profile("draft")
        return float(np.mean(bits)), float(np.mean(losses))


def _crossing(
    steps: np.ndarray[Any, np.dtype[np.float64]], losses: np.ndarray[Any, np.dtype[np.float64]]
) -> float:
    """The step that costs `TARGET`, by interpolation on logarithmic scales."""
    if losses[0] <= TARGET <= losses[-1]:
        return float(np.exp(np.interp(np.log(TARGET), np.log(losses), np.log(steps))))
    slope = np.log(losses[-1] / losses[0]) / np.log(steps[-1] / steps[0])
    edge = 0 if losses[0] > TARGET else -1  # beyond the ladder: go on as it went
    return float(steps[edge] * (TARGET / losses[edge]) ** (1 / max(slope, 1.0)))
