# SPDX-License-Identifier: Apache-2.0
"""table: look numbers up in one table that stands somewhere in the context.

The evidence is dense and in one place; which row will be asked for is unknown until the question
comes. Worked look-ups at the end of the context show the form of an answer: without them a small
model fails for want of instruction, not of memory.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from kvlib.evals.tasks.base import Builder, Sample, Source, check_at_least
from kvlib.evals.tasks.lookups import Entry, draw_facts

__all__ = ["Table"]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows ``word: number``.

    Args:
        pairs: rows.
        digits: of a number; no digit comes twice in it.
        shots: worked look-ups at the end of the context; their rows are not asked for again.
        questions: of a context.
        filler: around the table: sentences or topics.
    """

    pairs: int = 20
    digits: int = 3
    shots: int = 3
    questions: int = 5
    filler: str = "sentences"
    name: ClassVar[str] = "table"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    metric: ClassVar[str] = "exact"
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_at_least(self.name, 0, shots=self.shots)
        check_at_least(self.name, 1, digits=self.digits, questions=self.questions)
        check_at_least(self.name, self.shots + self.questions, pairs=self.pairs)

    def make(self, source: Source, length: int, rng: random.Random) -> Sample:
        """A table in filler, worked look-ups, questions."""
        colon, newline = source.encode(": "), source.encode("\n")
        rows = [
            Entry(source.encode(key), colon, source.encode(value), newline)
            for key, value in draw_facts(source, self.pairs, self.digits, rng)
        ]
        table, offsets = source.encode("\n\nTable of codes:\n"), []
        for row in rows:
            offsets.append(len(table))
            table += row.ids
        order = rng.sample(range(self.pairs), self.shots + self.questions)
        builder = Builder(source, length, rng)
        builder.end = source.encode("\n\nCodes read from the table above:\n")
        for i in order[: self.shots]:
            builder.end += rows[i].ids
        context, (start,) = builder.place([table + newline], self.filler)
        asked = order[self.shots :]
        return Sample(tuple(context), tuple(rows[i].ask(start + offsets[i]) for i in asked))
