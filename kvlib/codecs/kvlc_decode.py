# SPDX-License-Identifier: Apache-2.0
"""`kvlc`: from the bytes of sections to keys and values; see `kvlib.codecs.kvlc_sections`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvlib.blocks import LayerKV
from kvlib.codecs.base import read_raw
from kvlib.codecs.coefficients import (
    U32,
    Cursor,
    Decoded,
    Packed,
    parse_chunk,
)
from kvlib.codecs.container import Container, SectionFlag, SectionKind
from kvlib.codecs.kvlc_kernels import Float, Int
from kvlib.codecs.kvlc_sections import (
    GROUP,
    HEAD,
    KINDS,
    MEAN_STEP,
    MEMBER,
    MOST_SYMBOLS,
    Settings,
    Shared,
    cuts_of,
    expected_of,
    form_of,
    pieces_of,
    rope_of,
    same_tokens,
    transform_of,
    width_of,
)
from kvlib.codecs.transforms import Transform
from kvlib.errors import CapacityError, CorruptDataError
from kvlib.spec import RopeSpec

__all__ = ["decode_layers"]


class _Job(NamedTuple):
    """A piece to be decoded, its bytes already cut up."""

    parts: list[Tensor]
    positions: Int
    transform: Transform | None
    rope: RopeSpec | None
    step: float
    kept: Int
    exempt: Int
    exempt_bytes: memoryview
    chunks: list[Packed]


def decode_layers(settings: Settings, container: Container, layers: Sequence[LayerKV]) -> None:
    """Fill the keys and values of layers in place.

    Raises:
        CorruptDataError: the sections are malformed.
    """
    by_index = {layer.layer_idx: layer for layer in layers}
    done: set[tuple[int, SectionKind]] = set()  # sections of layers that came with another one's
    jobs: list[_Job] = []
    shared = Shared(settings.sinks)
    waiting = 0
    with np.errstate(all="ignore"):  # malformed sections may hold any numbers
        for layer in layers:
            for kind, _ in KINDS:
                if (layer.layer_idx, kind) in done:
                    continue
                out = layer.keys if kind is SectionKind.KEYS else layer.values
                if read_raw(container, kind, layer.layer_idx, out) or not out.numel():
                    continue
                data = container.read(kind, layer.layer_idx)[1]
                group = [layer]
                if data == bytes([MEMBER]) or data[:1] == bytes([GROUP]):
                    group = _group(settings, container, layer, kind, by_index)
                    done.update((member.layer_idx, kind) for member in group)
                    data = container.read(kind, group[0].layer_idx)[1]
                for job in _parse(settings, shared, group, kind, data):
                    jobs.append(job)
                    for packed in job.chunks:
                        waiting += packed.n * packed.active
                if waiting > MOST_SYMBOLS:
                    _finish(jobs, shared)
                    jobs, waiting = [], 0
        _finish(jobs, shared)


def _group(
    settings: Settings,
    container: Container,
    layer: LayerKV,
    kind: SectionKind,
    by_index: dict[int, LayerKV],
) -> list[LayerKV]:
    """All layers of a group; those that nobody asked for get room of their own."""
    size = 1 if settings.profile is None else settings.profile.group
    first = layer.layer_idx // size * size
    members = range(first, min(first + size, settings.spec.num_layers))
    if not {s.layer_idx for s in container.header.layers}.issuperset(members):
        raise CorruptDataError(f"layer {layer.layer_idx} belongs to a group that is not there")
    group = []
    for index in members:
        _check_member(container, kind, layer, index, first=index == first)
        found = by_index.get(index)
        if found is None:
            try:
                found = replace(
                    layer,
                    layer_idx=index,
                    keys=torch.empty(layer.keys.shape, dtype=layer.keys.dtype),
                    values=torch.empty(layer.values.shape, dtype=layer.values.dtype),
                )
            except RuntimeError as exc:
                raise CapacityError(f"no memory for layer {index}: {exc}") from exc
        group.append(found)
    if not same_tokens(settings.spec, group):
        raise CorruptDataError(f"the layers from {first} on cannot be coded together")
    return group


def _check_member(
    container: Container, kind: SectionKind, like: LayerKV, index: int, *, first: bool
) -> None:
    """Whether a layer's section is one of a group's, and claims the size that `like` has."""
    out = like.keys if kind is SectionKind.KEYS else like.values
    info, data = container.read(kind, index)
    raw_bytes = out.numel() * out.element_size()
    if (
        data[:1] != bytes([GROUP if first else MEMBER])
        or (not first and data.nbytes != 1)
        or info.flags & SectionFlag.RAW
        or info.raw_bytes != raw_bytes
    ):
        raise CorruptDataError(f"layer {index} is not part of the group it stands in")


def _parse(
    settings: Settings,
    shared: Shared,
    layers: Sequence[LayerKV],
    kind: SectionKind,
    data: memoryview,
) -> list[_Job]:
    """Cut a section up, and check all that can be told before decoding."""
    cursor = Cursor(data)
    form, turned, zero, num_explicit, step = cursor.unpack(HEAD)
    pieces = pieces_of(layers)
    rope = rope_of(settings, layers, kind)
    parts = [piece.parts(kind) for piece in pieces]
    widths = [width_of(mine) for mine in parts]
    if form != form_of(settings, layers, sum(widths)) or (form == GROUP) != (len(layers) > 1):
        raise CorruptDataError(f"a kvlc section of form {form} does not fit its layers")
    if turned != (rope is not None) or zero or not (math.isfinite(step) and step > 0):
        raise CorruptDataError("the head of a kvlc section is malformed")
    places = [shared.split(piece.positions) for piece in pieces]
    if num_explicit:
        places = _with_listed(cursor, num_explicit, [len(x.positions) for x in pieces], places)
    item_bytes = layers[0].keys.element_size()
    raw = [
        cursor.take(len(exempt) * width * item_bytes)
        for width, (_, exempt) in zip(widths, places, strict=True)
    ]
    factor = np.float32(step)
    jobs = []
    for i, piece in enumerate(pieces):
        kept, exempt = places[i]
        transform = transform_of(settings, form, piece, kind)
        rank, num_parts, expected = widths[i], 1, None
        if transform is not None:
            rank, num_parts = transform.rank, transform.parts
            expected = expected_of(transform, step)
        chunks = [
            parse_chunk(cursor, b - a, rank, expected, factor, num_parts)
            for a, b in cuts_of(len(kept), settings.chunk)
        ]
        jobs.append(
            _Job(parts[i], piece.positions, transform, rope, step, kept, exempt, raw[i], chunks)
        )
    cursor.end()
    return jobs


def _with_listed(
    cursor: Cursor, number: int, lengths: Sequence[int], places: Sequence[tuple[Int, Int]]
) -> list[tuple[Int, Int]]:
    """Entries to be coded and exempt ones, of pieces so long, where so many more are listed."""
    total = sum(lengths)
    if number > total:
        raise CorruptDataError(f"{number} exempt entries of {total}")
    listed = cursor.array(U32, number).astype(np.int64)
    if int(listed[-1]) >= total or bool((np.diff(listed) <= 0).any()):
        raise CorruptDataError("the list of exempt entries is malformed")
    out = []
    first = 0
    for count, (_, exempt) in zip(lengths, places, strict=True):
        mine = listed[slice(*np.searchsorted(listed, (first, first + count)))] - first
        fixed = np.zeros(count, np.bool_)
        fixed[exempt] = True
        if fixed[mine].any():
            raise CorruptDataError("an exempt entry is listed without need")
        fixed[mine] = True
        out.append((np.flatnonzero(~fixed), np.flatnonzero(fixed)))
        first += count
    return out


def _finish(jobs: Sequence[_Job], shared: Shared) -> None:
    kernel = shared.kernel
    decoded = iter(kernel.read_chunks([chunk for job in jobs for chunk in job.chunks]))
    for job in jobs:
        turning = shared.turning(job.rope, job.positions, job.kept)
        first = 0
        for chunk in job.chunks:
            last = first + chunk.n
            here = turning
            if turning is not None:
                (cos, sin), rope = turning
                here = (cos[first:last], sin[first:last]), rope
            rows, bias = _restore(job, next(decoded))
            kernel.place(job.parts, job.kept[first:last], rows, bias, here)
            first = last
        if len(job.exempt):
            _put_exempt(job)


def _restore(job: _Job, chunk: Decoded) -> tuple[Float, Float]:
    """A decoded chunk as rows [n, width], and what each row lacks, [width]."""
    mean_step = job.step * MEAN_STEP
    if job.transform is not None:
        means = (chunk.means * mean_step + job.transform.statistics.mean).astype(np.float32)
        rows = job.transform.join(chunk.rows)
        return rows, job.transform.back(means[None])[0] + job.transform.offset
    return chunk.rows[0], (chunk.means * mean_step).astype(np.float32)


def _put_exempt(job: _Job) -> None:
    index = torch.from_numpy(job.exempt)
    dtype = job.parts[0].dtype
    width = width_of(job.parts)
    raw = torch.frombuffer(bytearray(job.exempt_bytes), dtype=dtype).reshape(-1, width)
    first = 0
    for out in job.parts:
        heads, _, size = out.shape
        mine = raw[:, first : first + heads * size].reshape(-1, heads, size)
        out[:, index] = mine.transpose(0, 1)
        first += heads * size
