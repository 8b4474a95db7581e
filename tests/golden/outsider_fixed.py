# SPDX-License-Identifier: Apache-2.0
"""The outsider's fixed-rate codecs: fp8, kivi and hadamard, from docs/formats/codec.md alone.

Shares no code with kvlib. `outsider.py` loads this file when a container needs it.
"""

import re

import numpy as np
import outsider
from outsider import need

FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
PATTERN = re.compile(
    r"fp8@1:format=(?P<format>e4m3|e5m2),scale=(?P<scale>none|head|token)"
    r"|kivi@1:bits=(?P<bits>[234]),group=(?P<group>[1-9][0-9]{0,3})"
    r",residual=(?P<residual>0|[1-9][0-9]{0,6})"
    r"|hadamard@1:bits=(?P<levels>[234]),correct=(true|false)",
    re.ASCII,
)
LEVELS = {
    2: "0.452780035 1.510417608",
    3: "0.245094179 0.756005281 1.343909279 2.151945705",
    4: "0.128395030 0.388048299 0.656759119 0.942340456 1.256231197 1.618046386 2.069017227 "
    "2.732589571",
}


def known(text):
    """The parameters of a codec string, None if it is no fixed-rate one."""
    match = PATTERN.fullmatch(text)
    if match is None:
        return None
    found = match.groupdict()
    if found["group"] is not None and (
        not 2 <= int(found["group"]) <= 1024 or int(found["residual"]) > 1 << 20
    ):
        return None
    return found


class Bytes:
    """A section, read from the front."""

    def __init__(self, data, size):
        need(len(data) == size, "the section has another size")
        self.data, self.at = data, 0

    def take(self, size):
        self.at += size
        return self.data[self.at - size : self.at]

    def halves(self, count, *, negative=False):
        x = np.frombuffer(self.take(2 * count), "<f2").astype(np.float32)
        need(np.isfinite(x).all(), "a number that is not finite")
        need(negative or (x >= 0).all(), "a negative number")
        return x

    def codes(self, rows, width, bits):
        size = -(-width * bits // 8)
        raw = np.frombuffer(self.take(rows * size), np.uint8).reshape(rows, size)
        each = np.unpackbits(raw, axis=1, bitorder="little")
        need(not each[:, width * bits :].any(), "bits after the last code")
        each = each[:, : width * bits].reshape(rows, width, bits)
        return (each.astype(np.int64) << np.arange(bits)).sum(axis=2)


def decode(codec, data, *, kind, layer_idx, lengths, width, dtype):
    """The bytes of a tensor that is not empty and not stored raw."""
    found = known(codec)
    if found["format"] is not None:
        return fp8(data, found["format"], found["scale"], lengths, width, dtype)
    if found["bits"] is not None:
        numbers = [int(found[name]) for name in ("bits", "group", "residual")]
        return kivi(data, *numbers, kind, lengths, width, dtype)
    return hadamard(data, int(found["levels"]), kind, layer_idx, sum(lengths), width, dtype)


def fp8(data, form, scale, lengths, width, dtype):
    rows = sum(lengths)
    count = {"none": 0, "head": len(lengths), "token": rows}[scale]
    section = Bytes(data, 2 * count + rows * width)
    scales = section.halves(count)
    numbers = outsider.to_float32(section.take(rows * width), FORMATS[form]).reshape(rows, width)
    need(np.isfinite(numbers).all(), "a code of no finite number")
    if scale == "head":
        scales = np.array([s for s, n in zip(scales, lengths, strict=True) for _ in range(n)], "f4")
    if scale != "none":
        numbers = numbers * scales.reshape(rows, 1)
    return outsider.from_float32(numbers, dtype)


def kivi(data, bits, group, residual, kind, lengths, width, dtype):
    quantized = [max(0, n - residual) for n in lengths]
    rows = sum(quantized)
    need(rows, "nothing is quantized")
    itemsize = dict(outsider.DTYPES.values())[dtype]
    exact = (sum(lengths) - rows) * width * itemsize
    if kind == outsider.KEYS:
        lines, first = [], 0  # of each entry, the line of its minimum
        for m in quantized:
            lines += [first + t // group for t in range(m)]
            first += -(-m // group)
        shape, index = (first, width), (np.array(lines)[:, None], np.arange(width))
    else:
        shape = (rows, -(-width // group))
        index = (np.arange(rows)[:, None], np.arange(width) // group)
    count = shape[0] * shape[1]
    section = Bytes(data, 4 * count + rows * (-(-width * bits // 8)) + exact)
    minimum = section.halves(count, negative=True).reshape(shape)
    step = section.halves(count).reshape(shape)
    codes = section.codes(rows, width, bits).astype(np.float32)
    whole = outsider.from_float32(minimum[index] + codes * step[index], dtype)
    out, at = [], 0
    for n, m in zip(lengths, quantized, strict=True):
        size = m * width * itemsize
        out += [whole[at : at + size], section.take((n - m) * width * itemsize)]
        at += size
    return b"".join(out)


def mix(word):
    word = (word ^ word >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ word >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ word >> 16


def scramble(layer_idx, kind, width):
    """Order and signs of the channels."""
    start = mix(2 * layer_idx + (kind == outsider.VALUES))
    words = [mix(start + c & 0xFFFFFFFF) for c in range(width)]
    order = list(range(width))
    if width & (width - 1):
        order.sort(key=words.__getitem__)
    return order, [-1.0 if word & 1 else 1.0 for word in words]


def transform(a):
    """One piece, [entries, 2^k], by the definition of a butterfly."""
    size = a.shape[1]
    k = size.bit_length() - 1
    for bit in range(k):
        low = np.array([j for j in range(size) if not j >> bit & 1])
        both = a[:, low], a[:, low + (1 << bit)]
        a = a.copy()
        a[:, low], a[:, low + (1 << bit)] = both[0] + both[1], both[0] - both[1]
    scale = np.float32(2.0 ** -(k // 2))
    return a * (scale * np.uint32(0x3F3504F3).view(np.float32) if k % 2 else scale)


def hadamard(data, bits, kind, layer_idx, rows, width, dtype):
    section = Bytes(data, 2 * rows + rows * (-(-width * bits // 8)))
    gains = section.halves(rows)
    upper = [np.float32(x) for x in LEVELS[bits].split()]
    levels = np.array([-x for x in upper[::-1]] + upper, np.float32)
    a = levels[section.codes(rows, width, bits)]
    order, signs = scramble(layer_idx, kind, width)
    out, at = np.empty((rows, width), np.float32), 0
    for k in reversed(range(width.bit_length())):
        if width >> k & 1:
            places = order[at : at + (1 << k)]
            turned = transform(a[:, at : at + (1 << k)]) * gains[:, None]
            out[:, places] = turned * np.array([signs[c] for c in places], np.float32)
            at += 1 << k
    return outsider.from_float32(out, dtype)
