# SPDX-License-Identifier: Apache-2.0
"""The bytes of a segment store, checked against docs/formats/segments.md by hand."""

import importlib
import struct
import sys
from pathlib import Path
from types import ModuleType

import pytest
import xxhash

from kvlib.errors import ConfigError, CorruptDataError, IncompatibleDataError
from kvlib.store.segment_format import (
    Entry,
    Extent,
    Super,
    granules_of,
    pack_entry,
    pack_header,
    parse_header_page,
    unpack_entry,
)
from kvlib.store.segments import SegmentStore
from kvlib.testing.records import make_record

STORE = Super(bytes(range(16)), 8192)
NAME = bytes(range(64))
ENTRY = Entry(20000, 77, 0, (Extent(3, 5, 2), Extent(0, 9, 1)), 1_700_000_000_123, b"tenant#1")


def test_a_header_page_is_what_the_document_says():
    """Built here from the document's table alone."""
    page = b"\x89KVSEG\r\n" + struct.pack("<HHI", 2, 2, 8192) + bytes(range(16)) + NAME
    page += struct.pack("<QQQ", 77, 20000, 1_700_000_000_123) + b"tenant#1"
    page += struct.pack("<6I", 3, 5, 2, 0, 9, 1)
    page += bytes(4088 - len(page))
    page += struct.pack("<Q", xxhash.xxh3_64_intdigest(page))
    assert pack_header(STORE, NAME, ENTRY) == page
    assert parse_header_page(memoryview(page), STORE) == (NAME, ENTRY)


def test_every_flipped_bit_of_a_header_page_is_found():
    """All 32,768 of them."""
    page = bytearray(pack_header(STORE, NAME, ENTRY))
    for bit in range(8 * len(page)):
        page[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            parse_header_page(memoryview(page), STORE)
        page[bit // 8] ^= 1 << bit % 8
    assert parse_header_page(memoryview(page), STORE) == (NAME, ENTRY)


def resealed(page: bytes) -> memoryview:
    body = page[:4088]
    return memoryview(body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)))


def test_intact_pages_of_others_are_refused():
    """Another version, store, granule, or sizes that contradict each other."""
    page = pack_header(STORE, NAME, ENTRY)
    with pytest.raises(IncompatibleDataError, match="version 3"):
        parse_header_page(resealed(page[:8] + b"\3\0" + page[10:]), STORE)
    for other in (Super(bytes(16), 8192), Super(STORE.uuid, 4096)):
        with pytest.raises(CorruptDataError):
            parse_header_page(memoryview(page), other)
    for count in (0, 3, 5, 65535):
        with pytest.raises(CorruptDataError):
            parse_header_page(resealed(page[:10] + struct.pack("<H", count) + page[12:]), STORE)
    with pytest.raises(CorruptDataError):
        parse_header_page(memoryview(page)[:4095], STORE)


def test_every_flipped_bit_of_a_row_or_its_key_is_found():
    """The checksum of a row covers its key, so a row under another key is damaged, too."""
    row = pack_entry(NAME, ENTRY)
    for bit in range(8 * len(row)):
        bad = bytearray(row)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            unpack_entry(NAME, bytes(bad))
    for bit in range(8 * len(NAME)):
        bad = bytearray(NAME)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            unpack_entry(bytes(bad), row)
    for cut in range(len(row)):
        with pytest.raises(CorruptDataError):
            unpack_entry(NAME, row[:cut])
    assert unpack_entry(NAME, row) == ENTRY


def test_super_is_what_the_document_says():
    """Four lines of text, the last one their checksum; every flipped bit is found."""
    text = b"kvlib segment store 2\nuuid 000102030405060708090a0b0c0d0e0f\ngranule 8192\n"
    whole = text + f"xxh3 {xxhash.xxh3_64_intdigest(text):016x}\n".encode()
    assert STORE.to_bytes() == whole
    assert Super.parse(whole, "SUPER") == STORE
    for bit in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ConfigError, IncompatibleDataError)):
            Super.parse(bytes(bad), "SUPER")
    for cut in range(len(whole)):
        with pytest.raises((ConfigError, IncompatibleDataError)):
            Super.parse(whole[:cut], "SUPER")


def test_a_record_takes_whole_granules_with_its_header_page():
    """4096 bytes for the page, then the container."""
    assert [granules_of(n, 4096) for n in (0, 1, 4096, 4097)] == [1, 2, 2, 3]
    assert [granules_of(n, 65536) for n in (0, 61440, 61441)] == [1, 1, 2]


def outsider_store() -> ModuleType:
    """The reader that was written from the document alone."""
    folder = str(Path(__file__).resolve().parents[1] / "golden")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("outsider_store")


def test_an_outsider_finds_what_is_stored(tmp_path):
    """A reader that knows the document alone finds every record, split ones included."""
    records = [make_record(seed, size=2500 * seed) for seed in range(9)]
    with SegmentStore(tmp_path / "kv", capacity=70 * 4096, segment=9 * 4096) as store:
        for record in records:
            assert store.put(*record)
        for key, _ in records[1:4]:
            store.delete(key)
        for record in (make_record(20, size=30_000), make_record(21, size=7000)):
            assert store.put(*record)
            records.append(record)
        held = set(store.keys())
        assert any(len(store._room.lookup(key.to_bytes()).extents) > 1 for key in held)
    found, _ = outsider_store().read_segments(tmp_path / "kv")
    whole = {key.to_bytes(): b"".join(parts) for key, parts in records}
    assert {key.to_bytes() for key in held} <= found.keys() <= whole.keys()
    for key in held:
        assert found[key.to_bytes()] == whole[key.to_bytes()]
