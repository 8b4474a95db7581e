# SPDX-License-Identifier: Apache-2.0
"""Product-quantized keys: 8 bytes of a key tell what a query thinks of it (PQCache, 2407.12820).

A head's keys, their mean off, are turned by a matrix P, cut into `parts` equal runs of channels,
and each run is replaced by the nearest of 256 centroids. With y = P^T (k - mean) and R = P^-T,

    q . (k - mean) = (R^T q) . y  ~  sum over the parts of (R^T q)_part . centroid(code)_part

which is one table of [parts, 256] for each query and `parts` look-ups for each key.

P is chosen for the queries that are to come: k-means lessens |y - y'|^2, and what matters is the
error of q . k, whose mean square is (k - k')^T C (k - k') with C the mean of q q^T. So
P = C^(1/2) V, where V are the principal axes of C^(1/2) (k - mean); axes are dealt out to the parts
so that the products of their variances are alike (the "eigenvalue allocation" of optimized product
quantization, Ge et al. 2013).
"""

import math
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from kvlib.errors import ConfigError, ShapeError
from kvlib.store.abstracts import AbstractForm, Rows, check_keys
from kvlib.store.leaves import LEAF_TOKENS

__all__ = ["CENTROIDS", "Codebook", "Codes", "load_faiss"]

CENTROIDS = 256


@cache
def _kernels() -> Any:
    """`kvlib.store.abstracts_pq_numba`, None without numba."""
    try:
        return import_module("kvlib.store.abstracts_pq_numba")
    except ImportError:
        return None


class Codebook:
    """How the keys of one layer are coded. All but the mean is held in bfloat16.

    Args:
        mean: float32 [heads, dim], taken off every key.
        into: [heads, dim, dim]: P.
        back: [heads, dim, dim]: R, so that P R^T is the identity.
        centroids: [heads, parts, CENTROIDS, dim / parts].
    """

    def __init__(self, mean: Tensor, into: Tensor, back: Tensor, centroids: Tensor) -> None:
        self.mean = mean
        self.into, self.back, self.centroids = (x.bfloat16() for x in (into, back, centroids))

    @classmethod
    def train(
        cls,
        keys: Tensor,
        second: Tensor,
        *,
        parts: int = 8,
        samples: int = 2048,
        rounds: int = 5,
        seed: int = 0,
    ) -> "Codebook":
        """Fit a codebook with faiss.

        Args:
            keys: [heads, n, dim], post-RoPE; `CENTROIDS` of them or more.
            second: [heads, dim, dim]: the sum, or mean, of q q^T over the queries, post-RoPE, that
                share each head.
            parts: bytes of a code; divides dim.
            samples: keys that k-means sees, spread evenly over those given.
            rounds: of k-means.
            seed: of the first centroids.

        Raises:
            ConfigError: faiss is not installed, `parts` does not divide dim, or there are too few
                keys.
        """
        heads, num, dim = keys.shape
        if parts < 1 or dim % parts:
            raise ConfigError(f"{parts} parts do not divide the {dim} channels of a key")
        if num < CENTROIDS:
            raise ConfigError(f"a codebook needs {CENTROIDS} keys or more, got {num}")
        faiss = load_faiss()
        keys = keys.double()
        mean = keys.mean(1)
        into, back = _turns(keys - mean[:, None], second.double(), parts)
        spread = torch.linspace(0, num - 1, min(samples, num)).long()
        turned = (keys[:, spread] - mean[:, None]) @ into
        runs = turned.float().unflatten(2, (parts, -1)).transpose(1, 2).contiguous()
        width = dim // parts
        centroids = torch.empty(heads, parts, CENTROIDS, width)
        for head in range(heads):
            for part in range(parts):
                kmeans = faiss.Kmeans(
                    width,
                    CENTROIDS,
                    niter=rounds,
                    seed=seed,
                    min_points_per_centroid=1,
                    max_points_per_centroid=-(-samples // CENTROIDS),
                )
                kmeans.train(runs[head, part].numpy())
                centroids[head, part] = torch.from_numpy(kmeans.centroids)
        return cls(mean.float(), into, back, centroids)

    @property
    def parts(self) -> int:
        """Bytes of a code."""
        return self.centroids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.mean, self.into, self.back, self.centroids))

    def encode(self, keys: Tensor) -> Tensor:
        """Codes of keys [heads, t, dim]: uint8 [t, heads, parts]."""
        turned = (keys.float() - self.mean[:, None]) @ self.into.float()
        runs = turned.unflatten(2, (self.parts, -1)).transpose(1, 2)  # [heads, parts, t, width]
        centroids = self.centroids.float()
        # |y - c|^2 without |y|^2, which is the same for all c
        far = centroids.square().sum(-1)[:, :, None] - 2 * runs @ centroids.transpose(2, 3)
        nearest: Tensor = far.argmin(-1)
        return nearest.to(torch.uint8).permute(2, 0, 1)

    def table(self, query: Tensor) -> Tensor:
        """What each centroid adds to q . (k - mean), of queries [heads, rows, dim].

        Returns:
            float32 [heads, parts * CENTROIDS, rows].
        """
        turned = (query.float() @ self.back.float()).unflatten(2, (self.parts, -1))
        return torch.einsum("hrpw,hpcw->hpcr", turned, self.centroids.float()).flatten(1, 2)


class Codes:
    """The coded keys of one layer.

    Args:
        book: the codebook.
        leaf: tokens of a leaf.
    """

    def __init__(self, book: Codebook, *, leaf: int = LEAF_TOKENS) -> None:
        if leaf < 1:
            raise ConfigError(f"a leaf has 1 token or more, got {leaf}")
        self.book, self.leaf = book, leaf
        self._codes = Rows((len(book.centroids), book.parts), torch.uint8)
        self._starts = torch.arange(book.parts, dtype=torch.int32) * CENTROIDS

    def __len__(self) -> int:
        """Leaves, an unfinished one included."""
        return -(-len(self._codes) // self.leaf)

    @property
    def num_tokens(self) -> int:
        """Tokens appended."""
        return len(self._codes)

    @property
    def nbytes(self) -> int:
        """Bytes held, the codebook included."""
        return self._codes.nbytes + self.book.nbytes

    def append(self, keys: Tensor) -> None:
        """Add the keys of the next tokens, [heads, t, dim], post-RoPE.

        Raises:
            ShapeError: keys of another shape.
        """
        check_keys(keys, *self.book.mean.shape)
        self._codes.extend(self.book.encode(keys))

    @staticmethod
    def form(parts: int, profile: str) -> AbstractForm:
        """The form of codes by the codebooks of an artefact with the digest `profile`."""
        return AbstractForm(f"codes@1:parts={parts}", 1, parts, 0, profile)

    def take(self, first: int, stop: int) -> Tensor:
        """The codes of tokens [first, stop), uint8 [stop - first, heads * parts]."""
        return self._codes.data[first:stop].flatten(1).clone()

    def extend(self, rows: Tensor) -> None:
        """Append codes as `take` gave them.

        Raises:
            ShapeError: rows of another size.
        """
        heads, parts = len(self.book.centroids), self.book.parts
        if rows.dim() != 2 or rows.shape[1] != heads * parts:
            raise ShapeError(f"codes {tuple(rows.shape)}; expected [tokens, {heads * parts}]")
        self._codes.extend(rows.unflatten(1, (heads, parts)))

    def logits(self, query: Tensor, *, compiled: bool = True) -> Tensor:
        """Give q . (k - mean) of every key, as its code has it.

        Args:
            query: float [heads, rows, dim].
            compiled: use numba where it is installed; the bits are the same.

        Returns:
            float32 [heads, rows, tokens].
        """
        tables = self.book.table(query)
        kernels = _kernels() if compiled else None
        if kernels is None:
            codes = self._codes.data.int().add_(self._starts)
            rows = [embedding_bag(codes[:, h], x, mode="sum") for h, x in enumerate(tables)]
            return torch.stack([x.t() for x in rows])
        out = torch.empty(len(tables), query.shape[1], self.num_tokens)
        turned = tables.transpose(1, 2).contiguous().numpy()
        kernels.look_up(self._codes.data.numpy(), turned, CENTROIDS, out.numpy())
        return out

    def scores(self, query: Tensor) -> Tensor:
        """Logarithm of the sum of exp(q . (k - mean)) over each leaf.

        Args:
            query: float [heads, rows, dim]: the queries that share each KV head, scaled.

        Returns:
            float32 [heads, rows, n].
        """
        logits = self.logits(query)
        missing = len(self) * self.leaf - logits.shape[2]
        if missing:
            logits = pad(logits, (0, missing), value=-torch.inf)
        leaves: Tensor = logits.unflatten(2, (-1, self.leaf))
        return leaves.logsumexp(-1)


def _turns(keys: Tensor, second: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """P and R of each head: float64 [heads, dim, dim] each, from centred keys and C."""
    power, axes = torch.linalg.eigh(second)
    # A channel that no query used yet still counts for something, and C must have an inverse.
    power = power.clamp_min(1e-6 * power.amax(1, keepdim=True) + 1e-30).sqrt()
    root = (axes * power[:, None]) @ axes.transpose(1, 2)
    inverse = (axes / power[:, None]) @ axes.transpose(1, 2)
    seen = keys @ root
    variance, turn = torch.linalg.eigh(seen.transpose(1, 2) @ seen / keys.shape[1])
    order = torch.stack([_dealt(row.tolist(), parts) for row in variance])
    turn = turn.gather(2, order[:, None].expand_as(turn))
    return root @ turn, inverse @ turn


def _dealt(variance: Sequence[float], parts: int) -> Tensor:
    """Axes, part after part: the largest variance left goes to the part with the least product."""
    hands: list[list[int]] = [[] for _ in range(parts)]
    logs = [0.0] * parts
    floor = max(*variance, 1e-30) * 1e-9  # in units of it, no axis lessens a product
    for axis in sorted(range(len(variance)), key=lambda i: -variance[i]):
        open_hands = [i for i in range(parts) if len(hands[i]) < len(variance) // parts]
        hand = min(open_hands, key=lambda i: logs[i])
        hands[hand].append(axis)
        logs[hand] += math.log(max(variance[axis] / floor, 1.0))
    return torch.tensor([axis for hand in hands for axis in hand])


def load_faiss() -> Any:
    """The module, which trains codebooks.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as exc:
        raise ConfigError(
            "codebooks are trained with faiss, which is not installed: pip install 'kvlib[faiss]'"
        ) from exc
    return faiss
