# SPDX-License-Identifier: Apache-2.0
"""What a `KVStore` keeps its records to: time to live, quota, watermarks, policies, hints."""

import json
import shutil
import time

import pytest
from typer.testing import CliRunner

from kvlib import KVStore
from kvlib.cli import app
from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.store import terms as clocks
from kvlib.store.replacement import Hint
from kvlib.store.terms import tenant_tag
from kvlib.testing.models import random_block, tiny_spec

SPEC = tiny_spec()
BLOCK = random_block(SPEC, 256)


@pytest.fixture
def later(monkeypatch):
    """Lets seconds pass; besides, no time passes."""
    elapsed, wall = clocks._elapsed_ms(), clocks._wall_ms()
    passed = 0

    def pass_time(seconds):
        nonlocal passed
        passed += round(1000 * seconds)

    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: elapsed + passed)
    monkeypatch.setattr(clocks, "_wall_ms", lambda: wall + passed)
    return pass_time


def prompt(store, first):
    return store.block_keys(SPEC, list(range(first, first + 256)))


def put(store, first, **settings):
    return store.put(SPEC, prompt(store, first), BLOCK, **settings).stored_blocks


def stored(store, first):
    return store.load(SPEC, prompt(store, first)).num_blocks


def as_json(*arguments):
    done = CliRunner().invoke(app, ["store", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.parametrize("tier", ["file", "segment"])
def test_a_time_to_live_holds_in_every_tier_and_through_restarts(tmp_path, later, tier):
    """What a load brings up keeps the time it has; a put may say another one."""
    with KVStore(tmp_path, tier=tier, ttl="15m") as store:
        assert put(store, 0) == 4
        assert put(store, 1000, ttl="1h") == 4
        assert put(store, 2000, ttl=60) == 4
        later(60)
        assert [stored(store, x) for x in (0, 1000, 2000)] == [4, 4, 0]
        assert store.match(SPEC, prompt(store, 2000)) == 0
    with KVStore(tmp_path, tier=tier) as store:
        assert stored(store, 0) == 4  # up into memory
        later(15 * 60 - 61)
        assert stored(store, 0) == 4
        later(1)
        assert [stored(store, x) for x in (0, 1000)] == [0, 4]
        assert {t.expired for t in store.stats().tiers.values()} == {1}
        assert put(store, 0) == 4  # without a time
        later(10 * 365 * 86400)
        assert [stored(store, x) for x in (0, 1000)] == [4, 0]


def test_expired_blocks_are_put_again_in_the_background(tmp_path, later):
    """`put_async` takes the same terms."""
    with KVStore(tmp_path) as store:
        keys = prompt(store, 0)
        assert store.put_async(SPEC, keys, BLOCK, ttl=5).result().stored_blocks == 4
        assert store.put_async(SPEC, keys, BLOCK, ttl=5).result().present_blocks == 4
        later(5)
        assert store.put_async(SPEC, keys, BLOCK).result().stored_blocks == 4
        later(1e6)
        assert stored(store, 0) == 4


@pytest.mark.parametrize("tier", ["file", "segment"])
def test_a_tenant_pays_for_itself(tmp_path, tier):
    """With a quota of two prompts it has two, in memory and on disk; another tenant has its own."""
    with KVStore(tmp_path / "probe", tier=tier) as store:
        put(store, 0)
        one = max(t.used_bytes for t in store.stats().tiers.values())
    with KVStore(tmp_path / "kv", tier=tier, salt="other") as other:
        assert [put(other, x) for x in (0, 1000, 2000)] == [4, 4, 4]
    with (
        KVStore(tmp_path / "kv", tier=tier, salt="mine", quota=2 * one) as mine,
        KVStore(tmp_path / "kv", tier=tier, salt="other") as other,
    ):
        for x in range(0, 5000, 1000):
            assert put(mine, x) == 4
        assert [stored(mine, x) for x in range(0, 5000, 1000)] == [0, 0, 0, 4, 4]
        assert [stored(other, x) for x in (0, 1000, 2000)] == [4, 4, 4]
        assert mine.check()["memory"].ok
        assert mine.check()[tier].ok
    tags = {salt: tenant_tag(salt).hex() for salt in ("mine", "other")}
    tenants = as_json("stat", tmp_path / "kv")["tenants"]
    assert tenants.keys() == set(tags.values())
    assert tenants[tags["mine"]]["records"] == 2
    assert tenants[tags["mine"]]["used_bytes"] <= 2 * one
    assert tenants[tags["other"]]["records"] == 3
    if tier == "segment":
        assert tenants[tags["mine"]]["quota"] == 2 * one // 4096 * 4096
        assert tenants[tags["other"]]["quota"] == 0
    shown = CliRunner().invoke(app, ["store", "stat", str(tmp_path / "kv")]).output
    assert f"{tags['mine']}: 2 records" in shown


def account(path, salt="mine"):
    """Records, bytes and quota of a tenant."""
    found = as_json("stat", path)["tenants"][tenant_tag(salt).hex()]
    return found["records"], found["used_bytes"], found["quota"]


def test_a_quota_holds_from_the_opening_on(tmp_path):
    """Also a smaller one, and when a lost index made room of records that were dropped theirs."""
    path = tmp_path / "kv"
    with KVStore(path, memory=0, salt="mine") as store:
        put(store, 0)
        one = store.stats().tiers["segment"].used_bytes
        for x in range(1000, 6000, 1000):
            put(store, x)
    assert account(path) == (6, 6 * one, 0)

    def opened(prompts):
        with KVStore(path, memory=0, salt="mine", quota=prompts * one) as store:
            assert store.check()["segment"].ok
        return account(path)

    assert opened(4) == (4, 4 * one, 4 * one)
    for prompts in (3, 2):
        shutil.rmtree(path / "index.lmdb")
        with KVStore(path, memory=0, salt="other"):  # makes the index anew
            pass
        assert account(path) == (6, 6 * one, 0)
        assert opened(prompts) == (prompts, prompts * one, prompts * one)
    assert opened(5) == (2, 2 * one, 5 * one)
    with KVStore(path, memory=0, salt="mine", quota=5 * one) as store:
        assert store._stack.tiers[0]._room._early is not None  # the index was not read for it
        assert [stored(store, x) for x in range(0, 6000, 1000)] == [0, 0, 0, 0, 4, 4]


def test_a_record_beyond_its_quota_is_dropped_and_counted(tmp_path):
    """Nothing is stored of it anywhere."""
    with KVStore(tmp_path, quota="4KiB") as store:
        report = store.put(SPEC, prompt(store, 0), BLOCK)
        assert (report.stored_blocks, report.dropped_blocks) == (0, 4)
        assert {t.rejected for t in store.stats().tiers.values()} == {1}


def wait_for(condition):
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("tier", [None, "file", "segment"])
def test_watermarks_make_room_ahead(tmp_path, tier):
    """Above the high mark a tier is brought down to the low one, though it is not full."""
    capacity = 1 << 20
    where = {"memory": capacity} if tier is None else {"path": tmp_path, "tier": tier, "memory": 0}
    with KVStore(**where, disk=capacity, watermarks=(0.8, 0.4)) as store:
        name = tier or "memory"

        def used():
            return store.stats().tiers[name].used_bytes

        first = 0
        while used() <= 0.8 * capacity and not store.stats().tiers[name].evicted:
            assert put(store, first) == 4
            first += 1000
            wait_for(lambda: not store._relief._busy)  # a put meanwhile would come on top
        wait_for(lambda: used() <= 0.4 * capacity)
        assert used() > 0.2 * capacity
        assert stored(store, 0) == 0
        assert stored(store, first - 1000) == 4
    if tier == "segment":
        limits = as_json("stat", tmp_path)["limits"]
        assert limits == {"capacity": capacity, "high": 838860, "low": 419430, "min_free": 0}
        shown = CliRunner().invoke(app, ["store", "stat", str(tmp_path)]).output
        assert "from 819.2 KiB on it is brought down to 409.6 KiB" in shown


@pytest.mark.parametrize("tier", ["file", "segment"])
def test_gc_drops_what_has_expired(tmp_path, later, tier):
    """Without options nothing else; with them, first."""
    with KVStore(tmp_path, tier=tier) as store:
        for at in range(4):
            put(store, 1000 * at, ttl=60 if at % 2 else None)
    assert as_json("gc", tmp_path)["dropped"] == []
    assert as_json("stat", tmp_path)["expiring"] == 2
    later(61)
    about = as_json("stat", tmp_path)
    assert (about["records"], about["expiring"], about["expired"]) == (4, 2, 2)
    listed = CliRunner().invoke(app, ["store", "ls", str(tmp_path)]).output
    assert listed.count("expired") == 2
    tried = as_json("gc", tmp_path, "--dry-run")
    assert (len(tried["dropped"]), tried["expired"], tried["records"]) == (2, 2, 4)
    used = as_json("stat", tmp_path)["used_bytes"]
    done = as_json("gc", tmp_path, "--disk", used - 1)
    assert (len(done["dropped"]), done["expired"], done["records"]) == (2, 2, 2)
    with KVStore(tmp_path, tier=tier) as store:
        assert [stored(store, 1000 * at) for at in range(4)] == [4, 0, 4, 0]


def test_terms_travel_with_an_archive(tmp_path, later):
    """Tenant and the end of the time; what is over stays behind."""
    with KVStore(tmp_path / "one", tier="segment", salt="me") as store:
        put(store, 0, ttl=100)
        put(store, 1000)
        put(store, 2000, ttl=10)
    later(10)
    assert as_json("export", tmp_path / "one", tmp_path / "kv.tar")["records"] == 2
    assert as_json("import", tmp_path / "two", tmp_path / "kv.tar", "--tier", "file")["stored"] == 2
    about = as_json("stat", tmp_path / "two")
    assert (about["records"], about["expiring"]) == (2, 1)
    assert about["tenants"].keys() == {tenant_tag("me").hex()}
    with KVStore(tmp_path / "two", salt="me") as store:
        later(80)
        assert [stored(store, x) for x in (0, 1000, 2000)] == [4, 4, 0]
        later(21)
        assert [stored(store, x) for x in (0, 1000, 2000)] == [0, 4, 0]


@pytest.mark.parametrize("tier", ["file", "segment"])
def test_an_archive_brings_back_what_has_expired(tmp_path, later, tier):
    """A record that nobody is served any more is none that is there already."""
    for name, ttl in (("one", None), ("two", 10)):
        with KVStore(tmp_path / name, tier=tier) as store:
            put(store, 0, ttl=ttl)
    assert as_json("export", tmp_path / "one", tmp_path / "kv.tar")["records"] == 1
    assert as_json("import", tmp_path / "two", tmp_path / "kv.tar")["stored"] == 0
    later(10)
    assert as_json("import", tmp_path / "two", tmp_path / "kv.tar")["stored"] == 1
    with KVStore(tmp_path / "two", memory=0) as store:
        assert stored(store, 0) == 4


def test_policies_are_given_for_all_tiers_or_for_each(tmp_path):
    """The default is ARC in memory and LRU on disk."""

    def policies(**settings):
        with KVStore(tmp_path, **settings) as store:
            rosters = [
                t._roster if hasattr(t, "_roster") else t._room._roster for t in tiers(store)
            ]
            return [roster._state._policy.name for roster in rosters]

    def tiers(store):
        return store._stack.tiers

    assert policies() == ["arc", "lru"]
    assert policies(replacement="s3fifo") == ["s3fifo", "s3fifo"]
    assert policies(replacement={"disk": "gdsf"}) == ["arc", "gdsf"]
    assert policies(replacement={"memory": "lru", "disk": "s3fifo:small=0.3"}) == ["lru", "s3fifo"]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"replacement": "s3fif"}, UnknownPluginError, "Did you mean 's3fifo'"),
        ({"replacement": {"disk": "lruu"}}, UnknownPluginError, "Did you mean"),
        ({"replacement": {"disc": "lru"}}, ConfigError, "Did you mean 'disk'"),
        ({"ttl": 0}, ConfigError, "ttl=0"),
        ({"ttl": "-3d"}, ConfigError, "more than 0"),
        ({"quota": "much"}, ConfigError, "quota='much'"),
        ({"watermarks": (0.5, 0.9)}, ConfigError, "the high one first"),
        ({"watermarks": (1.5, 0.9)}, ConfigError, "the high one first"),
        ({"watermarks": 0.9}, ConfigError, "two shares"),
        ({"min_free": -1}, ConfigError, "min_free=-1"),
        ({"mac_key": b"k" * 65}, ConfigError, "16 to 64 bytes, got 65"),
        ({"mac_key": b"k" * 65, "salt": "a"}, ConfigError, "16 to 64 bytes, got 65"),
    ],
    ids=str,
)
def test_bad_settings_say_what_to_do(tmp_path, settings, error, says):
    """And nothing is made."""
    with pytest.raises(error, match=says):
        KVStore(tmp_path / "kv", **settings)
    assert not (tmp_path / "kv").exists()


def test_a_bad_time_to_live_of_a_put_is_an_error():
    """Before anything is stored."""
    with KVStore() as store:
        for ttl in (0, -1, "soon"):
            with pytest.raises(ConfigError, match="ttl="):
                put(store, 0, ttl=ttl)
            with pytest.raises(ConfigError, match="ttl="):
                store.put_async(SPEC, prompt(store, 0), BLOCK, ttl=ttl)
        assert store.match(SPEC, prompt(store, 0)) == 0


@pytest.mark.parametrize("how", ["put", "load", "load_async", "touch"])
@pytest.mark.parametrize("tier", [None, "file", "segment"])
def test_hints_reach_every_tier(tmp_path, how, tier):
    """What is expected soon stays, though it was used longest ago; what is not wanted goes."""
    with KVStore() as store:
        put(store, 0)
        one = store.stats().tiers["memory"].used_bytes + 8192
    where = {"memory": 5 * one} if tier is None else {"path": tmp_path, "tier": tier, "memory": 0}
    keep = Hint(priority=1, session="chat 7", next_use=3600)
    with KVStore(**where, disk=5 * one) as store:
        assert put(store, 0, **({"hint": keep} if how == "put" else {})) == 4
        if how == "touch":
            assert store.touch(SPEC, prompt(store, 0), hint=keep) == 4
        elif how == "load":
            assert store.load(SPEC, prompt(store, 0), hint=keep).num_blocks == 4
        elif how == "load_async":
            assert store.load_async(SPEC, prompt(store, 0), hint=keep).result().num_blocks == 4
            store._pool.submit(lambda: None, priority=20).result()  # what is noted later, is
        for x in range(1000, 12_000, 1000):
            assert put(store, x) == 4
        assert store.stats().tiers[tier or "memory"].evicted > 0
        assert stored(store, 0) == 4
        assert stored(store, 1000) == 0
