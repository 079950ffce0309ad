"""`recess snapshots ls|inspect|verify|rm`, and those of `snapshot_transfer`."""

from __future__ import annotations

import json

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import ago, short
from recess.cli.verbs.snapshot_transfer import TRANSFERS
from recess.units import format_bytes


@click.group("snapshots")
def snapshots() -> None:
    """Manage snapshots."""


@snapshots.command("ls")
@verb
def ls(inv: Invocation) -> None:
    """List snapshots."""
    found = inv.server.call("GET", "/v1/snapshots")["snapshots"]
    rows = [
        {
            **row,
            "short": short(row["id"]),
            "age": ago(row["created"]),
            "stored": format_bytes(int(row["figures"].get("new_bytes", 0))),
        }
        for row in found
    ]
    if inv.out.as_json:
        inv.out.data(found)
        return
    columns = [
        ("SNAPSHOT", "short"), ("NAME", "name"), ("MACHINE", "machine"), ("WHY", "why"), ("AT", "log_position"),
        ("CREATED", "age"), ("STORED", "stored"),
    ]  # fmt: skip
    inv.out.table(rows, columns)


@snapshots.command("inspect")
@click.argument("ref")
@verb
def inspect(inv: Invocation, ref: str) -> None:
    """Show one snapshot."""
    row = inv.server.call("GET", f"/v1/snapshots/{ref}")
    inv.out.data(row, json.dumps(row, indent=2))


@snapshots.command("verify")
@click.argument("ref")
@verb
def verify(inv: Invocation, ref: str) -> None:
    """Re-hash everything a snapshot needs."""
    report = inv.server.call("POST", f"/v1/snapshots/{ref}/verify", {})
    inv.out.data(report, "ok: " + ", ".join(f"{k} {v}" for k, v in report.items()))


@snapshots.command("rm")
@click.argument("refs", nargs=-1, required=True)
@verb
def rm(inv: Invocation, refs: tuple[str, ...]) -> None:
    """Remove snapshots; refused while others depend on them."""
    for ref in refs:
        inv.server.call("DELETE", f"/v1/snapshots/{ref}")
        inv.out.line(ref)
    if inv.out.as_json:
        inv.out.data(list(refs))


for command in TRANSFERS:
    snapshots.add_command(command)
