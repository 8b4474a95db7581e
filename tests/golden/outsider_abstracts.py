# SPDX-License-Identifier: Apache-2.0
"""The outsider's abstracts, from docs/formats/container.md alone; sound containers only."""

import re

import numpy as np
import outsider
from outsider import BLOCK, CODEC, RAW, need

ITEMS = {"int8": 1, "bfloat16": 2, "float32": 4}


def decode(data, mac_key=None):
    """Header, and of every layer (lo, hi) float32 [n, Hkv, D], or codes uint8 [tokens, Hkv, M]."""
    data = bytes(data)
    header = outsider.verify(data, mac_key)
    need(header["num_tokens"] == BLOCK * len(header["keys"]) > 0, "no whole blocks")
    need(header["start"] % BLOCK == 0, "it does not begin with a block")
    boxes = re.fullmatch(r"boxes@1:dtype=(int8|bfloat16|float32),leaf=(16|32|64)", header["codec"])
    codes = re.fullmatch(r"codes@1:parts=([1-9][0-9]*)", header["codec"])
    need(boxes or codes, "no abstracts", outsider.Foreign)
    need(header["flags"] & ~outsider.MAC_FLAG == (8 if codes else 0), "flags")
    need(bool(header["profile"]) == bool(codes), "profile")
    sections = {s["layer_idx"]: s for s in header["sections"]}
    need(len(sections) == len(header["sections"]) == len(header["layers"]), "one for each layer")
    out = []
    for layer in header["layers"]:
        heads, dim = layer["num_kv_heads"], layer["k_head_dim"]
        section = sections[layer["layer_idx"]]
        size = section["stored_bytes"]
        need((section["kind"], section["flags"]) == (CODEC, RAW), "section")
        at = section["offset"]
        raw = np.frombuffer(data[at : at + size], np.uint8)
        if codes:
            parts = int(codes[1])
            need(size == header["num_tokens"] * heads * parts, "section size")
            out.append(raw.reshape(-1, heads, parts))
            continue
        dtype, leaf = boxes[1], int(boxes[2])
        split = heads if dtype == "int8" else 0
        width = split + 2 * heads * dim * ITEMS[dtype]
        need(size == header["num_tokens"] // leaf * width, "section size")
        rows = raw.reshape(-1, width)
        if dtype == "int8":
            exponents = rows[:, :split].astype(np.int8).astype(int)
            x = np.ldexp(
                rows[:, split:].view(np.int8).astype(np.float32).reshape(-1, heads, 2, dim),
                exponents[:, :, None, None],
            )
        else:
            x = outsider.to_float32(rows.tobytes(), dtype).reshape(-1, heads, 2, dim)
        out.append((-x[:, :, 0], x[:, :, 1]))
    return header, out
