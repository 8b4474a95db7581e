# SPDX-License-Identifier: Apache-2.0
"""Score kvpress on prompts that `kvlib eval export` wrote: same tokens, same model, same budgets.

Runs in an environment of its own (requirements.txt beside this file) and imports nothing of kvlib;
`kvpress_methods` reads the method strings. Answers are teacher-forced: what follows the compressed
prompt is one forward pass, at the positions it would have had without compression.

The output is JSON lines: a header, then one line per sample, mode and method, written as soon as it
is known. Run again, the script continues where it stopped.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress_methods import InputError, Method, Shape, parse_method
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

SCHEMA = 1
MODES = ("unaware", "aware")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

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
    shape = Shape.of(model)
    questions, held, full, left = [], [], [], []
    try:
        for index, (ids, asks) in enumerate(rounds):
            cache, mine = prefill(model, ids, method, shape, f"{prompt.key('')} {index}")
            left.append(mine)
            held.append(storage_bytes(cache))
            full.append(full_bytes(cache, len(ids)))
            questions += [
                scores(answer_logits(model, cache, len(ids), ask, answer), answer)
                for ask, answer in asks
            ]
    finally:
        forget_masks(model)
    return {
        "sample": prompt.sample,
        "mode": prompt.mode,
        "method": method.label,
        "context_tokens": len(prompt.context),
        "questions": questions,
        "held_bytes": round(sum(held) / len(held)),
        "full_bytes": round(sum(full) / len(full)),
        "kept_share": sum(mine.share for mine in left) / len(left),
        "kept_tokens": left[0].tokens,
    }


@dataclass(frozen=True)
class Left:
    """What attention still reads: its share of all numbers, and entries by layer.

    Where heads of a layer differ it is a list, by head.
    """

    share: float
    tokens: list[int | list[int]]


def prefill(
    model: PreTrainedModel, ids: Tensor, method: Method, shape: Shape, salt: str
) -> tuple[DynamicCache, Left]:
    """The compressed cache of a prompt, checked against what kvlib means by the method."""
    shape = replace(shape, tokens=len(ids), kept=method.kept(len(ids)))
    press = method.press(shape)
    cache = DynamicCache()
    # For RandomPress: the same draw whatever ran before, as a resumed run needs.
    digest = hashlib.sha256(f"{method.seed} {salt}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
    with contextlib.nullcontext() if press is None else press(model):
        # By name: KVzipPress reads these two from the keyword arguments.
        model.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    counts = [
        entries(layer, block) for layer, block in zip(cache.layers, blocks(model), strict=True)
    ]
    zeroed = {0} if method.channels is None else zero_channels(cache)
    method.check(counts, zeroed, shape)
    share = sum(map(sum, counts)) / (shape.layers * shape.heads * shape.tokens)
    share *= 1 - max(zeroed) / (2 * shape.width)  # of keys and values
    tokens = [heads[0] if len(set(heads)) == 1 else heads for heads in counts]
    return cache, Left(share, tokens)


def blocks(model: PreTrainedModel) -> Iterator[Any]:
    """The attention modules, by layer."""
    for layer in model.model.layers:
        yield layer.self_attn


def entries(layer: Any, block: Any) -> list[int]:
    """Entries that attention reads of each head: those that are held and not masked."""
    heads, held = layer.keys.shape[1:3]
    assert layer.values.shape[2] == held
    counts = [held] * heads
    masked = getattr(block, "masked_key_indices", None)
    if masked is not None:
        rows, columns = masked[1].cpu(), masked[2].cpu()
        assert bool((columns < held).all())
        assert len(torch.unique(rows * held + columns)) == len(rows), "an entry is masked twice"
        gone = torch.bincount(rows, minlength=heads).tolist()
        counts = [n - out for n, out in zip(counts, gone, strict=True)]
    return counts


def zero_channels(cache: DynamicCache) -> set[int]:
    """How many channels of all keys of a head are zero, as far as heads differ."""
    zero = [(layer.keys == 0).all(dim=2).sum(dim=-1).flatten() for layer in cache.layers]
    return set(torch.cat(zero).tolist())


def forget_masks(model: PreTrainedModel) -> None:
    """Head-wise presses leave their masks on the modules, for every question that follows."""
    for block in blocks(model):
        block.masked_key_indices = None


def answer_logits(
    model: PreTrainedModel, cache: DynamicCache, start: int, ask: list[int], answer: list[int]
) -> Tensor:
    """Logits [len(answer), V] that predict the answer; the cache is left as it was."""
    ids = torch.tensor([[*ask, *answer[:-1]]])
    positions = torch.arange(start, start + ids.shape[1])[None]
    # Layers grow by torch.cat, into new tensors: holding on to the old ones undoes it.
    before = [(x.keys, x.values, x.keys._version, x.values._version) for x in cache.layers]
    # One mask serves all layers, with the length of the first: a pyramid takes one token at a time.
    uneven = len({x.keys.shape[2] for x in cache.layers}) > 1
    size = 1 if uneven else ids.shape[1]
    pieces = [
        model(
            input_ids=piece,
            position_ids=places,
            past_key_values=cache,
            logits_to_keep=len(answer),
        ).logits[0]
        for piece, places in zip(ids.split(size, 1), positions.split(size, 1), strict=True)
    ]
    logits = torch.cat(pieces)[-len(answer) :]
    rows = zip(cache.layers, before, blocks(model), strict=True)
    for layer, (keys, values, *versions), block in rows:
        assert layer.keys.shape[2] == keys.shape[2] + ids.shape[1]
        assert [keys._version, values._version] == versions, "a question changed the cache"
        masked = getattr(block, "masked_key_indices", None)
        if masked is not None:  # what attention read in their place
            same = (layer.keys[masked] == keys[masked]).all(-1)
            assert not bool(same.any()), "a masked key was read"
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
    disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzipPress warns each time it is made
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
