"""`recess snapshots ls|tree|inspect|diff|verify|tag|untag|rm|prune`, and those of `snapshot_transfer`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from recess.cli.common import Invocation, verb
from recess.cli.output import ago, short
from recess.cli.verbs.snapshot_transfer import TRANSFERS
from recess.cli.verbs.snapshot_tree import tree_lines
from recess.units import PAGE_BYTES, format_bytes, parse_duration


@click.group("snapshots")
def snapshots() -> None:
    """Manage snapshots. REF is an id, the start of one, NAME:TAG, or NAME for the newest taken under that name."""


@snapshots.command("ls")
@verb
def ls(inv: Invocation) -> None:
    """List snapshots; HERE tells whether this node can restore them (why not: inspect)."""
    found = inv.server.call("GET", "/v1/snapshots")["snapshots"]
    rows = [
        {
            **row,
            "short": short(row["id"]),
            "called": ", ".join(row["names"]),
            "age": ago(row["created"]),
            "stored": format_bytes(int(row["figures"].get("new_bytes", 0))),
            "here": _here(row),
        }
        for row in found
    ]
    if inv.out.as_json:
        inv.out.data(found)
        return
    columns = [
        ("SNAPSHOT", "short"), ("NAMES", "called"), ("MACHINE", "machine"), ("WHY", "why"), ("AT", "log_position"),
        ("CREATED", "age"), ("STORED", "stored"), ("HERE", "here"),
    ]  # fmt: skip
    inv.out.table(rows, columns)


def _here(row: Mapping[str, Any]) -> str:
    if not row["restorable"]:
        return "no"
    checked = row["figures"].get("checked") or {"ok": True}
    return "yes" if checked["ok"] else "failed its check"


@snapshots.command("tree")
@verb
def tree(inv: Invocation) -> None:
    """Show what stems from what: bytes owned and shared, and what removing would free, alone and with its branch."""
    found = inv.server.call("GET", "/v1/snapshots/tree")
    inv.out.data(found, "\n".join(tree_lines(found["nodes"], int(found["bytes"]))))


@snapshots.command("inspect")
@click.argument("ref")
@verb
def inspect(inv: Invocation, ref: str) -> None:
    """Show one snapshot: names, bytes, who needs it, and whether it can be restored here or why not."""
    row = inv.server.call("GET", f"/v1/snapshots/{ref}")
    inv.out.data(row, json.dumps(row, indent=2))


@snapshots.command("verify")
@click.option("--restore", is_flag=True, help="Also restore it for real in a scratch machine and compare its memory.")
@click.argument("ref")
@verb
def verify(inv: Invocation, ref: str, restore: bool) -> None:
    """Re-hash everything a snapshot needs."""
    report = inv.server.call("POST", f"/v1/snapshots/{ref}/verify", {"restore": restore})
    inv.out.data(report, "ok: " + ", ".join(f"{k} {v}" for k, v in report.items() if not isinstance(v, dict)))
    if report.get("restored"):
        inv.out.line("restored: " + ", ".join(f"{k} {v}" for k, v in report["restored"].items()))


@snapshots.command("diff")
@click.argument("left", metavar="A")
@click.argument("right", metavar="B")
@verb
def diff(inv: Invocation, left: str, right: str) -> None:
    """Show what changed from snapshot A to B: files, processes, memory. Both are looked at in scratch machines whose
    programs stand still; nothing runs."""
    found = inv.server.call("GET", f"/v1/snapshots/{left}/diff", query={"to": right})
    inv.out.data(found, "\n".join(diff_lines(found)))


def diff_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a diff's lines, for `session diff` too."""
    lines = []
    for what in ("files", "processes"):
        changes = found[what] or {}
        for kind, mark in (("added", "+"), ("removed", "-"), ("changed", "~")):
            # Names are the guest's: what a terminal would act on is shown, not sent.
            shown = [name if name.isprintable() else repr(name) for name in changes.get(kind, [])]
            lines += [f"{mark} {what[:4]} {name}" for name in shown]
    if found["why_no_files"]:
        lines.append(f"files and processes: {found['why_no_files']}")
    for part in ("memory", "disk"):
        pages = found[part]
        size = format_bytes(int(pages["changed"]) * PAGE_BYTES)
        lines.append(f"{part}: {pages['changed']} pages changed ({size}), {pages['zeroed']} of them to zeros")
    return lines


@snapshots.command("tag")
@click.argument("ref")
@click.argument("name")
@verb
def tag(inv: Invocation, ref: str, name: str) -> None:
    """Give REF the further name NAME[:TAG]; another snapshot that has it loses it."""
    answer = inv.server.call("POST", f"/v1/snapshots/{ref}/tag", {"name": name})
    if answer["moved_from"]:
        inv.out.progress(f"{name} was {short(answer['moved_from'])}")
    inv.out.data(answer, answer["id"])


@snapshots.command("untag")
@click.argument("names", nargs=-1, required=True)
@verb
def untag(inv: Invocation, names: tuple[str, ...]) -> None:
    """Take names away; the snapshots stay."""
    for name in names:
        inv.server.call("DELETE", f"/v1/snapshot-names/{name}")
        inv.out.line(name)
    if inv.out.as_json:
        inv.out.data(list(names))


@snapshots.command("rm")
@click.option("-f", "--force", is_flag=True, help="Also what others share (they keep it), logs name, or is damaged.")
@click.argument("refs", nargs=-1, required=True)
@verb
def rm(inv: Invocation, refs: tuple[str, ...], force: bool) -> None:
    """Remove snapshots and free their bytes; refused while something depends on them."""
    removed = []
    for ref in refs:
        gone = inv.server.call("DELETE", f"/v1/snapshots/{ref}", query={"force": "1" if force else None})
        inv.out.line(ref)
        inv.out.progress(f"freed {format_bytes(int(gone['bytes']))}")
        removed.append(gone)
    if inv.out.as_json:
        inv.out.data(removed)


@snapshots.command("prune")
@click.option(
    "--keep-last", type=click.IntRange(min=0), default=None, help="Newest that stay of each machine or session."
)
@click.option(
    "--older-than",
    "--ttl",
    "older_than",
    default=None,
    help="Only those older than this, like 7d (default: the retention).",
)
@click.option("-a", "--all", "everything", is_flag=True, help="Unnamed snapshots that you took, too.")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why.")
@verb
def prune(
    inv: Invocation, keep_last: int | None, older_than: str | None, everything: bool, dry_run: bool
) -> None:  # fmt: skip
    """Remove snapshots that Recess took by itself and nothing needs any more, expired ones, and garbage."""
    body: dict[str, Any] = {"all": everything, "dry_run": dry_run}
    if keep_last is not None:
        body["keep_last"] = keep_last
    if older_than is not None:
        body["older_than_s"] = parse_duration(older_than)
    answer = inv.server.call("POST", "/v1/snapshots/prune", body)
    for gone in answer["removed"]:
        inv.out.line(gone["id"] if inv.out.quiet else _gone_line(gone))
    inv.out.progress(
        f"would remove {len(answer['removed'])}" if dry_run else f"freed {format_bytes(int(answer['bytes']))}"
    )
    if inv.out.as_json:
        inv.out.data(answer)


def _gone_line(gone: Mapping[str, Any]) -> str:
    names: Sequence[str] = gone["names"]
    return f"{short(gone['id'])}   {', '.join(names) or '-'}   {gone['why']}"


for command in TRANSFERS:
    snapshots.add_command(command)
