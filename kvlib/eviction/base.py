# SPDX-License-Identifier: Apache-2.0
"""What a policy declares, sees, remembers and answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from kvlib.attention import Logits
from kvlib.blocks import LayerKV
from kvlib.errors import ConfigError
from kvlib.plans import Plan
from kvlib.spec import RopeSpec

__all__ = [
    "About",
    "LayerState",
    "LayerView",
    "Needs",
    "Plans",
    "Policy",
    "ProbeView",
    "QueryMoments",
    "Resources",
]

Plans: TypeAlias = Sequence[Plan]
"""The plans of one layer, empty to leave it alone."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Signals that a policy asks for; nothing else is computed.

    Attributes:
        prefill_column_sums: attention that every entry receives from every query of the prompt.
        step_column_sums: the same from the queries of every later step.
        prefill_local_sums: attention that every entry receives from the prompt's queries less than
            this many positions behind it, in a softmax over those entries alone; 0 for none.
        query_window: attention received from this many last queries of the prompt.
        step_query_window: the same from the last queries of every later forward, which may have
            one token or many.
        step_maxima: the most attention that any single query of a later forward pays to an entry.
        last_queries: this many last queries of the prompt themselves.
        query_moments: mean and covariance of the prompt's queries as they were before the rotary
            embedding, without those of this many first tokens; None for none.
        hidden: what goes into the attention module for every new token, in the prompt and, if
            `steps`, in every later forward. Held for all layers at once until the end of a forward
            if `whole_model`.
        probe: extra passes over the complete prompt, see `Policy.probes`.
        rerun: a second pass over some of the prompt's tokens alone, see `Policy.rerun`.
        whole_model: whether plans depend on all layers together. If not, a layer is evicted as soon
            as its own attention is done, before the next layer fills up.
        layer_steps: whether, with `whole_model`, only plans for the prompt do: those of `on_step`
            depend on one layer.
        steps: whether `on_step` is to be called at all; a policy that decides at the end of the
            prompt and then keeps everything says no, and costs nothing afterwards.
        step_keys: whether `on_step` reads whole keys: then no other policy may prune channels.
        prefill_plans: whether a prompt that comes in pieces is evicted between them, by
            `on_prefill_piece`; probes then run after every piece.
    """

    prefill_column_sums: bool = False
    step_column_sums: bool = False
    prefill_local_sums: int = 0
    query_window: int = 0
    step_query_window: int = 0
    step_maxima: bool = False
    last_queries: int = 0
    query_moments: int | None = None
    hidden: bool = False
    probe: bool = False
    rerun: bool = False
    whole_model: bool = False
    layer_steps: bool = False
    steps: bool = True
    step_keys: bool = False
    prefill_plans: bool = False

    def __post_init__(self) -> None:
        """Check that the flags fit."""
        if (self.probe or self.rerun) and not self.whole_model:
            raise ConfigError("a policy with extra passes decides for the whole model")

    @classmethod
    def union(cls, every: Sequence["Needs"]) -> "Needs":
        """What all of them need together; a flag is set if one sets it, numbers are the largest."""
        merged: dict[str, Any] = {}
        for f in fields(cls):
            values = [v for needs in every if (v := getattr(needs, f.name)) is not None]
            if f.type == "bool" or f.type is bool:
                merged[f.name] = any(values)
            else:
                merged[f.name] = max(values, default=f.default)
        moments = {n.query_moments for n in every if n.query_moments is not None}
        if len(moments) > 1:
            raise ConfigError(
                f"statistics of queries without the first {sorted(moments)} tokens cannot be had "
                "in one prefill: give these policies the same sinks, or compare them in two runs"
            )
        return cls(**merged)

    @property
    def any_signal(self) -> bool:
        """Whether anything has to be computed for the policy."""
        return any(
            (
                self.prefill_column_sums,
                self.step_column_sums,
                self.step_maxima,
                self.hidden,
                self.probe,
                self.rerun,
                self.prefill_local_sums > 0,
                self.query_window > 0,
                self.step_query_window > 0,
                self.last_queries > 0,
                self.query_moments is not None,
            )
        )


@dataclass(frozen=True, slots=True)
class QueryMoments:
    """Mean and covariance of queries before the rotary embedding, over the tokens of a prompt.

    A factor that the embedding multiplies queries by (yarn) is in them.

    Attributes:
        count: queries that were averaged over.
        mean: float32 [Hq, D].
        covariance: float32 [Hq, D, D], divided by `count`.
    """

    count: int
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, slots=True)
class About:
    """What `docs/policies.md` says of a policy besides its parameters and needs; plain text.

    Attributes:
        idea: in three sentences.
        when: when it decides.
        cost: of time and memory, beyond attention over what is held.
        paper: authors' title, arXiv number, and the code that was read, if any.
        differs: where it departs from the paper or its official code, and why.
    """

    idea: str
    when: str
    cost: str
    paper: str
    differs: str


@dataclass(slots=True)
class LayerState:
    """What a policy remembers of one layer of one sequence. It belongs to the sequence.

    Attributes:
        entries: one number for each entry of the layer, by name: tensors of the layer's
            `keys.shape[:-1]`. They follow the rows: entries that a plan drops lose theirs, new
            entries begin with 0.
        values: anything else, by name.
    """

    entries: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        every = [*self.entries.values(), *self.values.values()]
        return sum(x.numel() * x.element_size() for x in every)

    def fork(self) -> "LayerState":
        """A copy that shares nothing."""
        return LayerState(
            {name: x.clone() for name, x in self.entries.items()},
            {name: x.clone() for name, x in self.values.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """One layer of one sequence, as a policy sees it after a forward pass. Read only, but `state`.

    Attributes:
        layer: every entry, the new ones included.
        state: the policy's own.
        num_new: tokens of this forward; their entries are the last real ones of each row.
        num_prompt: tokens of the prompt, in a prefill those seen so far.
        num_seen: tokens of the sequence, evicted ones included.
        column_sums: float32 [Hkv, G, S], attention received from this forward's queries; None if
            not asked for.
        local_sums: float32 [Hkv, G, S], see `Needs.prefill_local_sums`; of this forward's queries.
        window_sums: float32 [Hkv, G, S], attention received from the last `query_window` queries of
            the prompt (fewer if it is shorter) at the end of the prefill, and from the last
            `step_query_window` queries of a later forward; None otherwise.
        column_maxima: float32 [Hkv, G, S], the most attention that any query of a later forward
            paid; None if not asked for.
        last_queries: [Hq, w, D], the last queries of the prompt, after the rotary embedding, at the
            end of the prefill.
        query_moments: at the end of the prefill.
        hidden: [num_new, d_model], what went into the layer's attention module (after the layer's
            input norm) for this forward's tokens; None if not asked for, or in a forward of no
            tokens.
        logits: how the layer makes logits, where any signal was asked for.
        rope: rotary embedding of the layer, None if it has none.
        place: index among the layers that policies see.
        num_layers: how many those are.
    """

    layer: LayerKV
    state: LayerState
    num_new: int
    num_prompt: int
    num_seen: int
    column_sums: Tensor | None = None
    local_sums: Tensor | None = None
    window_sums: Tensor | None = None
    column_maxima: Tensor | None = None
    last_queries: Tensor | None = None
    query_moments: QueryMoments | None = None
    hidden: Tensor | None = None
    logits: Logits = field(default_factory=Logits)
    rope: RopeSpec | None = None
    place: int = 0
    num_layers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a policy may use besides the prompt's own pass. The cache's user gives it.

    Attributes:
        model: the model that the cache is for.
        tokenizer: its tokenizer, or None.
        draft: a second, smaller model with the same token ids, or None.
        patch: int64 [n], token ids that stand for the questions to come, or None.
        ropes: rotary embedding of each layer of the model, None where there is none.
        identity: gives what artefacts of this model are named by (`kvlib.artefacts`).
    """

    model: Any = None
    tokenizer: Any = None
    draft: Any = None
    patch: Tensor | None = None
    ropes: Sequence[RopeSpec | None] = ()
    identity: Callable[[], str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeView:
    """One layer of one sequence in an extra pass (`Policy.probes`), whose entries are not kept.

    Attributes:
        layer: what the cache holds, without the probe's own entries.
        state: the policy's own; results go here.
        index: which of the probes runs.
        query: [Hq, n, D] of the probe's tokens, after the rotary embedding.
        keys: [Hkv, n, D] of the probe's own tokens.
        logits: how the layer makes logits.
        num_prompt: tokens of the prompt.
        hidden: [n, d_model], as in `LayerView`, of the probe's tokens.
    """

    layer: LayerKV
    state: LayerState
    index: int
    query: Tensor
    keys: Tensor
    logits: Logits
    num_prompt: int
    hidden: Tensor | None = None


@runtime_checkable
class Policy(Protocol):
    """Decides what is kept. Implementations are frozen dataclasses: their fields are parameters.

    `version` grows when what is remembered changes its meaning: older snapshots are then refused.

    A policy object holds no state and serves any number of sequences. Calls for one layer, in
    order: `on_prefill_chunk` for every forward of the prompt; after the last one the probes if it
    asks for them, then `on_prefill_end` (or `rerun`) once; then `on_step` after every later
    forward, of one token or of many. With `Needs.prefill_plans`, probes and `on_prefill_piece`
    follow every earlier forward of the prompt too.
    """

    @property
    def name(self) -> str:
        """As it is registered; in one policy's class, a ClassVar, as are the next two."""

    @property
    def version(self) -> int:
        """See above."""

    @property
    def status(self) -> str:
        """`stable` or `experimental`."""

    @property
    def about(self) -> About:
        """For the documentation; a ClassVar too."""

    @property
    def needs(self) -> Needs:
        """Signals asked for."""

    def check(self, resources: Resources) -> None:
        """Refuse a model, or the lack of something, before anything is run.

        Raises:
            ConfigError: naming the remedy.
        """

    def on_prefill_chunk(self, view: LayerView) -> None:
        """Take note of a forward of the prompt in `view.state`."""

    def on_prefill_piece(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Plans after a piece of the prompt that more pieces follow: see `Needs.prefill_plans`."""

    def probes(self, prompt: Tensor, resources: Resources) -> Sequence[Tensor]:
        """Token ids, int64 [n] each, of the extra passes to run over the complete prompt.

        Each runs by itself after the prompt, sees all that the cache holds, and leaves no entry
        behind. Asked for only if `needs.probe`.

        Args:
            prompt: int64 [num_prompt], the token ids of one sequence, as far as they have come.
            resources: what the cache was given.
        """

    def on_probe(self, view: ProbeView) -> None:
        """Take note of an extra pass in `view.state`."""

    def rerun(self, prompt: Tensor, views: Sequence[LayerView]) -> Tensor | None:
        """Which of the prompt's tokens to run again, alone: their entries replace the prompt's.

        The chosen take the last positions of the prompt, so that those of later tokens follow.
        Called in place of `on_prefill_end`, and only if `needs.rerun`.

        Args:
            prompt: int64 [num_prompt], the token ids of one sequence.
            views: of all layers.

        Returns:
            Indices into `prompt`, int64 [n], ascending; None, or all, to keep what is held.
        """

    def on_prefill_end(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Plans for each view: all layers if `needs.whole_model`, else one layer at a time."""

    def on_step(self, views: Sequence[LayerView]) -> Sequence[Plans]:
        """Plans after a later forward, as in `on_prefill_end`, but see `Needs.layer_steps`."""
