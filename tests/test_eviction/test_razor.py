# SPDX-License-Identifier: Apache-2.0
"""RazorAttention against its oracle, and what its documentation claims."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import kvlib
from kvlib.artefacts import model_identity, save_artefact
from kvlib.attention import attend
from kvlib.blocks import SYNTHETIC, LayerKV
from kvlib.cache_rows import LayerRow
from kvlib.errors import ConfigError
from kvlib.eviction import LayerState, LayerView, Resources, build_policy
from kvlib.eviction.head_roles import retrieval_heads
from kvlib.eviction.razor import Razor
from kvlib.model_spec import spec_for_model
from kvlib.registry import describe
from kvlib.spec import RopeSpec
from kvlib.testing.models import tiny_model
from kvlib.testing.recall_model import RETRIEVAL_HEAD, recall_model, recall_prompt
from tests.oracles import razor as oracle
from tests.test_eviction.test_oracles import HEADS, random_attention

ROPE = RopeSpec(theta=1e4, rotary_dim=8)


class Driven:
    """A policy over one layer, as a cache would drive it, with the output of its attention."""

    def __init__(self, policy, *, rope=ROPE, dtype=torch.float32, layer_idx=0, num_layers=1):
        self.policy, self.rope, self.dtype = policy, rope, dtype
        self.layer_idx, self.num_layers = layer_idx, num_layers
        self.row = None
        self.num_seen = self.num_prompt = 0

    def forward(self, q, k, v):
        q, k, v = (torch.as_tensor(x).to(self.dtype) for x in (q, k, v))
        num = k.shape[1]
        positions = torch.arange(self.num_seen, self.num_seen + num, dtype=torch.int32)
        self.num_seen += num
        is_prompt = self.row is None
        if is_prompt:
            self.num_prompt = num
            held = positions.expand(len(k), -1)
            layer = LayerKV(layer_idx=self.layer_idx, keys=k, values=v, positions=held)
            self.row = LayerRow(layer, LayerState())
        else:
            self.row.append(k, v, positions)
        output = attend(q, self.row.layer).output
        view = LayerView(
            layer=self.row.layer,
            state=self.row.state,
            num_new=num,
            num_prompt=self.num_prompt,
            num_seen=self.num_seen,
            rope=self.rope,
            place=self.layer_idx,
            num_layers=self.num_layers,
        )
        decide = self.policy.on_prefill_end if is_prompt else self.policy.on_step
        self.plans = decide([view])[0]
        self.row.apply(self.plans, self.rope)
        return output.double().numpy()

    def real(self, head):
        positions = self.row.layer.row(head).positions
        return positions[positions != SYNTHETIC].tolist()

    def compensation(self, head):
        """Key, value and log weight of the synthetic entry; None without one."""
        row = self.row.layer.row(head)
        if int(row.positions[-1]) != SYNTHETIC:
            assert SYNTHETIC not in row.positions.tolist()
            return None
        assert row.positions.tolist().count(SYNTHETIC) == 1
        return row.keys[-1], row.values[-1], float(row.log_weight[-1])


def assert_oracle(mine, theirs):
    """Real entries, compensation tokens and their weights."""
    mine.row.layer.validate()
    for head in range(HEADS):
        assert mine.real(head) == theirs.kept[head]
        found = mine.compensation(head)
        if not theirs.dropped[head]:
            assert found is None
            continue
        keys, values = theirs.compensation(head)
        np.testing.assert_allclose(found[0].double(), keys, atol=1e-6)
        np.testing.assert_allclose(found[1].double(), values, atol=1e-6)
        assert found[2] == pytest.approx(math.log(len(theirs.dropped[head])), abs=1e-6)
        weights = mine.row.layer.row(head).log_weight[:-1]
        assert not weights.any()


@given(
    seed=st.integers(0, 2**31),
    group=st.sampled_from([1, 3, 4, 7]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    prompt=st.integers(1, 30),
    sinks=st.integers(0, 4),
    s0=st.integers(0, 8),
    c=st.sampled_from([1, 2, 5, 1000]),
    whole=st.sampled_from(["none", "0.0", "0.1", "0.0/0.1", "all"]),
)
@example(seed=0, group=4, sizes=[1] * 7, prompt=30, sinks=0, s0=0, c=1000, whole="none")
def test_entries_and_attention_are_the_oracles(seed, group, sizes, prompt, sinks, s0, c, whole):
    """Prompt, steps of one token and of many: rows, means, weights and the attention's output."""
    named = {"none": (), "all": (0, 1), "0.0/0.1": (0, 1), "0.0": (0,), "0.1": (1,)}[whole]
    mine = Driven(Razor(heads=whole, sinks=sinks, s0=s0, c=float(c)))
    theirs = oracle.RazorLayer(HEADS, named, sinks=sinks, s0=s0, c=c)
    for parts in random_attention(seed, group, (prompt, *sizes)):
        expected = theirs.forward(*parts)
        np.testing.assert_allclose(mine.forward(*parts), expected, atol=3e-5)
        assert_oracle(mine, theirs)


def test_a_log_weight_is_multiplicity():
    """An entry with log n added to its logit is n entries."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn((4, 1, 8), generator=generator)
    k, v = torch.randn((2, 2, 9, 8), generator=generator)
    weight = torch.zeros(2, 9)
    weight[:, 3] = math.log(5)
    positions = torch.arange(9, dtype=torch.int32).expand(2, -1)
    one = LayerKV(layer_idx=0, keys=k, values=v, positions=positions, log_weight=weight)
    index = torch.tensor([0, 1, 2, *[3] * 5, *range(4, 9)])
    places = torch.arange(13, dtype=torch.int32).expand(2, -1)
    many = LayerKV(layer_idx=0, keys=k[:, index], values=v[:, index], positions=places)
    assert torch.allclose(attend(q, one).output, attend(q, many).output, atol=1e-6)


def test_nothing_is_lost_where_all_dropped_keys_are_equal():
    """The compensated attention is full attention then, and is not without the weight."""
    rng = np.random.default_rng(0)
    sizes = (40, *[1] * 10)
    num = sum(sizes)
    q, k, v = (
        rng.standard_normal((heads, num, 8)).astype(np.float32)
        for heads in (2 * HEADS, HEADS, HEADS)
    )
    k[:, 4:-5] = k[:, 4:5]  # all that will ever be dropped
    mine = Driven(Razor(heads="none", s0=5, c=1e6, sinks=4))
    stop = 0
    for n in sizes:
        start, stop = stop, stop + n
        output = mine.forward(q[:, start:stop], k[:, start:stop], v[:, start:stop])
    places = torch.arange(num, dtype=torch.int32).expand(HEADS, -1)
    whole = LayerKV(layer_idx=0, keys=torch.tensor(k), values=torch.tensor(v), positions=places)
    full = attend(torch.tensor(q[:, -1:]), whole).output.numpy()
    np.testing.assert_allclose(output, full, atol=2e-6)
    held = mine.row.layer
    assert held.lengths == (4 + 5 + 1,) * HEADS
    unweighted = torch.zeros_like(held.log_weight)
    lost = LayerKV(
        layer_idx=0,
        keys=held.keys,
        values=held.values,
        positions=held.positions,
        log_weight=unweighted,
    )
    assert np.abs(attend(torch.tensor(q[:, -1:]), lost).output.numpy() - full).max() > 1e-2


def test_the_mean_goes_on_in_bfloat16():
    """Token by token it is the mean of all at once, although bfloat16 could not add them up."""
    generator = torch.Generator().manual_seed(0)
    late = torch.arange(1500) >= 600
    k = torch.randn((HEADS, 1500, 8), generator=generator) + 8.0 * late[:, None]
    k = k.bfloat16()
    mine = Driven(Razor(heads="none", s0=2, c=1e6, sinks=1), dtype=torch.bfloat16)
    for part in k.split([600, *[1] * 900], dim=1):
        mine.forward(part[:, :1, :1].expand(HEADS, part.shape[1], 8), part, part)
    for head in range(HEADS):
        keys, values, weight = mine.compensation(head)
        expected = k[head, 1:-2].double().mean(0)
        assert torch.equal(keys, expected.bfloat16())
        assert torch.equal(values, keys)
        assert weight == pytest.approx(math.log(1497), abs=1e-6)
    mean = k[0, 1:599].double().mean(0).bfloat16()
    for n, key in enumerate(k[0, 599:-2], 598):
        mean = mean + (key - mean) / (n + 1)
    assert float((mean - expected).abs().max()) > 0.5  # what it would be without float32 sums


@pytest.mark.parametrize(("num", "gone"), [(14, 0), (15, 1), (16, 2)])
def test_short_prompts_are_left_alone(num, gone):
    """Up to sinks + window nothing is planned and nothing remembered; one more is itself."""
    ((q, k, v),) = random_attention(0, 1, (num,))
    mine = Driven(Razor(heads="none", s0=10, c=5.0, sinks=4))
    before = torch.tensor(k), torch.tensor(v)
    mine.forward(q, k, v)
    assert mine.row.layer.lengths == (14 + (gone > 0),) * HEADS
    assert bool(mine.plans) == bool(mine.row.state.values) == bool(gone)
    if gone == 0:
        assert torch.equal(mine.row.layer.keys, before[0])
        assert torch.equal(mine.row.layer.values, before[1])
    if gone == 1:
        key, value, weight = mine.compensation(0)
        assert torch.equal(key, before[0][0, 4])
        assert torch.equal(value, before[1][0, 4])
        assert weight == 0


def test_the_window_grows_and_takes_nothing_back():
    """It is a share of all tokens; the oldest entry never gets younger positions before it."""
    mine = Driven(Razor(heads="none", s0=0, c=4.0, sinks=1))
    first, held = [], []
    for parts in random_attention(0, 1, (40, *[1] * 40)):
        mine.forward(*parts)
        held.append(len(mine.real(0)) - 1)
        first.append(mine.real(0)[1])
    assert held == [math.ceil(n / 4) for n in range(40, 81)]
    assert first == sorted(first)
    assert Razor(heads="none").window(20_000) == 4000
    assert Razor(heads="none").window(20_001) == 4001
    assert Razor(heads="none", c=2.2, s0=0).window(22) == 10  # the decimal as it is written


def test_bytes_that_are_kept():
    """With p of the heads whole, p + (1 - p) / c of the entries stay, sinks and means besides."""
    model = tiny_model(num_hidden_layers=3)
    ids = torch.randint(0, 199, (1, 500), generator=torch.Generator().manual_seed(0))
    caches = [kvlib.KVCache(model, policy) for policy in (Razor(heads="0.1", s0=0), "full")]
    for cache in caches:
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
    lengths = [caches[0].layer_kv(index).lengths for index in range(3)]
    assert lengths == [(105, 500), (105, 105), (105, 105)]
    per_entry = 2 * 8 * 4 + 4 + 4  # position and weight
    sums = 6 * 2 * 8 * 4 + 3 * 2 * 8  # and the number of dropped tokens
    assert caches[0].nbytes <= 1025 * per_entry + sums + 500
    assert caches[0].nbytes < 0.41 * caches[1].nbytes


# In a model


@pytest.fixture(scope="module")
def recall():
    return recall_model(256)


def answers(model, policy, prompt):
    """Share of the prompt's values that the model finds after it was compressed."""
    ids = torch.tensor([prompt.input_ids])
    cache = kvlib.KVCache(model, policy, model_id="recall")
    right = 0
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        for index, value in enumerate(prompt.values):
            ask = torch.tensor([prompt.question(index)])
            logits = model(ask, past_key_values=cache.fork(), use_cache=True).logits
            right += int(logits[0, -1].argmax()) == value
    return right / len(prompt.values)


def test_the_retrieval_head_alone_keeps_recall(recall):
    """A fifth of the other heads is enough, as long as the retrieval head is whole."""
    prompt = recall_prompt(40, 256)
    head = "{}.{}".format(*RETRIEVAL_HEAD)
    assert answers(recall, f"razor:heads={head},s0=8,c=10.0", prompt) == 1
    assert answers(recall, "razor:heads=none,s0=8,c=10.0", prompt) < 0.4
    assert answers(recall, "razor:heads=all", prompt) == 1


def profile(path, induction, echo, *, model="model", layers=(0, 1)):
    tensors = {"layers": torch.tensor(layers), "induction": torch.tensor(induction)}
    if echo is not None:
        tensors["echo"] = torch.tensor(echo)
    return save_artefact(path, kind="razor", model=model, tensors=tensors, settings={})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


SCORES = [[0.1, 0.5], [0.9, 0.2]], [[0.0, 0.1], [0.2, 0.7]]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ("induction=0.25,echo=0.0", "1.0"),
        ("induction=0.5,echo=0.0", "0.1/1.0"),
        ("induction=0.25,echo=0.25", "1.0/1.1"),
        ("induction=0.125,echo=0.0", "1.0"),  # half a head is one
        ("induction=0.12,echo=0.0", "none"),
        ("induction=0.0,echo=0.0", "none"),
        ("induction=1.0,echo=0.0", "0.0/0.1/1.0/1.1"),
    ],
)
def test_a_profile_names_the_heads(folder, shares, expected):
    """The shares are taken of its scores; the method then equals one that names the heads."""
    model = tiny_model(num_hidden_layers=2)
    identity = model_identity(spec_for_model(model, model_id="tiny"))
    made = profile("p.razor", *SCORES, model=identity)
    policy = build_policy(f"razor:profile=p.razor,{shares},s0=6,sinks=1")
    assert policy.digest == made.digest
    assert f"digest={made.digest}" in describe(policy)
    assert build_policy(describe(policy)) == policy
    ids = torch.randint(0, 199, (1, 50), generator=torch.Generator().manual_seed(0))
    held = []
    for each in (Razor(heads=expected, s0=6, sinks=1), policy):
        cache = kvlib.KVCache(model, each, model_id="tiny")
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
        held.append([cache.layer_kv(i) for i in range(2)])
    assert all(a.equal(b) for a, b in zip(*held, strict=True))
    with pytest.raises(ConfigError, match="run kvlib calibrate razor"):
        kvlib.KVCache(model, policy, model_id="another")


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_retrieval_heads_are_the_best_of_all_layers(layers, heads, seed):
    """Ties go to the earlier layer, then the lower head."""
    rng = np.random.default_rng(seed)
    induction, echo = rng.integers(0, 4, (2, layers, heads)) / 4
    total = layers * heads
    for share in (0.0, 0.14, 0.5, 1.0):
        nums = [math.floor(share * total + 0.5), math.floor(0.01 * total + 0.5)]
        marks = retrieval_heads(torch.tensor(induction), torch.tensor(echo), share, 0.01)
        found = {tuple(place) for place in marks.nonzero().tolist()}
        assert found == oracle.retrieval(induction.tolist(), echo.tolist(), *nums)


# What is refused


def test_heads_have_to_be_known():
    """Without a profile or heads the remedy is named, early and late."""
    policy = build_policy("razor")
    assert describe(policy).startswith("razor:profile=none,heads=profile,")
    remedy = "run kvlib calibrate razor --model M -o FILE"
    with pytest.raises(ConfigError, match=remedy):
        policy.check(Resources())
    with pytest.raises(ConfigError, match=remedy):
        Driven(policy).forward(*random_attention(0, 1, (5,))[0])


def test_other_models_profiles_are_refused(folder):
    """By the identity of the model, where there is one, and by its layers and heads."""
    profile("p.razor", *SCORES)
    policy = build_policy("razor:profile=p.razor")
    policy.check(Resources())
    policy.check(Resources(identity=lambda: "model"))
    with pytest.raises(ConfigError, match="run kvlib calibrate razor"):
        policy.check(Resources(identity=lambda: "another"))
    parts = random_attention(0, 1, (5,))[0]
    Driven(policy, num_layers=2).forward(*parts)
    with pytest.raises(ConfigError, match="for 2 layers of 2 KV heads, this model has 3 layers"):
        Driven(policy, num_layers=3).forward(*parts)
    profile("p.razor", *SCORES, layers=(1, 3))
    with pytest.raises(ConfigError, match="for layers 1, 3; this one is 0"):
        Driven(build_policy("razor:profile=p.razor"), num_layers=2).forward(*parts)
    with pytest.raises(ConfigError, match="the method says"):
        build_policy(describe(policy))  # the file is another one now
    profile("p.razor", SCORES[0], None)
    with pytest.raises(ConfigError, match="lacks echo"):
        build_policy("razor:profile=p.razor")


def test_models_without_rotary_embeddings_are_refused():
    """Echo and induction say nothing there; whole caches are no problem."""
    parts = random_attention(0, 1, (5,))[0]
    with pytest.raises(ConfigError, match="no rotary embedding"):
        Driven(Razor(heads="none"), rope=None).forward(*parts)
    Driven(Razor(heads="all"), rope=None).forward(*parts)


def test_heads_that_are_not_there_are_refused():
    """Heads beyond the layer's, layers beyond the last."""
    parts = random_attention(0, 1, (5,))[0]
    for text, where in (("0.2", {}), ("1.0", {}), ("0.1/1.2", {"layer_idx": 1, "num_layers": 2})):
        with pytest.raises(ConfigError, match=rf"heads={text} names {text[-3:]}; this model has"):
            Driven(Razor(heads=text), **where).forward(*parts)
    Driven(Razor(heads="0.1/1.1"), num_layers=2).forward(*parts)


def test_pruned_channels_are_refused():
    """A step reads the keys that leave the window."""
    with pytest.raises(ConfigError, match="reads whole keys in every step"):
        build_policy("razor:heads=none+think:ratio=0.4")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("razor:heads=1", r"layer.head joined by '/'"),
        ("razor:heads=0.1/", r"layer.head joined by '/'"),
        ("razor:heads=0.1/x.2", r"layer.head joined by '/'"),
        ("razor:heads=0.1,profile=x", "give a profile or heads, not both"),
        ("razor:profile=nowhere", "cannot read artefact 'nowhere'"),
        ("razor:heads=none,s0=-1", "s0 and sinks must be 0 or more, got -1 and 4"),
        ("razor:heads=none,sinks=-1", "s0 and sinks must be 0 or more, got 4000 and -1"),
        ("razor:heads=none,c=0.5", "c must be 1 or more, got 0.5"),
        ("razor:induction=1.5", r"induction is a share of the heads in \[0, 1\], got 1.5"),
        ("razor:echo=-0.1", r"echo is a share of the heads in \[0, 1\], got -0.1"),
    ],
)
def test_wrong_parameters_are_named(method, message, folder):
    """What was seen and what is expected."""
    with pytest.raises(ConfigError, match=message):
        build_policy(method)


@torch.no_grad()
@pytest.mark.parametrize("lag", [1, 4])
def test_entries_leave_together(lag):
    """With a lag, the window exceeds its size by less than that, and nothing is lost."""
    model = tiny_model()
    caches = [kvlib.KVCache(model, Razor(heads="0.1", s0=8, c=1e6, lag=n)) for n in (1, lag)]
    prompt = torch.randint(0, 199, (1, 40), generator=torch.Generator().manual_seed(0))
    for step, tokens in enumerate([prompt, *prompt[:, :9].split(1, 1)]):
        for cache in caches:
            model(tokens, past_key_values=cache)
        late = step % lag
        assert caches[1].layer_kv(0).lengths[0] == 4 + 8 + 1 + late
        assert caches[0].layer_kv(0).lengths[0] == 4 + 8 + 1
        for cache, more in zip(caches, (0, late), strict=True):
            weight = cache.layer_kv(0).row(0).log_weight[-1]
            assert round(math.exp(float(weight))) == 40 + step - 12 - more
