# SPDX-License-Identifier: Apache-2.0
"""labels: learn four classes of words from many labelled ones, and label new words.

Labels mean nothing, so they have to be learnt from the context. Every label is there many times
over: a policy may drop most of the context if what is left shows all four.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from kvlib.errors import ConfigError
from kvlib.evals.tasks.base import Question, Sample, Source, check_at_least
from kvlib.evals.tasks.words import CLASSES

__all__ = ["Labels"]

_LABELS = ("bax", "dom", "fim", "gul", "kep", "lod", "mip", "nar", "pog", "rud", "tav", "zet")


@dataclass(frozen=True, slots=True)
class Labels:
    """Lines ``word: label``.

    Args:
        questions: of a context: words that were not there, of all classes in turns.
    """

    questions: int = 8
    name: ClassVar[str] = "labels"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    metric: ClassVar[str] = "exact"
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_at_least(self.name, 1, questions=self.questions)
        most = 4 * len(next(iter(CLASSES.values()))) // 2
        if self.questions > most:
            raise ConfigError(f"{self.name}: at most {most} questions, got {self.questions}")

    def make(self, source: Source, length: int, rng: random.Random) -> Sample:
        """As many lines as fit, the classes in random order, and new words."""
        labels = rng.sample(_LABELS, len(CLASSES))
        newline, colon = source.encode("\n"), source.encode(":")
        known: list[tuple[str, str]] = []
        new: list[list[tuple[str, str]]] = []
        held = -(-self.questions // len(CLASSES))
        for words, label in zip(CLASSES.values(), labels, strict=True):
            mixed = [(word, label) for word in rng.sample(words, len(words))]
            new.append(mixed[:held])
            known += mixed[held:]
        lines: list[int] = []
        room = length - len(source.start)
        while len(lines) < room:  # every word once before any comes twice
            for word, label in rng.sample(known, len(known)):
                lines += source.encode(word) + colon + source.encode(f" {label}") + newline
        turns = [pairs[i] for i in range(held) for pairs in new][: self.questions]
        asked = tuple(
            Question(
                question=tuple(source.encode(word)),
                prefix=tuple(colon),
                answer=tuple(source.encode(f" {label}")),
            )
            for word, label in turns
        )
        # Cut at the beginning: the end has to be the end of a line.
        return Sample((*source.start, *lines[len(lines) - room :]), asked)
