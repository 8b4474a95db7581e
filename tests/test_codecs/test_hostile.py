# SPDX-License-Identifier: Apache-2.0
"""What readers do with bytes that nobody honest wrote."""

import random
import struct
import subprocess
import sys
import textwrap
from hashlib import blake2b

import pytest
import torch
import xxhash

from kvlib.blocks import SYNTHETIC, KVBlock, LayerKV, Row
from kvlib.codecs import CODECS, build_codec, decode_block, encode_block
from kvlib.errors import CodecError, CorruptDataError, IncompatibleDataError
from kvlib.keys import BlockKey
from kvlib.spec import KVSpec, LayerSpec
from kvlib.testing.models import random_block, tiny_spec

CODEC_NAMES = [n for n in CODECS.names() if n != "cachegen"]  # it needs a profile
MAC_KEY = bytes(range(32))

# Written down again, from the format's specification: the reader must not check itself.
FIXED = "<8sHHIQ32s32sQIIIHBB"
ROW = "<HHIQQQ16s"


def small_spec(dtype: str = "float16") -> KVSpec:
    layer = LayerSpec(num_kv_heads=2, k_head_dim=3, v_head_dim=2)
    return KVSpec(model_id="m", layers=(layer, layer), dtype=dtype)


def dense_block() -> KVBlock:
    """Two layers of five tokens; some numbers repeat, so that planes are compressed."""
    spec = small_spec()
    block = random_block(spec, 40, start=64, seed=1)
    first = block.layers[0]
    first.keys.fill_(1.5)
    return KVBlock(spec=spec, start=64, num_tokens=40, layers=(first, block.layers[1])).slice(
        64, 80
    )


def ragged_block() -> KVBlock:
    """One layer with every kind of section: ragged, weighted, synthetic, channel lists."""
    spec = small_spec()
    generator = torch.Generator().manual_seed(2)

    def row(positions: list[int]) -> Row:
        n = len(positions)
        return Row(
            torch.randn((n, 2), generator=generator).half(),
            torch.randn((n, 2), generator=generator).half(),
            torch.tensor(positions, dtype=torch.int32),
            torch.randn(n, generator=generator),
        )

    layer = LayerKV.from_rows(
        1, [row([70, 75, SYNTHETIC]), row([66])], channels=torch.tensor([[0, 2], [0, 1]])
    )
    return KVBlock(spec=spec, start=64, num_tokens=16, layers=(layer,))


BLOCKS = {"dense": dense_block, "ragged": ragged_block}


def record(codec: str, form: str, *, mac_key: bytes | None = None) -> tuple[bytes, KVSpec]:
    block = BLOCKS[form]()
    keys = [BlockKey(bytes([7]) * 32)]
    return (
        b"".join(encode_block(block, build_codec(codec), keys=keys, mac_key=mac_key)),
        block.spec,
    )


def cases() -> list[tuple[str, str, bytes | None]]:
    plain = [(codec, form, None) for codec in CODEC_NAMES for form in BLOCKS]
    return [*plain, ("exact", "ragged", MAC_KEY)]


CASES = pytest.mark.parametrize(
    ("codec", "form", "mac_key"), cases(), ids=lambda x: "mac" if isinstance(x, bytes) else x
)


@CASES
def test_every_flipped_bit_is_refused(codec, form, mac_key):
    """Whichever bit of a record flips, header, table, section or padding, reading it fails."""
    data, spec = record(codec, form, mac_key=mac_key)
    decode_block(data, spec, mac_key=mac_key)
    for bit in range(len(data) * 8):
        mutant = bytearray(data)
        mutant[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CodecError):
            decode_block(mutant, spec, mac_key=mac_key)


@CASES
def test_every_truncation_and_addition_is_refused(codec, form, mac_key):
    """A record cut anywhere, or with bytes after or inside it, is never decoded."""
    data, spec = record(codec, form, mac_key=mac_key)
    for n in range(len(data)):
        with pytest.raises(CodecError):
            decode_block(data[:n], spec, mac_key=mac_key)
    for extra in (b"\0", b"\0" * 8, data):
        with pytest.raises(CorruptDataError):
            decode_block(data + extra, spec, mac_key=mac_key)
    for at in range(0, len(data) + 1, 3):
        for extra in (b"\0", b"\xff" * 8):
            with pytest.raises(CodecError):
                decode_block(data[:at] + extra + data[at:], spec, mac_key=mac_key)


@CASES
def test_swapped_and_repeated_bytes_are_refused(codec, form, mac_key):
    """Two differing bytes swapped, or a run copied over another, are noticed."""
    data, spec = record(codec, form, mac_key=mac_key)
    rng = random.Random(0)
    for _ in range(500):
        mutant = bytearray(data)
        a, b, n = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice([1, 2, 8, 32])
        a, b = min(a, len(data) - n), min(b, len(data) - n)
        mutant[a : a + n] = data[b : b + n]
        if mutant != data:
            with pytest.raises(CodecError):
                decode_block(mutant, spec, mac_key=mac_key)


def test_random_bytes_are_refused():
    """Noise of any length, with or without a true beginning, is not a container."""
    data, spec = record("exact", "dense")
    rng = random.Random(0)
    for n in [*range(64), 100, 1000, 5000]:
        for front in (0, 8, 16, 112):
            with pytest.raises(CodecError):
                decode_block(data[:front] + rng.randbytes(n), spec)


# Everything below writes correct checksums over wrong contents, as a hostile writer would.


class Surgery:
    """A container taken apart, to be put together again with other contents."""

    def __init__(self, data: bytes) -> None:
        fields = struct.unpack_from(FIXED, data)
        self.fixed = list(fields)
        tlv_bytes, sections = fields[9], fields[10]
        at = struct.calcsize(FIXED)
        self.tlv: list[tuple[int, bytes]] = []
        end = at + tlv_bytes
        while at < end:
            tag, n = struct.unpack_from("<HI", data, at)
            self.tlv.append((tag, data[at + 6 : at + 6 + n]))
            at += 6 + n
        self.rows = [list(struct.unpack_from(ROW, data, at + 48 * i)) for i in range(sections)]
        self.bodies = [data[row[3] : row[3] + row[4]] for row in self.rows]
        self.relayout = True
        self.fill = True  # sizes of the fixed fields and of the table follow the contents
        self.storage = True  # the storage fingerprint follows the header

    FIELD: dict[str, int] = {  # noqa: RUF012
        "version": 1,
        "flags": 2,
        "header_bytes": 3,
        "total_bytes": 4,
        "spec": 5,
        "storage": 6,
        "start": 7,
        "num_tokens": 8,
        "tlv_bytes": 9,
        "num_sections": 10,
        "num_layers": 11,
        "dtype": 12,
        "alignment": 13,
    }

    def set(self, **fields: int | bytes) -> "Surgery":
        for name, value in fields.items():
            self.fixed[self.FIELD[name]] = value
        return self

    def tag(self, tag: int, value: bytes | None) -> "Surgery":
        """Replace a tag's value, drop it (None), or add it."""
        kept = [(t, v) for t, v in self.tlv if t != tag]
        at = next((i for i, (t, _) in enumerate(self.tlv) if t == tag), len(kept))
        if value is not None:
            kept.insert(at, (tag, value))
        self.tlv = kept
        return self

    def _storage_fingerprint(self) -> bytes:
        """As docs/formats/block.md says, without kvlib."""

        def enc(value):
            if value is None:
                return b"n"
            if isinstance(value, int):
                return b"i" + struct.pack("<q", value)
            if isinstance(value, str):
                value, tag = value.encode("utf-8", "surrogatepass"), b"s"
                return tag + struct.pack("<Q", len(value)) + value
            if isinstance(value, bytes):
                return b"y" + struct.pack("<Q", len(value)) + value
            return b"l" + struct.pack("<Q", len(value)) + b"".join(map(enc, value))

        tags = dict(self.tlv)
        layers = tags.get(0x8003, b"")
        indices = tuple(
            int.from_bytes(layers[i : i + 2], "little") for i in range(0, len(layers), 12)
        )
        heads = tags.get(0x8006)

        def text(tag, default):
            return tags[tag].decode("utf-8", "replace") if tag in tags else default

        fields = (
            self.fixed[5],
            64,
            text(0x8001, ""),
            text(0x8005, "exact"),
            struct.unpack("<HH", heads) if heads is not None and len(heads) == 4 else None,
            indices,
            text(0x8004, ""),
        )
        preimage = b"kvlib\0\1\6" + b"".join(map(enc, fields))
        return blake2b(preimage, digest_size=32).digest()

    def build(self) -> bytes:
        tlv = b"".join(struct.pack("<HI", t, len(v)) + v for t, v in self.tlv)
        size = struct.calcsize(FIXED) + len(tlv) + 48 * len(self.rows) + 8
        unit = 1 << min(self.fixed[13], 16)
        body, end = b"", size
        for row, data in zip(self.rows, self.bodies, strict=True):
            offset = -(-end // unit) * unit
            body += bytes(offset - end) + data
            end = offset + len(data)
            row[6] = xxhash.xxh3_64_intdigest(data).to_bytes(8, "little") + bytes(8)
            if self.relayout:
                row[3], row[4] = offset, len(data)
        total = -(-end // unit) * unit
        body += bytes(total - end)
        if self.fill:
            self.set(
                header_bytes=size,
                total_bytes=total,
                tlv_bytes=len(tlv),
                num_sections=len(self.rows),
            )
        if self.storage:
            self.set(storage=self._storage_fingerprint())
        header = struct.pack(FIXED, *self.fixed) + tlv
        header += b"".join(struct.pack(ROW, *row) for row in self.rows)
        return header + xxhash.xxh3_64_intdigest(header).to_bytes(8, "little") + body


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("form", BLOCKS)
def test_surgery_is_faithful(codec, form):
    """Taken apart and put together unchanged, a container is the same bytes."""
    data, _ = record(codec, form)
    assert Surgery(data).build() == data


_INTERESTING = [0, 1, 2, 3, 7, 63, 64, 65, 127, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
_WIDE = [*_INTERESTING, 2**33, 2**63 - 1, 2**63, 2**64 - 1]
_LIMITS = {"version": 16, "flags": 16, "header_bytes": 32, "total_bytes": 64, "start": 64}
_LIMITS |= {"num_tokens": 32, "tlv_bytes": 32, "num_sections": 32, "num_layers": 16}
_LIMITS |= {"dtype": 8, "alignment": 8}


def _flip(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        act = rng.randrange(4)
        if out and act == 0:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif out and act == 1:
            out[rng.randrange(len(out))] = rng.choice([0, 1, 127, 128, 255])
        elif out and act == 2:
            del out[rng.randrange(len(out)) :][: rng.choice([1, 2, 4, 12])]
        else:
            at = rng.randrange(len(out) + 1)
            out[at:at] = rng.randbytes(rng.choice([1, 2, 4, 12]))
    return bytes(out)


def _mutate(rng: random.Random, surgery: Surgery) -> None:
    act = rng.randrange(9)
    if act == 0:
        name = rng.choice(list(_LIMITS))
        bits = _LIMITS[name]
        surgery.set(**{name: rng.choice(_WIDE) % (1 << bits)})
        surgery.fill = rng.random() < 0.3
    elif act == 1:
        i = rng.randrange(len(surgery.tlv))
        tag, value = surgery.tlv[i]
        surgery.tlv[i] = (tag, _flip(rng, value))
    elif act == 2:
        i = rng.randrange(len(surgery.tlv))
        tag = rng.choice([0x8001, 0x8002, 0x8003, 0x8004, 0x8005, 0x8006, 0x8007, 1, 2])
        value = rng.choice([b"", b"exact", struct.pack("<HH", 0, 1), rng.randbytes(12)])
        surgery.tlv.insert(i, (tag, value)) if rng.random() < 0.7 else surgery.tlv.pop(i)
    elif act == 3:
        row = rng.choice(surgery.rows)
        field, bits = rng.choice([(0, 16), (1, 16), (2, 32), (5, 64)])
        near = [row[field] + 1, row[field] - 1, row[field] ^ 1]
        row[field] = rng.choice([*_WIDE, *near]) % (1 << bits)
    elif act == 4:
        surgery.relayout = False
        row = rng.choice(surgery.rows)
        field = rng.choice([3, 4])
        row[field] = rng.choice([*_WIDE, row[field] + 8, row[field] - 8]) % (1 << 64)
    elif act in (5, 6, 7):
        i = rng.randrange(len(surgery.rows))
        surgery.bodies[i] = _flip(rng, surgery.bodies[i])
        if rng.random() < 0.5:
            surgery.rows[i][5] = len(surgery.bodies[i])
    else:
        i = rng.randrange(len(surgery.rows))
        if rng.random() < 0.5:
            del surgery.rows[i], surgery.bodies[i]
        else:
            j = rng.randrange(len(surgery.rows))
            surgery.rows[i], surgery.rows[j] = surgery.rows[j], surgery.rows[i]
            surgery.bodies[i], surgery.bodies[j] = surgery.bodies[j], surgery.bodies[i]


@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_mutations_under_correct_checksums(codec, form):
    """With all checksums made right again, a mutant decodes to a valid block or is a CodecError."""
    data, spec = record(codec, form)
    rng = random.Random(f"{codec} {form}")
    decoded = 0
    reasons = set()
    for _ in range(6000):
        surgery = Surgery(data)
        surgery.storage = rng.random() < 0.9
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if not surgery.rows or not surgery.tlv:
                break
            _mutate(rng, surgery)
        mutant = surgery.build()
        try:
            block = decode_block(mutant, spec, max_decoded_bytes=1 << 24)
        except CodecError as exc:
            reasons.add("".join(c for c in str(exc) if not c.isdigit())[:40])
            continue
        decoded += 1
        for layer in block.layers:
            layer.validate()
    assert decoded > 20, "no mutant reached the codec"
    assert len(reasons) > 20, "the mutants failed too early"


def exact_record(frame_parts: bytes, **fields: int) -> tuple[bytes, KVSpec]:
    """A float8 MLA record of one plane whose section is `frame_parts`."""
    layer = LayerSpec(kind="mla", num_kv_heads=1, k_head_dim=4, v_head_dim=0)
    spec = KVSpec(model_id="m", layers=(layer,), dtype="float8_e5m2")
    keys = torch.zeros((1, 64, 4)).to(torch.float8_e5m2)
    block = KVBlock.dense(spec, [(keys, keys[..., :0])])
    surgery = Surgery(b"".join(encode_block(block, build_codec("exact"))))
    surgery.bodies[0] = frame_parts
    surgery.set(**fields)
    for row in surgery.rows[:1]:
        row[5] = surgery.fixed[8] * 4
    return surgery.build(), spec


def test_known_bad_frames():
    """Compressed planes that are not exactly one frame of the right size are refused."""
    import zstandard

    good = zstandard.ZstdCompressor(level=1).compress(bytes(256))
    # Its header is the magic, a byte that says "one segment, two bytes of size", and the size; the
    # same blocks stand behind another header when that has a window instead.
    assert good[4:7] == b"\x60\0\0"
    windowed = good[:4] + b"\x40\x48" + good[5:]
    for frame in (good, windowed):
        data, spec = exact_record(struct.pack("<I", len(frame)) + frame)
        assert decode_block(data, spec).layers[0].keys.view(torch.uint8).count_nonzero() == 0
    data, spec = exact_record(struct.pack("<I", len(good)) + good + b"\0")
    with pytest.raises(CorruptDataError, match="follow the last plane"):
        decode_block(data, spec)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(256))
    dictionary = zstandard.ZstdCompressionDict(
        random.Random(0).randbytes(512), dict_type=zstandard.DICT_TYPE_RAWCONTENT
    )
    bad = {
        "empty": b"",
        "cut": good[:-1],
        "header only": good[:6],
        "trailing bytes": good + b"\0",
        "trailing frame": good + good,
        "skippable first": struct.pack("<II", 0x184D2A50, 4) + b"abcd" + good,
        "skippable only": struct.pack("<II", 0x184D2A50, 4) + b"abcd",
        "no content size": unsized,
        "too few": zstandard.compress(bytes(255)),
        "too many": zstandard.compress(bytes(257)),
        "8 GiB": b"\x28\xb5\x2f\xfd\xc0\x48" + struct.pack("<Q", 8 << 30) + good[7:],
        "2 GiB window": good[:4] + b"\x40\xa8" + good[5:],
        "16 MiB window": good[:4] + b"\x40\x70" + good[5:],
        "dictionary id": good[:4] + b"\x63\x01\0\0\0" + good[5:],
        "reserved bit": good[:4] + bytes([good[4] | 8]) + good[5:],
        "raw dictionary": zstandard.ZstdCompressor(dict_data=dictionary).compress(
            dictionary.as_bytes()[:256]
        ),
        "noise": good[:4] + random.Random(1).randbytes(40),
    }
    for frame in bad.values():
        data, spec = exact_record(struct.pack("<I", len(frame)) + frame)
        with pytest.raises(CorruptDataError):
            decode_block(data, spec)
    for words in (len(good) + 1, len(good) - 1, 1 << 30, len(good) | 1 << 31, 0):
        data, spec = exact_record(struct.pack("<I", words) + good)
        with pytest.raises(CorruptDataError):
            decode_block(data, spec)


def test_overlapping_and_gapped_sections():
    """Sections that overlap, leave a gap, or run backwards are refused before being read."""
    data, spec = record("exact", "dense")
    for change in (
        lambda s: s.rows[1].__setitem__(3, s.rows[0][3]),
        lambda s: s.rows[1].__setitem__(3, s.rows[1][3] + 8),
        lambda s: s.rows[1].__setitem__(3, s.rows[1][3] - 8),
        lambda s: s.rows[0].__setitem__(3, 0),
        lambda s: s.rows[0].__setitem__(4, s.rows[0][4] + 8),
        lambda s: s.rows[-1].__setitem__(4, s.rows[-1][4] + 8),
        lambda s: s.rows[-1].__setitem__(4, 2**64 - 1),
        lambda s: s.rows[-1].__setitem__(3, 2**64 - 8),
    ):
        surgery = Surgery(data)
        surgery.relayout = False
        change(surgery)
        with pytest.raises(CorruptDataError, match=r"tile|end at"):
            decode_block(surgery.build(), spec)


def test_gaps_of_zeros():
    """Sections must begin at the next multiple of the alignment: not later, and not between."""
    data, spec = record("exact", "dense")
    whole = Surgery(data)
    for gap in (8, 64, 4):
        for at in range(len(whole.rows)):
            surgery = Surgery(data)
            surgery.relayout = False
            for row in surgery.rows[at:]:
                row[3] += gap
            surgery.build()
            surgery.fill = False
            surgery.set(total_bytes=surgery.fixed[4] + gap)
            header = surgery.build()[: surgery.fixed[3]]
            old = whole.rows[at][3]
            mutant = header + data[surgery.fixed[3] : old] + bytes(gap) + data[old:]
            with pytest.raises(CorruptDataError, match=r"tile|end at"):
                decode_block(mutant, spec)


def test_contradicting_headers():
    """Flags, fingerprints, keys, heads, dtype and layers must agree among themselves."""
    data, spec = record("exact", "dense")
    layers = dict(Surgery(data).tlv)[0x8003]

    def layer(i: int, at: int, value: int) -> bytes:
        out = bytearray(layers)
        struct.pack_into("<H", out, 12 * i + at, value)
        return bytes(out)

    corrupt = [
        Surgery(data).set(flags=0),
        Surgery(data).set(flags=1 | 16),
        Surgery(data).set(dtype=1),
        Surgery(data).set(dtype=99),
        Surgery(data).set(num_tokens=17),
        Surgery(data).set(num_tokens=0),
        Surgery(data).set(start=2**31 - 15),
        Surgery(data).set(start=2**64 - 1),
        Surgery(data).set(alignment=2),
        Surgery(data).set(num_layers=1),
        Surgery(data).tag(0x8001, None),
        Surgery(data).tag(0x8002, None),
        Surgery(data).tag(0x8003, None),
        Surgery(data).tag(0x8001, b"exact@1\xff"),
        Surgery(data).tag(0x8002, bytes(31)),
        Surgery(data).tag(0x8002, bytes(64)),
        Surgery(data).tag(0x8006, struct.pack("<HH", 1, 1)),
        Surgery(data).tag(0x8006, struct.pack("<HH", 0, 1)),
        Surgery(data).tag(0x8006, struct.pack("<HH", 0, 2)),
        Surgery(data).tag(0x8006, struct.pack("<HH", 1, 3)),
        Surgery(data).tag(0x8006, b"\0"),
        Surgery(data).tag(0x8003, layer(1, 0, 0)),  # layer 0 twice
        Surgery(data).tag(0x8003, layer(1, 0, 2)),  # beyond the model
        Surgery(data).tag(0x8003, layer(0, 2, 65535)),  # heads
        Surgery(data).tag(0x8003, layer(0, 2, 1)),
        Surgery(data).tag(0x8003, layer(0, 2, 0)),
        Surgery(data).tag(0x8003, layer(0, 4, 4)),  # widths
        Surgery(data).tag(0x8003, layer(0, 6, 0)),
        Surgery(data).tag(0x8003, layer(0, 8, 2)),  # channels without a list
        Surgery(data).tag(0x8003, layer(0, 10, 2)),  # a sliding layer
        Surgery(data).tag(0x8003, layer(0, 10, 0x101)),  # reserved byte
    ]
    for surgery in corrupt:
        with pytest.raises(CorruptDataError):
            decode_block(surgery.build(), spec)
    incompatible = [
        Surgery(data).set(version=2),
        Surgery(data).set(flags=1 | 64),
        Surgery(data).set(flags=1 | 2),
        Surgery(data).set(flags=1 | 4),
        Surgery(data).set(flags=1 | 8),
        Surgery(data).set(spec=bytes(32)),
        Surgery(data).tag(0x8004, b"profile"),
        Surgery(data).tag(0x8007, b""),
        Surgery(data).tag(0x8001, b"exact@3"),
        Surgery(data).tag(0x8001, b"exact"),
        Surgery(data).tag(0x8001, b"nothing@1"),
        Surgery(data).tag(0x8001, b"int4@1"),
        Surgery(data).tag(0x8001, b"int4@1:group=0"),
        Surgery(data).tag(0x8001, b"int4@1:group=032"),
        Surgery(data).tag(0x8001, b"os:system"),
        Surgery(data).tag(0x8001, b""),
        Surgery(data).tag(0x8003, layer(0, 10, 9)),  # a kind of layer yet unknown
    ]
    for surgery in incompatible:
        with pytest.raises(IncompatibleDataError):
            decode_block(surgery.build(), spec)
    storage = Surgery(data).set(storage=bytes(32))
    storage.storage = False
    with pytest.raises(CorruptDataError, match="storage fingerprint"):
        decode_block(storage.build(), spec)


def test_side_sections_must_make_sense():
    """Positions, weights, channels and row lengths with impossible contents are refused."""
    data, spec = record("exact", "ragged")
    kinds = {row[0]: i for i, row in enumerate(Surgery(data).rows)}

    def with_section(kind: int, body: bytes) -> bytes:
        surgery = Surgery(data)
        surgery.bodies[kinds[kind]] = body
        surgery.rows[kinds[kind]][5] = len(body)
        return surgery.build()

    good = {
        3: struct.pack("<4i", 70, 75, -1, 66),
        4: struct.pack("<4f", 1, 0, 0, 0),
        5: struct.pack("<4H", 0, 1, 1, 2),
        6: struct.pack("<2I", 3, 1),
    }
    for kind, body in good.items():
        assert decode_block(with_section(kind, body), spec).num_tokens == 16
    bad = {
        3: [
            struct.pack("<4i", *p)
            for p in (
                (75, 70, -1, 66),
                (70, 70, -1, 66),
                (70, -1, 75, 66),
                (70, 75, -2, 66),
                (70, 75, -1, 80),
                (63, 75, -1, 66),
                (70, 75, -(2**31), 66),
            )
        ]
        + [b"", good[3][:-4], good[3] + bytes(4), good[3][:-1]],
        4: [struct.pack("<4f", *w) for w in ((float("nan"), 0, 0, 0), (0, 0, 0, float("-inf")))]
        + [b"", good[4][:-1], good[4] + bytes(4)],
        5: [struct.pack("<4H", *c) for c in ((1, 0, 0, 1), (0, 0, 0, 1), (0, 3, 0, 1))]
        + [b"", good[5][:-2], good[5] + bytes(2)],
        6: [
            struct.pack("<2I", *n)
            for n in ((1, 1), (4, 1), (2**32 - 1, 2**32 - 1), (2**32 - 1, 5), (0, 0))
        ]
        + [b"", good[6][:-1], good[6] + bytes(4)],
    }
    for kind, bodies in bad.items():
        for body in bodies:
            with pytest.raises(CorruptDataError):
                decode_block(with_section(kind, body), spec)
    for kind, i in kinds.items():
        surgery = Surgery(data)
        if kind == 4:
            continue  # weights are optional
        del surgery.rows[i], surgery.bodies[i]
        with pytest.raises(CorruptDataError):
            decode_block(surgery.build(), spec)


LIMITED = """
import resource, sys, time
sys.path[:0] = {path!r}
from kvlib.codecs import decode_block
from kvlib.errors import CapacityError, CodecError
import kvlib.codecs.exact, kvlib.codecs.integer, kvlib.codecs.kvlc_kernels
kvlib.codecs.kvlc_kernels.kernels()
cases = {cases!r}
from kvlib.spec import KVSpec, LayerSpec
def spec_of(k):
    layer = LayerSpec(kind="mla", num_kv_heads=1, k_head_dim=k, v_head_dim=0)
    return KVSpec(model_id="m", layers=(layer,), dtype="float8_e5m2")
def wide():
    layer = LayerSpec(num_kv_heads=65535, k_head_dim=65535, v_head_dim=65535)
    return KVSpec(model_id="m", layers=(layer,), dtype="float16")
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, data, kind in cases:
    spec = wide() if kind == "wide" else spec_of(kind)
    begin = time.monotonic()
    try:
        decode_block(data, spec)
    except (CodecError, CapacityError) as exc:
        seen = type(exc).__name__
    else:
        seen = "decoded"
    print(name, seen, "slow" if time.monotonic() - begin > 2 else "fast", sep=chr(9))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc are Linux's")
def test_claims_cost_no_memory():
    """Records that claim gigabytes are refused within 256 MiB and in little time."""
    import zstandard

    good = zstandard.ZstdCompressor(level=1).compress(bytes(256))
    expected: dict[str, set[str]] = {}
    cases: list[tuple[str, bytes, int | str]] = []

    def add(name: str, data: bytes, *outcomes: str, kind: int | str = 4) -> None:
        expected[name] = set(outcomes)
        cases.append((name, data, kind))

    def framed(frame: bytes, **fields: int) -> bytes:
        return exact_record(struct.pack("<I", len(frame)) + frame, **fields)[0]

    corrupt = "CorruptDataError"
    magic = b"\x28\xb5\x2f\xfd"
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    add("control", framed(good), "decoded")
    for size in (8 << 30, 1 << 40, 2**63, 2**64 - 3):
        add(f"declares {size}", framed(magic + b"\xc0\x48" + struct.pack("<Q", size)), corrupt)
    add("honest bomb in a small layer", framed(bomb), corrupt)
    add("window 2 GiB", framed(magic + b"\x40\xa8" + good[5:]), corrupt)
    add("window 3.75 TiB", framed(magic + b"\x40\xff" + good[5:]), corrupt)
    skippable = struct.pack("<II", 0x184D2A50, 2**32 - 1)
    add("skippable 4 GiB", framed(skippable + good), corrupt)
    add("second frame", framed(good + bomb), corrupt)
    # Claims that are consistent with themselves and below the limit of 4 GiB.
    tokens = 1 << 29
    small_window = magic + b"\x80\x48" + struct.pack("<I", (tokens * 4) & 0xFFFFFFFF) + good[7:]
    add("2 GiB of keys", framed(small_window, num_tokens=tokens), "CapacityError")
    half = 40 << 20  # 160 MiB of keys fit, the plane beside them does not
    frame = magic + b"\x80\x48" + struct.pack("<I", half * 4) + good[7:]
    add("160 MiB twice", framed(frame, num_tokens=half), "CapacityError")
    for tokens in (1 << 30, 2**31, 2**32 - 1):
        frame = magic + b"\xc0\x48" + struct.pack("<Q", tokens * 4) + good[7:]
        add(f"{tokens} tokens", framed(frame, num_tokens=tokens), corrupt, "CapacityError")
    for raw in (2**63, 2**64 - 1, (4 << 30) + 1, 4 << 30):
        surgery = Surgery(framed(good))
        surgery.rows[0][5] = raw
        add(f"raw_bytes {raw}", surgery.build(), corrupt)
    layer = LayerSpec(num_kv_heads=65535, k_head_dim=65535, v_head_dim=65535)
    spec = KVSpec(model_id="m", layers=(layer,), dtype="float16")
    empty = torch.empty((65535, 0, 65535), dtype=torch.float16)
    for codec in CODEC_NAMES:
        data = b"".join(encode_block(KVBlock.dense(spec, [(empty, empty)]), build_codec(codec)))
        add(f"{codec}: 65535 heads, 0 tokens", data, "decoded", kind="wide")
        for tokens in (1, 2**31 - 1):
            for raw in (65535 * 65535 * 2 * tokens, 2 << 30):
                surgery = Surgery(data).set(num_tokens=tokens)
                for row in surgery.rows:
                    row[2], row[5] = 0, raw % 2**64
                add(f"{codec}: 65535 heads {tokens} {raw}", surgery.build(), corrupt, kind="wide")
    script = LIMITED.format(path=[p for p in sys.path if p], cases=cases)
    done = subprocess.run(
        [sys.executable, "-"],
        input=textwrap.dedent(script),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = {line.split("\t")[0]: line.split("\t")[1:] for line in done.stdout.splitlines()}
    assert set(seen) == set(expected)
    for name, (outcome, speed) in seen.items():
        assert outcome in expected[name], name
        assert speed == "fast", name


def test_header_is_small_whatever_it_claims():
    """A header that claims more than 64 KiB, or more than is there, is refused by its size."""
    data, spec = record("exact", "dense")
    for size in (0, 119, 65537, 2**31, 2**32 - 1, len(data) + 1):
        mutant = bytearray(data)
        struct.pack_into("<I", mutant, 12, size)
        with pytest.raises(CorruptDataError, match="header of"):
            decode_block(mutant, spec)


def test_other_spec_is_refused_before_the_codec_runs():
    """A record of another model or dtype is incompatible, not corrupt."""
    data, _ = record("int4", "dense")
    for spec in (tiny_spec(), small_spec("float32"), small_spec("bfloat16")):
        with pytest.raises(IncompatibleDataError, match="another model"):
            decode_block(data, spec)
