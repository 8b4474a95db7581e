# SPDX-License-Identifier: Apache-2.0
"""Check every golden file twice: with kvlib, and with a reader that shares no code with it.

    python tests/golden/check_golden.py [--keys-only]

Needs numpy, xxhash and zstandard, never torch; with --keys-only the standard library alone. Takes
the kvlib that is installed, else the one this file lies beside.
"""

import importlib.util
import json
import sys
from hashlib import blake2b, sha256
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RESULTS = {
    "encoded": "hex",
    "specs": "fingerprint",
    "roots": "key",
    "blocks": "keys",
    "snapshots": "key",
    "storages": "fingerprint",
    "models": "fingerprint",
}
"""The parts of keys.json, and where in a vector its result stands."""


def find_modules():
    """Make kvlib and the outsider importable."""
    for name, place in (("kvlib", FOLDER.parents[1]), ("outsider", FOLDER)):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.path.insert(0, str(place))


def value_of(typed):
    """The value that ["type", text] stands for."""
    kind, plain = typed
    if kind == "list":
        return [value_of(item) for item in plain]
    read = {"int": int, "float": float, "bytes": bytes.fromhex}
    return read[kind](plain) if kind in read else plain


def extras_of(plain):
    return [(kind, bytes.fromhex(content), offset) for kind, content, offset in plain]


def prefix_of(vector):
    return {
        "salt": bytes.fromhex(vector.get("salt", "")),
        "extras": extras_of(vector.get("extras", [])),
    }


def inside_of(vector):
    return {int(i): extras_of(extras) for i, extras in vector.get("block_extras", {}).items()}


def spec_of(plain):
    """The `KVSpec` that a JSON description (the names of docs/formats/block.md) stands for."""
    from kvlib.spec import KVSpec, LayerSpec, RopeSpec

    layers = []
    for layer in plain["layers"]:
        rope = layer["rope"]
        if rope is not None:
            rope = RopeSpec(**{**rope, "params": tuple((k, v) for k, v in rope["params"])})
        layers.append(LayerSpec(**{**layer, "rope": rope}))
    return KVSpec(**{**plain, "layers": tuple(layers)})


class ByKvlib:
    """The vectors of keys.json as kvlib computes them."""

    def __init__(self, data):
        self._specs = {v["name"]: spec_of(v["spec"]) for v in data["specs"]}
        self._prints = {name: spec.fingerprint() for name, spec in self._specs.items()}
        self._tokens = {v["name"]: v["tokens"] for v in data["tokens"]}

    def _prefix(self, v):
        from kvlib.keys import Extra

        given = prefix_of(v)
        return {**given, "extras": [Extra(*extra) for extra in given["extras"]]}

    def encoded(self, v):
        from kvlib.keys import encode

        return encode(value_of(v["value"])).hex()

    def specs(self, v):
        return self._prints[v["name"]].hex()

    def roots(self, v):
        from kvlib.keys import root_key

        return root_key(self._prints[v["spec"]], **self._prefix(v)).hex()

    def blocks(self, v):
        from kvlib.keys import BlockKey, Extra, block_keys

        inside = {i: [Extra(*extra) for extra in extras] for i, extras in inside_of(v).items()}
        parent = BlockKey(bytes.fromhex(v["parent"])) if "parent" in v else None
        keys = block_keys(
            self._prints[v["spec"]],
            self._tokens[v["tokens"]],
            block_extras=inside,
            parent=parent,
            **self._prefix(v),
        )
        return [key.hex() for key in keys]

    def snapshots(self, v):
        from kvlib.keys import snapshot_key

        tokens, artefacts = self._tokens[v["tokens"]], v["artefacts"]
        given = {**self._prefix(v), "artefacts": artefacts}
        return snapshot_key(self._prints[v["spec"]], tokens, v["method"], **given).hex()

    def storages(self, v):
        from kvlib.spec import storage_fingerprint

        given = {name: x for name, x in v.items() if name in ("fidelity", "layers", "profile")}
        if "head_range" in v:
            given["head_range"] = tuple(v["head_range"])
        return storage_fingerprint(self._specs[v["spec"]], v["codec"], **given).hex()

    def models(self, v):
        from kvlib.keys import Namespace, digest

        files = {name: bytes.fromhex(data) for name, data in v["files"].items()}
        fields = tuple(
            (name, len(data), blake2b(data, digest_size=32).digest())
            for name, data in sorted(files.items())
        )
        return digest(Namespace.MODEL, fields).hex()


class ByOutsider:
    """The same vectors as the outsider computes them."""

    def __init__(self, data):
        import outsider

        self._outsider = outsider
        self._specs = {v["name"]: v["spec"] for v in data["specs"]}
        self._prints = {n: outsider.spec_fingerprint(s) for n, s in self._specs.items()}
        self._tokens = {v["name"]: v["tokens"] for v in data["tokens"]}

    def encoded(self, v):
        return self._outsider.encode(value_of(v["value"])).hex()

    def specs(self, v):
        return self._prints[v["name"]].hex()

    def roots(self, v):
        return self._outsider.root_key(self._prints[v["spec"]], **prefix_of(v)).hex()

    def blocks(self, v):
        root = self._outsider.root_key(self._prints[v["spec"]], **prefix_of(v))
        parent = bytes.fromhex(v["parent"]) if "parent" in v else root
        keys = self._outsider.block_keys(parent, self._tokens[v["tokens"]], inside_of(v))
        return [key.hex() for key in keys]

    def snapshots(self, v):
        tokens, given = self._tokens[v["tokens"]], prefix_of(v)
        made = self._outsider.snapshot_key(
            self._prints[v["spec"]], tokens, v["method"], v["artefacts"], **given
        )
        return made.hex()

    def storages(self, v):
        given = {name: x for name, x in v.items() if name in ("fidelity", "head_range", "profile")}
        layers = v.get("layers", self._outsider.kept_layers(self._specs[v["spec"]]))
        made = self._outsider.storage_fingerprint(
            self._prints[v["spec"]], v["codec"], layers, **given
        )
        return made.hex()

    def models(self, v):
        files = {name: bytes.fromhex(data) for name, data in v["files"].items()}
        return self._outsider.model_identity(files).hex()


def check_keys(data):
    """Lines that say what differs, and the number of vectors."""
    problems, count = [], 0
    sides = {"kvlib": ByKvlib(data), "outsider": ByOutsider(data)}
    for part, result in RESULTS.items():
        for index, vector in enumerate(data[part]):
            count += 1
            for name, side in sides.items():
                found = getattr(side, part)(vector)
                if found != vector[result]:
                    problems.append(
                        f"{part}[{index}]: {name} computes {found}, recorded {vector[result]}"
                    )
    return problems, count


# Containers

HEADER_FIELDS = (
    "flags",
    "header_bytes",
    "total_bytes",
    "start",
    "num_tokens",
    "alignment",
    "codec",
    "profile",
    "fidelity",
    "writer",
)
LAYER_FIELDS = ("layer_idx", "num_kv_heads", "k_head_dim", "v_head_dim", "channels", "kind")
SECTION_FIELDS = ("kind", "layer_idx", "flags", "offset", "stored_bytes", "raw_bytes")


def plain_header(header):
    """kvlib's `Header` as plain JSON, bytes as hex."""
    plain = {name: getattr(header, name) for name in HEADER_FIELDS}
    return {
        **plain,
        "flags": int(header.flags),
        "dtype": header.dtype_code,
        "spec_fingerprint": header.spec_fingerprint.hex(),
        "storage_fingerprint": header.storage_fingerprint.hex(),
        "keys": [key.hex() for key in header.keys],
        "head_range": None if header.head_range is None else list(header.head_range),
        "layers": [
            {name: getattr(layer, name) for name in LAYER_FIELDS} for layer in header.layers
        ],
        "sections": [
            {name: int(getattr(s, name)) for name in SECTION_FIELDS} | {"digest": s.digest.hex()}
            for s in header.sections
        ],
    }


def mac_key_of(case):
    return None if case["mac_key"] is None else bytes.fromhex(case["mac_key"])


def rebuilt(header, data, mac_key):
    """What kvlib writes from a container's own sections."""
    from kvlib.codecs.container import Section, build_container

    sections = [
        Section(s.kind, s.layer_idx, s.raw_bytes, (data[s.offset :][: s.stored_bytes],), s.flags)
        for s in header.sections
    ]
    parts = build_container(
        sections,
        spec_fingerprint=header.spec_fingerprint,
        storage_fingerprint=header.storage_fingerprint,
        start=header.start,
        num_tokens=header.num_tokens,
        dtype_code=header.dtype_code,
        codec=header.codec,
        layers=header.layers,
        keys=header.keys,
        flags=header.flags,
        fidelity=header.fidelity,
        head_range=header.head_range,
        profile=header.profile,
        writer=header.writer,
        alignment=header.alignment,
        mac_key=mac_key,
    )
    return b"".join(parts)


def check_container(data, case):
    """What differs between a container and the JSON beside it."""
    import outsider

    from kvlib.codecs.container import Container

    mac_key = mac_key_of(case)
    if (len(data), sha256(data).hexdigest()) != (case["bytes"], case["sha256"]):
        yield "the file has another size or SHA-256"
    container = Container(data, mac_key=mac_key)
    container.verify()
    for name, found in (
        ("kvlib", plain_header(container.header)),
        ("outsider", outsider.verify(data, mac_key)),
    ):
        for field in sorted(found.keys() | case["header"].keys()):
            if found.get(field) != case["header"].get(field):
                yield (
                    f"{name} reads {field} {found.get(field)}, recorded {case['header'].get(field)}"
                )
    if rebuilt(container.header, data, mac_key) != data:
        yield "kvlib lays the same sections out as other bytes"
    for name, found in (
        ("kvlib", spec_of(case["spec"]).fingerprint()),
        ("outsider", outsider.spec_fingerprint(case["spec"])),
    ):
        if found.hex() != case["header"]["spec_fingerprint"]:
            yield f"{name} computes another spec fingerprint"
    if "sections" in case:
        for s, given in zip(container.header.sections, case["sections"], strict=True):
            if data[s.offset :][: s.stored_bytes].hex() != given["data"]:
                yield f"section {given['kind']} holds other bytes"
        try:
            outsider.decode(data, case["spec"], mac_key)
            yield "the outsider decodes what it does not know"
        except outsider.Foreign:
            pass
        return
    header, layers = outsider.decode(data, case["spec"], mac_key)
    if header.get("integers") != case.get("integers"):
        yield "the outsider decodes other integers"
    yield from check_numbers(layers, case)


def same_numbers(found, want, dtype, tolerance):
    """Whether numbers (bytes) differ by at most `tolerance` times the largest of them.

    For dtypes of 16 bits one unit in the last place more. What is not finite is the same bits.
    """
    import numpy as np
    import outsider

    if len(found) != len(want):
        return False
    a, b = (outsider.to_float32(raw, dtype).astype(np.float64) for raw in (found, want))
    special = ~(np.isfinite(a) & np.isfinite(b))
    bits = [np.frombuffer(raw, np.uint8).reshape(len(b), -1)[special] for raw in (found, want)]
    if not np.array_equal(*bits):
        return False
    a, b = a[~special], b[~special]
    bound = tolerance * np.abs(b).max(initial=0) + 2.0**-140
    if dtype != "float32":
        digits = 10 if dtype == "float16" else 7
        size = np.maximum(np.abs(a), np.abs(b))
        bound = bound + np.maximum(2.0 ** (np.frexp(size)[1] - 1 - digits), 2.0**-24)
    return bool((np.abs(a - b) <= bound).all())


def check_numbers(layers, case):
    """What the outsider decodes, compared with what was recorded."""
    dtype, tolerance = case["spec"]["dtype"], case.get("tolerance")
    if len(layers) != len(case["layers"]):
        yield f"the outsider decodes {len(layers)} layers"
        return
    for found, want in zip(layers, case["layers"], strict=True):
        decoded = want.get("decoded", want)
        start, stop = case["start"], case["start"] + case["num_tokens"]
        positions = want["positions"]
        if positions is None:
            positions = list(range(start, stop)) * want["num_kv_heads"]
        weight, channels = found["log_weight"], found["channels"]
        for field in ("keys", "values"):
            raw = found[f"{field}_bytes"]
            if raw.hex() != decoded[field] and (
                tolerance is None
                or not same_numbers(raw, bytes.fromhex(decoded[field]), dtype, tolerance)
            ):
                yield f"layer {want['layer_idx']}: the outsider decodes other {field}"
        for field, got, expected in (
            ("row_lengths", found["row_lengths"], want["row_lengths"]),
            ("positions", found["positions"].reshape(-1).tolist(), positions),
            (
                "log_weight",
                weight if weight is None else weight.tobytes().hex(),
                want["log_weight"],
            ),
            ("channels", channels if channels is None else channels.tolist(), want["channels"]),
        ):
            if got != expected:
                yield f"layer {want['layer_idx']}: the outsider decodes other {field}"


def check_containers(folder):
    """Lines that say what differs, and the number of containers."""
    problems, count = [], 0
    names = {path.with_suffix("") for path in folder.glob("v*/*")}
    for name in sorted(names):
        count += 1
        try:
            data = name.with_suffix(".kvlc").read_bytes()
            case = json.loads(name.with_suffix(".json").read_text(encoding="utf-8"))
            found = list(check_container(data, case))
        except Exception as exc:  # noqa: BLE001  # whatever goes wrong is a difference
            found = [f"{type(exc).__name__}: {exc}"]
        problems += [f"{name.name}: {problem}" for problem in found]
    return problems, count


def main(arguments):
    """Print one line, or every difference; the exit status."""
    find_modules()
    data = json.loads((FOLDER / "keys.json").read_text(encoding="utf-8"))
    problems, vectors = check_keys(data)
    containers = 0
    if "--keys-only" not in arguments:
        more, containers = check_containers(FOLDER / "containers")
        problems += more
    if not vectors or not (containers or "--keys-only" in arguments):
        problems.append(f"only {vectors} vectors and {containers} containers were found")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    print(f"{vectors} vectors, {containers} containers, {python}: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
