# SPDX-License-Identifier: Apache-2.0
"""The outsider's `kvlc`, from docs/formats/codec.md alone: whole numbers, and float64.

Shares no code with kvlib. `outsider.py` loads this file when a container needs it. What it decodes
differs from kvlib's in the last bits of float32, because the page leaves the order of sums open.
"""

import itertools
import json
import math
import re
import struct
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import outsider
from outsider import Foreign, need

ROPE_REMOVED, MIXES_HEADS, PROFILE_NEEDED = 2, 4, 8
FOLDERS = [Path(__file__).with_name("profiles")]
"""Where profiles lie, as DIGEST.safetensors."""

NUMBER = r"(?:none|[0-9.e+-]+)"
PATTERN = re.compile(
    rf"kvlc@1:preset=(near|balanced|small|archive),level=({NUMBER}),bits=({NUMBER}),kl=({NUMBER})"
    r",chunk=([1-9][0-9]*),sinks=(0|[1-9][0-9]*),digest=(none|[0-9a-f]{16})",
    re.ASCII,
)


def known(text):
    """Preset, chunk, sinks and digest of a codec string, None if it is not one of kvlc's."""
    match = PATTERN.fullmatch(text)
    if match is None:
        return None
    preset, *rates, chunk, sinks, digest = match.groups()
    given = [rate != "none" for rate in rates]
    if sum(given) > 1 or not (16 <= int(chunk) <= 4096 and int(sinks) <= 4096):
        return None
    if digest == "none":
        return None if preset != "near" or any(given[1:]) else (preset, int(chunk), int(sinks), "")
    return preset, int(chunk), int(sinks), digest


# Profile


class Profile:
    """The tensors of a safetensors file."""

    def __init__(self, data, digest):
        need(blake2b(data, digest_size=8).hexdigest() == digest, "another profile", Foreign)
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + size])
        about = json.loads(header.pop("__metadata__")["kvlib"])
        need((about["format"], about["kind"]) == ("kvlib-artefact-1", "codec"), "kind", Foreign)
        self.model, settings = about["model"], about["settings"]
        self.presets, self.group = settings["presets"].split(), int(settings["group"])
        self.tensors, body = header, data[8 + size :]
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            dtype = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}[entry["dtype"]]
            x = np.frombuffer(body[first:last], dtype).reshape(entry["shape"])
            self.tensors[name] = x.astype(np.float64)

    def of(self, preset, kind, index):
        """The matrix, the statistics, and what is added to rows."""
        name = f"{preset}.{'K' if kind == outsider.KEYS else 'V'}.{index}"
        offset = self.tensors[f"{name}.offset"] if preset == "archive" else 0.0
        return self.tensors[f"{name}.decode"], self.tensors[f"{name}.statistics"], offset


@cache
def profile_of(digest):
    for folder in FOLDERS:
        path = folder / f"{digest}.safetensors"
        if path.is_file():
            return Profile(path.read_bytes(), digest)
    raise Foreign("a profile that is not there")


# Entropy coding


def distribution(sigma):
    """The mixture's distribution function."""

    def below(x):
        normal = (1 + math.erf(x / sigma / math.sqrt(2))) / 2
        tail = math.exp(-abs(x) * math.sqrt(2) / sigma) / 2
        return 0.75 * normal + 0.25 * (1 - tail if x > 0 else tail)

    return below


SIGMAS = [0.08 * 112.5 ** (c / 63) for c in range(64)]
RADII = [min(30, math.ceil(6 * sigma + 1.5)) for sigma in SIGMAS]
ESCAPE = 62


@cache
def tables():
    """For each class: of each of the 4096 slots its symbol, its frequency, and what is below."""
    rows = []
    for sigma, radius in zip(SIGMAS, RADII, strict=True):
        below, row = distribution(sigma), [0] * 63
        for v in range(-radius, radius + 1):
            row[v + 31] = max(1, round(4096 * (below(v + 0.5) - below(v - 0.5))))
        row[ESCAPE], row[31] = 1, 0
        row[31] = 4096 - sum(row)
        rows.append(row)
    packed = np.array(rows, "<u2").tobytes()
    expected = "a164528e3f6aff39550255bddcba5356af60cc3b53a3a433b9fb1070319509c3"
    if sha256(packed).hexdigest() != expected:
        raise AssertionError("other tables than those of the page")
    slots = []
    for row in rows:
        mine, total = [], 0
        for symbol, f in enumerate(row):
            mine += [(symbol, f, total)] * f
            total += f
        slots.append(mine)
    return slots


def lanes_of(count):
    lanes = 256
    while lanes > 8 and count < 768 * lanes:
        lanes //= 2
    return lanes


def decode_stream(states, words, n, classes):
    """The symbols of n lines, flat."""
    count = n * len(classes)
    need(len(words) <= count, "more words than symbols")
    need(all(1 << 15 <= x < 1 << 31 for x in states), "a state out of range")
    rows = [tables()[c] for c in classes]
    lanes, states, at, out = len(states), list(states), 0, []
    for i in range(count):
        x = states[i % lanes]
        symbol, f, below = rows[i % len(rows)][x & 4095]
        out.append(symbol)
        x = f * (x >> 12) + (x & 4095) - below
        if x < 1 << 15:
            need(at < len(words), "too few words")
            x = x << 16 | words[at]
            at += 1
        states[i % lanes] = x
    need(at == len(words), "words are left")
    need(all(x == 1 << 15 for x in states), "a lane ends elsewhere")
    return out


def varints(data, count):
    out, value, size = [], 0, 0
    for byte in data:
        value |= (byte & 127) << 7 * size
        size += 1
        if byte < 128:
            need(size <= 10 and value < 1 << 64 and (byte or size == 1), "a number's bytes")
            out.append(-(value >> 1) - 1 if value & 1 else value >> 1)
            value = size = 0
    need(size == 0 and len(out) == count, "not the number of escapes")
    return out


# Levels

LEVELS = [(e, 0) if e < 58 else (49 + (e - 58) % 9, 1 + (e - 58) // 9) for e in range(255)]
DEVIATIONS = [SIGMAS[c] * 2.0**k for c, k in LEVELS]
EDGES = [math.sqrt(a * b) for a, b in itertools.pairwise(DEVIATIONS)]


def expected(deviations, step):
    return [int(x) for x in np.searchsorted(EDGES, np.asarray(deviations) / step)]


class Section:
    """Read from the front."""

    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, size):
        need(size <= len(self.data) - self.at, "the section is cut off")
        self.at += size
        return self.data[self.at - size : self.at]

    def fields(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))


def signed(value):
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def take_low(highs, shifts, data):
    """Put low bits to numbers, n of each channel, line after line."""
    bits = [byte >> b & 1 for byte in data for b in range(8)]
    out = [h << shifts[i % len(shifts)] for i, h in enumerate(highs)]
    at = 0
    for j in range(max(shifts, default=0)):
        for i in range(len(out)):
            if shifts[i % len(shifts)] > j:
                out[i] |= bits[at] << j
                at += 1
    need(not any(bits[at:]), "bits behind the last one")
    return [signed(x) for x in out]


def read_chunk(section, n, r, known_levels):
    """Values [n, r] and means [r]; `known_levels` are the profile's, of values and of means."""
    active, base, mean_base, words, side_words, escapes, escape_bytes, low_bytes = section.fields(
        "HBB5I"
    )
    need(active <= r, "more channels than there are")
    need({base == 255, mean_base == 255} == {known_levels is not None}, "where levels come from")
    levels, mean_levels = known_levels or ([base] * active, [mean_base] * r)
    side_lanes, lanes = lanes_of(active + r), lanes_of(n * active)
    states = section.fields(f"{side_lanes + lanes}I")
    side = section.fields(f"{side_words}H")
    main = section.fields(f"{words}H")
    low = section.take(low_bytes)
    numbers = varints(section.take(escape_bytes), escapes)
    classes = [43] * active + [LEVELS[e][0] for e in mean_levels]
    symbols = decode_stream(states[:side_lanes], side, 1, classes)

    def resolve(symbols):
        need(symbols.count(ESCAPE) <= len(numbers), "too few escapes")
        return [numbers.pop(0) if s == ESCAPE else s - 31 for s in symbols]

    beside = resolve(symbols)
    levels = [e + d for e, d in zip(levels[:active], beside[:active], strict=True)]
    need(all(0 <= e <= 254 for e in levels), "a level out of range")
    values = decode_stream(states[side_lanes:], main, n, [LEVELS[e][0] for e in levels])
    values = resolve(values)
    need(not numbers, "escapes are left")
    mean_shifts, shifts = [LEVELS[e][1] for e in mean_levels], [LEVELS[e][1] for e in levels]
    first = -(-sum(mean_shifts) // 8)
    need(len(low) == first + -(-n * sum(shifts) // 8), "another number of low bits")
    means = take_low(beside[active:], mean_shifts, low[:first])
    values = take_low(values, shifts, low[first:])
    matrix = np.zeros((n, r), np.int64)
    matrix[:, :active] = np.array(values, np.int64).reshape(n, active)
    return matrix, np.array(means, np.int64)


# Rotation


def frequencies(rope):
    """One for each pair; None where they are not fixed."""
    given, theta, width = dict(rope["params"]), rope["theta"], rope["rotary_dim"]
    base = [theta ** (-2 * i / width) for i in range(width // 2)]
    try:
        if rope["kind"] == "default":
            return base
        if rope["kind"] not in ("linear", "llama3", "yarn"):
            return None
        factor = given["factor"]
        if rope["kind"] == "linear":
            return [g / factor for g in base]
        length = given["original_max_position_embeddings"]
        if rope["kind"] == "llama3":
            low, high = given["low_freq_factor"], given["high_freq_factor"]
            keep = [(length * g / (2 * math.pi) - low) / (high - low) for g in base]
            keep = [min(max(k, 0.0), 1.0) for k in keep]
            return [g * k + g / factor * (1 - k) for g, k in zip(base, keep, strict=True)]

        def channel(turns):
            return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

        a, b = channel(given.get("beta_fast", 32)), channel(given.get("beta_slow", 1))
        if given.get("truncate", 1):
            a, b = math.floor(a), math.ceil(b)
        a, b = max(a, 0), min(b, width - 1)
        b += 0.001 * (a == b)
        part = [min(max((i - a) / (b - a), 0.0), 1.0) for i in range(width // 2)]
        return [g * (1 - k) + g / factor * k for g, k in zip(base, part, strict=True)]
    except (KeyError, ArithmeticError, ValueError):
        return None


def removable(spec, index):
    rope = spec["layers"][index]["rope"]
    if rope is None or spec["rope_state"] != "post" or frequencies(rope) is None:
        return None
    return rope


def turn(x, positions, rope):
    """Keys [T, heads, D], float64, to their positions."""
    half, first = rope["rotary_dim"] // 2, rope["first_channel"]
    every = np.arange(half)
    a = first + (2 * every if rope["interleaved"] else every)
    b = a + (1 if rope["interleaved"] else half)
    angle = np.asarray(positions, np.float64)[:, None] * np.array(frequencies(rope))
    c, s = (f(angle).astype(np.float32).astype(np.float64)[:, None] for f in (np.cos, np.sin))
    u, v = x[..., a].copy(), x[..., b].copy()
    x[..., a], x[..., b] = u * c - v * s, v * c + u * s


def rounded(x, dtype):
    """The bytes of any numbers rounded to `dtype`."""
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x.astype(np.float32))
    if dtype != "bfloat16":
        return outsider.from_float32(x, dtype)
    out = np.frombuffer(outsider.from_float32(x, dtype), "<u2").copy()
    out[np.isnan(x).ravel()] = 0x7FC0
    return out.tobytes()


# Sections


def flags_of(header, spec):
    """The flags of the codec that a header must have, and its profile."""
    found = known(header["codec"])
    flags = MIXES_HEADS * (found[0] != "near") | PROFILE_NEEDED * bool(found[3])
    if any(removable(spec, i) for i in range(len(spec["layers"]))):
        flags |= ROPE_REMOVED
    return flags, found[3]


NAMES = {outsider.KEYS: "keys", outsider.VALUES: "values"}


class Reader:
    """One container's keys and values."""

    def __init__(self, data, header, spec, layers):
        self.header, self.spec = header, spec
        self.preset, self.chunk, self.sinks, digest = known(header["codec"])
        self.profile = profile_of(digest) if digest else None
        if self.profile is not None:
            model = outsider.spec_fingerprint({**spec, "dtype": "float32"}).hex()
            need(self.profile.model == model, "a profile of another model", Foreign)
            need(self.preset in self.profile.presets, "a preset not in the profile", Foreign)
        self.layers = {layer["layer_idx"]: layer for layer in layers}
        self.dtype = outsider.DTYPES[header["dtype"]][0]
        self.itemsize = outsider.DTYPES[header["dtype"]][1]
        self.sections = {
            (s["kind"], s["layer_idx"]): (s, data[s["offset"] :][: s["stored_bytes"]])
            for s in header["sections"]
        }
        self.integers = sha256()

    def read(self, kind, index):
        """Fill the keys or values of a layer, and of those that are coded with it."""
        if f"{NAMES[kind]}_bytes" in self.layers[index]:
            return
        _, data = self.sections[kind, index]
        group = [index]
        if data == b"\4" or data[:1] == b"\3":
            need(self.preset == "archive", "a group without need")
            size = self.profile.group
            group = list(range(index // size * size, (index // size + 1) * size))
            group = [i for i in group if i < len(self.spec["layers"])]
            need(len(group) > 1 and set(group) <= set(self.layers), "a group that is not whole")
            for i in group:
                section, data = self.sections[kind, i]
                need(not section["flags"] & outsider.RAW, "a raw member")
                need(data[:1] == b"\3" if i == group[0] else data == b"\4", "not a member")
                mine = self.layers[i]
                need(mine["channels"] is None and mine["row_lengths"] is None, "pruned or ragged")
                need(self.spec["layers"][i] == self.spec["layers"][group[0]], "other layers")
                positions = mine["positions"]
                same = self.layers[group[0]]["positions"][:1]
                need(positions.shape[1] == same.shape[1], "other tokens")
                need((positions == same).all(), "other tokens")
        self.read_section(kind, group, Section(self.sections[kind, group[0]][1]))

    def form_of(self, group, aligned):
        if self.preset == "near" or self.layers[group[0]]["channels"] is not None:
            return 0
        if len(group) > 1:
            return 3
        if self.preset == "balanced" or not aligned or "small" not in self.profile.presets:
            return 1
        return 2

    def read_section(self, kind, group, section):
        first = self.layers[group[0]]
        positions, lengths = first["positions"], first["row_lengths"]
        heads = len(positions) if lengths is None else len(lengths)
        aligned = lengths is None and bool((positions == positions[:1]).all())
        if aligned:
            pieces = [(range(heads), positions[0])]
        else:
            if lengths is not None:
                rows = np.split(positions, np.cumsum(lengths)[:-1])
            else:
                rows = list(positions)
            pieces = [([h], row) for h, row in enumerate(rows)]
        size = self.spec["layers"][group[0]][
            "k_head_dim" if kind == outsider.KEYS else "v_head_dim"
        ]
        if kind == outsider.KEYS and first["channels"] is not None:
            size = first["channels"].shape[1]
        form, turned, zero, listed, step = section.fields("BBHIf")
        rope = removable(self.spec, group[0])
        if kind != outsider.KEYS or first["channels"] is not None:
            rope = None
        need(form == self.form_of(group, aligned), "another form")
        need(turned == (rope is not None) and not zero, "turned, or not zero")
        need(math.isfinite(step) and step > 0, "a step that is none")
        total = sum(len(row) for _, row in pieces)
        need(listed <= total, "more listed rows than there are")
        listed = section.fields(f"{listed}I")
        need(all(a < b for a, b in itertools.pairwise(listed)), "not ascending")
        need(all(i < total for i in listed), "a listed row that is not there")
        plan, at = [], 0
        for members, row in pieces:
            mine = {i - at for i in listed if at <= i < at + len(row)}
            fixed = {t for t, p in enumerate(row) if p < self.sinks}
            need(not mine & fixed, "a row is exempt twice")
            exempt = sorted(mine | fixed)
            width = len(group) * len(members) * size
            raw = section.take(len(exempt) * width * self.itemsize)
            plan.append((members, row, exempt, raw, width))
            at += len(row)
        out = []
        for members, row, exempt, raw, width in plan:
            kept = [t for t in range(len(row)) if t not in set(exempt)]
            rows = self.read_rows(section, kind, group, form, members, len(kept), width, step)
            rows = rows.reshape(len(kept), len(group) * len(members), size)
            if rope is not None:
                turn(rows, row[kept], rope)
            piece = np.empty((len(row), rows.shape[1], size * self.itemsize), np.uint8)
            shape = (-1, rows.shape[1], size * self.itemsize)
            piece[kept] = np.frombuffer(rounded(rows, self.dtype), np.uint8).reshape(shape)
            piece[exempt] = np.frombuffer(raw, np.uint8).reshape(shape)
            out.append(piece.transpose(1, 0, 2))  # heads first
        need(section.at == len(section.data), "bytes follow the last chunk")
        name = NAMES[kind]
        for i, index in enumerate(group):
            data = b"".join(x[i * heads : (i + 1) * heads].tobytes() for x in out)
            self.layers[index][f"{name}_bytes"] = data
            lead = positions.shape
            numbers = outsider.to_float32(data, self.dtype).reshape(*lead, size)
            self.layers[index][name] = numbers

    def read_rows(self, section, kind, group, form, members, n, width, step):
        """The rows of a piece before they are turned, float64."""
        levels, center, matrices = None, 0.0, None
        if form:
            name = {1: "balanced", 2: "small", 3: "archive"}[form]
            decode, statistics, offset = self.profile.of(name, kind, group[0])
            if form == 1:
                matrices = [decode[h] for h in members]
                mine = statistics[:, list(members)]
                statistics = mine.transpose(0, 2, 1).reshape(3, -1)  # by rank, then by head
            else:
                matrices = [decode]
            center = statistics[0]
            levels = (expected(statistics[1], step), expected(statistics[2], step / 4))
        r = width if form == 0 else sum(x.shape[1] for x in matrices)
        count = -(-n // self.chunk)
        rows = [np.empty((0, width))]
        for i in range(count):
            size = n * (i + 1) // count - n * i // count
            values, means = read_chunk(section, size, r, levels)
            for x in (means, values):
                self.integers.update(struct.pack("<2I", size, r) + x.astype("<i8").tobytes())
            with np.errstate(all="ignore"):
                y = step * values.astype(np.float64) + (step / 4 * means + center)
                if form:
                    parts = [y[:, h :: len(matrices)] @ m.T for h, m in enumerate(matrices)]
                    y = np.concatenate(parts, axis=1) + offset
            rows.append(y)
        return np.concatenate(rows)


def fill(data, header, spec, layers):
    """Keys and values that are not there yet; the SHA-256 of all integers, chunk after chunk."""
    need(spec is not None, "kvlc needs the spec", Foreign)
    reader = Reader(data, header, spec, layers)
    for layer in layers:
        for kind in (outsider.KEYS, outsider.VALUES):
            reader.read(kind, layer["layer_idx"])
    return reader.integers.hexdigest()
