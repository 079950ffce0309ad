"""`recess volume` and `recess sync`: named volumes of this node, and exchanging a machine's volumes with the host."""

from __future__ import annotations

from typing import Any

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import ago
from recess.cli.verbs.lifecycle import each
from recess.sdk.transport import Json
from recess.units import format_bytes


@click.group("volume")
def volume() -> None:
    """Named volumes: create, ls, inspect, rm, prune."""


@volume.command("create")
@click.argument("name")
@verb
def create(inv: Invocation, name: str) -> None:
    """Make a volume NAME; one that is there is no error."""
    made = inv.server.call("POST", "/v1/volumes", {"name": name})
    inv.out.data(made, made["name"])


@volume.command("ls")
@verb
def ls(inv: Invocation) -> None:
    """List volumes."""
    rows = [
        {
            **one,
            "created_ago": ago(one["created"]),
            "size": format_bytes(one["bytes"]),
            "used_by": ", ".join(one["machines"]),
        }
        for one in inv.server.call("GET", "/v1/volumes")["volumes"]
    ]
    columns = (
        ("NAME", "name"),
        ("FILES", "files"),
        ("SIZE", "size"),
        ("CHANGED", "created_ago"),
        ("MACHINES", "used_by"),
    )
    inv.out.table(rows, columns, ids="name")


@volume.command("inspect")
@click.argument("name")
@verb
def inspect(inv: Invocation, name: str) -> None:
    """Show a volume: its folder on the host, what is in it, who has it."""
    found = inv.server.call("GET", f"/v1/volumes/{name}")
    lines = [f"{key:9} {found[key]}" for key in ("name", "path", "files")]
    lines += [f"size      {format_bytes(found['bytes'])}", f"machines  {', '.join(found['machines']) or '-'}"]
    inv.out.data(found, "\n".join(lines))


@volume.command("rm")
@click.argument("names", nargs=-1, required=True)
@verb
def rm(inv: Invocation, names: tuple[str, ...]) -> int:
    """Remove volumes and what is in them; one that a machine has stays."""
    return each(inv, names, lambda name: inv.server.call("DELETE", f"/v1/volumes/{name}"))


@volume.command("prune")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@verb
def prune(inv: Invocation, force: bool) -> int:
    """Remove volumes that no machine has."""
    spare = [one["name"] for one in inv.server.call("GET", "/v1/volumes")["volumes"] if not one["machines"]]
    if spare and not force:
        click.confirm(f"Remove {', '.join(spare)} and what is in them?", abort=True, err=True)
    return each(inv, tuple(spare), lambda name: inv.server.call("DELETE", f"/v1/volumes/{name}"))


@click.command("sync")
@click.argument("machines", nargs=-1, required=True)
@verb
def sync(inv: Invocation, machines: tuple[str, ...]) -> int:
    """Exchange the volumes of running MACHINES with the host now, both ways."""

    def act(ref: str) -> Any:
        done = inv.server.call("POST", f"/v1/machines/{ref}/sync", {})
        for one in done["volumes"]:
            for line in told(one):
                inv.out.progress(f"{ref}: {line}")
        return done

    return each(inv, machines, act)


def told(one: Json) -> list[str]:
    """Return what happened to one volume, as lines for people."""
    name = f"{one['source']} -> {one['target']}"
    if one["error"]:
        return [f"{name}: not exchanged: {one['error']}"]
    lines = [
        f"{name}: {one['copied_in']} in ({format_bytes(one['bytes_in'])}), {one['copied_out']} out "
        f"({format_bytes(one['bytes_out'])}), {one['removed_in']} + {one['removed_out']} removed"
    ]
    for clash in one["conflicts"]:
        other = f"the other is {clash['kept']}" if clash["kept"] else "the other side had removed it or keeps none"
        lines.append(f"conflict: {clash['path'] or one['target']}: the {clash['winner']}'s stands; {other}")
    return lines + [f"left out: {gone['path']}: {gone['why']}" for gone in one["left_out"]]
