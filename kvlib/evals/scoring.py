# SPDX-License-Identifier: Apache-2.0
"""One context under all methods: compress, ask, compare with the full cache, count the bytes.

Answers are teacher-forced: question and right answer are one forward pass, and the answer is exact
if every token of it is the model's first choice, which is the case if and only if greedy decoding
would have written it. Policies that evict after every step do so after that pass; `stepwise` feeds
the answer token by token instead.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvlib.cache import KVCache
from kvlib.cache_decisions import read_policy
from kvlib.codecs import Codec, build_codec
from kvlib.evals.metrics import answer_scores
from kvlib.evals.tasks import Question, Sample
from kvlib.eviction import Policy
from kvlib.model_hooks import decoder_of
from kvlib.registry import describe
from kvlib.store.snapshots import decode_snapshot, encode_snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MODES", "EvalMethod", "Scorer"]

MODES = ("unaware", "aware")
"""Whether a policy sees the context alone, or with one question behind it."""

PROBE_STEPS = 4
_BATCH_BYTES = 256 << 20  # of caches, for questions that are answered together


@dataclass(frozen=True)
class EvalMethod:
    """A policy, and the codec its cache goes through before the questions, if any."""

    policy: Policy
    codec: Codec | None

    @classmethod
    def parse(cls, text: str) -> "EvalMethod":
        """From a method string; errors as `KVCache` raises them."""
        policy, codec = read_policy(text, None)
        return cls(policy, None if codec is None else build_codec(codec))

    @cached_property
    def text(self) -> str:
        """The method string with every parameter."""
        policy = describe(self.policy)
        return policy if self.codec is None else f"{policy} | {describe(self.codec)}"

    @property
    def versions(self) -> str:
        """What its results depend on besides the text."""
        plugins = (self.policy, self.codec) if self.codec else (self.policy,)
        return " | ".join(f"{plugin.name}@{plugin.version}" for plugin in plugins)


@dataclass(slots=True)
class _Found:
    """What one method scored on one context so far."""

    questions: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    """Bytes and seconds, one for each prefill."""

    def record(self, sample: Sample) -> dict[str, Any]:
        """For the samples file: means over the prefills, but the seconds of the probed one."""
        found: dict[str, Any] = {"context_tokens": len(sample.context)}
        for name, first in self.numbers[0].items():
            every = [numbers[name] for numbers in self.numbers if name in numbers]
            is_seconds = name.endswith("_s") or first is None
            found[name] = first if is_seconds else sum(every) / len(every)
        return found | {"questions": self.questions}


class Scorer:
    """Scores methods on samples with one model.

    Args:
        model: any that `KVCache` supports, in eval mode.
        model_id: its identity, for snapshots that go through a codec.
        tokenizer: for policies that write text of their own.
        stepwise: feed answers token by token.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        model_id: str | None = None,
        tokenizer: Any = None,
        stepwise: bool = False,
    ) -> None:
        self._model, self._model_id, self._stepwise = model, model_id, stepwise
        self._tokenizer = tokenizer

    def _cache(self, policy: str | Policy, defer: Sequence[Policy] = ()) -> KVCache:
        return KVCache(
            self._model,
            policy,
            model_id=self._model_id,
            defer=defer,
            tokenizer=self._tokenizer,
        )

    @torch.no_grad()
    def score(
        self, sample: Sample, mode: str, methods: Sequence[EvalMethod], *, probe: bool = False
    ) -> Iterator[tuple[EvalMethod, dict[str, Any]]]:
        """Each method with what it scored, as soon as it is known.

        A context is prefilled once (in question-aware mode once for each question) for all methods
        and shared by its questions.

        Args:
            sample: the context and its questions.
            mode: one of `MODES`.
            methods: any number; the full cache is run besides, as the reference.
            probe: run every policy's prefill by itself too, and time it, the first token and a few
                steps.
        """
        full = EvalMethod.parse("full")
        methods = list({method.text: method for method in methods}.values())
        groups: dict[str, list[EvalMethod]] = {full.text: [full]}
        for method in methods:
            if method.text != full.text:
                groups.setdefault(describe(method.policy), []).append(method)
        policies = [group[0].policy for group in groups.values()]
        wanted = {method.text for method in methods}
        found = {method.text: _Found() for group in groups.values() for method in group}
        rounds: list[tuple[tuple[int, ...], list[tuple[Question, tuple[int, ...]]]]]
        if mode == "aware":
            rounds = [(sample.context + q.question, [(q, q.prefix)]) for q in sample.questions]
        else:
            rounds = [(sample.context, [(q, q.question + q.prefix) for q in sample.questions])]
        for number, (prompt, asks) in enumerate(rounds):
            # First, while no other cache is there to add to the memory.
            measured = [
                self._measure(policy, prompt) if probe and number == 0 else {}
                for policy in policies
            ]
            shared = self._cache("full", defer=policies)
            self._prefill(shared, prompt)
            reference: list[Tensor] = []
            full_bytes = 0
            for group, seconds in zip(groups.values(), measured, strict=True):
                cache = shared.decided(group[0].policy)
                full_bytes = full_bytes or cache.nbytes
                numbers = {"held_bytes": cache.nbytes, "full_bytes": full_bytes, **seconds}
                for method in group:
                    mine = dict(numbers)
                    held = (
                        cache if method.codec is None else self._through(method.codec, cache, mine)
                    )
                    if probe and number == 0:
                        self._probe(held, asks[0][1], mine, restored=method.codec is not None)
                    logits = self._answers(held, [(ask, q.answer) for q, ask in asks])
                    reference = reference or logits
                    found[method.text].numbers.append(mine)
                    found[method.text].questions += [
                        answer_scores(logits[i], reference[i], question.answer)
                        | {"evidence_kept": _evidence_kept(held, question)}
                        for i, (question, _) in enumerate(asks)
                    ]
                    if number == len(rounds) - 1 and method.text in wanted:
                        yield method, found[method.text].record(sample)

    def _prefill(self, cache: KVCache, prompt: Sequence[int]) -> None:
        ids = torch.tensor([list(prompt)], device=self._model.device)
        logits = self._model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        logits[0, -1, 0].item()  # a CUDA device is done only then

    def _measure(self, policy: Policy, prompt: Sequence[int]) -> dict[str, Any]:
        """Seconds and peaks of a prefill under one policy alone."""
        cache = self._cache(policy)
        with _peaks(self._model, cache) as peaks:
            start = time.perf_counter()
            self._prefill(cache, prompt)
            seconds = time.perf_counter() - start
        return {**peaks, "prefill_s": seconds}

    def _through(self, codec: Codec, cache: KVCache, numbers: dict[str, Any]) -> KVCache:
        """The cache after a round trip through a record; bytes and seconds into `numbers`."""
        start = time.perf_counter()
        snapshot = cache.to_snapshot()
        record = b"".join(encode_snapshot(snapshot, codec))
        numbers["encode_s"] = time.perf_counter() - start
        start = time.perf_counter()
        decoded = decode_snapshot(record, snapshot.block.spec, snapshot.method)
        restored = KVCache.from_snapshot(
            self._model, decoded, policy=cache.policy, model_id=self._model_id
        )
        numbers["restore_s"] = time.perf_counter() - start
        numbers["held_bytes"] = len(record)
        return restored

    def _probe(
        self, cache: KVCache, ask: Sequence[int], numbers: dict[str, Any], *, restored: bool
    ) -> None:
        """Seconds to the first token, from the tokens or from the record, and of a few steps."""
        twin = cache.fork()
        seconds, ids = [], torch.tensor([list(ask)], device=self._model.device)
        for _ in range(1 + PROBE_STEPS):
            start = time.perf_counter()
            logits = self._model(input_ids=ids, past_key_values=twin, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            ids.item()
            seconds.append(time.perf_counter() - start)
        numbers["first_token_s"] = numbers["restore_s" if restored else "prefill_s"] + seconds[0]
        numbers["step_s"] = seconds[1:]

    def _answers(
        self, cache: KVCache, asks: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Tensor]:
        """For each (question, answer) the logits [len(answer), V] that predict the answer."""
        if self._stepwise:
            return [self._step_by_step(cache.fork(), *ask) for ask in asks]
        size = max(1, min(len(asks), _BATCH_BYTES // max(cache.nbytes, 1)))
        found: list[Tensor] = []
        for first in range(0, len(asks), size):
            found += self._together(cache.fork(), asks[first : first + size])
        return found

    def _together(
        self, cache: KVCache, asks: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[Tensor]:
        rows = [[*ask, *answer[:-1]] for ask, answer in asks]
        width = max(map(len, rows))
        # What is padded at the end comes after everything that is read, and is thrown away.
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        if len(rows) > 1:
            cache.batch_repeat_interleave(len(rows))
        logits = self._model(input_ids=ids.to(self._model.device), past_key_values=cache).logits
        return [
            logits[i, len(ask) - 1 : len(ask) - 1 + len(answer)].float()
            for i, (ask, answer) in enumerate(asks)
        ]

    def _step_by_step(self, cache: KVCache, ask: Sequence[int], answer: Sequence[int]) -> Tensor:
        found = []
        for ids in (list(ask), *([token] for token in answer[:-1])):
            inputs = torch.tensor([ids], device=self._model.device)
            found.append(self._model(input_ids=inputs, past_key_values=cache).logits[0, -1].float())
        return torch.stack(found)


def _evidence_kept(cache: KVCache, question: Question) -> float | None:
    """Share of the answer's tokens that are held, over layers and heads; None if unknown."""
    if not question.evidence:
        return None
    wanted = torch.tensor(question.evidence, dtype=torch.int32)
    shares = []
    for index in range(len(cache.layers)):
        if getattr(cache.layers[index], "is_sliding", False):
            continue
        rows = cache.layer_kv(index).rows()
        shares += [torch.isin(wanted, x.positions.cpu()).float().mean().item() for x in rows]
    return sum(shares) / len(shares) if shares else None


@contextmanager
def _peaks(model: "PreTrainedModel", cache: KVCache) -> Iterator[dict[str, Any]]:
    """The most bytes during a pass: of the cache, looked at after every layer, and of memory.

    Memory is the device's on CUDA, the resident set of the whole process (weights included) on
    Linux, and unknown elsewhere.
    """
    peaks: dict[str, Any] = {"peak_cache_bytes": 0, "peak_memory_bytes": None}

    def look(*_: Any) -> None:
        peaks["peak_cache_bytes"] = max(peaks["peak_cache_bytes"], cache.nbytes)

    layers = getattr(decoder_of(model), "layers", ())
    hooks = [layer.register_forward_hook(look) for layer in layers]
    read = _memory_peak(model.device)
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()
        look()
        peaks["peak_memory_bytes"] = read()


def _memory_peak(device: torch.device) -> Callable[[], int | None]:
    """Start measuring; the function returned gives the peak since."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: int(torch.cuda.max_memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return lambda: None
    return _resident_peak


def _resident_peak() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
