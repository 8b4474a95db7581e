# SPDX-License-Identifier: Apache-2.0
"""What holds of every replacement policy, and what hints do."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError, UnknownPluginError
from kvlib.registry import describe
from kvlib.store.replacement import REPLACEMENTS, Hint, Replacement
from kvlib.store.replacement.admission import SecondTouch
from kvlib.store.replacement.queues import Ranked

NAMES = REPLACEMENTS.names()
ONLINE = [name for name in NAMES if name != "belady"]
CAPACITY = 100

hints = st.none() | st.builds(
    Hint,
    priority=st.sampled_from((0, 0, 0, -1, 2)),
    ttl=st.none() | st.integers(0, 40),
    next_use=st.none() | st.integers(0, 40),
    cost=st.sampled_from((1.0, 0.5, 7.0)),
)
actions = st.tuples(
    st.sampled_from(("use", "use", "use", "touch", "remove", "pin")), st.integers(0, 25), hints
)


class Cache:
    """A tier without bytes around a policy, and a dict of what it should hold."""

    def __init__(self, policy, capacity=CAPACITY):
        self.now = 0
        self.capacity = capacity
        self.state = REPLACEMENTS.build(policy).start(capacity, lambda: self.now)
        self.sizes = {}  # what is held, oldest use first
        self.pinned = set()

    def use(self, key, size, hint=None):
        """Read it or put it in; whether it was there."""
        self.now += 1
        if key in self.sizes:
            self.state.hit(key, hint)
            self.sizes[key] = self.sizes.pop(key)
            return True
        if size <= self.capacity and self.state.admit(key, size, hint) and self.make_room(size):
            self.state.insert(key, size, hint)
            self.sizes[key] = size
        return False

    def make_room(self, size):
        need = sum(self.sizes.values()) + size - self.capacity
        victims = list(self.state.victims(need, frozenset(self.pinned)))
        assert len(set(victims)) == len(victims)
        assert set(victims) <= self.sizes.keys() - self.pinned
        freed = [self.sizes[key] for key in victims]
        assert sum(freed[:-1]) < max(need, 1), "more than what was needed"
        if sum(freed) < need:
            assert set(victims) == self.sizes.keys() - self.pinned, "it gave up too early"
            return False
        for key in victims:
            self.state.remove(key, evicted=True)
            del self.sizes[key]
        assert sum(self.sizes.values()) + size <= self.capacity
        return True

    def act(self, action, key, hint):
        if action == "use":
            self.use(key, 3 + key, hint)
        elif action == "touch":
            self.now += 1
            self.state.touch(key)
            if key in self.sizes:
                self.sizes[key] = self.sizes.pop(key)
        elif action == "remove":
            self.state.remove(key)
            self.sizes.pop(key, None)
            self.pinned.discard(key)
        elif key in self.sizes and len(self.pinned) < 2:
            self.pinned ^= {key}


@pytest.mark.parametrize("name", NAMES)
@given(steps=st.lists(actions, max_size=120))
def test_any_policy_keeps_the_books(name, steps):
    """After every step: the right keys in order of use, enough victims and no more, room kept."""
    cache = Cache(name)
    for step in steps:
        cache.act(*step)
        assert list(cache.state.keys()) == list(cache.sizes)
        assert len(cache.state) == len(cache.sizes)
        assert sum(cache.sizes.values()) <= CAPACITY
    everything = list(cache.state.victims(1 << 40))
    assert sorted(everything) == sorted(cache.sizes)
    assert list(cache.state.victims(0)) == []


@pytest.mark.parametrize("name", NAMES)
@given(before=st.lists(actions, max_size=80), after=st.lists(actions, max_size=80))
def test_a_snapshot_goes_on_as_if_nothing_had_happened(name, before, after):
    """Through JSON into another process, at another time: the same victims ever after."""
    one, other = Cache(name), Cache(name)
    for step in before:
        one.act(*step)
    other.now = one.now + 1000
    other.state.restore(json.loads(json.dumps(one.state.snapshot())))
    other.sizes, other.pinned = dict(one.sizes), set(one.pinned)
    assert list(other.state.keys()) == list(one.state.keys())
    for step in after:
        one.act(*step)
        other.act(*step)
        assert list(other.sizes) == list(one.sizes)
    assert other.state.snapshot() == one.state.snapshot()
    assert set(other.state.victims(1 << 40)) == set(one.sizes)


def filled(name):
    cache = Cache(name, 12)
    for key in (1, 2, 3, 1, 4, 5, 2, 6, 7, 8, 1, 9):
        cache.use(key, 3, Hint(priority=int(key == 9), next_use=9 if key == 8 else None))
    return cache


def damaged(data):
    """Snapshots that are wrong in one place each."""
    for place in data:
        yield {key: value for key, value in data.items() if key != place}
        yield data | {place: 5}
        yield data | {place: [5]}
    record = data["records"][0]
    for i in range(len(record)):
        yield data | {"records": [[*record[:i], "x", *record[i + 1 :]], *data["records"][1:]]}
        yield data | {"records": [[*record[:i], math.nan, *record[i + 1 :]], *data["records"][1:]]}
    yield data | {"records": [record, *data["records"]]}
    yield data | {"records": data["records"][:-1]}
    for number, (priority, order) in enumerate(data["orders"]):
        others = [pair for i, pair in enumerate(data["orders"]) if i != number]
        yield data | {"orders": others} if number or order else data | {"orders": 7}
        for field, value in order.items():
            wrong = ["x", ["x"], [["x"]], None]
            if isinstance(value, list) and value:
                wrong += [[*value, value[0]], value[1:]]
                if isinstance(value[0], list):
                    wrong += [[[*value[0][:-1], -1], *value[1:]]]
            for bad in wrong:
                yield data | {"orders": [*others, [priority, order | {field: bad}]]}


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_snapshot_changes_nothing(name):
    """Whatever part is missing or wrong, the error is ours and the state goes on as it was."""
    cache = filled(name)
    good = json.loads(json.dumps(cache.state.snapshot()))
    again = REPLACEMENTS.build(name).start(12, lambda: cache.now)
    again.restore(good)
    seen = 0
    for bad in damaged(good):
        if bad == good:
            continue
        try:
            again.restore(bad)
        except (CorruptDataError, IncompatibleDataError):
            seen += 1
            assert json.loads(json.dumps(again.snapshot())) == good, bad
        else:  # well-formed after all: what it says is held, and can go
            assert set(again.victims(1 << 40)) == set(again.keys())
            again.restore(good)
    assert seen > 20


def test_a_snapshot_of_another_policy_is_refused():
    """By name and by parameters."""
    snapshot = filled("s3fifo").state.snapshot()
    for other in ("lru", "s3fifo:small=0.2"):
        with pytest.raises(IncompatibleDataError, match="expected"):
            REPLACEMENTS.build(other).start(12).restore(snapshot)


@pytest.mark.parametrize("name", NAMES)
def test_policies_are_plugins(name):
    """Frozen, described by their method string, and of the protocol."""
    policy = REPLACEMENTS.build(name)
    assert isinstance(policy, Replacement)
    assert REPLACEMENTS.build(describe(policy)) == policy
    assert type(policy).__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("arcs", UnknownPluginError, "Did you mean 'arc'"),
        ("s3fifo:smal=0.2", ConfigError, "'small'"),
        ("s3fifo:small=1.5", ConfigError, "between 0 and 1"),
        ("s3fifo:promote=4", ConfigError, "1 to 3"),
    ],
)
def test_wrong_method_strings_are_named(text, error, words):
    """The message says what was wrong."""
    with pytest.raises(error, match=words):
        REPLACEMENTS.build(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ttl": -1},
        {"next_use": -1},
        {"next_use": float("nan")},
        {"cost": 0},
        {"cost": float("inf")},
    ],
)
def test_wrong_hints_are_refused(wrong):
    """A hint out of range is an error where it is made."""
    with pytest.raises(ConfigError):
        Hint(**wrong)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_deleted_is_forgotten(name):
    """Only an eviction may leave a trace: a record that was deleted comes back as a new one."""
    one, other = Cache(name), Cache(name)
    for key in (1, 2, 2):
        one.use(key, 3)
        one.state.remove(key)
    one.sizes.clear()
    one.use(3, 3)
    other.use(3, 3)
    assert one.state.snapshot()["orders"] == other.state.snapshot()["orders"]


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_victims_evicts_nothing(name):
    """Asked for more, the same ones come first; pinned ones stay where they were."""
    cache = Cache(name)
    for key in range(10):
        cache.use(key, 3)
    assert list(cache.state.victims(9, frozenset((0, 1)))) == [2, 3, 4]
    assert list(cache.state.victims(7)) == [0, 1, 2]
    assert list(cache.state.victims(1 << 40)) == list(range(10))


def test_belady_takes_anything_while_there_is_room():
    """Also what is never used again, and again after a record was deleted."""
    cache = Cache("belady", 6)
    for key in (1, 2):
        cache.use(key, 3, Hint(next_use=50))
    cache.use(3, 3)
    assert set(cache.sizes) == {1, 2}
    cache.act("remove", 1, None)
    cache.use(3, 3)
    assert set(cache.sizes) == {2, 3}


@pytest.mark.parametrize("name", ONLINE)
def test_what_is_gone_is_remembered_only_so_long(name):
    """Ghosts are bounded: a long scan leaves a snapshot no larger than a short one."""
    lengths = []
    for uses in (2_000, 4_000):
        cache = Cache(name)
        for key in range(uses):
            cache.use(key % (uses - 7), 1 + key % 3)
        lengths.append(len(json.dumps(cache.state.snapshot())))
    assert lengths[1] < 1.2 * lengths[0]


# Hints


@given(
    uses=st.lists(
        st.tuples(st.integers(0, 9), st.none() | st.integers(0, 30)), min_size=1, max_size=40
    )
)
def test_what_waits_longest_for_a_hit_goes_first(uses):
    """Around LRU, by sums over all steps: what is known by its next use, the rest by its earnings.

    A use that was expected and did not come leaves the record as if it were new.
    """
    cache = Cache("lru", 1 << 20)
    last, due = {}, {}
    room = hit = 0
    for key, ahead in uses:
        unknown = {k for k in last if due[k] is None}
        room += len(unknown)
        hit += key in unknown
        cache.use(key, 1, None if ahead is None else Hint(next_use=ahead))
        last[key], due[key] = cache.now, None if ahead is None else cache.now + ahead
    order = list(cache.state.victims(1 << 40))
    assert set(order) == set(last)
    late = {key for key in last if due[key] is not None and due[key] < cache.now}
    known = [due[key] for key in order if due[key] is not None and key not in late]
    assert known == sorted(known, reverse=True)
    unknown = [last[key] for key in order if due[key] is None]
    assert unknown == sorted(unknown)
    if not late and len(uses) <= 8:  # nothing has faded yet
        wait = room / hit if hit else math.inf
        waits = [
            max(cache.now - last[key], wait) if due[key] is None else due[key] - cache.now
            for key in order
        ]
        assert waits == sorted(waits, reverse=True)


def test_earnings_fade():
    """A policy whose records were hit long ago does not live on it: what is expected stays."""
    cache = Cache("lru", 10)
    for i in range(200):
        cache.use(i % 5, 1)
    cache.use(50, 1, Hint(next_use=400))
    kept_at = 0
    for key in range(1000, 1300):
        cache.use(key, 1)
        kept_at += 50 in cache.sizes
    assert kept_at < 300  # five records that were hit each fifth use: 400 is too long to wait
    for key in range(10_000, 11_000):  # and none of these is ever hit
        cache.use(key, 1)
    cache.use(60, 1, Hint(next_use=400))
    for key in range(2000, 2300):
        cache.use(key, 1)
    assert 60 in cache.sizes


@pytest.mark.parametrize("name", ONLINE)
def test_a_record_that_is_expected_soon_stays(name):
    """Of ten records used alike, the one whose next use is near outlives the others."""
    cache = Cache(name, 10)
    for key in range(10):
        cache.use(key, 1, Hint(next_use=15) if key == 0 else None)
    for key in range(100, 109):
        cache.use(key, 1)
    assert 0 in cache.sizes
    cache.now += 1000  # it did not come
    for key in range(200, 230):
        cache.use(key, 1)
    assert 0 not in cache.sizes


@pytest.mark.parametrize("name", ONLINE)
def test_a_record_that_is_expected_late_goes(name):
    """It goes before records that were used longer ago, where records are hit at all."""
    cache = Cache(name, 10)
    for key in (*range(9), *range(9), 9):
        cache.use(key, 1, Hint(next_use=5000) if key == 9 else None)
    cache.use(100, 1)
    assert set(cache.sizes) == {*range(9), 100}


@pytest.mark.parametrize("name", ONLINE)
def test_priorities_and_times_to_live(name):
    """What is over goes first, then the lowest priority, whatever the policy says."""
    cache = Cache(name, 10)
    for key in range(10):
        cache.use(key, 1, Hint(priority=key % 3 - 1, ttl=2 if key == 5 else None))
        cache.use(key, 1)
    order = list(cache.state.victims(1 << 40))
    assert order[0] == 5
    assert [key % 3 - 1 for key in order[1:]] == sorted(
        key % 3 - 1 for key in range(10) if key != 5
    )
    cache.use(5, 1, Hint(priority=1))  # used in time after all
    assert next(cache.state.victims(1 << 40)) != 5


@pytest.mark.parametrize("name", ONLINE)
def test_the_end_of_a_prompt_goes_first(name):
    """Records put in and read from the last to the first leave in that order."""
    cache = Cache(name, 20)
    for _ in range(3):
        for key in reversed(range(10)):
            cache.use(key, 1)
    assert list(cache.state.victims(1 << 40)) == list(reversed(range(10)))


@pytest.mark.parametrize("name", ONLINE)
def test_a_touch_orders_and_is_no_second_use(name):
    """Records put in by threads in any order and touched from the last to the first: same order."""
    touched, plain = Cache(name, 60), Cache(name, 60)
    for cache in (touched, plain):
        for key in range(10) if cache is touched else reversed(range(10)):
            cache.use(key, 1)
    for key in reversed(range(10)):
        touched.act("touch", key, None)
    assert list(touched.state.victims(1 << 40)) == list(plain.state.victims(1 << 40))


@pytest.mark.parametrize("name", ["arc", "s3fifo"])
def test_a_scan_passes_through(name):
    """Records used again survive a scan of ten times the capacity, which LRU does not."""
    kept = {}
    for policy in (name, "lru"):
        cache = Cache(policy, 50)
        for _ in range(3):
            for key in range(20):
                cache.use(key, 1)
        for key in range(1000, 1500):
            cache.use(key, 1)
        kept[policy] = len(cache.sizes.keys() & set(range(20)))
    assert kept == {name: 20, "lru": 0}


def test_gdsf_takes_the_cost_by_the_byte():
    """Large and cheap goes before small and cheap goes before large and dear."""
    cache = Cache("gdsf")
    cache.use(1, 10, Hint(cost=100))
    cache.use(2, 10)
    cache.use(3, 2)
    assert list(cache.state.victims(1 << 40)) == [2, 3, 1]


# The parts


@given(st.lists(st.tuples(st.integers(0, 8), st.none() | st.integers(-3, 3)), max_size=200))
def test_ranked_keys_come_in_order(steps):
    """Least rank first, then the one set longest ago; None discards."""
    ranked, model = Ranked(), {}
    for key, rank in steps:
        model.pop(key, None)
        if rank is None:
            ranked.discard(key)
        else:
            ranked.set(key, rank)
            model[key] = rank
        assert [key for _, key in ranked.ascending()] == sorted(model, key=model.get)
        assert len(ranked) == len(model)


def test_second_touch():
    """The second offer is taken, the third is a first again; heads at once; memory is bounded."""
    admission = SecondTouch(3, heads=2)
    assert [admission.wanted(7, 5) for _ in range(4)] == [False, True, False, True]
    assert admission.wanted(8, 1)
    assert not admission.wanted(8)
    for key in range(10):
        assert not admission.wanted(key + 100, 2)
        assert len(admission) <= 3
    assert not admission.wanted(100, 2)
    assert admission.wanted(109, 2)
    with pytest.raises(ConfigError, match="most=0"):
        SecondTouch(0)
