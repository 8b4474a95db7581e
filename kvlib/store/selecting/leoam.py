# SPDX-License-Identifier: Apache-2.0
"""LeoAM-style selection (arXiv 2506.20187): light abstracts of leaves decide what is read.

Two abstracts, see `kvlib.store.abstracts` and `kvlib.store.abstracts_pq`:

- boxes (``codes=0``): q . a + weight * |q| . h from centre and half-range of a leaf's keys. LeoAM
  and Quest use weight 1, a bound; less catches more of the attention. A unit counts by the most
  over the queries that share it;
- codes (``codes=8``, bytes of a key): the logarithm of the sum of exp(q . k) over a leaf's coded
  keys. It estimates the attention that a leaf receives, so a unit counts by the sum over the
  queries of their estimated attention. With a `profile` the codebooks are the model's, from
  `kvlib calibrate abstracts`. Without, one is fitted to the first keys of the sequence and, which
  matters much, to their queries where these are given; boxes stand in until there are enough.

The paper's body was not to be had, and the authors' release chooses by other means than its
abstracts; so this follows the abstract of the paper and measurements (benchmarks/selection.py), not
its text.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.artefacts import Artefact
from kvlib.errors import ConfigError
from kvlib.registry import PLACE
from kvlib.store.abstracts import BOX_DTYPES, AbstractForm, Boxes
from kvlib.store.abstracts_book import load_books
from kvlib.store.abstracts_pq import CENTROIDS, Codebook, Codes
from kvlib.store.selecting.base import BudgetedSelector, HeadShape, LayerSelector, merge_heads

__all__ = ["LeoAM"]


@dataclass(frozen=True, slots=True)
class LeoAM(BudgetedSelector):
    """Leaves by abstracts, of one kind or the other.

    Args:
        heads: ``joint``: the same leaves for all KV heads of a layer; ``each``: others for each.
        codes: bytes of a coded key; 0 for boxes. Without a profile they need the extra ``faiss``.
        train: first keys of a sequence that a codebook is fitted to; they are held until then.
        weight: of a box's half-range; 1 is Quest's bound.
        dtype: of boxes, see `kvlib.store.abstracts.BOX_DTYPES`.
        profile: file from `kvlib calibrate abstracts`: codebooks for all sequences of a model.
        digest: of the profile; filled in when it is read, and checked if it is given.
    """

    heads: str = "joint"
    codes: int = 0
    train: int = 4096
    weight: float = 0.75
    dtype: str = "int8"
    profile: str | None = field(default=None, compare=False, metadata=PLACE)
    digest: str | None = None
    _books: tuple[Codebook, ...] = field(init=False, repr=False, compare=False, default=())
    _artefact: Artefact | None = field(init=False, repr=False, compare=False, default=None)
    name: ClassVar[str] = "leoam"

    def __post_init__(self) -> None:
        """Check the parameters."""
        BudgetedSelector.__post_init__(self)
        if self.heads not in ("joint", "each"):
            raise ConfigError(f"leoam: heads must be joint or each, got {self.heads!r:.80}")
        if self.dtype not in BOX_DTYPES:
            raise ConfigError(f"leoam: dtype is one of {', '.join(BOX_DTYPES)}: {self.dtype!r:.80}")
        if self.codes < 0:
            raise ConfigError(f"leoam: codes must be 0 or more bytes, got {self.codes}")
        if self.train < CENTROIDS:
            raise ConfigError(f"leoam: train must be {CENTROIDS} or more, got {self.train}")
        if self.weight < 0:
            raise ConfigError(f"leoam: weight must be 0 or more, got {self.weight}")
        if self.profile is None:
            if self.digest is not None:
                raise ConfigError("leoam: a digest is a profile's: give profile=FILE, too")
            return
        found, books = load_books(self.profile, self.digest or "")
        if self.codes != books[0].parts:
            raise ConfigError(
                f"leoam: profile {self.profile!r} has codes of {books[0].parts} bytes, the method "
                f"says codes={self.codes}: give codes={books[0].parts}"
            )
        object.__setattr__(self, "digest", found.digest)
        object.__setattr__(self, "_books", tuple(books))
        object.__setattr__(self, "_artefact", found)

    @property
    def needs_queries(self) -> bool:
        """A codebook is fitted to keys as queries see them; it does without, less well."""
        return self.codes > 0 and not self._books

    @property
    def form(self) -> AbstractForm | None:
        """Boxes, or the codes of a profile; a sequence's own codes mean nothing to others."""
        if self._books:
            return Codes.form(self.codes, str(self.digest))
        return None if self.codes else self._box_form(self.dtype)

    def check_model(self, identity: str) -> None:
        """See `Selector.check_model`."""
        if self._artefact is not None:
            self._artefact.check_model(identity)

    def open(self, shape: HeadShape) -> LayerSelector:
        """Begin a layer of a sequence.

        Raises:
            ConfigError: `codes` does not divide the channels of a key.
        """
        if self.codes and shape.dim % self.codes:
            raise ConfigError(
                f"leoam: codes must divide the {shape.dim} channels of a key, got {self.codes}"
            )
        if self._books:
            raise ConfigError("leoam: a profile's codebooks are one a layer: use open_layers")
        return _Coded(self, shape) if self.codes else _Boxed(self, shape)

    def open_layers(self, shape: HeadShape, num_layers: int) -> list[LayerSelector]:
        """See `Selector.open_layers`.

        Raises:
            ConfigError: the profile is of a model with other layers; or see `open`.
        """
        if not self._books:
            return BudgetedSelector.open_layers(self, shape, num_layers)
        heads, dim = self._books[0].mean.shape
        if (len(self._books), heads, dim) != (num_layers, shape.kv_heads, shape.dim):
            raise ConfigError(
                f"leoam: profile {self.profile!r} is of a model with {len(self._books)} layers of "
                f"{heads} KV heads and {dim} channels, this one has {num_layers} of "
                f"{shape.kv_heads} and {shape.dim}: run kvlib calibrate abstracts for it"
            )
        return [_Calibrated(self, shape, book) for book in self._books]


class _Boxed(LayerSelector):
    def __init__(self, method: LeoAM, shape: HeadShape) -> None:
        super().__init__(shape)
        self._method = method
        self._boxes = Boxes(shape.kv_heads, shape.dim, leaf=method.leaf, dtype=method.dtype)

    def _append(self, keys: Tensor, queries: Tensor | None) -> None:
        self._boxes.append(keys)

    def take(self, first: int, stop: int) -> Tensor:
        return self._boxes.take(first // self._boxes.leaf, stop // self._boxes.leaf)

    def _extend(self, rows: Tensor) -> int:
        self._boxes.extend(rows)
        return len(rows) * self._boxes.leaf

    def relevance(self, query: Tensor) -> Tensor:
        scores = self._boxes.scores(self.shape.grouped(query), self._method.weight)
        return merge_heads(scores, "max", joint=self._method.heads == "joint")

    @property
    def nbytes(self) -> int:
        return self._boxes.nbytes


class _Calibrated(LayerSelector):
    """Codes by a codebook that is there from the first key on."""

    def __init__(self, method: LeoAM, shape: HeadShape, book: Codebook) -> None:
        super().__init__(shape)
        self._method = method
        self._codes = Codes(book, leaf=method.leaf)

    def _append(self, keys: Tensor, queries: Tensor | None) -> None:
        self._codes.append(keys)

    def take(self, first: int, stop: int) -> Tensor:
        return self._codes.take(first, stop)

    def _extend(self, rows: Tensor) -> int:
        self._codes.extend(rows)
        return len(rows)

    def relevance(self, query: Tensor) -> Tensor:
        scores = self._codes.scores(self.shape.grouped(query))
        return merge_heads(scores, "mass", joint=self._method.heads == "joint")

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes


class _Coded(LayerSelector):
    """Boxes, and the keys themselves, until a codebook is fitted to them; codes from then on."""

    def __init__(self, method: LeoAM, shape: HeadShape) -> None:
        super().__init__(shape)
        self._method = method
        self._early = _Boxed(method, shape)  # empty once there are codes, as are the keys
        self._keys: list[Tensor] = []
        self._second = torch.zeros(shape.kv_heads, shape.dim, shape.dim, dtype=torch.float64)
        self._codes: Codes | None = None

    def _append(self, keys: Tensor, queries: Tensor | None) -> None:
        if self._codes is not None:
            self._codes.append(keys)
            return
        if queries is not None:
            rows = self.shape.grouped(queries).double()
            self._second += rows.transpose(1, 2) @ rows
        self._keys.append(keys.to(torch.bfloat16))
        if self.num_tokens + keys.shape[1] < self._method.train:
            self._early.append(keys)
            return
        held = torch.cat(self._keys, 1).float()
        if not self._second.any():  # keys out of a store come without queries
            self._second += torch.eye(self.shape.dim)
        book = Codebook.train(held, self._second, parts=self._method.codes)
        self._codes = Codes(book, leaf=self._method.leaf)
        self._codes.append(held)
        self._early, self._keys = _Boxed(self._method, self.shape), []
        self._second = self._second.new_empty(0)

    def relevance(self, query: Tensor) -> Tensor:
        if self._codes is None:
            return self._early.relevance(query)
        scores = self._codes.scores(self.shape.grouped(query))
        return merge_heads(scores, "mass", joint=self._method.heads == "joint")

    @property
    def nbytes(self) -> int:
        own = self._early.nbytes + sum(x.nbytes for x in [self._second, *self._keys])
        return own + (0 if self._codes is None else self._codes.nbytes)
