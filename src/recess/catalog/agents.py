"""Deployed versions of agent code. A version is the hash of what was deployed, so the same code is the same version, and
a rollback is a deploy of older code. It must not know what the code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import msgspec
from blake3 import blake3

from recess.catalog.names import check_name
from recess.db import Database, Row, Tx
from recess.errors import BadInput, Corrupt, NotFound

FILES_BYTES_MAX = 64 << 20
FILES_MAX = 10_000
VERSION_CHARS = 16


@dataclass(frozen=True)
class AgentVersion:
    """One version. `deployed` grows with each deploy of any agent: the largest of an agent is its current version.

    `size` counts the files' bytes; the files themselves are read by `AgentRows.files`. `created` in wall seconds.
    """

    agent: str
    version: str
    deployed: int
    created: float
    size: int
    config: Mapping[str, Any]


def agent_version(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    """Return the version of this code: the first 16 hex digits of a BLAKE3-256 over the canonical JSON of both."""
    return blake3(_encode({"files": dict(files), "config": dict(config)}).encode()).hexdigest()[:VERSION_CHARS]


def check_files(files: Mapping[str, bytes]) -> int:
    """Return the total bytes. Raises BadInput: none or too many files, too many bytes, a path that leaves its folder."""
    if not files or len(files) > FILES_MAX:
        raise BadInput(f"an agent has 1 to {FILES_MAX} files, not {len(files)}")
    for path in files:
        pure = PurePosixPath(path)
        if not path or pure.is_absolute() or ".." in pure.parts or str(pure) != path or "\x00" in path:
            raise BadInput(f"agent file {path!r}: not a plain relative path")
    total = sum(len(data) for data in files.values())
    if total > FILES_BYTES_MAX:
        raise BadInput(
            f"the agent's files are {total} bytes, more than {FILES_BYTES_MAX}", hint="put data in the image"
        )
    return total


class AgentRows:
    """Agent versions over a database. Every call is one transaction, durable when it returns."""

    def __init__(self, db: Database) -> None:
        self.db = db

    async def deploy(
        self, agent: str, files: Mapping[str, bytes], config: Mapping[str, Any], *, now: float
    ) -> AgentVersion:
        """Store this code and make it the agent's current version; known code becomes current again. Raises BadInput."""
        check_name(agent, "agent")
        size = check_files(files)
        version = agent_version(files, config)
        texts = (_encode(dict(config)), _encode(dict(files)))

        def run(tx: Tx) -> AgentVersion:
            last = tx.one("SELECT COALESCE(MAX(deployed), 0) AS n FROM catalog_agent")
            number = (int(last["n"]) if last else 0) + 1
            rows = tx.execute(
                "INSERT INTO catalog_agent (agent, version, deployed, created, size, config, files) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (agent, version) DO UPDATE SET deployed = excluded.deployed "
                "RETURNING agent, version, deployed, created, size, config",
                (agent, version, number, now, size, *texts),
            )
            return _decode(rows[0])

        return await self.db.write(run)

    async def current(self, agent: str) -> AgentVersion:
        """Return the version deployed last. Raises NotFound."""
        found = await self.versions(agent, limit=1)
        if not found:
            raise _not_found(agent)
        return found[0]

    async def get(self, agent: str, version: str) -> AgentVersion:
        """Return one version, by its name or an unambiguous prefix. Raises NotFound, BadInput."""
        if not version or not version.isascii():
            raise _not_found(f"{agent} version {version}")
        sql = f"SELECT {_COLUMNS} FROM catalog_agent WHERE agent = ? AND version >= ? AND version < ? ORDER BY version LIMIT 2"
        rows = await self.db.read(lambda tx: tx.execute(sql, (agent, version, version + "~")))
        if not rows:
            raise _not_found(f"{agent} version {version}")
        if len(rows) > 1 and rows[0]["version"] != version:
            raise BadInput(f"agent {agent}: version {version!r} is ambiguous", hint="give more of it")
        return _decode(rows[0])

    async def versions(self, agent: str, *, limit: int = 1000) -> list[AgentVersion]:
        """Return the agent's versions, current first."""
        sql = f"SELECT {_COLUMNS} FROM catalog_agent WHERE agent = ? ORDER BY deployed DESC LIMIT ?"
        return await self.db.read(lambda tx: [_decode(row) for row in tx.execute(sql, (agent, limit))])

    async def list_current(self, *, limit: int = 1000) -> list[AgentVersion]:
        """Return the current version of every agent, deployed last first."""
        sql = (
            f"SELECT {_COLUMNS} FROM catalog_agent AS a WHERE deployed = "
            "(SELECT MAX(deployed) FROM catalog_agent AS b WHERE b.agent = a.agent) ORDER BY deployed DESC LIMIT ?"
        )
        return await self.db.read(lambda tx: [_decode(row) for row in tx.execute(sql, (limit,))])

    async def files(self, agent: str, version: str) -> dict[str, bytes]:
        """Return path -> bytes of exactly this version. Raises NotFound, Corrupt (the bytes are not that version)."""
        sql = "SELECT config, files FROM catalog_agent WHERE agent = ? AND version = ?"
        row = await self.db.read(lambda tx: tx.one(sql, (agent, version)))
        if row is None:
            raise _not_found(f"{agent} version {version}")
        try:
            files = msgspec.json.decode(row["files"], type=dict[str, bytes])
            intact = agent_version(files, msgspec.json.decode(row["config"])) == version
        except (msgspec.MsgspecError, TypeError):
            intact = False
        if not intact:
            raise Corrupt(f"catalog: agent {agent} version {version} is damaged", hint="deploy it again")
        return files


_COLUMNS = "agent, version, deployed, created, size, config"


def _decode(row: Row) -> AgentVersion:
    values = {name: row[name] for name in _COLUMNS.split(", ")}
    try:
        values["config"] = msgspec.json.decode(values["config"])
        return msgspec.convert(values, AgentVersion)
    except (msgspec.MsgspecError, TypeError) as exc:
        raise Corrupt(
            f"catalog: agent {values['agent']!r} version {values['version']!r} has an unreadable row: {exc}",
            hint="deploy it again",
        ) from exc


def _encode(value: object) -> str:
    try:
        return msgspec.json.encode(value, order="deterministic").decode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadInput(f"agent: not JSON data: {exc}") from exc


def _not_found(ref: str) -> NotFound:
    return NotFound(
        f"no such agent: {ref}", hint="deploy it: recess deploy agent.py --name NAME", kind="agent", ref=ref
    )
