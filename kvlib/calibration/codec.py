# SPDX-License-Identifier: Apache-2.0
"""The transforms of `kvlc` for one model.

A codec may err where it does no harm. How much harm an error e in the cached keys (turned back to
position 0) or values of a token does is, to second order, e' F e: half the Fisher information F is
the curvature of the KL divergence of the next-token distribution. So the model reads texts; the KV
of the first part is held fixed like a cache, and the gradient of the log-probability of tokens that
are **drawn from the model's own distribution** over the second part gives, token by token, vectors
g with E[g g'] = F. One matrix for each layer and kind is kept, over all channels of all heads, with
a ridge, since errors are not infinitesimal and texts differ. Layers that matter less have smaller
matrices: it is also what tells how the bits are shared among layers.

With M = F + ridge, the square root of M takes errors to a space where they all cost the same. There
the principal axes of the centred keys or values are the coefficients: of one head (`balanced`), one
layer (`small`) or a group of layers (`archive`). Axes of `archive` that are far below any step are
dropped. Since all coefficients are worth the same, one step serves the whole model, and reverse
water-filling says that this is the best one can do with uniform quantizers (Cover and Thomas,
Elements of Information Theory, 10.3).

Steps are then put on a scale: documents that were held out are encoded at a ladder of steps, and
level 1 is where they lose 0.01 nats a token. The bits and losses that they had at each level are
part of the artefact; `kvlc:bits=` and `kvlc:kl=` are read off them. Two more documents check that
the curve holds for others: the profile is refused if they lose more than twice as much.

Fisher information for weighting KV quantization: KVQuant (Hooper et al. 2024, arXiv:2401.18079),
there for single channels. PCA across layers: KVTC (arXiv:2511.01815), there in plain squared error.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvlib.artefacts import Artefact, model_identity, save_artefact
from kvlib.calibration.codec_trial import (
    CHECKED,
    HELD_OUT,
    LADDER,
    TARGET,
    Trial,
    continuation_logits,
    prefill,
    scaled,
)
from kvlib.calibration.documents import sample_documents
from kvlib.codecs.rope import angles, removable_rope, turn
from kvlib.codecs.transforms import KIND, PRESETS, Profile
from kvlib.errors import ConfigError
from kvlib.model_spec import spec_for_model
from kvlib.spec import KVSpec, LayerKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvlib.calibration import Progress

__all__ = ["calibrate", "summary"]

_GATE = 2.0
_SKIP = 16  # first tokens, whose keys and values are like no others
_CHUNK = 256  # tokens over which means are taken off
_DRAWS = 2  # of the text that follows
_LEAST = 0.03  # of the first guess of a step: axes with a smaller deviation are dropped
_SENSITIVE = 0.7  # power of the sensitivity in the steps of `near`; 1 would be its own optimum
_STEP_RANGE = (0.35, 2.8)  # of those steps about their geometric mean


def calibrate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    model_id: str | None,
    out: str | Path,
    *,
    progress: "Progress" = lambda done, total: None,
    presets: str = "balanced small archive",
    texts: Mapping[str, str] | None = None,
    documents: int = 42,
    tokens: int = 768,
    following: int = 256,
    group: int = 5,
    ridge: float = 0.1,
    seed: int = 0,
) -> Artefact:
    """Measure a model and write the profile for ``kvlc:profile=FILE``.

    Tensors of the artefact, k being K or V and n a layer (the first of a group): ``near.k``
    float32 [L], steps at level 1; ``metric.k.n`` float32 [C, C]; of presets ``preset.k.n.decode``
    float16 [width, r] (balanced: [heads, D, r]), ``preset.k.n.statistics`` float32 [3, r], mean,
    deviation and deviation of chunk means of each coefficient at level 1; ``archive.k.n.offset``
    float32 [width]; ``preset.levels``, ``preset.bits`` and ``preset.kl`` float32 [n], the held-out
    curve.

    Args:
        model: a decoder with full attention in every layer.
        tokenizer: its tokenizer; None for random tokens instead of text.
        model_id: identity of the weights, for models that came from no hub and no folder.
        out: the file; one that is there is replaced.
        progress: told of every document and every point of the curves.
        presets: those to make, of balanced, small and archive; near is always there.
        texts: documents by name; those of Python by default.
        documents: how many to use at most.
        tokens: of each that are cached.
        following: tokens after them that feel the errors.
        group: layers that `archive` codes together.
        ridge: of the metric, as a share of its mean diagonal.
        seed: of the places in the documents, and of the draws.

    Raises:
        ConfigError: bad options, too little text, a model that cannot be calibrated, or a curve
            that does not hold for other documents.
    """
    wanted = _check_options(presets, documents, tokens, following, group, ridge)
    spec = spec_for_model(model, model_id=model_id)
    spec.require((LayerKind.FULL,), "kvlib calibrate codec")
    samples = sample_documents(model, tokenizer, texts, documents, tokens + following, seed)
    if len(samples) <= HELD_OUT + CHECKED:
        raise ConfigError(
            f"{len(samples)} documents have {tokens + following} tokens; at least "
            f"{HELD_OUT + CHECKED + 1} are needed: give more or longer ones, or fewer tokens"
        )
    measured, rest = samples[: -HELD_OUT - CHECKED], samples[-HELD_OUT - CHECKED :]
    total = len(measured) + (len(LADDER) + 1) * (len(wanted) + 1)
    done = iter(range(1, total + 1))

    def tick() -> None:
        progress(next(done), total)

    moments = [_Moments(spec, kind) for kind in "KV"]
    generator = torch.Generator().manual_seed(seed)
    for ids in measured:
        _measure(model, spec, ids, tokens, moments, generator)
        tick()
    for mine in moments:
        mine.finish(ridge)
    trial = Trial(model, spec, rest, tokens, tick)
    tensors: dict[str, Tensor] = {}
    settings = {
        "presets": " ".join(("near", *wanted)), "group": group, "layers": spec.num_layers,
        "documents": len(measured), "tokens": tokens, "following": following, "ridge": ridge,
        "seed": seed,
    }  # fmt: skip
    for mine in moments:
        for index, metric in enumerate(mine.metrics):
            tensors[f"metric.{mine.kind}.{index}"] = metric.float()
    for preset in ("near", *wanted):
        made = (
            _near(moments, trial.guess)
            if preset == "near"
            else _transforms(spec, preset, moments, group, trial.guess)
        )
        curve = trial.curve(preset, made, tensors, settings)
        tensors |= scaled(made, curve.unit)
        for name in ("levels", "bits", "kl"):
            tensors[f"{preset}.{name}"] = torch.tensor(getattr(curve, name), dtype=torch.float32)
        other = trial.check(preset, tensors, settings)
        if not other <= _GATE * TARGET:
            raise ConfigError(
                f"{preset}: at the step where held-out documents lose {TARGET} nats a token, "
                f"others lose {other:.4f}: the profile would not keep its word. Give more text "
                "(--documents, --tokens), or text like that which the model will read"
            )
        settings[f"{preset} checked"] = f"{other:.5f}"
    return save_artefact(
        out, kind=KIND, model=model_identity(spec), tensors=tensors, settings=settings
    )


def summary(found: Artefact) -> Sequence[tuple[str, str]]:
    """The curves, for `kvlib calibrate`."""
    rows = []
    profile = Profile(found)
    for preset in profile.presets:
        for level, bits, kl in zip(*profile.curve(preset), strict=True):
            rows.append(
                (f"{preset}, level {level:g}", f"{bits:.2f} bits a value, KL {kl:.5f} nats")
            )
    return rows


def _check_options(
    presets: str, documents: int, tokens: int, following: int, group: int, ridge: float
) -> tuple[str, ...]:
    wanted = tuple(presets.replace(",", " ").split())
    if unknown := set(wanted) - set(PRESETS):
        raise ConfigError(f"presets are {', '.join(PRESETS)}; got {', '.join(sorted(unknown))}")
    numbers = {"documents": documents, "tokens": tokens, "following": following, "group": group}
    least = {"documents": HELD_OUT + CHECKED + 1, "tokens": 2 * _SKIP, "following": 8, "group": 1}
    for name, value in numbers.items():
        if type(value) is not int or value < least[name]:
            raise ConfigError(
                f"{name} must be a whole number of at least {least[name]}, got {value}"
            )
    if not 0 < ridge <= 100:
        raise ConfigError(f"ridge must be above 0 and at most 100, got {ridge}")
    return tuple(p for p in PRESETS[1:] if p in wanted or p == "balanced")


# -- moments


class _Moments:
    """What one kind (K or V) needs: metrics by layer, and rows to take principal axes of."""

    def __init__(self, spec: KVSpec, kind: str) -> None:
        self.kind = kind
        self.widths = [
            x.num_kv_heads * (x.k_head_dim if kind == "K" else x.v_head_dim) for x in spec.layers
        ]
        self.heads = [x.num_kv_heads for x in spec.layers]
        self.metrics = [torch.zeros(w, w, dtype=torch.float64) for w in self.widths]
        self.count = 0
        self.rows: list[list[Tensor]] = [[] for _ in spec.layers]  # float16 [tokens, C] a document

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Gradients [n, C] of each layer."""
        for metric, g in zip(self.metrics, gradients, strict=True):
            metric += (g.T @ g).double()
        self.count += len(gradients[0])

    def finish(self, ridge: float) -> None:
        """Means, with the ridge."""
        for index, metric in enumerate(self.metrics):
            mean = metric / self.count
            level = mean.diagonal().mean().clamp_min(1e-30)
            self.metrics[index] = mean + ridge * level * torch.eye(len(mean), dtype=torch.float64)

    def chunks(self, layer: int) -> Iterator[Tensor]:
        """Rows of a layer in float32, a chunk at a time, without first tokens."""
        for rows in self.rows[layer]:
            for at in range(_SKIP, len(rows), _CHUNK):
                yield rows[at : at + _CHUNK].float()


def _rows(spec: KVSpec, kind: str, layers: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """[heads, T, D] of each layer as rows [T, C], keys turned back to position 0."""
    out = []
    for index, x in enumerate(layers):
        rows = x.detach().float().cpu().transpose(0, 1).contiguous()
        rope = removable_rope(spec, index) if kind == "K" else None
        if rope is not None:
            turn(rows.numpy(), angles(rope, np.arange(tokens)), rope, back=True)
        out.append(rows.flatten(1))
    return out


def _measure(
    model: "PreTrainedModel",
    spec: KVSpec,
    ids: Tensor,
    tokens: int,
    moments: Sequence[_Moments],
    generator: torch.Generator,
) -> None:
    """Add one document: its rows, and the gradients of what is drawn after it."""
    pairs = prefill(model, ids[:, :tokens])
    leaves = [[x.requires_grad_() for x in kind] for kind in zip(*pairs, strict=True)]
    for mine, layers in zip(moments, leaves, strict=True):
        rows = _rows(spec, mine.kind, layers, tokens)
        for index, x in enumerate(rows):
            mine.rows[index].append(x.half())
    with torch.enable_grad():
        logits = continuation_logits(model, list(zip(*leaves, strict=True)), ids[:, tokens:])
        scores = torch.log_softmax(logits.float(), dim=-1)
    for draw in range(_DRAWS):
        chances = scores.detach().exp().cpu()
        drawn = torch.multinomial(chances, 1, generator=generator).to(scores.device)
        loss = scores.gather(1, drawn).sum()
        flat = [x for layers in leaves for x in layers]
        gradients = torch.autograd.grad(loss, flat, retain_graph=draw + 1 < _DRAWS)
        count = len(leaves[0])
        for mine, part in zip(moments, (gradients[:count], gradients[count:]), strict=True):
            # A rotation's gradient turns back like what it rotates.
            mine.add([x[_SKIP:] for x in _rows(spec, mine.kind, part, tokens)])


# -- transforms


def _near(moments: Sequence[_Moments], guess: float) -> dict[str, Tensor]:
    """Steps of `near`: deviation times a power of 1 / sensitivity."""
    steps, plain = [], []
    for mine in moments:
        for index, metric in enumerate(mine.metrics):
            chunks = [x - x.mean(0) for x in mine.chunks(index)]
            plain.append(torch.cat(chunks).double().square().mean().sqrt())
            steps.append(metric.diagonal().mean() ** -0.5 / plain[-1])
    relative = torch.stack(steps) ** _SENSITIVE
    relative /= relative.log().mean().exp()
    both = torch.stack(plain) * relative.clamp(*_STEP_RANGE)
    count = len(moments[0].metrics)
    both *= 0.5 / guess  # half a deviation is a good guess here
    return {"near.K": both[:count].float(), "near.V": both[count:].float()}


def _transforms(
    spec: KVSpec, preset: str, moments: Sequence[_Moments], group: int, guess: float
) -> dict[str, Tensor]:
    """Decoding matrices, whose unit is the metric's, and statistics of the coefficients."""
    out: dict[str, Tensor] = {}
    size = group if preset == "archive" else 1
    for mine in moments:
        for first in range(0, len(mine.metrics), size):
            layers = range(first, min(first + size, len(mine.metrics)))
            together = len(layers) > 1 and len({spec.layers[i] for i in layers}) == 1
            if mine.widths[first] == 0 or (preset == "archive" and not together):
                continue  # without values, or alone, or of different shapes
            name = f"{preset}.{mine.kind}.{first}"
            if preset == "balanced":
                decode, statistics = _heads(mine, first)
            elif preset == "small":
                decode, statistics, _ = _axes(mine, layers, 0.0)
            else:
                decode, statistics, out[f"{name}.offset"] = _axes(mine, layers, guess)
            out[f"{name}.decode"], out[f"{name}.statistics"] = decode, statistics
    return out


@dataclass(frozen=True)
class _Root:
    """Square root of a metric, and its inverse."""

    root: Tensor
    inverse: Tensor


def _root(metric: Tensor) -> _Root:
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(values.max() * 1e-12).sqrt()
    return _Root((vectors * root) @ vectors.T, (vectors / root) @ vectors.T)


def _axes(mine: _Moments, layers: range, guess: float) -> tuple[Tensor, Tensor, Tensor]:
    """Principal axes of several layers, in the metric, and what they lack of the mean row."""
    roots = [_root(mine.metrics[i]) for i in layers]
    white = [
        torch.cat([x @ r.root.float() for x, r in zip(parts, roots, strict=True)], dim=1)
        for parts in zip(*(mine.chunks(i) for i in layers), strict=True)
    ]
    axes, statistics = _principal(white, guess)
    mean = torch.cat(white).double().mean(0)
    lacking = (mean - axes @ (axes.T @ mean))[:, None]
    parts = [_unwhiten(x, roots) for x in (axes, lacking)]
    return parts[0], statistics, parts[1][:, 0]


def _unwhiten(x: Tensor, roots: Sequence[_Root]) -> Tensor:
    """Rows of the whitened space back in that of keys and values."""
    out, at = [], 0
    for root in roots:
        out.append(root.inverse @ x[at : at + len(root.inverse)])
        at += len(root.inverse)
    return torch.cat(out)


def _heads(mine: _Moments, layer: int) -> tuple[Tensor, Tensor]:
    """Principal axes of each head: [heads, D, D] and [3, heads, D]."""
    heads = mine.heads[layer]
    width = mine.widths[layer] // heads
    decode, statistics = [], []
    chunks = list(mine.chunks(layer))
    for h in range(heads):
        at = slice(h * width, (h + 1) * width)
        root = _root(mine.metrics[layer][at, at])
        one, two = _principal([x[:, at] @ root.root.float() for x in chunks], 0.0)
        decode.append(root.inverse @ one)
        statistics.append(two)
    return torch.stack(decode), torch.stack(statistics, dim=1)


def _principal(chunks: Sequence[Tensor], guess: float) -> tuple[Tensor, Tensor]:
    """Axes [width, r] and statistics [3, r] of centred rows, the largest first."""
    centred = torch.cat([x - x.mean(0) for x in chunks])
    covariance = (centred.T @ centred).double() / len(centred)
    variances, axes = torch.linalg.eigh(covariance)
    variances, axes = variances.flip(0).clamp_min(0), axes.flip(1)
    means = torch.stack([x.double().mean(0) @ axes for x in chunks])
    spread = (variances + means.var(0)).sqrt()
    used = torch.nonzero(spread > guess * _LEAST)
    kept = int(used[-1]) + 1 if len(used) else 1
    statistics = torch.stack([means.mean(0), variances.sqrt(), means.std(0)])
    return axes[:, :kept], statistics[:, :kept]
