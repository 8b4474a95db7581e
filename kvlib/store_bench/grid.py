# SPDX-License-Identifier: Apache-2.0
"""A trace through every policy at every capacity, and the numbers as one JSON object."""

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kvlib.machine import environment
from kvlib.store.replacement.admission import SecondTouch
from kvlib.store.replacement.base import Replacement
from kvlib.store.replacement.belady import Belady
from kvlib.store_bench.replay import Outcome, Step, next_uses, replay
from kvlib.store_bench.trace import Request

__all__ = ["BELADY", "cells", "run"]

BELADY = "belady"


def run(
    requests: Sequence[Request],
    policies: Mapping[str, Replacement],
    capacities: Sequence[int],
    *,
    block_bytes: int,
    block_tokens: int,
    second_touch: Mapping[str, int] | None = None,
    foresight: float = 0.0,
    step: Step = lambda done: None,
) -> dict[str, Any]:
    """Replay a trace through every policy and through Belady's, which knows every next use.

    Args:
        requests: the trace.
        policies: by the names they shall have in the results.
        capacities: of the tier, in bytes.
        block_bytes: of each block.
        block_tokens: of each block but the last of a prompt.
        second_touch: arguments of `SecondTouch`; None admits every block. Belady's is not bound.
        foresight: share of the conversations, drawn once, of whose blocks all policies are told the
            next use; of blocks that are not used again nobody is told.
        step: told how many more requests are done; (policies + 1) x capacities x requests in all.
    """
    began = time.perf_counter()
    ahead = next_uses(requests)
    told = None if not foresight else _some(requests, ahead, foresight)
    rows = []
    for name, policy in {**policies, BELADY: Belady()}.items():
        for capacity in capacities:
            outcome = replay(
                requests,
                policy,
                capacity,
                lambda block: block_bytes,
                block_tokens=block_tokens,
                ahead=ahead if isinstance(policy, Belady) else told,
                admission=(
                    None
                    if second_touch is None or isinstance(policy, Belady)
                    else SecondTouch(**second_touch)
                ),
                step=step,
            )
            rows.append(_row(name, capacity, outcome))
    best = {row["capacity_bytes"]: row for row in rows if row["policy"] == BELADY}
    for row in rows:
        most = best[row["capacity_bytes"]]["block_hit_ratio"]
        row["of_belady"] = row["block_hit_ratio"] / most if most else None
    return {
        "benchmark": "replay",
        "schema": 1,
        "settings": {
            "block_bytes": block_bytes,
            "block_tokens": block_tokens,
            "second_touch": None if second_touch is None else dict(second_touch),
            "foresight": foresight,
        },
        "trace": _about(requests, ahead),
        "environment": environment(),
        "results": rows,
        "seconds": time.perf_counter() - began,
    }


def _some(
    requests: Sequence[Request], ahead: Sequence[Sequence[int | None]], share: float
) -> list[list[int | None]]:
    """What is known of whole conversations: a prompt's second block draws for all behind it."""
    known: dict[int, bool] = {}
    draw = random.Random(0)  # the same in every run
    told: list[list[int | None]] = []
    for request, mine in zip(requests, ahead, strict=True):
        is_known = False
        for i, block in enumerate(request.blocks):
            is_known = known.setdefault(block, draw.random() < share if i < 2 else is_known)
        told.append(
            [then if known[x] else None for x, then in zip(request.blocks, mine, strict=True)]
        )
    return told


def _about(
    requests: Sequence[Request], ahead: Sequence[Sequence[int | None]]
) -> dict[str, int | float]:
    blocks = sum(map(len, ahead))
    again = sum(then is not None for mine in ahead for then in mine)
    return {
        "requests": len(requests),
        "blocks": blocks,
        "distinct_blocks": blocks - again,
        "tokens": sum(request.input_tokens for request in requests),
        "minutes": (requests[-1].timestamp_ms - requests[0].timestamp_ms) / 60e3,
        "most_block_hit_ratio": again / blocks if blocks else 0.0,  # with any capacity
    }


def _row(name: str, capacity: int, outcome: Outcome) -> dict[str, Any]:
    blocks, tokens = max(outcome.blocks, 1), max(outcome.tokens, 1)
    return {
        "policy": name,
        "capacity_bytes": capacity,
        "block_hit_ratio": outcome.hit_blocks / blocks,
        "token_hit_ratio": outcome.hit_tokens / tokens,
        "held_ratio": outcome.held_blocks / blocks,
        "inserts_per_block": outcome.inserted / blocks,
        **asdict(outcome),
    }


def cells(results: Mapping[str, Any], ratio: str) -> tuple[list[int], dict[str, list[float]]]:
    """A table of `results`: the capacities, and for each policy its ratio at each of them."""
    rows = results["results"]
    capacities = list(dict.fromkeys(row["capacity_bytes"] for row in rows))
    table: dict[str, list[float]] = {}
    for row in rows:
        table.setdefault(row["policy"], []).append(row[ratio])
    return capacities, table
