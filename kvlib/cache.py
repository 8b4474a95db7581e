# SPDX-License-Identifier: Apache-2.0
"""`KVCache`: a drop-in cache for transformers that frees what its policy drops.

    cache = kvlib.KVCache(model, policy="snapkv:budget=0.25")
    model.generate(**inputs, past_key_values=cache)

Until something is evicted, keys, values and attention are exactly those of transformers'
`DynamicCache`. After that, each sequence's rows are attended to by `kvlib.attention`, with a mask
of their own. Layers with a sliding window are bounded already: transformers keeps them, policies do
not see them, budgets do not count them.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvlib.artefacts import model_identity
from kvlib.attention import Logits, attend_batch
from kvlib.blocks import LayerKV
from kvlib.cache_columns import Columns, NewColumns
from kvlib.cache_copies import Copyable
from kvlib.cache_decisions import Decisions, Forward, read_policy
from kvlib.cache_hidden import watch_hidden
from kvlib.cache_layers import EvictableLayer, alone, layer_of, make_layers
from kvlib.cache_probe import Probes
from kvlib.cache_signals import MAX_ROLLBACK, Signals
from kvlib.errors import ConfigError
from kvlib.eviction.base import LayerState, Needs, Policy, Resources
from kvlib.model_hooks import AttentionCall, HookedCache, decoder_of, untraced, watch
from kvlib.model_spec import layer_specs, spec_for_model
from kvlib.registry import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KVCache"]


class KVCache(Copyable, Cache, HookedCache):
    """A cache under an eviction policy, for `generate()` and for plain forward passes.

    The prompt ends with the first forward pass, whatever its length; what follows are steps, of one
    token or of many (a question after a long context). Where a prompt comes in several passes, say
    so with `prefill_chunk_size`, or end it yourself with `end_prefill`.

    Args:
        model: the model that will run over it: a decoder whose layers all have full or
            sliding-window attention, and go through transformers' attention interface.
        policy: method string or policy object; after a ``|``, the codec of its snapshots.
        codec: the same, given apart.
        prefill_chunk_size: as given to `generate()`: a prompt is fed in pieces of so many tokens. A
            shorter piece, the first single token after whole ones, or `end_prefill` ends it; with
            1, only `end_prefill` does.
        model_id: identity of the weights, for snapshots of models that came from no hub and no
            folder.
        defer: policies to choose from once the prompt, a single pass, has been run: see `decided`.
        tokenizer: the model's, for policies that write text of their own behind the prompt.
        draft: a smaller model with the same token ids, for policies that let one look ahead.
        patch: int64 [n], token ids that stand for the questions to come, for policies that ask.

    Raises:
        ConfigError: layers of another kind (named), or two codecs.
        UnknownPluginError: no such policy.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        policy: str | Policy = "full",
        *,
        codec: str | None = None,
        prefill_chunk_size: int | None = None,
        model_id: str | None = None,
        defer: Sequence[Policy] = (),
        tokenizer: Any = None,
        draft: Any = None,
        patch: Tensor | None = None,
        _restoring: bool = False,
    ) -> None:
        policy, codec = read_policy(policy, codec)
        if prefill_chunk_size is not None and prefill_chunk_size < 1:
            raise ConfigError(f"prefill_chunk_size must be 1 or more, got {prefill_chunk_size}")
        self.policy = policy
        self.codec = codec
        self.model_id = model_id
        self.prefill_chunk_size = prefill_chunk_size
        if defer and prefill_chunk_size is not None:
            raise ConfigError("defer takes a prompt in one pass, without prefill_chunk_size")
        self._defer = tuple(defer)
        config = model.config.get_text_config(decoder=True)
        specs = layer_specs(config)
        self._ropes = [spec.rope for spec in specs]
        self._decisions = Decisions(policy, specs)
        made = make_layers(self, config)
        super().__init__(layers=made)
        self._evictable = [layer for layer in made if isinstance(layer, EvictableLayer)]
        self._sliding = [layer for layer in made if not isinstance(layer, EvictableLayer)]
        self._model = model
        resources = Resources(
            model=model,
            tokenizer=tokenizer,
            draft=draft,
            patch=patch,
            ropes=self._ropes,
            identity=lambda: model_identity(spec_for_model(model, model_id=model_id)),
        )
        for each in () if _restoring else (policy, *self._defer):
            each.check(resources)
        self._model_name = type(model).__name__
        self._decoder = decoder_of(model)
        self._probes = Probes(self, self._decoder, resources)
        self._start()
        watch(self._decoder, self)
        if self._needs.hidden:
            watch_hidden(self._decoder, self)

    def _start(self) -> None:
        self._columns = Columns()
        self._deferred = bool(self._defer)
        self._needs = Needs.union([other.needs for other in (self.policy, *self._defer)])
        self._signals = Signals(self._needs, self._ropes)
        self._probes.clear()
        self.record_past = False
        self._in_prefill = True
        self._whole_chunk = False  # the newest pass was a piece of the prompt, more may follow
        self._forward: Forward | None = None  # running
        self._open: Forward | None = None  # done, but `crop` may still shorten it
        self._attended = 0  # layers that the running pass has been through
        self._failed = False

    # What it is

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, positions, space to grow, policy state."""
        total = sum(layer.nbytes for layer in self._evictable)
        for layer in self._sliding:  # these are views of a step's tensors, which stay alive
            held = [x for x in (layer.keys, layer.values) if x is not None]
            total += sum(x.untyped_storage().nbytes() for x in held)
        return total + self._columns.nbytes + self._signals.nbytes + self._probes.nbytes

    @property
    def num_columns(self) -> int:
        """Columns ever seen: tokens, evicted ones included, and padding."""
        return self._columns.num

    @property
    def method(self) -> str:
        """The policy with all its parameters, as text."""
        return describe(self.policy)

    def layer_kv(self, layer_idx: int, sequence: int = 0) -> LayerKV:
        """What is held of one layer of one sequence: views, valid until the cache changes.

        Raises:
            ConfigError: the layer is empty or has a sliding window.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, EvictableLayer):
            raise ConfigError(f"layer {layer_idx} has a sliding window: no policy touches it")
        if layer.rows is not None:
            return layer.rows[sequence].layer
        if layer.keys is None or layer.values is None:
            raise ConfigError(f"layer {layer_idx} is empty")
        valid = None if self._columns.valid is None else self._columns.valid[sequence]
        positions = self._columns.token_positions(sequence)
        return layer_of(layer_idx, layer.keys[sequence], layer.values[sequence], positions, valid)

    # A forward pass, as the hooks report it

    def begin_forward(self, decoder: nn.Module, arguments: dict[str, Any]) -> None:
        """See `kvlib.model_hooks.HookedCache`."""
        if decoder is not self._decoder:
            raise ConfigError(
                f"this KVCache was made for another {self._model_name}; make one for each model"
            )
        if self._probes.running:
            return
        self._check_usable()
        if arguments.get("output_attentions"):
            raise ConfigError(
                "KVCache returns no attention weights: leave output_attentions out. A policy gets "
                "sums of them as signals (kvlib.eviction.Needs)"
            )
        new = self._columns.read(arguments)
        self._commit_open(0)
        chunk = self.prefill_chunk_size
        if self._in_prefill and self._whole_chunk and new.num == 1 != chunk:
            self.end_prefill()
        self._warn_about_pieces(new.num)
        if self._columns.batch == 0:
            for layer in self._evictable:
                layer.states = [LayerState() for _ in new.positions]
        if self._in_prefill and (self._needs.probe or self._needs.rerun):
            self._probes.take_prompt(arguments)
        self._whole_chunk = chunk is not None and new.num >= chunk
        self._attended = 0
        self._forward = Forward(
            new,
            is_step=not self._in_prefill,
            ends_prefill=self._in_prefill and not self._whole_chunk,
        )
        self._columns.add(new, to_prompt=self._in_prefill)

    def _check_usable(self) -> None:
        if self._failed:
            raise ConfigError("an earlier forward pass over this KVCache failed: make a new one")
        if self._forward is not None:
            raise ConfigError("two forward passes at once over one KVCache: each needs its own")

    def _warn_about_pieces(self, num: int) -> None:
        evicted = any(layer.rows is not None for layer in self._evictable)
        if not self._in_prefill and num == self.num_columns >= 16 and evicted:
            warnings.warn(
                f"two forward passes of {num} tokens in a row: the first was taken for the whole "
                "prompt and evicted. If the prompt comes in pieces, pass "
                f"KVCache(..., prefill_chunk_size={num})",
                stacklevel=2,
            )

    @untraced
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new keys and values [B, Hkv, T, D] of a layer."""
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def expect_update(self, layer_idx: int) -> None:
        """Refuse keys that do not come from a forward pass of the cache's own model."""
        if self._forward is None and not self._probes.running:
            raise ConfigError(
                f"layer {layer_idx} was given keys outside of a forward pass of the "
                f"{self._model_name} that this KVCache was made for; make one for each model"
            )

    def enter(self, module: nn.Module, hidden: Tensor | None) -> None:
        """See `kvlib.model_hooks.HookedCache`."""
        self._signals.hidden.enter(module, hidden)

    def needs_mask(self) -> bool:
        """See `kvlib.model_hooks.HookedCache`."""
        return not self._probes.running and any(layer.rows is None for layer in self._evictable)

    def attend(self, key: Tensor, call: AttentionCall) -> Tensor | None:
        """See `kvlib.model_hooks.HookedCache`."""
        index: int = getattr(call.module, "layer_idx")  # noqa: B009
        layer = self.layers[index]
        hidden = self._signals.hidden.leave(call.module)
        if not isinstance(layer, EvictableLayer):
            return None
        if layer.pending is None:
            raise ConfigError(
                f"{type(call.module).__name__} attends without giving its keys to the cache: "
                "KVCache works neither with gradient checkpointing nor with layers that read the "
                "keys of others"
            )
        if layer.pending[0] is not key:
            raise ConfigError(
                f"{type(call.module).__name__} changes keys after caching them: KVCache does not "
                "support this model"
            )
        if self._probes.running:
            return self._probes.attend(layer, call, hidden)
        forward = self._forward
        assert forward is not None  # noqa: S101
        self._attended += 1
        self._signals.hidden.keep(index, hidden, forward.new.valid, is_step=forward.is_step)
        logits = call.logits()
        if layer.rows is None:
            keys, values = layer.grow()
            output, _ = call.original(
                call.module, call.query, keys, values, call.mask, **call.options
            )
            for row in range(self._columns.batch):
                self._observe(layer, row, call.query[row], logits)
        else:
            output = self._attend_rows(layer, call, logits)
        if not (self.record_past or self._deferred or self._waits(forward)):
            self._commit([layer], forward, [0] * self._columns.batch)
        return output

    @torch.no_grad()
    def _observe(self, layer: EvictableLayer, row: int, query: Tensor, logits: Logits) -> None:
        forward = self._forward
        assert forward is not None  # noqa: S101
        if not self._signals.wants(is_step=forward.is_step):
            return
        valid = forward.new.valid
        self._signals.observe(
            layer.layer_idx,
            row,
            query if valid is None else query[:, valid[row].to(query.device)],
            lambda: self.layer_kv(layer.layer_idx, row),
            logits,
            is_step=forward.is_step,
            may_roll_back=self.record_past,
        )

    def _attend_rows(self, layer: EvictableLayer, call: AttentionCall, logits: Logits) -> Tensor:
        forward = self._forward
        assert forward is not None and layer.pending is not None and layer.rows is not None  # noqa: S101, PT018
        keys, values = layer.pending
        layer.pending = None
        if call.options.get("dropout"):
            raise ConfigError("KVCache has no attention dropout: put the model in eval mode")
        new = forward.new
        for row, held in enumerate(layer.rows):
            k, v = keys[row].detach(), values[row].detach()
            p = new.positions[row].to(keys.device)
            if new.valid is not None:
                where = new.valid[row].to(keys.device)
                k, v, p = k[:, where], v[:, where], p[where]
            held.append(k, v, p)
        # Sums come with the attention of a single query, unless they may have to be taken back.
        at_once = forward.is_step and not self.record_past
        at_once = at_once and self._signals.come_with_attention(new.num)
        output, sums = attend_batch(
            call.query,
            [held.layer for held in layer.rows],
            logits,
            valid=new.valid,
            with_column_sums=at_once,
        )
        for row, mine in enumerate(sums):
            if at_once:
                self._signals.put(layer.layer_idx, row, mine, logits)
            else:
                self._observe(layer, row, call.query[row], logits)
        return output

    def end_forward(self, *, failed: bool) -> None:
        """See `kvlib.model_hooks.HookedCache`."""
        if self._probes.running:  # one that failed raises through `_commit`
            return
        forward, self._forward = self._forward, None
        if failed or forward is None:
            self._fail()
            return
        if any(layer.pending is not None for layer in self._evictable):
            self._fail()
            raise ConfigError(
                f"{self._model_name} caches keys but its attention does not go through "
                "transformers' attention interface: KVCache does not support it"
            )
        if self._attended != len(self._evictable):
            self._fail()
            raise ConfigError(
                f"only {self._attended} of {len(self._evictable)} layers ran over this KVCache: it "
                "cannot be used where layers are skipped"
            )
        self._columns.advance(forward.new)
        if forward.new.num > 1:  # else a window would keep the whole pass alive
            for layer in self._sliding:
                layer.keys, layer.values = alone(layer.keys), alone(layer.values)
        if self.record_past or self._deferred:
            self._open = forward
            return
        if self._waits(forward):
            self._commit(self._evictable, forward, [0] * self._columns.batch)
        self._done(forward)

    def _waits(self, forward: Forward) -> bool:
        """Whether no layer is decided before all have been run."""
        return self._needs.whole_model and not (forward.is_step and self._needs.layer_steps)

    def _fail(self) -> None:
        self._failed = True
        self._signals.hidden.clear()

    # Decisions

    def _commit(
        self, layers: Sequence[EvictableLayer], forward: Forward, removed: Sequence[int]
    ) -> None:
        try:
            self._decisions.commit(
                layers, forward, removed, self._columns, self._signals, self.layer_kv, self._probes
            )
        except BaseException:  # some layers have been decided, others not
            self._fail()
            raise

    def _done(self, forward: Forward) -> None:
        self._in_prefill &= not forward.ends_prefill
        if not self._in_prefill:
            self._probes.clear()
        self._columns.settle(keep_positions=self.needs_mask())

    def end_prefill(self) -> None:
        """Say that the prompt is complete: what the policy drops goes now."""
        self._check_usable()
        self._commit_open(0)
        columns = self._columns
        if not self._in_prefill or columns.batch == 0:
            return
        nothing = NewColumns(0, None, torch.zeros(columns.batch, 0, dtype=torch.int32))
        last = Forward(nothing, is_step=False, ends_prefill=True)
        self._commit(self._evictable, last, [0] * columns.batch)
        self._done(last)

    # Rolling back

    def activate_past_recording(self) -> None:
        """Let `crop` take back tokens of the newest forward: decisions wait for it.

        `generate()` calls this for assisted generation.
        """
        for layer in self._sliding:
            layer.activate_past_recording()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens out again: a negative number, or 0 to let decisions be made.

        Rolling back needs what eviction has thrown away. So it works on the newest forward after
        `activate_past_recording` (as assisted generation does), and without it only where the
        policy has neither seen nor dropped anything.

        Raises:
            ConfigError: the state before those tokens cannot be restored exactly.
        """
        if tokens_to_remove > 0:
            raise ConfigError("crop takes a negative number of tokens to remove")
        self._check_usable()
        num = -tokens_to_remove
        opened = self._open
        if num and self._deferred and not self.record_past:
            raise ConfigError(
                "cannot take tokens back while decisions about the prompt are deferred: call "
                "activate_past_recording() before the prompt"
            )
        if opened is not None and num > min(opened.new.num, MAX_ROLLBACK):
            raise ConfigError(
                f"cannot take back {num} tokens: the newest forward pass had {opened.new.num}, "
                f"and at most {MAX_ROLLBACK} can be taken back"
            )
        if opened is None and num and (self._has_decided() or num > self.num_columns):
            raise ConfigError(
                f"cannot take back {num} of {self.num_columns} tokens: policy {self.method!r} has "
                "decided with them. Call activate_past_recording() before a forward pass that may "
                "be taken back"
            )
        try:
            for layer in self._sliding:  # all or none of them refuse
                layer.crop(tokens_to_remove)
        except RuntimeError as exc:
            raise ConfigError(f"cannot take back {num} tokens: {exc}") from exc
        if opened is not None:
            self._commit_open(num)
        else:
            self._remove(num)

    def _has_decided(self) -> bool:
        return (
            self._needs.any_signal
            or any(layer.rows is not None for layer in self._evictable)
            or any(state.nbytes for layer in self._evictable for state in layer.states)
        )

    def _remove(self, num: int) -> list[int]:
        """Take the last columns out of everything; returns the tokens each sequence lost."""
        lost = self._columns.remove(num) if num else [0] * self._columns.batch
        self._probes.truncate(self.num_columns)
        for layer in self._evictable:
            if layer.keys is not None and layer.values is not None:
                layer.keys = layer.keys[..., : self.num_columns, :]
                layer.values = layer.values[..., : self.num_columns, :]
            for held, gone in zip(layer.rows or (), lost, strict=False):
                held.truncate(gone)
        return lost

    def _commit_open(self, removed: int) -> None:
        forward, self._open = self._open, None
        if forward is not None:
            if self._deferred:  # this cache is decided now, by its own policy
                self._deferred, self._needs = False, self.policy.needs
                self._signals = self._signals.fork(self._needs)
            self._commit(self._evictable, forward, self._remove(removed))
            self._done(forward)

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._evictable:
            layer.clear()
        for layer in self._sliding:
            layer.reset()
        self._start()
