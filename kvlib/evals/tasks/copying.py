# SPDX-License-Identifier: Apache-2.0
"""copy: a few words of the text come again; go on with what followed them there.

Any passage may be asked for, so nothing in the context is safe to drop. The model is not always
right over the full cache either: the task is judged by the share of right tokens.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from kvlib.errors import ConfigError
from kvlib.evals.tasks.base import Question, Sample, Source, check_at_least

__all__ = ["Copying"]

_TRIES = 50
_END = "\n\nThe same text again, from somewhere in the middle:\n\n"


@dataclass(frozen=True, slots=True)
class Copying:
    """Passages of real text.

    Args:
        cue: tokens that are repeated.
        tokens: that have to follow.
        questions: of a context.
    """

    cue: int = 32
    tokens: int = 16
    questions: int = 5
    name: ClassVar[str] = "copy"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    metric: ClassVar[str] = "token_accuracy"
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_at_least(self.name, 1, tokens=self.tokens, questions=self.questions)
        check_at_least(self.name, 2, cue=self.cue)

    def make(self, source: Source, length: int, rng: random.Random) -> Sample:
        """Real text, and places in it that do not overlap."""
        begin, end = source.start, source.encode(_END)
        room = length - len(begin) - len(end)
        part = room // self.questions  # each question has a part of the text to itself
        if part < self.cue + self.tokens:
            raise ConfigError(
                f"{self.name}: {self.questions} passages of {self.cue + self.tokens} tokens do not "
                f"fit into {length}"
            )
        text = source.passage(room, rng)
        asked = []
        for i in range(self.questions):
            for _ in range(_TRIES):
                at = i * part + rng.randrange(part - self.cue - self.tokens + 1)
                cue = text[at : at + self.cue]
                if _count(text, cue) == 1:  # else there may be two answers
                    break
            answer = text[at + self.cue : at + self.cue + self.tokens]
            first = len(begin) + at + self.cue
            asked.append(
                Question(
                    question=tuple(cue[:-1]),
                    prefix=tuple(cue[-1:]),
                    answer=tuple(answer),
                    evidence=tuple(range(first, first + self.tokens)),
                )
            )
        return Sample((*begin, *text, *end), tuple(asked))


def _count(text: list[int], part: list[int]) -> int:
    """How often the part occurs."""
    first, size = part[0], len(part)
    return sum(token == first and text[i : i + size] == part for i, token in enumerate(text))
