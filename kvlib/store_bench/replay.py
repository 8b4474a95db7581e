# SPDX-License-Identifier: Apache-2.0
"""A trace of requests through one tier under one policy, without any KV.

A request finds the leading run of its blocks that are all held: what lies behind the first gap is
of no use to a prefix cache, and is no hit. Then its blocks are used from the last to the first, as
`KVStore` does: what is held is a hit to the policy, what is not is offered to the tier. So a parent
is always used after its children.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvlib.store.replacement.admission import SecondTouch
from kvlib.store.replacement.base import Hint, Replacement
from kvlib.store_bench.trace import Request

__all__ = ["COST_TOKENS", "Outcome", "Step", "next_uses", "replay"]

COST_TOKENS = 30_500
"""Position at which attention costs as much as the weights, for 8 billion weights, 32 layers and a
width of 4,096: computing a block at position p costs 1 + p / COST_TOKENS, which is its hint."""

_STEP = 256

Step = Callable[[int], None]
"""Told how many more requests are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run counted.

    Attributes:
        blocks: asked for.
        hit_blocks: of them in leading runs.
        held_blocks: of them held, also behind a gap.
        tokens: of the prompts.
        hit_tokens: of them in leading runs.
        inserted: blocks put in.
        evicted: blocks dropped to make room.
        refused: blocks not let in.
        most_bytes: held at any time.
    """

    blocks: int = 0
    hit_blocks: int = 0
    held_blocks: int = 0
    tokens: int = 0
    hit_tokens: int = 0
    inserted: int = 0
    evicted: int = 0
    refused: int = 0
    most_bytes: int = 0


def next_uses(requests: Sequence[Request]) -> list[list[int | None]]:
    """For each block of each request, uses until its next one, None if there is none.

    Uses are counted in the order of `replay`: blocks of a request from the last to the first.
    """
    at = sum(len(request.blocks) for request in requests)
    seen: dict[int, int] = {}
    found: list[list[int | None]] = []
    for request in reversed(requests):
        ahead: list[int | None] = []
        for block in request.blocks:  # backwards through a request that is used backwards
            at -= 1
            then = seen.get(block)
            ahead.append(None if then is None else then - at)
            seen[block] = at
        found.append(ahead)
    return found[::-1]


def replay(
    requests: Sequence[Request],
    policy: Replacement,
    capacity_bytes: int,
    size_of: Callable[[int], int],
    *,
    block_tokens: int,
    ahead: Sequence[Sequence[int | None]] | None = None,
    admission: SecondTouch[int] | None = None,
    step: Step = lambda done: None,
) -> Outcome:
    """Run a trace through a tier that is empty at first.

    Args:
        requests: the trace.
        policy: which blocks go first.
        capacity_bytes: hard limit of the tier.
        size_of: bytes of a block, from its id.
        block_tokens: of each block but the last of a prompt.
        ahead: uses until the next use of each block, which the policy is told; see `next_uses`.
        admission: who may come in; without it, everybody whom the policy lets in.
        step: see `Step`.
    """
    uses = 0
    order: Any = policy.start(capacity_bytes, lambda: uses)
    held: dict[int, int] = {}
    used = most = hit_blocks = held_blocks = hit_tokens = inserted = evicted = refused = 0
    most_blocks = max((len(request.blocks) for request in requests), default=0)
    hints = [Hint(cost=1 + i * block_tokens / COST_TOKENS) for i in range(most_blocks)]
    for number, request in enumerate(requests, start=1):
        blocks = request.blocks
        run = next((i for i, block in enumerate(blocks) if block not in held), len(blocks))
        hit_blocks += run
        hit_tokens += min(run * block_tokens, request.input_tokens)
        for i in range(len(blocks) - 1, -1, -1):
            uses += 1
            block, hint = blocks[i], hints[i]
            if ahead is not None and (known := ahead[number - 1][i]) is not None:
                hint = Hint(next_use=known, cost=hint.cost)
            if block in held:
                held_blocks += 1
                order.hit(block, hint)
                continue
            size = size_of(block)
            if (
                size > capacity_bytes
                or (admission is not None and not admission.wanted(block, i))
                or not order.admit(block, size, hint)
            ):
                refused += 1
                continue
            for victim in list(order.victims(used + size - capacity_bytes)):
                order.remove(victim, evicted=True)
                used -= held.pop(victim)
                evicted += 1
            order.insert(block, size, hint)
            held[block] = size
            used += size
            inserted += 1
            most = max(most, used)
        if not number % _STEP:
            step(_STEP)
    step(len(requests) % _STEP)
    return Outcome(
        blocks=uses,
        hit_blocks=hit_blocks,
        held_blocks=held_blocks,
        tokens=sum(request.input_tokens for request in requests),
        hit_tokens=hit_tokens,
        inserted=inserted,
        evicted=evicted,
        refused=refused,
        most_bytes=most,
    )
