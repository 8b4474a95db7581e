# SPDX-License-Identifier: Apache-2.0
"""What a second core adds to decoding: threads of one process, and processes as what is possible.

Records of 256 tokens of SmolLM2's keys and values are decoded by one and by two threads, and by one
and two processes, in turns. Two processes share no interpreter lock, only the machine: the ratio of
the ratios is what the lock costs.
"""

import multiprocessing
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pydoc_data.topics import topics
from typing import Any

import common
import torch
from transformers import DynamicCache

from kvlib.blocks import KVBlock
from kvlib.codecs import build_codec, decode_block, encode_block
from kvlib.model_spec import spec_for_model
from kvlib.smollm2 import load_smollm2

RECORD = 256
SECONDS = 1.0


def sample() -> KVBlock:
    """Keys and values of real text, bfloat16."""
    model, tokenizer = load_smollm2(torch.float32)
    text = "\n\n".join(topics[name] for name in sorted(topics))[20000:]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : 2 * RECORD]
    cache = DynamicCache()
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache)
    spec = replace(spec_for_model(model), dtype="bfloat16")
    layers = [(x.keys[0].bfloat16(), x.values[0].bfloat16()) for x in cache.layers]
    return KVBlock.dense(spec, layers).slice(RECORD, 2 * RECORD)


def decode_for(data: bytes, spec: Any, seconds: float) -> int:
    """Decode a record over and over; how often."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        decode_block(data, spec)
        count += 1
    return count


def with_threads(data: bytes, spec: Any, number: int) -> int:
    """Records decoded by so many threads."""
    with ThreadPoolExecutor(number) as pool:
        return sum(pool.map(lambda _: decode_for(data, spec, SECONDS), range(number)))


def _child(data: bytes, spec: Any, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    decode_block(data, spec)
    barrier.wait()
    queue.put(decode_for(data, spec, SECONDS))


def with_processes(data: bytes, spec: Any, number: int) -> int:
    """Records decoded by so many processes."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(number), context.Queue()
    children = [
        context.Process(target=_child, args=(data, spec, barrier, queue)) for _ in range(number)
    ]
    for child in children:
        child.start()
    total = sum(queue.get() for _ in children)
    for child in children:
        child.join()
    return total


def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--methods", default="exact;kvlc", help="separated by ;")
    args = parser.parse_args()
    torch.set_num_threads(1)
    block = sample()
    result: dict[str, Any] = {}
    for method in args.methods.split(";"):
        data = b"".join(encode_block(block, build_codec(method)))
        decode_block(data, block.spec)
        counts: dict[str, list[int]] = {}
        for _ in range(args.repeats):
            for number in (1, 2):
                for name, run in (("threads", with_threads), ("processes", with_processes)):
                    key = f"{number} {name}"
                    counts.setdefault(key, []).append(run(data, block.spec, number))
        rates = {
            key: sorted(x * block.nbytes / SECONDS / 1e6 for x in found)
            for key, found in counts.items()
        }
        middle = {key: found[len(found) // 2] for key, found in rates.items()}
        name = re.sub(r"[:,]profile=[^,]*", "", method)  # no path of this machine
        result[name] = {
            "mb_per_second": rates,
            "threads": middle["2 threads"] / middle["1 threads"] / 2,
            "processes": middle["2 processes"] / middle["1 processes"] / 2,
        }
        print(
            f"{name}: one thread {middle['1 threads']:.0f} MB/s; efficiency of a second thread "
            f"{result[name]['threads']:.2f}, of a second process {result[name]['processes']:.2f}",
            file=sys.stderr,
        )
    common.finish("threads", result, args.json)


if __name__ == "__main__":
    main()
