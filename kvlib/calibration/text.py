# SPDX-License-Identifier: Apache-2.0
"""Text to measure a model on, which every machine has: Python's own help topics."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlib.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["sample_prompt"]

_CHARACTERS = 16  # of text for each token asked for; few tokens are longer


def sample_prompt(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    num: int,
    generator: torch.Generator,
) -> Tensor:
    """Int64 [1, num]: a piece of text from anywhere, or random tokens."""
    if tokenizer is None:
        size = model.config.get_text_config(decoder=True).vocab_size
        return torch.randint(0, size, (1, num), generator=generator)
    from kvlib.demo.prompt import demo_text

    text = demo_text()
    last = max(len(text) - _CHARACTERS * num, 0)
    start = int(torch.randint(0, last + 1, (), generator=generator))
    piece = text[start : start + _CHARACTERS * num]
    ids = tokenizer(piece, truncation=True, max_length=num)["input_ids"]
    if len(ids) < num:
        raise ConfigError(
            f"a piece of the text has {len(ids)} tokens; {num} were asked for: calibrate with fewer"
        )
    return torch.tensor([ids])
