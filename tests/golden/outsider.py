# SPDX-License-Identifier: Apache-2.0
"""A reader of kvlib's formats that shares no code with kvlib.

Written from the pages of docs/formats alone. Keys need the standard
library; containers need xxhash, zstandard and NumPy as well. Specs and extras are plain JSON: the
names are those of the tables in block.md.
"""

import hmac
import importlib.util
import itertools
import re
import struct
import sys
from hashlib import blake2b
from pathlib import Path

PREFIX, SNAPSHOT, SPEC, STORAGE, MODEL = 1, 3, 5, 6, 7
BLOCK = 64


class Refused(Exception):
    """No numbers come out of these bytes."""


class Damaged(Refused):
    """They contradict themselves."""


class Foreign(Refused):
    """Another version, model, codec or key."""


def need(condition, message, error=Damaged):
    if not condition:
        raise error(message)


# block.md: keys and fingerprints


def encode(value):
    if value is None:
        return b"\x6e"
    if value is True or value is False:
        return b"\x62\x01" if value else b"\x62\x00"
    if isinstance(value, int):
        return b"\x69" + struct.pack("<q", value)
    if isinstance(value, float):
        return b"\x66" + struct.pack("<d", 0.0 if value == 0 else value)
    if isinstance(value, str):
        data = value.encode("utf-8")
        return b"\x73" + struct.pack("<Q", len(data)) + data
    if isinstance(value, bytes):
        return b"\x79" + struct.pack("<Q", len(value)) + value
    return b"\x6c" + struct.pack("<Q", len(value)) + b"".join(encode(item) for item in value)


def hashed(namespace, *fields):
    data = b"\x6b\x76\x6c\x69\x62\x00\x01" + bytes([namespace])
    return blake2b(data + b"".join(map(encode, fields)), digest_size=32).digest()


def rope_fields(rope):
    if rope is None:
        return None
    params = sorted([name, float(number)] for name, number in rope["params"])
    theta = float(rope["theta"])
    last = (rope["interleaved"], params, rope["first_channel"])
    return [rope["kind"], theta, rope["rotary_dim"], *last]


def layer_fields(layer):
    names = ("kind", "num_kv_heads", "k_head_dim", "v_head_dim", "window")
    return [*(layer[name] for name in names), rope_fields(layer["rope"])]


def spec_fingerprint(spec):
    names = ("model_id", "adapter", "weight_quantization", "dtype", "rope_state", "kv_scales")
    layers = [layer_fields(layer) for layer in spec["layers"]]
    return hashed(SPEC, *(spec[name] for name in names), layers)


def model_identity(files):
    """`files`: {name: content}."""
    fields = [
        [name, len(files[name]), blake2b(files[name], digest_size=32).digest()]
        for name in sorted(files)
    ]
    return hashed(MODEL, fields)


def extra_fields(extras):
    """`extras`: lists of kind, content digest (bytes), offset."""
    return sorted([kind, bytes(content), offset] for kind, content, offset in extras)


def token_bytes(tokens):
    return b"".join(struct.pack("<I", token) for token in tokens)


def root_key(fingerprint, salt=b"", extras=()):
    return hashed(PREFIX, "root", fingerprint, salt, extra_fields(extras))


def block_keys(root, tokens, block_extras=None):
    keys, key = [], root
    for i in range(len(tokens) // BLOCK):
        ids = token_bytes(tokens[BLOCK * i : BLOCK * (i + 1)])
        key = hashed(PREFIX, "block", key, ids, extra_fields((block_extras or {}).get(i, ())))
        keys.append(key)
    return keys


def snapshot_key(fingerprint, tokens, method, artefacts=(), salt=b"", extras=()):
    ids = token_bytes(tokens)
    return hashed(SNAPSHOT, fingerprint, salt, extra_fields(extras), ids, method, list(artefacts))


def storage_fingerprint(fingerprint, codec, layers, fidelity="exact", head_range=None, profile=""):
    return hashed(STORAGE, fingerprint, BLOCK, codec, fidelity, head_range, list(layers), profile)


def kept_layers(spec):
    return [i for i, layer in enumerate(spec["layers"]) if layer["kind"] != "recurrent"]


# container.md: header

MAGIC = bytes.fromhex("894b564c430d0a1a")
KEYS, VALUES, POSITIONS, LOG_WEIGHT, CHANNELS, ROW_LENGTHS, CODEC, STATE = range(1, 9)
RAW = 1
WHOLE = 65535
DTYPES = {
    1: ("float32", 4),
    2: ("float16", 2),
    3: ("bfloat16", 2),
    4: ("float8_e4m3fn", 1),
    5: ("float8_e5m2", 1),
}
LAYER_KINDS = {1: "full", 2: "sliding", 3: "mla"}
LOSSLESS_FLAG, MIXES_HEADS_FLAG, EXPLICIT_FLAG, MAC_FLAG = 1, 4, 16, 32
CODEC_FLAGS = 2 | 4 | 8


def xxh3(data):
    import xxhash

    return xxhash.xxh3_64_intdigest(data, seed=0).to_bytes(8, "little")


def mac(data, key, person):
    return blake2b(data, digest_size=16, key=key, person=person.ljust(16, b"\0")).digest()


def section_digest(data, mac_key):
    if mac_key is None:
        return xxh3(data) + bytes(8)
    return mac(data, mac_key, b"KVLC section")


def text(data):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise Damaged("a text is not UTF-8") from exc


def parse_tags(data):
    tags, at = {}, 0
    while at < len(data):
        need(len(data) - at >= 6, "a tag is cut off")
        tag, size = struct.unpack_from("<HI", data, at)
        need(size <= len(data) - at - 6, "a tag's value is cut off")
        need(tag not in tags, "a tag occurs twice")
        known = tag == 1 or 0x8001 <= tag <= 0x8006
        need(known or tag < 0x8000, "an unknown critical tag", Foreign)
        tags[tag] = data[at + 6 : at + 6 + size]
        at += 6 + size
    need({0x8001, 0x8002, 0x8003} <= set(tags), "a required tag is missing")
    return tags


def parse_layers(data, count):
    need(len(data) == 12 * count, "the layers do not fill their tag")
    layers = []
    for index, heads, k_dim, v_dim, channels, kind, zero in struct.iter_unpack("<5H2B", data):
        need(kind in LAYER_KINDS, "an unknown layer kind", Foreign)
        need(not layers or index > layers[-1]["layer_idx"], "layers out of order")
        need(index < WHOLE and heads and k_dim and channels <= k_dim and not zero, "bad layer")
        layers.append(
            {
                "layer_idx": index,
                "num_kv_heads": heads,
                "k_head_dim": k_dim,
                "v_head_dim": v_dim,
                "channels": channels,
                "kind": kind,
            }
        )
    return layers


def parse_sections(data, header, limit):
    unit = header["alignment"]

    def up(n):
        return (n + unit - 1) // unit * unit

    layers = {layer["layer_idx"] for layer in header["layers"]}
    sections, seen, end = [], set(), header["header_bytes"]
    for kind, index, flags, offset, stored, raw, digest in struct.iter_unpack("<HHI3Q16s", data):
        need(KEYS <= kind <= STATE and flags <= RAW, "unknown section kind or flags", Foreign)
        of_layer = index in layers and kind != STATE
        need(of_layer or (index == WHOLE and kind in (CODEC, STATE)), "a section of no layer")
        need(kind != STATE or (stored == raw and flags == RAW), "state is not raw")
        need((kind, index) not in seen, "a section occurs twice")
        need(offset == up(end), "a section does not begin where the one before ends")
        need(offset + stored <= header["total_bytes"], "a section leaves the container")
        need(stored <= raw or kind == CODEC, "a section is larger than what it decodes to")
        seen.add((kind, index))
        end = offset + stored
        sections.append(
            {
                "kind": kind,
                "layer_idx": index,
                "flags": flags,
                "offset": offset,
                "stored_bytes": stored,
                "raw_bytes": raw,
                "digest": digest.hex(),
            }
        )
    need(up(end) == header["total_bytes"], "the sections do not fill the container")
    need(sum(s["raw_bytes"] for s in sections) <= limit, "it claims to decode to too much")
    return sections


def parse(data, mac_key=None, limit=4 << 30):
    """The checked header as a plain dict; bytes are hex."""
    need(len(data) >= 16 and data[:8] == MAGIC, "not a container")
    version, flags, header_bytes = struct.unpack_from("<HHI", data, 8)
    need(version == 1, "another version", Foreign)
    need(120 <= header_bytes <= 65536, "impossible header size")
    need(header_bytes <= len(data), "the header is cut off")
    keyed = bool(flags & MAC_FLAG)
    body = header_bytes - 8 - 16 * keyed
    need(body >= 112 and xxh3(data[:body]) == data[body : body + 8], "header checksum")
    need(keyed == (mac_key is not None), "MAC without a key, or a key without MAC", Foreign)
    if keyed:
        expected = mac(data[: body + 8], mac_key, b"KVLC header")
        need(hmac.compare_digest(expected, data[body + 8 : header_bytes]), "header MAC")
    need(flags < 64, "unknown flags", Foreign)
    total = int.from_bytes(data[16:24], "little")
    spec, storage = data[24:56], data[56:88]
    start, tokens, tlv_bytes, num_sections = struct.unpack_from("<QIII", data, 88)
    num_layers, dtype, log2 = struct.unpack_from("<HBB", data, 108)
    need(start + tokens <= 1 << 31, "positions beyond 2**31")
    need(dtype in DTYPES, "unknown dtype", Foreign)
    need(3 <= log2 <= 16, "impossible alignment")
    need(112 + tlv_bytes + 48 * num_sections == body, "tags and table do not fill the header")
    tags = parse_tags(data[112 : 112 + tlv_bytes])
    keys = tags[0x8002]
    need(len(keys) % 32 == 0, "keys are cut off")
    need(len(keys) <= 32 or tokens == len(keys) // 32 * BLOCK, "keys do not fit the tokens")
    heads = tags.get(0x8006)
    if heads is not None:
        need(len(heads) == 4, "head range")
        heads = list(struct.unpack("<HH", heads))
        need(heads[0] < heads[1], "empty head range")
    header = {
        "flags": flags,
        "header_bytes": header_bytes,
        "total_bytes": total,
        "spec_fingerprint": spec.hex(),
        "storage_fingerprint": storage.hex(),
        "start": start,
        "num_tokens": tokens,
        "dtype": dtype,
        "alignment": 1 << log2,
        "codec": text(tags[0x8001]),
        "keys": [keys[i : i + 32].hex() for i in range(0, len(keys), 32)],
        "layers": parse_layers(tags[0x8003], num_layers),
        "profile": text(tags.get(0x8004, b"")),
        "fidelity": text(tags.get(0x8005, b"exact")),
        "head_range": heads,
        "writer": text(tags.get(0x0001, b"")),
    }
    header["sections"] = parse_sections(data[112 + tlv_bytes : body], header, limit)
    indices = [layer["layer_idx"] for layer in header["layers"]]
    expected = storage_fingerprint(
        spec, header["codec"], indices, header["fidelity"], heads, header["profile"]
    )
    need(storage == expected, "the storage fingerprint is not that of this header")
    explicit = any(s["kind"] == POSITIONS for s in header["sections"])
    need(bool(flags & EXPLICIT_FLAG) == explicit, "flag POSITIONS_EXPLICIT")
    return header


def verify(data, mac_key=None, limit=4 << 30):
    """The header, after every byte of the container has been checked."""
    data = bytes(data)
    header = parse(data, mac_key, limit)
    need(header["total_bytes"] == len(data), "not the whole container, or more than it")
    end = header["header_bytes"]
    for section in header["sections"]:
        need(not any(data[end : section["offset"]]), "padding is not zero")
        end = section["offset"] + section["stored_bytes"]
        digest = section_digest(data[section["offset"] : end], mac_key)
        need(hmac.compare_digest(digest.hex(), section["digest"]), "section digest")
    need(not any(data[end:]), "padding is not zero")
    return header


# container.md: contents


def check_spec(header, spec):
    """Compare a header with the spec it is expected to belong to."""
    need(header["spec_fingerprint"] == spec_fingerprint(spec).hex(), "another model", Foreign)
    need(DTYPES[header["dtype"]][0] == spec["dtype"], "dtype is not the spec's")
    most = max(layer["num_kv_heads"] for layer in spec["layers"])
    heads = header["head_range"]
    need(heads is None or (heads[1] <= most and heads != [0, most]), "head range")
    for layer in header["layers"]:
        need(layer["layer_idx"] < len(spec["layers"]), "a layer the model does not have")
        want = spec["layers"][layer["layer_idx"]]
        for name in ("k_head_dim", "v_head_dim"):
            need(layer[name] == want[name], f"{name} is not the spec's")
        need(LAYER_KINDS[layer["kind"]] == want["kind"], "kind is not the spec's")
        if heads is None:
            need(layer["num_kv_heads"] == want["num_kv_heads"], "heads are missing")
        else:
            bound = min(want["num_kv_heads"], heads[1] - heads[0])
            need(layer["num_kv_heads"] <= bound, "more heads than the range holds")


def to_float32(raw, dtype):
    """The numbers in `raw` (bytes) as a flat float32 array."""
    import numpy as np

    if dtype == "float32":
        return np.frombuffer(raw, "<f4").astype(np.float32)
    if dtype == "float16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    if dtype == "bfloat16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "float8_e5m2":
        return (np.frombuffer(raw, "u1").astype(np.uint16) << 8).view(np.float16).astype("f4")
    table = []
    for byte in range(256):
        sign = -1.0 if byte & 128 else 1.0
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = (mantissa / 8 + bool(exponent)) * 2.0 ** (max(exponent, 1) - 7)
        table.append(sign * (float("nan") if byte & 127 == 127 else size))
    return np.array(table, np.float32)[np.frombuffer(raw, "u1")]


def from_float32(x, dtype):
    """The bytes of finite float32 numbers rounded to `dtype`, to nearest even."""
    import numpy as np

    if dtype == "float32":
        return x.astype("<f4").tobytes()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype("<f2").tobytes()
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


LOSSLESS = ("exact@1", "exact@2", "raw@1")
ROWS, COLUMNS, AS_IS = "rows", "columns", "as it is"


def decode_exact(data, rows, width, dtype, forms):
    """`forms`: what the high bits of a plane's word mean, one bit or two of them."""
    import numpy as np
    import zstandard

    itemsize = dict(DTYPES.values())[dtype]
    count = rows * width
    need(len(data) >= 4 * itemsize, "the plane sizes are cut off")
    out = np.empty((count, itemsize), np.uint8)
    at = 4 * itemsize
    for plane, word in enumerate(struct.unpack_from(f"<{itemsize}I", data)):
        code, size = divmod(word, 1 << (31 if len(forms) == 2 else 30))
        need(code in forms, "a plane of no form")
        need(size <= len(data) - at, "a plane is cut off")
        stored = data[at : at + size]
        at += size
        if forms[code] != AS_IS:
            need(stored[:4] == b"\x28\xb5\x2f\xfd", "not a zstandard frame")
            try:
                frame = zstandard.get_frame_parameters(stored)
                need(frame.content_size == count, "a plane of another size")
                need(not frame.dict_id and frame.window_size <= 8 << 20, "dictionary or window")
                stored = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
            except zstandard.ZstdError as exc:
                raise Damaged("a plane does not decompress") from exc
        need(len(stored) == count, "a plane of another size")
        if forms[code] == COLUMNS:
            stored = bytes(stored[c * rows + r] for r in range(rows) for c in range(width))
        out[:, plane] = np.frombuffer(stored, np.uint8)
    need(at == len(data), "bytes follow the last plane")
    return out.tobytes()


def decode_integer(data, rows, width, dtype, bits, group):
    import numpy as np

    groups = -(-width // group)
    body = rows * (width if bits == 8 else -(-width // 2))
    side = 2 * rows * groups
    need(len(data) == 2 * side + body, "the section has another size")
    minimum = np.frombuffer(data[:side], "<f2").astype(np.float32).reshape(rows, groups)
    step = np.frombuffer(data[side : 2 * side], "<f2").astype(np.float32).reshape(rows, groups)
    need(np.isfinite(minimum).all() and np.isfinite(step).all(), "a minimum or step not finite")
    need((step >= 0).all(), "a negative step")
    codes = np.frombuffer(data[2 * side :], np.uint8).reshape(rows, -1)
    if bits == 4:
        need(width % 2 == 0 or not (codes[:, -1] >> 4).any(), "bits after the last code")
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(rows, -1)[:, :width]
    of = np.arange(width) // group
    return from_float32(minimum[:, of] + codes.astype(np.float32) * step[:, of], dtype)


def beside(name):
    """A file beside this one that reads codecs of its own."""
    if name not in sys.modules:
        path = Path(__file__).with_name(f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault("outsider", sys.modules[__name__])
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def fixed_rate():
    return beside("outsider_fixed")


def transform():
    return beside("outsider_kvlc")


def decode_tensor(section, data, codec, layer_idx, lengths, width, dtype):
    """The bytes of a KEYS or VALUES tensor; `lengths` are the entries of each head.

    None where all layers are needed: `decode` fills these in.
    """
    rows = sum(lengths)
    size = rows * width * dict(DTYPES.values())[dtype]
    need(section["raw_bytes"] == size, "raw_bytes is not the size of the shape")
    if section["flags"] & RAW:
        need(len(data) == size, "a raw section of another size")
        return data
    if not size:
        return b""
    need(codec != "raw@1", "a section that is not raw")
    if codec == "exact@1":
        return decode_exact(data, rows, width, dtype, {0: ROWS, 1: AS_IS})
    if codec == "exact@2":
        return decode_exact(data, rows, width, dtype, {0: ROWS, 1: COLUMNS, 2: AS_IS})
    name, _, group = codec.partition("@1:group=")
    need(dtype in ("float32", "float16", "bfloat16"), f"{name} does not hold {dtype}", Foreign)
    if codec.startswith("kvlc@1:"):
        return None
    if fixed_rate().known(codec):
        return fixed_rate().decode(
            codec,
            data,
            kind=section["kind"],
            layer_idx=layer_idx,
            lengths=lengths,
            width=width,
            dtype=dtype,
        )
    return decode_integer(data, rows, width, dtype, int(name[3:]), int(group))


def known_codec(text):
    match = re.fullmatch(r"int[48]@1:group=([1-9][0-9]{0,3})", text, re.ASCII)
    if match is not None:
        return 2 <= int(match[1]) <= 1024
    if text.startswith("kvlc@1:"):
        return transform().known(text) is not None
    return text in LOSSLESS or fixed_rate().known(text) is not None


def decode(data, spec=None, mac_key=None, limit=4 << 30):
    """Every layer of a container, as dicts of NumPy arrays; `spec` is what the caller expects.

    `keys` and `values` are float32, `keys_bytes` and `values_bytes` the same in the container's
    dtype, bit for bit.
    """
    data = bytes(data)
    header = verify(data, mac_key, limit)
    if spec is not None:
        check_spec(header, spec)
    need(known_codec(header["codec"]), "an unknown codec", Foreign)
    transformed = header["codec"].startswith("kvlc@1:")
    flags, profile = 0, ""
    if transformed:
        need(spec is not None, "keys cannot be turned without the spec", Foreign)
        flags, profile = transform().flags_of(header, spec)
    need(header["flags"] & CODEC_FLAGS == flags, "flags of the codec", Foreign)
    need(header["profile"] == profile, "another profile", Foreign)
    need(header["head_range"] is None or not flags & MIXES_HEADS_FLAG, "a range of mixed heads")
    lossless = header["codec"] in LOSSLESS
    need(bool(header["flags"] & LOSSLESS_FLAG) == lossless, "flag LOSSLESS")
    layers = [decode_layer(data, header, layer) for layer in header["layers"]]
    if transformed:
        header["integers"] = transform().fill(data, header, spec, layers)
    return header, layers


STATE_TYPES = {1: "bool", 2: "uint8", 3: "int32", 4: "int64", 5: "float32", 6: "float64"}
STATE_SIZES = {1: 1, 2: 1, 3: 4, 4: 8, 5: 4, 6: 8}


def read_state(data):
    """A STATE section as [name, dtype, sizes, bytes in hex]."""
    tensors, at = [], 4
    need(len(data) >= 4, "state is cut off")
    for _ in range(struct.unpack_from("<I", data)[0]):
        need(len(data) >= at + 4, "state is cut off")
        length, code, dims = struct.unpack_from("<HBB", data, at)
        need(code in STATE_TYPES, "an unknown type of state", Foreign)
        need(length > 0 and dims <= 4, "impossible state")
        name = text(data[at + 4 : at + 4 + length])
        at += 4 + length
        need(len(data) >= at + 8 * dims, "state is cut off")
        sizes = struct.unpack_from(f"<{dims}Q", data, at)
        at += 8 * dims
        size = STATE_SIZES[code]
        for n in sizes:
            need(n <= 1 << 31, "impossible state")
            size *= n
        need(size <= len(data) - at, "state is cut off")
        need(not tensors or name > tensors[-1][0], "state is out of order")
        raw = bytes(data[at : at + size])
        need(code != 1 or max(raw, default=0) <= 1, "a truth value above 1")
        tensors.append([name, STATE_TYPES[code], list(sizes), raw.hex()])
        at += size
    need(at == len(data), "bytes behind the state")
    return tensors


def decode_layer(data, header, layer):
    import numpy as np

    sections = {s["kind"]: s for s in header["sections"] if s["layer_idx"] == layer["layer_idx"]}
    heads = layer["num_kv_heads"]

    def stored(kind):
        section = sections[kind]
        return data[section["offset"] : section["offset"] + section["stored_bytes"]]

    def side(kind, dtype, count):
        if kind not in sections:
            return None
        section, size = sections[kind], np.dtype(dtype).itemsize * count
        sizes = (section["stored_bytes"], section["raw_bytes"])
        need(section["flags"] == RAW and sizes == (size, size), "a side section of another size")
        return np.frombuffer(stored(kind), dtype)

    need(KEYS in sections and VALUES in sections, "keys or values are missing")
    lengths = side(ROW_LENGTHS, "<u4", heads)
    if lengths is not None:
        need(POSITIONS in sections, "rows of different length without positions")
        lengths = [int(n) for n in lengths]
        shape = (sum(lengths),)
    elif POSITIONS in sections:
        per_head, rest = divmod(sections[POSITIONS]["stored_bytes"], 4 * heads)
        need(not rest, "positions do not divide over the heads")
        shape = (heads, per_head)
    else:
        shape = (heads, header["num_tokens"])
    per_head = lengths if lengths is not None else [shape[1]] * heads
    rows = sum(per_head)
    width = layer["channels"] or layer["k_head_dim"]
    dtype = DTYPES[header["dtype"]][0]
    out = {"layer_idx": layer["layer_idx"], "row_lengths": lengths}
    start, stop = header["start"], header["start"] + header["num_tokens"]
    positions = side(POSITIONS, "<i4", rows)
    for name, kind, columns in (("keys", KEYS, width), ("values", VALUES, layer["v_head_dim"])):
        # Sizes were compared with the bytes that are there; nothing large is made before that.
        section, codec, index = sections[kind], header["codec"], layer["layer_idx"]
        raw = decode_tensor(section, stored(kind), codec, index, per_head, columns, dtype)
        if raw is not None:
            out[f"{name}_bytes"] = raw
            out[name] = to_float32(raw, dtype).reshape(*shape, columns)
    if positions is None:
        positions = np.tile(np.arange(start, stop).astype(np.int32), (heads, 1))
        out["positions"] = positions
    else:
        at = 0
        for n in per_head:
            row = [int(p) for p in positions[at : at + n]]
            real = row[: len(row) - row.count(-1)]
            need(all(start <= p < stop for p in real), "a position outside the run")
            need(all(a < b for a, b in itertools.pairwise(real)), "positions not ascending")
            at += n
        out["positions"] = positions.reshape(shape)
    weight = side(LOG_WEIGHT, "<f4", rows)
    need(weight is None or np.isfinite(weight).all(), "a weight that is not finite")
    out["log_weight"] = None if weight is None else weight.reshape(shape)
    channels = side(CHANNELS, "<u2", heads * layer["channels"])
    need((channels is None) == (layer["channels"] == 0), "channel list missing or unexpected")
    if channels is not None:
        channels = channels.reshape(heads, -1).astype(np.int64)
        need((channels < layer["k_head_dim"]).all(), "a channel the model does not have")
        need((channels[:, 1:] > channels[:, :-1]).all(), "channels not ascending")
    out["channels"] = channels
    return out
