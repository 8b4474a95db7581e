# SPDX-License-Identifier: Apache-2.0
"""Turning keys back to position 0, and forward again.

A rotary embedding hides what keys have in common: the channels of a pair exchange their parts from
token to token. Without it each channel has a mean and a deviation of its own, and codes in fewer
bits. Positions are explicit, so the keys of evicted caches turn back as well.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlib.errors import ConfigError
from kvlib.spec import KVSpec, RopeSpec, RopeState

__all__ = ["Angles", "angles", "removable_rope", "turn"]

Float = NDArray[np.float32]
Angles = tuple[Float, Float]
"""Cosines and sines, float32 [n, rotary_dim / 2] each."""


def removable_rope(spec: KVSpec, layer_idx: int) -> RopeSpec | None:
    """The rotation that can be taken off a layer's keys; None where there is none to take off.

    Frequencies that depend on the sequence's length (dynamic, longrope) cannot be undone later.
    """
    rope = spec.layers[layer_idx].rope
    if rope is None or spec.rope_state is not RopeState.POST:
        return None
    return None if _frequencies(rope) is None else rope


@cache
def _frequencies(rope: RopeSpec) -> NDArray[np.float64] | None:
    try:
        return np.array(rope.inverse_frequencies())
    except ConfigError:
        return None


def angles(rope: RopeSpec, positions: NDArray[np.integer[Any]]) -> Angles:
    """Cosines and sines at each position; the products are float64, the results float32."""
    frequencies = _frequencies(rope)
    if frequencies is None:
        raise ConfigError(f"keys cannot be turned under RoPE kind {rope.kind!r}")
    turned = positions.astype(np.float64)[:, None] * frequencies
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


def turn(x: Float, at: Angles, rope: RopeSpec, *, back: bool) -> None:
    """Rotate keys [n, heads, D] in place, to their positions or `back` to position 0."""
    cos, sin = at[0][:, None], -at[1][:, None] if back else at[1][:, None]
    first, half = rope.first_channel, rope.rotary_dim // 2
    rotated = x[..., first : first + rope.rotary_dim]
    a = rotated[..., 0::2] if rope.interleaved else rotated[..., :half]
    b = rotated[..., 1::2] if rope.interleaved else rotated[..., half:]
    turned = a * cos - b * sin
    b[...] = b * cos + a * sin
    a[...] = turned
