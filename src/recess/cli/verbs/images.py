"""`recess images ls|create|inspect|rm`."""

from __future__ import annotations

import json

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import ago
from recess.units import format_bytes


@click.group("images")
def images() -> None:
    """Manage images."""


@images.command("ls")
@verb
def ls(inv: Invocation) -> None:
    """List images."""
    found = inv.server.call("GET", "/v1/images")["images"]
    if inv.out.as_json:
        inv.out.data(found)
        return
    rows = [
        {
            **row,
            "short": "damaged" if "damaged" in row else row["root_hash"][:12],
            "age": ago(row["created"]) if row["created"] else "",
            "size": format_bytes(row["size_bytes"]),
        }
        for row in found
    ]
    inv.out.table(rows, [("IMAGE", "name"), ("HASH", "short"), ("CREATED", "age"), ("SIZE", "size")], ids="name")
    for row in found:
        if "damaged" in row:
            inv.out.progress(f"{row['damaged']}\n  hint: {row['hint']}")


@images.command("create")
@click.option("--packages", required=True, metavar="A,B,...", help="Debian packages, on top of the base.")
@click.argument("name")
@verb
def create(inv: Invocation, name: str, packages: str) -> None:
    """Build an image NAME from Debian packages."""
    body = {"name": name, "packages": [p.strip() for p in packages.split(",") if p.strip()]}
    row = inv.server.call_with_progress("POST", "/v1/images", body, inv.out.progress)
    inv.out.data(row, row["name"])


@images.command("inspect")
@click.argument("name")
@verb
def inspect(inv: Invocation, name: str) -> None:
    """Show one image."""
    row = inv.server.call("GET", f"/v1/images/{name}")
    inv.out.data(row, json.dumps(row, indent=2))


@images.command("rm")
@click.argument("names", nargs=-1, required=True)
@verb
def rm(inv: Invocation, names: tuple[str, ...]) -> None:
    """Remove images that no template needs."""
    for name in names:
        inv.server.call("DELETE", f"/v1/images/{name}")
        inv.out.line(name)
    if inv.out.as_json:
        inv.out.data(list(names))
