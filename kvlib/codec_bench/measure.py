# SPDX-License-Identifier: Apache-2.0
"""What a codec costs a model on real text, and how many bits it takes.

The model reads the beginning of a text. Its keys and values, cast to the dtype of the cache, are
the reference: a continuation of the text is read behind them once as they are, and once as a codec
gives them back. Rates are whole containers: headers, tables and checksums are in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvlib.blocks import KVBlock
from kvlib.calibration.codec_trial import continuation_logits, prefill
from kvlib.calibration.documents import test_documents
from kvlib.codecs import Codec, decode_block, describe_codec, encode_block
from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError
from kvlib.evals.models import EvalModel
from kvlib.model_spec import spec_for_model
from kvlib.spec import KVSpec, LayerKind

__all__ = [
    "Document",
    "Quality",
    "Task",
    "check_codec",
    "decode_with",
    "measure",
    "prepare",
    "spec_of",
    "texts_of",
]

_ROWS = 64  # of logits that are compared at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is run.

    Attributes:
        tokens: that are cached.
        following: tokens of the continuation.
        record: tokens of a container.
        dtype: of the cache.
    """

    tokens: int
    following: int
    record: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Quality:
    """One method on one document.

    Attributes:
        bits: stored, for each key and value number.
        kl: from the reference, nats, mean over the continuation.
        top1: share of the continuation where the likeliest token is the reference's.
        nll: nats a token of the text itself.
    """

    bits: float
    kl: float
    top1: float
    nll: float


@dataclass(frozen=True, slots=True)
class Document:
    """A cached text.

    Attributes:
        name: of the text.
        blocks: its KV in the dtype of the cache, a record each.
        ids: [1, n] of the continuation.
        targets: [n], the token after each of them.
        logits: [n, vocabulary] float32 behind the reference.
        nll: of the text behind the reference.
        cast_kl: from the model's own KV to the reference.
    """

    name: str
    blocks: tuple[KVBlock, ...]
    ids: Tensor
    targets: Tensor
    logits: Tensor
    nll: float
    cast_kl: float

    @property
    def values(self) -> int:
        """Numbers in keys and values."""
        return sum(x.keys.numel() + x.values.numel() for b in self.blocks for x in b.layers)


def spec_of(loaded: EvalModel, dtype: str) -> KVSpec:
    """The spec of a model's cache in another dtype.

    Raises:
        ConfigError: a layer forgets tokens, or keeps none.
    """
    spec = replace(spec_for_model(loaded.model, model_id=loaded.model_id), dtype=dtype)
    spec.require((LayerKind.FULL,), "kvlib bench codec")
    return spec


def check_codec(codec: Codec, spec: KVSpec) -> None:
    """Find out before minutes of measuring whether a codec takes such blocks.

    Raises:
        ConfigError, UnsupportedInputError: it does not.
    """
    codec.caps(spec)
    dtype = getattr(torch, spec.dtype)
    heads = [(x.num_kv_heads, x.k_head_dim, x.v_head_dim) for x in spec.layers]
    pairs = [(torch.ones(h, 1, k, dtype=dtype), torch.ones(h, 1, v, dtype=dtype))
             for h, k, v in heads]  # fmt: skip
    encode_block(KVBlock.dense(spec, pairs), codec)


def texts_of(
    loaded: EvalModel, task: Task, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Token ids [1, n] of each document, by name; random ones for a model without text.

    Args:
        loaded: the model.
        task: how many are needed.
        names: of the documents that are wanted; all by default.

    Raises:
        ConfigError: no such document, or one that is too short.
    """
    texts = test_documents()
    if unknown := [name for name in names or () if name not in texts]:
        raise ConfigError(f"documents are {', '.join(texts)}; got {', '.join(unknown)}")
    size = task.tokens + task.following + 1
    out = {}
    for index, name in enumerate(names or texts):
        if loaded.tokenizer is None:
            generator = torch.Generator().manual_seed(index)
            vocabulary = loaded.model.config.get_text_config(decoder=True).vocab_size
            out[name] = torch.randint(0, vocabulary, (1, size), generator=generator)
            continue
        ids = loaded.tokenizer(texts[name])["input_ids"]
        if len(ids) < size:
            raise ConfigError(
                f"document {name!r} has {len(ids)} tokens for this model; {size} are needed: give "
                "fewer with --tokens or --following, or leave it out with --documents"
            )
        out[name] = torch.tensor([ids[:size]])
    return out


@torch.no_grad()
def prepare(loaded: EvalModel, spec: KVSpec, name: str, ids: Tensor, task: Task) -> Document:
    """Read a document: its reference cache, and what the model says behind it.

    Args:
        loaded: the model.
        spec: of the cache.
        name: of the document.
        ids: see `texts_of`.
        task: see there.
    """
    model, dtype = loaded.model, getattr(torch, spec.dtype)
    own = prefill(model, ids[:, : task.tokens])
    pairs = [(k.to("cpu", dtype), v.to("cpu", dtype)) for k, v in own]
    following = ids[:, task.tokens : task.tokens + task.following]
    targets = ids[0, task.tokens + 1 :]
    block = KVBlock.dense(spec, pairs)
    logits = _logits(loaded, block, following)
    uncast = continuation_logits(model, own, following).float().cpu()
    return Document(
        name=name,
        blocks=tuple(block.split(*range(task.record, task.tokens, task.record))),
        ids=following,
        targets=targets,
        logits=logits,
        nll=_compare(logits, logits, targets)[2],
        cast_kl=_compare(uncast, logits, targets)[0],
    )


def decode_with(codec: Codec, records: Sequence[bytes], spec: KVSpec) -> list[KVBlock]:
    """Decode with this very codec, whose profile need not be found by its digest."""
    own = describe_codec(codec)

    def find(text: str) -> Codec:
        if text != own:
            raise IncompatibleDataError(f"a record of {text!r:.120} instead of {own!r:.120}")
        return codec

    return [decode_block(record, spec, codec_for=find) for record in records]


@torch.no_grad()
def measure(
    loaded: EvalModel, document: Document, codec: Codec, put_back: Sequence[int] = (0,)
) -> list[Quality]:
    """Encode and decode a document's cache, and read the continuation behind the result.

    Args:
        loaded: the model.
        document: what `prepare` made.
        codec: on trial.
        put_back: for each result, first tokens that are exact after decoding and whose bytes are
            added; ascending, and not more than a record has.

    Raises:
        CorruptDataError: a lossless codec lost something.
    """
    spec = document.blocks[0].spec
    records = [b"".join(encode_block(block, codec)) for block in document.blocks]
    decoded = decode_with(codec, records, spec)
    if codec.lossless and not all(
        a.equal(b) for a, b in zip(decoded, document.blocks, strict=True)
    ):
        raise CorruptDataError(f"{describe_codec(codec)} is called lossless and is not")
    block = KVBlock.join(decoded)
    stored = sum(map(len, records))
    exact = document.blocks[0]
    out = []
    for count in put_back:
        for mine, true in zip(block.layers, exact.layers, strict=True):
            mine.keys[:, :count] = true.keys[:, :count]
            mine.values[:, :count] = true.values[:, :count]
        size = stored + count * spec.bytes_per_token()
        logits = _logits(loaded, block, document.ids)
        kl, top1, nll = _compare(document.logits, logits, document.targets)
        out.append(Quality(8 * size / document.values, kl, top1, nll))
    return out


def _logits(loaded: EvalModel, block: KVBlock, ids: Tensor) -> Tensor:
    """Behind a block, in the model's own dtype: float32 [n, vocabulary] on the CPU."""
    where, dtype = loaded.model.device, loaded.model.dtype
    pairs = [(x.keys.to(where, dtype), x.values.to(where, dtype)) for x in block.layers]
    return continuation_logits(loaded.model, pairs, ids).float().cpu()


def _compare(true: Tensor, mine: Tensor, targets: Tensor) -> tuple[float, float, float]:
    """KL from `true`, share of equal first choices, and nats a token of the targets."""
    kl = agree = nll = 0.0
    for at in range(0, len(true), _ROWS):
        p, q = (torch.log_softmax(x[at : at + _ROWS].double(), dim=-1) for x in (true, mine))
        kl += float((p.exp() * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        nll -= float(q.gather(1, targets[at : at + _ROWS, None]).sum())
    return kl / len(true), agree / len(true), nll / len(true)
