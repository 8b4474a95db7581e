# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a KV cache mean, and the two fingerprints that name it.

Shape legend used everywhere: B batch, T tokens, Hq query heads, Hkv KV heads, G group, D head dim,
L layers, N packed rows.

`KVSpec.fingerprint()` names the numbers: model, adapter, weight quantization, dtype, RoPE, layer
kinds. `storage_fingerprint()` names the form they are stored in: block size, head range, codec,
fidelity. A block key holds only the first, so that one prefix has one key on every engine; a stored
record holds both. Only the standard library is needed here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TypeVar

from kvlib.errors import ConfigError
from kvlib.keys import BLOCK_TOKENS, Namespace, digest

__all__ = [
    "DTYPES",
    "EXACT",
    "DType",
    "KVSpec",
    "LayerKind",
    "LayerSpec",
    "RopeSpec",
    "RopeState",
    "storage_fingerprint",
]

EXACT = "exact"
"""The fidelity of KV that was computed from exact KV and stored without loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """An element type: `code` is its number in containers, `itemsize` its bytes."""

    name: str
    code: int
    itemsize: int


DTYPES: Mapping[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType(name="float32", code=1, itemsize=4),
        DType(name="float16", code=2, itemsize=2),
        DType(name="bfloat16", code=3, itemsize=2),
        DType(name="float8_e4m3fn", code=4, itemsize=1),
        DType(name="float8_e5m2", code=5, itemsize=1),
    )
}
"""Element types a block may have, by torch's name. Codes are part of the container format."""


class LayerKind(StrEnum):
    """How a layer keeps its past."""

    FULL = "full"
    """Every token stays."""
    SLIDING = "sliding"
    """Only the last `window` tokens are attended."""
    MLA = "mla"
    """One latent vector a token (`k_head_dim` wide, no values) stands for all heads."""
    RECURRENT = "recurrent"
    """A state of fixed size; there are no tokens to cut."""


class RopeState(StrEnum):
    """Whether stored keys are rotated."""

    POST = "post"
    PRE = "pre"
    NONE = "none"
    """The model has no rotary embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of a layer.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: channels of a head that are rotated (an even number).
        kind: scaling rule: default, linear, llama3, yarn, dynamic or longrope.
        params: the rule's numbers by their transformers name, sorted by name; item i of a list is
            `name.i`.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise channel i pairs with i + rotary_dim /
            2, both counted from `first_channel`.
        first_channel: where the rotated channels begin; 0 but for MLA, whose latent comes first.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    params: tuple[tuple[str, float], ...] = ()
    interleaved: bool = False
    first_channel: int = 0

    def __post_init__(self) -> None:
        """Check ranges and put `params` in order."""
        if (
            type(self.rotary_dim) is not int
            or not 2 <= self.rotary_dim < 1 << 16
            or self.rotary_dim % 2
        ):
            raise ConfigError(
                f"rotary_dim must be a positive even integer, got {self.rotary_dim!r}"
            )
        if type(self.first_channel) is not int or not 0 <= self.first_channel < 1 << 16:
            raise ConfigError(f"first_channel must lie in 0..65535, got {self.first_channel!r}")
        _check_text(self, "kind")
        try:
            theta = float(self.theta)
            params = tuple(sorted((str(k), float(v)) for k, v in self.params))
        except (TypeError, ValueError, OverflowError) as exc:
            raise ConfigError(
                f"theta and params must be numbers, got {self.theta!r} and {self.params!r}"
            ) from exc
        if not (math.isfinite(theta) and theta > 0):
            raise ConfigError(f"theta must be a positive number, got {self.theta}")
        if len({name for name, _ in params}) != len(params) or not all(
            math.isfinite(v) for _, v in params
        ):
            raise ConfigError(f"params must be finite and named once each, got {params}")
        object.__setattr__(self, "theta", theta)
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "interleaved", bool(self.interleaved))

    def inverse_frequencies(self) -> list[float]:
        """The `rotary_dim / 2` angular frequencies in radians per position.

        Raises:
            ConfigError: for kinds whose frequencies depend on the sequence length (dynamic,
                longrope) or are unknown.

        Source: default Su et al. 2021 (arXiv:2104.09864); linear Chen et al. 2023
        (arXiv:2306.15595); yarn Peng et al. 2023 (arXiv:2309.00071), section 3.2; llama3: Llama
        3.1's published scaling rule.
        """
        try:
            return self._frequencies()
        except (ArithmeticError, ValueError) as exc:
            if isinstance(exc, ConfigError):
                raise
            raise ConfigError(
                f"the numbers of RoPE kind {self.kind!r} make no frequencies: theta {self.theta}, "
                f"{dict(self.params)}"
            ) from exc

    def _frequencies(self) -> list[float]:
        half = self.rotary_dim // 2
        base = [self.theta ** (-2.0 * i / self.rotary_dim) for i in range(half)]
        given = dict(self.params)
        if self.kind == "default":
            return base
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ConfigError(
                f"the frequencies of RoPE kind {self.kind!r} are not fixed: keys cannot be moved "
                "to other positions; this works for default, linear, llama3 and yarn"
            )
        factor = self._param(given, "factor")
        if self.kind == "linear":
            return [f / factor for f in base]
        context = self._param(given, "original_max_position_embeddings")
        if self.kind == "llama3":
            low, high = (
                self._param(given, "low_freq_factor"),
                self._param(given, "high_freq_factor"),
            )
            out = []
            for f in base:
                turns = context * f / (2 * math.pi)  # full turns within the original context
                keep = min(1.0, max(0.0, (turns - low) / (high - low)))
                out.append(f / factor * (1 - keep) + f * keep)
            return out

        def channel_of(turns: float) -> float:
            return (
                self.rotary_dim
                * math.log(context / (turns * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        first, last = (
            channel_of(given.get("beta_fast", 32.0)),
            channel_of(given.get("beta_slow", 1.0)),
        )
        if given.get("truncate", 1.0):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.rotary_dim - 1)
        if first == last:
            last += 0.001
        ramps = [min(1.0, max(0.0, (i - first) / (last - first))) for i in range(half)]
        return [f / factor * ramp + f * (1 - ramp) for f, ramp in zip(base, ramps, strict=True)]

    def _param(self, given: Mapping[str, float], name: str) -> float:
        if name not in given:
            raise ConfigError(
                f"RoPE kind {self.kind!r} needs the parameter {name!r}; it has {sorted(given)}"
            )
        return given[name]

    def _fields(self) -> tuple[object, ...]:
        return (
            self.kind,
            self.theta,
            self.rotary_dim,
            self.interleaved,
            self.params,
            self.first_channel,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer: its kind and the shape of what it keeps a token.

    Attributes:
        kind: see `LayerKind`.
        num_kv_heads: Hkv of the whole model, never of one tensor-parallel rank (1 for MLA, 0 for
            recurrent).
        k_head_dim: channels of a key (for MLA: of the latent, rotary part included).
        v_head_dim: channels of a value (0 for MLA).
        window: tokens a sliding layer attends to, its own included; 0 elsewhere.
        rope: rotary embedding, or None.
    """

    kind: LayerKind = LayerKind.FULL
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    window: int = 0
    rope: RopeSpec | None = None

    def __post_init__(self) -> None:
        """Check that the numbers fit the kind."""
        object.__setattr__(self, "kind", _member(LayerKind, self.kind, "layer kind"))
        for name in ("num_kv_heads", "k_head_dim", "v_head_dim", "window"):
            value = getattr(self, name)
            if (
                type(value) is not int or not 0 <= value < 1 << 16
            ):  # True would be equal to 1 and hash differently
                raise ConfigError(f"{name} must be an integer in 0..65535, got {value!r}")
        recurrent = self.kind is LayerKind.RECURRENT
        if recurrent != (self.num_kv_heads == 0) or recurrent != (self.k_head_dim == 0):
            raise ConfigError(
                f"a {self.kind} layer cannot have {self.num_kv_heads} KV heads of "
                f"{self.k_head_dim} channels"
            )
        if self.kind is LayerKind.MLA and (self.num_kv_heads, self.v_head_dim) != (1, 0):
            raise ConfigError(
                "an mla layer has one head and no values (num_kv_heads=1, v_head_dim=0)"
            )
        if (self.kind is LayerKind.SLIDING) != (self.window > 0):
            raise ConfigError(
                f"window is {self.window} in a {self.kind} layer; only sliding layers have one"
            )
        if self.rope is not None:
            last = self.rope.first_channel + self.rope.rotary_dim
            if last > self.k_head_dim:
                raise ConfigError(
                    f"RoPE rotates channels up to {last} of a head of {self.k_head_dim} channels"
                )

    def _fields(self) -> tuple[object, ...]:
        rope = None if self.rope is None else self.rope._fields()
        return (
            str(self.kind),
            self.num_kv_heads,
            self.k_head_dim,
            self.v_head_dim,
            self.window,
            rope,
        )


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """What the bytes of a KV cache mean.

    Attributes:
        model_id: identity of the weights (`kvlib.model_spec` finds it for transformers models).
        layers: one `LayerSpec` a layer, in model order.
        dtype: element type of keys and values, a name in `DTYPES`.
        adapter: identity of a LoRA or other adapter, "" without one.
        weight_quantization: "" for unquantized weights.
        rope_state: whether the keys are rotated.
        kv_scales: identity of the scales that 8-bit KV was quantized with, "" without any.
    """

    model_id: str
    layers: tuple[LayerSpec, ...]
    dtype: str
    adapter: str = ""
    weight_quantization: str = ""
    rope_state: RopeState = RopeState.POST
    kv_scales: str = ""

    def __post_init__(self) -> None:
        """Check ranges."""
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "rope_state", _member(RopeState, self.rope_state, "rope_state"))
        for name in ("model_id", "dtype", "adapter", "weight_quantization", "kv_scales"):
            _check_text(self, name)
        if not self.model_id:
            raise ConfigError(
                "model_id is empty: without an identity, two models would share each other's cache"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not 0 < len(self.layers) < 1 << 16:
            raise ConfigError(f"a model has 1 to 65535 layers, got {len(self.layers)}")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @cached_property
    def _fingerprint(self) -> bytes:
        return digest(
            Namespace.SPEC,
            self.model_id,
            self.adapter,
            self.weight_quantization,
            self.dtype,
            str(self.rope_state),
            self.kv_scales,
            tuple(layer._fields() for layer in self.layers),
        )

    def fingerprint(self) -> bytes:
        """32 bytes that name the numbers; never the layout, page size, head range or codec."""
        return self._fingerprint

    def bytes_per_token(self) -> int:
        """Bytes that one token adds over all layers (recurrent layers add none)."""
        values = sum(
            layer.num_kv_heads * (layer.k_head_dim + layer.v_head_dim) for layer in self.layers
        )
        return values * DTYPES[self.dtype].itemsize

    def require(self, kinds: Iterable[LayerKind], component: str) -> None:
        """Refuse, by name, the layers that `component` cannot handle.

        Raises:
            ConfigError: naming the kinds and layers found and the kinds supported.
        """
        supported = tuple(kinds)
        found: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            if layer.kind not in supported:
                found.setdefault(str(layer.kind), []).append(index)
        if found:
            seen = "; ".join(f"{kind} layers {_ranges(indices)}" for kind, indices in found.items())
            raise ConfigError(
                f"{component} supports {', '.join(supported)} layers only; model {self.model_id!r} "
                f"has {seen}"
            )


_E = TypeVar("_E", bound=StrEnum)


def _member(enum: type[_E], value: str, what: str) -> _E:
    try:
        return enum(value)
    except ValueError as exc:
        raise ConfigError(f"{what} {value!r} is not one of {', '.join(enum)}") from exc


def _check_text(owner: object, name: str) -> None:
    if not isinstance(getattr(owner, name), str):
        raise ConfigError(f"{name} must be text, got {getattr(owner, name)!r:.80}")


def _ranges(indices: list[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    out: list[list[int]] = []
    for index in indices:
        if out and out[-1][1] == index - 1:
            out[-1][1] = index
        else:
            out.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def storage_fingerprint(
    spec: KVSpec,
    codec: str,
    *,
    fidelity: str = EXACT,
    head_range: tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
    profile: str = "",
) -> bytes:
    """32 bytes that name the form in which blocks of `spec` are stored.

    Args:
        spec: what the numbers mean.
        codec: canonical codec string, every parameter given (`kvlib.codecs.Codec.describe`).
        fidelity: lowest fidelity among the KV the blocks were computed from: `EXACT`, or the
            canonical string of the lossy codec or method that an ancestor went through. Exact
            requests never see other records.
        head_range: KV heads [first, last) of a tensor-parallel rank, counted in the layer that has
            most; None for all.
        layers: layers of a pipeline-parallel rank; None for all that keep tokens.
        profile: id of a calibration artefact that decoding needs, "" without one.
    """
    if layers is None:
        layers = [i for i, layer in enumerate(spec.layers) if layer.kind is not LayerKind.RECURRENT]
    return storage_digest(spec.fingerprint(), codec, fidelity, head_range, tuple(layers), profile)


def storage_digest(
    fingerprint: bytes,
    codec: str,
    fidelity: str,
    head_range: tuple[int, int] | None,
    layers: tuple[int, ...],
    profile: str,
) -> bytes:
    """The storage fingerprint from what a container's header holds."""
    return digest(
        Namespace.STORAGE, fingerprint, BLOCK_TOKENS, codec, fidelity, head_range, layers, profile
    )
