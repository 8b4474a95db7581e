# SPDX-License-Identifier: Apache-2.0
"""How engines lay out keys and values in their pages, and the way to kvlib's own form and back.

An engine keeps the KV of a layer as pages of a few tokens; a `PageLayout` knows what lies where in
a page. kvlib's form is that of transformers: keys and values [Hkv, T, D] in the order of tokens.
`verify_layout` holds a layout to the engine's own writer before anything is served through it:
layouts changed between releases before, and whoever did not notice served garbage.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvlib.errors import ConnectorError

__all__ = [
    "LAYOUTS",
    "AmxPages",
    "LatentPages",
    "PageLayout",
    "Pages",
    "Part",
    "RowPages",
    "VecPages",
    "verify_layout",
]


Part = tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]
"""Pages, int64 [n] on the CPU, and keys and values [H, n * N, D] of each layer."""


class PageLayout(Protocol):
    """What lies where in a page.

    Shapes: `view` [B, H, N, C] is a layer's memory as the engine gives it (pages, KV heads, tokens
    of a page, content of a token and head). `pages` are indices into it.
    """

    @property
    def name(self) -> str:
        """Of the layout."""
        ...

    def read(self, view: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, len(pages) * N, D] of some pages, as a copy."""
        ...

    def write(self, view: Tensor, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [H, len(pages) * N, D] into some pages."""
        ...


def _take(view: Tensor, pages: Tensor) -> Tensor:
    """Those pages; without a copy where they follow each other."""
    first, count = int(pages[0]), len(pages)
    if int(pages[-1]) - first == count - 1 and bool((pages.diff() == 1).all()):
        return view[first : first + count]
    return view.index_select(0, pages.to(view.device))


def _tokens(x: Tensor) -> Tensor:
    """[n, H, N, D] as a contiguous [H, n * N, D]."""
    n, heads, size, dim = x.shape
    out = x.new_empty((heads, n, size, dim))
    out.copy_(x.transpose(0, 1))
    return out.view(heads, n * size, dim)


def _paged(x: Tensor, size: int) -> Tensor:
    """[H, n * N, D] as a view [n, H, N, D]."""
    heads, tokens, dim = x.shape
    return x.reshape(heads, tokens // size, size, dim).transpose(0, 1)


class RowPages:
    """A token's key and value side by side: vLLM's logical view on CUDA and ROCm."""

    name: ClassVar[str] = "rows"

    def read(self, view: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `PageLayout.read`."""
        keys, values = _take(view, pages).chunk(2, dim=-1)
        return _tokens(keys), _tokens(values)

    def write(self, view: Tensor, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PageLayout.write`."""
        size = view.shape[2]
        view[pages] = torch.cat([_paged(keys, size), _paged(values, size)], dim=-1)


class LatentPages:
    """One latent vector a token, no values: MLA."""

    name: ClassVar[str] = "latent"

    def read(self, view: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `PageLayout.read`; the values have no channels."""
        keys = _tokens(_take(view, pages))
        return keys, keys.new_empty((*keys.shape[:2], 0))

    def write(self, view: Tensor, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PageLayout.write`."""
        view[pages] = _paged(keys, view.shape[2])


class _CpuPages:
    """A page of vLLM's CPU attention: first a region of keys, then one of values."""

    name: ClassVar[str]

    @staticmethod
    def _regions(view: Tensor) -> tuple[Tensor, int, int]:
        """A view [B, H, 2, N * D] and N, D."""
        pages, heads, size, content = view.shape
        dim = content // 2
        return view.view(pages, heads, 2, size * dim), size, dim


class VecPages(_CpuPages):
    """vLLM's CPU attention without AMX: keys [D, N] (transposed), values [N, D].

    Args:
        compiled: use numba where it is installed.
    """

    name: ClassVar[str] = "cpu-vec"

    def __init__(self, *, compiled: bool = True) -> None:
        self._compiled = compiled

    def _kernels(self) -> Any:
        """`kvlib.connectors.layouts_numba`, None without numba."""
        if self._compiled:
            with suppress(ImportError):
                return import_module("kvlib.connectors.layouts_numba")
            self._compiled = False
        return None

    def write_parts(self, views: Sequence[Tensor], parts: Sequence[Part]) -> bool:
        """Write all layers of several runs of pages at once; False where that cannot be."""
        kernels = self._kernels()
        if kernels is None or not kernels.fits(views, parts):
            return False
        kernels.write(views, parts)
        return True

    def read(self, view: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `PageLayout.read`."""
        regions, size, dim = self._regions(view)
        kernels = self._kernels()
        if kernels is not None:
            keys, values = (
                view.new_empty((view.shape[1], len(pages) * size, dim)) for _ in range(2)
            )
            part = (pages, [(keys, values)])
            if kernels.fits([view], [part]):
                kernels.read([view], [part])
                return keys, values
        taken = _take(regions, pages)
        n, heads = taken.shape[:2]
        packed = taken[:, :, 0].view(n, heads, dim, size).transpose(2, 3)
        return _tokens(packed), _tokens(taken[:, :, 1].view(n, heads, size, dim))

    def write(self, view: Tensor, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PageLayout.write`."""
        if self.write_parts([view], [(pages, [(keys, values)])]):
            return
        regions, size, dim = self._regions(view)
        n, heads = len(pages), regions.shape[1]
        packed = regions.new_empty((n, heads, 2, size * dim))
        packed[:, :, 0].view(n, heads, dim, size).copy_(_paged(keys, size).transpose(2, 3))
        packed[:, :, 1].view(n, heads, size, dim).copy_(_paged(values, size))
        regions.index_copy_(0, pages, packed)


class AmxPages(_CpuPages):
    """vLLM's CPU attention with AMX (bfloat16).

    Keys [N / 16, D / 2, 16, 2]: groups of 16 tokens, pairs of channels innermost. Values
    [D / 16, N / 2, 16, 2]: groups of 16 channels, pairs of tokens innermost.
    """

    name: ClassVar[str] = "cpu-amx"

    def read(self, view: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """See `PageLayout.read`."""
        regions, size, dim = self._regions(view)
        taken = _take(regions, pages)
        n, heads = taken.shape[:2]
        keys = taken[:, :, 0].view(n, heads, size // 16, dim // 2, 16, 2)
        values = taken[:, :, 1].view(n, heads, dim // 16, size // 2, 16, 2)
        return (
            _tokens(keys.permute(0, 1, 2, 4, 3, 5).reshape(n, heads, size, dim)),
            _tokens(values.permute(0, 1, 3, 5, 2, 4).reshape(n, heads, size, dim)),
        )

    def write(self, view: Tensor, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `PageLayout.write`."""
        regions, size, dim = self._regions(view)
        n, heads = len(pages), regions.shape[1]
        k = _paged(keys, size).reshape(n, heads, size // 16, 16, dim // 2, 2)
        v = _paged(values, size).reshape(n, heads, size // 2, 2, dim // 16, 16)
        packed = regions.new_empty((n, heads, 2, size * dim))
        packed[:, :, 0] = k.permute(0, 1, 2, 4, 3, 5).reshape(n, heads, size * dim)
        packed[:, :, 1] = v.permute(0, 1, 4, 2, 5, 3).reshape(n, heads, size * dim)
        regions.index_copy_(0, pages, packed)


LAYOUTS: Mapping[str, PageLayout] = {
    layout.name: layout for layout in (RowPages(), LatentPages(), VecPages(), AmxPages())
}
"""All layouts by name."""


class Pages:
    """The paged memory of all layers of an engine's cache.

    Args:
        views: of each layer, in model order, [B, H, N, C].
        layout: what lies where in a page.
    """

    def __init__(self, views: Sequence[Tensor], layout: PageLayout) -> None:
        if not views or len({view.shape[2] for view in views}) != 1:
            raise ConnectorError(
                "the layers of this cache have pages of different sizes: "
                f"{sorted({view.shape[2] for view in views})} tokens; expected one size"
            )
        self.views = list(views)
        self.layout = layout
        self.page_tokens = int(views[0].shape[2])

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.views)

    def read_layer(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [H, len(pages) * N, D] of a layer, on the CPU."""
        keys, values = self.layout.read(self.views[layer], pages)
        return keys.cpu(), values.cpu()

    def write_layer(self, layer: int, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [H, len(pages) * N, D] into pages of a layer."""
        view = self.views[layer]
        self.layout.write(
            view,
            pages.to(view.device),
            keys.to(view.device, non_blocking=True),
            values.to(view.device, non_blocking=True),
        )

    def write_parts(self, parts: Sequence[Part]) -> None:
        """Put keys and values of all layers into several runs of pages."""
        write = getattr(self.layout, "write_parts", None)
        if write is not None and write(self.views, parts):
            return
        for pages, layers in parts:
            for layer, (keys, values) in enumerate(layers):
                self.write_layer(layer, pages, keys, values)


Writer = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""An engine's own way to put tokens into its cache: (keys [T, H, D], values [T, H, D], memory
[B, H, N, C], slots [T])."""


def verify_layout(layout: PageLayout, view: Tensor, writer: Writer | None) -> None:
    """Write a pattern through the engine and read it through the layout, and the other way round.

    Works on memory of its own that has the shape and strides of `view`.

    Args:
        layout: what is to be tested.
        view: a layer's memory, [B, H, N, C].
        writer: the engine's own; None only tests that the layout undoes itself.

    Raises:
        ConnectorError: it is not this layout.
    """
    num_pages, heads, size, content = view.shape
    num_pages = min(num_pages, 4)
    split = content if layout.name == LatentPages.name else content // 2
    generator = torch.Generator().manual_seed(20)
    tokens = num_pages * size

    def pattern(dim: int) -> Tensor:
        x = torch.randn((heads, tokens, dim), generator=generator)
        return x.to(view.dtype).to(view.device)

    def memory() -> Tensor:
        span = 1 + sum(
            (n - 1) * s for n, s in zip((num_pages, *view.shape[1:]), view.stride(), strict=True)
        )
        flat = torch.zeros(span, dtype=view.dtype, device=view.device)
        return flat.as_strided((num_pages, heads, size, content), view.stride())

    keys, values = pattern(split), pattern(content - split)
    order = torch.randperm(num_pages, generator=generator)
    ours = memory()
    layout.write(ours, order.to(view.device), keys, values)
    read = layout.read(ours, order)
    same = torch.equal(read[0], keys) and torch.equal(read[1], values)
    if same and writer is not None:
        theirs = memory()
        offsets = torch.arange(size)
        slots = (order[:, None] * size + offsets[None]).flatten().to(view.device)
        flat = [x.transpose(0, 1).contiguous() for x in (keys, values)]
        writer(flat[0], flat[1], theirs, slots)
        read = layout.read(theirs, order)
        same = (
            torch.equal(read[0], keys)
            and torch.equal(read[1], values)
            and torch.equal(ours, theirs)
        )
    if not same:
        raise ConnectorError(
            f"this engine's cache {tuple(view.shape)} of {view.dtype} is not laid out as "
            f"{layout.name!r}: a pattern written through the engine did not come back. Nothing is "
            "loaded or stored; run without the connector, or use a version that is supported"
        )
