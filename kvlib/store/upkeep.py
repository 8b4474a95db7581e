# SPDX-License-Identifier: Apache-2.0
"""What is in a store on disk, what of it is damaged, and what may go."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvlib.codecs.container import MAX_HEADER_BYTES, parse_header
from kvlib.errors import CodecError, CorruptDataError, StoreError, UnknownPluginError
from kvlib.keys import StoreKey
from kvlib.store.kept import Kept

__all__ = [
    "GIVEN_UP",
    "Record",
    "Step",
    "Summary",
    "Verified",
    "clear",
    "describe",
    "drop",
    "expired",
    "is_abstracts",
    "is_of",
    "is_older_version",
    "problem",
    "read_whole",
    "summarize",
    "to_drop",
    "verify",
]

Step = Callable[[int], None]
"""Told the bytes of each record that is done."""

GIVEN_UP = (CodecError, OSError, StoreError)
"""What makes a record unreadable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a record says of itself; only `key` and `nbytes` if its header cannot be read.

    Attributes:
        key: its name.
        nbytes: of the container.
        start: index of its first token.
        tokens: that it stands for.
        codec: canonical string.
        fidelity: lowest among the KV it was computed from; its codec may cost more.
        layers: how many.
        spec: fingerprint of the model's spec, in hexadecimal digits.
        tenant: tag of whose account it is on, in hexadecimal digits.
        ttl: seconds for which it may still be served, at most 0 if that is over; None for ever.
        problem: why the header cannot be read; empty if it can.
    """

    key: StoreKey
    nbytes: int
    start: int = 0
    tokens: int = 0
    codec: str = ""
    fidelity: str = ""
    layers: int = 0
    spec: str = ""
    tenant: str = ""
    ttl: float | None = None
    problem: str = ""


def describe(
    store: Kept, mac_key: bytes | None = None, keys: Iterable[StoreKey] | None = None
) -> Iterator[Record]:
    """The records of a store, the one used longest ago first; only headers are read.

    Args:
        store: the store.
        mac_key: of the records.
        keys: of them; None for all.
    """
    front = np.empty(MAX_HEADER_BYTES, np.uint8).data
    for key in store.keys() if keys is None else keys:
        size, terms = store.size(key), store.terms(key)
        if size is None or terms is None:
            continue  # gone meanwhile
        record = Record(key=key, nbytes=size, tenant=terms.tenant.hex(), ttl=terms.ttl)
        try:
            if store.peek(key, front, ()) is None:
                continue
            header = parse_header(front, mac_key=mac_key)
        except GIVEN_UP as exc:
            yield replace(record, problem=str(exc) or type(exc).__name__)
            continue
        yield replace(
            record,
            start=header.start,
            tokens=header.num_tokens,
            codec=header.codec,
            fidelity=header.fidelity,
            layers=len(header.layers),
            spec=header.spec_fingerprint.hex(),
        )


def expired(store: Kept) -> list[StoreKey]:
    """The records whose time is over, and which are still there."""
    terms = ((key, store.terms(key)) for key in store.keys())
    return [key for key, t in terms if t is not None and t.ttl is not None and t.ttl <= 0]


@dataclass(slots=True)
class Summary:
    """A store in numbers.

    Attributes:
        records: how many.
        nbytes: of their containers.
        tokens: they hold; abstracts, which only tell of them, hold none.
        codecs: records by codec.
        fidelities: records by fidelity.
        models: records by fingerprint of the spec.
        tenants: records by tag of whose account they are on.
        expiring: records that have a time to live.
        expired: of these, whose time is over.
        unreadable: records by why their headers cannot be read.
        oldest: earliest last use, in seconds since 1970, if the tier knows.
        newest: latest one.
    """

    records: int = 0
    nbytes: int = 0
    tokens: int = 0
    codecs: Counter[str] = field(default_factory=Counter)
    fidelities: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)
    expiring: int = 0
    expired: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    oldest: float | None = None
    newest: float | None = None


def summarize(store: Kept, mac_key: bytes | None = None, step: Step = lambda done: None) -> Summary:
    """Look at every header; see `Summary`."""
    total = Summary()
    for record in describe(store, mac_key):
        total.records += 1
        total.nbytes += record.nbytes
        total.tokens += 0 if is_abstracts(record.codec) else record.tokens
        total.tenants[record.tenant] += 1
        total.expiring += record.ttl is not None
        total.expired += record.ttl is not None and record.ttl <= 0
        if record.problem:
            total.unreadable[record.problem] += 1
        else:
            total.codecs[record.codec] += 1
            total.fidelities[record.fidelity] += 1
            total.models[record.spec] += 1
        used = store.last_use(record.key)
        if used is not None:
            total.oldest = used if total.oldest is None else min(total.oldest, used)
            total.newest = used if total.newest is None else max(total.newest, used)
        step(record.nbytes)
    return total


def read_whole(store: Kept, key: StoreKey) -> memoryview | None:
    """A record's verified bytes, None if it is gone.

    Raises:
        CodecError, OSError, StoreError: see `Kept.peek`.
    """
    size = store.size(key)
    if size is None:
        return None
    data: memoryview = np.empty(size, np.uint8).data
    got = store.peek(key, data)
    return None if got is None else data[:got]


def problem(store: Kept, key: StoreKey) -> CodecError | OSError | StoreError | None:
    """Why a record would not be served; None if every byte of it is right, or if it is gone."""
    try:
        read_whole(store, key)
    except GIVEN_UP as exc:
        return exc
    return None


@dataclass(slots=True)
class Verified:
    """What `verify` found.

    Attributes:
        records: read.
        nbytes: read.
        problems: a line each.
        repaired: of them removed.
    """

    records: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    repaired: int = 0


def verify(
    store: Kept,
    *,
    repair: bool = False,
    mac_key: bytes | None = None,
    step: Step = lambda done: None,
) -> Verified:
    """Read and verify every record, and the accounts.

    Args:
        store: the store.
        repair: drop records that are damaged, never those that only this reader cannot read (of
            another version, or without their key), and none if all of them fail under a MAC key.
        mac_key: that the store was opened with.
        step: see `Step`.
    """
    found = Verified()
    damaged = []
    for key in list(store.keys()):
        size = store.size(key)
        if size is None:
            continue
        found.records += 1
        found.nbytes += size
        wrong = problem(store, key)
        if wrong is not None:
            text = str(wrong) or type(wrong).__name__
            found.problems.append(f"{key.block.hex()[:16]}: {text}")
            if isinstance(wrong, CorruptDataError):
                damaged.append(key)
        step(size)
    if repair and mac_key is not None and damaged and len(damaged) == found.records:
        found.problems.append("no record is right under this MAC key: is it theirs? None dropped")
        damaged = []
    if repair:
        found.repaired += sum(store.delete(key) for key in damaged)
    accounts = store.accounts(repair=repair)
    found.problems += accounts
    found.repaired += len(accounts) if repair else 0
    return found


def is_older_version(codec: str) -> bool:
    """Whether a canonical string is of a version before the one that this kvlib writes."""
    from kvlib.codecs import CODECS

    name, _, rest = codec.partition("@")
    version = rest.partition(":")[0]
    try:
        newest: Any = CODECS.get(name)
    except UnknownPluginError:
        return False
    return version.isdecimal() and int(version) < newest.version


def is_of(codec: str, wanted: str) -> bool:
    """Whether a canonical string is of a codec: ``exact``, ``exact@1`` or all of it."""
    name_version = codec.partition(":")[0]
    return wanted in (codec, name_version, name_version.partition("@")[0])


def is_abstracts(codec: str) -> bool:
    """Whether a canonical string is of abstracts (docs/formats/container.md), not of blocks."""
    return any(is_of(codec, name) for name in ("boxes", "codes"))


def to_drop(
    store: Kept,
    *,
    most_bytes: int | None,
    codec: str | None = None,
    older: bool = False,
    mac_key: bytes | None = None,
    step: Step = lambda done: None,
) -> list[Record]:
    """Which records have to go: those whose time is over, then those used longest ago.

    Args:
        store: the store.
        most_bytes: physical bytes that may stay; None drops only what is over.
        codec: only records of this codec may go; see `kvlib store gc`.
        older: only records of older versions of their codec may go.
        mac_key: of the records.
        step: see `Step`.
    """
    over = expired(store)
    going = list(describe(store, mac_key, over))
    if most_bytes is None:
        return going
    left = store.stats().used_bytes - sum(store.physical(record.nbytes) for record in going)
    gone = set(over)
    for record in describe(store, mac_key):
        if record.key in gone:
            continue
        if left <= most_bytes:
            break
        step(record.nbytes)
        if codec is not None and not is_of(record.codec, codec):
            continue
        if older and not is_older_version(record.codec):
            continue
        going.append(record)
        left -= store.physical(record.nbytes)
    return going


def drop(store: Kept, records: Collection[Record], step: Step = lambda done: None) -> int:
    """Delete records and give their room back to the file system; how many were still there."""
    dropped = 0
    for record in records:
        dropped += store.delete(record.key)
        step(record.nbytes)
    store.let_go()
    return dropped


def clear(store: Kept, step: Step = lambda done: None) -> int:
    """Delete all records and give their room back to the file system; how many there were."""
    dropped = 0
    for key in list(store.keys()):
        size = store.size(key) or 0
        dropped += store.delete(key)
        step(size)
    store.let_go()
    return dropped
