# SPDX-License-Identifier: Apache-2.0
"""Stored keys and containers stay what they are: on every Python, in every process, forever."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from types import ModuleType

import pytest
import torch
import zstandard

import kvlib
import kvlib.model_spec
from kvlib.codecs.container import Container
from kvlib.codecs.state import decode_state
from kvlib.errors import IncompatibleDataError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden"
CONTAINERS = FOLDER / "containers" / "v1"
MAX_BYTES = {"exact-aligned": 8192}  # of the others: 4096
MAX_BYTES |= {f"kvlc-{name}": 8192 for name in ("near-profile", "balanced", "small", "archive")}


def load(name: str) -> ModuleType:
    """A script of tests/golden as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


outsider = load("outsider")
check_golden = load("check_golden")
regenerate = load("regenerate")

NAMES = sorted(regenerate.CASES)
NAN, INF = float("nan"), float("inf")
PLAIN = [name for name in NAMES if name != "tags"]


@cache
def keys_json() -> dict:
    return json.loads((FOLDER / "keys.json").read_text(encoding="utf-8"))


@cache
def golden(name: str) -> tuple[bytes, dict]:
    """A stored container and the JSON beside it."""
    text = (CONTAINERS / f"{name}.json").read_text(encoding="utf-8")
    return (CONTAINERS / f"{name}.kvlc").read_bytes(), json.loads(text)


def same_zstd(case: dict) -> bool:
    return case["zstd_version"] in (None, list(zstandard.ZSTD_VERSION))


def test_every_golden_file_is_there(regen_golden):
    """A golden file that is missing fails; so does one that nothing describes."""
    if regen_golden:
        regenerate.write_missing(regenerate.golden_files())
    found = {path.name for path in CONTAINERS.iterdir()}
    assert found == {f"{name}.{ending}" for name in NAMES for ending in ("kvlc", "json")}
    (profile,) = regenerate.PROFILES.iterdir()
    data = profile.read_bytes()
    assert (profile.name, len(data) < 40000) == (f"{regenerate.PROFILE}.safetensors", True)
    assert blake2b(data, digest_size=8).hexdigest() == regenerate.PROFILE
    assert data == regenerate.kvlc_profile()
    assert (FOLDER / "keys.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_encoding_gives_the_stored_bytes(name, monkeypatch):
    """What goes in becomes the stored bytes; other versions of zstd may only pack otherwise."""
    data, case = golden(name)
    made = regenerate.encode_case(case)
    if same_zstd(case):
        assert made == data
    else:
        assert regenerate.decode_case(made, case).equal(regenerate.block_of(case))
    assert len(data) <= MAX_BYTES.get(name, 4096)
    if name.startswith("kvlc"):
        monkeypatch.setenv("KVLIB_RANS", "numpy")
        assert regenerate.encode_case(case) == data


@pytest.mark.parametrize("name", PLAIN)
def test_decoding_gives_the_stored_numbers(name):
    """Stored bytes decode to what went in, or for a lossy codec to what it once gave."""
    data, case = golden(name)
    found = regenerate.decode_case(data, case)
    stored = regenerate.block_of(case, decoded=True)
    if "tolerance" not in case:
        assert found.equal(stored)
    else:
        for mine, theirs in zip(found.layers, stored.layers, strict=True):
            for x, y in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                raw = [bytes.fromhex(regenerate.hex_of(z)) for z in (x, y)]
                assert check_golden.same_numbers(*raw, case["spec"]["dtype"], case["tolerance"])
            assert replace(mine, keys=theirs.keys, values=theirs.values).equal(theirs)
    if case["header"]["flags"] & 1:
        assert found.equal(regenerate.block_of(case))


def test_a_snapshots_state_is_read_by_both():
    """kvlib and the outsider find the tensors that went in, bit for bit."""
    data, case = golden("exact-snapshot")
    (section,) = [s for s in case["header"]["sections"] if s["kind"] == 8]
    raw = data[section["offset"] :][: section["stored_bytes"]]
    assert outsider.read_state(raw) == case["state"]
    found, expected = decode_state(raw), regenerate.state_of(case)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].numpy().tobytes() == x.numpy().tobytes()
    for size in range(len(raw)):
        with pytest.raises(outsider.Damaged):
            outsider.read_state(raw[:size])


def test_fields_without_a_codec_are_read_but_not_decoded():
    """A header may name a codec and profile of the future: read, verified, never decoded."""
    data, case = golden("tags")
    Container(data).verify()
    with pytest.raises(IncompatibleDataError):
        regenerate.decode_case(data, case)


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_inputs_are_the_described_ones(name):
    """The JSON holds the case that regenerate.py describes, with results added."""
    stored = dict(golden(name)[1])
    made = regenerate.CASES[name]()
    inputs = [{k: x for k, x in layer.items() if k != "decoded"} for layer in stored["layers"]]
    assert {**{k: stored[k] for k in made}, "layers": inputs} == made


def test_the_stored_key_vectors_are_the_computed_ones():
    """keys.json is, to the byte, what regenerate.py would write."""
    written = regenerate.keys_text(regenerate.make_keys())
    assert (FOLDER / "keys.json").read_text(encoding="utf-8") == written


def test_the_containers_cover_the_format():
    """Every section kind, header field, element type and codec occurs, compressed planes too."""
    headers = [golden(name)[1]["header"] for name in NAMES]
    sections = [section for header in headers for section in header["sections"]]
    assert {section["kind"] for section in sections} == set(range(1, 9))
    assert {header["dtype"] for header in headers} == set(range(1, 6))
    assert {layer["kind"] for header in headers for layer in header["layers"]} == {1, 2, 3}
    assert 0xFFFF in {section["layer_idx"] for section in sections}
    assert {len(header["keys"]) for header in headers} == {0, 1, 2}
    assert {header["flags"] & 49 for header in headers} >= {0, 1, 16, 17, 32, 33}
    assert {header["alignment"] for header in headers} >= {8, 16, 64, 4096}
    packed = {
        header["codec"].partition("@")[0]
        for header in headers
        if any(
            s["kind"] in (1, 2) and not s["flags"] and s["raw_bytes"] for s in header["sections"]
        )
    }
    assert packed >= {"exact", "int8", "int4", "fp8", "kivi", "hadamard", "kvlc"}
    forms = {
        golden(name)[0][s["offset"]]
        for name in NAMES
        if name.startswith("kvlc")
        for s in golden(name)[1]["header"]["sections"]
        if s["kind"] in (1, 2) and not s["flags"]
    }
    assert forms == set(range(5))


def test_existing_files_are_never_overwritten(tmp_path):
    """Writing golden files makes the missing ones; one that differs is left alone and named."""
    old, same, new = (tmp_path / name for name in ("old", "same", "folder/new"))
    old.write_bytes(b"old")
    same.write_bytes(b"same")
    files = {old: b"other", same: b"same", new: b"new"}
    assert regenerate.write_missing(files) == ([new], [old])
    assert (old.read_bytes(), new.read_bytes()) == (b"old", b"new")


# check_golden.py


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_golden_files_hold_in_a_fresh_process(seed):
    """kvlib and the outsider both reproduce every file, whatever Python's hash seed."""
    done = run(sys.executable, str(FOLDER / "check_golden.py"), PYTHONHASHSEED=seed)
    assert done.returncode == 0, done.stderr
    vectors = sum(len(keys_json()[part]) for part in check_golden.RESULTS)
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    assert done.stdout == f"{vectors} vectors, {len(NAMES)} containers, {python}: ok\n"


def other_pythons() -> list[str]:
    """Pythons besides this one that are found and run."""
    found = []
    for name in ("python3.11", "python3.12", "python3.13"):
        path = shutil.which(name)
        if path and run(path, "-c", "import hashlib").returncode == 0:
            found.append(path)
    return found


PYTHONS = {"this": sys.executable} | {Path(path).name: path for path in other_pythons()}


@pytest.mark.parametrize("python", PYTHONS.values(), ids=PYTHONS)
def test_keys_need_only_the_standard_library(python):
    """Any Python computes the same keys, without its installed packages."""
    place = str(Path(kvlib.__file__).parents[1])
    done = run(python, "-S", str(FOLDER / "check_golden.py"), "--keys-only", PYTHONPATH=place)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ vectors, 0 containers, python 3\.\d+: ok\n", done.stdout)


@pytest.mark.parametrize("module", ["kvlib.codecs.container", "kvlib.keys", "kvlib.spec"])
def test_containers_and_keys_load_neither_torch_nor_numpy(module):
    """Headers and keys are read by processes that have no tensors."""
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'numpy', 'zstandard'}} & {{*sys.modules}}))"
    )
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("part", check_golden.RESULTS)
def test_a_wrong_key_vector_is_reported(part):
    """A vector that changed is named once for each of the two computations."""
    data = json.loads(json.dumps(keys_json()))
    result = check_golden.RESULTS[part]
    data[part][-1][result] = "00" if part != "blocks" else []
    problems, _ = check_golden.check_keys(data)
    assert len(problems) == 2
    assert all(problem.startswith(f"{part}[{len(data[part]) - 1}]: ") for problem in problems)


def tampered(folder: Path, name: str) -> list[str]:
    """What the check says of one container, copied to `folder` and changed by the caller."""
    problems, count = check_golden.check_containers(folder)
    assert count == 1
    assert all(problem.startswith(f"{name}: ") for problem in problems)
    return problems


def test_numbers_within_a_tolerance():
    """Two parts in 10^5 of the largest, a unit in the last place; what is special is the same."""
    same, x = check_golden.same_numbers, [1000.0, -3.0, NAN, 0.25]
    for dtype, units in (("float32", 0), ("bfloat16", 1), ("float16", 1)):
        kind = getattr(torch, dtype)

        def raw(numbers, kind=kind):
            return bytes.fromhex(regenerate.hex_of(torch.tensor(numbers, dtype=kind)))

        assert same(raw(x), raw(x), dtype, 2e-5)
        for at, size in enumerate(x):
            for change, expected in ((0.015, True), (0.1 + units * abs(size) / 64, False)):
                y = [n + change if i == at else n for i, n in enumerate(x)]
                assert same(raw(y), raw(x), dtype, 2e-5) == (expected or size != size)
        assert not same(raw([1000.0, -3.0, 0.0, 0.25]), raw(x), dtype, 2e-5)
        assert not same(raw([1000.0, -3.0, INF, 0.25]), raw(x), dtype, 2e-5)
        assert not same(raw(x[:3]), raw(x), dtype, 2e-5)


def test_other_integers_are_reported(tmp_path):
    """The SHA-256 of all integers has to be the recorded one."""
    data, case = golden("kvlc-archive")
    place = tmp_path / "v1"
    place.mkdir()
    (place / "kvlc-archive.kvlc").write_bytes(data)
    for integers, problems in ((case["integers"], 0), ("00", 1)):
        text = json.dumps({**case, "integers": integers})
        (place / "kvlc-archive.json").write_text(text, encoding="utf-8")
        assert len(tampered(tmp_path, "kvlc-archive")) == problems


@pytest.mark.parametrize("name", ["exact-ragged", "int8-float32", "kivi-ragged"])
def test_a_wrong_container_is_reported(tmp_path, name):
    """A container or JSON file that is missing or changed is named."""
    data, case = golden(name)
    place = tmp_path / "v1"
    place.mkdir()
    file, beside = place / f"{name}.kvlc", place / f"{name}.json"
    file.write_bytes(data)
    assert tampered(tmp_path, name)
    beside.write_text(json.dumps(case), encoding="utf-8")
    assert tampered(tmp_path, name) == []
    file.write_bytes(data[:-1] + b"\1")
    assert tampered(tmp_path, name)
    file.write_bytes(data)
    for field in case["header"]:
        wrong = {**case, "header": {**case["header"], field: "wrong"}}
        beside.write_text(json.dumps(wrong), encoding="utf-8")
        assert len(tampered(tmp_path, name)) >= 2
    for field in ("keys", "values", "positions", "row_lengths", "log_weight", "channels"):
        wrong = json.loads(json.dumps(case))
        layer = wrong["layers"][-1]
        layer.get("decoded", layer)[field] = [1]
        if field in ("keys", "values") or "decoded" not in layer:
            beside.write_text(json.dumps(wrong), encoding="utf-8")
            assert tampered(tmp_path, name) == [
                f"{name}: layer {layer['layer_idx']}: the outsider decodes other {field}"
            ]
    file.unlink()
    assert tampered(tmp_path, name)


# What is written about them


def test_model_identity_of_files(tmp_path, monkeypatch):
    """A model folder has the identity that the vectors hold; files of other kinds do not count."""
    monkeypatch.setattr(kvlib.model_spec, "CACHE_FOLDER", tmp_path / "cache")
    for index, vector in enumerate(keys_json()["models"]):
        folder = tmp_path / str(index)
        folder.mkdir()
        for name, data in vector["files"].items():
            (folder / name).write_bytes(bytes.fromhex(data))
        (folder / "README.md").write_text("x", encoding="utf-8")
        assert kvlib.model_spec.files_identity(folder).hex() == vector["fingerprint"]


def vectors_of(document: str) -> list[list[str]]:
    """The hex that begins each line of the fenced blocks under "Test vectors"."""
    text = (ROOT / "docs" / "formats" / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```text\n(.*?)^```", text.partition("## Test vectors")[2], re.M | re.S)
    return [[line.partition("  ")[0].replace(" ", "") for line in b.splitlines()] for b in blocks]


def test_vectors_in_block_md_are_the_golden_ones():
    """Every key on the page is a golden one, and the pre-image on it hashes to its fingerprint."""
    encoded, preimage, fingerprint, keys, more, model = vectors_of("block.md")
    data = keys_json()
    assert set(encoded) <= {vector["hex"] for vector in data["encoded"]}
    hashed = blake2b(bytes.fromhex("".join(preimage)), digest_size=32).hexdigest()
    assert fingerprint == [hashed]
    known = {
        key
        for part, result in check_golden.RESULTS.items()
        for vector in data[part]
        for key in ([vector[result]] if isinstance(vector[result], str) else vector[result])
    }
    assert {*fingerprint, *keys, *more, *model} <= known
    assert [len(x) for x in (keys, more, model)] == [5, 3, 1]


def test_vectors_in_container_md_are_the_golden_ones():
    """The container on the page is the stored one, and its numbers and digests are right."""
    container, numbers, digests = vectors_of("container.md")
    data, case = golden("int4-float32-odd")
    assert bytes.fromhex("".join(container)) == data
    assert case["layers"][0]["decoded"]["keys"].startswith("".join(numbers))
    key = bytes(range(32))
    assert digests == [
        outsider.section_digest(b"", None).hex(),
        outsider.section_digest(b"", key).hex(),
        outsider.mac(b"", key, b"KVLC header").hex(),
    ]
