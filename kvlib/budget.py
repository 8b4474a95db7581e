# SPDX-License-Identifier: Apache-2.0
"""How many entries may stay: integers, made from ratios in one place."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvlib.errors import ConfigError

__all__ = ["Budget", "round_budget"]


def round_budget(budget: float | int | str, num_tokens: int) -> int:
    """The number of tokens a budget means: the only place where a ratio becomes an integer.

    Args:
        budget: an int (or text without a point) is a number of tokens; a float (or text with a
            point) is the fraction of `num_tokens` to keep, in (0, 1], read as the decimal it is
            written as and rounded **up**, so it never becomes 0 for a prompt that has tokens.
        num_tokens: tokens in the prompt.

    Returns:
        0..num_tokens; 0 only for an integer budget of 0 or an empty prompt.

    Raises:
        ConfigError: a negative budget, or a fraction outside (0, 1].
    """
    if isinstance(budget, bool):
        raise ConfigError(f"budget must be a fraction such as 0.25 or a number of tokens: {budget}")
    if num_tokens < 0:
        raise ConfigError(f"budget {budget!r:.80} over {num_tokens} tokens is meaningless")
    if isinstance(budget, int):
        if budget < 0:
            raise ConfigError(f"a budget in tokens cannot be negative, got {budget}")
        return min(budget, num_tokens)
    try:
        text = str(budget).strip()
        is_ratio = isinstance(budget, float) or "." in text or "e" in text.lower()
        if is_ratio and abs(int(text.lower().partition("e")[2] or 0)) > 400:
            raise ValueError("no float has such an exponent")  # its Fraction may fill the memory
        exact = Fraction(text)
    except (ValueError, ZeroDivisionError) as exc:
        raise ConfigError(
            f"budget must be a fraction such as 0.25 or a number of tokens, got {budget!r:.80}"
        ) from exc
    if is_ratio:
        if not 0 < exact <= 1:
            raise ConfigError(
                f"a budget with a point is the fraction to keep and lies in (0, 1], got {budget!r}"
            )
        return math.ceil(exact * num_tokens)
    if exact < 0 or exact.denominator != 1:
        raise ConfigError(
            f"a budget without a point is a number of tokens (0 or more), got {budget!r}"
        )
    return min(int(exact), num_tokens)


@dataclass(frozen=True, slots=True)
class Budget:
    """Entries that may stay, as integers.

    Attributes:
        tokens: [L][Hkv]: tokens per layer and KV head, sinks and recent window included.
    """

    tokens: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check that every budget is a non-negative integer."""
        try:
            tokens = tuple(tuple(operator.index(n) for n in layer) for layer in self.tokens)
        except TypeError as exc:
            raise ConfigError(f"a budget is in whole tokens: {exc}") from exc
        object.__setattr__(self, "tokens", tokens)
        if any(n < 0 for layer in self.tokens for n in layer):
            raise ConfigError(f"a budget cannot be negative: {self.tokens}")

    @classmethod
    def uniform(
        cls, budget: float | int | str, *, num_tokens: int, kv_heads: Sequence[int]
    ) -> "Budget":
        """The same budget (see `round_budget`) for all heads; `kv_heads` is Hkv by layer."""
        n = round_budget(budget, num_tokens)
        return cls(tuple((n,) * heads for heads in kv_heads))

    @property
    def total(self) -> int:
        """Entries over all layers and heads."""
        return sum(sum(layer) for layer in self.tokens)
