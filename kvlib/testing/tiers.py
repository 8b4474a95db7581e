# SPDX-License-Identifier: Apache-2.0
"""What every tier must do: subclass `TierContract`, give `make_tier`, and pytest runs the rest."""

import os
import random
import time
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvlib.codecs.container import parse_header
from kvlib.errors import StoreClosedError
from kvlib.keys import StoreKey
from kvlib.store import terms as clocks
from kvlib.store.replacement import Hint
from kvlib.store.terms import Terms
from kvlib.store.tier import Tier
from kvlib.testing.records import make_record

__all__ = ["TierContract", "read"]

MIB = 1 << 20


def read(tier: Tier, key: StoreKey) -> bytes | None:
    """The bytes of a record, or None."""
    size = tier.size(key)
    if size is None:
        return None
    buffer = bytearray(size)
    got = tier.get_into(key, buffer)
    return None if got is None else bytes(buffer[:got])


class TierContract:
    """The contract suite. `make_tier` is a fixture that opens an empty tier of a given capacity."""

    persistent: bool
    """What the tier says of itself."""

    overhead: int = 0
    """Bytes a record takes besides its own, rounded up to whole pages."""

    @pytest.fixture
    @abstractmethod
    def make_tier(self) -> Callable[[int], Tier]:
        """A function from a capacity in bytes to a tier; for persistent ones, always the same."""

    def test_a_miss_is_none(self, make_tier: Callable[[int], Tier]) -> None:
        """What is not there is None or False, never an error."""
        key, _ = make_record(0)
        with make_tier(MIB) as tier:
            assert tier.get_into(key, bytearray(4096)) is None
            assert tier.size(key) is None
            assert tier.contains_many([key]) == [False]
            assert tier.delete(key) is False
            tier.touch([key])
            assert list(tier.keys()) == []
            assert tier.stats().misses == 1

    def test_records_come_back(self, make_tier: Callable[[int], Tier]) -> None:
        """Whatever the pieces and buffer types, the bytes come back; pieces are not kept."""
        with make_tier(MIB) as tier:
            for seed, size in enumerate((0, 1, 100, 5000, 70000)):
                key, parts = make_record(seed, size=size)
                want = b"".join(parts)
                first = bytearray(want[:5])
                assert tier.put(key, [first, memoryview(want)[5:9], want[9:]])
                first[:] = b"xxxxx"
                assert read(tier, key) == want
                assert tier.size(key) == len(want)
            assert tier.stats().records == 5
            assert tier.check().ok

    def test_single_pieces_of_many(self, make_tier: Callable[[int], Tier]) -> None:
        """A record in thousands of pieces is one record."""
        key, parts = make_record(1, size=20000)
        want = b"".join(parts)
        with make_tier(MIB) as tier:
            assert tier.put(key, [want[i : i + 7] for i in range(0, len(want), 7)])
            assert read(tier, key) == want

    def test_sections_are_read_alone(self, make_tier: Callable[[int], Tier]) -> None:
        """With `sections`, the header and these arrive at their offsets."""
        key, parts = make_record(2, size=40000)
        want = b"".join(parts)
        header = parse_header(want)
        with make_tier(MIB) as tier:
            tier.put(key, parts)
            front = bytearray(header.header_bytes)
            assert tier.get_into(key, front, sections=()) == len(want)
            assert front == want[: header.header_bytes]
            buffer = bytearray(b"\xa5" * len(want))
            assert tier.get_into(key, buffer, sections=[2]) == len(want)
            info = header.sections[2]
            end = info.offset + info.stored_bytes
            assert buffer[info.offset : end] == want[info.offset : end]

    def test_what_is_returned_is_a_copy(self, make_tier: Callable[[int], Tier]) -> None:
        """Writing into a buffer after a read changes nothing in the tier."""
        key, parts = make_record(3)
        want = b"".join(parts)
        with make_tier(MIB) as tier:
            tier.put(key, parts)
            buffer = bytearray(len(want))
            tier.get_into(key, buffer)
            buffer[:] = bytes(len(want))
            assert read(tier, key) == want

    def test_a_buffer_too_small_is_a_miss(self, make_tier: Callable[[int], Tier]) -> None:
        """A record that does not fit the buffer is not read in part."""
        key, parts = make_record(4)
        with make_tier(MIB) as tier:
            tier.put(key, parts)
            assert tier.get_into(key, bytearray(100)) is None
            assert read(tier, key) == b"".join(parts)

    def test_the_first_record_stays(self, make_tier: Callable[[int], Tier]) -> None:
        """A second put of a key writes nothing and says that the key is held."""
        key, parts = make_record(5)
        with make_tier(MIB) as tier:
            assert tier.put(key, parts)
            assert tier.put(key, [b"something else"])
            assert read(tier, key) == b"".join(parts)
            assert (tier.stats().puts, tier.stats().duplicates) == (1, 1)

    def test_the_record_used_longest_ago_goes_first(self, make_tier: Callable[[int], Tier]) -> None:
        """Reads and touches count as use; the last of a touch is used last."""
        records = [make_record(seed, size=3000) for seed in range(4)]
        with make_tier(3 * (4096 + self.overhead)) as tier:
            for key, parts in records[:3]:
                tier.put(key, parts)
            tier.touch([records[2][0], records[0][0]])
            assert read(tier, records[1][0]) is not None
            assert list(tier.keys()) == [records[i][0] for i in (2, 0, 1)]
            tier.put(*records[3])
            held = tier.contains_many([key for key, _ in records])
            assert held == [True, True, False, True]
            assert tier.stats().evicted == 1

    def test_capacity_is_never_exceeded(self, make_tier: Callable[[int], Tier]) -> None:
        """After every step the bytes held are within the capacity and add up."""
        choose = random.Random(1)
        with make_tier(40000) as tier:
            for _ in range(300):
                seed = choose.randrange(40)
                key, parts = make_record(seed, size=300 * seed)
                if choose.random() < 0.2:
                    tier.delete(key)
                elif choose.random() < 0.5:
                    tier.put(key, parts)
                else:
                    assert read(tier, key) in (None, b"".join(parts))
                stats = tier.stats()
                assert stats.used_bytes <= 40000
                assert stats.records == len(list(tier.keys()))
            assert tier.stats().evicted > 0
            assert tier.check().ok

    def test_pinned_records_stay(self, make_tier: Callable[[int], Tier]) -> None:
        """Others make room; when all are pinned, nothing comes in; what was pinned twice stays."""
        with make_tier(3 * (4096 + self.overhead)) as tier:
            records = [make_record(seed, size=3000) for seed in range(8)]
            keys = [key for key, _ in records]
            tier.pin([keys[0], keys[1]])
            tier.pin([keys[0]])
            for key, parts in records[:5]:
                assert tier.put(key, parts)
            assert tier.contains_many(keys[:5]) == [True, True, False, False, True]
            tier.pin([keys[4]])
            assert not tier.put(*records[5])
            assert tier.stats().rejected == 1
            assert tier.contains_many(keys[:5]) == [True, True, False, False, True]
            tier.unpin([keys[0], keys[1], keys[4]])
            for key, parts in records[5:8]:
                tier.put(key, parts)
            held = tier.contains_many(keys)
            assert held[0]
            assert not held[1]
            assert tier.stats().used_bytes <= 3 * (4096 + self.overhead)
            assert tier.delete(keys[0])  # asked for, pinned or not

    def test_what_can_never_fit_is_rejected(self, make_tier: Callable[[int], Tier]) -> None:
        """A record larger than the capacity is dropped, counted, and evicts nothing."""
        small, large = make_record(1), make_record(2, size=20000)
        with make_tier(8192 + self.overhead) as tier:
            tier.put(*small)
            assert tier.put(*large) is False
            assert tier.stats().rejected == 1
            assert read(tier, small[0]) is not None

    def test_a_deadline_that_passed_is_a_miss(self, make_tier: Callable[[int], Tier]) -> None:
        """Nothing is returned after the deadline; before it, everything is."""
        key, parts = make_record(6)
        buffer = bytearray(sum(memoryview(p).nbytes for p in parts))
        with make_tier(MIB) as tier:
            tier.put(key, parts)
            assert tier.get_into(key, buffer, deadline=time.monotonic() - 1) is None
            assert tier.stats().timeouts == 1
            assert tier.get_into(key, buffer, deadline=time.monotonic() + 60) == len(buffer)

    def test_deleted_is_gone(self, make_tier: Callable[[int], Tier]) -> None:
        """After a delete the key is a miss and its bytes are free again."""
        key, parts = make_record(7)
        with make_tier(MIB) as tier:
            tier.put(key, parts)
            assert tier.delete(key) is True
            assert read(tier, key) is None
            assert (tier.stats().records, tier.stats().used_bytes) == (0, 0)
            assert tier.put(key, parts)
            assert read(tier, key) == b"".join(parts)

    def test_threads_see_whole_records(self, make_tier: Callable[[int], Tier]) -> None:
        """Eight threads on few keys: every read is a miss or the exact bytes; then all adds up."""
        records = [make_record(seed, size=2000 + 500 * seed) for seed in range(8)]
        with make_tier(5 * (4096 + self.overhead)) as tier:

            def work(seed: int) -> int:
                choose = random.Random(seed)
                hits = 0
                for _ in range(60):
                    key, parts = choose.choice(records)
                    action = choose.randrange(4)
                    if action == 0:
                        tier.put(key, parts)
                    elif action == 1:
                        tier.delete(key)
                    else:
                        got = read(tier, key)
                        assert got in (None, b"".join(parts))
                        hits += got is not None
                return hits

            with ThreadPoolExecutor(8) as pool:
                assert sum(pool.map(work, range(8))) > 0
            assert tier.check().ok
            assert tier.stats().used_bytes <= 5 * (4096 + self.overhead)
            assert tier.stats().corrupt == 0

    def test_closed_tiers_refuse(self, make_tier: Callable[[int], Tier]) -> None:
        """After close every call raises; closing again does not."""
        key, parts = make_record(8)
        tier = make_tier(MIB)
        tier.put(key, parts)
        tier.close()
        tier.close()
        for call in (
            lambda: tier.get_into(key, bytearray(4096)),
            lambda: tier.put(key, parts),
            lambda: tier.contains_many([key]),
            lambda: tier.size(key),
            lambda: tier.touch([key]),
            lambda: tier.delete(key),
            tier.keys,
            tier.stats,
            tier.check,
        ):
            with pytest.raises(StoreClosedError):
                call()

    def test_forked_children_are_refused(self, make_tier: Callable[[int], Tier]) -> None:
        """A tier opened before a fork raises in the child and goes on in the parent."""
        key, parts = make_record(9)
        with make_tier(MIB) as tier:
            tier.put(key, parts)
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                verdict = b"0"
                try:
                    tier.get_into(key, bytearray(4096))
                except StoreClosedError:
                    verdict = b"1"
                tier.close()  # must not disturb the parent's
                os.write(writer, verdict)
                os._exit(0)
            os.waitpid(pid, 0)
            assert os.read(reader, 1) == b"1"
            os.close(reader)
            os.close(writer)
            assert read(tier, key) == b"".join(parts)

    def test_it_says_whether_it_persists(self, make_tier: Callable[[int], Tier]) -> None:
        """A persistent tier opened again has its records in order of use; others start empty."""
        records = [make_record(seed) for seed in range(5)]
        with make_tier(MIB) as tier:
            assert tier.persistent == self.persistent
            for key, parts in records:
                tier.put(key, parts)
            tier.touch([records[1][0]])
        with make_tier(MIB) as tier:
            order = [records[i][0] for i in (0, 2, 3, 4, 1)] if self.persistent else []
            assert list(tier.keys()) == order
            for key, parts in records:
                assert read(tier, key) == (b"".join(parts) if self.persistent else None)

    def test_what_expired_is_a_counted_miss(
        self, make_tier: Callable[[int], Tier], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A record is served as long as its time runs, is then gone, and may be put again."""
        later = _passing(monkeypatch)
        brief, lasting = make_record(20, size=3000), make_record(21, size=3000)
        with make_tier(MIB) as tier:
            assert tier.put(*brief, Terms(ttl=10))
            assert tier.put(*lasting)
            later(9.999)
            assert read(tier, brief[0]) == b"".join(brief[1])
            later(0.001)
            misses = tier.stats().misses
            assert tier.get_into(brief[0], bytearray(8192)) is None
            assert tier.stats().misses == misses + 1
            assert tier.size(brief[0]) is None
            assert tier.contains_many([brief[0], lasting[0]]) == [False, True]
            assert tier.check().ok
            stats = tier.stats()
            assert (stats.expired, stats.evicted, stats.records) == (1, 0, 1)
            assert tier.put(*brief, Terms(ttl=5))
            later(4)
            assert tier.put(*brief, Terms(ttl=5))  # the first one stays, with its time
            assert tier.stats().duplicates == 1
            assert read(tier, brief[0]) == b"".join(brief[1])
            later(1)
            assert tier.put(*brief)  # expired, and nobody had noticed
            later(1e9)
            assert read(tier, brief[0]) == b"".join(brief[1])
            assert tier.check().ok
            assert tier.stats().used_bytes <= 2 * (4096 + self.overhead)

    def test_what_expired_makes_room_first(
        self, make_tier: Callable[[int], Tier], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Even if it was used last."""
        later = _passing(monkeypatch)
        records = [make_record(seed, size=3000) for seed in range(30, 35)]
        with make_tier(3 * (4096 + self.overhead)) as tier:
            for at, (key, parts) in enumerate(records[:3]):
                tier.put(key, parts, Terms(ttl=10 if at == 1 else None))
            later(9)
            assert read(tier, records[1][0]) is not None
            later(1)
            assert tier.put(*records[3])
            held = tier.contains_many([key for key, _ in records])
            assert held == [True, False, True, True, False]
            assert (tier.stats().expired, tier.stats().evicted) == (1, 0)

    def test_terms_are_kept(
        self, make_tier: Callable[[int], Tier], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tenant and time; through a restart, whatever was done to the clock meanwhile."""
        later = _passing(monkeypatch)
        wall = clocks._wall_ms()
        record = make_record(40)
        with make_tier(MIB) as tier:
            tier.put(*record, Terms(ttl=100, tenant=b"somebody"))
            later(10)
            terms = tier.terms(record[0])
            assert terms is not None
            assert (terms.tenant, terms.ttl) == (b"somebody", 90)
            assert tier.terms(make_record(41)[0]) is None
        if not self.persistent:
            return
        monkeypatch.setattr(clocks, "_wall_ms", lambda: wall + 20_000)
        with make_tier(MIB) as tier:
            terms = tier.terms(record[0])
            assert terms is not None
            assert terms.tenant == b"somebody"
            assert terms.ttl is not None
            assert 79 < terms.ttl <= 80.1
            later(81)
            assert tier.contains_many([record[0]]) == [False]
        monkeypatch.setattr(clocks, "_wall_ms", lambda: wall - 86_400_000)
        with make_tier(MIB) as tier:  # set back by a day: what went does not come back
            assert read(tier, record[0]) is None
            assert tier.put(*record, Terms(ttl=100))
            assert read(tier, record[0]) is not None
            later(100)
            assert read(tier, record[0]) is None

    def test_a_clock_that_is_set_changes_nothing(
        self, make_tier: Callable[[int], Tier], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As long as the tier is open: no record expires early, and none comes back."""
        later = _passing(monkeypatch)
        wall = clocks._wall_ms()
        record, other = make_record(42), make_record(43)
        with make_tier(MIB) as tier:
            tier.put(*record, Terms(ttl=10))
            tier.put(*other, Terms(ttl=1000))
            for day in (86_400_000, -86_400_000):
                monkeypatch.setattr(clocks, "_wall_ms", lambda day=day: wall + day)
                assert read(tier, record[0]) is not None
            later(10)
            assert read(tier, record[0]) is None
            assert read(tier, other[0]) is not None

    def test_a_quota_is_kept_by_its_tenant(self, make_tier: Callable[[int], Tier]) -> None:
        """Its own oldest records go; nobody else's, though the tier is not full."""
        unit = 4096 + self.overhead
        records = [make_record(seed, size=3000) for seed in range(50, 60)]
        keys = [key for key, _ in records]
        mine = Terms(tenant=b"tenant 1", quota=2 * unit)
        with make_tier(6 * unit) as tier:
            for record in records[:3]:
                assert tier.put(*record, Terms(tenant=b"tenant 2"))
            for record in records[3:5]:
                assert tier.put(*record, mine)
            tier.touch([keys[3]])
            assert tier.put(*records[5], mine)
            assert tier.contains_many(keys[:6]) == [True, True, True, True, False, True]
            tier.pin([keys[3], keys[5]])
            assert not tier.put(*records[6], mine)
            assert tier.contains_many(keys[:7]) == [True, True, True, True, False, True, False]
            tier.unpin([keys[3], keys[5]])
            assert tier.put(*records[6], mine)
            assert tier.put(*records[7], Terms(tenant=b"tenant 2"))  # has none
            assert not tier.put(*make_record(60, size=20_000), mine)
            assert tier.contains_many(keys[:8]) == [*[True] * 3, False, False, *[True] * 3]
            assert tier.check().ok
            assert tier.stats().evicted == 2

    def test_trim_brings_it_down(self, make_tier: Callable[[int], Tier]) -> None:
        """What would go next goes first; what is pinned stays."""
        unit = 4096 + self.overhead
        records = [make_record(seed, size=3000) for seed in range(70, 76)]
        keys = [key for key, _ in records]
        with make_tier(10 * unit) as tier:
            for record in records:
                tier.put(*record)
            assert tier.check().ok  # all of them are written
            assert tier.trim(10 * unit) == 0
            used = tier.stats().used_bytes
            tier.pin([keys[0]])
            assert tier.trim(used - 1) == 1
            assert tier.contains_many(keys) == [True, False, True, True, True, True]
            assert tier.trim(0) == 4
            assert tier.contains_many(keys) == [True, False, False, False, False, False]
            for record in records[1:]:
                tenant = b"tenant 2" if record is records[2] else b"tenant 1"
                tier.put(*record, Terms(tenant=tenant))
            assert tier.check().ok
            assert tier.trim(2 * unit, b"tenant 1") == 2
            assert tier.contains_many(keys) == [True, False, True, False, True, True]
            assert tier.check().ok

    def test_hints_reach_the_policy(self, make_tier: Callable[[int], Tier]) -> None:
        """Of a lower priority first, whatever was used last; from `put` and `touch`."""
        records = [make_record(seed, size=3000) for seed in range(80, 85)]
        keys = [key for key, _ in records]
        with make_tier(3 * (4096 + self.overhead)) as tier:
            tier.put(*records[0])
            tier.put(*records[1])
            tier.put(*records[2], Terms(hint=Hint(priority=-1)))
            assert tier.put(*records[3])
            assert tier.contains_many(keys[:4]) == [True, True, False, True]
            tier.touch([keys[3]], Hint(priority=-1))
            assert tier.put(*records[4])
            assert tier.contains_many(keys) == [True, True, False, False, True]


def _passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A function that lets seconds pass for all tiers; besides, no time passes."""
    now = clocks._elapsed_ms()

    def later(seconds: float) -> None:
        nonlocal now
        now += round(1000 * seconds)

    monkeypatch.setattr(clocks, "_elapsed_ms", lambda: now)
    return later
