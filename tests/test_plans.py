# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import random
import struct
import weakref
from dataclasses import replace
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import SYNTHETIC, LayerKV, Row
from kvlib.budget import Budget, round_budget
from kvlib.errors import ConfigError, ShapeError
from kvlib.plans import (
    AppendToken,
    Demote,
    KeepChannels,
    KeepTokens,
    MergeTokens,
    Reposition,
    apply_plan,
    rotate,
)
from kvlib.spec import KVSpec, LayerSpec, RopeSpec
from kvlib.testing.strategies import layer_kvs

ROPE = RopeSpec(theta=1e4, rotary_dim=6)
WIDTH, DEPTH = 8, 5  # key and value channels


# ---- the oracle: Python floats and lists, nothing of kvlib, of torch or of NumPy ----


def oracle(rows, channels, plans):
    """The plans' documented meaning, entry by entry, over rows of dicts."""
    channels = [list(range(len(row[0]["k"]))) if row else None for row in rows] or channels
    before = [[dict(entry) for entry in row] for row in rows]
    kept = [list(range(len(row))) for row in rows]
    if "keep" in plans:
        kept = plans["keep"]
    now = [[dict(before[h][i]) for i in kept[h]] for h in range(len(rows))]
    if "merge" in plans:
        pairs, axis = plans["merge"]
        sums = {}
        for head, src, dst, weight in pairs:
            total = sums.setdefault((head, dst), {"k": [0.0] * WIDTH, "v": [0.0] * DEPTH})
            for what in "kv":
                for c, x in enumerate(before[head][src][what]):
                    total[what][c] += weight * x
        for (head, dst), total in sums.items():
            for what in {"both": "kv", "keys": "k", "values": "v"}[axis]:
                now[head][kept[head].index(dst)][what] = total[what]
    if "append" in plans:
        for head, k, v, logit in plans["append"]:
            now[head].append({"k": k, "v": v, "p": -1, "w": logit})
    if "move" in plans:
        new, rope = plans["move"]
        for entry, p in zip(itertools.chain(*now), new, strict=True):
            if entry["p"] != -1:
                entry["k"] = turn(entry["k"], p - entry["p"], **rope)
                entry["p"] = p
    if "channels" in plans:
        for head, row in enumerate(now):
            for entry in row:
                entry["k"] = [entry["k"][c] for c in plans["channels"][head]]
    leave = None
    if "demote" in plans:
        leave = [
            [
                entry
                for j, entry in enumerate(row)
                if j < len(kept[h]) and kept[h][j] in plans["demote"][h]
            ]
            for h, row in enumerate(now)
        ]
        now = [
            [
                entry
                for j, entry in enumerate(row)
                if not (j < len(kept[h]) and kept[h][j] in plans["demote"][h])
            ]
            for h, row in enumerate(now)
        ]
    return now, leave


def turn(key, shift, *, theta, rotary_dim, interleaved=False, first_channel=0, frequencies=None):
    """One key rotated by `shift` positions, in Python's float64 and complex numbers."""
    out = list(key)
    half = rotary_dim // 2
    for i in range(half):
        f = theta ** (-2.0 * i / rotary_dim) if frequencies is None else frequencies[i]
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        a, b = a + first_channel, b + first_channel
        z = complex(key[a], key[b]) * complex(math.cos(shift * f), math.sin(shift * f))
        out[a], out[b] = z.real, z.imag
    return out


def rows_of(layer):
    """A layer as rows of dicts of Python numbers."""
    out = []
    at = 0
    for h, n in enumerate(layer.lengths):
        row = []
        for j in range(n):
            where = (h, j) if layer.row_lengths is None else (at + j,)
            p = (
                layer.positions[j]
                if isinstance(layer.positions, range)
                else int(layer.positions[where])
            )
            w = 0.0 if layer.log_weight is None else float(layer.log_weight[where])
            entry = {"k": layer.keys[where].tolist(), "v": layer.values[where].tolist()}
            row.append({**entry, "p": p, "w": w})
        at += n
        out.append(row)
    return out


def assert_rows(layer, expected, tolerance=1e-5):
    """The layer holds the expected rows, up to float32 sums of a few terms."""
    seen = rows_of(layer)
    assert [len(row) for row in seen] == [len(row) for row in expected]
    for a, b in zip(itertools.chain(*seen), itertools.chain(*expected), strict=True):
        assert a["p"] == b["p"]
        assert a["w"] == pytest.approx(b["w"], abs=1e-6)
        assert a["k"] == pytest.approx(b["k"], rel=tolerance, abs=tolerance)
        assert a["v"] == pytest.approx(b["v"], rel=tolerance, abs=tolerance)


def layer_of(lengths=(5, 5), *, seed=0, ranged=False, weights=False, synthetic=()):
    generator = torch.Generator().manual_seed(seed)
    if ranged:
        shape = (len(lengths), lengths[0])
        return LayerKV(
            layer_idx=3,
            keys=torch.randn((*shape, WIDTH), generator=generator),
            values=torch.randn((*shape, DEPTH), generator=generator),
            positions=range(10, 10 + lengths[0]),
        )
    rows = []
    for head, n in enumerate(lengths):
        positions = torch.randperm(40, generator=generator)[:n].sort()[0].to(torch.int32) + 10
        if head in synthetic and n:
            positions[-1] = SYNTHETIC
        weight = torch.randn(n, generator=generator) if weights else None
        rows.append(
            Row(
                torch.randn((n, WIDTH), generator=generator),
                torch.randn((n, DEPTH), generator=generator),
                positions,
                weight,
            )
        )
    return LayerKV.from_rows(3, rows)


def rows_t(*rows):
    return tuple(torch.tensor(row, dtype=torch.int64) for row in rows)


def draw_plans(rng, layer, kinds):
    """Random plans of these kinds for kvlib, and the same for the oracle."""
    ours, theirs = [], {}
    kept = [list(range(n)) for n in layer.lengths]
    if "keep" in kinds:
        kept = [sorted(rng.sample(row, rng.randint(min(1, len(row)), len(row)))) for row in kept]
        ours.append(KeepTokens(rows_t(*kept)))
        theirs["keep"] = kept
    if "merge" in kinds:
        pairs = []
        for head, n in enumerate(layer.lengths):
            if kept[head]:
                pairs += [
                    (head, rng.randrange(n), rng.choice(kept[head]), rng.uniform(-1, 1))
                    for _ in range(rng.randint(0, 5))
                ]
        rng.shuffle(pairs)
        axis = rng.choice(["both", "keys", "values"])
        columns = list(zip(*pairs, strict=True)) or [(), (), (), ()]
        head, src, dst = (torch.tensor(c, dtype=torch.int64) for c in columns[:3])
        weight = torch.tensor(columns[3], dtype=torch.float32)
        ours.append(MergeTokens(head, src, dst, weight, axis))
        exact = [(*p[:3], w) for p, w in zip(pairs, weight.tolist(), strict=True)]
        theirs["merge"] = (exact, axis)
    lengths = [len(row) for row in kept]
    if "append" in kinds:
        heads = sorted(rng.sample(range(len(lengths)), rng.randint(1, len(lengths))))
        keys = torch.tensor([[rng.gauss(0, 1) for _ in range(WIDTH)] for _ in heads])
        values = torch.tensor([[rng.gauss(0, 1) for _ in range(DEPTH)] for _ in heads])
        mass = tuple(rng.choice([1.0, 2.0, 37.5]) for _ in heads)
        bias = torch.tensor([rng.gauss(0, 1) for _ in heads]) if rng.random() < 0.5 else None
        ours.append(AppendToken(tuple(heads), keys, values, mass, bias))
        logits = [math.log(m) for m in mass] if bias is None else bias.tolist()
        theirs["append"] = [
            (h, keys[i].tolist(), values[i].tolist(), logits[i]) for i, h in enumerate(heads)
        ]
        for h in heads:
            lengths[h] += 1
    if "move" in kinds:
        synthetic = []
        for h, row in enumerate(kept):
            source = rows_of(layer)[h]
            synthetic.append([source[i]["p"] == -1 for i in row])
            synthetic[-1] += [True] * (lengths[h] - len(row))
        new = []
        for marks in synthetic:
            places = iter(sorted(rng.sample(range(3000), len(marks))))
            new += [-1 if mark else next(places) for mark in marks]
        ours.append(Reposition(torch.tensor(new, dtype=torch.int32)))
        theirs["move"] = (new, {"theta": 1e4, "rotary_dim": 6})
    if "channels" in kinds:
        width = rng.randint(1, WIDTH)
        lists = [sorted(rng.sample(range(WIDTH), width)) for _ in lengths]
        ours.append(KeepChannels(torch.tensor(lists)))
        theirs["channels"] = lists
    if "demote" in kinds:
        gone = [sorted(rng.sample(row, rng.randint(0, len(row)))) for row in kept]
        ours.append(Demote(rows_t(*gone)))
        theirs["demote"] = gone
    rng.shuffle(ours)
    return ours, theirs


KINDS = ("keep", "merge", "append", "move", "channels", "demote")
SUBSETS = [s for n in range(1, 7) for s in itertools.combinations(KINDS, n)]


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_plans_do_what_they_document(kinds):
    """Every set of plans, given in any order, gives the oracle's entries, and spares the input."""
    rng = random.Random("+".join(kinds))
    layers = [
        layer_of((5, 5), ranged=True),
        layer_of((6, 6), seed=1),
        layer_of((4, 0, 7), seed=2, weights=True),
        layer_of((3, 5, 5), seed=3, weights=True, synthetic=(0, 2)),
    ]
    for layer in layers:
        before = rows_of(layer)
        plans, meant = draw_plans(rng, layer, kinds)
        changed, demoted = apply_plan(layer, plans, rope=ROPE)
        now, leave = oracle(before, None, meant)
        assert_rows(changed, now)
        changed.validate()
        assert (demoted is None) == (leave is None)
        if demoted is not None:
            assert_rows(demoted, leave)
            demoted.validate()
        for part in (changed, demoted):
            if part is not None:
                assert part.layer_idx == 3
                want = meant.get("channels")
                seen = None if part.channels is None else part.channels.tolist()
                assert seen == want
        assert rows_of(layer) == before


def test_order_of_plans():
    """Merge sees values from before any plan; append comes after it; moves come before pruning."""
    layer = layer_of((4, 4), ranged=True)
    merge = MergeTokens(
        torch.tensor([0, 0, 0, 0]),
        torch.tensor([0, 3, 2, 1]),
        torch.tensor([1, 1, 2, 2]),
        torch.tensor([0.5, 0.25, 1.0, 2.0]),
    )
    plans = [
        Demote(rows_t([1], [])),
        KeepChannels(torch.tensor([[0, 4], [1, 7]])),
        Reposition(torch.tensor([20, 40, -1, 0, 1], dtype=torch.int32)),
        AppendToken((0,), torch.ones(1, WIDTH), torch.ones(1, DEPTH), (8.0,)),
        merge,
        KeepTokens(rows_t([1, 2], [0, 3])),
    ]
    x = rows_of(layer)
    changed, demoted = apply_plan(layer, plans, rope=ROPE)
    first = [0.5 * a + 0.25 * b for a, b in zip(x[0][0]["k"], x[0][3]["k"], strict=True)]
    first = turn(first, 20 - 11, theta=1e4, rotary_dim=6)
    second = [c + 2 * b for c, b in zip(x[0][2]["k"], x[0][1]["k"], strict=True)]  # b unmerged
    second = turn(second, 40 - 12, theta=1e4, rotary_dim=6)
    assert demoted.lengths == (1, 0)
    assert demoted.row(0).keys[0].tolist() == pytest.approx([first[0], first[4]], abs=1e-5)
    assert changed.lengths == (2, 2)
    assert changed.row(0).keys[0].tolist() == pytest.approx([second[0], second[4]], abs=1e-5)
    assert changed.row(0).keys[1].tolist() == [1.0, 1.0]
    assert changed.positions.tolist() == [[40, -1], [0, 1]]
    assert changed.log_weight.tolist() == [[0.0, pytest.approx(math.log(8))], [0.0, 0.0]]


@given(st.data())
def test_keep_tokens_selects_bits(data):
    """KeepTokens copies exactly the chosen entries of any layer, NaN payloads included."""
    spec = KVSpec(
        model_id="m",
        layers=(LayerSpec(num_kv_heads=3, k_head_dim=5, v_head_dim=2),),
        dtype=data.draw(st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"])),
    )
    layer = data.draw(layer_kvs(spec, 0))
    kept = [sorted(data.draw(st.sets(st.integers(0, n - 1)))) if n else [] for n in layer.lengths]
    changed, demoted = apply_plan(layer, KeepTokens(rows_t(*kept)))
    assert demoted is None
    expected = [row_of_bits(layer.row(h), index) for h, index in enumerate(kept)]
    assert [row_of_bits(changed.row(h), range(len(k))) for h, k in enumerate(kept)] == expected
    assert changed.lengths == tuple(map(len, kept))


def row_of_bits(row, index):
    """Bytes of some entries of a row."""

    def bits(x, i):
        return bytes(x[i].clone().view(torch.uint8).tolist()) if x[i].numel() else b""

    return [
        (
            bits(row.keys, i),
            bits(row.values, i),
            int(row.positions[i]),
            None if row.log_weight is None else struct.pack("<f", float(row.log_weight[i])),
        )
        for i in index
    ]


def test_nothing_to_do_is_the_same_layer():
    """No plans, or keeping every entry, returns the very layer, without a copy."""
    for layer in (layer_of((5, 5), ranged=True), layer_of((4, 0, 7), seed=2)):
        everything = KeepTokens(rows_t(*[list(range(n)) for n in layer.lengths]))
        for plans in ([], everything, [everything]):
            assert apply_plan(layer, plans).layer is layer
            assert apply_plan(layer, plans).demoted is None
    layer = layer_of((5, 5), ranged=True)
    everything = KeepTokens(rows_t(range(5), range(5)))
    pruned = apply_plan(layer, [everything, KeepChannels(torch.tensor([[1], [2]]))]).layer
    assert pruned.positions == range(10, 15)


def test_what_is_dropped_is_not_referenced():
    """The result holds its own bytes and no more; the old layer's memory is freed."""
    plans = [
        [KeepTokens(rows_t([0], [0]))],
        [KeepTokens(rows_t([0, 1, 2, 3, 4], [0, 1, 2, 3]))],
        [KeepChannels(torch.tensor([[0], [1]]))],
        [Demote(rows_t([1], [2]))],
        [KeepTokens(rows_t([0, 1], [0])), Demote(rows_t([1], []))],
        [Reposition(torch.arange(10, dtype=torch.int32) + 3)],
    ]
    for plan in plans:
        arrays = [np.random.default_rng(0).standard_normal((2, 5, n), np.float32) for n in (8, 5)]
        held = [weakref.ref(a) for a in arrays]
        layer = LayerKV(
            layer_idx=0,
            keys=torch.from_numpy(arrays[0]),
            values=torch.from_numpy(arrays[1]),
            positions=range(5),
        )
        del arrays
        applied = apply_plan(layer, plan, rope=ROPE)
        del layer
        assert all(ref() is None for ref in held), plan
        for part in applied:
            if part is not None:
                tensors = [part.keys, part.values, part.log_weight, part.channels]
                tensors += [part.positions] if isinstance(part.positions, torch.Tensor) else []
                for x in tensors:
                    if x is not None:
                        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


INDEX_ERRORS = [
    KeepTokens(rows_t([0])),
    KeepTokens(rows_t([0], [0], [0])),
    KeepTokens(rows_t([0, 0], [0])),
    KeepTokens(rows_t([1, 0], [0])),
    KeepTokens(rows_t([-1, 0], [0])),
    KeepTokens(rows_t([5], [0])),
    KeepTokens((torch.tensor([0], dtype=torch.int32), torch.tensor([0]))),
    KeepTokens((torch.tensor([[0]]), torch.tensor([0]))),
    KeepTokens((torch.tensor([True] * 5), torch.tensor([True] * 5))),
    Demote(rows_t([0])),
    Demote(rows_t([5], [])),
    Demote(rows_t([1, 1], [])),
    [KeepTokens(rows_t([0], [0])), Demote(rows_t([1], []))],
    Reposition(torch.arange(9, dtype=torch.int32)),
    Reposition(torch.arange(10)),
    Reposition(torch.arange(10, dtype=torch.int32).reshape(2, 5)),
    Reposition(torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 3, 4], dtype=torch.int32)),
    Reposition(torch.tensor([-7, 1, 2, 3, 4, 0, 1, 2, 3, 4], dtype=torch.int32)),
    Reposition(torch.tensor([0, 2, 2, 3, 4, 0, 1, 2, 3, 4], dtype=torch.int32)),
    Reposition(torch.tensor([4, 3, 2, 1, 0, 0, 1, 2, 3, 4], dtype=torch.int32)),
    KeepChannels(torch.tensor([[0, 1]])),
    KeepChannels(torch.tensor([0, 1])),
    KeepChannels(torch.tensor([[1, 0], [0, 1]])),
    KeepChannels(torch.tensor([[1, 1], [0, 1]])),
    KeepChannels(torch.tensor([[-1, 1], [0, 1]])),
    KeepChannels(torch.tensor([[0, 8], [0, 1]])),
    KeepChannels(torch.tensor([[0], [1]], dtype=torch.int32)),
    AppendToken((2,), torch.ones(1, 8), torch.ones(1, 5), (1.0,)),
    AppendToken((-1,), torch.ones(1, 8), torch.ones(1, 5), (1.0,)),
    AppendToken((0, 0), torch.ones(2, 8), torch.ones(2, 5), (1.0, 1.0)),
    AppendToken((0,), torch.ones(2, 8), torch.ones(1, 5), (1.0,)),
    AppendToken((0,), torch.ones(1, 8), torch.ones(1, 5), (1.0, 2.0)),
    AppendToken((0,), torch.ones(1, 7), torch.ones(1, 5), (1.0,)),
    AppendToken((0,), torch.ones(1, 8), torch.ones(1, 6), (1.0,)),
    AppendToken((0,), torch.ones(8), torch.ones(1, 5), (1.0,)),
    AppendToken((0,), torch.ones(1, 8), torch.ones(1, 5), (0.0,)),
    AppendToken((0,), torch.ones(1, 8), torch.ones(1, 5), (-1.0,)),
    AppendToken((0,), torch.ones(1, 8), torch.ones(1, 5), (math.nan,)),
    AppendToken((0,), torch.ones(1, 8), torch.ones(1, 5), (math.inf,)),
    AppendToken((0,), torch.ones(1, 8), torch.ones(1, 5), (1.0,), torch.tensor([math.nan])),
    AppendToken((0, 1), torch.ones(2, 8), torch.ones(2, 5), (1.0, 1.0), torch.zeros(1)),
]


@pytest.mark.parametrize("plan", INDEX_ERRORS, ids=map(str, range(len(INDEX_ERRORS))))
def test_wrong_indices_are_shape_errors(plan):
    """An index, shape or mass that does not fit is refused before anything is built."""
    with pytest.raises(ShapeError):
        apply_plan(layer_of((5, 5), ranged=True), plan, rope=ROPE)


def merge_of(head, src, dst, weight=1.0, axis="both"):
    return MergeTokens(
        torch.tensor([head]), torch.tensor([src]), torch.tensor([dst]), torch.tensor([weight]), axis
    )


def test_wrong_merges():
    """Heads, sources and destinations must exist, and a destination must be kept."""
    layer = layer_of((5, 3))
    keep = KeepTokens(rows_t([1, 2], [0]))
    for bad in ((2, 0, 0), (-1, 0, 0), (0, 5, 0), (0, -1, 0), (0, 0, 5), (1, 3, 0), (1, 0, -1)):
        with pytest.raises(ShapeError):
            apply_plan(layer, merge_of(*bad))
    for bad in ((0, 1, 0), (0, 1, 3), (1, 0, 1)):
        with pytest.raises(ShapeError, match="not kept"):
            apply_plan(layer, [keep, merge_of(*bad)])
    short = replace(merge_of(0, 1, 2), weight=torch.tensor([1.0, 2.0]))
    with pytest.raises(ShapeError, match="one length"):
        apply_plan(layer, short)
    with pytest.raises(ConfigError, match="axis"):
        apply_plan(layer, merge_of(0, 1, 2, axis="key"))


def test_wrong_sets_of_plans():
    """Two plans of a kind, things that are no plans, and moves that cannot be made are refused."""
    layer = layer_of((5, 5), ranged=True)
    keep = KeepTokens(rows_t([0], [0]))
    with pytest.raises(ConfigError, match="two KeepTokens"):
        apply_plan(layer, [keep, keep])
    with pytest.raises(ConfigError, match="is not a plan"):
        apply_plan(layer, [keep, "demote"])
    move = Reposition(torch.arange(10, dtype=torch.int32) % 5)
    with pytest.raises(ConfigError, match="needs the layer's RopeSpec"):
        apply_plan(layer, move)
    with pytest.raises(ConfigError, match="not fixed"):
        apply_plan(layer, move, rope=replace(ROPE, kind="dynamic"))
    with pytest.raises(ShapeError, match="of keys of 8"):
        apply_plan(layer, move, rope=replace(ROPE, first_channel=4))
    pruned = apply_plan(layer, KeepChannels(torch.tensor([[0, 1], [2, 3]]))).layer
    with pytest.raises(ConfigError, match="pruned channels"):
        apply_plan(pruned, move, rope=ROPE)


def test_channels_are_pruned_further_by_their_own_numbers():
    """KeepChannels of a pruned layer names the model's channels, not the columns left."""
    layer = layer_of((3, 2))
    once = apply_plan(layer, KeepChannels(torch.tensor([[1, 4, 7], [0, 2, 5]]))).layer
    twice = apply_plan(once, KeepChannels(torch.tensor([[7, 1], [5, 0]]).flip(1))).layer
    assert twice.channels.tolist() == [[1, 7], [0, 5]]
    assert torch.equal(twice.row(0).keys, layer.row(0).keys[:, [1, 7]])
    assert torch.equal(twice.row(1).keys, layer.row(1).keys[:, [0, 5]])
    with pytest.raises(ShapeError, match="not there"):
        apply_plan(once, KeepChannels(torch.tensor([[2], [0]])))
    columns = torch.tensor([[1, 0], [7, 5]])
    assert apply_plan(once, KeepChannels(columns.t())).layer.equal(twice)  # any strides


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64.0,
}


def llama3_frequencies(theta, dim):
    """Meta's published scaling, as in its reference code: by wavelength."""
    out = []
    for i in range(0, dim, 2):
        f = 1.0 / theta ** (i / dim)
        wave = 2 * math.pi / f
        if wave > 64 / 1.0:
            f = f / 8
        elif wave >= 64 / 4.0:
            smooth = (64 / wave - 1.0) / (4.0 - 1.0)
            f = (1 - smooth) * f / 8 + smooth * f
        out.append(f)
    return out


ROPES = {
    "default": (RopeSpec(theta=1e4, rotary_dim=16), {}),
    "partial": (RopeSpec(theta=1e4, rotary_dim=6), {}),
    "interleaved": (RopeSpec(theta=1e4, rotary_dim=16, interleaved=True), {}),
    "latent first": (RopeSpec(theta=1e6, rotary_dim=8, first_channel=8), {"first_channel": 8}),
    "mla interleaved": (
        RopeSpec(theta=1e4, rotary_dim=8, first_channel=6, interleaved=True),
        {"first_channel": 6},
    ),
    "llama3": (
        RopeSpec(theta=5e5, rotary_dim=16, kind="llama3", params=tuple(LLAMA3.items())),
        {"frequencies": llama3_frequencies(5e5, 16)},
    ),
    "linear": (
        RopeSpec(theta=1e4, rotary_dim=16, kind="linear", params=(("factor", 4.0),)),
        {"frequencies": [1e4 ** (-2 * i / 16) / 4 for i in range(8)]},
    ),
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rotation_by_a_shift_is_rotation_to_the_place(name, dtype):
    """Keys at p rotated by s are the keys at p + s, to the dtype's rounding, near and far."""
    rope, extra = ROPES[name]
    how = {
        "theta": rope.theta,
        "rotary_dim": rope.rotary_dim,
        "interleaved": rope.interleaved,
        **extra,
    }
    rng = random.Random(0)
    kind = getattr(torch, dtype)
    eps = torch.finfo(kind).eps
    plain = [[rng.gauss(0, 1) for _ in range(16)] for _ in range(12)]
    places = [0, 1, 5, 63, 64, 1000, 4095, 32767, 131071, 7, 9, 11]
    goals = [0, 64, 4, 63, 0, 1_000_003, 4096, 1, 131072, 2**31 - 1, 8, 12]
    keys = torch.tensor(
        [turn(k, p, **how) for k, p in zip(plain, places, strict=True)], dtype=torch.float64
    ).to(kind)
    shift = torch.tensor([g - p for g, p in zip(goals, places, strict=True)], dtype=torch.int32)
    moved = rotate(keys, shift, rope)
    assert moved.dtype == kind
    for i, goal in enumerate(goals):
        # The input's rounding turns with it (at most sqrt(2) of it), and the result's comes on top.
        # Far away, the angle itself is p * f in float64: 2**31 * 2**-53 is nothing.
        expected = turn(plain[i], goal, **how)
        size = max(map(abs, plain[i])) * 1.5
        for seen, want in zip(moved[i].tolist(), expected, strict=True):
            assert abs(seen - want) <= 2 * eps * size
    same = (shift == 0).nonzero()[:, 0]
    assert torch.equal(moved[same], keys[same])


def test_what_does_not_move_keeps_its_bits():
    """Infinities, NaN payloads and -0.0 stay as they are in entries that are not shifted."""
    raw = torch.tensor([0x7FC12345, -0x80000000, 0x7F800000, 1, 0x3F800000, 2, 3, 4]).to(
        torch.int32
    )
    keys = torch.stack([raw.view(torch.float32), torch.ones(8)])
    moved = rotate(keys, torch.tensor([0, 3], dtype=torch.int32), ROPE)
    assert torch.equal(moved[0].view(torch.int32), raw)
    assert not torch.equal(moved[1], keys[1])


# ---- budgets ----


@pytest.mark.parametrize(
    ("budget", "tokens", "expected"),
    [
        (0.1, 10, 1),
        (0.1, 11, 2),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (1.1e-1, 100, 11),
        (1.0, 7, 7),
        ("1.0", 7, 7),
        ("1.", 7, 7),
        (1e-9, 1, 1),
        (1e-300, 10**9, 1),
        (5e-324, 1, 1),
        ("0.25", 16, 4),
        (" 0.25 ", 16, 4),
        (".5", 3, 2),
        ("5e-1", 3, 2),
        ("2.5E-1", 16, 4),
        (0.5, 0, 0),
        (512, 1000, 512),
        ("512", 1000, 512),
        (512, 100, 100),
        (0, 100, 0),
        ("0", 100, 0),
        (1, 100, 1),
        (10**5000, 100, 100),
        (0.1, 10**30, 10**29),
        (np.float32(0.1), 10, 1),
        (np.float64(0.1), 10, 1),
        (np.int64(3), 10, 3),
    ],
    ids=lambda x: f"{x!r}"[:20] if not isinstance(x, int) or x < 10**18 else "huge",
)
def test_round_budget(budget, tokens, expected):
    """A point makes a fraction, read as the decimal it is written as and rounded up."""
    assert round_budget(budget, tokens) == expected


@pytest.mark.parametrize(
    "budget",
    [
        0.0,
        -0.0,
        -0.5,
        1.5,
        1.0000001,
        "0.0",
        "2.0",
        "1e3",
        "-0.1",
        -1,
        "-1",
        "1/3",
        "0.1/3",
        "",
        " ",
        "x",
        "0.x",
        "nan",
        "inf",
        math.nan,
        math.inf,
        -math.inf,
        None,
        True,
        False,
        [],
        "1e-401",
        "1e-999999999999",
        "1e999999999999",
        "1e",
        "9" * 5000,
        1 + 2j,
    ],
    ids=lambda b: repr(b)[:20],
)
def test_wrong_budgets(budget):
    """What is no count and no fraction in (0, 1] is a ConfigError, at once."""
    with pytest.raises(ConfigError):
        round_budget(budget, 10)


def test_budget_of_negative_prompts():
    """A prompt cannot have a negative length."""
    with pytest.raises(ConfigError):
        round_budget(0.5, -1)


@given(st.decimals("0.0001", "1", places=4), st.integers(0, 10**6), st.sampled_from([str, float]))
def test_ratios_round_up_exactly(ratio, tokens, form):
    """The result is the ceiling of the exact decimal product, as text and as float."""
    text = f"{ratio:f}"
    budget = text if form is str else float(text)
    expected = (Decimal(text) * tokens).to_integral_value(ROUND_CEILING)
    assert round_budget(budget, tokens) == expected
    assert tokens == 0 or round_budget(budget, tokens) >= 1


def test_budget_objects():
    """Budgets count whole entries per layer and head."""
    budget = Budget.uniform(0.1, num_tokens=25, kv_heads=[2, 1, 0])
    assert budget.tokens == ((3, 3), (3,), ())
    assert budget.total == 9
    assert Budget([[1, 2], [3]]) == Budget(((1, 2), (3,)))
    assert Budget(torch.tensor([[1, 2]])).tokens == ((1, 2),)
    for wrong in ([[-1]], [[1.5]], [[2.0]], [["3"]], [3]):
        with pytest.raises(ConfigError):
            Budget(wrong)
