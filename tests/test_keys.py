# SPDX-License-Identifier: Apache-2.0
import itertools
import random
import struct
import subprocess
import sys
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvlib.errors import ConfigError
from kvlib.keys import (
    BLOCK_TOKENS,
    Extra,
    Namespace,
    StoreKey,
    block_keys,
    digest,
    encode,
    root_key,
    snapshot_key,
)

PRINT = bytes(range(32))
OTHER = bytes(range(1, 33))

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.binary(max_size=6)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8)


def same(a, b):
    """Equal in type and content, all the way down (and 0.0 is -0.0)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(max_examples=120)
@given(values, values)
def test_encoding_is_injective(a, b):
    """Two values have one encoding only if they are the same value."""
    assert (encode(a) == encode(b)) == same(a, b)


@settings(max_examples=120)
@given(st.lists(values, max_size=4), st.lists(values, max_size=4))
def test_encodings_in_sequence_are_injective(a, b):
    """Fields written one after another cannot be read as other fields."""
    joined = [b"".join(map(encode, x)) for x in (a, b)]
    assert (joined[0] == joined[1]) == same(tuple(a), tuple(b))


@given(values, values)
def test_no_encoding_begins_another(a, b):
    """The code is prefix-free, so nothing can be appended to a field unseen."""
    assume(not same(a, b))
    assert not encode(b).startswith(encode(a))


def test_near_misses_differ():
    """Values that look alike in other encodings all have their own bytes here."""
    near = [
        None, False, True, 0, 1, -1, 2**32, 2**63 - 1, -(2**63), 0.0, 1.0, 5e-324,
        "", "0", "1", "n", "None", "\0", "a", "ab", "a\0", "é", "e\u0301",
        b"", b"0", b"n", b"\0", b"a", b"ab", b"a\0", bytes(8),
        (), ((),), ((), ()), (None,), (0,), (1,), (False,), ("",), (b"",), ("a", "b"), ("ab",),
        ("a", ("b",)), (("a",), "b"), (("a", "b"),), (1, 2), (2, 1), (12,), ("ab", ""), ("", "ab"),
    ]  # fmt: skip
    for a, b in itertools.combinations(near, 2):
        assert encode(a) != encode(b), (a, b)
        assert digest(Namespace.SPEC, a) != digest(Namespace.SPEC, b)


def test_encoding_forms():
    """Lists are tuples, bytearrays bytes, and both zeros one number; bytes as documented."""
    assert encode([1, [2]]) == encode((1, (2,)))
    assert encode(bytearray(b"x")) == encode(b"x")
    assert encode(-0.0) == encode(0.0) == b"f" + bytes(8)
    assert encode(None) == b"n"
    assert encode(True) == b"b\x01"
    assert encode(-2) == b"i\xfe" + b"\xff" * 7
    assert encode(1.5) == b"f" + struct.pack("<d", 1.5)
    assert encode("é") == b"s\x02\0\0\0\0\0\0\0\xc3\xa9"
    assert encode(b"ab") == b"y\x02\0\0\0\0\0\0\0ab"
    assert encode((None, "")) == b"l\x02\0\0\0\0\0\0\0ns" + bytes(8)


@pytest.mark.parametrize(
    "value",
    [
        2**63, -(2**63) - 1, float("nan"), float("inf"), -float("inf"), "\ud800", {}, set(), 1j,
        object(), np.int64(1), range(3), memoryview(b"x"), (1, {2: 3}), Namespace,
    ],
    ids=lambda v: f"{v!r:.24}".partition(" at ")[0],
)  # fmt: skip
def test_what_cannot_be_encoded(value):
    """Types and numbers without one canonical form are ConfigErrors."""
    with pytest.raises(ConfigError):
        encode(value)


def test_namespaces_are_apart():
    """Equal fields under different namespaces never have equal digests."""
    assert len({digest(space, "x", 1) for space in Namespace}) == len(Namespace)


def test_swapped_and_shifted_fields():
    """Moving a value, or part of one, into the next field changes the digest."""
    rng = random.Random(0)
    for _ in range(300):
        a, b = (rng.randbytes(rng.randrange(6)) for _ in range(2))
        if a != b:
            assert digest(Namespace.MODEL, a, b) != digest(Namespace.MODEL, b, a)
        if a:
            assert digest(Namespace.MODEL, a, b) != digest(Namespace.MODEL, a[:-1], a[-1:] + b)
        assert digest(Namespace.MODEL, a, b) != digest(Namespace.MODEL, a + b)
        assert digest(Namespace.MODEL, (a,), b) != digest(Namespace.MODEL, a, b)


def independent_keys(tokens, salt=b"", extras=(), block_extras=None):
    """Keys written down again from docs/formats/block.md, without kvlib."""

    def enc(x):
        if isinstance(x, int):
            return b"i" + struct.pack("<q", x)
        if isinstance(x, str):
            return b"s" + struct.pack("<Q", len(x.encode())) + x.encode()
        if isinstance(x, bytes):
            return b"y" + struct.pack("<Q", len(x)) + x
        return b"l" + struct.pack("<Q", len(x)) + b"".join(map(enc, x))

    def h(*fields):
        data = b"kvlib\0\1\1" + b"".join(map(enc, fields))
        return blake2b(data, digest_size=32).digest()

    key, out = h("root", PRINT, salt, tuple(sorted(extras))), []
    for i in range(len(tokens) // 64):
        data = struct.pack("<64I", *tokens[64 * i : 64 * i + 64])
        key = h("block", key, data, tuple(sorted((block_extras or {}).get(i, ()))))
        out.append(key)
    return out


@given(
    st.integers(0, 300),
    st.binary(max_size=4),
    st.lists(st.tuples(st.text(max_size=3), st.binary(max_size=3), st.integers(-9, 9)), max_size=3),
    st.integers(0, 2**32),
)
def test_keys_follow_the_specification(n, salt, extras, seed):
    """Chained keys equal an independent computation, extras in any order."""
    rng = random.Random(seed)
    tokens = [rng.randrange(2**32) for _ in range(n)]
    given = [Extra(*e) for e in extras]
    per_block = {0: given} if n else None
    keys = block_keys(PRINT, tokens, salt=salt, extras=given[::-1], block_extras=per_block)
    assert keys == independent_keys(tokens, salt, extras, {0: extras})
    assert len(keys) == n // BLOCK_TOKENS


def test_forms_of_token_ids_agree():
    """Lists, tuples, ranges, NumPy arrays and torch tensors of any width give the same keys."""
    ids = list(range(50, 50 + 2 * BLOCK_TOKENS + 3))
    expected = block_keys(PRINT, ids)
    wide = np.stack([np.array(ids), np.zeros(len(ids), np.int64)], axis=1)
    forms = [
        tuple(ids),
        range(50, 50 + len(ids)),
        *(np.array(ids, d) for d in (np.int16, np.int32, np.int64, np.uint32, np.uint64, ">i8")),
        *(torch.tensor(ids, dtype=d) for d in (torch.int16, torch.int32, torch.int64)),
        wide[:, 0],
        torch.from_numpy(wide)[:, 0],
        [np.int64(i) for i in ids],
    ]
    for form in forms:
        assert block_keys(PRINT, form) == expected
        assert snapshot_key(PRINT, form, "m") == snapshot_key(PRINT, ids, "m")
    top = [2**32 - 1] * BLOCK_TOKENS
    assert block_keys(PRINT, top) == block_keys(PRINT, np.array(top, np.uint32))
    assert block_keys(PRINT, []) == block_keys(PRINT, np.array([], np.int64)) == []


@pytest.mark.parametrize(
    "tokens",
    [
        [-1], [2**32], [1.0], ["1"], [None], "a" * 64, b"a" * 64, bytearray(64), 5, None, [[1]],
        np.array([-1]), np.array([2**32]), np.array([1.0]), np.array([[1]]), np.array([True]),
        np.array(3), np.array(["a"]),
        torch.tensor([-1]), torch.tensor([1.5]), torch.tensor([[1]]), torch.tensor([True]),
        torch.tensor(3),
    ],
    ids=lambda t: f"{type(t).__name__} {t!r:.30}",
)  # fmt: skip
def test_wrong_token_ids(tokens):
    """What is not a flat run of ids in 0..2**32-1 is a ConfigError."""
    with pytest.raises(ConfigError):
        block_keys(PRINT, tokens)
    with pytest.raises(ConfigError):
        snapshot_key(PRINT, tokens, "m")


def test_partial_tail_has_no_key():
    """Only full blocks have keys; a longer prompt keeps the keys of its beginning."""
    ids = list(range(4 * BLOCK_TOKENS))
    whole = block_keys(PRINT, ids)
    for n in range(0, len(ids) + 1, 7):
        assert block_keys(PRINT, ids[:n]) == whole[: n // BLOCK_TOKENS]
    assert len(set(whole)) == 4


def test_every_token_counts():
    """Changing one token changes its block's key and all later ones, and no earlier one."""
    ids = list(range(3 * BLOCK_TOKENS))
    whole = block_keys(PRINT, ids)
    for at in (0, 63, 64, 127, 128, 191):
        changed = block_keys(PRINT, [*ids[:at], 7777, *ids[at + 1 :]])
        first = at // BLOCK_TOKENS
        assert changed[:first] == whole[:first]
        assert not set(changed[first:]) & set(whole[first:])


@given(st.integers(0, 5), st.integers(0, 5))
def test_chains_continue_from_a_parent(first, second):
    """Keys of a beginning and of its continuation are the keys of the whole."""
    ids = list(range((first + second) * BLOCK_TOKENS + 5))
    extra = Extra("image", b"d")
    whole = block_keys(PRINT, ids, salt="s", extras=[extra], block_extras={first: [extra]})
    cut = first * BLOCK_TOKENS
    head = block_keys(PRINT, ids[:cut], salt="s", extras=[extra])
    parent = head[-1] if head else root_key(PRINT, salt="s", extras=[extra])
    tail = block_keys(PRINT, ids[cut:], parent=parent, block_extras={0: [extra]})
    assert head + tail == whole


def test_salts_fingerprints_and_extras_separate():
    """Another salt, model, request extra or block extra shares no key."""
    ids = list(range(2 * BLOCK_TOKENS))
    image = Extra("image", b"1" * 32)
    variants = [
        {},
        {"salt": "a"},
        {"salt": "b"},
        {"salt": "\0"},
        {"extras": [image]},
        {"extras": [image, image]},
        {"extras": [Extra("audio", b"1" * 32)]},
        {"extras": [Extra("image", b"2" * 32)]},
        {"extras": [Extra("image", b"1" * 32, 1)]},
        {"extras": [Extra("image", b"1" * 32, -1)]},
        {"salt": "image", "extras": [Extra("", b"1" * 32)]},
        {"block_extras": {0: [image]}},
        {"block_extras": {0: [image._replace(offset=3)]}},
    ]
    keys = [key for v in variants for key in block_keys(PRINT, ids, **v)]
    keys += block_keys(OTHER, ids)
    assert len(set(keys)) == len(keys)
    late = block_keys(PRINT, ids, block_extras={1: [image]})
    assert late[0] == block_keys(PRINT, ids)[0]
    assert late[1] != block_keys(PRINT, ids)[1]
    assert block_keys(PRINT, ids, block_extras={1: []}) == block_keys(PRINT, ids)
    assert root_key(PRINT, salt="é") == root_key(PRINT, salt="é".encode())
    assert root_key(PRINT) != block_keys(PRINT, ids)[0]


def test_extras_have_no_order():
    """Extras are a multiset: their order does not matter, their number does."""
    extras = [Extra("b", b"1"), Extra("a", b"2", 4), Extra("a", b"2", -4), Extra("a", b"1")]
    keys = {root_key(PRINT, extras=p) for p in itertools.permutations(extras)}
    assert len(keys) == 1
    assert root_key(PRINT, extras=[*extras, extras[0]]) not in keys
    assert root_key(PRINT, extras=[("a", bytearray(b"1"), 0)]) == root_key(
        PRINT, extras=[Extra("a", b"1")]
    )


@pytest.mark.parametrize(
    "extra",
    [
        Extra("image", 5), Extra("image", "x"), Extra(b"image", b"x"), Extra("image", b"x", 1.0),
        Extra("image", b"x", True), Extra("image", b"x", None), ("image", b"x"), ("image",), (),
        "image", 5, None, Extra("\ud800", b"x"), Extra("image", b"x", 2**63),
    ],
    ids=repr,
)  # fmt: skip
def test_wrong_extras(extra):
    """An extra is text, bytes and a 64-bit integer: nothing is converted."""
    for use in ({"extras": [extra]}, {"block_extras": {0: [extra]}}):
        with pytest.raises(ConfigError):
            block_keys(PRINT, range(64), **use)


def test_wrong_arguments():
    """Fingerprints, parents, salts and extras of absent blocks are checked before hashing."""
    parent = root_key(PRINT)
    wrong = [
        {"fingerprint": b""}, {"fingerprint": bytes(31)}, {"fingerprint": "x" * 32},
        {"fingerprint": bytearray(32)}, {"fingerprint": None},
        {"salt": 5}, {"salt": None}, {"salt": "\udc80"}, {"salt": ("a",)},
        {"parent": b""}, {"parent": bytes(33)}, {"parent": parent.hex()},
        {"parent": parent, "salt": "a"}, {"parent": parent, "extras": [Extra("a", b"")]},
        {"block_extras": {2: []}}, {"block_extras": {-1: [Extra("a", b"")]}},
    ]  # fmt: skip
    for change in wrong:
        arguments = {"fingerprint": PRINT, "tokens": range(2 * BLOCK_TOKENS), **change}
        with pytest.raises(ConfigError):
            block_keys(**arguments)
    with pytest.raises(ConfigError, match="extras are given for blocks"):
        block_keys(PRINT, [], block_extras={0: []})


def test_snapshot_keys_differ_in_each_field():
    """Model, tokens, method, artefacts, salt and extras each make another snapshot."""
    base = {"fingerprint": PRINT, "tokens": [1, 2, 3], "method": "snapkv:budget=0.25"}
    changes = [
        {},
        {"fingerprint": OTHER},
        {"tokens": [1, 2]},
        {"tokens": [1, 2, 3, 0]},
        {"tokens": [3, 2, 1]},
        {"tokens": []},
        {"method": "snapkv:budget=0.5"},
        {"method": ""},
        {"artefacts": ["a"]},
        {"artefacts": ["a", "b"]},
        {"artefacts": ["b", "a"]},
        {"artefacts": ["ab"]},
        {"salt": "a"},
        {"extras": [Extra("a", b"")]},
        {"extras": [Extra("a", b"", 2)]},
    ]
    keys = {snapshot_key(**{**base, **change}) for change in changes}
    assert len(keys) == len(changes)
    assert snapshot_key(**base, salt="x") == snapshot_key(**base, salt=b"x")
    with pytest.raises(ConfigError, match="artefacts are a list"):
        snapshot_key(**base, artefacts="id")
    prompt = list(range(64))
    assert snapshot_key(PRINT, prompt, "") not in block_keys(PRINT, prompt)


def test_store_key_bytes():
    """A store key is its two halves, 64 bytes."""
    key = StoreKey(root_key(PRINT), OTHER)
    assert key.to_bytes() == root_key(PRINT) + OTHER
    assert len(key.to_bytes()) == 64


def test_keys_are_the_same_in_every_process():
    """Hash seeds and processes do not matter, and keys need neither torch nor NumPy."""
    code = (
        "import sys\n"
        "from kvlib.keys import block_keys\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print(block_keys(bytes(range(32)), list(range(130)), salt='s')[-1].hex())"
    )
    expected = block_keys(PRINT, list(range(130)), salt="s")[-1].hex()
    path = [p for p in sys.path if p]
    for seed in ("0", "1"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(path)}
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        assert out.stdout.strip() == expected
