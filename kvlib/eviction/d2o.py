# SPDX-License-Identifier: Apache-2.0
"""D2O: layers share the budget, evicted tokens may merge (arXiv 2406.13035, sections 3.2 and 3.3).

**Between layers**, once, when the prompt ends. Take the attention that every entry received from
the prompt's queries, and its variance over entries. A layer with high variance looks at few entries
and can do with few; one with low variance looks everywhere. With F the layer's variance, scaled to
[0, 1], layer l keeps the share rho * L * softmax(-F)[l] of the prompt: rho on average.

**Within a layer**, whenever a head holds more than the layer's budget. As in H2O the entries that
have received the most attention stay, and the most recent ones, and the first few (sinks). An entry
i that has to go has a second chance: u_i is the highest cosine of its key with a key that stays.
The layer has a threshold tau. In the first eviction it is the mean of all u; later the mean m of
the pass's u, over heads and entries, moves it: tau = beta * m + (1 - beta) * tau. Where u_i reaches
tau, the entry is merged into that nearest one: with M the entries that merge into j,

    D = e + sum of exp(u_i) over i in M,    x_j = (e * x_j + sum of exp(u_i) * x_i) / D

for keys and values. The others are gone for good. A merged-into entry keeps its position and its
score. Keys are compared and merged as cached, rotary embedding included; `merge_keys=False` merges
values only, so that every key stays one of its own position.

**Whole numbers.** The layers' numbers sum to exactly L times the mean: largest remainders are
rounded up, where the code cuts fractions off. Then they are limited. A share is never below 0.01
(if the mean itself is smaller: the mean). Where the budget is a fraction of the prompt, a layer
whose share reaches 1 never evicts, later tokens included. Where it is a number of tokens that is a
limit for later tokens too, so no layer is without one; and nothing at all is evicted before the
sequence has more tokens than the mean. Limits are not balanced by the other layers, as in the code.

**The official code** departs from the paper in five places. Each is a parameter, and
``norm=official,first_eviction=first_step,skip_layers=true,weights=mean,match=rank,beta=0.5`` is the
code:

- `norm`: F is scaled by minimum and maximum over the query heads inside one layer, then averaged,
  so layers are hardly compared and their budgets differ by at most a factor e;
- `first_eviction`: in the first step after the prompt, not at its end;
- `skip_layers`: layers 0, 1 and L - 1 never evict, which comes on top of the budget: of 32 layers
  with rho 0.2, the others keep 0.2 and all together (3 + 29 * 0.2) / 32 = 0.275;
- `weights`: x_j becomes the plain mean of x_j and all u_i * x_i, which shrinks it since u < 1;
- `match`: evicted entries are ranked by position in each head, u is averaged over heads rank by
  rank, and what reaches tau merges in all heads, although they are different tokens there.

It also copies keys and values to every query head, while here a KV head decides, with the attention
of its query heads summed; and it takes fractions of the prompt plus one token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvlib.errors import ConfigError
from kvlib.eviction.base import About, LayerView, Needs, Plans
from kvlib.eviction.key_lengths import forget_lengths, key_lengths
from kvlib.eviction.scored import PolicyBase, Protect
from kvlib.eviction.select import (
    check_budget,
    drop_lowest,
    keep_highest,
    keep_rows,
    keeps_all,
    largest_remainder,
    reduce_group,
    share_of,
    tokens_to_keep,
)
from kvlib.plans import KeepTokens, MergeTokens

__all__ = ["D2O", "Nearest", "layer_shares", "nearest"]

_OPTIONS = {
    "norm": ("across_layers", "official"),
    "first_eviction": ("prefill_end", "first_step"),
    "weights": ("softmax", "mean"),
    "match": ("head", "rank"),
}
_MIN_SHARE = Fraction(1, 100)
_RECEIVED = "received"  # in the prompt; the number of a query head of the group follows
_NO_LIMIT = torch.iinfo(torch.int64).max
_ROUNDING = 1e-6  # of float32: equal cosines must not fall below their own mean
_BLOCK = 2**24  # similarities at once: 64 MiB
_TINY = torch.finfo(torch.float32).tiny  # least length that a key is divided by
_FEW = 16  # where fewer entries go than one in so many, copying those that stay costs more


@dataclass(frozen=True, slots=True)
class D2O(PolicyBase):
    """Layer budgets by attention density, heavy hitters, and merging instead of dropping.

    Args:
        budget: entries per head on average over layers: a fraction of the prompt or a number of
            tokens.
        recent: share of a layer's budget for the most recent entries, the current token included;
            rounded up to whole entries.
        sinks: first entries that always stay. They count as heavy hitters: a budget too small for
            both keeps its recent entries, fewer sinks, and never sinks alone.
        beta: how fast the threshold follows, in [0, 1]. The paper has 0.7, the code 0.5.
        merge_self: weight of the entry that others merge into, before division, where theirs are
            exp(u); with e this is a softmax over similarities. Not used if `weights` is mean.
        merge_keys: whether keys are merged too, or values only.
        norm: how variances are scaled: across_layers (the paper), or official, inside each layer.
        first_eviction: prefill_end, or first_step (the code).
        skip_layers: whether the first two layers and the last never evict (the code).
        weights: of what is merged: softmax (the paper) or mean (the code).
        match: what has to be similar: an evicted entry of the same head (head), or on average over
            heads those of the same rank by position (rank, the code).
    """

    budget: float | int = 0.5
    recent: float = 0.5
    sinks: int = 4
    beta: float = 0.7
    merge_self: float = math.e
    merge_keys: bool = True
    norm: str = "across_layers"
    first_eviction: str = "prefill_end"
    skip_layers: bool = False
    weights: str = "softmax"
    match: str = "head"
    name: ClassVar[str] = "d2o"
    version: ClassVar[int] = 1
    status: ClassVar[str] = "stable"
    about: ClassVar[About] = About(
        idea=(
            "Layers whose attention is spread over many entries get more of the budget than layers "
            "that look at few. Within a layer the heavy hitters and the most recent entries stay. "
            "An evicted entry whose key is similar enough to one that stays is merged into it, and "
            "a moving average of similarities says what is enough."
        ),
        when="at the end of the prompt and in every step",
        cost=(
            "column sums: one more Q K^T over the prompt; cosines of evicted and kept keys, in "
            "each step one pass over the keys; 8 bytes an entry and KV head, and as much for each "
            "query head until the prompt ends"
        ),
        paper=(
            "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of LLMs, "
            "arXiv 2406.13035; AIoT-MLSys-Lab/D2O"
        ),
        differs=(
            "Variances are scaled by minimum and maximum over layers. KV heads decide, by the sum "
            "over their query heads. The first eviction is at the end of the prompt. Layers' "
            "numbers of entries sum exactly. Five departures of the official code from the paper "
            "are parameters: norm, first_eviction, skip_layers, weights, match."
        ),
    )

    def __post_init__(self) -> None:
        """Check the parameters."""
        check_budget(self.name, self.budget)
        for key in ("recent", "beta"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"d2o: {key} is a share in [0, 1], got {getattr(self, key)}")
        if self.sinks < 0:
            raise ConfigError(f"d2o: sinks must be 0 or more, got {self.sinks}")
        if not 0 <= self.merge_self < math.inf:
            raise ConfigError(f"d2o: merge_self must be 0 or more, got {self.merge_self}")
        for key, options in _OPTIONS.items():
            if getattr(self, key) not in options:
                raise ConfigError(
                    f"d2o: {key} is {' or '.join(options)}, got {getattr(self, key)!r}"
                )

    @property
    def needs(self) -> Needs:
        """Column sums and keys, and all layers of the prompt; nothing if everything is kept."""
        if keeps_all(self.budget):
            return Needs(steps=False)
        return Needs(
            prefill_column_sums=True,
            step_column_sums=True,
            whole_model=True,
            layer_steps=True,
            step_keys=True,
        )

    # Level 1: layer budgets

    def layer_budgets(self, variances: Sequence[Tensor], mean: int, num_prompt: int) -> list[int]:
        """Entries per head of each layer.

        Args:
            variances: [Hq] of each layer, of the attention received in the prompt.
            mean: entries per head on average.
            num_prompt: tokens of the prompt.
        """
        num = len(variances)
        budgets = largest_remainder(layer_shares(variances, self.norm), mean * num)
        floor = min(math.ceil(_MIN_SHARE * num_prompt), mean)
        budgets = [max(n, floor) for n in budgets]
        if isinstance(self.budget, float):
            budgets = [n if n < num_prompt else _NO_LIMIT for n in budgets]
        if self.skip_layers:
            skipped = (0, 1, num - 1)
            budgets = [_NO_LIMIT if i in skipped else n for i, n in enumerate(budgets)]
        return budgets

    def protected(self, budget: int) -> Protect:
        """The most recent entries, and the first of what the budget has for heavy hitters."""
        recent = share_of(self.recent, budget)
        return Protect(sinks=min(self.sinks, budget - max(recent, 1)), window=recent)

    # The life of a sequence

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Add what the pass's queries looked at, by query head: variances are of single heads."""
        if keeps_all(self.budget) or view.num_new == 0:
            return
        state = view.state.entries
        for g, received in enumerate(_column_sums(view).unbind(1)):
            name = f"{_RECEIVED}{g}"
            state[name] = received + state[name] if name in state else received.clone()

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Layer budgets, and the prompt down to them."""
        mean = tokens_to_keep(views[0], self.budget)
        if mean is None:
            return [() for _ in views]
        received = [_take_received(view) for view in views]
        variances = [x.double().var(-1, correction=0).flatten().cpu() for x in received]
        budgets = self.layer_budgets(variances, mean, views[0].num_prompt)
        for view, budget in zip(views, budgets, strict=True):
            view.state.values["layer_budget"] = torch.tensor(budget)
        if self.first_eviction == "first_step":
            return [() for _ in views]
        return [self._evict(view) for view in views]

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """As many as came go again, in layers whose budget is full."""
        return [self._step(view) for view in views]

    def _step(self, view: LayerView) -> Plans:
        if "layer_budget" not in view.state.values or view.num_new == 0:
            return ()  # everything is kept, a prompt that was all padding, or nothing came
        entries = view.state.entries
        entries["scores"] = entries["scores"] + reduce_group(_column_sums(view), "sum")
        return self._evict(view)

    # Level 2: eviction and merge

    def _evict(self, view: LayerView) -> Plans:
        layer, state = view.layer, view.state
        mean, budget = tokens_to_keep(view, self.budget), int(state.values["layer_budget"])
        held = max(layer.lengths)
        if mean is None or view.num_seen <= mean or held <= budget:
            return ()
        if not layer.is_dense:
            raise ConfigError(
                f"d2o keeps equally many entries in all heads of a layer, and layer "
                f"{layer.layer_idx} has {layer.lengths}: evict with d2o from the beginning"
            )
        guard, scores = self.protected(budget), state.entries["scores"]
        budgets, safe = [budget] * layer.num_kv_heads, guard.within(budget)
        keep = drop_lowest(scores, layer.lengths, budgets, [safe] * layer.num_kv_heads)
        if not keep:
            keep = keep_rows(keep_highest(guard.mark(scores, layer.lengths, budgets), budget))
        kept, gone = _kept_and_gone(keep, scores)
        few = kept is None or gone.shape[1] * _FEW <= held
        found = nearest(layer.keys, kept, gone, key_lengths(view, _TINY) if few else None)
        passes = self._passes(view, found.similarity)
        if not bool(passes.any()):
            return keep
        merge = self._merge(gone, found, passes, held)
        if self.merge_keys:
            forget_lengths(view, merge.head, merge.dst)
        return (*keep, merge)

    def _passes(self, view: LayerView, similarity: Tensor) -> Tensor:
        """Move the threshold; which of the evicted entries [Hkv, E] reach it."""
        mean = float(similarity.mean())
        tau = view.state.values.get("tau")
        new = mean if tau is None else self.beta * mean + (1 - self.beta) * float(tau)
        view.state.values["tau"] = torch.tensor(new, dtype=torch.float64)
        if self.match == "rank":
            similarity = similarity.mean(0, keepdim=True).expand_as(similarity)
        return similarity >= new - _ROUNDING

    def _merge(self, gone: Tensor, found: "Nearest", passes: Tensor, held: int) -> MergeTokens:
        head, slot = passes.nonzero(as_tuple=True)
        u, src, dst = found.similarity[head, slot], gone[head, slot], found.entry[head, slot]
        if self.weights == "softmax":
            theirs = shares = u.exp()
            itself = self.merge_self
        else:
            theirs, shares, itself = u, torch.ones_like(u), 1.0
        if gone.shape[1] == 1:  # one entry of each head: each destination is another's
            to, own, total = head, dst, shares + itself
            mine = total
        else:
            own, group = torch.unique(head * held + dst, return_inverse=True)
            total = u.new_full((len(own),), itself).index_add_(0, group, shares)
            to, own, mine = own // held, own % held, total[group]
        return MergeTokens(
            head=torch.cat([to, head]),
            src=torch.cat([own, src]),
            dst=torch.cat([own, dst]),
            weight=torch.cat([itself / total, theirs / mine]),
            axis="both" if self.merge_keys else "values",
        )


def layer_shares(variances: Sequence[Tensor], norm: str) -> list[float]:
    """Softmax over layers of minus their scaled variances; they sum to 1.

    Args:
        variances: float64 [Hq] of each layer.
        norm: `across_layers` scales the layers' means over heads by their minimum and maximum,
            `official` each layer's heads by theirs, and takes the mean then.
    """
    if norm == "official":
        dense = torch.stack([_scaled(mine).mean() for mine in variances])
    else:
        dense = _scaled(torch.stack([mine.mean() for mine in variances]))
    shares: list[float] = torch.softmax(-dense, 0).tolist()
    return shares


def _scaled(x: Tensor) -> Tensor:
    """To [0, 1] by minimum and maximum; zeros where all are equal, but for rounding."""
    span = x.max() - x.min()
    return (x - x.min()) / span if span > _ROUNDING * x.max() else torch.zeros_like(x)


class Nearest(NamedTuple):
    """For each evicted entry, [Hkv, E].

    Attributes:
        similarity: cosine with the nearest kept entry of its head, float32.
        entry: which one that is.
    """

    similarity: Tensor
    entry: Tensor


def nearest(
    keys: Tensor, kept: Tensor | None, gone: Tensor, lengths: Tensor | None = None
) -> Nearest:
    """Match evicted entries with kept ones of the same head, by the cosine of their keys.

    In float32. Memory: 64 MiB of similarities at a time (or those of one evicted entry for each
    head, if that is more), and a float32 copy of the keys that are compared with. A key of length 0
    has cosine 0 with every other.

    Args:
        keys: [Hkv, S, D].
        kept: int64 [Hkv, R], ascending; None if only one entry of each head goes.
        gone: int64 [Hkv, E], the others.
        lengths: float32 [Hkv, S], of all keys, none of them 0: only where few entries go.
    """
    rows = torch.arange(len(keys), device=keys.device)[:, None]
    few = kept is None or gone.shape[1] * _FEW <= keys.shape[1]
    others = (keys if kept is None or few else keys[rows, kept]).float()
    if lengths is None:
        lengths = torch.linalg.vector_norm(others, dim=-1).clamp_(min=_TINY)
    size = max(_BLOCK // max(others.shape[0] * others.shape[1], 1), 1)
    found = []
    for block in gone.split(size, dim=1):
        unit = keys[rows, block].float()
        unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_(min=_TINY)
        cosines = (unit @ others.transpose(1, 2)).div_(lengths[:, None])
        if few:
            hidden = gone[:, None].expand(-1, block.shape[1], -1)
            cosines.scatter_(2, hidden, -torch.inf)
        found.append(cosines.max(-1))  # of equal ones the first
    similarity = torch.cat([x.values for x in found], dim=1)
    index = torch.cat([x.indices for x in found], dim=1)
    return Nearest(similarity, index if kept is None or few else kept.gather(1, index))


def _kept_and_gone(keep: Plans, scores: Tensor) -> tuple[Tensor | None, Tensor]:
    """`nearest`'s arguments, of a plan that keeps equally many entries of each head."""
    (plan,) = keep
    assert isinstance(plan, KeepTokens)  # noqa: S101
    if plan.gaps is not None:
        gone = torch.tensor([list(gap) for gap in plan.gaps.ranges], device=scores.device)
        return None, gone
    kept = torch.stack(plan.rows)
    stays = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, value=True)
    return kept, (~stays).nonzero()[:, 1].view(len(kept), -1)


def _column_sums(view: LayerView) -> Tensor:
    if view.column_sums is None:
        raise ConfigError("d2o needs the attention that entries receive, and did not get it")
    return view.column_sums


def _take_received(view: LayerView) -> Tensor:
    """[Hkv, G, S] of the prompt; its sum over query heads becomes the entries' scores."""
    entries = view.state.entries
    num = sum(name.startswith(_RECEIVED) for name in entries)
    received = torch.stack([entries.pop(f"{_RECEIVED}{g}") for g in range(num)], dim=1)
    entries["scores"] = reduce_group(received, "sum")
    return received
