# SPDX-License-Identifier: Apache-2.0
"""What `kvlib store` says of a store, as text."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from kvlib.store.segment_ledger import Limits
    from kvlib.store.upkeep import Record

__all__ = [
    "MOST_LINES",
    "ages",
    "capacity_text",
    "counted",
    "plain",
    "printable",
    "record_line",
    "size_text",
    "tenants_text",
]

MOST_LINES = 20


def size_text(nbytes: int) -> str:
    """Bytes with a unit."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):,.1f} {unit}"
    return f"{nbytes:,} bytes"


def capacity_text(limits: "Limits") -> str:
    """What a store is kept to."""
    if not limits.capacity:
        return "set by whoever opens the store"
    text = f"{size_text(limits.capacity)}, as it was last opened"
    if limits.high:
        text += f"; from {size_text(limits.high)} on it is brought down to {size_text(limits.low)}"
    if limits.min_free:
        text += f"; {size_text(limits.min_free)} of the file system are left to others"
    return text


def tenants_text(tenants: Mapping[str, Mapping[str, int]]) -> str:
    """A line for each tenant, the one that holds most first."""
    lines = []
    for tag, about in list(tenants.items())[:MOST_LINES]:
        quota = f" of {size_text(about['quota'])}" if about["quota"] else ""
        name = tag if int(tag, 16) else "none"
        lines.append(
            f"{name}: {about['records']:,} records, {size_text(about['used_bytes'])}{quota}"
        )
    if len(tenants) > MOST_LINES:
        lines.append(f"and {len(tenants) - MOST_LINES:,} more")
    return "\n".join(lines) or "none"


def counted(counts: Mapping[str, int]) -> str:
    """Names and how many of each."""
    return "; ".join(f"{name}: {n:,}" for name, n in counts.items()) or "none"


def ages(oldest: float | None, newest: float | None) -> str:
    """Two times, from and to."""
    if oldest is None or newest is None:
        return "unknown"
    return " to ".join(
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t)) for t in (oldest, newest)
    )


def _left(ttl: float | None) -> str:
    if ttl is None:
        return ""
    return f"  {ttl:,.0f} s left" if ttl > 0 else "  expired"


def plain(text: str) -> str:
    """Text of a file, which could hold markup or a terminal's control characters."""
    return escape(printable(text))


def printable(text: str) -> str:
    """Text without control characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def record_line(record: "Record") -> str:
    """A line of `kvlib store ls`, ended."""
    name = record.key.block.hex()[:16]
    if record.problem:
        return f"{name}  {record.nbytes:>12,} bytes  {printable(record.problem)}\n"
    stop = record.start + record.tokens
    return (
        f"{name}  {record.nbytes:>12,} bytes  tokens {record.start}..{stop}  "
        f"{record.layers} layers  {printable(record.codec)}  {printable(record.fidelity)}"
        f"{_left(record.ttl)}\n"
    )
