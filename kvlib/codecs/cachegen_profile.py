# SPDX-License-Identifier: Apache-2.0
"""What `kvlib calibrate cachegen` measured, as `cachegen` uses it: bin widths and tables.

Tensors of the artefact, for n layers that keep tokens, K levels, and the C channels (heads times
head dim) that keys or values of a layer have:

    levels                 float64 [K], ascending
    layers                 int64 [n], their indices in the model
    sigma                  float32 [n, 2]: what one bin is measured in, of keys and of values
    LAYER.KIND.anchors     int16 [C, 256]: frequencies of the codes of anchors, KIND keys or values
    LAYER.KIND.deltas.I    int16 [C, 256]: those of the bins of deltas at level I

A row of frequencies adds up to 4096. Symbol 127 + v stands for the whole number v in -127..127; the
numbers that a row can code are one range around 0. Symbol 255 says that the number is elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvlib.artefacts import Artefact, find_artefact, load_artefact, model_identity
from kvlib.codecs.cachegen_kernels import ESCAPE, GROUP, LARGEST, Kernels
from kvlib.codecs.cachegen_lines import batches
from kvlib.codecs.rans import MAX_LANES, Tables
from kvlib.errors import ConfigError, CorruptDataError
from kvlib.spec import KVSpec, LayerKind

__all__ = [
    "ESCAPE",
    "FACTORS",
    "GROUP",
    "KINDS",
    "LARGEST",
    "MAX_ROWS",
    "SYMBOLS",
    "ChannelTables",
    "Profile",
    "SharedTables",
    "TableSet",
    "find_profile",
    "kept_layers",
    "load_profile",
    "third",
    "widths",
]

Floats = NDArray[np.float32]

KIND = "cachegen"
"""Of the artefact."""
KINDS = ("keys", "values")
SYMBOLS = 256
FACTORS = (0.5, 1.0, 1.5)
"""What bins of the first, middle and last third of the layers are multiplied by."""
MAX_ROWS = 1 << 16
"""Of one `Tables`."""
_MAX_WIDTH = 1e4  # of a bin: half of one must not leave float16


def kept_layers(spec: KVSpec) -> list[int]:
    """Indices of the layers that keep tokens."""
    return [i for i, x in enumerate(spec.layers) if x.kind is not LayerKind.RECURRENT]


def widths(spec: KVSpec, layer_idx: int) -> tuple[int, int]:
    """Channels of keys and of values of a layer, all heads together."""
    layer = spec.layers[layer_idx]
    return layer.num_kv_heads * layer.k_head_dim, layer.num_kv_heads * layer.v_head_dim


def third(place: int, num: int) -> int:
    """0, 1 or 2: which third of `num` layers the one at `place` is in."""
    return 3 * place // num


@dataclass(frozen=True, eq=False)
class SharedTables:
    """Rows of several layers at one level: what has them can be coded together.

    Args:
        tables: the rows.
    """

    tables: Tables
    _lookups: dict[str, Any] = field(default_factory=dict)

    def lookup(self, kernel: Kernels) -> Any:
        """What the kernels decode with; made once."""
        found = self._lookups.get(kernel.__name__)
        if found is None:
            found = self._lookups[kernel.__name__] = kernel.lookup(self.tables)
        return found


@dataclass(frozen=True, eq=False)
class TableSet:
    """How the numbers of one layer and kind are coded at one level.

    Args:
        width: float32, of a bin of deltas.
        shared: where its rows are: C for deltas, then C for anchors.
        first: the first of these rows.
        low: float32 [2C], the smallest number that each row can code.
        high: float32 [2C], the largest.
    """

    width: np.float32
    shared: SharedTables
    first: int
    low: Floats
    high: Floats

    def of(self, channels: NDArray[np.int64] | None) -> "ChannelTables":
        """The same for some of the channels, or for all.

        Raises:
            CorruptDataError: there is no such channel.
        """
        if channels is None:
            return self._every
        num = self.low.size // 2
        if channels.size and not 0 <= channels.min() <= channels.max() < num:
            raise CorruptDataError(
                f"channels {channels.min()}..{channels.max()} of a layer that has {num}"
            )
        rows = [channels + num, channels]
        group = np.concatenate([rows[0], *[rows[1]] * (GROUP - 1)])
        columns = np.resize(group, group.size + MAX_LANES if group.size else 0) + self.first
        low, high = ([edge[r] for r in rows] for edge in (self.low, self.high))
        return ChannelTables(self.width, self.shared, columns.astype(np.uint32), low, high)

    @cached_property
    def _every(self) -> "ChannelTables":
        return self.of(np.arange(self.low.size // 2))


@dataclass(frozen=True, eq=False, slots=True)
class ChannelTables:
    """How the columns of a matrix are coded.

    Args:
        width: float32, of a bin of deltas.
        shared: the tables.
        columns: uint32 [GROUP * C + MAX_LANES], which of their rows the numbers of a group of
            tokens have, and from the front again.
        low: float32 [C] each, the smallest number that anchors, and deltas, can have as symbols.
        high: float32 [C] each, the largest.
    """

    width: np.float32
    shared: SharedTables
    columns: NDArray[np.uint32]
    low: list[Floats]
    high: list[Floats]


@dataclass(frozen=True, eq=False)
class Profile:
    """A checked artefact."""

    artefact: Artefact
    _sets: dict[tuple[int, int, float], TableSet] = field(default_factory=dict)
    _known: dict[KVSpec, bool] = field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Of the artefact."""
        return self.artefact.tensors

    @cached_property
    def levels(self) -> list[float]:
        """Every level that it has tables for, ascending.

        Raises:
            ConfigError: the artefact does not say.
        """
        levels: list[float] = self._tensor("levels", torch.float64, None).tolist()
        if not levels or not all(np.isfinite(x) and x > 0 for x in levels):
            raise self._wrong(f"levels are {levels}")
        return levels

    @cached_property
    def _places(self) -> dict[int, int]:
        layers = self._tensor("layers", torch.int64, None).tolist()
        return {layer: place for place, layer in enumerate(layers)}

    def check(self, spec: KVSpec) -> None:
        """Refuse a model that it was not made for.

        Raises:
            ConfigError: saying why.
        """
        if spec in self._known:
            return
        self.artefact.check_model(model_identity(spec))
        if list(self._places) != kept_layers(spec):
            raise self._wrong(f"layers are {list(self._places)}")
        for layer_idx in self._places:
            for kind, channels in enumerate(widths(spec, layer_idx)):
                if channels:
                    for name in self._names(layer_idx, kind, range(len(self.levels))):
                        self._tensor(name, torch.int16, (channels, SYMBOLS))
        self._known[spec] = True

    def tables(self, layer_idx: int, kind: int, level: float) -> TableSet:
        """How keys (kind 0) or values (1) of a layer are coded.

        Those of all layers are made when the first of a level is asked for.

        Raises:
            ConfigError: the artefact holds something that is no table.
        """
        key = (layer_idx, kind, level)
        if key not in self._sets:
            self._make(level)
        found = self._sets.get(key)
        if found is None:
            raise self._wrong(f"{KINDS[kind]} of layer {layer_idx} are not there")
        return found

    def _make(self, level: float) -> None:
        index = self.levels.index(level)
        keys, rows = [], []
        for layer_idx in self._places:
            for kind in range(len(KINDS)):
                anchors, deltas = self._names(layer_idx, kind, [index])
                if deltas in self.tensors:  # else there are no channels
                    keys.append((layer_idx, kind))
                    rows.append(torch.cat([self.tensors[deltas], self.tensors[anchors]]).numpy())
        every = list(zip(keys, rows, strict=True))
        for some in batches(every, [len(x) for x in rows], MAX_ROWS):
            self._share(level, some)

    def _share(self, level: float, some: list[tuple[tuple[int, int], NDArray[np.int16]]]) -> None:
        """Make the table sets of some layers and kinds, whose rows are given."""
        tables = Tables(np.concatenate([rows for _, rows in some]))
        coded = tables.frequencies[:, : 2 * LARGEST + 1] > 0
        low = coded.argmax(1)
        high = 2 * LARGEST - coded[:, ::-1].argmax(1)
        wrong = (coded.sum(1) != high - low + 1) | (low > LARGEST) | (high < LARGEST)
        wrong |= tables.frequencies[:, ESCAPE] == 0
        edges = [(x - LARGEST).astype(np.float32) for x in (low, high)]
        shared = SharedTables(tables)
        first = 0
        for (layer_idx, kind), mine in some:
            last = first + len(mine)
            if wrong[first:last].any():
                raise self._wrong(f"a table of layer {layer_idx} has gaps, or no escape")
            width = self._width(layer_idx, kind, level)
            of_mine = [edge[first:last] for edge in edges]
            self._sets[layer_idx, kind, level] = TableSet(width, shared, first, *of_mine)
            first = last

    def _width(self, layer_idx: int, kind: int, level: float) -> np.float32:
        place, num = self._places[layer_idx], len(self._places)
        sigma = self._tensor("sigma", torch.float32, (num, 2))[place, kind].item()
        width = level * FACTORS[third(place, num)] * sigma
        if not 1e-20 < width < _MAX_WIDTH:
            raise self._wrong(f"sigma of layer {layer_idx} is {sigma}")
        return np.float32(width)

    def _names(self, layer_idx: int, kind: int, levels: "range | list[int]") -> list[str]:
        stem = f"{layer_idx}.{KINDS[kind]}"
        return [f"{stem}.anchors", *(f"{stem}.deltas.{i}" for i in levels)]

    def _tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None) -> Tensor:
        x = self.tensors.get(name)
        if x is None or x.dtype != dtype or (x.dim() != 1 if shape is None else x.shape != shape):
            seen: Any = None if x is None else (x.dtype, tuple(x.shape))
            raise self._wrong(f"{name} is {seen}")
        return x

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(
            f"the cachegen artefact {self.artefact.digest} is not one: {what}; make it again with "
            "kvlib calibrate cachegen"
        )


_read: dict[str, Profile] = {}  # by digest; all codecs with one profile share its tables


def load_profile(path: str, digest: str = "") -> Profile:
    """Read a profile.

    Raises:
        ConfigError: see `kvlib.artefacts.load_artefact`.
    """
    artefact = load_artefact(path, KIND, digest)
    return _read.setdefault(artefact.digest, Profile(artefact))


def find_profile(digest: str) -> Profile:
    """The profile with that digest: one that was read before, or see `find_artefact`.

    Raises:
        ConfigError: it is nowhere, or damaged.
    """
    if digest not in _read:
        _read[digest] = Profile(find_artefact(KIND, digest))
    return _read[digest]
