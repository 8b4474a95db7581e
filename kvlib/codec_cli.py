# SPDX-License-Identifier: Apache-2.0
"""`kvlib codec`: KV from safetensors into a container, back, and what is in one.

The safetensors form has, for every layer N of the model, ``layers.N.keys`` [Hkv, T, D] and
``layers.N.values`` [Hkv, T, Dv]: one sequence, all of one dtype, keys as the model caches them
(after RoPE). The text ``start`` in its metadata is the position of the first token; 0 without it.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvlib.errors import (
    ConfigError,
    CorruptDataError,
    IncompatibleDataError,
    ShapeError,
    UnsupportedInputError,
)
from kvlib.spec import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from kvlib.blocks import KVBlock
    from kvlib.codecs import Codec, Header
    from kvlib.spec import KVSpec, LayerSpec

__all__ = ["app"]

app = typer.Typer(
    help="Encode KV from a safetensors file, decode it, or look into a container. The safetensors "
    "file has, for every layer N, layers.N.keys [Hkv, T, D] and layers.N.values [Hkv, T, Dv] as "
    "the model caches them (one sequence, keys after RoPE), and maybe the metadata start: the "
    "position of its first token.",
    no_args_is_help=True,
)
console = Console()

FileArgument = Annotated[Path, typer.Argument(help="To read.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]
ModelOption = Annotated[
    str | None, typer.Option(help="smollm2, recall, or a model folder: whose KV it is.")
]
ModelIdOption = Annotated[
    str | None, typer.Option(help="Instead of --model: any text that names the weights.")
]
ThetaOption = Annotated[
    float | None, typer.Option(help="With --model-id: base of RoPE; no RoPE without it.")
]
RotaryOption = Annotated[
    int | None, typer.Option(help="With --rope-theta: channels that turn; all by default.")
]
KindOption = Annotated[
    str, typer.Option(help="With --rope-theta: default, linear, llama3 or yarn.")
]
ParamOption = Annotated[
    list[str] | None, typer.Option(help="With --rope-kind: NAME=NUMBER, once for each.")
]
InterleavedOption = Annotated[
    bool, typer.Option(help="With --rope-theta: neighbouring channels turn together.")
]

_DTYPE_NAMES = {dtype.code: dtype.name for dtype in DTYPES.values()}
_SHAPE_ERRORS = 3  # tensors that an error names


@app.command()
def encode(
    file: FileArgument,
    out: OutOption,
    codec: Annotated[str, typer.Option(help="Method string, such as int4:group=64.")],
    model: ModelOption = None,
    model_id: ModelIdOption = None,
    rope_theta: ThetaOption = None,
    rotary_dim: RotaryOption = None,
    rope_kind: KindOption = "default",
    rope_param: ParamOption = None,
    interleaved: InterleavedOption = False,
) -> None:
    """Encode the KV of a safetensors file as one container."""
    from kvlib.calibration import writable_file
    from kvlib.codecs import build_codec, encode_block

    chosen = build_codec(codec)
    pairs, start = _read_tensors(file)
    dtype = str(pairs[0][0].dtype).removeprefix("torch.")
    shapes = [(k.shape[0], k.shape[2], v.shape[2]) for k, v in pairs]
    rope = _Rope(rope_theta, rotary_dim, rope_kind, rope_param or [], interleaved)
    spec = _spec(model, model_id, rope, shapes, dtype)
    block = _block(spec, pairs, start)
    data = b"".join(encode_block(block, chosen))
    writable_file(out).write_bytes(data)
    values = sum(x.numel() for pair in pairs for x in pair)
    console.print(
        f"{out}: {len(data):,} bytes, {8 * len(data) / max(values, 1):.3f} bits a value for "
        f"{len(pairs)} layers, {block.num_tokens:,} tokens in {dtype}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def decode(
    file: FileArgument,
    out: OutOption,
    model: ModelOption = None,
    model_id: ModelIdOption = None,
    rope_theta: ThetaOption = None,
    rotary_dim: RotaryOption = None,
    rope_kind: KindOption = "default",
    rope_param: ParamOption = None,
    interleaved: InterleavedOption = False,
    profile: Annotated[
        Path | None, typer.Option(help="Calibration that the container asks for.")
    ] = None,
) -> None:
    """Decode a container into a safetensors file."""
    from safetensors.torch import save

    from kvlib.calibration import writable_file
    from kvlib.codecs import Container, decode_block

    container = Container(_read(file))
    header = container.header
    dtype = _dtype(header)
    shapes = [(x.num_kv_heads, x.k_head_dim, x.v_head_dim) for x in header.layers]
    rope = _Rope(rope_theta, rotary_dim, rope_kind, rope_param or [], interleaved)
    spec = _spec(model, model_id, rope, shapes, dtype)
    block = decode_block(container, spec, codec_for=_with_profile(profile))
    tensors = {}
    for layer in block.layers:
        if not isinstance(layer.positions, range) or layer.channels is not None:
            raise UnsupportedInputError(
                f"layer {layer.layer_idx} holds only some tokens or key channels: the safetensors "
                "form is for whole layers; use kvlib.codecs.decode_block"
            )
        tensors[f"layers.{layer.layer_idx}.keys"] = layer.keys
        tensors[f"layers.{layer.layer_idx}.values"] = layer.values
    data = save(tensors, {"start": str(block.start)})
    writable_file(out).write_bytes(data)
    console.print(
        f"{out}: {len(data):,} bytes, {len(block.layers)} layers, {block.num_tokens:,} tokens from "
        f"{block.start:,} on in {dtype}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


@app.command()
def inspect(
    file: FileArgument,
    verify: Annotated[bool, typer.Option(help="Read and check every section too.")] = False,
) -> None:
    """Show what a container says of itself; without --verify only its header is read."""
    from kvlib.codecs.container import MAX_HEADER_BYTES, Container, parse_header

    if verify:
        container = Container(_read(file))
        container.verify()
        header = container.header
    else:
        header = parse_header(_read(file, MAX_HEADER_BYTES))
        size = file.stat().st_size
        if size != header.total_bytes:
            raise CorruptDataError(
                f"the container is {header.total_bytes} bytes long, {size} are there"
            )
    table = Table(show_header=False, title=_plain(file.name))
    table.add_column()
    table.add_column(overflow="fold")
    for name, text in _about(header).items():
        table.add_row(name, _plain(text))
    console.print(table)
    sizes = Table("sections", "number", "stored bytes", "decoded bytes", "raw")
    for column in sizes.columns[1:]:
        column.justify = "right"
    for kind in dict.fromkeys(section.kind for section in header.sections):
        mine = [section for section in header.sections if section.kind is kind]
        stored, raw = (sum(getattr(x, f"{n}_bytes") for x in mine) for n in ("stored", "raw"))
        whole = sum(bool(section.flags) for section in mine)
        sizes.add_row(kind.name.lower(), f"{len(mine)}", f"{stored:,}", f"{raw:,}", f"{whole}")
    held = sum(section.stored_bytes for section in header.sections)
    rest = header.total_bytes - header.header_bytes - held
    sizes.add_row("header", "1", f"{header.header_bytes:,}", "", "")
    sizes.add_row("padding", "", f"{rest:,}", "", "")
    console.print(sizes)
    console.print("Header and sections are intact." if verify else "The header is intact.")


def _plain(text: str) -> str:
    """Text of a file, which could hold markup or a terminal's control characters."""
    return escape("".join(c if c.isprintable() else "?" for c in text))


def _about(header: "Header") -> dict[str, str]:
    """A header as text, by name."""
    from kvlib.codecs.container import SectionKind

    shapes: dict[tuple[int, int, int, int], list[int]] = {}
    for layer in header.layers:
        shape = (layer.num_kv_heads, layer.k_head_dim, layer.v_head_dim, layer.channels)
        shapes.setdefault(shape, []).append(layer.layer_idx)
    texts = []
    for (heads, k, v, channels), layers in shapes.items():
        kept = f" ({channels} kept)" if channels else ""
        texts.append(f"{len(layers)} of {heads} heads, keys {k}{kept}, values {v}")
    dtype = DTYPES.get(_DTYPE_NAMES.get(header.dtype_code, ""))
    kinds = (SectionKind.KEYS, SectionKind.VALUES)
    raw = sum(section.raw_bytes for section in header.sections if section.kind in kinds)
    values = raw // dtype.itemsize if dtype else 0
    return {
        "codec": header.codec,
        "profile": header.profile or "none",
        "tokens": f"{header.num_tokens:,} from {header.start:,} on",
        "layers": "; ".join(texts) or "none",
        "dtype": dtype.name if dtype else f"unknown code {header.dtype_code}",
        "bits a value": f"{8 * header.total_bytes / values:.3f}" if values else "no values",
        "bytes": f"{header.total_bytes:,} for {raw:,}",
        "flags": " ".join(str(f.name).lower() for f in header.flags) or "none",
        "fidelity": header.fidelity,
        "heads": "all" if header.head_range is None else "{}..{}".format(*header.head_range),
        "block keys": str(len(header.keys)),
        "spec": header.spec_fingerprint.hex(),
        "writer": header.writer or "unknown",
    }


def _dtype(header: "Header") -> str:
    if header.dtype_code not in _DTYPE_NAMES:
        raise IncompatibleDataError(
            f"dtype code {header.dtype_code} is unknown; this kvlib knows {_DTYPE_NAMES}"
        )
    return _DTYPE_NAMES[header.dtype_code]


def _read(file: Path, size: int = -1) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(size)
    except OSError as exc:
        raise ConfigError(f"cannot read {str(file)!r}: {exc.strerror}") from exc


def _read_tensors(file: Path) -> "tuple[list[tuple[Tensor, Tensor]], int]":
    """Keys and values of layers 0, 1, ..., and the position of the first token."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    data = _read(file)
    try:
        tensors = load(data)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, ValueError, OSError) as exc:
        raise ConfigError(f"{str(file)!r} is no safetensors file: {exc!s:.200}") from exc
    start = metadata.get("start", "0")
    if not (start.isascii() and start.isdecimal() and len(start) <= 10):
        raise ConfigError(f"the metadata of {str(file)!r} say start={start!r:.40}; a number is due")
    return _pairs(tensors), int(start)


def _pairs(tensors: "Mapping[str, Tensor]") -> "list[tuple[Tensor, Tensor]]":
    layers = (len(tensors) + 1) // 2
    names = [f"layers.{i}.{kind}" for i in range(layers) for kind in ("keys", "values")]
    if not layers or set(names) != set(tensors):
        seen = sorted(set(tensors) - set(names))[:_SHAPE_ERRORS]
        absent = sorted(set(names) - set(tensors))[:_SHAPE_ERRORS]
        raise ConfigError(
            "the file must hold layers.N.keys and layers.N.values for N = 0, 1, ... and nothing "
            f"else; it has {len(tensors)} tensors, beyond them {', '.join(seen) or 'none'}, and "
            f"lacks {', '.join(absent) or 'none'}"
        )
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in tensors.values()})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise ConfigError(f"all tensors must have one dtype of {', '.join(DTYPES)}; got {dtypes}")
    tokens = tensors["layers.0.keys"].shape[1:2]
    for name, x in tensors.items():
        if x.dim() != 3 or x.shape[1:2] != tokens:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; expected [heads, tokens, channels] with as "
                "many tokens in all layers"
            )
    return [(tensors[f"layers.{i}.keys"], tensors[f"layers.{i}.values"]) for i in range(layers)]


def _block(spec: "KVSpec", pairs: "list[tuple[Tensor, Tensor]]", start: int) -> "KVBlock":
    from kvlib.blocks import KVBlock

    if len(pairs) != spec.num_layers:
        raise ShapeError(f"the file holds {len(pairs)} layers; the model has {spec.num_layers}")
    return KVBlock.dense(spec, pairs, start=start)


class _Rope:
    """What the options say of RoPE.

    Args:
        theta: None for a model without.
        rotary_dim: None for all channels.
        kind: of scaling.
        params: of the kind, as NAME=NUMBER.
        interleaved: which channels turn together.
    """

    def __init__(
        self,
        theta: float | None,
        rotary_dim: int | None,
        kind: str,
        params: list[str],
        interleaved: bool,
    ) -> None:
        self.given = {
            "--rope-theta": theta is not None,
            "--rotary-dim": rotary_dim is not None,
            "--rope-kind": kind != "default",
            "--rope-param": bool(params),
            "--interleaved": interleaved,
        }
        self.theta, self.rotary_dim, self.kind = theta, rotary_dim, kind
        self.interleaved = interleaved
        self.params: list[tuple[str, float]] = []
        for text in params:
            name, equals, number = text.partition("=")
            try:
                self.params.append((name, float(number)))
            except ValueError:
                equals = ""
            if not name or not equals:
                raise ConfigError(f"--rope-param takes NAME=NUMBER, got {text!r:.80}")

    def layer(self, heads: int, k_dim: int, v_dim: int) -> "LayerSpec":
        """A layer of such a model."""
        from kvlib.spec import LayerSpec, RopeSpec

        rope = None
        if self.theta is not None:
            rope = RopeSpec(
                theta=self.theta,
                rotary_dim=k_dim if self.rotary_dim is None else self.rotary_dim,
                kind=self.kind,
                params=tuple(self.params),
                interleaved=self.interleaved,
            )
        return LayerSpec(num_kv_heads=heads, k_head_dim=k_dim, v_head_dim=v_dim, rope=rope)


def _spec(
    model: str | None,
    model_id: str | None,
    rope: _Rope,
    shapes: list[tuple[int, int, int]],
    dtype: str,
) -> "KVSpec":
    """Of a model, or as the options and the shapes say."""
    from kvlib.model_spec import model_id_text
    from kvlib.spec import KVSpec, RopeState

    used = [name for name, is_given in rope.given.items() if is_given]
    if (model is None) == (model_id is None):
        raise ConfigError("say whose KV it is: --model, or --model-id with what is known of RoPE")
    if model is not None:
        if used:
            raise ConfigError(f"{', '.join(used)}: the model says that; these go with --model-id")
        return replace(_model_spec(model), dtype=dtype)
    if used and rope.theta is None:
        raise ConfigError(f"{', '.join(used)}: give --rope-theta too")
    return KVSpec(
        model_id=model_id_text(str(model_id)),
        layers=tuple(rope.layer(*shape) for shape in shapes),
        dtype=dtype,
        rope_state=RopeState.NONE if rope.theta is None else RopeState.POST,
    )


def _model_spec(name: str) -> "KVSpec":
    """From the config and the identity of the weights, which are not loaded."""
    from kvlib.model_spec import spec_for_model

    if name.partition(":")[0] == "recall":
        from kvlib.evals.models import load_eval_model

        loaded = load_eval_model(name)
        return spec_for_model(loaded.model, model_id=loaded.model_id)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    from kvlib.smollm2 import smollm2_folder

    place = smollm2_folder() if name == "smollm2" else Path(name).expanduser()
    try:
        config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as exc:
        raise ConfigError(
            f"cannot read model {name!r:.200}: expected smollm2, recall, a model folder, or a hub "
            f"name in the local cache ({' '.join(str(exc).split())[:200]})"
        ) from exc
    return spec_for_model(model)


def _with_profile(profile: Path | None) -> "Callable[[str], Codec]":
    """Finds the codec of a canonical string, reading its profile from that file."""
    from kvlib.codecs import build_codec, codec_from_canonical, describe_codec

    def find(text: str) -> "Codec":
        name, _, rest = text.partition("@")
        params = [x for x in rest.partition(":")[2].split(",") if x.startswith("digest=")]
        if not params or params == ["digest=none"]:
            return codec_from_canonical(text)
        if profile is None:
            try:
                return codec_from_canonical(text)
            except IncompatibleDataError as exc:
                raise IncompatibleDataError(f"{exc}; here, give --profile FILE") from exc
        kept = [x for x in rest.partition(":")[2].split(",") if not x.startswith("profile=")]
        codec = build_codec(f"{name}:{','.join([*kept, f'profile={profile}'])}")
        if describe_codec(codec) != text:
            raise IncompatibleDataError(
                f"the container was written by codec {text!r:.120}; this kvlib has "
                f"{describe_codec(codec)!r}"
            )
        return codec

    return find
