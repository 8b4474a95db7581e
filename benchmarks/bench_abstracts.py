# SPDX-License-Identifier: Apache-2.0
"""Restoring a prompt into a `TieredCache`: abstracts out of the store, or made anew from the keys.

Random keys and values in SmolLM2's shape (30 layers, 3 KV heads of 64 channels, float32), in a
segment store on disk; CPU time is that of all threads. `made` and `stored` are the two ways to
come by the abstracts alone, in the pieces that a restore has; `restore_made` and `restore_stored`
the whole of `TieredCache.prefill`, and `restore_bare` the same without abstracts (`select=full`).
The cases take turns.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

import kvlib
from kvlib.artefacts import model_identity, save_artefact
from kvlib.blocks import KVBlock
from kvlib.model_spec import spec_for_model
from kvlib.store.abstracts_book import CHECKSUM, KIND, checksum, tensors_of
from kvlib.store.abstracts_pq import Codebook
from kvlib.store.selecting import SELECTORS, HeadShape, Selection
from kvlib.testing.models import tiny_model

LAYERS, HEADS, DIM, PIECE = 30, 3, 64, 4


def write_profile(file: Path, identity: str) -> None:
    """Codebooks of random keys: what they are worth does not matter here."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(HEADS, 512, DIM, generator=g)
    book = Codebook.train(keys, torch.eye(DIM).expand(HEADS, DIM, DIM), samples=512, rounds=1)
    tensors = tensors_of([book] * LAYERS)
    settings = {CHECKSUM: checksum(identity, {}, tensors)}
    save_artefact(file, kind=KIND, model=identity, tensors=tensors, settings=settings)


def measure(path: Path, select: str, model: Any, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds and bytes of one method."""
    g = torch.Generator().manual_seed(0)
    spec = spec_for_model(model, model_id="random")
    ids = torch.randint(0, model.config.vocab_size, (tokens + 1,), generator=g)
    pairs = [
        (torch.randn(HEADS, tokens, DIM, generator=g), torch.randn(HEADS, tokens, DIM, generator=g))
        for _ in range(LAYERS)
    ]
    method = SELECTORS.build(select)
    with kvlib.KVStore(path, memory=0) as store:
        names = store.block_keys(spec, ids)
        store.put(spec, names, KVBlock.dense(spec, pairs))
        bare = store.stats().tiers["segment"].used_bytes

        def restore(select: str, *, save: bool = False) -> int:
            cache = kvlib.TieredCache(
                model, store=store, model_id="random", resident="64MiB", select=select
            )
            report = cache.prefill(ids, save=save)
            cache.close()
            return report.abstract_tokens

        def alone(*, stored: bool) -> None:
            selection = Selection(method, HeadShape(9, HEADS, DIM, 1.0), LAYERS)
            for at in range(0, len(names), PIECE):
                some = slice(at * 64, (at + PIECE) * 64)
                found = None
                if stored:
                    found = store.load_abstracts(spec, names[: at + PIECE], method.form, start=at)
                for layer in range(LAYERS):
                    if found is not None:
                        selection.extend(layer, found.layers[layer])
                    else:
                        selection.append(layer, pairs[layer][0][:, some])

        cases: dict[str, Callable[[], object]] = {
            "made": lambda: alone(stored=False),
            "restore_bare": lambda: restore("full"),
            "restore_made": lambda: restore(select),
        }
        times: dict[str, list[float]] = {}

        def run(cases: dict[str, Callable[[], object]]) -> None:
            for _ in range(repeats):
                for name, case in cases.items():
                    begun = time.process_time()
                    case()
                    times.setdefault(name, []).append(time.process_time() - begun)

        run(cases)
        assert restore(select, save=True) == 0
        run({"stored": lambda: alone(stored=True), "restore_stored": lambda: restore(select)})
        assert restore(select) == tokens
        used = store.stats().tiers["segment"].used_bytes - bare
    seconds = {name: statistics.median(x) for name, x in times.items()}
    return {"cpu_s": seconds, "bytes": used, "share_of_kv": used / bare}


def main() -> None:
    """Run and report."""
    parser = common.parser(__doc__, repeats=5)
    parser.add_argument("--tokens", type=int, default=8000, help="a multiple of 64")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_model(
        num_hidden_layers=LAYERS,
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=args.tokens + 1,
    )
    result: dict[str, Any] = {"tokens": args.tokens}
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "p"
        write_profile(profile, model_identity(spec_for_model(model, model_id="random")))
        methods = {"boxes": "leoam", "codes": f"leoam:codes=8,profile={profile}"}
        for name, select in methods.items():
            path = Path(folder) / name
            result[name] = measure(path, select, model, args.tokens, args.repeats)
    common.finish("abstracts", result, args.json)


if __name__ == "__main__":
    main()
