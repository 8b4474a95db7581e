# SPDX-License-Identifier: Apache-2.0
"""Rules that choose encoding levels over a link: who meets the SLO, at which quality (simulated).

An 8B model's KV (128 KiB a token in bfloat16) at five levels; prefill of 8,000 tokens/s, decoding
at 4 GB/s. A load of n divides the link and the accelerator by n. SLOs are shares of the time that
recomputing the context takes at load 1. The divergences of the levels are parameters, not
measurements. "optimum" knows the trace. "two-sided" is no rule but a bound for another design,
which knows it too: the front is recomputed while the tail is fetched.
"""

import math
import random
import statistics
from collections.abc import Iterator
from typing import Any

from common import finish, parser

from kvlib.codecs.stream_baselines import ArtefactRule, FixedLevel, PaperRule
from kvlib.codecs.stream_trace import ChunkTrace, Outcome, TimeTrace, Trace, best_plan, simulate
from kvlib.codecs.streaming import ChunkOffer, Context, LinkEstimate, StreamController, StreamRule

BITS = (2.56, 2.12, 1.73, 1.36, 1.06)
DIVERGENCE = (0.0015, 0.003, 0.006, 0.012, 0.024)
VALUES_PER_TOKEN = 65_536
PREFILL_TOKENS_PER_S = 8000
DECODE_BYTES_PER_S = 4e9
GBIT = 1e9 / 8
CONTEXTS = (4096, 16384, 32768)
CHUNKS = (256, 1536)
SLO_SHARES = (0.4, 0.7, 1.2, 2.0)
LOADS = (1, 2)
TRACES = ("constant", "uniform", "drop", "markov", "sinusoid")
KNOWN_CHUNKS = 8  # fetched before, where the link is known

# rule, gain of the estimate (the paper's is that of the last chunk alone), whether it is shown the
# true rate of the next chunk
RULES: dict[str, tuple[StreamRule, float, bool]] = {
    "kvlib": (StreamController(), 0.25, False),
    "kvlib reserve=0": (StreamController(reserve=0), 0.25, False),
    "kvlib deviations=0 reserve=0": (StreamController(deviations=0, reserve=0), 0.25, False),
    "kvlib deviations=2": (StreamController(deviations=2), 0.25, False),
    "CacheGen paper": (PaperRule(), 1.0, False),
    "CacheGen artefact": (ArtefactRule(), 0.25, False),
    "CacheGen artefact, true rate": (ArtefactRule(), 0.25, True),
    "finest": (FixedLevel(0), 0.25, False),
    "middle": (FixedLevel(2), 0.25, False),
    "coarsest": (FixedLevel(4), 0.25, False),
    "recompute": (FixedLevel(None), 0.25, False),
}


def context_of(tokens: int, chunk: int) -> Context:
    sizes = [min(chunk, tokens - start) for start in range(0, tokens, chunk)]
    return Context(
        tuple(
            ChunkOffer(
                tokens=n,
                nbytes=tuple(math.ceil(n * VALUES_PER_TOKEN * bits / 8) for bits in BITS),
                decode_s=n * VALUES_PER_TOKEN * 2 / DECODE_BYTES_PER_S,
                prefill_s=n / PREFILL_TOKENS_PER_S,
            )
            for n in sizes
        )
    )


def links(kind: str, chunks: int, load: int, rng: random.Random) -> tuple[Trace, Trace]:
    """A link's trace, and an earlier stretch of the same link."""
    gbit = GBIT / load
    if kind == "constant":
        rate = rng.uniform(0.5, 10) * gbit
        return ChunkTrace((rate,)), ChunkTrace((rate,))
    if kind == "uniform":
        draw = [tuple(rng.uniform(0.1, 10) * gbit for _ in range(n)) for n in (chunks, 50)]
        return ChunkTrace(draw[0]), ChunkTrace(draw[1])
    if kind == "drop":
        rate = rng.uniform(1, 10) * gbit
        return TimeTrace(rng.uniform(0.05, 1), (rate, rate / 10)), ChunkTrace((rate,))
    steps = 2000
    if kind == "markov":  # 50 ms steps, half a second in a state on average
        fast, rates = rng.random() < 0.5, []
        for _ in range(steps):
            fast ^= rng.random() < 0.1
            rates.append((5 if fast else 0.5) * gbit)
    else:  # two-second waves, lognormal noise
        base, phase = rng.uniform(1, 6), rng.uniform(0, 2 * math.pi)
        rates = [
            max(0.05, base * (1 + 0.6 * math.sin(phase + math.pi * i / 20)))
            * rng.lognormvariate(0, 0.3)
            * gbit
            for i in range(steps)
        ]
    cut = steps // 5
    return TimeTrace(0.05, tuple(rates[cut:])), TimeTrace(0.05, tuple(rates[:cut]))


def known(before: Trace, context: Context, gain: float) -> LinkEstimate:
    """The estimate after a few chunks of an earlier request."""
    link, now, nbytes = LinkEstimate(gain=gain), 0.0, context.offers[0].nbytes[2]
    for i in range(KNOWN_CHUNKS):
        arrived = before.finish_s(i, now, nbytes)
        link, now = link.after(nbytes, arrived - now), arrived
    return link


def two_sided(context: Context, trace: Trace, load: int) -> float:
    """Least time with the first m chunks recomputed while the others are fetched, coarsest."""
    n = len(context.offers)
    best = load * context.prefill_from[0]
    for m in range(n):
        now, gpu = 0.0, load * (context.prefill_from[0] - context.prefill_from[m])
        for at in range(m, n):
            now = trace.finish_s(at, now, context.offers[at].nbytes[-1])
            gpu = max(gpu, now) + load * context.offers[at].decode_s
        best = min(best, gpu)
    return best


def cases(requests: int, chunk: int, kind: str) -> Iterator[tuple[Context, int, float, Any, Any]]:
    for tokens in CONTEXTS:
        context = context_of(tokens, chunk)
        for load in LOADS:
            for share in SLO_SHARES:
                # The same links for every chunk size and rule.
                rng = random.Random(f"{kind} {tokens} {load} {share}")
                for _ in range(requests):
                    seed = rng.random()
                    trace, before = links(kind, len(context.offers), load, random.Random(seed))
                    yield context, load, share, trace, before


class Tally:
    def __init__(self) -> None:
        self.ttft: list[float] = []
        self.relative: list[float] = []
        self.met: dict[str, list[bool]] = {}
        self.tokens = self.recomputed = 0
        self.levels = self.divergence = 0.0

    def add(
        self, context: Context, load: int, share: float, ttft_s: float, outcome: Outcome | None
    ) -> None:
        slo_s = share * context.prefill_from[0]
        self.ttft.append(ttft_s)
        self.relative.append(ttft_s / slo_s)
        self.met.setdefault(f"{share} x{load}", []).append(ttft_s <= slo_s * (1 + 1e-9))
        if outcome is None:
            return
        for offer, level in zip(context.offers, outcome.levels, strict=True):
            self.tokens += offer.tokens
            if level is None:
                self.recomputed += offer.tokens
            else:
                self.levels += offer.tokens * level
                self.divergence += offer.tokens * DIVERGENCE[level]

    def row(self) -> dict[str, Any]:
        met = {slo: statistics.mean(values) for slo, values in self.met.items()}
        out: dict[str, Any] = {
            "slo_met": statistics.mean(met.values()),
            "slo_met_by_share_and_load": met,
            "ttft_s_median": statistics.median(self.ttft),
            "ttft_s_p95": statistics.quantiles(self.ttft, n=20)[-1],
            "ttft_over_slo_p95": statistics.quantiles(self.relative, n=20)[-1],
        }
        if self.tokens:
            fetched = self.tokens - self.recomputed
            out |= {
                "mean_level": self.levels / fetched if fetched else None,
                "mean_divergence": self.divergence / self.tokens,
                "recomputed_share": self.recomputed / self.tokens,
            }
        return out


def main() -> None:
    arguments = parser(__doc__, repeats=10).parse_args()
    rows = []
    for chunk in CHUNKS:
        for kind in TRACES:
            tallies: dict[tuple[str, bool], Tally] = {}
            for context, load, share, trace, before in cases(arguments.repeats, chunk, kind):
                slo_s = share * context.prefill_from[0]
                for warm in (False, True):
                    for name, (rule, gain, peek) in RULES.items():
                        link = known(before, context, gain) if warm else LinkEstimate(gain=gain)
                        done = simulate(
                            rule, context, trace, slo_s=slo_s, link=link, load=load, peek=peek
                        )
                        tally = tallies.setdefault((name, warm), Tally())
                        tally.add(context, load, share, done.ttft_s, done)
                best = best_plan(context, trace, slo_s=slo_s, costs=DIVERGENCE, load=load, width=32)
                tallies.setdefault(("optimum", True), Tally()).add(
                    context, load, share, best.ttft_s, best
                )
                tallies.setdefault(("two-sided", True), Tally()).add(
                    context, load, share, two_sided(context, trace, load), None
                )
            for (name, warm), tally in tallies.items():
                row = {"chunk_tokens": chunk, "trace": kind, "rule": name, "link_known": warm}
                rows.append(row | tally.row())
    finish(
        "streaming",
        {
            "contexts_tokens": CONTEXTS,
            "bits_per_value": BITS,
            "divergence_of_levels": DIVERGENCE,
            "requests_per_trace": arguments.repeats * len(CONTEXTS) * len(LOADS) * len(SLO_SHARES),
            "rows": rows,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
