# SPDX-License-Identifier: Apache-2.0
"""`kvlc`: from keys and values to the bytes of sections; see `kvlib.codecs.kvlc_sections`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import LayerKV
from kvlib.codecs.base import raw_section, raw_view
from kvlib.codecs.coefficients import Chunk
from kvlib.codecs.container import Section, SectionKind
from kvlib.codecs.kvlc_kernels import Double, Float, Int, Kernels
from kvlib.codecs.kvlc_sections import (
    HEAD,
    IDENTITY,
    KINDS,
    MEAN_STEP,
    MEMBER,
    MOST_SYMBOLS,
    NAMES,
    Piece,
    Settings,
    Shared,
    cuts_of,
    expected_of,
    form_of,
    pieces_of,
    rope_of,
    transform_of,
    width_of,
)
from kvlib.codecs.transforms import Statistics
from kvlib.spec import RopeSpec

if TYPE_CHECKING:
    from kvlib.codecs.coefficients_write_numpy import Draft

__all__ = ["encode_layers"]

_MOST_CHANNELS = (1 << 16) - 1  # that a chunk can count
_MOST_STEPS = float(1 << 24)  # a larger coefficient makes its token exempt
_LEAST_SPREAD = 2.0**-10
_HEADROOM = 4  # what is decoded must not become infinite


@dataclass(frozen=True, slots=True)
class _Draft:
    """Layers that are coded together, before their symbols are."""

    layers: Sequence[LayerKV]
    kind: SectionKind
    front: bytes
    chunks: "list[Draft | bytes]"


def encode_layers(settings: Settings, groups: Sequence[Sequence[LayerKV]]) -> list[Section]:
    """Sections of layers, groups of which are coded together: in the section of the first one."""
    sections: list[Section] = []
    shared = Shared(settings.sinks)
    drafts: list[_Draft] = []
    waiting = 0
    todo = [(layers, kind) for layers in reversed(groups) for kind, _ in reversed(KINDS)]
    with np.errstate(all="ignore"):  # what overflows is stored as it is
        while todo or drafts:
            if todo and waiting <= MOST_SYMBOLS:
                layers, kind = todo.pop()
                tensors = [x.keys if kind is SectionKind.KEYS else x.values for x in layers]
                draft = _draft(settings, shared, layers, kind) if tensors[0].numel() else None
                if draft is not None:
                    drafts.append(draft)
                    waiting += sum(x.numel() for x in tensors)
                elif len(layers) > 1:
                    todo.extend(([layer], kind) for layer in layers)
                else:
                    sections.append(_raw(layers[0], kind))
                continue
            coded = iter(
                shared.kernel.write_chunks([chunk for draft in drafts for chunk in draft.chunks])
            )
            for draft in drafts:
                data = b"".join([draft.front, *(next(coded) for _ in draft.chunks)])
                made = _sections(draft, data)
                if not made:
                    todo.extend(([layer], draft.kind) for layer in draft.layers)
                sections.extend(made)
            drafts, waiting = [], 0
    return sections


def _sections(draft: _Draft, data: bytes) -> list[Section]:
    """The sections of one draft; none if several layers have to be coded one by one."""
    tensors = [x.keys if draft.kind is SectionKind.KEYS else x.values for x in draft.layers]
    raw_bytes = [x.numel() * x.element_size() for x in tensors]
    if len(data) >= raw_bytes[0]:
        return [] if len(tensors) > 1 else [_raw(draft.layers[0], draft.kind)]
    return [
        Section(draft.kind, layer.layer_idx, size, (bytes([MEMBER]) if i else data,))
        for i, (layer, size) in enumerate(zip(draft.layers, raw_bytes, strict=True))
    ]


def _raw(layer: LayerKV, kind: SectionKind) -> Section:
    x = (layer.keys if kind is SectionKind.KEYS else layer.values).detach().cpu()
    matrix = x.reshape(-1, x.shape[-1]).contiguous() if x.numel() else x
    return raw_section(kind, layer.layer_idx, matrix)


def _draft(
    settings: Settings, shared: Shared, layers: Sequence[LayerKV], kind: SectionKind
) -> _Draft | None:
    """All of a section but the entropy coding; None where it cannot be coded."""
    kernel = shared.kernel
    pieces = pieces_of(layers)
    rope = rope_of(settings, layers, kind)
    parts = [[_on_cpu(x) for x in piece.parts(kind)] for piece in pieces]
    widths = [width_of(x) for x in parts]
    if max(widths) > _MOST_CHANNELS:
        return None
    form = form_of(settings, layers, sum(widths))
    front: list[bytes] = []
    explicit: list[Int] = []
    cuts: list[tuple[Piece, list[Float]]] = []
    first = 0
    for piece, mine in zip(pieces, parts, strict=True):
        kept, listed, rows = _gather(shared, piece, mine, rope)
        if len(listed):
            explicit.append(first + listed)
        first += len(piece.positions)
        if len(kept) < len(piece.positions):
            exempt = np.ones(len(piece.positions), np.bool_)
            exempt[kept] = False
            front.append(_raw_rows(mine, np.flatnonzero(exempt)))
        cuts.append((piece, [rows[a:b] for a, b in cuts_of(len(rows), settings.chunk)]))
    means = _means([rows for _, mine in cuts for rows in mine], kernel) if form == IDENTITY else []
    step = _step(settings, layers[0].layer_idx, kind, form, means, kernel)
    if not (math.isfinite(step) and step > 0):
        return None
    chunks: list[Draft | bytes] = []
    ready = iter(means)
    for piece, mine_too in cuts:
        transform = transform_of(settings, form, piece, kind)
        for rows in mine_too:
            if transform is None:
                (y, mean), statistics = next(ready), None
            else:
                ((y, mean),) = _means([transform.forward(rows)], kernel)
                statistics = transform.statistics
            made = _quantize(y, mean, statistics, step, kernel)
            if made is None:
                return None
            chunks.append(kernel.draft_chunk(made, expected_of(transform, step)))
    head = HEAD.pack(form, rope is not None, 0, sum(map(len, explicit)), step)
    every = [head, *(x.astype("<u4").tobytes() for x in explicit), *front]
    return _Draft(layers, kind, b"".join(every), chunks)


def _on_cpu(x: Tensor) -> Tensor:
    return x if x.is_cpu and not x.requires_grad else x.detach().cpu()


@cache
def _limit(dtype: torch.dtype) -> float:
    """Sizes from here on are exempt, as a float32."""
    return float(np.float32(torch.finfo(dtype).max / _HEADROOM))


def _gather(
    shared: Shared, piece: Piece, parts: Sequence[Tensor], rope: RopeSpec | None
) -> tuple[Int, Int, Float]:
    """The entries to be coded, those that are exempt and no sinks, and the rows of the first."""
    kernel = shared.kernel
    limit = _limit(parts[0].dtype)
    kept, _ = shared.split(piece.positions)
    rows, fit = kernel.gather(parts, kept, shared.turning(rope, piece.positions, kept), limit)
    if fit:
        return kept, kept[:0], rows
    plain = [x[:, torch.from_numpy(kept)].transpose(0, 1).flatten(1) for x in parts]
    good = (torch.cat(plain, dim=1).float().abs() < limit).all(dim=1).numpy()  # not so for NaN
    kept, listed = kept[good], kept[~good]
    rows, _ = kernel.gather(parts, kept, shared.turning(rope, piece.positions, kept), limit)
    return kept, listed, rows


def _raw_rows(parts: Sequence[Tensor], index: Int) -> bytes:
    """The own bytes of some rows."""
    at = torch.from_numpy(index)
    rows = torch.cat([x[:, at].transpose(0, 1).flatten(1) for x in parts], dim=1).contiguous()
    return raw_view(rows).tobytes() if rows.numel() else b""


def _means(chunks: Sequence[Float], kernel: Kernels) -> list[tuple[Float, Double]]:
    """Chunks with the means of their columns."""
    return [(rows, kernel.sums(rows) / len(rows)) for rows in chunks]


def _step(
    settings: Settings,
    layer_idx: int,
    kind: SectionKind,
    form: int,
    chunks: Sequence[tuple[Float, Double]],
    kernel: Kernels,
) -> float:
    """The step as a float32: what the calibration says, or a part of the rows' deviation."""
    if form != IDENTITY:
        return float(np.float32(settings.level))
    if settings.profile is not None:
        unit = settings.profile.near_step(NAMES[kind], layer_idx)
    else:
        unit = _deviation(chunks, kernel)
    return float(np.float32(settings.level * unit))


def _deviation(chunks: Sequence[tuple[Float, Double]], kernel: Kernels) -> float:
    """Standard deviation within chunks; of what hardly varies, a thousandth of its size."""
    spread, size, count = 0.0, 0.0, 0
    for rows, mean in chunks:
        mine = float(kernel.squares(rows, mean).sum())
        spread += mine
        size += mine + float((mean**2).sum()) * len(rows)
        count += rows.size
    return max(spread, size * _LEAST_SPREAD**2) ** 0.5 / count**0.5 if size else 1.0


def _quantize(
    rows: Float, mean: Double, statistics: Statistics | None, step: float, kernel: Kernels
) -> Chunk | None:
    """One chunk of coefficients as integers; None when they are too large."""
    mean_step = step * MEAN_STEP
    center: Any = 0.0 if statistics is None else statistics.mean
    means = np.rint((mean - center) / mean_step)
    taken = (means * mean_step + center).astype(np.float32)
    found = kernel.quantize(rows, taken, np.float32(1 / step), _MOST_STEPS)
    # A chunk without channels has no means; the largest of some is NaN if one of them is.
    if found is None or (means.size and not max(means.max(), -means.min()) < 4 * _MOST_STEPS):
        return None
    values, total, square = found
    return Chunk(values, means.astype(np.int64), total, square)
