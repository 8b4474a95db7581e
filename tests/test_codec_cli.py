# SPDX-License-Identifier: Apache-2.0
"""`kvlib codec` as a user calls it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kvlib.artefacts import model_identity, save_artefact
from kvlib.blocks import KVBlock, LayerKV
from kvlib.cli import app, main
from kvlib.codecs import build_codec, decode_block, encode_block
from kvlib.codecs.container import Container
from kvlib.codecs.transforms import KIND, forget_profile
from kvlib.evals.models import load_eval_model
from kvlib.model_spec import spec_for_model
from kvlib.spec import KVSpec, LayerSpec, RopeSpec
from kvlib.testing.models import random_block, tiny_spec

IDENTITY = ["--model-id", "test", "--rope-theta", "10000"]


def spec_like_options(dtype="float32", **rope):
    """What `IDENTITY` says of blocks of `tiny_spec`."""
    turn = RopeSpec(**({"theta": 1e4, "rotary_dim": 8} | rope))
    layer = LayerSpec(num_kv_heads=2, k_head_dim=8, v_head_dim=8, rope=turn)
    return KVSpec(model_id="user:test", layers=(layer, layer), dtype=dtype)


def tensors_of(block):
    return {
        f"layers.{layer.layer_idx}.{name}": getattr(layer, name).contiguous()
        for layer in block.layers
        for name in ("keys", "values")
    }


@pytest.fixture
def kv(tmp_path):
    """A file of random KV, and its block."""
    block = random_block(tiny_spec(dtype="bfloat16"), 40)
    file = tmp_path / "kv.safetensors"
    save_file(tensors_of(block), file)
    return file, block


def codec(*arguments):
    result = CliRunner().invoke(app, ["codec", *map(str, arguments)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs a command that must end in one line and status 1; returns the line."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["kvlib", "codec", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def encoded(kv, tmp_path, method="int8"):
    out = tmp_path / "kv.kvlc"
    codec("encode", kv[0], "--codec", method, "-o", out, *IDENTITY)
    return out


# There and back


def test_lossless_round_trip(kv, tmp_path):
    """The same tensors, bit for bit, under the same names."""
    file = encoded(kv, tmp_path, "exact")
    back = tmp_path / "back.safetensors"
    codec("decode", file, "-o", back, *IDENTITY)
    want, got = tensors_of(kv[1]), load_file(back)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], x) and got[name].dtype == x.dtype for name, x in want.items())


def test_the_container_is_what_the_library_makes(kv, tmp_path):
    """Byte for byte `encode_block`, under the spec that the options describe."""
    file = encoded(kv, tmp_path, "int4:group=8")
    spec = spec_like_options("bfloat16")
    block = KVBlock(spec=spec, start=0, num_tokens=40, layers=kv[1].layers)
    assert file.read_bytes() == b"".join(encode_block(block, build_codec("int4:group=8")))


def test_lossy_round_trip_is_the_library_s(kv, tmp_path):
    """kvlc turns keys back by the RoPE of the options; decoding agrees with `decode_block`."""
    file = encoded(kv, tmp_path, "kvlc:level=0.2")
    back = tmp_path / "back.safetensors"
    codec("decode", file, "-o", back, *IDENTITY)
    block = decode_block(file.read_bytes(), spec_like_options("bfloat16"))
    got = load_file(back)
    for name, x in tensors_of(block).items():
        assert torch.equal(got[name], x)
        assert not torch.equal(x, tensors_of(kv[1])[name])
        assert (x.float() - tensors_of(kv[1])[name].float()).abs().mean() < 0.2


def test_a_start_survives(tmp_path):
    """The metadata say where the tokens lie, and so do those of the decoded file."""
    block = random_block(tiny_spec(), 8, start=100)
    file = tmp_path / "kv.safetensors"
    save_file(tensors_of(block), file, {"start": "100"})
    container, back = tmp_path / "c.kvlc", tmp_path / "back.safetensors"
    codec("encode", file, "--codec", "exact", "-o", container, *IDENTITY)
    assert Container(container.read_bytes()).header.start == 100
    codec("decode", container, "-o", back, *IDENTITY)
    with safe_open(back, "pt") as opened:
        assert opened.metadata()["start"] == "100"


def test_every_option_of_rope_reaches_the_spec(tmp_path):
    """Fingerprints agree with a spec that was made by hand."""
    file, out = tmp_path / "kv.safetensors", tmp_path / "c.kvlc"
    save_file(tensors_of(random_block(tiny_spec(), 4)), file)
    codec(
        *("encode", file, "--codec", "exact", "-o", out, *IDENTITY, "--rotary-dim", 4),
        *("--rope-kind", "linear", "--rope-param", "factor=4", "--interleaved"),
    )
    rope = {"rotary_dim": 4, "kind": "linear", "params": (("factor", 4.0),), "interleaved": True}
    header = Container(out.read_bytes()).header
    assert header.spec_fingerprint == spec_like_options(**rope).fingerprint()
    codec("encode", file, "--codec", "exact", "-o", out, "--model-id", "test")
    plain = LayerSpec(num_kv_heads=2, k_head_dim=8, v_head_dim=8)
    spec = KVSpec(model_id="user:test", layers=(plain,) * 2, dtype="float32", rope_state="none")
    assert Container(out.read_bytes()).header.spec_fingerprint == spec.fingerprint()


def test_a_model_folder_gives_the_spec_without_its_weights(text_model_folder, tmp_path):
    """The spec equals that of the loaded model; its KV goes there and back."""
    loaded = load_eval_model(str(text_model_folder))
    with torch.no_grad():
        cache = loaded.model(torch.arange(20)[None]).past_key_values
    pairs = [(x.keys[0].half(), x.values[0].half()) for x in cache.layers]
    spec = replace(spec_for_model(loaded.model), dtype="float16")
    block = KVBlock.dense(spec, pairs)
    file, out, back = (tmp_path / name for name in ("kv.safetensors", "c.kvlc", "b.safetensors"))
    save_file(tensors_of(block), file)
    codec("encode", file, "--codec", "exact", "-o", out, "--model", text_model_folder)
    assert decode_block(out.read_bytes(), spec).equal(block)
    codec("decode", out, "-o", back, "--model", text_model_folder)
    assert all(torch.equal(x, load_file(back)[name]) for name, x in tensors_of(block).items())


def test_recall_is_a_model_too(tmp_path):
    """The identity is that of `kvlib eval`."""
    loaded = load_eval_model("recall:vocab=16")
    spec = spec_for_model(loaded.model, model_id=loaded.model_id)
    file, out = tmp_path / "kv.safetensors", tmp_path / "c.kvlc"
    block = random_block(spec, 3)
    save_file(tensors_of(block), file)
    codec("encode", file, "--codec", "exact", "-o", out, "--model", "recall:vocab=16")
    assert decode_block(out.read_bytes(), spec).equal(block)


def test_a_profile_is_found_where_decode_is_told(tmp_path, fails, monkeypatch):
    """Without it, decoding says what is missing; with another one, too."""
    monkeypatch.setenv("KVLIB_PROFILES", str(tmp_path / "none"))
    identity = model_identity(spec_like_options())
    settings = {"presets": "near", "group": 1, "layers": 2}
    files, digests = [], []
    for number in (1.0, 2.0):
        files.append(tmp_path / f"{number}.kvlc-profile")
        steps = {f"near.{k}": torch.full((2,), 0.1 * number) for k in "KV"}
        found = save_artefact(
            files[-1], kind=KIND, model=identity, tensors=steps, settings=settings
        )
        digests.append(found.digest)
    kv, out, back = (tmp_path / name for name in ("kv.safetensors", "c.kvlc", "b.safetensors"))
    save_file(tensors_of(random_block(tiny_spec(), 40)), kv)
    codec("encode", kv, "--codec", f"kvlc:profile={files[0]}", "-o", out, *IDENTITY)
    forget_profile(digests[0])
    message = fails("decode", out, "-o", back, *IDENTITY)
    assert f"{digests[0]} is needed" in message
    assert "give --profile FILE" in message
    message = fails("decode", out, "-o", back, "--profile", files[1], *IDENTITY)
    assert "the method says" in message
    assert not back.exists()
    forget_profile(digests[0])
    codec("decode", out, "-o", back, "--profile", files[0], *IDENTITY)
    error = load_file(back)["layers.0.keys"] - load_file(kv)["layers.0.keys"]
    assert 0 < error.abs().max() < 0.2


# What is in a container


def test_inspect_says_what_is_in_it(kv, tmp_path):
    """Shape, codec, rate, and bytes of each kind of section."""
    file = encoded(kv, tmp_path, "int8:group=32")
    text = codec("inspect", file)
    size = file.stat().st_size
    header = Container(file.read_bytes()).header
    for want in (
        "int8@1:group=32",
        "40 from 0 on",
        "2 of 2 heads, keys 8, values 8",
        "bfloat16",
        f"{8 * size / (40 * 2 * 2 * 16):.3f}",
        f"{size:,} for {40 * 2 * 2 * 16 * 2:,}",
        "The header is intact.",
    ):
        assert want in text, want
    for kind in ("keys", "values"):
        mine = [x for x in header.sections if x.kind.name.lower() == kind]
        stored = sum(x.stored_bytes for x in mine)
        row = next(x for x in text.splitlines() if kind in x and f"{stored:,}" in x)
        assert f" {len(mine)} " in row


def test_inspect_reads_no_payload_and_verify_does(kv, tmp_path, fails):
    """A flipped bit in a section is seen by --verify only; one in the header always."""
    file = encoded(kv, tmp_path)
    good = file.read_bytes()
    at = Container(good).header.sections[-1].offset
    file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    assert "The header is intact." in codec("inspect", file)
    message = fails("inspect", file, "--verify")
    assert "CorruptDataError: section values of layer 1 does not match its checksum" in message
    file.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    assert "the header does not match its checksum" in fails("inspect", file)
    file.write_bytes(good)
    assert "Header and sections are intact." in codec("inspect", file, "--verify")


def test_text_of_a_container_is_no_markup(kv, tmp_path, monkeypatch):
    """What a stranger wrote into the header is shown and does nothing."""
    from kvlib.codecs import pack

    monkeypatch.setattr(pack, "writer_text", lambda: "kvlib [/b] \x1b[31m")
    text = codec("inspect", encoded(kv, tmp_path))
    assert "kvlib [/b] ?[31m" in text


# Mistakes


def test_files_that_are_not_what_they_should_be(kv, tmp_path, fails):
    """Wrong kind, truncated, absent."""
    file = encoded(kv, tmp_path)
    good = file.read_bytes()
    back = tmp_path / "back.safetensors"
    for command in (["inspect"], ["inspect", "--verify"], ["decode", "-o", back, *IDENTITY]):
        head, *rest = command
        assert "not a KVLC container" in fails(head, kv[0], *rest)
        assert "cannot read" in fails(head, tmp_path / "absent", *rest)
        assert "cannot read" in fails(head, tmp_path, *rest)
        for size in (0, 10, 100, len(good) - 1):
            file.write_bytes(good[:size])
            assert fails(head, file, *rest).startswith("CorruptDataError: ")
        file.write_bytes(good + b"x")
        assert "bytes long" in fails(head, file, *rest)
    assert not back.exists()
    out = tmp_path / "out.kvlc"
    encode = ("encode", "--codec", "int8", "-o", out, *IDENTITY)
    assert "is no safetensors file" in fails(*encode, file)
    assert "cannot read" in fails(*encode, tmp_path / "absent")
    assert not out.exists()


def test_another_model_is_refused(kv, tmp_path, fails, text_model_folder):
    """By its identity, or by another RoPE."""
    file = encoded(kv, tmp_path)
    back = tmp_path / "back.safetensors"
    for identity in (
        ["--model", text_model_folder],
        ["--model-id", "other", "--rope-theta", "10000"],
        ["--model-id", "test", "--rope-theta", "20000"],
        ["--model-id", "test"],
    ):
        message = fails("decode", file, "-o", back, *identity)
        assert message.startswith("IncompatibleDataError: the container holds KV of spec")
    assert not back.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--model, or --model-id"),
        (["--model", "recall", "--model-id", "x"], "--model, or --model-id"),
        (["--model", "recall", "--rope-theta", "10000"], "the model says that"),
        (["--model", "recall:vocab=16"], "the file holds 2 layers"),
        (["--model", "nowhere"], "cannot read model 'nowhere'"),
        (["--model-id", "x", "--rotary-dim", "4"], "give --rope-theta too"),
        (["--model-id", "x", "--rope-theta", "-1"], "theta must be a positive number"),
        ([*IDENTITY, "--rope-param", "factor"], "NAME=NUMBER"),
        ([*IDENTITY, "--rope-param", "factor=x"], "NAME=NUMBER"),
        ([*IDENTITY, "--codec", "in8"], "no codec is named 'in8'"),
        ([*IDENTITY, "--codec", "kvlc:preset=small"], "needs a profile"),
    ],
)
def test_wrong_options_are_one_line(kv, tmp_path, fails, options, message):
    """And nothing is written."""
    out = tmp_path / "out.kvlc"
    found = fails("encode", kv[0], "-o", out, "--codec", "int8", *options)
    if "the file holds" in message:  # recall has 2 layers too, of other shapes
        assert found.startswith("ShapeError")
    else:
        assert message in found
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.values"), "lacks layers.1.values"),
        (lambda t: t.update(extra=torch.ones(1)), "beyond them extra"),
        (lambda t: t.clear(), "it has 0 tensors"),
        (lambda t: t.update({"layers.0.keys": torch.ones(2, 40, 8)}), "one dtype"),
        (lambda t: t.update({"layers.1.keys": t["layers.1.keys"][:, :39].clone()}), "has shape"),
        (lambda t: t.update({"layers.1.keys": t["layers.1.keys"][0].clone()}), "has shape"),
        (lambda t: t.update({"layers.1.keys": t["layers.1.keys"][:1].clone()}), "ShapeError"),
        (lambda t: t.update({n: x.to(torch.int32) for n, x in t.items()}), "one dtype of"),
    ],
    ids=["missing", "strange", "empty", "dtypes", "tokens", "dims", "heads", "dtype"],
)
def test_tensors_of_another_form_are_refused(kv, tmp_path, fails, change, message):
    """Missing and strange ones, other dtypes and shapes."""
    tensors = tensors_of(kv[1])
    change(tensors)
    file, out = tmp_path / "wrong.safetensors", tmp_path / "out.kvlc"
    save_file(tensors, file)
    assert message in fails("encode", file, "--codec", "exact", "-o", out, *IDENTITY)
    assert not out.exists()


def test_a_start_that_is_no_number_is_refused(kv, tmp_path, fails):
    """Nor one beyond all positions."""
    file, out = tmp_path / "wrong.safetensors", tmp_path / "out.kvlc"
    for start in ("-1", "x", "9999999999"):
        save_file(tensors_of(kv[1]), file, {"start": start})
        fails("encode", file, "--codec", "exact", "-o", out, *IDENTITY)
    assert not out.exists()


def test_evicted_layers_have_no_such_form(tmp_path, fails):
    """A container of rows with their own positions decodes in the library only."""
    spec = spec_like_options()
    layers = tuple(
        LayerKV(
            layer_idx=x.layer_idx,
            keys=x.keys[:, ::2].contiguous(),
            values=x.values[:, ::2].contiguous(),
            positions=torch.arange(0, 8, 2, dtype=torch.int32).expand(2, 4).contiguous(),
        )
        for x in random_block(spec, 8).layers
    )
    block = KVBlock(spec=spec, start=0, num_tokens=8, layers=layers)
    file = tmp_path / "c.kvlc"
    file.write_bytes(b"".join(encode_block(block, build_codec("exact"))))
    assert "positions" in codec("inspect", file)
    message = fails("decode", file, "-o", tmp_path / "b.safetensors", *IDENTITY)
    assert "holds only some tokens" in message


def test_an_unreadable_config_is_one_line(kv, tmp_path, fails):
    """A folder that is none of a model."""
    folder = tmp_path / "model"
    folder.mkdir()
    out = tmp_path / "out.kvlc"
    for text in (
        "{",
        json.dumps({"model_type": "unheard-of"}),
        json.dumps({"model_type": "llama"}),
    ):
        (folder / "config.json").write_text(text)
        found = fails("encode", kv[0], "--codec", "exact", "-o", out, "--model", folder)
        assert "ConfigError" in found
    assert not out.exists()
