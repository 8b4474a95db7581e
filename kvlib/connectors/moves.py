# SPDX-License-Identifier: Apache-2.0
"""What a `Mover` works on, what it is asked, and what it answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from torch import Tensor

from kvlib.keys import BlockKey
from kvlib.spec import EXACT
from kvlib.store.replacement import Hint

if TYPE_CHECKING:
    from concurrent.futures import Future

    from kvlib.store.puts import Put

__all__ = ["PagedMemory", "Save", "Saving", "Staged"]

Saving: TypeAlias = "Future[Put | None]"
"""A `Save` under way; see `Mover.save`."""


class PagedMemory(Protocol):
    """An engine's cache as a `Mover` sees it; `kvlib.connectors.layouts.Pages` is one.

    Attributes:
        views: a tensor of each layer, where the engine keeps it.
        page_tokens: tokens of a page.
    """

    views: list[Tensor]
    page_tokens: int

    @property
    def num_layers(self) -> int:
        """Layers."""
        ...

    def read_layer(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, tokens, D] of some pages of a layer, as copies on the CPU."""
        ...

    def write_layer(self, layer: int, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [H, tokens, D] into pages of a layer."""
        ...

    def write_parts(self, parts: Sequence[tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]]) -> None:
        """Put keys and values of all layers into several runs of pages."""
        ...


class Staged(NamedTuple):
    """What staging came to.

    Attributes:
        num_blocks: leading blocks of the prompt that are there: stored, or before `first`.
        fidelity: the lowest among them.
        crowded: there was no room for more, which there will be (never where a `Mover` waits).
    """

    num_blocks: int
    fidelity: str = EXACT
    crowded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Blocks of a prompt that lie complete in an engine's pages.

    Attributes:
        ticket: whose they are.
        keys: of all blocks from the start of the prompt to the last one to be stored.
        first: the first block to be stored.
        pages: ids of the pages of the prompt from `first_page` on.
        first_page: the page that the first block begins in, counted from the start of the prompt.
        fidelity: of what the blocks were computed from.
        hint: what is known of their next use.
    """

    ticket: str
    keys: Sequence[BlockKey]
    first: int
    pages: Sequence[int] | Tensor
    first_page: int
    fidelity: str = EXACT
    hint: Hint | None = None
