# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine has, in two halves that share no document.

Prose from Python's help topics, reference text from docstrings, and source code of the standard
library. What is calibrated on one half is measured on the other.
"""

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvlib.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "calibration_documents",
    "read_documents",
    "sample_documents",
    "sample_texts",
    "test_documents",
]

_TEST_TOPICS = ("formatstrings", "try", "with")
_TEST_DOCSTRINGS = (
    "argparse", "logging", "threading", "asyncio.queues", "asyncio.streams", "tarfile", "zipfile",
    "statistics", "random", "fractions", "datetime",
)  # fmt: skip
_TEST_SOURCES = ("textwrap", "heapq", "bisect", "shlex")
_DOCSTRINGS = (
    "email.message", "unittest.case", "_pydecimal", "subprocess", "difflib", "mailbox",
    "ipaddress", "doctest", "optparse", "inspect", "configparser",
)  # fmt: skip
_SOURCES = (
    "ast", "calendar", "csv", "fnmatch", "gettext", "imaplib", "json.decoder", "locale", "netrc",
    "poplib", "sched", "smtplib", "string",
)  # fmt: skip
_SHORTEST = 6000  # characters


def test_documents() -> dict[str, str]:
    """Three long texts to measure on, by name."""
    from pydoc_data.topics import topics

    return {
        "topics": "\n\n".join(topics[name] for name in _TEST_TOPICS),
        "docstrings": "\n\n".join(map(_docstrings, _TEST_DOCSTRINGS)),
        "source": "\n".join(map(_source, _TEST_SOURCES)),
    }


def calibration_documents() -> dict[str, str]:
    """Some 40 texts to calibrate on, by name: none of them in `test_documents`."""
    from pydoc_data.topics import topics

    found = {
        f"topic {name}": text
        for name, text in sorted(topics.items())
        if name not in _TEST_TOPICS and len(text) >= _SHORTEST
    }
    found |= {f"docstrings of {name}": _docstrings(name) for name in _DOCSTRINGS}
    found |= {f"source of {name}": _source(name) for name in _SOURCES}
    return found


def sample_documents(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    texts: Mapping[str, str] | None,
    most: int,
    size: int,
    seed: int,
) -> list[Tensor]:
    """Pieces of different documents, int64 [1, size] each, in mixed order.

    Args:
        model: whose vocabulary is meant.
        tokenizer: its tokenizer; None for random tokens instead of text.
        texts: documents by name; `calibration_documents` if None. Short ones are left out.
        most: pieces at most.
        size: tokens of each.
        seed: of the order, and of the places in the documents.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokenizer is None:
        return _random_tokens(model, most, size, generator)
    found = []
    for text in (calibration_documents() if texts is None else texts).values():
        ids = torch.tensor(tokenizer(text)["input_ids"])
        if len(ids) >= size:
            at = int(torch.randint(0, len(ids) - size + 1, (), generator=generator))
            found.append(ids[None, at : at + size])
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[i] for i in order[:most]]


def sample_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    texts: Mapping[str, str] | None,
    most: int,
    size: int,
    seed: int,
) -> list[Tensor]:
    """Documents in mixed order, one after another, cut into pieces int64 [1, size].

    Args:
        model: whose vocabulary is meant.
        tokenizer: its tokenizer; None for random tokens.
        texts: documents by name; `calibration_documents` if None.
        most: pieces at most.
        size: tokens of each; the one piece of documents that have no more may be shorter.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokenizer is None:
        return _random_tokens(model, most, size, generator)
    documents = list((calibration_documents() if texts is None else texts).values())
    ids: list[int] = []
    for i in torch.randperm(len(documents), generator=generator).tolist():
        ids += tokenizer(documents[i])["input_ids"]
        if len(ids) >= most * size:
            break
    count = min(len(ids) // size, most)
    whole = [torch.tensor([ids[i * size : (i + 1) * size]]) for i in range(count)]
    return whole or ([torch.tensor([ids])] if ids else [])


def _random_tokens(
    model: "PreTrainedModel", count: int, size: int, generator: torch.Generator
) -> list[Tensor]:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return list(torch.randint(0, vocabulary, (count, 1, size), generator=generator))


def read_documents(files: Iterable[Path]) -> dict[str, str]:
    """Text files, by name.

    Raises:
        ConfigError: one cannot be read, or is not UTF-8.
    """
    found = {}
    for file in files:
        try:
            found[str(file)] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"cannot read the text {str(file)!r}: {exc}") from exc
    return found


def _source(module: str) -> str:
    return inspect.getsource(importlib.import_module(module))


def _docstrings(module: str) -> str:
    found = importlib.import_module(module)
    return "\n\n".join([inspect.getdoc(found) or "", *_members(found, module)])


def _members(module: object, name: str) -> Iterator[str]:
    for label, thing in sorted(vars(module).items()):
        own = getattr(thing, "__module__", None) == name
        if not own or not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        yield f"{label}: {inspect.getdoc(thing) or ''}"
        if inspect.isclass(thing):
            for method, function in sorted(vars(thing).items()):
                if inspect.isfunction(function) and function.__doc__:
                    yield f"{label}.{method}: {inspect.cleandoc(function.__doc__)}"
