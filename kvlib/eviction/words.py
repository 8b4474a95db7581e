# SPDX-License-Identifier: Apache-2.0
"""Text that policies write behind a prompt."""

from typing import Any

import torch
from torch import Tensor

from kvlib.errors import ConfigError

__all__ = ["end_of_turn", "token_ids"]


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """Int64 [n]: a text without the tokenizer's own beginning and end.

    Raises:
        ConfigError: that is no tokenizer.
    """
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
        raise ConfigError(
            "expected the model's tokenizer, such as AutoTokenizer.from_pretrained(...) gives, got "
            f"{tokenizer!r:.80}"
        )
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)


def end_of_turn(tokenizer: Any) -> str:
    """What a chat template writes between a user's text and the answer; a line break without."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n"
    mark = "#" * 13
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    return str(text).rpartition(mark)[2]
