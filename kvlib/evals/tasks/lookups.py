# SPDX-License-Identifier: Apache-2.0
"""What look-up tasks share: keys with numbers, and an entry's tokens."""

import random
from dataclasses import dataclass

from kvlib.errors import ConfigError
from kvlib.evals.tasks.base import Question, Source

__all__ = ["Entry", "draw_facts", "number"]


def number(digits: int, rng: random.Random) -> str:
    """A number in which no digit comes twice: small models lose their way in 4147.

    Raises:
        ConfigError: more digits than there are.
    """
    if digits > 9:
        raise ConfigError(f"a number of {digits} different digits is not possible; at most 9")
    return "".join(rng.sample("123456789", digits))


def draw_facts(source: Source, num: int, digits: int, rng: random.Random) -> list[tuple[str, str]]:
    """Different words, each with a number.

    Raises:
        ConfigError: more facts than words.
    """
    if num > len(source.words):
        raise ConfigError(f"{num} keys were asked for; there are {len(source.words)} words")
    return [(word, number(digits, rng)) for word in rng.sample(source.words, num)]


@dataclass(frozen=True, slots=True)
class Entry:
    """A fact as it is written, wherever it is: the same ids in the context and in a question."""

    question: list[int]
    prefix: list[int]
    answer: list[int]
    end: list[int]

    @property
    def ids(self) -> list[int]:
        """All of it."""
        return self.question + self.prefix + self.answer + self.end

    def ask(self, start: int) -> Question:
        """The question whose answer is this entry, which begins at `start` in the context."""
        first = start + len(self.question) + len(self.prefix)
        return Question(
            question=tuple(self.question),
            prefix=tuple(self.prefix),
            answer=tuple(self.answer),
            evidence=tuple(range(first, first + len(self.answer))),
        )
