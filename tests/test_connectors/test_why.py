# SPDX-License-Identifier: Apache-2.0
"""Why a prompt misses in a folder that tensor-parallel ranks write."""

import pytest

from kvlib.blocks import KVBlock
from kvlib.connectors.why import explain
from kvlib.errors import ConfigError
from kvlib.spec import KVSpec, LayerSpec
from kvlib.store.kept import open_kept
from kvlib.store.store import KVStore
from kvlib.testing.models import random_block

HEADS = 6
SPEC = KVSpec(
    model_id="user:m",
    layers=(LayerSpec(num_kv_heads=HEADS, k_head_dim=8, v_head_dim=8),) * 2,
    dtype="float32",
)
TOKENS = list(range(64 * 6 + 1))
WHOLE = random_block(SPEC, 64 * 6)


def store(path, head_range, blocks=6, codec="exact"):
    """Put leading blocks as a rank does."""
    first, last = head_range or (0, HEADS)
    mine = [(x.keys[first:last], x.values[first:last]) for x in WHOLE.layers]
    with KVStore(path, memory=0, codec=codec, head_range=head_range) as store:
        keys = store.block_keys(SPEC, TOKENS)
        store.put(SPEC, keys, KVBlock.dense(SPEC, mine).slice(0, 64 * blocks))


def why(path, ranks=1):
    kept = open_kept(path)
    found, said = explain(kept, SPEC, TOKENS, codec="exact@2", lossless=True, ranks=ranks)
    kept.close()
    return found, " ".join(said)


def loaded(path, ranks):
    """What an engine of so many ranks would get."""
    step = HEADS // ranks
    found = []
    for first in range(0, HEADS, step):
        mine = None if ranks == 1 else (first, first + step)
        with KVStore(path, memory=0, head_range=mine) as store:
            found.append(store.load(SPEC, store.block_keys(SPEC, TOKENS)).num_blocks)
    return min(found)


def test_what_all_ranks_stored_is_a_hit_for_them_alone(tmp_path):
    for head_range in ((0, 2), (2, 4), (4, 6)):
        store(tmp_path, head_range)
    found, said = why(tmp_path, ranks=3)
    assert found == loaded(tmp_path, 3) == 6
    assert "All 6 whole blocks" in said
    found, said = why(tmp_path)
    assert found == loaded(tmp_path, 1) == 0
    assert "stored for the KV heads 0-1, 2-3 and 4-5 of 6 only" in said
    assert "not for 0-5" in said
    assert "never stored" not in said
    found, said = why(tmp_path, ranks=2)
    assert found == loaded(tmp_path, 2) == 0
    assert "not for 0-2 and 3-5" in said


def test_the_ranks_that_lack_a_block_are_named(tmp_path):
    store(tmp_path, (0, 2))
    found, said = why(tmp_path)
    assert found == loaded(tmp_path, 1) == 0
    assert "stored for the KV heads 0-1 of 6 only" in said
    store(tmp_path, (2, 4), blocks=5)
    store(tmp_path, (4, 6), blocks=4)
    found, said = why(tmp_path, ranks=3)
    assert found == loaded(tmp_path, 3) == 4
    assert "4 of 6 whole blocks" in said
    assert "stored for the KV heads 0-1 and 2-3 of 6 only, not for 4-5" in said


def test_a_store_of_whole_heads_asked_by_ranks(tmp_path):
    store(tmp_path, None)
    assert why(tmp_path)[0] == 6
    found, said = why(tmp_path, ranks=2)
    assert found == loaded(tmp_path, 2) == 0
    assert "stored for the KV heads 0-5 of 6 only, not for 0-2 and 3-5" in said


def test_another_form_is_no_other_range(tmp_path):
    """Of the heads that are asked for there is one by another codec."""
    store(tmp_path, (0, 3), codec="int8")
    assert "another form" in why(tmp_path, ranks=2)[1]
    store(tmp_path, (3, 6))
    found, said = why(tmp_path, ranks=2)
    assert found == 0
    assert "stored for the KV heads 3-5 of 6 only, not for 0-2" in said
    assert "heads 0-2 are stored in another form (codec 'int8@1" in said


def test_a_block_that_some_ranks_lost(tmp_path):
    """One rank's record of the first blocks is gone, the others' are there."""
    for head_range in ((0, 3), (3, 6)):
        store(tmp_path, head_range)
    kept = open_kept(tmp_path)
    lost = [key for key in kept.keys() if key.block == _first()]
    assert len(lost) == 2
    kept.delete(lost[0])
    kept.close()
    found, said = why(tmp_path, ranks=2)
    assert found == loaded(tmp_path, 2) == 0
    assert "of 6 only, not for" in said


def _first():
    with KVStore() as store:
        return store.block_keys(SPEC, TOKENS)[0]


def test_heads_that_cannot_be_dealt_out(tmp_path):
    store(tmp_path, None)
    with pytest.raises(ConfigError, match="cannot be dealt out"):
        why(tmp_path, ranks=4)
