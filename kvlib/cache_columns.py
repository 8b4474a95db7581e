# SPDX-License-Identifier: Apache-2.0
"""Which columns of a batch are tokens, and at which positions.

`generate()` counts in columns: all sequences of a batch are equally long, shorter ones are padded.
A cache that evicts keeps no padding, so it has to remember what every column was.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlib.errors import ConfigError

__all__ = ["Columns", "NewColumns"]


@dataclass(frozen=True, slots=True)
class NewColumns:
    """The columns of one forward pass.

    Attributes:
        num: T.
        valid: bool [B, T], which of them are tokens; None for all.
        positions: int32 [B, T].
    """

    num: int
    valid: Tensor | None
    positions: Tensor

    def tokens(self, sequence: int, removed: int = 0) -> int:
        """Tokens of a sequence among the columns, without the last `removed` ones."""
        left = self.num - removed
        return left if self.valid is None else int(self.valid[sequence, :left].sum())


class Columns:
    """All columns so far.

    Attributes:
        num: columns.
        batch: sequences; 0 before the first forward pass.
        valid: bool [B, num]; None while every column is a token.
        positions: int32 [B, num]; None once nothing needs them (`settle`).
        plain: whether the positions of a sequence count its tokens from 0.
        seen: tokens of each sequence.
        prompt: those that belong to its prompt.
    """

    def __init__(self) -> None:
        self.num = 0
        self.batch = 0
        self.valid: Tensor | None = None
        self.positions: Tensor | None = None
        self.seen: list[int] = []
        self.prompt: list[int] = []
        self.plain: list[bool] = []
        self._last: list[int] = []  # position of the last token
        self._before: list[int] = []  # the same before the newest columns
        self._newest: NewColumns | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        held = [x for x in (self.valid, self.positions) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    def read(self, arguments: dict[str, Any]) -> NewColumns:
        """The new columns of a forward pass with these arguments; changes nothing.

        Raises:
            ConfigError: another batch size, or a mask or positions that do not continue these.
        """
        inputs = arguments.get("input_ids")
        if inputs is None:
            inputs = arguments["inputs_embeds"]
        batch, num = inputs.shape[:2]
        if self.batch not in (0, batch):
            raise ConfigError(f"the cache holds {self.batch} sequences, the forward has {batch}")
        valid = self._read_mask(arguments.get("attention_mask"), batch, num)
        given = arguments.get("position_ids")
        if given is None:
            positions = torch.arange(self.num, self.num + num, device=inputs.device)[None]
        elif given.dim() == 2 and given.shape[-1] == num:
            positions = given
        else:
            raise ConfigError(
                f"position_ids are {tuple(given.shape)}; KVCache takes [{batch}, {num}]"
            )
        positions = positions.to(torch.int32).expand(batch, -1).contiguous()
        for row in range(batch):
            mine = positions[row] if valid is None else positions[row][valid[row]]
            last = self._last[row] if self.batch else -1
            if len(mine) and (int(mine[0]) <= last or bool((mine[1:] <= mine[:-1]).any())):
                raise ConfigError(
                    f"position_ids of sequence {row} do not ascend from {last + 1} on; KVCache "
                    "takes one sequence per row (no packing) whose positions go on"
                )
        return NewColumns(num, valid, positions)

    def _read_mask(self, mask: Any, batch: int, num: int) -> Tensor | None:
        if mask is None:
            return None
        total = self.num + num
        if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, total):
            seen = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(
                f"attention_mask is {seen}; KVCache takes [{batch}, {total}]: one number for every "
                "column so far, evicted ones included, and for the new ones"
            )
        tokens = mask.bool()
        old = tokens[:, : self.num]
        if not (bool(old.all()) if self.valid is None else torch.equal(old, self.valid)):
            raise ConfigError(
                "attention_mask hides columns that were tokens in an earlier forward pass (or the "
                "reverse); KVCache does not keep padding and cannot change it afterwards"
            )
        new = tokens[:, self.num :]
        return None if bool(new.all()) else new

    def add(self, new: NewColumns, *, to_prompt: bool) -> None:
        """Append columns that `read` has returned; `num` follows with `advance`."""
        first = self.batch == 0
        if first:
            self.batch = len(new.positions)
            self.seen, self.prompt = [0] * self.batch, [0] * self.batch
            self._last, self.plain = [-1] * self.batch, [True] * self.batch
        if new.valid is not None or self.valid is not None:
            device = new.positions.device
            ones = torch.ones(self.batch, max(self.num, new.num), dtype=torch.bool, device=device)
            old = ones[:, : self.num] if self.valid is None else self.valid
            mine = ones[:, : new.num] if new.valid is None else new.valid
            self.valid = torch.cat([old, mine], dim=1)
        if first:
            self.positions = new.positions
        elif self.positions is not None:
            self.positions = torch.cat([self.positions, new.positions], dim=1)
        self._newest, self._before = new, list(self._last)
        for row in range(self.batch):
            count = new.tokens(row)
            self.seen[row] += count
            self.prompt[row] += count if to_prompt else 0
            if count:
                self._last[row] = self._last_of(new, row, 0)
            # Ascending from 0 on, and as many as tokens: then they count them.
            self.plain[row] &= self._last[row] == self.seen[row] - 1

    @staticmethod
    def _last_of(new: NewColumns, row: int, removed: int) -> int:
        mine = new.positions[row, : new.num - removed]
        if new.valid is not None:
            mine = mine[new.valid[row, : len(mine)]]
        return int(mine[-1])

    def advance(self, new: NewColumns) -> None:
        """The forward pass over `new` is done."""
        self.num += new.num

    def settle(self, *, keep_positions: bool) -> None:
        """Nothing can be taken back any more, and positions may no longer be needed."""
        self._newest = None
        if not keep_positions:  # what is held of every layer carries its own
            self.positions = None

    def remove(self, num: int) -> list[int]:
        """Take the last columns out again; returns how many tokens each sequence lost.

        Without positions, only the newest columns can be taken out.
        """
        keep = self.num - num
        lost = []
        for row in range(self.batch):
            gone = num if self.valid is None else int(self.valid[row, keep:].sum())
            self.seen[row] -= gone
            self.prompt[row] = min(self.prompt[row], self.seen[row])
            lost.append(gone)
        if self.valid is not None:
            self.valid = self.valid[:, :keep]
        if self.positions is not None:
            self.positions = self.positions[:, :keep]
        for row in range(self.batch):
            if self.positions is not None:
                left = self.token_positions(row)
                self._last[row] = int(left[-1]) if len(left) else -1
            elif self._newest is not None and self._newest.tokens(row, num):
                self._last[row] = self._last_of(self._newest, row, num)
            else:
                self._last[row] = self._before[row]
        self.num = keep
        return lost

    def token_positions(self, sequence: int) -> Tensor:
        """int32 [n]: positions of the tokens of one sequence."""
        assert self.positions is not None  # noqa: S101
        mine = self.positions[sequence]
        return mine if self.valid is None else mine[self.valid[sequence]]

    def last_position(self, sequence: int) -> int:
        """Position of the last token of one sequence, -1 before the first."""
        return self._last[sequence]

    def fork(self) -> "Columns":
        """A copy; its tensors are shared, since none is ever written to."""
        twin = copy(self)
        for name in ("seen", "prompt", "plain", "_last", "_before"):
            setattr(twin, name, list(getattr(self, name)))
        return twin

    def take(self, order: Sequence[int]) -> None:
        """Make the batch consist of these sequences."""
        self.batch = len(order)
        for name in ("seen", "prompt", "plain", "_last", "_before"):
            held = getattr(self, name)
            setattr(self, name, [held[i] for i in order])
        self._newest = None
        index = torch.tensor(order)
        if self.valid is not None:
            self.valid = self.valid[index.to(self.valid.device)]
        if self.positions is not None:
            self.positions = self.positions[index.to(self.positions.device)]
