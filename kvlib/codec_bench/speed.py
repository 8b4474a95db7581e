# SPDX-License-Identifier: Apache-2.0
"""How fast codecs are on one core.

All codecs take turns, so that a machine that slows down hits them alike, and each encodes and
decodes the same blocks. Beside wall time stands the CPU time of the thread, which does not count
what a busy machine took away; and that of the process, which betrays a codec that uses more cores.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kvlib.blocks import KVBlock
from kvlib.codec_bench.measure import decode_with
from kvlib.codecs import Codec, encode_block
from kvlib.codecs.base import raw_view

__all__ = ["Times", "measure_speeds"]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of every repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)

    @contextmanager
    def take(self, *, keep: bool) -> Iterator[None]:
        """Time what is inside; forget it unless `keep`."""
        process, cpu, wall = time.process_time(), time.thread_time(), time.perf_counter()
        yield
        if keep:
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.thread_time() - cpu)
            self.process.append(time.process_time() - process)

    def summary(self, raw_bytes: int) -> dict[str, Any]:
        """Megabytes of raw KV a second: of CPU time and of wall time; and the seconds."""
        return {
            "mb_per_cpu_s": _speeds(raw_bytes, self.cpu),
            "mb_per_s": _speeds(raw_bytes, self.wall),
            "cores": round(statistics.median(self.process) / _least(self.cpu), 2),
            "wall_s": self.wall,
            "cpu_s": self.cpu,
        }


def _least(seconds: Sequence[float]) -> float:
    return max(statistics.median(seconds), 1e-9)


def _speeds(raw_bytes: int, seconds: Sequence[float]) -> dict[str, float]:
    each = [raw_bytes / max(s, 1e-9) / 1e6 for s in seconds]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def measure_speeds(
    codecs: Mapping[str, Codec],
    blocks: Sequence[KVBlock],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[dict[str, tuple[Times, Times]], Times, int]:
    """Time encoding and decoding of some blocks, on one thread.

    Args:
        codecs: by any name.
        blocks: of one model.
        repeats: measured, after one that is not.
        tick: called after each codec's turn.

    Returns:
        Encoding and decoding times by name, those of copying the same bytes, and how many bytes
        these are.
    """
    spec = blocks[0].spec
    flat = np.concatenate(
        [raw_view(x.contiguous()).ravel() for b in blocks for y in b.layers
         for x in (y.keys, y.values)]
    )  # fmt: skip
    target = np.empty_like(flat)
    times = {name: (Times(), Times()) for name in codecs}
    copies = Times()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(1 + repeats):
            keep = turn > 0
            with copies.take(keep=keep):
                np.copyto(target, flat)
            for name, codec in codecs.items():
                encoding, decoding = times[name]
                with encoding.take(keep=keep):
                    records = [b"".join(encode_block(block, codec)) for block in blocks]
                with decoding.take(keep=keep):
                    decode_with(codec, records, spec)
                tick()
    finally:
        torch.set_num_threads(threads)
    return times, copies, flat.nbytes
