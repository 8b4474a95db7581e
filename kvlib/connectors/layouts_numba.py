# SPDX-License-Identifier: Apache-2.0
"""`VecPages` compiled by numba: all layers of all records in one call, which needs no interpreter.

With torch it is a strided copy for each layer and record, hundreds of them, each of which gives up
the interpreter and has to get it back from an engine that polls. Here a page's keys are turned as
they are copied, at the pace of memory. Layers and records lie anywhere, so the kernels are given
addresses; everything that they rely on is checked before.
"""

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray
from torch import Tensor

from kvlib.connectors.layouts import Part
from kvlib.errors import ShapeError

__all__ = ["fits", "read", "write"]

_P = ParamSpec("_P")
_Int64 = NDArray[np.int64]
_u64 = np.uint64
_ENDLESS = 1 << 40  # numbers that memory at an address may have


@intrinsic
def _at2(context: Any, address: Any) -> Any:
    """An address as a pointer to numbers of 2 bytes."""
    return _pointer(types.int16, address)


@intrinsic
def _at4(context: Any, address: Any) -> Any:
    """An address as a pointer to numbers of 4 bytes."""
    return _pointer(types.int32, address)


def _pointer(item: Any, address: Any) -> Any:
    pointer: Any = types.CPointer
    signature = pointer(item)(address)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return signature, generate


def _compiled(function: Callable[_P, None]) -> Callable[_P, None]:
    row, table = (types.Array(types.int64, n, "C", readonly=True) for n in (1, 2))
    signature = types.void(row, row, row, row, table, table, row)
    try:
        made = njit(signature, nogil=True, cache=True)(function)
    except (OSError, RuntimeError):  # no folder to write to: compile in every process
        made = njit(signature, nogil=True)(function)
    return cast("Callable[_P, None]", made)


def _kernel(at: Any, *, into_pages: bool) -> Callable[..., None]:
    """Copying of numbers that `at` points to, into pages or out of them.

    Its arguments: addresses of the layers' memory; [page stride, head stride, H, N, D]; pages of
    all parts, and where each part begins among them, and ends; addresses of keys and of values
    [parts, layers]; from a head to the next in each part.
    """

    @_compiled
    def move(
        memory: _Int64,
        shape: _Int64,
        pages: _Int64,
        starts: _Int64,
        keys: _Int64,
        values: _Int64,
        rows: _Int64,
    ) -> None:
        page_stride, head_stride, heads, size, dim = shape
        page = size * dim
        for part in range(starts.size - 1):
            for layer in range(memory.size):
                whole = carray(at(memory[layer]), (_ENDLESS,))
                k = carray(at(keys[part, layer]), (_ENDLESS,))
                v = carray(at(values[part, layer]), (_ENDLESS,))
                for i in range(starts[part], starts[part + 1]):
                    for h in range(heads):
                        to = pages[i] * page_stride + h * head_stride
                        begin = h * rows[part] + (i - starts[part]) * page
                        turned, mine = whole[to : to + page], k[begin : begin + page]
                        theirs, plain = whole[to + page : to + 2 * page], v[begin : begin + page]
                        if into_pages:
                            for d in range(dim):
                                for t in range(size):
                                    turned[_u64(d * size + t)] = mine[_u64(t * dim + d)]
                            for j in range(page):
                                theirs[_u64(j)] = plain[_u64(j)]
                        else:
                            for t in range(size):
                                for d in range(dim):
                                    mine[_u64(t * dim + d)] = turned[_u64(d * size + t)]
                            for j in range(page):
                                plain[_u64(j)] = theirs[_u64(j)]

    return move


_WRITE = {2: _kernel(_at2, into_pages=True), 4: _kernel(_at4, into_pages=True)}
_READ = {2: _kernel(_at2, into_pages=False), 4: _kernel(_at4, into_pages=False)}


def fits(views: Sequence[Tensor], parts: Sequence[Part]) -> bool:
    """Whether these lie in memory as the kernels know it.

    Args:
        views: of each layer, [B, H, N, 2 D]: on the CPU, a page of a head one run of memory, all
            layers alike.
        parts: tokens of a head are one run of memory; heads are equally far apart in all layers.
    """
    view = views[0]
    _, heads, size, content = view.shape
    dim = content // 2
    if (
        view.device.type != "cpu"
        or view.element_size() not in _WRITE
        or view.stride()[2:] != (content, 1)
        or view.stride(1) < size * content
        or any(_alike(x) != _alike(view) for x in views)
    ):
        return False
    for pages, layers in parts:
        like = _alike(layers[0][0])
        if (
            pages.dtype != torch.int64
            or like[:2] != (view.dtype, view.device)
            or like[2] != (heads, len(pages) * size, dim)
            or like[3][1:] != (dim, 1)
            or any(_alike(x) != like for pair in layers for x in pair)
        ):
            return False
    return True


def _alike(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, x.shape, x.stride()


def write(views: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Put keys and values into pages; what is given must fit.

    Raises:
        ShapeError: there is no such page, or another number of layers.
    """
    _WRITE[views[0].element_size()](*_arguments(views, parts))


def read(views: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Take keys and values out of pages; see `write`."""
    _READ[views[0].element_size()](*_arguments(views, parts))


def _arguments(views: Sequence[Tensor], parts: Sequence[Part]) -> tuple[_Int64, ...]:
    view = views[0]
    _, heads, size, content = view.shape
    pages = np.concatenate([pages.numpy() for pages, _ in parts])
    if pages.size and not 0 <= pages.min() <= pages.max() < len(view):
        raise ShapeError(f"pages {pages.min()} to {pages.max()}; there are {len(view)}")
    if any(len(layers) != len(views) for _, layers in parts):
        raise ShapeError(f"{len(parts[0][1])} layers for the pages of {len(views)}")
    return (
        np.array([x.data_ptr() for x in views], np.int64),
        np.array([view.stride(0), view.stride(1), heads, size, content // 2], np.int64),
        pages,
        np.cumsum([0, *(len(some) for some, _ in parts)], dtype=np.int64),
        np.array([[k.data_ptr() for k, _ in layers] for _, layers in parts], np.int64),
        np.array([[v.data_ptr() for _, v in layers] for _, layers in parts], np.int64),
        np.array([layers[0][0].stride(0) for _, layers in parts], np.int64),
    )
