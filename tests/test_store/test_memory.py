# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest

from kvlib.errors import UnknownPluginError
from kvlib.store.memory import MemoryTier
from kvlib.store.replacement import REPLACEMENTS
from kvlib.testing.records import make_record
from kvlib.testing.tiers import TierContract, read


class TestMemoryTier(TierContract):
    """The memory tier keeps the contract, whichever policy it has."""

    persistent = False

    @pytest.fixture(params=["default", *(x for x in REPLACEMENTS.names() if x != "belady")])
    def make_tier(self, request):
        if request.param == "default":
            return MemoryTier
        return partial(MemoryTier, replacement=request.param)


def test_records_read_again_outlive_a_scan():
    """ARC, the default: 40 records that nobody reads again do not drive out those in use."""
    used = [make_record(seed, size=1000) for seed in range(5)]
    survivors = {}
    for policy in (None, REPLACEMENTS.build("lru")):
        with MemoryTier(16_000, **({"replacement": policy} if policy else {})) as tier:
            for key, parts in used:
                tier.put(key, parts)
                assert read(tier, key) is not None
            for seed in range(100, 140):
                tier.put(*make_record(seed, size=1000))
            survivors[policy is None] = sum(tier.contains_many([key for key, _ in used]))
    assert survivors == {True: 5, False: 0}


def test_what_a_load_does_is_one_use():
    """A record that is brought up, touched and looked at is used once: a scan takes it."""
    key, parts = make_record(1, size=1000)
    with MemoryTier(16_000) as tier:
        for other in range(10, 15):  # in use, so that ARC has both lists
            tier.put(*make_record(other, size=1000))
            read(tier, make_record(other, size=1000)[0])
        tier.put(key, parts)
        tier.touch([key])
        tier.get_into(key, bytearray(2000), sections=())
        for seed in range(100, 140):
            tier.put(*make_record(seed, size=1000))
        assert tier.contains_many([key]) == [False]


def test_an_unknown_policy_is_refused():
    """With the names there are."""
    with pytest.raises(UnknownPluginError, match="arc"):
        MemoryTier(1000, replacement="mru")
