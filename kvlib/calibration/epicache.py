# SPDX-License-Identifier: Apache-2.0
"""EpiCache's layer sensitivities: how far keys move when tokens cannot look far (arXiv 2509.17396).

A text is read twice: with full attention, and with every token seeing only the first `sinks` tokens
and the last `window` (itself included). For each layer, sigma is the cosine between the keys of the
two passes, averaged over KV heads and tokens, and its sensitivity is 1 - sigma. Block-wise eviction
does to a prompt something like the second pass, so a sensitive layer gets more of the budget.

The mean is over all tokens, as in the paper: those within sinks and window see everything, and
lower all layers alike. (The authors' code compares windows of 100 tokens at a time and normalises
the cosines of all layers to [0, 1].) One text is enough: the paper finds the same order of layers
with 1 and with 100 documents, in three domains. Keys are compared after the rotary embedding, which
turns both in the same way.

The first layer's keys depend on no attention, so its sensitivity is 0. Layers with a sliding window
are left out: policies do not see them either.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvlib.artefacts import Artefact, model_identity, save_artefact
from kvlib.cache import KVCache
from kvlib.cache_layers import EvictableLayer
from kvlib.calibration.text import sample_prompt
from kvlib.errors import ConfigError
from kvlib.eviction.epicache import EpiCache
from kvlib.model_hooks import AttentionCall, decoder_of
from kvlib.model_spec import spec_for_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvlib.calibration import Progress

__all__ = ["calibrate", "key_similarity", "summary"]

_PIECE = 512  # tokens of a pass: a mask of all pairs would grow with the square of the text


def calibrate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    model_id: str | None,
    out: str | Path,
    *,
    progress: "Progress" = lambda done, total: None,
    tokens: int = 2048,
    window: int = 512,
    sinks: int = 128,
    seed: int = 0,
) -> Artefact:
    """Measure the sensitivities and write them to a file for ``epicache:profile=FILE``.

    The artefact's tensors are ``layers`` int64 [L], the layers that policies see, and
    ``sensitivity`` float32 [L].

    Args:
        model: a decoder that `KVCache` takes.
        tokenizer: its tokenizer; None for random tokens instead of text.
        model_id: identity of the weights, for models that came from no hub and no folder.
        out: the file; one that is there is replaced.
        progress: told of every piece of either pass.
        tokens: of the text.
        window: tokens that the second pass sees back, the token itself included.
        sinks: first tokens that it sees anyway (the authors' 128).
        seed: of the place that the text is taken from.

    Raises:
        ConfigError: sizes that make no sense, or a text that is too short.
    """
    if window < 1 or sinks < 0 or tokens <= window + sinks:
        raise ConfigError(
            f"the text has to be longer than window and sinks together, got {tokens} tokens, "
            f"window {window} (1 or more) and {sinks} sinks (0 or more)"
        )
    spec = spec_for_model(model, model_id=model_id)
    ids = sample_prompt(model, tokenizer, tokens, torch.Generator().manual_seed(seed))
    found = key_similarity(model, ids, window=window, sinks=sinks, progress=progress)
    sensitivity = [max(1 - sigma, 0.0) for sigma in found.values()]
    return save_artefact(
        out,
        kind=EpiCache.name,
        model=model_identity(spec),
        tensors={
            "layers": torch.tensor(list(found)),
            "sensitivity": torch.tensor(sensitivity, dtype=torch.float32),
        },
        settings={"tokens": tokens, "window": window, "sinks": sinks, "seed": seed},
    )


@torch.no_grad()
def key_similarity(
    model: "PreTrainedModel",
    ids: Tensor,
    *,
    window: int,
    sinks: int,
    progress: "Progress" = lambda done, total: None,
) -> dict[int, float]:
    """The mean cosine between keys of both passes, by layer.

    Args:
        model: see `calibrate`.
        ids: int64 [1, T].
        window: see `calibrate`.
        sinks: see `calibrate`.
        progress: see `calibrate`.

    Raises:
        ConfigError: the model has no layers with full attention.
    """
    pieces = ids.to(model.device).split(_PIECE, dim=1)
    whole, narrow = KVCache(model), _Narrow(model)
    done = 0
    for cache in (whole, narrow):
        for piece in pieces:
            if isinstance(cache, _Narrow):
                cache.look_at(window, sinks, piece.shape[1])
            decoder_of(model)(input_ids=piece, past_key_values=cache, use_cache=True)
            done += 1
            progress(done, 2 * len(pieces))
    layers = [i for i, layer in enumerate(whole.layers) if isinstance(layer, EvictableLayer)]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layers with full attention: nothing to share out"
        )
    out = {}
    for index in layers:
        full, near = (cache.layer_kv(index).keys.double() for cache in (whole, narrow))
        out[index] = torch.cosine_similarity(full, near, dim=-1).mean().item()
    return out


class _Narrow(KVCache):
    """A full cache whose layers see sinks and a window only."""

    mask: Tensor

    def look_at(self, window: int, sinks: int, num: int) -> None:
        """What the next `num` tokens may see."""
        past = self.num_columns
        query = torch.arange(past, past + num)[:, None]
        entry = torch.arange(past + num)
        seen = (entry <= query) & ((entry < sinks) | (entry > query - window))
        weight = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        self.mask = weight[None, None]

    def attend(self, key: Tensor, call: AttentionCall) -> Tensor | None:
        index: int = getattr(call.module, "layer_idx")  # noqa: B009
        if isinstance(self.layers[index], EvictableLayer):
            call = replace(call, mask=self.mask.to(call.query))
        return super().attend(key, call)


def summary(artefact: Artefact) -> "Sequence[tuple[str, str]]":
    """Rows for the command line: each layer's number, and how it was measured."""
    pairs: list[list[Any]] = [artefact.tensors[x].tolist() for x in ("layers", "sensitivity")]
    rows = [(f"layer {i}", f"sensitivity {s:.2e}") for i, s in zip(*pairs, strict=True)]
    return [*rows, *artefact.settings.items()]
