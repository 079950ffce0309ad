"""Rows of nodes and of API tokens (a token is stored as its hash, never itself)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recess.catalog.table import Rows, Table
from recess.db import Database, Tx


@dataclass(frozen=True)
class NodeRecord:
    """One node. `capacity` is what it advertises; `seen` is its last sign of life. Times in wall seconds."""

    id: str
    name: str
    address: str
    state: str
    created: float
    seen: float
    capacity: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenRecord:
    """One API token: BLAKE3-256 hex of it, what it may do, `expires` in wall seconds (0.0: never)."""

    id: str
    name: str
    hash: str
    created: float
    expires: float = 0.0
    last_used: float = 0.0
    scopes: Mapping[str, Any] = field(default_factory=dict)


NODES: Table[NodeRecord] = Table("catalog_node", NodeRecord, "node", "nod", json=frozenset({"capacity", "meta"}))
TOKENS: Table[TokenRecord] = Table("catalog_token", TokenRecord, "token", "tok", json=frozenset({"scopes"}))


class NodeRows(Rows[NodeRecord]):
    """Nodes over a database."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, NODES)


class TokenRows(Rows[TokenRecord]):
    """Tokens over a database."""

    def __init__(self, db: Database) -> None:
        super().__init__(db, TOKENS)

    async def by_hash(self, digest: str, *, now: float) -> TokenRecord | None:
        """Return the token of this hash if it exists and has not expired, or None."""

        def run(tx: Tx) -> TokenRecord | None:
            row = tx.one("SELECT * FROM catalog_token WHERE hash = ? AND (expires = 0 OR expires > ?)", (digest, now))
            return None if row is None else TOKENS.decode(row)

        return await self.db.read(run)
