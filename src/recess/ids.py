"""Prefixed, sortable, unguessable ids: `mch_` machine, `snp_` snapshot, `lyr_` layer, `ses_` session, `ent_` entry ...

An id is the prefix, 8 characters of time (milliseconds, Crockford base 32, wraps in 2060) and 10 random ones (50 bits).
A snapshot's and a layer's id are not made here: they are the hash of their content (`recess.snapshots`).
"""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def _base32(value: int, width: int) -> str:
    return "".join(_ALPHABET[(value >> (5 * i)) & 31] for i in reversed(range(width)))


def new_id(prefix: str, *, now_ms: int | None = None) -> str:
    """Return a new id `PREFIX_tttttttt rrrrrrrrrr` (without the space). `now_ms` is for tests."""
    stamp = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    return f"{prefix}_{_base32(stamp, 8)}{_base32(secrets.randbits(50), 10)}"


def has_prefix(value: str, prefix: str) -> bool:
    """Tell whether `value` looks like an id of this kind (form only, not existence)."""
    head, sep, tail = value.partition("_")
    return bool(sep) and head == prefix and bool(tail) and all(c in _ALPHABET for c in tail)
