# SPDX-License-Identifier: Apache-2.0
"""A recall model whose weights are set by hand: an instrument whose readings follow from theory.

`recall_model` is an ordinary transformers Llama of two layers that answers ``BOS k1 v1 k2 v2 ...
SEP k`` with the value of `k`, exactly, from a hundred to thousands of tokens. It is an induction
circuit (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits") with nothing else
in the way, so what a policy keeps decides what it scores: the answer is right if and only if the
value's entry of one KV head, `RETRIEVAL_HEAD`, is still held when the key is asked for. A policy
that knows nothing of the question and keeps a fraction f of the tokens scores f.

How it works. The residual stream holds five separate parts: a constant; a mark (of `BOS`, or of the
tokens without a code); A, a random unit vector that is the token's code; B, the code of the token
before it; and C, the output.

- Layer 0, query head 0 attends to the token before (`LOCAL_HEAD`) and copies its A to B. Its query
  and key are constants on the fastest rotary pairs, the key's phase one step ahead, so that the
  logit has its peak at distance 1.
- Layer 1, query head 0 matches its A with the B of all tokens before it, and copies the A of the
  match to C. It uses the slowest rotary pairs, which do not turn over these lengths. Where nothing
  matches, it attends to BOS and answers nothing.
- `lm_head` reads C. All other heads are idle: their logits are 0 everywhere and their output
  unused.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvlib.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = [
    "BOS",
    "IDLE_HEADS",
    "LOCAL_HEAD",
    "RETRIEVAL_HEAD",
    "SEP",
    "RecallPrompt",
    "recall_model",
    "recall_prompt",
]

BOS, SEP = 0, 1
"""Ids of the first token and of the separator; all other ids are keys and values."""

LOCAL_HEAD, RETRIEVAL_HEAD = (0, 0), (1, 0)
"""(layer, KV head) that attends to the previous token, and that finds the answer."""

IDLE_HEADS = ((0, 1), (1, 1))
"""(layer, KV head) whose queries attend to everything alike and are not used."""

_HIDDEN, _HEAD_DIM, _CODE = 192, 128, 62
_CONST, _MARK, _PLAIN = 0, 1, 188
_A, _B, _C = (slice(2 + i * _CODE, 2 + (i + 1) * _CODE) for i in range(3))
_THETA = 1e12
_FAST_PAIRS = 16
_LOCAL_LOGIT = 400.0  # at distance 1; distance 0 and 2 come 20 below it
_MATCH_LOGIT = 60.0
_SINK = 0.72  # of a match; codes of other tokens reach 0.6 of one at most
_OUTPUT_LOGIT = 30.0


def recall_model(
    vocab_size: int = 1024,
    *,
    max_position_embeddings: int = 16384,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> "LlamaForCausalLM":
    """The hand-set recall model: 2 layers, 4 query and 2 KV heads of 128 channels, in eval mode.

    Args:
        vocab_size: ids, `BOS` and `SEP` included: two for each pair of the longest prompt, and two.
        max_position_embeddings: in the config; nothing depends on it.
        dtype: of the weights. Recall is exact in float32 up to 8,001 tokens at least, in bfloat16
            up to 1,001.
        seed: of the codes.

    Raises:
        ConfigError: a vocabulary without keys and values.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if vocab_size < 4:
        raise ConfigError(f"a recall model needs a vocabulary of 4 or more, got {vocab_size}")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=_HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=_HEAD_DIM,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        _set_weights(model, _codes(vocab_size, seed))
    nn.Module.to(model, dtype)
    model.train(False)
    return model


def _codes(vocab_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = nn.functional.normalize(torch.randn((vocab_size, _CODE), generator=generator))
    codes[[BOS, SEP]] = 0
    return codes


def _set_weights(model: "LlamaForCausalLM", codes: Tensor) -> None:
    embedding = model.model.embed_tokens.weight
    embedding[:, _CONST] = 1
    embedding[:, _A] = codes
    embedding[BOS, _MARK] = 1
    embedding[SEP, _PLAIN] = 1  # so that all tokens are equally long
    first, second = model.model.layers
    # RMSNorm divides by the length over sqrt(hidden): sqrt(2) before layer 0, and after it sqrt(3),
    # or sqrt(2) where the token before has no code. These weights undo it for most tokens.
    first.input_layernorm.weight.fill_((2 / _HIDDEN) ** 0.5)
    second.input_layernorm.weight.fill_((3 / _HIDDEN) ** 0.5)
    model.model.norm.weight.fill_((4 / _HIDDEN) ** 0.5)
    _previous_token_head(first.self_attn)
    _match_head(second.self_attn)
    model.lm_head.weight[:, _C] = _OUTPUT_LOGIT * codes


def _previous_token_head(attention: nn.Module) -> None:
    """KV head 0 of layer 0: the logit is the sum of cos(w (distance - 1)) over the fast pairs."""
    half = _HEAD_DIM // 2
    pairs = torch.arange(_FAST_PAIRS)
    turn = _THETA ** (-pairs.double() / half)  # radians a token
    size = (_LOCAL_LOGIT * _HEAD_DIM**0.5 / _FAST_PAIRS) ** 0.5
    query, key, value, output = _projections(attention)
    query[pairs, _CONST] = size
    key[pairs, _CONST] = (size * turn.cos()).float()
    key[pairs + half, _CONST] = (size * turn.sin()).float()
    value[:_CODE, _A] = torch.eye(_CODE)
    output[_B, :_CODE] = torch.eye(_CODE)


def _match_head(attention: nn.Module) -> None:
    """KV head 0 of layer 1: A against B on the 31 slowest pairs, BOS against all on the next."""
    half = _HEAD_DIM // 2
    slow = half - _CODE // 2
    places = torch.cat([torch.arange(slow, half), torch.arange(slow, half) + half])
    size = (_MATCH_LOGIT * _HEAD_DIM**0.5) ** 0.5
    query, key, value, output = _projections(attention)
    query[places, _A] = size * torch.eye(_CODE)
    key[places, _B] = size * torch.eye(_CODE)
    query[slow - 1, _CONST] = size
    # BOS is shorter than other tokens after layer 0, and therefore longer after the norm.
    key[slow - 1, _MARK] = size * _SINK * (2 / 3) ** 0.5
    value[:_CODE, _A] = torch.eye(_CODE)
    output[_C, :_CODE] = torch.eye(_CODE)


def _projections(attention: nn.Module) -> list[Tensor]:
    return [getattr(attention, f"{name}_proj").weight for name in "qkvo"]


@dataclass(frozen=True, slots=True)
class RecallPrompt:
    """Pairs to remember.

    Attributes:
        input_ids: BOS, then a key and its value in turns.
        keys: in the order of the prompt; no key is a value, and none comes twice.
        values: of the keys.
    """

    input_ids: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]

    def question(self, index: int) -> tuple[int, ...]:
        """What follows the prompt to ask for `values[index]`."""
        return (SEP, self.keys[index])


def recall_prompt(num_pairs: int, vocab_size: int = 1024, *, seed: int = 0) -> RecallPrompt:
    """A prompt of 1 + 2 `num_pairs` tokens for `recall_model(vocab_size)`.

    Raises:
        ConfigError: the vocabulary has too few ids for that many pairs.
    """
    if not 0 < num_pairs <= (vocab_size - 2) // 2:
        raise ConfigError(
            f"{num_pairs} pairs of a vocabulary of {vocab_size}: from 1 to {(vocab_size - 2) // 2} "
            "are possible"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randperm(vocab_size - 2, generator=generator) + 2).tolist()
    keys, values = ids[:num_pairs], ids[num_pairs : 2 * num_pairs]
    pairs = [token for pair in zip(keys, values, strict=True) for token in pair]
    return RecallPrompt((BOS, *pairs), tuple(keys), tuple(values))
