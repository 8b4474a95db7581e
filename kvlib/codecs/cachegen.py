# SPDX-License-Identifier: Apache-2.0
"""`cachegen`: CacheGen (arXiv 2310.07240), as the paper has it and as LMCache ships it.

**paper.** Tokens are cut into chunks, and these into groups of ten. The first token of a group is
the anchor: its channels, all heads together, are scaled by its largest magnitude to 8 bits. The
others are differences to the decoded anchor, in bins of one width for all channels of a layer:

    width = level * factor * sigma

The factor is 0.5, 1 or 1.5 in the first, middle or last third of the layers, and sigma is the root
mean square of the differences to the anchors among a layer's keys (or values). It and the
frequencies of the symbols, for each layer, kind and channel, for anchors and at each level for
deltas, are measured once for a model by `kvlib calibrate cachegen`; nothing about them is stored
with the data. So the same KV can be encoded at any level that the profile has. What a table does
not cover is an escape. The paper's arithmetic coder is rANS here. It leaves open what widths are
multiples of, and how scales are stored: here in the dtype of the KV, in which they are exact.

**lmcache.** What LMCache ships under that name has neither anchors, deltas, levels nor profile.
Each token of a layer is scaled by its largest magnitude to 31 levels (15 for keys from the 11th
layer on and values from the third; 31 in models with less than ten layers), and entropy-coded with
the distributions of its own chunk, one per channel, which are stored beside it: 33 numbers of 16
bits, whatever the number of levels. This one stores as many, as counts. LMCache also stores the
length, 32 bits, of the stream that each channel has for each 256 tokens; here one stream has all
channels, and the same bytes hold a check of each channel's symbols. Coded sizes are those of ideal
arithmetic coding within 2%, as LMCache's are.

Both keep keys as they are cached, after the rotary embedding. Heads of ragged rows are coded each
by itself, with scales of its own, as if it were a layer; pruned keys use the tables of the channels
that they kept. Keys or values of a layer with a number that is not finite, or more than half of
what the dtype can hold, are stored raw, as are those that would not become smaller.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvlib.blocks import KVBlock, LayerKV
from kvlib.codecs.base import CodecCaps, raw_section, read_raw, unsupported_dtype
from kvlib.codecs.cachegen_kernels import kernels
from kvlib.codecs.cachegen_lines import Chunk, Reader, batches, planes, raw_tokens
from kvlib.codecs.cachegen_lmcache import LMCacheCoder
from kvlib.codecs.cachegen_paper import PaperCoder
from kvlib.codecs.cachegen_profile import Profile, find_profile, load_profile
from kvlib.codecs.container import Buffer, Container, Section, SectionKind
from kvlib.errors import ConfigError, CorruptDataError, UnsupportedInputError
from kvlib.registry import PLACE
from kvlib.spec import KVSpec

__all__ = ["CacheGenCodec", "ChunkCoder"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = (SectionKind.KEYS, SectionKind.VALUES)
_VARIANTS = ("paper", "lmcache")
_MAX_CHUNK = 1 << 15
_DEFAULT_LEVEL = 0.5
_BATCH = 1 << 24  # numbers of layers that are coded together; a layer may have more


class ChunkCoder(Protocol):
    """How a variant codes chunks; it gets many at once, which is faster than one by one."""

    def draft(self, chunk: Chunk) -> Any:
        """A chunk before its symbols are coded; None if it must stay raw."""
        ...

    def write(self, drafts: Sequence[Any]) -> list[list[Buffer]]:
        """The parts of each chunk."""
        ...

    def parse(self, chunk: Chunk, reader: Reader) -> Any:
        """Read a chunk before its symbols are decoded.

        Raises:
            CorruptDataError: no encoder writes this.
        """
        ...

    def finish(self, packed: Sequence[Any]) -> None:
        """Fill the chunks.

        Raises:
            CorruptDataError: no encoder writes such parts.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGenCodec:
    """Anchors and deltas under a model's own tables, or scaled tokens under those of their chunk.

    Args:
        variant: ``paper`` or ``lmcache``, see the module.
        profile: file from `kvlib calibrate cachegen`, for paper.
        level: what bin widths are multiplied by, one of the profile's levels; larger is coarser.
            0.5 unless given. None for lmcache.
        chunk: tokens that are coded together.
        sinks: tokens at lower positions are stored as they are (0: none, as published).
        digest: of the profile; filled in when it is read, and checked if it is given. Alone it
            names a profile that this process has read, or one in a folder of profiles; see
            `kvlib.codecs.cachegen_profile.find_profile`.
    """

    name: ClassVar[str] = "cachegen"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "experimental"
    lossless: ClassVar[bool] = False

    variant: str = "paper"
    profile: str | None = field(default=None, compare=False, metadata=PLACE)
    level: float | None = None
    chunk: int = 256
    sinks: int = 0
    digest: str | None = None
    _profile: Profile | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        """Check the parameters and read the profile."""
        if self.variant not in _VARIANTS:
            raise ConfigError(
                f"cachegen:variant is {' or '.join(_VARIANTS)}, got {self.variant!r:.80}"
            )
        if not 1 <= self.chunk <= _MAX_CHUNK:
            raise ConfigError(f"cachegen:chunk must be in 1..{_MAX_CHUNK}, got {self.chunk}")
        if self.sinks < 0:
            raise ConfigError(f"cachegen:sinks must be 0 or more, got {self.sinks}")
        if self.variant == "lmcache":
            if (self.profile, self.level, self.digest) != (None, None, None):
                raise ConfigError(
                    "cachegen:variant=lmcache has no profile and no levels: leave profile, level "
                    "and digest out"
                )
            return
        level = _DEFAULT_LEVEL if self.level is None else float(self.level)
        object.__setattr__(self, "level", level)
        if self.profile is not None:
            found = load_profile(self.profile, self.digest or "")
        elif self.digest is not None:
            found = find_profile(self.digest)
        else:
            return
        if level not in found.levels:
            known = ", ".join(str(x) for x in found.levels)
            raise ConfigError(
                f"profile {self.profile or self.digest!r} has no tables for level {level} of "
                f"cachegen; it has {known}"
            )
        object.__setattr__(self, "digest", found.artefact.digest)
        object.__setattr__(self, "_profile", found)

    def caps(self, spec: KVSpec) -> CodecCaps:
        """See `Codec.caps`."""
        if self.variant == "lmcache":
            return CodecCaps(mixes_heads=True)
        profile = self._known()
        profile.check(spec)
        return CodecCaps(mixes_heads=True, profile=profile.artefact.digest)

    def _known(self) -> Profile:
        if self._profile is None:
            raise ConfigError(
                "cachegen needs the statistics of the model: run kvlib calibrate cachegen --model "
                "M -o FILE and pass profile=FILE (or variant=lmcache, which needs none)"
            )
        return self._profile

    def encode(self, block: KVBlock) -> list[Section]:
        """See `Codec.encode`."""
        self.caps(block.spec)
        coder = self._coder(block.spec)
        sections = []
        for layers in batches(block.layers, [_numbers(x) for x in block.layers], _BATCH):
            every = [(layer, kind) for layer in layers for kind in range(len(_KINDS))]
            found = [self._draft(coder, block.spec, layer, kind) for layer, kind in every]
            drafts = [p for pieces in found for p in pieces or () if not isinstance(p, bytes)]
            written = iter(coder.write(drafts))
            for (layer, kind), pieces in zip(every, found, strict=True):
                parts: list[Buffer] | None = None
                if pieces is not None:
                    parts = []
                    for p in pieces:
                        parts += [p] if isinstance(p, bytes) else next(written)
                sections.append(_section(layer, kind, parts))
        return sections

    def _draft(
        self, coder: ChunkCoder, spec: KVSpec, layer: LayerKV, kind: int
    ) -> list[Any] | None:
        """A section's exact entries, as bytes, and chunks, as drafts; None if it must stay raw."""
        full = spec.layers[layer.layer_idx].num_kv_heads
        if layer.num_kv_heads != full:
            raise UnsupportedInputError(
                f"cachegen codes all heads of a layer together; layer {layer.layer_idx} holds "
                f"{layer.num_kv_heads} of {full}: use a codec that codes each head by itself"
            )
        x = _tensor(layer, kind)
        if x.dtype not in _DTYPES:
            raise unsupported_dtype(self.name, x, _DTYPES)
        pieces: list[Any] = []
        for plane, exact in self._planes(spec, layer, kind):
            here = plane._replace(x=plane.x.detach().to("cpu"))
            if exact:
                pieces.append(raw_tokens(here.x[:, :exact]))
            for chunk in self._chunks(here, exact):
                draft = coder.draft(chunk)
                if draft is None:
                    return None
                pieces.append(draft)
        return pieces

    def decode(self, container: Container, spec: KVSpec, layers: Sequence[LayerKV]) -> None:
        """See `Codec.decode`."""
        coder = self._coder(spec)
        for some in batches(layers, [_numbers(x) for x in layers], _BATCH):
            packed: list[Any] = []
            for layer in some:
                for kind in range(len(_KINDS)):
                    self._parse(coder, container, spec, layer, kind, packed)
            coder.finish(packed)

    def _parse(
        self,
        coder: ChunkCoder,
        container: Container,
        spec: KVSpec,
        layer: LayerKV,
        kind: int,
        packed: list[Any],
    ) -> None:
        """Fill what is stored as it is, and put the other chunks of a section into `packed`."""
        x = _tensor(layer, kind)
        if read_raw(container, _KINDS[kind], layer.layer_idx, x) or not x.numel():
            return
        if x.dtype not in _DTYPES:
            raise unsupported_dtype(self.name, x, _DTYPES)
        if layer.num_kv_heads != spec.layers[layer.layer_idx].num_kv_heads:
            raise CorruptDataError(
                f"layer {layer.layer_idx}: {layer.num_kv_heads} heads of cachegen, which "
                "codes all heads of a layer together"
            )
        reader = Reader(container.read(_KINDS[kind], layer.layer_idx)[1])
        for plane, exact in self._planes(spec, layer, kind):
            if exact:
                reader.raw_tokens(plane.x[:, :exact])
            packed += [coder.parse(chunk, reader) for chunk in self._chunks(plane, exact)]
        reader.end()

    def _planes(self, spec: KVSpec, layer: LayerKV, kind: int) -> Iterator[tuple[Chunk, int]]:
        want = spec.layers[layer.layer_idx]
        return planes(layer, kind, self.sinks, (want.k_head_dim, want.v_head_dim)[kind])

    def _chunks(self, plane: Chunk, exact: int) -> Iterator[Chunk]:
        num = plane.x.shape[1]
        if not exact and num <= self.chunk:
            yield plane
            return
        for first in range(exact, num, self.chunk):
            yield plane.cut(first, min(first + self.chunk, num))

    def _coder(self, spec: KVSpec) -> ChunkCoder:
        if self.variant == "lmcache":
            return LMCacheCoder(spec, kernels())
        assert self.level is not None  # noqa: S101 (the paper's variant has one)
        return PaperCoder(self._known(), self.level, kernels())


def _tensor(layer: LayerKV, kind: int) -> Tensor:
    return (layer.keys, layer.values)[kind]


def _numbers(layer: LayerKV) -> int:
    return layer.keys.numel() + layer.values.numel()


def _section(layer: LayerKV, kind: int, parts: list[Buffer] | None) -> Section:
    """A section of coded parts, or a raw one where that is smaller."""
    x = _tensor(layer, kind)
    raw_bytes = x.numel() * x.element_size()
    if parts is None or sum(memoryview(p).nbytes for p in parts) >= raw_bytes:
        return raw_section(_KINDS[kind], layer.layer_idx, x.detach().to("cpu").contiguous())
    return Section(_KINDS[kind], layer.layer_idx, raw_bytes, tuple(parts))
