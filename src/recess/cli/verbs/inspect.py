"""`recess inspect`: everything known about something, and Docker's names for it where somebody asks by a template."""

from __future__ import annotations

import json
from typing import Any

import click

from recess.cli.common import Invocation, verb
from recess.cli.verbs.ps import shown_guest
from recess.errors import BadInput, NotFound
from recess.sdk.transport import Json

_PLACES = {
    "machine": "/v1/machines/{}",
    "session": "/v1/sessions/{}",
    "snapshot": "/v1/snapshots/{}",
    "image": "/v1/images/{}",
}


def with_dockers_names(row: Json) -> Json:
    """Return a machine with what Docker's users ask of one: .State.Status, .Config.Env, .NetworkSettings.Ports. Pure."""
    spec, state = row["spec"], row["state"]
    ports: dict[str, list[Json]] = {}
    for ip, host, guest in row["meta"].get("ports") or []:
        ports.setdefault(shown_guest(guest), []).append({"HostIp": ip, "HostPort": str(host)})
    return {
        **row,
        "State": {
            "Status": state, "Running": state == "running", "Paused": state == "paused", "ExitCode": row["exit_code"] or 0,
        },
        "Config": {
            "Image": spec["image"], "Cmd": spec["argv"], "Env": [f"{k}={v}" for k, v in spec["env"].items()],
            "Labels": spec["labels"], "WorkingDir": spec["cwd"], "User": spec["user"], "Tty": spec["tty"],
        },
        "HostConfig": {
            "Memory": spec["memory_bytes"], "AutoRemove": spec["remove_on_exit"], "NetworkMode": spec["network"],
            "RestartPolicy": {"Name": spec["restart"] or "no"},
        },
        "NetworkSettings": {"Ports": ports},
    }  # fmt: skip


@click.command("inspect")
@click.option("--type", "kind", type=click.Choice(list(_PLACES)), default=None, help="Look only there.")
@click.option("-f", "short", default="", metavar="TEMPLATE", help="The same as --format: '{{.State.Status}}'.")
@click.argument("refs", nargs=-1, required=True)
@verb
def inspect(inv: Invocation, refs: tuple[str, ...], kind: str | None, short: str) -> None:
    """Show everything known about REFS: machines, sessions, snapshots or images."""
    if short and inv.out.as_json:
        raise BadInput("--json and --format exclude each other", hint="-f json prints one document a row")
    inv.out.template = short or inv.out.template
    rows = [_find(inv, ref, kind) for ref in refs]
    if inv.out.template:
        rows = [with_dockers_names(row) if row["type"] == "machine" else row for row in rows]
    shown: Any = rows[0] if len(rows) == 1 else rows
    inv.out.data(shown, json.dumps(shown, indent=2))


def _find(inv: Invocation, ref: str, kind: str | None) -> Json:
    for name in [kind] if kind else list(_PLACES):
        try:
            return {"type": name, **inv.server.call("GET", _PLACES[name].format(ref))}
        except NotFound:
            continue
    raise NotFound(f"no {kind or 'machine, session, snapshot or image'} {ref!r}", hint="recess ps -a; recess images ls")
