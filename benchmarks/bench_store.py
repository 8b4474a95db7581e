# SPDX-License-Identifier: Apache-2.0
"""`KVStore` on disk beside plain files of the same bytes (the limit), in turn.

A 4,096-token prefix of a model with SmolLM2's shape (30 layers, 3 KV heads of 64, float32), random
numbers. Plain files are in the page cache; the store reads past it.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from common import finish, interleave, parser, ratios, summary

from kvlib import KVStore
from kvlib.keys import block_keys
from kvlib.spec import KVSpec, LayerSpec
from kvlib.store.records import BLOCKS_PER_RECORD
from kvlib.testing.models import random_block
from kvlib.testing.tiers import read


def main() -> None:
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder by default"
    )
    options = arguments.parse_args()
    torch.set_num_threads(1)
    layer = LayerSpec(num_kv_heads=3, k_head_dim=64, v_head_dim=64)
    spec = KVSpec(model_id="bench", layers=(layer,) * 30, dtype="float32")
    tokens = list(range(4096))
    keys = block_keys(spec.fingerprint(), tokens)
    block = random_block(spec, 4096)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    results = {}
    try:
        for codec in ("exact", "int8", "int4"):
            with KVStore(folder / codec, memory=0, codec=codec) as store:
                report = store.put(spec, keys, block)
                (tier,) = store._stack.tiers
                found = [read(tier, key) for key in tier.keys()]
                payload = [data for data in found if data is not None]
                if len(payload) != report.stored_blocks // BLOCKS_PER_RECORD:
                    raise SystemExit(f"{len(payload)} records of {report.stored_blocks} blocks")
                plain = folder / f"{codec}-plain"
                plain.mkdir()
                numbers = iter(range(1 << 30))

                def store_put(codec: str = codec, numbers: Iterator[int] = numbers) -> None:
                    fresh = folder / f"{codec}-{next(numbers)}"
                    with KVStore(fresh, memory=0, codec=codec) as other:
                        other.put(spec, keys, block)
                    shutil.rmtree(fresh)

                def plain_write(plain: Path = plain, payload: list[bytes] = payload) -> None:
                    for i, data in enumerate(payload):
                        (plain / str(i)).write_bytes(data)

                def plain_read(plain: Path = plain, payload: list[bytes] = payload) -> None:
                    for i in range(len(payload)):
                        (plain / str(i)).read_bytes()

                times = interleave(
                    {
                        "put": store_put,
                        "plain_write": plain_write,
                        "load": lambda store=store: store.load(spec, keys),
                        "plain_read": plain_read,
                        "match": lambda store=store: store.match(spec, keys),
                    },
                    repeats=options.repeats,
                )
                results[codec] = {
                    "records": len(payload),
                    "stored_bytes": report.stored_bytes,
                    "raw_bytes": report.raw_bytes,
                    "raw_mb_per_s": {
                        name: summary([report.raw_bytes / t / 1e6 for t in times[name]])
                        for name in ("put", "load")
                    },
                    "stored_mb_per_s": {
                        name: summary([report.stored_bytes / t / 1e6 for t in times[name]])
                        for name in ("plain_write", "plain_read")
                    },
                    "put_over_plain_write": ratios(times["put"], times["plain_write"]),
                    "load_over_plain_read": ratios(times["load"], times["plain_read"]),
                    "match_us_per_block": summary([t / len(keys) * 1e6 for t in times["match"]]),
                    "raw_seconds": times,
                }
    finally:
        shutil.rmtree(folder)
    finish("store", {"tokens": len(tokens), "codecs": results}, options.json)


if __name__ == "__main__":
    main()
