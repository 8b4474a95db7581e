# SPDX-License-Identifier: Apache-2.0
"""The scheduler's accounts, against a simulation of an engine that checks every page."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvlib.connectors.identity import request_salt
from kvlib.connectors.ledger import Ledger
from kvlib.connectors.moves import Staged
from kvlib.keys import block_keys
from kvlib.spec import EXACT, KVSpec, LayerSpec

SPEC = KVSpec(
    model_id="user:m",
    layers=(LayerSpec(num_kv_heads=1, k_head_dim=2, v_head_dim=2),),
    dtype="float32",
)


def test_keys_are_those_of_everybody():
    """The same as `block_keys` gives, however they are asked for."""
    tokens = list(range(1000))
    ledger = Ledger(SPEC, 32, salt="s")
    state = ledger.begin("a")
    got = [state.keys_for(tokens, n)[-1] for n in (1, 2, 5, 15)]
    whole = block_keys(SPEC.fingerprint(), tokens, salt="s")
    assert got == [whole[0], whole[1], whole[4], whole[14]]


def test_salts():
    assert request_salt("s", None) == request_salt("s", "") == "s"
    salts = [("", None), ("", "a"), ("a", None), ("a", "a"), ("aa", None), ("", "aa")]
    keys = {
        block_keys(SPEC.fingerprint(), list(range(64)), salt=request_salt(*salt))[0]
        for salt in salts
    }
    assert len(keys) == len(salts)


@pytest.mark.parametrize(
    ("page", "tokens", "local", "blocks"),
    [(32, 65, 0, 1), (32, 64, 0, 0), (32, 129, 128, 0), (128, 128, 0, 0), (128, 193, 0, 2)],
)
def test_what_is_asked_for(page, tokens, local, blocks):
    """Whole blocks, and never the last token."""
    ledger = Ledger(SPEC, page)
    assert ledger.wanted(ledger.begin("a"), list(range(tokens)), local) == blocks


@given(
    page=st.sampled_from([16, 32, 48, 64, 128]),
    tokens=st.integers(1, 1200),
    staged=st.integers(0, 20),
    pages=st.integers(0, 20),
)
def test_offers_are_whole_pages_that_are_there(page, tokens, staged, pages):
    ledger = Ledger(SPEC, page)
    state = ledger.begin("a")
    local = min(pages, (tokens - 1) // page) * page
    state.keys_for(list(range(tokens)), min(staged, tokens // 64))
    ledger.settled(state, Staged(min(staged, tokens // 64)))
    offer = ledger.offer(state, tokens, local)
    assert offer >= 0
    assert offer % page == 0
    if offer:
        assert local + offer < tokens
        assert local + offer <= min(staged, tokens // 64) * 64
        more = local + offer + page
        assert more >= tokens or more > min(staged, tokens // 64) * 64


@given(data=st.data())
def test_every_block_is_stored_once_and_only_when_it_is_complete(data):
    """An engine computes a prompt in chunks, decodes, speculates, is preempted, and ends."""
    page = data.draw(st.sampled_from([16, 32, 64, 128]), "page")
    prompt = data.draw(st.integers(1, 900), "prompt")
    output = data.draw(st.integers(0, 400), "output")
    save = data.draw(st.sampled_from(["all", "prompt", "none"]), "save")
    ledger = Ledger(SPEC, page, save=save)
    state = ledger.begin("a")
    tokens = list(range(prompt))
    pages = list(range(100, 100 + -(-(prompt + output + 9) // page)))
    computed = 0
    stored = []

    def store(due, known):
        if due is not None:
            made = ledger.save(state, due, pages, "lossy")
            assert len(made.keys) * 64 <= known
            first, stop = due
            assert made.keys[first:] == tuple(
                block_keys(SPEC.fingerprint(), tokens[: stop * 64])[first:stop]
            )
            start = made.first_page * page
            assert start <= first * 64 < start + page
            assert start + len(made.pages) * page >= stop * 64
            assert list(made.pages) == pages[made.first_page :][: len(made.pages)]
            stored.extend(range(first, stop))

    while computed < prompt + output:
        if computed < len(tokens):
            step = data.draw(st.integers(1, 300), "chunk")
            step = min(step, len(tokens) - computed)
            drafts = 0
        else:
            step, drafts = 1, data.draw(st.integers(0, 4), "drafts")
        known = min(computed + step + drafts, len(tokens))
        due = ledger.due(state, tokens, computed + step + drafts, prompt_tokens=prompt)
        store(due, known)
        computed += step
        if computed >= prompt:
            accepted = data.draw(st.integers(0, drafts), "accepted")
            computed += accepted
            tokens += [7] * (1 + accepted)
    last = ledger.due(state, tokens, computed, prompt_tokens=prompt, last=True)
    store(last, min(computed, len(tokens)))
    limit = {"all": min(computed, len(tokens)), "prompt": min(prompt, computed), "none": 0}[save]
    assert stored == list(range(limit // 64))


def test_groups_of_blocks_make_one_record_each():
    """While a prompt is computed, and while it goes on: four at a time; singly at its end."""
    ledger = Ledger(SPEC, 32)
    state = ledger.begin("a")
    tokens = list(range(700))
    assert ledger.due(state, tokens, 300, prompt_tokens=700) == (0, 4)
    assert ledger.due(state, tokens, 500, prompt_tokens=700) is None
    assert ledger.due(state, tokens, 700, prompt_tokens=700) == (4, 10)
    tokens += [1] * 100
    assert ledger.due(state, tokens, 760, prompt_tokens=700) is None
    assert ledger.due(state, tokens, 780, prompt_tokens=700) == (10, 12)
    assert ledger.due(state, tokens, 790, prompt_tokens=700, last=True) is None


def test_what_came_from_the_store_is_not_stored_again():
    ledger = Ledger(SPEC, 32)
    state = ledger.begin("a")
    tokens = list(range(700))
    state.keys_for(tokens, ledger.wanted(state, tokens, 0))
    ledger.settled(state, Staged(6))
    assert ledger.offer(state, 700, 0) == 384
    ledger.taken(state, 384)
    assert state.loading
    assert ledger.due(state, tokens, 384, prompt_tokens=700) is None
    state.loading = False
    assert ledger.due(state, tokens, 700, prompt_tokens=700) == (6, 10)
    ledger.save(state, (6, 10), list(range(40)), "lossy")
    other = ledger.begin("b")  # the same prompt again, from the engine's own cache
    ledger.taken(other, 0)
    assert ledger.due(other, tokens, 700, prompt_tokens=700) is None


def test_what_was_evicted_is_stored_again():
    """A look-up that finds less than was stored says so."""
    ledger = Ledger(SPEC, 32)
    tokens = list(range(700))
    state = ledger.begin("a")
    due = ledger.due(state, tokens, 700, prompt_tokens=700)
    ledger.save(state, due, list(range(40)), "lossy")
    other = ledger.begin("b")
    other.keys_for(tokens, 10)
    ledger.settled(other, Staged(4))
    ledger.taken(other, 256)
    other.loading = False
    assert ledger.due(other, tokens, 700, prompt_tokens=700) == (4, 10)


def test_fidelity_is_inherited():
    """What is computed from blocks that went through a lossy codec is not exact; nor from unknown
    ones of the engine's own cache."""
    tokens = list(range(700))
    ledger = Ledger(SPEC, 32, lossless=False)
    first = ledger.begin("a")
    made = ledger.save(first, (0, 4), list(range(40)), "lossy") if first.keys_for(tokens, 4) else 0
    assert made.fidelity == EXACT
    clean = ledger.begin("b")  # from the engine's own cache, computed by the first
    clean.keys_for(tokens, 10)
    clean.local_tokens = 256
    ledger.taken(clean, 0)
    assert ledger.save(clean, (4, 8), list(range(40)), "lossy").fidelity == EXACT
    loaded = ledger.begin("c")
    loaded.keys_for(tokens, 10)
    ledger.settled(loaded, Staged(4, "lossy"))
    loaded.local_tokens = 0
    ledger.taken(loaded, 256)
    assert ledger.save(loaded, (4, 8), list(range(40)), "lossy").fidelity == "lossy"
    unknown = ledger.begin("d")
    unknown.keys_for(tokens, 10)
    unknown.local_tokens = 256
    ledger.taken(unknown, 0)
    assert ledger.save(unknown, (4, 8), list(range(40)), "lossy").fidelity == "lossy"


def test_after_new_weights_nothing_is_served_or_stored():
    ledger = Ledger(SPEC, 32)
    tokens = list(range(700))
    state = ledger.begin("a")
    other = KVSpec(model_id="user:m2", layers=SPEC.layers, dtype="float32")
    ledger.renew(other)
    assert ledger.wanted(state, tokens, 0) == 0
    assert ledger.due(state, tokens, 700, prompt_tokens=700) is None
    fresh = ledger.begin("b")
    assert fresh.keys_for(tokens, 1) == block_keys(other.fingerprint(), tokens)[:1]


def test_a_request_that_lost_its_pages_is_stored_again():
    """What was to be copied out of them may not have been; unless the store says that it was."""
    ledger = Ledger(SPEC, 32)
    tokens = list(range(700))
    state = ledger.begin("a")
    ledger.save(state, ledger.due(state, tokens, 700, prompt_tokens=700), list(range(40)), "lossy")
    ledger.preempted(state)
    assert ledger.due(state, tokens, 700, prompt_tokens=700) == (0, 10)
    ledger.preempted(state)
    ledger.settled(state, Staged(4))
    ledger.taken(state, 0)
    assert ledger.due(state, tokens, 700, prompt_tokens=700) == (4, 10)
