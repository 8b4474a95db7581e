# SPDX-License-Identifier: Apache-2.0
"""needle: one sentence with a number, somewhere in the context, asked for without examples."""

import random
from dataclasses import dataclass, replace
from typing import ClassVar

from kvlib.evals.tasks.base import Builder, Sample, Source, check_at_least
from kvlib.evals.tasks.lookups import Entry, number

__all__ = ["Needle"]


@dataclass(frozen=True, slots=True)
class Needle:
    """A single fact.

    Args:
        digits: of the number; no digit comes twice in it.
        filler: around it: topics or sentences.
    """

    digits: int = 7
    filler: str = "topics"
    name: ClassVar[str] = "needle"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    metric: ClassVar[str] = "exact"
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_at_least(self.name, 1, digits=self.digits)

    def make(self, source: Source, length: int, rng: random.Random) -> Sample:
        """A sentence in filler, and the question at the end."""
        first, second = rng.sample(source.words, 2)
        value = source.encode(number(self.digits, rng))
        fact = f"The access code of the {first} {second}"
        link, end = source.encode(" is: "), source.encode(".\n")
        told = Entry(source.encode(f"\n\n{fact}"), link, value, end)
        asked = source.encode(f"\n\nWhat is the access code of the {first} {second}? {fact}")
        context, (start,) = Builder(source, length, rng).place([told.ids], self.filler)
        evidence = told.ask(start).evidence
        question = Entry(asked, link, value, end).ask(0)
        return Sample(tuple(context), (replace(question, evidence=evidence),))
