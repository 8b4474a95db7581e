# SPDX-License-Identifier: Apache-2.0
"""Streaming of a context over a link, by exhaustion and in plain numbers.

A plan is a tuple of levels, one a fetched chunk; the chunks after them are recomputed.
"""

from itertools import product


def end_of(plan, sizes, decode, prefill, finish):
    """Seconds until all KV is there. `finish(chunk, start, nbytes)` is the link."""
    link = accelerator = 0.0
    for i, level in enumerate(plan):
        link = finish(i, link, sizes[i][level])
        accelerator = max(accelerator, link) + decode[i]
    return accelerator + sum(prefill[len(plan) :])


def all_plans(chunks, levels):
    """Every prefix of chunks at every sequence of levels."""
    for fetched in range(chunks + 1):
        yield from product(levels, repeat=fetched)


def optimum(sizes, decode, prefill, finish, slo, costs, tokens, levels):
    """Of plans in time: fewest recomputed chunks, then least cost. Of late ones: the first to end.

    Returns:
        Whether it is in time, chunks fetched, cost of these, seconds.
    """
    in_time, late = [], []
    for plan in all_plans(len(sizes), levels):
        end = end_of(plan, sizes, decode, prefill, finish)
        cost = sum(tokens[i] * costs[level] for i, level in enumerate(plan))
        (in_time if end <= slo else late).append((len(plan), cost, end))
    if in_time:
        fetched, cost, end = min(in_time, key=lambda x: (-x[0], x[1]))
        return True, fetched, cost, end
    return False, *min(late, key=lambda x: x[2])


def averages(pairs, gain):
    """Mean seconds per byte and mean deviation after (bytes, seconds) pairs, as defined."""
    mean = deviation = None
    for nbytes, seconds in pairs:
        x = seconds / nbytes
        if mean is None:
            mean = deviation = x
        else:
            deviation = (1 - gain) * deviation + gain * abs(x - mean)
            mean = (1 - gain) * mean + gain * x
    return mean, deviation
