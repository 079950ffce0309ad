"""`recess version`."""

from __future__ import annotations

import platform

import click

from recess import __version__
from recess.cli.common import Invocation, verb
from recess.sdk.local_server import is_up, transport_for


@click.command("version")
@verb
def version(inv: Invocation) -> None:
    """Show the versions of client and server (which is not started for it)."""
    data: dict[str, object] = {"client": __version__, "python": platform.python_version(), "server": None}
    transport = transport_for(inv.config)
    if is_up(transport):
        data["server"] = transport.call("GET", "/v1/info")["version"]
    inv.out.data(data, f"client {data['client']}\nserver {data['server'] or 'not running'}")
