# SPDX-License-Identifier: Apache-2.0
"""What EpiCache holds while it prefills a long conversation, and where it sends questions.

A conversation of so many tokens on a few topics, utterances of one topic in a row, is taken into an
`EpisodicCache` with the model's own embeddings. The most bytes that the layers of one cache held at
any time are compared with what the budget, one block and the patched prompt would take, and with
the full cache. A question about each topic should go to an episode that holds most of its segments.
"""

import sys
import time
from pydoc_data.topics import topics
from typing import Any

import common
import torch

import kvlib
from kvlib.eviction.epicache import INSTRUCTION
from kvlib.eviction.words import end_of_turn, token_ids
from kvlib.smollm2 import load_smollm2

TOPICS = ("with", "import", "lambda", "formatstrings", "slicings", "exceptions")
SEGMENT = 4


def utterances(tokenizer: Any, tokens: int) -> list[tuple[str, str]]:
    """Topic and text of each utterance; all topics get an equal part of the tokens."""
    said = []
    for topic in TOPICS:
        spent, paragraphs = 0, [x.strip() for x in topics[topic].split("\n\n") if x.strip()]
        mine: list[tuple[str, str]] = []
        while spent < tokens // len(TOPICS):
            text = f"Ann said about {topic}: {paragraphs[len(mine) % len(paragraphs)]}"
            mine.append((topic, text))
            spent += len(tokenizer.encode(text, add_special_tokens=False)) + 1
        said += mine[: len(mine) - len(mine) % SEGMENT] or mine
    return said


def routed(cache: kvlib.EpisodicCache, said: list[tuple[str, str]], topic: str) -> bool:
    """Whether the question goes where no other episode has more of the topic's segments."""
    of_segment = [said[i][0] for i in range(0, len(said), SEGMENT)]
    counts = [sum(of_segment[i] == topic for i in episode.segments) for episode in cache.episodes]
    return counts[cache.route(f"What did Ann say about {topic}?")] == max(counts)


def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=1)
    parser.add_argument("--tokens", type=int, default=7500)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--episodes", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    said = utterances(tokenizer, args.tokens)
    cache = kvlib.EpisodicCache(
        model,
        tokenizer,
        budget=args.budget,
        block=args.block,
        episodes=args.episodes,
        segment=SEGMENT,
    )

    def progress(done: int, total: int) -> None:
        print(f"\r{done} of {total} blocks", end="", file=sys.stderr, flush=True)

    start = time.perf_counter()
    cache.build([text for _, text in said], progress=progress)
    seconds = time.perf_counter() - start
    config = model.config
    entry = 2 * config.head_dim * 4 + 4  # keys, values, position
    token = config.num_hidden_layers * config.num_key_value_heads * entry
    typical = [cache.segments[i] for episode in cache.episodes for i in episode.typical]
    patches = [token_ids(tokenizer, INSTRUCTION + end_of_turn(tokenizer) + x) for x in typical]
    patch = min(len(x) for x in patches)  # the bound is to hold for the shortest one
    history = len(token_ids(tokenizer, "\n".join(text for _, text in said)))
    result = {
        "model": "smollm2",
        "threads": 1,
        "history_tokens": history,
        "utterances": len(said),
        "budget": args.budget,
        "block": args.block,
        "patch_tokens": [len(x) for x in patches],
        "episodes": len(cache.episodes),
        "peak_bytes": cache.peak_bytes,
        "budget_and_block_bytes": (args.budget + args.block) * token,
        "bound_bytes": (args.budget + args.block + patch) * token,
        "full_bytes": history * token,
        "held_bytes": cache.nbytes,
        "seconds": seconds,
        "routed": {topic: routed(cache, said, topic) for topic in TOPICS},
    }
    print(
        f"\n{history} tokens: at most {cache.peak_bytes / 1e6:.1f} MB, budget and block "
        f"{result['budget_and_block_bytes'] / 1e6:.1f}, with the patched prompt "
        f"{result['bound_bytes'] / 1e6:.1f}, all {result['full_bytes'] / 1e6:.1f}; "
        f"{sum(result['routed'].values())} of {len(TOPICS)} questions routed",
        file=sys.stderr,
    )
    common.finish("episodes", result, args.json)


if __name__ == "__main__":
    main()
