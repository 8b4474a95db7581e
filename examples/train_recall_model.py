# SPDX-License-Identifier: Apache-2.0
"""Train a small transformer to recall the value of a key from a prompt of key/value pairs.

The model is a plain two-layer Llama. A recall prompt is ``BOS k1 v1 k2 v2 ... SEP k``, its answer
the value of `k`. It is solved by an induction head: a head of the first layer tells each token what
came before it, and a head of the second layer finds the token that came after the one at hand
(Olsson et al. 2022, "In-context Learning and Induction Heads").

Why a curriculum. Neither head is of use without the other, so the loss hardly falls until chance
has formed a bit of both; then it drops within some tens of steps. A recall prompt has a single
answer to learn from, too little for that to happen soon. A random sequence and the same sequence
again need the same circuit and give one answer per repeated token. So training starts with copying,
and recall, the same circuit on another format, is mixed in when copying works. Lengths vary from
step to step: with a fixed one, attending a fixed distance back would do. Short sequences come
first, as fewer tokens compete in them, but the model does not extrapolate to longer ones: the limit
is doubled each time it is mastered, up to the wanted length.

Usage: ``python examples/train_recall_model.py OUT_FOLDER``. Some minutes of one CPU core. The
folder gets the model (`from_pretrained` loads it) and `training.json`. At one thread, a seed gives
the same weights each time.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

BOS, SEP = 0, 1
"""Ids of the first token and of the separator; all other ids are keys and values."""

TOKENS_PER_STEP = 2048
SHORTEST, FIRST_LENGTH = 16, 129
"""Least tokens of a sequence, and most tokens in the first stage."""
TOKENS_PER_QUESTION = 32
"""In training, a recall prompt is followed by up to one question for so many tokens."""
LEARNING_RATE, LATER_RATE = 2e-3, 1e-3
"""While the heads form, and from then on."""
DECAY = 0.7
"""Of the rate, after each check that fails: a constant one keeps shaking off the last percent."""
WARMUP_STEPS = 50
MASTERED = 0.97
"""Moving average of the accuracy at which training goes on to the next stage."""
GOOD_ENOUGH = 0.995
"""Held-out accuracy, at each number of pairs, that ends training."""
CHECK_EVERY, REPORT_EVERY = 100, 25
CHECK_QUESTIONS, FINAL_QUESTIONS = 256, 512


class Batch(NamedTuple):
    """What goes in, (rows, tokens), and what should come out at `positions`, (rows, positions)."""

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True, slots=True)
class Score:
    """Share of `n` held-out questions about a prompt of `pairs` pairs answered right."""

    pairs: int
    n: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Result:
    """How training ended; `converged` is False if the step limit was hit first."""

    converged: bool
    steps: int
    seconds: float
    scores: tuple[Score, ...]


def make_model(max_tokens: int = 1025, *, seed: int = 0) -> LlamaForCausalLM:
    """An untrained model, with just the ids for a prompt of `max_tokens` without repeats."""
    config = LlamaConfig(
        vocab_size=max_tokens + 3,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _distinct(batch: int, count: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Rows of `count` keys and values, no id twice in a row."""
    return torch.rand(batch, vocab_size - 2, generator=generator).argsort(dim=1)[:, :count] + 2


def copy_batch(rows: int, half: int, vocab_size: int, generator: torch.Generator) -> Batch:
    """``BOS s1 ... sn s1 ... sn`` but for the last token, with what follows in the second half.

    The second `s1` itself cannot be known from what came before.
    """
    row = _distinct(rows, half, vocab_size, generator)
    start = torch.full((rows, 1), BOS)
    positions = torch.arange(half + 1, 2 * half)
    return Batch(torch.cat([start, row, row[:, :-1]], dim=1), positions, row[:, 1:])


def recall_batch(
    rows: int, pairs: int, vocab_size: int, generator: torch.Generator, *, questions: int = 1
) -> Batch:
    """``BOS k1 v1 ... kn vn SEP k`` with the value of `k`; more questions are more ``SEP k``."""
    row = _distinct(rows, 2 * pairs, vocab_size, generator)
    asked = 2 * torch.rand(rows, pairs, generator=generator).argsort(dim=1)[:, :questions]
    start = torch.full((rows, 1), BOS)
    asking = torch.stack([torch.full_like(asked, SEP), row.gather(1, asked)], dim=2).flatten(1)
    positions = torch.arange(2 * pairs + 2, 2 * (pairs + questions) + 1, 2)
    return Batch(torch.cat([start, row, asking], dim=1), positions, row.gather(1, asked + 1))


def answers(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Logits at the batch's positions."""
    return model(input_ids=batch.input_ids, logits_to_keep=batch.positions, use_cache=False).logits


def held_out_pairs(max_tokens: int) -> list[int]:
    """The numbers of pairs to test: some up to the most that fit in `max_tokens`."""
    most = (max_tokens - 3) // 2
    return [pairs for pairs in (16, 64, 256, 500) if pairs < most] + [most]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, pairs: int, n: int, *, seed: int) -> Score:
    """Score on `n` new prompts, each with one question."""
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for first in range(0, n, 16):
        rows = min(16, n - first)
        batch = recall_batch(rows, pairs, model.config.vocab_size, generator)
        right += int((answers(model, batch).argmax(-1) == batch.targets).sum())
    return Score(pairs, n, right / n)


def _good_everywhere(model: LlamaForCausalLM, max_tokens: int, seed: int) -> bool:
    """Whether held-out accuracy is good enough at all lengths; the longest is the last to be."""
    for pairs in reversed(held_out_pairs(max_tokens)):
        score = evaluate(model, pairs, CHECK_QUESTIONS, seed=seed)
        print(
            f"held-out: {score.pairs} pairs, accuracy {score.accuracy:.4f} (n = {score.n})",
            flush=True,
        )
        if score.accuracy < GOOD_ENOUGH:
            return False
    return True


def _training_batch(
    recall: bool, length: int, vocab_size: int, generator: torch.Generator
) -> Batch:
    def between(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    if not recall:
        tokens = between(SHORTEST, length)
        return copy_batch(TOKENS_PER_STEP // tokens, tokens // 2, vocab_size, generator)
    # Half of the prompts have the full length, and some hardly more than one question: otherwise
    # the last pairs of the longest prompts are almost never seen.
    tokens = min(between(SHORTEST, 2 * length), length)
    questions = between(1, -(-tokens // TOKENS_PER_QUESTION))
    pairs = (tokens - 1) // 2 - questions
    rows = TOKENS_PER_STEP // tokens
    return recall_batch(rows, pairs, vocab_size, generator, questions=questions)


def train(
    model: LlamaForCausalLM, *, max_tokens: int = 1025, steps: int = 4000, seed: int = 0
) -> Result:
    """Train in place, until recall is good at all lengths or the steps are used up.

    Args:
        model: of `make_model(max_tokens)`.
        max_tokens: longest sequence, `SHORTEST` or more.
        steps: limit.
        seed: of the data.
    """
    # Seeds of held-out prompts are drawn from the same generator, so that no two sets are alike.
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),  # at 0.999, the steep loss of the phase change is remembered too long
    )
    vocab_size = model.config.vocab_size
    length = min(FIRST_LENGTH, max_tokens)
    later_rate = LATER_RATE
    with_recall, converged, average, step = False, False, 0.0, 0
    start = time.perf_counter()

    def new_seed() -> int:
        return int(torch.randint(2**31, (1,), generator=generator))

    while step < steps and not converged:
        step += 1
        recall = with_recall and step % 2 == 1
        batch = _training_batch(recall, length, vocab_size, generator)
        logits = answers(model, batch)
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        warm = LEARNING_RATE * min(1, step / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = later_rate if with_recall else warm
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        accuracy = (logits.argmax(-1) == batch.targets).float().mean().item()
        average += 0.05 * (accuracy - average)
        if step % REPORT_EVERY == 0:
            print(
                f"step {step} ({'recall' if recall else 'copy'}): loss {loss.item():.3f}, "
                f"average accuracy {average:.3f}, length {length}, "
                f"{time.perf_counter() - start:.1f} s",
                flush=True,
            )
        if average <= MASTERED:
            continue
        if not with_recall:
            with_recall, average = True, 0.0
        elif length < max_tokens:
            length, average = min(2 * length, max_tokens), 0.0
        elif step % CHECK_EVERY == 0:
            converged = _good_everywhere(model, max_tokens, new_seed())
            later_rate *= DECAY
    seconds = time.perf_counter() - start
    # Not the scores that ended training, which are picked for being high.
    scores = tuple(
        evaluate(model, pairs, FINAL_QUESTIONS, seed=new_seed())
        for pairs in held_out_pairs(max_tokens)
    )
    return Result(converged, step, seconds, scores)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and save; 1 if the step limit was hit first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out_folder", type=Path, metavar="OUT_FOLDER", help="new or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=1025, help="of the longest prompt")
    parser.add_argument("--steps", type=int, default=4000, help="limit")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.max_tokens < SHORTEST or args.max_tokens > TOKENS_PER_STEP:
        parser.error(f"--max-tokens: from {SHORTEST} to {TOKENS_PER_STEP} are possible")
    out: Path = args.out_folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} is not an empty folder")

    torch.set_num_threads(args.threads)
    model = make_model(args.max_tokens, seed=args.seed)
    print(f"{model.num_parameters():,} parameters")
    result = train(model, max_tokens=args.max_tokens, steps=args.steps, seed=args.seed)
    for score in result.scores:
        print(f"{score.pairs:4} pairs: accuracy {score.accuracy:.4f} (n = {score.n})")
    if not result.converged:
        print(
            f"not saved: after {result.steps} steps, recall is below {GOOD_ENOUGH} at some length; "
            "more --steps or another --seed may help",
            file=sys.stderr,
        )
        return 1

    model.save_pretrained(out)
    settings = {name: getattr(args, name) for name in ("seed", "max_tokens", "steps", "threads")}
    record = {"settings": settings, "parameters": model.num_parameters(), **asdict(result)}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"saved to {out} after {result.steps} steps, {result.seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
