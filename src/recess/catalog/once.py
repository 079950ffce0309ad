"""Idempotency keys of calls that make machines: written in the same transaction as the machine's row, or not at all.

A key outlives its machine (a call that is repeated after that must not make another one), for some weeks. A machine whose
making failed gives its key back. It must not know what the call was: a digest stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from recess.db import Database, Tx
from recess.errors import KeyReused

KEEP_S = 30 * 86400.0


@dataclass(frozen=True)
class Once:
    """A key, and the digest of everything that was asked for with it."""

    key: str
    digest: str


class OnceRows:
    """The keys of a database."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def machine_of(self, once: Once) -> str:
        """Return the id of the machine that was made with this key, "" for none. Raises KeyReused."""
        return await self._db.read(lambda tx: find_in(tx, once))

    async def release(self, machine_id: str) -> None:
        """Give the key of a machine back whose making failed."""
        await self._db.write(lambda tx: tx.execute("DELETE FROM catalog_once WHERE machine = ?", (machine_id,)))


def find_in(tx: Tx, once: Once) -> str:
    """Return the machine's id inside the caller's transaction, "" for none. Raises KeyReused."""
    row = tx.one("SELECT digest, machine FROM catalog_once WHERE key = ?", (once.key,))
    if row is None:
        return ""
    if row["digest"] != once.digest:
        raise KeyReused(f"idempotency key {once.key!r} came with another request before")
    return str(row["machine"])


def claim_in(tx: Tx, once: Once, machine_id: str, now: float) -> None:
    """Note that this machine is what the key makes, and forget keys that are very old. Raises KeyReused when another
    server on this database was quicker."""
    if find_in(tx, once):
        raise KeyReused(f"idempotency key {once.key!r} is making a machine at this moment")
    tx.execute("DELETE FROM catalog_once WHERE created < ?", (now - KEEP_S,))
    tx.execute(
        "INSERT INTO catalog_once (key, digest, machine, created) VALUES (?, ?, ?, ?)",
        (once.key, once.digest, machine_id, now),
    )
