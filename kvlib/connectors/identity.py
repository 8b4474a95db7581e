# SPDX-License-Identifier: Apache-2.0
"""Under which identity a request's blocks live, and a rank's share: the same on every engine."""

from kvlib.errors import ConfigError
from kvlib.keys import Namespace, digest
from kvlib.spec import KVSpec

__all__ = ["rank_heads", "request_salt"]


def request_salt(salt: str, cache_salt: str | None) -> str | bytes:
    """The salt of a request's keys.

    Args:
        salt: the store's.
        cache_salt: what a client sent with the request, to share nothing with others.

    Returns:
        The store's salt where the request has none of its own, so that such requests share their
        blocks with everything else that uses this salt; else one that no store's salt can be.
    """
    if not cache_salt:
        return salt
    return digest(Namespace.PREFIX, "request salt", salt, cache_salt)


def rank_heads(spec: KVSpec, rank: int, ranks: int) -> tuple[tuple[int, int] | None, bool]:
    """What a tensor-parallel rank holds of each token, and whether it is the one to store that.

    Engines deal the KV heads out in order. Where there are fewer heads than ranks (MLA has one),
    neighbours hold the same one: they share its records, and the first of them writes.

    Args:
        spec: of the whole model.
        rank: which one, from 0 on.
        ranks: tensor-parallel size.

    Returns:
        KV heads [first, last), None for all; whether this rank writes them.

    Raises:
        ConfigError: the heads cannot be dealt out.
    """
    heads = max(layer.num_kv_heads for layer in spec.layers)
    if heads % ranks and ranks % heads:
        raise ConfigError(
            f"{heads} KV heads cannot be dealt out to {ranks} tensor-parallel ranks: one number "
            "must divide the other"
        )
    first = rank * heads // ranks
    last = first + max(heads // ranks, 1)
    writes = heads >= ranks or rank % (ranks // heads) == 0
    return (None if last - first == heads else (first, last)), writes
