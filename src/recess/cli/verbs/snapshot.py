"""`recess snapshot`, `restore` and `fork`: the verbs that act (the plural `snapshots` manages)."""

from __future__ import annotations

import click

from recess.cli.common import Invocation, new_key, verb
from recess.units import format_bytes, format_duration


@click.command("snapshot")
@click.argument("machine")
@click.argument("name", default="")
@verb
def snapshot(inv: Invocation, machine: str, name: str) -> None:
    """Take a snapshot of MACHINE, called NAME if given; the machine goes on."""
    row = inv.server.call("POST", f"/v1/machines/{machine}/snapshot", {"name": name})
    figures = row["figures"]
    inv.out.progress(
        f"standstill {format_duration(figures.get('standstill_s', 0.0))}, "
        f"durable {format_duration(figures.get('durable_s', 0.0))}, "
        f"stored {format_bytes(int(figures.get('new_bytes', 0)))}"
    )
    inv.out.data(row, row["id"])


@click.command("restore")
@click.option("--name", default="", help="Name of the new machine.")
@click.argument("ref")
@verb
def restore(inv: Invocation, ref: str, name: str) -> None:
    """Start a new machine from a snapshot (id, name or prefix)."""
    path = f"/v1/snapshots/{ref}/restore"
    answer = inv.server.call_with_progress("POST", path, {"name": name}, inv.out.progress, key=new_key())
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
