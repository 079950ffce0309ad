"""`recess df` and `prune`: what takes space on this node, and giving back what nothing needs."""

from __future__ import annotations

import sys

import click

from recess.cli.common import Invocation, verb
from recess.errors import BadInput, Conflict
from recess.units import format_bytes


@click.command("df")
@verb
def df(inv: Invocation) -> None:
    """Show what machines, snapshots, images and templates take on this node's disk."""
    found = inv.server.call("GET", "/v1/df")
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [
        {**row, "size": format_bytes(row["bytes"]), "free": format_bytes(row["reclaimable_bytes"])}
        for row in found["kinds"]
    ]
    columns = [("TYPE", "kind"), ("TOTAL", "count"), ("ACTIVE", "active"), ("SIZE", "size"), ("RECLAIMABLE", "free")]
    inv.out.table(rows, columns, ids="kind")
    inv.out.progress(f"free on this disk: {format_bytes(found['free_bytes'])}")


@click.command("prune")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("-a", "--all", "everything", is_flag=True, help="Unnamed snapshots that you took, too.")
@click.option("--caches", is_flag=True, help="What is made again when it is needed, too: the next resumes are slower.")
@verb
def prune(inv: Invocation, force: bool, everything: bool, caches: bool) -> int:
    """Remove machines that have ended, snapshots that nothing needs, and garbage. Suspended machines stay."""
    if not force:
        if not sys.stdin.isatty():
            raise BadInput("prune removes things: say --force", hint="recess df shows what there is")
        if not click.confirm("Remove machines that have ended, and snapshots that nothing needs?", err=True):
            return 1
    removed, before = [], inv.server.call("GET", "/v1/df")
    for row in inv.server.call("GET", "/v1/machines", query={"all": 1})["machines"]:
        if row["state"] not in ("exited", "dead", "created") or row["session"]:
            continue
        try:
            inv.server.call("DELETE", f"/v1/machines/{row['id']}")
        except Conflict:
            continue  # it was started meanwhile
        removed.append(row["id"])
        inv.out.line(row["id"])
    snapshots = inv.server.call("POST", "/v1/snapshots/prune", {"all": everything})
    emptied = inv.server.call("POST", "/v1/caches/prune") if caches else {}
    after = inv.server.call("GET", "/v1/df")
    freed = max(0, _total(before) - _total(after))
    inv.out.progress(f"removed {len(removed)} machines, {len(snapshots['removed'])} snapshots: {format_bytes(freed)}")
    inv.out.data({"machines": removed, "snapshots": snapshots["removed"], "caches": emptied, "bytes": freed})
    return 0


def _total(found: dict[str, object]) -> int:
    kinds = found["kinds"]
    return sum(int(row["bytes"]) for row in kinds) if isinstance(kinds, list) else 0
