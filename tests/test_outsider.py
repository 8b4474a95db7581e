# SPDX-License-Identifier: Apache-2.0
"""kvlib and a reader written from the two pages of docs/formats agree on every block and byte."""

import importlib.util
import json
import random
import struct
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import KVBlock
from kvlib.codecs import CODECS, build_codec, decode_block, encode_block
from kvlib.codecs.container import Container
from kvlib.errors import CodecError, CorruptDataError, UnsupportedInputError
from kvlib.keys import BlockKey, Extra, block_keys, root_key, snapshot_key
from kvlib.spec import DTYPES, KVSpec, LayerKind, storage_fingerprint
from kvlib.testing.models import random_block, tiny_spec
from kvlib.testing.strategies import kv_blocks, specs

FOLDER = Path(__file__).resolve().parent / "golden"
CONTAINERS = FOLDER / "containers" / "v1"


def load(name: str) -> ModuleType:
    """A script of tests/golden as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


outsider = load("outsider")
same_numbers = load("check_golden").same_numbers

NAMES = [n for n in CODECS.names() if n != "cachegen"]  # it needs a profile
METHODS = [*NAMES, "int8:group=2", "int8:group=5", "int4:group=3", "int4:group=1024"]
METHODS += ["fp8:scale=none", "fp8:format=e5m2,scale=token", "hadamard:bits=3,correct=false"]
METHODS += ["kivi:bits=2,group=3,residual=2", "kivi:bits=3,group=1024", "hadamard:bits=2"]
MAC_KEY = bytes(range(7, 50))


def plain_spec(spec: KVSpec) -> dict:
    """A spec as plain JSON."""
    names = ("model_id", "dtype", "adapter", "weight_quantization", "kv_scales")
    layers = []
    for layer in spec.layers:
        rope = layer.rope
        if rope is not None:
            fields = ("theta", "rotary_dim", "kind", "params", "interleaved", "first_channel")
            rope = {name: getattr(rope, name) for name in fields}
        sizes = ("num_kv_heads", "k_head_dim", "v_head_dim", "window")
        sizes = {name: getattr(layer, name) for name in sizes}
        layers.append({"kind": str(layer.kind), **sizes, "rope": rope})
    plain = {name: getattr(spec, name) for name in names}
    plain |= {"rope_state": str(spec.rope_state), "layers": layers}
    return json.loads(json.dumps(plain))


def raw(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""


@cache
def dtypes_of(method: str) -> tuple[str, ...]:
    """Element types that a codec takes."""
    taken = []
    for dtype in DTYPES:
        try:
            encode_block(random_block(tiny_spec(dtype=dtype), 4), build_codec(method))
        except UnsupportedInputError:
            continue
        taken.append(dtype)
    return tuple(taken)


@pytest.fixture(autouse=True)
def _profiles(monkeypatch):
    """Let kvlib find the profile of golden containers."""
    monkeypatch.setenv("KVLIB_PROFILES", str(FOLDER / "profiles"))


def check_same(data: bytes, block: KVBlock, mac_key: bytes | None) -> None:
    """Compare what both readers decode: bit for bit, where the page says what every bit is."""
    mine = decode_block(data, block.spec, mac_key=mac_key)
    header, layers = outsider.decode(data, plain_spec(block.spec), mac_key)
    assert (header["start"], header["num_tokens"]) == (mine.start, mine.num_tokens)
    assert len(layers) == len(mine.layers)
    for theirs, layer in zip(layers, mine.layers, strict=True):
        assert theirs["layer_idx"] == layer.layer_idx
        lengths = theirs["row_lengths"]
        assert (None if lengths is None else tuple(lengths)) == layer.row_lengths
        for name, x in (("keys", layer.keys), ("values", layer.values)):
            if header["codec"].startswith("kvlc"):
                assert theirs[name].shape == x.shape
                # Sums of huge numbers may overflow or not, as their order is.
                if x.numel() and not np.nan_to_num(theirs[name], nan=np.inf).max() > 1e30:
                    assert same_numbers(theirs[f"{name}_bytes"], raw(x), block.spec.dtype, 2e-5)
                continue
            assert theirs[f"{name}_bytes"] == raw(x)
            assert theirs[name].dtype == np.float32
            np.testing.assert_array_equal(theirs[name], x.float().numpy())
        np.testing.assert_array_equal(theirs["positions"], layer.positions_tensor().numpy())
        weight = theirs["log_weight"]
        assert (weight is None) == (layer.log_weight is None)
        if weight is not None:
            assert weight.tobytes() == raw(layer.log_weight)
        channels = theirs["channels"]
        assert (channels is None) == (layer.channels is None)
        if channels is not None:
            np.testing.assert_array_equal(channels, layer.channels.numpy())


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
def test_the_outsider_decodes_what_kvlib_decodes(method, data):
    """For any block through any codec, both readers give the same bits."""
    block = data.draw(kv_blocks(dtypes=dtypes_of(method)))
    mac_key = data.draw(st.sampled_from([None, MAC_KEY]))
    keys = [BlockKey(bytes([n]) * 32) for n in range(data.draw(st.integers(0, 1)))]
    parts = encode_block(
        block,
        build_codec(method),
        keys=keys,
        fidelity=data.draw(st.sampled_from(["exact", "int4@1:group=32", "é"])),
        alignment=data.draw(st.sampled_from([8, 16, 512])),
        mac_key=mac_key,
    )
    check_same(b"".join(parts), block, mac_key)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_blocks_agree(method, dtype):
    """Blocks large enough for compressed planes decode alike."""
    taken = dtype in dtypes_of(method)
    spec = tiny_spec(dtype=dtype, layers=1)
    block = random_block(spec, 64, seed=3)
    if taken:
        keys = block_keys(spec.fingerprint(), range(64))
        data = b"".join(encode_block(block, build_codec(method), keys=keys))
        raw_sections = any(s["flags"] for s in outsider.verify(data)["sections"])
        assert not raw_sections or method in ("exact", "raw")
        check_same(data, block, None)
    else:
        with pytest.raises(UnsupportedInputError):
            encode_block(block, build_codec(method))


# Keys

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
EXTRAS = st.lists(
    st.tuples(TEXT, st.binary(max_size=3), st.integers(-(2**63), 2**63 - 1)), max_size=4
)


@given(
    spec=specs(kinds=list(LayerKind)),
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(0, 200),
    salt=st.one_of(st.binary(max_size=9), TEXT),
    extras=EXTRAS,
    inside=st.dictionaries(st.integers(0, 3), EXTRAS),
)
def test_keys_agree(spec, seed, size, salt, extras, inside):
    """Roots, block keys and snapshot keys are the ones of the page, for any input."""
    rng = random.Random(seed)
    tokens = [rng.choice([0, 2**32 - 1, rng.getrandbits(32)]) for _ in range(size)]
    inside = {i: x for i, x in inside.items() if i * 64 < size}
    mine = spec.fingerprint()
    theirs = outsider.spec_fingerprint(plain_spec(spec))
    assert mine == theirs
    given_extras = [Extra(*extra) for extra in extras]
    plain_salt = salt.encode() if isinstance(salt, str) else salt
    root = outsider.root_key(theirs, plain_salt, extras)
    assert root_key(mine, salt=salt, extras=given_extras) == root
    assert block_keys(
        mine,
        tokens,
        salt=salt,
        extras=given_extras,
        block_extras={i: [Extra(*extra) for extra in x] for i, x in inside.items()},
    ) == outsider.block_keys(root, tokens, inside)
    method = f"m:seed={seed}"
    assert snapshot_key(
        mine, tokens, method, artefacts=["a"], salt=salt, extras=given_extras
    ) == outsider.snapshot_key(theirs, tokens, method, ["a"], plain_salt, extras)


@given(
    spec=specs(kinds=list(LayerKind)),
    codec=TEXT,
    fidelity=TEXT,
    profile=TEXT,
    heads=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    layers=st.none() | st.lists(st.integers(0, 9), max_size=4),
)
def test_storage_fingerprints_agree(spec, codec, fidelity, profile, heads, layers):
    """Storage fingerprints are the ones of the page, for any input."""
    plain = plain_spec(spec)
    mine = storage_fingerprint(
        spec, codec, fidelity=fidelity, head_range=heads, layers=layers, profile=profile
    )
    theirs = outsider.storage_fingerprint(
        outsider.spec_fingerprint(plain),
        codec,
        outsider.kept_layers(plain) if layers is None else layers,
        fidelity,
        None if heads is None else list(heads),
        profile,
    )
    assert mine == theirs


# Bytes that are wrong

SMALL = ["exact-compressed", "exact-mac", "exact-ragged", "int4-float32-odd", "int8-edges", "tags"]


@cache
def golden(name: str) -> tuple[bytes, dict]:
    case = json.loads((CONTAINERS / f"{name}.json").read_text(encoding="utf-8"))
    return (CONTAINERS / f"{name}.kvlc").read_bytes(), case


def mac_key_of(case: dict) -> bytes | None:
    return None if case["mac_key"] is None else bytes.fromhex(case["mac_key"])


@pytest.mark.parametrize("name", SMALL)
def test_both_readers_refuse_flipped_bits(name):
    """Each bit of the header's front, and a sample of all others, is noticed when it flips."""
    data, case = golden(name)
    key = mac_key_of(case)
    outsider.verify(data, key)
    rng = random.Random(name)
    for bit in [*range(112 * 8), *rng.sample(range(112 * 8, len(data) * 8), 1000)]:
        mutant = bytearray(data)
        mutant[bit // 8] ^= 1 << bit % 8
        with pytest.raises(outsider.Refused):
            outsider.verify(mutant, key)
        with pytest.raises(CodecError):
            Container(mutant, mac_key=key).verify()


def padding_of(header: dict) -> list[int]:
    """The bytes of a container that no section and no header holds."""
    used = set(range(header["header_bytes"]))
    for section in header["sections"]:
        used |= set(range(section["offset"], section["offset"] + section["stored_bytes"]))
    return sorted(set(range(header["total_bytes"])) - used)


def test_both_readers_refuse_padding_that_is_not_zero():
    """Each byte of padding, before, between and after the sections, must be zero."""
    tried = 0
    for path in sorted(CONTAINERS.glob("*.kvlc")):
        data, case = golden(path.stem)
        key, places = mac_key_of(case), padding_of(case["header"])
        for at in places[:20] + places[-20:]:
            mutant = bytearray(data)
            mutant[at] = 1
            with pytest.raises(outsider.Damaged):
                outsider.verify(mutant, key)
            with pytest.raises(CorruptDataError):
                Container(mutant, mac_key=key).verify()
            tried += 1
    assert tried > 100


@pytest.mark.parametrize("name", SMALL)
def test_the_outsider_refuses_other_lengths_and_keys(name):
    """A container cut short, prolonged, or read with the wrong MAC key is refused."""
    data, case = golden(name)
    key = mac_key_of(case)
    for mutant in [*(data[:n] for n in range(0, len(data), 5)), data + b"\0", data + bytes(4096)]:
        with pytest.raises(outsider.Refused):
            outsider.verify(mutant, key)
    with pytest.raises(outsider.Refused):
        outsider.verify(data, None if key else bytes(16))
    if key:
        with pytest.raises(outsider.Refused):
            outsider.verify(data, key[:-1] + b"?")


def test_the_outsider_refuses_another_model():
    """A container is refused where another spec is expected."""
    data, case = golden("int8-edges")
    outsider.decode(data, case["spec"])
    for name in ("model_id", "adapter", "weight_quantization", "kv_scales"):
        with pytest.raises(outsider.Foreign):
            outsider.decode(data, {**case["spec"], name: "other"})


class Resealed:
    """A container taken apart; put together again with every digest made right."""

    def __init__(self, data: bytes) -> None:
        self.fixed = list(struct.unpack_from("<8sHHIQ32s32sQIIIHBB", data))
        tlv_bytes, count = self.fixed[9], self.fixed[10]
        at, end = 112, 112 + tlv_bytes
        self.tags = []
        while at < end:
            tag, size = struct.unpack_from("<HI", data, at)
            self.tags.append([tag, bytearray(data[at + 6 : at + 6 + size])])
            at += 6 + size
        self.rows = [
            list(struct.unpack_from("<HHI3Q16s", data, end + 48 * i)) for i in range(count)
        ]
        self.bodies = [bytearray(data[row[3] : row[3] + row[4]]) for row in self.rows]
        self.keep_layout = False
        self.keep_identity = False

    def build(self) -> bytes:
        tlv = b"".join(struct.pack("<HI", tag, len(v)) + v for tag, v in self.tags)
        size = 112 + len(tlv) + 48 * len(self.rows) + 8
        unit = 1 << min(self.fixed[13], 16)
        end, rest = size, b""
        for row, body in zip(self.rows, self.bodies, strict=True):
            offset = -(-end // unit) * unit
            rest += bytes(offset - end) + body
            end = offset + len(body)
            row[6] = outsider.section_digest(bytes(body), None)
            if not self.keep_layout:
                row[3], row[4] = offset, len(body)
        rest += bytes(-end % unit)
        if not self.keep_layout:
            self.fixed[3], self.fixed[4] = size, size + len(rest)
            self.fixed[9], self.fixed[10] = len(tlv), len(self.rows)
        if not self.keep_identity:
            self.fixed[6] = self._storage()
        head = struct.pack("<8sHHIQ32s32sQIIIHBB", *self.fixed) + tlv
        head += b"".join(struct.pack("<HHI3Q16s", *row) for row in self.rows)
        return head + outsider.xxh3(head) + rest

    def _storage(self) -> bytes:
        tags = {tag: bytes(value) for tag, value in self.tags}
        layers = tags.get(0x8003, b"")
        indices = [int.from_bytes(layers[i : i + 2], "little") for i in range(0, len(layers), 12)]
        heads = tags.get(0x8006, b"")
        return outsider.storage_fingerprint(
            self.fixed[5],
            tags.get(0x8001, b"").decode("utf-8", "replace"),
            indices,
            tags.get(0x8005, b"exact").decode("utf-8", "replace"),
            list(struct.unpack("<HH", heads)) if len(heads) == 4 else None,
            tags.get(0x8004, b"").decode("utf-8", "replace"),
        )


NUMBERS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 32, 64, 65, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1]
FIELD_BITS = [0, 16, 16, 32, 64, 0, 0, 64, 32, 32, 32, 16, 8, 8]
VALUES = [b"", b"\0\0\1\0", b"exact@1", b"exact@2", b"int4@1:group=04", b"int8@1:group=16", b"p"]
VALUES += [b"\xff"]


def mutate(rng: random.Random, it: Resealed) -> None:
    """Change one thing that a digest would not show."""
    act = rng.randrange(8)
    if act == 0:
        field = rng.choice([n for n, bits in enumerate(FIELD_BITS) if bits])
        near = [*NUMBERS, it.fixed[field] + 1, it.fixed[field] ^ 1, it.fixed[field] - 1]
        it.fixed[field] = rng.choice(near) % (1 << FIELD_BITS[field])
        it.keep_layout = field in (3, 4, 9, 10)
    elif act == 1:
        tag = rng.choice(it.tags)
        if tag[1]:
            tag[1][rng.randrange(len(tag[1]))] = rng.choice([0, 1, 2, 3, 4, 127, 128, 255])
    elif act == 2:
        at = rng.randrange(len(it.tags))
        tag = rng.choice([1, 2, 0x7FFF, *range(0x8001, 0x8009), 0xFFFF])
        if rng.random() < 0.8:
            it.tags = [x for x in it.tags if x[0] != tag or rng.random() < 0.1]
            it.tags.insert(at, [tag, bytearray(rng.choice([*VALUES, rng.randbytes(32)]))])
        else:
            del it.tags[at]
    elif act == 3:
        row = rng.choice(it.rows)
        field = rng.choice([0, 0, 1, 2, 3, 4, 5, 5])
        bits = (16, 16, 32, 64, 64, 64)[field]
        row[field] = rng.choice([*NUMBERS, row[field] + 1, row[field] - 1]) % (1 << bits)
        it.keep_layout = field in (3, 4)
    elif act in (4, 5):
        body = rng.choice(it.bodies)
        for _ in range(rng.choice([1, 1, 2])):
            if body:
                body[rng.randrange(len(body))] = rng.choice([0, 1, 127, 128, 129, 252, 255])
    elif act == 6:
        index = rng.randrange(len(it.bodies))
        del it.bodies[index][rng.randrange(len(it.bodies[index]) + 1) :]
        if rng.random() < 0.5:
            it.bodies[index] += rng.randbytes(rng.choice([1, 2, 4, 6, 12]))
        if rng.random() < 0.5:
            it.rows[index][5] = len(it.bodies[index])
    else:
        i, j = rng.randrange(len(it.rows)), rng.randrange(len(it.rows))
        it.rows[i], it.rows[j] = it.rows[j], it.rows[i]
        it.bodies[i], it.bodies[j] = it.bodies[j], it.bodies[i]
        if rng.random() < 0.3:
            del it.rows[j], it.bodies[j]


RESEALED = ["exact-compressed", "exact-head-range", "exact-ragged", "int4-ragged", "int8-edges"]
RESEALED += ["fp8-ragged", "kivi-ragged", "hadamard-ragged", "hadamard-float32-odd"]
RESEALED += ["kvlc-near-float32", "kvlc-near-fine", "kvlc-balanced", "kvlc-archive"]


@pytest.mark.parametrize("name", RESEALED)
def test_both_readers_refuse_the_same_containers(name):
    """Whatever a writer puts under right checksums, both take it or both refuse it."""
    data, case = golden(name)
    spec = load("check_golden").spec_of(case["spec"])
    assert Resealed(data).build() == data
    rng = random.Random(name)
    taken = refused = 0
    for _ in range(1000):
        it = Resealed(data)
        it.keep_identity = rng.random() < 0.02
        for _ in range(rng.choice([1, 1, 1, 2])):
            if it.rows and it.tags:
                mutate(rng, it)
        mutant = it.build()
        try:
            block = decode_block(mutant, spec)
        except CodecError as exc:
            refused += 1
            with pytest.raises(outsider.Refused):
                pytest.fail(f"the outsider takes {outsider.decode(mutant, case['spec'])[0]}: {exc}")
        else:
            taken += 1
            check_same(mutant, block, None)
    assert taken > 50
    assert refused > 300
