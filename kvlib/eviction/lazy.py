# SPDX-License-Identifier: Apache-2.0
"""LazyEviction: wait a while before forgetting (arXiv 2506.15969).

In a long chain of thought most tokens are looked at again after a quiet stretch. A policy that
evicts in every step drops them during the stretch; this one decides only every W steps, from when
an entry was looked at and how long its stretches have been.

The clock t counts tokens after the prompt. An entry is **active** in a step if its attention is at
least alpha. Two numbers are kept for each: TS, the last step in which it was active, and MRI, its
maximum recurrence interval. A prompt entry starts with TS = 0, one that step t brings with t - 1,
both with MRI = 0. In every step, for active entries: MRI = max(MRI, t - TS), then TS = t. When t is
a multiple of W and a row holds more than B entries, its last W stay, and of the others the B - W
with the highest

    H1 + H2,  H1 = 2 sigmoid(-(t - TS) / MRI),  H2 = 2 sigmoid(-(MRI - 1)),

or 0 where MRI = 0: such an entry was never active. H1 asks whether the quiet stretch is still a
usual one for this entry, H2 prefers entries that come back often. The prompt is never evicted at
its end, and between two decisions rows grow to B + W entries.

A forward of T tokens is one observation: t grows by T, an entry is active if any of the T queries
finds it so, and the decision is due if a multiple of W was reached or passed. Its new entries have
the TS that they would have had one by one, so the same stretch is counted for them as for those
that were there before.

The released code differs in four ways. It adds 1 inside H1, so that H1 is at most 0.54 (`h1_offset`
1 does the same); counts steps in the model's dtype, which is exact up to 256 in bfloat16; keeps
every query head's own copy of keys and values; and has one global state for all requests.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvlib.artefacts import Artefact, load_artefact
from kvlib.blocks import LayerKV
from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Resources
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.select import (
    by_entry,
    by_row,
    check_budget,
    keeps_all,
    reduce_group,
    tokens_to_keep,
)

__all__ = ["Lazy"]

_WINDOW = 101  # the authors' for DeepSeek-R1-Distill-Qwen-7B on GSM8K, like the default alpha


@dataclass(frozen=True, slots=True)
class Lazy(ScoredPolicy):
    """Recurring attention, looked into every `window` steps.

    Args:
        budget: entries per head after a decision, window included: a fraction of the prompt or a
            number of tokens, which must be above `window`. Where a fraction of a prompt is not
            above it, the window is one entry less than the budget, but at least 1.
        window: W, the last entries that stay and the steps between two decisions; 101 unless a
            profile says otherwise. The authors' are from 27 to 363, by model and task.
        alpha: attention from which an entry is active; the authors' 1e-4 for Qwen models, 5e-4 for
            a Llama.
        group: how the query heads of a KV head are reduced before they are compared with alpha:
            max, so that one of them suffices, or mean. After a forward of many tokens that is the
            mean of each head's own maximum over the queries.
        h1_offset: added inside H1: 0 as in the paper, 1 as in the released code.
        profile: file from ``kvlib calibrate lazy`` with the model's window; alpha and group must be
            those that it was measured with.
        digest: of that file; filled in if not given, refused if it is another file's.
    """

    budget: float | int = 0.5
    window: int | None = None
    alpha: float = 1e-4
    group: str = "max"
    h1_offset: int = 0
    profile: str | None = None
    digest: str | None = None
    name: ClassVar[str] = "lazy"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "Tokens of a chain of thought fall quiet and are looked at again later. For every "
            "entry the last active step and the longest quiet stretch are kept. Every W steps "
            "the entries whose present stretch is long beside their longest go."
        ),
        when="every W steps; never at the end of the prompt",
        cost="one attention row a step; 8 bytes an entry and KV head; up to W entries over budget",
        paper=(
            "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient "
            "Long Reasoning, arXiv 2506.15969; Halo-949/LazyEviction"
        ),
        differs=(
            "Decisions are per KV head, not per query head. The released code adds 1 inside H1 "
            "(h1_offset=1) and counts steps in the model's dtype. A forward of many tokens is one "
            "observation, which the authors do not consider."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters and read the profile."""
        check_budget(self.name, self.budget)
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"lazy: alpha is a share of attention in (0, 1], got {self.alpha}")
        if self.group not in ("max", "mean"):
            raise ConfigError(f"lazy: group is max or mean, got {self.group!r}")
        if self.h1_offset not in (0, 1):
            raise ConfigError(
                f"lazy: h1_offset is 0 (paper) or 1 (released code), got {self.h1_offset}"
            )
        measured = self._read_profile()
        if self.window is None:
            object.__setattr__(self, "window", _WINDOW if measured is None else measured)
        if self._window < 1:
            raise ConfigError(f"lazy: window must be 1 or more, got {self.window}")
        if measured is not None and self.window != measured:
            raise ConfigError(
                f"lazy: the window of profile {self.profile!r} is {measured}, not {self.window}: "
                "leave out one of them"
            )
        if isinstance(self.budget, int) and self.budget <= self._window:
            raise ConfigError(
                f"lazy: a budget of {self.budget} tokens is not above the window of {self.window}, "
                "which stays anyway: raise the budget or give a smaller window"
            )

    def _read_profile(self) -> int | None:
        """The window of the profile, if there is one; its digest becomes a parameter."""
        if self.profile is None:
            if self.digest is not None:
                raise ConfigError("lazy: digest is that of a profile: give profile=FILE too")
            return None
        artefact = self._artefact()
        for name, mine in (("alpha", str(float(self.alpha))), ("group", self.group)):
            if artefact.settings.get(name, mine) != mine:
                raise ConfigError(
                    f"lazy: profile {self.profile!r} was measured with {name}="
                    f"{artefact.settings[name]}, not {mine}: use the same, or calibrate again"
                )
        window = artefact.tensors.get("window")
        if window is None or window.dtype != torch.int64 or window.numel() != 1:
            raise ConfigError(
                f"lazy: profile {self.profile!r} holds no window (one int64): make it again with "
                "kvlib calibrate lazy"
            )
        object.__setattr__(self, "digest", artefact.digest)
        return int(window)

    def _artefact(self) -> Artefact:
        return load_artefact(str(self.profile), self.name, self.digest or "")

    @property
    def _window(self) -> int:
        return _WINDOW if self.window is None else self.window

    @property
    def needs(self) -> Needs:
        """What every step looks at."""
        wanted = not keeps_all(self.budget)
        return Needs(step_maxima=wanted, steps=wanted)

    def check(self, resources: Resources) -> None:
        """Refuse another model's profile."""
        if self.profile is not None and resources.identity is not None:
            self._artefact().check_model(resources.identity())

    def _lag(self, budget: int) -> int:
        """W for so many entries."""
        return max(min(self._window, budget - 1), 1)

    def protected(self, budget: int) -> Protect:
        """The last W entries."""
        return Protect(window=self._lag(budget))

    def on_prefill_chunk(self, view: LayerView) -> None:
        """The prompt is not observed."""

    def observe(self, view: LayerView) -> None:
        """Let the clock tick, and note what was active."""
        if view.num_new == 0:
            return
        if view.column_maxima is None:
            raise ConfigError("lazy needs the attention of every step, and did not get it")
        layer, entries = view.layer, view.state.entries
        now = _clock(view) + view.num_new
        active = by_entry(reduce_group(view.column_maxima, self.group), layer) >= self.alpha
        last_active = _begun(view, entries.get("last_active"), now)
        interval = (now - last_active) * active  # 0 changes no maximum
        longest = entries.get("max_recurrence")
        entries["max_recurrence"] = (
            interval.clamp_(min=0) if longest is None else torch.maximum(longest, interval)
        )
        entries["last_active"] = last_active.masked_fill_(active, now)
        view.state.values["step"] = torch.tensor(now)

    def target(self, view: LayerView) -> int | None:
        """The budget if this forward, one after the prompt, reached a multiple of W; else all."""
        now = _clock(view)
        budget = tokens_to_keep(view, self.budget) if now else None
        if budget is None:
            return None
        lag = self._lag(budget)
        return budget if now // lag > (now - view.num_new) // lag else None

    def scores(self, view: LayerView) -> Tensor:
        """H1 + H2 in float64: beside an H2 of 1, float32 would lose an H1 below 1e-7.

        They are computed on the CPU, once in W steps, and so are the same on every device.
        """
        last_active, longest = (
            by_row(view.state.entries[name], view.layer).cpu().double()
            for name in ("last_active", "max_recurrence")
        )
        quiet = _clock(view) - last_active
        h1 = 2 * torch.sigmoid(-(self.h1_offset + quiet / longest.clamp(min=1)))
        h2 = 2 * torch.sigmoid(1 - longest)
        return torch.where(longest > 0, h1 + h2, 0.0)


def _clock(view: LayerView) -> int:
    """Tokens after the prompt that were observed."""
    return int(view.state.values.get("step", 0))


def _begun(view: LayerView, last_active: Tensor | None, now: int) -> Tensor:
    """A copy of the last active steps, in which new entries have those they begin with."""
    layer, num = view.layer, view.num_new
    if not layer.is_dense or last_active is None:
        from_end = _from_end(layer)
        old = 0 if last_active is None else last_active
        return torch.where(from_end < num, now - 1 - from_end, old)
    begun = last_active.clone()
    begun[:, -num:] = torch.arange(now - num, now, dtype=torch.int32, device=begun.device)
    return begun


def _from_end(layer: LayerKV) -> Tensor:
    """Int32 of `keys.shape[:-1]`: how many entries of its row come after each."""
    device = layer.row(0).keys.device
    rows = [torch.arange(n - 1, -1, -1, dtype=torch.int32, device=device) for n in layer.lengths]
    return torch.stack(rows) if layer.is_dense else torch.cat(rows)
