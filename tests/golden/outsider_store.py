# SPDX-License-Identifier: Apache-2.0
"""The outsider's stores: folders, prefixes, head ranges and the engines' salts.

Written from block.md, files.md and segments.md alone; shares no code with kvlib. A store is a dict
from the 64 bytes of an address to a container; no index is used.
"""

import re
import struct
from hashlib import blake2b

import numpy as np
import outsider
from outsider import BLOCK, Refused, need, xxh3

CHUNK = 4  # blocks between the cuts of records
PAGE = 4096


# block.md: salts of requests, head ranges, records


def request_salt(salt, cache_salt):
    """The salt of an engine's request, as bytes; both are texts, `cache_salt` may be None."""
    if not cache_salt:
        return salt.encode("utf-8")
    return outsider.hashed(outsider.PREFIX, "request salt", salt, cache_salt)


def tenant(salt, mac_key=None):
    """The 8 bytes that name the account of a store's salt (bytes)."""
    if not salt:
        return bytes(8)
    return blake2b(salt, digest_size=8, key=mac_key or b"", person=b"kvlib tenant").digest()


def most_heads(spec):
    return max(layer["num_kv_heads"] for layer in spec["layers"])


def rank_range(spec, rank, ranks):
    """The head range of a tensor-parallel rank, None for all heads."""
    most = most_heads(spec)
    first = rank * most // ranks
    last = first + max(most // ranks, 1)
    return None if last - first == most else [first, last]


def heads_of(spec, layer, head_range):
    """Which of a layer's heads lie in records of a range."""
    heads = spec["layers"][layer]["num_kv_heads"]
    if head_range is None:
        return range(heads)
    most = most_heads(spec)
    first, last = (end * heads // most for end in head_range)
    return range(first, first + max(last - first, 1))


def groups(missing):
    """The records, as (first block, blocks), that a put of these missing blocks writes."""
    out, run = [], []
    for index in sorted(missing):
        if run and index != run[-1] + 1:
            out += [(i, 1) for i in run]
            run = []
        run.append(index)
        if (index + 1) % CHUNK == 0:
            out.append((run[0], len(run)))
            run = []
    return out + [(i, 1) for i in run]


def walk(store, keys, storages, mac_key=None):
    """The records of the leading blocks: (first block, blocks of ours, address)."""
    at, found = 0, []
    while at < len(keys):
        for storage in storages:
            count = leading(store.get(keys[at] + storage), keys, storage, at, mac_key)
            if count:
                found.append((at, count, keys[at] + storage))
                at += count
                break
        else:
            break
    return found


def leading(data, keys, storage, at, mac_key):
    """How many of the blocks from `at` on a record has, 0 if it may not be used."""
    if data is None:
        return 0
    try:
        header = outsider.parse(data, mac_key)
    except Refused:
        return 0
    held = [bytes.fromhex(key) for key in header["keys"]]
    if not held or header["storage_fingerprint"] != storage.hex():
        return 0
    if header["start"] != BLOCK * at or header["num_tokens"] != BLOCK * len(held):
        return 0
    pairs = enumerate(zip(held, keys[at:], strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(held), len(keys) - at))


def read_prefix(store, spec, keys, storages, head_range=None, mac_key=None):
    """Keys and values of the leading blocks: how many they are, and [Hkv, T, bytes] by layer."""
    parts = {}
    blocks = 0
    for _, count, address in walk(store, keys, storages, mac_key):
        header, layers = outsider.decode(store[address], spec, mac_key)
        need(header["head_range"] == head_range, "a record of other heads")
        for layer in layers:
            held = len(heads_of(spec, layer["layer_idx"], head_range))
            for name in ("keys", "values"):
                raw = np.frombuffer(layer[f"{name}_bytes"], np.uint8)
                raw = raw.reshape(held, header["num_tokens"], -1)
                parts.setdefault((layer["layer_idx"], name), []).append(raw[:, : BLOCK * count])
        blocks += count
    return blocks, {name: np.concatenate(raw, axis=1) for name, raw in parts.items()}


def join_ranks(spec, ranks):
    """Whole layers from what ranks hold, [(head range, blocks, layers of `read_prefix`)]."""
    blocks = min(blocks for _, blocks, _ in ranks)
    whole = {}
    for head_range, _, layers in ranks:
        for (layer, name), raw in layers.items():
            for head, row in zip(heads_of(spec, layer, head_range), raw, strict=True):
                whole.setdefault((layer, name), {})[head] = row[: BLOCK * blocks]
    for (layer, _), rows in whole.items():
        need(len(rows) == spec["layers"][layer]["num_kv_heads"], "heads that no rank holds")
    return blocks, {name: np.stack([rows[h] for h in sorted(rows)]) for name, rows in whole.items()}


# files.md


def read_folder(folder):
    """A file store: containers, and (expires, tenant) of each, by address."""
    need((folder / "FORMAT").read_bytes() == b"kvlib filestore 2\n", "another version")
    records, terms = {}, {}
    for path in sorted(folder.glob("*/*.kvlc")):
        if re.fullmatch(r"[0-9a-f]{128}", path.stem) and path.parent.name == path.stem[:2]:
            address, data = bytes.fromhex(path.stem), path.read_bytes()
            end = data[-32:]
            if len(end) < 32 or end[:8] != bytes.fromhex("894b56454e440d0a"):
                continue
            if xxh3(address + end[:24]) == end[24:]:
                records[address] = data[:-32]
                terms[address] = (int.from_bytes(end[8:16], "little"), end[16:24])
    return records, terms


# segments.md


def read_segments(folder):
    """A segment store that nobody has open, without its index; as `read_folder`."""
    lines = (folder / "SUPER").read_bytes().splitlines(keepends=True)
    need(lines[0] == b"kvlib segment store 2\n" and len(lines) == 4, "another version")
    check = int.from_bytes(xxh3(b"".join(lines[:3])), "little")
    need(lines[3] == b"xxh3 %016x\n" % check, "checksum of SUPER")
    uuid, granule = bytes.fromhex(lines[1].split()[1].decode()), int(lines[2].split()[1])
    files = {int(path.stem[4:], 16): path.read_bytes() for path in folder.glob("seg-*.kv")}
    found = []
    for number, data in files.items():
        for first in range(len(data) // granule):
            page = data[first * granule : first * granule + PAGE]
            if page[:8] != bytes.fromhex("894b565345470d0a") or xxh3(page[:4088]) != page[4088:]:
                continue
            version, count, unit, store = struct.unpack_from("<HHI16s", page, 8)
            if (version, unit, store) != (2, granule, uuid) or not 1 <= count <= 4:
                continue
            generation, size, expires, account = struct.unpack_from("<QQQ8s", page, 96)
            extents = list(struct.iter_unpack("<III", page[128 : 128 + 12 * count]))
            inside = all((f + n) * granule <= len(files.get(s, b"")) for s, f, n in extents)
            if inside and extents[0][:2] == (number, first):
                found.append((generation, page[32:96], size, (expires, account), extents))
    taken, records, terms = set(), {}, {}
    for _, address, size, mine, extents in sorted(found, reverse=True):
        room = {(s, f + i) for s, f, n in extents for i in range(n)}
        if address in records or room & taken:
            continue
        taken |= room
        body = b"".join(files[s][f * granule : (f + n) * granule] for s, f, n in extents)
        need(not any(body[PAGE + size : PAGE + -(-size // PAGE) * PAGE]), "padding is not zero")
        records[address], terms[address] = body[PAGE : PAGE + size], mine
    return records, terms


def read_store(folder):
    """The store in a folder, whichever it is."""
    return read_folder(folder) if (folder / "FORMAT").exists() else read_segments(folder)
