# SPDX-License-Identifier: Apache-2.0
"""Method strings that join policies, and compositions at work over a model."""

import pytest
import torch

import kvlib
from kvlib.cache_layers import EvictableLayer
from kvlib.codecs import build_codec
from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.eviction import Needs, build_policy
from kvlib.eviction.adakv import AdaKV
from kvlib.eviction.base import LayerState, LayerView
from kvlib.eviction.compose import Composed, compose
from kvlib.eviction.h2o import H2O
from kvlib.eviction.joint import Joint
from kvlib.eviction.pyramid import Pyramid
from kvlib.eviction.scored import Protect, ScoredPolicy
from kvlib.eviction.snapkv import SnapKV
from kvlib.plans import KeepTokens
from kvlib.registry import describe
from kvlib.store.snapshots import decode_snapshot, encode_snapshot
from kvlib.testing.models import random_block, tiny_model, tiny_spec

# Reading and writing


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("snapkv:budget=0.25+adakv:floor=0.2", (SnapKV(budget=0.25), AdaKV(floor=0.2))),
        ("h2o:budget=12+adakv", (H2O(budget=12), AdaKV())),
        ("adakv+h2o:budget=12", (H2O(budget=12), AdaKV())),
        ("pyramid:budget=0.25", (SnapKV(budget=0.25), Pyramid())),
        ("snapkv:budget=0.25+pyramid", (SnapKV(budget=0.25), Pyramid())),
        ("joint", (SnapKV(), Joint())),
        (
            "adakv:budget=0.25,window=8,floor=0.5",
            (SnapKV(budget=0.25, window=8), AdaKV(floor=0.5)),
        ),
        ("pyramid:kernel=7,beta=10.0,pool=max", (SnapKV(kernel=7, pool="max"), Pyramid(beta=10.0))),
        ("snapkv+protect:sinks=4,window=8", (SnapKV(), Protect(sinks=4, window=8))),
        (
            "protect:sinks=4+h2o+joint:floor=0.1",
            (H2O(), Joint(floor=0.1), Protect(sinks=4)),
        ),
        (
            "adakv:budget=9+protect:window=2",
            (SnapKV(budget=9), AdaKV(), Protect(window=2)),
        ),
    ],
)
def test_parts_are_read(method, parts):
    """Whatever their order, with the parameters where they belong; described, they read back."""
    policy = build_policy(method)
    assert policy.parts == parts
    assert policy.name == parts[0].name
    text = describe(policy)
    assert text == "+".join(describe(part) for part in parts)
    assert build_policy(text) == policy
    assert describe(build_policy(text)) == text


def test_a_composition_with_channels_reads_back():
    """A channel policy alone is itself; beside an allocator it still has a scorer."""
    for method in ("h2o:budget=9+think:ratio=0.5", "adakv:budget=9+think:ratio=0.5"):
        policy = build_policy(method)
        assert build_policy(describe(policy)) == policy
    assert build_policy("adakv:budget=9+think").parts[0] == SnapKV(budget=9)


def test_one_policy_is_not_wrapped():
    """It is what it is alone."""
    assert build_policy("h2o:budget=9") == H2O(budget=9)
    assert compose([H2O(budget=9)]) == H2O(budget=9)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("snapkv+adakvv", r"no policy is named 'adakvv'. Did you mean 'adakv'"),
        ("snapkvv+adakv", r"no policy is named 'snapkvv'. Did you mean 'snapkv'"),
        ("adakv+snapkvv", r"no policy is named 'snapkvv'. Did you mean 'snapkv'"),
        ("h2o+protct:sinks=4", r"no policy is named 'protct'. Did you mean 'protect'"),
        ("h2o+adakv:flor=0.5", r"'adakv' has no parameter 'flor'. Did you mean 'floor'"),
        ("adakv:budgt=0.5", r"neither 'adakv' nor 'snapkv'.* 'budgt'. Did you mean 'budget'"),
        ("h2o+protect:sink=4", r"'protect' has no parameter 'sink'. Did you mean 'sinks'"),
    ],
)
def test_unknown_names_suggest(method, message):
    """The nearest one, of policies and of parameters."""
    with pytest.raises((ConfigError, UnknownPluginError), match=message):
        build_policy(method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("h2o+snapkv", "'h2o' and 'snapkv' .* one policy that decides which tokens stay; leave"),
        ("adakv+h2o+snapkv", "'h2o' and 'snapkv' .* one policy that decides which tokens stay"),
        ("h2o+adakv+joint", "'adakv' and 'joint' cannot work together: a method has one allocator"),
        ("adakv+adakv", "'adakv' and 'adakv' .* one allocator"),
        ("h2o+protect:sinks=1+protect:sinks=2", "'protect' and 'protect' .* one protector"),
        ("think+think", "'think' and 'think' .* one policy that prunes channels"),
        ("full+adakv", "adakv cannot work with 'full', .* put a scoring policy such as snapkv"),
        ("full+protect:sinks=4", "protect cannot work with 'full', .* a scoring policy"),
        ("protect:sinks=4", "protect cannot work with 'full', .* a scoring policy"),
        ("d2o+adakv", "adakv cannot work with 'd2o', .* a scoring policy"),
        ("keydiff+think", "'keydiff' reads whole keys in every step and 'think' prunes them"),
    ],
)
def test_parts_that_do_not_fit(method, message):
    """Refused, saying which and what to do."""
    with pytest.raises(ConfigError, match=message):
        build_policy(method)


def test_what_a_composition_declares():
    """Needs of its parts; versions count; one experimental part makes it experimental."""
    assert build_policy("h2o:budget=9+adakv").needs == H2O(budget=9).needs
    assert build_policy("h2o:budget=9+joint").needs.whole_model
    assert not build_policy("h2o:budget=9+pyramid").needs.whole_model
    assert not build_policy("h2o:budget=1.0+joint").needs.any_signal
    assert build_policy("h2o+adakv").version == 2

    class Trial(AdaKV):
        status = "experimental"

    assert Composed(H2O()).status == Composed(H2O(), AdaKV()).status == "stable"
    assert Composed(H2O(), Trial()).status == "experimental"


def test_a_scorer_that_decides_by_itself_is_asked():
    """Only an allocator or a protector takes its decisions over."""

    class LastOne(ScoredPolicy):
        name, version, status = "last", 1, "stable"
        needs = Needs()

        def on_prefill_end(self, views):
            held = [view.layer.lengths for view in views]
            return [(KeepTokens(tuple(torch.tensor([n - 1]) for n in mine)),) for mine in held]

        on_step = on_prefill_end

    layer = random_block(tiny_spec(), 5).layers[0]
    view = LayerView(layer=layer, state=LayerState(), num_new=5, num_prompt=5, num_seen=5)
    policy = Composed(LastOne())
    for ((plan,),) in (policy.on_prefill_end([view]), policy.on_step([view])):
        assert [row.tolist() for row in plan.rows] == [[4], [4]]


# At work

PROMPT = 64
STEPS = (1, 3, 1, 1)
METHODS = {
    "snapkv:budget=0.25,window=4+adakv": False,
    "h2o:budget=12+adakv:floor=0.1": True,
    "h2o:budget=0.25+joint": True,
    "pyramid:budget=0.25,window=4": False,
    "expected:budget=0.25,eps=0.02+adakv": False,
    "tova:budget=12+joint:floor=0.1+protect:sinks=2,window=3": True,
}


def peaked_model():
    """Its attention is far from uniform."""
    model = tiny_model()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(10)
    return model


def ids(num, seed=0):
    return torch.randint(0, 199, (1, num), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward(model, cache, tokens, **options):
    return model(tokens, past_key_values=cache, use_cache=True, **options).logits


def lengths(cache, sequence=0):
    return [list(cache.layer_kv(i, sequence).lengths) for i in range(len(cache.layers))]


@pytest.mark.parametrize("method", METHODS)
def test_prompt_and_steps(method):
    """The sum is exact after every pass, some rows are longer than others, and bytes go down."""
    model = peaked_model()
    cache, full = kvlib.KVCache(model, method), kvlib.KVCache(model, "full")
    budget = 12 if "budget=12" in method else PROMPT // 4
    later = 0
    for num in (PROMPT, *STEPS):
        tokens = ids(num, seed=later)
        assert bool(forward(model, cache, tokens).isfinite().all())
        forward(model, full, tokens)
        later += num if num != PROMPT else 0
        held = lengths(cache)
        fair = budget if METHODS[method] else budget + later
        assert sum(map(sum, held)) == 3 * 2 * fair
        if "adakv" in method:
            assert [sum(mine) for mine in held] == [2 * fair] * 3
        assert len({n for mine in held for n in mine}) > 1
        assert cache.get_seq_length() == PROMPT + later
        assert cache.nbytes < 0.35 * full.nbytes


@pytest.mark.parametrize("allocator", ["", "+adakv:floor=0.0", "+joint", "+pyramid"])
@pytest.mark.parametrize("protect", [True, False])
def test_protected_entries_stay(allocator, protect):
    """Sinks and window of the protector, in every head, through every step; not without it."""
    model = peaked_model()
    method = f"h2o:budget=12,recent=0.0{allocator}"
    cache = kvlib.KVCache(model, method + "+protect:sinks=5,window=4" * protect)
    seen, stay = 0, []
    for num in (PROMPT, 1, 1, 5, 1):
        forward(model, cache, ids(num, seed=seen))
        seen += num
        guarded = {*range(5), *range(seen - 4, seen)}
        held = [
            row.positions.tolist() for index in range(3) for row in cache.layer_kv(index).rows()
        ]
        stay += [guarded <= set(row) for row in held]
    assert all(stay) == protect


@pytest.mark.parametrize("method", METHODS)
def test_a_snapshot_needs_only_its_text(method):
    """Restored from the method in it, and under the text the user wrote: the same from there on."""
    model = peaked_model()
    cache = kvlib.KVCache(model, method, model_id="tiny")
    for num in (PROMPT, 1, 3):
        forward(model, cache, ids(num, seed=num))
    snapshot = cache.to_snapshot()
    assert snapshot.method == cache.method == describe(build_policy(method))
    record = b"".join(encode_snapshot(snapshot, build_codec("exact")))
    found = decode_snapshot(record, cache.spec, snapshot.method)
    copies = [
        kvlib.KVCache.from_snapshot(model, found, model_id="tiny"),
        kvlib.KVCache.from_snapshot(model, found, policy=build_policy(method), model_id="tiny"),
        cache.fork(),
    ]
    assert copies[0].policy == cache.policy
    for num in (1, 4, 1):
        expected = forward(model, cache, ids(num, seed=9))
        for other in copies:
            assert torch.equal(forward(model, other, ids(num, seed=9)), expected)
            assert lengths(other) == lengths(cache)
    with pytest.raises(ConfigError, match="the snapshot was taken under"):
        kvlib.KVCache.from_snapshot(model, found, policy=SnapKV(), model_id="tiny")


def test_a_store_keeps_compositions():
    """Saved and loaded by the method's text, and missed under another floor."""
    model = peaked_model()
    store = kvlib.KVStore()
    cache = kvlib.KVCache(model, "h2o:budget=12+adakv", model_id="tiny")
    forward(model, cache, ids(PROMPT))
    assert cache.save(store, ids(PROMPT)) > 0
    options = {"model_id": "tiny"}
    other = "h2o:budget=12+adakv:floor=0.3"
    assert kvlib.KVCache.load(model, store, ids(PROMPT), other, **options) is None
    found = kvlib.KVCache.load(model, store, ids(PROMPT), "h2o:budget=12+adakv", **options)
    assert lengths(found) == lengths(cache)
    assert torch.equal(forward(model, found, ids(1)), forward(model, cache, ids(1)))


@pytest.mark.parametrize("method", METHODS)
def test_sequences_of_a_batch(method):
    """Padded beside a longer one, each is shared out as it is alone."""
    model = peaked_model().double()
    prompts = (30, PROMPT)
    batch = kvlib.KVCache(model, method)
    alone = [kvlib.KVCache(model, method) for _ in prompts]
    mask = torch.tensor([[0] * (PROMPT - n) + [1] * n for n in prompts])
    for num in (PROMPT, 1, 3):
        if num != PROMPT:
            mask = torch.cat([mask, torch.ones(2, num, dtype=torch.long)], dim=1)
        parts = [ids(num, seed=row) for row in range(2)]
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -num:]
        options = {"attention_mask": mask, "position_ids": places}
        forward(model, batch, torch.cat(parts), **options)
        for row, (cache, n) in enumerate(zip(alone, prompts, strict=True)):
            forward(model, cache, parts[row][:, -n:] if num == PROMPT else parts[row])
            assert lengths(batch, row) == lengths(cache)
            for index in range(3):
                mine, theirs = batch.layer_kv(index, row), cache.layer_kv(index)
                assert torch.equal(mine.positions_tensor(), theirs.positions_tensor())


def test_every_layer_is_decided_once():
    """A head's number is set at the end of the prompt and remembered with the sequence."""
    model = peaked_model()
    cache = kvlib.KVCache(model, "h2o:budget=12+joint")
    given = None
    for num in (PROMPT, *STEPS):
        forward(model, cache, ids(num, seed=num))
        layers = [layer for layer in cache.layers if isinstance(layer, EvictableLayer)]
        now = [layer.rows[0].state.values["budgets"].tolist() for layer in layers]
        assert now == (given or now) == lengths(cache)
        given = now
