# SPDX-License-Identifier: Apache-2.0
"""The networks of `kvzap` for one model: hidden states to KVzip+ scores (arXiv 2601.07891).

The model reads some texts and is asked to repeat each, as `kvzip` does. That gives, for every token
of a text, every layer and every KV head, the score that the policy wants to know beforehand; its
logarithm is what a network learns to predict from what went into the layer's attention module at
that token. The first tokens, which the policy keeps anyway and whose hidden states are like no
others, are left out. The texts are Python's own help topics, which every machine has; the paper
takes 1.2 million pairs from far more varied ones.

A linear map is found in closed form, in float64, by ridge regression; the penalty of each input
channel is proportional to its variance. A network with a hidden layer is trained with Adam on a
sample of each text's tokens. An eighth of the texts is held out, and the share of the scores'
variance that is predicted there (R^2, each head about its own mean) is part of the artefact. The
paper has 0.63 to 0.77.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kvlib.artefacts import Artefact, model_identity, save_artefact
from kvlib.attention import column_maxima, keys_only
from kvlib.cache import KVCache
from kvlib.calibration.text import sample_prompt
from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Plans, ProbeView, Resources
from kvlib.eviction.kvzap import KVzap, Network, predict
from kvlib.eviction.kvzip import KVzip
from kvlib.eviction.scored import PolicyBase
from kvlib.model_hooks import decoder_of
from kvlib.model_spec import spec_for_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvlib.calibration import Progress

__all__ = ["KINDS", "Moments", "Scored", "calibrate", "repetition_scores", "ridge", "summary"]

KINDS = ("linear", "mlp")
QUANTILES = (0.25, 0.5, 0.75, 0.9)
"""Shares of held-out entries whose predicted score the artefact gives: what tau to choose."""
_SINKS = 4
_RIDGE = 1e-3
_FLOOR = 1e-10  # of a score: its logarithm has to be finite, and outliers would draw the line
_BATCH, _EPOCHS, _STEPS, _RATE = 256, 15, 500, 5e-3  # so many epochs, and at least so many steps


def calibrate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    model_id: str | None,
    out: str | Path,
    *,
    progress: "Progress" = lambda done, total: None,
    prompts: int = 64,
    tokens: int = 1000,
    kind: str = "linear",
    pairs: int = 500,
    seed: int = 0,
) -> Artefact:
    """Train the networks and write them to a file for ``kvzap:profile=FILE``.

    Tensors of the artefact: ``layers`` int64 [L], the layers that policies see; for layer n and map
    i, ``n.i.weight`` [out, in] and ``n.i.bias`` [out], float32; ``r2`` float32 [L], of each layer
    on held-out texts; ``quantiles`` float32, of their predicted scores at `QUANTILES`.

    Args:
        model: a decoder that `KVCache` takes, whose attention modules have an ``o_proj``.
        tokenizer: its tokenizer; None for random tokens instead of text.
        model_id: identity of the weights, for models that came from no hub and no folder.
        out: the file; one that is there is replaced.
        progress: told of every text and every network.
        prompts: texts, at least 2; every eighth is held out.
        tokens: of the longest texts; the shortest have three quarters of that.
        kind: linear or mlp.
        pairs: tokens of each text that a hidden layer is trained on, and that R^2 is taken over; a
            linear map is found from all.
        seed: of texts, samples and first weights.

    Raises:
        ConfigError: a parameter without meaning, a text that is too short, or a model whose output
            projections cannot be found.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind is {' or '.join(KINDS)}, got {kind!r}")
    if prompts < 2 or tokens <= 2 * _SINKS or pairs < 1:
        raise ConfigError(
            f"at least 2 prompts (one is held out), more than {2 * _SINKS} tokens and 1 pair, got "
            f"{prompts}, {tokens} and {pairs}"
        )
    identity = model_identity(spec_for_model(model, model_id=model_id))
    generator = torch.Generator().manual_seed(seed)
    sizes = random.Random(seed)
    fits: dict[int, _Fit] = {}
    for done in range(prompts):
        length = sizes.randint(3 * tokens // 4, tokens)
        prompt = sample_prompt(model, tokenizer, length, generator)
        found = repetition_scores(model, tokenizer, prompt[0], model_id=model_id)
        some = torch.randperm(length - _SINKS, generator=generator)[:pairs]
        for one in found:
            fit = fits.setdefault(one.layer_idx, _Fit(kind))
            target = one.scores.T[_SINKS:].double().clamp(min=_FLOOR).log()
            held_out = done % 8 == min(7, prompts - 1)
            fit.add(one.hidden[_SINKS:], target, some, held_out=held_out)
        progress(done + 1, prompts + len(fits))
    tensors, r2, predicted = {"layers": torch.tensor(sorted(fits))}, [], []
    for done, index in enumerate(sorted(fits)):
        network = fits[index].solve(seed)
        for i, (weight, bias) in enumerate(network):
            tensors |= {f"{index}.{i}.weight": weight, f"{index}.{i}.bias": bias}
        seen, share = fits[index].judge(network)
        predicted.append(seen.flatten().cpu())
        r2.append(share)
        progress(prompts + done + 1, prompts + len(fits))
    tensors["r2"] = torch.tensor(r2)
    tensors["quantiles"] = _quantiles(torch.cat(predicted))
    return save_artefact(
        out,
        kind=KVzap.name,
        model=identity,
        tensors=tensors,
        settings={
            "prompts": prompts,
            "tokens": tokens,
            "kind": kind,
            "pairs": pairs,
            "seed": seed,
        },
    )


# Scores


class Scored(NamedTuple):
    """One layer of a text: hidden states [n, d_model] and scores, float32 [Hkv, n]."""

    layer_idx: int
    hidden: Tensor
    scores: Tensor


@torch.no_grad()
def repetition_scores(
    model: "PreTrainedModel",
    tokenizer: Any,
    prompt: Tensor,
    *,
    plus: bool = True,
    model_id: str | None = None,
) -> list[Scored]:
    """Read a text, repeat it, and score every entry of every layer.

    Args:
        model: see `calibrate`.
        tokenizer: its own; None to read the text again without a request.
        prompt: int64 [n], token ids.
        plus: KVzip+ scores; else KVzip's own.
        model_id: see `calibrate`.
    """
    outputs = _output_weights(model) if plus else None
    # A budget of one entry: there is always something to decide. One chunk holds the whole text.
    kvzip = KVzip(budget=1, chunk=len(prompt), instruct=tokenizer is not None)
    found: list[Scored] = []
    collector = _Collector(kvzip, outputs, found.append)
    cache = KVCache(model, collector, tokenizer=tokenizer, model_id=model_id)
    decoder_of(model)(prompt[None].to(model.device), past_key_values=cache, use_cache=True)
    return found


class _Collector(PolicyBase):
    """A policy that repeats the prompt as KVzip does, hands on what it finds, and keeps all."""

    name: ClassVar[str] = "kvzap-collector"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    about: ClassVar[About] = KVzap.about

    def __init__(
        self,
        kvzip: KVzip,
        outputs: dict[int, Tensor] | None,
        hand_on: Callable[[Scored], None],
    ) -> None:
        self._kvzip, self._outputs, self._hand_on = kvzip, outputs, hand_on
        self._hidden: dict[int, Tensor] = {}

    @property
    def needs(self) -> Needs:
        """The repetition and all hidden states."""
        return Needs(probe=True, hidden=True, whole_model=True, steps=False)

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Note the hidden states."""
        if view.hidden is not None:
            self._hidden[view.layer.layer_idx] = view.hidden

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """KVzip's."""
        return self._kvzip.probes(prompt, resources)

    def on_probe(self, view: ProbeView) -> None:
        """Score every entry: the most that a token of the repetition gets out of it."""
        layer, votes = view.layer, None
        if self._outputs is not None and view.hidden is not None:
            votes = 1 / view.hidden.float().norm(dim=-1)
        seen = keys_only(layer.layer_idx, torch.cat([layer.keys, view.keys], dim=1))
        everywhere = replace(view.logits, window=None)
        most = column_maxima(view.query, seen, everywhere, votes=votes)[..., : layer.keys.shape[1]]
        if self._outputs is not None:
            most = most * _written(layer.values, self._outputs[layer.layer_idx], most.shape[1])
        self._hand_on(Scored(layer.layer_idx, self._hidden.pop(layer.layer_idx), most.amax(1)))

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Nothing goes."""
        return [() for _ in views]


def _output_weights(model: "PreTrainedModel") -> dict[int, Tensor]:
    """The output projection [d_model, Hq * Dv] of every layer's attention."""
    found: dict[int, Tensor] = {}
    for module in decoder_of(model).modules():
        index, output = (getattr(module, name, None) for name in ("layer_idx", "o_proj"))
        if isinstance(index, int) and isinstance(output, nn.Linear):
            found[index] = output.weight.detach()
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no attention modules with a linear o_proj: KVzip+ scores "
            "cannot be had of it; use kvzip"
        )
    return found


def _written(values: Tensor, output: Tensor, group: int) -> Tensor:
    """Float32 [Hkv, G, n]: the length of what each entry's value adds to the residual stream."""
    heads, _, width = values.shape
    if output.shape[1] != heads * group * width:
        raise ConfigError(
            f"an output projection of {output.shape[1]} columns is not that of {heads * group} "
            f"heads of {width} channels: use kvzip for this model"
        )
    parts = output.view(-1, heads, group, width)
    lengths = [
        (values[h] @ parts[:, h, g].T.to(values)).float().norm(dim=-1)
        for h in range(heads)
        for g in range(group)
    ]
    return torch.stack(lengths).view(heads, group, -1)


# Fitting


class Moments:
    """Sums over pairs of inputs [n, d] and targets [n, m], in float64: all that a line needs."""

    def __init__(self) -> None:
        self.num = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take more pairs."""
        x, y = x.double(), y.double()
        new = x.sum(0), y.sum(0), x.T @ x, x.T @ y
        self.num += len(x)
        old = self._sums or [torch.zeros_like(part) for part in new]
        self._sums = [a + b for a, b in zip(old, new, strict=True)]

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means [d] and [m], covariances [d, d] and [d, m]."""
        x, y, xx, xy = (part / self.num for part in self._sums)
        return x, y, xx - x[:, None] * x, xy - x[:, None] * y


def ridge(moments: Moments, penalty: float) -> tuple[Tensor, Tensor]:
    """Find the line with the smallest penalised error.

    Weight W [m, d] and bias b [m] are float64 and have the least of

        mean |y - W x - b|^2 + penalty * sum over channels k of variance[k] * |W[:, k]|^2.

    A channel that never changes gets weights of 0.
    """
    x, y, xx, xy = moments.centred()
    variance = xx.diagonal()
    still = variance <= 1e-12 * variance.max()
    penalties = penalty * variance.masked_fill(still, 0) + still.double()
    xx = xx.masked_fill(still[:, None] | still, 0)
    weight = torch.linalg.solve(xx + penalties.diag(), xy.masked_fill(still[:, None], 0)).T
    return weight, y - weight @ x


class _Fit:
    """The pairs of one layer."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._moments = Moments()
        self._sampled: list[tuple[Tensor, Tensor]] = []
        self._held_out: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor, some: Tensor, *, held_out: bool) -> None:
        """Take a text: inputs [n, d], targets [n, m] and a sample of their indices."""
        sample = x[some.to(x.device)], y[some.to(y.device)]
        if held_out:
            self._held_out.append(sample)
        elif self._kind == "linear":
            self._moments.add(x, y)
        else:
            self._sampled.append(sample)

    def solve(self, seed: int) -> Network:
        """The network, float32."""
        if self._kind == "linear":
            weight, bias = ridge(self._moments, _RIDGE)
            return ((weight.float(), bias.float()),)
        x, y = (torch.cat(parts).float() for parts in zip(*self._sampled, strict=True))
        return _train(x, y, seed)

    def judge(self, network: Network) -> tuple[Tensor, float]:
        """Predictions [n, m] of held-out texts and the share of the variance that they explain."""
        x, y = (torch.cat(parts) for parts in zip(*self._held_out, strict=True))
        seen = predict(network, x)
        left = (seen.double() - y).square().sum()
        return seen, float(1 - left / (y - y.mean(0)).square().sum())


def _train(x: Tensor, y: Tensor, seed: int) -> Network:
    """A network with one hidden layer, trained on inputs [n, d] and targets [n, m]."""
    x_mean, x_scale = x.mean(0), x.std(0) + 1e-6
    y_mean, y_scale = y.mean(0), y.std(0) + 1e-6
    x, y = (x - x_mean) / x_scale, (y - y_mean) / y_scale
    width = max(x.shape[1] // 8, 1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        first, second = (nn.Linear(x.shape[1], width), nn.Linear(width, y.shape[1]))
        both = nn.Sequential(first, nn.GELU(), second).to(x.device)
        batches = -(-len(x) // _BATCH)
        epochs = max(_EPOCHS, -(-_STEPS // batches))
        optimizer = torch.optim.Adam(both.parameters(), lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(_BATCH):
                mine = index.to(x.device)
                loss = (both(x[mine]) - y[mine]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    # What was done to inputs and targets becomes part of the maps.
    inner, outer = first.weight.detach() / x_scale, second.weight.detach() * y_scale[:, None]
    return (
        (inner, first.bias.detach() - inner @ x_mean),
        (outer, second.bias.detach() * y_scale + y_mean),
    )


def _quantiles(x: Tensor) -> Tensor:
    ordered = x.sort().values
    index = [min(int(share * len(ordered)), len(ordered) - 1) for share in QUANTILES]
    return ordered[index].float()


def summary(artefact: Artefact) -> Sequence[tuple[str, str]]:
    """Name and text of what `kvlib calibrate` prints."""
    layers, r2 = artefact.tensors["layers"].tolist(), artefact.tensors["r2"]
    settings = artefact.settings
    trained = f"{settings['prompts']} texts of up to {settings['tokens']} tokens"
    rows = [(f"layer {layer}", f"R^2 {share:.3f}") for layer, share in zip(layers, r2, strict=True)]
    taus = [
        (f"tau={value:.2f}", f"removes {share:.0%} of held-out entries outside the window")
        for value, share in zip(artefact.tensors["quantiles"].tolist(), QUANTILES, strict=True)
    ]
    return [
        ("trained on", f"{trained}, {settings['kind']}"),
        ("R^2 on held-out texts", f"mean {r2.mean():.3f}, {r2.min():.3f} to {r2.max():.3f}"),
        *taus,
        *rows,
    ]
