# SPDX-License-Identifier: Apache-2.0
"""`kvlc` of bytes that nobody honest wrote, and of shapes and numbers at the edges.

KVLIB_KVLC_EDITS is the number of random edits, 20,000 by default. For more than a minute of them:

    KVLIB_KVLC_EDITS=120000 pytest tests/test_codecs/test_kvlc_hostile.py -k random_edits
"""

import contextlib
import itertools
import os
import random
import resource
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvlib.blocks import KVBlock, LayerKV, Row
from kvlib.codecs import Container, build_codec, decode_block, encode_block
from kvlib.codecs.container import SectionFlag, SectionKind
from kvlib.errors import (
    CapacityError,
    CodecError,
    CorruptDataError,
    IncompatibleDataError,
    UnsupportedInputError,
)
from kvlib.spec import KVSpec, LayerSpec, RopeSpec
from tests.test_codecs.profiles import random_profile

EDITS = int(os.environ.get("KVLIB_KVLC_EDITS", "20000"))
MIB = 1 << 20
KINDS = (SectionKind.KEYS, SectionKind.VALUES)
SPEC = KVSpec(
    model_id="hostile",
    dtype="float32",
    layers=[
        LayerSpec(
            num_kv_heads=2,
            k_head_dim=4,
            v_head_dim=3,
            rope=RopeSpec(theta=10000.0, rotary_dim=4),
        )
    ]
    * 2,
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    file = tmp_path_factory.mktemp("profiles") / "hostile.kvlc"
    random_profile(SPEC, file)
    return file


def drawn(rng, *shape):
    """Channels with sizes and means of their own, and some outliers."""
    width = shape[-1]
    x = rng.standard_normal(shape) * rng.uniform(0.2, 3, width) + rng.standard_normal(width)
    x[rng.random(shape) < 0.01] *= 50
    return torch.from_numpy(x).float()


def block_of(tokens=40, ragged=False, seed=0):
    rng = np.random.default_rng(seed)
    pairs = [(drawn(rng, 2, tokens, 4), drawn(rng, 2, tokens, 3)) for _ in SPEC.layers]
    pairs[0][0][0, 9, 1] = torch.nan
    block = KVBlock.dense(SPEC, pairs)
    if not ragged:
        return block
    layers = []
    for layer in block.layers:
        rows = []
        for head, row in enumerate(layer.rows()):
            kept = torch.arange(head, tokens, 1 + head)
            rows.append(Row(row.keys[kept], row.values[kept], row.positions[kept], None))
        layers.append(LayerKV.from_rows(layer.layer_idx, rows))
    return KVBlock(spec=SPEC, start=0, num_tokens=tokens, layers=tuple(layers))


FORMS = {
    "near": ("kvlc:level=0.4,chunk=32", False),
    "fine": ("kvlc:level=0.01,chunk=32,sinks=0", False),
    "ragged": ("kvlc:chunk=16", True),
    "balanced": ("kvlc:preset=balanced,chunk=32,profile=PROFILE", True),
    "small": ("kvlc:preset=small,level=0.05,profile=PROFILE", False),
    "archive": ("kvlc:preset=archive,chunk=32,profile=PROFILE", False),
}


def made(form, profile, tokens=40):
    """Codec, block and container."""
    method, ragged = FORMS[form]
    codec = build_codec(method.replace("PROFILE", str(profile)))
    block = block_of(tokens, ragged)
    return codec, block, b"".join(encode_block(block, codec))


# -- with checksums


@pytest.mark.parametrize("form", ["fine", "archive"])
def test_every_flipped_bit_and_truncation_is_refused(form, profile):
    """Nothing gets past the checksums."""
    _, _, data = made(form, profile, tokens=24)
    decode_block(data, SPEC)
    flags = {s.flags for s in Container(data).header.sections if s.kind in KINDS}
    assert SectionFlag(0) in flags
    for bit in range(8 * len(data)):
        mutant = bytearray(data)
        mutant[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            decode_block(mutant, SPEC)
    for size in range(len(data)):
        with pytest.raises(CodecError):
            decode_block(data[:size], SPEC)


# -- without


class Bare:
    """What a codec sees of a container, with sections that no checksum protects."""

    def __init__(self, data):
        container = Container(data)
        self.header = container.header
        self.sections = {
            (kind, s.layer_idx): bytes(container.read(kind, s.layer_idx)[1])
            for kind in KINDS
            for s in self.header.layers
        }
        self.infos = {k: container.find(*k) for k in self.sections}
        self.coded = [k for k, x in self.infos.items() if not x.flags & SectionFlag.RAW]

    def with_section(self, key, data):
        out = object.__new__(Bare)
        out.header, out.infos, out.coded = self.header, self.infos, self.coded
        out.sections = {**self.sections, key: data}
        return out

    def read(self, kind, layer_idx):
        info, data = self.infos[kind, layer_idx], self.sections[kind, layer_idx]
        plain = SimpleNamespace(
            flags=info.flags, raw_bytes=info.raw_bytes, stored_bytes=len(data), kind=kind
        )
        return plain, memoryview(data)


def decoded(codec, bare, block):
    """The numbers that come out."""
    layers = []
    for x in block.layers:
        keys, values = torch.zeros_like(x.keys), torch.zeros_like(x.values)
        layers.append(
            LayerKV(
                layer_idx=x.layer_idx,
                keys=keys,
                values=values,
                positions=x.positions,
                row_lengths=x.row_lengths,
            )
        )
    codec.decode(bare, SPEC, layers)
    return [y.numpy() for x in layers for y in (x.keys, x.values)]


@contextlib.contextmanager
def little_memory():
    """Room for 96 MiB more than there is now, where the system can say so."""
    if sys.platform != "linux":
        yield
        return
    old = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + 96 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


EDGES = [0, 1, 2, 7, 30, 31, 61, 62, 63, 127, 128, 129, 254, 255]
WIDE = [*EDGES, 256, 32767, 32768, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]


def edited(rng, data):
    """A few bytes changed, removed or added, more often where the heads of things are."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        act = rng.randrange(7)
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 200))
        if act == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif act == 1:
            out[at] = rng.choice(EDGES)
        elif act in (2, 3):
            size = rng.choice([2, 4])
            value = rng.choice(WIDE) if act == 2 else rng.getrandbits(32)
            out[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
        elif act == 4:
            del out[at : at + rng.choice([1, 2, 4, 24])]
        elif act == 5:
            out[at:at] = rng.randbytes(rng.choice([1, 2, 4, 24]))
        else:
            size, frm = rng.choice([1, 2, 4, 8]), rng.randrange(len(out))
            out[at : at + size] = out[frm : frm + size]
        if not out:
            break
    return bytes(out)


def attempt(codec, bare, block):
    """Numbers, or the error that is one of the three there may be."""
    begin = time.thread_time()
    try:
        found = decoded(codec, bare, block)
    except (CorruptDataError, IncompatibleDataError, CapacityError) as exc:
        found = exc
    assert time.thread_time() - begin < 2
    return found


@pytest.mark.parametrize("form", FORMS)
def test_random_edits(form, profile, monkeypatch):
    """Errors of ours or numbers, in little memory and time, and the same without numba."""
    codec, block, data = made(form, profile)
    bare = Bare(data)
    assert len(bare.coded) >= 3
    decoded(codec, bare, block)
    rng = random.Random(form)
    taken, reasons = 0, set()
    with little_memory():
        for i in range(-(-EDITS // len(FORMS))):
            key = rng.choice(bare.coded)
            mutant = bare.with_section(key, edited(rng, bare.sections[key]))
            part = block
            if form != "archive":
                part = SimpleNamespace(layers=[block.layers[key[1]]])
            found = attempt(codec, mutant, part)
            # A claim that is not checked before memory is asked for would end here.
            assert not isinstance(found, CapacityError), found
            if isinstance(found, CorruptDataError):
                reasons.add("".join(c for c in str(found) if not c.isdigit())[:40])
            else:
                taken += 1
            if i % 20:
                continue
            with monkeypatch.context() as patch:
                patch.setenv("KVLIB_RANS", "numpy")
                other = attempt(codec, mutant, part)
            assert isinstance(other, list) == isinstance(found, list)
            if isinstance(found, list):
                for x, y in zip(found, other, strict=True):
                    np.testing.assert_array_equal(x, y)
    assert taken > EDITS // len(FORMS) // 200, "no edit reached the numbers"
    assert len(reasons) > 8, "the edits failed too early"


HEAD = struct.Struct("<BBHIf")
CHUNK = struct.Struct("<HBB5I")
FIELDS = ("active", "base", "mean_base", "words", "side_words", "escapes", "escape_bytes", "low")


def first_chunk(bare, key, block):
    """Where the first chunk of a section begins; sinks and listed rows stand before it."""
    data = bare.sections[key]
    listed = HEAD.unpack_from(data)[3]
    layer = block.layers[key[1]]
    x = layer.keys if key[0] is SectionKind.KEYS else layer.values
    width = x.shape[0] * x.shape[2] if layer.row_lengths is None else x.shape[1]
    return HEAD.size + 4 * listed + (4 + listed) * width * x.element_size()


@pytest.mark.parametrize("number", [-1, 1, 1000, 65535, 1 << 20, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("field", FIELDS)
def test_every_count_of_a_chunk_is_checked(field, number, profile):
    """Counts that are wrong by little, or claim gigabytes, are damage; -1 is one less."""
    codec, block, data = made("near", profile)
    bare = Bare(data)
    refused = 0
    for key in bare.coded:
        section = bytearray(bare.sections[key])
        at = first_chunk(bare, key, block)
        values = list(CHUNK.unpack_from(section, at))
        assert values[0] <= 8
        assert max(values[1:3]) < 255
        i = FIELDS.index(field)
        bits = (16, 8, 8, 32, 32, 32, 32, 32)[i]
        wrong = values[i] + number if abs(number) == 1 else number
        if not 0 <= wrong < 1 << bits:
            continue
        values[i] = wrong
        CHUNK.pack_into(section, at, *values)
        with little_memory():
            found = attempt(codec, bare.with_section(key, bytes(section)), block)
        if i in (1, 2):  # another level decodes to other numbers, or does not
            assert not isinstance(found, CapacityError)
        else:
            assert isinstance(found, CorruptDataError)
        refused += 1
    assert refused or field in FIELDS[:3] or number == -1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({0: 1}, "form"),
        ({0: 3}, "group|form"),
        ({0: 5}, "form"),
        ({1: 0}, "head of a kvlc section"),
        ({1: 2}, "head of a kvlc section"),
        ({2: 1}, "head of a kvlc section"),
        ({3: 5}, "chunk|claimed|active|exempt|levels"),
        ({3: 41}, "41 exempt entries of 40"),
        ({3: (1 << 32) - 1}, "exempt entries of 40"),
        ({4: 0.0}, "head of a kvlc section"),
        ({4: -1.0}, "head of a kvlc section"),
        ({4: float("nan")}, "head of a kvlc section"),
        ({4: float("inf")}, "head of a kvlc section"),
    ],
)
def test_the_head_of_a_section_is_checked(fields, message, profile):
    codec, block, data = made("near", profile)
    bare = Bare(data)
    key = SectionKind.KEYS, 1
    head = list(HEAD.unpack_from(bare.sections[key]))
    for i, value in fields.items():
        head[i] = value
    section = HEAD.pack(*head) + bare.sections[key][HEAD.size :]
    with pytest.raises(CorruptDataError, match=message):
        decoded(codec, bare.with_section(key, section), block)


def test_lists_of_exempt_rows_are_checked(profile):
    """Indices ascend, exist, and name no row that is exempt anyway."""
    codec, block, data = made("near", profile)
    bare = Bare(data)
    key = SectionKind.KEYS, 0
    section = bare.sections[key]
    assert HEAD.unpack_from(section)[3] == 1
    for index in (0, 3, 40, (1 << 32) - 1):
        forged = section[: HEAD.size] + struct.pack("<I", index) + section[HEAD.size + 4 :]
        with pytest.raises(CorruptDataError, match="exempt"):
            decoded(codec, bare.with_section(key, forged), block)
    head = list(HEAD.unpack_from(section))
    head[3] = 2
    for pair in ((9, 9), (10, 9)):
        rest = struct.pack("<2I", *pair) + bytes(32) + section[HEAD.size + 4 :]
        with pytest.raises(CorruptDataError, match="exempt"):
            decoded(codec, bare.with_section(key, HEAD.pack(*head) + rest), block)


@pytest.mark.parametrize("layers", [None, [0], [1]])
@pytest.mark.parametrize("change", ["raw first", "raw member", "longer", "both first", "too small"])
def test_members_of_a_group_are_checked(change, layers, profile):
    """Whichever layers are asked for, before room is made for those that are not."""
    codec, block, data = made("archive", profile)
    bare = Bare(data)
    first, member = (SectionKind.KEYS, 0), (SectionKind.KEYS, 1)
    assert bare.sections[member] == b"\4"
    size = block.layers[0].keys.numel() * 4
    changes = {
        "raw first": (first, SectionFlag.RAW, None),
        "raw member": (member, SectionFlag.RAW, bytes(size)),
        "longer": (member, SectionFlag(0), b"\4\0"),
        "both first": (member, SectionFlag(0), bare.sections[first]),
        "too small": (member, SectionFlag(0), b"\4"),
    }
    key, flags, section = changes[change]
    forged = bare.with_section(key, bare.sections[key] if section is None else section)
    info = SimpleNamespace(flags=flags, raw_bytes=size - 4 * (change == "too small"))
    forged.infos = {**bare.infos, key: info}
    if change == "raw member" and layers == [1]:
        return  # asked for alone it is a tensor of its own
    wanted = [x for x in block.layers if layers is None or x.layer_idx in layers]
    part = SimpleNamespace(layers=wanted)
    with pytest.raises(CorruptDataError):
        decoded(codec, forged, part)


# -- shapes and numbers

CONTENTS = ("normal", "constant", "zero", "denormal", "huge", "nan", "inf", "all nan")


def filled(rng, shape, dtype, content):
    x = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    info = torch.finfo(dtype)
    if content == "constant":
        x[:] = 1.25
    elif content == "zero":
        x[:] = 0
    elif content == "denormal":
        x = x * (info.smallest_normal / 8)
    elif content == "huge":
        x = x.clamp(-4, 4) * (info.max / 5)
    elif content == "all nan":
        x[:] = torch.nan
    elif content in ("nan", "inf") and shape[1]:
        x[..., shape[1] // 2, shape[2] - 1] = torch.nan if content == "nan" else -torch.inf
    return x


def same_bits(x, y):
    if not x.numel():
        return x.shape == y.shape
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def check_near(x, y, section, start, sinks, what):
    """Half a step for each coefficient, of which a rotation mixes two, and some rounding."""
    info, data = section
    if info.flags & SectionFlag.RAW or not x.numel():
        assert same_bits(x, y), what
        return
    step = HEAD.unpack_from(data)[4]
    wide, found = x.double(), y.double()
    usable = wide.abs() < torch.finfo(x.dtype).max / 4
    good = usable.all(2).all(0)
    good[: max(0, min(sinks - start, len(good)))] = False
    assert same_bits(x[:, ~good], y[:, ~good]), what
    units = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[x.dtype]
    size = wide[:, good].abs().max() if bool(good.any()) else 0.0
    bound = step * 0.5 * 2**0.5 * 1.001 + size * units + torch.finfo(x.dtype).smallest_normal
    assert ((wide - found)[:, good].abs() <= bound).all(), what


DIMS = [(64, 80), (80, 64), (96, 128), (128, 96), (256, 33)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_shapes_and_numbers_at_the_edges(dims, dtype):
    """Lengths about a chunk's, special numbers, and widths of heads that differ."""
    k, v = dims
    rope = RopeSpec(theta=10000.0, rotary_dim=k // 2)
    layer = LayerSpec(num_kv_heads=2, k_head_dim=k, v_head_dim=v, rope=rope)
    spec = KVSpec(model_id="edges", dtype=dtype, layers=[layer])
    kind, rng = getattr(torch, dtype), np.random.default_rng(k)
    codec = build_codec("kvlc:level=0.3,chunk=16,sinks=2")
    coded = 0
    for tokens, content in itertools.product((0, 1, 15, 16, 17, 33), CONTENTS):
        start = 0 if tokens % 2 else 1000
        pair = [filled(rng, (2, tokens, width), kind, content) for width in dims]
        block = KVBlock.dense(spec, [tuple(pair)], start=start)
        data = b"".join(encode_block(block, codec))
        found = decode_block(data, spec).layers[0]
        container = Container(data)
        for name, x, y in zip(KINDS, pair, (found.keys, found.values), strict=True):
            section = container.read(name, 0)
            coded += not section[0].flags
            check_near(x, y, section, start, 2, (tokens, content, name))
    assert coded > 25


@pytest.mark.parametrize("tokens", [127, 700])
def test_lanes_that_do_not_divide_the_symbols(tokens):
    """16 and 64 lanes of streams that end in the middle of a step."""
    layer = LayerSpec(num_kv_heads=3, k_head_dim=33, v_head_dim=35)
    spec = KVSpec(model_id="lanes", dtype="float32", layers=[layer])
    rng = np.random.default_rng(tokens)
    pair = [filled(rng, (3, tokens, width), torch.float32, "normal") for width in (33, 35)]
    assert all(tokens * 3 * x.shape[2] % 16 for x in pair)
    data = b"".join(
        encode_block(KVBlock.dense(spec, [tuple(pair)]), build_codec("kvlc:chunk=4096,sinks=0"))
    )
    found = decode_block(data, spec).layers[0]
    for name, x, y in zip(KINDS, pair, (found.keys, found.values), strict=True):
        check_near(x, y, Container(data).read(name, 0), 0, 0, name)


def test_channels_that_a_chunk_cannot_count():
    """More than 65535: the tensor is stored; its neighbour is not."""
    layer = LayerSpec(num_kv_heads=513, k_head_dim=128, v_head_dim=64)
    spec = KVSpec(model_id="wide", dtype="float16", layers=[layer])
    rng = np.random.default_rng(0)
    pair = [filled(rng, (513, 20, width), torch.float16, "normal") for width in (128, 64)]
    data = b"".join(encode_block(KVBlock.dense(spec, [tuple(pair)]), build_codec("kvlc")))
    found = decode_block(data, spec).layers[0]
    flags = [bool(s.flags & SectionFlag.RAW) for s in Container(data).header.sections]
    assert flags == [True, False]
    assert same_bits(found.keys, pair[0])
    check_near(pair[1], found.values, Container(data).read(KINDS[1], 0), 0, 4, "values")


@pytest.mark.parametrize("mean", [4e3, 6e3, 6.4e3, 7e3, 1e5])
def test_means_of_millions_of_steps(mean, profile):
    """Levels end where a byte does; what is farther out is an escape, or the tensor is stored."""
    block = block_of()
    for layer in block.layers:
        layer.values.add_(mean)
    codec = build_codec(f"kvlc:level=0.01,profile={profile}")
    data = b"".join(encode_block(block, codec))
    for x, y in zip(block.layers, decode_block(data, SPEC).layers, strict=True):
        assert (x.values - y.values).abs().max() <= 0.0005 + mean * 2.0**-22
    flags = {s.flags for s in Container(data).header.sections if s.kind is SectionKind.VALUES}
    assert flags == {SectionFlag.RAW if mean == 1e5 else SectionFlag(0)}


def test_a_range_of_heads_needs_near(profile):
    """Which matrices belong to the heads of a rank is not known to the codec."""
    block = block_of()
    layers = [
        LayerKV(
            layer_idx=x.layer_idx,
            keys=x.keys[1:].clone(),
            values=x.values[1:].clone(),
            positions=x.positions,
        )
        for x in block.layers
    ]
    part = KVBlock(spec=SPEC, start=0, num_tokens=40, layers=tuple(layers))
    for preset in ("balanced", "small", "archive"):
        codec = build_codec(f"kvlc:preset={preset},profile={profile}")
        with pytest.raises(UnsupportedInputError, match="cannot store heads"):
            encode_block(part, codec, head_range=(1, 2))
    assert encode_block(part, build_codec("kvlc"), head_range=(1, 2))
