# SPDX-License-Identifier: Apache-2.0
"""Whether an index may be mapped: its file is looked at with plain reads before LMDB sees it.

A store that was closed by its last user leaves `CLEAN`: size and xxh3-64 of the index. A file that
still matches is what LMDB wrote. Without it somebody was killed, and then

- since another boot the index was never synced, so it is not trusted;
- in this boot LMDB's copy-on-write left it whole, and it is walked page by page (`lmdb.verify`, in
  Python, without the engine) for what somebody else may have done to it.

Rows have checksums of their own, so that a flipped bit in one is found where it is read.
"""

import os
from collections.abc import Callable
from pathlib import Path

import xxhash

_walk: Callable[[str, bool], list[str]] | None
try:
    from lmdb.verify import verify

    _walk = verify
except ImportError:  # older: an index that was not closed is made anew
    _walk = None

__all__ = ["boot_id", "doubt", "fingerprint", "is_clean", "mark_clean", "mark_open"]

_CLEAN = "CLEAN"
_OPEN = "OPEN"
_PIECE = 4 << 20
_WALK_BYTES = 1 << 30
"""Walking costs about as much a byte as reading header pages: a larger one is made anew."""


def boot_id() -> str:
    """Names this run of the machine; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def fingerprint(path: Path) -> str:
    """Size and checksum of a file.

    Raises:
        OSError: it cannot be read.
    """
    state = xxhash.xxh3_64()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            state.update(piece)
            size += len(piece)
    return f"{size} {state.hexdigest()}\n"


def mark_clean(root: Path, data: Path) -> None:
    """Note that nobody has the index open, and what it is.

    Raises:
        OSError: the note cannot be written; the next open then walks the index.
    """
    temporary = root / f"{_CLEAN}.new"
    with temporary.open("w", encoding="ascii") as file:
        file.write(fingerprint(data))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(root / _CLEAN)


def mark_open(root: Path) -> None:
    """Note that the index is in use, and in which run of the machine.

    Raises:
        OSError: the folder cannot be written.
    """
    (root / _OPEN).write_text(boot_id(), encoding="ascii")
    (root / _CLEAN).unlink(missing_ok=True)


def is_clean(root: Path, data: Path) -> bool | None:
    """Whether an index is what it was when its store was closed; None if it was not closed."""
    try:
        noted = (root / _CLEAN).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    try:
        return noted == fingerprint(data)
    except OSError:
        return False


def doubt(root: Path, data: Path) -> str:
    """Why an index must not be mapped.

    Args:
        root: the store's folder.
        data: the index's file; nobody has it open, and it was not closed.

    Returns:
        The reason, empty if there is none.
    """
    try:
        last = (root / _OPEN).read_text(encoding="ascii", errors="replace")
        size = data.stat().st_size
    except OSError as exc:
        return f"it cannot be read: {exc}"
    if not last or last != boot_id():
        return "the machine went down while it was open"
    if _walk is None or size > _WALK_BYTES:
        return "it was not closed"
    try:
        findings = _walk(str(data), False)
    except Exception as exc:  # noqa: BLE001  any failure of the walk is a finding
        return f"it is no index: {exc}"
    return "; ".join(str(finding) for finding in findings[:3])
