# SPDX-License-Identifier: Apache-2.0
"""`attend` and `column_sums` against plain loops in float64, and the memory that they take."""

import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import kvlib.attention
from kvlib.attention import Logits, attend, attention_at, column_maxima, column_sums
from kvlib.blocks import LayerKV, Row
from kvlib.errors import ShapeError

# The oracle: one query, one entry at a time, in float64


@dataclass
class Expected:
    """Output [Hq, T, Dv], column sums (one [S] per query head), and what float32 may differ by.

    `output_error` and `sums_error` bound rounding: a logit is a sum of C products, whose float32
    error is at most (C + 4) eps times the sum of their sizes; a probability's relative error is at
    most twice the largest logit error, and S + 8 eps for exp, sum and division; an output is an
    average of values, a column sum has T terms.
    """

    output: torch.Tensor
    sums: list[torch.Tensor]
    output_error: float
    sums_error: float


def expected(query, layer, *, scale=None, softcap=None, sinks=None, window=None) -> Expected:
    eps = 2.0**-24
    query_heads, num, width = query.shape
    group = query_heads // layer.num_kv_heads
    outputs, sums, relative, largest = [], [], 0.0, 0.0
    for head in range(query_heads):
        kv_head = head // group
        keys, values, positions, weights = layer.row(kv_head)
        keys, values = keys.double().tolist(), values.double()
        largest = max(largest, float(values.abs().max()))
        positions = positions.tolist()
        weights = [0.0] * len(positions) if weights is None else weights.double().tolist()
        channels = range(width) if layer.channels is None else layer.channels[kv_head].tolist()
        own = [i for i, p in enumerate(positions) if p >= 0][-num:]
        total = torch.zeros(len(positions), dtype=torch.float64)
        rows = []
        for t in range(num):
            q = query[head, t].double()[list(channels)].tolist()
            me = positions[own[t]]
            logits = []
            for i, p in enumerate(positions):
                if p >= 0 and (p > me or (window is not None and p <= me - window)):
                    logits.append(-math.inf)
                    continue
                products = [a * b for a, b in zip(q, keys[i], strict=True)]
                factor = scale if scale is not None else width**-0.5
                x = sum(products) * factor
                if softcap is not None:
                    x = softcap * math.tanh(x / softcap)
                logits.append(x + weights[i])
                size = sum(abs(x) for x in products) * abs(factor) + abs(weights[i])
                size += 8 * (softcap or 0)
                relative = max(relative, 2 * (len(products) + 4) * eps * size)
            extra = [] if sinks is None else [float(sinks[head])]
            relative = max(relative, *(8 * eps * abs(x) for x in [*extra, 0.0]))
            peak = max(logits + extra)
            shares = [math.exp(x - peak) for x in logits]
            all_of_it = sum(shares) + sum(math.exp(x - peak) for x in extra)
            row = torch.tensor([x / all_of_it for x in shares], dtype=torch.float64)
            rows.append(row @ values)
            total += row
        outputs.append(torch.stack(rows))
        sums.append(total)
    entries = max(layer.lengths)
    error = relative + (2 * entries + 8) * eps
    return Expected(torch.stack(outputs), sums, error * largest, error * num)


# Layers to ask about

FORMS = ("range", "tensor", "packed")


def random_rows(
    form: str,
    *,
    heads: int,
    old: int,
    new: int,
    width: int = 8,
    value_width: int = 8,
    weights: bool = False,
    synthetic: int = 0,
    dtype: torch.dtype = torch.float32,
    gen: torch.Generator,
) -> list[Row]:
    """Rows that end in `new` tokens that all heads share (and synthetic entries after them)."""
    rows = []
    first = 3 * (old + 3 * heads) + 1
    for head in range(heads):
        mine = old + (3 * head if form == "packed" else 0)
        if form == "range":
            positions = torch.arange(mine + new)
        else:  # gaps, other ones in every head
            held = torch.randperm(first - 1, generator=gen)[:mine].sort().values
            positions = torch.cat([held, torch.arange(first, first + 2 * new, 2)])
        positions = torch.cat([positions, torch.full((synthetic,), -1)]).int()
        n = len(positions)
        rows.append(
            Row(
                torch.randn(n, width, generator=gen).to(dtype),
                torch.randn(n, value_width, generator=gen).to(dtype),
                positions,
                torch.randn(n, generator=gen) if weights else None,
            )
        )
    return rows


def random_layer(form: str, *, channels: int | None = None, seed: int = 0, **sizes) -> LayerKV:
    gen = torch.Generator().manual_seed(seed)
    kept = None
    if channels is not None:
        width = sizes.pop("width", 8)
        order = [torch.randperm(width, generator=gen)[:channels] for _ in range(sizes["heads"])]
        kept = torch.stack([x.sort().values for x in order])
        sizes["width"] = channels
    layer = LayerKV.from_rows(0, random_rows(form, gen=gen, **sizes), channels=kept)
    layer.validate()
    if form == "range":
        layer = replace(layer, positions=range(layer.lengths[0]))
    return layer


def random_query(heads: int, num: int, width: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(heads, num, width, generator=torch.Generator().manual_seed(seed))


def check(query, layer, logits: Logits = Logits()) -> None:  # noqa: B008
    """All three ways to ask agree with the oracle, and nothing is summed beyond a row's end."""
    want = expected(
        query,
        layer,
        scale=logits.scale,
        softcap=logits.softcap,
        sinks=logits.sinks,
        window=logits.window,
    )
    group = query.shape[0] // layer.num_kv_heads
    both = attend(query, layer, logits, with_column_sums=True)
    alone = attend(query, layer, logits)
    assert alone.column_sums is None
    for output in (both.output, alone.output):
        assert output.shape == want.output.shape
        assert output.dtype == query.dtype
        assert (output - want.output).abs().max() <= want.output_error
    for sums in (both.column_sums, column_sums(query, layer, logits)):
        assert sums.dtype == torch.float32
        assert sums.shape == (layer.num_kv_heads, group, max(layer.lengths))
        for head, total in enumerate(want.sums):
            mine = sums[head // group, head % group]
            assert (mine[: len(total)] - total).abs().max() <= want.sums_error
            assert not mine[len(total) :].any()
        if logits.sinks is None:
            slack = want.sums_error * max(layer.lengths)
            assert (sums.sum(-1) - query.shape[1]).abs().max() <= slack
        else:
            assert (sums.sum(-1) < query.shape[1]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group", [1, 3, 4])
def test_groups_lengths_and_old_entries(form, group):
    for heads, num, old in product((1, 2), (1, 5), (0, 7)):
        layer = random_layer(form, heads=heads, old=old, new=num)
        check(random_query(heads * group, num), layer)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_windows_soft_caps_and_sinks(form, window, softcap):
    for with_sinks, num, old in product((False, True), (1, 5), (0, 7)):
        layer = random_layer(form, heads=2, old=old, new=num)
        sinks = random_query(6, 1, 1)[:, 0, 0] if with_sinks else None
        logits = Logits(window=window, softcap=softcap, sinks=sinks)
        check(random_query(6, num), layer, logits)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("synthetic", [0, 1, 2])
def test_weights_and_synthetic_entries(form, synthetic):
    """A synthetic entry stands last and is seen by every query, whatever mask or window."""
    if form == "range" and synthetic:
        form = "tensor"  # a range holds no synthetic entries
    for num, old, window, softcap in product((1, 5), (0, 7), (None, 4), (None, 3.0)):
        layer = random_layer(form, heads=2, old=old, new=num, weights=True, synthetic=synthetic)
        check(random_query(6, num), layer, Logits(window=window, softcap=softcap))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 5, 8])
def test_narrow_keys(form, channels):
    """Logits of pruned keys keep the scale of the whole head."""
    for num, old, weights in product((1, 4), (0, 6), (False, True)):
        layer = random_layer(form, heads=2, old=old, new=num, channels=channels, weights=weights)
        check(random_query(4, num), layer)
        check(random_query(4, num), layer, Logits(window=3, softcap=2.0))


def test_narrow_keys_equal_keys_with_zeros():
    layer = random_layer("tensor", heads=2, old=6, new=3, channels=5)
    wide = torch.zeros(2, 9, 8)
    wide.scatter_(-1, layer.channels[:, None].expand(-1, 9, -1), layer.keys)
    query = random_query(4, 3)
    narrow = attend(query, layer).output
    padded = attend(query, replace(layer, keys=wide, channels=None)).output
    torch.testing.assert_close(narrow, padded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_values_of_another_width_and_a_given_scale(form):
    for num, old in product((1, 5), (0, 7)):
        layer = random_layer(form, heads=2, old=old, new=num, value_width=6)
        check(random_query(6, num), layer, Logits(scale=0.7))


def test_log_weight_of_log_n_counts_an_entry_n_times():
    """What a weight means: an entry with log 3 is three equal entries."""
    layer = random_layer("tensor", heads=1, old=4, new=1)
    weight = torch.zeros(1, 5)
    weight[0, 1] = math.log(3)
    order = torch.tensor([0, 1, 1, 1, 2, 3, 4])
    repeated = replace(
        layer,
        keys=layer.keys[:, order],
        values=layer.values[:, order],
        positions=torch.arange(7, dtype=torch.int32)[None],
    )
    query = random_query(2, 1)
    weighted = attend(query, replace(layer, log_weight=weight)).output
    torch.testing.assert_close(weighted, attend(query, repeated).output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits", [Logits(), Logits(softcap=3.0), Logits(window=4)])
def test_half_precision(dtype, logits):
    """Inputs are exact in float64; output and, in fused kernels, probabilities are rounded.

    With u the unit roundoff: u for each probability and u for their sum (both act on an average of
    values), u for the output, u to spare. Column sums never leave float32.
    """
    unit = torch.finfo(dtype).eps / 2
    for form, num, old in product(FORMS, (1, 5), (0, 7)):
        layer = random_layer(form, heads=2, old=old, new=num, dtype=dtype)
        query = random_query(6, num).to(dtype)
        want = expected(query, layer, softcap=logits.softcap, window=logits.window)
        done = attend(query, layer, logits, with_column_sums=True)
        assert done.output.dtype == dtype
        bound = 4 * unit * float(layer.values.abs().max()) + want.output_error
        assert (done.output - want.output).abs().max() <= bound
        for head, total in enumerate(want.sums):
            mine = done.column_sums[head // 3, head % 3, : len(total)]
            assert (mine - total).abs().max() <= want.sums_error


def test_sinks_take_their_share():
    layer = random_layer("tensor", heads=2, old=4, new=3)
    query = random_query(4, 3)
    sinks = torch.tensor([-30.0, 0.0, 2.0, 30.0])
    left = column_sums(query, layer, Logits(sinks=sinks)).sum(-1).flatten()
    assert left[0] == pytest.approx(3, abs=1e-5)
    assert 0.3 < left[2] < left[1] < 3
    assert left[3] < 1e-6


def test_column_sums_of_the_last_queries():
    """The observation window: only the last queries, over everything."""
    layer = random_layer("range", heads=2, old=0, new=12)
    query = random_query(4, 12)
    first = replace(layer, keys=layer.keys[:, :9], values=layer.values[:, :9], positions=range(9))
    early = torch.nn.functional.pad(column_sums(query[:, :9], first), (0, 3))
    late = column_sums(query[:, 9:], layer)
    torch.testing.assert_close(early + late, column_sums(query, layer), rtol=1e-5, atol=1e-6)


# Blocks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("elements", [1 << 19, 20])
def test_attention_at_chosen_entries(form, elements, monkeypatch):
    """Each query's attention where it was asked for; over all queries that is the column sums."""
    monkeypatch.setattr(kvlib.attention, "BLOCK_ELEMENTS", elements)
    new = 5
    layer = random_layer(form, heads=2, old=7, new=new)
    query = random_query(6, new)
    logits = Logits(softcap=3.0)
    every = torch.arange(max(layer.lengths)).expand(new, -1)
    seen = attention_at(query, layer, every, logits)
    assert seen.shape == (2, 3, new, max(layer.lengths))
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 3, new))
    torch.testing.assert_close(seen.sum(-2), column_sums(query, layer, logits))
    for i in range(new):
        assert not seen[0, :, i, layer.lengths[0] - new + i + 1 :].any()  # later tokens
    few = torch.tensor([[0, 3], [1, 1], [8, 7], [2, 11], [11, 0]])
    chosen = seen.gather(-1, few.expand(2, 3, -1, -1))
    torch.testing.assert_close(attention_at(query, layer, few, logits), chosen)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("elements", [1 << 19, 20])
@pytest.mark.parametrize("synthetic", [0, 2])
def test_maxima_of_queries_without_entries_of_their_own(form, elements, synthetic, monkeypatch):
    """Every query sees all entries, however many it has beside it, and nothing else."""
    monkeypatch.setattr(kvlib.attention, "BLOCK_ELEMENTS", elements)
    weights = form != "range"
    layer = random_layer(
        form, heads=2, old=3, new=1, weights=weights, synthetic=synthetic if weights else 0
    )
    query = random_query(6, 9)  # more than there are entries
    found = column_maxima(query, layer, Logits(softcap=3.0), own=False)
    assert found.shape == (2, 3, max(layer.lengths))
    for head in range(6):
        row = layer.row(head // 3)
        x = query[head].double() @ row.keys.double().T / math.sqrt(8)
        best = (3 * torch.tanh(x / 3) + row.weights()).softmax(-1).amax(0)
        mine = found[head // 3, head % 3]
        torch.testing.assert_close(mine[: len(best)].double(), best, rtol=1e-5, atol=1e-6)
        assert not mine[len(best) :].any()
    with pytest.raises(ShapeError, match="at least the 9"):
        column_maxima(query, layer)
    with pytest.raises(ShapeError, match="have no window"):
        column_maxima(query, layer, Logits(window=4), own=False)


@pytest.mark.parametrize("elements", [1, 37, 300])
def test_results_do_not_depend_on_the_block_size(elements, monkeypatch):
    cases = []
    for form, num, old, weights in product(FORMS, (1, 9), (0, 5), (False, True)):
        synthetic = int(weights and form != "range")
        layer = random_layer(form, heads=2, old=old, new=num, weights=weights, synthetic=synthetic)
        query = random_query(6, num)
        kinds = (Logits(), Logits(window=4), Logits(softcap=2.0, sinks=torch.ones(6)))
        cases += [(query, layer, logits) for logits in kinds]
    whole = [attend(*case, with_column_sums=True) for case in cases]
    monkeypatch.setattr(kvlib.attention, "BLOCK_ELEMENTS", elements)
    for case, want in zip(cases, whole, strict=True):
        got = attend(*case, with_column_sums=True)
        torch.testing.assert_close(got.output, want.output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.column_sums, want.column_sums, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(column_sums(*case), want.column_sums, rtol=1e-5, atol=1e-6)


def test_small_blocks_against_the_oracle(monkeypatch):
    monkeypatch.setattr(kvlib.attention, "BLOCK_ELEMENTS", 50)
    for form, old, window, softcap in product(FORMS, (0, 6), (None, 4), (None, 3.0)):
        layer = random_layer(form, heads=2, old=old, new=9, weights=form != "range", synthetic=0)
        check(random_query(6, 9), layer, Logits(window=window, softcap=softcap))


# Errors


@pytest.mark.parametrize("ask", [attend, column_sums])
def test_heads_that_cannot_be_shared(ask):
    layer = replace(random_layer("tensor", heads=2, old=4, new=3), layer_idx=7)
    with pytest.raises(ShapeError, match="5 query heads cannot share the 2 KV heads of layer 7"):
        ask(random_query(5, 3), layer)
    with pytest.raises(ShapeError, match="1 query heads cannot share the 2 KV heads"):
        ask(random_query(1, 3), layer)


@pytest.mark.parametrize("ask", [attend, column_sums])
def test_another_dtype_or_width(ask):
    layer = replace(random_layer("tensor", heads=2, old=4, new=3), layer_idx=7)
    with pytest.raises(ShapeError) as caught:
        ask(random_query(4, 3).bfloat16(), layer)
    for part in ("layer 7", "queries are torch.bfloat16 of 8", "keys torch.float32 of 8"):
        assert part in str(caught.value)
    with pytest.raises(ShapeError, match=r"queries are torch.float32 of 6 channels, .* of 8"):
        ask(random_query(4, 3, 6), layer)


@pytest.mark.parametrize("ask", [attend, column_sums])
@pytest.mark.parametrize("form", FORMS)
def test_fewer_entries_than_queries(ask, form):
    layer = random_layer(form, heads=2, old=0, new=2)
    with pytest.raises(ShapeError, match="holds 2 entries in a row; expected at least the 3"):
        ask(random_query(4, 3), layer)


# Memory


def peak_bytes(function) -> int:
    """The most bytes that the allocator had handed out at a time while `function` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = function()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def returned_bytes(result) -> int:
    tensors = result if isinstance(result, tuple) else (result,)
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


T = 8192
MATRIX = T * T * 4
"""One head's probabilities in float32."""


def long_case(*, queries: int, form: str, value_width: int = 8):
    """One head with `queries` new tokens among `T` entries."""
    layer = random_layer(form, heads=1, old=T - queries, new=queries, value_width=value_width)
    return random_query(1, queries), layer


MEMORY_CASES = {
    "plain": ("range", T, Logits()),
    "soft cap": ("range", T, Logits(softcap=5.0)),
    "sinks": ("range", T, Logits(sinks=torch.zeros(1))),
    "window": ("range", T, Logits(window=512)),
    "masked chunk": ("tensor", 2048, Logits()),
    "masked chunk, soft cap": ("tensor", 2048, Logits(softcap=5.0)),
}


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_no_matrix_is_held(case):
    """Beyond inputs and results: at most 5 % of one head's T x T float32 matrix."""
    form, queries, logits = MEMORY_CASES[case]
    query, layer = long_case(queries=queries, form=form)
    held = []

    def both():
        held.append(attend(query, layer, logits, with_column_sums=True))

    def sums():
        held.append(column_sums(query, layer, logits))

    for function in (both, sums):
        extra = peak_bytes(function) - returned_bytes(held[-1])
        assert extra <= 0.05 * MATRIX


def test_no_matrix_is_held_for_packed_rows():
    gen = torch.Generator().manual_seed(0)
    long = random_rows("tensor", heads=1, old=T - 2048, new=2048, gen=gen)[0]
    short = Row(*(x if x is None else x[1000:] for x in long))
    layer = LayerKV.from_rows(0, [long, short])
    assert not layer.is_dense
    query = random_query(2, 2048)
    held = []
    peak = peak_bytes(lambda: held.append(attend(query, layer, with_column_sums=True)))
    assert peak - returned_bytes(held[-1]) <= 0.05 * MATRIX


def test_no_matrix_is_held_for_values_of_another_width():
    query, layer = long_case(queries=T, form="range", value_width=6)
    held = []
    peak = peak_bytes(lambda: held.append(attend(query, layer)))
    assert peak - returned_bytes(held[-1]) <= 0.05 * MATRIX


def test_the_meter_sees_a_matrix():
    """A meter that missed it would let the tests above pass."""
    query, layer = long_case(queries=T, form="range")

    def naive():
        probabilities = torch.softmax(query[0] @ layer.keys[0].T, -1)
        return probabilities @ layer.values[0]

    assert peak_bytes(naive) >= MATRIX

    def hidden():  # within one operator
        return torch.ops.aten._scaled_dot_product_attention_math(
            query[None], layer.keys[None], layer.values[None], is_causal=True
        )[0]

    assert peak_bytes(hidden) >= MATRIX


def test_the_meter_counts_exactly():
    def two_then_one():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
        return second, third

    assert peak_bytes(two_then_one) == 1 << 21


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form):
    for num, old, weights in product((1, 5), (0, 7), (False, True)):
        layer = random_layer(form, heads=2, old=old, new=num, weights=weights)
        moved = replace(
            layer,
            keys=layer.keys.cuda(),
            values=layer.values.cuda(),
            positions=layer.positions
            if isinstance(layer.positions, range)
            else layer.positions.cuda(),
            log_weight=None if layer.log_weight is None else layer.log_weight.cuda(),
        )
        query = random_query(6, num)
        for logits in (Logits(), Logits(window=4), Logits(softcap=3.0)):
            want = attend(query, layer, logits, with_column_sums=True)
            got = attend(query.cuda(), moved, logits, with_column_sums=True)
            torch.testing.assert_close(got.output.cpu(), want.output, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                got.column_sums.cpu(), want.column_sums, rtol=1e-4, atol=1e-5
            )
