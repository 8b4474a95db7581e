# SPDX-License-Identifier: Apache-2.0
"""Named tensors as bytes: what an eviction policy remembers, in a container's STATE section.

The layout is specified in docs/formats/container.md. Numbers keep their bits.
"""

import math
from collections.abc import Mapping
from struct import Struct, error

import torch
from torch import Tensor

from kvlib.codecs.container import Buffer
from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError

__all__ = ["decode_state", "encode_state"]

_COUNT = Struct("<I")
_TENSOR = Struct("<HBB")  # bytes of the name, dtype code, dimensions
_CODES = {
    torch.bool: 1,
    torch.uint8: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float32: 5,
    torch.float64: 6,
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
MAX_DIMENSIONS = 4
MAX_SIZE = 1 << 31


def encode_state(state: Mapping[str, Tensor]) -> bytes:
    """Bytes of the tensors, sorted by name.

    Raises:
        ConfigError: a dtype, name or number of dimensions that the format does not have.
    """
    parts = [_COUNT.pack(len(state))]
    for name, x in sorted(state.items()):
        text = name.encode()
        if x.dtype not in _CODES or x.dim() > MAX_DIMENSIONS or not 0 < len(text) < 1 << 16:
            raise ConfigError(
                f"policy state {name!r:.80} is {x.dtype} {tuple(x.shape)}; expected up to "
                f"{MAX_DIMENSIONS} dimensions of {', '.join(str(d) for d in _CODES)}"
            )
        parts.append(_TENSOR.pack(len(text), _CODES[x.dtype], x.dim()) + text)
        parts.append(Struct(f"<{x.dim()}Q").pack(*x.shape))
        data = x.detach().cpu().contiguous()
        parts.append(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def decode_state(data: Buffer) -> dict[str, Tensor]:
    """The tensors, on the CPU; they alias nothing.

    Raises:
        CorruptDataError: truncated or malformed bytes.
        IncompatibleDataError: an unknown dtype.
    """
    view = memoryview(data).cast("B")
    try:
        (count,) = _COUNT.unpack_from(view, 0)
        at = _COUNT.size
        state: dict[str, Tensor] = {}
        last = ""
        for _ in range(count):
            length, code, dims = _TENSOR.unpack_from(view, at)
            at += _TENSOR.size
            name = bytes(view[at : at + length]).decode()
            at += length
            if code not in _DTYPES:
                raise IncompatibleDataError(f"policy state has the unknown dtype code {code}")
            if dims > MAX_DIMENSIONS or (state and name <= last) or not name:
                raise CorruptDataError(f"policy state {name!r:.80} is malformed or out of order")
            shape = Struct(f"<{dims}Q").unpack_from(view, at)
            at += 8 * dims
            dtype = _DTYPES[code]
            size = math.prod(shape) * dtype.itemsize
            if size > len(view) - at or max(shape, default=0) > MAX_SIZE:
                raise CorruptDataError(
                    f"policy state {name!r:.80} claims {size} bytes of {len(view) - at} left"
                )
            x = torch.empty(size, dtype=torch.uint8)
            x.numpy()[:] = view[at : at + size]
            if dtype is torch.bool and bool((x > 1).any()):
                raise CorruptDataError(f"policy state {name!r:.80} holds a truth value above 1")
            state[name] = x.view(dtype).reshape(shape)
            at += size
            last = name
    except (error, UnicodeDecodeError) as exc:
        raise CorruptDataError(f"policy state is cut off or malformed: {exc}") from exc
    if at != len(view):
        raise CorruptDataError(f"policy state ends at {at} of {len(view)} bytes")
    return state
