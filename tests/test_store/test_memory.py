# SPDX-License-Identifier: Apache-2.0
import pytest

from kvlib.store.memory import MemoryTier
from kvlib.testing.tiers import TierContract


class TestMemoryTier(TierContract):
    """The memory tier keeps the contract."""

    persistent = False

    @pytest.fixture
    def make_tier(self):
        return MemoryTier
