# SPDX-License-Identifier: Apache-2.0
"""Times to live, tenants and quotas: the pieces, and every tier against a model of them."""

import errno
import random
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvlib import KVStore
from kvlib.errors import ConfigError, CorruptDataError, UnknownPluginError
from kvlib.store import segment_growth
from kvlib.store import terms as clocks
from kvlib.store.blockio import SegmentFiles
from kvlib.store.cost import CostModel
from kvlib.store.files import FileStore
from kvlib.store.memory import MemoryTier
from kvlib.store.replacement import REPLACEMENTS, Hint
from kvlib.store.replacement.roster import Roster
from kvlib.store.segment_ledger import Ledger
from kvlib.store.segments import SegmentStore
from kvlib.store.sizes import parse_seconds
from kvlib.store.stack import TierStack
from kvlib.store.terms import NO_TENANT, Terms, WallClock, tenant_tag
from kvlib.testing.models import random_block, tiny_spec
from kvlib.testing.records import make_record
from kvlib.testing.tiers import read

PAGE = 4096
TIERS = {"memory": None, "file": FileStore, "segment": SegmentStore}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (1, 1.0),
        (0.5, 0.5),
        ("90", 90),
        ("90s", 90),
        ("15m", 900),
        ("1.5h", 5400),
        (" 7 d ", 604800),
    ],
)
def test_times_as_people_write_them(text, seconds):
    """Seconds, or a number with one of four letters."""
    assert parse_seconds(text, "ttl") == seconds


@pytest.mark.parametrize(
    "text", [0, -1, 0.0, "0s", "-5s", True, None, "", "d", "7w", "1d2h", "inf", 1e20]
)
def test_anything_else_is_no_time(text):
    """Nothing that is over at once, or never."""
    with pytest.raises(ConfigError, match=r"ttl=.*more than 0"):
        parse_seconds(text, "ttl")


def test_tags_name_tenants_and_hide_salts():
    """Eight bytes; another salt or MAC key has another one; without a salt there is none."""
    tags = {tenant_tag("a"), tenant_tag("b"), tenant_tag("a", b"k" * 16), tenant_tag(b"a\0")}
    assert len(tags) == 4
    assert {len(tag) for tag in tags} == {8}
    assert tenant_tag("a") == tenant_tag(b"a")
    assert tenant_tag("") == tenant_tag(b"", b"k" * 16) == NO_TENANT


def test_the_clock_never_goes_back(monkeypatch):
    """Not when it is set, nor before what is remembered; what is no date is not believed."""
    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: 1000)
    monkeypatch.setattr(clocks, "_wall_ms", lambda: 5_000_000)
    clock = WallClock()
    monkeypatch.setattr(clocks, "_wall_ms", lambda: 1)
    assert clock.now() == 5_000_000
    assert WallClock(floor=6_000_000).now() == 6_000_000
    assert WallClock(floor=1 << 63).now() == 1
    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: 1250)
    assert clock.now() == 5_000_250
    assert clock.until(None) == 0
    assert clock.until(0.0001) == 5_000_251
    assert clock.left(5_001_250) == 1.0
    assert clock.left(0) is None


@pytest.mark.parametrize("policy", REPLACEMENTS.names())
def test_a_roster_knows_who_holds_what(policy):
    """Under every policy: what is over first, a tenant's own in order of use, bytes by tenant."""
    now = 0.0
    roster: Roster[int] = Roster(policy, 1000, lambda: now)
    a, b = Terms(tenant=b"tenant a"), Terms(tenant=b"tenant b")
    for key in range(6):
        roster.insert(key, 100, Terms(ttl=5, tenant=b"tenant a") if key == 4 else (a, b)[key % 2])
    roster.touch(0)
    roster.hit(2)
    assert roster.tenants == {b"tenant a": 300, b"tenant b": 300}
    assert list(roster.victims(300, tenant=b"tenant a")) == [4, 0, 2]
    assert list(roster.victims(150, {4}, b"tenant a")) == [0, 2]
    assert list(roster.victims(100, tenant=b"nobody..")) == []
    roster.touch(4, Hint(priority=3))  # does not take its time from it
    assert roster.terms(4) == Terms(ttl=5, tenant=b"tenant a")
    now = 5.0
    assert roster.is_over(4)
    assert next(roster.victims(100)) == 4
    assert list(roster.victims(200, tenant=b"tenant a")) == [4, 0]
    roster.insert(4, 50, b)
    assert roster.tenants == {b"tenant a": 200, b"tenant b": 350}
    assert not roster.is_over(4)
    for key in range(6):
        roster.remove(key)
        roster.remove(key)
    assert roster.tenants == {}
    assert (len(roster), 3 in roster, roster.expires) == (0, False, False)


@pytest.mark.parametrize("kind", list(TIERS))
def test_policies_are_method_strings_in_every_tier(tmp_path, kind):
    """By name, with parameters; a wrong one is an error that names a near one."""

    def make(policy):
        if kind == "memory":
            return MemoryTier(1 << 20, replacement=policy)
        return TIERS[kind](tmp_path / "kv", capacity=1 << 20, replacement=policy)

    for policy in ("lru", "s3fifo:small=0.2", "arc"):
        with make(policy) as tier:
            assert tier.put(*make_record(1))
    with pytest.raises(UnknownPluginError, match="s3fifo"):
        make("s3fif0")
    with pytest.raises(ConfigError):
        make("s3fifo:small=2")
    with make("gdsf") as tier:  # and nothing was left locked
        assert tier.check().ok


@pytest.mark.parametrize("kind", ["file", "segment"])
def test_a_scan_does_not_drive_out_what_is_read_again(tmp_path, kind):
    """On disk, too, ARC keeps what LRU loses."""
    used = [make_record(seed, size=3000) for seed in range(4)]
    left = {}
    for policy in ("arc", "lru"):
        unit = PAGE if kind == "file" else 2 * PAGE
        with TIERS[kind](tmp_path / policy, capacity=12 * unit, replacement=policy) as tier:
            for key, parts in used:
                tier.put(key, parts)
                assert tier.check().ok  # published
                assert read(tier, key) is not None
            for seed in range(100, 130):
                tier.put(*make_record(seed, size=3000))
            left[policy] = sum(tier.contains_many([key for key, _ in used]))
    assert left == {"arc": 4, "lru": 0}


def test_a_store_that_was_only_looked_at_remembers_how_late_it_was(tmp_path, monkeypatch):
    """A clock that is set back afterwards gives no record more time."""
    wall, now = clocks._wall_ms(), clocks._elapsed_ms()
    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: now)
    key, parts = make_record(5)
    left = []
    for ahead in (0, 90_000, -86_400_000):
        monkeypatch.setattr(clocks, "_wall_ms", lambda ahead=ahead: wall + ahead)
        with SegmentStore(tmp_path / "kv", capacity=1 << 20) as store:
            if not left:
                store.put(key, parts, Terms(ttl=100))
            assert store.contains_many([key]) == [True]
            left.append(store.terms(key).ttl)
    assert left == [100, 10, 10]


def test_accounts_of_tenants_are_audited_and_repaired(tmp_path):
    """A wrong sum, a row too many or too few; quotas that were noted stay."""
    env = lmdb.open(str(tmp_path), max_dbs=8)
    ledger = Ledger(env)
    holder = b"h" * 16
    with env.begin(write=True) as txn:
        ledger.add_segment(txn, 40)
        for i in range(4):
            tenant = b"tenant %d" % (i % 2)
            entry = ledger.reserve(txn, holder, 9, 1 + i, tenant=tenant, quota=7 + i)
            if i < 3:
                ledger.publish(txn, holder, {bytes([i]) * 64: entry}, now=0)
        want = {b"tenant 0": (1 + 3, 9), b"tenant 1": (2 + 4, 10)}
        assert ledger.accounts.all(txn) == want
        assert ledger.audit(txn) == []
    for damage in ("more", "less", "gone", "stranger"):
        with env.begin(write=True) as txn:
            accounts = ledger.accounts
            if damage == "stranger":
                accounts.charge(txn, b"tenant 9", 5)
            else:
                by = {"more": 3, "less": -1, "gone": -4}[damage]
                accounts.charge(txn, b"tenant 0", by, 9)
            assert any("tenant" in line or "74656e616e74" in line for line in ledger.audit(txn))
            assert ledger.repair(txn) != []
            assert ledger.audit(txn) == []
            assert {k: v.used for k, v in accounts.all(txn).items()} == {
                k: v[0] for k, v in want.items()
            }
            accounts.charge(txn, b"tenant 0", 0, 9)
    with env.begin(write=True) as txn:
        txn.put(b"short", b"x", db=ledger.accounts._db)
        with pytest.raises(CorruptDataError):
            ledger.audit(txn)
        txn.abort()
    with env.begin(write=True) as txn:
        ledger.sweep(txn, lambda _: True)
        for i in range(3):
            ledger.remove(txn, bytes([i]) * 64)
        assert ledger.accounts.all(txn) == {}
        assert ledger.audit(txn) == []
    env.close()


def test_two_open_stores_keep_one_quota(tmp_path):
    """Of a tenant that writes through both: what the other stored counts, and goes."""
    mine = Terms(tenant=b"tenant 1", quota=4 * PAGE)
    other = Terms(tenant=b"tenant 2")
    records = [make_record(seed, size=1000) for seed in range(12)]

    def used(store):
        return {k: v.used for k, v in store._room.limits()[1].items()}

    with (
        SegmentStore(tmp_path / "kv", capacity=60 * PAGE) as one,
        SegmentStore(tmp_path / "kv", capacity=60 * PAGE) as two,
    ):
        assert two.put(*records[11], other)
        for at, record in enumerate(records[:8]):
            assert (one, two)[at % 2].put(*record, mine)
            assert used(one)[b"tenant 1"] <= 4
            (one, two)[at % 2]._commit.flush()
        assert one.contains_many([key for key, _ in records[:8]]) == [*[False] * 6, True, True]
        assert read(one, records[11][0]) is not None
        assert one.check().ok
    for damage in (False, True):
        if damage:  # made anew from the header pages
            shutil.rmtree(tmp_path / "kv" / "index.lmdb")
        with SegmentStore(tmp_path / "kv", capacity=60 * PAGE) as store:
            assert used(store) == {b"tenant 1": 4, b"tenant 2": 2}
            assert store.terms(records[7][0]) == Terms(tenant=b"tenant 1")
            assert store.check().ok


def test_a_floor_of_free_space_stops_growth(tmp_path):
    """Below it no segment is made, and files take the room of others; above it, they are."""
    record, other = make_record(1), make_record(2)
    with SegmentStore(tmp_path / "seg", capacity="1MiB", min_free=1 << 60) as store:
        assert not store.put(*record)
        assert store.stats().rejected == 1
    assert not list((tmp_path / "seg").glob("*.kv"))
    with SegmentStore(tmp_path / "seg", capacity="1MiB", segment=4 * PAGE, min_free=1) as store:
        assert store.put(*record)
        held = list((tmp_path / "seg").glob("*.kv"))
        assert held
    with SegmentStore(tmp_path / "seg", capacity="1MiB", min_free=1 << 60) as store:
        for seed in range(3, 10):
            assert store.put(*make_record(seed))  # in the room there is
        assert list((tmp_path / "seg").glob("*.kv")) == held
        assert store.stats().evicted > 0
    with FileStore(tmp_path / "file", min_free=1 << 60) as store:
        assert not store.put(*record)
    with FileStore(tmp_path / "file", min_free=1) as store:
        assert store.put(*record)
    with FileStore(tmp_path / "file", min_free=1 << 60) as store:
        assert store.put(*other)
        assert list(store.keys()) == [other[0]]
        assert not store.put(*make_record(3, size=30_000))


def test_what_expires_before_it_is_published(tmp_path, monkeypatch):
    """It is written anew, and the room of the first one is free again."""
    now = clocks._elapsed_ms()
    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: now)
    monkeypatch.setattr("kvlib.store.segment_commit._GROUP_S", 1e6)
    record = make_record(1)
    with SegmentStore(tmp_path / "kv", capacity=20 * PAGE) as store:
        assert store.put(*record, Terms(ttl=1))
        now += 1000
        assert store.contains_many([record[0]]) == [False]
        assert store.put(*record)
        assert read(store, record[0]) == b"".join(record[1])
        store._commit.flush()
        assert store.stats().used_bytes == 2 * PAGE
        assert store.check().ok
    with SegmentStore(tmp_path / "kv", capacity=20 * PAGE) as store:
        assert read(store, record[0]) == b"".join(record[1])


def test_what_is_met_while_it_is_dropped_is_counted_once(tmp_path, monkeypatch):
    """By readers that found its row before it went, also when the name was given away again."""
    now = clocks._elapsed_ms()
    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: now)
    monkeypatch.setattr("kvlib.store.segment_commit._GROUP_S", 1e6)
    (key, parts), (other, _) = make_record(1), make_record(2)
    name = key.to_bytes()
    with SegmentStore(tmp_path / "kv", capacity=20 * PAGE) as store:
        monkeypatch.setattr(store._room, "_nudge", lambda: None)  # dropped when we say so

        def put(ttl):
            assert store.put(key, parts, Terms(ttl=ttl))
            store._commit.flush()
            return store._room.lookup(name)

        first = put(1)
        now += 1000
        assert store.contains_many([key, other]) == [False, False]
        assert store._room.is_over(name, first)
        assert store.stats().expired == 1
        store._room.publish([])  # drops it
        assert store._room.is_over(name, first)
        assert store.stats().expired == 1
        second = put(1)
        assert store._room.is_over(name, first)
        assert not store._room.is_over(name, second)
        assert store.stats().expired == 1
        now += 1000
        assert store._room.is_over(name, first)
        assert store.stats().expired == 1
        assert store._room.is_over(name, second)
        assert store.stats().expired == 2
        put(None)  # in its place
        assert store._room.is_over(name, second)
        assert store.stats().expired == 2
        assert read(store, key) == b"".join(parts)


@pytest.mark.parametrize("kind", ["file", "segment"])
def test_many_readers_count_an_expired_record_once(tmp_path, kind):
    """However they meet it."""
    records = [make_record(seed, size=100) for seed in range(24)]
    with TIERS[kind](tmp_path / "kv", capacity=100 * PAGE) as store, ThreadPoolExecutor(6) as pool:
        for key, parts in records:
            assert store.put(key, parts, Terms(ttl=0.05))

        def meet(seed):
            choose = random.Random(seed)
            while time.monotonic() < until:
                key = choose.choice(records)[0]
                choose.choice([store.size, store.terms, lambda k: store.contains_many([k])])(key)
                read(store, key)

        until = time.monotonic() + 0.6
        list(pool.map(meet, range(6)))
        assert store.contains_many([key for key, _ in records]) == [False] * 24
        assert store.stats().expired == 24


class Fleeting(FileStore):
    """Drops what was read: others saw that its time is over, or needed its room."""

    def get_into(self, key, *args, **settings):
        got = super().get_into(key, *args, **settings)
        self.delete(key)
        return got


def test_what_is_gone_when_its_time_is_asked_for_stays_in_no_other_tier(tmp_path):
    """It is served this once: in a faster tier it would have no end any more."""
    key, parts = make_record(1)
    with Fleeting(tmp_path) as disk, MemoryTier("1MiB") as memory:
        stack = TierStack([memory, disk], CostModel())
        disk.put(key, parts, Terms(ttl=60))
        assert stack.terms(key).ttl == pytest.approx(60, abs=20)
        assert stack.read(key)[0] == b"".join(parts)
        assert memory.contains_many([key]) == [False]
        assert stack.terms(key) is None


@pytest.mark.parametrize("lost", ["device", "disk"])
def test_nor_does_a_store_keep_it_elsewhere(tmp_path, monkeypatch, lost):
    """Neither decoded, nor on disk where only memory had it."""
    spec = tiny_spec()
    with KVStore(tmp_path, device="cpu") as store:
        keys = store.block_keys(spec, range(256))
        store.put(spec, keys, random_block(spec, 256), ttl=60)
        memory, disk = store._stack.tiers
        (key,) = disk.keys()
        if lost == "disk":
            assert disk.delete(key)

        lend = memory.lend

        def lend_last(key, *args):
            found = lend(key, *args)
            for tier in (memory, disk):
                tier.delete(key)
            return found

        monkeypatch.setattr(memory, "lend", lend_last)
        if lost == "device":
            assert store.load(spec, keys).num_blocks == 4
        else:
            store._writer.copy_down([key])
        assert store.match(spec, keys) == 0
        assert store.load(spec, keys).num_blocks == 0


def test_files_keep_their_order_when_the_clock_is_set_back(tmp_path, monkeypatch):
    """What is used after that is used last, also for who opens the folder then."""
    records = [make_record(seed) for seed in range(4)]
    now = time.time_ns()
    for ago, some in ((0, records[:2]), (86400, records[2:])):
        monkeypatch.setattr(time, "time_ns", lambda ago=ago: now - 10**9 * ago)
        with FileStore(tmp_path) as store:
            for record in some:
                assert store.put(*record)
    with FileStore(tmp_path) as store:
        assert list(store.keys()) == [key for key, _ in records]


@pytest.mark.parametrize("short", ["min_free", "ENOSPC"])
def test_the_rests_of_a_full_disk_make_no_segments(tmp_path, monkeypatch, short):
    """Somebody frees four pages again and again: that is no file each time."""
    left = 20 * PAGE
    allocate = SegmentFiles.create

    def create(self, number, nbytes):
        nonlocal left
        if nbytes > left:
            raise OSError(errno.ENOSPC, "no room")
        left -= nbytes
        allocate(self, number, nbytes)

    if short == "ENOSPC":
        monkeypatch.setattr(SegmentFiles, "create", create)
    monkeypatch.setattr(segment_growth, "free_bytes", lambda _: (1 << 30) + left)
    monkeypatch.setattr(segment_growth, "_RETRY_S", 0.0)
    with SegmentStore(
        tmp_path, capacity="1GiB", granule=PAGE, min_free=(1 << 30) if short == "min_free" else 0
    ) as store:
        for seed in range(300):
            assert store.put(*make_record(seed, size=5000))
            left = 4 * PAGE
        assert len(list(tmp_path.glob("*.kv"))) < 25
        assert store.check().ok


CAPACITY = 24 * PAGE
QUOTA = 8 * PAGE
RECORDS = [make_record(seed, size=(100, 3000, 7000)[seed % 3]) for seed in range(12)]
WHOLE = [b"".join(parts) for _, parts in RECORDS]
SEEDS = st.integers(0, len(RECORDS) - 1)
TENANTS = (b"tenant 0", b"tenant 1", b"tenant 2")  # the last one has no quota


class TermsMachine(RuleBasedStateMachine):
    """Any tier under any policy: nothing is served beyond its time, no quota is exceeded, and
    nobody pays for another one's.
    """

    @initialize(kind=st.sampled_from(list(TIERS)), policy=st.sampled_from(REPLACEMENTS.names()))
    def begin(self, kind: str, policy: str) -> None:
        self.kind, self.policy = kind, policy
        self.folder = Path(tempfile.mkdtemp())
        self.patch = pytest.MonkeyPatch()
        self.now = clocks._elapsed_ms()
        self.patch.setattr(clocks, "_elapsed_ms", lambda: self.now)
        self.patch.setattr(clocks, "_wall_ms", lambda: self.wall)
        self.wall = 1_800_000_000_000
        self.until: dict[int, float] = {}  # of what was put, when its time is over
        self.tenant: dict[int, bytes] = {}
        self.open()

    def open(self) -> None:
        if self.kind == "memory":
            self.store = MemoryTier(CAPACITY, replacement=self.policy)
        else:
            self.store = TIERS[self.kind](
                self.folder / "kv", capacity=CAPACITY, replacement=self.policy
            )

    def held(self) -> set[int]:
        found = self.store.contains_many([key for key, _ in RECORDS])
        return {seed for seed, there in enumerate(found) if there}

    def physical(self, seed: int) -> int:
        size = len(WHOLE[seed])
        extra = {"memory": 0, "file": 32, "segment": PAGE}[self.kind]
        return size if self.kind == "memory" else -(-(size + extra) // PAGE) * PAGE

    @rule(
        seed=SEEDS,
        tenant=st.sampled_from(TENANTS),
        ttl=st.sampled_from([None, 1, 5, 60]),
        priority=st.integers(-1, 1),
        quota=st.sampled_from([QUOTA, 2 * PAGE]),
    )
    def put(self, seed: int, tenant: bytes, ttl, priority: int, quota: int) -> None:
        bound = None if tenant == TENANTS[2] else quota
        before = self.held()
        room = CAPACITY - self.store.stats().used_bytes
        terms = Terms(ttl=ttl, tenant=tenant, quota=bound, hint=Hint(priority=priority))
        put = self.store.put(*RECORDS[seed], terms)
        after = self.held()
        assert put == (seed in after)
        if put and seed not in before:
            self.until[seed] = float("inf") if ttl is None else self.now + 1000 * ttl
            self.tenant[seed] = tenant
        lost = before - after
        if room >= self.physical(seed):
            assert {self.tenant[other] for other in lost} <= {tenant}
        if bound is not None and put and seed not in before:
            assert self.used(after, tenant) <= bound
        if not put:
            assert not lost or self.kind == "segment"
            assert self.policy == "belady" or (bound is not None and bound < self.physical(seed))

    def used(self, held: set[int], tenant: bytes) -> int:
        return sum(self.physical(seed) for seed in held if self.tenant[seed] == tenant)

    @rule(seed=SEEDS)
    def get(self, seed: int) -> None:
        got = read(self.store, RECORDS[seed][0])
        assert got is None or got == WHOLE[seed]
        if self.now >= self.until.get(seed, 0):
            assert got is None

    @rule(seeds=st.lists(SEEDS, max_size=3), ahead=st.sampled_from([None, 2.0, 30.0]))
    def touch(self, seeds: list[int], ahead: float | None) -> None:
        hint = None if ahead is None else Hint(next_use=ahead)
        self.store.touch([RECORDS[seed][0] for seed in seeds], hint)

    @rule(seconds=st.sampled_from([0.5, 1, 4, 30]), aside=st.sampled_from([0, -3600, 3600]))
    def pass_time(self, seconds: float, aside: int) -> None:
        self.now += int(1000 * seconds)
        self.wall += int(1000 * (seconds + aside))  # somebody sets the clock

    @rule(seed=SEEDS)
    def delete(self, seed: int) -> None:
        self.store.delete(RECORDS[seed][0])
        assert seed not in self.held()

    @rule(most=st.integers(0, CAPACITY))
    def trim(self, most: int) -> None:
        assert self.store.check().ok  # all of them are written
        self.store.trim(most)
        assert self.store.stats().used_bytes <= most

    @rule()
    def reopen(self) -> None:
        held = self.held()
        self.store.close()
        self.open()
        again = self.held()
        assert again <= held
        if self.kind == "memory":
            assert not again

    @invariant()
    def kept(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.stats().used_bytes <= CAPACITY
        for seed in self.held():
            assert self.now < self.until[seed]
            terms = self.store.terms(RECORDS[seed][0])
            assert terms.tenant == self.tenant[seed]
        for tenant in TENANTS[:2]:
            assert self.used(self.held(), tenant) <= QUOTA

    def teardown(self) -> None:
        if hasattr(self, "store"):
            report = self.store.check()
            assert report.ok, report
            self.store.close()
            self.patch.undo()
            shutil.rmtree(self.folder)


TestTermsMachine = TermsMachine.TestCase
TestTermsMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
