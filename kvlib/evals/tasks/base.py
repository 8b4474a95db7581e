# SPDX-License-Identifier: Apache-2.0
"""What a task is: contexts of an exact length in tokens, with questions that share them."""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from kvlib.errors import ConfigError
from kvlib.evals.tasks.words import WORDS, sentence
from kvlib.registry import describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Builder", "Question", "Sample", "Source", "Task", "check_at_least", "make_sample"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a context, as token ids.

    Attributes:
        question: what a policy may see before it evicts, in question-aware compression.
        prefix: comes after the eviction in any case; at least one token, so that every token of the
            answer is predicted from what was kept.
        answer: the only right one.
        evidence: positions in the context that hold the answer.
    """

    question: tuple[int, ...]
    prefix: tuple[int, ...]
    answer: tuple[int, ...]
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A context and the questions that share it."""

    context: tuple[int, ...]
    questions: tuple[Question, ...]

    def digest(self) -> str:
        """Names the token ids: results of different prompts must not be paired."""
        parts = [self.context]
        for question in self.questions:
            parts += [question.question, question.prefix, question.answer]
        text = "|".join(",".join(map(str, part)) for part in parts)
        return blake2b(text.encode(), digest_size=16).hexdigest()


@runtime_checkable
class Task(Protocol):
    """Makes samples. Implementations are frozen dataclasses: their fields are parameters.

    `version` grows with every change of the samples. `metric` is the score a task is judged by:
    ``exact``, ``token_accuracy`` or ``kl``. `needs_text` says whether it is made of text; the
    others need no tokenizer.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    status: ClassVar[str]
    metric: ClassVar[str]
    needs_text: ClassVar[bool]

    def make(self, source: "Source", length: int, rng: random.Random) -> Sample:
        """A sample with a context of exactly `length` tokens."""


def make_sample(task: Task, source: "Source", length: int, seed: int, index: int) -> Sample:
    """Sample `index` of a task: the same wherever it is made, whatever else is made.

    Raises:
        ConfigError: the length is too short for the task, or the source cannot serve it.
    """
    if task.needs_text and source.tokenizer is None:
        raise ConfigError(f"task {task.name!r} is made of text and this model has no tokenizer")
    rng = random.Random(f"{describe(task)}@{task.version}|{length}|{seed}|{index}")
    sample = task.make(source, length, rng)
    if len(sample.context) != length or not all(q.prefix and q.answer for q in sample.questions):
        raise ConfigError(
            f"task {task.name!r} made a context of {len(sample.context)} tokens for {length}, or a "
            "question without prefix or answer"
        )
    return sample


def check_at_least(name: str, minimum: int, **values: int) -> None:
    """Refuse parameters that are too small.

    Raises:
        ConfigError: naming task, parameter and value.
    """
    for key, value in values.items():
        if value < minimum:
            raise ConfigError(f"{name}: {key} must be {minimum} or more, got {value}")


class Source:
    """Token ids for one model: its tokenizer, and text that every Python has.

    The text is that of the running Python's help topics, so it differs between its releases.

    Args:
        tokenizer: of the model; None for models without text.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, without special tokens."""
        assert self.tokenizer is not None  # noqa: S101
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def start(self) -> list[int]:
        """What the tokenizer puts before every text."""
        assert self.tokenizer is not None  # noqa: S101
        empty = list(self.tokenizer("")["input_ids"])
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and empty[:1] == [bos] else []

    @cached_property
    def words(self) -> list[str]:
        """Keys: words of one token, or all we have if the tokenizer has few of those."""
        short = [word for word in WORDS if len(self.encode(word)) == 1]
        return short if len(short) >= 80 else list(WORDS)

    @cached_property
    def _text(self) -> tuple[list[int], list[int]]:
        """Ids of the help topics, and where in them a paragraph begins."""
        from pydoc_data.topics import topics

        assert self.tokenizer is not None  # noqa: S101
        parts = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
        # By paragraph: where a blank line is no token of its own, its place would be lost.
        every = self.tokenizer([f"{part}\n\n" for part in parts], add_special_tokens=False)
        ids: list[int] = []
        starts = []
        for part in every["input_ids"]:
            starts.append(len(ids))
            ids += part
        return ids, starts

    @property
    def topics(self) -> list[int]:
        """Real text: Python's help topics in alphabetical order."""
        return self._text[0]

    @property
    def paragraphs(self) -> list[int]:
        """Where paragraphs of the topics begin."""
        return self._text[1]

    def digest(self) -> str:
        """Names the tokenizer and the text, as far as samples depend on them."""
        if self.tokenizer is None:
            return ""
        ids = [*self.start, *self.topics, *self.encode(" ".join(WORDS))]
        return blake2b(",".join(map(str, ids)).encode(), digest_size=16).hexdigest()

    def passage(self, num: int, rng: random.Random) -> list[int]:
        """`num` tokens of real text, from the beginning of a paragraph on.

        Raises:
            ConfigError: the text is shorter than that.
        """
        last = bisect_right(self.paragraphs, len(self.topics) - num)
        if last == 0:
            raise ConfigError(f"the text has {len(self.topics)} tokens; {num} were asked for")
        start = self.paragraphs[rng.randrange(last)]
        return self.topics[start : start + num]

    def sentences(self, num: int, rng: random.Random) -> list[int]:
        """`num` tokens of made-up sentences, none of whose words are keys."""
        ids: list[int] = []
        while len(ids) < num:
            few = " ".join(sentence(rng) for _ in range(rng.randrange(3, 7)))
            ids += self.encode(f"{few}\n\n")
        return ids[:num]

    def filler(self, kind: str) -> Callable[[int, random.Random], list[int]]:
        """The maker of a kind of filler: ``topics`` or ``sentences``.

        Raises:
            ConfigError: another kind.
        """
        if kind not in ("topics", "sentences"):
            raise ConfigError(f"filler is topics or sentences, got {kind!r}")
        return self.passage if kind == "topics" else self.sentences


class Builder:
    """A context of an exact length: pieces scattered in filler, and an end.

    Args:
        source: of ids.
        length: of the context, in tokens.
        rng: decides where pieces go.
    """

    def __init__(self, source: Source, length: int, rng: random.Random) -> None:
        self._source, self._length, self._rng = source, length, rng
        self.end: list[int] = []

    def place(self, pieces: Sequence[Sequence[int]], filler: str) -> tuple[list[int], list[int]]:
        """The context, and the position in it at which each piece begins.

        Raises:
            ConfigError: the pieces alone are longer than the context.
        """
        start = self._source.start
        room = self._length - len(start) - len(self.end) - sum(map(len, pieces))
        if room < 0:
            raise ConfigError(
                f"a context of {self._length} tokens is too short: what has to be in it takes "
                f"{self._length - room}"
            )
        text = self._source.filler(filler)(room, self._rng) if room else []
        cuts = sorted(self._rng.randrange(room + 1) for _ in pieces)
        ids, starts, done = list(start), [], 0
        for cut, piece in zip(cuts, pieces, strict=True):
            ids += text[done:cut]
            starts.append(len(ids))
            ids += piece
            done = cut
        return ids + text[done:] + self.end, starts
