"""`recess db check|backup|restore|migrate`: the database itself, without a server: a home's SQLite, or the Postgres it is on."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import click

from recess.cli.common import Invocation, verb


@click.group("db")
def db() -> None:
    """Check, back up, restore or migrate the database (log and catalog); RECESS_DATABASE_URL names a Postgres."""


@db.command("check")
@click.option("--deep", is_flag=True, help="Read every entry, segment and large body, too.")
@verb
def check(inv: Invocation, deep: bool) -> int:
    """Check that the log and the catalog are whole; exit code 1 if not. The server may run."""
    # Imported here, as in the other verbs: the server's rooms cost what no other verb should pay.
    from recess.node import databases

    found = asyncio.run(databases.check(inv.config, deep=deep, tell=inv.out.progress))
    wrong = f"{len(found.problems)} problems" if found.problems else "whole"
    inv.out.data(asdict(found), f"{wrong}: {found.sessions} sessions, {found.engine}, {_versions(found.schemas)}")
    return 1 if found.problems else 0


@db.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@verb
def backup(inv: Invocation, file: Path) -> None:
    """Write log and catalog to FILE, a tar that `restore` reads on either engine. The server may run.

    The layers of snapshots are not in it: see `recess snapshots push` and `export`.
    """
    from recess.node import databases

    index = asyncio.run(databases.backup(inv.config, file.absolute()))
    inv.out.progress(
        f"{sum(index.rows.values())} rows, {len(index.members) - len(index.tables)} segments and large bodies"
    )
    inv.out.data({"file": str(file.absolute()), "rows": index.rows, "schemas": index.schemas}, str(file))


@db.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@verb
def restore(inv: Invocation, file: Path) -> None:
    """Restore FILE into the database, which must be empty; from any engine and any earlier version. No server may run."""
    from recess.node import databases

    index = asyncio.run(databases.restore(inv.config, file.absolute()))
    inv.out.progress(f"{sum(index.rows.values())} rows of {_versions(index.schemas)}")
    inv.out.data({"rows": index.rows, "schemas": index.schemas}, "restored")


@db.command("migrate")
@verb
def migrate(inv: Invocation) -> None:
    """Bring the schema up to this version, as the next server would. No server of this home may run."""
    from recess.node import databases

    moved = asyncio.run(databases.migrate(inv.config))
    text = "\n".join(
        f"{room}: {old} -> {new}" if old != new else f"{room}: {new}" for room, (old, new) in moved.items()
    )
    inv.out.data({room: {"before": old, "after": new} for room, (old, new) in moved.items()}, text)


def _versions(schemas: dict[str, int]) -> str:
    return ", ".join(f"{room} schema {number}" for room, number in schemas.items())
