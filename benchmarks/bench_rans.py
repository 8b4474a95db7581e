# SPDX-License-Identifier: Apache-2.0
"""The entropy coder of each backend, beside constriction's ANS coder and zstandard.

60 streams of 256 x 192 symbols, one call for all. "classes": the parametric tables, standard
deviations from 0.3 to 3. "tables": 192 different rows of 256 symbols, one for each column. Besides
the usual wall time there is that of the thread, which a busy machine changes less. "numba, lanes
alone" is what runs where the processor has no AVX-512.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import constriction
import numpy as np
import torch
import zstandard
from common import finish, interleave, parser, summary

from kvlib.codecs import rans, rans_numba
from kvlib.codecs.rans_tables import Tables, class_sigmas

STREAMS, TOKENS, CHANNELS, LANES = 60, 256, 192, 64


def normal_tables(rng: np.random.Generator, rows: int, alphabet: int) -> Tables:
    """Normal distributions of many widths, every symbol possible."""
    sigma = rng.uniform(2, 30, (rows, 1))
    p = np.exp(-(((np.arange(alphabet) - alphabet / 2) / sigma) ** 2) / 2)
    f = 1 + (p / p.sum(1, keepdims=True) * (4096 - alphabet)).astype(np.int64)
    f[:, alphabet // 2] += 4096 - f.sum(1)
    return Tables(f)


def inputs(rng: np.random.Generator, tables: Tables, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Symbols with the frequencies of their rows."""
    p = tables.frequencies / 4096
    draw = [[rng.choice(tables.alphabet, TOKENS, p=p[r]) for r in row] for row in rows]
    return [np.ascontiguousarray(np.array(columns, np.uint8).T) for columns in draw]


def cases_of(symbols: list[np.ndarray], rows: list[np.ndarray], tables: Tables) -> dict:
    """What is timed."""
    lanes, shapes = [LANES] * len(symbols), [x.shape for x in symbols]
    coded = rans.encode(symbols, rows, tables, lanes, "numpy")
    out = [np.empty(shape, np.uint8) for shape in shapes]
    cases: dict[str, Callable[[], object]] = {}
    for b in ("numba", "numpy", "torch"):
        assert all(map(np.array_equal, rans.decode(coded, shapes, rows, tables, b), symbols))
        cases[f"{b} encode"] = lambda b=b: rans.encode(symbols, rows, tables, lanes, b)
        cases[f"{b} decode"] = lambda b=b: rans.decode(coded, shapes, rows, tables, b, out)
    for what in ("encode", "decode"):
        cases[f"numba, lanes alone {what}"] = lambda run=cases[f"numba {what}"]: without_vectors(
            run
        )
    pool = ThreadPoolExecutor(2)
    halves = [slice(0, len(symbols) // 2), slice(len(symbols) // 2, None)]

    def both() -> None:
        decode = lambda h: rans.decode(coded[h], shapes[h], rows[h], tables, "numba", out[h])  # noqa: E731
        list(pool.map(decode, halves))

    cases["numba decode, 2 threads"] = both
    joined = np.stack(symbols)
    packed = zstandard.ZstdCompressor(level=1).compress(joined.data)
    cases["zstd1 encode"] = lambda: zstandard.ZstdCompressor(level=1).compress(joined.data)
    cases["zstd1 decode"] = lambda: zstandard.ZstdDecompressor().decompress(packed)
    models, grouped = peer_input(symbols, rows, tables)

    def encode_peer():
        coder = constriction.stream.stack.AnsCoder()
        for model, part in zip(models, grouped, strict=True):
            coder.encode_reverse(part, model)
        return coder

    peer = encode_peer()

    def decode_peer() -> None:
        coder = peer.clone()
        for model, part in zip(models[::-1], grouped[::-1], strict=True):
            coder.decode(model, part.size)

    cases |= {"constriction encode": encode_peer, "constriction decode": decode_peer}
    bits = -sum(
        float(np.log2(tables.frequencies[r, x] / 4096).sum())
        for x, r in zip(symbols, rows, strict=True)
    )
    size = joined.size
    return {
        "cases": cases,
        "bits_per_symbol": {
            "entropy": bits / size,
            "kvlib": 8 * sum(c.nbytes for c in coded) / size,
            "constriction": peer.num_bits() / size,
            "zstd1": 8 * len(packed) / size,
        },
    }


def without_vectors(run: Callable[[], object]) -> None:
    """Do it with the other kernels, compiled before anything is timed."""
    kernels = rans_numba.KERNELS
    rans_numba.KERNELS = rans_numba.kernels(False)
    try:
        run()
    finally:
        rans_numba.KERNELS = kernels


def peer_input(symbols: list[np.ndarray], rows: list[np.ndarray], tables: Tables) -> tuple:
    """The symbols row by row of the tables, as that coder wants them."""
    x = np.concatenate(symbols, axis=1)
    row = np.concatenate(rows)
    models, grouped = [], []
    for r in np.unique(row):
        f = tables.frequencies[r]
        present = np.flatnonzero(f)
        part = np.searchsorted(present, x[:, row == r].ravel()).astype(np.int32)
        grouped.append(part)
        p = f[present] / 4096
        models.append(constriction.stream.model.Categorical(p, perfect=False))
    return models, grouped


def main() -> None:
    arguments = parser(__doc__, repeats=15).parse_args()
    torch.set_num_threads(1)
    rans_numba.kernels(False)
    rng = np.random.default_rng(0)
    wanted = np.exp(rng.uniform(np.log(0.3), np.log(3), (STREAMS, CHANNELS)))
    classes = np.abs(np.log(class_sigmas()) - np.log(wanted)[..., None]).argmin(-1)
    own = normal_tables(rng, CHANNELS, 256)
    results = {}
    for name, tables, rows in (
        ("classes", rans.GAUSSIAN, list(classes)),
        ("tables", own, [np.arange(CHANNELS)] * STREAMS),
    ):
        made = cases_of(inputs(rng, tables, rows), rows, tables)
        cpu: dict[str, list[float]] = {case: [] for case in made["cases"]}

        def timed(case: str, run: Callable[[], object], cpu=cpu) -> None:
            start = time.thread_time()
            run()
            cpu[case].append(time.thread_time() - start)

        times = interleave(
            {case: lambda c=case, r=run: timed(c, r) for case, run in made["cases"].items()},
            repeats=arguments.repeats,
        )
        count = STREAMS * TOKENS * CHANNELS
        results[name] = {
            "bits_per_symbol": made["bits_per_symbol"],
            "million_symbols_per_s": {
                case: summary([count / t / 1e6 for t in values]) for case, values in times.items()
            },
            "million_symbols_per_cpu_s": {
                case: summary([count / t / 1e6 for t in values[1:]])
                for case, values in cpu.items()
                if "threads" not in case
            },
            "raw_seconds": times,
        }
    versions = {name: version(name) for name in ("numba", "constriction")}
    finish("rans", {"lanes": LANES, "versions": versions, "inputs": results}, arguments.json)


if __name__ == "__main__":
    main()
