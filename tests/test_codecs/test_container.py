# SPDX-License-Identifier: Apache-2.0
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import KVBlock
from kvlib.codecs import (
    Container,
    Section,
    build_codec,
    codec_from_canonical,
    decode_block,
    encode_block,
)
from kvlib.codecs.container import (
    MAGIC,
    MAX_HEADER_BYTES,
    VERSION,
    Flag,
    LayerShape,
    SectionFlag,
    SectionKind,
    build_container,
    header_size,
    parse_header,
    verify_padding,
)
from kvlib.errors import (
    CapacityError,
    ConfigError,
    CorruptDataError,
    IncompatibleDataError,
    ShapeError,
    UnsupportedInputError,
)
from kvlib.keys import BlockKey
from kvlib.spec import KVSpec, LayerSpec, storage_fingerprint
from kvlib.testing.models import random_block, tiny_spec
from kvlib.testing.strategies import kv_blocks

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
EXACT = build_codec("exact")

BASE = {
    "spec_fingerprint": bytes(32),
    "storage_fingerprint": bytes([1]) * 32,
    "start": 64,
    "num_tokens": 3,
    "dtype_code": 2,
    "codec": "exact@1",
    "layers": [LayerShape(0, 2, 4, 3), LayerShape(5, 1, 8, 0, 2, 3)],
}


def sections():
    return [
        Section(SectionKind.KEYS, 0, 10, (b"abc", b"", b"defg")),
        Section(SectionKind.VALUES, 0, 0, ()),
        Section(SectionKind.CODEC, 0xFFFF, 0, (b"side",)),
        Section(SectionKind.KEYS, 5, 13, (bytes(range(13)),), SectionFlag.RAW),
    ]


def build(parts=None, **changes):
    return b"".join(build_container(sections() if parts is None else parts, **{**BASE, **changes}))


def reseal(data, header_bytes):
    """The same container with a right header checksum."""
    out = bytearray(data)
    out[header_bytes - 8 : header_bytes] = xxhash.xxh3_64_intdigest(
        bytes(out[: header_bytes - 8])
    ).to_bytes(8, "little")
    return bytes(out)


def with_tag(data, tag, value):
    """The container with one more tagged field, offsets moved and checksums right."""
    fields = list(struct.unpack_from("<8sHHIQ32s32sQIIIHBB", data))
    old, tlv, count = fields[3], fields[9], fields[10]
    extra = struct.pack("<HI", tag, len(value)) + value
    grow = -(-(old + len(extra)) // 8) * 8 - -(-old // 8) * 8
    fields[3], fields[4], fields[9] = old + len(extra), fields[4] + grow, tlv + len(extra)
    table = bytearray(data[112 + tlv : old - 8])
    for i in range(count):
        (offset,) = struct.unpack_from("<Q", table, 48 * i + 8)
        struct.pack_into("<Q", table, 48 * i + 8, offset + grow)
    header = struct.pack("<8sHHIQ32s32sQIIIHBB", *fields) + data[112 : 112 + tlv] + extra + table
    header += xxhash.xxh3_64_intdigest(header).to_bytes(8, "little")
    body = data[-(-old // 8) * 8 :]
    return header + bytes(-len(header) % 8) + body


@pytest.mark.parametrize("alignment", [1 << n for n in range(3, 17)])
@pytest.mark.parametrize("mac_key", [None, KEY], ids=["plain", "mac"])
def test_every_field_comes_back(alignment, mac_key):
    """A header says what was written, and every section starts at the alignment."""
    keys = [BlockKey(bytes([i]) * 32) for i in range(2)]
    data = build(
        alignment=alignment,
        mac_key=mac_key,
        keys=keys,
        num_tokens=128,
        flags=Flag.LOSSLESS,
        fidelity="int4@1:group=32",
        head_range=(2, 7),
        profile="p",
        writer="wé",
    )
    container = Container(data, mac_key=mac_key)
    container.verify()
    h = container.header
    assert len(data) % alignment == 0
    assert (h.total_bytes, h.alignment, h.header_bytes) == (len(data), alignment, header_size(data))
    assert (h.spec_fingerprint, h.storage_fingerprint) == (bytes(32), bytes([1]) * 32)
    assert (h.start, h.num_tokens, h.dtype_code, h.codec) == (64, 128, 2, "exact@1")
    assert h.keys == tuple(keys)
    assert h.layers == tuple(BASE["layers"])
    assert (h.fidelity, h.head_range, h.profile, h.writer) == ("int4@1:group=32", (2, 7), "p", "wé")
    assert h.flags == Flag.LOSSLESS | (Flag.MAC if mac_key else Flag(0))
    assert parse_header(data[: h.header_bytes], mac_key=mac_key) == h
    for info, section in zip(h.sections, sections(), strict=True):
        assert info.offset % alignment == 0
        assert (info.kind, info.layer_idx, info.flags) == (
            section.kind,
            section.layer_idx,
            section.flags,
        )
        assert (info.raw_bytes, info.stored_bytes) == (section.raw_bytes, section.stored_bytes)
        seen, body = container.read(info.kind, info.layer_idx)
        assert seen == info
        assert bytes(body) == b"".join(section.parts)


def test_defaults_come_back():
    """Fields that were not written have their defaults."""
    h = parse_header(build())
    assert (h.keys, h.fidelity, h.head_range, h.profile, h.writer) == ((), "exact", None, "", "")
    assert h.flags == Flag(0)
    assert parse_header(build([], layers=[])).sections == ()


def test_pieces_are_not_copied():
    """Building hands the caller's own buffers on."""
    body = bytearray(b"x" * 100)
    parts = build_container([Section(SectionKind.KEYS, 0, 100, (body,))], **BASE)
    assert any(part is body for part in parts)


def test_sections_are_read_only_views():
    """A section read from a container is a view that cannot be written through."""
    data = bytearray(build())
    _, body = Container(data).read(SectionKind.KEYS, 0)
    assert body.readonly
    data[bytes(data).index(b"abc")] ^= 1
    assert bytes(body) != b"abcdefg"


@pytest.mark.parametrize(
    "changes",
    [
        {"alignment": 4}, {"alignment": 0}, {"alignment": 24}, {"alignment": 1 << 17},
        {"alignment": -8}, {"mac_key": b"short"}, {"mac_key": bytes(65)}, {"mac_key": b""},
        {"spec_fingerprint": bytes(31)}, {"storage_fingerprint": b""},
        {"keys": [BlockKey(bytes(33))]}, {"start": -1}, {"num_tokens": -1},
        {"start": 2**31 - 2}, {"start": 2**31, "num_tokens": 1}, {"num_tokens": 2**31},
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_arguments(changes):
    """What no reader would accept is refused when it is built."""
    with pytest.raises(ConfigError):
        build(**changes)


def test_last_position():
    """A block may end at position 2**31 - 1."""
    assert parse_header(build(start=2**31 - 3)).start == 2**31 - 3
    assert parse_header(build(start=2**31, num_tokens=0)).num_tokens == 0


def test_header_limit():
    """A header of 64 KiB is read; one byte more cannot be built."""
    room = MAX_HEADER_BYTES - header_size(build(writer="x")) + 1
    data = build(writer="x" * room)
    assert header_size(data) == MAX_HEADER_BYTES
    assert parse_header(data).writer == "x" * room
    with pytest.raises(UnsupportedInputError, match="exceeds"):
        build(writer="x" * (room + 1))
    spec = tiny_spec(layers=700)
    with pytest.raises(UnsupportedInputError, match="encode fewer layers"):
        encode_block(random_block(spec, 1), EXACT)


def test_header_size_needs_16_bytes():
    """The first 16 bytes say how long the header is, or that this is no container."""
    data = build()
    size = header_size(data)
    assert header_size(data[:16]) == size
    assert header_size(memoryview(bytearray(data))) == size
    for n in range(16):
        with pytest.raises(CorruptDataError, match="not a KVLC container"):
            header_size(data[:n])
    for wrong in (0, 119, 65537, 2**32 - 1):
        with pytest.raises(CorruptDataError, match="header of"):
            header_size(MAGIC + struct.pack("<HHI", VERSION, 0, wrong))
    for version in (0, 2, 65535):
        with pytest.raises(IncompatibleDataError, match=f"container version {version}"):
            header_size(MAGIC + struct.pack("<HHI", version, 0, 200))
    with pytest.raises(CorruptDataError):
        header_size(b"\x89PNG\r\n\x1a\n" + data[8:16])


def test_mac_keeps_others_out():
    """Without the key, with another, or with one where there is no MAC, nothing is read."""
    sealed = build(mac_key=KEY)
    plain = build()
    assert parse_header(sealed, mac_key=KEY).flags & Flag.MAC
    with pytest.raises(CorruptDataError, match="MAC does not verify"):
        parse_header(sealed, mac_key=OTHER_KEY)
    with pytest.raises(IncompatibleDataError, match="no key was given"):
        parse_header(sealed)
    with pytest.raises(IncompatibleDataError, match="carries no MAC"):
        parse_header(plain, mac_key=KEY)
    for bad in (b"x" * 15, b"x" * 65):
        with pytest.raises(ConfigError, match="16 to 64"):
            parse_header(sealed, mac_key=bad)
    for good in (b"x" * 16, b"x" * 64):
        Container(build(mac_key=good), mac_key=good).verify()


def test_mac_downgrade_and_forgery():
    """Taking the MAC away, or forging sections under right checksums, does not pass."""
    sealed = build(mac_key=KEY)
    size = header_size(sealed)
    stripped = bytearray(sealed)
    stripped[10] &= ~int(Flag.MAC) & 0xFF
    for candidate in (bytes(stripped), reseal(stripped, size), reseal(stripped, size - 16)):
        with pytest.raises((CorruptDataError, IncompatibleDataError)):
            Container(candidate, mac_key=KEY)
    forged = bytearray(sealed)
    forged[24] ^= 1  # the spec's fingerprint, with the unkeyed checksum made right again
    with pytest.raises(CorruptDataError, match="MAC"):
        Container(reseal(forged, size - 16), mac_key=KEY)
    plain = build()
    at = sealed.index(b"abcdefg")
    container = Container(sealed[:at] + b"abcdefh" + sealed[at + 7 :], mac_key=KEY)
    with pytest.raises(CorruptDataError, match="keys of layer 0"):
        container.read(SectionKind.KEYS, 0)
    assert plain.count(b"abcdefg") == 1


def test_mac_replay_under_another_key():
    """A record of one tenant, whole or in parts, is nothing under another's key."""
    mine, theirs = build(mac_key=KEY), build(mac_key=OTHER_KEY)
    size = header_size(mine)
    for mixed in (theirs, theirs[:size] + mine[size:], mine[: size - 16] + theirs[size - 16 :]):
        with pytest.raises(CorruptDataError):
            Container(mixed, mac_key=KEY).verify()
    with pytest.raises(CorruptDataError, match="does not match"):
        Container(mine[:size] + build([Section(SectionKind.KEYS, 0, 10, (b"zzzzzzz",)),
                                       *sections()[1:]], mac_key=KEY)[size:],
                  mac_key=KEY).verify()  # fmt: skip
    digests = [s.digest for s in parse_header(mine, mac_key=KEY).sections]
    assert not set(digests) & {s.digest for s in parse_header(theirs, mac_key=OTHER_KEY).sections}


def test_a_header_mac_is_no_section_mac():
    """MACs of headers and sections are personalized apart: one cannot be shown as the other."""
    sealed = build(mac_key=KEY)
    size = header_size(sealed)
    body = sealed[: size - 16]
    other = build([Section(SectionKind.KEYS, 0, len(body), (body,))], mac_key=KEY)
    assert sealed[size - 16 : size] != parse_header(other, mac_key=KEY).sections[0].digest


def test_unknown_tags():
    """A tag that may be ignored is skipped; a critical one that is unknown is refused by name."""
    data = build()
    for tag in (0x0002, 0x7FFF):
        Container(with_tag(data, tag, b"12345")).verify()
    for tag in (0x8007, 0x8000, 0xFFFF):
        with pytest.raises(IncompatibleDataError, match=f"{tag:#06x}"):
            Container(with_tag(data, tag, b"12345"))
    with pytest.raises(CorruptDataError, match="occurs twice"):
        Container(with_tag(data, 0x8001, b"exact@1"))
    for tag in (0x0001, 0x8005):
        with pytest.raises(CorruptDataError, match="not UTF-8"):
            Container(with_tag(data, tag, b"\xff"))
    assert Container(with_tag(data, 0x8005, b"int8")).header.fidelity == "int8"


@pytest.mark.parametrize("bit", range(6, 16))
def test_unknown_flags(bit):
    """A flag that this reader cannot act on is refused, not ignored."""
    data = bytearray(build())
    struct.pack_into("<H", data, 10, 1 << bit)
    with pytest.raises(IncompatibleDataError, match="unknown flags"):
        Container(reseal(data, header_size(data)))


def test_unknown_sections():
    """Unknown kinds and flags of sections are refused."""
    data = build()
    first = header_size(data) - 8 - 48 * 4
    for at, value in ((0, 9), (0, 0), (0, 65535), (4, 2), (4, 1 << 31)):
        mutant = bytearray(data)
        struct.pack_into("<H" if at == 0 else "<I", mutant, first + at, value)
        with pytest.raises(IncompatibleDataError, match="unknown kind"):
            Container(reseal(mutant, header_size(data)))


def test_wrong_tables():
    """Sections twice, of undescribed layers, growing, or of the whole block are refused."""
    key = Section(SectionKind.KEYS, 0, 8, (b"12345678",))
    for wrong in (
        [key, key],
        [replace(key, layer_idx=1)],
        [replace(key, raw_bytes=7)],
        [replace(key, layer_idx=0xFFFF)],
        [replace(key, raw_bytes=2**63)],
    ):
        with pytest.raises(CorruptDataError):
            parse_header(build(wrong))
    parse_header(build([replace(key, raw_bytes=100)]), max_decoded_bytes=100)
    with pytest.raises(CorruptDataError, match="limit is 99"):
        parse_header(build([replace(key, raw_bytes=100)]), max_decoded_bytes=99)
    half = replace(key, raw_bytes=50)
    both = build([half, replace(half, kind=SectionKind.VALUES)])
    with pytest.raises(CorruptDataError, match="decode to 100"):
        Container(both, max_decoded_bytes=99)


def test_key_counts():
    """Several keys stand for whole blocks of 64 tokens; one may stand for a tail."""
    keys = [BlockKey(bytes([i]) * 32) for i in range(3)]
    assert len(parse_header(build(keys=keys, num_tokens=192)).keys) == 3
    assert len(parse_header(build(keys=keys[:1], num_tokens=5)).keys) == 1
    for n, tokens in ((2, 127), (3, 128), (2, 64)):
        with pytest.raises(CorruptDataError, match="block keys for"):
            parse_header(build(keys=keys[:n], num_tokens=tokens))


def test_padding_must_be_zero():
    """Bytes between sections are accounted for, also where nothing reads them."""
    data = build(alignment=64)
    header = parse_header(data)
    covered = set(range(header.header_bytes))
    for s in header.sections:
        covered |= set(range(s.offset, s.offset + s.stored_bytes))
    padding = sorted(set(range(len(data))) - covered)
    assert len(padding) > 64
    for at in padding:
        mutant = bytearray(data)
        mutant[at] = 1
        container = Container(mutant)
        with pytest.raises(CorruptDataError, match="padding"):
            container.verify()
        with pytest.raises(CorruptDataError, match="padding"):
            verify_padding(header, memoryview(mutant))


def test_verification_is_lazy_and_once():
    """A section is verified when it is read; `verified` says that somebody did it before."""
    data = bytearray(build())
    at = bytes(data).index(b"abc")
    data[at] ^= 1
    container = Container(data)
    assert container.find(SectionKind.KEYS, 0) is not None
    container.read(SectionKind.KEYS, 5)
    for _ in range(2):
        with pytest.raises(CorruptDataError, match="keys of layer 0"):
            container.read(SectionKind.KEYS, 0)
    assert bytes(Container(data, verified=True).read(SectionKind.KEYS, 0)[1]) == b"`bcdefg"
    assert container.find(SectionKind.CHANNELS, 0) is None
    with pytest.raises(CorruptDataError, match="no channels section"):
        container.read(SectionKind.CHANNELS, 0)


def test_containers_need_no_torch():
    """Headers and sections can be read by a process without torch or NumPy."""
    code = (
        "import sys\n"
        "from kvlib.codecs import Container\n"
        "c = Container(sys.stdin.buffer.read())\n"
        "c.verify()\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "print(c.header.codec)"
    )
    env = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    out = subprocess.run(
        [sys.executable, "-c", code], input=build(), capture_output=True, check=True, env=env
    )
    assert out.stdout.strip() == b"exact@1"


# ---- blocks in containers ----


@given(kv_blocks(), st.sampled_from([8, 64, 4096]), st.sampled_from([None, KEY]))
def test_any_block_comes_back(block, alignment, mac_key):
    """Every block that the types allow survives a container bit for bit."""
    data = b"".join(encode_block(block, EXACT, alignment=alignment, mac_key=mac_key))
    assert decode_block(data, block.spec, mac_key=mac_key).equal(block)


def test_what_the_header_says_about_a_block():
    """Fingerprints, flags and keys in the header are those of the block and the codec."""
    block = random_block(tiny_spec(), 128, start=64)
    keys = [BlockKey(bytes([i]) * 32) for i in range(2)]
    header = parse_header(b"".join(encode_block(block, build_codec("int4"), keys=keys)))
    assert header.spec_fingerprint == block.spec.fingerprint()
    assert header.storage_fingerprint == storage_fingerprint(block.spec, "int4@1:group=32")
    assert header.keys == tuple(keys)
    assert header.flags == Flag(0)
    assert header.writer.startswith("kvlib ")
    assert (header.start, header.num_tokens) == (64, 128)
    lossless = parse_header(b"".join(encode_block(block, EXACT, fidelity="int8@1:group=64")))
    assert lossless.flags == Flag.LOSSLESS
    assert lossless.fidelity == "int8@1:group=64"
    assert lossless.storage_fingerprint == storage_fingerprint(
        block.spec, "exact@2", fidelity="int8@1:group=64"
    )


def test_head_ranges():
    """A rank's share of the heads is stored under its range; a wrong range is refused."""
    block = random_block(tiny_spec(), 5)
    share = replace(
        block,
        layers=tuple(replace(x, keys=x.keys[:1], values=x.values[:1]) for x in block.layers),
    )
    for head_range in ((0, 1), (1, 2)):
        data = b"".join(encode_block(share, EXACT, head_range=head_range))
        assert decode_block(data, block.spec).equal(share)
        assert Container(data).header.head_range == head_range
    prints = {
        Container(b"".join(encode_block(share, EXACT, head_range=r))).header.storage_fingerprint
        for r in ((0, 1), (1, 2))
    }
    assert len(prints) == 2
    for wrong in ((0, 2), (1, 1), (1, 3), (-1, 1), (2, 1)):
        with pytest.raises(ShapeError):
            encode_block(share, EXACT, head_range=wrong)
    with pytest.raises(ShapeError, match="give head_range"):
        encode_block(share, EXACT)
    with pytest.raises(ShapeError, match="leave it out"):
        encode_block(block, EXACT, head_range=(0, 2))


def test_malformed_blocks_are_not_written():
    """What a reader would refuse is a ShapeError before any byte is made."""
    block = random_block(tiny_spec(), 4, start=8)
    first = block.layers[0]

    def place(*rows):
        return replace(first, positions=torch.tensor(rows, dtype=torch.int32))

    def listed(*rows):
        return replace(first, keys=first.keys[..., : len(rows[0])], channels=torch.tensor(rows))

    bad = [
        place((8, 9, 10, 12), (8, 9, 10, 11)),
        place((7, 9, 10, 11), (8, 9, 10, 11)),
        place((8, 8, 10, 11), (8, 9, 10, 11)),
        place((8, -1, 10, 11), (8, 9, 10, 11)),
        replace(first, log_weight=torch.full((2, 4), float("nan"))),
        listed((0, 8), (0, 1)),
        listed((1, 0), (0, 1)),
        replace(first, keys=first.keys[..., :0], channels=torch.zeros((2, 0), dtype=torch.int64)),
    ]
    for layer in bad:
        with pytest.raises(ShapeError):
            encode_block(replace(block, layers=(layer, block.layers[1])), EXACT)


def test_layers_option():
    """Some layers, in any order or none, come back; absent ones are an error."""
    block = random_block(tiny_spec(layers=4), 3)
    data = b"".join(encode_block(replace(block, layers=block.layers[1:]), EXACT))
    for wanted in ([1], [3, 1], (2,), {1, 2, 3}, []):
        part = decode_block(data, block.spec, layers=wanted)
        assert [x.layer_idx for x in part.layers] == sorted(wanted)
    for absent in ([0], [1, 4], [-1]):
        with pytest.raises(CorruptDataError, match="not in the container"):
            decode_block(data, block.spec, layers=absent)


def test_out_must_fit():
    """Tensors to decode into are checked for shape, dtype, device and layout before decoding."""
    block = random_block(tiny_spec(layers=1), 3)
    data = b"".join(encode_block(block, EXACT))
    good = torch.zeros(2, 3, 8)
    for bad in (
        torch.zeros(2, 3, 7),
        torch.zeros(2, 4, 8),
        torch.zeros(3, 8),
        torch.zeros(2, 3, 8, dtype=torch.float16),
        torch.zeros(2, 3, 8, device="meta"),
        torch.zeros(2, 3, 16)[..., ::2],
        torch.zeros(2, 8, 3).transpose(1, 2),
    ):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ShapeError, match="cannot decode"):
                decode_block(data, block.spec, out={0: pair})
    one = KVSpec(
        model_id="m",
        layers=(LayerSpec(num_kv_heads=1, k_head_dim=1, v_head_dim=1),),
        dtype="float32",
    )
    column = torch.arange(3.0).reshape(1, 3, 1)
    data = b"".join(encode_block(KVBlock.dense(one, [(column, column)]), EXACT))
    target = torch.zeros(1, 3, 4)[..., 1:2], torch.zeros(1, 3)[..., None]
    assert torch.equal(decode_block(data, one, out={0: target}).layers[0].keys, column)
    assert torch.equal(target[1], column)


def test_out_is_not_written_after_an_error():
    """When decoding on threads fails, it fails after the last thread has stopped writing."""
    block = random_block(tiny_spec(layers=8), 64)
    data = bytearray(b"".join(encode_block(block, EXACT)))
    data[parse_header(data).sections[0].offset] ^= 1
    running = []

    class Watched:
        name, version, status, lossless = "exact", 1, "stable", True
        caps = EXACT.caps

        def decode(self, container, spec, layers):
            (layer,) = layers
            running.append(layer.layer_idx)
            try:
                for _ in range(20 if layer.layer_idx else 1):
                    EXACT.decode(container, spec, layers)
            finally:
                running.pop()

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            with pytest.raises(CorruptDataError):
                decode_block(data, block.spec, codec_for=lambda _: Watched(), executor=pool)
            assert not running


def test_no_memory_is_a_capacity_error():
    """A codec that finds no memory is reported as such, never as another exception."""
    block = random_block(tiny_spec(), 3)

    class Greedy:
        name, version, status, lossless = "exact", 1, "stable", True
        caps = EXACT.caps

        def decode(self, container, spec, layers):
            raise MemoryError

    data = b"".join(encode_block(block, EXACT))
    with pytest.raises(CapacityError, match="no memory"):
        decode_block(data, block.spec, codec_for=lambda _: Greedy())


def test_canonical_strings():
    """A header's codec must be known, of this version, with every parameter in normal form."""
    assert codec_from_canonical("int4@1:group=16") == build_codec("int4:group=16")
    assert codec_from_canonical("exact@2") == EXACT
    for text in (
        "", "@", "exact", "exact@", "exact@0", "exact@3", "exact@2:", "exact@1:x=1", "int4@1",
        "int4@1:group=016", "int4@1: group=16", "int4@1:group=1", "int4@1:group=x", "nothing@1",
        "int4:group=16@1", "exact@2|exact", "exact@2;", "exact@1\n", "exact@01", "int4@0:group=16",
    ):  # fmt: skip
        with pytest.raises(IncompatibleDataError, match="written by codec"):
            codec_from_canonical(text)
