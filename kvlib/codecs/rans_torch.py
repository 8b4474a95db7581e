# SPDX-License-Identifier: Apache-2.0
"""The entropy coder in torch operations, for any device: step by step what the NumPy one does.

Torch has few operations on unsigned numbers, so all are int64; every value fits 63 bits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvlib.codecs.rans import (
    FULL_BITS,
    LOWEST,
    WORD_BITS,
    Coded,
    Stream,
    check_end,
    uncodable,
)
from kvlib.codecs.rans_numpy import Batch, Block
from kvlib.codecs.rans_tables import MAX_ALPHABET, PRECISION, TOTAL, Tables

__all__ = ["decode_streams", "encode_streams"]

_CPU = torch.device("cpu")


class _BlockOn:
    """A `Block` whose arrays are tensors on a device."""

    def __init__(self, block: Block, device: torch.device) -> None:
        def put(x: slice | np.ndarray) -> slice | Tensor:
            return x if isinstance(x, slice) else _put(x, device)

        self.lanes, self.streams = put(block.lanes), put(block.streams)
        self.columns, self.starts = _put(block.columns, device), _put(block.starts, device)


def _put(x: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(x.astype(np.int64)).to(device)


def _places(chosen: Tensor, starts: Tensor, place: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """The words of the chosen lanes, and where the streams' next words are."""
    edges = torch.searchsorted(chosen, starts)
    number = edges.diff()
    moved = place + sign * number
    first = moved if sign < 0 else place
    within = torch.arange(len(chosen), device=chosen.device)
    return within + (first - edges[:-1]).repeat_interleave(number), moved


def encode_streams(
    streams: Sequence[Stream], tables: Tables, device: torch.device = _CPU
) -> list[Coded]:
    """See `kvlib.codecs.rans.Coder`; `device` is where the work is done."""
    if not streams:
        return []
    batch = Batch(streams)
    table = _put(tables.encoder, device)
    symbols = torch.from_numpy(batch.load()).to(device)
    states = torch.full((int(batch.edges[-1]),), LOWEST, device=device)
    words = torch.zeros(batch.size, dtype=torch.int64, device=device)
    ends = _put(batch.counts.cumsum(), device)
    place = ends.clone()
    absent = torch.zeros((), dtype=torch.bool, device=device)
    for at in batch.blocks(MAX_ALPHABET, backwards=True):
        block = _BlockOn(at, device)
        for columns, mine in zip(block.columns.flip(0), at.of(symbols).flip(0), strict=True):
            entry = table[columns + mine]
            f = entry >> PRECISION
            absent |= (f == 0).any()
            x = states[block.lanes].clone()
            full = torch.nonzero(x >= f << FULL_BITS).view(-1)
            wanted, place[block.streams] = _places(full, block.starts, place[block.streams], -1)
            words[wanted] = x[full] & ((1 << WORD_BITS) - 1)
            x[full] >>= WORD_BITS
            quotient = torch.div(x, f.clamp(min=1), rounding_mode="floor")
            states[block.lanes] = x + quotient * (TOTAL - f) + (entry & (TOTAL - 1))
    if absent:
        raise uncodable(batch.streams, tables)
    last = batch.states(states.cpu().numpy().astype(np.uint32))
    out = words.cpu().numpy().astype(np.uint16)
    every = zip(batch.indices, place.tolist(), ends.tolist(), last, strict=True)
    done = {i: Coded(x.copy(), out[first:end].copy()) for i, first, end, x in every}
    return [done[i] for i in range(len(streams))]


def decode_streams(
    streams: Sequence[Stream],
    coded: Sequence[Coded],
    tables: Tables,
    device: torch.device = _CPU,
) -> None:
    """See `kvlib.codecs.rans.Coder`; `device` is where the work is done."""
    if not streams:
        return
    batch = Batch(streams)
    given = [coded[i] for i in batch.indices]
    lookup, table = _put(tables.symbols, device), _put(tables.encoder, device)
    symbols = torch.empty(batch.size, dtype=torch.uint8, device=device)
    states = _put(np.concatenate([c.states for c in given]), device)
    sizes = np.array([c.words.size for c in given])
    # One more: a stream that asks for more words than it has reads others' until it is refused.
    words = _put(np.concatenate([*(c.words for c in given), np.zeros(1, np.uint16)]), device)
    begin = _put(sizes.cumsum() - sizes, device)
    place = begin.clone()
    for at in batch.blocks(TOTAL):
        block = _BlockOn(at, device)
        for columns, mine in zip(block.columns, at.of(symbols), strict=True):
            x = states[block.lanes]
            slot = x & (TOTAL - 1)
            symbol = lookup[columns + slot]
            mine[:] = symbol.to(torch.uint8)
            entry = table[(columns >> PRECISION) * MAX_ALPHABET + symbol]
            x = (entry >> PRECISION) * (x >> PRECISION) + slot - (entry & (TOTAL - 1))
            low = torch.nonzero(x < LOWEST).view(-1)
            wanted, place[block.streams] = _places(low, block.starts, place[block.streams], 1)
            x[low] = x[low] << WORD_BITS | words[wanted.clamp(max=len(words) - 1)]
            states[block.lanes] = x
    every = batch.states(states.cpu().numpy())
    for s, c, state, n in zip(batch.streams, given, every, (place - begin).tolist(), strict=True):
        check_end(s, c, state, n)
    batch.store(symbols.cpu().numpy())
