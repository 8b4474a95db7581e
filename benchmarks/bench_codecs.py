# SPDX-License-Identifier: Apache-2.0
"""Codecs on real KV, beside memcpy (the limit) and plain zstandard (a peer).

KV of SmolLM2-135M over 2,048 tokens of `pydoc_data.topics`, in records of 256 tokens, one thread.
"""

import numpy as np
import torch
import zstandard
from common import finish, interleave, parser, summary

from kvlib.blocks import KVBlock
from kvlib.codecs import build_codec, decode_block, describe_codec, encode_block
from kvlib.demo.prompt import demo_prompt
from kvlib.model_spec import spec_for_model
from kvlib.smollm2 import load_smollm2

METHODS = ("exact", "int8", "int4", "int4:group=64")


def main() -> None:
    arguments = parser(__doc__, repeats=5).parse_args()
    torch.set_num_threads(1)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_smollm2(torch.float32)
        ids = torch.tensor([demo_prompt(tokenizer, 2048)[0]])
        with torch.no_grad():
            cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
        spec = spec_for_model(model.to(dtype))
        pairs = [(x.keys[0].to(dtype), x.values[0].to(dtype)) for x in cache.layers]
        blocks = KVBlock.dense(spec, pairs).split(*range(256, 2048, 256))
        raw = sum(block.nbytes for block in blocks)
        flat = np.concatenate(
            [x.contiguous().view(torch.uint8).numpy().ravel() for pair in pairs for x in pair]
        )
        packed = zstandard.ZstdCompressor(level=3).compress(flat.data)
        cases = {
            "memcpy": flat.copy,
            "zstd3_encode": lambda flat=flat: zstandard.ZstdCompressor(level=3).compress(flat.data),
            "zstd3_decode": lambda packed=packed: zstandard.ZstdDecompressor().decompress(packed),
        }
        sizes = {"zstd3": len(packed)}
        errors = {}
        for method in METHODS:
            codec = build_codec(method)
            name = describe_codec(codec)
            records = [b"".join(encode_block(block, codec)) for block in blocks]
            sizes[name] = sum(map(len, records))
            decoded = [decode_block(record, spec) for record in records]
            if codec.lossless:
                assert all(a.equal(b) for a, b in zip(decoded, blocks, strict=True))
            errors[name] = _relative_error(blocks, decoded)
            cases[f"{name} encode"] = lambda codec=codec, blocks=blocks: [
                encode_block(b, codec) for b in blocks
            ]
            cases[f"{name} decode"] = lambda records=records, spec=spec: [
                decode_block(r, spec) for r in records
            ]
        times = interleave(cases, repeats=arguments.repeats)
        results[str(dtype).removeprefix("torch.")] = {
            "raw_bytes": raw,
            "ratio": {name: raw / size for name, size in sizes.items()},
            "bits_per_value": {
                name: 8 * size / (raw / dtype.itemsize) for name, size in sizes.items()
            },
            "relative_error": errors,
            "mb_per_s": {
                name: summary([raw / t / 1e6 for t in values]) for name, values in times.items()
            },
            "raw_seconds": times,
        }
    finish("codecs", {"tokens": 2048, "dtypes": results}, arguments.json)


def _relative_error(blocks: list[KVBlock], decoded: list[KVBlock]) -> dict[str, float]:
    """Frobenius norm of the error over that of the tensor, keys and values apart."""
    out = {}
    for name in ("keys", "values"):
        lost = whole = 0.0
        for a, b in zip(blocks, decoded, strict=True):
            for x, y in zip(a.layers, b.layers, strict=True):
                true = getattr(x, name).double()
                lost += float((true - getattr(y, name).double()).square().sum())
                whole += float(true.square().sum())
        out[name] = (lost / whole) ** 0.5
    return out


if __name__ == "__main__":
    main()
