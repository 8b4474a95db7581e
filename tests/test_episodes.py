# SPDX-License-Identifier: Apache-2.0
"""`EpisodicCache`: clusters, routing, what each episode's cache is, and the memory it takes."""

import sys

import numpy as np
import pytest
import torch

import kvlib
from kvlib.calibration import calibrate
from kvlib.episodes import cluster, medoids
from kvlib.errors import ConfigError
from kvlib.eviction.epicache import INSTRUCTION, patch_digest
from kvlib.smollm2 import load_folder

faiss = pytest.importorskip("faiss")

TOPICS = ("garden", "engine", "violin")
SAID = [
    f'Ann said, "the {topic} again, number {i}, and the {topic}"'
    for topic in TOPICS
    for i in range(8)
]


@pytest.fixture(scope="module")
def loaded(text_model_folder):
    """A model whose attention is far from uniform."""
    model, tokenizer = load_folder(text_model_folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(6)
    return model, tokenizer


def counts(texts):
    """Embeds a text by how often it names each topic."""
    return np.array([[text.count(topic) + 0.01 for topic in TOPICS] for text in texts])


def episodic(loaded, **options):
    given = {"budget": 40, "block": 160, "episodes": 3, "embedder": counts, "model_id": "tiny"}
    return kvlib.EpisodicCache(*loaded, **(given | options))


def positions(cache):
    layers = [cache.layer_kv(index) for index in range(len(cache.layers))]
    return [[row.positions.tolist() for row in layer.rows()] for layer in layers]


# Clusters


def blobs(seed, num=60, centers=4):
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centers, 16)) * 3
    label = rng.integers(0, centers, num)
    found = middle[label] + 0.1 * rng.standard_normal((num, 16))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32), label


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_found_and_always_the_same(seed):
    """Those that are there; in the order in which they begin; whatever the global seeds are."""
    vectors, label = blobs(seed)
    expected = sorted(tuple(np.flatnonzero(label == i).tolist()) for i in set(label))
    found = cluster(vectors, 4, seed=42)
    assert found == expected
    noise = np.random.default_rng(seed).standard_normal((50, 8)).astype(np.float32)
    first = cluster(noise, 6, seed=1)
    np.random.seed(seed)
    torch.manual_seed(seed)
    assert cluster(noise, 6, seed=1) == first


def test_fewer_vectors_than_clusters():
    """Equal ones count once; none is left out."""
    vectors = np.eye(3, dtype=np.float32)[[0, 1, 1, 0, 2, 1]]
    assert cluster(vectors, 5, seed=0) == [(0, 3), (1, 2, 5), (4,)]
    assert cluster(vectors[:1], 4, seed=0) == [(0,)]
    assert cluster(vectors[[0, 3]], 4, seed=0) == [(0, 1)]


def test_medoids_by_hand():
    """By cosine, not by distance: (9, 9) points where (1, 1) does."""
    vectors = np.array([[1, 0], [9, 9], [0, 1], [1, 0.8]], dtype=np.float32)
    centroid = np.array([1, 1], dtype=np.float32)
    assert medoids(vectors, (0, 1, 2, 3), centroid, 1) == (1,)
    assert medoids(vectors, (0, 2, 3), centroid, 2) == (0, 3)  # of equal ones the first
    assert medoids(vectors, (0, 2), centroid, 9) == (0, 2)


def test_without_faiss(loaded, monkeypatch):
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install kvlib\[faiss\]"):
        episodic(loaded).build(SAID)


# Episodes


def test_each_topic_is_an_episode(loaded):
    """Its segments, its typical one, and a question about it goes there."""
    cache = episodic(loaded, segment=2)
    calls = []
    cache.build(SAID, progress=lambda *x: calls.append(x))
    assert [episode.segments for episode in cache.episodes] == [
        tuple(range(i, i + 4)) for i in (0, 4, 8)
    ]
    assert cache.segments[4] == "\n".join(SAID[8:10])
    for number, topic in enumerate(TOPICS):
        assert cache.route(f"what of the {topic}?") == number
        assert all(topic in cache.segments[i] for i in cache.episodes[number].typical)
    pieces = -(-(len("\n".join(SAID)) + 1) // 160)  # bytes are tokens
    assert calls == [(i, 3 * pieces) for i in range(3 * pieces + 1)]
    assert cache.nbytes == sum(episode.cache.nbytes for episode in cache.episodes)


def test_routing_is_argmax_cosine(loaded):
    """Of the question and the centroids, on random embeddings."""
    rng = np.random.default_rng(0)
    known = {}

    def embedder(texts):
        return np.stack([known.setdefault(t, rng.standard_normal(12)) for t in texts])

    cache = episodic(loaded, segment=1, episodes=5, embedder=embedder)
    cache.build(SAID[:15])
    for i in range(30):
        asked = embedder([f"q{i}"])[0]
        cosines = []
        for episode in cache.episodes:
            unit = [known[SAID[s]] / np.linalg.norm(known[SAID[s]]) for s in episode.segments]
            middle = np.mean(unit, axis=0)
            cosines.append(asked @ middle / np.linalg.norm(middle) / np.linalg.norm(asked))
        assert cache.route(f"q{i}") == int(np.argmax(cosines))


@torch.no_grad()
@pytest.mark.parametrize("block", [181, 5000])
def test_an_episodes_cache_is_that_of_the_policy(loaded, block):
    """The whole history, block by block, with its typical segments as the patched prompt."""
    model, tokenizer = loaded
    cache = episodic(loaded, segment=2, representatives=2, block=block, system="Be kind.")
    cache.build(SAID)
    before = "Be kind.\n\n"
    ids = tokenizer(before + "\n".join(SAID), return_tensors="pt").input_ids
    for episode in cache.episodes:
        text = INSTRUCTION + "\n" + "\n".join(cache.segments[i] for i in episode.typical)
        patch = tokenizer(text, return_tensors="pt").input_ids[0]
        assert len(episode.typical) == 2
        assert episode.cache.method == (
            f"epicache:budget=40,alpha=1.1,floor=0.25,sinks={len(before)},"
            f"patch={patch_digest(patch)},profile=none,digest=none"
        )
        again = kvlib.KVCache(
            model,
            f"epicache:budget=40,sinks={len(before)}",
            prefill_chunk_size=1,
            patch=patch,
        )
        for piece in ids.split(block, 1):
            model(piece, past_key_values=again)
        again.end_prefill()
        assert positions(episode.cache) == positions(again)
        assert episode.cache.get_seq_length() == ids.shape[1]
        for layer in positions(episode.cache):
            assert sum(map(len, layer)) == 2 * 40
            assert all(row[: len(before)] == list(range(len(before))) for row in layer)
    held = [positions(episode.cache) for episode in cache.episodes]
    assert held[0] != held[1] != held[2] != held[0]


@torch.no_grad()
def test_answers_leave_the_episode_as_it_was(loaded):
    """`generate` goes on in a copy, with the history's positions."""
    model, tokenizer = loaded
    cache = episodic(loaded)
    cache.build(SAID)
    episode, copy, ids = cache.ask("and the violin?")
    assert episode == 2
    assert tokenizer.decode(ids[0]) == "\n".join(SAID) + "\n\nand the violin?\n"
    own = cache.episodes[episode].cache
    before = positions(own)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, past_key_values=copy, **options)
    assert out.shape[1] == ids.shape[1] + 5
    assert copy.get_seq_length() == ids.shape[1] + 4
    assert positions(own) == before
    twin = own.fork()
    logits = model(ids[:, own.get_seq_length() :], past_key_values=twin).logits
    assert int(logits[0, -1].argmax()) == int(out[0, ids.shape[1]])


@torch.no_grad()
def test_the_models_own_states_embed(loaded):
    """Averaged over a text's tokens; the same text is at its own centroid."""
    model, tokenizer = loaded
    cache = episodic(loaded, embedder=None, segment=1, episodes=100)
    cache.build(SAID[:6])
    assert len(cache.episodes) == 6
    assert [cache.route(text) for text in SAID[:6]] == list(range(6))
    ids = tokenizer(SAID[3], return_tensors="pt").input_ids
    states = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
    np.testing.assert_allclose(
        cache.episodes[3].centroid, (states / states.norm()).numpy(), atol=1e-5
    )


@torch.no_grad()
def test_a_chat_template_frames_the_history(loaded, text_model_folder):
    """What it writes before the history stays, and what it writes behind ends the question."""
    model, tokenizer = load_folder(text_model_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}"
    )
    cache = episodic((model, tokenizer), system="Be kind.")
    cache.build(SAID)
    before = "<system>Be kind.</><user>"
    _, held, ids = cache.ask("so?")
    assert tokenizer.decode(ids[0]) == f"{before}{chr(10).join(SAID)}\n\nso?</><bot>"
    assert f"sinks={len(before)}," in held.method
    patch = tokenizer.decode(held._probes.resources.patch)
    assert patch.startswith(INSTRUCTION + "</><bot>Ann said")


# Memory


@torch.no_grad()
def test_a_long_conversation_stays_within_budget_and_block(loaded):
    """7,500 tokens: no more bytes than the entries of budget, one block and patched prompt."""
    tokenizer = loaded[1]
    said = [f"{SAID[i % len(SAID)]} {i}" for i in range(150)]
    num = len(tokenizer("\n".join(said)).input_ids)
    assert num > 7500
    cache = episodic(loaded, budget=512, block=256, episodes=1)
    cache.build(said)
    entry = 2 * 3 * ((8 + 8) * 4 + 4)  # heads, layers; key, value and position
    patch = len(cache.episodes[0].cache._probes.resources.patch)
    assert entry * 700 < cache.peak_bytes <= entry * (512 + 256 + patch)
    assert cache.peak_bytes < entry * num / 5
    held = cache.episodes[0].cache
    assert sum(sum(held.layer_kv(i).lengths) for i in range(3)) == 2 * 3 * 512
    assert held.nbytes < entry * 512 * 1.05


# What is refused


def test_what_makes_no_sense(loaded):
    for option in ("block", "episodes", "segment", "representatives"):
        with pytest.raises(ConfigError, match=f"1 or more, got {option}=0"):
            episodic(loaded, **{option: 0})
    with pytest.raises(ConfigError, match=r"epicache.*leaves nothing"):
        episodic(loaded, budget=0)
    cache = episodic(loaded)
    with pytest.raises(ConfigError, match=r"call build\(utterances\) first"):
        cache.ask("what?")
    for history in ([], [" ", "\n"]):
        with pytest.raises(ConfigError, match="no text"):
            cache.build(history)
    for history in ("Ann: hello", None, [{"role": "user", "content": "hello"}], ["a", None]):
        with pytest.raises(
            ConfigError, match=r"a list of utterances, each a text.*got (['{]|None)"
        ):
            cache.build(history)
    for wrong in (np.zeros(3), np.zeros((1, 4)), np.full((6, 4), np.nan)):
        with pytest.raises(ConfigError, match=r"for 6 texts; expected finite numbers \[6, d\]"):
            episodic(loaded, embedder=lambda texts, wrong=wrong: wrong).build(SAID)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 1.5}, "whole numbers of 1 or more, got block=1.5"),
        ({"segment": "4"}, "whole numbers of 1 or more, got segment='4'"),
        ({"seed": 2**40}, "seed is an int of 32 bits"),
        ({"seed": "one"}, "seed is an int of 32 bits, got 'one'"),
        ({"embedder": "all-MiniLM-L6-v2"}, "embedder is a function of texts.*got 'all-MiniLM"),
    ],
)
def test_wrong_options(loaded, options, message):
    """What was seen and what is expected."""
    with pytest.raises(ConfigError, match=message):
        episodic(loaded, **options)


@pytest.mark.parametrize("tokenizer", [None, "gpt2"])
def test_a_tokenizer_is_expected(loaded, tokenizer):
    """A name is none."""
    with pytest.raises(ConfigError, match=f"expected the model's tokenizer.*got {tokenizer!r}"):
        episodic((loaded[0], tokenizer))


def test_embedders_that_give_something_else(loaded):
    """No numbers, or rows of several lengths; other lengths for the question."""
    for wrong in (["a"] * 6, [[1]] * 5 + [[1, 2]]):
        with pytest.raises(ConfigError, match=r"for 6 texts that is no array.*\[6, d\]"):
            episodic(loaded, embedder=lambda texts, wrong=wrong: wrong).build(SAID)
    cache = episodic(loaded, embedder=lambda texts: np.eye(len(texts) + 1)[1:])
    cache.build(SAID)
    with pytest.raises(ConfigError, match="gave 2 numbers for the question, and 7 for each text"):
        cache.ask("what?")


def test_embedders_may_give_tensors(loaded):
    """With gradients too."""
    weight = torch.ones(3, requires_grad=True)
    cache = episodic(loaded, embedder=lambda texts: torch.tensor(counts(texts)) * weight)
    cache.build(SAID)
    assert [cache.route(f"the {topic}?") for topic in TOPICS] == [0, 1, 2]


@pytest.mark.parametrize("question", ["", " \n", None, ["what?"]])
def test_a_question_is_a_text(loaded, question):
    """Nothing can be embedded of a blank one."""
    cache = episodic(loaded, embedder=None)
    cache.build(SAID[:4])
    with pytest.raises(ConfigError, match="a question is a text, got"):
        cache.ask(question)


def test_a_profile_of_another_model_is_refused(loaded, tmp_path):
    """When the first cache is made; with the right one, its digest is in the method."""
    for name in ("tiny", "other"):
        calibrate("epicache", *loaded, name, tmp_path / name, tokens=40, window=8, sinks=2)
    cache = episodic(loaded, profile=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="was measured on model"):
        cache.build(SAID[:8])
    cache = episodic(loaded, profile=str(tmp_path / "tiny"))
    cache.build(SAID[:8])
    held = cache.episodes[0].cache
    assert f"profile={tmp_path / 'tiny'},digest=" in held.method
    lengths = [sum(held.layer_kv(index).lengths) for index in range(3)]
    assert sum(lengths) == 2 * 3 * 40
    assert lengths[0] < lengths[1]


def test_another_history_takes_its_place(loaded):
    """And a build that fails leaves the first one."""
    cache = episodic(loaded)
    cache.build(SAID)
    with pytest.raises(ConfigError):
        cache.build([])
    assert len(cache.episodes) == 3
    cache.build(SAID[:8])
    assert len(cache.episodes) == 1
    assert "violin" not in "".join(cache.segments)
