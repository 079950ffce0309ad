"""`recess ps`."""

from __future__ import annotations

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import ago
from recess.sdk.transport import Json


def _ports(row: Json) -> str:
    return ", ".join(f"{ip}:{host}->{guest}" for ip, host, guest in row["meta"].get("ports") or [])


@click.command("ps")
@click.option("-a", "--all", "everything", is_flag=True, help="Those that do not run, too.")
@verb
def ps(inv: Invocation, everything: bool) -> None:
    """List machines."""
    answer = inv.server.call("GET", "/v1/machines", query={"all": 1 if everything else None})
    rows = [
        {
            **row,
            "image": row["spec"]["image"],
            "command": " ".join(row["spec"]["argv"])[:30],
            "age": ago(row["created"]) if row["created"] else "",
            "ports": _ports(row) if row["state"] in ("running", "paused") else "",
        }
        for row in answer["machines"]
    ]
    if inv.out.as_json:
        inv.out.data(answer["machines"])
        return
    columns = [
        ("MACHINE ID", "id"), ("IMAGE", "image"), ("COMMAND", "command"), ("CREATED", "age"), ("STATE", "state"),
        ("PORTS", "ports"), ("NAME", "name"),
    ]  # fmt: skip
    inv.out.table(rows, columns)
    for row in rows:
        if row["state"] in ("damaged", "stalled"):
            inv.out.progress(f"{row['name'] or row['id']}: {row['status']}\n  hint: {row['meta']['hint']}")
