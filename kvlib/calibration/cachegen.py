# SPDX-License-Identifier: Apache-2.0
"""The tables of `cachegen` for one model: how its KV is distributed (arXiv 2310.07240).

The model reads some texts twice. The first time gives sigma, the root mean square of what is coded:
the differences of tokens to the anchor before them, for keys and values of each layer. The second
time counts, for each channel, the codes of anchors and, at each level, the bins of differences.
Every token counts as an anchor, since there are few; differences are taken with groups of ten that
begin at the first token, and at the sixth.

A table has the numbers from the lowest to the highest that were seen, and two more on either side.
The texts are Python's own help topics, which every machine has.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvlib.artefacts import Artefact, model_identity, save_artefact
from kvlib.blocks import KVBlock
from kvlib.calibration.documents import sample_documents
from kvlib.codecs.cachegen import CacheGenCodec
from kvlib.codecs.cachegen_kernels import Floats
from kvlib.codecs.cachegen_lines import tokens_of
from kvlib.codecs.cachegen_profile import (
    ESCAPE,
    FACTORS,
    GROUP,
    KINDS,
    LARGEST,
    SYMBOLS,
    kept_layers,
    third,
    widths,
)
from kvlib.codecs.rans_tables import TOTAL
from kvlib.errors import ConfigError
from kvlib.model_hooks import decoder_of
from kvlib.model_spec import spec_for_model
from kvlib.spec import KVSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvlib.calibration import Progress

__all__ = ["calibrate", "measure", "summary", "table"]

LEVELS = (0.25, 0.35, 0.5, 0.7, 1.0)
_PHASES = (0, 5)  # where groups begin
_MARGIN = 2
_UNSEEN = 0.5  # added to every count: what was not seen may occur
_SMALLEST = 1e-6  # of sigma: a layer that is constant

Counts = NDArray[np.int64]


def calibrate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    model_id: str | None,
    out: str | Path,
    *,
    progress: "Progress" = lambda done, total: None,
    prompts: int = 16,
    tokens: int = 1000,
    levels: str = "",
    seed: int = 0,
) -> Artefact:
    """Measure the tables and write them to a file for ``cachegen:profile=FILE``.

    `kvlib.codecs.cachegen_profile` says what is in it.

    Args:
        model: a decoder whose layers all keep every token.
        tokenizer: its tokenizer; None for random tokens instead of text.
        model_id: identity of the weights, for models that came from no hub and no folder.
        out: the file; one that is there is replaced.
        progress: told of every text that was read.
        prompts: texts at most, each from another document.
        tokens: of each.
        levels: those to have tables for, such as ``0.35/0.7``; `LEVELS` unless given.
        seed: of the places that texts are taken from.

    Raises:
        ConfigError: sizes or levels that make no sense, a text that is too short, or a model with
            layers of another kind.
    """
    ladder = _ladder(levels)
    if prompts < 1 or tokens < GROUP + max(_PHASES):
        raise ConfigError(
            f"cachegen needs a text or more of {GROUP + max(_PHASES)} tokens or more, got "
            f"{prompts} of {tokens}"
        )
    spec = spec_for_model(model, model_id=model_id)
    texts = sample_documents(model, tokenizer, None, prompts, tokens, seed)
    if not texts:
        raise ConfigError(f"no document has {tokens} tokens: calibrate with fewer")
    done = 0

    def read() -> Iterable[KVBlock]:
        nonlocal done
        for ids in texts:
            yield _read(model, spec, ids)
            done += 1
            progress(done, 2 * len(texts))

    return save_artefact(
        out,
        kind=CacheGenCodec.name,
        model=model_identity(spec),
        tensors=measure(spec, read, ladder),
        settings={"prompts": len(texts), "tokens": tokens, "seed": seed},
    )


def _ladder(text: str) -> list[float]:
    try:
        levels = sorted({float(x) for x in text.split("/")}) if text else list(LEVELS)
    except ValueError:
        levels = []
    if not levels or not all(1e-3 <= x <= 1e3 for x in levels):
        raise ConfigError(
            f"levels are numbers in 0.001..1000 with / between them (0.35/0.7), got {text!r:.80}"
        )
    return levels


@torch.no_grad()
def _read(model: "PreTrainedModel", spec: KVSpec, ids: Tensor) -> KVBlock:
    """What the model caches of a text."""
    from transformers import DynamicCache

    cache = DynamicCache()  # without a config no layer forgets what leaves its window
    decoder_of(model)(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    pairs = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            break
        pairs.append((keys[0].cpu(), values[0].cpu()))
    if len(pairs) != spec.num_layers:
        raise ConfigError(
            f"{type(model).__name__} has layers that cache something else than keys and values: "
            "cachegen cannot be calibrated for it"
        )
    return KVBlock.dense(spec, pairs)


def measure(
    spec: KVSpec, read: Callable[[], Iterable[KVBlock]], levels: Sequence[float] = LEVELS
) -> dict[str, Tensor]:
    """The tensors of an artefact.

    Args:
        spec: of the model.
        read: dense blocks of it, the same each of the two times that it is called.
        levels: ascending.
    """
    layers = kept_layers(spec)
    squares = np.zeros((len(layers), 2))
    numbers = np.zeros((len(layers), 2))
    for block in read():
        for place, kind, x in _matrices(block, layers):
            for deltas in _deltas(x):
                squares[place, kind] += np.square(deltas, dtype=np.float64).sum()
                numbers[place, kind] += deltas.size
    sigma = np.sqrt(squares / np.maximum(numbers, 1)).clip(_SMALLEST).astype(np.float32)
    counts: dict[str, Counts] = {}
    for layer_idx in layers:
        for kind, channels in enumerate(widths(spec, layer_idx)):
            if channels:
                stem = f"{layer_idx}.{KINDS[kind]}"
                for name in ("anchors", *(f"deltas.{i}" for i in range(len(levels)))):
                    counts[f"{stem}.{name}"] = np.zeros((channels, SYMBOLS), np.int64)
    for block in read():
        for place, kind, x in _matrices(block, layers):
            stem = f"{layers[place]}.{KINDS[kind]}"
            peaks = np.abs(x).max(1, keepdims=True)
            _count(counts[f"{stem}.anchors"], x / np.where(peaks > 0, peaks / LARGEST, 1))
            unit = FACTORS[third(place, len(layers))] * sigma[place, kind]
            for deltas in _deltas(x):
                for i, level in enumerate(levels):
                    _count(counts[f"{stem}.deltas.{i}"], deltas / (level * unit))
    return {
        "levels": torch.tensor(levels, dtype=torch.float64),
        "layers": torch.tensor(layers),
        "sigma": torch.from_numpy(sigma),
        **{k: torch.from_numpy(table(x)) for k, x in counts.items()},
    }


def _matrices(block: KVBlock, layers: Sequence[int]) -> Iterable[tuple[int, int, Floats]]:
    """Keys and values of layers, [T, C]."""
    for layer in block.layers:
        for kind, x in enumerate((layer.keys, layer.values)):
            if x.numel():
                yield layers.index(layer.layer_idx), kind, tokens_of(x)


def _deltas(x: Floats) -> Iterable[Floats]:
    """Differences to the anchors, [n, C]; anchors themselves are left out."""
    for phase in _PHASES:
        whole = (len(x) - phase) // GROUP
        groups = x[phase : phase + whole * GROUP].reshape(whole, GROUP, -1)
        yield (groups[:, 1:] - groups[:, :1]).reshape(-1, x.shape[1])


def _count(counts: Counts, values: NDArray[np.floating[Any]]) -> None:
    """Add what [n, C] round to, numbers that have no symbol as `ESCAPE`."""
    bins = np.rint(values)
    bins = np.where(np.abs(bins) <= LARGEST, bins + LARGEST, ESCAPE).astype(np.int64)
    places = bins + SYMBOLS * np.arange(len(counts))
    counts += np.bincount(places.reshape(-1), minlength=counts.size).reshape(counts.shape)


def table(counts: Counts) -> NDArray[np.int16]:
    """The frequencies that counts [C, 256] make: rows that add up to 4096."""
    out = np.zeros(counts.shape, np.int64)
    for row, seen in zip(out, counts, strict=True):
        inside = np.flatnonzero(np.append(seen[:ESCAPE], 0))
        low = max(min(inside.min(initial=LARGEST), LARGEST) - _MARGIN, 0)
        high = min(max(inside.max(initial=LARGEST), LARGEST) + _MARGIN, 2 * LARGEST)
        part = seen[low : high + 1] + _UNSEEN
        escapes = seen[ESCAPE] + _UNSEEN
        scale = TOTAL / (part.sum() + escapes)
        row[low : high + 1] = np.maximum(np.rint(part * scale), 1)
        row[ESCAPE] = max(round(escapes * scale), 1)
        missing = TOTAL - row.sum()
        while missing:  # what is too much is taken from the largest ones, in turn
            mode = row.argmax()
            step = missing if missing > 0 else -min(-missing, max(row[mode] // 8, 1))
            row[mode] += step
            missing -= step
    return out.astype(np.int16)


def summary(artefact: Artefact) -> "Sequence[tuple[str, str]]":
    """Rows for the command line: the levels, each layer's numbers, and how they were measured."""
    tensors = artefact.tensors
    levels = "/".join(str(x) for x in tensors["levels"].tolist())
    rows = [
        (f"layer {i}", f"sigma of keys {k:.3g}, of values {v:.3g}")
        for i, (k, v) in zip(tensors["layers"].tolist(), tensors["sigma"].tolist(), strict=True)
    ]
    return [("levels", levels), *rows, *artefact.settings.items()]
