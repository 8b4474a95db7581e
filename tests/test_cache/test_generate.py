# SPDX-License-Identifier: Apache-2.0
"""Everything that `generate()` does with a cache."""

import pytest
import torch
from transformers import DynamicCache

import kvlib
from kvlib.testing.models import tiny_model

EVICTING = ("streaming:budget=0.25", "snapkv:budget=0.25,window=8", "h2o:budget=0.25")
METHODS = ("full", *EVICTING)
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def ids(num: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 199, (batch, num), generator=torch.Generator().manual_seed(seed))


def held(cache: kvlib.KVCache, sequence: int = 0) -> list[list[list[int]]]:
    layers = [cache.layer_kv(i, sequence) for i in range(len(cache.layers))]
    return [[row.positions.tolist() for row in layer.rows()] for layer in layers]


@pytest.mark.parametrize("method", METHODS)
def test_several_turns(model, method):
    """A second turn with the whole conversation so far goes on where the first one ended."""
    cache, by_hand = (kvlib.KVCache(model, method) for _ in range(2))
    first = model.generate(ids(40), past_key_values=cache, max_new_tokens=5, **PLAIN)
    prompt = torch.cat([first, ids(9, seed=1)], dim=1)
    second = model.generate(prompt, past_key_values=cache, max_new_tokens=6, **PLAIN)
    assert second.shape[1] == 60
    assert cache.num_columns == 59
    with torch.no_grad():
        # The answer's last token was never run: it comes with the second question.
        passes = [ids(40), *(first[:, i : i + 1] for i in range(40, 44)), prompt[:, 44:]]
        for tokens in passes:
            logits = model(tokens, past_key_values=by_hand).logits
        for i in range(54, 60):
            assert logits[0, -1].argmax() == second[0, i]
            if i < 59:
                logits = model(second[:, i : i + 1], past_key_values=by_hand).logits
    assert held(cache) == held(by_hand)
    assert max(max(row) for row in held(cache)[0]) == 58


@pytest.mark.parametrize("method", METHODS)
def test_two_requests_in_turn(model, method):
    """Interleaved token by token, each gets what it gets alone."""
    alone = []
    for seed in (1, 2):
        cache = kvlib.KVCache(model, method)
        with torch.no_grad():
            out = [model(ids(50, seed=seed), past_key_values=cache).logits[:, -1]]
            out += [
                model(t[None, None], past_key_values=cache).logits[:, -1]
                for t in ids(6, seed=seed + 9)[0]
            ]
        alone.append((torch.cat(out), held(cache)))
    caches = [kvlib.KVCache(model, method) for _ in range(2)]
    outs = [[], []]
    with torch.no_grad():
        for turn in range(7):
            for n, seed in enumerate((1, 2)):
                tokens = ids(50, seed=seed)
                if turn:
                    tokens = ids(6, seed=seed + 9)[:, turn - 1 : turn]
                outs[n].append(model(tokens, past_key_values=caches[n]).logits[:, -1])
    for n in range(2):
        assert torch.equal(torch.cat(outs[n]), alone[n][0])
        assert held(caches[n]) == alone[n][1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_an_unequal_batch_is_its_sequences(model, method, padding):
    """Plans are those of separate runs, logits up to rounding; an unequal question too."""
    lengths = (29, 48)
    mask = torch.zeros(2, 48, dtype=torch.int64)
    for row, n in enumerate(lengths):
        mask[row, 48 - n :] = 1
    if padding == "right":
        mask = mask.flip(1)
    questions = torch.ones(2, 4, dtype=torch.int64)
    questions[1, :2] = 0
    mask = torch.cat([mask, questions], dim=1)
    tokens = ids(52, batch=2)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = kvlib.KVCache(model, method)
    together = []
    with torch.no_grad():
        for a, b in ((0, 48), (48, 52)):
            out = model(
                tokens[:, a:b],
                attention_mask=mask[:, :b],
                position_ids=positions[:, a:b],
                past_key_values=cache,
            )
            together.append(out.logits)
        for row in range(2):
            alone = kvlib.KVCache(model, method)
            for logits, (a, b) in zip(together, ((0, 48), (48, 52)), strict=True):
                real = mask[row, a:b].bool()
                found = model(tokens[row : row + 1, a:b][:, real], past_key_values=alone).logits
                assert (logits[row, real] - found[0]).abs().max() < 1e-5
            assert held(cache, row) == held(alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk", [7, 15, 16, 60, 100])
@pytest.mark.parametrize("padding", [0, 37])
def test_a_prompt_in_pieces(model, method, chunk, padding):
    """Chunked prefill ends as one pass does, also where a piece is all padding."""
    tokens = ids(60, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    more = {"attention_mask": mask, "max_new_tokens": 6, **PLAIN}
    whole = kvlib.KVCache(model, method)
    expected = model.generate(tokens, past_key_values=whole, **more)
    cache = kvlib.KVCache(model, method, prefill_chunk_size=chunk)
    found = model.generate(tokens, past_key_values=cache, prefill_chunk_size=chunk, **more)
    assert torch.equal(found, expected)
    assert [held(cache, row) for row in range(2)] == [held(whole, row) for row in range(2)]


def test_a_last_piece_of_one_token_counts_as_a_step(model):
    """It cannot be told from the first new token: the prompt ends before it."""
    cache = kvlib.KVCache(model, "snapkv:budget=0.25,window=8", prefill_chunk_size=20)
    with torch.no_grad():
        for piece in torch.split(ids(41), 20, dim=1):
            model(piece, past_key_values=cache)
    assert cache.layer_kv(0).lengths == (11, 11)  # a quarter of 40, and one
    assert held(cache)[0][0][-1] == 40


def test_pieces_that_the_cache_was_not_told_of(model):
    """A second pass just as long as the first gets a warning that names the argument."""
    cache = kvlib.KVCache(model, "snapkv:budget=0.25,window=8")
    with torch.no_grad():
        model(ids(20), past_key_values=cache)
        with pytest.warns(UserWarning, match="prefill_chunk_size=20"):
            model(ids(20), past_key_values=cache)


def test_the_end_of_a_prompt_can_be_said(model):
    """`end_prefill` evicts at once; before it, nothing is."""
    cache = kvlib.KVCache(model, "h2o:budget=0.25", prefill_chunk_size=1)
    with torch.no_grad():
        for token in ids(20)[0]:
            model(token[None, None], past_key_values=cache)
    assert cache.layer_kv(0).lengths == (20, 20)
    cache.end_prefill()
    cache.end_prefill()
    assert cache.layer_kv(0).lengths == (5, 5)


@pytest.mark.parametrize("method", METHODS)
def test_streaming_output(model, method):
    """A streamer gets the tokens as they come."""

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    cache = kvlib.KVCache(model, method)
    out = model.generate(
        ids(40), past_key_values=cache, max_new_tokens=8, streamer=streamer, **PLAIN
    )
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


def test_beam_search_equals_the_ordinary_cache(model):
    """Under `full`, beams are DynamicCache's."""
    more = {"max_new_tokens": 10, "num_beams": 4, "num_return_sequences": 2, **PLAIN}
    found = model.generate(ids(40), past_key_values=kvlib.KVCache(model), **more)
    expected = model.generate(ids(40), past_key_values=DynamicCache(config=model.config), **more)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_reordered_rows_are_those_of_the_beams(model, method):
    """After each reordering, a row holds what a cache fed with that beam's tokens holds."""
    cache = kvlib.KVCache(model, method)
    beams = [ids(40, seed=s)[0].tolist() for s in (1, 2, 3)]
    orders = ([0, 0, 2], [2, 1, 1], [1, 0, 2], [2, 2, 2])
    with torch.no_grad():
        model(torch.tensor(beams), past_key_values=cache)
        for turn, order in enumerate(orders):
            cache.reorder_cache(torch.tensor(order))
            beams = [beams[i] for i in order]
            new = ids(3, seed=40 + turn)[0].tolist()
            beams = [[*beam, token] for beam, token in zip(beams, new, strict=True)]
            logits = model(torch.tensor(new)[:, None], past_key_values=cache).logits
            for row, beam in enumerate(beams):
                alone = kvlib.KVCache(model, method)
                model(torch.tensor([beam[:40]]), past_key_values=alone)
                for token in beam[40:]:
                    single = model(torch.tensor([[token]]), past_key_values=alone).logits
                assert held(cache, row) == held(alone)
                assert (logits[row] - single[0]).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_beam_search_and_samples_run(model, method):
    """Beams, several samples of one prompt, and the batch operations of a cache."""
    cache = kvlib.KVCache(model, method)
    out = model.generate(ids(40), past_key_values=cache, max_new_tokens=6, num_beams=3, **PLAIN)
    assert out.shape == (1, 46)
    cache = kvlib.KVCache(model, method)
    more = {"do_sample": True, "num_return_sequences": 3, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(ids(40), past_key_values=cache, max_new_tokens=4, **more).shape == (3, 44)
    before = [held(cache, row) for row in range(3)]
    cache.batch_repeat_interleave(2)
    assert [held(cache, row) for row in range(6)] == [x for x in before for _ in range(2)]
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert [held(cache, row) for row in range(2)] == [before[2], before[0]]
    cache.batch_select_indices(torch.tensor([False, True]))
    assert held(cache) == before[0]


@pytest.mark.parametrize("method", ["full", "h2o:budget=0.25"])
def test_compiled(model, method):
    """torch.compile gives the same output; asking for one whole graph gives one clear error."""
    compiled = torch.compile(model, backend="eager")
    caches = [kvlib.KVCache(model, method) for _ in range(2)]
    with torch.no_grad():
        for tokens in (ids(40), ids(1), ids(5), ids(1)):
            found = compiled(tokens, past_key_values=caches[0]).logits
            assert torch.equal(found, model(tokens, past_key_values=caches[1]).logits)
    torch.compiler.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match="compile without fullgraph=True"):
        whole(ids(40), past_key_values=kvlib.KVCache(model, method))
    torch.compiler.reset()
    with torch.no_grad():
        model(ids(40), past_key_values=kvlib.KVCache(model, method))
    assert model.config._attn_implementation == "sdpa"
