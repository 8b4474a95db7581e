# SPDX-License-Identifier: Apache-2.0
"""Ada-KV, joint allocation and PyramidKV by their definitions, over lists and fractions.

`rows` are the scores of every head of a layer, one list a head; lists may differ in length. Shares
are text (``0.2``), so that they mean the decimal number that is written.
"""

from fractions import Fraction

__all__ = ["choose", "protected", "pyramid", "share", "water"]


def protected(num, budget, sinks, window):
    """The indices of a row of `num` entries that stay whatever they score.

    Of a budget that is too small for both, the first entries take what they need.
    """
    first = min(sinks, budget)
    last = min(window, budget - first)
    return {s for s in range(num) if s < first or s >= num - last}


def water(available, total):
    """`total` poured over vessels that hold so much each: equal levels, but none overflows."""
    level = [Fraction(0)] * len(available)
    left = Fraction(total)
    while left:
        rising = [i for i in range(len(level)) if level[i] < available[i]]
        step = min(left / len(rising), min(available[i] - level[i] for i in rising))
        for i in rising:
            level[i] += step
            left -= step
    return level


def rounded(shares, total):
    """Down, then one more for the largest remainders until they sum; of equal ones, the first."""
    out = [x.numerator // x.denominator for x in shares]
    while sum(out) < total:
        rest = [x - n for x, n in zip(shares, out, strict=True)]
        out[rest.index(max(rest))] += 1
    return out


def share(layers, budget, sinks, window, floor):
    """Entries that each head keeps, [layers][heads], if all heads of these layers compete."""
    guarded = [[protected(len(row), budget, sinks, window) for row in rows] for rows in layers]
    rivals, even = [], []
    for at, rows in enumerate(layers):
        room = min(budget * len(rows), sum(map(len, rows))) - sum(map(len, guarded[at]))
        free = [len(row) - len(safe) for row, safe in zip(rows, guarded[at], strict=True)]
        even += water(free, room)
        for head, row in enumerate(rows):
            for s, score in enumerate(row):
                if s not in guarded[at][head]:
                    rivals.append((-score, at, head, s))
    total = int(sum(even))
    heads = [(at, head) for at, rows in enumerate(layers) for head in range(len(rows))]
    won = dict.fromkeys(heads, 0)
    for _, at, head, _ in sorted(rivals)[:total]:
        won[at, head] += 1
    part = Fraction(floor)
    mixed = [(1 - part) * won[key] + part * e for key, e in zip(heads, even, strict=True)]
    more = dict(zip(heads, rounded(mixed, total), strict=True))
    return [
        [len(guarded[at][head]) + more[at, head] for head in range(len(rows))]
        for at, rows in enumerate(layers)
    ]


def pyramid(num, budget, kept, layers, beta):
    """Entries per head of each layer, for a prompt of `num` tokens of which `kept` always stay."""
    if num <= budget:
        return [num] * layers
    if layers == 1:
        return [budget]
    average = budget - kept
    low = average / Fraction(beta)
    high = 2 * average - low
    if high > num - kept:
        high = Fraction(num - kept)
        low = 2 * average - high
    line = [high + (low - high) * Fraction(place, layers - 1) for place in range(layers)]
    return [kept + n for n in rounded(line, average * layers)]


def choose(row, num, safe):
    """The protected indices and the highest-scored others, `num` together; earlier of equals."""
    others = sorted((s for s in range(len(row)) if s not in safe), key=lambda s: (-row[s], s))
    return sorted([*safe, *others[: num - len(safe)]])
