# SPDX-License-Identifier: Apache-2.0
"""The linear transforms of `kvlc`: from keys and values to coefficients worth one step each.

A transform takes rows x of one or several layers, [n, width], to coefficients [n, r] and back. It
is made by calibration (`kvlib.calibration.kvlc`) such that an error of one unit in any coefficient
harms the model's next-token distribution alike, and that coefficients are uncorrelated and come in
order of importance; so one step serves them all, and every channel finds the table that suits it.

What is stored is the way back, `decode` [width, r] in float16: x = decode y + offset. The way
forward is its
left inverse that is best in the metric M, of which each layer has a block:
y = (D' M D)^-1 D' M x. It is the encoder's affair, and computed when first needed.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvlib.artefacts import Artefact, find_artefact, load_artefact, model_identity
from kvlib.codecs.coefficients import Expected, levels_of
from kvlib.codecs.products import Products
from kvlib.errors import ConfigError
from kvlib.spec import KVSpec

__all__ = [
    "KIND",
    "PRESETS",
    "HeadsTransform",
    "MatrixTransform",
    "Profile",
    "Transform",
    "find_profile",
    "forget_profile",
    "level_for",
    "load_profile",
    "remember_profile",
]

Float = NDArray[np.float32]
Double = NDArray[np.float64]

KIND = "codec"
PRESETS = ("near", "balanced", "small", "archive")


@dataclass(frozen=True, eq=False)
class Statistics:
    """What to expect of coefficients, float64 [r] each.

    Attributes:
        mean: over all tokens.
        deviation: of tokens within a chunk.
        mean_deviation: of the means of chunks.
    """

    mean: Double
    deviation: Double
    mean_deviation: Double
    _expected: tuple[tuple[float, float], Expected] | None = field(default=None, init=False)

    def expected(self, step: float, mean_step: float) -> Expected:
        """Levels of the integers that steps make of them."""
        known = self._expected
        if known is None or known[0] != (step, mean_step):
            levels = levels_of(self.deviation / step), levels_of(self.mean_deviation / mean_step)
            known = (step, mean_step), Expected(*levels)
            object.__setattr__(self, "_expected", known)  # all chunks of a file share one step
        return known[1]


class Transform(Protocol):
    """Rows to coefficients and back."""

    @property
    def statistics(self) -> Statistics:
        """What to expect of coefficients."""
        ...

    @property
    def offset(self) -> Float:
        """What is added to every row, [width]."""
        ...

    @property
    def rank(self) -> int:
        """Coefficients of a row."""
        ...

    def forward(self, x: Float) -> Float:
        """Rows [n, width] to coefficients [n, r]."""
        ...

    @property
    def parts(self) -> int:
        """Transforms that take turns in the coefficients."""
        ...

    def join(self, y: Float) -> Float:
        """The first coefficients of each part, [parts, n, a], to rows [n, width]."""
        ...

    def back(self, y: Float) -> Float:
        """The first coefficients [n, a] to rows [n, width], the others being 0."""
        ...


@dataclass(frozen=True, eq=False)
class MatrixTransform:
    """One matrix for all channels of a layer, of a group of layers, or of one head.

    Attributes:
        decode: float32 [width, r].
        metrics: float64 blocks of the metric, whose sizes add up to the width.
        statistics: of the coefficients.
        offset: float32 [width], the part of the mean row that no coefficients make; 0 if r is the
            width.
    """

    decode: Float
    metrics: tuple[Double, ...]
    statistics: Statistics
    offset: Float

    @property
    def rank(self) -> int:
        """See `Transform`."""
        return int(self.decode.shape[1])

    @cached_property
    def _encode(self) -> Float:
        decode = self.decode.astype(np.float64)
        weighted = np.empty_like(decode)
        at = 0
        for block in self.metrics:
            stop = at + len(block)
            weighted[at:stop] = block @ decode[at:stop]
            at = stop
        return np.ascontiguousarray(
            np.linalg.solve(decode.T @ weighted, weighted.T).T.astype(np.float32)
        )

    @cached_property
    def _products(self) -> Products:
        return Products([self.decode.T])

    def forward(self, x: Float) -> Float:
        """See `Transform`."""
        return x @ self._encode

    @property
    def parts(self) -> int:
        """See `Transform`."""
        return 1

    def join(self, y: Float) -> Float:
        """See `Transform`."""
        return self._products.rows(y)

    def back(self, y: Float) -> Float:
        """See `Transform`."""
        return self._products.rows(y[None])


@dataclass(frozen=True, eq=False)
class HeadsTransform:
    """One matrix a head. Coefficient j of all heads comes before coefficient j + 1 of any.

    Attributes:
        heads: a transform for each head, of equal width and rank.
    """

    heads: tuple[MatrixTransform, ...]

    @property
    def rank(self) -> int:
        """See `Transform`."""
        return sum(head.rank for head in self.heads)

    @cached_property
    def statistics(self) -> Statistics:
        """See `Transform`."""
        parts = [head.statistics for head in self.heads]
        return Statistics(
            *(
                np.stack([getattr(p, name) for p in parts], axis=1).ravel()
                for name in ("mean", "deviation", "mean_deviation")
            )
        )

    @cached_property
    def offset(self) -> Float:
        """See `Transform`."""
        return np.concatenate([head.offset for head in self.heads])

    def forward(self, x: Float) -> Float:
        """See `Transform`."""
        width = self.heads[0].decode.shape[0]
        out = np.empty((len(x), self.rank), np.float32)
        for h, head in enumerate(self.heads):
            out[:, h :: len(self.heads)] = head.forward(x[:, h * width : (h + 1) * width])
        return out

    def back(self, y: Float) -> Float:
        """See `Transform`."""
        missing = -y.shape[1] % self.parts
        whole = np.pad(y, ((0, 0), (0, missing))) if missing else y
        return self.join(whole.reshape(len(y), -1, self.parts).transpose(2, 0, 1))

    @property
    def parts(self) -> int:
        """See `Transform`."""
        return len(self.heads)

    @cached_property
    def _products(self) -> Products:
        return Products([head.decode.T for head in self.heads])

    def join(self, y: Float) -> Float:
        """See `Transform`."""
        return self._products.rows(y)


class Profile:
    """A loaded calibration artefact.

    Args:
        artefact: of kind `kvlc`; see `kvlib.calibration.kvlc` for the names in it.
    """

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact
        self.digest = artefact.digest
        self.presets = tuple(artefact.settings["presets"].split())
        self.group = int(artefact.settings["group"])
        self._transforms: dict[tuple[object, ...], Transform] = {}
        self._checked: KVSpec | None = None

    def check(self, spec: KVSpec) -> None:
        """Refuse another model; see `Artefact.check_model`."""
        if spec is not self._checked:
            self.artefact.check_model(model_identity(spec))
            self._checked = spec

    def curve(self, preset: str) -> tuple[Double, Double, Double]:
        """Levels, and bits a value and KL (nats) of held-out text at each of them."""
        names = (f"{preset}.levels", f"{preset}.bits", f"{preset}.kl")
        levels, bits, kl = (self._array(n).astype(np.float64) for n in names)
        return levels, bits, kl

    def near_step(self, kind: str, layer_idx: int) -> float:
        """Step of `near` at level 1, in the unit of the numbers."""
        return float(self._array(f"near.{kind}")[layer_idx])

    def heads(self, kind: str, layer_idx: int) -> HeadsTransform:
        """The transform of `balanced`."""
        out = self._cached(("heads", kind, layer_idx), self._load_heads)
        assert isinstance(out, HeadsTransform)  # noqa: S101 (what that key stands for)
        return out

    def layer(self, kind: str, layer_idx: int) -> Transform:
        """The transform of `small`."""
        return self._cached(("small", kind, layer_idx), self._load)

    def layers(self, kind: str, first: int) -> Transform:
        """The transform of `archive` for the group of layers from `first` on."""
        return self._cached(("archive", kind, first), self._load)

    def _cached(self, key: tuple[str, str, int], load: Any) -> Transform:
        found = self._transforms.get(key)
        if found is None:
            found = self._transforms.setdefault(key, load(*key))
        return found

    def _array(self, name: str) -> Any:
        if name not in self.artefact.tensors:
            raise ConfigError(
                f"the profile {self.digest} lacks {name}: make it again with kvlib calibrate codec"
            )
        return self.artefact.tensors[name].numpy()

    def _statistics(self, name: str) -> Statistics:
        mean, deviation, mean_deviation = self._array(f"{name}.statistics").astype(np.float64)
        return Statistics(mean, deviation, mean_deviation)

    def _load(self, preset: str, kind: str, first: int) -> Transform:
        name = f"{preset}.{kind}.{first}"
        last = min(first + self.group, int(self.artefact.settings["layers"]))
        layers = range(first, last if preset == "archive" else first + 1)
        metrics = tuple(self._array(f"metric.{kind}.{i}").astype(np.float64) for i in layers)
        decode = self._array(f"{name}.decode").astype(np.float32)
        no_offset = np.zeros(len(decode), np.float32)
        offset = self._array(f"{name}.offset") if preset == "archive" else no_offset
        return MatrixTransform(decode, metrics, self._statistics(name), offset)

    def _load_heads(self, _: str, kind: str, layer_idx: int) -> Transform:
        name = f"balanced.{kind}.{layer_idx}"
        decode = self._array(f"{name}.decode").astype(np.float32)  # [H, D, r]
        mean, deviation, mean_deviation = self._array(f"{name}.statistics").astype(np.float64)
        metric = self._array(f"metric.{kind}.{layer_idx}").astype(np.float64)
        width = decode.shape[1]
        return HeadsTransform(
            tuple(
                MatrixTransform(
                    decode[h],
                    (metric[h * width : (h + 1) * width, h * width : (h + 1) * width],),
                    Statistics(mean[h], deviation[h], mean_deviation[h]),
                    np.zeros(width, np.float32),
                )
                for h in range(len(decode))
            )
        )


_read: dict[str, Profile] = {}  # by digest


def load_profile(path: str, digest: str = "") -> Profile:
    """Read a profile.

    Raises:
        ConfigError: see `kvlib.artefacts.load_artefact`.
    """
    artefact = load_artefact(path, KIND, digest)
    return _read.setdefault(artefact.digest, Profile(artefact))


def remember_profile(profile: Profile) -> None:
    """Let `find_profile` find a profile that is in no file."""
    _read[profile.digest] = profile


def forget_profile(digest: str) -> None:
    """Undo `remember_profile`."""
    _read.pop(digest, None)


def find_profile(digest: str) -> Profile:
    """The profile with that digest: one that was read before, or see `find_artefact`.

    Raises:
        ConfigError: it is nowhere, or damaged.
    """
    if digest not in _read:
        _read[digest] = Profile(find_artefact(KIND, digest))
    return _read[digest]


def level_for(profile: Profile, preset: str, name: str, wanted: float) -> float:
    """The level at which held-out text took `wanted` bits a value, or cost `wanted` nats.

    Between measured levels both are interpolated on logarithmic scales.

    Raises:
        ConfigError: beyond what was measured.
    """
    levels, bits, kl = profile.curve(preset)
    curve = bits if name == "bits" else kl
    low, high = float(curve.min()), float(curve.max())
    if not low <= wanted <= high:
        raise ConfigError(
            f"kvlc:{name}={wanted:g} is outside what the profile measured for preset {preset}: "
            f"{low:.4g} to {high:.4g}"
        )
    order = np.argsort(curve)
    return float(np.exp(np.interp(np.log(wanted), np.log(curve[order]), np.log(levels[order]))))
