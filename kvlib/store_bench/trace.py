# SPDX-License-Identifier: Apache-2.0
"""Traces of requests as Mooncake publishes them: JSON lines, blocks as ids in place of tokens.

Each line is an object with `timestamp` (milliseconds), `input_length` and `output_length` (tokens)
and `hash_ids`: an id for each block of the prompt, equal where the prompt is equal up to there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlib.errors import ConfigError

__all__ = ["BLOCK_TOKENS", "Request", "parse_request", "read_trace"]

BLOCK_TOKENS = 512
"""Tokens of a block in the traces that were published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request.

    Attributes:
        timestamp_ms: when it came.
        input_tokens: of its prompt.
        output_tokens: of its answer.
        blocks: ids of the prompt's blocks, from its start, each once; the last one may be
            incomplete.
    """

    timestamp_ms: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_trace(path: Path, block_tokens: int = BLOCK_TOKENS) -> list[Request]:
    """All requests of a trace, in its order; empty lines are skipped.

    Raises:
        ConfigError: the file cannot be read, has no requests, or a line is not one; names the line.
    """
    requests: list[Request] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        requests.append(parse_request(line, block_tokens))
                    except ConfigError as exc:
                        raise ConfigError(f"{path}, line {number}: {exc}") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read the trace {path}: {exc.strerror or exc}") from exc
    if not requests:
        raise ConfigError(f"the trace {path} has no requests: expected a JSON object a line")
    return requests


def parse_request(line: bytes, block_tokens: int = BLOCK_TOKENS) -> Request:
    """One line of a trace.

    Raises:
        ConfigError: not a JSON object with the four fields, or they contradict each other.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"not JSON ({exc}); is the file cut off?") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"expected a JSON object, got {type(found).__name__}")
    timestamp = _field(found, "timestamp")
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not timestamp >= 0:
        raise ConfigError(f"timestamp is milliseconds, at least 0; got {timestamp!r:.80}")
    lengths = [_field(found, name) for name in ("input_length", "output_length")]
    for name, length in zip(("input_length", "output_length"), lengths, strict=True):
        if type(length) is not int or length < 0:
            raise ConfigError(f"{name} is a number of tokens, got {length!r:.80}")
    blocks = _field(found, "hash_ids")
    if not isinstance(blocks, list) or any(type(block) is not int for block in blocks):
        raise ConfigError(f"hash_ids is a list of whole numbers, got {blocks!r:.80}")
    if len(set(blocks)) < len(blocks):
        raise ConfigError("hash_ids has an id twice: an id stands for all of a prompt up to there")
    _check_count(lengths[0], blocks, block_tokens)
    return Request(
        timestamp_ms=float(timestamp),
        input_tokens=lengths[0],
        output_tokens=lengths[1],
        blocks=tuple(blocks),
    )


def _field(found: dict[str, Any], name: str) -> Any:
    if name not in found:
        raise ConfigError(f"{name} is missing; there are {', '.join(sorted(found))[:80] or 'none'}")
    return found[name]


def _check_count(input_tokens: int, blocks: Sequence[int], block_tokens: int) -> None:
    """An incomplete last block may have an id or not."""
    full, rest = divmod(input_tokens, block_tokens)
    if len(blocks) not in (full, full + bool(rest)):
        raise ConfigError(
            f"{len(blocks)} hash_ids for {input_tokens} tokens: expected {full + bool(rest)} for "
            f"blocks of {block_tokens} tokens; if it has other blocks, say so (--block-tokens)"
        )
