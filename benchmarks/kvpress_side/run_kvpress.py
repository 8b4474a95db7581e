# SPDX-License-Identifier: Apache-2.0
"""Score kvpress on prompts that `kvlib eval export` wrote: same tokens, same model, same budgets.

Runs in an environment of its own (requirements.txt beside this file) and imports nothing of kvlib.
Answers are teacher-forced: what follows the compressed prompt is one forward pass, at the positions
it would have had without compression.

The output is JSON lines: a header, then one line per sample, mode and method, written as soon as it
is known. Run again, the script continues where it stopped.
"""

import argparse
import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

SCHEMA = 1
MODES = ("unaware", "aware")
EXPECTED_SINKS = 4
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

BuildPress = Callable[[int, int, float], kvpress.ScorerPress]
"""From tokens, tokens kept, and the compression ratio that keeps them."""


class InputError(Exception):
    """The prompts, the output file or a method cannot be used; the message says why."""


# Methods


@dataclass(frozen=True)
class Method:
    """A label of kvlib, and what kvpress does for it (`build` is None for the full cache)."""

    label: str
    budget: str = "1.0"
    seed: int = 0
    build: BuildPress | None = None

    def kept(self, tokens: int) -> int:
        """Entries per head that stay, counted as kvlib does: fractions are rounded up."""
        exact = Fraction(self.budget)
        if "." in self.budget or "e" in self.budget.lower():
            return math.ceil(exact * tokens)
        return min(int(exact), tokens)

    def press(self, tokens: int) -> kvpress.ScorerPress | None:
        """The press for a prompt of so many tokens; None where everything stays."""
        kept = self.kept(tokens)
        if self.build is None or kept == tokens:
            return None
        # kvpress keeps int(tokens * (1 - ratio)): half a token more is safe from rounding.
        return self.build(tokens, kept, 1 - (kept + 0.5) / tokens)


def parse_method(label: str) -> Method:
    """Read one method string, and refuse what kvpress cannot follow.

    Raises:
        InputError: naming what is not supported.
    """
    name, _, rest = label.partition(":")
    params: dict[str, str] = {}
    for item in rest.split(",") if rest else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value or key in params:
            raise InputError(f"cannot read {item!r} in method {label!r}: expected key=value, once")
        params[key] = value
    name = name.strip()
    if name not in _READERS:
        raise InputError(f"method {label!r} is not supported; known: {', '.join(_READERS)}")
    budget, seed, build = "1.0", 0, None
    if name != "full":
        budget = _budget(label, params.pop("budget", "0.5"))
    if name == "random":
        seed = _integer(label, params, "seed", 0)
    build = _READERS[name](label, params)
    if params:
        raise InputError(f"{', '.join(params)} in method {label!r} is not supported here")
    return Method(label, budget, seed, build)


def _budget(label: str, text: str) -> str:
    try:
        exact = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"cannot read budget {text!r} in method {label!r}") from None
    ratio = "." in text or "e" in text.lower()
    if exact <= 0 or (exact > 1 if ratio else exact.denominator != 1):
        raise InputError(
            f"budget {text!r} in method {label!r} is not supported: kvpress keeps a fraction in "
            "(0, 1] (written with a point) or 1 and more tokens (without)"
        )
    return text


def _integer(label: str, params: dict[str, str], key: str, default: int, least: int = 0) -> int:
    text = params.pop(key, str(default))
    if not text.isdecimal() or int(text) < least:
        raise InputError(
            f"{key}={text} in method {label!r} is not supported: it is a whole number from {least}"
        )
    return int(text)


def _only(label: str, params: dict[str, str], key: str, value: str) -> None:
    given = params.pop(key, value)
    if given != value:
        raise InputError(
            f"{key}={given} in method {label!r} is not supported: kvpress has {key}={value} only"
        )


def _full(label: str, params: dict[str, str]) -> None:
    """No press."""


def _streaming(label: str, params: dict[str, str]) -> BuildPress:
    sinks = _integer(label, params, "sinks", 4)
    return lambda tokens, kept, ratio: kvpress.StreamingLLMPress(
        compression_ratio=ratio,
        n_sink=min(sinks, kept),  # with more sinks than may stay, ties would decide
    )


def _snapkv(label: str, params: dict[str, str]) -> BuildPress:
    window = _integer(label, params, "window", 32, 1)
    kernel = _integer(label, params, "kernel", 5, 1)
    if kernel % 2 == 0:
        raise InputError(f"kernel={kernel} in method {label!r} is not supported: it must be odd")
    _only(label, params, "pool", "avg")
    _only(label, params, "group", "mean")
    return lambda tokens, kept, ratio: kvpress.SnapKVPress(
        compression_ratio=ratio,
        # A longer window fails on short prompts; one that may not stay whole is cut by ties.
        window_size=min(window, kept),
        kernel_size=kernel,
    )


def _random(label: str, params: dict[str, str]) -> BuildPress:
    _only(label, params, "sinks", "0")
    _only(label, params, "window", "0")
    # The press's own seed would give all layers the same draw; see `prefill`.
    return lambda tokens, kept, ratio: kvpress.RandomPress(compression_ratio=ratio)


def _expected(label: str, params: dict[str, str]) -> BuildPress:
    def build(tokens: int, kept: int, ratio: float) -> kvpress.ScorerPress:
        if kept < EXPECTED_SINKS:
            raise InputError(
                f"method {label!r} keeps {kept} of {tokens} tokens: fewer than the "
                f"{EXPECTED_SINKS} sinks of kvpress"
            )
        return kvpress.ExpectedAttentionPress(compression_ratio=ratio, n_sink=EXPECTED_SINKS)

    return build


def _plain(press: type[kvpress.ScorerPress]) -> Callable[[str, dict[str, str]], BuildPress]:
    return lambda label, params: lambda tokens, kept, ratio: press(compression_ratio=ratio)


_READERS: dict[str, Callable[[str, dict[str, str]], BuildPress | None]] = {
    "full": _full,
    "streaming": _streaming,
    "snapkv": _snapkv,
    "random": _random,
    "knorm": _plain(kvpress.KnormPress),
    "keydiff": _plain(kvpress.KeyDiffPress),
    "tova": _plain(kvpress.TOVAPress),
    "expected": _expected,
}


# Scoring


@dataclass(frozen=True)
class Question:
    """Token ids; an answer's first token is predicted by the last one of the prefix."""

    question: list[int]
    prefix: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Prompt:
    """A context in one mode, with its questions."""

    sample: dict[str, Any]
    mode: str
    context: Tensor
    questions: list[Question]

    def key(self, label: str) -> tuple[str, str, str]:
        """What a line of the output is about."""
        return json.dumps(self.sample, sort_keys=True), self.mode, label

    @property
    def prefilled(self) -> int:
        """Tokens that one method prefills."""
        if self.mode == "unaware":
            return len(self.context)
        return sum(len(self.context) + len(q.question) for q in self.questions)


@torch.no_grad()
def score(model: PreTrainedModel, prompt: Prompt, method: Method) -> dict[str, Any]:
    """One line of the output. Bytes are the mean over prefills, kept tokens those of the first."""
    rounds: list[tuple[Tensor, list[tuple[list[int], list[int]]]]]
    if prompt.mode == "unaware":
        rounds = [
            (prompt.context, [(q.question + q.prefix, q.answer) for q in prompt.questions]),
        ]
    else:
        rounds = [
            (torch.cat([prompt.context, torch.tensor(q.question, dtype=torch.long)]), [ask])
            for q in prompt.questions
            for ask in [(q.prefix, q.answer)]
        ]
    questions, held, full, kept = [], [], [], []
    for index, (ids, asks) in enumerate(rounds):
        cache = prefill(model, ids, method, f"{prompt.key('')} {index}")
        kept.append([layer.get_seq_length() for layer in cache.layers])
        held.append(storage_bytes(cache))
        full.append(full_bytes(cache, len(ids)))
        questions += [
            scores(answer_logits(model, cache, len(ids), ask, answer), answer)
            for ask, answer in asks
        ]
    return {
        "sample": prompt.sample,
        "mode": prompt.mode,
        "method": method.label,
        "context_tokens": len(prompt.context),
        "questions": questions,
        "held_bytes": round(sum(held) / len(held)),
        "full_bytes": round(sum(full) / len(full)),
        "kept_tokens": kept[0],
    }


def prefill(model: PreTrainedModel, ids: Tensor, method: Method, salt: str) -> DynamicCache:
    """The compressed cache of a prompt."""
    press = method.press(len(ids))
    cache = DynamicCache()
    # For RandomPress: the same draw whatever ran before, as a resumed run needs.
    digest = hashlib.sha256(f"{method.seed} {salt}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
    with contextlib.nullcontext() if press is None else press(model):
        model.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    expected = method.kept(len(ids))
    for index, layer in enumerate(cache.layers):
        found = {layer.keys.shape[2], layer.values.shape[2]}
        assert found == {expected}, f"{method.label}: layer {index} keeps {found}, not {expected}"
    return cache


def answer_logits(
    model: PreTrainedModel, cache: DynamicCache, start: int, ask: list[int], answer: list[int]
) -> Tensor:
    """Logits [len(answer), V] that predict the answer; the cache is left as it was."""
    ids = torch.tensor([[*ask, *answer[:-1]]])
    positions = torch.arange(start, start + ids.shape[1])[None]
    # Layers grow by torch.cat, into new tensors: holding on to the old ones undoes it.
    before = [(x.keys, x.values, x.keys._version, x.values._version) for x in cache.layers]
    logits = model(
        input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=len(answer)
    ).logits[0]
    for layer, (keys, values, *versions) in zip(cache.layers, before, strict=True):
        assert layer.keys.shape[2] == keys.shape[2] + ids.shape[1]
        assert [keys._version, values._version] == versions, "a question changed the cache"
        layer.keys, layer.values = keys, values
    return logits


def scores(logits: Tensor, answer: list[int]) -> dict[str, Any]:
    """What one question gets."""
    if not bool(logits.isfinite().all()):
        raise InputError("the model's logits are not finite: nothing can be scored")
    right = torch.tensor(answer)
    hits = logits.argmax(-1) == right
    return {
        "exact": int(hits.all()),
        "token_accuracy": hits.double().mean().item(),
        "nll": torch.nn.functional.cross_entropy(logits.double(), right).item(),
    }


def _tensors(cache: DynamicCache) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def storage_bytes(cache: DynamicCache) -> int:
    """Bytes the cache holds in memory, shared storage once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(cache)]
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


def full_bytes(cache: DynamicCache, tokens: int) -> int:
    """Bytes it would hold with all tokens."""
    return sum(x.numel() // x.shape[2] * tokens * x.element_size() for x in _tensors(cache))


# Files


def read_prompts(path: Path, limit: int | None) -> tuple[dict[str, Any], list[Prompt]]:
    """The model and the prompts of the first `limit` samples, in all their modes."""
    model: dict[str, Any] | None = None
    prompts: list[Prompt] = []
    samples: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if model is None:
                    if (record["schema"], record["kind"]) != (SCHEMA, "kvlib-prompts"):
                        raise ValueError("not a kvlib-prompts file of schema 1")
                    model = dict(record["model"])
                    continue
                prompt = _prompt(record)
            except (ValueError, KeyError, TypeError) as exc:
                raise InputError(f"{path}, line {number}: {type(exc).__name__}: {exc}") from exc
            sample = prompt.key("")[0]
            if limit is None or len(samples) < limit:
                samples.add(sample)
            if sample in samples:
                prompts.append(prompt)
    if model is None:
        raise InputError(f"{path} is empty")
    return model, prompts


def _prompt(record: dict[str, Any]) -> Prompt:
    questions = [Question(q["question"], q["prefix"], q["answer"]) for q in record["questions"]]
    if record["mode"] not in MODES:
        raise ValueError(f"mode {record['mode']!r} is not one of {', '.join(MODES)}")
    if not record["context"] or not questions:
        raise ValueError("no context or no questions")
    if not all(q.prefix and q.answer for q in questions):
        raise ValueError("a question has no prefix or no answer")
    context = torch.tensor(record["context"], dtype=torch.long)
    return Prompt(dict(record["sample"]), record["mode"], context, questions)


def resume(path: Path, header: dict[str, Any]) -> set[tuple[str, str, str]]:
    """What the output holds already; a torn last line is cut off, a new file gets its header.

    Raises:
        InputError: the file is of another model or other versions, or damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        sys.stderr.write(f"{path}: dropped a torn last line of {len(data) - whole} bytes\n")
        with path.open("r+b") as file:
            file.truncate(whole)
    lines = data[:whole].splitlines()
    if not lines:
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return set()
    done = set()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if number == 1:
                found = record
            else:
                key = json.dumps(record["sample"], sort_keys=True), record["mode"]
                done.add((*key, record["method"]))
        except (ValueError, KeyError, TypeError) as exc:
            raise InputError(f"{path}, line {number}: {type(exc).__name__}: {exc}") from exc
    if found != header:
        raise InputError(f"{path} is not of this model and these versions: it begins {found}")
    return done


def run(args: argparse.Namespace) -> None:
    """Score what is missing."""
    labels = [label.strip() for label in args.methods.split(";") if label.strip()]
    methods = [parse_method(label) for label in dict.fromkeys(labels)]
    described, prompts = read_prompts(args.prompts, args.limit)
    if described.get("dtype") not in DTYPES:
        raise InputError(f"dtype {described.get('dtype')!r} is not one of {', '.join(DTYPES)}")
    header = {
        "schema": SCHEMA,
        "kind": "kvlib-samples",
        "model": {name: x for name, x in described.items() if name != "folder"},
        "tool": f"kvpress {version('kvpress')}",
        "transformers": version("transformers"),
        "torch": torch.__version__,
    }
    done = resume(args.out, header)
    work = []
    for prompt in prompts:
        missing = [method for method in methods if prompt.key(method.label) not in done]
        done.update(prompt.key(method.label) for method in missing)
        if missing:
            work.append((prompt, missing))
    sys.stderr.write(f"{len(prompts) - len(work)} of {len(prompts)} contexts are done\n")
    if not work:
        return
    folder = args.model or Path(described["folder"])
    if not folder.is_dir():
        raise InputError(f"there is no model folder {folder}; --model names another")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[described["dtype"]],
        attn_implementation="sdpa",
        local_files_only=True,
    ).eval()
    start, spent = time.monotonic(), 0
    total = sum(prompt.prefilled * len(missing) for prompt, missing in work)
    with args.out.open("a", encoding="utf-8") as out:
        for number, (prompt, missing) in enumerate(work, 1):
            for method in missing:
                out.write(json.dumps(score(model, prompt, method)) + "\n")
                out.flush()
            spent += prompt.prefilled * len(missing)
            elapsed = time.monotonic() - start
            left = timedelta(seconds=round(elapsed / spent * (total - spent)))
            sys.stderr.write(
                f"{number}/{len(work)} contexts, {len(prompt.context)} tokens {prompt.mode}, "
                f"{len(missing)} methods, {elapsed:.0f} s so far, ETA {left}\n"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("prompts", type=Path, help="JSON lines of `kvlib eval export`")
    parser.add_argument("out", type=Path, help="JSON lines, continued if it exists")
    parser.add_argument("--methods", required=True, help="method strings, separated by ';'")
    parser.add_argument("--limit", type=int, help="only the first N samples, in all their modes")
    parser.add_argument("--model", type=Path, help="folder of the same model on this machine")
    torch.set_num_threads(1)
    try:
        run(parser.parse_args())
    except (InputError, OSError) as exc:
        sys.exit(f"run_kvpress: {exc}")


if __name__ == "__main__":
    main()
