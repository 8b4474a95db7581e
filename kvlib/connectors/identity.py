# SPDX-License-Identifier: Apache-2.0
"""Under which identity a request's blocks live: the same on every engine."""

from kvlib.keys import Namespace, digest

__all__ = ["request_salt"]


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
