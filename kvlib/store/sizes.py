# SPDX-License-Identifier: Apache-2.0
"""Sizes and times as people write them."""

import math
import re

from kvlib.errors import ConfigError

__all__ = ["parse_bytes", "parse_seconds"]

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*")
_MOST_SECONDS = 1000 * 365.25 * 86400
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*")


def parse_bytes(size: int | str, what: str) -> int:
    """Bytes of a size such as 4096, "512MiB", "1.5GiB" or "20GB" (KiB is 1024, KB is 1000).

    Args:
        size: the size.
        what: name of the argument, for the message.

    Raises:
        ConfigError: not a size, negative, or not a whole number of bytes.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = _PATTERN.fullmatch(size) if isinstance(size, str) else None
    if match is None or match[2] not in _UNITS:
        raise ConfigError(
            f'{what}={size!r} is not a size: expected bytes, or text such as "512MiB" or "20GB"'
        )
    return int(float(match[1]) * _UNITS[match[2]])


def parse_seconds(duration: float | str, what: str) -> float:
    """Seconds of a duration such as 90, 0.5, "90s", "15m", "12h" or "7d".

    Args:
        duration: the duration.
        what: name of the argument, for the message.

    Raises:
        ConfigError: not a duration, not positive, or longer than a thousand years.
    """
    seconds = math.nan
    if isinstance(duration, str):
        match = _TIME.fullmatch(duration)
        if match is not None:
            seconds = float(match[1]) * _SECONDS[match[2]]
    elif type(duration) in (int, float):
        seconds = float(duration)
    if not 0 < seconds <= _MOST_SECONDS:
        raise ConfigError(
            f'{what}={duration!r} is not a time to live: expected seconds, or text such as "90s", '
            '"15m", "12h" or "7d", more than 0 and at most a thousand years'
        )
    return seconds
