# SPDX-License-Identifier: Apache-2.0
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from kvlib.store.arena import Arena, address
from kvlib.store.fileio import TooLateError

PAGE = 4096


def test_slots_are_aligned_and_do_not_overlap():
    """Every slot begins at a page and is nobody else's."""
    arena = Arena(4, 2 * PAGE)
    views = [arena.take() for _ in range(4)]
    places = sorted(address(view) for view in views)
    assert all(place % PAGE == 0 for place in places)
    assert all(b - a >= 2 * PAGE for a, b in pairwise(places))
    assert arena.nbytes == 8 * PAGE


def test_who_finds_no_slot_waits_until_the_deadline():
    """Staging is bounded: a fifth lease of four slots comes when one is given back, or too late."""
    arena = Arena(1, PAGE)
    with arena.slot(), pytest.raises(TooLateError):
        arena.take(time.monotonic() + 0.02)
    with ThreadPoolExecutor(1) as pool:
        view = arena.take()
        waiting = pool.submit(arena.take)
        arena.give_back(view)
        assert waiting.result(timeout=10) is view
