# SPDX-License-Identifier: Apache-2.0
"""The entropy coder in NumPy: the reference, and what there is without a compiler.

One step codes a symbol of every lane of every stream that still has as many as it has lanes, so its
two dozen array operations are shared by as many streams as the caller has, whatever their sizes
are. The last, shorter step of the streams is a step of its own.

An operation on the few thousand lanes of a record costs about as much for being called as for what
it does. So nothing is allocated in a step that has a place already, and what steps have in common
is made once for a block of them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvlib.codecs.rans import (
    FULL_BITS,
    LOWEST,
    WORD_BITS,
    Bytes,
    Coded,
    States,
    Stream,
    check_end,
    uncodable,
)
from kvlib.codecs.rans_tables import MAX_ALPHABET, PRECISION, TOTAL, Tables

__all__ = ["Batch", "Block", "decode_streams", "decode_with", "encode_streams"]

Index = NDArray[np.intp]
Find = Callable[[States, States, States], object]
"""Called with slots, where the table rows of their lanes begin, and room for the entries of
`Tables.by_slot` that belong to them; all uint32 [lanes]. Slots may be overwritten."""

_BLOCK_STEPS, _BLOCK_SIZE = 128, 1 << 18
"""Steps whose table rows are laid out at once, and the most rows: 1 MiB of a core's cache."""
_PART_SIZE = 1 << 15
"""Symbols whose entries an encoder finds at once."""


# As arrays, which array operations take faster than Python's numbers. 20: see `Tables.by_symbol`.
_SLOT, _TOTAL, _PRECISION, _FULL_BITS, _LOWEST, _WORD_BITS, _COMPLEMENT = (
    np.array(k, np.uint32) for k in (TOTAL - 1, TOTAL, PRECISION, FULL_BITS, LOWEST, WORD_BITS, 20)
)


class Block(NamedTuple):
    """Steps that the same lanes take one after another; each codes one symbol of every lane.

    Attributes:
        first: where the symbols of the first step begin in the batch's buffer.
        stride: from one step's symbols to those of the next.
        lanes: the lanes, stream after stream, as a slice or index of the flat states.
        columns: uint32 [steps, lanes], where the table row of each begins.
        starts: where the lanes of each stream begin among these, and their number at the end.
        streams: the streams, as a slice or index.
    """

    first: int
    stride: int
    lanes: slice | Index
    columns: NDArray[np.uint32]
    starts: Index
    streams: slice | Index

    def of(self, buffer: Any) -> Any:
        """The symbols [steps, lanes] of a batch's buffer, an array or a tensor: a view."""
        steps, width = self.columns.shape
        mine = buffer[self.first : self.first + steps * self.stride]
        return mine.reshape(steps, self.stride)[:, :width]


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
        most = min(int(self._steps.max()), _BLOCK_STEPS)
        block = max(1, min(most, _BLOCK_SIZE // int(self.edges[-1])))
        # After so many steps the longest stream, and those like it, have the same table rows again.
        cycle = self.streams[0].period // gcd(self.streams[0].period, self.streams[0].lanes)
        self._block = block - block % cycle or block
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

    def blocks(self, row: int, *, backwards: bool = False) -> Iterator[Block]:
        """The steps in the order of decoding; or of encoding, but for those within a block.

        Args:
            row: entries of a table row.
            backwards: in the order of encoding.

        Yields:
            A block; the next one may take its arrays.
        """
        if backwards:
            yield from self._short_step(row)
        edges = self.edges.tolist()
        last = int(self._steps.max())
        ends = np.unique(self._steps).tolist()
        blocks = [
            (t, place + (t - first) * edges[most], edges[most])
            for first, end, most, place in self._runs()
            for t in range(first, end, self._block)
        ]
        tiled = self._tiled(row)
        columns = np.empty((self._block, edges[-1]), np.uint32)
        begun: list[int] = [-1] * len(tiled)
        for first, place, stride in reversed(blocks) if backwards else blocks:
            self._fill(columns, tiled, first, begun)
            stop = min(first + self._block, last)
            cuts = list(pairwise([first, *(t for t in ends if first < t < stop), stop]))
            for t, end in reversed(cuts) if backwards else cuts:
                active = int((self._steps > t).sum())
                width = edges[active]
                yield Block(
                    first=place + (t - first) * stride,
                    stride=stride,
                    lanes=slice(0, width),
                    columns=columns[t - first : end - first, :width],
                    starts=self.edges[: active + 1],
                    streams=slice(0, active),
                )
        if not backwards:
            yield from self._short_step(row)

    def _tiled(self, row: int) -> list[NDArray[np.uint32]]:
        """Where the table rows of each stream begin, enough to cut out any block of its steps."""
        out = []
        for stream in self.streams:
            rows = stream.columns[: stream.period] * np.uint32(row)
            out.append(np.concatenate([rows] * (2 + self._block * stream.lanes // stream.period)))
        return out

    def _fill(
        self,
        columns: NDArray[np.uint32],
        tiled: Sequence[NDArray[np.uint32]],
        first: int,
        begun: list[int],
    ) -> None:
        """Put the rows of a block of steps into columns [block, lanes].

        `begun` says with which of its columns each stream's part of the last block began.
        """
        active = int((self._steps > first).sum())
        at = 0
        for s, stream in enumerate(self.streams[:active]):
            n = stream.lanes
            begin = first * n % stream.period
            if begun[s] != begin:
                begun[s] = begin
                mine = tiled[s][begin : begin + len(columns) * n]
                columns[:, at : at + n] = mine.reshape(-1, n)
            at += n

    def _short_step(self, row: int) -> Iterator[Block]:
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
        width = int(rest.sum())
        yield Block(
            first=self.size - width,
            stride=width,
            lanes=np.concatenate(lanes),
            columns=(np.concatenate(columns) * np.uint32(row))[None],
            starts=np.concatenate([[0], rest[streams].cumsum()]),
            streams=streams,
        )


def encode_streams(streams: Sequence[Stream], tables: Tables) -> list[Coded]:
    """See `kvlib.codecs.rans.Coder`."""
    if not streams:
        return []
    batch = Batch(streams)
    symbols = batch.load()
    states = np.full(batch.edges[-1], LOWEST, np.uint32)
    words = np.empty(batch.size, np.uint16)  # no symbol puts out more than one
    ends = batch.counts.cumsum()
    place = ends.copy()
    ramp = np.arange(states.size)
    rooms, masks = np.empty(states.size, np.uint32), np.empty(states.size, np.bool_)
    quotients = np.empty(states.size)
    for block in batch.blocks(MAX_ALPHABET, backwards=True):
        x = states[block.lanes]
        last_word = place[block.streams]
        room, mask, quotient = rooms[: x.size], masks[: x.size], quotients[: x.size]
        starts = block.starts
        for step in _encoder_steps(block, symbols, tables, batch.streams):
            limit, gap, cumulative, divisor = step
            full = np.greater_equal(x, limit, mask).nonzero()[0]
            overflowing = x[full]
            # They go in front of the stream's words, in the order of lanes.
            edges = full.searchsorted(starts)
            first = edges[:-1]
            number = edges[1:] - first
            np.subtract(last_word, number, last_word)
            wanted = (last_word - first).repeat(number)
            np.add(wanted, ramp[: full.size], wanted)
            words[wanted] = overflowing
            np.right_shift(overflowing, _WORD_BITS, overflowing)
            x[full] = overflowing
            # x = x // f * TOTAL + x % f + cumulative. Quotients of such numbers that are not whole
            # are further from whole ones than float64 rounds, and that is quicker.
            quotient[:] = x
            np.divide(quotient, divisor, quotient)
            room[:] = quotient
            np.multiply(room, gap, room)
            np.add(x, room, x)
            np.add(x, cumulative, x)
        if not isinstance(block.lanes, slice):  # else these are views
            states[block.lanes] = x
            place[block.streams] = last_word
    every = zip(batch.indices, place, ends, batch.states(states), strict=True)
    done = {i: Coded(x.copy(), words[first:end].copy()) for i, first, end, x in every}
    return [done[i] for i in range(len(done))]


def _encoder_steps(
    block: Block, symbols: Bytes, tables: Tables, streams: Sequence[Stream]
) -> Iterator[tuple[States, States, States, NDArray[np.float64]]]:
    """What the steps of a block need besides the states, in the order of encoding.

    Yields:
        For each lane of a step: the least state without room, 4096 - frequency, the cumulative
        frequency and, as float64, the frequency.

    Raises:
        UnsupportedInputError: a symbol of one of the `streams` has frequency 0.
    """
    mine = block.of(symbols)
    steps, width = mine.shape
    some = max(1, _PART_SIZE // width)
    for last in range(steps, 0, -some):
        part = slice(max(0, last - some), last)
        entries = tables.encoder.take(block.columns[part] + mine[part])
        if not entries.all():
            raise uncodable(streams, tables)
        f = entries >> _PRECISION
        entries &= _SLOT
        rows = f << _FULL_BITS, _TOTAL - f, entries, f.astype(np.float64)
        yield from zip(*(x[::-1] for x in rows), strict=True)


def decode_streams(streams: Sequence[Stream], coded: Sequence[Coded], tables: Tables) -> None:
    """See `kvlib.codecs.rans.Coder`."""
    table = tables.by_slot

    def find(slots: States, columns: States, entries: States) -> None:
        np.bitwise_or(slots, columns, slots)
        table.take(slots, None, entries, "wrap")  # all are there; "raise" would copy the entries

    decode_with(find, streams, coded, TOTAL)


def decode_with(find: Find, streams: Sequence[Stream], coded: Sequence[Coded], row: int) -> None:
    """Decode like `decode_streams`, with entries that are found elsewhere; see `Find`.

    Args:
        find: finds them.
        streams: see `kvlib.codecs.rans.Coder`.
        coded: see there.
        row: entries of what `find` takes for a table row.
    """
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
    slots, parts = np.empty((2, states.size), np.uint32)
    masks = np.empty(states.size, np.bool_)
    for block in batch.blocks(row):
        x = states[block.lanes]
        next_word = place[block.streams]
        slot, part, mask = slots[: x.size], parts[: x.size], masks[: x.size]
        starts = block.starts
        entries = np.empty(block.columns.shape, np.uint32)
        for columns, entry in zip(block.columns, entries, strict=True):
            np.bitwise_and(x, _SLOT, slot)
            find(slot, columns, entry)
            np.right_shift(x, _PRECISION, slot)
            np.right_shift(entry, _COMPLEMENT, part)
            np.multiply(slot, part, slot)
            np.subtract(x, slot, x)
            np.bitwise_and(entry, _SLOT, part)
            np.subtract(x, part, x)
            low = np.less(x, _LOWEST, mask).nonzero()[0]
            edges = low.searchsorted(starts)
            first = edges[:-1]
            number = edges[1:] - first
            wanted = (next_word - first).repeat(number)
            np.add(wanted, ramp[: low.size], wanted)
            np.add(next_word, number, next_word)
            refilled = x[low]
            np.left_shift(refilled, _WORD_BITS, refilled)
            np.bitwise_or(refilled, words.take(wanted, None, None, "clip"), refilled)
            x[low] = refilled
        entries >>= _PRECISION
        block.of(symbols)[:] = entries  # the low byte of each
        if not isinstance(block.lanes, slice):  # else these are views
            states[block.lanes] = x
            place[block.streams] = next_word
    used = (place - begin).tolist()
    for s, c, x, n in zip(batch.streams, given, batch.states(states), used, strict=True):
        check_end(s, c, x, n)
    batch.store(symbols)
