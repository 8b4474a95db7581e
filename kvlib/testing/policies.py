# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: S101 (these are tests)
"""The tests that every eviction policy passes: an author subclasses `PolicyContract`.

They run the policy through `kvlib.KVCache` over tiny random models in float64, so that no choice
between tokens hangs on the rounding of the model.
"""

import copy
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, is_dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvlib.blocks import SYNTHETIC, LayerKV
from kvlib.cache import KVCache
from kvlib.cache_layers import EvictableLayer
from kvlib.codecs import build_codec
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, Needs, Policy, build_policy
from kvlib.registry import describe
from kvlib.store.snapshots import decode_snapshot, encode_snapshot
from kvlib.testing.recorder import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    Recorder,
    contract_model,
    numbers_of,
    positions_of,
    random_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PolicyContract"]

_BUDGET = 12
_PROMPTS = (1, _BUDGET - 1, _BUDGET, _BUDGET + 1, 4 * _BUDGET)
_STEPS = (1, 1, 1, 5, 1, 3, 1)  # tokens of the forward passes after a prompt


def _layers(cache: KVCache, sequence: int = 0) -> list[LayerKV]:
    return [cache.layer_kv(index, sequence) for index in range(LAYERS)]


def _state(cache: KVCache, layer_idx: int, sequence: int = 0) -> LayerState:
    layer = cache.layers[layer_idx]
    assert isinstance(layer, EvictableLayer)
    return layer.states[sequence] if layer.rows is None else layer.rows[sequence].state


def _held(cache: KVCache, sequence: int = 0) -> list[list[list[int]]]:
    """Positions by layer and head."""
    return [positions_of(layer) for layer in _layers(cache, sequence)]


def _forward(model: "PreTrainedModel", cache: Any, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens, past_key_values=cache, use_cache=True, **options).logits
    return logits


def _pieces(prompt: int, steps: Sequence[int] = _STEPS, *, seed: int = 0) -> tuple[Tensor, ...]:
    """The token ids of a prompt and of the passes after it, each [1, n]."""
    sizes = [prompt, *steps]
    return tuple(torch.split(random_tokens(1, sum(sizes), seed=seed), sizes, dim=1))


def _tolerance(x: Tensor, num_entries: int) -> float:
    """How far two computations of the same logits, keys or values may lie apart.

    Attention that also yields statistics is computed in float32: sums over a head's channels and
    over entries, whose rounding errors each layer hands on.
    """
    return 2.0**-23 * (HEAD_DIM + num_entries) * (LAYERS + 1) * max(1.0, float(x.abs().max()))


def _assert_close(seen: Tensor, expected: Tensor, num_entries: int) -> None:
    error = float((seen - expected).abs().max())
    assert error <= _tolerance(expected, num_entries), error


def _assert_same(seen: KVCache, expected: KVCache, *, sequence: int = 0, other: int = 0) -> None:
    """Two caches hold the same bits of two sequences, and the policy the same of them."""
    for index in range(LAYERS):
        assert seen.layer_kv(index, sequence).equal(expected.layer_kv(index, other))
        mine, theirs = _state(seen, index, sequence), _state(expected, index, other)
        for a, b in ((mine.entries, theirs.entries), (mine.values, theirs.values)):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)


class PolicyContract:
    """Subclass this in a test file, and set `method`; pytest runs the rest.

    A policy that is not registered overrides `policy`; one whose rows are not all equally long
    overrides `lengths`.

    Attributes:
        method: method string with ``{budget}`` in it; it may set other parameters, and has to where
            their defaults are far larger than a budget of 12 entries.
        evicts: whether it ever drops anything; if not, `method` needs no budget.
        bounded_after_prefill: whether later tokens count in the budget; if not, they are all kept.
        chunked_prefill_is_exact: whether a prompt in pieces ends as the same prompt in one; if not,
            only lengths are compared.
    """

    method: ClassVar[str]
    evicts: ClassVar[bool] = True
    bounded_after_prefill: ClassVar[bool] = True
    chunked_prefill_is_exact: ClassVar[bool] = True

    def policy(self, budget: float | int) -> Policy:
        """The policy under test."""
        return build_policy(self.method.format(budget=budget))

    def lengths(self, budget: int, prompt: int, later: int) -> list[list[int]]:
        """Entries by layer and head, for a budget in tokens and `later` tokens after the prompt."""
        num = prompt + later
        if self.evicts and self.bounded_after_prefill:
            num = min(budget, num)
        elif self.evicts:
            num = min(budget, prompt) + later
        return [[num] * HEADS for _ in range(LAYERS)]

    def check_rows(self, cache: KVCache, budget: int, prompt: int, later: int) -> None:
        """Rows are as long as they should be, in order, finite, and of tokens that were seen."""
        expected = self.lengths(budget, prompt, later)
        assert [list(layer.lengths) for layer in _layers(cache)] == expected
        for index, layer in enumerate(_layers(cache)):
            layer.validate()
            assert bool(layer.keys.isfinite().all())
            assert bool(layer.values.isfinite().all())
            assert max(map(max, positions_of(layer))) < prompt + later
            for name, x in _state(cache, index).entries.items():
                assert x.shape == layer.keys.shape[:-1], name
                assert bool(x.isfinite().all()), name

    def run(
        self, pieces: Sequence[Tensor], budget: float | int = _BUDGET
    ) -> tuple[KVCache, list[Tensor]]:
        """A cache after passes over `pieces`, and the logits of each."""
        cache = KVCache(contract_model(), self.policy(budget))
        return cache, [_forward(contract_model(), cache, tokens) for tokens in pieces]

    # What it is

    def test_declares_itself(self) -> None:
        """A policy is a frozen dataclass with name, version, status and needs."""
        policy = self.policy(_BUDGET)
        assert isinstance(policy, Policy)
        assert is_dataclass(policy)
        assert policy.name
        assert policy.version >= 1
        assert policy.status in ("stable", "experimental")
        assert isinstance(policy.needs, Needs)
        assert all(getattr(policy.about, f.name) for f in fields(policy.about))
        for field in fields(policy):
            with pytest.raises(FrozenInstanceError):
                setattr(policy, field.name, getattr(policy, field.name))

    def test_configuration_is_text(self) -> None:
        """Every parameter is in the canonical string; an equal policy has the same string."""
        policy = self.policy(_BUDGET)
        assert is_dataclass(policy)
        twin = type(policy)(**{f.name: getattr(policy, f.name) for f in fields(policy) if f.init})
        assert twin == policy
        assert describe(twin) == describe(policy)
        assert describe(policy).partition(":")[0] == policy.name

    @pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, 1.5])
    def test_refuses_budgets_without_meaning(self, budget: float | int) -> None:
        """No tokens, fewer than none, and more than all are refused, naming the policy."""
        if self.evicts:
            with pytest.raises(ConfigError, match=self.policy(_BUDGET).name):
                self.policy(budget)
        else:
            assert "{budget}" not in self.method

    # The full budget

    @pytest.mark.parametrize("budget", [1.0, 1000])
    @pytest.mark.parametrize("padding", [0, 3])
    def test_full_budget_is_identity(self, budget: float | int, padding: int) -> None:
        """Nothing to evict: keys, values and logits are those of a DynamicCache, bit for bit."""
        model = contract_model()
        cache = KVCache(model, self.policy(budget))
        expected: Any = DynamicCache(config=model.config)
        sizes = [20, *_STEPS]
        mask = torch.ones(2, sum(sizes), dtype=torch.long)
        mask[1, :padding] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)
        stop = 0
        for tokens in random_tokens(2, sum(sizes)).split(sizes, dim=1):
            start, stop = stop, stop + tokens.shape[1]
            options = {
                "attention_mask": mask[:, :stop] if padding else None,
                "position_ids": places[:, start:stop],
            }
            mine = _forward(model, cache, tokens, **options)
            theirs = _forward(model, expected, tokens, **options)
            first = padding if start == 0 else 0  # what padding gives does not matter
            assert torch.equal(mine[0], theirs[0])
            assert torch.equal(mine[1, first:], theirs[1, first:])
        for index, layer in enumerate(expected.layers):
            for row, first in enumerate((0, padding)):
                held = cache.layer_kv(index, row)
                assert torch.equal(held.keys, layer.keys[row, :, first:])
                assert torch.equal(held.values, layer.values[row, :, first:])
                assert positions_of(held) == [list(range(stop - first))] * HEADS

    def test_full_fraction_remembers_nothing(self) -> None:
        """A budget of 1.0 asks for no signal and keeps no number for any entry."""
        cache, _ = self.run(_pieces(30), budget=1.0)
        assert not self.policy(1.0).needs.any_signal
        assert all(not _state(cache, index).entries for index in range(LAYERS))

    # What is held

    @pytest.mark.parametrize("group", [1, 3, 4, 7])
    @pytest.mark.parametrize("prompt", _PROMPTS)
    def test_lengths_are_exact(self, group: int, prompt: int) -> None:
        """After the prompt and after every pass, for any number of query heads to a KV head."""
        model = contract_model(group)
        cache = KVCache(model, self.policy(_BUDGET))
        later = -prompt
        for tokens in _pieces(prompt, seed=prompt):
            assert bool(_forward(model, cache, tokens).isfinite().all())
            later += tokens.shape[1]
            self.check_rows(cache, _BUDGET, prompt, later)

    @pytest.mark.parametrize(("share", "num", "budget"), [(0.25, 37, 10), (0.07, 100, 7)])
    def test_fraction_is_one_of_the_prompt(self, share: float, num: int, budget: int) -> None:
        """A fraction is rounded up to whole tokens, and fixed when the prompt ends."""
        cache, _ = self.run(_pieces(num), budget=share)
        self.check_rows(cache, budget, num, sum(_STEPS))

    def test_what_is_gone_stays_away(self) -> None:
        """After a pass only entries are held that were there before, or that it brought."""
        model = contract_model()
        cache = KVCache(model, self.policy(_BUDGET))
        before: list[list[int]] = [[]] * (HEADS * LAYERS)
        seen = 0
        for tokens in _pieces(40):
            _forward(model, cache, tokens)
            new = range(seen, seen + tokens.shape[1])
            seen += tokens.shape[1]
            after = list(chain(*_held(cache)))
            for mine, old in zip(after, before, strict=True):
                assert set(mine) <= {*old, *new, SYNTHETIC}
            before = after

    # Positions and later tokens

    def test_positions_continue(self) -> None:
        """New tokens come after all that were ever seen, evicted ones included."""
        model = contract_model()
        recorder = Recorder(self.policy(_BUDGET))
        caches = KVCache(model, recorder), KVCache(model, self.policy(_BUDGET))
        seen = 0
        for tokens in _pieces(40):
            num = tokens.shape[1]
            implied = _forward(model, caches[0], tokens)
            places = torch.arange(seen, seen + num)[None]
            assert torch.equal(implied, _forward(model, caches[1], tokens, position_ids=places))
            seen += num
            assert all(cache.get_seq_length() == seen for cache in caches)
            for note in recorder.notes[-LAYERS:]:
                assert (note.num_new, note.num_prompt, note.num_seen) == (num, 40, seen)
                for row in note.positions:
                    real = [p for p in row if p != SYNTHETIC]
                    assert real[-num:] == list(range(seen - num, seen))
        assert len(recorder.notes) == LAYERS * (1 + len(_STEPS))

    @pytest.mark.parametrize("num", [2, _BUDGET, 3 * _BUDGET])
    def test_many_tokens_after_eviction(self, num: int) -> None:
        """A long question after a long context runs, and rows stay in order."""
        model = contract_model()
        cache = KVCache(model, self.policy(_BUDGET))
        later = -40
        for tokens in _pieces(40, (num, 1, num)):
            assert bool(_forward(model, cache, tokens).isfinite().all())
            later += tokens.shape[1]
            self.check_rows(cache, _BUDGET, 40, later)

    # Sequences

    @pytest.mark.parametrize("prompts", [(5, 40, 17), (30, 30)], ids=["padded", "equal"])
    @pytest.mark.parametrize("budget", [_BUDGET, 0.5])
    def test_batch_equals_separate_runs(self, prompts: tuple[int, ...], budget: float) -> None:
        """Sequences of a batch, padded on the left, fare as each does alone."""
        model = contract_model()
        batch = KVCache(model, self.policy(budget))
        alone = [KVCache(model, self.policy(budget)) for _ in prompts]
        streams = [_pieces(n, seed=seed) for seed, n in enumerate(prompts)]
        longest = max(prompts)
        mask = torch.tensor([[0] * (longest - n) + [1] * (n + sum(_STEPS)) for n in prompts])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        stop = 0
        for step, parts in enumerate(zip(*streams, strict=True)):
            width = longest if step == 0 else _STEPS[step - 1]
            start, stop = stop, stop + width
            padded = [torch.nn.functional.pad(x, (width - x.shape[1], 0)) for x in parts]
            together = _forward(
                model,
                batch,
                torch.cat(padded),
                attention_mask=None if len(set(prompts)) == 1 else mask[:, :stop],
                position_ids=places[:, start:stop],
            )
            for row, (cache, tokens) in enumerate(zip(alone, parts, strict=True)):
                logits = _forward(model, cache, tokens)[0]
                _assert_close(together[row, -len(logits) :], logits, stop)
                assert _held(batch, row) == _held(cache)
                for mine, theirs in zip(_layers(batch, row), _layers(cache), strict=True):
                    _assert_close(mine.keys, theirs.keys, stop)
                    _assert_close(mine.values, theirs.values, stop)

    def test_requests_share_nothing(self) -> None:
        """Two requests by turns, under one policy object, end as each would alone."""
        model = contract_model()
        policy = self.policy(0.3)
        streams = _pieces(40, seed=1), _pieces(25, seed=2)
        caches = KVCache(model, policy), KVCache(model, policy)
        logits: tuple[list[Tensor], list[Tensor]] = ([], [])
        for parts in zip(*streams, strict=True):
            for cache, tokens, mine in zip(caches, parts, logits, strict=True):
                mine.append(_forward(model, cache, tokens))
        for cache, stream, mine in zip(caches, streams, logits, strict=True):
            alone, expected = self.run(stream, budget=0.3)
            assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
            _assert_same(cache, alone)

    def test_deterministic(self) -> None:
        """The same passes give the same bits."""
        first, mine = self.run(_pieces(40))
        second, theirs = self.run(_pieces(40))
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        _assert_same(first, second)

    @pytest.mark.parametrize("chunk", [7, 10, 38])
    @pytest.mark.parametrize("told", [False, True], ids=["implied", "told"])
    def test_chunked_prefill_equals_one_shot(self, chunk: int, told: bool) -> None:
        """A prompt in pieces, ended by a short one, by the next token or by `end_prefill`."""
        model = contract_model()
        prompt, *later = _pieces(40)
        whole, expected = self.run([prompt])
        cache = KVCache(model, self.policy(_BUDGET), prefill_chunk_size=chunk)
        logits = torch.cat([_forward(model, cache, x) for x in prompt.split(chunk, 1)], dim=1)
        if not cache.policy.needs.prefill_plans:  # else later pieces do not see all
            _assert_close(logits, expected[0], 40)
        if told:
            cache.end_prefill()
        if told or 40 % chunk:
            self.check_rows(cache, _BUDGET, 40, 0)
        for tokens in later:
            mine, theirs = (_forward(model, x, tokens) for x in (cache, whole))
            if self.chunked_prefill_is_exact:
                _assert_close(mine, theirs, 40 + sum(_STEPS))
                assert _held(cache) == _held(whole)
        self.check_rows(cache, _BUDGET, 40, sum(_STEPS))

    # The policy's memory

    @pytest.mark.parametrize("prompt", [8, 40])
    def test_state_follows_rows(self, prompt: int) -> None:
        """Numbers kept for entries stay with their entries when others go."""
        model = contract_model()
        recorder = Recorder(self.policy(_BUDGET))
        cache = KVCache(model, recorder)
        for tokens in _pieces(prompt):
            _forward(model, cache, tokens)
            for note in recorder.notes[-LAYERS:]:
                layer = cache.layer_kv(note.layer_idx)
                after = numbers_of(_state(cache, note.layer_idx), layer)
                assert after.keys() == note.entries.keys()
                for name, rows in after.items():
                    for head, (row, now) in enumerate(zip(rows, positions_of(layer), strict=True)):
                        was = note.positions[head]
                        index = [was.index(p) for p in now if p != SYNTHETIC]
                        assert torch.equal(row[: len(index)], note.entries[name][head][index])

    def test_ties(self) -> None:
        """Where every token scores the same, lengths are exact, numbers finite, runs equal."""
        model = contract_model(tied=True)
        caches = [KVCache(model, self.policy(_BUDGET)) for _ in range(2)]
        for tokens in _pieces(40):
            for cache in caches:
                assert bool(_forward(model, cache, tokens).isfinite().all())
                self.check_rows(cache, _BUDGET, 40, cache.get_seq_length() - 40)
            _assert_same(caches[0], caches[1])

    # Copies

    def test_a_fork_goes_on_by_itself(self) -> None:
        """A copy made between steps decides as its origin does, and leaves it alone."""
        prompt, *rest = _pieces(4 * _BUDGET)
        cache, _ = self.run([prompt, *rest[:2]])
        twin = cache.fork()
        logits = [[_forward(contract_model(), c, x) for x in rest[2:]] for c in (twin, cache)]
        assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
        _assert_same(twin, cache)

    def test_a_snapshot_goes_on_the_same(self) -> None:
        """A cache stored between steps and restored makes the same plans and the same logits."""
        model = copy.deepcopy(contract_model()).float()
        prompt, *rest = _pieces(4 * _BUDGET)
        cache = KVCache(model, self.policy(_BUDGET), model_id="contract")
        for tokens in (prompt, *rest[:2]):
            _forward(model, cache, tokens)
        snapshot = cache.to_snapshot()
        record = b"".join(encode_snapshot(snapshot, build_codec("exact")))
        found = decode_snapshot(record, cache.spec, snapshot.method)
        restored = KVCache.from_snapshot(
            model, found, policy=self.policy(_BUDGET), model_id="contract"
        )
        _assert_same(restored, cache)
        logits = [[_forward(model, c, x) for x in rest[2:]] for c in (restored, cache)]
        assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
        _assert_same(restored, cache)
