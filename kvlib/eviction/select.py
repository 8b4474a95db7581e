# SPDX-License-Identifier: Apache-2.0
"""From scores and budgets to plans: what policies share.

Ties are broken one way everywhere: of entries with equal scores the one with the lower index, which
is the earlier token, stays.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import ceil

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvlib.blocks import LayerKV
from kvlib.budget import round_budget
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerView, Plans
from kvlib.layer_kv import Gaps
from kvlib.plans import KeepTokens

__all__ = [
    "GROUP_REDUCERS",
    "by_entry",
    "by_row",
    "check_budget",
    "check_group",
    "drop_lowest",
    "keep_highest",
    "keep_rows",
    "keeps_all",
    "largest_remainder",
    "plan_highest",
    "reduce_group",
    "share_of",
    "tokens_to_keep",
]

GROUP_REDUCERS = ("mean", "max", "sum")
"""How the scores of the query heads that share a KV head become one."""


def tokens_to_keep(view: LayerView, budget: float | int) -> int | None:
    """Entries per head that a budget means for this sequence; None for all of them.

    A fraction is one of the prompt, fixed when the prompt ends. The fraction 1 keeps everything,
    later tokens too.
    """
    if keeps_all(budget) or view.num_prompt == 0:  # a prompt that was all padding has no fraction
        return None
    if isinstance(budget, int):
        return budget
    held = view.state.values.get("budget")
    if held is None:
        held = torch.tensor(round_budget(budget, view.num_prompt))
        view.state.values["budget"] = held
    return int(held)


def keeps_all(budget: float | int) -> bool:
    """Whether the budget is the fraction 1: nothing is ever evicted."""
    return isinstance(budget, float) and budget == 1.0


def check_budget(name: str, budget: float | int) -> None:
    """Refuse a budget that means no number of tokens.

    Raises:
        ConfigError: naming the policy.
    """
    try:
        round_budget(budget, 1)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    if budget == 0:
        raise ConfigError(
            f"{name}: a budget of 0 tokens leaves nothing to attend to: give 1 or more, or a "
            "fraction such as 0.25"
        )


@lru_cache(maxsize=256)  # asked for in each layer of each step
def share_of(share: float, budget: int) -> int:
    """So much of a budget, rounded up; the share is the decimal as it is written."""
    return ceil(Fraction(str(share)) * budget)


def check_group(name: str, group: str) -> None:
    """Refuse a reducer that is not one of `GROUP_REDUCERS`."""
    if group not in GROUP_REDUCERS:
        raise ConfigError(f"{name}: group is {', '.join(GROUP_REDUCERS)}, got {group!r}")


def reduce_group(scores: Tensor, group: str) -> Tensor:
    """Scores [Hkv, G, S] of query heads to [Hkv, S]."""
    if group == "max":
        return scores.amax(1)
    return scores.mean(1) if group == "mean" else scores.sum(1)


def by_entry(x: Tensor, layer: LayerKV) -> Tensor:
    """From [Hkv, S] to one number for each entry, in the layer's own form."""
    if layer.is_dense:
        return x
    return torch.cat([row[:n] for row, n in zip(x, layer.lengths, strict=True)])


def by_row(x: Tensor, layer: LayerKV) -> Tensor:
    """From one number for each entry to [Hkv, S], with zeros behind shorter rows."""
    if layer.is_dense:
        return x
    return pad_sequence(x.split(list(layer.lengths)), batch_first=True)


def keep_highest(scores: Tensor, num: int) -> Tensor:
    """Indices [Hkv, num] of the highest scores [Hkv, S] of each head, ascending."""
    held = scores.shape[1]
    if num == held:
        return torch.arange(num, device=scores.device).expand(len(scores), -1)
    if num == held - 1:  # the usual step drops one entry of each head: the last of the lowest
        drop = held - 1 - scores.flip(1).argmin(1, keepdim=True)
        index = torch.arange(num, device=scores.device).expand(len(scores), -1)
        return index + (index >= drop)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[:, :num].sort(dim=-1).values


def keep_rows(indices: Tensor) -> Plans:
    """The plan that keeps the same number of entries [Hkv, n] in every head."""
    return (KeepTokens(tuple(indices.unbind(0))),)


def drop_lowest(
    scores: Tensor,
    lengths: Sequence[int],
    budgets: Sequence[int],
    safe: Sequence[tuple[int, int]],
) -> Plans:
    """`plan_highest` for the usual step, in which each head has one entry too many.

    Args:
        scores: see `plan_highest`; nothing is marked yet.
        lengths: see `plan_highest`.
        budgets: see `plan_highest`.
        safe: how many first and last entries each head protects.

    Returns:
        No plan if it is not such a step, or if everything is protected.
    """
    ends = [n - window for n, (_, window) in zip(lengths, safe, strict=True)]
    if any(
        n != budget + 1 or sinks >= end
        for n, budget, (sinks, _), end in zip(lengths, budgets, safe, ends, strict=True)
    ):
        return ()
    heads = len(lengths)
    if len(set(lengths)) == 1:  # then budgets are equal too, and so is what they protect
        same = heads > 1 and scores.stride(0) == 0
        mine = scores[: 1 if same else heads, safe[0][0] : ends[0]]
        last: list[int] = mine.flip(1).argmin(1).tolist()
        last *= heads if same else 1
    else:
        rows = zip(scores, safe, ends, strict=True)
        found = [row[sinks:end].flip(0).argmin() for row, (sinks, _), end in rows]
        last = torch.stack(found).tolist()
    starts = [end - 1 - back for end, back in zip(ends, last, strict=True)]
    gone = tuple(range(first, first + 1) for first in starts)
    return (KeepTokens.without(Gaps(tuple(lengths), gone, scores.device)),)


def plan_highest(scores: Tensor, lengths: Sequence[int], budgets: Sequence[int]) -> Plans:
    """The plan that keeps the `budgets[h]` highest-scored entries of each head.

    Args:
        scores: [Hkv, S]; of head h only the first `lengths[h]` count.
        lengths: entries of each head.
        budgets: entries to keep of each head; a head with fewer keeps what it has.
    """
    if all(n <= budget for n, budget in zip(lengths, budgets, strict=True)):
        return ()
    if len(set(lengths)) == len(set(budgets)) == 1:
        return keep_rows(keep_highest(scores, budgets[0]))
    rows = [
        keep_highest(scores[h : h + 1, :n], min(n, budget))[0]
        for h, (n, budget) in enumerate(zip(lengths, budgets, strict=True))
    ]
    return (KeepTokens(tuple(rows)),)


def largest_remainder(shares: Sequence[float | Fraction], total: int) -> list[int]:
    """Whole numbers proportional to `shares` that sum to `total`.

    Each share is rounded down; what is left goes to the largest remainders, of equal ones to the
    first. Nothing is rounded before that, or equal remainders would not be seen as such.
    """
    given = [Fraction(share) for share in shares]
    if sum(given) <= 0:
        given = [Fraction(1)] * len(given)
    exact = [share * total / sum(given) for share in given]
    parts = [int(x) for x in exact]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts
