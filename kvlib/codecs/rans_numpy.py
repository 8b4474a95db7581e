# SPDX-License-Identifier: Apache-2.0
"""The entropy coder in NumPy: the reference, and what there is without a compiler.

One step codes a symbol of every lane of every stream that still has N of them, so its dozen array
operations are shared by as many streams as the caller has. The last, shorter step of the streams is
a step of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs.rans import (
    FULL_BITS,
    LOWEST,
    WORD_BITS,
    Bytes,
    Coded,
    Stream,
    check_end,
    uncodable,
)
from kvlib.codecs.rans_tables import MAX_ALPHABET, PRECISION, TOTAL, Tables

__all__ = ["Batch", "batches", "decode_streams", "encode_streams"]

Index = NDArray[np.intp]


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """What is coded at once: one symbol of each of some lanes.

    Args:
        symbols: where they lie in the batch's buffer.
        lanes: the lanes, stream after stream, as a slice or index of the flat states.
        columns: the table row of each.
        starts: where the lanes of each stream begin among these, and their number at the end.
        streams: the streams, as a slice or index.
    """

    symbols: slice
    lanes: slice | Index
    columns: NDArray[np.uint32]
    starts: Index
    streams: slice | Index


class Batch:
    """Streams that have number of lanes and columns in common, the longest first.

    Args:
        indices: which of the caller's streams they are.
        streams: those streams.
    """

    def __init__(self, indices: Sequence[int], streams: Sequence[Stream]) -> None:
        self.indices = sorted(indices, key=lambda i: -streams[i].symbols.size)
        self.streams = [streams[i] for i in self.indices]
        self.lanes, self.period = self.streams[0].lanes, self.streams[0].period
        self.counts = np.array([s.symbols.size for s in self.streams], np.intp)
        self.columns = np.stack([s.columns for s in self.streams])
        self.size = int(self.counts.sum())

    def _runs(self) -> Iterator[tuple[int, int, int, int]]:
        """First step, end, streams that have these steps, and their place in the buffer."""
        steps = self.counts // self.lanes
        first = place = 0
        for end in np.unique(steps).tolist():
            active = int((steps >= end).sum())
            if end > first:
                yield first, end, active, place
                place += (end - first) * active * self.lanes
            first = end

    def _places(self, buffer: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
        """The parts of the streams' symbols, and of the buffer that is in the order of steps."""
        n = self.lanes
        for first, end, active, place in self._runs():
            part = buffer[place : place + (end - first) * active * n].reshape(-1, active, n)
            for s in range(active):
                yield self.streams[s].symbols[first * n : end * n].reshape(-1, n), part[:, s]
        place = int((self.counts // n).sum()) * n
        for stream, count in zip(self.streams, self.counts.tolist(), strict=True):
            rest = count % n
            yield stream.symbols[count - rest :], buffer[place : place + rest]
            place += rest

    def load(self) -> Bytes:
        """The symbols in the order of steps."""
        buffer = np.empty(self.size, np.uint8)
        for symbols, part in self._places(buffer):
            part[:] = symbols
        return buffer

    def store(self, buffer: Bytes) -> None:
        """Put them back into the streams."""
        for symbols, part in self._places(buffer):
            symbols[:] = part

    def steps(self, *, backwards: bool = False) -> Iterator[Step]:
        """The steps in the order of decoding, or of encoding."""
        if backwards:
            yield from self._short_step()
        n = self.lanes
        runs = list(self._runs())
        for first, end, active, place in reversed(runs) if backwards else runs:
            lanes, streams = slice(0, active * n), slice(0, active)
            starts = np.arange(active + 1) * n
            for t in range(first, end)[:: -1 if backwards else 1]:
                at = place + (t - first) * active * n
                column = t * n % self.period
                yield Step(
                    symbols=slice(at, at + active * n),
                    lanes=lanes,
                    columns=self.columns[:active, column : column + n].reshape(-1),
                    starts=starts,
                    streams=streams,
                )
        if not backwards:
            yield from self._short_step()

    def _short_step(self) -> Iterator[Step]:
        """The last step of the streams whose size is no multiple of the lanes."""
        n = self.lanes
        rest = self.counts % n
        streams = np.flatnonzero(rest)
        if not streams.size:
            return
        every = np.arange(n)
        columns = [self.columns[s, (self.counts[s] - rest[s]) % self.period :] for s in streams]
        yield Step(
            symbols=slice(self.size - int(rest.sum()), self.size),
            lanes=np.concatenate([s * n + every[: rest[s]] for s in streams]),
            columns=np.concatenate([c[: rest[s]] for s, c in zip(streams, columns, strict=True)]),
            starts=np.concatenate([[0], rest[streams].cumsum()]),
            streams=streams,
        )


def batches(streams: Sequence[Stream]) -> Iterator[Batch]:
    """Streams that can take their steps together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, stream in enumerate(streams):
        groups.setdefault((stream.lanes, stream.period), []).append(i)
    for indices in groups.values():
        yield Batch(indices, streams)


def encode_streams(streams: Sequence[Stream], tables: Tables) -> list[Coded]:
    """See `kvlib.codecs.rans.Coder`."""
    done: dict[int, Coded] = {}
    for batch in batches(streams):
        done.update(_encode(batch, tables))
    return [done[i] for i in range(len(streams))]


def _encode(batch: Batch, tables: Tables) -> Iterator[tuple[int, Coded]]:
    symbols = batch.load()
    states = np.full(len(batch.streams) * batch.lanes, LOWEST, np.uint32)
    words = np.empty(batch.size, np.uint16)  # no symbol puts out more than one
    ends = batch.counts.cumsum()
    place = ends.copy()
    absent = False
    for step in batch.steps(backwards=True):
        entry = tables.encoder.take(step.columns * MAX_ALPHABET + symbols[step.symbols])
        f = entry >> PRECISION
        absent |= not f.all()
        x = states[step.lanes]
        full = np.flatnonzero(x >= f << FULL_BITS)
        overflowing = x[full]
        # They go in front of the stream's words, in the order of lanes.
        edges = np.searchsorted(full, step.starts)
        number = edges[1:] - edges[:-1]
        place[step.streams] -= number
        words[np.arange(full.size) + (place[step.streams] - edges[:-1]).repeat(number)] = (
            overflowing
        )
        x[full] = overflowing >> WORD_BITS
        quotient = x // np.maximum(f, 1)
        states[step.lanes] = x + quotient * (TOTAL - f) + (entry & (TOTAL - 1))
    if absent:
        raise uncodable(batch.streams, tables)
    for i, first, end, x in zip(
        batch.indices, place, ends, states.reshape(-1, batch.lanes), strict=True
    ):
        yield i, Coded(x.copy(), words[first:end].copy())


def decode_streams(streams: Sequence[Stream], coded: Sequence[Coded], tables: Tables) -> None:
    """See `kvlib.codecs.rans.Coder`."""
    for batch in batches(streams):
        _decode(batch, [coded[i] for i in batch.indices], tables)


def _decode(batch: Batch, coded: Sequence[Coded], tables: Tables) -> None:
    symbols = np.empty(batch.size, np.uint8)
    states = np.concatenate([c.states for c in coded]).astype(np.uint32, copy=False)
    sizes = np.array([c.words.size for c in coded])
    # One more: a stream that asks for more words than it has reads others' until it is refused.
    words = np.concatenate([*(c.words for c in coded), [0]]).astype(np.uint32)
    begin = sizes.cumsum() - sizes
    place = begin.copy()
    for step in batch.steps():
        x = states[step.lanes]
        entry = tables.decoder.take(step.columns << PRECISION | (x & (TOTAL - 1)))
        symbols[step.symbols] = entry  # the low byte
        x = ((entry >> 20) + 1) * (x >> PRECISION) + (entry >> 8 & (TOTAL - 1))
        low = np.flatnonzero(x < LOWEST)
        edges = np.searchsorted(low, step.starts)
        number = edges[1:] - edges[:-1]
        wanted = np.arange(low.size) + (place[step.streams] - edges[:-1]).repeat(number)
        x[low] = x[low] << WORD_BITS | words.take(wanted, mode="clip")
        place[step.streams] += number
        states[step.lanes] = x
    used = (place - begin).tolist()
    for s, c, x, n in zip(batch.streams, coded, states.reshape(-1, batch.lanes), used, strict=True):
        check_end(s, c, x, n)
    batch.store(symbols)
