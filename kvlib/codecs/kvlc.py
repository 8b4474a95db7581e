# SPDX-License-Identifier: Apache-2.0
"""`kvlc`: fewer bits than CacheGen at the same quality.

What it does to the keys or values of a layer, and why:

1. **Exempt** tokens are stored as they are: the first `sinks` positions, on which attention leans
   so much that any error there shows everywhere, synthetic entries, and what is not finite.
2. Keys are turned back to position 0 (`kvlib.codecs.rope`), whatever the positions are.
3. In chunks of `chunk` tokens a **transform** makes coefficients in which one unit of error costs
   the same everywhere, and that are uncorrelated (`kvlib.codecs.transforms`).
4. The mean of each coefficient over its chunk is taken off: if it were left in, coefficients that
   are rounded to zero would carry an error that attention does not average out.
5. Coefficients are divided by the step, rounded to the nearest integer and entropy-coded
   (`kvlib.codecs.coefficients`).

Presets differ in step 3. `near` has no transform, so it needs no calibration (with a profile it
takes from it one step for each layer); `balanced` has one matrix a head; `small` one for
all heads of a layer; `archive` one for several layers, which are then decoded together. Matrices
belong to the heads of the model, so only `near` stores a rank that holds some of them. Heads that
kept different tokens, as most evictions leave them, have no rows in common: `small` and `archive`
then use the matrices of the heads, and layers that kept different tokens are not coded together.
Layers with pruned key channels are coded like `near`.

CacheGen (Liu et al. 2024, arXiv:2310.07240) is the ancestor: layered quantization plus arithmetic
coding. Transforms in this place: KVTC (arXiv:2511.01815). docs/formats/codec.md has the bytes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from kvlib.blocks import KVBlock, LayerKV
from kvlib.codecs.base import CodecCaps, unsupported_dtype
from kvlib.codecs.container import Container, Section
from kvlib.codecs.kvlc_decode import decode_layers
from kvlib.codecs.kvlc_encode import encode_layers
from kvlib.codecs.kvlc_sections import KINDS, Settings, same_tokens
from kvlib.codecs.rope import removable_rope
from kvlib.codecs.transforms import PRESETS, Profile, find_profile, level_for, load_profile
from kvlib.errors import ConfigError
from kvlib.registry import PLACE, suggest
from kvlib.spec import KVSpec

__all__ = ["KvlcCodec"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEVEL, _PROFILE_LEVEL = 0.5, 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class KvlcCodec:
    """Calibrated transform coding; see the module.

    Attributes:
        preset: near, balanced, small or archive; all but near need a profile.
        level: the step. With a profile, 1 is where held-out text lost 0.01 nats a token; without
            one, the unit is the deviation of a layer's keys or values. By default 0.7, and 0.5
            without a profile.
        bits: instead of a level, bits a value that held-out text took.
        kl: instead of a level, nats a token that held-out text lost.
        chunk: tokens that share means and tables.
        sinks: first positions that are stored exactly.
        profile: file from `kvlib calibrate codec`.
        digest: of the profile; filled in when it is read, and checked if it is given. Alone it
            names a profile that this process has read, or one in a folder of profiles; see
            `kvlib.codecs.transforms.find_profile`.
    """

    name: ClassVar[str] = "kvlc"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    lossless: ClassVar[bool] = False

    preset: str = "near"
    level: float | None = None
    bits: float | None = None
    kl: float | None = None
    chunk: int = 256
    sinks: int = 4
    profile: str | None = field(default=None, compare=False, metadata=PLACE)
    digest: str | None = None
    _profile: Profile | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        """Check the parameters and read the profile."""
        if self.preset not in PRESETS:
            raise ConfigError(f"kvlc:preset is {self.preset!r:.80}.{suggest(self.preset, PRESETS)}")
        if not 16 <= self.chunk <= 4096:
            raise ConfigError(f"kvlc:chunk is a number of tokens in 16..4096, got {self.chunk}")
        if not 0 <= self.sinks <= 4096:
            raise ConfigError(f"kvlc:sinks is a number of tokens in 0..4096, got {self.sinks}")
        rates = [n for n in ("level", "bits", "kl") if getattr(self, n) is not None]
        if len(rates) > 1:
            raise ConfigError(f"kvlc: give one of level, bits and kl, not {' and '.join(rates)}")
        for name in rates:
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= 1000):
                raise ConfigError(f"kvlc:{name} must be above 0, got {value}")
        if self.profile is None and self.digest is None:
            if self.preset != "near" or rates not in ([], ["level"]):
                what = f"preset={self.preset}" if self.preset != "near" else f"{rates[0]}="
                raise ConfigError(
                    f"kvlc:{what} needs a profile of the model: run kvlib calibrate codec --model "
                    "MODEL -o FILE and add profile=FILE (preset=near with a level works without)"
                )
            return
        if self.profile is not None:
            found = load_profile(self.profile, self.digest or "")
        else:
            found = find_profile(str(self.digest))
        if self.preset not in found.presets:
            raise ConfigError(
                f"profile {self.profile or self.digest!r} has no preset {self.preset}; it has "
                f"{', '.join(found.presets)}: calibrate with --presets"
            )
        object.__setattr__(self, "digest", found.digest)
        object.__setattr__(self, "_profile", found)
        self._level()

    def _level(self) -> float:
        """The level that was asked for, however it was."""
        if self._profile is not None and (self.bits is not None or self.kl is not None):
            name, wanted = ("bits", self.bits) if self.bits is not None else ("kl", self.kl)
            return level_for(self._profile, self.preset, name, float(wanted or 0))
        return self.level or (_LEVEL if self._profile is None else _PROFILE_LEVEL)

    def caps(self, spec: KVSpec) -> CodecCaps:
        """See `Codec.caps`."""
        if self._profile is not None:
            self._profile.check(spec)
        together = self.preset == "archive" and self._profile is not None
        return CodecCaps(
            mixes_heads=self.preset != "near",
            removes_rope=any(removable_rope(spec, i) is not None for i in range(spec.num_layers)),
            profile=self.digest or "",
            layer_group=self._profile.group if together and self._profile else 1,
        )

    # -- encoding

    def encode(self, block: KVBlock) -> list[Section]:
        """See `Codec.encode`."""
        self.caps(block.spec)
        for layer in block.layers:
            if layer.keys.dtype not in _DTYPES:
                raise unsupported_dtype(self.name, layer.keys, _DTYPES)
        made = encode_layers(self._settings(block.spec), list(self._groups(block)))
        sections = {(section.layer_idx, section.kind): section for section in made}
        return [sections[layer.layer_idx, kind] for layer in block.layers for kind, _ in KINDS]

    def _settings(self, spec: KVSpec) -> Settings:
        return Settings(
            spec=spec,
            preset=self.preset,
            level=self._level(),
            chunk=self.chunk,
            sinks=self.sinks,
            profile=self._profile,
        )

    def _groups(self, block: KVBlock) -> Iterator[list[LayerKV]]:
        """Layers that may be coded together: all of a profile's group, with the same tokens."""
        size = self.caps(block.spec).layer_group
        whole: dict[int, list[LayerKV]] = {}
        for layer in block.layers:
            whole.setdefault(layer.layer_idx // size, []).append(layer)
        for layers in whole.values():
            members = min(size, block.spec.num_layers - layers[0].layer_idx // size * size)
            if size > 1 and len(layers) == members and same_tokens(block.spec, layers):
                yield layers
            else:
                yield from ([layer] for layer in layers)

    # -- decoding

    def decode(self, container: Container, spec: KVSpec, layers: Sequence[LayerKV]) -> None:
        """See `Codec.decode`."""
        decode_layers(self._settings(spec), container, layers)
