"""`recess db`: check, back up, restore and migrate the database of a home, whichever engine it is.

A backup is a tar, readable without us, of everything that the log and the catalog need and that no snapshot's store holds:

    tables/NAME.jsonl.zst    all rows, in the engines' common form (recess.db.portable)
    bodies/HASH              large bodies, as JSON
    segments/KEY             sealed segments, as they are stored
    backup.json              last: what is in it, with a BLAKE3-256 of each member; a tar without it is half a backup

It is taken from one read transaction while the server runs, and can be restored into the other engine: that is how a home moves to
Postgres. Snapshots' layers are not in it: `recess snapshots push` and `export` are for these.

Restoring: nothing is touched before every hash was checked; the target must have no rows; the rows go in by one transaction, in the
schema they were written under, and what is due since is migrated then. Crash safety of the backup: temporary name, fsync, rename.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import msgspec
from blake3 import blake3

from recess.catalog import Catalog
from recess.clock import SystemClock
from recess.config import Config
from recess.contextlog import SqlLog, identity_of, segments, sql_blobs
from recess.contextlog.checking import check as check_log
from recess.contextlog.sql_read import segment_of
from recess.db import Database, Tx
from recess.db import portable as rows
from recess.errors import BadInput, Corrupt, IllegalState, Incompatible, NotFound
from recess.node.lock import HomeLock
from recess.node.logs import SCHEMAS, open_log

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT = 1
PREFIXES = ("log_", "catalog_")
_INDEX = "backup.json"
_IDENTITY = "log_identity"  # a copy is another log than the one it was taken of: it must not sweep what is that one's
_INDEX_BYTES_MAX = 64 << 20
_PIECE = 1 << 20


@dataclass(frozen=True)
class Index:
    """What a backup says of itself. `schemas`: room -> number of its newest migration then; `tables`: name -> columns."""

    format: int
    created: float
    engine: str
    schemas: dict[str, int]
    tables: dict[str, list[str]]
    rows: dict[str, int]
    members: dict[str, str] = field(default_factory=dict)  # name -> BLAKE3-256


@dataclass(frozen=True)
class Checked:
    """What a check looked at, and what it found wrong."""

    engine: str
    schemas: dict[str, int]
    sessions: int
    problems: list[str]


# --- opening


def where_of(config: Config) -> Path | str:
    """Return where this home's database is."""
    return config.database_url or config.database_path


@asynccontextmanager
async def _opened(config: Config) -> AsyncIterator[tuple[Database, dict[str, int]]]:
    """Open the database as it is, without a migration, and tell its versions. Raises NotFound if there is none."""
    where = where_of(config)
    if isinstance(where, Path) and not where.is_file():
        raise NotFound(
            f"there is no database: {where}", hint="it is made when the first server starts", kind="database"
        )
    db = await asyncio.to_thread(Database.open, where, [])
    try:
        yield db, await db.read(rows.versions)
    finally:
        await db.close()


def _newest() -> dict[str, int]:
    return {schema.room: len(schema.migrations) for schema in SCHEMAS}


def _check_current(versions: dict[str, int]) -> None:
    if versions != _newest():
        raise Incompatible(
            f"the database's schemas are {versions or 'none'}, this version's are {_newest()}",
            hint="recess db migrate",
            reasons=[f"{room}: {versions.get(room, 0)} is not {number}" for room, number in _newest().items()],
        )


# --- check


async def check(config: Config, *, deep: bool, tell: Callable[[str], None]) -> Checked:
    """Check the database and, `deep`, every entry, segment and body. `tell` gets each problem when it is found."""
    problems: list[str] = []

    def found(problem: str) -> None:
        problems.append(problem)
        tell(problem)

    async with _opened(config) as (db, versions):
        _check_current(versions)
        for problem in await db.read(_engine_problems):
            found(problem)
        log = (await open_log(config, db, SystemClock())).log
        async for problem in check_log(log, deep=deep):
            found(problem)
        catalog = Catalog(db)
        for table in (catalog.machines, catalog.snapshots, catalog.templates, catalog.nodes, catalog.tokens):
            _, damaged = await db.read(table.table.survey_in)
            for row in damaged:
                found(row.error.message)
        count = await db.read(lambda tx: tx.one("SELECT count(*) AS n FROM log_session"))
        return Checked(db.dialect, versions, int(count["n"]) if count else 0, problems)


def _engine_problems(tx: Tx) -> list[str]:
    """Return what the engine itself finds wrong. (Postgres checks its pages when it reads them.)"""
    if tx.dialect != "sqlite":
        return []
    found = [str(row[0]) for row in tx.execute("PRAGMA integrity_check(20)")]
    return [] if found == ["ok"] else [f"sqlite: {line}" for line in found]


# --- migrate


async def migrate(config: Config) -> dict[str, tuple[int, int]]:
    """Run what migrations are due; return room -> numbers before and after. No server of this home may run."""
    with _locked(config):
        async with _opened(config) as (_, before):
            pass
        db = await asyncio.to_thread(Database.open, where_of(config), SCHEMAS)
        try:
            after = await db.read(rows.versions)
        finally:
            await db.close()
    return {room: (before.get(room, 0), number) for room, number in after.items()}


@contextmanager
def _locked(config: Config) -> Iterator[None]:
    lock = HomeLock(config.home)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


# --- backup


class _Writer:
    """A tar that remembers the hash of each member."""

    def __init__(self, file: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self.members: dict[str, str] = {}

    def add(self, name: str, data: bytes) -> None:
        """Add a member that is at hand."""
        self.add_file(name, io.BytesIO(data), len(data), blake3(data).hexdigest())

    def add_file(self, name: str, file: IO[bytes], size: int, digest: str) -> None:
        """Add a member of this size and hash."""
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o600, int(time.time())
        self._tar.addfile(info, file)
        self.members[name] = digest

    def close(self) -> None:
        """Write the end of the tar."""
        self._tar.close()


@dataclass
class _Needed:
    """What the rows name besides themselves: segments by key, bodies with their sizes."""

    segments: list[segments.Segment] = field(default_factory=list)
    bodies: dict[str, int] = field(default_factory=dict)


async def backup(config: Config, target: Path) -> Index:
    """Write a backup. The server may run. Raises BadInput if there is such a file already."""
    if await asyncio.to_thread(target.exists):
        raise BadInput(f"{target} exists already", hint="give another name")
    temp = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        async with _opened(config) as (db, versions):
            _check_current(versions)
            log = (await open_log(config, db, SystemClock())).log
            with temp.open("wb") as file:
                index = await _write(db, log, versions, file)
                file.flush()
                os.fsync(file.fileno())
        temp.rename(target)
    finally:
        temp.unlink(missing_ok=True)
    _sync_folder(target.parent)
    return index


async def _write(db: Database, log: SqlLog, versions: dict[str, int], file: IO[bytes]) -> Index:
    def tables(tx: Tx) -> tuple[_Writer, dict[str, list[str]], dict[str, int], _Needed]:
        file.seek(0)
        file.truncate()
        out, columns, counts = _Writer(file), {}, {}
        for shape in rows.shapes(tx, PREFIXES):
            if shape.name != _IDENTITY:
                columns[shape.name] = list(shape.columns)
                counts[shape.name] = _write_table(tx, shape, out)
        return out, columns, counts, _needed(tx)

    out, columns, counts, needed = await db.read(tables)

    def rest() -> None:
        blobs = log.blobs
        if blobs is None:
            raise IllegalState("this log was opened without the store of its segments")
        for segment in needed.segments:
            out.add(f"segments/{segment.key}", blobs.get(segment.key, max_bytes=segment.size))
            for raw in segments.read(blobs, segment, segment.first, segment.last):
                if raw[10]:
                    needed.bodies[raw[10]] = raw[9]
        for digest, size in sorted(needed.bodies.items()):
            out.add(f"bodies/{digest}", log.bodies.get(digest, size))

    await asyncio.to_thread(rest)
    index = Index(FORMAT, time.time(), db.dialect, versions, columns, counts, dict(out.members))
    out.add(_INDEX, msgspec.json.encode(index))
    out.close()
    return index


def _write_table(tx: Tx, shape: rows.TableShape, out: _Writer) -> int:
    count = 0
    with TemporaryFile() as spool:
        with zstd.open(spool, "wb", level=3) as packed:
            for line in rows.lines_of(tx, shape):
                packed.write(line)
                count += 1
        size, digest = spool.tell(), blake3()
        spool.seek(0)
        while piece := spool.read(_PIECE):
            digest.update(piece)
        spool.seek(0)
        out.add_file(f"tables/{shape.name}.jsonl.zst", spool, size, digest.hexdigest())
    return count


def _needed(tx: Tx) -> _Needed:
    found = _Needed([segment_of(row) for row in tx.execute("SELECT * FROM log_segment ORDER BY session, first")])
    for row in tx.execute("SELECT DISTINCT blob, size FROM log_entry WHERE blob <> ''"):
        found.bodies[str(row["blob"])] = int(row["size"])
    found.bodies.update(sql_blobs.pieces_in(tx))
    return found


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- restore


async def restore(config: Config, source: Path) -> Index:
    """Restore a backup into this home's database, which must be empty or not there. No server of this home may run."""
    index = await asyncio.to_thread(read_index, source)
    known = _newest()
    if index.format != FORMAT or any(number > known.get(room, 0) for room, number in index.schemas.items()):
        raise Incompatible(
            f"{source} was written by a newer version of recess", hint="upgrade recess",
            reasons=[f"{room}: schema {number} > {known.get(room, 0)}" for room, number in index.schemas.items()],
        )  # fmt: skip
    config.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    config.blobs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(config):
        identity = await _prepare(config, index, source)
        then = [schema.up_to(index.schemas.get(schema.room, 0)) for schema in SCHEMAS]
        db = await asyncio.to_thread(Database.open, where_of(config), then)
        try:
            await rows.load(db, lambda: _tables(source, index, identity), PREFIXES, replaced=[_IDENTITY])
        finally:
            await db.close()
        db = await asyncio.to_thread(Database.open, where_of(config), SCHEMAS)
        await db.close()
    return index


async def _prepare(config: Config, index: Index, source: Path) -> str:
    """Put segments and bodies where the rows will look for them, which is harmless before there are any; leave tables of
    the backup's versions, or none. Returns the name of the log to be."""
    db = await asyncio.to_thread(Database.open, where_of(config), SCHEMAS)
    try:
        await db.read(lambda tx: rows.check_empty(tx, PREFIXES, [_IDENTITY]))
        identity = await identity_of(db, time.time())
        log = (await open_log(config, db, SystemClock())).log
        await asyncio.to_thread(_put_blobs, source, log)
        if index.schemas != _newest():
            await db.write(lambda tx: rows.drop_all(tx, PREFIXES))
    finally:
        await db.close()
    return identity


def _put_blobs(source: Path, log: SqlLog) -> None:
    with tarfile.open(source, "r:") as tar:
        for info in tar:
            kind, _, name = info.name.partition("/")
            if kind == "segments" and log.blobs is not None:
                log.blobs.put(name, _content(tar, info))
            elif kind == "bodies" and log.bodies.put(_content(tar, info)) != name:
                raise Corrupt(f"{source}: {info.name} is not what its name says")


def _tables(source: Path, index: Index, identity: str) -> rows.Tables:
    if index.schemas.get("contextlog", 0) >= 3:
        yield _IDENTITY, ["one", "id", "made"], [msgspec.json.encode([1, identity, time.time()])]
    with tarfile.open(source, "r:") as tar:
        for name, columns in index.tables.items():
            if not index.rows.get(name):
                yield name, columns, []  # an empty file is no zstd
                continue
            member = tar.extractfile(f"tables/{name}.jsonl.zst")
            if member is None:
                raise Corrupt(f"{source}: {name} is no file")
            with member, zstd.open(member, "rb") as lines:
                yield name, columns, lines


def read_index(source: Path) -> Index:
    """Return what a backup holds after checking the hash of every member. Raises NotFound, Corrupt (also for half a one)."""
    found: dict[str, str] = {}
    raw = b""
    try:
        with tarfile.open(source, "r:") as tar:
            for info in tar:
                if info.name == _INDEX:
                    raw = _content(tar, info, _INDEX_BYTES_MAX)
                else:
                    found[info.name] = _hash(tar, info)
        index = msgspec.json.decode(raw, type=Index)
    except FileNotFoundError as exc:
        raise NotFound(f"no such file: {source}", kind="backup", ref=str(source)) from exc
    except (tarfile.TarError, msgspec.MsgspecError, EOFError) as exc:
        raise Corrupt(f"{source} is not a whole backup: {exc}") from exc
    if found != index.members:
        wrong = sorted(name for name in found.keys() | index.members if found.get(name) != index.members.get(name))
        raise Corrupt(f"{source} is damaged: {wrong[0]} is not what was written")
    return index


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, max_bytes: int = 1 << 40) -> bytes:
    member = tar.extractfile(info)
    if member is None or info.size > max_bytes:
        raise Corrupt(f"backup: {info.name} cannot be read")
    with member:
        return member.read()


def _hash(tar: tarfile.TarFile, info: tarfile.TarInfo) -> str:
    digest = blake3()
    member = tar.extractfile(info)
    if member is None:
        raise Corrupt(f"backup: {info.name} is no file")
    with member:
        while piece := member.read(_PIECE):
            digest.update(piece)
    return str(digest.hexdigest())
