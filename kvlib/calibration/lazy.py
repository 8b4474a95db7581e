# SPDX-License-Identifier: Apache-2.0
"""The window of `lazy` for one model: how long its tokens stay quiet before they are needed again.

The model continues some texts greedily with nothing evicted. Every token's maximum recurrence
interval is noted in all layers and heads, and the window is the 80th percentile of those that were
active at all: the smallest number that at least 80% of the intervals do not exceed.

The paper measures on about 1% of the task's own samples, and the window depends on the task; here
the texts are Python's own help topics, which every machine has. Intervals cannot be longer than
what is generated, so a window for long chains of thought needs many new tokens.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlib.artefacts import Artefact, model_identity, save_artefact
from kvlib.cache import KVCache
from kvlib.cache_layers import EvictableLayer
from kvlib.calibration.text import sample_prompt
from kvlib.errors import ConfigError
from kvlib.eviction.lazy import Lazy
from kvlib.model_spec import spec_for_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvlib.calibration import Progress

__all__ = ["calibrate", "percentile_80"]

_WITHOUT_END = 2**31 - 1  # tokens: nothing is evicted, everything is observed


def calibrate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    model_id: str | None,
    out: str | Path,
    *,
    progress: "Progress" = lambda done, total: None,
    samples: int = 8,
    tokens: int = 512,
    new_tokens: int = 256,
    alpha: float = 1e-4,
    group: str = "max",
    seed: int = 0,
) -> Artefact:
    """Measure the window and write it to a file for ``lazy:profile=FILE``.

    The artefact's tensors are `window`, an int64 scalar, and `max_recurrence`, int64
    [new_tokens + 1]: how many entries had each interval; those at 0 were never active.

    Args:
        model: a decoder that `KVCache` takes.
        tokenizer: its tokenizer; None for random tokens instead of text.
        model_id: identity of the weights, for models that came from no hub and no folder.
        out: the file; one that is there is replaced.
        progress: told of every sample.
        samples: texts.
        tokens: tokens of each that the model reads.
        new_tokens: tokens that it then generates, whether or not it would end before.
        alpha: attention from which a token is active; the policy's.
        group: how the query heads of a KV head are reduced; the policy's.
        seed: of the places that texts are taken from.

    Raises:
        ConfigError: sizes below 1, a text that is too short, or no attention of at least alpha.
    """
    if min(samples, tokens, new_tokens) < 1:
        raise ConfigError(
            f"samples, tokens and new tokens must be 1 or more, got {samples}, {tokens} and "
            f"{new_tokens}"
        )
    policy = Lazy(budget=_WITHOUT_END, alpha=alpha, group=group)
    spec = spec_for_model(model, model_id=model_id)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(new_tokens + 1, dtype=torch.int64)
    for done in range(1, samples + 1):
        prompt = sample_prompt(model, tokenizer, tokens, generator)
        for found in _intervals(model, prompt, policy, new_tokens):
            counts += torch.bincount(found.flatten().cpu(), minlength=new_tokens + 1)
        progress(done, samples)
    return save_artefact(
        out,
        kind=Lazy.name,
        model=model_identity(spec),
        tensors={"window": torch.tensor(percentile_80(counts)), "max_recurrence": counts},
        settings={
            "samples": samples,
            "tokens": tokens,
            "new_tokens": new_tokens,
            "alpha": float(alpha),
            "group": group,
            "seed": seed,
        },
    )


def percentile_80(counts: Tensor) -> int:
    """The smallest interval that at least 80% of all but those of 0 do not exceed.

    Args:
        counts: int64, how often there was each interval from 0 on.

    Raises:
        ConfigError: there are none above 0.
    """
    active = counts[1:]
    total = int(active.sum())
    if total == 0:
        raise ConfigError(
            "no token ever got attention of alpha or more: calibrate with a smaller alpha"
        )
    enough = 5 * active.cumsum(0) >= 4 * total
    return 1 + int(enough.nonzero()[0, 0])


@torch.no_grad()
def _intervals(
    model: "PreTrainedModel", prompt: Tensor, policy: Lazy, new_tokens: int
) -> list[Tensor]:
    """The maximum recurrence interval of every entry, by layer, after a greedy continuation."""
    cache = KVCache(model, policy)
    ids = prompt.to(model.device)
    for _ in range(new_tokens + 1):  # the prompt, then each new token
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
    layers = [layer for layer in cache.layers if isinstance(layer, EvictableLayer)]
    return [layer.states[0].entries["max_recurrence"] for layer in layers]
