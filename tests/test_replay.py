# SPDX-License-Identifier: Apache-2.0
"""`kvlib bench replay`: traces, hit ratios under the prefix rule, the command."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvlib.cli import app
from kvlib.errors import ConfigError
from kvlib.store.replacement import REPLACEMENTS
from kvlib.store.replacement.admission import SecondTouch
from kvlib.store_bench.grid import run
from kvlib.store_bench.replay import next_uses, replay
from kvlib.store_bench.trace import Request, parse_request, read_trace
from tests.oracles import replacement as oracles

GOOD = {"timestamp": 3, "input_length": 1000, "output_length": 7, "hash_ids": [4, 9]}


def request(*blocks, tokens=None):
    tokens = 512 * len(blocks) if tokens is None else tokens
    return Request(timestamp_ms=0.0, input_tokens=tokens, output_tokens=1, blocks=blocks)


def conversations(seed, turns):
    """Prompts that share beginnings: sessions that go on, and new ones."""
    choose = random.Random(seed)
    sessions, fresh, requests = [(0,)], 1, []
    for _ in range(turns):
        old = choose.choice(sessions[-50:])
        if choose.random() < 0.4:
            old = old[: choose.randrange(1, len(old) + 1)]
        more = choose.randrange(6)
        blocks = (*old, *range(fresh, fresh + more))
        fresh += more
        sessions.append(blocks)
        requests.append(request(*blocks, tokens=512 * len(blocks) - choose.randrange(512)))
    return requests


def write_trace(path, requests):
    lines = [
        json.dumps(
            {
                "timestamp": 100 * i,
                "input_length": x.input_tokens,
                "output_length": x.output_tokens,
                "hash_ids": list(x.blocks),
            }
        )
        for i, x in enumerate(requests)
    ]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


# Traces


def test_a_line_is_a_request():
    """Lengths, time and ids; an incomplete last block with its id or without."""
    line = json.dumps(GOOD).encode()
    want = Request(timestamp_ms=3.0, input_tokens=1000, output_tokens=7, blocks=(4, 9))
    assert parse_request(line) == want
    assert parse_request(json.dumps(GOOD | {"hash_ids": [4]}).encode()).blocks == (4,)
    assert parse_request(line, block_tokens=999).blocks == (4, 9)
    empty = GOOD | {"input_length": 0, "hash_ids": []}
    assert parse_request(json.dumps(empty).encode()).blocks == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestamp": None}, "timestamp is milliseconds"),
        ({"timestamp": True}, "timestamp is milliseconds"),
        ({"timestamp": float("nan")}, "timestamp is milliseconds"),
        ({"input_length": 1.5}, "input_length is a number of tokens"),
        ({"output_length": -1}, "output_length is a number of tokens"),
        ({"hash_ids": "49"}, "list of whole numbers"),
        ({"hash_ids": [4, "9"]}, "list of whole numbers"),
        ({"hash_ids": [4, True]}, "list of whole numbers"),
        ({"hash_ids": [4, 4]}, "an id twice"),
        ({"hash_ids": [4, 9, 5]}, "3 hash_ids for 1000 tokens: expected 2"),
        ({"hash_ids": []}, "0 hash_ids"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, words):
    """Which line, what it has, what was expected."""
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | change)}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"line 3: .*{words}"):
        read_trace(path)


@pytest.mark.parametrize("field", GOOD)
def test_a_missing_field_is_named(field):
    """And those that are there."""
    line = json.dumps({k: v for k, v in GOOD.items() if k != field}).encode()
    with pytest.raises(ConfigError, match=f"{field} is missing; there are "):
        parse_request(line)


@pytest.mark.parametrize("line", [b"[1]", b"7", b"{", b"\xff\xfe", b"[" * 100_000, b"nul"])
def test_other_bytes_are_no_request(line):
    """Whatever is in the line, the error is ours."""
    with pytest.raises(ConfigError):
        parse_request(line)


def test_a_trace_that_cannot_be_read(tmp_path):
    """Absent, a folder, or empty."""
    (tmp_path / "empty").write_text("\n")
    for name, words in (("gone", "cannot read"), (".", "cannot read"), ("empty", "no requests")):
        with pytest.raises(ConfigError, match=words):
            read_trace(tmp_path / name)


# Replays


def play(requests, policy="lru", capacity=4, size_of=lambda block: 1, **more):
    built = REPLACEMENTS.build(policy)
    return replay(requests, built, capacity, size_of, block_tokens=512, **more)


def test_only_leading_blocks_hit():
    """What lies behind a gap is held and is no hit; the last block's tokens are those it has."""
    requests = [request(1, 2, 3), request(9, 2, 3), request(1, 2, 3, tokens=1200)]
    outcome = play(requests, capacity=10)
    assert (outcome.blocks, outcome.hit_blocks, outcome.held_blocks) == (9, 3, 5)
    assert (outcome.tokens, outcome.hit_tokens) == (2 * 1536 + 1200, 1200)
    assert (outcome.inserted, outcome.evicted, outcome.most_bytes) == (4, 0, 4)


def test_the_end_of_a_prompt_makes_room():
    """A prompt longer than the tier leaves its beginning there: that much hits the next time."""
    prompt = request(*range(10))
    outcome = play([prompt, prompt], capacity=4)
    assert outcome.hit_blocks == 4
    assert outcome.most_bytes == 4


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "lfuda"])
@pytest.mark.parametrize("unit", [True, False])
def test_hits_are_those_of_an_independent_simulator(policy, unit):
    """Leading runs counted by plain lists, for records of one size and of many."""
    requests = conversations(3, 250)
    sizes = {b: 1 if unit else 1 + b * 7919 % 5 for x in requests for b in x.blocks}
    for capacity in (10, 40, 120):
        outcome = play(requests, policy, capacity, sizes.__getitem__)
        make = {"lru": oracles.LRU, "arc": oracles.ARC, "s3fifo": oracles.S3FIFO}.get(policy)
        cache = make(capacity) if make else oracles.Aged(capacity, by_size=False)
        blocks = tokens = held = 0
        for x in requests:
            run = 0
            while run < len(x.blocks) and x.blocks[run] in cache.held:
                run += 1
            blocks += run
            tokens += min(512 * run, x.input_tokens)
            held += sum([cache.access(block, sizes[block]) for block in x.blocks[::-1]])
        assert (outcome.hit_blocks, outcome.hit_tokens, outcome.held_blocks) == (
            blocks,
            tokens,
            held,
        )
        assert 0 < outcome.hit_blocks < outcome.blocks
        assert outcome.most_bytes <= capacity


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), max_size=12))
def test_next_uses(prompts):
    """The distance to the next use, counted along the uses themselves."""
    requests = [request(*blocks) for blocks in prompts]
    uses = [block for blocks in prompts for block in reversed(blocks)]
    flat = [then for ahead in next_uses(requests) for then in reversed(ahead)]
    for at, (block, then) in enumerate(zip(uses, flat, strict=True)):
        later = [i - at for i in range(at + 1, len(uses)) if uses[i] == block]
        assert then == (later[0] if later else None)


def test_what_is_known_ahead_helps():
    """LRU that is told every next use lies between LRU and Belady's, which nobody beats."""
    requests = conversations(5, 300)
    ahead = next_uses(requests)
    plain = play(requests, "lru", 40).hit_blocks
    told = play(requests, "lru", 40, ahead=ahead).hit_blocks
    best = play(requests, "belady", 40, ahead=ahead)
    assert 1.1 * plain < told < best.hit_blocks
    for policy in ("lru", "arc", "s3fifo", "lfuda"):
        assert play(requests, policy, 40).held_blocks <= best.held_blocks


def test_second_touch_writes_less():
    """Only what is offered twice comes in, heads at once; the rest is counted as refused."""
    requests = conversations(6, 300)
    plain = play(requests, "lru", 60)
    twice = play(requests, "lru", 60, admission=SecondTouch())
    heads = play(requests, "lru", 60, admission=SecondTouch(heads=2))
    assert twice.inserted < heads.inserted < plain.inserted
    assert twice.inserted + twice.refused == twice.blocks - twice.held_blocks
    assert play([request(1, 2)] * 3, admission=SecondTouch()).hit_blocks == 2


@pytest.mark.parametrize("policy", REPLACEMENTS.names())
def test_blocks_larger_than_the_tier(policy):
    """They are refused, and evict nothing."""
    outcome = play([request(1, 2, 3)] * 3, policy, 4, lambda block: 5 if block == 1 else 2)
    assert outcome.refused >= 3
    assert outcome.evicted == 0
    assert outcome.most_bytes <= 4


def test_a_grid_has_every_policy_and_belady():
    """Ratios, the share of Belady's, the ceiling; every request is stepped through."""
    requests = conversations(7, 60)
    steps = []
    results = run(
        requests,
        {"lru": REPLACEMENTS.build("lru")},
        [20, 1000],
        block_bytes=1,
        block_tokens=512,
        step=steps.append,
    )
    assert sum(steps) == 2 * 2 * len(requests)
    rows = {(row["policy"], row["capacity_bytes"]): row for row in results["results"]}
    assert list(rows) == [("lru", 20), ("lru", 1000), ("belady", 20), ("belady", 1000)]
    ceiling = results["trace"]["most_block_hit_ratio"]
    assert (
        rows["lru", 1000]["block_hit_ratio"] == rows["belady", 1000]["block_hit_ratio"] == ceiling
    )
    assert rows["lru", 20]["of_belady"] < 1


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", "replay", *map(str, arguments)])


def test_the_command(tmp_path):
    """Two tables, the file, and the same numbers as the last line."""
    trace = write_trace(tmp_path / "t.jsonl", conversations(8, 80))
    out = tmp_path / "out.json"
    arguments = ["--capacity", "20", "--capacity", "30B", "--policy", "arc", "--policy"]
    done = invoke(trace, *arguments, "s3fifo:small=0.2", "--block-bytes", 1, "--json", out)
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(out.read_text())
    assert [row["policy"] for row in last["results"][::2]] == ["arc", "s3fifo:small=0.2", "belady"]
    assert last["trace"]["requests"] == 80
    assert "30 blocks" in done.stdout
    assert done.stdout.count("s3fifo:small=0.2") == 2 + 2


def test_the_command_with_all_options(tmp_path):
    """Second touch and foresight are in the settings and change the numbers."""
    trace = write_trace(tmp_path / "t.jsonl", conversations(9, 200))
    common = [trace, "--policy", "lru", "--capacity", "40", "--block-bytes", "1"]
    ratios = []
    for more in ([], ["--second-touch", "--heads", "3"], ["--foresight", "0.7"]):
        done = invoke(*common, *more)
        assert done.exit_code == 0, done.output
        results = json.loads(done.stdout.splitlines()[-1])
        ratios.append(results["results"][0]["block_hit_ratio"])
        best = results["results"][1]["block_hit_ratio"]
    assert results["settings"]["foresight"] == 0.7
    assert ratios[2] > ratios[0] != ratios[1]
    assert max(ratios) <= best


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "arcs"], "Did you mean 'arc'"),
        (["--capacity", "5 gigs"], "is not a size"),
        (["--block-bytes", "0"], "at least 1"),
        (["--heads", "3"], "belong to --second-touch"),
        (["--json", "no/such/../../folder/x.json"], "x.json"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, monkeypatch, arguments, words):
    """Before the trace is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no").write_text("a file")
    done = invoke(tmp_path / "none.jsonl", *arguments)
    assert done.exit_code == 1
    assert words in str(done.exception)
