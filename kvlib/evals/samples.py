# SPDX-License-Identifier: Apache-2.0
"""Results on disk: one JSON line for each context and method, appended as soon as it is known.

A file begins with a header that says which model the results belong to. A line that a kill has torn
is taken back when the file is opened again; nothing else is ever changed.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvlib.errors import ConfigError
from kvlib.registry import describe

if TYPE_CHECKING:
    from io import BufferedRandom

    from kvlib.evals.tasks import Sample, Task

__all__ = ["FILE", "SCHEMA", "Key", "SampleFile", "key_of", "read_samples", "sample_names"]

SCHEMA = 1
FILE = "samples.jsonl"

_SAME = ("name", "dtype", "device", "fingerprint", "text")


class Key(NamedTuple):
    """What a line is the result of."""

    task: str
    version: int
    length: int
    seed: int
    number: int
    mode: str
    stepwise: bool
    method: str

    @property
    def cell(self) -> tuple[str, int, int, str, bool]:
        """Lines of one cell are averaged."""
        return (self.task, self.version, self.length, self.mode, self.stepwise)

    @property
    def context(self) -> tuple[Any, ...]:
        """The same for all methods that were given the same questions."""
        return tuple(self[:-1])


def sample_names(
    task: "Task", length: int, seed: int, number: int, sample: "Sample"
) -> dict[str, int | str]:
    """What names a sample in a line, for `key_of` to read."""
    return {
        "task": describe(task),
        "version": task.version,
        "length": length,
        "seed": seed,
        "index": number,
        "digest": sample.digest(),
    }


def key_of(record: dict[str, Any]) -> Key:
    """The key of a line; a KeyError or TypeError if it is none of ours."""
    sample = record["sample"]
    return Key(
        str(sample["task"]),
        int(sample["version"]),
        int(sample["length"]),
        int(sample["seed"]),
        int(sample["index"]),
        str(record["mode"]),
        bool(record.get("stepwise", False)),
        str(record["method"]),
    )


def read_samples(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a run folder or of a samples file.

    The last line of a key counts, and of a method in a cell only the lines that were made by the
    same versions as the newest.

    Raises:
        ConfigError: no such file, or one that does not hold samples; the line is named.
    """
    place = path / FILE if path.is_dir() else path
    if not place.is_file():
        raise ConfigError(f"{place} does not exist: expected a run folder or a samples file")
    header: dict[str, Any] | None = None
    records: dict[Key, dict[str, Any]] = {}
    with place.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # torn
            try:
                entry = json.loads(line)
                if header is None:
                    header = _checked(entry, place)
                else:
                    key = key_of(entry)
                    records.pop(key, None)  # so that the newest is the last
                    records[key] = entry
            except (ValueError, KeyError, TypeError) as exc:
                raise ConfigError(
                    f"{place}, line {number} is no sample ({type(exc).__name__}: {exc})"
                ) from exc
    if header is None:
        raise ConfigError(f"{place} is empty: expected a header and samples")
    newest = {(key.cell, key.method): _versions(record) for key, record in records.items()}
    return header, [
        record
        for key, record in records.items()
        if newest[key.cell, key.method] == _versions(record)
    ]


def _versions(record: dict[str, Any]) -> str:
    return str(record.get("versions", ""))


def _checked(header: Any, place: Path) -> dict[str, Any]:
    if not isinstance(header, dict):
        raise TypeError("the header is no object")
    kind, schema = header.get("kind"), header.get("schema")
    if kind != "kvlib-samples" or schema != SCHEMA:
        raise ConfigError(
            f"{place} begins with kind {kind!r}, schema {schema!r}; expected 'kvlib-samples', "
            f"{SCHEMA}"
        )
    if not isinstance(header.get("model"), dict):
        raise TypeError("the header names no model")
    return header


class SampleFile:
    """The samples of one run, for appending. One process at a time.

    Args:
        folder: of the run; made if it is not there.
        header: of the results to come. Those that are there must be of the same model.

    Raises:
        ConfigError: the folder holds results of another model, or another process is writing.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BufferedRandom = self.path.open("a+b")
        except OSError as exc:
            raise ConfigError(f"cannot write to {self.path}: {exc}") from exc
        try:
            self._lock()
            self._repair()
            self.header = header = {"schema": SCHEMA, "kind": "kvlib-samples", **header}
            if self.path.stat().st_size == 0:
                self._write(header)
            self.header, self.records = read_samples(self.path)
            _check_same(self.header, header, folder)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(
                f"another process is writing to {self.path}: wait for it, or choose another folder"
            ) from exc

    def _repair(self) -> None:
        """Cut off a last line without an end."""
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def append(self, record: dict[str, Any]) -> None:
        """Add a line."""
        self._write(record)
        self.records.append(record)

    def done(self) -> set[tuple[Key, str]]:
        """What is there: keys, each with the versions of what made it."""
        return {(key_of(record), _versions(record)) for record in self.records}

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _check_same(held: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    differ = [
        f"{name} {held['model'].get(name)!r} (now {new['model'].get(name)!r})"
        for name in _SAME
        if held["model"].get(name) != new["model"].get(name)
    ]
    if differ:
        raise ConfigError(
            f"{folder} holds results with {', '.join(differ)}: choose another folder with --out"
        )
