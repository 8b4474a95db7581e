# SPDX-License-Identifier: Apache-2.0
"""From samples to rows: one for each method in each cell, and paired comparisons of two runs."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvlib.errors import ConfigError
from kvlib.evals.metrics import SCORES
from kvlib.evals.samples import key_of
from kvlib.evals.statistics import Interval, cluster_mean, holm, mcnemar
from kvlib.evals.tasks import build_task

__all__ = ["Comparison", "Row", "compare", "metric_of", "summarize"]

FEW_CONTEXTS = 5
"""Below this a bootstrap interval is too narrow to judge by."""

FULL = "full"
_NUMBERS = ("prefill_s", "encode_s", "restore_s", "first_token_s")


@dataclass(frozen=True, slots=True)
class Row:
    """One method in one cell.

    Attributes:
        task: with its parameters.
        version: of the task.
        length: tokens of a context.
        mode: unaware or aware.
        stepwise: answers were fed token by token.
        method: with its parameters.
        metric: that the task is judged by.
        contexts: how many.
        questions: how many.
        score: of the metric.
        delta: the same minus the full cache's, on the same questions; None without it.
        scores: means of every score, and of the evidence kept where there is evidence.
        held_share: bytes held (or stored, behind a codec) over those of the full cache.
        peak_share: most cache bytes during the prefill over the same; None if not probed.
        peak_memory_bytes: most memory during the prefill; None if not probed or unknown.
        seconds: medians of what was timed, by name.
    """

    task: str
    version: int
    length: int
    mode: str
    stepwise: bool
    method: str
    metric: str
    contexts: int
    questions: int
    score: Interval
    delta: Interval | None
    scores: dict[str, float]
    held_share: float
    peak_share: float | None
    peak_memory_bytes: float | None
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two methods, or two runs of one, on the questions that both have answered.

    Attributes:
        task: with its parameters.
        length: tokens of a context.
        mode: unaware or aware.
        first: the first method.
        second: the second one.
        metric: that is compared.
        contexts: that both have.
        questions: that both have.
        first_score: mean of the first.
        second_score: mean of the second.
        delta: second minus first, paired.
        p: exact McNemar p, corrected by Holm over all comparisons; None unless answers are right or
            wrong.
        only_first: questions that only the first got right.
        only_second: questions that only the second got right.
        verdict: better, worse, no difference shown, or too few contexts, for the second.
    """

    task: str
    length: int
    mode: str
    first: str
    second: str
    metric: str
    contexts: int
    questions: int
    first_score: float
    second_score: float
    delta: Interval
    p: float | None
    only_first: int
    only_second: int
    verdict: str


_Record = dict[str, Any]
_Clusters = dict[object, list[float]]


def metric_of(task: str) -> str:
    """What a task is judged by; ``exact`` for tasks that are not installed here."""
    try:
        return build_task(task).metric
    except ConfigError:
        return "exact"


def _values(records: Iterable[_Record], name: str) -> _Clusters:
    """A score of every question, by context."""
    return {
        key_of(record).context: [float(question[name]) for question in record["questions"]]
        for record in records
    }


def _digests(records: Iterable[_Record]) -> dict[object, str | None]:
    """What names the prompts; None where a tool did not say."""
    return {key_of(record).context: record["sample"].get("digest") for record in records}


def _ordered(records: Iterable[_Record]) -> dict[tuple[Any, ...], dict[str, list[_Record]]]:
    """Records by cell and method; contexts in one order, so that resampling repeats itself."""
    cells: dict[tuple[Any, ...], dict[str, list[_Record]]] = {}
    for record in sorted(records, key=lambda r: (key_of(r).seed, key_of(r).number)):
        key = key_of(record)
        cells.setdefault(key.cell, {}).setdefault(key.method, []).append(record)
    return cells


def summarize(records: Sequence[_Record]) -> list[Row]:
    """Rows in the order in which cells and methods first came."""
    first_seen: dict[tuple[Any, ...], None] = {}
    for record in records:
        key = key_of(record)
        first_seen.setdefault((key.cell, key.method))
    cells = _ordered(records)
    rows = []
    for cell, method in first_seen:
        mine = cells[cell][method]
        metric = metric_of(cell[0])
        score = cluster_mean(_values(mine, metric))
        full = cells[cell].get(FULL)
        delta = None
        if full is not None and method != FULL:
            differences = _differences(full, mine, metric)
            delta = cluster_mean(differences) if differences else None
        rows.append(_row(cell, method, mine, metric, score, delta))
    return rows


def _row(
    cell: tuple[Any, ...],
    method: str,
    records: list[_Record],
    metric: str,
    score: Interval,
    delta: Interval | None,
) -> Row:
    questions = [question for record in records for question in record["questions"]]
    names = [name for name in SCORES if name in questions[0]]
    scores = {name: statistics.fmean(q[name] for q in questions) for name in names}
    kept = [q["evidence_kept"] for q in questions if q.get("evidence_kept") is not None]
    if kept:
        scores["evidence_kept"] = statistics.fmean(kept)
    seconds = {
        name: statistics.median(r[name] for r in records if name in r)
        for name in _NUMBERS
        if any(name in r for r in records)
    }
    steps = [second for record in records for second in record.get("step_s", ())]
    if steps:
        seconds["step_s"] = statistics.median(steps)
    probed = [r for r in records if "peak_cache_bytes" in r]
    memory = [r["peak_memory_bytes"] for r in probed if r["peak_memory_bytes"] is not None]
    task, version, length, mode, stepwise = cell
    return Row(
        task=task,
        version=version,
        length=length,
        mode=mode,
        stepwise=stepwise,
        method=method,
        metric=metric,
        contexts=len(records),
        questions=len(questions),
        score=score,
        delta=delta,
        scores=scores,
        held_share=_share(records, "held_bytes"),
        peak_share=_share(probed, "peak_cache_bytes") if probed else None,
        peak_memory_bytes=statistics.median(memory) if memory else None,
        seconds=seconds,
    )


def _share(records: Sequence[_Record], name: str) -> float:
    part, whole = (sum(float(r[n]) for r in records) for n in (name, "full_bytes"))
    return part / whole


def _differences(first: list[_Record], second: list[_Record], metric: str) -> _Clusters:
    """Second minus first for every question of the contexts that both have."""
    ours, theirs = _values(first, metric), _values(second, metric)
    return {
        context: [b - a for a, b in zip(ours[context], theirs[context], strict=True)]
        for context in ours
        if context in theirs
    }


def compare(
    first: Sequence[_Record],
    second: Sequence[_Record],
    *,
    pairs: Callable[[str], str] = lambda method: method,
    metric: str | None = None,
) -> list[Comparison]:
    """Paired comparisons of every method of `first` with its partner in `second`.

    Args:
        first: records of a run.
        second: records of a run, perhaps the same.
        pairs: the method in `second` that a method of `first` is compared with.
        metric: a score, or the task's own (nll where one side, another tool, has not measured it).

    Raises:
        ConfigError: the two answered different questions of a context, or lack the metric.
    """
    ours, theirs = _ordered(first), _ordered(second)
    found = []
    for cell, methods in ours.items():
        for method, records in methods.items():
            partner = pairs(method)
            others = theirs.get(cell, {}).get(partner)
            if others:
                judged = metric or _common_metric(cell[0], records, others)
                one = _compare(cell, (method, partner), records, others, judged)
                if one is not None:
                    found.append(one)
    tested = [i for i, one in enumerate(found) if one.p is not None]
    corrected = dict(zip(tested, holm([found[i].p or 0.0 for i in tested]), strict=True))
    return [_with_p(one, corrected.get(i)) for i, one in enumerate(found)]


def _common_metric(task: str, first: list[_Record], second: list[_Record]) -> str:
    """What a task is judged by, or nll where one side has not measured that."""
    wanted = metric_of(task)
    measured = all(wanted in record["questions"][0] for record in (*first, *second))
    return wanted if measured else "nll"


def _compare(
    cell: tuple[Any, ...],
    names: tuple[str, str],
    first: list[_Record],
    second: list[_Record],
    metric: str,
) -> Comparison | None:
    try:
        ours, theirs = _values(first, metric), _values(second, metric)
    except KeyError as exc:
        raise ConfigError(f"not every sample has the score {exc}") from exc
    both = [context for context in ours if context in theirs]
    if not both:
        return None
    mine, its = _digests(first), _digests(second)
    if any(
        len(ours[context]) != len(theirs[context])
        or (None not in (mine[context], its[context]) and mine[context] != its[context])
        for context in both
    ):
        raise ConfigError(
            f"{cell[0]}: the two runs have different questions for one context (another tokenizer, "
            "or another release of Python, whose help topics are the text)"
        )
    delta = cluster_mean(_differences(first, second, metric))
    left = [value for context in both for value in ours[context]]
    right = [value for context in both for value in theirs[context]]
    test = mcnemar(left, right)
    better = metric not in ("nll", "kl")
    verdict = "no difference shown"
    if len(both) < FEW_CONTEXTS:
        verdict = "too few contexts"
    elif delta.low is not None and delta.high is not None and not delta.low <= 0 <= delta.high:
        verdict = "better" if (delta.mean > 0) == better else "worse"
    task, _, length, mode, _ = cell
    return Comparison(
        task=task,
        length=length,
        mode=mode,
        first=names[0],
        second=names[1],
        metric=metric,
        contexts=len(both),
        questions=len(left),
        first_score=statistics.fmean(left),
        second_score=statistics.fmean(right),
        delta=delta,
        p=test.p if metric == "exact" else None,
        only_first=test.only_first,
        only_second=test.only_second,
        verdict=verdict,
    )


def _with_p(one: Comparison, p: float | None) -> Comparison:
    return replace(one, p=p)
