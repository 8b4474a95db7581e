# SPDX-License-Identifier: Apache-2.0
"""How `cachegen` cuts a layer into matrices, and reads the parts of a section one by one."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvlib.blocks import LayerKV
from kvlib.codecs.base import raw_view
from kvlib.codecs.container import Buffer
from kvlib.codecs.rans import Coded, choose_lanes
from kvlib.errors import CorruptDataError

__all__ = [
    "Floats",
    "Plane",
    "Reader",
    "coded_parts",
    "floats_of",
    "planes",
    "raw_tokens",
    "store",
    "tokens_of",
]

Floats = NDArray[np.float32]

_PIECE = 16384  # numbers that torch converts without starting threads: callers have their own


class Plane(NamedTuple):
    """Entries whose heads are coded side by side: all heads of a layer, or one of a ragged one.

    Attributes:
        x: [H, n, D], a view of keys or values.
        channels: int64 [H * D]: which channel of the whole layer each column is.
        exact: so many first tokens are stored as they are.
    """

    x: Tensor
    channels: NDArray[np.int64]
    exact: int


def planes(layer: LayerKV, kind: int, sinks: int, head_dim: int) -> Iterator[Plane]:
    """What keys (kind 0) or values (1) of a layer are cut into, in the order of a section.

    Args:
        layer: on the CPU.
        kind: 0 or 1.
        sinks: tokens at lower positions are exact where all heads of a plane begin with them.
        head_dim: channels of a head when none are pruned.
    """
    x = (layer.keys, layer.values)[kind]
    heads = layer.num_kv_heads
    if kind == 0 and layer.channels is not None:
        kept = layer.channels.cpu().numpy()
    else:
        kept = np.broadcast_to(np.arange(x.shape[-1]), (heads, x.shape[-1]))
    channels = kept + head_dim * np.arange(heads)[:, None]
    if layer.is_dense:
        yield Plane(x, channels.reshape(-1), _leading(layer.positions, sinks))
        return
    start = 0
    for head, n in enumerate(layer.lengths):
        positions = layer.positions[start : start + n]
        yield Plane(x[None, start : start + n], channels[head], _leading(positions, sinks))
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


def tokens_of(x: Tensor, first: int, last: int) -> Floats:
    """float32 [last - first, H * D] of the tokens [first, last) of a plane [H, T, D]."""
    out = torch.empty((last - first, x.shape[0], x.shape[2]))
    _copy(out.transpose(0, 1), x[:, first:last])
    return out.view(last - first, -1).numpy()


def store(x: Tensor, first: int, values: Floats) -> None:
    """Round [n, H * D] to the dtype of a plane, and put it at the tokens from `first` on."""
    n = len(values)
    rows = torch.from_numpy(values).view(n, x.shape[0], x.shape[2])
    _copy(x[:, first : first + n], rows.transpose(0, 1))


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
    return raw_view(torch.from_numpy(values).to(dtype)).tobytes()


def coded_parts(coded: Coded) -> list[Buffer]:
    """States and words, as they are stored."""
    return [coded.states.astype("<u4").tobytes(), coded.words.astype("<u2").tobytes()]


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
        """The next `count` numbers, a view."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def numbers(self, count: int) -> list[int]:
        """The next `count` unsigned numbers of 32 bits."""
        values: list[int] = self.array("<u4", count).tolist()
        return values

    def floats(self, count: int, dtype: torch.dtype) -> Floats:
        """The next `count` numbers of a dtype, magnitudes.

        Raises:
            CorruptDataError: one is negative or not finite.
        """
        raw = np.frombuffer(self.take(count * dtype.itemsize), np.uint8).copy()
        values: Floats = torch.from_numpy(raw).view(dtype).to(torch.float32).numpy()
        if not np.isfinite(values).all() or np.signbit(values).any():
            raise CorruptDataError("a scale of a cachegen section is negative or not finite")
        return values

    def raw_tokens(self, out: Tensor) -> None:
        """The own bytes of a plane [H, n, D], token after token, into it."""
        raw = np.frombuffer(self.take(out.numel() * out.element_size()), np.uint8).copy()
        heads, n, width = out.shape
        out.copy_(torch.from_numpy(raw).view(out.dtype).view(n, heads, width).transpose(0, 1))

    def coded(self, symbols: int, words: int) -> Coded:
        """A stream of so many symbols."""
        states = self.array("<u4", choose_lanes(symbols))
        return Coded(states.astype(np.uint32), self.array("<u2", words).astype(np.uint16))

    def end(self) -> None:
        """Refuse bytes that follow.

        Raises:
            CorruptDataError: there are some.
        """
        if self._at != self._data.nbytes:
            raise CorruptDataError(
                f"{self._data.nbytes - self._at} bytes follow the end of a cachegen section"
            )
