# SPDX-License-Identifier: Apache-2.0
"""LazyEviction against its oracle, by hand, and with a window measured on a model."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import DynamicCache

import kvlib
from kvlib.artefacts import model_identity, save_artefact
from kvlib.attention import column_maxima
from kvlib.blocks import LayerKV
from kvlib.cache_rows import LayerRow, extend_entries
from kvlib.calibration.lazy import calibrate, percentile_80
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, Resources, build_policy
from kvlib.eviction.lazy import Lazy
from kvlib.model_spec import spec_for_model
from kvlib.registry import describe
from kvlib.testing.models import tiny_model
from tests.oracles.lazy import Entry, importance
from tests.oracles.lazy import Lazy as Oracle
from tests.test_eviction.test_oracles import HEADS, RELATIVE, random_attention
from tests.test_eviction.test_tova import first_layer

SCORE = 1e-12
"""Error of float64 scores, relative."""


class Driven:
    """A policy over one layer: a prompt, then passes whose attention is computed or made up."""

    def __init__(self, policy, prompt, heads=HEADS, dtype=torch.float32):
        self.policy = policy if isinstance(policy, Lazy) else build_policy(policy)
        if isinstance(prompt, int):
            prompt = torch.zeros(heads, prompt, 2, dtype=dtype)
        self.num_prompt = self.num_seen = prompt.shape[1]
        positions = torch.arange(self.num_seen, dtype=torch.int32).expand(len(prompt), -1)
        layer = LayerKV(layer_idx=0, keys=prompt, values=prompt, positions=positions)
        self.row = LayerRow(layer, LayerState())
        view = self.view(self.num_prompt, None)
        self.policy.on_prefill_chunk(view)
        assert list(self.policy.on_prefill_end([view])) == [()]
        assert view.state.nbytes == 0

    def view(self, num, maxima):
        return LayerView(
            layer=self.row.layer,
            state=self.row.state,
            num_new=num,
            num_prompt=self.num_prompt,
            num_seen=self.num_seen,
            column_maxima=maxima,
        )

    def forward(self, keys, attention):
        """New keys [Hkv, T, D]; attention(layer) gives the maxima."""
        num = keys.shape[1]
        positions = torch.arange(self.num_seen, self.num_seen + num, dtype=torch.int32)
        self.num_seen += num
        old = self.row.layer.lengths
        self.row.append(keys, keys, positions)
        extend_entries(self.row.state, old, self.row.layer)
        plans = self.policy.on_step([self.view(num, attention(self.row.layer))])
        self.row.apply(plans[0], None)
        return self

    def step(self, active=(), num=1, paid=1.0):
        """A pass of `num` tokens that pays so much to the tokens at these positions, else 0."""
        layer = self.row.layer
        keys = torch.zeros(layer.num_kv_heads, num, 2, dtype=layer.keys.dtype)

        def attention(layer):
            hit = torch.isin(layer.positions_tensor(), torch.tensor(active, dtype=torch.int32))
            return hit[:, None].float() * paid

        return self.forward(keys, attention)

    @property
    def positions(self):
        return self.row.layer.positions_tensor().tolist()

    def of(self, position, head=0):
        """TS and MRI."""
        index = self.positions[head].index(position)
        entries = self.row.state.entries
        return tuple(int(entries[x][head, index]) for x in ("last_active", "max_recurrence"))

    def numbers(self):
        entries = self.row.state.entries
        return entries["last_active"].tolist(), entries["max_recurrence"].tolist()


@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 3, 4, 7]),
    prompt=st.integers(1, 16),
    sizes=st.lists(st.sampled_from([1, 1, 1, 1, 2, 5, 9]), min_size=4, max_size=16),
    window=st.integers(1, 6),
    above=st.integers(1, 8),
    alpha=st.sampled_from([1e-4, 0.01, 0.05, 0.1, 0.3]),
    group=st.sampled_from(["max", "mean"]),
    offset=st.sampled_from([0, 1]),
)
@example(1, 4, 12, [1] * 16, 3, 4, 0.1, "mean", 1)
@example(2, 7, 12, [1, 5, 1, 9, 1, 1, 2], 4, 4, 0.05, "max", 0)
def test_choices_are_the_oracles(seed, groups, prompt, sizes, window, above, alpha, group, offset):
    """Positions, TS and MRI after every pass, of one token and of many."""
    budget = window + above
    parts = random_attention(seed, groups, [prompt, *sizes])
    mine = Driven(
        f"lazy:budget={budget},window={window},alpha={alpha},group={group},h1_offset={offset}",
        torch.from_numpy(parts[0][1]),
    )
    theirs = Oracle(HEADS, budget, window, alpha, group, offset)
    theirs.prompt(parts[0][1])
    for q, k, _ in parts[1:]:
        theirs.forward(q, k)
        assume(theirs.alpha_margin > RELATIVE and theirs.margin > SCORE)
        queries = torch.from_numpy(q)
        mine.forward(
            torch.from_numpy(k), lambda layer, queries=queries: column_maxima(queries, layer)
        )
        assert mine.positions == theirs.positions
        assert mine.numbers() == (
            [[entry.last_active for entry in row] for row in theirs.rows],
            [[entry.recurrence for entry in row] for row in theirs.rows],
        )


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("removed", [0, 2])
def test_a_real_model_over_a_real_cache(padding, removed):
    """Padded beside another sequence, and with tokens taken back, which count for nothing."""
    model = tiny_model(num_attention_heads=6, head_dim=8, initializer_range=0.3)
    ids = torch.randint(0, 199, (2, 70), generator=torch.Generator().manual_seed(3))
    cache = kvlib.KVCache(model, "lazy:budget=9,window=4,alpha=0.04")
    theirs = Oracle(2, 9, 4, 0.04)
    mask = torch.ones(2, 0, dtype=torch.int64)
    seen = at = 0
    for num in (20 + padding, 1, 1, 6, 1, 1, 1, 1, 4, 1):
        part = ids[:, at : at + num]
        new = torch.ones(2, num, dtype=torch.int64)
        if at == 0:
            new[1, :padding] = 0
        mask = torch.cat([mask, new], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -num:]
        if removed:
            cache.activate_past_recording()
        model(part, attention_mask=mask, position_ids=positions, past_key_values=cache)
        gone = removed if removed and num > removed else 0
        if removed:
            cache.crop(-gone)
        mask = mask[:, : mask.shape[1] - gone]
        at += num - gone
        valid = part[1:, (padding if not seen else 0) : num - gone]
        places = torch.arange(seen, seen + valid.shape[1])[None]
        q, k = first_layer(model, valid, places)
        if seen:
            theirs.forward(q, k)
        else:
            theirs.prompt(k)
        seen += valid.shape[1]
        assert theirs.alpha_margin > RELATIVE
        assert theirs.margin > SCORE
        held = cache.layer_kv(0, 1).positions_tensor()
        assert held.tolist() == theirs.positions
    recurrences = {entry.recurrence for row in theirs.rows for entry in row}
    assert len(theirs.rows[0]) < seen
    assert len(recurrences) > 2


# By hand


def test_a_trace():
    """Active at 3, 10 and 12: quiet for 3, 7 and 2 steps."""
    mine = Driven("lazy:budget=100,window=50", 4)
    for t in range(1, 15):
        mine.step([2] if t in (3, 10, 12) else [])
        assert mine.row.state.values["step"] == t
        if t == 3:
            assert mine.of(2) == (3, 3)
    assert mine.of(2) == (12, 7)
    assert mine.of(1) == (0, 0)  # never active
    assert mine.of(4 + 8) == (8, 0)  # brought by step 9
    assert all(x.dtype == torch.int32 for x in mine.row.state.entries.values())


@pytest.mark.parametrize("t", [1, 2, 9])
def test_active_at_its_own_first_step(t):
    """Then a token's recurrence interval is 1."""
    mine = Driven("lazy:budget=100,window=50", 3)
    for now in range(1, t + 1):
        mine.step([2 + now])
    assert mine.of(2 + t) == (t, 1)


def test_alpha_is_reached_or_not():
    """Attention of exactly alpha is active; what is just below is not."""
    mine = Driven("lazy:budget=100,window=50,alpha=0.25", 3)
    mine.step([0], paid=0.25)
    mine.step([1], paid=float(np.nextafter(np.float32(0.25), np.float32(0))))
    assert (mine.of(0), mine.of(1)) == ((1, 1), (0, 0))


@pytest.mark.parametrize(("group", "active"), [("max", [0, 1]), ("mean", [1])])
def test_groups(group, active):
    """One query head of three is enough, or their mean has to be."""
    mine = Driven(f"lazy:budget=100,window=50,alpha=0.25,group={group}", 2, heads=1)
    paid = torch.tensor([[[0.5, 0.1, 0.0], [0.1, 0.3, 0.0], [0.0, 0.4, 0.0]]])
    mine.forward(torch.zeros(1, 1, 2), lambda layer: paid)
    assert [p for p in range(3) if mine.of(p)[1]] == active


@pytest.mark.parametrize("prompt", [3, 8, 9, 40])
def test_only_multiples_of_the_window_evict(prompt):
    """Rows are cut to the budget there, if above, and grow by one anywhere else."""
    budget, window = 8, 5
    mine = Driven(f"lazy:budget={budget},window={window}", prompt)
    held = prompt
    for t in range(1, 43):
        mine.step([t % 7])
        held += 1
        if t % window == 0:
            held = min(held, budget)
        assert [len(row) for row in mine.positions] == [held] * HEADS
        if t > window:
            assert held < budget + window
            newest = list(range(prompt + t // window * window - window, prompt + t))
            assert mine.positions[0][-len(newest) :] == newest


def test_recurring_tokens_outlive_quiet_ones():
    """Of the prompt stay what is active in long or short intervals; what fell silent goes."""
    mine = Driven("lazy:budget=7,window=5", 6)
    for t in range(1, 11):
        active = [0] * (t % 5 == 0) + [1] * (t == 2) + [2] * (t % 2 == 0)
        mine.step(active)
    # At t = 5, quiet and MRI: token 0 has 0 and 5, token 1 3 and 2, token 2 1 and 2: 1.04, 0.90
    # and 1.29; the others were never active.
    assert mine.positions[0][:2] == [0, 2]
    assert mine.positions[0][2:] == [11, 12, 13, 14, 15]


@pytest.mark.parametrize("offset", [0, 1])
def test_scores(offset):
    """H1 and H2 at the values that the method's description gives."""
    mine = Driven(Lazy(budget=100, window=50, h1_offset=offset), 6)
    mine.step()
    numbers = [(20, 1), (20, 5), (15, 5), (0, 5), (20, 0), (0, 1), (1, 19)]
    entries = mine.row.state.entries
    entries["last_active"] = torch.tensor([[n[0] for n in numbers]] * HEADS, dtype=torch.int32)
    entries["max_recurrence"] = torch.tensor([[n[1] for n in numbers]] * HEADS, dtype=torch.int32)
    mine.row.state.values["step"] = torch.tensor(20)
    scores = mine.policy.scores(mine.view(1, None))
    expected = [importance(20 - last, longest, offset) for last, longest in numbers]
    np.testing.assert_allclose(scores.numpy(), [expected] * HEADS, rtol=1e-12)
    if offset == 0:
        rounded = [2, 1.036, 0.574, 0.072, 0, 1, 0.538]
        np.testing.assert_allclose(scores[0].numpy(), rounded, atol=1e-3)
    else:
        assert abs(float(scores[0, 0]) - 1.538) < 1e-3  # H1 weighs half as much


def test_of_equal_ones_the_earlier_stay():
    """Nothing was ever active: all score 0."""
    mine = Driven("lazy:budget=6,window=2", 9)
    mine.step().step()
    assert mine.positions == [[0, 1, 2, 3, 9, 10]] * HEADS


def test_a_pass_of_many_tokens():
    """One observation: the clock, TS of old and new entries, and the decision that is passed."""
    mine = Driven("lazy:budget=9,window=4", 3)
    mine.step()
    mine.step([0, 3, 4, 6], num=5)  # t = 2..6: positions 4..8; the multiple 4 is passed
    assert mine.row.state.values["step"] == 6
    assert [mine.of(p) for p in (0, 3)] == [(6, 6), (6, 6)]
    assert [mine.of(p) for p in (4, 5, 6, 8)] == [(6, 5), (2, 0), (6, 3), (5, 0)]
    mine.step(num=2)  # t = 8 is reached
    assert mine.positions == [[0, 1, 3, 4, 6, 7, 8, 9, 10]] * HEADS
    mine.step(num=3)  # t = 11
    assert len(mine.positions[0]) == 12
    mine.step(num=30)  # more than the budget at once, and several multiples
    assert len(mine.positions[0]) == 9
    assert mine.positions[0][-4:] == [40, 41, 42, 43]


def test_counters_are_exact_at_20000():
    """Whatever the model computes in."""
    mine = Driven("lazy:budget=30000,window=40", 2, heads=1, dtype=torch.bfloat16)
    mine.step([0], num=19998)
    mine.step([1])
    mine.step([0, 1, 2, 3, 20001])
    last, longest = mine.numbers()
    assert [last[0][i] for i in (0, 1, 2, 20001)] == [20000] * 4
    assert [longest[0][i] for i in (0, 1, 2, 3, 20001)] == [19998, 19999, 20000, 19999, 1]
    assert (last[0][20000], last[0][19999]) == (19998, 19997)


@pytest.mark.parametrize(
    ("share", "prompt", "budget", "lag"),
    [(0.5, 40, 20, 6), (0.5, 13, 7, 6), (0.5, 12, 6, 5), (0.1, 20, 2, 1), (0.1, 10, 1, 1)],
)
def test_fractions_below_the_window(share, prompt, budget, lag):
    """The window is one entry less than the budget, but at least 1."""
    mine = Driven(f"lazy:budget={share},window=6", prompt)
    for t in range(1, 15):
        mine.step()
        held = budget + t % lag if t >= lag else prompt + t
        assert [len(row) for row in mine.positions] == [held] * HEADS
    assert mine.positions[0][-lag:] == list(range(prompt + 14 - lag, prompt + 14))
    assert (mine.positions[0][0] == 0) == (budget > lag)  # the earliest of those that tie


def test_full_fraction():
    """Asks for nothing and is not even called in steps."""
    policy = Lazy(budget=1.0)
    assert not policy.needs.any_signal
    assert not policy.needs.steps
    assert Driven(policy, 5).step([0]).row.state.nbytes == 0


def test_passes_without_tokens_and_without_attention():
    """A sequence that is padding only in a pass lets its clock stand; a missing signal is named."""
    mine = Driven("lazy:budget=6,window=2", 9)
    mine.step().step()
    before = mine.row.state.fork()
    assert mine.policy.on_step([mine.view(0, None)]) == [()]
    assert all(torch.equal(x, before.entries[k]) for k, x in mine.row.state.entries.items())
    assert mine.row.state.values["step"] == 2
    with pytest.raises(ConfigError, match="lazy needs the attention of every step"):
        mine.policy.on_step([mine.view(1, None)])


# With others


def test_rows_that_are_not_equally_long():
    """Every head goes on as it would in a layer of its own."""
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 6, 12)
    policy = Lazy(budget=100, window=50, alpha=0.5)

    def noted(layer, num, maxima, state):
        view = LayerView(
            layer=layer, state=state, num_new=num, num_prompt=3, num_seen=20, column_maxima=maxima
        )
        policy.on_step([view])
        return state.entries["last_active"], state.entries["max_recurrence"], policy.scores(view)

    maxima = torch.rand(3, 2, max(lengths), generator=generator)
    rows = []
    for n in lengths:
        keys = torch.zeros(1, n, 2)
        positions = torch.arange(20 - n, 20, dtype=torch.int32)[None]
        layer = LayerKV(layer_idx=0, keys=keys, values=keys, positions=positions)
        numbers = torch.randint(0, 9, (2, n), generator=generator, dtype=torch.int32)
        rows.append((layer, numbers))
    together = LayerKV.from_rows(0, [layer.row(0) for layer, _ in rows])
    assert not together.is_dense
    packed = torch.cat([numbers for _, numbers in rows], dim=1)

    def state_of(last, longest):
        entries = {"last_active": last, "max_recurrence": longest}
        return LayerState(entries, {"step": torch.tensor(10)})

    last, longest, scores = noted(together, 3, maxima, state_of(*packed))
    parts = [x.split(list(lengths)) for x in (last, longest)]
    for h, (layer, numbers) in enumerate(rows):
        n = lengths[h]
        alone = noted(layer, 3, maxima[h : h + 1, :, :n], state_of(*(x[None] for x in numbers)))
        assert torch.equal(alone[0][0], parts[0][h])
        assert torch.equal(alone[1][0], parts[1][h])
        assert torch.equal(alone[2][0], scores[h, :n])


@torch.no_grad()
@pytest.mark.parametrize("more", ["adakv", "joint", "protect:sinks=3,window=2", "think:ratio=0.25"])
def test_compositions(more):
    """The prompt stays whole until the first multiple; then the parts do what they are for."""
    model = tiny_model()
    cache = kvlib.KVCache(model, f"lazy:budget=12,window=4,alpha=0.02+{more}")
    ids = torch.randint(0, 199, (1, 60), generator=torch.Generator().manual_seed(1))
    at = 0
    for num in (30, 1, 1, 1, 1, 3, 1, 2, 1, 1, 4):
        model(ids[:, at : at + num], past_key_values=cache)
        at += num
        lengths = [cache.layer_kv(layer).lengths for layer in range(3)]
        if at < 34:
            assert lengths == [(at, at)] * 3
        if at in (34, 38, 42, 46):
            assert sum(map(sum, lengths)) == 3 * 2 * 12
    if "protect" in more:
        held = cache.layer_kv(0).positions.tolist()
        assert all(row[:3] == [0, 1, 2] and row[-2:] == [44, 45] for row in held)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget=101", "budget of 101 tokens is not above the window of 101"),
        ("budget=5,window=5", "budget of 5 tokens is not above the window of 5"),
        ("window=0", "lazy: window must be 1 or more, got 0"),
        ("alpha=0.0", r"alpha is a share of attention in \(0, 1\], got 0.0"),
        ("alpha=1.5", r"alpha is a share of attention in \(0, 1\], got 1.5"),
        ("group=sum", "lazy: group is max or mean, got 'sum'"),
        ("h1_offset=2", "h1_offset is 0 .* or 1 .*, got 2"),
        ("digest=00", "give profile=FILE too"),
        ("profile=/nowhere/lazy.st", "make it with kvlib calibrate lazy"),
    ],
)
def test_wrong_parameters(text, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(f"lazy:{text}")


def test_the_default_window_is_in_the_text():
    assert Lazy() == Lazy(window=101)
    assert "window=101," in describe(Lazy())
    assert build_policy(describe(Lazy(window=7))) == Lazy(window=7)


# The window of a model


@given(st.lists(st.integers(0, 60), min_size=1, max_size=200))
def test_percentile(intervals):
    """The smallest interval that 80% of those above 0 do not exceed."""
    active = [n for n in intervals if n]
    counts = torch.bincount(torch.tensor(intervals))
    if not active:
        with pytest.raises(ConfigError, match="calibrate with a smaller alpha"):
            percentile_80(counts)
        return
    found = percentile_80(counts)
    assert found in active
    assert 5 * sum(n <= found for n in active) >= 4 * len(active)
    assert 5 * sum(n < found for n in active) < 4 * len(active)


@torch.no_grad()
def test_calibration_counts_what_eager_attention_pays(tmp_path):
    """The histogram is the oracle's over the model's own attention weights; windows follow it."""
    model = tiny_model(initializer_range=0.3)
    calls = []
    found = calibrate(
        model,
        None,
        "x",
        tmp_path / "lazy.st",
        progress=lambda *x: calls.append(x),
        samples=2,
        tokens=12,
        new_tokens=10,
        alpha=0.07,
        seed=5,
    )
    eager = tiny_model(initializer_range=0.3)
    eager.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(5)
    counts = [0] * 11
    for _ in range(2):
        ids = torch.randint(0, 199, (1, 12), generator=generator)
        cache = DynamicCache(config=eager.config)
        oracles = [Oracle(2, 10**6, 10**5, 0.07) for _ in range(3)]
        for oracle in oracles:
            oracle.prompt([[None] * 12] * 2)
        for t in range(11):
            out = eager(ids, past_key_values=cache, output_attentions=True)
            ids = out.logits[:, -1:].argmax(-1)
            for oracle, weights in zip(oracles if t else [], out.attentions, strict=False):
                for h, row in enumerate(oracle.rows):
                    row.append(Entry(11 + t, None, t - 1))
                    oracle.note(row, weights[0, 3 * h : 3 * h + 3, 0].T.double().tolist(), t)
                assert oracle.alpha_margin > RELATIVE
        for oracle in oracles:
            for row in oracle.rows:
                for entry in row:
                    counts[entry.recurrence] += 1
    assert found.tensors["max_recurrence"].tolist() == counts
    active = np.repeat(np.arange(1, 11), counts[1:])
    assert found.tensors["window"] == np.percentile(active, 80, method="inverted_cdf")
    assert calls == [(1, 2), (2, 2)]


def measured(tmp_path, name="lazy.st", **changes):
    options = {"samples": 1, "tokens": 30, "new_tokens": 12, "alpha": 0.01, **changes}
    return calibrate(tiny_model(initializer_range=0.3), None, "x", tmp_path / name, **options)


def test_calibration_depends_on_its_seed_only(tmp_path):
    first, again, other = (
        measured(tmp_path, f"{i}", seed=seed, alpha=0.05) for i, seed in enumerate((1, 1, 2))
    )
    same = torch.equal(first.tensors["max_recurrence"], again.tensors["max_recurrence"])
    assert same
    assert first.tensors["window"] == again.tensors["window"]
    assert not torch.equal(first.tensors["max_recurrence"], other.tensors["max_recurrence"])
    assert first.kind == "lazy"
    assert first.settings == {
        "samples": "1",
        "tokens": "30",
        "new_tokens": "12",
        "alpha": "0.05",
        "group": "max",
        "seed": "1",
    }


def test_calibration_refuses(tmp_path):
    with pytest.raises(ConfigError, match="must be 1 or more, got 0, 30 and 12"):
        measured(tmp_path, samples=0)
    with pytest.raises(ConfigError, match="calibrate with a smaller alpha"):
        measured(tmp_path, alpha=1.0)


class Letters:
    """A tokenizer with one token for two letters, and one that begins every text."""

    def __call__(self, text, *, truncation, max_length):
        pairs = [ord(c) % 199 for c in text[::2]]
        return {"input_ids": [1, *pairs][:max_length]}


def test_calibration_on_text(tmp_path):
    """Tokens come from the text, as many as were asked for; a text that is too short is refused."""
    found = calibrate(
        tiny_model(), Letters(), "x", tmp_path / "a", samples=1, tokens=40, new_tokens=5, alpha=0.01
    )
    assert found.tensors["max_recurrence"].sum() == 3 * 2 * (40 + 5)
    with pytest.raises(ConfigError, match=r"a piece of the text has \d+ tokens"):
        calibrate(tiny_model(), Letters(), "x", tmp_path / "a", tokens=10**8)


def test_a_policy_with_a_profile(tmp_path):
    """The window is the profile's, and the text says which file it was."""
    found = measured(tmp_path)
    window = int(found.tensors["window"])
    path = tmp_path / "lazy.st"
    policy = build_policy(f"lazy:budget=200,alpha=0.01,profile={path}")
    assert (policy.window, policy.digest) == (window, found.digest)
    assert build_policy(describe(policy)) == policy
    assert f"digest={found.digest}" in describe(policy)
    measured(tmp_path, seed=9)  # another file in its place
    with pytest.raises(ConfigError, match="the method says"):
        build_policy(describe(policy))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha=0.01,window=1000", "is .*, not 1000: leave out one of them"),
        ("alpha=0.02", "measured with alpha=0.01, not 0.02"),
        ("alpha=0.01,group=mean", "measured with group=max, not mean"),
        ("alpha=0.01,budget=1", "not above the window"),
        ("alpha=0.01,digest=0011223344556677", "the method says 0011223344556677"),
    ],
)
def test_a_profile_that_does_not_fit(tmp_path, text, message):
    measured(tmp_path)
    with pytest.raises(ConfigError, match=message):
        build_policy(f"lazy:{text},profile={tmp_path / 'lazy.st'}")


def test_a_profile_of_something_else(tmp_path):
    """Another kind of artefact, one without a window, and one of another model."""
    path = tmp_path / "lazy.st"
    for kind, tensors, message in (
        ("razor", {"window": torch.tensor(5)}, "artefact of 'razor'"),
        ("lazy", {"window": torch.tensor(5.0)}, "holds no window"),
        ("lazy", {"windows": torch.tensor(5)}, "holds no window"),
    ):
        save_artefact(path, kind=kind, model="m", tensors=tensors, settings={})
        with pytest.raises(ConfigError, match=message):
            Lazy(profile=str(path))
    measured(tmp_path)
    policy = Lazy(profile=str(path), alpha=0.01)
    policy.check(Resources())
    policy.check(
        Resources(identity=lambda: model_identity(spec_for_model(tiny_model(), model_id="x")))
    )
    with pytest.raises(ConfigError, match="run kvlib calibrate lazy"):
        policy.check(Resources(identity=lambda: "f" * 32))
    Lazy(window=5).check(Resources(identity=lambda: "f" * 32))
