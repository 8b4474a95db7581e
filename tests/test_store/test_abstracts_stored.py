# SPDX-License-Identifier: Apache-2.0
"""Abstracts kept by a store: the same bits as from the keys, or none."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlib import KVStore
from kvlib.codecs.container import (
    Container,
    Flag,
    Section,
    SectionFlag,
    SectionKind,
    build_container,
)
from kvlib.errors import ConfigError, ShapeError
from kvlib.keys import StoreKey
from kvlib.spec import storage_fingerprint
from kvlib.store.abstract_records import Abstracts
from kvlib.store.abstracts import AbstractForm, Boxes
from kvlib.store.abstracts_pq import Codebook, Codes
from kvlib.store.archive import export_records, import_records
from kvlib.store.kept import make_kept, open_kept
from kvlib.store.selecting import SELECTORS, HeadShape, Selection
from kvlib.store.upkeep import summarize
from kvlib.testing.models import random_block, tiny_spec
from tests.oracles import selecting as oracle

SPEC = tiny_spec()
HEADS, DIM, LAYERS = 2, 8, 2
SHAPE = HeadShape(4, HEADS, DIM, 1.0)
BOXES = Boxes.form("int8", 16)
TIERS = ["memory", "file", "segment"]
MAC = bytes(range(32))
GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def outsider():
    """The reader of abstracts that shares no code with kvlib."""
    for name in ("outsider", "outsider_abstracts"):
        if name not in sys.modules:
            found = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
            module = importlib.util.module_from_spec(found)
            sys.modules[name] = module
            found.loader.exec_module(module)
    return sys.modules["outsider_abstracts"]


def keys_of(num_blocks, seed=0, spec=SPEC, store=None):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (num_blocks * 64,), generator=g)
    with KVStore(memory="1MiB") as any_store:
        return (store or any_store).block_keys(spec, ids)


def boxes_of(block, form=BOXES, dtype="int8", leaf=16):
    rows = []
    for layer in block.layers:
        boxes = Boxes(HEADS, DIM, leaf=leaf, dtype=dtype)
        boxes.append(layer.keys)
        rows.append(boxes.take(0, len(boxes)))
    return Abstracts(form, block.start, tuple(rows))


def open_store(tier, path, **options):
    if tier == "memory":
        return KVStore(memory="8MiB", **options)
    return KVStore(path / "kv", memory=0, disk="8MiB", tier=tier, **options)


def same(a, b):
    return (a.form, a.start) == (b.form, b.start) and all(
        torch.equal(x, y) for x, y in zip(a.layers, b.layers, strict=True)
    )


@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(["int8", "bfloat16", "float32"]),
    leaf=st.sampled_from([1, 16, 32]),
    cut=st.integers(0, 4),
    more=st.integers(0, 40),
)
@settings(max_examples=40)
def test_boxes_come_back_bit_for_bit(seed, dtype, leaf, cut, more):
    """Taken out, put back and continued: as if the keys had been given."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(3 * torch.randn(2, 1, 8, generator=g))
    keys = torch.randn(2, 4 * leaf + more, 8, generator=g) * sizes
    whole, again = (Boxes(2, 8, leaf=leaf, dtype=dtype) for _ in range(2))
    whole.append(keys)
    rows = whole.take(0, cut)
    again.extend(rows)
    again.append(keys[:, cut * leaf :])
    assert again.num_tokens == whole.num_tokens
    for x, y in zip(whole.bounds(), again.bounds(), strict=True):
        assert torch.equal(x, y)
    assert rows.shape == (cut, Boxes.form(dtype, leaf).row_bytes(2, 8))
    if more % leaf:
        with pytest.raises(ShapeError, match="after"):
            again.extend(rows)


def test_the_row_of_the_documentation():
    """docs/formats/container.md writes it out."""
    boxes = Boxes(1, 2)
    boxes.append(torch.stack([torch.arange(16) / 8 - 1, torch.full((16,), 3.0)], 1)[None])
    assert bytes(boxes.take(0, 1).numpy().tobytes()).hex() == "fb20a01c60"
    text = Path(__file__).resolve().parents[2] / "docs/formats/container.md"
    assert "fb 20 a0 1c 60" in text.read_text()


@pytest.mark.parametrize("rows", [torch.zeros(1, 33), torch.zeros(34)])
def test_rows_of_another_size_are_refused(rows):
    boxes = Boxes(2, 8)
    with pytest.raises(ShapeError):
        boxes.extend(rows.byte())
    book = Codebook(torch.zeros(2, 8), *torch.zeros(2, 2, 8, 8), torch.zeros(2, 4, 256, 2))
    with pytest.raises(ShapeError):
        Codes(book).extend(rows.byte())


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("mac_key", [None, MAC])
def test_every_tier_keeps_them(tmp_path, tier, mac_key):
    """They come back bit for bit, with or without the blocks, also after the store was closed."""
    block = random_block(SPEC, 6 * 64)
    mine = boxes_of(block)
    with open_store(tier, tmp_path, mac_key=mac_key) as store:
        keys = keys_of(6, store=store)
        assert store.load_abstracts(SPEC, keys, BOXES) is None
        assert store.put_abstracts(SPEC, keys, mine) == 6
        assert store.put_abstracts(SPEC, keys, mine) == 0
        assert store.match(SPEC, keys) == 0
        assert same(store.load_abstracts(SPEC, keys, BOXES), mine)
        assert store.put(SPEC, keys, block).stored_blocks == 6
        assert store.load(SPEC, keys).num_blocks == 6
        later = store.load_abstracts(SPEC, keys, BOXES, start=4)
        assert same(later, mine.slice(256, 384))
        part = store.load_abstracts(SPEC, keys[:3], BOXES)
        assert same(part, mine.slice(0, 192))
        assert not store.check()[store._stack.tiers[0].name].problems
    if tier != "memory":
        with open_store(tier, tmp_path, mac_key=mac_key) as store:
            assert same(store.load_abstracts(SPEC, keys, BOXES), mine)


def record_of(store, keys, form=BOXES):
    """Name and bytes of the record of the first of these blocks."""
    storage = storage_fingerprint(SPEC, form.text, profile=form.profile)
    key = StoreKey(keys[0], storage)
    data, _ = store._stack.read(key)
    return key, bytes(data)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("mac_key", [None, MAC])
def test_an_outsider_reads_boxes(tmp_path, dtype, mac_key):
    """From the page alone; lo and hi enclose the keys as the oracle has them."""
    form, block = Boxes.form(dtype, 32), random_block(SPEC, 256)
    with open_store("memory", tmp_path, mac_key=mac_key) as store:
        keys = keys_of(4, store=store)
        store.put_abstracts(SPEC, keys, boxes_of(block, form, dtype, 32))
        _, data = record_of(store, keys, form)
    header, layers = outsider().decode(data, mac_key)
    assert [bytes.fromhex(x) for x in header["keys"]] == list(keys)
    assert (header["fidelity"], header["start"]) == ("exact", 0)
    for (lo, hi), layer in zip(layers, block.layers, strict=True):
        true_lo, true_hi = oracle.boxes(layer.keys.numpy(), 32)
        slack = 0 if dtype == "float32" else 0.07
        assert (lo <= true_lo).all()
        assert (hi >= true_hi).all()
        assert (lo >= true_lo - slack).all()
        assert (hi <= true_hi + slack).all()


def test_an_outsider_reads_codes():
    g = torch.Generator().manual_seed(1)
    rows = tuple(
        torch.randint(0, 256, (64, 2 * 4), generator=g, dtype=torch.uint8) for _ in range(2)
    )
    form = Codes.form(4, "a" * 16)
    with open_store("memory", None) as store:
        keys = keys_of(1, store=store)
        store.put_abstracts(SPEC, keys, Abstracts(form, 0, rows))
        _, data = record_of(store, keys, form)
    header, layers = outsider().decode(data)
    assert header["profile"] == "a" * 16
    for found, given_rows in zip(layers, rows, strict=True):
        np.testing.assert_array_equal(found, given_rows.numpy().reshape(64, 2, 4))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("boxes-int8", BOXES),
        ("boxes-bfloat16", Boxes.form("bfloat16", 32)),
        ("codes", Codes.form(4, "0123456789abcdef")),
    ],
)
def test_what_was_written_once_is_read_for_ever(name, form):
    """Golden records, of one block each: names and bytes stay what they were."""
    data = (GOLDEN / "abstracts" / "v1" / f"{name}.kvlc").read_bytes()
    header, layers = outsider().decode(data)
    key = StoreKey(*(bytes.fromhex(x) for x in (header["keys"][0], header["storage_fingerprint"])))
    with open_store("memory", None) as store:
        assert store._stack.put(key, [data], persistent=None)
        found = store.load_abstracts(SPEC, keys_of(1, store=store), form)
        assert found.num_tokens == 64
    for rows, given_rows in zip(found.layers, layers, strict=True):
        if name == "codes":
            np.testing.assert_array_equal(rows.numpy().reshape(64, 2, 4), given_rows)
            continue
        boxes = Boxes(HEADS, DIM, leaf=form.unit, dtype=form.text.partition("=")[2].split(",")[0])
        boxes.extend(rows)
        for bound, given_bound in zip(boxes.bounds(), given_rows, strict=True):
            np.testing.assert_array_equal(bound.numpy(), given_bound)


def test_whatever_differs_is_a_miss():
    """Form, codebooks, fidelity, salt, model: others' abstracts are not there."""
    block = random_block(SPEC, 64)
    with open_store("memory", None) as store:
        keys = keys_of(1, store=store)
        store.put_abstracts(SPEC, keys, boxes_of(block))
        for form in (Boxes.form("bfloat16", 16), Boxes.form("int8", 32), Codes.form(4, "b" * 16)):
            assert store.load_abstracts(SPEC, keys, form) is None
        assert store.load_abstracts(SPEC, keys, BOXES, fidelity="int8@1:group=64") is None
        assert store.load_abstracts(SPEC, keys_of(1, seed=1, store=store), BOXES) is None
        other = tiny_spec(model_id="other")
        assert store.load_abstracts(other, keys_of(1, spec=other, store=store), BOXES) is None
        codes = Abstracts(Codes.form(1, "a" * 16), 0, (torch.zeros(64, 2).byte(),) * 2)
        store.put_abstracts(SPEC, keys, codes)
        assert store.load_abstracts(SPEC, keys, codes.form) is not None
        assert store.load_abstracts(SPEC, keys, Codes.form(1, "b" * 16)) is None
        assert store.stats().corrupt_records == 0


def test_wrong_rows_are_refused():
    block = random_block(SPEC, 128)
    mine = boxes_of(block)
    with open_store("memory", None) as store:
        keys = keys_of(2, store=store)
        for wrong in (
            Abstracts(BOXES, 0, mine.layers[:1]),
            Abstracts(BOXES, 0, tuple(x[:-1] for x in mine.layers)),
            Abstracts(BOXES, 32, mine.layers),
            Abstracts(BOXES, 64, mine.layers),
            Abstracts(BOXES, 0, tuple(x.view(torch.int8) for x in mine.layers)),
            Abstracts(BOXES, 0, (mine.layers[0], mine.layers[1][:, :-1])),
            Abstracts(BOXES, 0, ()),
        ):
            with pytest.raises(ShapeError, match="cannot store abstracts"):
                store.put_abstracts(SPEC, keys, wrong)


@pytest.mark.parametrize("tier", TIERS)
def test_a_flipped_byte_anywhere_costs_only_the_abstracts(tmp_path, tier):
    """Right ones or none, never others; the blocks are there, and the damage is counted."""
    block = random_block(SPEC, 64)
    mine = boxes_of(block)
    with open_store(tier, tmp_path) as store:
        keys = keys_of(1, store=store)
        store.put(SPEC, keys, block)
        store.put_abstracts(SPEC, keys, mine)
        key, data = record_of(store, keys)
        tail = 32 if tier == "file" else 0  # a file ends with the record's terms
        lost = 0
        (medium,) = store._stack.tiers
        for at in range(len(data) + tail):
            flip(store, tmp_path / "kv", tier, key, data, at)
            found = store.load_abstracts(SPEC, keys, BOXES)
            assert found is None or same(found, mine), at
            lost += found is None
            medium.delete(key)  # one that seems to be of a later version is left where it is
            store._directory.forget(key)
            assert store.put_abstracts(SPEC, keys, mine) == 1
        assert lost >= len(data)
        stats = store.stats()
        counted = stats.tiers[medium.name]
        assert stats.corrupt_records + counted.corrupt + counted.errors >= len(data)
        loaded = store.load(SPEC, keys)
        assert loaded.num_blocks == 1
        assert torch.equal(loaded.block.layers[1].keys, block.layers[1].keys)


def flip(store, path, tier, key, data, at):
    """Flip the lowest bit of a byte of a record where it lies."""
    if tier == "memory":
        (held,) = store._stack.tiers
        held._records[key] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        return
    if tier == "file":
        (file,) = path.glob(f"*/{key.to_bytes().hex()}.kvlc")
        offset = at
    else:
        (file,) = path.glob("seg-*.kv")
        # Old copies stay in free granules, flipped somewhere: the whole one is the record.
        offset = file.read_bytes().index(data) + at
    with file.open("r+b") as out:
        out.seek(offset)
        byte = out.read(1)[0]
        out.seek(offset)
        out.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "what", ["size", "codec", "start", "layers", "profile", "flags", "dtype", "kind"]
)
def test_a_record_that_contradicts_its_name_is_dropped(what):
    """Sound sums over wrong contents: counted, dropped and a miss."""
    with open_store("memory", None) as store:
        keys = keys_of(1, store=store)
        store.put_abstracts(SPEC, keys, boxes_of(random_block(SPEC, 64)))
        key, data = record_of(store, keys)
        store._stack.delete(key)
        header = Container(data).header
        size = 4 * BOXES.row_bytes(HEADS, DIM) - (what == "size")
        raw = SectionFlag.RAW
        kind = SectionKind.KEYS if what == "kind" else SectionKind.CODEC
        layers = header.layers[: 1 if what == "layers" else 2]
        parts = build_container(
            [Section(kind, layer.layer_idx, size, (bytes(size),), raw) for layer in layers],
            spec_fingerprint=header.spec_fingerprint,
            storage_fingerprint=header.storage_fingerprint,
            start=64 * (what == "start"),
            num_tokens=64,
            dtype_code=header.dtype_code + (what == "dtype"),
            flags=Flag(what == "flags"),
            codec=header.codec + ("x" if what == "codec" else ""),
            profile="p" if what == "profile" else "",
            layers=layers,
            keys=keys,
        )
        assert store._stack.put(key, parts, persistent=None)
        assert store.load_abstracts(SPEC, keys, BOXES) is None
        assert store.stats().corrupt_records == 1
        assert store._stack.tiers[0].size(key) is None


@pytest.mark.parametrize("tier", TIERS)
def test_their_bytes_are_counted_and_bounded(tmp_path, tier):
    """As those of any record: physical bytes, capacity, no error for want of room."""
    with open_store(tier, tmp_path) as store:
        keys = keys_of(4, store=store)
        store.put_abstracts(SPEC, keys, boxes_of(random_block(SPEC, 256)))
        _, data = record_of(store, keys)
        used = store.stats().tiers[store._stack.tiers[0].name].used_bytes
        assert used >= len(data) >= 16 * 2 * BOXES.row_bytes(HEADS, DIM)
        if tier == "memory":
            assert used == len(data)
    with KVStore(memory=len(data) + 100) as store:
        assert store.put_abstracts(SPEC, keys, boxes_of(random_block(SPEC, 256))) == 4
        assert store.put_abstracts(SPEC, keys_of(4, 9), boxes_of(random_block(SPEC, 256))) == 4
        assert store.load_abstracts(SPEC, keys, BOXES) is None
        assert store.stats().tiers["memory"].used_bytes == len(data)
    with KVStore(memory=len(data) - 1) as store:
        assert store.put_abstracts(SPEC, keys, boxes_of(random_block(SPEC, 256))) == 0


@pytest.mark.parametrize(("source", "target"), [("segment", "file"), ("file", "segment")])
def test_archives_carry_them(tmp_path, source, target):
    """From one tier on disk to another."""
    block = random_block(SPEC, 256)
    with open_store(source, tmp_path / "a") as store:
        keys = keys_of(4, store=store)
        store.put(SPEC, keys, block)
        store.put_abstracts(SPEC, keys, boxes_of(block))
    archive = io.BytesIO()
    with open_kept(tmp_path / "a" / "kv") as kept:
        assert export_records(kept, archive).records == 2
        found = summarize(kept)
        assert (found.records, found.tokens) == (2, 256)  # abstracts hold no tokens
        assert found.codecs == {"exact@2": 1, BOXES.text: 1}
    make_kept(tmp_path / "b" / "kv", target).close()
    with open_kept(tmp_path / "b" / "kv", records=2, nbytes=len(archive.getvalue())) as kept:
        assert import_records(kept, archive).stored == 2
    with open_store(target, tmp_path / "b") as store:
        assert same(store.load_abstracts(SPEC, keys, BOXES), boxes_of(block))
        assert store.load(SPEC, keys).num_blocks == 4


def test_ranks_of_an_engine_keep_their_own():
    """A head range has abstracts of its heads."""
    with KVStore(memory="1MiB", head_range=(0, 1)) as store:
        keys = keys_of(1, store=store)
        rows = tuple(torch.ones(4, BOXES.row_bytes(1, DIM)).byte() for _ in range(LAYERS))
        store.put_abstracts(SPEC, keys, Abstracts(BOXES, 0, rows))
        assert same(store.load_abstracts(SPEC, keys, BOXES), Abstracts(BOXES, 0, rows))
        with pytest.raises(ShapeError):
            store.put_abstracts(SPEC, keys, boxes_of(random_block(SPEC, 64)))


def test_selections_without_stored_abstracts_say_so():
    """Methods whose abstracts no store can keep have no form."""
    for method in ("full", "infllm", "leoam:leaf=128", "leoam:codes=4", "percent"):
        assert SELECTORS.build(method).form is None
    for method in ("leoam", "quest", "leoam:weight=0.5,heads=each"):
        assert SELECTORS.build(method).form == AbstractForm("boxes@1:dtype=int8,leaf=16", 16, 1, 2)
    selection = Selection(SELECTORS.build("infllm"), SHAPE, 1)
    with pytest.raises(ConfigError, match="no abstracts"):
        selection.take(0, 0, 64)
    with pytest.raises(ConfigError, match="no abstracts"):
        selection.extend(0, torch.zeros(1, 1))


@pytest.mark.parametrize("method", ["leoam", "quest:dtype=float32", "leoam:leaf=64"])
def test_a_selection_goes_on_from_stored_abstracts(method):
    """The same choice as from the keys."""
    g = torch.Generator().manual_seed(3)
    keys = torch.randn(HEADS, 500, DIM, generator=g) * 3
    whole, again = (Selection(SELECTORS.build(method), SHAPE, 1) for _ in range(2))
    whole.append(0, keys)
    assert again.extend(0, whole.take(0, 0, 448)) == 448
    again.append(0, keys[:, 448:])
    assert again.num_tokens == 500
    for _ in range(5):
        query = torch.randn(4, 1, DIM, generator=g)
        assert torch.equal(whole.select(0, query), again.select(0, query))
