# SPDX-License-Identifier: Apache-2.0
"""`kvlib calibrate`: measure what a policy needs to know of a model, and write it to a file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvlib.errors import ConfigError

if TYPE_CHECKING:
    from kvlib.artefacts import Artefact

__all__ = ["app"]

app = typer.Typer(
    help="Measure what a policy needs to know of a model, once, into a file.", no_args_is_help=True
)
console = Console()

ModelOption = Annotated[str, typer.Option(help="smollm2, recall, or a model folder.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="File to write (safetensors).")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="Of torch: cpu, cuda, ...")]


@app.command()
def abstracts(
    model: ModelOption,
    out: OutOption,
    codes: Annotated[int, typer.Option(help="Bytes of a coded key.")] = 8,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A document like those the model will read; give it several times."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Texts to read.")] = 4,
    tokens: Annotated[
        int, typer.Option(help="Tokens of each, as long as contexts; at most what the model reads.")
    ] = 4096,
    samples: Annotated[int, typer.Option(help="Keys of a layer to fit its codebook to.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of the order of texts, and of first centroids.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Fit codebooks to keys as queries see them, for the selector leoam (needs faiss)."""
    from kvlib.calibration.documents import read_documents

    options = {
        "codes": codes, "prompts": prompts, "tokens": tokens, "samples": samples, "seed": seed,
        "texts": None if text is None else read_documents(text),
    }  # fmt: skip
    _run("abstracts", model, out, dtype, device, options, {"codes": codes}, method="leoam")


@app.command()
def razor(
    model: ModelOption,
    out: OutOption,
    block: Annotated[
        int, typer.Option(help="Random tokens that are repeated; fewer if they do not fit.")
    ] = 2500,
    draws: Annotated[int, typer.Option(help="Blocks to average over.")] = 3,
    induction: Annotated[
        float, typer.Option(help="Share of KV heads to take by induction score.")
    ] = 0.14,
    echo: Annotated[float, typer.Option(help="Share of KV heads to take by echo score.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Find the retrieval heads, which look back at repetitions of random tokens."""
    shares = {"induction": induction, "echo": echo}
    options = {"block": block, "draws": draws, "seed": seed, **shares}
    _run("razor", model, out, dtype, device, options, shares)


@app.command()
def lazy(
    model: ModelOption,
    out: OutOption,
    samples: Annotated[int, typer.Option(help="Texts to continue.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each that the model reads.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens that it then generates.")] = 256,
    alpha: Annotated[float, typer.Option(help="Attention from which a token is active.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Of the places that texts are taken from.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Find the window: how long tokens stay quiet before they are needed again."""
    options = {"samples": samples, "tokens": tokens, "new_tokens": new_tokens, "seed": seed}
    _run("lazy", model, out, dtype, device, options | {"alpha": alpha}, {"alpha": alpha})


@app.command()
def cachegen(
    model: ModelOption,
    out: OutOption,
    prompts: Annotated[int, typer.Option(help="Texts.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 1000,
    levels: Annotated[
        str, typer.Option(help="Multiples of the bin widths to have tables for.")
    ] = "0.25/0.35/0.5/0.7/1.0",
    seed: Annotated[int, typer.Option(help="Of the places that texts are taken from.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Count how keys and values are distributed, for the codec cachegen."""
    options = {"prompts": prompts, "tokens": tokens, "levels": levels, "seed": seed}
    ladder = levels.split("/")
    _run("cachegen", model, out, dtype, device, options, {"level": ladder[len(ladder) // 2]})


@app.command()
def codec(
    model: ModelOption,
    out: OutOption,
    presets: Annotated[
        str, typer.Option(help="Of balanced, small and archive; near is always there.")
    ] = "balanced small archive",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A document like those the model will read; give it several times."),
    ] = None,
    documents: Annotated[int, typer.Option(help="Texts at most; five are held out.")] = 42,
    tokens: Annotated[int, typer.Option(help="Tokens of each that are cached.")] = 768,
    following: Annotated[int, typer.Option(help="Tokens after them that feel the errors.")] = 256,
    group: Annotated[int, typer.Option(help="Layers that archive codes together.")] = 5,
    ridge: Annotated[float, typer.Option(help="Of the metric, as a share of its mean.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of places in the texts, and of draws.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Find transforms in which errors cost the model's predictions alike, for the codec kvlc."""
    from kvlib.calibration.documents import read_documents

    options = {
        "presets": presets, "documents": documents, "tokens": tokens, "following": following,
        "group": group, "ridge": ridge, "seed": seed,
        "texts": None if text is None else read_documents(text),
    }  # fmt: skip
    preset = next((p for p in ("small", "balanced", "archive") if p in presets), "near")
    _run("codec", model, out, dtype, device, options, {"preset": preset}, method="kvlc")


@app.command()
def epicache(
    model: ModelOption,
    out: OutOption,
    tokens: Annotated[int, typer.Option(help="Tokens of the text.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens that are seen back.")] = 512,
    sinks: Annotated[int, typer.Option(help="First tokens that are seen anyway.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the place that the text is taken from.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Find how far each layer's keys depend on distant tokens."""
    options = {"tokens": tokens, "window": window, "sinks": sinks, "seed": seed}
    _run("epicache", model, out, dtype, device, options, {})


@app.command()
def kvzap(
    model: ModelOption,
    out: OutOption,
    prompts: Annotated[int, typer.Option(help="Texts; every eighth is held out.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of the longest texts.")] = 1000,
    kind: Annotated[str, typer.Option(help="linear, or mlp with a hidden layer.")] = "linear",
    pairs: Annotated[
        int, typer.Option(help="Tokens of each text that mlp learns from, and R^2 is taken over.")
    ] = 500,
    seed: Annotated[int, typer.Option(help="Of texts, samples and first weights.")] = 0,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
) -> None:
    """Train networks that guess from hidden states what KVzip would find out."""
    options = {"prompts": prompts, "tokens": tokens, "kind": kind, "pairs": pairs, "seed": seed}
    _run("kvzap", model, out, dtype, device, options, {})


def _run(
    name: str,
    model: str,
    out: Path,
    dtype: str,
    device: str,
    options: dict[str, Any],
    params: dict[str, Any],
    method: str = "",
) -> None:
    """Load the model, measure, and say what came out.

    Args:
        name: of the policy.
        model: see `kvlib.evals.models.load_eval_model`.
        out: file to write.
        dtype: of the model.
        device: of the model.
        options: of the measurement.
        params: of the policy, which go with the file.
        method: name of the policy or codec, if it is another one.
    """
    from kvlib.calibration import CALIBRATIONS, calibrate, writable_file
    from kvlib.evals.models import load_eval_model
    from kvlib.registry import parse_method

    method = f"{method or name}:" + ",".join(
        f"{k}={v}" for k, v in {"profile": out, **params}.items()
    )
    try:  # before anything is run
        parse_method(method)
    except ConfigError as exc:
        raise ConfigError(
            f"no method string can hold the path {str(out)!r}: give one without + | ; : , = and "
            "spaces"
        ) from exc
    out = writable_file(out)
    loaded = load_eval_model(model, dtype, device)
    try:
        with _bar(f"{name} on {model}") as progress:
            found = calibrate(
                name,
                loaded.model,
                loaded.tokenizer,
                loaded.model_id,
                out,
                progress=progress,
                **options,
            )
    except KeyboardInterrupt:
        Console(stderr=True).print(f"Interrupted. {out} was not written.", highlight=False)
        raise typer.Exit(130) from None
    table = Table(show_header=False, title=f"{name} on {model}")
    for row in _summary(CALIBRATIONS[name], found):
        table.add_row(*row)
    console.print(table)
    console.print(f"In {out} ({out.stat().st_size} bytes, digest {found.digest}). The method is")
    console.print(f"    {method}", highlight=False, soft_wrap=True)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the error stream."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summary(module: str, found: "Artefact") -> Sequence[tuple[str, str]]:
    """What a method says of its own artefact, or else its single numbers and settings."""
    from importlib import import_module

    own = getattr(import_module(module), "summary", None)
    if own is not None:
        rows: Sequence[tuple[str, str]] = own(found)
        return rows
    numbers = [(k, str(x.item())) for k, x in found.tensors.items() if x.numel() == 1]
    return [*numbers, *found.settings.items()]
