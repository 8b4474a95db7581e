# SPDX-License-Identifier: Apache-2.0
"""How `cachegen` cuts a layer into matrices, and reads the parts of a section one by one."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvlib.blocks import LayerKV
from kvlib.codecs.base import raw_view
from kvlib.codecs.cachegen_kernels import Floats
from kvlib.codecs.container import Buffer
from kvlib.codecs.rans import Coded, _check_coded, choose_lanes
from kvlib.errors import CorruptDataError

__all__ = [
    "Chunk",
    "Reader",
    "batches",
    "coded_parts",
    "floats_of",
    "planes",
    "raw_tokens",
    "store",
    "tokens_of",
]

_T = TypeVar("_T")

_PATTERNS = {torch.float16: ("<u2", 0x7C00), torch.bfloat16: ("<u2", 0x7F80)}
_PATTERNS[torch.float32] = "<u4", 0x7F800000  # bits, and those of infinity
_PIECE = 16384  # numbers that torch converts without starting threads: callers have their own


class Chunk(NamedTuple):
    """Entries that are coded together, their heads side by side.

    Attributes:
        layer_idx: of their layer.
        kind: 0 for keys, 1 for values.
        x: [H, n, D], a view on the CPU: all heads of the layer, or one of a ragged one.
        channels: int64 [H * D]: which channel of the whole layer each column is. None: all, in
            order.
    """

    layer_idx: int
    kind: int
    x: Tensor
    channels: NDArray[np.int64] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and columns, n and H * D."""
        heads, n, width = self.x.shape
        return n, heads * width

    def cut(self, first: int, last: int) -> "Chunk":
        """Some of the entries."""
        return self._replace(x=self.x[:, first:last])


def batches(items: Sequence[_T], sizes: Sequence[int], most: int) -> Iterator[list[_T]]:
    """The items in order, as many at once as have `most` in all, or one."""
    some: list[_T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if some and total + size > most:
            yield some
            some, total = [], 0
        some.append(item)
        total += size
    if some:
        yield some


def planes(layer: LayerKV, kind: int, sinks: int, head_dim: int) -> Iterator[tuple[Chunk, int]]:
    """What keys (kind 0) or values (1) of a layer are cut into, in the order of a section.

    Args:
        layer: on the CPU.
        kind: 0 or 1.
        sinks: tokens at lower positions are exact where all heads of a plane begin with them.
        head_dim: channels of a head when none are pruned.

    Yields:
        Those that have entries, and how many first ones are stored as they are.
    """
    x = (layer.keys, layer.values)[kind]
    heads, width = layer.num_kv_heads, x.shape[-1]
    kept = layer.channels if kind == 0 else None
    if not x.numel():
        return
    if layer.is_dense and kept is None and width == head_dim:
        yield Chunk(layer.layer_idx, kind, x, None), _leading(layer.positions, sinks)
        return
    within = np.broadcast_to(np.arange(width), (heads, width)) if kept is None else kept.cpu()
    channels = np.asarray(within) + head_dim * np.arange(heads)[:, None]
    if layer.is_dense:
        whole = Chunk(layer.layer_idx, kind, x, channels.reshape(-1))
        yield whole, _leading(layer.positions, sinks)
        return
    start = 0
    for head, n in enumerate(layer.lengths):
        if n:
            positions = layer.positions[start : start + n]
            row = Chunk(layer.layer_idx, kind, x[None, start : start + n], channels[head])
            yield row, _leading(positions, sinks)
        start += n


def _leading(positions: range | Tensor, sinks: int) -> int:
    """How many first tokens have positions in [0, sinks), in all heads."""
    if not sinks or not len(positions):
        return 0
    if isinstance(positions, range):
        return max(0, min(positions.stop, sinks) - positions.start)
    rows = positions.reshape(-1, positions.shape[-1])[:, :sinks]
    inside = ((rows >= 0) & (rows < sinks)).all(0)
    return int(inside.to(torch.int64).cumprod(0).sum())


def tokens_of(x: Tensor) -> Floats:
    """float32 [n, H * D] of [H, n, D], a copy."""
    heads, n, width = x.shape
    out = torch.empty((n, heads, width))
    _copy(out.transpose(0, 1), x)
    return out.view(n, -1).numpy()


def store(x: Tensor, values: Floats) -> None:
    """Round [n, H * D] to the dtype of [H, n, D] and put it there."""
    heads, n, width = x.shape
    _copy(x, torch.from_numpy(values).view(n, heads, width).transpose(0, 1))


def _copy(out: Tensor, source: Tensor) -> None:
    step = max(1, _PIECE // max(1, out.shape[-1]))
    for target, rows in zip(out, source, strict=True):
        for first in range(0, len(rows), step):
            target[first : first + step].copy_(rows[first : first + step])


def raw_tokens(x: Tensor) -> bytes:
    """The own bytes of a plane [H, n, D], token after token."""
    return raw_view(x.transpose(0, 1).contiguous()).tobytes()


def floats_of(values: Floats, dtype: torch.dtype) -> bytes:
    """The bytes of numbers that `dtype` holds exactly."""
    if dtype == torch.float16:
        return values.astype("<f2").tobytes()
    if dtype == torch.bfloat16:
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f4").tobytes()


def coded_parts(coded: Coded) -> list[Buffer]:
    """The number of words, states and words, as they are stored."""
    words = coded.words
    return [
        words.size.to_bytes(4, "little"),
        coded.states.astype("<u4").tobytes(),
        words.astype("<u2").tobytes(),
    ]


class Reader:
    """The parts of a section, one after another; each size is checked before it is used."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> memoryview:
        """The next `size` bytes.

        Raises:
            CorruptDataError: there are fewer.
        """
        if not 0 <= size <= self._data.nbytes - self._at:
            raise CorruptDataError(
                f"a cachegen section ends {self._data.nbytes - self._at} bytes from here; {size} "
                "more are needed"
            )
        self._at += size
        return self._data[self._at - size : self._at]

    def array(self, dtype: str, count: int) -> "NDArray[Any]":
        """The next `count` numbers, a view; the dtype ends with their bytes."""
        return np.frombuffer(self.take(count * int(dtype[-1])), dtype)

    def numbers(self, count: int) -> list[int]:
        """The next `count` unsigned numbers of 32 bits."""
        values: list[int] = self.array("<u4", count).tolist()
        return values

    def floats(self, count: int, dtype: torch.dtype) -> Floats:
        """The next `count` numbers of a dtype, magnitudes.

        Raises:
            CorruptDataError: one is negative or not finite.
        """
        kind, infinite = _PATTERNS[dtype]
        pattern = self.array(kind, count)
        if (pattern >= infinite).any():  # so are those of negative numbers
            raise CorruptDataError("a scale of a cachegen section is negative or not finite")
        if dtype == torch.float16:
            return pattern.view("<f2").astype(np.float32)
        if dtype == torch.bfloat16:
            return (pattern.astype(np.uint32) << 16).view(np.float32)
        return pattern.view("<f4").astype(np.float32)

    def raw_tokens(self, out: Tensor) -> None:
        """The own bytes of a plane [H, n, D], token after token, into it."""
        raw = np.frombuffer(self.take(out.numel() * out.element_size()), np.uint8).copy()
        heads, n, width = out.shape
        out.copy_(torch.from_numpy(raw).view(out.dtype).view(n, heads, width).transpose(0, 1))

    def coded(self, symbols: int) -> Coded:
        """The next stream, of so many symbols: the number of its words, states and words; views.

        Raises:
            CorruptDataError: they are none.
        """
        words = int.from_bytes(self.take(4), "little")
        coded = Coded(self.array("<u4", choose_lanes(symbols)), self.array("<u2", words))
        _check_coded(0, coded, symbols)
        return coded

    def end(self) -> None:
        """Refuse bytes that follow.

        Raises:
            CorruptDataError: there are some.
        """
        if self._at != self._data.nbytes:
            raise CorruptDataError(
                f"{self._data.nbytes - self._at} bytes follow the end of a cachegen section"
            )
