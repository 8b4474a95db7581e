# SPDX-License-Identifier: Apache-2.0
"""RazorAttention: whole caches for retrieval heads only (arXiv 2407.15891).

A few heads look far back: echo heads at earlier occurrences of the current token, induction heads
at the tokens that followed those. They keep everything. `kvlib calibrate razor` finds them, once
for each model (`kvlib.calibration.razor`).

Every other head keeps its first `sinks` tokens and a window of the last max(s0, N / c), N being the
tokens seen so far. All that lies between becomes one **compensation token**: the mean of the
dropped keys, after the rotary embedding, and the mean of the dropped values. It stands for N_d
tokens: its term is multiplied by N_d in the softmax's numerator and denominator, which is the same
as adding log N_d to its logit. If all dropped keys are equal, nothing is lost.

The paper says how a prompt is compressed, and leaves open what happens afterwards. Here each token
that leaves the window goes into the mean and N_d grows; as N grows so does the window, but tokens
that are gone are not taken back. The sums behind the means are kept apart in float32, since a mean
in bfloat16 stops moving after a few hundred tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.artefacts import load_artefact
from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Plans, Resources
from kvlib.eviction.head_roles import HeadRoles, retrieval_heads
from kvlib.eviction.scored import PolicyBase
from kvlib.layer_kv import Gaps
from kvlib.plans import AppendToken, KeepTokens

__all__ = ["Razor"]

_PROFILE = "profile"


@dataclass(frozen=True, slots=True)
class Razor(PolicyBase):
    """Retrieval heads keep everything; the others keep sinks, a window and a mean of the rest.

    Args:
        profile: file from `kvlib calibrate razor`.
        heads: the retrieval heads: ``profile`` for those of the profile, ``all``, ``none``, or KV
            heads such as ``0.1/3.2`` (layer.head).
        induction: share of KV heads, over all layers, that retrieve for their induction score.
        echo: share that retrieve for their echo score.
        s0: entries that the window has at least.
        c: the window has at least the c-th part of the tokens seen.
        sinks: first tokens that always stay.
        lag: in steps, how many entries leave the window together: it may exceed its size by one
            less. With 16, most steps have nothing to move.
        digest: of the profile; filled in when it is read, and checked if it is given.
    """

    profile: str | None = None
    heads: str = _PROFILE
    induction: float = 0.14
    echo: float = 0.01
    s0: int = 4000
    c: float = 5.0
    sinks: int = 4
    lag: int = 1
    digest: str | None = None
    _roles: HeadRoles | None = field(init=False, repr=False, compare=False, default=None)
    name: ClassVar[str] = "razor"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "Few heads retrieve: on repeated random tokens they attend to earlier occurrences or "
            "to what followed them. Those keep everything. The others keep sinks, a window and one "
            "compensation token, the mean of all they dropped, weighted as that many tokens."
        ),
        when="at the end of the prompt and in every step",
        cost="a few passes over 10,001 tokens for each model; float32 sums for each head",
        paper=(
            "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv "
            "2407.15891; no code of the authors'. Their company's head search was read: "
            "Ascend/msmodelslim"
        ),
        differs=(
            "Random tokens are drawn without replacement, three times over, and ties do not "
            "admit extra heads. The paper is silent about decoding: tokens that leave the window "
            "join the mean. Models without rotary embeddings (ALiBi) are refused."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters and read the profile."""
        for share, what in ((self.induction, "induction"), (self.echo, "echo")):
            if not 0 <= share <= 1:
                raise ConfigError(f"razor: {what} is a share of the heads in [0, 1], got {share}")
        if self.s0 < 0 or self.sinks < 0:
            raise ConfigError(
                f"razor: s0 and sinks must be 0 or more, got {self.s0} and {self.sinks}"
            )
        if self.lag < 1:
            raise ConfigError(f"razor: lag must be 1 or more, got {self.lag}")
        if not self.c >= 1:
            raise ConfigError(
                f"razor: the window is the c-th part of the tokens, c must be 1 or more, got "
                f"{self.c}"
            )
        if self.heads != _PROFILE and (self.profile or self.digest):
            raise ConfigError(
                f"razor: give a profile or heads, not both (heads={self.heads!r:.80})"
            )
        if self.heads != _PROFILE:
            object.__setattr__(self, "_roles", HeadRoles.from_text(self.name, self.heads))
        elif self.profile is not None:
            found = load_artefact(self.profile, self.name, self.digest or "")
            object.__setattr__(self, "digest", found.digest)
            object.__setattr__(self, "_roles", self._read(found.tensors))

    def _read(self, tensors: Mapping[str, Tensor]) -> HeadRoles:
        origin = f"razor profile {self.profile!r}"
        if missing := {"induction", "echo", "layers"} - tensors.keys():
            raise ConfigError(
                f"{origin} lacks {', '.join(sorted(missing))}: make it again with kvlib calibrate "
                "razor"
            )
        marks = retrieval_heads(tensors["induction"], tensors["echo"], self.induction, self.echo)
        return HeadRoles.from_marks(marks, tensors["layers"].tolist(), origin)

    @property
    def needs(self) -> Needs:
        """No signal: positions decide. Keys that leave the window are read."""
        compresses = self.heads != "all"
        return Needs(steps=compresses, step_keys=compresses)

    @property
    def roles(self) -> HeadRoles:
        """Which heads retrieve.

        Raises:
            ConfigError: neither a profile nor heads were given.
        """
        if self._roles is None:
            raise ConfigError(
                "razor needs to know the model's retrieval heads: run kvlib calibrate razor "
                "--model M -o FILE and pass profile=FILE, or name them (heads=0.1/3.2)"
            )
        return self._roles

    def check(self, resources: Resources) -> None:
        """The retrieval heads are known, and are this model's."""
        _ = self.roles
        if self.profile is not None and resources.identity is not None:
            found = load_artefact(self.profile, self.name, self.digest or "")
            found.check_model(resources.identity())

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Compress the prompt."""
        for view in views:
            self.roles.check(view, view.layer.layer_idx)
            if view.rope is None and self.heads != "all":
                raise ConfigError(
                    f"razor: layer {view.layer.layer_idx} has no rotary embedding (ALiBi, or no "
                    "positions at all); its retrieval heads cannot be told by echo and induction. "
                    "Use another policy for this model"
                )
        return [self._plan(view, 1) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """What leaves the window joins the mean."""
        return [self._plan(view, self.lag) for view in views]

    def window(self, num_seen: int) -> int:
        """Last entries that stay: max(s0, N / c), rounded up."""
        return max(self.s0, ceil(num_seen / Fraction(str(self.c))))

    def _plan(self, view: LayerView, least: int) -> Plans:
        """Take the entries before the window out of each head where there are `least` of them."""
        layer, values = view.layer, view.state.values
        whole = self.roles.of(layer.layer_idx)
        if whole is None:
            return ()
        dropped = values["dropped"].tolist() if values else [0] * layer.num_kv_heads
        # The compensation token is the last of its row.
        real = [n - (gone > 0) for n, gone in zip(layer.lengths, dropped, strict=True)]
        window = self.window(view.num_seen)
        ends = [n - window for n in real]  # where it begins
        heads = [h for h, end in enumerate(ends) if h not in whole and end - self.sinks >= least]
        if not heads:
            return ()
        rows = layer.rows()
        device = rows[0].keys.device
        gone = [range(0)] * layer.num_kv_heads
        tails = [0] * layer.num_kv_heads
        sums = {name: _sums(view, name) for name in ("keys", "values")}
        for h in heads:
            end = ends[h]
            gone[h], tails[h] = range(self.sinks, end), layer.lengths[h] - real[h]
            dropped[h] += end - self.sinks
            for name, total in sums.items():
                leaving: Tensor = getattr(rows[h], name)[self.sinks : end]
                total[h] += leaving.sum(0, dtype=total.dtype)
        values["dropped"] = torch.tensor(dropped)
        values |= sums
        num = torch.tensor([dropped[h] for h in heads], device=device)[:, None]
        means = {name: total[heads] / num for name, total in sums.items()}
        mass = tuple(float(dropped[h]) for h in heads)
        gaps = Gaps(layer.lengths, tuple(gone), device, tuple(tails))
        return (KeepTokens.without(gaps), AppendToken(tuple(heads), **means, mass=mass))


def _sums(view: LayerView, name: str) -> Tensor:
    """[Hkv, D]: a copy of the sum of what each head has dropped so far of its keys or values."""
    x: Tensor = getattr(view.layer.row(0), name)
    held = view.state.values.get(name)
    if held is not None:
        return held.to(x.device, copy=True)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.zeros(view.layer.num_kv_heads, x.shape[-1], dtype=wide, device=x.device)
