"""`recess snapshot`, `restore`, `fork`, `rewind` and `diff`: the verbs that act (the plural `snapshots` manages)."""

from __future__ import annotations

from typing import Any

import click

from recess.cli.common import Invocation, callers_env, new_key, parse_env, parse_port, verb
from recess.cli.machine_flags import parse_labels
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
    inv.out.waiting(f"taking a snapshot of {machine}")
    try:
        row = inv.server.call("POST", f"/v1/machines/{machine}/snapshot", body)
    finally:
        inv.out.settle()
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
@click.option("-e", "--env", multiple=True, metavar="NAME[=VALUE]", help="Environment of what is started in it.")
@click.option("--env-file", multiple=True, metavar="FILE", help="Environment from a file.")
@click.option("-l", "--label", multiple=True, metavar="NAME[=VALUE]", help="Label.")
@click.option("-p", "--publish", multiple=True, metavar="[IP:][HOST:]GUEST",
              help="Publish these ports; default: the snapshot's, on free host ports.")  # fmt: skip
@click.option("--key", default="", help="The same key again is the same machine.")
@click.argument("ref")
@verb
def restore(
    inv: Invocation, ref: str, name: str, disk: bool, env: tuple[str, ...], env_file: tuple[str, ...],
    label: tuple[str, ...], publish: tuple[str, ...], key: str,
) -> None:  # fmt: skip
    """Start a new machine from a snapshot (id, name or prefix)."""
    path = f"/v1/snapshots/{ref}/restore"
    body: dict[str, Any] = {
        "name": name, "disk": disk, "env": parse_env(env, env_file, callers_env()), "labels": parse_labels(label),
    }  # fmt: skip
    if publish:
        body["ports"] = [list(parse_port(p)) for p in publish]
    answer = inv.act("POST", path, body, key=key or new_key())
    report = answer["resume"]
    if report is None:
        inv.out.progress("it was made before, by the same key")
    else:
        inv.out.progress(f"rung {report['rung']} ({report['why']}) in {format_duration(report['seconds'])}")
    inv.out.data(answer, answer["machine"]["id"])


@click.command("fork")
@click.option("-n", "--count", type=click.IntRange(1, 64), default=None, help="How many children; default: one.")
@click.option("--name", "names", multiple=True, help="Name of a child (repeat for more).")
@click.argument("machine")
@verb
def fork(inv: Invocation, machine: str, count: int | None, names: tuple[str, ...]) -> None:
    """Fork a running MACHINE: its children run on from here, the parent too."""
    body = {"count": len(names) or 1 if count is None else count, "names": list(names)}
    answer = inv.server.call("POST", f"/v1/machines/{machine}/fork", body, key=new_key())
    inv.out.data(answer["machines"], "\n".join(m["id"] for m in answer["machines"]))


@click.command("rewind")
@click.argument("machine")
@click.argument("snapshot", default="")
@verb
def rewind(inv: Invocation, machine: str, snapshot: str) -> None:
    """Take MACHINE back to one of its snapshots (default: its newest). What it is now is stored first: rewinding to that
    undoes it."""
    answer = inv.server.call("POST", f"/v1/machines/{machine}/rewind", {"to": snapshot})
    report, kept = answer["resume"], answer["kept"]
    if kept is not None:
        inv.out.progress(f"{machine} as it was: {kept['id'][:16]}")
    inv.out.progress(f"rung {report['rung']} ({report['why']}) in {format_duration(report['seconds'])}")
    inv.out.data(answer, machine)


@click.command("diff")
@click.argument("left")
@click.argument("right")
@verb
def diff(inv: Invocation, left: str, right: str) -> None:
    """Show what changed from snapshot LEFT to snapshot RIGHT: files as Docker shows them (A, C, D), and processes."""
    found = inv.server.call("GET", f"/v1/snapshots/{left}/diff", query={"to": right})
    if inv.out.as_json or inv.out.template:
        inv.out.data(found)
        return
    if found["why_no_files"]:
        inv.out.progress(found["why_no_files"])
    for kind in ("files", "processes"):
        for letter, which in (("A", "added"), ("C", "changed"), ("D", "removed")):
            for name in (found[kind] or {}).get(which, ()):
                inv.out.line(f"{letter} {name}" if kind == "files" else f"{letter} process {name}")
    memory = found["memory"]
    inv.out.progress(f"memory: {memory['changed']} of {memory['pages_total']} pages differ")
