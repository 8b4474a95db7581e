# SPDX-License-Identifier: Apache-2.0
"""Codebooks for the keys of one model, as its queries see them: `leoam:codes=8,profile=FILE`.

The model reads some texts. Of each layer and KV head keys are kept, spread evenly over all
positions, and the sum of q q^T over all queries; `kvlib.store.abstracts_pq` says what is made of
the two. Keys are taken after the rotary embedding, so the texts ought to be as long as the contexts
that the codes are for: documents are put together until they are.

What codebooks of a sequence's own keys and queries gain over these is measured in docs/tiered.md.
These are there before the first token, are held once for all sequences, and make codes mean the
same to everybody, so that a store can keep them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvlib.artefacts import Artefact, model_identity, save_artefact
from kvlib.cache import KVCache
from kvlib.calibration.documents import sample_texts
from kvlib.errors import ConfigError
from kvlib.model_hooks import AttentionCall, decoder_of
from kvlib.model_spec import spec_for_model
from kvlib.spec import LayerKind
from kvlib.store.abstracts_book import CHECKSUM, KIND, checksum, tensors_of
from kvlib.store.abstracts_pq import CENTROIDS, Codebook, load_faiss
from kvlib.store.leaves import LeafShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvlib.calibration import Progress

__all__ = ["calibrate", "summary"]

_ROUNDS = 10


def calibrate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    model_id: str | None,
    out: str | Path,
    *,
    progress: "Progress" = lambda done, total: None,
    codes: int = 8,
    texts: Mapping[str, str] | None = None,
    prompts: int = 4,
    tokens: int = 4096,
    samples: int = 8192,
    seed: int = 0,
) -> Artefact:
    """Fit a codebook to every layer and write them to a file for ``leoam:codes=N,profile=FILE``.

    `kvlib.store.abstracts_book` says what is in it.

    Args:
        model: a decoder with full attention in every layer, all of the same shape, in eval mode.
        tokenizer: its tokenizer; None for random tokens instead of text.
        model_id: identity of a model that came from no hub and no folder.
        out: the file.
        progress: told of every text that was read, and of every layer that was fitted.
        codes: bytes of a code; divides the channels of a key.
        texts: documents by name; those that every machine has if None.
        prompts: texts to read.
        tokens: of each; fewer if the model reads no more.
        samples: keys of a layer that its codebook is fitted to, `CENTROIDS` or more.
        seed: of the order of the documents, and of the first centroids.

    Raises:
        ConfigError: a model with other layers, sizes that make no sense, texts that are too short,
            or faiss is not installed.
    """
    load_faiss()  # what is missing is said before minutes of reading
    spec = spec_for_model(model, model_id=model_id)
    spec.require((LayerKind.FULL,), "kvlib calibrate abstracts")
    shape = LeafShape.of(spec)
    if codes < 1 or shape.k_dim % codes:
        raise ConfigError(f"codes must divide the {shape.k_dim} channels of a key, got {codes}")
    if prompts < 1 or tokens < 1 or not samples >= CENTROIDS:
        raise ConfigError(
            f"abstracts need a text or more and {CENTROIDS} samples or more, got {prompts} texts "
            f"of {tokens} tokens and {samples} samples"
        )
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    size = tokens if longest is None else min(tokens, longest)
    pieces = sample_texts(model, tokenizer, texts, prompts, size, seed)
    if (most := sum(ids.shape[1] for ids in pieces)) < CENTROIDS:
        raise ConfigError(
            f"the texts have {most} tokens; a codebook needs {CENTROIDS} or more: give longer ones"
        )
    total = len(pieces) + spec.num_layers
    each = -(-samples // len(pieces))
    kept: list[list[Tensor]] = [[] for _ in spec.layers]
    second = torch.zeros(spec.num_layers, shape.heads, shape.k_dim, shape.k_dim).double()

    def look(index: int, query: Tensor, keys: Tensor) -> None:
        rows = query.unflatten(0, (shape.heads, -1)).flatten(1, 2).double().cpu()
        second[index] += rows.transpose(1, 2) @ rows
        spread = torch.linspace(0, keys.shape[1] - 1, min(each, keys.shape[1])).long()
        kept[index].append(keys[:, spread.to(keys.device)].float().cpu())

    for done, ids in enumerate(pieces):
        _watch(model, ids, look)
        progress(done + 1, total)
    books = []
    for index, keys in enumerate(kept):
        held = torch.cat(keys, 1)
        books.append(
            Codebook.train(
                held, second[index], parts=codes, samples=samples, rounds=_ROUNDS, seed=seed
            )
        )
        progress(len(pieces) + index + 1, total)
    identity = model_identity(spec)
    tensors = tensors_of(books)
    settings: dict[str, object] = {
        "codes": codes,
        "prompts": len(pieces),
        "tokens": size,
        "samples": samples,
        "seed": seed,
    }
    settings[CHECKSUM] = checksum(identity, settings, tensors)
    return save_artefact(out, kind=KIND, model=identity, tensors=tensors, settings=settings)


class _Watched(KVCache):
    """A full cache that hands on what every layer attends with."""

    look: Callable[[int, Tensor, Tensor], None]

    def attend(self, key: Tensor, call: AttentionCall) -> Tensor | None:
        output = super().attend(key, call)
        index: int = getattr(call.module, "layer_idx")  # noqa: B009
        self.look(index, call.query[0], self.layer_kv(index).keys)
        return output


@torch.no_grad()
def _watch(
    model: "PreTrainedModel", ids: Tensor, look: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Run a text and hand on queries [Hq, T, D] and keys [Hkv, T, D] of every layer."""
    cache = _Watched(model)
    cache.look = look
    decoder_of(model)(ids.to(model.device), past_key_values=cache, use_cache=True)


def summary(artefact: Artefact) -> Sequence[tuple[str, str]]:
    """Name and text of what `kvlib calibrate` prints."""
    layers, heads, dim = artefact.tensors["mean"].shape
    settings: Mapping[str, Any] = artefact.settings
    held = sum(x.nbytes for x in artefact.tensors.values())
    return [
        ("codebooks", f"{layers} layers, {heads} KV heads, {dim} channels"),
        ("bytes of a key", f"{settings['codes']}"),
        ("bytes in memory", f"{held:,}, once for all sequences"),
        ("fitted to", f"{settings['prompts']} texts of {settings['tokens']} tokens"),
    ]
