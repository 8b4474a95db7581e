# SPDX-License-Identifier: Apache-2.0
"""recall: key/value pairs for the hand-set recall model, whose score follows from theory.

See `kvlib.testing.recall_model`: a policy that does not see the question scores the fraction of the
tokens that it keeps in the retrieval head.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from kvlib.errors import ConfigError
from kvlib.evals.tasks.base import Question, Sample, Source, check_at_least
from kvlib.testing.recall_model import recall_prompt

__all__ = ["Recall"]


@dataclass(frozen=True, slots=True)
class Recall:
    """Pairs without any filler.

    Args:
        questions: of a context.
    """

    questions: int = 50
    name: ClassVar[str] = "recall"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    metric: ClassVar[str] = "exact"
    needs_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_at_least(self.name, 1, questions=self.questions)

    def make(self, source: Source, length: int, rng: random.Random) -> Sample:
        """A prompt for the recall model, and some of its keys."""
        if length < 3 or length % 2 == 0:
            raise ConfigError(f"{self.name}: BOS and pairs make an odd length, got {length}")
        prompt = recall_prompt(length // 2, source.vocab_size, seed=rng.getrandbits(40))
        asked = rng.sample(range(length // 2), min(self.questions, length // 2))
        questions = tuple(
            Question(
                # Asked twice: a policy that may see the question is then asked again.
                question=prompt.question(i),
                prefix=prompt.question(i),
                answer=(prompt.values[i],),
                evidence=(2 + 2 * i,),
            )
            for i in asked
        )
        return Sample(prompt.input_ids, questions)
