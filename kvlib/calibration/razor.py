# SPDX-License-Identifier: Apache-2.0
"""RazorAttention's head search: which heads look back at repetitions (arXiv 2407.15891).

The model reads random tokens that come four times over: BOS, then a block of `block` distinct ids
and the same block again and again. A head that attends to earlier occurrences of the current token
has a high **echo** score; one that attends to the tokens that followed those has a high
**induction** score, whatever the tokens mean. For query i (counted after BOS) in blocks 2 to 4 and
all earlier occurrences j of its token, echo adds up attention[i, j] and induction attention[i, j +
1]; both are means over these queries and over some draws of the block. A perfect copying head has
induction 1. Attention to BOS counts for nothing, and rows are not normalised again without it.

Distances matter, and so do draws. On SmolLM2-135M the echo head is layer 7's KV head 2 with blocks
as long as the model can read, which one of three draws put second, and another head with blocks of
1,000 tokens. Without it, a number in a context of 4,096 tokens is seldom found again, even if a
third of the heads is taken by induction.

The score of a KV head is the highest of its query heads'. Layers with a sliding window are left
out: policies do not see them either.

Only the attention at those few places is kept of each row, so no matrix of all pairs is ever held.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvlib.artefacts import Artefact, model_identity, save_artefact
from kvlib.attention import Logits, attention_at
from kvlib.blocks import LayerKV
from kvlib.cache import KVCache
from kvlib.errors import ConfigError
from kvlib.eviction.head_roles import retrieval_heads
from kvlib.model_hooks import AttentionCall, decoder_of
from kvlib.model_spec import layer_specs, spec_for_model
from kvlib.spec import LayerKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvlib.calibration import Progress

__all__ = ["REPEATS", "calibrate", "diagonal_scores", "repeated_block", "summary"]

REPEATS = 4
"""Times that the block comes."""


def calibrate(
    model: "PreTrainedModel",
    tokenizer: Any,
    model_id: str | None,
    out: str | Path,
    *,
    progress: "Progress" = lambda done, total: None,
    block: int = 2500,
    draws: int = 3,
    induction: float = 0.14,
    echo: float = 0.01,
    seed: int = 0,
) -> Artefact:
    """Score every KV head of a model and write ``razor:profile=FILE``.

    Tensors of the artefact: ``layers`` int64 [L], the layers that policies see; ``induction`` and
    ``echo`` float32 [L, Hkv]; ``retrieval`` bool [L, Hkv], the heads that these shares choose.

    Args:
        model: a decoder with rotary embeddings, in eval mode.
        tokenizer: its own; None for a model without text.
        model_id: identity of a model that came from no hub and no folder.
        out: the file.
        progress: told of every layer.
        block: random tokens that are repeated; fewer if `REPEATS` blocks do not fit into the
            model's `max_position_embeddings`, or if it has no more ordinary tokens. The artefact's
            settings say how many there were. A shorter block is quicker to read and measures
            shorter distances only, at which other heads may echo best.
        draws: blocks to average over.
        induction: share of KV heads for ``retrieval``; the policy may choose others.
        echo: likewise.
        seed: of the blocks.

    Raises:
        ConfigError: a model without rotary embeddings or without full-attention layers, or too
            short a block.
    """
    specs = layer_specs(model.config.get_text_config(decoder=True))
    layers = [i for i, spec in enumerate(specs) if spec.kind is LayerKind.FULL]
    plain = [i for i in layers if specs[i].rope is None]
    if plain or not layers:
        raise ConfigError(
            f"{type(model).__name__} has "
            + (f"no rotary embedding in layers {plain}" if plain else "no full-attention layers")
            + ": razor's head search is for layers with both"
        )
    if draws < 1:
        raise ConfigError(f"draws must be 1 or more, got {draws}")
    if not (0 <= induction <= 1 and 0 <= echo <= 1):
        raise ConfigError(f"induction and echo are shares in [0, 1], got {induction} and {echo}")
    identity = model_identity(spec_for_model(model, model_id=model_id))
    total = draws * len(layers)
    sums: dict[int, Tensor] = {}
    for draw in range(draws):
        ids, start, size = repeated_block(model, tokenizer, block, seed=seed + draw)
        progress(draw * len(layers), total)

        def note(index: int, scores: Tensor) -> None:
            sums[index] = sums.get(index, 0) + scores / draws
            progress(draw * len(layers) + layers.index(index) + 1, total)  # noqa: B023 (called now)

        _watch(model, ids, start, size, note)
    by_head = torch.stack([sums[index].amax(-1) for index in layers])  # [L, 2, Hkv]
    echoes, inductions = by_head.float().unbind(1)
    return save_artefact(
        out,
        kind="razor",
        model=identity,
        tensors={
            "layers": torch.tensor(layers),
            "induction": inductions,
            "echo": echoes,
            "retrieval": retrieval_heads(inductions, echoes, induction, echo),
        },
        settings={
            "block": size,
            "repeats": REPEATS,
            "bos": start,
            "draws": draws,
            "induction": induction,
            "echo": echo,
            "seed": seed,
        },
    )


def repeated_block(
    model: "PreTrainedModel", tokenizer: Any, block: int, *, seed: int
) -> tuple[Tensor, int, int]:
    """Random tokens `REPEATS` times over, after BOS if the model has one.

    Returns:
        Token ids [1, n], how many come before the first block (0 or 1), and the block's size, see
        `calibrate`.

    Raises:
        ConfigError: the block has fewer than two tokens.
    """
    config = model.config.get_text_config(decoder=True)
    known: Any = config if tokenizer is None else tokenizer
    bos = getattr(known, "bos_token_id", None)
    ordinary = _ordinary_ids(config, tokenizer)
    longest = getattr(config, "max_position_embeddings", None)
    limits = [block, len(ordinary)]
    if longest is not None:
        limits.append((longest - (bos is not None)) // REPEATS)
    size = min(limits)
    if size < 2:
        raise ConfigError(
            f"a block of {size} tokens is no repetition to look back at: asked for {block}, the "
            f"model has {len(ordinary)} ordinary tokens and {longest} positions"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(ordinary)[torch.randperm(len(ordinary), generator=generator)[:size]]
    start = [] if bos is None else [bos]
    ids = torch.cat([torch.tensor(start, dtype=torch.int64), chosen.repeat(REPEATS)])
    return ids[None], len(start), size


def _ordinary_ids(config: Any, tokenizer: Any) -> list[int]:
    """Ids of the vocabulary that are no special and no added tokens, ascending."""
    size = int(config.vocab_size)
    special: set[Any] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(config, name, None)
        special |= set(given) if isinstance(given, list) else {given}
    if tokenizer is not None:
        size = min(size, len(tokenizer))
        special |= {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [index for index in range(size) if index not in special]


class _Watched(KVCache):
    """A full cache that hands on what every layer attends with."""

    look: Callable[[int, Tensor, LayerKV, Logits], None]

    def attend(self, key: Tensor, call: AttentionCall) -> Tensor | None:
        output = super().attend(key, call)
        if output is not None:  # else the layer has a sliding window
            index: int = getattr(call.module, "layer_idx")  # noqa: B009
            self.look(index, call.query[0], self.layer_kv(index), call.logits())
        return output


@torch.no_grad()
def _watch(
    model: "PreTrainedModel",
    ids: Tensor,
    start: int,
    block: int,
    note: Callable[[int, Tensor], None],
) -> None:
    """Run a prompt and hand on the `diagonal_scores` of each full-attention layer."""

    def look(index: int, query: Tensor, layer: LayerKV, logits: Logits) -> None:
        note(index, diagonal_scores(query, layer, start, block, logits).cpu())

    cache = _Watched(model)
    cache.look = look
    decoder_of(model)(ids.to(model.device), past_key_values=cache, use_cache=True)


def diagonal_scores(
    query: Tensor, layer: LayerKV, start: int, block: int, logits: Logits
) -> Tensor:
    """Echo and induction score of every query head: float64 [2, Hkv, G].

    Args:
        query: [Hq, T, D], of a repeated block, after the rotary embedding.
        layer: with all T tokens.
        start: tokens before the first block.
        block: tokens of a block.
        logits: how the layer makes logits.
    """
    num = query.shape[1] - start
    rows = torch.arange(block, num, device=query.device)
    back = block * torch.arange(1, num // block, device=query.device)
    echo = rows[:, None] - back  # earlier occurrences of each query's token, after BOS
    columns = torch.cat([echo, echo + 1], dim=1)
    exists = torch.cat([echo, echo], dim=1) >= 0
    # The first block has nothing to look back at: its rows are not computed.
    seen = attention_at(query[:, start + block :], layer, (columns + start).clamp(min=0), logits)
    both: Tensor = (seen * exists).double().unflatten(-1, (2, -1)).sum(-1).mean(-2)
    return both.movedim(-1, 0)  # from [Hkv, G, 2]


def summary(artefact: Artefact) -> Sequence[tuple[str, str]]:
    """Name and text of what `kvlib calibrate` prints."""
    tensors = artefact.tensors
    layers, marks = tensors["layers"].tolist(), tensors["retrieval"]
    rows = [
        (
            f"layer {layers[place]}, KV head {head}",
            f"induction {float(tensors['induction'][place, head]):.3f}, "
            f"echo {float(tensors['echo'][place, head]):.3f}",
        )
        for place, head in marks.nonzero().tolist()
    ]
    size, repeats = artefact.settings["block"], artefact.settings["repeats"]
    measured = f"{size} random tokens, {repeats} times, {artefact.settings['draws']} draws"
    chosen = f"{int(marks.sum())} of {marks.numel()} KV heads"
    return [("measured on", measured), ("retrieval heads", chosen), *rows]
