# SPDX-License-Identifier: Apache-2.0
"""records: look numbers up in records that are scattered over the whole context.

The evidence is sparse: a policy has to notice a short record in the middle of real text. As in
`table`, worked look-ups at the end show the form of an answer.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from kvlib.evals.tasks.base import Builder, Sample, Source, check_at_least
from kvlib.evals.tasks.lookups import Entry, draw_facts

__all__ = ["Records"]


@dataclass(frozen=True, slots=True)
class Records:
    """Records ``{"word": number}``.

    Args:
        pairs: records.
        digits: of a number; no digit comes twice in it.
        shots: worked look-ups at the end of the context; they are not asked for again.
        questions: of a context.
        filler: between the records: topics or sentences.
    """

    pairs: int = 10
    digits: int = 3
    shots: int = 3
    questions: int = 5
    filler: str = "topics"
    name: ClassVar[str] = "records"
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
        """Records in filler, worked look-ups, questions."""
        colon, brace, blank = source.encode(": "), source.encode("}\n"), source.encode("\n\n")
        records = [
            Entry(source.encode(f'{{"{key}"'), colon, source.encode(value), brace)
            for key, value in draw_facts(source, self.pairs, self.digits, rng)
        ]
        order = rng.sample(range(self.pairs), self.shots + self.questions)
        builder = Builder(source, length, rng)
        builder.end = list(blank)
        for i in order[: self.shots]:
            builder.end += records[i].ids
        pieces = [blank + record.ids + blank for record in records]
        context, starts = builder.place(pieces, self.filler)
        asked = order[self.shots :]
        questions = tuple(records[i].ask(starts[i] + len(blank)) for i in asked)
        return Sample(tuple(context), questions)
