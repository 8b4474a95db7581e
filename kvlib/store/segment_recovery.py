# SPDX-License-Identifier: Apache-2.0
"""Making the index anew from the header pages of the records.

Every record begins with a page that says all the index knows of it, at the start of a granule. So
the first page of every granule is looked at. What was deleted is still there until something is
written over it, and header pages are found inside the room of newer records: where two overlap, or
have one key, the newer generation is right. A record that turns out to be written over in part is
found by its checksums when it is read.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from kvlib.errors import CodecError
from kvlib.store.arena import Arena
from kvlib.store.blockio import SegmentFiles
from kvlib.store.fileio import scandir
from kvlib.store.segment_format import HEADER_MAGIC, PAGE, Entry, Super, parse_header_page
from kvlib.store.segment_index import Index
from kvlib.store.segment_ledger import Space

__all__ = ["find_segments", "rebuild"]

_NAME = re.compile(r"seg-([0-9a-f]{8})\.kv")
_PIECE = 4 << 20


def find_segments(root: Path) -> dict[int, int]:
    """Bytes of each segment file."""
    found = {}
    for item in scandir(root):
        match = _NAME.fullmatch(item.name)
        if match and item.is_file(follow_symlinks=False):
            found[int(match[1], 16)] = item.stat(follow_symlinks=False).st_size
    return found


def _headers(
    files: SegmentFiles, store: Super, number: int, granules: int, memory: memoryview
) -> Iterator[tuple[bytes, Entry]]:
    """The intact header pages of a segment, stale ones included."""
    step = memory.nbytes // store.granule * store.granule
    end = granules * store.granule
    for offset in range(0, end, step):
        piece = memory[: min(step, end - offset)]
        try:
            files.read(number, [piece], offset)
        except (CodecError, OSError):
            continue  # unreadable: nothing in it can be served
        for at in range(0, piece.nbytes, store.granule):
            if piece[at : at + len(HEADER_MAGIC)] != HEADER_MAGIC:
                continue
            try:
                name, entry = parse_header_page(piece[at : at + PAGE], store)
            except CodecError:
                continue
            if entry.extents[0][:2] == (number, (offset + at) // store.granule):
                yield name, entry


def rebuild(root: Path, files: SegmentFiles, store: Super, index: Index) -> int:
    """Fill an empty index with what the segments hold; nobody else has the store open.

    Returns:
        Records found.

    Raises:
        IndexFaultError: the index cannot be written.
    """
    segments = {n: size // store.granule for n, size in sorted(find_segments(root).items())}
    found: list[tuple[bytes, Entry]] = []
    with Arena(1, max(_PIECE, store.granule)).slot() as memory:
        for number, granules in segments.items():
            found += _headers(files, store, number, granules, memory)
    found.sort(key=lambda record: -record[1].generation)
    space = Space(segments)
    kept: dict[bytes, Entry] = {}
    for name, entry in found:
        if name not in kept and space.take(entry.extents):
            kept[name] = entry
    oldest_first = list(kept.items())[::-1]
    with index.write() as txn:
        index.ledger.fill(txn, segments, oldest_first)
    return len(kept)
