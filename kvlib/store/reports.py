# SPDX-License-Identifier: Apache-2.0
"""What `KVStore` answers: plain values."""

from dataclasses import dataclass

from kvlib.blocks import KVBlock
from kvlib.spec import EXACT
from kvlib.store.tier import TierStats

__all__ = ["Loaded", "PutReport", "StoreStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What `KVStore.load` found.

    Attributes:
        num_blocks: leading blocks restored.
        block: their KV on the CPU, None when nothing was found.
        blocks: instead of `block`, what each record holds of them, one after another; from
            `KVStore.borrow`.
        fidelity: `EXACT`, or the canonical string of the lossy codec or method that the KV went
            through.
        ancestors: `EXACT`, or the lowest fidelity among the KV that theirs was computed from.
        stored_bytes: bytes of the records read.
    """

    num_blocks: int = 0
    block: KVBlock | None = None
    blocks: tuple[KVBlock, ...] = ()
    fidelity: str = EXACT
    ancestors: str = EXACT
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PutReport:
    """What `KVStore.put` did.

    Attributes:
        stored_blocks: written now.
        present_blocks: there already.
        dropped_blocks: not stored for want of room or because a medium failed.
        stored_bytes: bytes of the records written.
        raw_bytes: bytes of the KV they hold.
    """

    stored_blocks: int = 0
    present_blocks: int = 0
    dropped_blocks: int = 0
    stored_bytes: int = 0
    raw_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """Counters since the store was opened.

    Attributes:
        tiers: by tier name, fastest first.
        loads: calls of `load`.
        hit_blocks: blocks restored.
        missed_blocks: blocks asked for and not restored.
        stored_blocks: blocks written.
        corrupt_records: records that verified but did not decode; each was dropped and is a miss.
        shared_reads: reads that joined one already under way.
        staging_drops: blocks that `put_async` dropped for want of staging.
    """

    tiers: dict[str, TierStats]
    loads: int = 0
    hit_blocks: int = 0
    missed_blocks: int = 0
    stored_blocks: int = 0
    corrupt_records: int = 0
    shared_reads: int = 0
    staging_drops: int = 0
