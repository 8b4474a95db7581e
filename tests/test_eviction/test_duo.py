# SPDX-License-Identifier: Apache-2.0
"""DuoAttention by its definition: which heads stream, and what they keep."""

import math
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib.errors import ConfigError
from kvlib.eviction import Resources, build_policy
from kvlib.eviction.duo import Duo
from kvlib.registry import describe
from kvlib.testing.models import tiny_model
from tests.oracles.eviction import streaming
from tests.test_eviction.test_oracles import HEADS, Driven, random_attention


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(gates, path="gates.tsv"):
    np.savetxt(path, gates, delimiter="\t")  # as the authors' code does
    return path


def full_heads(policy):
    return {(layer, head) for layer, heads in policy.roles.whole.items() for head in heads}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("gates")


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]),
    st.integers(0, 2**31),
)
def test_heads_below_the_quantile_stream(scratch, layers, heads, sparsity, seed):
    """Of distinct gates, those at or above the quantile are full; all at 0 and none at 1."""
    gates = np.random.default_rng(seed).permutation(layers * heads).reshape(layers, heads) / 100
    path = write(gates, scratch / "gates.tsv")
    expected = {tuple(x) for x in np.argwhere(gates >= np.quantile(gates, sparsity) - 1e-12)}
    found = full_heads(Duo(str(path), sparsity))
    assert found == (set() if sparsity == 1 else expected)


@pytest.mark.parametrize(
    ("gates", "sparsity", "expected"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], 0.5, {(0, 0), (0, 1)}),
        ([[0.5, 0.5], [0.9, 0.5]], 0.5, {(1, 0), (0, 0)}),
        ([[1.3, 1.0], [-1.0, 2.0]], 0.7, {(0, 0)}),  # gates are cut to [0, 1], which ties
        ([[0.1, 0.2, 0.3, 0.4, 0.5]], 0.5, {(0, 2), (0, 3), (0, 4)}),
    ],
)
def test_equal_gates_are_told_apart_by_place(gates, sparsity, expected):
    """The earlier layer is full first, then the lower head."""
    assert full_heads(Duo(write(gates), sparsity)) == expected


@given(
    st.sampled_from([(40, 1, 1, 1), (24, 1, 5, 1, 1, 9, 1), (3, 1, 1, 1, 1), (1, 20, 1, 2)]),
    st.integers(0, 5),
    st.integers(1, 9),
    st.sampled_from([1, 3, 4, 7]),
    st.sampled_from(["0.9 0.1", "0.1\t0.9"]),
)
def test_streaming_heads_keep_sinks_and_window(scratch, sizes, sinks, window, group, gates):
    """After the prompt and every step; full heads keep everything."""
    path = scratch / "one.tsv"
    path.write_text(gates)
    full = 0 if gates[0:3] == "0.9" else 1
    mine = Driven("full")
    mine.policy = Duo(str(path), 0.5, sinks=sinks, window=window)
    seen = 0
    for parts in random_attention(0, group, sizes):
        seen += parts[1].shape[1]
        mine.forward(*parts)
        rows = [row.positions.tolist() for row in mine.row.layer.rows()]
        short = streaming(seen, sizes[0], budget=str(sinks + window), sinks=sinks)
        assert rows[full] == list(range(seen))
        assert rows[1 - full] == short
        assert mine.row.layer.log_weight is None  # nothing stands in for what is gone


def test_in_a_model():
    """Each layer goes by its own line, and bytes are those of its heads."""
    model = tiny_model(num_hidden_layers=3)
    path = write([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    cache = kvlib.KVCache(model, f"duo:gates={path},sinks=2,window=8")
    ids = torch.randint(0, 199, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in ids.split([50, 1, 9], dim=1):
            model(part, past_key_values=cache, use_cache=True)
    assert [cache.layer_kv(i).lengths for i in range(3)] == [(60, 10), (10, 10), (60, 60)]


def test_layers_are_counted_without_those_of_a_window():
    """Line 0 is the first layer with full attention."""
    model = tiny_model(
        "Qwen2Config",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=16,
    )
    cache = kvlib.KVCache(model, f"duo:gates={write([[0.1, 0.9]])},sinks=2,window=8")
    with torch.no_grad():
        model(torch.arange(40)[None], past_key_values=cache, use_cache=True)
    assert cache.layer_kv(1).lengths == (10, 40)


def test_the_file_is_part_of_the_method():
    """Its digest is in the method string, and another file under that name is refused."""
    path = write([[0.1, 0.9]])
    policy = build_policy(f"duo:gates={path}")
    digest = blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    text = describe(policy)
    assert text == f"duo:gates=gates.tsv,sparsity=0.5,sinks=64,window=256,lag=1,digest={digest}"
    assert build_policy(text) == policy
    write([[0.2, 0.9]])
    with pytest.raises(ConfigError, match=f"the method says {digest}"):
        build_policy(text)


def test_gates_of_another_model_are_refused():
    """Naming the rows and columns of the file and the layers and heads of the model."""
    for gates in ([[0.1, 0.9]] * 2, [[0.1, 0.5, 0.9]]):
        mine = Driven("full")
        mine.policy = Duo(write(gates))
        size = f"{len(gates)} layers of {len(gates[0])} KV heads"
        with pytest.raises(ConfigError, match=f"{size}, this model has 1 layers of {HEADS} KV"):
            mine.forward(*random_attention(0, 1, (5,))[0])


def test_without_gates():
    """Described, and refused where it would be used."""
    policy = build_policy("duo")
    assert describe(policy).startswith("duo:gates=none,")
    with pytest.raises(ConfigError, match="pass gates=FILE, one line a layer"):
        policy.check(Resources())
    with pytest.raises(ConfigError, match="pass gates=FILE, one line a layer"):
        kvlib.KVCache(tiny_model(), policy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "are empty"),
        ("\n\n", "are empty"),
        ("0.1 0.2\n\n0.3\n", "line 3 of gates 'gates.tsv' is '0.3'"),
        ("0.1 0.2\n0.3 x\n", "line 2 of gates 'gates.tsv' is '0.3 x'"),
        ("0.1 nan", "line 1"),
        ("0.1 inf", "line 1"),
        ("0.1,0.2", "line 1"),
        ("\x00\x01", "line 1"),
    ],
)
def test_files_that_hold_no_gates(text, message):
    """What was seen and what is expected."""
    Path("gates.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as error:
        build_policy("duo:gates=gates.tsv")
    assert "one number a KV head" in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("duo:sparsity=1.5", r"sparsity is the share of streaming heads, in \[0, 1\], got 1.5"),
        ("duo:sparsity=-0.1", r"in \[0, 1\], got -0.1"),
        ("duo:sinks=-1", "sinks must be 0 or more and window 1 or more, got -1 and 256"),
        ("duo:window=0", "sinks must be 0 or more and window 1 or more, got 64 and 0"),
        ("duo:gates=nowhere", "cannot read gates 'nowhere'"),
    ],
)
def test_wrong_parameters_are_named(method, message):
    """What was seen and what is expected."""
    with pytest.raises(ConfigError, match=message):
        build_policy(method)


def test_a_file_that_is_too_large_is_not_read():
    """A model's weights, given by mistake."""
    with Path("gates.tsv").open("wb") as file:
        file.truncate(1 << 23)
    with pytest.raises(ConfigError, match="too large for gates"):
        build_policy("duo:gates=gates.tsv")


def test_quantiles_are_read_as_decimals():
    """0.07 of 100 steps between gates is 7, and not 7.000000000000001."""
    gates = np.arange(101)[:, None] / 101
    assert len(full_heads(Duo(write(gates), 0.07))) == 101 - 7
    assert math.ceil(0.07 * 100) == 8


@torch.no_grad()
def test_entries_leave_together(tmp_path):
    """With a lag of 3, the window exceeds its size by at most 2."""
    path = tmp_path / "gates.tsv"
    path.write_text("0.9 0.1\n" * 3, encoding="utf-8")
    model = tiny_model()
    cache = kvlib.KVCache(model, Duo(str(path), 0.5, sinks=2, window=6, lag=3))
    tokens = torch.randint(0, 199, (1, 30), generator=torch.Generator().manual_seed(0))
    model(tokens, past_key_values=cache)
    seen = []
    for token in tokens[:, :7].split(1, 1):
        model(token, past_key_values=cache)
        seen.append(cache.layer_kv(0).lengths)
    assert [streaming for _, streaming in seen] == [9, 10, 8, 9, 10, 8, 9]
    assert seen[-1][0] == 37
