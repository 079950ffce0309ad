"""`recess snapshot`, `restore` and `fork`: the verbs that act (the plural `snapshots` manages)."""

from __future__ import annotations

import click

from recess.cli.common import Invocation, new_key, verb
from recess.units import format_bytes, format_duration, parse_duration


@click.command("snapshot")
@click.option("--ttl", default="", help="Let it go after this time, like 12h or 7d, named or not.")
@click.option(
    "--keep-last", type=click.IntRange(min=1), default=None, help="Then keep only so many unnamed ones of it."
)
@click.argument("machine")
@click.argument("name", default="")
@verb
def snapshot(inv: Invocation, machine: str, name: str, ttl: str, keep_last: int | None) -> None:
    """Take a snapshot of MACHINE, called NAME[:TAG] if given; the machine goes on. A name that is in use moves here."""
    body = {"name": name, "ttl_s": parse_duration(ttl or 0.0), "keep_last": keep_last or 0}
    row = inv.server.call("POST", f"/v1/machines/{machine}/snapshot", body)
    figures = row["figures"]
    inv.out.progress(
        f"standstill {format_duration(figures.get('standstill_s', 0.0))}, "
        f"durable {format_duration(figures.get('durable_s', 0.0))}, "
        f"stored {format_bytes(int(figures.get('new_bytes', 0)))}"
    )
    if row["removed"]:
        inv.out.progress(f"removed {len(row['removed'])} older, freed {format_bytes(int(row['bytes']))}")
    inv.out.data(row, row["id"])


@click.command("restore")
@click.option("--name", default="", help="Name of the new machine.")
@click.option("--disk", is_flag=True, help="Boot its disk cold: files only, whatever its memory needs.")
@click.argument("ref")
@verb
def restore(inv: Invocation, ref: str, name: str, disk: bool) -> None:
    """Start a new machine from a snapshot (id, name or prefix)."""
    path, body = f"/v1/snapshots/{ref}/restore", {"name": name, "disk": disk}
    answer = inv.server.call_with_progress("POST", path, body, inv.out.progress, key=new_key())
    report = answer["resume"]
    inv.out.progress(f"rung {report['rung']} ({report['why']}) in {format_duration(report['seconds'])}")
    inv.out.data(answer, answer["machine"]["id"])


@click.command("fork")
@click.option("-n", "--count", default=1, help="How many children.")
@click.option("--name", "names", multiple=True, help="Name of a child (repeat for more).")
@click.argument("machine")
@verb
def fork(inv: Invocation, machine: str, count: int, names: tuple[str, ...]) -> None:
    """Fork a running MACHINE: its children run on from here, the parent too."""
    body = {"count": max(count, len(names)), "names": list(names)}
    answer = inv.server.call("POST", f"/v1/machines/{machine}/fork", body, key=new_key())
    inv.out.data(answer["machines"], "\n".join(m["id"] for m in answer["machines"]))
