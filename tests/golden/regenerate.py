# SPDX-License-Identifier: Apache-2.0
"""Write the golden files that are missing: `python tests/golden/regenerate.py`.

Golden files are promises to data that exists. An existing one is never overwritten: where it
differs from what this would write, that is reported and the exit status is 1. To replace one on
purpose (before it was ever released), delete it first.
"""

import json
import os
import random
import struct
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import outsider
import torch
import zstandard
from check_golden import RESULTS, ByKvlib, mac_key_of, plain_header, spec_of
from torch import Tensor

from kvlib.artefacts import model_identity, save_artefact
from kvlib.blocks import KVBlock, LayerKV
from kvlib.codecs import (
    build_codec,
    codec_from_canonical,
    decode_block,
    encode_block,
    pack,
    rans,
)
from kvlib.codecs.base import Codec
from kvlib.codecs.container import (
    Flag,
    LayerShape,
    Section,
    SectionFlag,
    SectionKind,
    build_container,
    parse_header,
)
from kvlib.codecs.state import encode_state
from kvlib.keys import BlockKey, block_keys, snapshot_key
from kvlib.spec import DTYPES, storage_digest

Json = Any
FOLDER = Path(__file__).resolve().parent
CONTAINERS = FOLDER / "containers" / "v1"
PROFILES = FOLDER / "profiles"
WRITER = "kvlib golden"  # in place of kvlib's version, which must be free to change


def layer(heads: int, k: int, v: int, **more: Json) -> Json:
    plain = {"kind": "full", "num_kv_heads": heads, "k_head_dim": k, "v_head_dim": v}
    return {**plain, "window": 0, "rope": None, **more}


def rope(theta: float, rotary_dim: int, **more: Json) -> Json:
    plain = {"theta": theta, "rotary_dim": rotary_dim, "kind": "default", "params": []}
    return {**plain, "interleaved": False, "first_channel": 0, **more}


def spec(model_id: str, dtype: str, layers: list[Json], **more: Json) -> Json:
    plain = {"model_id": model_id, "dtype": dtype, "layers": layers, "adapter": ""}
    return {**plain, "weight_quantization": "", "rope_state": "post", "kv_scales": "", **more}


# Keys

COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
LLAMA3_RULE = [
    ["original_max_position_embeddings", 8192],  # not in order, and integers
    ["low_freq_factor", 1],
    ["high_freq_factor", 4.0],
    ["factor", 8.0],
]
YARN_RULE = [["factor", 40.0], ["mscale", 0.707], ["original_max_position_embeddings", 4096.0]]
LONG_RULE = [["long_factor.0", 1.5], ["long_factor.1", 2.5], ["short_factor.10", 1.0]]

SPECS: dict[str, Json] = {
    "plain": spec("user:plain", "float16", [layer(2, 8, 8, rope=rope(10000.0, 8))] * 2),
    "llama3": spec(
        f"hub:org/llama@{COMMIT}",
        "bfloat16",
        [layer(8, 128, 128, rope=rope(500000, 128, kind="llama3", params=LLAMA3_RULE))] * 2,
    ),
    "sliding": spec(
        "blake2b:" + "5a" * 32,
        "bfloat16",
        [
            layer(4, 256, 256, kind="sliding", window=1024, rope=rope(10000.0, 256)),
            layer(4, 256, 256, rope=rope(1e6, 64, kind="linear", params=[["factor", 8]])),
        ],
    ),
    "mla": spec(
        "user:latent",
        "bfloat16",
        [
            layer(
                1,
                576,
                0,
                kind="mla",
                rope=rope(
                    1e4, 64, kind="yarn", params=YARN_RULE, interleaved=True, first_channel=512
                ),
            )
        ],
    ),
    "scaled": spec(
        "user:scaled",
        "float8_e4m3fn",
        [layer(8, 128, 128, rope=rope(1e6, 128))],
        adapter="style:01ab",
        weight_quantization="fp8:00112233445566778899aabbccddeeff",
        kv_scales="per-layer:77",
    ),
    "hybrid": spec(
        "user:hybrid",
        "float32",
        [layer(0, 0, 0, kind="recurrent"), layer(3, 5, 7), layer(0, 0, 0, kind="recurrent")],
        rope_state="none",
    ),
    "unrotated": spec(
        "user:unrotated",
        "float8_e5m2",
        [layer(2, 6, 6, rope=rope(1e4, 4, kind="longrope", params=LONG_RULE))],
        rope_state="pre",
    ),
    "names": spec("user:Ünïcödé 漢字 🔑", "float16", [layer(65535, 1, 65535)], adapter="é"),
}

ENCODED: list[tuple[str, Json]] = [
    ("none", None),
    ("bool", True),
    ("bool", False),
    ("int", "0"),
    ("int", "1"),
    ("int", "-1"),
    ("int", str(2**63 - 1)),
    ("int", str(-(2**63))),
    ("float", "0.0"),
    ("float", "-0.0"),
    ("float", "1.0"),
    ("float", "0.1"),
    ("float", "-1e300"),
    ("float", "5e-324"),
    ("text", ""),
    ("text", "é漢🔑"),
    ("bytes", ""),
    ("bytes", "00ff"),
    ("list", []),
    ("list", [["int", "1"], ["list", [["text", "a"], ["none", None]]], ["float", "1.0"]]),
]

IMAGE = "11" * 32
AUDIO = "22" * 32
ROOTS: list[Json] = [
    {"spec": "plain", "salt": "", "extras": []},
    {"spec": "llama3", "salt": "", "extras": []},
    {"spec": "llama3", "salt": b"tenant-a".hex(), "extras": []},
    {"spec": "llama3", "salt": "tenänt-🔑".encode().hex(), "extras": []},
    {"spec": "llama3", "salt": "00ff80", "extras": []},
    {"spec": "mla", "salt": "", "extras": [["image", IMAGE, 3], ["audio", AUDIO, 0]]},
    # Sorted by code point, not by UTF-16 unit; bytes unsigned, a prefix first; offsets as numbers.
    {"spec": "plain", "salt": "", "extras": [["\U00010000", "", 0], ["\uffff", "", 0]]},
    {
        "spec": "plain",
        "salt": "",
        "extras": [
            ["a", "80", 0],
            ["a", "7f00", 10],
            ["a", "7f", 9],
            ["a", "7f", -1],
            ["a", "7f", 9],
            ["", "ff", 0],
        ],
    },
]

EDGE = 2**32 - 1
TOKENS: dict[str, list[int]] = {
    "zeros": [0] * 64,
    "edge": [EDGE] * 64,
    "count": list(range(1, 131)),
    "short": list(range(63)),
    "mixed": [(i * 2654435761) % 2**32 if i % 7 else (0, EDGE)[i % 2] for i in range(192)],
}
IMAGE_AT = {"0": [["image", IMAGE, 60]], "1": [["image", IMAGE, -4], ["audio", AUDIO, 0]]}
BLOCKS: list[Json] = [
    {"spec": "plain", "tokens": "zeros"},
    {"spec": "plain", "tokens": "edge"},
    {"spec": "plain", "tokens": "short"},
    {"spec": "plain", "tokens": "count"},
    {"spec": "llama3", "tokens": "count"},
    {"spec": "llama3", "tokens": "mixed", "salt": b"tenant-a".hex()},
    {"spec": "sliding", "tokens": "mixed", "extras": [["embeds", AUDIO, 0]]},
    {"spec": "mla", "tokens": "count", "block_extras": IMAGE_AT},
    {"spec": "scaled", "tokens": "count", "block_extras": {"1": IMAGE_AT["1"]}},
    {"spec": "hybrid", "tokens": "mixed"},
    {"spec": "unrotated", "tokens": "zeros", "salt": "00"},
    {"spec": "names", "tokens": "zeros"},
    {"spec": "plain", "tokens": "mixed", "parent": "c0ffee" + "00" * 29},
    {"spec": "plain", "tokens": "mixed", "parent": "01" * 32, "block_extras": IMAGE_AT},
]
METHOD = "snapkv:budget=0.25,window=32"
SNAPSHOTS: list[Json] = [
    {"spec": "plain", "tokens": "count", "method": METHOD, "artefacts": []},
    {"spec": "plain", "tokens": "short", "method": METHOD, "artefacts": ["heads:1", "heads:0"]},
    {"spec": "mla", "tokens": "edge", "method": "", "artefacts": [], "salt": "ff"},
    {
        "spec": "mla",
        "tokens": "mixed",
        "method": METHOD,
        "artefacts": ["é"],
        "extras": [["image", IMAGE, 100], ["audio", AUDIO, 7]],
    },
]
STORAGES: list[Json] = [
    {"spec": "plain", "codec": "exact@1"},
    {"spec": "plain", "codec": "int8@1:group=64"},
    {"spec": "llama3", "codec": "int4@1:group=32"},
    {"spec": "llama3", "codec": "exact@1", "fidelity": "int4@1:group=32"},
    {"spec": "llama3", "codec": "exact@1", "head_range": [0, 4]},
    {"spec": "llama3", "codec": "exact@1", "head_range": [4, 8], "layers": [1]},
    {"spec": "hybrid", "codec": "exact@1"},
    {"spec": "hybrid", "codec": "exact@1", "layers": []},
    {"spec": "mla", "codec": "x@2:a=1,b=2", "fidelity": "exact", "profile": "calibration-7"},
]
MODELS: list[dict[str, str]] = [
    {"config.json": b"{}".hex(), "model.safetensors": "0001ff"},
    {"config.json": b"{ }".hex(), "b.bin": "", "Z.pt": "aa", "a.pth": "bb", "10.gguf": "cc"},
]


def make_keys() -> Json:
    """All of keys.json, computed now."""
    data: Json = {
        "encoded": [{"value": value} for value in ENCODED],
        "specs": [{"name": name, "spec": plain} for name, plain in SPECS.items()],
        "tokens": [{"name": name, "tokens": tokens} for name, tokens in TOKENS.items()],
        "roots": ROOTS,
        "blocks": BLOCKS,
        "snapshots": SNAPSHOTS,
        "storages": STORAGES,
        "models": [{"files": files} for files in MODELS],
    }
    side = ByKvlib(data)
    for part, result in RESULTS.items():
        data[part] = [{**vector, result: getattr(side, part)(vector)} for vector in data[part]]
    return data


def keys_text(data: Json) -> str:
    """One vector a line."""
    parts = []
    for name, vectors in data.items():
        lines = ",\n".join(json.dumps(vector, ensure_ascii=True) for vector in vectors)
        parts.append(f'"{name}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


# Containers

MAC_KEY = bytes(range(32)).hex()
_TORCH = {name: getattr(torch, name) for name in DTYPES}


def tensor_of(data: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    raw = bytes.fromhex(data)
    if not raw:
        return torch.empty(shape, dtype=_TORCH[dtype])
    return torch.frombuffer(bytearray(raw), dtype=_TORCH[dtype]).reshape(shape)


def hex_of(x: Tensor) -> str:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex() if x.numel() else ""


def block_of(case: Json, *, decoded: bool = False) -> KVBlock:
    """The block of a case: what goes in, or what decoding gives."""
    owner = spec_of(case["spec"])
    layers = []
    for plain in case["layers"]:
        want = owner.layers[plain["layer_idx"]]
        heads, lengths, positions = plain["num_kv_heads"], plain["row_lengths"], plain["positions"]
        if lengths is not None:
            lead: tuple[int, ...] = (sum(lengths),)
        else:
            lead = (heads, case["num_tokens"] if positions is None else len(positions) // heads)
        kept = plain["channels"]
        width = want.k_head_dim if kept is None else len(kept[0])
        given = plain["decoded"] if decoded and "decoded" in plain else plain
        weight = plain["log_weight"]
        layers.append(
            LayerKV(
                layer_idx=plain["layer_idx"],
                keys=tensor_of(given["keys"], owner.dtype, (*lead, width)),
                values=tensor_of(given["values"], owner.dtype, (*lead, want.v_head_dim)),
                positions=range(case["start"], case["start"] + case["num_tokens"])
                if positions is None
                else torch.tensor(positions, dtype=torch.int32).reshape(lead),
                row_lengths=None if lengths is None else tuple(lengths),
                log_weight=None if weight is None else tensor_of(weight, "float32", lead),
                channels=None if kept is None else torch.tensor(kept, dtype=torch.int64),
            )
        )
    return KVBlock(
        spec=owner, start=case["start"], num_tokens=case["num_tokens"], layers=tuple(layers)
    )


def encode_case(case: Json) -> bytes:
    """The container of a case, made now."""
    heads = None if case["head_range"] is None else tuple(case["head_range"])
    common: Json = {
        "keys": [BlockKey(bytes.fromhex(key)) for key in case["keys"]],
        "fidelity": case["fidelity"],
        "head_range": heads,
        "alignment": case["alignment"],
        "mac_key": mac_key_of(case),
    }
    if "sections" in case:
        return _encode_sections(case, common)
    with mock.patch.object(pack, "writer_text", return_value=WRITER), known_profiles():
        state = encode_state(state_of(case)) if "state" in case else None
        return b"".join(encode_block(block_of(case), codec_of(case), state=state, **common))


def codec_of(case: Json) -> Codec:
    """A method, or a canonical string where it is one of several versions.

    "exact" is the version of the day on which its cases were made: the first.
    """
    method = "exact@1" if case["method"] == "exact" else case["method"]
    return codec_from_canonical(method) if "@" in method else build_codec(method)


def known_profiles() -> Any:
    """Make kvlib find the golden profiles by their digests."""
    return mock.patch.dict(os.environ, KVLIB_PROFILES=str(PROFILES))


def state_of(case: Json) -> dict[str, Tensor]:
    """Named tensors of a snapshot, from [name, dtype, shape, hex]."""
    return {
        name: torch.frombuffer(bytearray.fromhex(data), dtype=getattr(torch, dtype)).reshape(shape)
        for name, dtype, shape, data in case["state"]
    }


def _encode_sections(case: Json, common: Json) -> bytes:
    """A container of what no codec of today writes."""
    print_ = spec_of(case["spec"]).fingerprint()
    shapes = [LayerShape(**plain) for plain in case["layers"]]
    sections = [
        Section(
            SectionKind(s["kind"]),
            s["layer_idx"],
            s["raw_bytes"],
            (bytes.fromhex(s["data"]),),
            SectionFlag(s["flags"]),
        )
        for s in case["sections"]
    ]
    parts = build_container(
        sections,
        spec_fingerprint=print_,
        storage_fingerprint=storage_digest(
            print_,
            case["method"],
            case["fidelity"],
            common["head_range"],
            tuple(shape.layer_idx for shape in shapes),
            case["profile"],
        ),
        start=case["start"],
        num_tokens=case["num_tokens"],
        dtype_code=DTYPES[case["spec"]["dtype"]].code,
        codec=case["method"],
        layers=shapes,
        flags=Flag(case["flags"]),
        profile=case["profile"],
        writer=case["writer"],
        **common,
    )
    return b"".join(parts)


def decode_case(data: bytes, case: Json) -> KVBlock:
    with known_profiles():
        return decode_block(data, spec_of(case["spec"]), mac_key=mac_key_of(case))


def finished(case: Json) -> tuple[bytes, Json]:
    """A case's container, and the case with what is to be expected of it."""
    data = encode_case(case)
    header = parse_header(data, mac_key=mac_key_of(case))
    out = {**case, "bytes": len(data), "sha256": sha256(data).hexdigest()}
    lossless = case["method"].startswith(("exact", "raw"))
    packed = lossless and any(
        s.kind in (SectionKind.KEYS, SectionKind.VALUES) and not s.flags & SectionFlag.RAW
        for s in header.sections
    )
    out["zstd_version"] = list(zstandard.ZSTD_VERSION) if packed else None
    out["header"] = plain_header(header)
    if "tolerance" in case:
        out["integers"] = outsider.decode(data, case["spec"], mac_key_of(case))[0]["integers"]
    if "sections" not in case and not lossless:
        block = decode_case(data, case)
        out["layers"] = [
            {**plain, "decoded": {"keys": hex_of(x.keys), "values": hex_of(x.values)}}
            for plain, x in zip(case["layers"], block.layers, strict=True)
        ]
    return data, out


# What goes in

_RNG = random.Random


def bits(seed: int, size: int, itemsize: int = 1) -> str:
    """Any bit pattern: NaN payloads, infinities, subnormals."""
    return _RNG(seed).randbytes(size * itemsize).hex()


def numbers(seed: int, size: int, dtype: str, *, scale: float = 1.0) -> str:
    """Numbers of both signs and of sizes between `scale` / 2 and 2 * `scale`."""
    rng = _RNG(seed)
    x = [rng.choice((-1, 1)) * scale * rng.uniform(0.5, 2) for _ in range(size)]
    return hex_of(torch.tensor(x, dtype=torch.float64).to(_TORCH[dtype]))


def words(fmt: str, *values: int) -> str:
    return struct.pack(f"<{len(values)}{fmt}", *values).hex()


def kv(layer_idx: int, heads: int, keys: str, values: str, **more: Json) -> Json:
    plain = {"layer_idx": layer_idx, "num_kv_heads": heads, "row_lengths": None}
    plain |= {"positions": None, "log_weight": None, "channels": None}
    return {**plain, **more, "keys": keys, "values": values}


def case(about: str, method: str, owner: Json, layers: list[Json], **more: Json) -> Json:
    plain = {"about": about, "method": method, "spec": owner, "start": 0, "num_tokens": 0}
    plain |= {"keys": [], "fidelity": "exact", "head_range": None, "alignment": 8, "mac_key": None}
    return {**plain, **more, "layers": layers}


def chain(owner: Json, tokens: list[int], salt: str = "") -> list[str]:
    return [key.hex() for key in block_keys(spec_of(owner).fingerprint(), tokens, salt=salt)]


def dense_bits(dtype: str, specials: str) -> Json:
    """Two layers of three tokens: any bits, and the special values of the type first."""
    size = DTYPES[dtype].itemsize
    owner = spec("golden", dtype, [layer(2, 4, 3, rope=rope(1e4, 4)), layer(1, 5, 0)])
    keys = specials + bits(1, 2 * 3 * 4 * size - len(specials) // 2)
    return case(
        f"dense {dtype}: NaN payloads, infinities, subnormals and zeros of both signs",
        "exact",
        owner,
        [kv(0, 2, keys, bits(2, 2 * 3 * 3, size)), kv(1, 1, bits(3, 3 * 5, size), "")],
        start=7,
        num_tokens=3,
    )


def uncoded() -> Json:
    """Numbers that `exact` would make smaller, and values without channels."""
    owner = spec("golden", "float16", [layer(2, 4, 6), layer(1, 5, 0)])
    layers = [
        kv(0, 2, numbers(71, 2 * 32 * 4, "float16"), numbers(72, 2 * 32 * 6, "float16")),
        kv(1, 1, numbers(73, 32 * 5, "float16"), ""),
    ]
    return case("raw: everything as it is", "raw", owner, layers, num_tokens=32)


def compressed() -> Json:
    owner = spec("golden", "bfloat16", [layer(2, 8, 8, rope=rope(1e4, 8))])
    size = 2 * 64 * 8
    layers = [kv(0, 2, numbers(4, size, "bfloat16"), numbers(5, size, "bfloat16", scale=64))]
    tokens = list(range(64))
    return case(
        "one whole block: the upper planes are compressed, the lower ones are not",
        "exact",
        owner,
        layers,
        num_tokens=64,
        keys=chain(owner, tokens),
    )


def columns() -> Json:
    """Signs and sizes of keys that last in a channel, and values that come back row by row."""
    rng = _RNG(30)
    owner = spec("golden", "bfloat16", [layer(2, 8, 8, rope=rope(1e4, 8))])
    about = [[(rng.gauss(0, 2), rng.uniform(0.1, 2)) for _ in range(8)] for _ in range(2)]
    keys = [[[rng.gauss(*c) for c in head] for _ in range(64)] for head in about]
    words = [[rng.gauss(0, 1) for _ in range(16)] for _ in range(9)]
    tokens = [rng.choice(words) for _ in range(64)]
    values = [[word[8 * head :][:8] for word in tokens] for head in range(2)]
    packed = [hex_of(torch.tensor(x, dtype=torch.float64).bfloat16()) for x in (keys, values)]
    return case(
        "exact@2: exponents of keys column after column, both planes of values row after row",
        "exact@2",
        owner,
        [kv(0, 2, *packed)],
        num_tokens=64,
    )


def columns_float32() -> Json:
    """Four planes: raw ones, one of zeros, and one of columns; heads of different length."""
    rng = _RNG(31)
    owner = spec("golden", "float32", [layer(2, 6, 5)])
    lengths = [21, 12]
    size = [abs(rng.gauss(0, 1)) * 4 ** rng.randrange(-6, 7) for _ in range(6)]
    keys = [[rng.gauss(s, s / 4) for s in size] for _ in range(sum(lengths))]
    values = [[2.0 ** rng.choice((-2, 1)) for _ in range(5)] for _ in range(sum(lengths))]
    keys, values = (hex_of(torch.tensor(x, dtype=torch.float32)) for x in (keys, values))
    positions = [*range(21), *range(0, 24, 2)]
    layers = [kv(0, 2, keys, values, positions=positions, row_lengths=lengths)]
    return case("exact@2: float32, ragged", "exact@2", owner, layers, num_tokens=24)


def record() -> Json:
    owner = spec("golden", "float16", [layer(1, 2, 2), layer(1, 2, 2), layer(1, 2, 1)])
    layers = [
        kv(1, 1, numbers(6, 256, "float16"), numbers(7, 256, "float16")),
        kv(2, 1, numbers(8, 256, "float16"), numbers(9, 128, "float16")),
    ]
    tokens = list(range(1000, 1256))
    return case(
        "a record of the third and fourth block, layers 1 and 2 of 3, computed from lossy KV",
        "exact",
        owner,
        layers,
        start=128,
        num_tokens=128,
        keys=chain(owner, tokens, "tenant-a")[2:],
        fidelity="int4@1:group=32",
    )


def integer(method: str, dtype: str, k: int, v: int, **more: Json) -> Json:
    """Three tokens of two heads: numbers, a constant row, and rows of small span."""
    owner = spec("golden", dtype, [layer(2, k, v)])
    step = DTYPES[dtype].itemsize * 2
    keys = numbers(10, 6 * k, dtype)
    keys = keys[:step] * k + keys[k * step :]
    values = numbers(11, 3 * v, dtype, scale=1000) + numbers(12, 3 * v, dtype, scale=1e-4)
    about = f"{method} of {dtype}, {k} and {v} channels"
    return case(about, method, owner, [kv(0, 2, keys, values)], num_tokens=3, **more)


def integer_edges() -> Json:
    """Values that a lossy codec hands on unharmed, by storing the tensor raw."""
    owner = spec("golden", "float32", [layer(1, 16, 16), layer(1, 16, 16)])
    nan = words("I", 0x7FC00001) + numbers(13, 31, "float32")
    far = numbers(14, 31, "float32") + hex_of(torch.tensor([65505.0]))
    zero = words("I", 0x80000000, 0) * 16
    near = hex_of(torch.tensor([65504.0, -65504.0, 1e-30, -1e-45] * 8))
    return case(
        "int8: keys with a NaN and values beyond float16 stay raw; zeros and the largest do not",
        "int8:group=16",
        owner,
        [kv(0, 1, nan, far), kv(1, 1, zero, near)],
        num_tokens=2,
    )


def ragged() -> Json:
    owner = spec("golden", "float16", [layer(3, 4, 2), layer(3, 4, 2)])
    rows = [70, 75, 127, -1, 64]
    whole = kv(
        1,
        3,
        bits(15, 5 * 3, 2),
        bits(16, 5 * 2, 2),
        row_lengths=[4, 0, 1],
        positions=rows,
        log_weight=words("f", 0, 1, -2, 3, 0),
        channels=[[0, 1, 3], [1, 2, 3], [0, 2, 3]],
    )
    equal = kv(0, 3, bits(17, 6 * 4, 2), bits(18, 6 * 2, 2), positions=[64, 66, 65, -1, -1, -1])
    return case(
        "rows of different length, one of them empty; synthetic entries, weights, kept channels",
        "exact",
        owner,
        [equal, whole],
        start=64,
        num_tokens=64,
        keys=chain(owner, list(range(128)))[1:],
    )


def snapshot() -> Json:
    owner = spec("golden", "float16", [layer(2, 4, 2, rope=rope(1e4, 4)), layer(1, 3, 3)])
    tokens = list(range(70))
    made = snapshot_key(spec_of(owner).fingerprint(), tokens, "h2o:budget=3,recent=0.5")
    kept = [0, 68, 69, 7, 30, 69]
    state = [
        ["00000/entries/scores", "float32", [2, 3], words("f", 1, 2, 3, 4, 5, 6)],
        ["00000/values/budget", "int64", [], words("q", 3)],
        ["00001/values/flags", "bool", [3], "010001"],
        ["00001/values/sums", "float64", [1, 2, 1], struct.pack("<2d", 0.1, -0.0).hex()],
        ["00001/values/é", "uint8", [2], "ff00"],
        ["prompt", "int32", [1, 1, 1, 1], words("i", -5)],
    ]
    return case(
        "a snapshot: an evicted layer, an empty one, and named tensors of every dtype",
        "exact",
        owner,
        [
            kv(0, 2, bits(31, 6 * 4, 2), bits(32, 6 * 2, 2), positions=kept),
            kv(1, 1, "", "", row_lengths=[0], positions=[]),
        ],
        num_tokens=70,
        keys=[made.hex()],
        state=state,
    )


def integer_ragged() -> Json:
    owner = spec("golden", "float16", [layer(2, 9, 4)])
    one = kv(
        0,
        2,
        numbers(19, 3 * 7, "float16"),
        numbers(20, 3 * 4, "float16"),
        row_lengths=[1, 2],
        positions=[2**31 - 1, 2**31 - 2, -1],
        channels=[[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 7, 8]],
    )
    return case(
        "int4 over kept channels, at the last positions there are",
        "int4:group=5",
        owner,
        [one],
        start=2**31 - 2,
        num_tokens=2,
    )


def fixed_ragged(method: str) -> Json:
    """Rows of 9, 0 and 4 entries, one synthetic; kept channels; fewer value channels than keys."""
    owner = spec("golden", "float16", [layer(1, 2, 2), layer(3, 14, 6)])
    rows = [*range(9), 0, 3, 8, -1]
    one = kv(
        1,
        3,
        numbers(33, 13 * 11, "float16"),
        numbers(34, 13 * 6, "float16", scale=30),
        row_lengths=[9, 0, 4],
        positions=rows,
        channels=[list(range(11)), list(range(3, 14)), [0, *range(4, 14)]],
    )
    return case(f"{method}: rows of different length", method, owner, [one], num_tokens=9)


def authenticated() -> Json:
    owner = spec("golden", "float16", [layer(2, 3, 3)])
    layers = [kv(0, 2, bits(21, 12, 2), bits(22, 12, 2))]
    return case(
        "MAC in place of plain checksums",
        "exact",
        owner,
        layers,
        num_tokens=2,
        mac_key=bytes(range(32)).hex(),
    )


def aligned() -> Json:
    owner = spec("golden", "bfloat16", [layer(1, 6, 0, kind="mla")])
    layers = [kv(0, 1, bits(23, 5 * 6, 2), "")]
    return case("sections at 4096", "exact", owner, layers, num_tokens=5, alignment=4096)


def head_range() -> Json:
    owner = spec("golden", "float32", [layer(4, 2, 2), layer(2, 2, 2)])
    layers = [kv(0, 2, bits(24, 4, 4), bits(25, 4, 4)), kv(1, 1, bits(26, 2, 4), bits(27, 2, 4))]
    return case(
        "heads [2, 4) of 4, and one of a layer that has 2",
        "exact",
        owner,
        layers,
        num_tokens=1,
        head_range=[2, 4],
    )


def empty() -> Json:
    owner = spec("golden", "float16", [layer(2, 4, 4)])
    return case("no tokens", "exact", owner, [kv(0, 2, "", "")], start=5)


def kvlc_numbers(seed: int, heads: int, width: int, entries: int, dtype: str, **more: Json) -> str:
    """Channels with means and deviations of their own; some entries or numbers are special."""
    rng = _RNG(seed)
    about = [[(rng.gauss(0, 2), rng.uniform(0.2, 3)) for _ in range(width)] for _ in range(heads)]
    x = [[[rng.gauss(*c) for c in head] for _ in range(entries)] for head in about]
    for head, entry, channel, value in more.get("special", ()):
        x[head][entry][channel] = value
    return hex_of(torch.tensor(x, dtype=torch.float64).to(_TORCH[dtype]))


def kvlc(about: str, method: str, owner: Json, layers: list[Json], **more: Json) -> Json:
    return case(f"kvlc: {about}", method, owner, layers, **more, tolerance=2e-5)


NAN, INF = float("nan"), float("inf")
LONG = [["factor", 8.0], ["original_max_position_embeddings", 32.0]]
BENDS = [*LONG, ["low_freq_factor", 1.0], ["high_freq_factor", 4.0]]


def kvlc_near() -> Json:
    owner = spec("golden", "float32", [layer(2, 8, 6, rope=rope(1e4, 8)), layer(3, 8, 6)])
    rng = _RNG(40)
    positions = [p for _ in range(2) for p in sorted(rng.sample(range(64, 128), 40))]
    ragged = [[*sorted(rng.sample(range(64, 128), n)), -1] for n in (35, 17)]
    lengths = [36, 0, 18]
    more = {"positions": ragged[0] + ragged[1], "row_lengths": lengths}
    layers = [
        kv(
            0,
            2,
            kvlc_numbers(41, 2, 8, 40, "float32"),
            kvlc_numbers(42, 2, 6, 40, "float32"),
            positions=positions,
        ),
        kv(
            1,
            3,
            kvlc_numbers(43, 1, 8, 54, "float32"),
            kvlc_numbers(44, 1, 6, 54, "float32", special=[(0, 3, 2, NAN), (0, 40, 0, -INF)]),
            **more,
        ),
    ]
    about = "near, heads that kept other tokens, and rows of different length"
    return kvlc(about, "kvlc:chunk=16", owner, layers, start=64, num_tokens=64)


def kvlc_rotations() -> Json:
    """Every kind of rotation that is removed, and one that is not."""
    ropes = [
        rope(1e4, 8, kind="llama3", params=BENDS),
        rope(1e4, 6, kind="linear", params=LONG[:1], interleaved=True, first_channel=2),
        rope(1e4, 8, kind="yarn", params=LONG),
        rope(1e4, 8, kind="longrope", params=LONG),
    ]
    owner = spec("golden", "bfloat16", [layer(2, 8, 4, rope=x) for x in ropes])
    special = [(0, 9, 3, NAN), (1, 30, 0, INF), (1, 1, 1, NAN)]
    layers = [
        kv(
            i,
            2,
            kvlc_numbers(50 + i, 2, 8, 48, "bfloat16", special=special if i == 1 else ()),
            kvlc_numbers(60 + i, 2, 4, 48, "bfloat16"),
        )
        for i in range(4)
    ]
    about = "near, rotations, sinks, and rows that are not finite"
    return kvlc(about, "kvlc:level=0.7,sinks=3", owner, layers, num_tokens=48)


def kvlc_fine() -> Json:
    """Small steps and outliers."""
    owner = spec("golden", "float32", [layer(1, 9, 5, rope=rope(1e4, 6))])
    far = [(0, 7, 4, 900.0), (0, 20, 1, -5e4), (0, 21, 8, 333.3)]
    keys = kvlc_numbers(70, 1, 9, 44, "float32", special=far)
    layers = [kv(0, 1, keys, kvlc_numbers(71, 1, 5, 44, "float32", special=[(0, 30, 2, 60.0)]))]
    about = "near, low bits and escapes"
    return kvlc(about, "kvlc:level=0.004,chunk=32,sinks=0", owner, layers, num_tokens=44)


PROFILE = "5efedc5ed4188ba4"
"""The digest of the profile that the following have."""


def kvlc_owner(dtype: str) -> Json:
    return spec("golden", dtype, [layer(2, 8, 6, rope=rope(1e4, 8))] * 3)


def kvlc_profile() -> bytes:
    """Transforms that need no linear algebra: nearly diagonal ones."""
    rng, tensors = _RNG(80), {}

    def near_identity(rows: int, columns: int) -> Tensor:
        unit = [rng.uniform(0.1, 0.4) for _ in range(columns)]
        x = [[u * ((i == j) + rng.gauss(0, 0.1)) for j, u in enumerate(unit)] for i in range(rows)]
        return torch.tensor(x, dtype=torch.float64).half()

    def statistics(*shape: int) -> Tensor:
        size = shape[0] if len(shape) == 1 else shape[0] * shape[1]
        parts = [[rng.gauss(0, 1) for _ in range(size)]]
        parts += [[rng.uniform(*ends) for _ in range(size)] for ends in ((1, 20), (0.5, 3))]
        return torch.tensor(parts).reshape(3, *shape)

    def put(name: str, width: int, rank: int) -> None:
        tensors[f"{name}.decode"] = near_identity(width, rank)
        tensors[f"{name}.statistics"] = statistics(rank)

    for kind, size in (("K", 8), ("V", 6)):
        tensors[f"near.{kind}"] = torch.tensor([0.5, 0.25, 1.0])
        for i in range(3):
            spread = torch.tensor([rng.uniform(0.5, 2) for _ in range(2 * size)])
            tensors[f"metric.{kind}.{i}"] = spread.diag()
            decode = torch.stack([near_identity(size, size) for _ in range(2)])
            tensors[f"balanced.{kind}.{i}.decode"] = decode
            tensors[f"balanced.{kind}.{i}.statistics"] = statistics(2, size)
            put(f"small.{kind}.{i}", 2 * size, 2 * size)
        put(f"archive.{kind}.0", 4 * size, 4 * size - 5)
        offset = torch.tensor([rng.gauss(0, 1) for _ in range(4 * size)])
        tensors[f"archive.{kind}.0.offset"] = offset
    presets = "near balanced small archive"
    for preset in presets.split():
        for name, curve in (("levels", (0.5, 2)), ("bits", (3, 1)), ("kl", (0.001, 0.1))):
            tensors[f"{preset}.{name}"] = torch.tensor(curve, dtype=torch.float32)
    with TemporaryDirectory() as folder:
        save_artefact(
            Path(folder) / "made",
            kind="codec",
            model=model_identity(spec_of(kvlc_owner("float32"))),
            tensors=tensors,
            settings={"presets": presets, "group": 2, "layers": 3},
        )
        return (Path(folder) / "made").read_bytes()


def kvlc_profiled(preset: str, dtype: str, **more: Json) -> Json:
    """Three layers of 40 tokens; of `odd` ones heads kept other tokens, `pruned` ones channels."""
    owner, layers = kvlc_owner(dtype), []
    rng = _RNG(81)
    channels = [[0, 1, 3, 4, 6], [1, 2, 3, 5, 7]]
    for i in range(3):
        given = {}
        if i == more.get("odd"):
            given["positions"] = [p for _ in range(2) for p in sorted(rng.sample(range(64), 40))]
        if i == more.get("pruned"):
            given["channels"] = channels
        width = 5 if "channels" in given else 8
        keys = kvlc_numbers(90 + i, 2, width, 40, dtype, special=more.get("special", ()))
        values = kvlc_numbers(100 + i, 2, 6, 40, dtype)
        given.setdefault("positions", [p for _ in range(2) for p in range(3, 63) if p % 3])
        layers.append(kv(i, 2, keys, values, **given))
    method = f"kvlc:preset={preset},level={more.get('level', 0.7)},chunk=32,digest={PROFILE}"
    about = f"preset {preset}, {dtype}, tokens that were kept"
    return kvlc(about, method, owner, layers, num_tokens=64)


def tags() -> Json:
    """Every field of a header, and a section of the whole block."""
    owner = spec("golden", "float16", [layer(4, 2, 2, kind="sliding", window=9)])
    shape = {"layer_idx": 0, "num_kv_heads": 1, "k_head_dim": 2, "v_head_dim": 2}
    sections = [
        {"kind": 7, "layer_idx": 0, "raw_bytes": 1, "flags": 0, "data": "0102030405"},
        {"kind": 1, "layer_idx": 0, "raw_bytes": 4, "flags": 1, "data": "00010203"},
        {"kind": 2, "layer_idx": 0, "raw_bytes": 4, "flags": 0, "data": "07"},
        {"kind": 7, "layer_idx": 0xFFFF, "raw_bytes": 0, "flags": 0, "data": "aa" * 17},
    ]
    return case(
        "header fields and sections that no codec uses yet; decoding is refused",
        "future@3:x=1",
        owner,
        [{**shape, "channels": 0, "kind": 2}],
        num_tokens=1,
        start=99,
        keys=["0f" * 32],
        fidelity="snapkv:budget=0.25",
        head_range=[1, 2],
        alignment=16,
        flags=8,
        profile="calibration-é",
        writer="golden",
        sections=sections,
    )


FLOAT32 = words("I", 0x7FC00000, 0x7F800001, 0xFFC12345, 0x80000000, 0x00000001, 0xFF800000)
FLOAT16 = words("H", 0x7E00, 0x7C01, 0xFEAB, 0x8000, 0x0001, 0xFC00)
BFLOAT16 = words("H", 0x7FC0, 0x7F81, 0xFFAB, 0x8000, 0x0001, 0xFF80)
FLOAT8_E4M3FN = words("B", 0x7F, 0xFF, 0x80, 0x01, 0x7E, 0x00)
FLOAT8_E5M2 = words("B", 0x7F, 0xFD, 0x80, 0x01, 0x7C, 0xFC)

CASES = {
    "exact-float32": lambda: dense_bits("float32", FLOAT32),
    "exact-float16": lambda: dense_bits("float16", FLOAT16),
    "exact-bfloat16": lambda: dense_bits("bfloat16", BFLOAT16),
    "exact-float8_e4m3fn": lambda: dense_bits("float8_e4m3fn", FLOAT8_E4M3FN),
    "exact-float8_e5m2": lambda: dense_bits("float8_e5m2", FLOAT8_E5M2),
    "exact-compressed": compressed,
    "exact-record": record,
    "exact-ragged": ragged,
    "exact-mac": authenticated,
    "exact-aligned": aligned,
    "exact-head-range": head_range,
    "exact-empty": empty,
    "exact-snapshot": snapshot,
    "exact2-bfloat16": columns,
    "raw-float16": uncoded,
    "exact2-float32": columns_float32,
    "int8-float32": lambda: integer("int8:group=4", "float32", 7, 4),
    "int8-bfloat16": lambda: integer("int8:group=64", "bfloat16", 16, 12),
    "int8-edges": integer_edges,
    "int4-float32-odd": lambda: integer("int4:group=4", "float32", 7, 3),
    "int4-float16": lambda: integer("int4:group=8", "float16", 17, 8, mac_key="ab" * 16),
    "int4-bfloat16-odd": lambda: integer("int4:group=32", "bfloat16", 33, 5, alignment=64),
    "int4-ragged": integer_ragged,
    "fp8-bfloat16": lambda: integer("fp8:format=e4m3,scale=head", "bfloat16", 7, 4),
    "fp8-none-float32": lambda: integer("fp8:format=e4m3,scale=none", "float32", 7, 4),
    "fp8-token-float16": lambda: integer("fp8:format=e5m2,scale=token", "float16", 16, 8),
    "fp8-ragged": lambda: fixed_ragged("fp8:format=e5m2,scale=head"),
    "kivi-float32": lambda: integer("kivi:bits=3,group=2,residual=1", "float32", 9, 7),
    "kivi-bfloat16": lambda: integer("kivi:bits=4,group=32,residual=0", "bfloat16", 7, 33),
    "kivi-ragged": lambda: fixed_ragged("kivi:bits=2,group=4,residual=2"),
    "hadamard-float32-odd": lambda: integer("hadamard:bits=3,correct=false", "float32", 7, 1),
    "hadamard-bfloat16": lambda: integer("hadamard:bits=2,correct=true", "bfloat16", 80, 16),
    "hadamard-ragged": lambda: fixed_ragged("hadamard:bits=4,correct=true"),
    "kvlc-near-float32": kvlc_near,
    "kvlc-near-bfloat16": kvlc_rotations,
    "kvlc-near-fine": kvlc_fine,
    "kvlc-near-profile": lambda: kvlc_profiled("near", "float16"),
    "kvlc-balanced": lambda: kvlc_profiled("balanced", "bfloat16", odd=1, pruned=2),
    "kvlc-small": lambda: kvlc_profiled("small", "float16", odd=0, level=0.2),
    "kvlc-archive": lambda: kvlc_profiled("archive", "float32", special=[(1, 9, 0, NAN)]),
    "tags": tags,
}


# Entropy-coded streams


def rans_streams() -> list[Json]:
    """Streams of the entropy coder, with the tables they need, and what they are coded to."""
    rng = random.Random(11)
    own = [[4096, 0, 0], [0, 4095, 1], [1, 2, 4093], [1365, 1366, 1365]]
    gaussian = rans.GAUSSIAN.frequencies.tolist()
    streams = []
    for name, frequencies, n, channels, lanes in (
        ("gaussian", None, 16, 24, 8),
        ("gaussian, odd", None, 19, 13, 16),
        ("fewer symbols than lanes", None, 1, 5, 64),
        ("own tables, most lanes", own, 30, 9, 256),
        ("own tables, few symbols", own, 3, 7, 8),
        ("no tokens", own, 0, 3, 8),
    ):
        table = frequencies or gaussian
        rows = [rng.randrange(len(table)) for _ in range(channels)]
        every = range(len(table[0]))
        symbols = [[rng.choices(every, table[row])[0] for row in rows] for _ in range(n)]
        matrix = np.array(symbols, np.uint8).reshape(n, channels)
        (coded,) = rans.encode(
            [matrix], [np.array(rows)], rans.Tables(np.array(table)), [lanes], backend="numpy"
        )
        streams.append(
            {
                "name": name,
                "frequencies": frequencies,  # None: those of the format
                "rows": rows,
                "lanes": lanes,
                "symbols": [bytes(token).hex() for token in symbols],
                "states": coded.states.astype("<u4").tobytes().hex(),
                "words": coded.words.astype("<u2").tobytes().hex(),
            }
        )
    return streams


def case_text(case: Json) -> str:
    """A line for each field; lists of numbers on one line."""

    def lines(value: Json, indent: str) -> str:
        if isinstance(value, dict) and value:
            inner = indent + " "
            items = [f"{inner}{json.dumps(k)}: {lines(v, inner)}" for k, v in value.items()]
            return "{\n" + ",\n".join(items) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(x, dict) for x in value):
            inner = indent + " "
            items = [inner + lines(x, inner) for x in value]
            return "[\n" + ",\n".join(items) + f"\n{indent}]"
        return json.dumps(value)

    return lines(case, "") + "\n"


def golden_files() -> dict[Path, bytes]:
    """Every golden file as it would be written now."""
    files = {FOLDER / "keys.json": keys_text(make_keys()).encode()}
    profile = PROFILES / f"{PROFILE}.safetensors"
    files[profile] = kvlc_profile()
    if not profile.exists():  # it is needed now
        write_missing({profile: files[profile]})
    files[FOLDER / "rans.json"] = case_text({"streams": rans_streams()}).encode()
    for name, make in CASES.items():
        data, out = finished(make())
        files[CONTAINERS / f"{name}.kvlc"] = data
        files[CONTAINERS / f"{name}.json"] = case_text(out).encode()
    return files


def write_missing(files: dict[Path, bytes]) -> tuple[list[Path], list[Path]]:
    """Write the files that do not exist; (those written, those that exist and differ)."""
    written, different = [], []
    for path, data in files.items():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written.append(path)
        elif path.read_bytes() != data:
            different.append(path)
    return written, different


def main() -> int:
    """Write what is missing and say so."""
    written, different = write_missing(golden_files())
    sys.stdout.writelines(f"wrote {path.name}\n" for path in written)
    sys.stdout.writelines(f"left alone, though it differs: {path.name}\n" for path in different)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
