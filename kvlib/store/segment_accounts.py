# SPDX-License-Identifier: Apache-2.0
"""What each tenant holds of a segment store: one row each, kept by the ledger's transactions.

Every granule in a row of `records` or `held` is on the account of the tenant that the row names. So
a quota holds at every moment for all processes together, like the capacity.
"""

from collections.abc import Iterable
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from kvlib.errors import CorruptDataError
from kvlib.store.segment_format import Entry
from kvlib.store.terms import TAG_BYTES

if TYPE_CHECKING:
    import lmdb

__all__ = ["Account", "Accounts"]

_ACCOUNT = Struct("<QQ")


class Account(NamedTuple):
    """What a tenant's records hold, in granules, and the quota it was last held to (0: none)."""

    used: int = 0
    quota: int = 0


class Accounts:
    """The database of tenants.

    Args:
        database: named `tenants`.
    """

    def __init__(self, database: "lmdb._Database") -> None:
        self._db = database

    def get(self, txn: "lmdb.Transaction[bytes]", tenant: bytes) -> Account:
        """What a tenant holds."""
        data = txn.get(tenant, db=self._db)
        return Account(*_ACCOUNT.unpack(data)) if data else Account()

    def all(self, txn: "lmdb.Transaction[bytes]") -> dict[bytes, Account]:
        """All tenants that hold something.

        Raises:
            CorruptDataError: there are rows that cannot be ours.
        """
        found = {}
        with txn.cursor(db=self._db) as cursor:
            for tenant, data in cursor:
                if len(tenant) != TAG_BYTES or len(data) != _ACCOUNT.size:
                    raise CorruptDataError(f"a tenant's row of {len(tenant)} and {len(data)} bytes")
                found[tenant] = Account(*_ACCOUNT.unpack(data))
        return found

    def charge(
        self, txn: "lmdb.Transaction[bytes]", tenant: bytes, granules: int, quota: int | None = None
    ) -> None:
        """Add to what a tenant holds, and note its quota if one is given."""
        data = txn.get(tenant, db=self._db)
        used, noted = _ACCOUNT.unpack(data) if data else (0, 0)
        used = max(used + granules, 0)  # below it: the accounts are wrong; the audit tells
        if used:
            row = _ACCOUNT.pack(used, noted if quota is None else quota)
            txn.put(tenant, row, db=self._db)
        else:
            txn.delete(tenant, db=self._db)

    def audit(self, txn: "lmdb.Transaction[bytes]", entries: Iterable[Entry]) -> list[str]:
        """Compare with all that is held; a line for each tenant that differs.

        Raises:
            CorruptDataError: there are rows that cannot be ours.
        """
        held = _used(entries)
        counted = {tenant: account.used for tenant, account in self.all(txn).items()}
        return [
            f"{counted.get(tenant, 0)} granules counted for tenant {tenant.hex()}, "
            f"{held.get(tenant, 0)} are held"
            for tenant in sorted(held.keys() | counted.keys())
            if held.get(tenant, 0) != counted.get(tenant, 0)
        ]

    def make(self, txn: "lmdb.Transaction[bytes]", entries: Iterable[Entry]) -> None:
        """Make all anew from what is held; quotas that were noted stay."""
        noted = self.all(txn)
        txn.drop(self._db, delete=False)
        for tenant, used in _used(entries).items():
            quota = noted.get(tenant, Account()).quota
            txn.put(tenant, _ACCOUNT.pack(used, quota), db=self._db)


def _used(entries: Iterable[Entry]) -> dict[bytes, int]:
    used: dict[bytes, int] = {}
    for entry in entries:
        used[entry.tenant] = used.get(entry.tenant, 0) + entry.granules
    return used
