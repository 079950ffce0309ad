"""Where this node's log and catalog are, and what keeps the log in order: the only place that names a database.

    alone:    SQLite in the home; segments among the home's blobs, large bodies beside the database
    cluster:  the Postgres of `database_url`, shared with other nodes; segments and large bodies in the store they share

A node of a cluster is named after its home, so that the next server of the same home, which holds the home's lock, may take the
sessions of the one before at once, and any other node must wait for their leases to end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from recess.blobs import BlobStore, LocalBlobs
from recess.catalog import SCHEMA as CATALOG_SCHEMA
from recess.clock import Clock
from recess.config import Config
from recess.contextlog import SCHEMA as LOG_SCHEMA
from recess.contextlog import BlobBodies, BodyStore, DirectoryBodies, LogKeeper, SqlLog, identity_of
from recess.db import Database
from recess.node.stores import home_id, open_blobs
from recess.sessions.service import Sessions
from recess.sessions.takeover import take_over

log = logging.getLogger(__name__)

SCHEMAS = (LOG_SCHEMA, CATALOG_SCHEMA)


@dataclass(frozen=True)
class OpenedLog:
    """The log and its keeper."""

    log: SqlLog
    keeper: LogKeeper


def open_database(config: Config) -> Database:
    """Open this node's database, migrated. Blocking. See `Database.open`."""
    return Database.open(config.database_url or config.database_path, SCHEMAS)


def node_name(config: Config) -> str:
    """Return this node's name among those that share its database; "" if none do."""
    return f"home-{home_id(config.home)}" if config.database_url else ""


def log_blobs(config: Config) -> BlobStore:
    """Return the store for the log's segments."""
    if config.database_url and config.store:
        return open_blobs(config.store, config)
    return LocalBlobs(config.blobs_dir)


async def open_log(config: Config, db: Database, clock: Clock) -> OpenedLog:
    """Return the log over an open database."""
    blobs = await asyncio.to_thread(log_blobs, config)
    bodies: BodyStore = DirectoryBodies(config.home / "bodies")
    if config.database_url:
        bodies = BlobBodies(blobs, await identity_of(db, clock.wall_s()))
    opened = SqlLog(db, bodies, clock, blobs=blobs)
    return OpenedLog(opened, LogKeeper(opened, clock))


def keep_log(opened: OpenedLog, sessions: Sessions, stack: AsyncExitStack, *, cluster: bool) -> None:
    """Begin what goes on beside the sessions: sealing, hearing of other nodes, taking over what they left. Ends with the
    stack."""
    stack.callback(opened.keeper.close)
    tasks = [asyncio.create_task(opened.keeper.run(), name="log-keeper")]
    if cluster:
        opened.log.watch(_on_loop(sessions.heard))
        tasks.append(asyncio.create_task(take_over(sessions), name="takeover"))
    for task in tasks:
        stack.push_async_callback(_finish, task)


def _on_loop(heard: Callable[[str], None]) -> Callable[[str], None]:
    loop = asyncio.get_running_loop()

    def call(session: str) -> None:
        try:
            loop.call_soon_threadsafe(heard, session)
        except RuntimeError:  # the loop has ended, and with it whoever wanted to know
            log.debug("a word about %s came after the end", session or "all sessions")

    return call


async def _finish(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
