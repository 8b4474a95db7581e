# SPDX-License-Identifier: Apache-2.0
"""DuoAttention: retrieval heads and streaming heads, by trained gates (arXiv 2410.10819).

Training gives each KV head a gate between 0 and 1: how much it needs full attention rather than
sinks and a window. The heads with the highest gates keep everything, the others keep the first
`sinks` tokens and the last `window`, at the end of the prompt and after each step. Unlike
RazorAttention, nothing stands in for what streaming heads drop.

The gates are read from a file as the authors publish them for some models: one line a layer, one
number a KV head (`full_attention_heads.tsv` in mit-han-lab/duo-attention, `attn_patterns`). Their
code adds random noise to the gates, so that equal ones fall on different sides of the threshold
from run to run. Here, of equal ones the earlier layer is full first, then the lower head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from math import ceil, isfinite
from pathlib import Path
from typing import ClassVar

import torch

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Plans, Resources
from kvlib.eviction.head_roles import HeadRoles, highest_heads
from kvlib.eviction.scored import PolicyBase
from kvlib.layer_kv import Gaps
from kvlib.plans import KeepTokens

__all__ = ["Duo"]

_MAX_BYTES = 1 << 22
_FORM = "one line a layer, one number a KV head (full_attention_heads.tsv of DuoAttention)"


@dataclass(frozen=True, slots=True)
class Duo(PolicyBase):
    """Heads with high gates keep everything, the others sinks and a window.

    Args:
        gates: file of gates: one line a layer, one number a KV head, tabs or spaces between.
        sparsity: share of the heads that stream: those with gates below this quantile. 0 for none,
            1 for all.
        sinks: first tokens that streaming heads keep.
        window: last entries that streaming heads keep.
        lag: in steps, how many entries leave the window together: it may exceed its size by one
            less. With 16, most steps have nothing to move.
        digest: of the file (BLAKE2b, 16 hexadecimal digits); filled in when it is read, and checked
            if it is given.
    """

    gates: str | None = None
    sparsity: float = 0.5
    sinks: int = 64
    window: int = 256
    lag: int = 1
    digest: str | None = None
    _roles: HeadRoles | None = field(init=False, repr=False, compare=False, default=None)
    name: ClassVar[str] = "duo"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "A trained gate for each KV head says how much the head needs the whole context. Heads "
            "with high gates keep everything. The others keep sinks and a sliding window."
        ),
        when="at the end of the prompt and in every step",
        cost="none; the gates are trained by the authors' code",
        paper=(
            "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming "
            "Heads, arXiv 2410.10819; mit-han-lab/duo-attention"
        ),
        differs=(
            "The prompt is processed densely and cut at its end, where the authors' streaming "
            "heads already see only sinks and window during it. Equal gates are told apart by "
            "place, not by noise."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters and read the gates."""
        if not 0 <= self.sparsity <= 1:
            raise ConfigError(
                f"duo: sparsity is the share of streaming heads, in [0, 1], got {self.sparsity}"
            )
        if self.sinks < 0 or self.window < 1:
            raise ConfigError(
                f"duo: sinks must be 0 or more and window 1 or more, got {self.sinks} and "
                f"{self.window}"
            )
        if self.lag < 1:
            raise ConfigError(f"duo: lag must be 1 or more, got {self.lag}")
        if self.gates is None:
            return
        data = _read(self.gates)
        digest = blake2b(data, digest_size=8).hexdigest()
        if self.digest not in (None, digest):
            raise ConfigError(
                f"duo: gates {self.gates!r} have the digest {digest}; the method says {self.digest}"
            )
        object.__setattr__(self, "digest", digest)
        gates = torch.tensor(_parse(data, self.gates), dtype=torch.float64).clamp(0, 1)
        # As many as are not below the quantile, which lies between two gates or on one.
        below = ceil(Fraction(str(self.sparsity)) * (gates.numel() - 1))
        full = 0 if self.sparsity == 1 else gates.numel() - below
        marks = highest_heads(gates, full)
        roles = HeadRoles.from_marks(marks, list(range(len(gates))), f"duo gates {self.gates!r}")
        object.__setattr__(self, "_roles", roles)

    @property
    def needs(self) -> Needs:
        """Nothing: positions decide."""
        return Needs(steps=self.sparsity > 0)

    @property
    def roles(self) -> HeadRoles:
        """Which heads keep everything; layers are counted without those of a sliding window.

        Raises:
            ConfigError: no gates were given.
        """
        if self._roles is None:
            raise ConfigError(f"duo needs the model's gates: pass gates=FILE, {_FORM}")
        return self._roles

    def check(self, resources: Resources) -> None:
        """There are gates."""
        _ = self.roles

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Cut the prompt of streaming heads."""
        for view in views:
            self.roles.check(view, view.place)
        return [self._plan(view, 1) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Cut streaming heads again."""
        return [self._plan(view, self.lag) for view in views]

    def _plan(self, view: LayerView, least: int) -> Plans:
        """Cut the heads that hold `least` entries too many."""
        lengths = view.layer.lengths
        full = self.roles.of(view.place) or frozenset()
        stay = self.sinks + self.window
        if all(n - stay < least or h in full for h, n in enumerate(lengths)):
            return ()
        gone = [
            range(self.sinks, n - self.window) if n - stay >= least and h not in full else range(0)
            for h, n in enumerate(lengths)
        ]
        device = view.layer.row(0).keys.device
        return (KeepTokens.without(Gaps(lengths, tuple(gone), device)),)


def _read(path: str) -> bytes:
    try:
        place = Path(path).expanduser()
        if place.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"duo: {path!r} is too large for gates: expected {_FORM}")
        return place.read_bytes()
    except OSError as exc:
        raise ConfigError(
            f"duo: cannot read gates {path!r} ({exc.strerror}): expected {_FORM}"
        ) from exc


def _parse(data: bytes, path: str) -> list[list[float]]:
    """The numbers of every line that is not empty."""
    found: list[list[float]] = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = [float(x) for x in line.split()]
        except ValueError:
            row = []
        if not row or not all(map(isfinite, row)) or len(row) != len(found[0] if found else row):
            raise ConfigError(
                f"duo: line {number} of gates {path!r} is {line.strip()!r:.60}: expected {_FORM}, "
                "equally many in each line"
            )
        found.append(row)
    if not found:
        raise ConfigError(f"duo: gates {path!r} are empty: expected {_FORM}")
    return found
