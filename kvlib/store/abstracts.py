# SPDX-License-Identifier: Apache-2.0
"""Abstracts: what stands for the keys of a leaf when a query asks which leaves to read.

An abstract of a layer grows with its sequence: appended tokens change the last leaf only. Keys are
taken **as attended**, after RoPE. A constant vector may be taken off all keys of a head first
(`mean`): it adds one constant to all logits of a query, which softmax does not see, and what is
left needs fewer bits.

`Boxes` hold, for each leaf, KV head and channel, the least and the greatest value lo and hi of the
keys. With centre a = (lo + hi) / 2 and half-range h = (hi - lo) / 2 they give the score

    q . a + weight * |q| . h

whose weight 1 is Quest's bound (arXiv 2406.10774), never below the greatest q . k in the leaf. The
bound overrates leaves with one stray channel; a weight of 0.5 ranks them better. lo and hi are
stored, not a and h, and rounded outwards, so weight 1 is a bound in each of the storage types.

Abstracts can be taken out as bytes and put back (`take`, `extend`): a store keeps them beside the
blocks that they are of (`kvlib.store.abstract_records`), and an `AbstractForm` says what they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlib.errors import ConfigError, ShapeError
from kvlib.store.leaves import LEAF_TOKENS

__all__ = ["BOX_DTYPES", "AbstractForm", "Boxes", "Rows", "check_keys"]

BOX_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""What boxes may be stored in. int8 has one exponent for each leaf and head, of 1 byte."""


@dataclass(frozen=True, slots=True)
class AbstractForm:
    """What the bytes of some abstracts are: a row for every `unit` tokens of a layer.

    Attributes:
        text: canonical string, such as ``boxes@1:dtype=int8,leaf=16``; docs/formats/container.md
            has them all.
        unit: tokens of a row.
        head_bytes: of a row, for each KV head.
        channel_bytes: of a row, for each channel of a KV head, on top.
        profile: digest of the artefact with the codebooks, "" without.
    """

    text: str
    unit: int
    head_bytes: int
    channel_bytes: int
    profile: str = ""

    def row_bytes(self, heads: int, dim: int) -> int:
        """Bytes of a row, of a layer with so many KV heads and channels of a key."""
        return heads * (self.head_bytes + self.channel_bytes * dim)


class Rows:
    """A tensor that grows along its first dimension.

    Args:
        row: shape of a row.
        dtype: of the numbers.
    """

    def __init__(self, row: tuple[int, ...], dtype: torch.dtype) -> None:
        self._held = torch.empty((0, *row), dtype=dtype)
        self._count = 0

    def __len__(self) -> int:
        """Rows."""
        return self._count

    @property
    def data(self) -> Tensor:
        """All rows: a view."""
        return self._held[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes held, room for rows to come included: at most an eighth and one row."""
        return self._held.nbytes

    def extend(self, rows: Tensor) -> None:
        """Append rows."""
        count = self._count + len(rows)
        if count > len(self._held):
            grown = self._held.new_empty((count + count // 8 + 1, *self._held.shape[1:]))
            grown[: self._count] = self.data
            self._held = grown
        self._held[self._count : count] = rows
        self._count = count


class Boxes:
    """Least and greatest keys of every leaf of one layer.

    Args:
        heads: KV heads.
        dim: channels of a key.
        leaf: tokens of a leaf.
        dtype: a name of `BOX_DTYPES`. Rounded outwards, so the bound holds in each.
        mean: [heads, dim], taken off every key; None takes nothing off.

    Raises:
        ConfigError: an unknown dtype, or a leaf without tokens.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        *,
        leaf: int = LEAF_TOKENS,
        dtype: str = "int8",
        mean: Tensor | None = None,
    ) -> None:
        if dtype not in BOX_DTYPES:
            raise ConfigError(f"boxes are stored in {', '.join(BOX_DTYPES)}, not in {dtype!r:.80}")
        if leaf < 1:
            raise ConfigError(f"a leaf has 1 token or more, got {leaf}")
        self.heads, self.dim, self.leaf, self.dtype = heads, dim, leaf, dtype
        self.mean = torch.zeros(heads, dim) if mean is None else mean.float().clone()
        self._stored = Rows((heads, 2, dim), BOX_DTYPES[dtype])
        self._exponents = Rows((heads,), torch.int8)
        self._open = torch.empty(heads, 2, dim)  # the last leaf, while tokens of it are missing
        self._num_open = 0

    def __len__(self) -> int:
        """Leaves, an unfinished one included."""
        return len(self._stored) + (self._num_open > 0)

    @property
    def num_tokens(self) -> int:
        """Tokens appended."""
        return len(self._stored) * self.leaf + self._num_open

    @property
    def nbytes(self) -> int:
        """Bytes held: boxes, exponents, the unfinished leaf and the mean."""
        return self._stored.nbytes + self._exponents.nbytes + self._open.nbytes + self.mean.nbytes

    def append(self, keys: Tensor) -> None:
        """Add the keys of the next tokens.

        Args:
            keys: [heads, t, dim], post-RoPE, any float dtype.

        Raises:
            ShapeError: keys of another shape.
        """
        check_keys(keys, self.heads, self.dim)
        keys = keys.float() - self.mean[:, None]
        at = 0
        if self._num_open:
            at = min(self.leaf - self._num_open, keys.shape[1])
            self._widen(keys[:, :at])
        whole = (keys.shape[1] - at) // self.leaf * self.leaf
        if whole:
            leaves = keys[:, at : at + whole].unflatten(1, (-1, self.leaf))
            boxes = torch.stack([-leaves.amin(2), leaves.amax(2)], 2)  # [heads, n, 2, dim]
            self._store(boxes.transpose(0, 1))
        self._widen(keys[:, at + whole :])

    def _widen(self, keys: Tensor) -> None:
        """Add keys to the unfinished leaf, and store it once it is whole."""
        if not keys.shape[1]:
            return
        box = torch.stack([-keys.amin(1), keys.amax(1)], 1)
        self._open = torch.maximum(box, self._open) if self._num_open else box
        self._num_open += keys.shape[1]
        if self._num_open == self.leaf:
            self._num_open = 0
            self._store(self._open[None])

    def _store(self, boxes: Tensor) -> None:
        """Append boxes float32 [n, heads, 2, dim]: -lo and hi, so that both are rounded up."""
        if self.dtype == "int8":
            largest = boxes.abs().amax((2, 3))
            exponents = (torch.frexp(largest).exponent - 7).clamp(-126, 120)
            exponents += torch.ldexp(largest, -exponents) > 127  # by then below 128
            self._exponents.extend(exponents.to(torch.int8))
            boxes = torch.ldexp(boxes, -exponents[..., None, None])
        self._stored.extend(_round_up(boxes, BOX_DTYPES[self.dtype]))

    @staticmethod
    def form(dtype: str, leaf: int) -> AbstractForm:
        """The form of boxes without a mean."""
        itemsize = BOX_DTYPES[dtype].itemsize
        text = f"boxes@1:dtype={dtype},leaf={leaf}"
        return AbstractForm(text, leaf, int(dtype == "int8"), 2 * itemsize)

    def take(self, first: int, stop: int) -> Tensor:
        """The boxes of the whole leaves [first, stop) as bytes, uint8 [stop - first, row bytes].

        A row: with int8 the exponents [heads], then -lo and hi [heads, 2, dim], little-endian.
        """
        boxes = self._stored.data[first:stop].flatten(1).view(torch.uint8)
        if self.dtype != "int8":
            return boxes.clone()
        return torch.cat([self._exponents.data[first:stop].view(torch.uint8), boxes], 1)

    def extend(self, rows: Tensor) -> None:
        """Append whole leaves as `take` gave them.

        Raises:
            ShapeError: rows of another size, or a leaf is unfinished.
        """
        split = self.heads if self.dtype == "int8" else 0
        width = split + 2 * self.heads * self.dim * BOX_DTYPES[self.dtype].itemsize
        if self._num_open or rows.dim() != 2 or rows.shape[1] != width:
            raise ShapeError(
                f"boxes {tuple(rows.shape)} after {self._num_open} tokens of a leaf; expected "
                f"[leaves, {width}] after whole leaves"
            )
        if split:
            self._exponents.extend(rows[:, :split].view(torch.int8))
        boxes = rows[:, split:].contiguous().view(BOX_DTYPES[self.dtype])
        self._stored.extend(boxes.unflatten(1, (self.heads, 2, self.dim)))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Least and greatest keys as stored, the mean off: float32 [n, heads, dim] each."""
        boxes = self._stored.data.float()
        if self.dtype == "int8":
            boxes = torch.ldexp(boxes, self._exponents.data.int()[..., None, None])
        if self._num_open:
            boxes = torch.cat([boxes, self._open[None]])
        return -boxes[:, :, 0], boxes[:, :, 1]

    def scores(self, query: Tensor, weight: float = 0.5) -> Tensor:
        """Give q . a + weight * |q| . h of each leaf; keys without their mean.

        Args:
            query: float [heads, rows, dim]: the queries that share each KV head, post-RoPE.
            weight: of the half-range; 1 makes the score a bound of q . k.

        Returns:
            float32 [heads, rows, n].
        """
        query = query.float()
        spread = weight * query.abs()
        # q . a + w |q| . h = ((w |q| - q) . -lo + (w |q| + q) . hi) / 2
        both = torch.stack([spread - query, spread + query], 2).div_(2).flatten(2)
        stored = self._stored.data.float().flatten(2).permute(1, 2, 0)
        out = both @ stored  # [heads, rows, n]
        if self.dtype == "int8":
            out = torch.ldexp(out, self._exponents.data.int().t()[:, None])
        if self._num_open:
            out = torch.cat([out, both @ self._open.flatten(1)[..., None]], -1)
        return out


def check_keys(keys: Tensor, heads: int, dim: int) -> None:
    """Refuse keys that are not [heads, t, dim].

    Raises:
        ShapeError: saying what they are.
    """
    if keys.dim() != 3 or keys.shape[::2] != (heads, dim):
        raise ShapeError(f"keys are {tuple(keys.shape)}, expected [{heads}, tokens, {dim}]")


def _round_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least numbers of `dtype` that are not below the float32 numbers `x`."""
    if dtype == torch.int8:
        return x.ceil().to(dtype)
    near = x.to(dtype)
    if dtype == torch.float32:
        return near
    # The next number up: one more in the bits of a positive number, one less of a negative one.
    bits = near.view(torch.int16)
    step = torch.where(near.signbit(), -1, 1).to(torch.int16)
    return torch.where(near.float() < x, bits + step, bits).view(dtype)
