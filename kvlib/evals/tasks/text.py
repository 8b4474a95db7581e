# SPDX-License-Identifier: Apache-2.0
"""text: how far the distribution of every next token of real text moves from the full cache's.

KL divergence sees the smallest damage with few tokens, on any model; it says little about what
can still be looked up (see `table`). The `nll` of this task is the logarithm of the perplexity.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from kvlib.evals.tasks.base import Question, Sample, Source, check_at_least

__all__ = ["Text"]


@dataclass(frozen=True, slots=True)
class Text:
    """A passage and its continuation.

    Args:
        tokens: of the continuation that are predicted.
    """

    tokens: int = 128
    name: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    metric: ClassVar[str] = "kl"
    needs_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_at_least(self.name, 1, tokens=self.tokens)

    def make(self, source: Source, length: int, rng: random.Random) -> Sample:
        """A passage of real text, cut in two."""
        text = [*source.start, *source.passage(length + 1 + self.tokens, rng)]
        follow = text[length : length + 1 + self.tokens]
        question = Question(question=(), prefix=(follow[0],), answer=tuple(follow[1:]))
        return Sample(tuple(text[:length]), (question,))
