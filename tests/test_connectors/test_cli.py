# SPDX-License-Identifier: Apache-2.0
"""`kvlib connectors`, `kvlib doctor` and `kvlib why-miss`."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kvlib
from kvlib.cli import app
from kvlib.connectors.config import ConnectorConfig
from kvlib.errors import ConfigError

runner = CliRunner()


def run(*args):
    return runner.invoke(app, [str(arg) for arg in args])


def words(result):
    assert result.exit_code == 0, result.output
    return shlex.split(result.output)


def test_the_flag_for_vllm(tmp_path):
    path = tmp_path / "kv"
    flag, config = words(run("connectors", "vllm", "--path", path, "--codec", "kvlc:preset=near"))
    assert flag == "--kv-transfer-config"
    given = json.loads(config)
    assert given["kv_connector"] == "KvlibConnector"
    assert given["kv_load_failure_policy"] == "recompute"
    options = ConnectorConfig.parse(given["kv_connector_extra_config"])
    assert options.path == str(path)
    assert options.codec == "kvlc:preset=near"
    with options.open_store() as store:
        assert store.path == path


def test_the_flag_for_the_tier(tmp_path):
    _, config = words(run("connectors", "vllm", "--tier", "--path", tmp_path, "--disk", "1GiB"))
    given = json.loads(config)["kv_connector_extra_config"]
    assert given["spec_name"] == "TieringOffloadingSpec"
    (tier,) = given["secondary_tiers"]
    assert (tier["type"], tier["disk"]) == ("KvlibTier", "1GiB")


def test_the_options_for_sglang(tmp_path):
    line = words(run("connectors", "sglang", "--path", tmp_path / "kv"))
    config = json.loads(line[line.index("--unified-cache-external-linker-config") + 1])
    assert config["linker"] == "KvlibLinker"
    line = words(run("connectors", "sglang", "--hicache", "--path", tmp_path / "kv"))
    extra = json.loads(line[line.index("--hicache-storage-backend-extra-config") + 1])
    assert extra["class_name"] == "KvlibHiCacheStorage"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--codec", "exakt"], "exact"),
        (["--memory", "lots"], "lots"),
        (["--path", "/proc/version/kv"], "/proc/version"),
    ],
)
def test_wrong_options_are_refused(args, said):
    result = run("connectors", "vllm", *args)
    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError | LookupError)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pathh": "x"}, "path"),
        ({"save": "some"}, "prompt"),
        ({"deadline": -1}, "deadline"),
        ({"path": 3}, "text"),
        ({"staging": "much"}, "staging"),
    ],
)
def test_wrong_options_in_json(given, said):
    with pytest.raises(ConfigError, match=said):
        ConnectorConfig.parse(given)


def test_the_doctor_without_an_engine(tmp_path):
    """No engine here: that is a note, unless it was asked for."""
    assert run("doctor").exit_code == 0
    result = run("doctor", "vllm")
    assert result.exit_code == 1
    assert "vllm is not installed" in result.output
    assert run("doctor", "tensorrt").exit_code == 1
    result = run("doctor", "--path", tmp_path / "none")
    assert result.exit_code == 1
    assert "does not exist" in result.output


@pytest.fixture(scope="module")
def stored(tmp_path_factory, text_model_folder):
    """A model, a store with a prompt of it, and the prompt."""
    from transformers import AutoModelForCausalLM

    path = tmp_path_factory.mktemp("why") / "kv"
    model = AutoModelForCausalLM.from_pretrained(text_model_folder)
    ids = torch.randint(3, 250, (400,), generator=torch.Generator().manual_seed(0))
    with kvlib.KVStore(path, memory=0) as store:
        kvlib.PrefixCache(model, store).prefill(ids)
    return path, text_model_folder, ids.tolist()


def why(stored, tmp_path, ids, *more):
    path, model, _ = stored
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(ids))
    return run("why-miss", "--path", path, "--model", model, "--tokens", file, *more)


def test_a_prompt_that_hits(stored, tmp_path):
    result = why(stored, tmp_path, stored[2])
    assert result.exit_code == 0
    assert "All 6 whole blocks" in result.output
    assert "records of the model" in run("doctor", "--path", stored[0]).output


@pytest.mark.parametrize(
    ("change", "more", "said"),
    [
        (lambda ids: ids[:64], (), "64 tokens"),
        (lambda ids: ids[:200] + [7] * 200, (), "3 of 6 whole blocks"),
        (lambda ids: ids, ("--salt", "s"), "without the store's salt"),
        (lambda ids: ids, ("--cache-salt", "s"), "without the request's cache_salt"),
        (lambda ids: ids, ("--dtype", "bfloat16"), "other weights, dtype or RoPE"),
        (lambda ids: ids, ("--model-id", "x"), "no record of this model"),
        (lambda ids: ids, ("--codec", "int8"), "another form"),
        (lambda ids: ids, ("--ranks", "2"), "KV heads 0-1 of 2 only, not for 0 and 1"),
        (lambda ids: [8, *ids], (), "never stored"),
    ],
)
def test_why_a_prompt_misses(stored, tmp_path, change, more, said):
    result = why(stored, tmp_path, change(stored[2]), *more)
    assert result.exit_code == 1, result.output
    assert said in " ".join(result.output.split())


def test_evicted_and_damaged(stored, tmp_path):
    """A record in the middle is gone; another one is damaged."""
    path = tmp_path / "copy"
    import shutil

    shutil.copytree(stored[0], path)
    with kvlib.KVStore(path, memory=0) as store:
        tier = store.stats().tiers["segment"]
        assert tier.records > 1
    from kvlib.store.kept import open_kept

    kept = open_kept(path)
    first = min(kept.keys(), key=lambda key: key.block != _first_block(stored))
    kept.delete(first)
    kept.close()
    changed = (path, *stored[1:])
    result = why(changed, tmp_path, stored[2])
    assert "evicted" in result.output
    shutil.rmtree(path)
    shutil.copytree(stored[0], path)
    for segment in path.glob("seg-*.kv"):
        data = bytearray(segment.read_bytes())
        at = max(i for i in range(0, len(data), 4096) if any(data[i : i + 4096]))
        for i in range(8192, at, 1024):
            data[i] ^= 1
        segment.write_bytes(data)
    result = why(changed, tmp_path, stored[2])
    assert result.exit_code == 1
    assert "damaged" in result.output


def _first_block(stored):
    from kvlib.connectors.cli import _spec
    from kvlib.keys import block_keys

    _, model, ids = stored
    spec = _spec(model, None, None, "")
    return block_keys(spec.fingerprint(), ids)[0]


def test_prompts_that_cannot_be_read(stored, tmp_path):
    file = tmp_path / "ids"
    file.write_text("1 2 x")
    path, model, _ = stored
    assert run("why-miss", "--path", path, "--model", model, "--tokens", file).exit_code == 1
    assert run("why-miss", "--path", path, "--model", model).exit_code == 1
    text = tmp_path / "text"
    text.write_text("what is this " * 40)
    result = run("why-miss", "--path", path, "--model", model, "--text", text)
    assert "0 of" in result.output
    file.write_text(" ".join(map(str, stored[2])))
    assert run("why-miss", "--path", path, "--model", model, "--tokens", file).exit_code == 0


ROOT = Path(__file__).parents[2]
COMMANDS = [
    (name, line)
    for name in ("README.md", "docs/vllm.md", "docs/vllm-tier.md", "docs/sglang.md")
    for line in re.findall(
        r"^kvlib connectors .*$", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE
    )
]


def test_the_guides_have_commands():
    assert {name for name, _ in COMMANDS} >= {"README.md", "docs/vllm.md"}


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_of_the_guides_work_as_written(name, line, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = shlex.split(line.replace("~/", f"{tmp_path}/"))[1:]
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert str(tmp_path) in result.output
