# SPDX-License-Identifier: Apache-2.0
"""The sections of `kvlc`: which rows are coded together, and how.

docs/formats/codec.md has the layout; `kvlib.codecs.kvlc` says what is done and why. The way to
bytes and back is in `kvlib.codecs.kvlc_encode` and `kvlib.codecs.kvlc_decode`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from struct import Struct
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvlib.blocks import LayerKV
from kvlib.codecs.coefficients import Expected
from kvlib.codecs.container import SectionKind
from kvlib.codecs.kvlc_kernels import Turning, kernels
from kvlib.codecs.rope import Angles, angles, removable_rope
from kvlib.codecs.transforms import Profile, Transform
from kvlib.spec import KVSpec, RopeSpec

__all__ = [
    "KINDS",
    "Piece",
    "Settings",
    "Shared",
    "cuts_of",
    "expected_of",
    "form_of",
    "pieces_of",
    "rope_of",
    "same_tokens",
    "transform_of",
    "width_of",
]

KINDS = ((SectionKind.KEYS, "K"), (SectionKind.VALUES, "V"))
NAMES = dict(KINDS)

HEAD = Struct("<BBHIf")  # form, keys are turned back, zero, explicitly exempt rows, step
IDENTITY, _HEADS, _LAYER, GROUP, MEMBER = range(5)
_FORMS = {"near": IDENTITY, "balanced": _HEADS, "small": _LAYER, "archive": GROUP}
MEAN_STEP = 0.25  # of the step: all tokens of a chunk share the error of their mean
MOST_SYMBOLS = 1 << 25  # coded at once
_MOST_SHARED = 8

Int = NDArray[np.int64]
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a `KvlcCodec` asks for, of one model."""

    spec: KVSpec
    preset: str
    level: float
    chunk: int
    sinks: int
    profile: Profile | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that are coded together: entries of some heads, in some layers.

    Attributes:
        layers: whose channels lie side by side in a row.
        head: the only head, or None for all heads side by side, which hold the same tokens.
        positions: int64 [T], -1 for synthetic entries.
    """

    layers: tuple[LayerKV, ...]
    head: int | None
    positions: Int

    def parts(self, kind: SectionKind) -> list[Tensor]:
        """Of each layer its keys or values [heads, T, D]: views."""
        out = []
        for layer in self.layers:
            x = layer.keys if kind is SectionKind.KEYS else layer.values
            if self.head is None:
                out.append(x)
            elif layer.row_lengths is None:
                out.append(x[self.head : self.head + 1])
            else:
                first = sum(layer.row_lengths[: self.head])
                out.append(x[None, first : first + layer.row_lengths[self.head]])
        return out


@lru_cache(maxsize=4)
def _range(start: int, stop: int) -> Int:
    out = np.arange(start, stop)
    out.setflags(write=False)
    return out


def _tokens(layer: LayerKV) -> Int | None:
    """Positions that all heads of a layer share; None when they do not."""
    if isinstance(layer.positions, range):
        return _range(layer.positions.start, layer.positions.stop)
    if layer.row_lengths is not None:
        return None
    positions: Int = layer.positions.cpu().numpy().astype(np.int64)
    return positions[0] if bool((positions == positions[:1]).all()) else None


def _pruned(layers: Sequence[LayerKV]) -> bool:
    return any([x.channels is not None for x in layers])  # noqa: C419 (mostly there is but one)


def same_tokens(spec: KVSpec, layers: Sequence[LayerKV]) -> bool:
    """Whether these layers of one shape hold the same tokens in all heads, with all channels."""
    if _pruned(layers) or len({spec.layers[x.layer_idx] for x in layers}) > 1:
        return False
    every = [_tokens(layer) for layer in layers]
    first = every[0]
    return first is not None and all(x is not None and np.array_equal(x, first) for x in every)


def pieces_of(layers: Sequence[LayerKV]) -> list[Piece]:
    """Several layers hold the same tokens; of one, heads may differ."""
    tokens = _tokens(layers[0])
    if tokens is not None:
        return [Piece(tuple(layers), None, tokens)]
    (layer,) = layers
    return [
        Piece((layer,), head, row.positions.cpu().numpy().astype(np.int64))
        for head, row in enumerate(layer.rows())
    ]


def form_of(settings: Settings, layers: Sequence[LayerKV], width: int) -> int:
    """The transform that fits these layers; `width` is that of all channels of a row."""
    if settings.profile is None or width == 0 or _pruned(layers):
        return IDENTITY
    form = _FORMS[settings.preset]
    if form == GROUP and len(layers) == 1:
        form = _LAYER if "small" in settings.profile.presets else _HEADS
    if form == _LAYER and _tokens(layers[0]) is None:
        form = _HEADS
    return form


def transform_of(
    settings: Settings, form: int, piece: Piece, kind: SectionKind
) -> Transform | None:
    """What takes rows of a piece to coefficients; None for `near`."""
    profile, name = settings.profile, NAMES[kind]
    if form == IDENTITY or profile is None:
        return None
    first = piece.layers[0].layer_idx
    if form == _HEADS:
        heads = profile.heads(name, first)
        return heads if piece.head is None else heads.heads[piece.head]
    return profile.layers(name, first) if form == GROUP else profile.layer(name, first)


def rope_of(settings: Settings, layers: Sequence[LayerKV], kind: SectionKind) -> RopeSpec | None:
    """The rotation to take off; layers that are coded together rotate alike or not at all."""
    if kind is not SectionKind.KEYS or _pruned(layers):
        return None
    return removable_rope(settings.spec, layers[0].layer_idx)


def cuts_of(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """As few chunks as hold these tokens, of nearly equal length."""
    count = -(-tokens // chunk)
    edges = [tokens * i // count for i in range(count + 1)] if count else []
    return list(pairwise(edges))


def width_of(parts: Sequence[Tensor]) -> int:
    """Channels of a row."""
    return sum(x.shape[0] * x.shape[2] for x in parts)


class Shared:
    """What sections share, computed once: most layers hold the same tokens.

    Args:
        sinks: see `Settings`.
    """

    def __init__(self, sinks: int) -> None:
        self.kernel = kernels()
        self._sinks = sinks
        self._split: dict[bytes, tuple[Int, Int]] = {}
        self._angles: dict[tuple[RopeSpec, bytes, bytes], Angles] = {}
        # Of the last call: dense layers have their positions from `_range`, one array for all.
        self._last_split: tuple[Int, tuple[Int, Int]] | None = None
        self._last_turning: tuple[Int, Int, Turning] | None = None

    def split(self, positions: Int) -> tuple[Int, Int]:
        """Indices of the entries to be coded, and of those that are exempt for their position."""
        if self._last_split is not None and self._last_split[0] is positions:
            return self._last_split[1]
        key = positions.tobytes()
        found = self._split.get(key)
        if found is None:
            fixed = positions < self._sinks
            found = np.flatnonzero(~fixed), np.flatnonzero(fixed)
            _keep(self._split, key, found)
        self._last_split = positions, found
        return found

    def turning(self, rope: RopeSpec | None, positions: Int, index: Int) -> Turning | None:
        """The angles of the entries `index`, of which these are the positions of all."""
        if rope is None:
            return None
        last = self._last_turning
        if (
            last is not None
            and last[0] is positions
            and last[1] is index
            and (last[2][1] is rope or last[2][1] == rope)
        ):
            return last[2]
        key = rope, positions.tobytes(), index.tobytes()
        found = self._angles.get(key)
        if found is None:
            found = angles(rope, positions[index])
            _keep(self._angles, key, found)
        self._last_turning = positions, index, (found, rope)
        return found, rope


def _keep(known: dict[_K, _V], key: _K, value: _V) -> None:
    """Remember a few of the latest."""
    if len(known) >= _MOST_SHARED:
        known.clear()
    known[key] = value


def expected_of(transform: Transform | None, step: float) -> Expected | None:
    """What the profile says of the integers; None without a transform."""
    return None if transform is None else transform.statistics.expected(step, step * MEAN_STEP)
