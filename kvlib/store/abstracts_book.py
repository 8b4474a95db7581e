# SPDX-License-Identifier: Apache-2.0
"""Codebooks that were measured once for a model: the artefact of `kvlib calibrate abstracts`.

Tensors, one row a layer: ``mean`` float32 [L, H, D]; ``into`` and ``back`` bfloat16 [L, H, D, D];
``centroids`` bfloat16 [L, H, parts, 256, D / parts], as `kvlib.store.abstracts_pq.Codebook` has
them. A wrong code shows nowhere but in worse choices, and safetensors has no checksums; so the
settings hold one of everything else.
"""

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from kvlib.artefacts import Artefact, load_artefact
from kvlib.errors import ConfigError
from kvlib.store.abstracts_pq import CENTROIDS, Codebook

__all__ = ["CHECKSUM", "KIND", "checksum", "load_books", "tensors_of"]

KIND = "abstracts"
CHECKSUM = "checksum"

_DTYPES = {
    "mean": torch.float32,
    "into": torch.bfloat16,
    "back": torch.bfloat16,
    "centroids": torch.bfloat16,
}


def tensors_of(books: list[Codebook]) -> dict[str, Tensor]:
    """The tensors of an artefact with these codebooks, one a layer."""
    return {name: torch.stack([getattr(book, name) for book in books]) for name in _DTYPES}


def checksum(model: str, settings: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b-128, in hex, of what an artefact says and holds, but for the checksum itself."""
    found = blake2b(repr(model).encode(), digest_size=16)
    for name, value in sorted(settings.items()):
        if name != CHECKSUM:
            found.update(repr((name, str(value))).encode())
    for name, x in sorted(tensors.items()):
        found.update(repr((name, x.dtype, tuple(x.shape))).encode())
        found.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_books(path: str, digest: str = "") -> tuple[Artefact, list[Codebook]]:
    """The codebooks of a file, one a layer; all who read a file share their memory.

    Args:
        path: from `kvlib calibrate abstracts`.
        digest: what the file's digest has to be; empty for any.

    Raises:
        ConfigError: see `kvlib.artefacts.load_artefact`; or the file is damaged.
    """
    found = load_artefact(path, KIND, digest)
    tensors = found.tensors
    if found.settings.get(CHECKSUM) != checksum(found.model, found.settings, tensors):
        raise ConfigError(
            f"artefact {path!r} does not match its checksum: it is damaged; make it again with "
            "kvlib calibrate abstracts"
        )
    seen = {name: (x.dtype, *x.shape) for name, x in tensors.items()}
    if seen != _expected(tensors) or not all(x.numel() for x in tensors.values()):
        raise ConfigError(
            f"artefact {path!r} has no codebooks that fit together ({seen}): make it again with "
            "kvlib calibrate abstracts"
        )
    rows = zip(*(tensors[name] for name in _DTYPES), strict=True)
    return found, [Codebook(*row) for row in rows]


def _expected(tensors: Mapping[str, Tensor]) -> dict[str, tuple[object, ...]]:
    """Dtypes and shapes that go with these centroids; none without centroids."""
    centroids = tensors.get("centroids")
    if centroids is None or centroids.dim() != 5:
        return {}
    layers, heads, parts, _, width = centroids.shape
    dim = parts * width
    shapes = {
        "mean": (layers, heads, dim),
        "into": (layers, heads, dim, dim),
        "back": (layers, heads, dim, dim),
        "centroids": (layers, heads, parts, CENTROIDS, width),
    }
    return {name: (dtype, *shapes[name]) for name, dtype in _DTYPES.items()}
