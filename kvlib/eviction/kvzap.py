# SPDX-License-Identifier: Apache-2.0
"""KVzap: guess from its own hidden state what an entry will be worth (arXiv 2601.07891).

KVzip reads the whole context twice to learn which entries are needed to repeat it. Here a small
network has learnt that beforehand, once for each model (`kvlib calibrate kvzap`). For every token
and layer it maps what goes into the attention module (d_model numbers, after the layer's input
norm) to one number for each KV head: the logarithm of the entry's KVzip+ score. That score is the
most that any token of a repetition gets out of the entry,

    max over repetition tokens j and query heads h of the group of  a[h, j, i] |W_O[h] v_i| / |h_j|,

attention times the length of what the entry's value adds to the residual stream, relative to the
length of token j's own hidden state (the normed one, as in kvpress). The network is a linear map,
or has one hidden layer of d_model / 8 with GELU.

An entry's score never changes, needs no attention weights and no later token. So there are two ways
to use it:

- With a **budget** the prompt is evicted once, at its end, and the heads of all layers compete
  (`joint`), as with KVzip. Later tokens are kept.
- With **tau** an entry whose score is below it goes once it has left the window (`threshold`): of
  the prompt at its end, later ones in the step in which they leave. How much stays depends on the
  text; the budget is ignored. That is the paper's way.

The last `window` tokens always stay: without them, the paper's scores collapse.

NVIDIA kvpress 0.5.5 downloads networks that its authors trained on 1.2 million pairs; here nothing
is downloaded. It masks entries; here they are freed. Its first tokens have no protection of their
own.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from kvlib.artefacts import Artefact, load_artefact
from kvlib.blocks import LayerKV
from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Resources
from kvlib.eviction.joint import Joint
from kvlib.eviction.scored import Allocator, Protect, ScoredPolicy
from kvlib.eviction.select import by_row, check_budget, keeps_all
from kvlib.eviction.threshold import Threshold

__all__ = ["KVzap", "Network", "predict"]

Network = tuple[tuple[Tensor, Tensor], ...]
"""Weight [out, in] and bias [out] of each map, float32."""


@dataclass(frozen=True, slots=True)
class KVzap(ScoredPolicy):
    """Predicted KVzip+ scores.

    Args:
        profile: file from ``kvlib calibrate kvzap`` with the model's networks; required.
        budget: entries per head after the prompt, on average: a fraction of it or a number of
            tokens. Ignored with tau, but the fraction 1 keeps everything.
        tau: the lowest predicted log score that stays; None to go by the budget. The authors' are
            from -3 to -9, by model; `kvlib calibrate` says what some would remove.
        window: last tokens that always stay.
        sinks: first tokens that always stay; the paper has none.
        digest: of the profile; filled in if not given, refused if it is another file's.
    """

    profile: str | None = None
    budget: float | int = 0.5
    tau: float | None = None
    window: int = 128
    sinks: int = 4
    digest: str | None = None
    name: ClassVar[str] = "kvzap"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "What KVzip would find out in a second pass can be guessed from each token's hidden "
            "state. A small network for each layer, trained once for a model, predicts the "
            "logarithm of every entry's score. Entries below a threshold go when they leave the "
            "window, or the lowest of the prompt until a budget is met."
        ),
        when="with a budget once, at the end of the prompt; with tau in every step too",
        cost=(
            "one small matrix product a layer; 4 bytes an entry and KV head. With a budget the "
            "hidden states of all layers are held until the end of a pass: `prefill_chunk_size` "
            "bounds that"
        ),
        paper="KVzap, arXiv 2601.07891; NVIDIA kvpress 0.5.5",
        differs=(
            "Networks are trained here, on much less text. Entries that lose are freed (kvpress "
            "masks them), four first tokens stay, and a budget is offered besides the threshold."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters and read the profile."""
        check_budget(self.name, self.budget)
        if self.window < 0 or self.sinks < 0:
            raise ConfigError(
                f"kvzap: window and sinks must be 0 or more, got {self.window} and {self.sinks}"
            )
        if self.tau is not None and not math.isfinite(self.tau):
            raise ConfigError(f"kvzap: tau is a finite number, got {self.tau}")
        if self.profile is None:
            if self.digest is not None:
                raise ConfigError("kvzap: digest is that of a profile: give profile=FILE too")
            return
        artefact = load_artefact(self.profile, self.name, self.digest or "")
        if "layers" not in artefact.tensors or any(
            not _maps(artefact, index) for index in artefact.tensors["layers"].tolist()
        ):
            raise ConfigError(
                f"kvzap: profile {self.profile!r} lacks networks: make it again with kvlib "
                "calibrate kvzap"
            )
        object.__setattr__(self, "digest", artefact.digest)

    @property
    def needs(self) -> Needs:
        """Hidden states; in steps only if they can be evicted."""
        wanted, anew = not keeps_all(self.budget), self.tau is not None
        return Needs(hidden=wanted, whole_model=not anew, steps=wanted and anew)

    def check(self, resources: Resources) -> None:
        """There is a profile, and it is this model's."""
        if self.profile is None:
            raise ConfigError(
                "kvzap needs networks that were trained for the model: run kvlib calibrate kvzap "
                "--model M -o FILE and pass profile=FILE"
            )
        if resources.identity is not None:
            artefact = load_artefact(self.profile, self.name, self.digest or "")
            artefact.check_model(resources.identity())

    def protected(self, budget: int) -> Protect:
        """Sinks and window."""
        return Protect(sinks=self.sinks, window=self.window)

    @property
    def allocator(self) -> Allocator:
        """All heads of all layers together, or each by itself against tau."""
        return Joint() if self.tau is None else Threshold(self.tau)

    def observe(self, view: LayerView) -> None:
        """Score the new entries."""
        if view.num_new == 0 or not self.needs.hidden:
            return
        if view.hidden is None or self.profile is None or self.digest is None:
            raise ConfigError("kvzap needs hidden states and a profile, and did not get both")
        layer, hidden = view.layer, view.hidden
        network = _network(self.profile, self.digest, layer.layer_idx, hidden.device)
        if network[0][0].shape[1] != hidden.shape[1] or len(network[-1][0]) != layer.num_kv_heads:
            raise ConfigError(
                f"kvzap: profile {self.profile!r} is for hidden states of {network[0][0].shape[1]} "
                f"channels and {len(network[-1][0])} KV heads; layer {layer.layer_idx} has "
                f"{hidden.shape[1]} and {layer.num_kv_heads}: run kvlib calibrate kvzap for it"
            )
        scores = view.state.entries.get("scores")
        if scores is None:
            shape = layer.keys.shape[:-1]
            scores = torch.zeros(shape, dtype=torch.float32, device=layer.keys.device)
        new = predict(network, hidden).T.to(scores.device)
        view.state.entries["scores"] = _with_last(scores, new, layer)

    def scores(self, view: LayerView) -> Tensor:
        """What was predicted for each entry."""
        return by_row(view.state.entries["scores"], view.layer)


def predict(network: Network, hidden: Tensor) -> Tensor:
    """Float32 [n, Hkv]: log scores of the entries of tokens with these hidden states [n, d]."""
    x = hidden.float()
    for index, (weight, bias) in enumerate(network):
        x = linear(gelu(x) if index else x, weight, bias)
    return x


def _with_last(old: Tensor, new: Tensor, layer: LayerKV) -> Tensor:
    """Numbers of all entries, the last ones of each row replaced by new ones [Hkv, n > 0]."""
    num = new.shape[1]
    if layer.is_dense:
        return torch.cat([old[:, :-num], new], dim=1)
    rows = zip(old.split(list(layer.lengths)), new, strict=True)
    return torch.cat([part for row, mine in rows for part in (row[:-num], mine)])


def _maps(artefact: Artefact, layer_idx: int) -> Network:
    """One layer's network; empty if the artefact has none."""
    maps: list[tuple[Tensor, Tensor]] = []
    while (weight := artefact.tensors.get(f"{layer_idx}.{len(maps)}.weight")) is not None:
        bias = artefact.tensors.get(f"{layer_idx}.{len(maps)}.bias")
        width = weight.shape[1] if not maps else len(maps[-1][0])
        if bias is None or weight.shape != (len(bias), width):
            return ()
        maps.append((weight.float(), bias.float()))
    return tuple(maps)


@lru_cache(maxsize=256)
def _network(profile: str, digest: str, layer_idx: int, device: torch.device) -> Network:
    maps = _maps(load_artefact(profile, KVzap.name, digest), layer_idx)
    if not maps:
        raise ConfigError(
            f"kvzap: profile {profile!r} has no network for layer {layer_idx}: run kvlib calibrate "
            "kvzap for this model"
        )
    return tuple((weight.to(device), bias.to(device)) for weight, bias in maps)
