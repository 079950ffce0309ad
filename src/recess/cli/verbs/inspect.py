"""`recess inspect`."""

from __future__ import annotations

import json

import click

from recess.cli.common import Invocation, verb
from recess.errors import NotFound

_PLACES = {
    "machine": "/v1/machines/{}",
    "session": "/v1/sessions/{}",
    "snapshot": "/v1/snapshots/{}",
    "image": "/v1/images/{}",
}


@click.command("inspect")
@click.option("--type", "kind", type=click.Choice(list(_PLACES)), default=None, help="Look only there.")
@click.argument("ref")
@verb
def inspect(inv: Invocation, ref: str, kind: str | None) -> None:
    """Show everything known about REF: a machine, session, snapshot or image."""
    for name in [kind] if kind else list(_PLACES):
        try:
            found = inv.server.call("GET", _PLACES[name].format(ref))
        except NotFound:
            continue
        inv.out.data({"type": name, **found}, json.dumps({"type": name, **found}, indent=2))
        return
    raise NotFound(f"no {kind or 'machine, session, snapshot or image'} {ref!r}", hint="recess ps -a; recess images ls")
