# SPDX-License-Identifier: Apache-2.0
"""The demo's text and question."""

from typing import TYPE_CHECKING

from kvlib.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["QUESTION", "demo_prompt", "demo_text"]

QUESTION = "In one short paragraph: what does the assert statement of Python do?"


def demo_text() -> str:
    """Long real text that every machine has: Python's own help topics, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def demo_prompt(
    tokenizer: "PreTrainedTokenizerBase", num_tokens: int
) -> tuple[list[int], list[int]]:
    """The shared prefix (exactly `num_tokens` ids of a chat with the text) and a question after it.

    Raises:
        ConfigError: the text is shorter than that.
    """
    if tokenizer.chat_template:
        marker = "@@TEXT@@"
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{marker}\n\n{QUESTION}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        before, after = str(chat).split(marker)
    else:
        before, after = "", f"\n\n{QUESTION}\n"
    prefix = tokenizer(before + demo_text(), add_special_tokens=False)["input_ids"]
    if len(prefix) < num_tokens:
        raise ConfigError(f"the demo's text has {len(prefix)} tokens; {num_tokens} were asked for")
    question = tokenizer(after, add_special_tokens=False)["input_ids"]
    return list(prefix[:num_tokens]), list(question)
