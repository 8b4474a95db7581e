# SPDX-License-Identifier: Apache-2.0
"""The entropy coder in NumPy: the reference, and what there is without a compiler.

One step codes a symbol of every lane of every stream that still has as many as it has lanes, so its
dozen array operations are shared by as many streams as the caller has, whatever their sizes are.
The last, shorter step of the streams is a step of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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

__all__ = ["Batch", "Step", "decode_streams", "encode_streams"]

Index = NDArray[np.intp]

_BLOCK_STEPS, _BLOCK_SIZE = 64, 1 << 17
"""Steps whose table rows are laid out at once, and the most rows: they stay in a core's cache."""


# As arrays, which array operations take faster than Python's numbers.
_SLOT, _TOTAL, _PRECISION, _FULL_BITS, _LOWEST, _WORD_BITS, _FREQUENCY, _BYTE = (
    np.array(k, np.uint32)
    for k in (TOTAL - 1, TOTAL, PRECISION, FULL_BITS, LOWEST, WORD_BITS, 20, 8)
)


class Step(NamedTuple):
    """What is coded at once: one symbol of each of some lanes.

    Attributes:
        symbols: where they lie in the batch's buffer.
        lanes: the lanes, stream after stream, as a slice or index of the flat states.
        columns: where the table row of each begins.
        starts: where the lanes of each stream begin among these, and their number at the end.
        streams: the streams, as a slice or index.
    """

    symbols: slice
    lanes: slice | Index
    columns: NDArray[np.uint32]
    starts: Index
    streams: slice | Index


class Batch:
    """Streams that take their steps together, those with the most steps first.

    Args:
        streams: the caller's streams.

    Attributes:
        indices: where each of `streams` is among the caller's.
        counts: the symbols of each.
        edges: where the lanes of each begin in the flat states, and their number at the end.
        size: of the buffer, in which symbols are in the order of steps.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.indices = sorted(
            range(len(streams)), key=lambda i: -(streams[i].symbols.size // streams[i].lanes)
        )
        self.streams = [streams[i] for i in self.indices]
        self.counts = np.array([s.symbols.size for s in self.streams], np.intp)
        self._lanes = np.array([s.lanes for s in self.streams], np.intp)
        self._steps = self.counts // self._lanes
        self.edges = np.concatenate([[0], self._lanes.cumsum()])
        self._block = max(1, min(_BLOCK_STEPS, _BLOCK_SIZE // max(int(self.edges[-1]), 1)))
        # In the buffer all have whole blocks of steps: fewer parts, and at most _BLOCK_SIZE more.
        self._room = -(-self._steps // self._block) * self._block
        rest = self.counts - self._steps * self._lanes
        self.size = int((self._room * self._lanes + rest).sum())

    def states(self, flat: NDArray[Any]) -> list[NDArray[Any]]:
        """The states of each stream: views."""
        return np.split(flat, self.edges[1:-1])

    def _runs(self) -> Iterator[tuple[int, int, int, int]]:
        """First step, end, streams that have room for these steps, and their place in it."""
        first = place = 0
        for end in np.unique(self._room).tolist():
            active = int((self._room >= end).sum())
            if end > first:
                yield first, end, active, place
                place += (end - first) * int(self.edges[active])
            first = end

    def _places(self, buffer: Bytes) -> Iterator[tuple[Bytes, Bytes]]:
        """The parts of the streams' symbols, and of the buffer that is in the order of steps."""
        edges = self.edges.tolist()
        for first, end, active, place in self._runs():
            width = edges[active]
            part = buffer[place : place + (end - first) * width].reshape(-1, width)
            for s, stream in enumerate(self.streams[:active]):
                n = stream.lanes
                last = min(end, stream.symbols.size // n)
                mine = stream.symbols[first * n : last * n].reshape(-1, n)
                yield mine, part[: last - first, edges[s] : edges[s + 1]]
        place = int((self._room * self._lanes).sum())
        for stream in self.streams:
            rest = stream.symbols.size % stream.lanes
            if rest:
                yield stream.symbols[-rest:], buffer[place : place + rest]
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

    def steps(self, row: int, *, backwards: bool = False) -> Iterator[Step]:
        """The steps in the order of decoding, or of encoding.

        Args:
            row: entries of a table row.
            backwards: in the order of encoding.

        Yields:
            A step; the next one may take its arrays.
        """
        if backwards:
            yield from self._short_step(row)
        edges = self.edges.tolist()
        block = self._block
        tiled = self._tiled(row, block)
        columns = np.empty((block, edges[-1]), np.uint32)
        known = active = -1
        last = int(self._steps.max())
        number = len(edges) - 1 - self._steps[::-1].searchsorted(np.arange(last), side="right")
        runs = list(self._runs())
        for first, end, most, place in reversed(runs) if backwards else runs:
            for t in range(first, min(end, last))[:: -1 if backwards else 1]:
                if t // block != known:
                    known = t // block
                    self._fill(columns, tiled, known * block)
                if number[t] != active:
                    active = int(number[t])
                    width = edges[active]
                    lanes, streams = slice(0, width), slice(0, active)
                    starts = self.edges[: active + 1]
                at = place + (t - first) * edges[most]
                rows = columns[t % block, :width]
                yield Step(slice(at, at + width), lanes, rows, starts, streams)
        if not backwards:
            yield from self._short_step(row)

    def _tiled(self, row: int, block: int) -> list[NDArray[np.uint32]]:
        """The table rows of each stream, enough to cut out any block of its steps."""
        out = []
        for stream, steps in zip(self.streams, self._steps.tolist(), strict=True):
            rows = stream.columns[: stream.period] * np.uint32(row)
            out.append(np.resize(rows, stream.period + min(block, steps) * stream.lanes))
        return out

    def _fill(
        self, columns: NDArray[np.uint32], tiled: Sequence[NDArray[np.uint32]], first: int
    ) -> None:
        """Put the table rows of a block of steps into columns [block, lanes]."""
        active = int((self._steps > first).sum())
        at = 0
        for stream, rows in zip(self.streams[:active], tiled, strict=False):
            n = stream.lanes
            steps = min(len(columns), stream.symbols.size // n - first)
            begin = first * n % stream.period
            columns[:steps, at : at + n] = rows[begin : begin + steps * n].reshape(-1, n)
            at += n

    def _short_step(self, row: int) -> Iterator[Step]:
        """The last step of the streams whose size is no multiple of the lanes."""
        rest = self.counts - self._steps * self._lanes
        streams = np.flatnonzero(rest)
        if not streams.size:
            return
        lanes, columns = [], []
        for s, n in zip(streams.tolist(), rest[streams].tolist(), strict=True):
            stream = self.streams[s]
            begin = (stream.symbols.size - n) % stream.period
            columns.append(stream.columns[begin : begin + n])
            lanes.append(np.arange(self.edges[s], self.edges[s] + n))
        yield Step(
            symbols=slice(self.size - int(rest.sum()), self.size),
            lanes=np.concatenate(lanes),
            columns=np.concatenate(columns) * np.uint32(row),
            starts=np.concatenate([[0], rest[streams].cumsum()]),
            streams=streams,
        )


def encode_streams(streams: Sequence[Stream], tables: Tables) -> list[Coded]:
    """See `kvlib.codecs.rans.Coder`."""
    if not streams:
        return []
    with np.errstate(divide="ignore"):  # a symbol without frequency is refused in the end
        return _encode(Batch(streams), tables)


def _encode(batch: Batch, tables: Tables) -> list[Coded]:
    symbols = batch.load()
    states = np.full(batch.edges[-1], LOWEST, np.uint32)
    words = np.empty(batch.size, np.uint16)  # no symbol puts out more than one
    ends = batch.counts.cumsum()
    place = ends.copy()
    ramp = np.arange(states.size)
    rooms = np.empty((2, states.size), np.uint32)
    least = np.full(states.size, TOTAL, np.uint32)
    for step in batch.steps(MAX_ALPHABET, backwards=True):
        x = states[step.lanes]
        f, room, lowest = rooms[0, : x.size], rooms[1, : x.size], least[: x.size]
        f[:] = symbols[step.symbols]
        np.add(f, step.columns, f)
        entry = tables.encoder.take(f)
        np.right_shift(entry, _PRECISION, f)
        np.minimum(lowest, f, out=lowest)
        np.left_shift(f, _FULL_BITS, room)
        full = (x >= room).nonzero()[0]
        overflowing = x.take(full)
        # They go in front of the stream's words, in the order of lanes.
        edges = full.searchsorted(step.starts)
        first = edges[:-1]
        number = edges[1:] - first
        last_word = place[step.streams]
        last_word -= number
        wanted = (last_word - first).repeat(number)
        wanted += ramp[: full.size]
        words[wanted] = overflowing
        overflowing >>= _WORD_BITS
        x[full] = overflowing
        # x = x // f * TOTAL + x % f + cumulative
        np.floor_divide(x, f, room)
        np.subtract(_TOTAL, f, f)
        np.multiply(room, f, room)
        np.add(x, room, x)
        np.bitwise_and(entry, _SLOT, entry)
        np.add(x, entry, x)
        if not isinstance(step.lanes, slice):  # else these are views
            states[step.lanes] = x
            place[step.streams] = last_word
    if not least.all():
        raise uncodable(batch.streams, tables)
    every = zip(batch.indices, place, ends, batch.states(states), strict=True)
    done = {i: Coded(x.copy(), words[first:end].copy()) for i, first, end, x in every}
    return [done[i] for i in range(len(done))]


def decode_streams(streams: Sequence[Stream], coded: Sequence[Coded], tables: Tables) -> None:
    """See `kvlib.codecs.rans.Coder`."""
    if not streams:
        return
    batch = Batch(streams)
    given = [coded[i] for i in batch.indices]
    symbols = np.empty(batch.size, np.uint8)
    states = np.concatenate([c.states for c in given]).astype(np.uint32, copy=False)
    sizes = np.array([c.words.size for c in given])
    # One more: a stream that asks for more words than it has reads others' until it is refused.
    words = np.concatenate([*(c.words for c in given), [0]]).astype(np.uint32)
    begin = sizes.cumsum() - sizes
    place = begin.copy()
    ramp = np.arange(states.size)
    room = np.empty_like(states)
    for step in batch.steps(TOTAL):
        x = states[step.lanes]
        slot = room[: x.size]
        np.bitwise_and(x, _SLOT, slot)
        np.bitwise_or(slot, step.columns, slot)
        entry = tables.decoder.take(slot)
        symbols[step.symbols] = entry  # the low byte
        # x = frequency * (x >> PRECISION) + slot - cumulative
        np.right_shift(entry, _FREQUENCY, slot)
        np.right_shift(x, _PRECISION, x)
        np.multiply(slot, x, slot)
        np.add(x, slot, x)
        np.right_shift(entry, _BYTE, entry)
        np.bitwise_and(entry, _SLOT, entry)
        np.add(x, entry, x)
        low = (x < _LOWEST).nonzero()[0]
        edges = low.searchsorted(step.starts)
        first = edges[:-1]
        number = edges[1:] - first
        next_word = place[step.streams]
        wanted = (next_word - first).repeat(number)
        wanted += ramp[: low.size]
        refilled = x.take(low)
        refilled <<= _WORD_BITS
        refilled |= words.take(wanted, mode="clip")
        x[low] = refilled
        next_word += number
        if not isinstance(step.lanes, slice):  # else these are views
            states[step.lanes] = x
            place[step.streams] = next_word
    used = (place - begin).tolist()
    for s, c, x, n in zip(batch.streams, given, batch.states(states), used, strict=True):
        check_end(s, c, x, n)
    batch.store(symbols)
