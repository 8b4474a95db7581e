# SPDX-License-Identifier: Apache-2.0
"""Is a prefix loaded sooner than it is computed again, and where should the one give way?

Running measurements answer that: of each tier (seconds for so many bytes), of decoding, and of
prefill (seconds for so many tokens at such a position).

    load(bytes)           = latency + bytes / bandwidth  +  bytes decoded / decoding speed
    prefill(n, at p)      = a n + b n (p + n / 2)

Prefill is linear in the tokens, plus attention, which is linear in what stands before each. Every
line is fitted by least squares with weights that halve every `HALF_LIFE` samples, so that a disk
that becomes busy is noticed. Coefficients that would be negative are taken as 0.

Blocks are loaded from the front and computed at the end, since computing needs all KV before it.
With both going on at once the time is the larger of loading blocks [0, m) and computing [m, n);
`CostModel.split` gives the best m.

These are the measurements of `kvlib.codecs.streaming`, too, where a medium is so slow that it pays
to fetch a coarser encoding: `CostModel.link` is its estimate of a tier, and its `Context.measured`
asks a `CostModel` for decoding and prefill. There is no second model of any of them.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvlib.codecs.streaming import LinkEstimate

__all__ = ["HALF_LIFE", "CostModel", "Line", "Split"]

HALF_LIFE = 64.0
_TINY = 1e-12


class Line:
    """y = sum of c_i x_i, fitted to a stream of samples; c_i >= 0.

    Args:
        unknowns: how many c_i.
    """

    def __init__(self, unknowns: int) -> None:
        self._xx = np.zeros((unknowns, unknowns))
        self._xy = np.zeros(unknowns)
        self._yy = 0.0
        self._weight = 0.0
        self.samples = 0

    def add(self, x: Sequence[float], y: float) -> None:
        """Learn a sample. Errors are taken to grow with the root of the size of x."""
        decay = 0.5 ** (1 / HALF_LIFE)
        row = np.asarray(x, np.float64)
        weight = 1 / max(*row, _TINY)
        self._xx = self._xx * decay + weight * np.outer(row, row)
        self._xy = self._xy * decay + weight * y * row
        self._yy = self._yy * decay + weight * y * y
        self._weight = self._weight * decay + 1
        self.samples += 1

    def coefficients(self) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """The c_i: the best non-negative ones among those with some of them 0."""
        size = self._xy.size
        best, least = np.zeros(size), 0.0
        for chosen in range(1, 1 << size):
            index = [i for i in range(size) if chosen >> i & 1]
            part = self._xx[np.ix_(index, index)]
            scale = np.sqrt(np.diag(part))
            if not (scale > 0).all():
                continue
            ridge = part / np.outer(scale, scale) + np.eye(len(index)) * 1e-9
            found = np.linalg.solve(ridge, self._xy[index] / scale) / scale
            if (found < 0).any():
                continue
            error = float(found @ part @ found - 2 * found @ self._xy[index])
            if error < least:
                best, least = np.zeros(size), error
                best[index] = found
        return best

    def at(self, x: Sequence[float]) -> float | None:
        """y, or None before the first sample."""
        return float(self.coefficients() @ np.asarray(x)) if self.samples else None

    def deviation(self, x: Sequence[float]) -> float | None:
        """By how much samples at x miss `at`, as a root mean square.

        None while there are no more samples than unknowns: a line goes through any such few.
        """
        spare = self._weight - self._xy.size
        if self.samples <= self._xy.size or spare <= 0:
            return None
        c = self.coefficients()
        error = self._yy - 2 * float(c @ self._xy) + float(c @ self._xx @ c)
        return float(np.sqrt(max(error, 0.0) / spare * max(*x, _TINY)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How to come by the KV of a prompt.

    Attributes:
        load_blocks: leading blocks to load; the rest is to be computed.
        seconds: how long that takes, both at once.
        load_seconds: of that, loading.
        compute_seconds: of that, computing.
        compute_all_seconds: computing everything instead.
    """

    load_blocks: int
    seconds: float
    load_seconds: float
    compute_seconds: float
    compute_all_seconds: float


class CostModel:
    """Running measurements of one store. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads: dict[str, Line] = {}
        self._decode = Line(2)
        self._prefill = Line(2)

    def read(self, tier: str, num_bytes: int, seconds: float) -> None:
        """A tier gave so many bytes in that time."""
        with self._lock:
            self._reads.setdefault(tier, Line(2)).add((1.0, num_bytes), seconds)

    def decode(self, num_bytes: int, seconds: float) -> None:
        """So many bytes of KV were decoded in that time."""
        with self._lock:
            self._decode.add((1.0, num_bytes), seconds)

    def prefill(self, tokens: int, position: int, seconds: float) -> None:
        """So many tokens from a position on went through the model in that time."""
        with self._lock:
            self._prefill.add((tokens, tokens * (position + tokens / 2)), seconds)

    def read_seconds(self, tier: str, num_bytes: int) -> float | None:
        """Expected time to read a record of that size; None when nothing was read there yet."""
        with self._lock:
            line = self._reads.get(tier)
            return None if line is None else line.at((1.0, num_bytes))

    def link(self, tier: str, num_bytes: int) -> LinkEstimate:
        """A tier as a link that streams chunks of about that size.

        Its pace has the tier's latency in it. While there are too few samples to tell how far they
        stray, they may stray by all of it, as with the first measurement of a `LinkEstimate`.
        """
        with self._lock:
            line = self._reads.get(tier)
            seconds = None if line is None else line.at((1.0, num_bytes))
            if line is None or not seconds:
                return LinkEstimate()
            deviation = line.deviation((1.0, num_bytes))
        return LinkEstimate(
            seconds / num_bytes, (seconds if deviation is None else deviation) / num_bytes
        )

    def decode_seconds(self, num_bytes: int) -> float | None:
        """Expected time to decode so many bytes of KV; None when nothing was decoded yet."""
        with self._lock:
            return self._decode.at((1.0, num_bytes))

    def prefill_seconds(self, tokens: int, position: int) -> float | None:
        """Expected time to compute tokens from a position on; None when nothing was yet."""
        with self._lock:
            return self._prefill.at((tokens, tokens * (position + tokens / 2)))

    def load_seconds(self, tier: str, stored_bytes: int, raw_bytes: int) -> float | None:
        """Expected time to read and decode a record; None when either is unknown."""
        read = self.read_seconds(tier, stored_bytes)
        decode = self.decode_seconds(raw_bytes)
        return None if read is None or decode is None else read + decode

    def split(
        self, loads: Sequence[float], *, block_tokens: int, tokens: int, start: int = 0
    ) -> Split | None:
        """The best place to stop loading, or None before any prefill was measured.

        Args:
            loads: expected seconds of loading each of the leading blocks.
            block_tokens: tokens of a block.
            tokens: of the whole prompt, all of which are needed.
            start: tokens before the first block that are there already.
        """
        whole = self.prefill_seconds(tokens - start, start)
        if whole is None:
            return None
        best: Split | None = None
        loading = 0.0
        for m in range(len(loads) + 1):
            done = start + m * block_tokens
            computing = self.prefill_seconds(tokens - done, done) or 0.0
            seconds = max(loading, computing)
            if best is None or seconds < best.seconds:
                best = Split(
                    load_blocks=m,
                    seconds=seconds,
                    load_seconds=loading,
                    compute_seconds=computing,
                    compute_all_seconds=whole,
                )
            if m < len(loads):
                loading += loads[m]
        return best
