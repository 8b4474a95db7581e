# SPDX-License-Identifier: Apache-2.0
"""A contract over every registered task, and what each one promises."""

import random
import re

import pytest

from kvlib.errors import ConfigError, UnknownPluginError
from kvlib.evals.tasks import TASKS, Source, build_task, make_sample
from kvlib.evals.tasks.words import CLASSES, WORDS, sentence
from kvlib.registry import describe

LENGTHS = {"recall": 301}


def sample_of(task, source, index=0, seed=0, length=None):
    made = build_task(task)
    mine = source if made.needs_text else Source(None, 1024)
    return make_sample(made, mine, length or LENGTHS.get(made.name, 3000), seed, index)


@pytest.mark.parametrize("name", TASKS.names())
class TestContract:
    def test_declares_itself(self, name):
        """Name, version, metric; its text can be read back."""
        task = build_task(name)
        assert task.name == name
        assert task.version >= 1
        assert task.metric in ("exact", "token_accuracy", "kl")
        assert build_task(describe(task)) == task

    def test_the_context_has_the_length(self, name, source):
        """Exactly, and every question a prefix and an answer."""
        for index in range(3):
            sample = sample_of(name, source, index)
            assert len(sample.context) == LENGTHS.get(name, 3000)
            assert sample.questions
            assert all(question.prefix and question.answer for question in sample.questions)

    def test_a_sample_depends_on_what_names_it_alone(self, name, source):
        """Made again, alone or after others, it is the same; another index or seed is another."""
        first = sample_of(name, source, 1)
        sample_of(name, source, 5)
        random.seed(3)
        assert sample_of(name, source, 1) == first
        others = [sample_of(name, source, 2), sample_of(name, source, 1, seed=1)]
        assert first not in others
        assert others[0] != others[1]

    def test_evidence_is_the_answer(self, name, source):
        """The positions that are said to hold the answer do, in order."""
        for index in range(3):
            sample = sample_of(name, source, index)
            for question in sample.questions:
                if question.evidence:
                    assert tuple(sample.context[p] for p in question.evidence) == question.answer

    def test_a_context_that_is_too_short_is_refused(self, name, source):
        """By name of what is missing, not with a traceback from inside."""
        if name in ("text", "labels"):
            assert len(sample_of(name, source, length=20).context) == 20
            return
        with pytest.raises(ConfigError):
            sample_of(name, source, length=2)


@pytest.mark.parametrize("filler", ["sentences", "topics"])
@pytest.mark.parametrize("name", ["table", "records"])
def test_look_ups_have_one_answer(name, filler, source):
    """Every key is told once, questions and worked look-ups are about different keys."""
    for index in range(5):
        sample = sample_of(f"{name}:filler={filler}", source, index)
        text = source.tokenizer.decode(sample.context)
        asked = [source.tokenizer.decode(q.question + q.prefix) for q in sample.questions]
        assert len(set(asked)) == 5
        for question, ask in zip(sample.questions, asked, strict=True):
            answer = source.tokenizer.decode(question.answer)
            assert len(set(answer)) == 3
            told = re.findall(rf"(?<![a-z]){re.escape(ask)}(\d+)", text)
            assert told == [answer]


def test_records_are_scattered_and_a_table_is_not(source):
    """Distance between the first and the last evidence."""

    def spread(name):
        sample = sample_of(name, source, 2)
        places = [p for q in sample.questions for p in q.evidence]
        return max(places) - min(places)

    assert spread("table") < 300
    assert spread("records") > 600


def test_a_cue_stands_once_in_its_context(source):
    """Otherwise two continuations would be right."""
    for index in range(4):
        sample = sample_of("copy:cue=8", source, index)
        text = source.tokenizer.decode(sample.context)
        for question in sample.questions:
            cue = source.tokenizer.decode(question.question + question.prefix)
            assert text.count(cue) == 1


def test_needles_lie_everywhere(source):
    """Depths of 40 samples cover the context."""
    depths = sorted(sample_of("needle", source, i).questions[0].evidence[0] for i in range(40))
    assert depths[0] < 600
    assert depths[-1] > 2300


def test_labels_are_learnt_from_other_words(source):
    """No word that is asked for stands in the context; the last line is whole."""
    sample = sample_of("labels", source, 3)
    text = source.tokenizer.decode(sample.context)
    assert text.endswith("\n")
    known = dict(line.split(": ") for line in text.split("\n")[1:-1])
    labels = {
        known[word]: kind for kind, words in CLASSES.items() for word in set(words) & known.keys()
    }
    assert len(labels) == 4
    kinds = []
    for question in sample.questions:
        word = source.tokenizer.decode(question.question)
        assert word not in known
        label = source.tokenizer.decode(question.answer).strip()
        assert word in CLASSES[labels[label]]
        kinds.append(labels[label])
    assert kinds == list(CLASSES) * 2


def test_text_goes_on_where_the_context_ends(source):
    """Context, prefix and answer are one passage."""
    sample = sample_of("text:tokens=50", source, 1)
    (question,) = sample.questions
    whole = (*sample.context, *question.prefix, *question.answer)
    text = source.topics
    assert len(question.answer) == 50
    assert any(tuple(text[p : p + len(whole)]) == whole for p in source.paragraphs)


def test_fillers_use_no_keys():
    """A made-up sentence holds no word that is a key."""
    rng = random.Random(0)
    words = {word for _ in range(3000) for word in re.findall("[a-z]+", sentence(rng).lower())}
    assert not words & set(WORDS)
    assert len(words) > 60
    assert all(len(set(words)) == 28 for words in CLASSES.values())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("table:pairs=3", "pairs must be 8 or more, got 3"),
        ("table:digits=0", "digits must be 1"),
        ("records:filler=prose", "filler is topics or sentences"),
        ("needle:digits=10", "at most 9"),
        ("labels:questions=99", "at most 56"),
        ("copy:cue=1", "cue must be 2 or more"),
        ("table:pairs=500", "there are"),
        ("text:tokens=900000", "were asked for"),
    ],
)
def test_what_cannot_be_made_is_refused(task, message, source):
    """With what was seen and what was expected."""
    with pytest.raises(ConfigError, match=message):
        sample_of(task, source)


def test_unknown_tasks_and_models_without_text(source):
    """The nearest name; a task of text needs a tokenizer, recall an odd length."""
    with pytest.raises(UnknownPluginError, match="table"):
        build_task("tabel")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        make_sample(build_task("table"), Source(None, 1024), 1000, 0, 0)
    with pytest.raises(ConfigError, match="odd length, got 300"):
        sample_of("recall", source, length=300)
    with pytest.raises(ConfigError, match="pairs of a vocabulary"):
        sample_of("recall", source, length=2001)
