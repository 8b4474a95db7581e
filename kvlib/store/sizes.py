# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them."""

import re

from kvlib.errors import ConfigError

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
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
