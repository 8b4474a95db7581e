# SPDX-License-Identifier: Apache-2.0
"""Blocks between pages and a store, with a real store and pages in memory."""

import threading
import time

import numpy as np
import pytest
import torch

from kvlib.connectors.layouts import LAYOUTS, Pages
from kvlib.connectors.mover import Mover
from kvlib.connectors.moves import Save, Staged
from kvlib.keys import block_keys
from kvlib.spec import KVSpec, LayerSpec
from kvlib.store.store import KVStore

SPEC = KVSpec(
    model_id="user:m",
    layers=(LayerSpec(num_kv_heads=2, k_head_dim=32, v_head_dim=32),) * 3,
    dtype="float32",
)
TOKENS = list(range(640))
KEYS = block_keys(SPEC.fingerprint(), TOKENS)


def far():
    return time.monotonic() + 30


def make_pages(seed=0, size=32, pages=24):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn((pages, 2, size, 64), generator=generator) for _ in range(3)]
    return Pages(views, LAYOUTS["cpu-vec"])


def make_mover(store, pages, staging=1 << 24):
    return Mover(store, SPEC, pages, staging=staging)


@pytest.fixture
def filled(tmp_path):
    """A store that holds the prompt, and the pages it came from."""
    pages = make_pages()
    mover = make_mover(KVStore(tmp_path / "kv", memory=0), pages)
    ids = [5, 3, 7, 0, 1, 2, 20, 21, 22, 9, 11, 10, 12, 13, 14, 15, 16, 17, 18, 19]
    mover.save(Save(ticket="a", keys=KEYS[:7], first=0, pages=ids[:14], first_page=0))
    mover.save(Save(ticket="a", keys=KEYS, first=7, pages=ids[14:], first_page=14))
    assert mover.wait_saved("a", 30)
    assert mover.counts["saved_tokens"] == 640
    yield tmp_path / "kv", pages, ids, mover
    mover.close()


def address_of(view):
    return np.frombuffer(view, np.uint8).ctypes.data


def wait_loaded(mover):
    limit = far()
    while time.monotonic() < limit:
        done = mover.loaded()
        if done:
            return done
        time.sleep(0.001)
    raise AssertionError("never loaded")


@pytest.mark.parametrize("first", [0, 4, 8])
@pytest.mark.parametrize("codec", ["raw", "exact"])
def test_pages_longer_than_blocks(tmp_path, codec, first):
    """Records end within a page of 128 tokens: 640 tokens are two of 4 blocks and two of one."""
    old, new = make_pages(size=128, pages=8), make_pages(seed=1, size=128, pages=8)
    store = KVStore(tmp_path / "kv", memory="64MiB", memory_codec=codec)
    mover = make_mover(store, old)
    mover.save(Save(ticket="a", keys=KEYS[:9], first=0, pages=range(5), first_page=0))
    mover.save(Save(ticket="b", keys=KEYS, first=9, pages=[4], first_page=4))
    assert mover.wait_saved("a", 30)
    assert mover.wait_saved("b", 30)
    mover.stage("a", KEYS, first, far())
    assert mover.wait_staged("a", 30) == Staged(10)
    mover.pages = new
    skip = -(-first // 2)
    mover.load("a", range(skip, 5), skip * 128)
    assert wait_loaded(mover) == [("a", ())]
    for layer in range(3):
        assert torch.equal(old.views[layer][skip:5], new.views[layer][skip:5])
    mover.close()


def test_what_memory_holds_uncoded_is_not_copied(tmp_path, monkeypatch):
    """It is lent, stays as it is when the tier drops it, and is given back when it is released."""
    pages = make_pages()
    mover = make_mover(KVStore(tmp_path / "kv", memory="64MiB", memory_codec="raw"), pages)
    mover.save(Save(ticket="a", keys=KEYS, first=0, pages=range(20), first_page=0))
    assert mover.wait_saved("a", 30)
    expected = [pages.read_layer(layer, torch.arange(20)) for layer in range(3)]
    mover.stage("b", KEYS, 0, far())
    assert mover.wait_staged("b", 30) == Staged(10)
    memory = mover.store._memory
    lent = memory.lend(next(iter(memory.keys())))
    places = range(lent_at := address_of(lent), lent_at + lent.nbytes)
    parts = mover.staged_part("b", 0, 640)
    assert any(part.layers[0].keys.data_ptr() in places for part in parts)
    memory.trim(0)
    for view in pages.views:
        view.zero_()
    mover.load("b", range(20), 0)
    assert wait_loaded(mover) == [("b", ())]
    for layer, (keys, values) in enumerate(expected):
        now = pages.read_layer(layer, torch.arange(20))
        assert torch.equal(now[0], keys)
        assert torch.equal(now[1], values)
    assert mover._reserved == 0
    mover.close()


@pytest.mark.parametrize(("first", "skip"), [(0, 0), (3, 6), (4, 9)])
def test_a_prompt_comes_back_into_other_pages(filled, first, skip):
    """All of it, or from a block on; into pages of another size."""
    path, old, ids, mover = filled
    mover.close()
    size = 64 if skip % 2 == 0 else 32
    new = make_pages(seed=1, size=size, pages=24)
    other = make_mover(KVStore(path, memory=0), new)
    other.stage("b", KEYS, first, far())
    assert other.wait_staged("b", 30) == Staged(10)
    start = skip * 32
    targets = list(range(23, 23 - (640 - start) // size, -1))
    other.load("b", targets, start)
    assert wait_loaded(other) == [("b", ())]
    for layer in range(3):
        was = old.read_layer(layer, torch.tensor(ids))
        now = new.read_layer(layer, torch.tensor(targets))
        assert torch.equal(now[0], was[0][:, start:])
        assert torch.equal(now[1], was[1][:, start:])
    assert other.counts["loaded_tokens"] == 640 - start
    assert other._reserved == 0
    other.close()


def test_what_is_being_stored_is_waited_for(tmp_path, monkeypatch):
    """A look-up right behind a save finds it, however slow the codec is."""
    store = KVStore(tmp_path / "kv", memory="16MiB")
    put = store.put_async

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return put(*args, **kwargs)

    monkeypatch.setattr(store, "put_async", slow)
    mover = make_mover(store, make_pages())
    mover.save(Save(ticket="a", keys=KEYS, first=0, pages=range(20), first_page=0))
    mover.stage("b", KEYS, 0, far())
    assert mover.wait_staged("b", 30) == Staged(10)
    mover.close()


def test_a_deadline_ends_the_wait(filled, monkeypatch):
    """What did not arrive in time is a miss, not an error."""
    _, _, _, mover = filled
    begun = threading.Event()

    def stalled(*args, **kwargs):
        begun.set()
        time.sleep(0.5)
        return 10

    monkeypatch.setattr(mover.store, "match", stalled)
    now = time.monotonic()
    mover.stage("b", KEYS, 0, now + 0.1)
    assert time.monotonic() - now < 0.1  # the call itself waits for nothing
    begun.wait(10)
    assert mover.staged("b") is None
    staged = mover.wait_staged("b", 30)
    assert staged is not None
    assert staged.num_blocks in (0, 10)
    assert mover.counts["stage_errors"] == 0


def test_an_error_of_the_store_is_a_miss(filled, monkeypatch):
    _, _, _, mover = filled

    def broken(*args, **kwargs):
        raise RuntimeError("the medium is gone")

    monkeypatch.setattr(mover.store, "borrow", broken)
    mover.stage("b", KEYS, 0, far())
    assert mover.wait_staged("b", 30) == Staged(0)
    assert mover.counts["stage_errors"] == 1
    assert mover._reserved == 0
    monkeypatch.setattr(mover.store, "put_async", broken)
    mover.save(Save(ticket="c", keys=KEYS, first=0, pages=range(20), first_page=0))
    assert mover.wait_saved("c", 30)
    assert mover.counts["save_errors"] == 1


def test_loading_what_is_not_staged_fails_and_says_which_pages(filled):
    _, pages, _, mover = filled
    before = [view.clone() for view in pages.views]
    mover.load("nobody", [1, 2, 3], 0)
    assert wait_loaded(mover) == [("nobody", (1, 2, 3))]
    mover.stage("b", KEYS[:4], 0, far())
    assert mover.wait_staged("b", 30) == Staged(4)
    mover.load("b", list(range(10)), 0)  # two blocks more than there are
    assert wait_loaded(mover) == [("b", tuple(range(10)))]
    assert all(torch.equal(a, b) for a, b in zip(before, pages.views, strict=True))
    assert mover.counts["load_errors"] == 2


def test_staged_blocks_are_bounded(filled):
    """The second prefix waits for room, and is given up when there is none."""
    path, _, _, mover = filled
    mover.close()
    size = 640 * SPEC.bytes_per_token()
    tight = make_mover(KVStore(path, memory=0), make_pages(), staging=size)
    tight.stage("a", KEYS, 0, far())
    assert tight.wait_staged("a", 30) == Staged(10)
    tight.stage("b", KEYS, 0, time.monotonic() + 0.2)
    assert tight.wait_staged("b", 30) == Staged(0)
    assert tight.counts["staging_full"] == 1
    tight.stage("c", KEYS, 0, far())
    tight.release("a")
    assert tight.wait_staged("c", 30) == Staged(10)
    assert tight._reserved == size
    tight.forget("c")
    assert tight._reserved == 0
    tight.close()
    small = make_mover(KVStore(path, memory=0), make_pages(), staging=size - 1)
    small.stage("a", KEYS, 0, far())
    assert small.wait_staged("a", 30) == Staged(9)  # what there is room for
    assert small._reserved <= size - 1
    small.close()
    none = make_mover(KVStore(path, memory=0), make_pages(), staging=1)
    none.stage("a", KEYS, 0, far())
    assert none.wait_staged("a", 30) == Staged(0)
    none.close()


def test_what_was_stored_is_forgotten(tmp_path):
    """An engine that only stores does not remember every save for ever."""
    mover = make_mover(KVStore(tmp_path / "kv", memory="16MiB"), make_pages())
    for i in range(600):
        key = block_keys(SPEC.fingerprint(), [i] * 64)
        mover.save(Save(ticket="a", keys=key, first=0, pages=[0, 1], first_page=0))
        if i % 100 == 99:
            assert mover.wait_saved("a", 30)
            for task in list(mover._storing.values()):
                task.result().result(30)
    assert len(mover._storing) <= 300
    mover.close()


def test_a_load_is_reported_whatever_happens(filled):
    """Who waits for one would wait for ever."""
    _, _, _, mover = filled
    mover.close()
    mover.load("b", [1, 2], 0)
    assert mover.loaded() == [("b", (1, 2))]


def test_counters_have_all_their_names_from_the_start(filled):
    """They are added up by one thread while others count."""
    _, _, _, mover = filled
    names = set(mover.counts)
    mover.stage("b", KEYS, 0, far())
    mover.wait_staged("b", 30)
    mover.load("b", [1, 2], 0)
    wait_loaded(mover)
    assert set(mover.counts) == names


def test_pages_given_away_are_not_read_any_more(tmp_path):
    """Saves that wait are given up at once; one that copies is waited for, and what is stored is
    what lay there before."""
    store = KVStore(tmp_path / "kv", memory="16MiB")
    pages = make_pages()
    mover = make_mover(store, pages)
    go, copying = threading.Event(), threading.Event()
    read = pages.read_layer

    def slow(layer, ids):
        copying.set()
        go.wait(10)
        return read(layer, ids)

    pages.read_layer = slow
    mover.save(Save(ticket="a", keys=KEYS[:4], first=0, pages=range(8), first_page=0))
    mover.save(Save(ticket="a", keys=KEYS[:8], first=4, pages=range(8, 16), first_page=8))
    copying.wait(10)
    assert mover.is_saving("a")
    assert not mover.wait_saved("a", 0.01)
    threading.Timer(0.2, go.set).start()
    expected = [read(layer, torch.arange(8)) for layer in range(3)]
    mover.stop_saving(["a"])
    assert not mover.is_saving("a")
    for view in pages.views:
        view.zero_()
    mover.stage("b", KEYS, 0, far())
    assert mover.wait_staged("b", 30) == Staged(4)
    (block,) = mover.staged_part("b", 0, 256)
    for layer, (keys, values) in zip(block.layers, expected, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    assert mover.counts["save_drops"] == 1
    mover.close()


def test_a_request_that_is_over_is_still_stored(filled, tmp_path):
    _, _, _, mover = filled
    keys = block_keys(SPEC.fingerprint(), TOKENS, salt="x")
    mover.save(Save(ticket="z", keys=keys, first=0, pages=range(20), first_page=0))
    mover.forget("z")
    limit = far()
    while mover.is_saving("z") and time.monotonic() < limit:
        time.sleep(0.001)
    mover.stage("y", keys, 0, far())
    assert mover.wait_staged("y", 30) == Staged(10)
    assert "z" not in mover._tickets


def test_closing_stores_what_was_begun(tmp_path):
    mover = make_mover(KVStore(tmp_path / "kv", memory=0), make_pages())
    mover.save(Save(ticket="a", keys=KEYS, first=0, pages=range(20), first_page=0))
    mover.close()
    mover.close()
    with KVStore(tmp_path / "kv", memory=0) as store:
        assert store.match(SPEC, KEYS) == 10
    task = mover.save(Save(ticket="b", keys=KEYS, first=0, pages=range(20), first_page=0))
    assert task.result() is None
