# SPDX-License-Identifier: Apache-2.0
"""Chained block keys in tokens per second, beside one BLAKE2b over all bytes (the limit)."""

from hashlib import blake2b

import numpy as np
from common import finish, interleave, parser, summary

from kvlib.keys import block_keys
from kvlib.spec import KVSpec, LayerSpec


def main() -> None:
    arguments = parser(__doc__, repeats=15).parse_args()
    spec = KVSpec(
        model_id="bench",
        layers=(LayerSpec(num_kv_heads=8, k_head_dim=128, v_head_dim=128),),
        dtype="bfloat16",
    )
    fingerprint = spec.fingerprint()
    count = 1 << 20
    ids = np.random.default_rng(0).integers(0, 128_000, count, dtype=np.int64)
    as_list = ids.tolist()
    data = ids.astype("<u4").tobytes()
    times = interleave(
        {
            "numpy_int64": lambda: block_keys(fingerprint, ids),
            "list": lambda: block_keys(fingerprint, as_list),
            "blake2b_limit": lambda: blake2b(data, digest_size=32).digest(),
        },
        repeats=arguments.repeats,
    )
    speed = {name: summary([count / t / 1e6 for t in values]) for name, values in times.items()}
    finish(
        "keys",
        {"tokens": count, "million_tokens_per_s": speed, "raw_seconds": times},
        arguments.json,
    )


if __name__ == "__main__":
    main()
