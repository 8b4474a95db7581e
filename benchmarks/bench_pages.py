# SPDX-License-Identifier: Apache-2.0
"""Records of 256 tokens into vLLM's CPU pages, beside copying as many bytes (the limit).

4,096 tokens in SmolLM2's shape, float32: 30 layers, 3 KV heads of 64 channels, pages of 32 tokens.
"""

import torch
from common import finish, interleave, parser, ratios, summary

from kvlib.connectors.layouts import Pages, VecPages

LAYERS, HEADS, DIM, SIZE, RECORDS, TOKENS = 30, 3, 64, 32, 16, 256


def main() -> None:
    arguments = parser(__doc__, repeats=15).parse_args()
    torch.set_num_threads(1)
    views = [torch.zeros(200, HEADS, SIZE, 2 * DIM) for _ in range(LAYERS)]
    records = [
        [tuple(torch.randn(2, HEADS, TOKENS, DIM)) for _ in range(LAYERS)] for _ in range(RECORDS)
    ]
    cuts = (torch.arange(RECORDS * TOKENS // SIZE) + 7).split(TOKENS // SIZE)
    parts = list(zip(cuts, records, strict=True))
    target = torch.empty(HEADS, TOKENS, DIM)
    rooms = [target.clone() for _ in range(2 * LAYERS * RECORDS)]
    flat = [x for record in records for pair in record for x in pair]

    def copy() -> None:
        for room, x in zip(rooms, flat, strict=True):
            room.copy_(x)

    compiled, plain = (Pages(views, VecPages(compiled=x)) for x in (True, False))
    times = interleave(
        {
            "compiled": lambda: compiled.write_parts(parts),
            "torch": lambda: plain.write_parts(parts),
            "copy_limit": copy,
        },
        repeats=arguments.repeats,
    )
    nbytes = sum(x.nbytes for x in flat)
    finish(
        "pages",
        {
            "bytes": nbytes,
            "gb_per_s": {k: summary([nbytes / t / 1e9 for t in v]) for k, v in times.items()},
            "of_copying": {k: ratios(times[k], times["copy_limit"]) for k in ("compiled", "torch")},
            "raw_seconds": times,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
