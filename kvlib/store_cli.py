# SPDX-License-Identifier: Apache-2.0
"""`kvlib store`: what is in a store on disk, whether it is intact, what may go, and moving it."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from kvlib.errors import ConfigError
from kvlib.store_cli_text import (
    MOST_LINES,
    ages,
    capacity_text,
    counted,
    plain,
    printable,
    record_line,
    size_text,
    tenants_text,
)

if TYPE_CHECKING:
    from kvlib.store.kept import Kept, Kind
    from kvlib.store.upkeep import Record

__all__ = ["app"]

app = typer.Typer(
    help="Look after a store on disk: what is in it, whether it is intact, what may go.",
    no_args_is_help=True,
)
console = Console()

PathArgument = Annotated[Path, typer.Argument(help="The store's folder.")]
MacOption = Annotated[
    Path | None,
    typer.Option(help="File with the 16 to 64 secret bytes that records are authenticated under."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

_FILE_WIDTH = 140  # of tables that do not go to a terminal


@app.command()
def stat(path: PathArgument, mac_key_file: MacOption = None, as_json: JsonOption = False) -> None:
    """What a store holds: records, bytes, tokens, codecs, models, tenants."""
    from kvlib.store.kept import tier_of
    from kvlib.store.upkeep import summarize

    mac_key = _mac_key(mac_key_file)
    with _opened(path, mac_key) as store:
        stats = store.stats()
        with _bar("reading headers", _total_bytes(store)) as step:
            found = summarize(store, mac_key, step)
        disk = store.disk_bytes()
        tenants, limits = store.tenants(), store.limits()
    free = _free_bytes(path)
    about: dict[str, Any] = {
        "tier": tier_of(path.expanduser()),
        "records": found.records,
        "bytes": found.nbytes,
        "used_bytes": stats.used_bytes,
        "disk_bytes": disk,
        "free_bytes": free,
        "tokens": found.tokens,
        "codecs": dict(found.codecs.most_common()),
        "fidelities": dict(found.fidelities.most_common()),
        "models": dict(found.models.most_common()),
        "tenants": {
            tag.hex(): {"records": found.tenants[tag.hex()], "used_bytes": used, "quota": quota}
            for tag, (used, quota) in sorted(tenants.items(), key=lambda x: -x[1][0])
        },
        "expiring": found.expiring,
        "expired": found.expired,
        "limits": limits._asdict(),
        "unreadable": dict(found.unreadable.most_common()),
        "oldest_use": found.oldest,
        "newest_use": found.newest,
    }
    if as_json:
        _print_json(about)
        return
    table = Table(show_header=False, title=plain(str(path)))
    table.add_column()
    table.add_column(overflow="fold")
    for name, text in (
        ("tier", about["tier"]),
        ("records", f"{found.records:,}"),
        ("bytes of records", size_text(found.nbytes)),
        ("held with padding", size_text(stats.used_bytes)),
        ("taken of the disk", f"{size_text(disk)}; {size_text(free)} are free beside it"),
        ("capacity", capacity_text(limits)),
        ("tokens", f"{found.tokens:,}"),
        ("codecs", counted(found.codecs)),
        ("fidelities", counted(found.fidelities)),
        ("models", counted({name[:16]: n for name, n in found.models.items()})),
        ("tenants", tenants_text(about["tenants"])),
        ("time to live", f"{found.expiring:,} have one; it is over for {found.expired:,}"),
        ("last use", ages(found.oldest, found.newest)),
        ("unreadable", counted(found.unreadable)),
    ):
        table.add_row(name, "\n".join(map(plain, text.split("\n"))))
    _wide().print(table)


@app.command("ls")
def list_records(
    path: PathArgument,
    limit: Annotated[int | None, typer.Option(min=1, help="Print so many and stop.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="Only of this codec: exact, exact@2 or all of its string.")
    ] = None,
    mac_key_file: MacOption = None,
    as_json: JsonOption = False,
) -> None:
    """A line for each record, the one used longest ago first; --json: a line of JSON for each."""
    from kvlib.store.upkeep import describe, is_of

    mac_key = _mac_key(mac_key_file)
    printed = 0
    with _opened(path, mac_key) as store:
        for record in describe(store, mac_key):
            if codec is not None and not is_of(record.codec, codec):
                continue
            sys.stdout.write(_json_line(record) if as_json else record_line(record))
            printed += 1
            if printed == limit:
                break


@app.command()
def verify(
    path: PathArgument,
    repair: Annotated[
        bool, typer.Option(help="Drop damaged records and put the accounts in order.")
    ] = False,
    mac_key_file: MacOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read and check every byte of every record; status 1 if there is a problem."""
    from kvlib.store.upkeep import verify

    mac_key = _mac_key(mac_key_file)
    begun = time.perf_counter()
    with _opened(path, mac_key) as store:
        with _bar("verifying", _total_bytes(store)) as step:
            found = verify(store, repair=repair, mac_key=mac_key, step=step)
        if repair:
            store.let_go()
    seconds = time.perf_counter() - begun
    if as_json:
        _print_json({**asdict(found), "seconds": seconds})
    else:
        for line in found.problems:
            _print(line)
        _print(
            f"{found.records:,} records, {size_text(found.nbytes)} in {seconds:.1f} s "
            f"({found.nbytes / max(seconds, 1e-9) / 1e6:,.0f} MB/s): "
            + (f"{len(found.problems):,} problems" if found.problems else "all intact")
            + (f", {found.repaired:,} repaired" if repair else "")
        )
    if found.problems:
        raise typer.Exit(1)


@app.command()
def gc(
    path: PathArgument,
    disk: Annotated[
        str | None, typer.Option(help="Bytes the records may keep, such as 10GiB.")
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="Drop only of this codec: exact, exact@2 or all of it.")
    ] = None,
    older_versions: Annotated[
        bool, typer.Option(help="Drop only what earlier versions of a codec wrote.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
    mac_key_file: MacOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drop what has expired; with options also others, those used longest ago first.

    With --disk until so much is left, else all that --codec and --older-versions name.
    """
    from kvlib.store.sizes import parse_bytes
    from kvlib.store.upkeep import drop, to_drop

    most = 0 if codec is not None or older_versions else None
    if disk is not None:
        most = parse_bytes(disk, "--disk")
    mac_key = _mac_key(mac_key_file)
    with _opened(path, mac_key) as store:
        before = store.stats()
        with _bar("choosing", _total_bytes(store)) as step:
            going = to_drop(
                store,
                most_bytes=most,
                codec=codec,
                older=older_versions,
                mac_key=mac_key,
                step=step,
            )
        if not dry_run:
            with _bar("dropping", sum(record.nbytes for record in going)) as step:
                drop(store, going, step)
        after = store.stats()
        disk_bytes = store.disk_bytes()
    if as_json:
        _print_json(
            {
                "dropped": [record.key.to_bytes().hex() for record in going],
                "dropped_bytes": sum(record.nbytes for record in going),
                "expired": sum(record.ttl is not None and record.ttl <= 0 for record in going),
                "records": after.records,
                "used_bytes": after.used_bytes,
                "disk_bytes": disk_bytes,
                "dry_run": dry_run,
            }
        )
        return
    for record in going[:MOST_LINES]:
        sys.stdout.write(record_line(record))
    if len(going) > MOST_LINES:
        _print(f"... and {len(going) - MOST_LINES:,} more")
    _print(
        f"{len(going):,} of {before.records:,} records {'would go' if dry_run else 'went'}; "
        f"{after.records:,} stay, which hold {size_text(after.used_bytes)} and take "
        f"{size_text(disk_bytes)} of the disk"
    )


@app.command()
def clear(
    path: PathArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Drop every record; the store itself stays."""
    from kvlib.store.upkeep import clear as clear_store

    with _opened(path, None) as store:
        stats = store.stats()
        text = f"{stats.records:,} records, {size_text(stats.used_bytes)}, in {plain(str(path))}"
        if not yes:
            typer.confirm(f"Drop {text}?", abort=True, err=True)
        with _bar("dropping", _total_bytes(store)) as step:
            dropped = clear_store(store, step)
        disk_bytes = store.disk_bytes()
    if as_json:
        _print_json({"dropped": dropped, "disk_bytes": disk_bytes})
    else:
        _print(f"{dropped:,} records went; the store takes {size_text(disk_bytes)} of the disk")


@app.command("export")
def export_store(
    path: PathArgument,
    out: Annotated[Path, typer.Argument(help="Tar file to write.")],
    mac_key_file: MacOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write all records, verified, into a tar file; status 1 if some are damaged."""
    from kvlib.store.archive import export_records

    mac_key = _mac_key(mac_key_file)
    out = out.expanduser()
    part = out.with_name(f"{out.name}.part")
    with _opened(path, mac_key) as store:
        if out.exists():
            raise ConfigError(f"{out} is there already; give another name or remove it")
        if path.expanduser().resolve() in out.resolve().parents:
            raise ConfigError(f"{out} would lie in the store itself; give another place")
        try:
            with part.open("xb") as file:
                try:
                    with _bar("exporting", _total_bytes(store)) as step:
                        done = export_records(store, file, step)
                    file.flush()
                    os.fsync(file.fileno())
                    part.replace(out)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as exc:
            raise ConfigError(f"cannot write {part}: {exc.strerror}") from exc
    if as_json:
        _print_json(asdict(done))
    else:
        for line in done.problems:
            _print(f"left out: {line}")
        _print(f"{out}: {done.records:,} records, {size_text(done.nbytes)}")
    if done.problems:
        raise typer.Exit(1)


@app.command("import")
def import_store(
    path: PathArgument,
    file: Annotated[Path, typer.Argument(help="Tar file from kvlib store export.")],
    disk: Annotated[
        str | None,
        typer.Option(help="Most bytes the store may take; older records go. Enough by default."),
    ] = None,
    tier: Annotated[
        str | None, typer.Option(help="segment or file: make such a store if there is none.")
    ] = None,
    mac_key_file: MacOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store the records of a tar file, each verified; status 1 if some are refused."""
    from kvlib.store.archive import contents, import_records
    from kvlib.store.kept import make_kept
    from kvlib.store.sizes import parse_bytes

    mac_key = _mac_key(mac_key_file)
    capacity = None if disk is None else parse_bytes(disk, "--disk")
    if tier not in (None, "segment", "file"):
        raise ConfigError(f"--tier {tier!r:.40}: expected segment or file")
    try:
        archive = file.expanduser().open("rb")
    except OSError as exc:
        raise ConfigError(f"cannot read {str(file)!r}: {exc.strerror}") from exc
    with archive:
        count, nbytes = contents(archive)
        if tier is not None:
            kind: Kind = "file" if tier == "file" else "segment"
            make_kept(path.expanduser(), kind, mac_key=mac_key).close()
        with (
            _opened(path, mac_key, records=count, nbytes=nbytes, capacity=capacity) as store,
            _bar("importing", nbytes) as step,
        ):
            done = import_records(store, archive, mac_key=mac_key, step=step)
    if as_json:
        _print_json(asdict(done))
    else:
        for line in done.reasons[:MOST_LINES]:
            _print(f"refused: {line}")
        _print(
            f"{done.stored:,} records stored ({size_text(done.nbytes)}), {done.duplicate:,} were "
            f"there already, {done.refused:,} refused, {done.evicted:,} older ones went"
        )
    if done.refused:
        raise typer.Exit(1)


# -- helpers


def _mac_key(file: Path | None) -> bytes | None:
    from kvlib.codecs.header import check_mac_key

    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            key = opened.read(65)  # one more than the longest: a wrong file is not read whole
    except OSError as exc:
        raise ConfigError(f"cannot read {str(file)!r}: {exc.strerror}") from exc
    check_mac_key(key)
    return key


@contextmanager
def _opened(
    path: Path,
    mac_key: bytes | None,
    *,
    records: int = 0,
    nbytes: int = 0,
    capacity: int | None = None,
) -> "Iterator[Kept]":
    from kvlib.store.kept import open_kept

    path = path.expanduser()
    try:
        store = open_kept(path, mac_key=mac_key, records=records, nbytes=nbytes, capacity=capacity)
    except OSError as exc:
        raise ConfigError(f"cannot open the store in {path}: {exc}") from exc
    try:
        with store:
            yield store
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.", highlight=False)
        raise typer.Exit(130) from None


def _total_bytes(store: "Kept") -> int:
    return sum(store.size(key) or 0 for key in store.keys())


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with a rate, on the error stream."""
    columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    errors = Console(stderr=True)
    progress = Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    task = progress.add_task(what, total=total)
    with progress:
        yield lambda done: progress.advance(task, done)


def _free_bytes(path: Path) -> int:
    status = os.statvfs(path.expanduser())
    return status.f_bavail * status.f_frsize


def _json_line(record: "Record") -> str:
    about = asdict(record) | {
        "block": record.key.block.hex(),
        "storage": record.key.storage.hex(),
        "stop": record.start + record.tokens,
    }
    del about["key"]
    return json.dumps(about) + "\n"


def _print(text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _print_json(about: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(about) + "\n")


def _wide() -> Console:
    return console if console.is_terminal else Console(width=_FILE_WIDTH)
